//! Finds the usage in a JSON answer while its bytes pass.
//!
//! Only the values of a few top-level keys are buffered and parsed, because an answer may be megabytes long
//! (embeddings). A nested `usage` does not count, except one in a choice (Moonshot), and only where the top level has
//! none. Gemini can answer with a list of chunks; the last usage in it counts.

use super::event::EventUsage;
use super::{Reported, fields};
use crate::json::{Found, MemberScanner, replace_lone_surrogates};
use memchr::memmem::Finder;
use std::sync::LazyLock;

/// The key of the usage within a choice, as it is written.
static USAGE_KEY: LazyLock<Finder> = LazyLock::new(|| Finder::new(b"\"usage\""));
/// A longer usage object is ignored.
const MAX_USAGE_BYTES: usize = 64 * 1024;

/// Where the value of a key holds the usage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum UsageHolder {
    /// The value is the usage.
    Usage,
    /// Cohere's `meta`: token counts among other fields.
    Meta,
    /// Groq's `x_groq`: an object with a `usage`.
    Parent,
    /// The list of choices, which can hold usage.
    Choices,
}

impl UsageHolder {
    fn of_key(key: &[u8], is_in_list: bool) -> Option<Self> {
        match key {
            b"usageMetadata" => Some(Self::Usage),
            b"usage" if !is_in_list => Some(Self::Usage),
            b"meta" if !is_in_list => Some(Self::Meta),
            b"x_groq" if !is_in_list => Some(Self::Parent),
            b"choices" if !is_in_list => Some(Self::Choices),
            _ => None,
        }
    }
}

/// Reads one JSON document in pieces of any size. Takes linear time and buffers at most 64 KiB.
#[derive(Debug, Default)]
pub struct JsonReader {
    scanner: MemberScanner,
    value: PartialValue,
    /// `None`: no list of choices can hold usage so far.
    choices: Option<Box<ChoicesReader>>,
    /// The usage of the answer. `None`: none so far.
    answer: Option<Reported>,
}

/// Reads the usage within the choices of a document.
#[derive(Debug, Default)]
struct ChoicesReader {
    scanner: MemberScanner,
    /// A part of the list was scanned, and its end was not.
    is_within: bool,
    value: PartialValue,
    reported: Option<Reported>,
}

/// The value that is being read, if it can hold usage.
#[derive(Debug, Default)]
struct PartialValue {
    holder: Option<UsageHolder>,
    json: Vec<u8>,
    is_too_long: bool,
}

impl JsonReader {
    /// Reads the next piece.
    pub fn feed(&mut self, piece: &[u8]) {
        let Self { scanner, value, choices, answer } = self;
        scanner.feed(piece, |found| match found {
            Found::Key { key, is_in_list } => {
                *value = PartialValue { holder: UsageHolder::of_key(key, is_in_list), ..Default::default() };
            }
            Found::Value { part, is_last } if value.holder == Some(UsageHolder::Choices) => {
                let is_within = choices.as_ref().is_some_and(|choices| choices.is_within);
                let is_whole = is_last && !is_within;
                // A list that arrives whole is scanned only if it has the key.
                if !is_whole || USAGE_KEY.find(part).is_some() {
                    choices.get_or_insert_default().feed(part, is_last);
                }
            }
            Found::Value { part, is_last } => {
                value.extend(part);
                if is_last && value.holder.is_some() {
                    update(answer, std::mem::take(value).usage());
                }
            }
        });
    }

    /// The usage reported so far.
    pub fn reported(&self) -> Reported {
        let choice = self.choices.as_ref().and_then(|choices| choices.reported);
        EventUsage { answer: self.answer, choice }.total()
    }

    /// Whether the reported usage covers the whole answer. `choices`: how many the request names. The usage within
    /// a choice covers only that choice, and the usage of a chunk in a list covers only the text up to that chunk.
    pub fn has_final_report(&self, choices: u64) -> bool {
        if self.answer.is_some() { !self.scanner.is_list() || self.is_complete() } else { choices <= 1 }
    }

    /// The text between the document so far and another element, if the document is a list of objects that can be
    /// continued here.
    pub fn list_separator(&self) -> Option<&'static str> {
        self.scanner.list_separator()
    }

    /// Whether the end of the document was read.
    pub fn is_complete(&self) -> bool {
        self.scanner.is_complete()
    }
}

impl ChoicesReader {
    /// Reads the next part of the list.
    fn feed(&mut self, part: &[u8], is_last: bool) {
        let Self { scanner, is_within, value, reported } = self;
        *is_within = !is_last;
        scanner.feed(part, |found| match found {
            Found::Key { key, .. } => {
                let holder = (key == b"usage").then_some(UsageHolder::Usage);
                *value = PartialValue { holder, ..Default::default() };
            }
            Found::Value { part, is_last } => {
                value.extend(part);
                if is_last && value.holder.is_some() {
                    update(reported, std::mem::take(value).usage());
                }
            }
        });
    }
}

/// Updates the report with a later one. A null reports nothing.
fn update(known: &mut Option<Reported>, later: Option<Reported>) {
    let later = later.filter(|later| later.has_any() || later.has_incredible());
    match (known, later) {
        (Some(known), Some(later)) => known.update(later),
        (known @ None, later) => *known = later,
        (Some(_), None) => {}
    }
}

impl PartialValue {
    fn extend(&mut self, part: &[u8]) {
        if self.holder.is_none() {
            return;
        }
        if self.json.len() + part.len() > MAX_USAGE_BYTES {
            self.is_too_long = true;
        } else {
            self.json.extend_from_slice(part);
        }
    }

    fn usage(self) -> Option<Reported> {
        let holder = self.holder?;
        let json = replace_lone_surrogates(&self.json);
        let text = if self.is_too_long { None } else { std::str::from_utf8(&json).ok() };
        match holder {
            UsageHolder::Usage => Some(Reported::read(text.unwrap_or("invalid"))),
            UsageHolder::Meta => Some(fields::read_meta(text.unwrap_or("null"))),
            UsageHolder::Parent => fields::read_within(text.unwrap_or("null").trim_start()),
            UsageHolder::Choices => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(text: &[u8], cuts: &[usize]) -> (Reported, bool) {
        let mut reader = JsonReader::default();
        let mut from = 0;
        for cut in cuts.iter().copied().chain([text.len()]) {
            let cut = cut.clamp(from, text.len());
            reader.feed(&text[from..cut]);
            from = cut;
        }
        (reader.reported(), reader.is_complete())
    }

    fn completion(text: &str) -> Option<u64> {
        read(text.as_bytes(), &[]).0.completion()
    }

    #[test]
    fn only_the_top_level_usage_counts() {
        assert_eq!(
            completion(r#"{"a":[1,{"usage":{"completion_tokens":9}}],"usage":{"completion_tokens":3}}"#),
            Some(3)
        );
        assert_eq!(completion(r#"{"a":{"usage":{"completion_tokens":9}}}"#), None);
        assert_eq!(completion(r#"[{"usage":{"completion_tokens":9}}]"#), None);
        assert_eq!(completion(r#"{"a":"\"usage\":{\"completion_tokens\":9}"}"#), None);
        assert_eq!(completion(r#"{"a":"usage","completion_tokens":9}"#), None);
        assert_eq!(completion("{ \"usage\" : \n {\"completion_tokens\" : 3 } \r\n}"), Some(3));
        assert_eq!(completion(r#"{"usage":null}"#), None);
        assert_eq!(completion(r#"{"usages":{"completion_tokens":3},"usag":{"completion_tokens":4}}"#), None);
    }

    #[test]
    fn a_colon_without_a_key_does_not_belong_to_the_key_before() {
        let document = r#"{"usage":{"completion_tokens":3},:{"completion_tokens":9},
            "choices":[{"usage":{"completion_tokens":1}}],:{:8,"a":2}}"#;
        for cut in 0..=document.len() {
            let (reported, _) = read(document.as_bytes(), &[cut]);
            assert_eq!((reported.completion(), reported.has_incredible()), (Some(3), false), "{cut}");
        }
    }

    #[test]
    fn usage_is_found_in_the_shape_of_each_provider() {
        for (document, want) in [
            (r#"{"candidates":[],"usageMetadata":{"promptTokenCount":2,"candidatesTokenCount":3}}"#, (2, 3)),
            (
                r#"[{"usageMetadata":{"promptTokenCount":2,"candidatesTokenCount":1}},
                    {"a":[1],"usageMetadata":{"candidatesTokenCount":3}}]"#,
                (2, 3),
            ),
            (r#"{"meta":{"x":1,"billed_units":{"input_tokens":2,"output_tokens":3}}}"#, (2, 3)),
            (r#"{"x_groq":{"id":"r","usage":{"prompt_tokens":2,"completion_tokens":3}}}"#, (2, 3)),
            (
                r#"{"usage":{"prompt_tokens":2,"completion_tokens":3},"x_groq":{"usage":{"prompt_tokens":2,"completion_tokens":3}}}"#,
                (2, 3),
            ),
        ] {
            let cuts: Vec<usize> = (0..document.len()).collect();
            for cuts in [&cuts[..], &[]] {
                let (reported, ended) = read(document.as_bytes(), cuts);
                assert_eq!(
                    (reported.prompt(), reported.completion()),
                    (Some(want.0), Some(want.1)),
                    "{document}"
                );
                assert!(ended && !reported.has_incredible());
            }
        }
        // Other values under these keys report nothing.
        let (reported, _) = read(br#"{"meta":"words","x_groq":[1],"a":1}"#, &[]);
        assert_eq!(reported, Reported::default());
    }

    #[test]
    fn usage_within_a_choice_counts_if_the_top_level_has_none() {
        let choice = |usage: &str| {
            format!(r#"{{"index":0,"message":{{"usage":{{"completion_tokens":9}}}},"usage":{usage}}}"#)
        };
        let (three, null) = (choice(r#"{"prompt_tokens":2,"completion_tokens":3}"#), choice("null"));
        let top = r#""usage":{"prompt_tokens":7,"completion_tokens":5}"#;
        for (document, want) in [
            (format!(r#"{{"choices":[{three}]}}"#), Some((2, 3))),
            (format!(r#"{{"choices":[{three},{null}],"usage":null}}"#), Some((2, 3))),
            (format!(r#"{{"choices":[{three}],{top}}}"#), Some((7, 5))),
            (format!(r#"{{{top},"choices":[{three}]}}"#), Some((7, 5))),
            (
                format!(r#"{{"choices":[{three}],"usage":{{"prompt_tokens":0,"completion_tokens":0}}}}"#),
                Some((2, 3)),
            ),
            (format!(r#"{{"choices":[{null}]}}"#), None),
            (format!(r#"{{"a":[{three}]}}"#), None),
            (format!(r#"[{{"choices":[{three}]}}]"#), None),
            (format!(r#"{{"choices":[{three}"#), Some((2, 3))),
        ] {
            let cuts: Vec<usize> = (0..document.len()).collect();
            for cuts in [&cuts[..], &[]] {
                let (reported, _) = read(document.as_bytes(), cuts);
                assert_eq!(reported.prompt().zip(reported.completion()), want, "{document}");
            }
        }
    }

    #[test]
    fn a_report_is_final_unless_it_covers_a_part_of_the_answer() {
        let choice = r#"{"choices":[{"usage":{"completion_tokens":3}}]}"#;
        let list = r#"[{"usageMetadata":{"candidatesTokenCount":1}}]"#;
        for (document, choices, is_final) in [
            (r#"{"usage":{"completion_tokens":3}}"#, 2, true),
            (r#"{"usage":{"completion_tokens":3},"choices":[{"#, 2, true),
            (choice, 1, true),
            (choice, 2, false),
            (list, 1, true),
            (&list[..list.len() - 1], 1, false),
        ] {
            let mut reader = JsonReader::default();
            reader.feed(document.as_bytes());
            assert_eq!(reader.has_final_report(choices), is_final, "{document}");
        }
    }

    #[test]
    fn an_endless_usage_object_is_not_buffered() {
        let mut reader = JsonReader::default();
        reader.feed(br#"{"usage":{"x":""#);
        for _ in 0..100 {
            reader.feed(&[b'a'; 4096]);
        }
        assert!(reader.value.json.len() <= MAX_USAGE_BYTES);
        reader.feed(br#"","completion_tokens":3}}"#);
        assert!(reader.reported().has_incredible() && !reader.reported().has_any());
    }

    proptest! {
        #[test]
        fn usage_does_not_depend_on_cuts(mut cuts in prop::collection::vec(0usize..140, 0..20)) {
            let text = br#"{"id":"x","choices":[{"message":{"content":"a \"b\" \\ c","n":[1,{}]}}],"usage":{"prompt_tokens":7,"completion_tokens":3},"x":0}"#;
            cuts.sort_unstable();
            prop_assert_eq!(read(text, &cuts), read(text, &[]));
        }

        #[test]
        fn agrees_with_a_json_parser(n in 0u64..100_000, text in ".{0,60}", key in "[a-z]{0,8}", wrap in 0..3) {
            let inner = serde_json::json!({"usage": {"completion_tokens": n + 1}, &key: &text});
            let document = match wrap {
                0 => serde_json::json!({"k": &text, "usage": {"completion_tokens": n}, "z": inner}),
                1 => serde_json::json!({&key: [inner], "a": text}),
                _ => serde_json::json!([inner, text]),
            };
            let want = document.get("usage").and_then(|u| u.get("completion_tokens")).and_then(serde_json::Value::as_u64);
            prop_assert_eq!(completion(&document.to_string()), want);
        }

        #[test]
        fn no_input_causes_a_panic(pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..50), 0..10)) {
            let mut reader = JsonReader::default();
            for piece in pieces {
                reader.feed(&piece);
            }
        }
    }
}
