//! Gemini contents and their parts. Field names may be in camel case or snake case.

use super::chat::add_role;
use super::content::document;
use crate::estimate::{ImageDetail, Prompt, PromptPart, Role};
use crate::json::{Expected, JsonVisitor, Visit, element, optional, raw_unless_null, string, value};
use serde::de::{DeserializeSeed as _, MapAccess, SeqAccess};
use std::borrow::Cow;

/// Reads `systemInstruction`.
pub(super) fn system<'a, M: MapAccess<'a>>(prompt: &mut Prompt<'a>, object: &mut M) -> Result<(), M::Error> {
    let first = prompt.text_count();
    value(object, &mut GeminiContent::of(prompt))?;
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
        let mut content = GeminiContent::of(self.0);
        let is_some = element(list, &mut content)?;
        let role = match (content.is_model, content.has_own_content) {
            (true, _) => Role::Assistant,
            (false, true) => Role::User,
            (false, false) => Role::Other,
        };
        if is_some {
            add_role(self.0, "user");
            self.0.end_message(role, first);
        }
        Ok(is_some)
    }

    fn field<M: MapAccess<'a>>(&mut self, name: &'static str, object: &mut M) -> Result<(), M::Error> {
        GeminiContent::of(self.0).field(name, object)
    }
}

struct GeminiContent<'p, 'a> {
    prompt: &'p mut Prompt<'a>,
    /// Whether the author is the model.
    is_model: bool,
    /// Whether there is more than results of functions.
    has_own_content: bool,
}

impl<'p, 'a> GeminiContent<'p, 'a> {
    fn of(prompt: &'p mut Prompt<'a>) -> Self {
        Self { prompt, is_model: false, has_own_content: false }
    }
}

impl<'a> JsonVisitor<'a> for GeminiContent<'_, 'a> {
    const FIELDS: &'static [&'static str] = &["role", "parts"];

    fn text(&mut self, text: Cow<'a, str>) -> Result<(), Expected> {
        self.has_own_content = true;
        self.prompt.add_text(PromptPart::Messages, text, 1);
        Ok(())
    }

    fn field<M: MapAccess<'a>>(&mut self, name: &'static str, object: &mut M) -> Result<(), M::Error> {
        if name == "role" {
            return string(object).map(|role| self.is_model = role == "model");
        }
        let mut parts = GeminiParts { prompt: &mut *self.prompt, has_own_content: false };
        value(object, &mut parts)?;
        self.has_own_content = parts.has_own_content;
        Ok(())
    }
}

/// A list of parts, or one part.
struct GeminiParts<'p, 'a> {
    prompt: &'p mut Prompt<'a>,
    /// Whether there is more than results of functions.
    has_own_content: bool,
}

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
        element(list, self)
    }

    fn field<M: MapAccess<'a>>(&mut self, name: &'static str, object: &mut M) -> Result<(), M::Error> {
        self.has_own_content |=
            matches!(name, "text" | "inlineData" | "inline_data" | "fileData" | "file_data");
        match name {
            "text" => self.prompt.add_text(PromptPart::Messages, string(object)?, 1),
            "inlineData" | "inline_data" => {
                let mut blob: Option<InlineBlob> = None;
                optional(object, &mut blob)?;
                if let Some(InlineBlob { kind, data }) = blob {
                    document(self.prompt, &kind, "", &data);
                }
            }
            "thoughtSignature" | "thought_signature" => self.prompt.add_encrypted_reasoning(&string(object)?),
            "fileData" | "file_data" => {
                let Some(reference) = raw_unless_null(object)? else { return Ok(()) };
                let mut file = InlineBlob::default();
                drop(Visit(&mut file).deserialize(&mut serde_json::Deserializer::from_str(reference)));
                // Most models charge the same for every image.
                if file.kind.starts_with("image/") {
                    self.prompt.add_image_at(reference, ImageDetail::Auto);
                } else {
                    self.prompt.identify(reference);
                    self.prompt.unseen += 1;
                }
            }
            _ => {
                let mut part = CallOrResult { prompt: self.prompt, is_present: false };
                value(object, &mut part)?;
                if part.is_present && matches!(name, "functionCall" | "function_call") {
                    self.prompt.add_tool_call(0);
                }
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
struct CallOrResult<'p, 'a> {
    prompt: &'p mut Prompt<'a>,
    is_present: bool,
}

impl<'a> JsonVisitor<'a> for CallOrResult<'_, 'a> {
    const FIELDS: &'static [&'static str] = &["name", "args", "response", "code", "output", "parts"];

    fn object(&mut self) -> Result<(), Expected> {
        self.is_present = true;
        Ok(())
    }

    fn field<M: MapAccess<'a>>(&mut self, name: &'static str, object: &mut M) -> Result<(), M::Error> {
        match name {
            "args" | "response" => {
                let json = raw_unless_null(object)?.unwrap_or_default();
                self.prompt.add_text(PromptPart::Messages, Cow::Borrowed(json), 1);
            }
            "parts" => value(object, &mut GeminiParts { prompt: &mut *self.prompt, has_own_content: false })?,
            _ => self.prompt.add_text(PromptPart::Messages, string(object)?, 1),
        }
        Ok(())
    }
}
