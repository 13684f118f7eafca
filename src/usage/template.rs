//! Most events of a stream are like one before but for their text: those are not parsed.
//!
//! A template is made of an event that was parsed and did nothing but add one text, which stands in it as one
//! whole string without escapes; where its text has some, of the same event with another text. An event fits
//! if it is the same, byte for byte, but for its places: that text, which may have escapes, the padding that
//! OpenAI adds, and the number that events of Responses have. It can be told without parsing what that one
//! does:
//!
//! - A place begins and ends where it does in the first event: a string's place has no control byte in it, no quote
//!   that is not escaped, and is UTF-8; a number's is a whole number. So both events have the same JSON tokens
//!   but for the values in the places, and doubled, escaped or oddly ordered keys are read alike in both.
//! - Nothing else depends on those values. Padding and number have names that no reader knows. Of the text
//!   it matters only that it is not empty: it is added where the first one's was. Were it a key, a type, an
//!   error or a usage, it would not have been added.
//! - A search for a quoted name finds none that begins or ends in a place but was not found in the first event: a
//!   quote before or behind a place belongs to that string, which no colon follows, and one within has a backslash
//!   before it, which no name ends in.

use super::texts::Slot;
use memchr::{memchr, memchr2, memmem};
use std::borrow::Cow;
use std::ops::Range;

/// A longer event is none that many others are like.
const LONGEST: usize = 4 * 1024;
/// Longer numbers may not be numbers to every parser.
const MOST_DIGITS: usize = 15;

/// What reading one event has done.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Effect {
    /// The last text that was added, and to what: the address of its bytes and how many.
    text: Option<(Slot, usize, usize)>,
    /// There was more than that.
    is_more: bool,
    /// Anthropic's block that is open after it, if it says so.
    open_block: Option<Option<u64>>,
}

impl Effect {
    /// Of an event that has yet to be read.
    pub(super) fn that_opens(open_block: Option<Option<u64>>) -> Self {
        Self { open_block, ..Self::default() }
    }

    pub(super) fn append(&mut self, slot: Slot, text: &str) {
        self.is_more |= self.text.is_some();
        self.text = Some((slot, text.as_ptr().addr(), text.len()));
    }

    /// Something was done that depends on more than the event, or on its text.
    pub(super) fn is_more(&mut self) {
        self.is_more = true;
    }
}

/// What events of one kind have in common.
#[derive(Debug)]
pub(super) struct Template {
    pub(super) slot: Slot,
    pub(super) open_block: Option<Option<u64>>,
    /// What is the same in all of them, each with the place behind it.
    parts: Vec<(Vec<u8>, Place)>,
    end: Vec<u8>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Place {
    Text,
    Padding,
    Number,
}

impl Template {
    /// Made of an event that carries something generated, and what reading it has done, if that can be told of
    /// others like it.
    pub(super) fn of(event: &[u8], effect: &Effect) -> Option<Self> {
        let (slot, address, length) = effect.text.filter(|_| !effect.is_more)?;
        if event.len() > LONGEST + length || event.contains(&b'\\') {
            return None;
        }
        let from = address.checked_sub(event.as_ptr().addr())?;
        let text = (from, from.checked_add(length)?, Place::Text);
        let is_whole = event.get(from.checked_sub(1)?) == Some(&b'"') && event.get(text.1) == Some(&b'"');
        if !is_whole {
            return None;
        }
        let mut places = vec![text];
        places.extend(string_of(event, b"\"obfuscation\":\"").map(|(from, to)| (from, to, Place::Padding)));
        places.extend(number_of(event, b"\"sequence_number\":").map(|(from, to)| (from, to, Place::Number)));
        places.sort_unstable();
        let (mut parts, mut at) = (Vec::with_capacity(places.len()), 0);
        for (from, to, place) in places {
            parts.push((event.get(at..from)?.to_vec(), place));
            at = to;
        }
        let open_block = effect.open_block;
        Some(Self { slot, open_block, parts, end: event[at..].to_vec() })
    }

    /// The text of an event, if that is of this kind.
    pub(super) fn text_of<'e>(&self, event: &'e [u8]) -> Option<Cow<'e, str>> {
        let (mut rest, mut text) = (event, None);
        for (before, place) in &self.parts {
            rest = rest.strip_prefix(&before[..])?;
            let length = match place {
                Place::Number => whole_number(rest)?,
                Place::Padding => plain_string(rest)?,
                Place::Text => string(rest)?,
            };
            let (value, behind) = rest.split_at(length);
            match place {
                Place::Number => {}
                Place::Padding => drop(std::str::from_utf8(value).ok()?),
                Place::Text => {
                    let from = event.len() - rest.len();
                    text = Some(from..from + length);
                }
            }
            rest = behind;
        }
        // When all else fits, for an unescaped text is a new one.
        text.filter(|_| rest == self.end).and_then(|text| unescaped(event, text))
    }
}

/// The event with another text in place of the only string in it that has escapes, if that is a value: as good to
/// make a template of, and to be read if and only if this one can be.
pub(super) fn without_escapes(event: &[u8]) -> Option<Vec<u8>> {
    let (mut at, mut escaped) = (0, None);
    while let Some(quote) = memchr(b'"', &event[at..]) {
        let from = at + quote + 1;
        let to = from + string(&event[from..])?;
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

/// The string between these quotes, if it is one and not empty.
fn unescaped(event: &[u8], text: Range<usize>) -> Option<Cow<'_, str>> {
    let value = &event[text.clone()];
    let text = if memchr(b'\\', value).is_some() {
        Cow::Owned(serde_json::from_slice(&event[text.start - 1..=text.end]).ok()?)
    } else {
        Cow::Borrowed(std::str::from_utf8(value).ok().filter(|_| has_no_control(value))?)
    };
    Some(text).filter(|text| !text.is_empty())
}

/// The length of a string, up to its closing quote.
fn string(json: &[u8]) -> Option<usize> {
    let mut at = 0;
    loop {
        at += memchr2(b'"', b'\\', json.get(at..)?)?;
        if json[at] == b'"' {
            return Some(at);
        }
        at += 2;
    }
}

/// Whether none of the bytes is a control character. The smallest one, and no early end: many at a time.
fn has_no_control(bytes: &[u8]) -> bool {
    bytes.iter().fold(u8::MAX, |least, byte| least.min(*byte)) >= b' '
}

/// The length of a string, up to its closing quote, if it needs no unescaping.
fn plain_string(json: &[u8]) -> Option<usize> {
    let end = memchr2(b'"', b'\\', json).filter(|&end| json[end] == b'"')?;
    has_no_control(&json[..end]).then_some(end)
}

/// The length of a whole number from 0.
fn whole_number(json: &[u8]) -> Option<usize> {
    let digits = json.iter().take_while(|byte| byte.is_ascii_digit()).count();
    (digits == 1 || (2..=MOST_DIGITS).contains(&digits) && json[0] != b'0').then_some(digits)
}

fn string_of(event: &[u8], name: &[u8]) -> Option<(usize, usize)> {
    let from = memmem::find(event, name)? + name.len();
    Some((from, from + plain_string(&event[from..])?))
}

/// A number that ends where its value does.
fn number_of(event: &[u8], name: &[u8]) -> Option<(usize, usize)> {
    let from = memmem::find(event, name)? + name.len();
    let to = from + whole_number(&event[from..])?;
    matches!(event.get(to), Some(b',' | b'}' | b' ')).then_some((from, to))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::usage::texts::Part;
    use crate::usage::{Received, SoFar, SseReader};
    use bytes::Bytes;
    use proptest::prelude::*;

    const EVENT: &str =
        r#"{"choices":[{"index":0,"delta":{"content":"Hi"}}],"sequence_number":7,"obfuscation":"xy"}"#;

    fn template(event: &str) -> Option<Template> {
        let at = event.find("Hi").unwrap();
        let mut effect = Effect::default();
        effect.append(Slot { choice: 0, part: Part::Content }, &event[at..at + 2]);
        Template::of(event.as_bytes(), &effect)
    }

    #[test]
    fn an_event_fits_if_only_its_places_differ() {
        let made = template(EVENT).unwrap();
        let fits =
            |from: &str, to: &str| made.text_of(EVENT.replace(from, to).as_bytes()).map(Cow::into_owned);
        for text in ["Hi", " the\u{e9}re: {", "type", "\u{7f}"] {
            assert_eq!(fits("Hi", text).as_deref(), Some(text));
        }
        for (text, means) in [
            (r"a\n", "a\n"),
            (r"\u00e9\ud83d\ude00", "\u{e9}\u{1f600}"),
            (r#"\"content\":\"b"#, "\"content\":\"b"),
            (r"\\\\", r"\\"),
            (r#"\\\""#, "\\\""),
        ] {
            assert_eq!(fits("Hi", text).as_deref(), Some(means));
        }
        for (from, to) in [("xy", ""), ("7", "0"), ("7", "123456789012345"), ("xy", "\u{e9}")] {
            assert_eq!(fits(from, to).as_deref(), Some("Hi"), "{to}");
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
            assert_eq!(fits(from, to), None, "{to}");
        }
        let broken: Vec<u8> = EVENT.bytes().map(|b| if b == b'H' { 0xc3 } else { b }).collect();
        assert_eq!(made.text_of(&broken), None);
        assert_eq!(made.text_of(&EVENT.as_bytes()[..EVENT.len() - 1]), None);
        // Not the whole of a string; an escape somewhere.
        assert!(template(&EVENT.replace("Hi", "Hi ")).is_none());
        assert!(template(&EVENT.replace("index", r"inde\u0078")).is_none());
    }

    /// Events with places for texts: `%`.
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

    /// What a reader makes of these events. What is guessed by the length of texts is known as soon as they are
    /// looked into, or never where they are reported before.
    fn read(mut reader: SseReader, events: &[Bytes]) -> impl PartialEq + std::fmt::Debug {
        for event in events {
            reader.feed(event, &mut Vec::<Bytes>::new());
        }
        let received = reader.received();
        received.look_into_all();
        let last = received.last_events().next().map(Bytes::copy_from_slice);
        let opened = (received.open_block(), Bytes::copy_from_slice(received.opening()));
        let SoFar { surely, probably } = received.so_far();
        let so_far = (surely, reader.reported().completion().is_none().then_some(probably));
        (so_far, opened, last, reader.reported(), reader.take_texts())
    }

    fn events() -> impl Strategy<Value = Vec<Bytes>> {
        let texts = || prop::collection::vec(0..TEXTS.len(), 1..4);
        // Usual ones in a row, so that there is something to fit.
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
        fn what_is_not_parsed_is_read_as_if_it_were(events in events()) {
            let usual = read(SseReader::new(false), &events);
            prop_assert_eq!(usual, read(SseReader::that_parses_all(), &events));
        }
    }

    #[test]
    fn where_every_text_has_escapes_they_are_usual_too() {
        for text in [r"\n", r#"{\""#, r"\u00e9"] {
            let event = EVENT.replace("Hi", text);
            assert_eq!(without_escapes(event.as_bytes()), Some(EVENT.replace("Hi", "text").into()), "{text}");
            let mut received = Received::default();
            (0..2).for_each(|_| received.push_event(event.as_bytes()));
            assert!(received.push_usual(EVENT.as_bytes()) && received.push_usual(event.as_bytes()), "{text}");
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
    fn usual_events_are_not_parsed_and_others_in_between_change_nothing() {
        let role =
            r#"{"choices":[{"index":0,"delta":{"role":"assistant","content":""}}],"sequence_number":1}"#;
        let mut received = Received::default();
        received.push_event(role.as_bytes());
        received.push_event(EVENT.as_bytes());
        let long = "a".repeat(40_000);
        for (text, is_usual) in
            [(" there", true), (r"\x", false), ("", false), (&long, false), (r"!\n", true), (" ok", true)]
        {
            let event = EVENT.replace("Hi", text);
            assert_eq!(received.push_usual(event.as_bytes()), is_usual, "{text}");
            if !is_usual {
                received.push_event(event.as_bytes());
            }
        }
        assert_eq!(received.so_far().surely, 6);
        assert_eq!(received.finish_events().texts, [format!("Hi there{long}!\n ok")]);
    }
}
