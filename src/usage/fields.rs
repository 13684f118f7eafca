//! Usage objects of every provider's shape.

use super::{Field, Reported};
use crate::quota::MAX_AMOUNT;
use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;
use std::borrow::Cow;
use std::fmt;

/// What stands under a name.
#[derive(Clone, Copy)]
enum Place {
    /// A number of tokens.
    Number(Field),
    /// An object with more of them.
    Object(&'static [(&'static str, Place)]),
}

use Place::{Number, Object};

/// The names by provider; where several have one, it means the same.
const USAGE: &[(&str, Place)] = &[
    // OpenAI, Azure and most others; of Responses and Anthropic the second name.
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
const OF_PROMPT: &[(&str, Place)] =
    &[("cached_tokens", Number(Field::Cached)), ("audio_tokens", Number(Field::PromptAudio))];
const OF_COMPLETION: &[(&str, Place)] = &[("reasoning_tokens", Number(Field::Reasoning))];
const COUNTED: &[(&str, Place)] =
    &[("input_tokens", Number(Field::Prompt)), ("output_tokens", Number(Field::Completion))];
const BILLED: &[(&str, Place)] =
    &[("input_tokens", Number(Field::BilledPrompt)), ("output_tokens", Number(Field::BilledCompletion))];
/// Cohere's `meta`, of which nothing else is of interest.
const META: &[(&str, Place)] = &[("tokens", Object(COUNTED)), ("billed_units", Object(BILLED))];

/// Reads one usage object, as JSON text. What is not an object reports nothing; `null` neither.
pub(super) fn read(usage: &str) -> Reported {
    read_as(USAGE, usage)
}

/// The same for an object that has the usage among other things.
pub(super) fn read_meta(meta: &str) -> Reported {
    Reported { refused: false, ..read_as(META, meta) }
}

/// Reads the `usage` of an object; `None`: there is none, or it is null.
pub(super) fn read_within(object: &str) -> Option<Reported> {
    #[derive(Deserialize)]
    struct Holder<'a> {
        #[serde(borrow)]
        usage: Option<&'a RawValue>,
    }
    // A list would do for a structure too.
    let object = Some(object).filter(|json| json.starts_with('{'))?;
    let usage = serde_json::from_str::<Holder>(object).ok()?.usage?.get();
    (usage != "null").then(|| read(usage))
}

fn read_as(names: &'static [(&'static str, Place)], json: &str) -> Reported {
    let mut reading = Reading { names, reported: Reported::default(), has_prompt_tokens: false };
    let mut deserializer = serde_json::Deserializer::from_str(json);
    if reading.deserialize(&mut deserializer).and_then(|()| deserializer.end()).is_err() {
        return Reported { refused: true, ..Reported::default() };
    }
    let Reading { mut reported, has_prompt_tokens, .. } = reading;
    if has_prompt_tokens {
        // Others than Anthropic who name its caches have them within the prompt.
        let [read, cached] = [Field::CacheRead, Field::Cached].map(|field| reported.get(field));
        reported.set(Field::Cached, cached.or(read));
        reported.set(Field::CacheRead, None);
        reported.set(Field::CacheWritten, None);
    }
    reported
}

struct Reading {
    names: &'static [(&'static str, Place)],
    reported: Reported,
    has_prompt_tokens: bool,
}

impl<'de> DeserializeSeed<'de> for &mut Reading {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for &mut Reading {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a usage object or null")
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let names = self.names;
        while let Some(key) = map.next_key::<Cow<'de, str>>()? {
            match names.iter().find(|(name, _)| *name == key).map(|(_, place)| *place) {
                None => drop(map.next_value::<IgnoredAny>()?),
                Some(Number(field)) => {
                    self.has_prompt_tokens |= key == "prompt_tokens";
                    match map.next_value::<Whole>()? {
                        Whole::Number(n) => self.reported.set(field, Some(n)),
                        Whole::Null => {}
                        Whole::Incredible => self.reported.refused = true,
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

/// What stands further in adds to what is known; where it is no object there is nothing of it.
fn details(names: &'static [(&'static str, Place)], json: &str) -> Reported {
    if json.starts_with('{') { read_as(names, json) } else { Reported::default() }
}

/// A number of tokens as somebody else reports it.
enum Whole {
    Number(u64),
    Null,
    Incredible,
}

impl<'de> Deserialize<'de> for Whole {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;
        impl<'de> Visitor<'de> for Any {
            type Value = Whole;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("anything")
            }

            fn visit_u64<E>(self, n: u64) -> Result<Whole, E> {
                Ok(if n <= MAX_AMOUNT { Whole::Number(n) } else { Whole::Incredible })
            }

            fn visit_f64<E>(self, x: f64) -> Result<Whole, E> {
                // Some providers send 12.0. 2^40 is exact in an f64, so the cast below is too.
                #[allow(clippy::cast_precision_loss)]
                let largest = MAX_AMOUNT as f64;
                let whole = x.fract() == 0.0 && (0.0..=largest).contains(&x);
                #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
                Ok(if whole { Whole::Number(x as u64) } else { Whole::Incredible })
            }

            fn visit_unit<E>(self) -> Result<Whole, E> {
                Ok(Whole::Null)
            }

            fn visit_i64<E>(self, _: i64) -> Result<Whole, E> {
                Ok(Whole::Incredible)
            }

            fn visit_bool<E>(self, _: bool) -> Result<Whole, E> {
                Ok(Whole::Incredible)
            }

            fn visit_str<E>(self, _: &str) -> Result<Whole, E> {
                Ok(Whole::Incredible)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Whole, A::Error> {
                while seq.next_element::<IgnoredAny>()?.is_some() {}
                Ok(Whole::Incredible)
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Whole, A::Error> {
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
                Ok(Whole::Incredible)
            }
        }
        deserializer.deserialize_any(Any)
    }
}
