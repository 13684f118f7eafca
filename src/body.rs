//! Reads the fields of a request body that the gateway needs, in one pass and without building a tree.
//!
//! Nothing here does I/O. The gateway forwards the body unchanged except for three edits: it requests usage, it lowers
//! the bound on completion tokens, and it replaces the model by the name that a route sends.

mod anthropic;
mod chat;
mod content;
mod detect;
mod edit;
mod fields;
mod gemini;
mod inputs;
mod named;
mod responses;
#[cfg(test)]
mod sample_tests;
mod spelling;

use crate::api::Api;
use crate::estimate::Prompt;
use crate::json::{nests_deeper_than, replace_lone_surrogates};
use serde::de::DeserializeSeed as _;
use std::borrow::Cow;
use std::fmt;

pub(crate) use detect::detect_api;
use edit::StreamOptions;
pub use edit::{Bounds, Edit, edited};
use fields::{BodyReader, TopLevel};
pub use named::{NamedModel, named_model};

/// Deeper nesting is rejected; the outermost object is level 1.
const MAX_NESTING: usize = 128;

/// The fields of a request body that the gateway needs.
#[derive(Debug, Default)]
pub struct Body<'a> {
    /// `model`.
    pub model: Option<Cow<'a, str>>,
    /// The range of its value in the body, also of a null.
    model_at: Option<edit::Span>,
    /// `stream`.
    pub streams: bool,
    /// The position of `stream_options` in the body and its `include_usage`.
    stream_options: Option<StreamOptions>,
    /// The caller's bound on each completion (`max_tokens` or its equivalent); the larger one if there are two.
    pub max_tokens: Option<u64>,
    /// Completions for each prompt (`n`, `best_of`); 0 if not set.
    pub choices: u64,
    bounds: Bounds,
    /// The prompt whose tokens are to be counted.
    pub prompt: Prompt<'a>,
}

/// Why a body is rejected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BodyFault {
    /// Not JSON, not an object, a governed field twice, or nested too deep. The text completes a sentence that
    /// begins with "The request body".
    Invalid(String),
    /// A governed field has an invalid value.
    Value {
        /// The name of the field.
        param: &'static str,
        /// A description of its valid values.
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

/// The text of a request body, for reading only. It has the same length as the body and differs from it only in halves
/// of surrogate pairs, which it has as U+FFFD.
#[derive(Debug)]
pub struct BodyText<'b>(Cow<'b, str>);

impl<'b> BodyText<'b> {
    /// The text of these bytes.
    ///
    /// # Errors
    /// The bytes are not UTF-8, or nested too deep for JSON.
    pub fn of(json: &'b [u8]) -> Result<Self, BodyFault> {
        let text = match replace_lone_surrogates(json) {
            Cow::Borrowed(bytes) => utf8(bytes).map(Cow::Borrowed),
            Cow::Owned(bytes) => String::from_utf8(bytes).map(Cow::Owned).map_err(|e| e.utf8_error()),
        };
        let text =
            text.map_err(|e| BodyFault::Invalid(format!("is not UTF-8 (byte {})", e.valid_up_to())))?;
        if nests_deeper_than(MAX_NESTING, json) {
            return Err(BodyFault::Invalid(format!("is nested more than {MAX_NESTING} levels deep")));
        }
        Ok(Self(text))
    }
}

/// Bytes as text. In texts that are not ASCII, simdutf8 is many times as fast as the standard library, which reports where a
/// fault is.
fn utf8(bytes: &[u8]) -> Result<&str, std::str::Utf8Error> {
    simdutf8::basic::from_utf8(bytes).or_else(|_| std::str::from_utf8(bytes))
}

impl<'a> Body<'a> {
    /// Reads a request body of the given API.
    ///
    /// # Errors
    /// The body is invalid.
    pub fn read(api: Api, text: &'a BodyText<'_>) -> Result<Self, BodyFault> {
        let text = &*text.0;
        let mut deserializer = serde_json::Deserializer::from_str(text);
        // `BodyText` has bounded the recursion. serde_json's own limit is 127 levels.
        deserializer.disable_recursion_limit();
        let mut reader = BodyReader::of(api, text);
        let read = TopLevel(&mut reader).deserialize(&mut deserializer).and_then(|()| deserializer.end());
        let BodyReader { mut body, field, fault, .. } = reader;
        match (read, fault) {
            (_, Some(fault)) => Err(fault),
            (Ok(()), None) => {
                // Without a prompt the model starts with its end-of-text token.
                if api == Api::Completions && body.prompt.prompts == 0 {
                    body.prompt.add_tokens(crate::estimate::PromptPart::Overhead, 1);
                }
                let opening = text.find('{').unwrap_or(0) + 1;
                body.bounds.open(api, opening);
                Ok(body)
            }
            (Err(e), None) if e.is_data() && !field.is_empty() => Err(BodyFault::Invalid(format!(
                "has a field '{field}' of a shape that the API does not accept: {e}"
            ))),
            (Err(e), None) => Err(BodyFault::Invalid(format!("is not a valid JSON object: {e}"))),
        }
    }

    /// Whether the caller requests usage in its stream: `include_usage` is present and `true`.
    pub fn wants_usage(&self) -> bool {
        self.stream_options.as_ref().is_some_and(StreamOptions::wants_usage)
    }

    /// The cap of the request: the bound on each completion times the number of completions.
    pub fn completion_cap(&self) -> Option<u64> {
        Some(self.max_tokens?.saturating_mul(self.completions()))
    }

    /// Number of completions for all prompts together.
    pub fn completions(&self) -> u64 {
        self.choices.max(1).saturating_mul(self.prompt.prompts.max(1))
    }

    /// The edit that replaces the value of `model` by this name. `None`: the body has no such field.
    pub fn replace_model(&self, name: &str) -> Option<Edit> {
        self.model_at.map(|at| Edit::json_text(at, name))
    }

    /// The edit that sets `stream_options.include_usage`.
    pub fn request_usage(&self) -> Edit {
        StreamOptions::request(self.stream_options.as_ref(), &self.bounds)
    }

    /// The positions of the caller's bounds in the body, or where a bound can be inserted.
    pub fn bounds(&self) -> Bounds {
        self.bounds.clone()
    }
}

/// The byte offset of `part` in `whole`. `part` must be a slice of `whole`.
fn offset(whole: &str, part: &str) -> usize {
    (part.as_ptr() as usize).saturating_sub(whole.as_ptr() as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads a body. The text is leaked, so that the result does not borrow from a value of this function.
    fn read_bytes(api: Api, json: &[u8]) -> Result<Body<'static>, BodyFault> {
        let text = BodyText::of(Box::leak(json.to_vec().into_boxed_slice()))?;
        Body::read(api, Box::leak(Box::new(text)))
    }

    fn read(api: Api, json: &str) -> Result<Body<'static>, BodyFault> {
        read_bytes(api, json.as_bytes())
    }

    fn fault(json: &str) -> String {
        read(Api::Chat, json).unwrap_err().to_string()
    }

    proptest::proptest! {
        #[test]
        fn a_fault_in_utf8_is_found_at_the_place_that_the_standard_library_reports(
            text in "[a-z \u{e9}\u{4e00}-\u{9fff}\u{1f600}]{0,200}",
            changes in proptest::collection::vec((0usize..800, 0x20u8..), 0..2),
        ) {
            let mut json = format!(r#"{{"model":"m","user":"{text}"}}"#).into_bytes();
            for (at, byte) in changes {
                let at = at % json.len();
                json[at] = byte;
            }
            match std::str::from_utf8(&json) {
                Ok(text) => proptest::prop_assert_eq!(&*BodyText::of(&json).unwrap().0, text),
                Err(error) => {
                    let message = format!("The request body is not UTF-8 (byte {}).", error.valid_up_to());
                    proptest::prop_assert_eq!(BodyText::of(&json).unwrap_err().to_string(), message);
                }
            }
        }
    }

    #[test]
    fn a_bound_is_lowered_in_place_or_inserted() {
        for (before, model, after) in [
            (r#"{"model":"m","max_tokens":500,"n":2}"#, "m", r#"{"model":"m","max_tokens":7,"n":2}"#),
            (
                r#"{"max_completion_tokens": 500 , "x":[1], "max_tokens":null}"#,
                "m",
                r#"{"max_completion_tokens": 7 , "x":[1], "max_tokens":null}"#,
            ),
            (r#"{"n":2,"max_tokens":null}"#, "m", r#"{"n":2,"max_tokens":7}"#),
            (r#"{"n":2,"max_tokens":null}"#, "o3", r#"{"max_completion_tokens":7,"n":2,"max_tokens":null}"#),
            (
                r#"{"max_completion_tokens":500,"max_tokens":5}"#,
                "m",
                r#"{"max_completion_tokens":7,"max_tokens":5}"#,
            ),
            (
                r#"{"max_tokens":5.0,"max_completion_tokens":1e3}"#,
                "m",
                r#"{"max_tokens":5.0,"max_completion_tokens":7}"#,
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
        edits.push(body.request_usage());
        let after = r#"{"stream_options":{"include_usage":true},"stream":true,"max_tokens":3}"#;
        assert_eq!(edited(before.as_bytes(), edits), after.as_bytes());
    }

    #[test]
    fn a_bound_replaces_a_null_generation_config() {
        for name in ["generationConfig", "generation_config"] {
            let before = format!(r#"{{"contents":[],"{name}": null }}"#);
            let edits =
                read(Api::Gemini, &before).unwrap().bounds().lower_to(7, "gemini-2.5-pro", before.as_bytes());
            let after = edited(before.as_bytes(), edits);
            let want = format!(r#"{{"contents":[],"{name}": {{"maxOutputTokens":7}} }}"#);
            assert_eq!(after, want.as_bytes());
            assert_eq!(read_bytes(Api::Gemini, &after).unwrap().max_tokens, Some(7));
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
    fn anything_but_one_json_object_is_rejected() {
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
        assert!(matches!(read_bytes(Api::Chat, b"{\"a\":\"\xff\"}"), Err(BodyFault::Invalid(_))));
    }

    #[test]
    fn a_repeated_governed_field_is_rejected_even_if_escaped_or_in_another_case() {
        for json in [
            r#"{"model":"a","model":"b"}"#,
            r#"{"model":"a","\u006dodel":"b"}"#,
            r#"{"model":"a","Model":"b"}"#,
            r#"{"MAX_TOKENS":5}"#,
            r#"{"\u017ftream":true}"#,
            r#"{"messages":[{"role":"user","content":"a","content":"b"}]}"#,
            r#"{"messages":[{"role":"user","content":"a","Content":"b"}]}"#,
            r#"{"messages":[{"CONTENT":"a","role":"user","content":"b"}]}"#,
        ] {
            let message = fault(json);
            assert!(
                message.contains("twice") || message.contains("case") || message.contains("duplicate"),
                "{json}: {message}"
            );
        }
        assert!(read(Api::Chat, r#"{"x":1,"x":2,"X":3}"#).is_ok());
    }

    #[test]
    fn a_field_of_geminis_config_in_another_case_is_rejected() {
        for field in [
            "MaxOutputTokens",
            "maxoutputtokens",
            "MAX_OUTPUT_TOKENS",
            "CandidateCount",
            "max_output_to\\u212aens",
        ] {
            let json = format!(r#"{{"contents":[],"generationConfig":{{"{field}":5}}}}"#);
            assert!(read(Api::Gemini, &json).is_err(), "{json}");
        }
        for twice in
            [r#""maxOutputTokens":5,"max_output_tokens":6"#, r#""maxOutputTokens":5,"maxOutputTokens":6"#]
        {
            assert!(read(Api::Gemini, &format!(r#"{{"generationConfig":{{{twice}}}}}"#)).is_err(), "{twice}");
        }
    }

    #[test]
    fn nesting_is_bounded_at_128_in_every_field() {
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
    fn numbers_and_flags_are_checked() {
        for (field, bad) in [
            ("max_tokens", "0"),
            ("max_tokens", "-1"),
            ("max_tokens", "2147483648"),
            ("max_tokens", "1.5"),
            ("max_tokens", "0.0"),
            ("max_tokens", "1e10"),
            ("max_tokens", "1e999"),
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
            ("stream_options", r#"{"include_usage":true,"Include_Usage":false}"#),
            ("stream_options", r#"{"Include_Usage":true}"#),
            ("stream_options", r#"{"include_u\u017fage":true}"#),
            ("stream_options", r#"{"include_usage":true,"include_\u0075sage":true}"#),
        ] {
            let fault = read(Api::Chat, &format!("{{\"{field}\":{bad}}}")).unwrap_err();
            assert!(matches!(fault, BodyFault::Value { param, .. } if param == field), "{field}: {bad}");
        }
        let body =
            read(Api::Chat, r#"{"max_tokens":7,"max_completion_tokens":9,"n":2,"best_of":3,"stream":null}"#)
                .unwrap();
        assert_eq!((body.completion_cap(), body.streams), (Some(27), false));
        assert!(read(Api::Completions, r#"{"max_tokens":0}"#).is_ok());
        let fault = read(Api::Completions, r#"{"max_tokens":-1}"#).unwrap_err().to_string();
        assert!(fault.contains("from 0 to"), "{fault}");
        let body = read(Api::Chat, r#"{"max_tokens":4096.0,"n":2e0,"best_of":1}"#).unwrap();
        assert_eq!(body.completion_cap(), Some(8_192));
        let config = r#"{"contents":[],"generationConfig":{"maxOutputTokens":1e3,"candidateCount":2.0}}"#;
        assert_eq!(read(Api::Gemini, config).unwrap().completion_cap(), Some(2_000));
    }

    #[test]
    fn requesting_usage_changes_nothing_else() {
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
            let asked = edited(before.as_bytes(), vec![body.request_usage()]);
            assert_eq!(std::str::from_utf8(&asked).unwrap(), after);
            assert!(read_bytes(Api::Chat, &asked).unwrap().wants_usage());
        }
    }

    mod properties {
        use super::*;
        use proptest::prelude::*;

        proptest! {
            #[test]
            fn no_input_causes_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
                let _ = read_bytes(Api::Chat, &bytes);
            }

            #[test]
            fn no_json_causes_a_panic(text in "(\\{|\\}|\\[|\\]|,|:|\"(messages|role|content|stream_options|include_usage|user|input)\"|1|true|null){0,40}") {
                for api in [Api::Chat, Api::Completions, Api::Embeddings] {
                    let _ = read_bytes(api, text.as_bytes());
                }
            }
        }
    }
}
