//! OpenAI's Responses: `instructions` and the items of `input`. What their terms are is published nowhere; they
//! follow those of chats, and what answers report.

use super::chat::add_role;
use super::content::{Content, members};
use crate::estimate::{ImageDetail, Prompt, PromptPart, Role, media};
use crate::json::{Expected, LooseText, Take, element, string, value};
use serde::de::{MapAccess, SeqAccess};
use std::borrow::Cow;

/// `instructions`: a message before all others.
pub(super) fn instructions<'a>(prompt: &mut Prompt<'a>, text: Cow<'a, str>) {
    if !text.is_empty() {
        let first = prompt.text_count();
        prompt.add_text(PromptPart::Messages, text, 1);
        add_role(prompt, "developer");
        prompt.end_message(Role::System, first);
    }
}

/// Reasoning that only the provider can read: what is left of its base64 without what comes around it.
/// Fitted to 6 exchanges.
pub(super) fn encrypted(prompt: &mut Prompt<'_>, base64: &str) {
    const AROUND: u64 = 750;
    prompt.add_tokens(PromptPart::Messages, (base64.len() as u64 * 3 / 4).saturating_sub(AROUND) / 4);
}

/// `input`: a text, or a list of items.
pub(super) struct Input<'p, 'a>(pub(super) &'p mut Prompt<'a>);

impl<'a> Take<'a> for Input<'_, 'a> {
    fn text(&mut self, text: Cow<'a, str>) -> Result<(), Expected> {
        let first = self.0.text_count();
        self.0.add_text(PromptPart::Messages, text, 1);
        let role = add_role(self.0, "user");
        self.0.end_message(role, first);
        Ok(())
    }

    fn element<S: SeqAccess<'a>>(&mut self, list: &mut S) -> Result<bool, S::Error> {
        let first_text = self.0.text_count();
        let mut item =
            Item { prompt: &mut *self.0, role: Cow::Borrowed(""), kind: Cow::Borrowed(""), arguments: 0 };
        let there_is = element(list, &mut item)?;
        let Item { role, kind, arguments, .. } = item;
        if there_is {
            finish(self.0, &kind, &role, arguments, first_text);
        }
        Ok(there_is)
    }
}

fn finish(prompt: &mut Prompt<'_>, kind: &str, role: &str, arguments: u64, first_text: usize) {
    match kind {
        "" | "message" => {
            let role = add_role(prompt, role);
            prompt.end_message(role, first_text);
        }
        "item_reference" => prompt.unseen += 1,
        "function_call" | "custom_tool_call" => {
            prompt.add_tool_call(arguments);
            prompt.end_message(Role::Other, first_text);
        }
        "reasoning" => {}
        _ => prompt.end_message(Role::Other, first_text),
    }
}

struct Item<'p, 'a> {
    prompt: &'p mut Prompt<'a>,
    role: Cow<'a, str>,
    kind: Cow<'a, str>,
    /// How many a call has.
    arguments: u64,
}

impl<'a> Take<'a> for Item<'_, 'a> {
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
    ];

    fn text(&mut self, text: Cow<'a, str>) -> Result<(), Expected> {
        self.prompt.add_text(PromptPart::Messages, text, 1);
        Ok(())
    }

    fn field<M: MapAccess<'a>>(&mut self, name: &'static str, object: &mut M) -> Result<(), M::Error> {
        match name {
            "type" => self.kind = string(object)?,
            "role" => self.role = string(object)?,
            "content" | "output" => value(object, &mut Content::of(self.prompt))?,
            // What stands in the prompt is what was thought, if anything, and not what is said of it.
            "summary" => {
                let mut text = LooseText::default();
                value(object, &mut text)?;
                self.prompt.add_reasoning(text.0);
            }
            "name" => self.prompt.add_text(PromptPart::Messages, string(object)?, 2),
            "arguments" => {
                let text = string(object)?;
                self.arguments = members(&text);
                self.prompt.add_text(PromptPart::Messages, text, 1);
            }
            "encrypted_content" => encrypted(self.prompt, &string(object)?),
            // An image that was generated before.
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
