//! Buffers the delivered part of an answer, so that its tokens can be counted if the upstream never reports usage.
//!
//! Parsing is deferred, because most answers report usage at their end: up to 32 KiB of events stay unparsed.
//! Events that match a template are never parsed.

use super::collector::{TextCollector, TextToCount};
use super::template::{EventTemplate, without_escapes};
use super::texts;
use crate::json::replace_lone_surrogates;
use memchr::memmem::{self, Finder};
use memchr::{memchr_iter, memrchr};
use serde_json::value::RawValue;
use std::sync::{Arc, LazyLock};

/// Limit of the buffered events. At this size they are parsed and dropped, and only their text stays.
const MAX_UNPARSED_BYTES: usize = 32 * 1024;
/// Limit of the buffered events if all are parsed. They stay because the events that end a stream early are made
/// from the last ones.
const MAX_PARSED_BYTES: usize = 4 * 1024;
/// This many unmatched events in a row are parsed at once, to make a template. The parsing is wasted if the
/// upstream reports usage, so it stops then until `raw` is full.
const MAX_TEMPLATE_ATTEMPTS: u8 = 4;
/// Several templates are needed if events alternate between choices, or between reasoning and content.
const MAX_TEMPLATES: usize = 4;
/// A longer JSON answer is not buffered.
const MAX_DOCUMENT_BYTES: usize = 1024 * 1024;
/// A longer opening event is not buffered.
const MAX_OPENING_BYTES: usize = 64 * 1024;

static TYPE: LazyLock<Finder> = LazyLock::new(|| Finder::new(b"\"type\""));
static ERROR: LazyLock<Finder> = LazyLock::new(|| Finder::new(b"\"error\":"));

/// The delivered part of one answer.
#[derive(Debug, Default)]
pub struct Delivered {
    /// For a stream: the data of the last events, each followed by a newline. For a JSON answer: the document.
    raw: Vec<u8>,
    /// Length of the front of `raw` that needs no parsing: it was parsed, or its tokens were reported.
    parsed_bytes: usize,
    text: TextCollector,
    templates: Vec<EventTemplate>,
    /// Attempts to make a template since an event last matched one or `raw` was last full.
    template_attempts: u8,
    #[cfg(test)]
    has_no_templates: bool,
    /// The event that opened the stream; empty if the events that end a stream early do not need it.
    opening: Option<Vec<u8>>,
    /// Anthropic's content block that is open after the parsed events.
    open_block: Option<u64>,
    /// Number of events that carry generated text.
    generated_events: u64,
    /// Whether the JSON document was dropped because it exceeds `MAX_DOCUMENT_BYTES`.
    is_document_dropped: bool,
}

/// An estimate of the tokens delivered so far, made without a tokenizer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeliveredTokens {
    /// Lower bound: one token for each event that carries generated text.
    pub lower_bound: u64,
    /// Best guess.
    pub best_guess: u64,
}

impl Delivered {
    #[cfg(test)]
    pub(super) fn without_templates() -> Self {
        Self { has_no_templates: true, ..Self::default() }
    }

    /// Adds the data of one event that reports no usage.
    pub fn push_event(&mut self, data: &[u8]) {
        if self.push_matching(data) {
            return;
        }
        let carries_text = self.push_unmatched(data);
        if carries_text && self.template_attempts < MAX_TEMPLATE_ATTEMPTS && data.len() <= MAX_UNPARSED_BYTES
        {
            self.template_attempts += 1;
            self.add_template();
        }
    }

    /// Adds the data of one event if it matches a template. Returns whether it does.
    pub(super) fn push_matching(&mut self, data: &[u8]) -> bool {
        #[cfg(test)]
        if self.has_no_templates {
            return false;
        }
        if self.opening.is_none() || data.len() > MAX_UNPARSED_BYTES {
            return false;
        }
        let matching =
            |template: &EventTemplate| Some((template.slot, template.open_block, template.text_of(data)?));
        let Some((slot, open_block, text)) = self.templates.iter().find_map(matching) else { return false };
        self.parse_all(); // texts are appended in the order of events
        self.text.append(slot, &text);
        self.open_block = open_block.unwrap_or(self.open_block);
        self.generated_events += 1;
        self.template_attempts = 0;
        self.buffer(data);
        self.parsed_bytes = self.raw.len();
        true
    }

    /// Adds the data of one event that matches no template. Returns whether it carries generated text.
    pub(super) fn push_unmatched(&mut self, data: &[u8]) -> bool {
        let carries_text = carries_text(data);
        self.generated_events += u64::from(carries_text);
        if self.opening.is_none() && !is_ping(data) {
            let is_needed = data.len() <= MAX_OPENING_BYTES && memmem::find(data, b"\"choices\"").is_none();
            self.opening = Some(if is_needed { data.to_vec() } else { Vec::new() });
        }
        self.buffer(data);
        carries_text
    }

    fn buffer(&mut self, data: &[u8]) {
        let is_all_parsed = self.parsed_bytes == self.raw.len();
        if is_all_parsed && self.raw.len() > MAX_PARSED_BYTES
            || self.raw.len() + data.len() > MAX_UNPARSED_BYTES
        {
            self.parse_all();
            self.raw.clear();
            self.parsed_bytes = 0;
            self.template_attempts = 0;
        }
        if data.len() > MAX_UNPARSED_BYTES {
            self.open_block = parse(data, &mut self.text).unwrap_or(self.open_block);
            return;
        }
        let from = self.raw.len();
        self.raw.extend_from_slice(data);
        // JSON allows any whitespace between tokens; here a newline ends an event.
        for at in memchr_iter(b'\n', data) {
            self.raw[from + at] = b' ';
        }
        self.raw.push(b'\n');
    }

    /// Makes a template from the last event, if possible.
    fn add_template(&mut self) {
        let open_block = self.parse_all();
        let last = newest_first(&self.raw).next().unwrap_or_default();
        let template =
            EventTemplate::of(last, self.text.effect(), open_block).or_else(|| template_of_escaped(last));
        if template.is_some() && self.templates.len() >= MAX_TEMPLATES {
            self.templates.remove(0);
        }
        self.templates.extend(template);
    }

    /// Estimates the delivered tokens: one token per event. If events are so long that each must hold several
    /// tokens: one token per four bytes, although a token of plain text often has five or six bytes.
    pub fn tokens(&self) -> DeliveredTokens {
        let by_length = self.text.total_bytes() / 4;
        let best_guess =
            if by_length >= 2 * self.generated_events { by_length } else { self.generated_events };
        DeliveredTokens { lower_bound: self.generated_events, best_guess }
    }

    /// The data of the last events, newest first.
    pub fn last_events(&self) -> impl Iterator<Item = &[u8]> {
        newest_first(&self.raw)
    }

    /// The JSON answer so far; empty if it is too long.
    pub fn document(&self) -> &[u8] {
        &self.raw
    }

    /// The event that opened the stream; empty for chat streams.
    pub fn opening(&self) -> &[u8] {
        self.opening.as_deref().unwrap_or_default()
    }

    /// Anthropic's content block that is open after the last event.
    pub fn open_block(&self) -> Option<u64> {
        newest_first(&self.raw[self.parsed_bytes..])
            .find_map(texts::open_block_after)
            .unwrap_or(self.open_block)
    }

    /// Bytes in memory. The time that `finish_events` or `finish_document` takes grows with it.
    pub fn buffered_bytes(&self) -> usize {
        self.raw.len() + self.text.buffered_bytes()
    }

    /// Whether enough text for a portion (see `take_portion`) has arrived.
    pub fn has_portion(&self) -> bool {
        self.text.has_portion()
    }

    /// Takes a portion: text to count while the rest of the answer arrives. `None`: too little text so far, or the
    /// previous portion is not counted yet.
    pub fn take_portion(&mut self) -> Option<Arc<Vec<String>>> {
        self.text.take_portion()
    }

    /// Records the tokens of the portion that was taken last; `None`: counting failed.
    pub fn portion_counted(&mut self, tokens: Option<u64>) {
        self.text.portion_counted(tokens);
    }

    /// Adds a piece of a JSON answer.
    pub fn push_piece(&mut self, piece: &[u8]) {
        if self.is_document_dropped || self.raw.len() + piece.len() > MAX_DOCUMENT_BYTES {
            self.is_document_dropped = true;
            self.text.skip(self.raw.len() + piece.len());
            self.raw = Vec::new();
        } else {
            self.raw.extend_from_slice(piece);
        }
    }

    /// Counts bytes of a stream that cannot be parsed: one token per four bytes.
    pub fn skip(&mut self, bytes: usize) {
        self.text.skip(bytes);
    }

    /// Records that the upstream's final report covers all text so far. Only later text will be counted.
    pub fn usage_reported(&mut self) {
        self.open_block = self.open_block();
        self.text.usage_reported();
        self.parsed_bytes = self.raw.len();
    }

    /// Ends a stream. Returns its delivered text.
    pub fn finish_events(mut self) -> TextToCount {
        self.parse_all();
        self.text.finish()
    }

    /// Ends a complete JSON answer. Returns its text.
    pub fn finish_document(mut self) -> TextToCount {
        parse(&replace_lone_surrogates(&self.raw), &mut self.text);
        self.text.finish()
    }

    /// Ends a JSON list of chunks that was cut off. Returns the text of its complete chunks.
    pub fn finish_cut_list(mut self) -> TextToCount {
        for chunk in complete_chunks(&replace_lone_surrogates(&self.raw)) {
            parse(chunk.get().as_bytes(), &mut self.text);
        }
        self.text.finish()
    }

    /// Ends a JSON answer that was cut off. It counts one token per four bytes.
    pub fn finish_cut_document(mut self) -> TextToCount {
        self.text.skip(self.raw.len());
        self.text.finish()
    }

    /// Parses all events in `raw`. Returns how the last one changes the open content block.
    pub(super) fn parse_all(&mut self) -> Option<Option<u64>> {
        let mut block_change = None;
        let unparsed = &self.raw[self.parsed_bytes..];
        for event in unparsed.split_inclusive(|&b| b == b'\n') {
            block_change = parse(event.strip_suffix(b"\n").unwrap_or(event), &mut self.text);
            self.open_block = block_change.unwrap_or(self.open_block);
        }
        self.parsed_bytes = self.raw.len();
        block_change
    }
}

/// Collects the text of an event or document; invalid JSON counts by its length. Returns the content block that is
/// open after it; `None`: it opens and closes none.
fn parse(json: &[u8], text: &mut TextCollector) -> Option<Option<u64>> {
    text.begin_event();
    if texts::collect(text, json).is_err() {
        text.skip(json.len());
    }
    texts::open_block_after(json)
}

/// The complete items of a JSON list that was cut off.
fn complete_chunks(list: &[u8]) -> impl Iterator<Item = &RawValue> {
    let mut rest = list.trim_ascii_start().strip_prefix(b"[").unwrap_or_default();
    std::iter::from_fn(move || {
        rest = rest.trim_ascii_start();
        rest = rest.strip_prefix(b",").unwrap_or(rest);
        let mut chunks = serde_json::Deserializer::from_slice(rest).into_iter::<&RawValue>();
        let chunk = chunks.next()?.ok()?;
        rest = &rest[chunks.byte_offset()..];
        Some(chunk)
    })
}

/// Makes a template for an event whose text has escapes, from the same event with another text.
fn template_of_escaped(event: &[u8]) -> Option<EventTemplate> {
    let plain = without_escapes(event)?;
    let mut text = TextCollector::default();
    let open_block = parse(&plain, &mut text);
    EventTemplate::of(&plain, text.effect(), open_block)
}

/// Splits events that each end with a newline; the last one comes first.
fn newest_first(events: &[u8]) -> impl Iterator<Item = &[u8]> {
    events.strip_suffix(b"\n").unwrap_or(events).rsplit(|&b| b == b'\n')
}

fn is_ping(data: &[u8]) -> bool {
    data.is_empty() || (data.len() < 64 && memmem::find(data, b"\"ping\"").is_some())
}

/// Whether an event carries generated text, unlike events that open or close an answer. Searches for field names
/// and does not parse. A quote with a colon after it always ends a field name. Within a text, a backslash escapes
/// every quote, and no name in the list ends with a backslash.
fn carries_text(data: &[u8]) -> bool {
    let is_text = |at: usize| {
        let value = data[at + 1..].trim_ascii_start();
        if value.first() != Some(&b'"') || value.get(1) == Some(&b'"') {
            return false;
        }
        let Some(name) = data[..at].trim_ascii_end().strip_suffix(b"\"") else { return false };
        match &name[memrchr(b'"', name).map_or(0, |quote| quote + 1)..] {
            b"delta" => true,
            b"content" | b"reasoning_content" | b"reasoning" | b"refusal" | b"text" | b"arguments"
            | b"name" | b"partial_json" | b"thinking" | b"data" | b"transcript" => !is_responses_event(data),
            _ => false,
        }
    };
    memchr_iter(b':', data).any(is_text) && !has_error(data)
}

/// Whether an event is of the Responses API. Only its `delta` fields are generated text: other fields repeat it.
fn is_responses_event(data: &[u8]) -> bool {
    TYPE.find_iter(data).any(|at| {
        let value =
            data[at + TYPE.needle().len()..].trim_ascii_start().strip_prefix(b":").unwrap_or_default();
        value.trim_ascii_start().starts_with(b"\"response.")
    })
}

/// Whether an event holds an error object.
fn has_error(data: &[u8]) -> bool {
    ERROR.find_iter(data).any(|at| data[at + ERROR.needle().len()..].trim_ascii_start().starts_with(b"{"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of_events(events: &[&str]) -> TextToCount {
        let mut delivered = Delivered::default();
        events.iter().for_each(|e| delivered.push_event(e.as_bytes()));
        delivered.finish_events()
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
        assert_eq!(
            texts,
            TextToCount { texts: vec!["Hello you".into(), "x".into(), "hm".into()], known_tokens: 0 }
        );
    }

    #[test]
    fn a_tool_call_counts_its_name_its_arguments_and_four_tokens() {
        let texts = of_events(&[
            r#"{"choices":[{"index":0,"delta":{"tool_calls":[{"index":0,"id":"c","function":{"name":"get","arguments":""}}]}}]}"#,
            r#"{"choices":[{"index":0,"delta":{"tool_calls":[{"index":0,"function":{"arguments":"{\"a\":1}"}}]}}]}"#,
            r#"{"choices":[{"index":0,"delta":{"tool_calls":[{"index":1,"function":{"name":"put","arguments":"{}"}}]}}]}"#,
        ]);
        assert_eq!(
            texts,
            TextToCount { texts: vec!["get{\"a\":1}".into(), "put{}".into()], known_tokens: 8 }
        );
    }

    #[test]
    fn only_events_with_generated_text_count_as_tokens() {
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
            let mut delivered = Delivered::default();
            delivered.push_event(event.as_bytes());
            assert_eq!(delivered.tokens().lower_bound, u64::from(is), "{event}");
        }
    }

    #[test]
    fn a_complete_document_counts_its_messages_and_a_cut_one_its_bytes() {
        let document = br#"{"choices":[{"message":{"role":"assistant","content":"Hi","refusal":null}},{"text":"there"}]}"#;
        let mut whole = Delivered::default();
        document.chunks(7).for_each(|c| whole.push_piece(c));
        // Without an index both belong to choice 0.
        assert_eq!(whole.finish_document(), TextToCount { texts: vec!["Hithere".into()], known_tokens: 0 });
        let list = br#" [{"candidates":[{"content":{"parts":[{"text":"Hi"}]}}]},
            {"candidates":[{"content":{"parts":[{"text":" there"}]}}]},{"candidates":[{"con"#;
        for (length, texts) in [(list.len(), vec!["Hi there"]), (60, vec!["Hi"]), (20, vec![]), (1, vec![])] {
            let mut cut = Delivered::default();
            cut.push_piece(&list[..length]);
            assert_eq!(cut.finish_cut_list().texts, texts, "{length}");
        }
        let mut cut = Delivered::default();
        cut.push_piece(&document[..41]);
        assert_eq!(cut.finish_cut_document(), TextToCount { texts: vec![], known_tokens: 11 });
    }

    #[test]
    fn memory_is_bounded_and_no_text_is_lost() {
        let mut delivered = Delivered::default();
        let event = format!(r#"{{"choices":[{{"index":0,"delta":{{"content":"{}"}}}}]}}"#, "a".repeat(1000));
        for _ in 0..3000 {
            delivered.push_event(event.as_bytes());
            assert!(delivered.raw.capacity() <= 4 * MAX_UNPARSED_BYTES);
        }
        let texts = delivered.finish_events();
        assert_eq!(texts.bytes() as u64 + texts.known_tokens * 4, 3_000_000);
        let mut delivered = Delivered::default();
        for _ in 0..300 {
            delivered.push_piece(&[b'x'; 10_000]);
        }
        assert_eq!(delivered.finish_document(), TextToCount { texts: vec![], known_tokens: 750_000 });
    }
}
