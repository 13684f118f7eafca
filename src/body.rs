//! What of a request's JSON the gateway needs, in one pass over it, without building a tree.
//!
//! Pure. The body itself is forwarded as it came, but for two changes: usage that is asked for, and a bound
//! that is lowered.

mod anthropic;
mod chat;
mod content;
mod edit;
mod fields;
mod gemini;
mod inputs;
mod named;
mod responses;

use crate::api::Api;
use crate::estimate::Prompt;
use serde::de::DeserializeSeed as _;
use std::borrow::Cow;
use std::fmt;

use edit::StreamOptions;
pub use edit::{Bounds, Edit, edited};
use fields::{Reading, TopLevel};
pub use named::named_model;

/// Deeper nesting is refused; the outermost object counts as 1.
const DEEPEST: usize = 128;

/// What a request's body says, as far as the gateway is concerned.
#[derive(Debug, Default)]
pub struct Body<'a> {
    /// `model`.
    pub model: Option<Cow<'a, str>>,
    /// `stream`.
    pub streams: bool,
    /// Where `stream_options` stands in the body, and what it says of usage.
    stream_options: Option<StreamOptions>,
    /// The caller's own bound on a completion, by whatever name its API has for it; of two the larger.
    pub max_tokens: Option<u64>,
    /// How many completions there are to each prompt.
    pub choices: u64,
    bounds: Bounds,
    /// What is to be counted.
    pub prompt: Prompt<'a>,
}

/// Why a body is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BodyFault {
    /// Not JSON, not an object, a governed field twice, nested too deep. The text says which.
    Invalid(String),
    /// A governed field with a value that it cannot have: its name and what it may be.
    Value {
        /// The field.
        param: &'static str,
        /// What it may be.
        expected: &'static str,
    },
}

impl fmt::Display for BodyFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Invalid(what) => write!(f, "The request body {what}."),
            Self::Value { param, expected } => {
                write!(f, "Invalid value for '{param}': it must be {expected}.")
            }
        }
    }
}

impl<'a> Body<'a> {
    /// Reads a request body of the given API.
    ///
    /// # Errors
    /// What the caller has to mend.
    pub fn read(api: Api, json: &'a [u8]) -> Result<Self, BodyFault> {
        let text = text_of(json)?;
        check_nesting(json)?;
        let mut deserializer = serde_json::Deserializer::from_str(text);
        // Bounded by the check above, at the contract's figure; serde_json's own bound is one lower.
        deserializer.disable_recursion_limit();
        let mut reading = Reading::of(api, text);
        let read = TopLevel(&mut reading).deserialize(&mut deserializer).and_then(|()| deserializer.end());
        let Reading { mut body, field, fault, .. } = reading;
        match (read, fault) {
            (_, Some(fault)) => Err(fault),
            (Ok(()), None) => {
                // Without a prompt the model starts from its end-of-text token.
                if api == Api::Completions && body.prompt.prompts == 0 {
                    body.prompt.add_tokens(crate::estimate::PromptPart::Overhead, 1);
                }
                let opening = json.iter().position(|&b| b == b'{').unwrap_or(0) + 1;
                body.bounds.open(api, opening);
                Ok(body)
            }
            (Err(e), None) if e.is_data() && !field.is_empty() => Err(BodyFault::Invalid(format!(
                "has a field '{field}' of another shape than the API takes: {e}"
            ))),
            (Err(e), None) => Err(BodyFault::Invalid(format!("is not a valid JSON object: {e}"))),
        }
    }

    /// Whether the caller has asked for usage in its stream; an explicit `false` has not.
    pub fn wants_usage(&self) -> bool {
        self.stream_options.as_ref().is_some_and(StreamOptions::wants_usage)
    }

    /// The caller's own bound on all completions together.
    pub fn completion_cap(&self) -> Option<u64> {
        Some(self.max_tokens?.saturating_mul(self.completions()))
    }

    /// How many completions are generated: so many for each prompt.
    pub fn completions(&self) -> u64 {
        self.choices.max(1).saturating_mul(self.prompt.prompts.max(1))
    }

    /// What sets `stream_options.include_usage`.
    pub fn ask_for_usage(&self) -> Edit {
        StreamOptions::ask(self.stream_options.as_ref(), &self.bounds)
    }

    /// Where the bounds of a completion stand, or one could be put.
    pub fn bounds(&self) -> Bounds {
        self.bounds.clone()
    }
}

fn text_of(json: &[u8]) -> Result<&str, BodyFault> {
    std::str::from_utf8(json)
        .map_err(|e| BodyFault::Invalid(format!("is not UTF-8 (byte {})", e.valid_up_to())))
}

fn check_nesting(json: &[u8]) -> Result<(), BodyFault> {
    if nests_deeper_than(DEEPEST, json) {
        return Err(BodyFault::Invalid(format!("is nested more than {DEEPEST} levels deep")));
    }
    Ok(())
}

/// Whether brackets outside of strings nest deeper than `most`. Linear and without recursion.
fn nests_deeper_than(most: usize, json: &[u8]) -> bool {
    let (mut depth, mut at) = (0usize, 0);
    while at < json.len() {
        match json[at] {
            b'"' => {
                at += 1;
                while let Some(found) = memchr::memchr2(b'"', b'\\', &json[at..]) {
                    at += found;
                    if json[at] == b'"' {
                        break;
                    }
                    at = (at + 2).min(json.len());
                }
            }
            b'{' | b'[' => {
                depth += 1;
                if depth > most {
                    return true;
                }
            }
            b'}' | b']' => depth = depth.saturating_sub(1),
            _ => {}
        }
        at += 1;
    }
    false
}

/// Where `part` stands in `whole`, of which it is a slice.
fn offset(whole: &str, part: &str) -> usize {
    (part.as_ptr() as usize).saturating_sub(whole.as_ptr() as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(api: Api, json: &str) -> Result<Body<'_>, BodyFault> {
        Body::read(api, json.as_bytes())
    }

    fn fault(json: &str) -> String {
        read(Api::Chat, json).unwrap_err().to_string()
    }

    #[test]
    fn a_bound_is_lowered_wherever_it_stands() {
        for (before, model, after) in [
            (r#"{"model":"m","max_tokens":500,"n":2}"#, "m", r#"{"model":"m","max_tokens":7,"n":2}"#),
            (
                r#"{"max_completion_tokens": 500 , "x":[1], "max_tokens":null}"#,
                "m",
                r#"{"max_completion_tokens": 7 , "x":[1], "max_tokens":7}"#,
            ),
            (
                r#"{"max_completion_tokens":500,"max_tokens":5}"#,
                "m",
                r#"{"max_completion_tokens":7,"max_tokens":5}"#,
            ),
            (r#" { "model":"m"}"#, "gpt-4o", r#" {"max_tokens":7, "model":"m"}"#),
            (r#"{"model":"m"}"#, "openai/o3-mini", r#"{"max_completion_tokens":7,"model":"m"}"#),
            (r#"{"model":"m"}"#, "gpt-5-mini", r#"{"max_completion_tokens":7,"model":"m"}"#),
        ] {
            let edits = read(Api::Chat, before).unwrap().bounds().lower_to(7, model, before.as_bytes());
            assert_eq!(edited(before.as_bytes(), edits), after.as_bytes(), "{before}");
        }
        let before = r#"{"stream":true,"max_tokens":9}"#;
        let body = read(Api::Chat, before).unwrap();
        let mut edits = body.bounds().lower_to(3, "m", before.as_bytes());
        edits.push(body.ask_for_usage());
        let after = r#"{"stream_options":{"include_usage":true},"stream":true,"max_tokens":3}"#;
        assert_eq!(edited(before.as_bytes(), edits), after.as_bytes());
    }

    #[test]
    fn a_bound_takes_the_place_of_a_null_config() {
        for name in ["generationConfig", "generation_config"] {
            let before = format!(r#"{{"contents":[],"{name}": null }}"#);
            let edits =
                read(Api::Gemini, &before).unwrap().bounds().lower_to(7, "gemini-2.5-pro", before.as_bytes());
            let after = edited(before.as_bytes(), edits);
            let want = format!(r#"{{"contents":[],"{name}": {{"maxOutputTokens":7}} }}"#);
            assert_eq!(after, want.as_bytes());
            assert_eq!(Body::read(Api::Gemini, &after).unwrap().max_tokens, Some(7));
        }
    }

    #[test]
    fn a_part_counts_the_same_with_and_without_a_list_around_it() {
        let part = r#"{"type":"image_url","image_url":{"url":"https://example.com/a.png"}}"#;
        let tokens = |content: &str| {
            let body = format!(r#"{{"model":"gpt-4o","messages":[{{"role":"user","content":{content}}}]}}"#);
            let body = read(Api::Chat, &body).unwrap();
            body.prompt.estimate(&crate::estimate::Models::default().named("gpt-4o")).tokens()
        };
        assert_eq!(tokens(part), tokens(&format!("[{part}]")));
    }

    #[test]
    fn what_is_not_one_json_object_is_refused() {
        for json in [
            "",
            "x",
            "[]",
            "3",
            "\"a\"",
            "null",
            "{",
            "{}{}",
            "{\"a\":1,}",
            "{\"a\" 1}",
            "{\"messages\":[{]}",
        ] {
            assert!(matches!(read(Api::Chat, json), Err(BodyFault::Invalid(_))), "{json}");
        }
        assert!(matches!(Body::read(Api::Chat, b"{\"a\":\"\xff\"}"), Err(BodyFault::Invalid(_))));
    }

    #[test]
    fn a_governed_field_twice_is_refused_also_escaped_or_in_another_case() {
        for json in [
            r#"{"model":"a","model":"b"}"#,
            r#"{"model":"a","\u006dodel":"b"}"#,
            r#"{"model":"a","Model":"b"}"#,
            r#"{"MAX_TOKENS":5}"#,
            r#"{"\u017ftream":true}"#,
            r#"{"messages":[{"role":"user","content":"a","content":"b"}]}"#,
        ] {
            let refused = fault(json);
            assert!(
                refused.contains("twice") || refused.contains("case") || refused.contains("duplicate"),
                "{json}: {refused}"
            );
        }
        assert!(read(Api::Chat, r#"{"x":1,"x":2,"X":3}"#).is_ok());
    }

    #[test]
    fn nesting_is_bounded_at_128_wherever_it_stands() {
        for field in ["x", "messages", "tools", "stream_options"] {
            let nested = |levels: usize| {
                let inner = levels - 1;
                format!("{{\"{field}\":{}{}}}", "[".repeat(inner), "]".repeat(inner))
            };
            assert!(fault(&nested(129)).contains("128"), "{field}");
            assert!(!read(Api::Chat, &nested(128)).is_err_and(|e| e.to_string().contains("128")), "{field}");
            assert!(fault(&nested(100_000)).contains("128"), "{field}");
        }
        assert!(read(Api::Chat, &format!("{{\"x\":\"{}\"}}", "[".repeat(500))).is_ok());
    }

    #[test]
    fn numbers_and_flags_have_bounds_and_types() {
        for (field, bad) in [
            ("max_tokens", "0"),
            ("max_tokens", "-1"),
            ("max_tokens", "2147483648"),
            ("max_tokens", "1e3"),
            ("max_tokens", "1.0"),
            ("max_tokens", "\"5\""),
            ("max_tokens", "18446744073709551616"),
            ("max_completion_tokens", "[]"),
            ("max_output_tokens", "0"),
            ("n", "0"),
            ("n", "129"),
            ("best_of", "1000"),
            ("stream", "1"),
            ("stream", "\"true\""),
            ("model", "5"),
            ("stream_options", "true"),
            ("stream_options", r#"{"include_usage":1}"#),
            ("stream_options", r#"{"include_usage":true,"include_usage":false}"#),
        ] {
            let refused = read(Api::Chat, &format!("{{\"{field}\":{bad}}}")).unwrap_err();
            assert!(matches!(refused, BodyFault::Value { param, .. } if param == field), "{field}: {bad}");
        }
        let body =
            read(Api::Chat, r#"{"max_tokens":7,"max_completion_tokens":9,"n":2,"best_of":3,"stream":null}"#)
                .unwrap();
        assert_eq!((body.completion_cap(), body.streams), (Some(27), false));
        assert!(read(Api::Completions, r#"{"max_tokens":0}"#).is_ok());
    }

    #[test]
    fn asking_for_usage_changes_nothing_else() {
        const ASKED: &str = r#"{"include_usage":true}"#;
        for (before, after) in [
            (
                r#" { "stream" : true}"#.to_owned(),
                format!(r#" {{"stream_options":{ASKED}, "stream" : true}}"#),
            ),
            (
                r#"{"stream_options": null ,"x":"é"}"#.to_owned(),
                format!(r#"{{"stream_options": {ASKED} ,"x":"é"}}"#),
            ),
            (
                r#"{"stream_options":{ }}"#.to_owned(),
                r#"{"stream_options":{"include_usage":true }}"#.to_owned(),
            ),
            (
                r#"{"stream_options":{"a":[1]}}"#.to_owned(),
                r#"{"stream_options":{"include_usage":true,"a":[1]}}"#.to_owned(),
            ),
            (
                r#"{"stream_options":{"a":1,"include_usage" : false}}"#.to_owned(),
                r#"{"stream_options":{"a":1,"include_usage" : true}}"#.to_owned(),
            ),
            (
                r#"{"stream_options":{"include_usage":null}}"#.to_owned(),
                r#"{"stream_options":{"include_usage":true}}"#.to_owned(),
            ),
        ] {
            let body = read(Api::Chat, &before).unwrap();
            assert!(!body.wants_usage());
            let asked = edited(before.as_bytes(), vec![body.ask_for_usage()]);
            assert_eq!(std::str::from_utf8(&asked).unwrap(), after);
            assert!(Body::read(Api::Chat, &asked).unwrap().wants_usage());
        }
    }

    mod properties {
        use super::*;
        use proptest::prelude::*;

        proptest! {
            #[test]
            fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
                let _ = Body::read(Api::Chat, &bytes);
            }

            #[test]
            fn no_json_makes_it_panic(text in "(\\{|\\}|\\[|\\]|,|:|\"(messages|role|content|stream_options|include_usage|user|input)\"|1|true|null){0,40}") {
                for api in [Api::Chat, Api::Completions, Api::Embeddings] {
                    let _ = Body::read(api, text.as_bytes());
                }
            }
        }
    }
}
