//! Reads usage objects in the shape of any provider.

use super::{Field, Reported};
use crate::json::Text;
use crate::quota::MAX_AMOUNT;
use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;
use std::fmt;

/// The meaning of a key of a usage object.
#[derive(Clone, Copy)]
enum FieldShape {
    /// A number of tokens.
    Number(Field),
    /// An object with more keys.
    Object(&'static [(&'static str, FieldShape)]),
}

use FieldShape::{Number, Object};

/// Keys by provider. A key that several providers use means the same for all.
const USAGE: &[(&str, FieldShape)] = &[
    // OpenAI, Azure and most others. The Responses API and Anthropic use `input_` and `output_`.
    ("prompt_tokens", Number(Field::Prompt)),
    ("input_tokens", Number(Field::Prompt)),
    ("completion_tokens", Number(Field::Completion)),
    ("output_tokens", Number(Field::Completion)),
    ("total_tokens", Number(Field::Total)),
    ("prompt_tokens_details", Object(OF_PROMPT)),
    ("prompt_token_details", Object(OF_PROMPT)),
    ("input_tokens_details", Object(OF_PROMPT)),
    ("completion_tokens_details", Object(OF_COMPLETION)),
    ("output_tokens_details", Object(OF_COMPLETION)),
    // DeepSeek, Moonshot and Cohere.
    ("prompt_cache_hit_tokens", Number(Field::Cached)),
    ("cached_tokens", Number(Field::Cached)),
    // Anthropic.
    ("cache_creation_input_tokens", Number(Field::CacheWritten)),
    ("cache_read_input_tokens", Number(Field::CacheRead)),
    // Gemini.
    ("promptTokenCount", Number(Field::Prompt)),
    ("candidatesTokenCount", Number(Field::Completion)),
    ("thoughtsTokenCount", Number(Field::Thoughts)),
    ("toolUsePromptTokenCount", Number(Field::ToolUse)),
    ("totalTokenCount", Number(Field::Total)),
    ("cachedContentTokenCount", Number(Field::Cached)),
    // Cohere.
    ("tokens", Object(COUNTED)),
    ("billed_units", Object(BILLED)),
];
const OF_PROMPT: &[(&str, FieldShape)] =
    &[("cached_tokens", Number(Field::Cached)), ("audio_tokens", Number(Field::PromptAudio))];
const OF_COMPLETION: &[(&str, FieldShape)] = &[("reasoning_tokens", Number(Field::Reasoning))];
const COUNTED: &[(&str, FieldShape)] =
    &[("input_tokens", Number(Field::Prompt)), ("output_tokens", Number(Field::Completion))];
const BILLED: &[(&str, FieldShape)] =
    &[("input_tokens", Number(Field::BilledPrompt)), ("output_tokens", Number(Field::BilledCompletion))];
/// Cohere's `meta`. Its other keys are ignored.
const META: &[(&str, FieldShape)] = &[("tokens", Object(COUNTED)), ("billed_units", Object(BILLED))];

/// Reads one usage object, as JSON text. `null` reports nothing.
pub(super) fn read(usage: &str) -> Reported {
    read_as(USAGE, usage)
}

/// Reads the token counts in Cohere's `meta`.
pub(super) fn read_meta(meta: &str) -> Reported {
    Reported { has_incredible: false, ..read_as(META, meta) }
}

/// Reads the `usage` member of an object; `None`: it has none, or null.
pub(super) fn read_within(object: &str) -> Option<Reported> {
    #[derive(Deserialize)]
    struct Holder<'a> {
        #[serde(borrow)]
        usage: Option<&'a RawValue>,
    }
    // serde would also read a list into the struct.
    let object = Some(object).filter(|json| json.starts_with('{'))?;
    let usage = serde_json::from_str::<Holder>(object).ok()?.usage?.get();
    (usage != "null").then(|| read(usage))
}

fn read_as(names: &'static [(&'static str, FieldShape)], json: &str) -> Reported {
    let mut visitor = UsageVisitor { names, reported: Reported::default(), has_prompt_tokens: false };
    let mut deserializer = serde_json::Deserializer::from_str(json);
    if visitor.deserialize(&mut deserializer).and_then(|()| deserializer.end()).is_err() {
        return Reported { has_incredible: true, ..Reported::default() };
    }
    let UsageVisitor { mut reported, has_prompt_tokens, .. } = visitor;
    if has_prompt_tokens {
        // A provider other than Anthropic that reports cache tokens includes them in the prompt.
        let [read, cached] = [Field::CacheRead, Field::Cached].map(|field| reported.get(field));
        reported.set(Field::Cached, cached.or(read));
        reported.set(Field::CacheRead, None);
        reported.set(Field::CacheWritten, None);
    }
    reported
}

struct UsageVisitor {
    names: &'static [(&'static str, FieldShape)],
    reported: Reported,
    has_prompt_tokens: bool,
}

impl<'de> DeserializeSeed<'de> for &mut UsageVisitor {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for &mut UsageVisitor {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a usage object or null")
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let names = self.names;
        while let Some(Text(key)) = map.next_key()? {
            match names.iter().find(|(name, _)| *name == key).map(|(_, shape)| *shape) {
                None => drop(map.next_value::<IgnoredAny>()?),
                Some(Number(field)) => {
                    self.has_prompt_tokens |= key == "prompt_tokens";
                    match map.next_value::<TokenCount>()? {
                        TokenCount::Number(n) => {
                            let known = self.reported.get(field);
                            self.reported.set(field, Some(n).filter(|&n| n > 0).or(known).or(Some(n)));
                        }
                        TokenCount::Null => {}
                        TokenCount::Incredible => self.reported.has_incredible = true,
                    }
                }
                Some(Object(names)) => {
                    let raw = map.next_value::<&'de RawValue>()?.get();
                    self.reported.update(details(names, raw));
                }
            }
        }
        Ok(())
    }
}

/// Reads a nested object. Other values are ignored.
fn details(names: &'static [(&'static str, FieldShape)], json: &str) -> Reported {
    if json.starts_with('{') { read_as(names, json) } else { Reported::default() }
}

/// A number of tokens as reported.
enum TokenCount {
    Number(u64),
    Null,
    Incredible,
}

impl<'de> Deserialize<'de> for TokenCount {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;
        impl<'de> Visitor<'de> for Any {
            type Value = TokenCount;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("anything")
            }

            fn visit_u64<E>(self, n: u64) -> Result<TokenCount, E> {
                Ok(if n <= MAX_AMOUNT { TokenCount::Number(n) } else { TokenCount::Incredible })
            }

            fn visit_f64<E>(self, x: f64) -> Result<TokenCount, E> {
                // Some providers send 12.0. 2^40 is exact in an f64, so the cast below is too.
                #[allow(clippy::cast_precision_loss)]
                let largest = MAX_AMOUNT as f64;
                let whole = x.fract() == 0.0 && (0.0..=largest).contains(&x);
                #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
                Ok(if whole { TokenCount::Number(x as u64) } else { TokenCount::Incredible })
            }

            fn visit_unit<E>(self) -> Result<TokenCount, E> {
                Ok(TokenCount::Null)
            }

            fn visit_i64<E>(self, _: i64) -> Result<TokenCount, E> {
                Ok(TokenCount::Incredible)
            }

            fn visit_bool<E>(self, _: bool) -> Result<TokenCount, E> {
                Ok(TokenCount::Incredible)
            }

            fn visit_str<E>(self, _: &str) -> Result<TokenCount, E> {
                Ok(TokenCount::Incredible)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<TokenCount, A::Error> {
                while seq.next_element::<IgnoredAny>()?.is_some() {}
                Ok(TokenCount::Incredible)
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<TokenCount, A::Error> {
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
                Ok(TokenCount::Incredible)
            }
        }
        deserializer.deserialize_any(Any)
    }
}
