//! Anthropic's messages: `system` and `messages`, each a text or a list of blocks.

use super::chat::add_role;
use super::content::{document, members};
use crate::estimate::{ImageDetail, Prompt, PromptPart, media};
use crate::json::{Expected, LooseText, Take, element, raw, string, value};
use serde::de::{MapAccess, SeqAccess};
use std::borrow::Cow;

/// What stands around a document: its index, its title and the like. Fitted to 9 exchanges.
const AROUND_A_DOCUMENT: u64 = 30;
/// How answers cite documents is told where that is asked for. Fitted to 6 exchanges.
const CITATIONS: u64 = 540;
/// Fitted to 2 exchanges.
const EMPTY_QUESTION: u64 = 10;

/// `system`.
pub(super) fn system<'a, M: MapAccess<'a>>(prompt: &mut Prompt<'a>, object: &mut M) -> Result<(), M::Error> {
    let first = prompt.text_count();
    value(object, &mut Blocks(prompt))?;
    if prompt.text_count() > first {
        let role = add_role(prompt, "system");
        prompt.end_message(role, first);
    }
    Ok(())
}

/// `messages`.
pub(super) struct Messages<'p, 'a> {
    prompt: &'p mut Prompt<'a>,
    /// How many there were so far.
    count: u64,
}

impl<'p, 'a> Messages<'p, 'a> {
    pub(super) fn of(prompt: &'p mut Prompt<'a>) -> Self {
        Self { prompt, count: 0 }
    }
}

const A_LIST: Expected = Expected("a list of messages");

impl<'a> Take<'a> for Messages<'_, 'a> {
    fn text(&mut self, _: Cow<'a, str>) -> Result<(), Expected> {
        Err(A_LIST)
    }

    fn number(&mut self, _: Option<u64>) -> Result<(), Expected> {
        Err(A_LIST)
    }

    fn object(&mut self) -> Result<(), Expected> {
        Err(A_LIST)
    }

    fn element<S: SeqAccess<'a>>(&mut self, list: &mut S) -> Result<bool, S::Error> {
        let first = self.prompt.text_count();
        let mut message = Message { prompt: &mut *self.prompt, role: Cow::Borrowed("") };
        let there_is = element(list, &mut message)?;
        let Message { role, .. } = message;
        if there_is {
            // The first one is the user's; where it is not, an empty one is put before it.
            if self.count == 0 && role == "assistant" {
                self.prompt.add_tokens(PromptPart::Overhead, EMPTY_QUESTION);
            }
            self.count += 1;
            let role = add_role(self.prompt, &role);
            self.prompt.end_message(role, first);
        }
        Ok(there_is)
    }
}

struct Message<'p, 'a> {
    prompt: &'p mut Prompt<'a>,
    role: Cow<'a, str>,
}

impl<'a> Take<'a> for Message<'_, 'a> {
    const FIELDS: &'static [&'static str] = &["role", "content"];

    fn field<M: MapAccess<'a>>(&mut self, name: &'static str, object: &mut M) -> Result<(), M::Error> {
        match name {
            "role" => string(object).map(|role| self.role = role),
            _ => value(object, &mut Blocks(self.prompt)),
        }
    }
}

/// A text, or a list of blocks.
struct Blocks<'p, 'a>(&'p mut Prompt<'a>);

impl<'a> Take<'a> for Blocks<'_, 'a> {
    fn text(&mut self, text: Cow<'a, str>) -> Result<(), Expected> {
        self.0.add_text(PromptPart::Messages, text, 1);
        Ok(())
    }

    fn element<S: SeqAccess<'a>>(&mut self, list: &mut S) -> Result<bool, S::Error> {
        let mut block = Block {
            prompt: &mut *self.0,
            kind: Cow::Borrowed(""),
            source: None,
            name: Cow::Borrowed(""),
            arguments: 0,
        };
        let there_is = element(list, &mut block)?;
        block.finish();
        Ok(there_is)
    }
}

struct Block<'p, 'a> {
    prompt: &'p mut Prompt<'a>,
    kind: Cow<'a, str>,
    source: Option<Source<'a>>,
    name: Cow<'a, str>,
    /// How many a call has.
    arguments: u64,
}

impl<'a> Take<'a> for Block<'_, 'a> {
    const FIELDS: &'static [&'static str] = &[
        "type",
        "text",
        "thinking",
        "source",
        "content",
        "input",
        "name",
        "title",
        "context",
        "data",
        "citations",
    ];

    fn text(&mut self, text: Cow<'a, str>) -> Result<(), Expected> {
        self.prompt.add_text(PromptPart::Messages, text, 1);
        Ok(())
    }

    fn field<M: MapAccess<'a>>(&mut self, name: &'static str, object: &mut M) -> Result<(), M::Error> {
        match name {
            "type" => self.kind = string(object)?,
            "source" => value(object, self.source.get_or_insert_default())?,
            "content" => value(object, &mut Blocks(self.prompt))?,
            // The arguments of a call, as JSON.
            "input" => {
                let input = raw(object)?;
                self.arguments = members(input);
                self.prompt.add_text(PromptPart::Messages, Cow::Borrowed(input), 1);
            }
            "name" => self.name = string(object)?,
            "citations" => value(object, &mut Citations(self.prompt))?,
            // Thinking that is not shown.
            "data" => self.prompt.add_tokens(PromptPart::Messages, string(object)?.len() as u64 * 3 / 16),
            _ => {
                let mut text = LooseText::default();
                value(object, &mut text)?;
                self.prompt.add_text(PromptPart::Messages, text.0, 1);
            }
        }
        Ok(())
    }
}

impl Block<'_, '_> {
    fn finish(self) {
        let Self { prompt, kind, source, name, arguments } = self;
        if kind == "tool_use" {
            prompt.add_tool_call(arguments);
        }
        prompt.add_text(PromptPart::Messages, name, 1);
        match (&*kind, source) {
            ("image", source) => {
                let data = source.map(|s| s.data).unwrap_or_default();
                prompt.add_image(media::image_size(&data), ImageDetail::Auto);
            }
            (_, Some(source)) => {
                prompt.add_tokens(PromptPart::Messages, AROUND_A_DOCUMENT);
                source.add_to(prompt);
            }
            _ => {}
        }
    }
}

/// `citations`: an object in a question; in an answer they are a list.
struct Citations<'p, 'a>(&'p mut Prompt<'a>);

impl<'a> Take<'a> for Citations<'_, 'a> {
    const FIELDS: &'static [&'static str] = &["enabled"];

    fn boolean(&mut self, enabled: bool) -> Result<(), Expected> {
        if enabled {
            self.0.add_tokens(PromptPart::Messages, CITATIONS);
        }
        Ok(())
    }

    fn field<M: MapAccess<'a>>(&mut self, _: &'static str, object: &mut M) -> Result<(), M::Error> {
        value(object, self)
    }
}

/// Where the bytes of a document are.
#[derive(Default)]
struct Source<'a> {
    kind: Cow<'a, str>,
    media_type: Cow<'a, str>,
    data: Cow<'a, str>,
    content: LooseText<'a>,
}

impl<'a> Take<'a> for Source<'a> {
    const FIELDS: &'static [&'static str] = &["type", "media_type", "data", "content"];

    fn field<M: MapAccess<'a>>(&mut self, name: &'static str, object: &mut M) -> Result<(), M::Error> {
        match name {
            "type" => self.kind = string(object)?,
            "media_type" => self.media_type = string(object)?,
            "data" => self.data = string(object)?,
            _ => value(object, &mut self.content)?,
        }
        Ok(())
    }
}

impl<'a> Source<'a> {
    fn add_to(self, prompt: &mut Prompt<'a>) {
        match &*self.kind {
            "text" => prompt.add_text(PromptPart::Messages, self.data, 1),
            "base64" => document(prompt, &self.media_type, "", &self.data),
            "content" => prompt.add_text(PromptPart::Messages, self.content.0, 1),
            _ => prompt.unseen += 1,
        }
    }
}
