//! What was received of an answer, kept so that it can be counted if usage never comes.
//!
//! Bounded: events are kept raw until 32 KiB have come together, then only their text, and of that some 32 KiB
//! if it is counted in portions. Beyond 1 MiB of text the rest counts as one token for four bytes.

use super::portions::take_front;
use super::template::{Effect, Template, without_escapes};
use super::texts::{self, Part, Slot};
use memchr::memchr_iter;
use memchr::memmem::{self, Finder};
use std::sync::{Arc, LazyLock};

/// Raw events are boiled down to their text when they reach this size.
const COMPACT_AT: usize = 32 * 1024;
/// Those that have been looked into are kept up to this size: an ending is made like the last ones.
const MOST_LOOKED_INTO: usize = 4 * 1024;
/// A template is looked for in so many events of those that come to `COMPACT_AT`. Looking into them one by one
/// costs no more, but would be in vain if usage comes before the rest.
const TRIES: u8 = 4;
/// Choices, or reasoning and content, may come in turns.
const MOST_TEMPLATES: usize = 4;
/// So much text makes a portion that is counted while the rest is coming.
const PORTION: usize = 32 * 1024;
/// More text than this is not counted.
const MOST_TEXT: usize = 1024 * 1024;
/// A whole JSON answer is kept up to this size.
const MOST_DOCUMENT: usize = 1024 * 1024;
/// A longer opening event is not kept.
const LONGEST_OPENING: usize = 64 * 1024;
/// More texts that are counted apart (choices, tool calls) than this are counted together.
const MOST_TEXTS: usize = 256;
/// Responses are charged the token that ends a message as well: 142 of 146 recorded ones of OpenAI's models that cannot
/// reason, and that have nothing but text, cost just one token more than their text.
const TOKENS_PER_ENDING: u64 = 1;
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
    /// The data of the last events, a newline after each. (Of a document: the document.)
    raw: Vec<u8>,
    /// So much of `raw` has been looked into, or reported by the provider.
    looked_into: usize,
    /// What the last event that was looked into has done.
    effect: Effect,
    templates: Vec<Template>,
    /// So many events have been looked into for a template since `raw` was emptied.
    tries: u8,
    #[cfg(test)]
    parses_all: bool,
    texts: Vec<Kept>,
    /// Calls that came whole.
    whole_calls: u64,
    /// A response has come to its end.
    has_ended: bool,
    /// The event that opened the answer, where the ending needs it.
    opening: Option<Vec<u8>>,
    /// Anthropic's block that is open, as far as events have been looked into.
    open_block: Option<u64>,
    /// All that has come, and so much of it since the last portion was taken.
    text_bytes: usize,
    fresh: usize,
    /// Is being counted.
    portion: Option<Arc<Vec<String>>>,
    tokens: u64,
    /// Bytes that were passed over.
    uncounted: u64,
    /// So much of what was passed over has been reported by the provider.
    reported_uncounted: u64,
    /// Events that carried something generated.
    events: u64,
}

/// One text.
#[derive(Debug)]
struct Kept {
    slot: Slot,
    /// What has not been counted in a portion.
    text: String,
    /// How long it is with what has been.
    length: usize,
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
    #[cfg(test)]
    pub(super) fn that_parses_all() -> Self {
        Self { parses_all: true, ..Self::default() }
    }

    /// Keeps the data of one event that reports no usage.
    pub fn push_event(&mut self, data: &[u8]) {
        if self.push_usual(data) {
            return;
        }
        let is_generated = self.push_reporting(data);
        if is_generated && self.tries < TRIES && data.len() <= COMPACT_AT {
            self.tries += 1;
            self.look_into_all();
            let last = self.last_events().next().unwrap_or_default();
            let template = Template::of(last, &self.effect).or_else(|| template_of_escaped(last));
            if template.is_some() && self.templates.len() >= MOST_TEMPLATES {
                self.templates.remove(0);
            }
            self.templates.extend(template);
        }
    }

    /// The same, if the event is like one before it but for its text. Whether it was.
    pub(super) fn push_usual(&mut self, data: &[u8]) -> bool {
        #[cfg(test)]
        if self.parses_all {
            return false;
        }
        if self.opening.is_none() || data.len() > COMPACT_AT {
            return false;
        }
        let fits = |template: &Template| Some((template.slot, template.open_block, template.text_of(data)?));
        let Some((slot, open_block, text)) = self.templates.iter().find_map(fits) else { return false };
        // In the order in which they came.
        self.look_into_all();
        self.append(slot, &text);
        self.open_block = open_block.unwrap_or(self.open_block);
        self.events += 1;
        self.tries = 0;
        self.keep(data);
        self.looked_into = self.raw.len();
        true
    }

    /// Keeps the data of one event, which may also report usage. Whether it carries something generated.
    pub(super) fn push_reporting(&mut self, data: &[u8]) -> bool {
        let is_generated = is_generated(data);
        self.events += u64::from(is_generated);
        if self.opening.is_none() && !is_ping(data) {
            let is_needed = data.len() <= LONGEST_OPENING && memmem::find(data, b"\"choices\"").is_none();
            self.opening = Some(if is_needed { data.to_vec() } else { Vec::new() });
        }
        self.keep(data);
        is_generated
    }

    fn keep(&mut self, data: &[u8]) {
        let is_done = self.looked_into == self.raw.len() && self.raw.len() > MOST_LOOKED_INTO;
        if is_done || self.raw.len() + data.len() > COMPACT_AT {
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

    /// How many tokens have come: an event that carries any carries one or more. Only where their texts are so long
    /// that they must have several is it one for each four bytes: a token of plain text often has five or six.
    pub fn so_far(&self) -> SoFar {
        let by_length = (self.text_bytes as u64 + self.uncounted) / 4;
        let probably = if by_length >= 2 * self.events { by_length } else { self.events };
        SoFar { surely: self.events, probably }
    }

    /// The data of the last events, the last one first.
    pub fn last_events(&self) -> impl Iterator<Item = &[u8]> {
        backwards(&self.raw)
    }

    /// The event that opened the answer, other than of a chat.
    pub fn opening(&self) -> &[u8] {
        self.opening.as_deref().unwrap_or_default()
    }

    /// The block of Anthropic's that has begun and not ended.
    pub fn open_block(&self) -> Option<u64> {
        let last = backwards(&self.raw[self.looked_into..]).find_map(texts::block);
        last.unwrap_or(self.open_block)
    }

    /// Bytes that are kept: tells how long it will take to look into them.
    pub fn kept_bytes(&self) -> usize {
        let in_portion = self.portion.iter().flat_map(|texts| texts.iter());
        let texts = self.texts.iter().map(|kept| &kept.text).chain(in_portion);
        self.raw.len() + texts.map(String::len).sum::<usize>()
    }

    /// Whether so much text has come that a portion of it can be counted.
    pub fn has_portion(&self) -> bool {
        self.fresh >= PORTION
    }

    /// Texts to be counted while the rest is coming, if there is enough for that. One portion at a time:
    /// until `portion_counted` it is kept here too, so that nothing is left out where an answer ends before
    /// that.
    pub fn take_portion(&mut self) -> Option<Arc<Vec<String>>> {
        if !self.has_portion() || self.portion.is_some() {
            return None;
        }
        self.fresh = 0;
        let fronts = self.texts.iter_mut().filter_map(|kept| take_front(&mut kept.text)).collect();
        self.portion = Some(Arc::new(fronts));
        self.portion.clone()
    }

    /// How many tokens the portion has; `None`: they could not be counted. Meanwhile it may have been reported.
    pub fn portion_counted(&mut self, tokens: Option<u64>) {
        let Some(portion) = self.portion.take() else { return };
        let by_length = || portion.iter().map(String::len).sum::<usize>().div_ceil(4) as u64;
        self.tokens += tokens.unwrap_or_else(by_length);
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
        self.open_block = self.open_block();
        self.texts.clear();
        self.whole_calls = 0;
        self.has_ended = false;
        self.tokens = 0;
        self.portion = None;
        self.fresh = 0;
        self.looked_into = self.raw.len();
        self.reported_uncounted = self.uncounted;
    }

    /// Forgets everything: usage has come.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    /// The texts of a stream, as far as it came.
    pub fn finish_events(mut self) -> Texts {
        self.look_into_all();
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
        let ending = if self.has_ended && self.is_message() { TOKENS_PER_ENDING } else { 0 };
        let in_portion = self.portion.map(Arc::unwrap_or_clone).unwrap_or_default();
        let texts = in_portion.into_iter().chain(self.texts.into_iter().map(|kept| kept.text)).collect();
        let uncounted = self.uncounted.saturating_sub(self.reported_uncounted);
        Texts { texts, tokens: self.tokens + ending + uncounted.div_ceil(4) }
    }

    /// Whether a response has a message, and calls no tool: of what ends a call nothing was measured.
    fn is_message(&self) -> bool {
        let is_any = |is: fn(&Part) -> bool| self.texts.iter().any(|kept| is(&kept.slot.part));
        is_any(|part| matches!(part, Part::ItemContent(_)))
            && !is_any(|part| matches!(part, Part::ToolCall(_)))
    }

    fn compact(&mut self) {
        self.look_into_all();
        self.raw.clear();
        self.looked_into = 0;
        self.tries = 0;
    }

    /// Looks into the events that have not been.
    pub(super) fn look_into_all(&mut self) {
        if self.looked_into == self.raw.len() {
            return;
        }
        let raw = std::mem::take(&mut self.raw);
        for data in raw[self.looked_into..].split_inclusive(|&b| b == b'\n') {
            self.read(data.strip_suffix(b"\n").unwrap_or(data));
        }
        self.looked_into = raw.len();
        self.raw = raw;
    }

    fn read(&mut self, json: &[u8]) {
        let open_block = texts::block(json);
        self.open_block = open_block.unwrap_or(self.open_block);
        self.effect = Effect::that_opens(open_block);
        if texts::read(self, json).is_err() {
            self.effect.is_more();
            self.uncounted += json.len() as u64;
        }
    }

    /// A response was not cut short.
    pub(super) fn ends(&mut self) {
        self.effect.is_more();
        self.has_ended = true;
    }

    /// What a tool call costs beside its text, and its name.
    pub(super) fn call(&mut self, slot: Slot, name: &str) {
        if name.is_empty() {
            return;
        }
        self.effect.is_more();
        self.tokens += TOKENS_PER_TOOL_CALL;
        self.append(slot, name);
        if let Some(kept) = self.texts.iter_mut().find(|kept| kept.slot == slot) {
            kept.name = kept.length;
        }
    }

    /// A call of its own, which no later event adds to.
    pub(super) fn whole_call(&mut self, choice: u64, name: &str, arguments: &str) {
        let slot = Slot { choice, part: Part::ToolCall(self.whole_calls) };
        self.whole_calls += 1;
        self.effect.is_more();
        self.call(slot, name);
        self.append(slot, arguments);
    }

    /// A text that may have come in deltas before. Nothing counts twice: past the bounds it is not known
    /// what has come, and it is taken to have.
    pub(super) fn repeat(&mut self, slot: Slot, text: &str) {
        self.effect.is_more();
        let is_new = match self.texts.iter().find(|kept| kept.slot == slot) {
            Some(kept) => kept.length == kept.name,
            None => self.knows_all() && self.texts.len() < MOST_TEXTS,
        };
        if is_new {
            self.append(slot, text);
        }
    }

    /// Whether nothing has been passed over since usage was reported.
    fn knows_all(&self) -> bool {
        self.uncounted == self.reported_uncounted
    }

    /// The call likewise.
    pub(super) fn repeat_call(&mut self, slot: Slot, name: &str, arguments: &str) {
        let is_known = self.texts.iter().any(|kept| kept.slot == slot);
        if !is_known && self.knows_all() && self.texts.len() < MOST_TEXTS {
            self.call(slot, name);
        }
        self.repeat(slot, arguments);
    }

    /// Adds to a text.
    pub(super) fn append(&mut self, slot: Slot, text: &str) {
        if text.is_empty() {
            return;
        }
        self.effect.append(slot, text);
        if self.text_bytes + text.len() > MOST_TEXT {
            self.uncounted += text.len() as u64;
            return;
        }
        self.text_bytes += text.len();
        self.fresh += text.len();
        let known = self.texts.iter().position(|kept| kept.slot == slot);
        match known.or_else(|| (self.texts.len() >= MOST_TEXTS).then_some(MOST_TEXTS - 1)) {
            Some(at) => {
                self.texts[at].text.push_str(text);
                self.texts[at].length += text.len();
            }
            None => self.texts.push(Kept { slot, text: text.to_owned(), length: text.len(), name: 0 }),
        }
    }
}

/// Of an event whose text has escapes, by reading the same one with another text.
fn template_of_escaped(event: &[u8]) -> Option<Template> {
    let plain = without_escapes(event)?;
    let mut received = Received::default();
    received.read(&plain);
    Template::of(&plain, &received.effect)
}

/// Events, each with a newline behind it, the last one first.
fn backwards(events: &[u8]) -> impl Iterator<Item = &[u8]> {
    events.strip_suffix(b"\n").unwrap_or(events).rsplit(|&b| b == b'\n')
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

static TYPE: LazyLock<Finder> = LazyLock::new(|| Finder::new(b"\"type\""));
static ERROR: LazyLock<Finder> = LazyLock::new(|| Finder::new(b"\"error\":"));

fn is_ping(data: &[u8]) -> bool {
    data.is_empty() || (data.len() < 64 && memmem::find(data, b"\"ping\"").is_some())
}

/// Whether an event carries something generated, unlike those that open and close an answer. A look at its
/// fields and no parsing, since it is done for every event: a colon behind a quote ends a field's name,
/// for a quote within a text has a backslash before it, which no such name ends in.
fn is_generated(data: &[u8]) -> bool {
    let is_of_responses = TYPE.find_iter(data).any(|at| {
        let value = data[at + 6..].trim_ascii_start().strip_prefix(b":").unwrap_or_default();
        value.trim_ascii_start().starts_with(b"\"response.")
    });
    if ERROR.find_iter(data).any(|at| data[at + 8..].trim_ascii_start().starts_with(b"{")) {
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
    fn portions_leave_little_and_lose_nothing() {
        let event = |index: u64, text: &str| {
            format!(r#"{{"choices":[{{"index":{index},"delta":{{"content":"{text}"}}}}]}}"#)
        };
        let text = "a word ".repeat(1_000);
        let (mut received, mut counted) = (Received::default(), 0);
        for n in 0..100 {
            received.push_event(event(n % 2, &text).as_bytes());
            if let Some(portion) = received.take_portion() {
                assert!(received.take_portion().is_none());
                // Until it is counted it is as if it had not been taken.
                assert!(received.kept_bytes() >= PORTION);
                let bytes: usize = portion.iter().map(String::len).sum();
                counted += bytes as u64;
                received.portion_counted(Some(bytes as u64));
                assert!(received.kept_bytes() < 2 * PORTION);
            }
        }
        assert!(counted > 600_000);
        let texts = received.finish_events();
        assert_eq!((texts.tokens, texts.bytes() as u64 + counted), (counted, 100 * 7_000));
    }

    #[test]
    fn a_portion_that_is_not_counted_counts_at_the_end_unless_it_was_reported() {
        let text = "a word ".repeat(6_000);
        let event = format!(r#"{{"choices":[{{"delta":{{"content":"{text}"}}}}]}}"#);
        let with_portion = || {
            let mut received = Received::default();
            received.push_event(event.as_bytes());
            assert!(received.take_portion().is_some());
            received
        };
        assert_eq!(with_portion().finish_events().bytes(), text.len());
        let mut failed = with_portion();
        failed.portion_counted(None);
        let rest = failed.finish_events();
        assert_eq!((rest.bytes() as u64 + 4 * rest.tokens).abs_diff(text.len() as u64) / 4, 0);
        let mut reported = with_portion();
        reported.is_reported();
        reported.portion_counted(Some(9));
        assert_eq!(reported.finish_events(), Texts::default());
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
