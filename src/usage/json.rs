//! Usage of a whole JSON answer, found while its bytes go by.
//!
//! Only the values of a few top-level keys are kept and parsed. An answer may be megabytes long
//! (embeddings); what stands elsewhere in it, also another `usage` further in, is passed over. Gemini's streams
//! can be one list of answers, of which the last word counts.

use super::{Reported, fields};
use memchr::memchr2;

/// No usage object is longer than this; one that is does not count as reported.
const LONGEST_USAGE: usize = 64 * 1024;
const LONGEST_KEY: usize = 13;

/// What a key's value says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Says {
    Usage,
    /// Usage among other things: Cohere's `meta`.
    Meta,
    /// Groq's `x_groq`, with a `usage` of its own.
    Holder,
}

impl Says {
    /// By the key; in a list of answers only Gemini's.
    fn of(key: &[u8], is_list: bool) -> Option<Self> {
        match key {
            b"usageMetadata" => Some(Self::Usage),
            b"usage" if !is_list => Some(Self::Usage),
            b"meta" if !is_list => Some(Self::Meta),
            b"x_groq" if !is_list => Some(Self::Holder),
            _ => None,
        }
    }
}

/// Follows one JSON document, fed in arbitrary pieces. Linear; keeps at most 64 KiB.
#[derive(Debug, Default)]
pub struct JsonReader {
    depth: u32,
    /// The depth at which keys are looked at: 1, in a list of answers 2.
    top: u32,
    place: Place,
    /// At that depth: the next string is a key.
    expects_key: bool,
    in_key: bool,
    /// The key's first bytes; longer ones are of no interest.
    key: Vec<u8>,
    value: Option<(Says, Vec<u8>)>,
    too_long: bool,
    ended: bool,
    reported: Reported,
}

#[derive(Clone, Copy, Debug, Default, PartialEq)]
enum Place {
    #[default]
    Outside,
    String,
    Escape,
}

impl JsonReader {
    /// Reads the next piece.
    pub fn feed(&mut self, bytes: &[u8]) {
        // Start of what belongs to the value and has not been copied yet.
        let mut copied = 0;
        let mut at = 0;
        while at < bytes.len() {
            match self.place {
                Place::Escape => {
                    self.place = Place::String;
                    at += 1;
                }
                Place::String => at = self.string(bytes, at),
                Place::Outside if self.depth > self.top => {
                    at += structural(&bytes[at..]);
                    if let Some(&byte) = bytes.get(at) {
                        self.further_in(byte);
                        at += 1;
                    }
                }
                Place::Outside => {
                    if let Some(ends_value) = self.outside(bytes[at]) {
                        if ends_value {
                            self.keep(&bytes[copied.min(at)..at]);
                            self.finish_value();
                        }
                        copied = at + 1;
                    }
                    at += 1;
                }
            }
        }
        self.keep(&bytes[copied.min(bytes.len())..]);
    }

    /// What was reported so far.
    pub fn reported(&self) -> Reported {
        self.reported
    }

    /// Whether the document's end was seen.
    pub fn is_complete(&self) -> bool {
        self.ended
    }

    /// Passes over a string; returns where to go on.
    fn string(&mut self, bytes: &[u8], at: usize) -> usize {
        let rest = &bytes[at..];
        let end = memchr2(b'"', b'\\', rest);
        if self.in_key {
            let part = &rest[..end.unwrap_or(rest.len())];
            let room = (LONGEST_KEY + 1).saturating_sub(self.key.len());
            self.key.extend_from_slice(&part[..part.len().min(room)]);
        }
        let Some(end) = end else { return bytes.len() };
        if rest[end] == b'\\' {
            self.place = Place::Escape;
            if self.in_key {
                // An escaped key is not taken for `usage`.
                self.key.extend_from_slice(b"\\");
            }
        } else {
            self.place = Place::Outside;
            self.in_key = false;
        }
        at + end + 1
    }

    /// Takes a quote or bracket further in than the keys that are looked at.
    fn further_in(&mut self, byte: u8) {
        match byte {
            b'"' => self.place = Place::String,
            b'{' | b'[' => self.depth = self.depth.saturating_add(1),
            _ => self.depth -= 1,
        }
    }

    /// Takes one byte outside of strings, at the depth of those keys or above it. `Some(true)`: a top-level value
    /// ends before it; `Some(false)`: one begins after it.
    fn outside(&mut self, byte: u8) -> Option<bool> {
        match byte {
            b'"' => {
                self.place = Place::String;
                if self.depth == self.top && self.expects_key {
                    self.in_key = true;
                    self.key.clear();
                }
                None
            }
            b'{' | b'[' => {
                self.depth += 1;
                if self.depth == 1 {
                    self.top = if byte == b'[' { 2 } else { 1 };
                }
                self.expects_key = self.depth == self.top && byte == b'{';
                None
            }
            b'}' | b']' => {
                let ends_answer = self.depth == self.top;
                self.depth = self.depth.saturating_sub(1);
                self.ended |= self.depth == 0;
                ends_answer.then_some(true)
            }
            b',' if self.depth == self.top => {
                self.expects_key = true;
                Some(true)
            }
            b':' if self.depth == self.top && self.expects_key => {
                self.expects_key = false;
                self.value = Says::of(&self.key, self.top == 2).map(|says| (says, Vec::new()));
                self.too_long = false;
                Some(false)
            }
            _ => None,
        }
    }

    fn keep(&mut self, bytes: &[u8]) {
        if let Some((_, value)) = &mut self.value {
            if value.len() + bytes.len() > LONGEST_USAGE {
                self.too_long = true;
            } else {
                value.extend_from_slice(bytes);
            }
        }
    }

    fn finish_value(&mut self) {
        let Some((says, value)) = self.value.take() else { return };
        let text = if self.too_long { None } else { std::str::from_utf8(&value).ok() };
        self.reported.update(match says {
            Says::Usage => Reported::read(text.unwrap_or("broken")),
            Says::Meta => fields::read_meta(text.unwrap_or("null")),
            Says::Holder => fields::read_within(text.unwrap_or("null")).unwrap_or_default(),
        });
    }
}

/// So many bytes are looked at together.
const STRIDE: usize = 32;

/// How many bytes come before the next quote or bracket: of embeddings, most of them.
fn structural(bytes: &[u8]) -> usize {
    // A brace differs from a square bracket in one bit. No early end within a stride, so that it takes few instructions.
    let is = |byte: &u8| *byte == b'"' || matches!(byte | 0x20, b'{' | b'}');
    let has_none = |stride: &&[u8]| !stride.iter().fold(false, |any, byte| any | is(byte));
    let skipped = bytes.chunks_exact(STRIDE).take_while(has_none).count() * STRIDE;
    skipped + bytes[skipped..].iter().position(is).unwrap_or(bytes.len() - skipped)
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
    fn usage_is_found_where_each_provider_has_it() {
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
                assert!(ended && !reported.was_refused());
            }
        }
        // What else is called so says nothing.
        let (reported, _) = read(br#"{"meta":"words","x_groq":[1],"a":1}"#, &[]);
        assert_eq!(reported, Reported::default());
    }

    #[test]
    fn a_document_is_complete_at_its_last_brace() {
        assert!(read(br#"{"a":"}"}"#, &[]).1);
        assert!(!read(br#"{"a":"}""#, &[]).1);
    }

    #[test]
    fn a_usage_without_end_is_not_kept() {
        let mut reader = JsonReader::default();
        reader.feed(br#"{"usage":{"x":""#);
        for _ in 0..100 {
            reader.feed(&[b'a'; 4096]);
        }
        assert!(reader.value.as_ref().is_some_and(|(_, v)| v.len() <= LONGEST_USAGE));
        reader.feed(br#"","completion_tokens":3}}"#);
        assert!(reader.reported().was_refused() && !reader.reported().is_any());
    }

    proptest! {
        #[test]
        fn usage_does_not_depend_on_where_the_bytes_are_cut(mut cuts in prop::collection::vec(0usize..140, 0..20)) {
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
        fn long_lists_are_passed_over_as_byte_by_byte(
            parts in prop::collection::vec("[-0-9., \n]{0,70}|[\\[\\]{}]|\"[a-z\\[}]{0,3}\"", 0..20),
        ) {
            let text = format!(r#"{{"a":[{}],"usage":{{"x":[[{}]],"completion_tokens":3}}}}"#, parts.concat(), "1,".repeat(50));
            let cuts: Vec<usize> = (0..text.len()).collect();
            prop_assert_eq!(read(text.as_bytes(), &[]), read(text.as_bytes(), &cuts));
            let bytes = parts.concat();
            let want = bytes.find(|c| "\"{}[]".contains(c)).unwrap_or(bytes.len());
            prop_assert_eq!(structural(bytes.as_bytes()), want);
        }

        #[test]
        fn no_bytes_make_it_panic(pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..50), 0..10)) {
            let mut reader = JsonReader::default();
            for piece in pieces {
                reader.feed(&piece);
            }
        }
    }
}
