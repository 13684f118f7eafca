//! What a request has cost: read out of the upstream's answer, or counted where it says nothing.
//!
//! Pure: bytes in, numbers out. The shapes and their meaning follow the providers' documents and
//! recorded answers; a field that is not a whole number from 0 to 2^40 does not count as reported.

mod choices;
mod json;
mod received;
mod sse;

use crate::quota::{Amounts, MAX_AMOUNT};
use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use std::fmt;

pub use json::JsonReader;
pub use received::{Received, SoFar, Texts};
pub use sse::SseReader;

/// What an upstream has reported so far. Each field is the last credible word on it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reported {
    prompt: Option<u64>,
    completion: Option<u64>,
    total: Option<u64>,
    /// A field was there that cannot be true: negative, not a whole number, absurdly large.
    refused: bool,
}

impl Reported {
    /// Reads one usage object, as JSON text. What is not an object reports nothing; `null` neither.
    pub fn read(usage: &str) -> Self {
        match serde_json::from_str::<Fields>(usage) {
            Ok(fields) => fields.0,
            Err(_) => Self { refused: true, ..Self::default() },
        }
    }

    /// Takes over what `later` reports; what it leaves out stays. Nothing is added up.
    pub fn update(&mut self, later: Self) {
        self.prompt = later.prompt.or(self.prompt);
        self.completion = later.completion.or(self.completion);
        self.total = later.total.or(self.total);
        self.refused |= later.refused;
    }

    /// Whether anything credible was reported.
    pub fn is_any(&self) -> bool {
        self.prompt.is_some() || self.completion.is_some() || self.total.is_some()
    }

    /// Whether something was reported that cannot be true.
    pub fn was_refused(&self) -> bool {
        self.refused
    }

    /// Tokens the model read. A usage with nothing but a total is the prompt's.
    pub fn prompt(&self) -> Option<u64> {
        match self.completion {
            None => self.prompt.or(self.total),
            Some(completion) => self.prompt.or(self.total.map(|t| t.saturating_sub(completion))),
        }
    }

    /// Tokens the model generated; what the total leaves beside the prompt where it is not named.
    pub fn completion(&self) -> Option<u64> {
        self.completion.or_else(|| match (self.prompt, self.total) {
            (Some(prompt), Some(total)) => Some(total.saturating_sub(prompt)),
            (None, Some(_)) => Some(0),
            (_, None) => None,
        })
    }

    /// What is charged: what was reported, and for what was not the estimate and the count.
    pub fn amounts(&self, estimated_prompt: u64, counted_completion: u64) -> Amounts {
        let prompt = self.prompt().unwrap_or(estimated_prompt);
        let completion = self.completion().unwrap_or(counted_completion);
        let mut amounts = Amounts::of_request(prompt, completion);
        amounts.total = amounts.total.max(self.total.unwrap_or(0)).min(MAX_AMOUNT);
        amounts
    }

    /// What a stream has used so far that has come to so many completion tokens, whatever it reported on
    /// its way.
    pub fn amounts_so_far(&self, estimated_prompt: u64, completion: u64) -> Amounts {
        Amounts::of_request(self.prompt().unwrap_or(estimated_prompt), completion)
    }
}

/// A usage object of OpenAI's shape; unknown fields are passed over, of a repeated one the last counts.
struct Fields(Reported);

impl<'de> Deserialize<'de> for Fields {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object;
        impl<'de> Visitor<'de> for Object {
            type Value = Fields;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a usage object or null")
            }

            fn visit_unit<E>(self) -> Result<Fields, E> {
                Ok(Fields(Reported::default()))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields, A::Error> {
                let mut reported = Reported::default();
                while let Some(key) = map.next_key::<std::borrow::Cow<'de, str>>()? {
                    let field = match &*key {
                        "prompt_tokens" | "input_tokens" => &mut reported.prompt,
                        "completion_tokens" | "output_tokens" => &mut reported.completion,
                        "total_tokens" => &mut reported.total,
                        _ => {
                            map.next_value::<IgnoredAny>()?;
                            continue;
                        }
                    };
                    match map.next_value::<Whole>()? {
                        Whole::Number(n) => *field = Some(n),
                        Whole::Null => {}
                        Whole::Incredible => reported.refused = true,
                    }
                }
                Ok(Fields(reported))
            }
        }
        deserializer.deserialize_any(Object)
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn charged(usage: &str) -> (u64, u64, u64) {
        let a = Reported::read(usage).amounts(100, 50);
        (a.prompt, a.completion, a.total)
    }

    #[test]
    fn what_is_reported_is_charged_and_the_rest_is_counted() {
        for (usage, want) in [
            (r#"{"prompt_tokens":7,"completion_tokens":3,"total_tokens":10}"#, (7, 3, 10)),
            (r#"{"prompt_tokens":7,"completion_tokens":3,"total_tokens":25}"#, (7, 3, 25)),
            (r#"{"prompt_tokens":7,"completion_tokens":3,"total_tokens":2}"#, (7, 3, 10)),
            (r#"{"prompt_tokens":7,"total_tokens":7}"#, (7, 0, 7)),
            (r#"{"total_tokens":7}"#, (7, 0, 7)),
            (r#"{"prompt_tokens":7}"#, (7, 50, 57)),
            (r#"{"completion_tokens":3}"#, (100, 3, 103)),
            (r#"{"input_tokens":7,"output_tokens":3}"#, (7, 3, 10)),
            (r#"{"prompt_tokens":12.0,"completion_tokens":null}"#, (12, 50, 62)),
            ("null", (100, 50, 150)),
            ("{}", (100, 50, 150)),
        ] {
            assert_eq!(charged(usage), want, "{usage}");
            assert!(!Reported::read(usage).was_refused(), "{usage}");
        }
    }

    #[test]
    fn what_cannot_be_true_is_refused() {
        for bad in ["-1", "1.5", "\"12\"", "1e300", "1099511627777", "true", "[1]", "{\"a\":1}", "1e999"] {
            let usage = format!(r#"{{"prompt_tokens":{bad}}}"#);
            assert_eq!(charged(&usage), (100, 50, 150), "{usage}");
            assert!(Reported::read(&usage).was_refused(), "{usage}");
        }
        for bad in ["[]", "3", "\"x\"", "{"] {
            assert!(Reported::read(bad).was_refused() && !Reported::read(bad).is_any(), "{bad}");
        }
    }

    #[test]
    fn the_last_word_counts_and_null_takes_nothing_back() {
        let mut r = Reported::read(r#"{"prompt_tokens":7,"completion_tokens":1}"#);
        r.update(Reported::read(r#"{"prompt_tokens":7,"completion_tokens":5,"total_tokens":12}"#));
        r.update(Reported::read(r#"{"prompt_tokens":null}"#));
        assert_eq!(r.amounts(0, 0), Amounts { requests: 1, prompt: 7, completion: 5, total: 12 });
    }
}
