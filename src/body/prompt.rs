//! The parts of a body that the model reads: collected as texts to count and tokens that are known.
//!
//! Message rules: 3 tokens a message and 3 for the reply (OpenAI's cookbook); the terms of tool calls
//! and results were fitted to counts that the API reported.

use crate::estimate::{Part, Prompt};
use crate::json::LooseText;
use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use std::borrow::Cow;
use std::fmt;

use super::Api;

/// An image whose size is not looked at: 1,024 by 1,024 in high detail by the gpt-4o rule.
const IMAGE_TOKENS: u64 = 765;
const IMAGE_TOKENS_LOW_DETAIL: u64 = 85;
/// Audio whose length is not looked at: a minute at ten tokens a second.
const AUDIO_TOKENS: u64 = 600;
/// A file that is not looked into.
const FILE_TOKENS: u64 = 2_000;

impl<'a> Prompt<'a> {
    /// Adds what holds for the request as a whole.
    pub(super) fn finish(&mut self, api: Api) {
        match api {
            Api::Chat => self.add(Part::Overhead, 3),
            // Without a prompt the model starts from its end-of-text token.
            Api::Completions if self.prompts == 0 => self.add(Part::Overhead, 1),
            Api::Completions | Api::Embeddings => {}
        }
    }

    /// Counts tool and schema definitions as the JSON they are written in.
    pub(super) fn definition(&mut self, field: &str, json: &'a str) {
        match field {
            "tools" | "functions" => {
                self.count(Part::Tools, Cow::Borrowed(json), 1);
                self.add(Part::Tools, 9);
            }
            "response_format" if json.contains("json_schema") => {
                self.count(Part::Schema, Cow::Borrowed(json), 1);
                self.add(Part::Schema, 10);
            }
            _ => {}
        }
    }

    fn message(&mut self, message: Message<'a>) {
        let Message { role, content, name, refusal, function_call, tool_calls } = message;
        self.add(
            Part::Overhead,
            match &*role.0 {
                "function" => 1,
                "tool" => 2,
                _ => 3,
            },
        );
        self.count(Part::Messages, role.0, 1);
        if !name.0.is_empty() {
            self.count(Part::Messages, name.0, 1);
            self.add(Part::Overhead, 1);
        }
        self.count(Part::Messages, refusal.0, 1);
        let has_content = self.content(content);
        if let Some(call) = function_call {
            self.add(Part::Messages, 3);
            self.call(call, 1);
        }
        let calls = tool_calls.unwrap_or_default();
        if !calls.is_empty() {
            self.add(Part::Messages, if calls.len() > 1 { 15 } else { 0 } + if has_content { 6 } else { 0 });
        }
        for call in calls {
            self.add(Part::Messages, 4);
            self.call(call.function.unwrap_or_default(), 2);
        }
    }

    fn call(&mut self, call: Function<'a>, times_name: u32) {
        self.count(Part::Messages, call.name.0, times_name);
        self.count(Part::Messages, call.arguments.0, 1);
    }

    /// Returns whether there is any.
    fn content(&mut self, content: Content<'a>) -> bool {
        match content {
            Content::Text(text) => {
                let any = !text.is_empty();
                self.count(Part::Messages, text, 1);
                any
            }
            Content::Parts(parts) => {
                let any = !parts.is_empty();
                parts.into_iter().for_each(|part| self.part(part));
                any
            }
        }
    }

    fn part(&mut self, part: ContentPart<'a>) {
        match &*part.kind.0 {
            "image_url" | "input_image" => {
                let low = part.image_url.is_some_and(|i| i.detail.0 == "low");
                self.add(Part::Images, if low { IMAGE_TOKENS_LOW_DETAIL } else { IMAGE_TOKENS });
            }
            "input_audio" => self.add(Part::Messages, AUDIO_TOKENS),
            "file" | "input_file" => self.add(Part::Messages, FILE_TOKENS),
            _ => {
                self.count(Part::Messages, part.text.0, 1);
                self.count(Part::Messages, part.refusal.0, 1);
            }
        }
    }
}

#[derive(Deserialize)]
struct Message<'a> {
    #[serde(borrow, default)]
    role: LooseText<'a>,
    #[serde(borrow, default)]
    content: Content<'a>,
    #[serde(borrow, default)]
    name: LooseText<'a>,
    #[serde(borrow, default)]
    refusal: LooseText<'a>,
    #[serde(borrow)]
    function_call: Option<Function<'a>>,
    #[serde(borrow)]
    tool_calls: Option<Vec<ToolCall<'a>>>,
}

#[derive(Deserialize)]
struct ToolCall<'a> {
    #[serde(borrow)]
    function: Option<Function<'a>>,
}

#[derive(Default, Deserialize)]
struct Function<'a> {
    #[serde(borrow, default)]
    name: LooseText<'a>,
    #[serde(borrow, default)]
    arguments: LooseText<'a>,
}

#[derive(Deserialize)]
struct ContentPart<'a> {
    #[serde(borrow, default, rename = "type")]
    kind: LooseText<'a>,
    #[serde(borrow, default)]
    text: LooseText<'a>,
    #[serde(borrow, default)]
    refusal: LooseText<'a>,
    #[serde(borrow)]
    image_url: Option<Image<'a>>,
}

/// An image part's `image_url`: an object, or in some dialects the bare URL.
#[derive(Default)]
struct Image<'a> {
    detail: LooseText<'a>,
}

impl<'de: 'a, 'a> Deserialize<'de> for Image<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;
        impl<'de> Visitor<'de> for Either {
            type Value = Image<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an image URL, or an object that has one")
            }

            fn visit_str<E>(self, _: &str) -> Result<Image<'de>, E> {
                Ok(Image::default())
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Image<'de>, A::Error> {
                let mut image = Image::default();
                while let Some(key) = map.next_key::<LooseText<'de>>()? {
                    if key.0 == "detail" {
                        image.detail = map.next_value()?;
                    } else {
                        map.next_value::<IgnoredAny>()?;
                    }
                }
                Ok(image)
            }
        }
        deserializer.deserialize_any(Either)
    }
}

enum Content<'a> {
    Text(Cow<'a, str>),
    Parts(Vec<ContentPart<'a>>),
}

impl Default for Content<'_> {
    fn default() -> Self {
        Self::Text(Cow::Borrowed(""))
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Content<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;
        impl<'de> Visitor<'de> for Any {
            type Value = Content<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or a list of content parts")
            }

            fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Content<'de>, E> {
                Ok(Content::Text(Cow::Borrowed(text)))
            }

            fn visit_str<E>(self, text: &str) -> Result<Content<'de>, E> {
                Ok(Content::Text(Cow::Owned(text.to_owned())))
            }

            fn visit_unit<E>(self) -> Result<Content<'de>, E> {
                Ok(Content::default())
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Content<'de>, A::Error> {
                let mut parts = Vec::new();
                while let Some(part) = seq.next_element()? {
                    parts.push(part);
                }
                Ok(Content::Parts(parts))
            }
        }
        deserializer.deserialize_any(Any)
    }
}

/// Reads `messages`.
pub(super) struct Messages<'p, 'a>(pub(super) &'p mut Prompt<'a>);

impl<'a> DeserializeSeed<'a> for Messages<'_, 'a> {
    type Value = ();

    fn deserialize<D: Deserializer<'a>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'a> Visitor<'a> for Messages<'_, 'a> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of messages")
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'a>>(self, mut seq: A) -> Result<(), A::Error> {
        while let Some(message) = seq.next_element::<Message>()? {
            self.0.message(message);
        }
        Ok(())
    }
}

/// Reads `prompt` or `input`: a string, a list of strings, a list of tokens, a list of such lists.
pub(super) struct Inputs<'p, 'a>(pub(super) &'p mut Prompt<'a>);

impl<'a> DeserializeSeed<'a> for Inputs<'_, 'a> {
    type Value = ();

    fn deserialize<D: Deserializer<'a>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(Input { prompt: self.0, depth: 0 }).map(|_| ())
    }
}

struct Input<'p, 'a> {
    prompt: &'p mut Prompt<'a>,
    depth: u8,
}

/// What one element was: tokens of a list are one prompt together, texts are one each.
enum Element {
    Token,
    Whole,
}

impl<'a> DeserializeSeed<'a> for Input<'_, 'a> {
    type Value = Element;

    fn deserialize<D: Deserializer<'a>>(self, deserializer: D) -> Result<Element, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'a> Visitor<'a> for Input<'_, 'a> {
    type Value = Element;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string, a list of strings, a list of tokens or a list of lists of tokens")
    }

    fn visit_unit<E>(self) -> Result<Element, E> {
        Ok(Element::Whole)
    }

    fn visit_borrowed_str<E>(self, text: &'a str) -> Result<Element, E> {
        self.prompt.prompts += 1;
        self.prompt.count(Part::Messages, Cow::Borrowed(text), 1);
        Ok(Element::Whole)
    }

    fn visit_str<E>(self, text: &str) -> Result<Element, E> {
        self.prompt.prompts += 1;
        self.prompt.count(Part::Messages, Cow::Owned(text.to_owned()), 1);
        Ok(Element::Whole)
    }

    fn visit_u64<E>(self, _: u64) -> Result<Element, E> {
        self.prompt.add(Part::Messages, 1);
        Ok(Element::Token)
    }

    fn visit_seq<A: SeqAccess<'a>>(self, mut seq: A) -> Result<Element, A::Error> {
        if self.depth > 1 {
            return Err(serde::de::Error::custom("lists nested more than twice"));
        }
        let mut of_tokens = false;
        while let Some(e) =
            seq.next_element_seed(Input { prompt: &mut *self.prompt, depth: self.depth + 1 })?
        {
            of_tokens |= matches!(e, Element::Token);
        }
        self.prompt.prompts += u64::from(of_tokens);
        Ok(Element::Whole)
    }
}

/// Reads `suffix`.
pub(super) struct Suffix<'p, 'a>(pub(super) &'p mut Prompt<'a>);

impl<'a> DeserializeSeed<'a> for Suffix<'_, 'a> {
    type Value = ();

    fn deserialize<D: Deserializer<'a>>(self, deserializer: D) -> Result<(), D::Error> {
        let text = LooseText::deserialize(deserializer)?;
        self.0.count(Part::Messages, text.0, 1);
        Ok(())
    }
}
