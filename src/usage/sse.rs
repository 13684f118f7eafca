//! Reads the usage of a server-sent event stream while its bytes pass, and withholds one event: the usage chunk
//! that the gateway requested and the caller did not.
//!
//! Takes linear time and bounded memory: each byte is examined a fixed number of times, wherever the network cuts
//! the stream. Lines end with LF, CRLF or CR. Only events with a `usage` that is not null are parsed at once.

use super::choices::ChoiceDetector;
use super::delivered::{Delivered, DeliveredTokens};
use super::sink::{Discard, Sink};
use super::{Reported, TextToCount, ending, fields};
use bytes::Bytes;
use memchr::memchr2;
use memchr::memmem::Finder;
use serde::Deserialize;
use serde_json::value::RawValue;
use std::borrow::Cow;
use std::sync::{Arc, LazyLock};

static USAGE: LazyLock<Finder> = LazyLock::new(|| Finder::new(b"\"usage"));

/// A longer event is passed on and not parsed.
const MAX_EVENT_BYTES: usize = 4 * 1024 * 1024;
/// A longer event is not held back: the usage chunk is far smaller.
const MAX_WITHHELD_BYTES: usize = 256 * 1024;

/// Reads one event stream in pieces of any size.
#[derive(Debug, Default)]
pub struct SseReader {
    /// Whether to withhold the event that carries only usage, because the gateway requested it and the caller did
    /// not.
    withholds: bool,
    /// The bytes of an event whose end has not arrived.
    partial: Vec<u8>,
    /// Whether `partial` has not been passed to the caller yet.
    is_held_back: bool,
    /// Looks for choices in `partial`.
    choices: ChoiceDetector,
    /// Whether the current event exceeds `MAX_EVENT_BYTES` and is therefore not parsed.
    is_too_long: bool,
    /// Whether the current line has bytes.
    in_line: bool,
    /// Whether the last byte was a CR. An LF that follows belongs to it.
    after_cr: bool,
    /// Whether the event that ended with the last byte was withheld. If that byte was the CR of a CRLF, the LF is
    /// withheld too.
    withheld_last: bool,
    reported: Reported,
    delivered: Delivered,
    /// The delivered tokens at the moment when the upstream last reported completion tokens.
    delivered_at_report: DeliveredTokens,
    withheld: u32,
}

impl SseReader {
    /// Creates a reader for a new stream. With `withholds`, it does not pass on the event that has usage and no
    /// choices.
    pub fn new(withholds: bool) -> Self {
        Self { withholds, ..Self::default() }
    }

    #[cfg(test)]
    pub(super) fn without_templates() -> Self {
        Self { delivered: Delivered::without_templates(), ..Self::default() }
    }

    #[cfg(test)]
    pub(super) fn delivered(&mut self) -> &mut Delivered {
        &mut self.delivered
    }

    /// Reads the next piece and passes on the bytes for the caller.
    ///
    /// Without withholding, it passes on the whole piece. With withholding, it may hold back a partial event until
    /// the event is complete or cannot be the usage chunk.
    pub fn feed(&mut self, piece: &Bytes, out: &mut impl Sink) {
        if !self.withholds {
            self.scan(piece, &mut Discard);
            out.push(piece.clone());
            return;
        }
        self.scan(piece, out);
    }

    /// Ends the stream and passes on the held-back bytes. A last event without a blank line after it is read too.
    pub fn finish(&mut self, out: &mut impl Sink) {
        let was_held_back = std::mem::take(&mut self.is_held_back);
        let event = std::mem::take(&mut self.partial);
        self.choices = ChoiceDetector::default();
        let is_usage_chunk = !event.is_empty() && !self.is_too_long && self.read_event(&event);
        self.withheld += u32::from(is_usage_chunk && was_held_back);
        if was_held_back && !is_usage_chunk {
            out.push(Bytes::from(event));
        }
    }

    /// Ends a stream that broke off: drops the partial event. Returns whether the caller has received a part of
    /// that event.
    pub fn break_off(&mut self) -> bool {
        let is_passed_on = self.is_too_long || !(self.partial.is_empty() || self.is_held_back);
        self.partial = Vec::new();
        self.is_held_back = false;
        is_passed_on
    }

    /// The usage reported so far.
    pub fn reported(&self) -> Reported {
        self.reported
    }

    /// Completion tokens so far: the reported ones, plus an estimate of the ones delivered since. An estimate by
    /// text length is limited to `cap`, the cap of the request.
    pub fn tokens_so_far(&self, cap: u64) -> u64 {
        let (reported, before, now) =
            (self.reported.completion().unwrap_or(0), self.delivered_at_report, self.delivered.tokens());
        let lower_bound = reported + now.lower_bound.saturating_sub(before.lower_bound);
        let best_guess = reported + now.best_guess.saturating_sub(before.best_guess);
        lower_bound.max(best_guess.min(cap))
    }

    /// The events that end the stream as if the model had reached its token limit, in the format of the delivered
    /// events.
    pub fn length_ending(&self, choices: u64) -> String {
        ending::at_length(&self.delivered, choices, self.tokens_so_far(u64::MAX))
    }

    /// The sequence number of the next event, if the events are numbered (Responses API).
    pub fn next_sequence_number(&self) -> Option<u64> {
        ending::next_sequence_number(&self.delivered)
    }

    /// Number of withheld events.
    pub fn withheld(&self) -> u32 {
        self.withheld
    }

    /// Bytes buffered for counting.
    pub fn buffered_bytes(&self) -> usize {
        self.delivered.buffered_bytes()
    }

    /// Whether enough text for a portion (see `take_portion`) has arrived.
    pub fn has_portion(&self) -> bool {
        self.delivered.has_portion()
    }

    /// Takes a portion: text to count while the rest of the stream arrives. `None`: too little text so far, or the
    /// previous portion is not counted yet.
    pub fn take_portion(&mut self) -> Option<Arc<Vec<String>>> {
        self.delivered.take_portion()
    }

    /// Records the tokens of the portion that was taken last; `None`: counting failed.
    pub fn portion_counted(&mut self, tokens: Option<u64>) {
        self.delivered.portion_counted(tokens);
    }

    /// Takes the generated text that was delivered since usage was last reported.
    pub fn take_text(&mut self) -> TextToCount {
        std::mem::take(&mut self.delivered).finish_events()
    }

    fn scan(&mut self, piece: &Bytes, out: &mut impl Sink) {
        // `passed`: index of the first byte of this piece that was not passed on yet.
        let (mut passed, mut event_start, mut at) = (0, 0, 0);
        if self.after_cr && piece.first() == Some(&b'\n') {
            at = 1;
            if self.partial.is_empty() {
                event_start = 1;
                if self.withheld_last {
                    passed = 1;
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
            let is_blank = !std::mem::take(&mut self.in_line);
            if is_blank {
                if self.end_event(&piece[event_start..at]) {
                    self.withheld += 1;
                    self.withheld_last = self.after_cr;
                    push_slice(out, piece, passed, event_start);
                    passed = at;
                } else if self.is_held_back {
                    // The event is not withheld: its earlier pieces go first.
                    out.push(Bytes::copy_from_slice(&self.partial));
                }
                self.partial.clear();
                self.choices = ChoiceDetector::default();
                self.is_held_back = false;
                self.is_too_long = false;
                event_start = at;
            }
        }
        self.in_line |= at < piece.len();
        self.extend_partial(piece, passed, event_start, out);
    }

    /// Buffers the event that begins in `piece` and does not end in it. Passes on the bytes that need not be held
    /// back.
    fn extend_partial(&mut self, piece: &Bytes, passed: usize, event_start: usize, out: &mut impl Sink) {
        let tail = &piece[event_start..];
        if tail.is_empty() {
            push_slice(out, piece, passed, event_start);
            return;
        }
        let before = self.partial.len();
        let may_hold_back = self.withholds && !self.is_too_long && (before == 0 || self.is_held_back);
        let was_held_back = std::mem::take(&mut self.is_held_back);
        let is_too_long = self.is_too_long || before + tail.len() > MAX_EVENT_BYTES;
        if !is_too_long {
            self.partial.extend_from_slice(tail);
            if may_hold_back {
                self.choices.feed(tail);
                self.is_held_back = !self.choices.has_choice() && self.partial.len() <= MAX_WITHHELD_BYTES;
            }
        }
        if self.is_held_back {
            push_slice(out, piece, passed, event_start);
        } else {
            if was_held_back {
                out.push(Bytes::copy_from_slice(&self.partial[..before]));
            }
            push_slice(out, piece, passed, piece.len());
        }
        if is_too_long {
            self.is_too_long = true;
            self.delivered.skip(before + tail.len());
            self.partial = Vec::new();
        }
    }

    /// Ends the event that consists of `partial` and `tail`. Returns whether to withhold it.
    fn end_event(&mut self, tail: &[u8]) -> bool {
        if self.is_too_long {
            self.delivered.skip(tail.len());
            return false;
        }
        if self.partial.is_empty() {
            // The size limit must not depend on where the stream is cut.
            return self.read_event(tail) && self.withholds && tail.len() <= MAX_WITHHELD_BYTES;
        }
        let before = self.partial.len();
        let mut event = std::mem::take(&mut self.partial);
        event.extend_from_slice(tail);
        let is_usage_chunk = self.read_event(&event) && event.len() <= MAX_WITHHELD_BYTES;
        event.truncate(before);
        self.partial = event;
        is_usage_chunk && self.is_held_back
    }

    /// Reads one complete event. Returns whether it carries only usage.
    fn read_event(&mut self, event: &[u8]) -> bool {
        let Some(data) = data_of(event) else { return false };
        if is_error_event(event) {
            return false; // its data is not a completion, whatever its shape
        }
        // An event that matches a template reports no usage, because the event behind the template reported none.
        if self.delivered.push_matching(&data) {
            return false;
        }
        if mentions_usage(&data)
            && let Ok(chunk) = serde_json::from_slice::<UsageEvent>(&data)
            && let Some(reported) = chunk.reported()
        {
            self.reported.update(reported);
            let is_usage_chunk = chunk.is_usage_chunk();
            if !is_usage_chunk {
                self.delivered.push_unmatched(&data);
            }
            if reported.completion().is_some() {
                self.delivered_at_report = self.delivered.tokens();
                self.delivered.usage_reported();
            }
            return is_usage_chunk;
        }
        self.delivered.push_event(&data);
        false
    }
}

/// The fields of an event that can hold usage.
#[derive(Deserialize)]
struct UsageEvent<'a> {
    #[serde(borrow)]
    choices: Option<&'a RawValue>,
    #[serde(borrow)]
    usage: Option<&'a RawValue>,
    /// Gemini.
    #[serde(borrow, rename = "usageMetadata")]
    usage_metadata: Option<&'a RawValue>,
    /// Groq: holds a `usage` that repeats the numbers.
    #[serde(borrow)]
    x_groq: Option<&'a RawValue>,
    /// Responses API: the complete response.
    #[serde(borrow)]
    response: Option<&'a RawValue>,
    /// Anthropic's first event.
    #[serde(borrow)]
    message: Option<&'a RawValue>,
    /// Cohere's last event.
    #[serde(borrow)]
    delta: Option<&'a RawValue>,
}

impl UsageEvent<'_> {
    /// The usage that the event reports; `None`: it has none.
    fn reported(&self) -> Option<Reported> {
        let nested = |parent: Option<&RawValue>| fields::read_within(parent?.get());
        let direct = |usage: Option<&RawValue>| {
            let usage = usage.map(RawValue::get).filter(|usage| *usage != "null")?;
            Some(Reported::read(usage))
        };
        let all = [
            nested(self.response),
            nested(self.message),
            nested(self.delta),
            nested(self.x_groq),
            direct(self.usage_metadata),
            direct(self.usage),
        ];
        all.into_iter().flatten().reduce(|mut sum, next| {
            sum.update(next);
            sum
        })
    }

    /// Whether this is the extra event of a stream with `include_usage`: usage and an empty list of choices.
    fn is_usage_chunk(&self) -> bool {
        self.usage.is_some_and(|usage| usage.get() != "null")
            && self.choices.is_some_and(|choices| is_empty_array(choices.get()))
    }
}

fn push_slice(out: &mut impl Sink, piece: &Bytes, from: usize, to: usize) {
    if from < to {
        out.push(piece.slice(from..to));
    }
}

fn is_empty_array(json: &str) -> bool {
    json.strip_prefix('[').and_then(|j| j.strip_suffix(']')).is_some_and(|inside| inside.trim().is_empty())
}

/// Whether data may report usage: a key begins with `usage` and its value is not null. Many upstreams send
/// `"usage":null` in every event.
fn mentions_usage(data: &[u8]) -> bool {
    USAGE.find_iter(data).any(|at| {
        let after = &data[at + USAGE.needle().len()..];
        let value = after.strip_prefix(b"\"").and_then(|after| after.trim_ascii_start().strip_prefix(b":"));
        !value.is_some_and(|value| value.trim_ascii_start().starts_with(b"null"))
    })
}

/// Whether an event has the name `error`.
fn is_error_event(event: &[u8]) -> bool {
    let name = event.strip_prefix(b"event:").unwrap_or_default().trim_ascii_start();
    name.strip_prefix(b"error").is_some_and(|rest| matches!(rest.first(), Some(b'\n' | b'\r')))
}

/// The data of an event; several `data` lines are joined by LF. `None`: it has no data.
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
mod tests;
