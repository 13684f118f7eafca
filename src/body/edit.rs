//! The edits that the gateway makes to a body. All other bytes stay unchanged.

use super::offset;
use super::spelling::position;
use crate::api::Api;
use crate::json::{Text, whole_number};
use bytes::Bytes;
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;
use smallvec::SmallVec;
use std::borrow::Cow;
use std::fmt;

/// A range of bytes in the body.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) start: usize,
    pub(super) end: usize,
}

impl Span {
    /// The range of `part`, which is a slice of `whole`.
    pub(super) fn of(whole: &str, part: &str) -> Self {
        let start = offset(whole, part);
        Self { start, end: start + part.len() }
    }

    fn empty(at: usize) -> Self {
        Self { start: at, end: at }
    }

    /// The whole number in this range.
    fn number(self, body: &[u8]) -> Option<u64> {
        whole_number(std::str::from_utf8(body.get(self.start..self.end)?).ok()?)
    }
}

/// Replaces a range of the body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Edit {
    at: Span,
    text: Cow<'static, str>,
}

impl Edit {
    /// Replaces a JSON value by a text.
    pub(super) fn json_text(at: Span, text: &str) -> Self {
        Self { at, text: serde_json::Value::from(text).to_string().into() }
    }

    /// Replaces the bytes in this range by a text as it is.
    pub(crate) fn plain_text(at: std::ops::Range<usize>, text: &str) -> Self {
        Self { at: Span { start: at.start, end: at.end }, text: text.to_owned().into() }
    }
}

/// The positions of the bounds in a body, or where a bound can be inserted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Bounds {
    api: Api,
    /// The values of the caller's bounds, including nulls.
    pub(super) existing: SmallVec<[Span; 2]>,
    /// The range of a chat's `max_tokens` that is null. Reasoning models do not accept a number there.
    pub(super) null_max_tokens: Option<Span>,
    /// Position after the body's opening brace. A field always follows it: an empty body requests neither a stream
    /// nor a completion, so it is never edited.
    opening: usize,
    /// Position after the opening brace of Gemini's `generationConfig`, and whether that object is empty.
    pub(super) config: Option<(usize, bool)>,
    /// The range of a `generationConfig` that is null.
    pub(super) null_config: Option<Span>,
}

impl Bounds {
    pub(super) fn open(&mut self, api: Api, opening: usize) {
        self.api = api;
        self.opening = opening;
    }

    /// The edits that bound each completion to `tokens`. They change every field with a larger bound. If there is
    /// none, they replace a null, or insert a new field, whose name depends on the API and the model.
    pub fn lower_to(&self, tokens: u64, model: &str, body: &[u8]) -> Vec<Edit> {
        if !self.existing.is_empty() {
            let is_lower = |at: &&Span| at.number(body).is_some_and(|bound| bound <= tokens);
            let edit = |&at: &Span| Edit { at, text: tokens.to_string().into() };
            return self.existing.iter().filter(|at| !is_lower(at)).map(edit).collect();
        }
        if let Some(at) = self.null_config {
            return vec![Edit { at, text: format!("{{\"maxOutputTokens\":{tokens}}}").into() }];
        }
        let model = model.rsplit('/').next().unwrap_or(model);
        let is_reasoning_model = ["o1", "o3", "o4", "gpt-5"].iter().any(|prefix| model.starts_with(prefix));
        if let Some(at) = self.null_max_tokens.filter(|_| !is_reasoning_model) {
            return vec![Edit { at, text: tokens.to_string().into() }];
        }
        let (at, text) = match (self.api, self.config) {
            (Api::Responses, _) => (self.opening, format!("\"max_output_tokens\":{tokens},")),
            (Api::Chat, _) if is_reasoning_model => {
                (self.opening, format!("\"max_completion_tokens\":{tokens},"))
            }
            (Api::Gemini, None) => {
                (self.opening, format!("\"generationConfig\":{{\"maxOutputTokens\":{tokens}}},"))
            }
            (Api::Gemini, Some((at, true))) => (at, format!("\"maxOutputTokens\":{tokens}")),
            (Api::Gemini, Some((at, false))) => (at, format!("\"maxOutputTokens\":{tokens},")),
            _ => (self.opening, format!("\"max_tokens\":{tokens},")),
        };
        vec![Edit { at: Span::empty(at), text: text.into() }]
    }
}

/// Applies edits, which must not overlap.
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

/// `stream_options` of a body.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct StreamOptions {
    /// The range of the object or null.
    at: Span,
    is_null: bool,
    is_empty: bool,
    /// The range of the value of `include_usage`, and whether it is `true`.
    include_usage: Option<(Span, bool)>,
}

impl StreamOptions {
    pub(super) fn read(raw: &str, start: usize) -> Result<Self, &'static str> {
        const EXPECTED: &str = "an object with at most one include_usage, which is true or false";
        let at = Span { start, end: start + raw.len() };
        if raw == "null" {
            return Ok(Self { at, is_null: true, ..Self::default() });
        }
        if !raw.starts_with('{') {
            return Err(EXPECTED);
        }
        let IncludeUsage(include_usage) = serde_json::from_str(raw).map_err(|_| EXPECTED)?;
        let include_usage = match include_usage.map(RawValue::get) {
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

    pub(super) fn wants_usage(&self) -> bool {
        matches!(self.include_usage, Some((_, true)))
    }

    /// The edit that sets `include_usage`, in the existing options or in new ones.
    pub(super) fn request(options: Option<&Self>, bounds: &Bounds) -> Edit {
        let (at, text) = match options {
            None => (Span::empty(bounds.opening), r#""stream_options":{"include_usage":true},"#),
            Some(Self { include_usage: Some((span, _)), .. }) => (*span, "true"),
            Some(Self { at, is_null: true, .. }) => (*at, r#"{"include_usage":true}"#),
            Some(Self { at, is_empty, .. }) => {
                let open = Span::empty(at.start + 1);
                (open, if *is_empty { r#""include_usage":true"# } else { r#""include_usage":true,"# })
            }
        };
        Edit { at, text: text.into() }
    }
}

/// The value of `include_usage`, which may occur only once and only in this spelling.
struct IncludeUsage<'a>(Option<&'a RawValue>);

impl<'de: 'a, 'a> Deserialize<'de> for IncludeUsage<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Options;
        impl<'de> Visitor<'de> for Options {
            type Value = Option<&'de RawValue>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut found = None;
                while let Some(Text(key)) = map.next_key()? {
                    if position(&["include_usage"], &key).is_none() {
                        map.next_value::<IgnoredAny>()?;
                    } else if key != "include_usage" || found.replace(map.next_value()?).is_some() {
                        return Err(A::Error::custom("include_usage twice or in another case"));
                    }
                }
                Ok(found)
            }
        }
        deserializer.deserialize_map(Options).map(Self)
    }
}
