//! Usage of a server-sent event stream, read while the bytes go by, and the one event that may be
//! withheld from the caller.
//!
//! Linear and bounded: each byte is looked at a fixed number of times, however the network cut the
//! stream. Line ends are LF, CRLF or CR. Only events that name `usage` are parsed.

use super::choices::Choices;
use super::received::{Received, SoFar};
use super::{Reported, Texts, ending, fields};
use bytes::Bytes;
use memchr::memchr2;
use memchr::memmem::Finder;
use serde::Deserialize;
use serde_json::value::RawValue;
use std::borrow::Cow;
use std::sync::{Arc, LazyLock};

static USAGE: LazyLock<Finder> = LazyLock::new(|| Finder::new(b"\"usage"));

/// An event longer than this passes through unread.
const LONGEST_EVENT: usize = 4 * 1024 * 1024;
/// No more than this of an event is ever kept back: the one to withhold is far smaller.
const MOST_KEPT_BACK: usize = 256 * 1024;

/// Where the pieces of a stream go that the caller is to receive, in order.
pub trait Sink {
    /// Takes the next piece.
    fn push(&mut self, piece: Bytes);
}

impl Sink for Vec<Bytes> {
    fn push(&mut self, piece: Bytes) {
        Vec::push(self, piece);
    }
}

impl Sink for std::collections::VecDeque<Bytes> {
    fn push(&mut self, piece: Bytes) {
        self.push_back(piece);
    }
}

/// Where pieces go that nobody is to receive.
#[derive(Clone, Copy, Debug)]
pub struct Nowhere;

impl Sink for Nowhere {
    fn push(&mut self, _: Bytes) {}
}

/// Follows one event stream, fed in arbitrary pieces.
#[derive(Debug, Default)]
pub struct SseReader {
    /// Whether the gateway itself asked for usage: then the event that only carries it is withheld.
    withholds: bool,
    /// The event that has begun and not ended.
    begun: Vec<u8>,
    /// `begun` is kept back from the caller.
    kept_back: bool,
    /// What is seen of the choices in `begun`.
    choices: Choices,
    /// The event is too long: it is passed over.
    overlong: bool,
    /// The current line has bytes.
    in_line: bool,
    /// The last byte was a CR: an LF that follows belongs to it.
    after_cr: bool,
    /// The event that ended with the last byte was withheld, so the LF of its CRLF is too.
    withheld_last: bool,
    reported: Reported,
    received: Received,
    /// What had come when its tokens were last reported.
    when_reported: SoFar,
    withheld: u32,
}

impl SseReader {
    /// A reader from the start of a stream. With `withholds` the event that has no choices and a usage
    /// is kept from the caller.
    pub fn new(withholds: bool) -> Self {
        Self { withholds, ..Self::default() }
    }

    #[cfg(test)]
    pub(super) fn that_parses_all() -> Self {
        Self { received: Received::that_parses_all(), ..Self::default() }
    }

    #[cfg(test)]
    pub(super) fn received(&mut self) -> &mut Received {
        &mut self.received
    }

    /// Reads the next piece and hands on what the caller is to receive of it.
    ///
    /// Without withholding that is always the piece itself. With it, an event that came in pieces may
    /// be kept back until it is whole or cannot be the one to withhold.
    pub fn feed(&mut self, piece: &Bytes, out: &mut impl Sink) {
        if !self.withholds {
            self.scan(piece, &mut Nowhere);
            out.push(piece.clone());
            return;
        }
        self.scan(piece, out);
    }

    /// The stream has ended: hands on what was kept back. A last event without its blank line counts.
    pub fn finish(&mut self, out: &mut impl Sink) {
        let kept_back = std::mem::take(&mut self.kept_back);
        let event = std::mem::take(&mut self.begun);
        self.choices = Choices::default();
        let reports = !event.is_empty() && !self.overlong && self.event(&event);
        self.withheld += u32::from(reports && kept_back);
        if kept_back && !reports {
            out.push(Bytes::from(event));
        }
    }

    /// The stream has broken off: hands on nothing, an event cut in half is of no use to the caller.
    /// Returns whether the caller has been given a part of an event.
    pub fn break_off(&mut self) -> bool {
        let given = self.overlong || !(self.begun.is_empty() || self.kept_back);
        self.begun = Vec::new();
        self.kept_back = false;
        given
    }

    /// What was reported so far.
    pub fn reported(&self) -> Reported {
        self.reported
    }

    /// How many tokens have come: reported, and guessed of what has come since. By guessing alone it is
    /// not taken to be longer than its request allows.
    pub fn tokens_so_far(&self, cap: u64) -> u64 {
        let (reported, before, now) =
            (self.reported.completion().unwrap_or(0), self.when_reported, self.received.so_far());
        let surely = reported + now.surely.saturating_sub(before.surely);
        let probably = reported + now.probably.saturating_sub(before.probably);
        surely.max(probably.min(cap))
    }

    /// What ends the stream as if the model had reached its bound, made like the events that came.
    pub fn length_ending(&self, choices: u64) -> String {
        ending::of_length(&self.received, choices, self.tokens_so_far(u64::MAX))
    }

    /// The number of the next event, where they have one (Responses).
    pub fn next_sequence_number(&self) -> Option<u64> {
        ending::next_sequence_number(&self.received)
    }

    /// How many events were withheld.
    pub fn withheld(&self) -> u32 {
        self.withheld
    }

    /// Bytes that are kept to be counted.
    pub fn kept_bytes(&self) -> usize {
        self.received.kept_bytes()
    }

    /// Whether so much text has come that a portion of it can be counted.
    pub fn has_portion(&self) -> bool {
        self.received.has_portion()
    }

    /// Texts to be counted while the rest is coming, if there is enough for that, one portion at a time.
    pub fn take_portion(&mut self) -> Option<Arc<Vec<String>>> {
        self.received.take_portion()
    }

    /// How many tokens the portion has; `None`: they could not be counted.
    pub fn portion_counted(&mut self, tokens: Option<u64>) {
        self.received.portion_counted(tokens);
    }

    /// The generated text that has come since usage was reported, if it ever was.
    pub fn take_texts(&mut self) -> Texts {
        std::mem::take(&mut self.received).finish_events()
    }

    fn scan(&mut self, piece: &Bytes, out: &mut impl Sink) {
        // Start of what the caller has not been given of this piece, and of the event in it.
        let (mut given, mut event_start, mut at) = (0, 0, 0);
        if self.after_cr && piece.first() == Some(&b'\n') {
            at = 1;
            if self.begun.is_empty() {
                event_start = 1;
                if self.withheld_last {
                    given = 1;
                }
            }
        }
        if !piece.is_empty() {
            self.after_cr = false;
            self.withheld_last = false;
        }
        while let Some(found) = memchr2(b'\n', b'\r', &piece[at..]) {
            let line_end = at + found;
            self.in_line |= found > 0;
            at = line_end + 1;
            if piece[line_end] == b'\r' {
                match piece.get(at) {
                    Some(b'\n') => at += 1,
                    Some(_) => {}
                    None => self.after_cr = true,
                }
            }
            let blank = !std::mem::take(&mut self.in_line);
            if blank {
                if self.end_event(&piece[event_start..at]) {
                    self.withheld += 1;
                    self.withheld_last = self.after_cr;
                    out_slice(out, piece, given, event_start);
                    given = at;
                } else if self.kept_back {
                    // It came in pieces and is not to be withheld: what came before goes first.
                    out.push(Bytes::copy_from_slice(&self.begun));
                }
                self.begun.clear();
                self.choices = Choices::default();
                self.kept_back = false;
                self.overlong = false;
                event_start = at;
            }
        }
        self.in_line |= at < piece.len();
        self.begin(piece, given, event_start, out);
    }

    /// Keeps what has begun and not ended, and hands on what need not be kept back.
    fn begin(&mut self, piece: &Bytes, given: usize, event_start: usize, out: &mut impl Sink) {
        let tail = &piece[event_start..];
        if tail.is_empty() {
            out_slice(out, piece, given, event_start);
            return;
        }
        let before = self.begun.len();
        let may_keep_back = self.withholds && !self.overlong && (before == 0 || self.kept_back);
        let was_kept_back = std::mem::take(&mut self.kept_back);
        let too_long = self.overlong || before + tail.len() > LONGEST_EVENT;
        if !too_long {
            self.begun.extend_from_slice(tail);
            if may_keep_back {
                self.choices.feed(tail);
                self.kept_back = !self.choices.has_item() && self.begun.len() <= MOST_KEPT_BACK;
            }
        }
        if self.kept_back {
            out_slice(out, piece, given, event_start);
        } else {
            if was_kept_back {
                out.push(Bytes::copy_from_slice(&self.begun[..before]));
            }
            out_slice(out, piece, given, piece.len());
        }
        if too_long {
            self.overlong = true;
            self.received.pass_over(before + tail.len());
            self.begun = Vec::new();
        }
    }

    /// An event has ended with `tail`, after what has begun. Returns whether it is to be withheld.
    fn end_event(&mut self, tail: &[u8]) -> bool {
        if self.overlong {
            self.received.pass_over(tail.len());
            return false;
        }
        if self.begun.is_empty() {
            // By the same measure as if it had come in pieces.
            return self.event(tail) && self.withholds && tail.len() <= MOST_KEPT_BACK;
        }
        let before = self.begun.len();
        let mut event = std::mem::take(&mut self.begun);
        event.extend_from_slice(tail);
        let reports = self.event(&event) && event.len() <= MOST_KEPT_BACK;
        event.truncate(before);
        self.begun = event;
        reports && self.kept_back
    }

    /// Reads one whole event. Returns whether it only reports usage.
    fn event(&mut self, event: &[u8]) -> bool {
        let Some(data) = data_of(event) else { return false };
        if says_error(event) {
            return false; // whatever its data look like, they are no completion
        }
        // What is like the last one that reported nothing does not report either.
        if self.received.push_usual(&data) {
            return false;
        }
        if USAGE.find(&data).is_some()
            && let Ok(chunk) = serde_json::from_slice::<Chunk>(&data)
            && let Some(reported) = chunk.reported()
        {
            self.reported.update(reported);
            let only_reports = chunk.only_reports();
            if !only_reports {
                self.received.push_reporting(&data);
            }
            if reported.completion().is_some() {
                self.when_reported = self.received.so_far();
                self.received.is_reported();
            }
            return only_reports;
        }
        self.received.push_event(&data);
        false
    }
}

/// An event, as far as usage can stand in it.
#[derive(Deserialize)]
struct Chunk<'a> {
    #[serde(borrow)]
    choices: Option<&'a RawValue>,
    #[serde(borrow)]
    usage: Option<&'a RawValue>,
    /// Gemini's.
    #[serde(borrow, rename = "usageMetadata")]
    usage_metadata: Option<&'a RawValue>,
    /// Groq's, with a `usage` of its own; the same numbers once more.
    #[serde(borrow)]
    x_groq: Option<&'a RawValue>,
    /// Of Responses, with the whole of it.
    #[serde(borrow)]
    response: Option<&'a RawValue>,
    /// Of Anthropic's first event.
    #[serde(borrow)]
    message: Option<&'a RawValue>,
    /// Of Cohere's last one.
    #[serde(borrow)]
    delta: Option<&'a RawValue>,
}

impl Chunk<'_> {
    /// What it reports; `None`: it says nothing of usage.
    fn reported(&self) -> Option<Reported> {
        let inner = |part: Option<&RawValue>| fields::read_within(part?.get());
        let outer = |part: Option<&RawValue>| {
            let usage = part.map(RawValue::get).filter(|usage| *usage != "null")?;
            Some(Reported::read(usage))
        };
        let all = [
            inner(self.response),
            inner(self.message),
            inner(self.delta),
            inner(self.x_groq),
            outer(self.usage_metadata),
            outer(self.usage),
        ];
        all.into_iter().flatten().reduce(|mut sum, next| {
            sum.update(next);
            sum
        })
    }

    /// No choices, and a usage: what comes extra where a stream is asked for it.
    fn only_reports(&self) -> bool {
        self.usage.is_some_and(|usage| usage.get() != "null")
            && self.choices.is_some_and(|choices| is_empty_array(choices.get()))
    }
}

fn out_slice(out: &mut impl Sink, piece: &Bytes, from: usize, to: usize) {
    if from < to {
        out.push(piece.slice(from..to));
    }
}

fn is_empty_array(json: &str) -> bool {
    json.strip_prefix('[').and_then(|j| j.strip_suffix(']')).is_some_and(|inside| inside.trim().is_empty())
}

/// Whether an event is called `error`.
fn says_error(event: &[u8]) -> bool {
    let name = event.strip_prefix(b"event:").unwrap_or_default().trim_ascii_start();
    name.strip_prefix(b"error").is_some_and(|rest| matches!(rest.first(), Some(b'\n' | b'\r')))
}

/// The data of an event: of several `data` lines joined by LF. `None`: it has none.
fn data_of(event: &[u8]) -> Option<Cow<'_, [u8]>> {
    let event = event.strip_prefix(b"\xef\xbb\xbf").unwrap_or(event);
    let mut data: Option<Cow<'_, [u8]>> = None;
    let mut rest = event;
    while !rest.is_empty() {
        let end = memchr2(b'\n', b'\r', rest).unwrap_or(rest.len());
        let line = &rest[..end];
        rest = rest.get(end + 1..).unwrap_or_default();
        let Some(value) = line.strip_prefix(b"data:") else { continue };
        let value = value.strip_prefix(b" ").unwrap_or(value);
        match &mut data {
            None => data = Some(Cow::Borrowed(value)),
            Some(joined) => {
                let joined = joined.to_mut();
                joined.push(b'\n');
                joined.extend_from_slice(value);
            }
        }
    }
    data
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const EXTRA: &str =
        r#"data: {"id":"c","choices":[],"usage":{"prompt_tokens":7,"completion_tokens":2,"total_tokens":9}}"#;
    const HI: &str = r#"data: {"id":"c","choices":[{"index":0,"delta":{"content":"Hi"}}],"usage":null}"#;
    const LAST: &str = r#"data: {"id":"c","choices":[{"index":0,"delta":{},"finish_reason":"stop"}],"usage":{"prompt_tokens":7,"completion_tokens":2}}"#;

    /// Feeds a stream cut at the given places; returns what the caller got, and the reader.
    fn follow(stream: &str, withholds: bool, cuts: &[usize]) -> (String, SseReader) {
        let mut reader = SseReader::new(withholds);
        let mut out: Vec<Bytes> = Vec::new();
        let bytes = Bytes::copy_from_slice(stream.as_bytes());
        let mut from = 0;
        for cut in cuts.iter().copied().chain([bytes.len()]) {
            let cut = cut.clamp(from, bytes.len());
            reader.feed(&bytes.slice(from..cut), &mut out);
            from = cut;
        }
        reader.finish(&mut out);
        (String::from_utf8(out.concat()).unwrap(), reader)
    }

    fn every_byte(stream: &str) -> Vec<usize> {
        (0..stream.len()).collect()
    }

    #[test]
    fn just_the_event_that_only_reports_usage_is_withheld() {
        for nl in ["\n", "\r\n", "\r"] {
            let e = |s: &str| format!("{s}{nl}{nl}");
            let before = e(": keepalive") + &e(HI) + &e(LAST);
            let extra = format!(": of it{nl}id: 3{nl}") + &e(EXTRA);
            let after = e("data: [DONE]");
            let stream = before.clone() + &extra + &after;
            for cuts in [vec![], every_byte(&stream), vec![stream.len() - after.len() - 3]] {
                let (got, reader) = follow(&stream, true, &cuts);
                assert_eq!(got, before.clone() + &after, "{nl:?} {cuts:?}");
                assert_eq!(reader.withheld(), 1);
                let (got, reader) = follow(&stream, false, &cuts);
                assert_eq!(got, stream);
                assert_eq!((reader.reported().prompt(), reader.reported().completion()), (Some(7), Some(2)));
            }
        }
    }

    #[test]
    fn what_has_come_is_what_was_reported_and_what_came_since() {
        let event = |content: &str, usage: &str| {
            format!(r#"data: {{"choices":[{{"index":0,"delta":{{"content":"{content}"}}}}]{usage}}}"#)
                + "\n\n"
        };
        let (_, none) = follow(&event("a", "").repeat(30), false, &[]);
        assert_eq!((none.tokens_so_far(u64::MAX), none.tokens_so_far(5)), (30, 30));
        // Some backends report with every event; one token may come in two of them.
        let reported = event("a", "") + &event("b", r#","usage":{"completion_tokens":1}"#);
        let (_, running) = follow(&reported, false, &[]);
        assert_eq!(running.tokens_so_far(u64::MAX), 1);
        let (_, running) = follow(&(reported + &event("c", "")), false, &[]);
        assert_eq!(running.tokens_so_far(u64::MAX), 2);
        // Long texts in few events are guessed by their length, but not beyond what was asked for.
        let (_, long) = follow(&event(&"a".repeat(40_000), "").repeat(2), false, &[]);
        assert_eq!((long.tokens_so_far(u64::MAX), long.tokens_so_far(5_000)), (20_000, 5_000));
    }

    #[test]
    fn the_next_number_follows_the_last_whole_event() {
        for (stream, next) in [
            ("", None),
            ("data: {\"sequence_number\":0}\n\n", Some(1)),
            ("data: {\"sequence_number\":4,\"usage\":{\"output_tokens\":1}}\n\n", Some(5)),
            ("data: {\"sequence_number\":4}\n\ndata: {\"sequence_number\":5", Some(5)),
            ("data: {\"sequence_number\":-4}\n\n", None),
        ] {
            let mut reader = SseReader::new(false);
            reader.feed(&Bytes::from(stream), &mut Vec::<Bytes>::new());
            reader.break_off();
            assert_eq!(reader.next_sequence_number(), next, "{stream}");
        }
    }

    #[test]
    fn usage_is_found_without_a_blank_line_at_the_end_and_behind_a_byte_order_mark() {
        let (got, reader) = follow(EXTRA, true, &[]);
        assert_eq!((got.as_str(), reader.reported().completion()), ("", Some(2)));
        let (_, reader) = follow(&format!("\u{feff}{EXTRA}\n\n"), false, &[]);
        assert_eq!(reader.reported().completion(), Some(2));
        let (_, reader) =
            follow("data: {\"choices\":[],\ndata: \"usage\":{\"completion_tokens\":4}}\n\n", false, &[]);
        assert_eq!(reader.reported().completion(), Some(4));
    }

    #[test]
    fn an_event_in_pieces_is_kept_back_only_while_it_may_be_the_one() {
        let mut reader = SseReader::new(true);
        let mut out: Vec<Bytes> = Vec::new();
        let piece = |s: &'static str| Bytes::from_static(s.as_bytes());
        reader.feed(&piece("data: {\"id\":1,"), &mut out);
        assert!(out.is_empty());
        reader.feed(&piece("\"choices\":[{\"delta\":"), &mut out);
        assert_eq!(out.concat(), b"data: {\"id\":1,\"choices\":[{\"delta\":");
        reader.feed(&piece("{}}]}\n\nda"), &mut out);
        assert_eq!(out.concat(), b"data: {\"id\":1,\"choices\":[{\"delta\":{}}]}\n\n");
        reader.finish(&mut out);
        assert!(out.concat().ends_with(b"\n\nda"));
    }

    #[test]
    fn other_choices_before_the_list_make_no_difference_to_a_cut() {
        let usage = r#""choices":[],"usage":{"completion_tokens":2}}"#;
        for before in [r#""id":"choices","#, r#""a":{"choices":[1]},"#, r#""a":[{"choices":["b"]}],"#] {
            let stream = format!("data: {{{before}{usage}\n\n");
            for cuts in [vec![], every_byte(&stream)] {
                let (got, reader) = follow(&stream, true, &cuts);
                assert_eq!((got.as_str(), reader.withheld()), ("", 1), "{stream}");
            }
        }
    }

    #[test]
    fn text_is_there_to_be_counted_where_usage_never_comes() {
        let (_, mut reader) = follow(&format!("{HI}\n\n{HI}\n\ndata: [DONE]\n\n"), true, &[]);
        assert_eq!(reader.take_texts().texts, ["HiHi"]);
        assert!(!reader.reported().is_any());
    }

    #[test]
    fn an_endless_event_passes_unread_in_bounded_memory() {
        let mut reader = SseReader::new(true);
        let mut passed = 0;
        let piece = Bytes::from(vec![b'x'; 64 * 1024]);
        for _ in 0..200 {
            let mut out: Vec<Bytes> = Vec::new();
            reader.feed(&piece, &mut out);
            passed += out.iter().map(Bytes::len).sum::<usize>();
            assert!(reader.begun.len() <= LONGEST_EVENT);
        }
        let mut out: Vec<Bytes> = Vec::new();
        reader.feed(&Bytes::from(format!("\n\n{HI}\n\n{EXTRA}\n\n")), &mut out);
        assert_eq!((passed, out.concat()), (200 * 64 * 1024, format!("\n\n{HI}\n\n").into_bytes()));
        assert_eq!(reader.reported().completion(), Some(2));
        // All of it is reported now.
        assert_eq!(reader.take_texts(), Texts::default());
        let cuts: Vec<usize> = (0..=passed).step_by(64 * 1024).collect();
        let (_, mut silent) = follow(&format!("{}\n\n{HI}\n\n", "x".repeat(passed)), false, &cuts);
        let counted = silent.take_texts();
        assert_eq!((counted.tokens, counted.texts), ((passed as u64 + 2).div_ceil(4), vec!["Hi".to_owned()]));
    }

    fn line() -> impl Strategy<Value = String> {
        prop_oneof![
            Just(EXTRA.to_owned()),
            Just(HI.to_owned()),
            Just(LAST.to_owned()),
            Just("data: [DONE]".to_owned()),
            Just(String::new()),
            Just(": comment".to_owned()),
            "[a-z]{0,5}:? ?[ -~é]{0,20}",
        ]
    }

    proptest! {
        #[test]
        fn nothing_depends_on_where_the_bytes_are_cut(
            lines in prop::collection::vec((line(), prop_oneof![Just("\n"), Just("\r\n"), Just("\r")]), 0..16),
            cuts in prop::collection::vec(0usize..1200, 0..12),
            withholds in any::<bool>(),
        ) {
            let stream: String = lines.into_iter().map(|(l, nl)| l + nl).collect();
            let mut cuts = cuts;
            cuts.sort_unstable();
            let (whole, mut a) = follow(&stream, withholds, &[]);
            let (cut, mut b) = follow(&stream, withholds, &cuts);
            let (single, mut c) = follow(&stream, withholds, &every_byte(&stream));
            prop_assert_eq!(&whole, &cut);
            prop_assert_eq!(&whole, &single);
            prop_assert_eq!(a.reported(), b.reported());
            prop_assert_eq!(a.reported(), c.reported());
            let texts = a.take_texts();
            prop_assert_eq!(&texts, &b.take_texts());
            prop_assert_eq!(&texts, &c.take_texts());
            if !withholds {
                prop_assert_eq!(whole, stream);
            }
        }
    }
}
