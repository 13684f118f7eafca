//! What was received of an answer, kept so that it can be counted if usage never comes.
//!
//! Bounded: events are kept raw until 32 KiB have come together, then only their text. Beyond 1 MiB
//! of text the rest counts as one token for four bytes.

use crate::json::LooseText as Text;
use memchr::{memchr_iter, memmem};
use serde::Deserialize;

/// Raw events are boiled down to their text when they reach this size.
const COMPACT_AT: usize = 32 * 1024;
/// More text than this is not kept.
const MOST_TEXT: usize = 1024 * 1024;
/// A whole JSON answer is kept up to this size.
const MOST_DOCUMENT: usize = 1024 * 1024;
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
    texts: Vec<(Slot, String)>,
    text_bytes: usize,
    tokens: u64,
    /// Bytes that were passed over.
    uncounted: u64,
    /// Events that carried something generated.
    events: u64,
}

/// How many tokens have come, without counting them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SoFar {
    /// So many at least.
    pub surely: u64,
    /// So many or so.
    pub probably: u64,
}

/// Which text a delta belongs to: tokens straddle deltas, so they are joined before they are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Slot {
    choice: u64,
    part: Part,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Content,
    Refusal,
    Reasoning,
    ToolCall(u64),
}

impl Received {
    /// Keeps the data of one event.
    pub fn push_event(&mut self, data: &[u8]) {
        self.events += u64::from(is_generated(data));
        if self.raw.len() + data.len() > COMPACT_AT {
            self.compact();
        }
        if data.len() > COMPACT_AT {
            self.read(data);
        } else {
            self.raw.extend_from_slice(data);
            self.raw.push(b'\n');
        }
    }

    /// How many tokens have come: an event that carries any carries one or more, and a token has four
    /// bytes of text or so.
    pub fn so_far(&self) -> SoFar {
        let by_length = (self.text_bytes as u64 + self.uncounted) / 4;
        SoFar { surely: self.events, probably: self.events.max(by_length) }
    }

    /// The data of the last event.
    pub fn last_event(&self) -> &[u8] {
        let raw = self.raw.strip_suffix(b"\n").unwrap_or(&self.raw);
        raw.rsplit(|&b| b == b'\n').next().unwrap_or_default()
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
        let texts = self.texts.into_iter().map(|(_, text)| text).collect();
        Texts { texts, tokens: self.tokens + self.uncounted.div_ceil(4) }
    }

    fn compact(&mut self) {
        let mut raw = std::mem::take(&mut self.raw);
        for data in raw.split(|&b| b == b'\n') {
            self.read(data);
        }
        raw.clear();
        self.raw = raw;
    }

    fn read(&mut self, json: &[u8]) {
        if memmem::find(json, b"\"choices\"").is_none() {
            return; // `[DONE]`, an error, a ping: nothing that was generated
        }
        match serde_json::from_slice::<Answer>(json) {
            Ok(answer) => answer.choices.into_iter().for_each(|c| self.choice(c)),
            Err(_) => self.uncounted += json.len() as u64,
        }
    }

    fn choice(&mut self, choice: Choice) {
        let Choice { index, delta, text } = choice;
        let slot = |part| Slot { choice: index, part };
        self.append(slot(Part::Content), &text.0);
        let Some(delta) = delta else { return };
        self.append(slot(Part::Content), &delta.content.0);
        self.append(slot(Part::Refusal), &delta.refusal.0);
        self.append(slot(Part::Reasoning), &delta.reasoning_content.0);
        self.append(slot(Part::Reasoning), &delta.reasoning.0);
        if let Some(call) = delta.function_call {
            self.call(slot(Part::ToolCall(u64::MAX)), &call);
        }
        for (at, call) in (0..).zip(delta.tool_calls.unwrap_or_default()) {
            if let Some(function) = call.function {
                self.call(slot(Part::ToolCall(call.index.unwrap_or(at))), &function);
            }
        }
    }

    fn call(&mut self, slot: Slot, function: &Function) {
        if !function.name.0.is_empty() {
            self.tokens += TOKENS_PER_TOOL_CALL;
        }
        self.append(slot, &function.name.0);
        self.append(slot, &function.arguments.0);
    }

    fn append(&mut self, slot: Slot, text: &str) {
        if text.is_empty() {
            return;
        }
        if self.text_bytes + text.len() > MOST_TEXT {
            self.uncounted += text.len() as u64;
            return;
        }
        self.text_bytes += text.len();
        let known = self.texts.iter().position(|(s, _)| *s == slot);
        match known.or_else(|| (self.texts.len() >= MOST_TEXTS).then_some(MOST_TEXTS - 1)) {
            Some(at) => self.texts[at].1.push_str(text),
            None => self.texts.push((slot, text.to_owned())),
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
/// Of the Responses API one field does: other events repeat what has come.
const OF_RESPONSES: [&[u8]; 1] = [b"delta"];

/// Whether an event carries something generated, unlike those that open and close an answer. A look at its
/// fields and no parsing, since it is done for every event: a colon behind a quote ends a field's name,
/// for a quote within a text has a backslash before it, which no such name ends in.
fn is_generated(data: &[u8]) -> bool {
    let is_of_responses = memmem::find(data, b"\"type\":\"response.").is_some();
    let fields = if is_of_responses { &OF_RESPONSES[..] } else { &GENERATED[..] };
    memchr_iter(b':', data).any(|at| {
        let Some(name) = data[..at].trim_ascii_end().strip_suffix(b"\"") else { return false };
        let named = |field: &&[u8]| name.strip_suffix(*field).is_some_and(|before| before.ends_with(b"\""));
        let value = data[at + 1..].trim_ascii_start();
        value.first() == Some(&b'"') && value.get(1) != Some(&b'"') && fields.iter().any(named)
    })
}

#[derive(Deserialize)]
struct Answer<'a> {
    #[serde(borrow, default)]
    choices: Vec<Choice<'a>>,
}

#[derive(Deserialize)]
struct Choice<'a> {
    #[serde(default)]
    index: u64,
    #[serde(borrow, alias = "message")]
    delta: Option<Delta<'a>>,
    #[serde(borrow, default)]
    text: Text<'a>,
}

#[derive(Deserialize)]
struct Delta<'a> {
    #[serde(borrow, default)]
    content: Text<'a>,
    #[serde(borrow, default)]
    refusal: Text<'a>,
    #[serde(borrow, default)]
    reasoning_content: Text<'a>,
    #[serde(borrow, default)]
    reasoning: Text<'a>,
    #[serde(borrow)]
    function_call: Option<Function<'a>>,
    #[serde(borrow)]
    tool_calls: Option<Vec<ToolCall<'a>>>,
}

#[derive(Deserialize)]
struct ToolCall<'a> {
    index: Option<u64>,
    #[serde(borrow)]
    function: Option<Function<'a>>,
}

#[derive(Deserialize)]
struct Function<'a> {
    #[serde(borrow, default)]
    name: Text<'a>,
    #[serde(borrow, default)]
    arguments: Text<'a>,
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
