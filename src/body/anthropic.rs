//! Anthropic Messages: `system` and `messages`, each a text or a list of blocks.

use super::chat::add_role;
use super::content::{document, member_count};
use crate::estimate::{ImageDetail, Prompt, PromptPart, Role, media};
use crate::json::{Expected, JsonVisitor, LooseText, element, optional, raw_unless_null, string, value};
use serde::de::{MapAccess, SeqAccess};
use std::borrow::Cow;

/// Tokens that the provider adds to a document, such as its index and its title. Fitted to 9 exchanges.
const TOKENS_PER_DOCUMENT: u64 = 30;
/// Tokens of the instructions on citing documents, which the provider adds if citations are enabled. Fitted to 6
/// exchanges.
const CITATION_TOKENS: u64 = 540;
/// Tokens of an empty user message. Fitted to 2 exchanges.
const EMPTY_USER_MESSAGE_TOKENS: u64 = 10;

/// Reads `system`.
pub(super) fn system<'a, M: MapAccess<'a>>(prompt: &mut Prompt<'a>, object: &mut M) -> Result<(), M::Error> {
    let first = prompt.text_count();
    value(object, &mut Blocks::of(prompt))?;
    if prompt.text_count() > first {
        let role = add_role(prompt, "system");
        prompt.end_message(role, first);
    }
    Ok(())
}

/// `messages` of Anthropic.
pub(super) struct AnthropicMessages<'p, 'a> {
    prompt: &'p mut Prompt<'a>,
    /// Messages read so far.
    count: u64,
}

impl<'p, 'a> AnthropicMessages<'p, 'a> {
    pub(super) fn of(prompt: &'p mut Prompt<'a>) -> Self {
        Self { prompt, count: 0 }
    }
}

const MESSAGE_LIST: Expected = Expected("a list of messages");

impl<'a> JsonVisitor<'a> for AnthropicMessages<'_, 'a> {
    fn text(&mut self, _: Cow<'a, str>) -> Result<(), Expected> {
        Err(MESSAGE_LIST)
    }

    fn number(&mut self, _: Option<u64>) -> Result<(), Expected> {
        Err(MESSAGE_LIST)
    }

    fn object(&mut self) -> Result<(), Expected> {
        Err(MESSAGE_LIST)
    }

    fn element<S: SeqAccess<'a>>(&mut self, list: &mut S) -> Result<bool, S::Error> {
        let (first, calls) = (self.prompt.text_count(), self.prompt.call_count());
        let mut message =
            AnthropicMessage { prompt: &mut *self.prompt, role: Cow::Borrowed(""), has_own_content: false };
        let is_some = element(list, &mut message)?;
        let AnthropicMessage { role, has_own_content, .. } = message;
        if is_some {
            // If the first message is not the user's, the provider inserts an empty one before it.
            if self.count == 0 && role == "assistant" {
                self.prompt.add_tokens(PromptPart::Overhead, EMPTY_USER_MESSAGE_TOKENS);
            }
            self.count += 1;
            let role = match add_role(self.prompt, &role) {
                Role::User if !has_own_content => Role::Other,
                role => role,
            };
            self.prompt.end_tool_calls(self.prompt.call_count() - calls, false);
            self.prompt.end_message(role, first);
        }
        Ok(is_some)
    }
}

struct AnthropicMessage<'p, 'a> {
    prompt: &'p mut Prompt<'a>,
    role: Cow<'a, str>,
    /// Whether there is more than results of tools.
    has_own_content: bool,
}

impl<'a> JsonVisitor<'a> for AnthropicMessage<'_, 'a> {
    const FIELDS: &'static [&'static str] = &["role", "content"];

    fn field<M: MapAccess<'a>>(&mut self, name: &'static str, object: &mut M) -> Result<(), M::Error> {
        if name == "role" {
            self.role = string(object)?;
            return Ok(());
        }
        let mut blocks = Blocks::of(self.prompt);
        value(object, &mut blocks)?;
        self.has_own_content = blocks.has_own_content;
        Ok(())
    }
}

/// A text, or a list of blocks.
struct Blocks<'p, 'a> {
    prompt: &'p mut Prompt<'a>,
    /// Whether there is more than results of tools.
    has_own_content: bool,
}

impl<'p, 'a> Blocks<'p, 'a> {
    fn of(prompt: &'p mut Prompt<'a>) -> Self {
        Self { prompt, has_own_content: false }
    }
}

impl<'a> JsonVisitor<'a> for Blocks<'_, 'a> {
    /// Of the result of a search for tools.
    const FIELDS: &'static [&'static str] = &["tool_references"];

    fn field<M: MapAccess<'a>>(&mut self, _: &'static str, object: &mut M) -> Result<(), M::Error> {
        value(object, self)
    }

    fn text(&mut self, text: Cow<'a, str>) -> Result<(), Expected> {
        self.has_own_content = true;
        self.prompt.add_text(PromptPart::Messages, text, 1);
        Ok(())
    }

    fn element<S: SeqAccess<'a>>(&mut self, list: &mut S) -> Result<bool, S::Error> {
        let mut block = MessageBlock {
            prompt: &mut *self.prompt,
            kind: Cow::Borrowed(""),
            source: None,
            name: Cow::Borrowed(""),
            arguments: 0,
            thinking: Cow::Borrowed(""),
            signature: Cow::Borrowed(""),
        };
        let is_some = element(list, &mut block)?;
        self.has_own_content |= is_some && block.kind != "tool_result";
        block.finish();
        Ok(is_some)
    }
}

struct MessageBlock<'p, 'a> {
    prompt: &'p mut Prompt<'a>,
    kind: Cow<'a, str>,
    source: Option<BlockSource<'a>>,
    name: Cow<'a, str>,
    /// The number of arguments of a call.
    arguments: u64,
    thinking: Cow<'a, str>,
    /// The encrypted form of `thinking`, or of redacted thinking.
    signature: Cow<'a, str>,
}

impl<'a> JsonVisitor<'a> for MessageBlock<'_, 'a> {
    const FIELDS: &'static [&'static str] = &[
        "type",
        "text",
        "thinking",
        "signature",
        "source",
        "content",
        "input",
        "name",
        "title",
        "context",
        "data",
        "citations",
        "tool_name",
    ];

    fn text(&mut self, text: Cow<'a, str>) -> Result<(), Expected> {
        self.prompt.add_text(PromptPart::Messages, text, 1);
        Ok(())
    }

    fn field<M: MapAccess<'a>>(&mut self, name: &'static str, object: &mut M) -> Result<(), M::Error> {
        match name {
            "type" => self.kind = string(object)?,
            "source" => optional(object, &mut self.source)?,
            "content" => value(object, &mut Blocks::of(self.prompt))?,
            // The arguments of a call, as JSON.
            "input" => {
                let Some(input) = raw_unless_null(object)? else { return Ok(()) };
                self.arguments = member_count(input);
                self.prompt.add_text(PromptPart::Messages, Cow::Borrowed(input), 1);
            }
            "name" => self.name = string(object)?,
            // Of a `tool_reference`.
            "tool_name" => {
                let name = string(object)?;
                self.prompt.load_tool(name);
            }
            "citations" => value(object, &mut Citations(self.prompt))?,
            "thinking" => self.thinking = string(object)?,
            "signature" | "data" => {
                let signature = string(object)?;
                if !signature.is_empty() {
                    self.signature = signature;
                }
            }
            _ => {
                let mut text = LooseText::default();
                value(object, &mut text)?;
                self.prompt.add_text(PromptPart::Messages, text.0, 1);
            }
        }
        Ok(())
    }
}

impl MessageBlock<'_, '_> {
    fn finish(self) {
        let Self { prompt, kind, source, name, arguments, thinking, signature } = self;
        if thinking.is_empty() {
            prompt.add_encrypted_reasoning(&signature);
        } else {
            prompt.add_reasoning(thinking);
        }
        if kind == "tool_use" {
            prompt.add_tool_call(arguments);
        }
        prompt.add_text(PromptPart::Messages, name, 1);
        match (&*kind, source) {
            ("image", source) => {
                let BlockSource { data, reference, .. } = source.unwrap_or_default();
                if data.is_empty() {
                    prompt.add_image_at(&reference, ImageDetail::Auto);
                } else {
                    prompt.identify(&reference);
                    prompt.add_image(media::image_size(&data), ImageDetail::Auto);
                }
            }
            (_, Some(source)) => {
                prompt.add_tokens(PromptPart::Messages, TOKENS_PER_DOCUMENT);
                source.add_to(prompt);
            }
            _ => {}
        }
    }
}

/// `citations`: an object in a request; a list in an answer that the caller sends back.
struct Citations<'p, 'a>(&'p mut Prompt<'a>);

impl<'a> JsonVisitor<'a> for Citations<'_, 'a> {
    const FIELDS: &'static [&'static str] = &["enabled"];

    fn boolean(&mut self, enabled: bool) -> Result<(), Expected> {
        if enabled {
            self.0.add_tokens(PromptPart::Messages, CITATION_TOKENS);
        }
        Ok(())
    }

    fn field<M: MapAccess<'a>>(&mut self, _: &'static str, object: &mut M) -> Result<(), M::Error> {
        value(object, self)
    }
}

/// `source` of a document or image.
#[derive(Default)]
struct BlockSource<'a> {
    kind: Cow<'a, str>,
    media_type: Cow<'a, str>,
    data: Cow<'a, str>,
    content: LooseText<'a>,
    /// The id or URL of content outside the request.
    reference: Cow<'a, str>,
}

impl<'a> JsonVisitor<'a> for BlockSource<'a> {
    const FIELDS: &'static [&'static str] = &["type", "media_type", "data", "content", "url", "file_id"];

    fn field<M: MapAccess<'a>>(&mut self, name: &'static str, object: &mut M) -> Result<(), M::Error> {
        match name {
            "type" => self.kind = string(object)?,
            "media_type" => self.media_type = string(object)?,
            "data" => self.data = string(object)?,
            "url" | "file_id" => self.reference = string(object)?,
            _ => value(object, &mut self.content)?,
        }
        Ok(())
    }
}

impl<'a> BlockSource<'a> {
    fn add_to(self, prompt: &mut Prompt<'a>) {
        match &*self.kind {
            "text" => prompt.add_text(PromptPart::Messages, self.data, 1),
            "base64" => document(prompt, &self.media_type, "", &self.data),
            "content" => prompt.add_text(PromptPart::Messages, self.content.0, 1),
            _ => {
                prompt.identify(&self.reference);
                prompt.unseen += 1;
            }
        }
    }
}
