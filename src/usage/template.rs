//! Recognises stream events that differ from an earlier event only in their text, so that they need no parsing.
//!
//! Matching takes a seventh of the time of parsing. Without templates the whole gateway spent 7 to 9 % more CPU per
//! event on paced streams, and 50 % more on quick ones.
//!
//! A template is made from a parsed event whose only effect was to append one text. That text must be one whole
//! string of the event, without escapes. If it has escapes, the template is made from the same event with another
//! text. An event matches if it is equal, byte for byte, except in its placeholders: the text, which may have escapes; the
//! padding that OpenAI adds (`obfuscation`); and the sequence number of the Responses API.
//!
//! Parsing a matching event would append its text to the same slot, and do nothing else:
//!
//! - Each placeholder stands between the same fixed bytes in both events. A string placeholder has no control byte
//!   and no unescaped quote, and is UTF-8. A number placeholder is a whole number. So both events consist of the
//!   same JSON tokens apart from the placeholder values, and duplicate, escaped or oddly ordered keys have the same
//!   meaning in both.
//! - The placeholder values affect nothing else. The parser ignores the padding and the number. The text only has
//!   to be non-empty: it is appended to the slot of the first text. If it were a key, a type, an error or a usage,
//!   the first event would not have appended it.
//! - A search for a quoted field name finds the same names in both events. A quote before or after a placeholder
//!   belongs to the placeholder's string, and no colon follows that string. A quote within a placeholder follows a
//!   backslash, and no name ends with a backslash.

use super::collector::{EventEffect, TextSlot};
use crate::json::string_length;
use memchr::{memchr, memchr2, memmem};
use std::borrow::Cow;
use std::ops::Range;

/// An event with more bytes besides its text gets no template.
const MAX_TEMPLATE_BYTES: usize = 4 * 1024;
/// Parsers may read longer numbers differently.
const MAX_DIGITS: usize = 15;

/// The bytes that events of one kind have in common.
#[derive(Debug)]
pub(super) struct EventTemplate {
    /// The slot to which the text is appended.
    pub(super) slot: TextSlot,
    /// The content block that is open after a matching event; `None`: the event does not change it.
    pub(super) open_block: Option<Option<u64>>,
    /// Fixed bytes, each followed by a placeholder.
    parts: Vec<(Vec<u8>, Placeholder)>,
    /// The fixed bytes after the last placeholder.
    end: Vec<u8>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Placeholder {
    Text,
    Padding,
    Number,
}

impl EventTemplate {
    /// The template of a parsed event; `None`: its effect is not one text, or the text is not one whole string.
    pub(super) fn of(event: &[u8], effect: &EventEffect, open_block: Option<Option<u64>>) -> Option<Self> {
        let (slot, address, length) = effect.only_text()?;
        if event.len() > MAX_TEMPLATE_BYTES + length || event.contains(&b'\\') {
            return None;
        }
        let from = address.checked_sub(event.as_ptr().addr())?;
        let text = (from, from.checked_add(length)?, Placeholder::Text);
        let is_whole_string =
            event.get(from.checked_sub(1)?) == Some(&b'"') && event.get(text.1) == Some(&b'"');
        if !is_whole_string {
            return None;
        }
        let mut placeholders = vec![text];
        placeholders.extend(
            string_of(event, b"\"obfuscation\":\"").map(|(from, to)| (from, to, Placeholder::Padding)),
        );
        placeholders.extend(
            number_of(event, b"\"sequence_number\":").map(|(from, to)| (from, to, Placeholder::Number)),
        );
        placeholders.sort_unstable();
        let (mut parts, mut at) = (Vec::with_capacity(placeholders.len()), 0);
        for (from, to, kind) in placeholders {
            parts.push((event.get(at..from)?.to_vec(), kind));
            at = to;
        }
        Some(Self { slot, open_block, parts, end: event[at..].to_vec() })
    }

    /// The text of an event; `None`: the event does not match.
    pub(super) fn text_of<'e>(&self, event: &'e [u8]) -> Option<Cow<'e, str>> {
        let (mut rest, mut text) = (event, None);
        for (fixed, kind) in &self.parts {
            rest = rest.strip_prefix(&fixed[..])?;
            let length = match kind {
                Placeholder::Number => whole_number(rest)?,
                Placeholder::Padding => plain_string(rest)?,
                Placeholder::Text => string_length(rest)?,
            };
            let (value, after) = rest.split_at(length);
            match kind {
                Placeholder::Number => {}
                Placeholder::Padding => drop(std::str::from_utf8(value).ok()?),
                Placeholder::Text => {
                    let from = event.len() - rest.len();
                    text = Some(from..from + length);
                }
            }
            rest = after;
        }
        // Unescaping comes last because it allocates.
        text.filter(|_| rest == self.end).and_then(|text| unescaped(event, text))
    }
}

/// Replaces the only string that has escapes with another text. The string must be a value. The result is valid
/// JSON if and only if the event is, and a template can be made from it.
pub(super) fn without_escapes(event: &[u8]) -> Option<Vec<u8>> {
    let (mut at, mut escaped) = (0, None);
    while let Some(quote) = memchr(b'"', &event[at..]) {
        let from = at + quote + 1;
        let to = from + string_length(&event[from..])?;
        if memchr(b'\\', &event[from..to]).is_some() && escaped.replace(from..to).is_some() {
            return None;
        }
        at = to + 1;
    }
    let escaped = escaped?;
    let is_key = event[escaped.end + 1..].trim_ascii_start().starts_with(b":");
    unescaped(event, escaped.clone()).filter(|_| !is_key)?;
    Some([&event[..escaped.start], b"text", &event[escaped.end..]].concat())
}

/// The string in this range without its escapes; `None`: it is empty or not a valid string.
fn unescaped(event: &[u8], text: Range<usize>) -> Option<Cow<'_, str>> {
    let value = &event[text.clone()];
    let text = if memchr(b'\\', value).is_some() {
        Cow::Owned(serde_json::from_slice(&event[text.start - 1..=text.end]).ok()?)
    } else {
        Cow::Borrowed(std::str::from_utf8(value).ok().filter(|_| has_no_control(value))?)
    };
    Some(text).filter(|text| !text.is_empty())
}

/// Whether no byte is a control character. The loop has no early exit, so that the compiler can vectorise it.
fn has_no_control(bytes: &[u8]) -> bool {
    bytes.iter().fold(u8::MAX, |min, byte| min.min(*byte)) >= b' '
}

/// The length of a string without escapes, up to its closing quote.
fn plain_string(json: &[u8]) -> Option<usize> {
    let end = memchr2(b'"', b'\\', json).filter(|&end| json[end] == b'"')?;
    has_no_control(&json[..end]).then_some(end)
}

/// The length of a whole number without sign or leading zeros.
fn whole_number(json: &[u8]) -> Option<usize> {
    let digits = json.iter().take_while(|byte| byte.is_ascii_digit()).count();
    (digits == 1 || (2..=MAX_DIGITS).contains(&digits) && json[0] != b'0').then_some(digits)
}

/// The range of the string after `name`.
fn string_of(event: &[u8], name: &[u8]) -> Option<(usize, usize)> {
    let from = memmem::find(event, name)? + name.len();
    Some((from, from + plain_string(&event[from..])?))
}

/// The range of the whole number after `name`.
fn number_of(event: &[u8], name: &[u8]) -> Option<(usize, usize)> {
    let from = memmem::find(event, name)? + name.len();
    let to = from + whole_number(&event[from..])?;
    matches!(event.get(to), Some(b',' | b'}' | b' ')).then_some((from, to))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::usage::collector::TextKind;
    use crate::usage::{Delivered, DeliveredTokens, SseReader};
    use bytes::Bytes;
    use proptest::prelude::*;

    const EVENT: &str =
        r#"{"choices":[{"index":0,"delta":{"content":"Hi"}}],"sequence_number":7,"obfuscation":"xy"}"#;

    fn template(event: &str) -> Option<EventTemplate> {
        let at = event.find("Hi").unwrap();
        let mut effect = EventEffect::default();
        effect.record_text(TextSlot { choice: 0, kind: TextKind::Content }, &event[at..at + 2]);
        EventTemplate::of(event.as_bytes(), &effect, None)
    }

    #[test]
    fn an_event_matches_if_only_its_placeholders_differ() {
        let template_of_event = template(EVENT).unwrap();
        let text_of = |from: &str, to: &str| {
            template_of_event.text_of(EVENT.replace(from, to).as_bytes()).map(Cow::into_owned)
        };
        for text in ["Hi", " the\u{e9}re: {", "type", "\u{7f}"] {
            assert_eq!(text_of("Hi", text).as_deref(), Some(text));
        }
        for (text, means) in [
            (r"a\n", "a\n"),
            (r"\u00e9\ud83d\ude00", "\u{e9}\u{1f600}"),
            (r#"\"content\":\"b"#, "\"content\":\"b"),
            (r"\\\\", r"\\"),
            (r#"\\\""#, "\\\""),
        ] {
            assert_eq!(text_of("Hi", text).as_deref(), Some(means));
        }
        for (from, to) in [("xy", ""), ("7", "0"), ("7", "123456789012345"), ("xy", "\u{e9}")] {
            assert_eq!(text_of(from, to).as_deref(), Some("Hi"), "{to}");
        }
        for (from, to) in [
            ("Hi", ""),
            ("Hi", r"a\"),
            ("Hi", r"a\x"),
            ("Hi", r"\ud83d"),
            ("Hi", "\\n\u{1}"),
            ("Hi", "\u{1}"),
            ("xy", r"\n"),
            ("Hi", r#"a","content":"b"#),
            ("xy", "\t"),
            ("7", "07"),
            ("7", "-7"),
            ("7", "1234567890123456"),
            ("7", ""),
            ("}", "} "),
            ("index", "Index"),
        ] {
            assert_eq!(text_of(from, to), None, "{to}");
        }
        let broken: Vec<u8> = EVENT.bytes().map(|b| if b == b'H' { 0xc3 } else { b }).collect();
        assert_eq!(template_of_event.text_of(&broken), None);
        assert_eq!(template_of_event.text_of(&EVENT.as_bytes()[..EVENT.len() - 1]), None);
        // The text is not a whole string; the event has an escape.
        assert!(template(&EVENT.replace("Hi", "Hi ")).is_none());
        assert!(template(&EVENT.replace("index", r"inde\u0078")).is_none());
    }

    /// Events with placeholders for texts (`%`) and numbers (`#`).
    const SHAPES: [&str; 38] = [
        r#"{"choices":[{"index":0,"delta":{"content":"%"}}]}"#,
        r#"{"id":"c","choices":[{"index":0,"delta":{"content":"%"},"finish_reason":null}],"usage":null}"#,
        r#"{"choices":[{"index":0,"delta":{"content":"%"}}],"usage":null,"obfuscation":"%"}"#,
        r#"{"obfuscation":"%","choices":[{"index":0,"delta":{"content":"%"}}]}"#,
        r#"{"choices":[{"delta":{"content":"%"},"index":1}]}"#,
        r#"{"choices":[{"index":0,"delta":{"content":"%"}},{"index":1,"delta":{"content":"%"}}]}"#,
        r#"{"choices":[{"index":0,"delta":{"content":"%","content":"%"}}]}"#,
        r#"{"choices":[{"index":0,"delta":{"content":"%"}}],"choices":[]}"#,
        r#"{"choices":[{"index":0,"delta":{"\u0063ontent":"%"}}]}"#,
        r#"{"choices":[{"index":0,"delta":{"content":"%","reasoning_content":"%","reasoning":"x"}}]}"#,
        r#"{"choices":[{"delta":{"reasoning":"%","reasoning_details":[{"text":"%"}]}}]}"#,
        r#"{"choices":[{"delta":{"content":["%","%"]}}]}"#,
        r#"{"choices":[{"delta":{"content":[{"type":"text","text":"%"}]}}]}"#,
        r#"{"choices":[{"delta":{"tool_calls":[{"index":0,"function":{"name":"%","arguments":"%"}}]}}]}"#,
        r#"{"choices":[{"delta":{"tool_calls":[{"index":0,"function":{"arguments":"%"}}]}}]}"#,
        r#"{"choices":[{"text":"%","index":0}],"name":"%"}"#,
        r#"{"choices":[{"text":"%"}],"error":"%"}"#,
        r#"{"choices":[{"text":"%"}],"error":null}"#,
        r#"{"choices":[{"text":"%"}],"type":"%"}"#,
        r#"{"choices":[{"text":"a"}],"delta":{"usage":"%"},"\u0075sage":{"completion_tokens":3}}"#,
        r#"{"choices":[{"text":"%"}],"usage":{"completion_tokens":3}}"#,
        r#"{"choices":[],"usage":{"completion_tokens":3}}"#,
        r#"{"error":{"message":"%"}}"#,
        r#"{"type":"ping"}"#,
        r#"{"type":"message_start","message":{"usage":{"input_tokens":3,"output_tokens":1}}}"#,
        r#"{"type":"content_block_start","index":1,"content_block":{"type":"text","text":"%"}}"#,
        r#"{"type":"content_block_start","index":2,"content_block":{"type":"tool_use","name":"%"}}"#,
        r#"{"type":"content_block_delta","index":1,"delta":{"type":"text_delta","text":"%"}}"#,
        r#"{"type":"content_block_delta","index":2,"delta":{"type":"input_json_delta","partial_json":"%"}}"#,
        r#"{"type":"content_block_stop","index":1}"#,
        r#"{"type":"response.output_text.delta","sequence_number":#,"delta":"%","obfuscation":"%"}"#,
        r#"{"type":"response.output_text.delta","delta":"%","sequence_number":#}"#,
        r#"{"type":"response.output_text.done","sequence_number":#,"text":"%"}"#,
        r#"{"type":"content-delta","index":0,"delta":{"message":{"content":{"text":"%"}}}}"#,
        r#"{"candidates":[{"content":{"parts":[{"text":"%"}]}}],"usageMetadata":null}"#,
        r#"[{"candidates":[{"content":{"parts":[{"text":"%"},{"functionCall":{"name":"%"}}]}}]}]"#,
        "{\"choices\":\ndata: [{\"text\":\"%\"}]}",
        r#"{"choices":[{"text":"%"}]"#,
    ];

    const TEXTS: [&[u8]; 29] = [
        b"",
        b"a",
        b" token",
        b"type",
        b"error",
        b"usage",
        b"ping",
        b"null",
        b"content",
        b"response.",
        b": \\\"content\\\": ",
        b"\\n",
        b"\\u00e9",
        b"\\ud83d",
        b"\\ud83d\\ude00",
        b"\\\\\\\"",
        b"\\\"usage",
        b"a\\\"type",
        b"error\\\":{",
        b"\\n\xc3",
        b"\\",
        b" : {[}]",
        b"\",\"content\":\"",
        b"\t",
        b"\x7f",
        "\u{e9}\u{65e5}\u{1f44d}".as_bytes(),
        b"\xc3",
        b"\xa9",
        b"a word and a longer text of several words",
    ];

    fn filled(shape: &str, texts: &[usize], number: u64) -> Bytes {
        let (mut event, mut texts) = (b"data: ".to_vec(), texts.iter().cycle());
        for byte in shape.bytes() {
            match byte {
                b'%' => event.extend_from_slice(TEXTS[texts.next().copied().unwrap_or_default()]),
                b'#' => event.extend_from_slice(number.to_string().as_bytes()),
                _ => event.push(byte),
            }
        }
        event.extend_from_slice(b"\n\n");
        event.into()
    }

    /// The state of a reader after these events. The estimate by text length depends on when events are parsed, so
    /// it is left out if completion tokens were reported.
    fn read(mut reader: SseReader, events: &[Bytes]) -> impl PartialEq + std::fmt::Debug {
        for event in events {
            reader.feed(event, &mut Vec::<Bytes>::new());
        }
        let delivered = reader.delivered();
        delivered.parse_all();
        let last = delivered.last_events().next().map(Bytes::copy_from_slice);
        let opened = (delivered.open_block(), Bytes::copy_from_slice(delivered.opening()));
        let DeliveredTokens { lower_bound, best_guess } = delivered.tokens();
        let tokens = (lower_bound, reader.reported().completion().is_none().then_some(best_guess));
        (tokens, opened, last, reader.reported(), reader.take_text())
    }

    fn events() -> impl Strategy<Value = Vec<Bytes>> {
        let texts = || prop::collection::vec(0..TEXTS.len(), 1..4);
        // Several events of one shape in a row, so that templates match.
        let some = (0..SHAPES.len(), prop::collection::vec(texts(), 1..8), 0u64..20);
        prop::collection::vec(some, 1..12).prop_map(|rows| {
            let of_row = |(shape, rows, number): (usize, Vec<Vec<usize>>, u64)| {
                let row = (number..).zip(rows);
                row.map(move |(number, texts)| filled(SHAPES[shape], &texts, number)).collect::<Vec<_>>()
            };
            rows.into_iter().flat_map(of_row).collect()
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]
        #[test]
        fn templates_have_the_effect_of_parsing(events in events()) {
            let matched = read(SseReader::new(false), &events);
            prop_assert_eq!(matched, read(SseReader::without_templates(), &events));
        }
    }

    #[test]
    fn events_whose_texts_all_have_escapes_match_too() {
        for text in [r"\n", r#"{\""#, r"\u00e9"] {
            let event = EVENT.replace("Hi", text);
            assert_eq!(without_escapes(event.as_bytes()), Some(EVENT.replace("Hi", "text").into()), "{text}");
            let mut delivered = Delivered::default();
            (0..2).for_each(|_| delivered.push_event(event.as_bytes()));
            assert!(
                delivered.push_matching(EVENT.as_bytes()) && delivered.push_matching(event.as_bytes()),
                "{text}"
            );
        }
        for event in [
            EVENT,
            r#"{"a":"\n","b":"\n"}"#,
            r#"{"a":"\x"}"#,
            r#"{"a\n" : 1}"#,
            r#"{"a":"\n"#,
            r#"{"a":"\"#,
            "",
        ] {
            assert_eq!(without_escapes(event.as_bytes()), None, "{event}");
        }
    }

    #[test]
    fn other_events_in_between_do_not_affect_a_template() {
        let role =
            r#"{"choices":[{"index":0,"delta":{"role":"assistant","content":""}}],"sequence_number":1}"#;
        let mut delivered = Delivered::default();
        delivered.push_event(role.as_bytes());
        delivered.push_event(EVENT.as_bytes());
        let long = "a".repeat(40_000);
        for (text, matches) in
            [(" there", true), (r"\x", false), ("", false), (&long, false), (r"!\n", true), (" ok", true)]
        {
            let event = EVENT.replace("Hi", text);
            assert_eq!(delivered.push_matching(event.as_bytes()), matches, "{text}");
            if !matches {
                delivered.push_event(event.as_bytes());
            }
        }
        assert_eq!(delivered.tokens().lower_bound, 6);
        assert_eq!(delivered.finish_events().texts, [format!("Hi there{long}!\n ok")]);
    }
}
