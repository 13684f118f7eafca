//! What of a request's JSON the gateway needs, in one pass over it, without building a tree.
//!
//! Pure. The body itself is forwarded as it came, but for two changes: usage that is asked for, and a bound
//! that is lowered.

mod prompt;

use crate::estimate::Prompt;
use crate::json::Text;
use bytes::Bytes;
use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;
use smallvec::SmallVec;
use std::borrow::Cow;
use std::fmt;

/// Deeper nesting is refused; the outermost object counts as 1.
const DEEPEST: usize = 128;
const MAX_TOKENS: u64 = (1 << 31) - 1;
const MOST_CHOICES: u64 = 128;

/// The APIs whose prompts are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Api {
    /// `/chat/completions`
    Chat,
    /// `/completions`
    Completions,
    /// `/embeddings`
    Embeddings,
}

impl Api {
    /// Its name in metrics, log lines and `count --api`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Chat => "chat",
            Self::Completions => "completions",
            Self::Embeddings => "embeddings",
        }
    }

    /// Whether the model generates tokens.
    pub fn generates(self) -> bool {
        self != Self::Embeddings
    }
}

/// What a request's body says, as far as the gateway is concerned.
#[derive(Debug, Default)]
pub struct Body<'a> {
    /// `model`.
    pub model: Option<Cow<'a, str>>,
    /// `stream`.
    pub streams: bool,
    /// Where `stream_options` stands in the body, and what it says of usage.
    stream_options: Option<StreamOptions>,
    /// `max_tokens`.
    pub max_tokens: Option<u64>,
    /// `max_completion_tokens`.
    pub max_completion_tokens: Option<u64>,
    /// `n`.
    pub n: Option<u64>,
    /// `best_of`.
    pub best_of: Option<u64>,
    /// Where the values of the caller's bounds stand.
    caps: SmallVec<[Span; 2]>,
    /// Where the object begins.
    opens_at: usize,
    /// What is to be counted.
    pub prompt: Prompt<'a>,
}

#[derive(Clone, Copy, Debug, Default)]
struct StreamOptions {
    /// Of the object, or of a `null` in its place.
    at: Span,
    is_null: bool,
    is_empty: bool,
    /// Of the value of `include_usage` within it, and whether that is `true`.
    include_usage: Option<(Span, bool)>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Span {
    start: usize,
    end: usize,
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
        let text = std::str::from_utf8(json)
            .map_err(|e| BodyFault::Invalid(format!("is not UTF-8 (byte {})", e.valid_up_to())))?;
        if nests_deeper_than(DEEPEST, json) {
            return Err(BodyFault::Invalid(format!("is nested more than {DEEPEST} levels deep")));
        }
        let mut deserializer = serde_json::Deserializer::from_str(text);
        // Bounded by the check above, at the contract's figure; serde_json's own bound is one lower.
        deserializer.disable_recursion_limit();
        let mut reading = Reading { api, text, body: Body::default(), field: "", fault: None };
        let read = TopLevel(&mut reading).deserialize(&mut deserializer).and_then(|()| deserializer.end());
        let Reading { mut body, field, fault, .. } = reading;
        match (read, fault) {
            (_, Some(fault)) => Err(fault),
            (Ok(()), None) => {
                body.prompt.finish(api);
                body.opens_at = json.iter().position(|&b| b == b'{').unwrap_or(0);
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
        matches!(self.stream_options, Some(StreamOptions { include_usage: Some((_, true)), .. }))
    }

    /// The caller's own bound on all completions together: of two names for it the larger.
    pub fn completion_cap(&self) -> Option<u64> {
        let cap = self.max_tokens.max(self.max_completion_tokens)?;
        Some(cap.saturating_mul(self.completions()))
    }

    /// How many completions are generated: so many for each prompt.
    pub fn completions(&self) -> u64 {
        let each = self.n.unwrap_or(1).max(self.best_of.unwrap_or(1));
        each.saturating_mul(self.prompt.prompts.max(1))
    }

    /// What sets `stream_options.include_usage`.
    pub fn ask_for_usage(&self) -> Edit {
        let (at, text) = match self.stream_options {
            None => (self.opening(), r#""stream_options":{"include_usage":true},"#),
            Some(StreamOptions { include_usage: Some((span, _)), .. }) => (span, "true"),
            Some(StreamOptions { at, is_null: true, .. }) => (at, r#"{"include_usage":true}"#),
            Some(StreamOptions { at, is_empty, .. }) => {
                let open = Span { start: at.start + 1, end: at.start + 1 };
                (open, if is_empty { r#""include_usage":true"# } else { r#""include_usage":true,"# })
            }
        };
        Edit { at, text: text.into() }
    }

    /// Where the bounds of a completion stand, or one could be put.
    pub fn bounds(&self) -> Bounds {
        Bounds { caps: self.caps.clone(), opening: self.opening() }
    }

    /// Just behind the brace that opens the body. There is a field behind it: without one nothing is
    /// streamed or generated.
    fn opening(&self) -> Span {
        Span { start: self.opens_at + 1, end: self.opens_at + 1 }
    }
}

/// A change to a body, of which every other byte stays as it was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Edit {
    at: Span,
    text: Cow<'static, str>,
}

/// Where a body bounds its completions.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Bounds {
    caps: SmallVec<[Span; 2]>,
    opening: Span,
}

impl Bounds {
    /// What bounds each completion to so many tokens: in every field that names a bound, or in a new
    /// one, whose name depends on the model.
    pub fn lower_to(&self, tokens: u64, model: &str) -> Vec<Edit> {
        if self.caps.is_empty() {
            let model = model.rsplit('/').next().unwrap_or(model);
            let reasons = ["o1", "o3", "o4", "gpt-5"].iter().any(|prefix| model.starts_with(prefix));
            let name = if reasons { "max_completion_tokens" } else { "max_tokens" };
            return vec![Edit { at: self.opening, text: format!("\"{name}\":{tokens},").into() }];
        }
        self.caps.iter().map(|&at| Edit { at, text: tokens.to_string().into() }).collect()
    }
}

/// The body with these changes, which do not overlap.
pub fn edited(json: &[u8], mut edits: Vec<Edit>) -> Bytes {
    edits.sort_by_key(|edit| edit.at.start);
    let mut out = Vec::with_capacity(json.len() + edits.iter().map(|edit| edit.text.len()).sum::<usize>());
    let mut from = 0;
    for Edit { at, text } in edits {
        out.extend_from_slice(&json[from..at.start]);
        out.extend_from_slice(text.as_bytes());
        from = at.end;
    }
    out.extend_from_slice(&json[from..]);
    out.into()
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

/// The fields that decide what a request may do and costs. Each may stand in a body once, spelled
/// exactly so: other parsers match names whatever their case, and take the last of two.
const GOVERNED: &[&str] = &[
    "model",
    "stream",
    "stream_options",
    "max_tokens",
    "max_completion_tokens",
    "max_output_tokens",
    "n",
    "best_of",
    "messages",
    "prompt",
    "suffix",
    "input",
    "tools",
    "functions",
    "tool_choice",
    "function_call",
    "response_format",
];

/// What has been read so far.
struct Reading<'a> {
    api: Api,
    text: &'a str,
    body: Body<'a>,
    /// The governed field that is being read.
    field: &'static str,
    fault: Option<BodyFault>,
}

struct TopLevel<'r, 'a>(&'r mut Reading<'a>);

impl<'a> DeserializeSeed<'a> for TopLevel<'_, 'a> {
    type Value = ();

    fn deserialize<D: Deserializer<'a>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'a> Visitor<'a> for TopLevel<'_, 'a> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'a>>(self, mut map: A) -> Result<(), A::Error> {
        let mut seen = [false; GOVERNED.len()];
        while let Some(key) = map.next_key_seed(Key)? {
            let Some(field) = governed(&key) else {
                map.next_value::<IgnoredAny>()?;
                continue;
            };
            let name = GOVERNED[field];
            self.0.field = name;
            if seen[field] || key != name {
                let how = if seen[field] { "twice" } else { "in another case" };
                self.0.fault = Some(BodyFault::Invalid(format!("has the field '{name}' {how}")));
            } else {
                seen[field] = true;
                self.0.read_field(name, &mut map)?;
            }
            if self.0.fault.is_some() {
                return Err(A::Error::custom("refused"));
            }
            self.0.field = "";
        }
        Ok(())
    }
}

impl<'a> Reading<'a> {
    fn read_field<A: MapAccess<'a>>(&mut self, name: &'static str, map: &mut A) -> Result<(), A::Error> {
        match name {
            "messages" => map.next_value_seed(prompt::Messages(&mut self.body.prompt)),
            "prompt" | "input" => map.next_value_seed(prompt::Inputs(&mut self.body.prompt)),
            "suffix" => map.next_value_seed(prompt::Suffix(&mut self.body.prompt)),
            _ => {
                let raw = map.next_value::<&'a RawValue>()?.get();
                if matches!(name, "max_tokens" | "max_completion_tokens") {
                    let start = offset(self.text, raw);
                    self.body.caps.push(Span { start, end: start + raw.len() });
                }
                if raw != "null" || name == "stream_options" {
                    self.read_raw(name, raw);
                }
                Ok(())
            }
        }
    }

    fn read_raw(&mut self, name: &'static str, raw: &'a str) {
        let body = &mut self.body;
        let read = match name {
            "model" => {
                serde_json::from_str(raw).map(|model: Text| body.model = Some(model.0)).map_err(|_| A_STRING)
            }
            "stream" => raw.parse().map(|streams| body.streams = streams).map_err(|_| "true or false"),
            "max_tokens" => bounded(raw, u64::from(self.api != Api::Completions), MAX_TOKENS)
                .map(|n| body.max_tokens = n)
                .ok_or(UP_TO_MAX),
            "max_completion_tokens" => {
                bounded(raw, 1, MAX_TOKENS).map(|n| body.max_completion_tokens = n).ok_or(UP_TO_MAX)
            }
            "max_output_tokens" => bounded(raw, 1, MAX_TOKENS).map(|_| ()).ok_or(UP_TO_MAX),
            "n" => bounded(raw, 1, MOST_CHOICES).map(|n| body.n = n).ok_or(UP_TO_CHOICES),
            "best_of" => bounded(raw, 1, MOST_CHOICES).map(|n| body.best_of = n).ok_or(UP_TO_CHOICES),
            "stream_options" => {
                StreamOptions::read(raw, offset(self.text, raw)).map(|o| body.stream_options = Some(o))
            }
            _ => {
                body.prompt.definition(name, raw);
                Ok(())
            }
        };
        if let Err(expected) = read {
            self.fault = Some(BodyFault::Value { param: name, expected });
        }
    }
}

const A_STRING: &str = "a string";
const UP_TO_MAX: &str = "a whole number from 1 to 2147483647";
const UP_TO_CHOICES: &str = "a whole number from 1 to 128";

/// A whole number within bounds, as JSON text: no sign, no fraction, no exponent, no quotes.
/// The outer `None` is a fault.
fn bounded(raw: &str, least: u64, most: u64) -> Option<Option<u64>> {
    raw.parse().ok().filter(|n| (least..=most).contains(n)).map(Some)
}

/// Where `part` stands in `whole`, of which it is a slice.
fn offset(whole: &str, part: &str) -> usize {
    (part.as_ptr() as usize).saturating_sub(whole.as_ptr() as usize)
}

impl StreamOptions {
    fn read(raw: &str, start: usize) -> Result<Self, &'static str> {
        #[derive(Deserialize)]
        struct Object<'a> {
            #[serde(borrow, default, deserialize_with = "present")]
            include_usage: Option<&'a RawValue>,
        }
        const EXPECTED: &str =
            "an object whose include_usage, if any, is true or false, and stands there once";
        let at = Span { start, end: start + raw.len() };
        if raw == "null" {
            return Ok(Self { at, is_null: true, ..Self::default() });
        }
        if !raw.starts_with('{') {
            return Err(EXPECTED);
        }
        let object: Object = serde_json::from_str(raw).map_err(|_| EXPECTED)?;
        let include_usage = match object.include_usage.map(RawValue::get) {
            None => None,
            Some(value @ ("true" | "false" | "null")) => {
                let start = start + offset(raw, value);
                Some((Span { start, end: start + value.len() }, value == "true"))
            }
            Some(_) => return Err(EXPECTED),
        };
        let is_empty = raw[1..raw.len() - 1].trim().is_empty();
        Ok(Self { at, is_null: false, is_empty, include_usage })
    }
}

/// A value that is there, be it `null`.
fn present<'de: 'a, 'a, D: Deserializer<'de>>(deserializer: D) -> Result<Option<&'a RawValue>, D::Error> {
    <&'a RawValue>::deserialize(deserializer).map(Some)
}

/// A key of an object.
struct Key;

impl<'a> DeserializeSeed<'a> for Key {
    type Value = Cow<'a, str>;

    fn deserialize<D: Deserializer<'a>>(self, deserializer: D) -> Result<Cow<'a, str>, D::Error> {
        Text::deserialize(deserializer).map(|text| text.0)
    }
}

fn governed(key: &str) -> Option<usize> {
    if key.len() > 64 {
        return None;
    }
    GOVERNED.iter().position(|name| *name == key).or_else(|| {
        // The long s and the Kelvin sign fold to ASCII letters.
        let folded: String = key
            .chars()
            .map(|c| match c {
                'ſ' => 's',
                'K' => 'k',
                c => c.to_ascii_lowercase(),
            })
            .collect();
        GOVERNED.iter().position(|name| *name == folded)
    })
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
            (r#" { "model":"m"}"#, "gpt-4o", r#" {"max_tokens":7, "model":"m"}"#),
            (r#"{"model":"m"}"#, "openai/o3-mini", r#"{"max_completion_tokens":7,"model":"m"}"#),
            (r#"{"model":"m"}"#, "gpt-5-mini", r#"{"max_completion_tokens":7,"model":"m"}"#),
        ] {
            let edits = read(Api::Chat, before).unwrap().bounds().lower_to(7, model);
            assert_eq!(edited(before.as_bytes(), edits), after.as_bytes(), "{before}");
        }
        let before = r#"{"stream":true,"max_tokens":9}"#;
        let body = read(Api::Chat, before).unwrap();
        let mut edits = body.bounds().lower_to(3, "m");
        edits.push(body.ask_for_usage());
        let after = r#"{"stream_options":{"include_usage":true},"stream":true,"max_tokens":3}"#;
        assert_eq!(edited(before.as_bytes(), edits), after.as_bytes());
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
