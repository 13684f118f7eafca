//! Gemini contents and their parts. Field names may be in camel case or snake case.

use super::chat::add_role;
use super::content::document;
use crate::estimate::{Prompt, PromptPart, Role};
use crate::json::{Expected, JsonVisitor, element, raw, string, value};
use serde::de::{MapAccess, SeqAccess};
use std::borrow::Cow;

/// Reads `systemInstruction`.
pub(super) fn system<'a, M: MapAccess<'a>>(prompt: &mut Prompt<'a>, object: &mut M) -> Result<(), M::Error> {
    let first = prompt.text_count();
    value(object, &mut GeminiContent(prompt))?;
    if prompt.text_count() > first {
        prompt.end_message(Role::System, first);
    }
    Ok(())
}

/// `contents`: a list of contents, or one content.
pub(super) struct GeminiContents<'p, 'a>(pub(super) &'p mut Prompt<'a>);

impl<'a> JsonVisitor<'a> for GeminiContents<'_, 'a> {
    const FIELDS: &'static [&'static str] = GeminiContent::FIELDS;

    fn text(&mut self, text: Cow<'a, str>) -> Result<(), Expected> {
        self.0.add_text(PromptPart::Messages, text, 1);
        Ok(())
    }

    fn element<S: SeqAccess<'a>>(&mut self, list: &mut S) -> Result<bool, S::Error> {
        let first = self.0.text_count();
        let is_some = element(list, &mut GeminiContent(self.0))?;
        if is_some {
            add_role(self.0, "user");
            self.0.end_message(Role::Other, first);
        }
        Ok(is_some)
    }

    fn field<M: MapAccess<'a>>(&mut self, name: &'static str, object: &mut M) -> Result<(), M::Error> {
        GeminiContent(self.0).field(name, object)
    }
}

struct GeminiContent<'p, 'a>(&'p mut Prompt<'a>);

impl<'a> JsonVisitor<'a> for GeminiContent<'_, 'a> {
    const FIELDS: &'static [&'static str] = &["role", "parts"];

    fn text(&mut self, text: Cow<'a, str>) -> Result<(), Expected> {
        self.0.add_text(PromptPart::Messages, text, 1);
        Ok(())
    }

    fn field<M: MapAccess<'a>>(&mut self, name: &'static str, object: &mut M) -> Result<(), M::Error> {
        match name {
            "role" => string(object).map(drop),
            _ => value(object, &mut GeminiParts(self.0)),
        }
    }
}

/// A list of parts, or one part.
struct GeminiParts<'p, 'a>(&'p mut Prompt<'a>);

impl<'a> JsonVisitor<'a> for GeminiParts<'_, 'a> {
    const FIELDS: &'static [&'static str] = &[
        "text",
        "inlineData",
        "inline_data",
        "fileData",
        "file_data",
        "functionCall",
        "function_call",
        "functionResponse",
        "function_response",
        "executableCode",
        "executable_code",
        "codeExecutionResult",
        "code_execution_result",
        "thoughtSignature",
        "thought_signature",
    ];

    fn element<S: SeqAccess<'a>>(&mut self, list: &mut S) -> Result<bool, S::Error> {
        element(list, &mut GeminiParts(self.0))
    }

    fn field<M: MapAccess<'a>>(&mut self, name: &'static str, object: &mut M) -> Result<(), M::Error> {
        match name {
            "text" => self.0.add_text(PromptPart::Messages, string(object)?, 1),
            "inlineData" | "inline_data" => {
                let mut blob = InlineBlob::default();
                value(object, &mut blob)?;
                document(self.0, &blob.kind, "", &blob.data);
            }
            "thoughtSignature" | "thought_signature" => self.0.add_encrypted_reasoning(&string(object)?),
            "fileData" | "file_data" => {
                self.0.identify(raw(object)?);
                self.0.unseen += 1;
            }
            _ => {
                if matches!(name, "functionCall" | "function_call") {
                    self.0.add_tool_call(0);
                }
                value(object, &mut CallOrResult(self.0))?;
            }
        }
        Ok(())
    }
}

#[derive(Default)]
struct InlineBlob<'a> {
    kind: Cow<'a, str>,
    data: Cow<'a, str>,
}

impl<'a> JsonVisitor<'a> for InlineBlob<'a> {
    const FIELDS: &'static [&'static str] = &["mimeType", "mime_type", "data"];

    fn field<M: MapAccess<'a>>(&mut self, name: &'static str, object: &mut M) -> Result<(), M::Error> {
        match name {
            "data" => self.data = string(object)?,
            _ => self.kind = string(object)?,
        }
        Ok(())
    }
}

/// A call of a function or of code, or its result. Names and values are counted.
struct CallOrResult<'p, 'a>(&'p mut Prompt<'a>);

impl<'a> JsonVisitor<'a> for CallOrResult<'_, 'a> {
    const FIELDS: &'static [&'static str] = &["name", "args", "response", "code", "output", "parts"];

    fn field<M: MapAccess<'a>>(&mut self, name: &'static str, object: &mut M) -> Result<(), M::Error> {
        match name {
            "args" | "response" => self.0.add_text(PromptPart::Messages, Cow::Borrowed(raw(object)?), 1),
            "parts" => value(object, &mut GeminiParts(self.0))?,
            _ => self.0.add_text(PromptPart::Messages, string(object)?, 1),
        }
        Ok(())
    }
}
