//! OpenAI Responses: `instructions` and the items of `input`. OpenAI does not publish their token costs; these follow
//! the costs of chats and the usage in answers.

use super::chat::add_role;
use super::content::{MessageContent, member_count};
use crate::estimate::{ImageDetail, Prompt, PromptPart, ReferenceKind, Role, add_call_arguments, media};
use crate::json::{Expected, JsonVisitor, LooseText, element, raw, string, value};
use serde::de::{MapAccess, SeqAccess};
use std::borrow::Cow;

/// Counts `instructions`: a message before all others.
pub(super) fn instructions<'a>(prompt: &mut Prompt<'a>, text: Cow<'a, str>) {
    if !text.is_empty() {
        let first = prompt.text_count();
        prompt.add_text(PromptPart::Messages, text, 1);
        add_role(prompt, "developer");
        prompt.end_message(Role::System, first);
    }
}

/// `input`: a text, or a list of items.
pub(super) struct ResponsesInput<'p, 'a>(pub(super) &'p mut Prompt<'a>);

impl<'a> JsonVisitor<'a> for ResponsesInput<'_, 'a> {
    fn text(&mut self, text: Cow<'a, str>) -> Result<(), Expected> {
        let first = self.0.text_count();
        self.0.add_text(PromptPart::Messages, text, 1);
        let role = add_role(self.0, "user");
        self.0.end_message(role, first);
        Ok(())
    }

    fn element<S: SeqAccess<'a>>(&mut self, list: &mut S) -> Result<bool, S::Error> {
        let first_text = self.0.text_count();
        let mut item = InputItem {
            prompt: &mut *self.0,
            role: Cow::Borrowed(""),
            kind: Cow::Borrowed(""),
            arguments: 0,
            id: Cow::Borrowed(""),
            has_content: false,
            encrypted: Cow::Borrowed(""),
        };
        let is_some = element(list, &mut item)?;
        let InputItem { role, kind, arguments, id, has_content, encrypted, .. } = item;
        if kind.starts_with("compaction") {
            self.0.add_encrypted_summary(&encrypted);
        } else {
            self.0.add_encrypted_reasoning(&encrypted);
        }
        if is_some {
            if matches!(&*kind, "function_call" | "custom_tool_call") {
                self.0.end_call_item(!id.is_empty());
            } else {
                self.0.end_other_item();
            }
            refer(self.0, &kind, id, has_content);
            finish(self.0, &kind, &role, arguments, first_text);
        }
        Ok(is_some)
    }
}

/// Adds the reference that an item is.
fn refer<'a>(prompt: &mut Prompt<'a>, kind: &str, id: Cow<'a, str>, has_content: bool) {
    match kind {
        "item_reference" => prompt.refer_to_answer(ReferenceKind::Item, id),
        "reasoning" if !has_content && !id.is_empty() => {
            prompt.refer_to_answer(ReferenceKind::Reasoning, id);
        }
        _ => {}
    }
}

fn finish(prompt: &mut Prompt<'_>, kind: &str, role: &str, arguments: u64, first_text: usize) {
    match kind {
        "" | "message" => {
            let role = add_role(prompt, role);
            prompt.end_message(role, first_text);
        }
        // These have no role; a compaction is the provider's summary of earlier items.
        "item_reference" | "reasoning" | "compaction" | "compaction_summary" => {}
        "function_call" | "custom_tool_call" => {
            prompt.add_tool_call(arguments);
            prompt.end_message(Role::Other, first_text);
        }
        _ => prompt.end_message(Role::Other, first_text),
    }
}

struct InputItem<'p, 'a> {
    prompt: &'p mut Prompt<'a>,
    role: Cow<'a, str>,
    kind: Cow<'a, str>,
    /// The number of arguments of a call.
    arguments: u64,
    id: Cow<'a, str>,
    /// Whether the item has reasoning in a form that the model reads.
    has_content: bool,
    /// Content that only the provider can decrypt.
    encrypted: Cow<'a, str>,
}

impl<'a> JsonVisitor<'a> for InputItem<'_, 'a> {
    const FIELDS: &'static [&'static str] = &[
        "type",
        "role",
        "content",
        "output",
        "summary",
        "name",
        "arguments",
        "input",
        "encrypted_content",
        "result",
        "code",
        "tools",
        "id",
    ];

    fn text(&mut self, text: Cow<'a, str>) -> Result<(), Expected> {
        self.prompt.add_text(PromptPart::Messages, text, 1);
        Ok(())
    }

    fn field<M: MapAccess<'a>>(&mut self, name: &'static str, object: &mut M) -> Result<(), M::Error> {
        match name {
            "type" => self.kind = string(object)?,
            "role" => self.role = string(object)?,
            "id" => self.id = string(object)?,
            "content" | "output" => value(object, &mut MessageContent::of(self.prompt))?,
            // The prompt holds the reasoning itself, if anything, and not its summary.
            "summary" => {
                let mut text = LooseText::default();
                value(object, &mut text)?;
                self.prompt.add_reasoning(text.0);
            }
            "name" => self.prompt.add_text(PromptPart::Messages, string(object)?, 2),
            "arguments" => {
                let text = string(object)?;
                self.arguments = member_count(&text);
                add_call_arguments(self.prompt, text);
            }
            "encrypted_content" => {
                self.encrypted = string(object)?;
                self.has_content |= !self.encrypted.is_empty();
            }
            // Of `additional_tools`, and of lists that the provider loaded earlier.
            "tools" => self.prompt.add_loaded_tools(raw(object)?),
            // An image that the model generated earlier.
            "result" => {
                let base64 = string(object)?;
                if !base64.is_empty() {
                    self.prompt.add_image(media::image_size(&base64), ImageDetail::Auto);
                }
            }
            _ => self.prompt.add_text(PromptPart::Messages, string(object)?, 1),
        }
        Ok(())
    }
}
