//! Reads the usage of a server-sent event stream while its bytes pass, and withholds one event: the usage chunk
//! that the gateway requested and the caller did not. Comment lines always pass at once.
//!
//! Takes linear time and bounded memory: each byte is examined a fixed number of times, wherever the network cuts
//! the stream. Lines end with LF, CRLF or CR. Only events with a `usage` that is not null are parsed at once.

use super::choice_ends::ChoiceEnds;
use super::choices::ChoiceDetector;
use super::delivered::{Delivered, DeliveredTokens};
use super::event::{EventReport, EventUsage, UsageEvent};
use super::sink::{Discard, Sink};
use super::stream_end::StreamEnd;
use super::{AnswerIds, Reported, TextToCount, answer_model, ending};
use crate::json::replace_lone_surrogates;
use bytes::Bytes;
use memchr::memchr2;
use memchr::memmem::Finder;
use std::borrow::Cow;
use std::sync::{Arc, LazyLock};

static USAGE: LazyLock<Finder> = LazyLock::new(|| Finder::new(b"\"usage"));

const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";
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
    /// The bytes of an event whose end has not arrived, without its comment lines.
    partial: Vec<u8>,
    /// Whether `partial` has not been passed to the caller yet.
    is_held_back: bool,
    /// The beginning of a comment line within a held-back event. It is passed on when the line is complete.
    partial_comment: Vec<u8>,
    /// Looks for choices in `partial`.
    choices: ChoiceDetector,
    /// Whether the current event exceeds `MAX_EVENT_BYTES` and is therefore not parsed.
    is_too_long: bool,
    /// The line that has begun and not ended.
    line: LineKind,
    /// The line that ended with the last byte, if that byte was a CR. An LF that follows belongs to that line.
    after_cr: Option<LineEnd>,
    /// How many bytes of a byte order mark the stream begins with. All of them: the mark has passed, or there is none.
    byte_order_mark: usize,
    /// The choices that have ended, if the reader withholds.
    choice_ends: ChoiceEnds,
    /// The usage reported so far.
    reported: Reported,
    /// Its parts: the usage of the answer, and usage within choices, which counts only where the other is missing.
    reported_by_part: EventUsage,
    end: StreamEnd,
    delivered: Delivered,
    /// The delivered tokens at the moment when the upstream last reported completion tokens.
    delivered_at_report: DeliveredTokens,
    withheld: u32,
}

/// The kind of a line, by its first byte.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum LineKind {
    /// No byte of it has arrived.
    #[default]
    Empty,
    Comment,
    Field,
}

/// A line that has ended.
#[derive(Clone, Copy, Debug)]
enum LineEnd {
    /// A field, or the blank line that ends an event.
    Event,
    /// The blank line that ends a withheld event.
    Withheld,
    Comment,
}

/// The position in a piece of the stream.
struct PiecePosition<'p> {
    piece: &'p Bytes,
    /// Index of the first byte that was neither passed on nor held back.
    passed: usize,
    /// Index of the first byte that belongs to the current event and is not in `partial`.
    event_start: usize,
}

impl LineKind {
    /// The kind of the line after these bytes of it.
    fn after(self, bytes: &[u8]) -> Self {
        match (self, bytes.first()) {
            (Self::Empty, Some(b':')) => Self::Comment,
            (Self::Empty, Some(_)) => Self::Field,
            _ => self,
        }
    }
}

impl SseReader {
    /// Creates a reader for a new stream. With `withholds`, it does not pass on the event that has usage and no
    /// choices, or only choices that carry nothing after all choices have ended.
    pub fn new(withholds: bool) -> Self {
        Self { withholds, ..Self::default() }
    }

    /// Sets the number of choices that the request names.
    #[must_use]
    pub fn with_choices(self, choices: u64) -> Self {
        Self { end: StreamEnd::of(choices), ..self }
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
    /// the event is complete or cannot be the usage chunk. A comment line within a held-back event is passed on when
    /// the line is complete, and so comes before the lines that are held back.
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
        push_all(out, &mut self.partial_comment);
    }

    /// Ends a stream that broke off: drops the partial event. Returns whether the caller has received a part of
    /// that event, or of a comment line.
    pub fn break_off(&mut self) -> bool {
        let in_comment = self.line == LineKind::Comment && self.partial_comment.is_empty();
        let is_passed_on = in_comment || self.is_too_long || !(self.partial.is_empty() || self.is_held_back);
        self.partial = Vec::new();
        self.partial_comment = Vec::new();
        self.is_held_back = false;
        is_passed_on
    }

    /// The model that the stream names.
    pub fn answer_model(&self) -> Option<String> {
        answer_model::of_stream(&self.delivered)
    }

    /// The ids of a complete response (Responses API).
    pub fn answer_ids(&self) -> Option<AnswerIds> {
        AnswerIds::of_stream(&self.delivered)
    }

    /// The usage reported so far.
    pub fn reported(&self) -> Reported {
        self.reported
    }

    /// Whether the final report of completion tokens has passed. Before, a report can be a placeholder, or the usage
    /// so far.
    pub fn has_final_report(&self) -> bool {
        self.end.has_final_report()
    }

    /// Whether the last event of the API has passed.
    pub fn has_last_event(&self) -> bool {
        self.end.has_last_event()
    }

    /// Completion tokens so far: the reported ones, plus an estimate of the ones delivered since. An estimate by
    /// text length is limited to `cap`, the cap of the request.
    pub fn tokens_so_far(&self, cap: u64) -> u64 {
        let (reported, before, now) =
            (self.reported.completion().unwrap_or(0), self.delivered_at_report, self.delivered.tokens());
        let lower_bound = reported + now.lower_bound.saturating_sub(before.lower_bound);
        let best_guess = reported + now.best_guess.saturating_sub(before.best_guess);
        // The report may be the usage of one of several choices.
        let of_all = if self.end.has_several_choices() { now } else { DeliveredTokens::default() };
        let best_guess = best_guess.max(of_all.best_guess);
        lower_bound.max(of_all.lower_bound).max(best_guess.min(cap))
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

    /// Takes the generated text that no final report covers.
    pub fn take_text(&mut self) -> TextToCount {
        std::mem::take(&mut self.delivered).finish_events()
    }

    fn scan(&mut self, piece: &Bytes, out: &mut impl Sink) {
        let mut at = self.skip_byte_order_mark(piece);
        let mut position = PiecePosition { piece, passed: 0, event_start: at };
        if let Some(line) = self.after_cr.take_if(|_| !piece.is_empty())
            && piece[0] == b'\n'
        {
            at = 1;
            self.end_crlf(line, &mut position, out);
        }
        while let Some(found) = memchr2(b'\n', b'\r', &piece[at..]) {
            let (line_start, line_end) = (at, at + found);
            at = line_end + 1;
            let is_last_cr = piece[line_end] == b'\r' && at == piece.len();
            if piece[line_end] == b'\r' && piece.get(at) == Some(&b'\n') {
                at += 1;
            }
            let line = match std::mem::take(&mut self.line).after(&piece[line_start..line_end]) {
                LineKind::Field => LineEnd::Event,
                LineKind::Comment => {
                    self.take_comment(&mut position, line_start, at, out);
                    push_all(out, &mut self.partial_comment);
                    LineEnd::Comment
                }
                LineKind::Empty => self.take_event(&mut position, at, out),
            };
            self.after_cr = is_last_cr.then_some(line);
        }
        self.line = self.line.after(&piece[at..]);
        if self.line == LineKind::Comment {
            self.take_comment(&mut position, at, piece.len(), out);
        }
        self.extend_partial(&mut position, piece.len(), out);
    }

    /// Passes on a byte order mark at the start of the stream. Returns how many bytes of `piece` belong to it.
    fn skip_byte_order_mark(&mut self, piece: &[u8]) -> usize {
        let missing = &BYTE_ORDER_MARK[self.byte_order_mark..];
        let found = piece.iter().zip(missing).take_while(|(byte, mark)| byte == mark).count();
        self.byte_order_mark += found;
        if found < missing.len() && found < piece.len() {
            // There is no byte order mark: these bytes belong to the first line.
            self.partial.extend_from_slice(&BYTE_ORDER_MARK[..self.byte_order_mark]);
            self.line = self.line.after(&self.partial);
            self.byte_order_mark = BYTE_ORDER_MARK.len();
        }
        found
    }

    /// Reads an LF at the beginning of a piece. It belongs to `line`, which ended with a CR in the previous piece.
    fn end_crlf(&self, line: LineEnd, position: &mut PiecePosition, out: &mut impl Sink) {
        let is_passed = match line {
            LineEnd::Event if !self.partial.is_empty() => return,
            LineEnd::Event => false,
            LineEnd::Withheld => true,
            LineEnd::Comment => {
                if self.is_held_back {
                    position.pass_to(1, out);
                }
                self.is_held_back
            }
        };
        position.event_start = 1;
        if is_passed {
            position.passed = 1;
        }
    }

    /// Reads a comment line, or a part of one. It belongs to no event. If the event around it is held back, the bytes
    /// go to `partial_comment`.
    fn take_comment(&mut self, position: &mut PiecePosition, start: usize, end: usize, out: &mut impl Sink) {
        if position.event_start < start {
            self.extend_partial(position, start, out);
        }
        position.event_start = end;
        if !self.is_held_back {
            return;
        }
        self.partial_comment.extend_from_slice(&position.piece[start..end]);
        position.passed = end;
        // The size limit must not depend on where the stream is cut.
        if self.partial.len() + self.partial_comment.len() > MAX_WITHHELD_BYTES {
            self.is_held_back = false;
            out.push(Bytes::copy_from_slice(&self.partial));
            push_all(out, &mut self.partial_comment);
        }
    }

    /// Ends an event at its blank line, which ends at index `end`.
    fn take_event(&mut self, position: &mut PiecePosition, end: usize, out: &mut impl Sink) -> LineEnd {
        let is_withheld = self.end_event(&position.piece[position.event_start..end]);
        if is_withheld {
            self.withheld += 1;
            position.pass_to(position.event_start, out);
            position.passed = end;
        } else if self.is_held_back {
            // The event is not withheld: its earlier pieces go first.
            out.push(Bytes::copy_from_slice(&self.partial));
        }
        self.partial.clear();
        self.choices = ChoiceDetector::default();
        self.is_held_back = false;
        self.is_too_long = false;
        position.event_start = end;
        if is_withheld { LineEnd::Withheld } else { LineEnd::Event }
    }

    /// Buffers the bytes of the current event up to index `end`, where the event does not end. Passes on the bytes
    /// that need not be held back.
    fn extend_partial(&mut self, position: &mut PiecePosition, end: usize, out: &mut impl Sink) {
        let tail = &position.piece[position.event_start..end];
        if tail.is_empty() {
            position.pass_to(end, out);
            return;
        }
        let before = self.partial.len();
        let may_hold_back = self.withholds && !self.is_too_long && (before == 0 || self.is_held_back);
        let was_held_back = std::mem::take(&mut self.is_held_back);
        let is_too_long = self.is_too_long || before + tail.len() > MAX_EVENT_BYTES;
        if !is_too_long {
            self.partial.extend_from_slice(tail);
            if may_hold_back {
                let may_be_usage_chunk = self.may_be_usage_chunk(tail, self.choice_ends.all_ended());
                self.is_held_back = may_be_usage_chunk && self.partial.len() <= MAX_WITHHELD_BYTES;
            }
        }
        if self.is_held_back {
            position.pass_to(position.event_start, out);
            position.passed = end;
        } else {
            if was_held_back {
                out.push(Bytes::copy_from_slice(&self.partial[..before]));
            }
            position.pass_to(end, out);
        }
        position.event_start = end;
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
            self.choice_ends.observe_unreadable();
            return false;
        }
        // An event is withheld by the same rules wherever the stream is cut: see `extend_partial`.
        let have_choices_ended = self.choice_ends.all_ended();
        if self.partial.is_empty() {
            return self.read_event(tail)
                && self.withholds
                && tail.len() <= MAX_WITHHELD_BYTES
                && self.may_be_usage_chunk(tail, have_choices_ended);
        }
        let before = self.partial.len();
        let mut event = std::mem::take(&mut self.partial);
        event.extend_from_slice(tail);
        let is_usage_chunk = self.read_event(&event) && event.len() <= MAX_WITHHELD_BYTES;
        event.truncate(before);
        self.partial = event;
        is_usage_chunk && self.is_held_back && self.may_be_usage_chunk(tail, have_choices_ended)
    }

    /// Whether the current event can be the usage chunk, by its lines up to and including `tail`: it has no choice, or
    /// all choices ended before it.
    fn may_be_usage_chunk(&mut self, tail: &[u8], have_choices_ended: bool) -> bool {
        self.choices.feed(tail);
        !self.choices.has_choice() || have_choices_ended
    }

    /// Reads one complete event. Returns whether it carries only usage.
    fn read_event(&mut self, event: &[u8]) -> bool {
        let Some(data) = data_of(event) else { return false };
        // An event that matches a template reports no usage, because the event behind the template reported none. A text
        // with half of a surrogate pair matches none.
        if self.delivered.push_matching(&data) {
            return false;
        }
        let data = replace_lone_surrogates(&data);
        // An event that matches a template begins and ends the same choices as the event behind the template.
        if self.withholds {
            self.choice_ends.observe(&data);
        }
        if mentions_usage(&data)
            && let Ok(event) = serde_json::from_slice::<UsageEvent>(&data)
            && let Some(report) = event.report()
        {
            return self.read_report(&data, &event, &report);
        }
        self.end.read(&data);
        self.delivered.push_event(&data);
        false
    }

    /// Reads an event that reports usage. Returns whether it carries only usage.
    fn read_report(&mut self, data: &[u8], event: &UsageEvent, report: &EventReport) -> bool {
        self.reported_by_part.update(&report.usage);
        self.reported = self.reported_by_part.total();
        let is_usage_chunk = event.is_usage_chunk(&self.choice_ends);
        if !is_usage_chunk {
            self.delivered.push_unmatched(data);
        }
        let is_final = self.end.read_report(event, report);
        if report.usage.total().completion().is_some_and(|tokens| tokens > 0) {
            self.delivered_at_report = self.delivered.tokens();
            if is_final {
                self.end.final_report();
                self.delivered.usage_reported();
            }
        }
        is_usage_chunk
    }
}

impl PiecePosition<'_> {
    /// Passes on the bytes up to index `end`.
    fn pass_to(&mut self, end: usize, out: &mut impl Sink) {
        if self.passed < end {
            out.push(self.piece.slice(self.passed..end));
            self.passed = end;
        }
    }
}

/// Passes on all bytes of a buffer.
fn push_all(out: &mut impl Sink, buffer: &mut Vec<u8>) {
    if !buffer.is_empty() {
        out.push(std::mem::take(buffer).into());
    }
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

/// Reads the data of an event; several `data` lines are joined by LF. `None`: it has no data, or its last name is
/// `error`. Data of errors is not a completion, whatever its shape.
fn data_of(event: &[u8]) -> Option<Cow<'_, [u8]>> {
    let mut data: Option<Cow<'_, [u8]>> = None;
    let mut is_error = false;
    let mut rest = event;
    while !rest.is_empty() {
        let end = memchr2(b'\n', b'\r', rest).unwrap_or(rest.len());
        let line = &rest[..end];
        rest = rest.get(end + 1..).unwrap_or_default();
        let Some(value) = field(line, b"data") else {
            if let Some(name) = field(line, b"event") {
                is_error = name == b"error";
            }
            continue;
        };
        match &mut data {
            None => data = Some(Cow::Borrowed(value)),
            Some(joined) => {
                let joined = joined.to_mut();
                joined.push(b'\n');
                joined.extend_from_slice(value);
            }
        }
    }
    data.filter(|_| !is_error)
}

/// The value of a line, if it is of this field. A line without a colon has an empty value.
fn field<'l>(line: &'l [u8], name: &[u8]) -> Option<&'l [u8]> {
    match line.strip_prefix(name)? {
        [] => Some(b""),
        [b':', b' ', value @ ..] | [b':', value @ ..] => Some(value),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
