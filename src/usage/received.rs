//! What was received of an answer, kept so that it can be counted if usage never comes.
//!
//! Bounded: events are kept raw until 32 KiB have come together, then only their text. Beyond 1 MiB
//! of text the rest counts as one token for four bytes.

use super::texts::{self, Part, Slot};
use memchr::{memchr_iter, memmem};

/// Raw events are boiled down to their text when they reach this size.
const COMPACT_AT: usize = 32 * 1024;
/// More text than this is not kept.
const MOST_TEXT: usize = 1024 * 1024;
/// A whole JSON answer is kept up to this size.
const MOST_DOCUMENT: usize = 1024 * 1024;
/// A longer opening event is not kept.
const LONGEST_OPENING: usize = 64 * 1024;
/// More texts that are counted apart (choices, tool calls) than this are counted together.
const MOST_TEXTS: usize = 256;
/// What a tool call costs beside its name and arguments.
const TOKENS_PER_TOOL_CALL: u64 = 4;

/// Texts whose tokens are the completion, and tokens that are known without counting.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Texts {
    /// To be counted one by one.
    pub texts: Vec<String>,
    /// To be added.
    pub tokens: u64,
}

impl Texts {
    /// Bytes of text to count: tells how long it will take.
    pub fn bytes(&self) -> usize {
        self.texts.iter().map(String::len).sum()
    }
}

/// The generated text of one answer, as far as it came.
#[derive(Debug, Default)]
pub struct Received {
    /// Event data that has not been looked into, a newline after each.
    raw: Vec<u8>,
    texts: Vec<Kept>,
    /// Calls that came whole.
    whole_calls: u64,
    /// The event that opened the answer, where the ending needs it.
    opening: Option<Vec<u8>>,
    /// Anthropic's block that is open, as far as events have been looked into.
    pub(super) open_block: Option<u64>,
    text_bytes: usize,
    tokens: u64,
    /// Bytes that were passed over.
    uncounted: u64,
    /// So much of `raw`, and of what was passed over, has been reported by the provider.
    reported_raw: usize,
    reported_uncounted: u64,
    /// Events that carried something generated.
    events: u64,
}

/// One text.
#[derive(Debug)]
struct Kept {
    slot: Slot,
    text: String,
    /// So much of it is the name of a tool.
    name: usize,
}

/// How many tokens have come, without counting them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SoFar {
    /// So many at least.
    pub surely: u64,
    /// So many or so.
    pub probably: u64,
}

impl Received {
    /// Keeps the data of one event.
    pub fn push_event(&mut self, data: &[u8]) {
        self.events += u64::from(is_generated(data));
        if self.opening.is_none() && !is_ping(data) {
            let is_needed = data.len() <= LONGEST_OPENING && memmem::find(data, b"\"choices\"").is_none();
            self.opening = Some(if is_needed { data.to_vec() } else { Vec::new() });
        }
        if self.raw.len() + data.len() > COMPACT_AT {
            self.compact();
        }
        if data.len() > COMPACT_AT {
            self.read(data);
        } else {
            let from = self.raw.len();
            self.raw.extend_from_slice(data);
            // Between parts of JSON any space will do, and a newline ends an event here.
            for at in memchr_iter(b'\n', data) {
                self.raw[from + at] = b' ';
            }
            self.raw.push(b'\n');
        }
    }

    /// How many tokens have come: an event that carries any carries one or more, and a token has four
    /// bytes of text or so.
    pub fn so_far(&self) -> SoFar {
        let by_length = (self.text_bytes as u64 + self.uncounted) / 4;
        SoFar { surely: self.events, probably: self.events.max(by_length) }
    }

    /// The data of the last events, the last one first.
    pub fn last_events(&self) -> impl Iterator<Item = &[u8]> {
        let raw = self.raw.strip_suffix(b"\n").unwrap_or(&self.raw);
        raw.rsplit(|&b| b == b'\n')
    }

    /// The event that opened the answer, other than of a chat.
    pub fn opening(&self) -> &[u8] {
        self.opening.as_deref().unwrap_or_default()
    }

    /// The block of Anthropic's that has begun and not ended.
    pub fn open_block(&self) -> Option<u64> {
        let last = self.last_events().find_map(texts::block);
        last.unwrap_or(self.open_block)
    }

    /// Bytes that are kept: tells how long it will take to look into them.
    pub fn kept_bytes(&self) -> usize {
        self.raw.len() + self.text_bytes
    }

    /// Keeps a piece of a whole JSON answer.
    pub fn push_piece(&mut self, piece: &[u8]) {
        if self.uncounted > 0 || self.raw.len() + piece.len() > MOST_DOCUMENT {
            self.uncounted += (self.raw.len() + piece.len()) as u64;
            self.raw = Vec::new();
        } else {
            self.raw.extend_from_slice(piece);
        }
    }

    /// Bytes that could not be looked into.
    pub fn pass_over(&mut self, bytes: usize) {
        self.uncounted += bytes as u64;
    }

    /// The provider has reported all that came so far: only what comes later is to be counted.
    pub fn is_reported(&mut self) {
        self.texts.clear();
        self.tokens = 0;
        self.reported_raw = self.raw.len();
        self.reported_uncounted = self.uncounted;
    }

    /// Forgets everything: usage has come.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    /// The texts of a stream, as far as it came.
    pub fn finish_events(mut self) -> Texts {
        self.compact();
        self.finish()
    }

    /// The texts of a JSON answer that came whole.
    pub fn finish_document(mut self) -> Texts {
        let raw = std::mem::take(&mut self.raw);
        self.read(&raw);
        self.finish()
    }

    /// A JSON answer that was cut off in the middle: one token for four bytes.
    pub fn finish_cut_document(self) -> Texts {
        Texts { texts: Vec::new(), tokens: (self.uncounted + self.raw.len() as u64).div_ceil(4) }
    }

    fn finish(self) -> Texts {
        let texts = self.texts.into_iter().map(|kept| kept.text).collect();
        let uncounted = self.uncounted.saturating_sub(self.reported_uncounted);
        Texts { texts, tokens: self.tokens + uncounted.div_ceil(4) }
    }

    fn compact(&mut self) {
        let mut raw = std::mem::take(&mut self.raw);
        let from = std::mem::take(&mut self.reported_raw);
        for data in raw[from.min(raw.len())..].split(|&b| b == b'\n') {
            self.read(data);
        }
        raw.clear();
        self.raw = raw;
    }

    fn read(&mut self, json: &[u8]) {
        if texts::read(self, json).is_err() {
            self.uncounted += json.len() as u64;
        }
    }

    /// What a tool call costs beside its text, and its name.
    pub(super) fn call(&mut self, slot: Slot, name: &str) {
        if name.is_empty() {
            return;
        }
        self.tokens += TOKENS_PER_TOOL_CALL;
        self.append(slot, name);
        if let Some(kept) = self.texts.iter_mut().find(|kept| kept.slot == slot) {
            kept.name = kept.text.len();
        }
    }

    /// A call of its own, which no later event adds to.
    pub(super) fn whole_call(&mut self, choice: u64, name: &str, arguments: &str) {
        let slot = Slot { choice, part: Part::ToolCall(self.whole_calls) };
        self.whole_calls += 1;
        self.call(slot, name);
        self.append(slot, arguments);
    }

    /// A text that may have come in deltas before. Nothing counts twice: past the bounds it is not known
    /// what has come, and it is taken to have.
    pub(super) fn repeat(&mut self, slot: Slot, text: &str) {
        let is_new = match self.texts.iter().find(|kept| kept.slot == slot) {
            Some(kept) => kept.text.len() == kept.name,
            None => self.uncounted == 0 && self.texts.len() < MOST_TEXTS,
        };
        if is_new {
            self.append(slot, text);
        }
    }

    /// The call likewise.
    pub(super) fn repeat_call(&mut self, slot: Slot, name: &str, arguments: &str) {
        let is_known = self.texts.iter().any(|kept| kept.slot == slot);
        if !is_known && self.uncounted == 0 && self.texts.len() < MOST_TEXTS {
            self.call(slot, name);
        }
        self.repeat(slot, arguments);
    }

    /// Adds to a text.
    pub(super) fn append(&mut self, slot: Slot, text: &str) {
        if text.is_empty() {
            return;
        }
        if self.text_bytes + text.len() > MOST_TEXT {
            self.uncounted += text.len() as u64;
            return;
        }
        self.text_bytes += text.len();
        let known = self.texts.iter().position(|kept| kept.slot == slot);
        match known.or_else(|| (self.texts.len() >= MOST_TEXTS).then_some(MOST_TEXTS - 1)) {
            Some(at) => self.texts[at].text.push_str(text),
            None => self.texts.push(Kept { slot, text: text.to_owned(), name: 0 }),
        }
    }
}

/// Fields whose text is generated, whatever the API.
const GENERATED: [&[u8]; 12] = [
    b"content",
    b"reasoning_content",
    b"reasoning",
    b"refusal",
    b"text",
    b"arguments",
    b"name",
    b"delta",
    b"partial_json",
    b"thinking",
    b"data",
    b"transcript",
];
fn is_ping(data: &[u8]) -> bool {
    data.is_empty() || (data.len() < 64 && memmem::find(data, b"\"ping\"").is_some())
}

/// Of the Responses API one field does: other events repeat what has come.
const OF_RESPONSES: [&[u8]; 1] = [b"delta"];

/// Whether an event carries something generated, unlike those that open and close an answer. A look at its
/// fields and no parsing, since it is done for every event: a colon behind a quote ends a field's name,
/// for a quote within a text has a backslash before it, which no such name ends in.
fn is_generated(data: &[u8]) -> bool {
    let is_of_responses = memmem::find_iter(data, b"\"type\"").any(|at| {
        let value = data[at + 6..].trim_ascii_start().strip_prefix(b":").unwrap_or_default();
        value.trim_ascii_start().starts_with(b"\"response.")
    });
    if memmem::find_iter(data, b"\"error\":").any(|at| data[at + 8..].trim_ascii_start().starts_with(b"{")) {
        return false;
    }
    let fields = if is_of_responses { &OF_RESPONSES[..] } else { &GENERATED[..] };
    memchr_iter(b':', data).any(|at| {
        let Some(name) = data[..at].trim_ascii_end().strip_suffix(b"\"") else { return false };
        let named = |field: &&[u8]| name.strip_suffix(*field).is_some_and(|before| before.ends_with(b"\""));
        let value = data[at + 1..].trim_ascii_start();
        value.first() == Some(&b'"') && value.get(1) != Some(&b'"') && fields.iter().any(named)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of_events(events: &[&str]) -> Texts {
        let mut received = Received::default();
        events.iter().for_each(|e| received.push_event(e.as_bytes()));
        received.finish_events()
    }

    #[test]
    fn deltas_are_joined_by_choice_and_part() {
        let texts = of_events(&[
            r#"{"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}"#,
            r#"{"choices":[{"index":0,"delta":{"content":"Hel"}},{"index":1,"delta":{"content":"x"}}]}"#,
            r#"{"choices":[{"index":0,"delta":{"content":"lo","refusal":null,"reasoning_content":"hm"}}]}"#,
            r#"{"choices":[{"index":0,"delta":{"content":[{"type":"text","text":" you"}]}}]}"#,
            r#"{"error":{"message":"no completion"}}"#,
            "[DONE]",
        ]);
        assert_eq!(texts, Texts { texts: vec!["Hello you".into(), "x".into(), "hm".into()], tokens: 0 });
    }

    #[test]
    fn tool_calls_count_name_arguments_and_four() {
        let texts = of_events(&[
            r#"{"choices":[{"index":0,"delta":{"tool_calls":[{"index":0,"id":"c","function":{"name":"get","arguments":""}}]}}]}"#,
            r#"{"choices":[{"index":0,"delta":{"tool_calls":[{"index":0,"function":{"arguments":"{\"a\":1}"}}]}}]}"#,
            r#"{"choices":[{"index":0,"delta":{"tool_calls":[{"index":1,"function":{"name":"put","arguments":"{}"}}]}}]}"#,
        ]);
        assert_eq!(texts, Texts { texts: vec!["get{\"a\":1}".into(), "put{}".into()], tokens: 8 });
    }

    #[test]
    fn only_events_that_carry_something_count_as_tokens() {
        for (event, is) in [
            (r#"{"choices":[{"index":0,"delta":{"role":"assistant","content":""}}],"usage":null}"#, false),
            (
                r#"{"choices":[{"index":0,"delta":{"role":"assistant","content":null,"refusal":null}}]}"#,
                false,
            ),
            (r#"{"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}"#, false),
            (r#"{"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":2}}"#, false),
            ("[DONE]", false),
            (r#"{"choices":[{"index":0,"delta":{"content":"Hi"}}]}"#, true),
            (r#"{"choices": [{"delta": {"content" : "Hi"}}]}"#, true),
            (r#"{"choices":[{"delta":{"content":null,"reasoning_content":"hm"}}]}"#, true),
            (r#"{"choices":[{"delta":{"content":[{"type":"text","text":" you"}]}}]}"#, true),
            (r#"{"choices":[{"delta":{"tool_calls":[{"function":{"name":"get","arguments":""}}]}}]}"#, true),
            (r#"{"choices":[{"delta":{"tool_calls":[{"function":{"arguments":"{\""}}]}}]}"#, true),
            (r#"{"choices":[{"text":"Hi","index":0}],"object":"text_completion"}"#, true),
            (r#"{"id":"\"content\":\"x\"","choices":[{"delta":{"content":""}}]}"#, false),
            (r#"{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"Hi"}}"#, true),
            (
                r#"{"type":"message_delta","delta":{"stop_reason":"end_turn"},"usage":{"output_tokens":3}}"#,
                false,
            ),
            (r#"{"type":"response.output_text.delta","delta":"Hi"}"#, true),
            (r#"{"type":"response.output_text.done","text":"Hi there"}"#, false),
            (r#"{"candidates":[{"content":{"parts":[{"text":"Hi"}],"role":"model"}}]}"#, true),
        ] {
            let mut received = Received::default();
            received.push_event(event.as_bytes());
            assert_eq!(received.so_far().surely, u64::from(is), "{event}");
        }
    }

    #[test]
    fn a_document_gives_its_messages_and_a_cut_one_its_bytes() {
        let document = br#"{"choices":[{"message":{"role":"assistant","content":"Hi","refusal":null}},{"text":"there"}]}"#;
        let mut whole = Received::default();
        document.chunks(7).for_each(|c| whole.push_piece(c));
        // Both stand in choice 0, for want of an index.
        assert_eq!(whole.finish_document(), Texts { texts: vec!["Hithere".into()], tokens: 0 });
        let mut cut = Received::default();
        cut.push_piece(&document[..41]);
        assert_eq!(cut.finish_cut_document(), Texts { texts: vec![], tokens: 11 });
    }

    #[test]
    fn memory_stays_bounded_and_nothing_is_forgotten() {
        let mut received = Received::default();
        let event = format!(r#"{{"choices":[{{"index":0,"delta":{{"content":"{}"}}}}]}}"#, "a".repeat(1000));
        for _ in 0..3000 {
            received.push_event(event.as_bytes());
            assert!(received.raw.capacity() <= 4 * COMPACT_AT && received.text_bytes <= MOST_TEXT);
        }
        let texts = received.finish_events();
        assert_eq!(texts.bytes() as u64 + texts.tokens * 4, 3_000_000);
        let mut received = Received::default();
        for _ in 0..300 {
            received.push_piece(&[b'x'; 10_000]);
        }
        assert_eq!(received.finish_document(), Texts { texts: vec![], tokens: 750_000 });
    }

    #[test]
    fn a_flood_of_choices_is_counted_together() {
        let mut received = Received::default();
        for index in 0..10_000 {
            received.push_event(
                format!(r#"{{"choices":[{{"index":{index},"delta":{{"content":"a"}}}}]}}"#).as_bytes(),
            );
        }
        let texts = received.finish_events();
        assert_eq!((texts.texts.len(), texts.bytes()), (MOST_TEXTS, 10_000));
    }
}
