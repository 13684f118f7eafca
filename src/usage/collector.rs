//! Collects the generated text of one answer so that its tokens can be counted.
//!
//! Bounded: up to 1 MiB of text in up to 256 separate texts. Further text counts as one token per four bytes.

use std::sync::Arc;

/// Size of a portion: text that is counted while the rest of the answer arrives.
pub(super) const PORTION_BYTES: usize = 32 * 1024;
/// Text beyond this is not collected.
pub(super) const MAX_TEXT_BYTES: usize = 1024 * 1024;
/// Further texts (choices, tool calls) are appended to the last one.
pub(super) const MAX_TEXTS: usize = 256;
/// The Responses API charges the token that ends a message. Of 146 recorded text-only answers of OpenAI models
/// without reasoning, 142 cost exactly one token more than their text.
const TOKENS_PER_MESSAGE_END: u64 = 1;
/// Tokens of a tool call in addition to its name and arguments.
const TOKENS_PER_TOOL_CALL: u64 = 4;
/// When the front of a text is taken for a portion, at most this much of the text stays.
const MAX_REST_BYTES: usize = 2 * 1024;

/// Text whose tokens are still to be counted, and tokens that are already known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TextToCount {
    /// Each text is counted on its own.
    pub texts: Vec<String>,
    /// Tokens to add to the count.
    pub known_tokens: u64,
}

impl TextToCount {
    /// Bytes of all texts. Counting time grows with it.
    pub fn bytes(&self) -> usize {
        self.texts.iter().map(String::len).sum()
    }
}

/// The text that a delta belongs to. Tokens straddle deltas, so deltas are joined before they are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TextSlot {
    /// Index of the choice, output item, content block or candidate.
    pub(super) choice: u64,
    pub(super) kind: TextKind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TextKind {
    Content,
    Refusal,
    Reasoning,
    AudioTranscript,
    Code,
    ToolCall(u64),
    /// Content part of an output item of the Responses API.
    ItemContent(u64),
    /// Reasoning part of an output item of the Responses API.
    ItemReasoning(u64),
    /// Reasoning summary part of an output item of the Responses API.
    Summary(u64),
}

/// The generated text of one answer.
#[derive(Debug, Default)]
pub(super) struct TextCollector {
    texts: Vec<CollectedText>,
    /// Tool calls that arrived complete in one event (Gemini).
    complete_calls: u64,
    /// Records that a response (Responses API) ended with status `completed`.
    is_response_completed: bool,
    /// All text appended, in bytes. Never decreases.
    appended_bytes: usize,
    /// Text appended since the last portion was taken, in bytes.
    fresh_bytes: usize,
    /// The portion that is being counted.
    portion: Option<Arc<Vec<String>>>,
    /// Tokens of counted portions and the fixed tokens of tool calls.
    tokens: u64,
    /// Bytes that were not collected.
    skipped_bytes: u64,
    /// The value of `skipped_bytes` at the upstream's final report.
    reported_skipped_bytes: u64,
    /// The effect of the current event.
    effect: EventEffect,
}

/// The effect of one event on a collector.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct EventEffect {
    /// The text appended: its slot, the address of its bytes, and their number.
    text: Option<(TextSlot, usize, usize)>,
    /// Whether the event had another effect, or an effect that depends on its text or on earlier events.
    has_other_effect: bool,
}

impl EventEffect {
    pub(super) fn record_text(&mut self, slot: TextSlot, text: &str) {
        self.has_other_effect |= self.text.is_some();
        self.text = Some((slot, text.as_ptr().addr(), text.len()));
    }

    /// The text appended (slot, address, length), if that was the only effect.
    pub(super) fn only_text(&self) -> Option<(TextSlot, usize, usize)> {
        self.text.filter(|_| !self.has_other_effect)
    }
}

#[derive(Debug)]
struct CollectedText {
    slot: TextSlot,
    /// The text without the portions taken from it.
    text: String,
    /// Bytes appended, including portions taken.
    appended_bytes: usize,
    /// Bytes of the tool's name at the front.
    name_bytes: usize,
}

impl TextCollector {
    /// Begins an event: resets `effect`.
    pub(super) fn begin_event(&mut self) {
        self.effect = EventEffect::default();
    }

    /// The effect of the current event so far.
    pub(super) fn effect(&self) -> &EventEffect {
        &self.effect
    }

    /// Appends to the text of `slot`.
    pub(super) fn append(&mut self, slot: TextSlot, text: &str) {
        if text.is_empty() {
            return;
        }
        self.effect.record_text(slot, text);
        if self.appended_bytes + text.len() > MAX_TEXT_BYTES {
            self.skipped_bytes += text.len() as u64;
            return;
        }
        self.appended_bytes += text.len();
        self.fresh_bytes += text.len();
        let known = self.texts.iter().position(|collected| collected.slot == slot);
        match known.or_else(|| (self.texts.len() >= MAX_TEXTS).then_some(MAX_TEXTS - 1)) {
            Some(at) => {
                self.texts[at].text.push_str(text);
                self.texts[at].appended_bytes += text.len();
            }
            None => self.texts.push(CollectedText {
                slot,
                text: text.to_owned(),
                appended_bytes: text.len(),
                name_bytes: 0,
            }),
        }
    }

    /// Adds the name of a tool call and the call's fixed tokens.
    pub(super) fn call(&mut self, slot: TextSlot, name: &str) {
        if name.is_empty() {
            return;
        }
        self.effect.has_other_effect = true;
        self.tokens += TOKENS_PER_TOOL_CALL;
        self.append(slot, name);
        if let Some(collected) = self.texts.iter_mut().find(|collected| collected.slot == slot) {
            collected.name_bytes = collected.appended_bytes;
        }
    }

    /// Adds a tool call that no later event extends.
    pub(super) fn complete_call(&mut self, choice: u64, name: &str, arguments: &str) {
        let slot = TextSlot { choice, kind: TextKind::ToolCall(self.complete_calls) };
        self.complete_calls += 1;
        self.effect.has_other_effect = true;
        self.call(slot, name);
        self.append(slot, arguments);
    }

    /// Adds a complete text unless its deltas were collected before. If bytes were skipped, that is unknown, and
    /// the text is assumed to be collected.
    pub(super) fn append_once(&mut self, slot: TextSlot, text: &str) {
        self.effect.has_other_effect = true;
        let is_new = match self.texts.iter().find(|collected| collected.slot == slot) {
            Some(collected) => collected.appended_bytes == collected.name_bytes,
            None => self.can_add_new_slot(),
        };
        if is_new {
            self.append(slot, text);
        }
    }

    /// Adds a complete tool call unless it was collected before.
    pub(super) fn call_once(&mut self, slot: TextSlot, name: &str, arguments: &str) {
        let is_known = self.texts.iter().any(|collected| collected.slot == slot);
        if !is_known && self.can_add_new_slot() {
            self.call(slot, name);
        }
        self.append_once(slot, arguments);
    }

    /// Whether to add a complete text whose slot is not in `texts`. `false` if its deltas may have been skipped
    /// since usage was last reported, or appended to another text because `texts` is full.
    fn can_add_new_slot(&self) -> bool {
        self.skipped_bytes == self.reported_skipped_bytes && self.texts.len() < MAX_TEXTS
    }

    /// Records that a response (Responses API) ended with status `completed`.
    pub(super) fn response_completed(&mut self) {
        self.effect.has_other_effect = true;
        self.is_response_completed = true;
    }

    /// Counts bytes that cannot be parsed: one token per four bytes.
    pub(super) fn skip(&mut self, bytes: usize) {
        self.effect.has_other_effect = true;
        self.skipped_bytes += bytes as u64;
    }

    /// Text collected or skipped so far, in bytes.
    pub(super) fn total_bytes(&self) -> u64 {
        self.appended_bytes as u64 + self.skipped_bytes
    }

    /// Bytes of text in memory.
    pub(super) fn buffered_bytes(&self) -> usize {
        let in_portion = self.portion.iter().flat_map(|texts| texts.iter());
        self.texts.iter().map(|collected| &collected.text).chain(in_portion).map(String::len).sum()
    }

    /// Whether enough text for a portion has arrived.
    pub(super) fn has_portion(&self) -> bool {
        self.fresh_bytes >= PORTION_BYTES
    }

    /// Takes text to count while the rest of the answer arrives. `None`: too little text so far, or a portion is
    /// being counted. A copy stays here until `portion_counted`, so that the text is not lost if the answer ends
    /// first.
    pub(super) fn take_portion(&mut self) -> Option<Arc<Vec<String>>> {
        if !self.has_portion() || self.portion.is_some() {
            return None;
        }
        self.fresh_bytes = 0;
        let fronts = self.texts.iter_mut().filter_map(|collected| take_front(&mut collected.text)).collect();
        self.portion = Some(Arc::new(fronts));
        self.portion.clone()
    }

    /// Records the tokens of the portion. If counting failed (`None`), it counts one token per four bytes. Does
    /// nothing if the upstream has reported usage since the portion was taken.
    pub(super) fn portion_counted(&mut self, tokens: Option<u64>) {
        let Some(portion) = self.portion.take() else { return };
        let by_length = || portion.iter().map(String::len).sum::<usize>().div_ceil(4) as u64;
        self.tokens += tokens.unwrap_or_else(by_length);
    }

    /// Records that the upstream's final report covers all text so far. Only later text will be counted.
    pub(super) fn usage_reported(&mut self) {
        *self = Self {
            appended_bytes: self.appended_bytes,
            skipped_bytes: self.skipped_bytes,
            reported_skipped_bytes: self.skipped_bytes,
            ..Self::default()
        };
    }

    /// The text to count.
    pub(super) fn finish(self) -> TextToCount {
        let message_end =
            if self.is_response_completed && self.is_message() { TOKENS_PER_MESSAGE_END } else { 0 };
        let skipped = self.skipped_bytes.saturating_sub(self.reported_skipped_bytes);
        let in_portion = self.portion.map(Arc::unwrap_or_clone).unwrap_or_default();
        let texts = in_portion.into_iter().chain(self.texts.into_iter().map(|collected| collected.text));
        TextToCount { texts: texts.collect(), known_tokens: self.tokens + message_end + skipped.div_ceil(4) }
    }

    /// Whether a response has a message and no tool call. The tokens that end a tool call were not measured.
    fn is_message(&self) -> bool {
        let has = |is: fn(&TextKind) -> bool| self.texts.iter().any(|collected| is(&collected.slot.kind));
        has(|kind| matches!(kind, TextKind::ItemContent(_)))
            && !has(|kind| matches!(kind, TextKind::ToolCall(_)))
    }
}

/// Takes the front of a growing text, so that it can be counted separately. A long text without a safe cut (for
/// example, Chinese) is taken whole, which may count one token too many.
fn take_front(text: &mut String) -> Option<String> {
    let at = safe_cut(text).or_else(|| (text.len() > MAX_REST_BYTES).then_some(text.len()))?;
    let rest = text[at..].to_owned();
    let mut front = std::mem::replace(text, rest);
    front.truncate(at);
    front.shrink_to_fit();
    Some(front)
}

/// The last position where a cut does not change the number of tokens: between a letter or digit and a space or
/// newline. Tokenizers first split text into words. OpenAI's tokenizers always end a word at this position, and
/// split the rest independently of the text before it.
fn safe_cut(text: &str) -> Option<usize> {
    let from = text.len().saturating_sub(MAX_REST_BYTES);
    let is_cut = |pair: &[u8]| pair[0].is_ascii_alphanumeric() && matches!(pair[1], b' ' | b'\n');
    text.as_bytes()[from..].windows(2).rposition(is_cut).map(|at| from + at + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::estimate::{Encoding, Tokenizer};
    use proptest::prelude::*;

    const CONTENT: TextSlot = TextSlot { choice: 0, kind: TextKind::Content };

    fn count(encoding: Encoding, text: &str) -> u64 {
        Tokenizer { encoding, percent: 100, splits_digits: false }.count_all([text])
    }

    proptest! {
        #[test]
        fn cutting_a_text_keeps_the_number_of_tokens(
            text in "([a-zA-Z]{1,9} {0,2}|[ -~]{0,12}|\\PC{0,6}|\\s{1,3}|'(ll|S|d)|[0-9]{1,5}){0,40}",
        ) {
            let mut rest = text.clone();
            let front = take_front(&mut rest).unwrap_or_default();
            prop_assert_eq!(&format!("{front}{rest}"), &text);
            for encoding in [Encoding::O200k, Encoding::Cl100k] {
                prop_assert_eq!(count(encoding, &front) + count(encoding, &rest), count(encoding, &text));
            }
        }
    }

    #[test]
    fn at_most_two_kib_of_a_long_text_stay_behind() {
        for (text, rest) in
            [("a word ".repeat(1_000), 1), ("\u{65e5}".repeat(1_000), 0), ("\u{65e5}".repeat(600), 1_800)]
        {
            let mut text = text;
            let front = take_front(&mut text);
            assert_eq!((text.len(), front.is_none()), (rest, rest == 1_800));
        }
    }

    #[test]
    fn portions_leave_little_text_and_lose_none() {
        let text = "a word ".repeat(1_000);
        let (mut collector, mut counted) = (TextCollector::default(), 0);
        for choice in 0..100 {
            collector.append(TextSlot { choice: choice % 2, ..CONTENT }, &text);
            if let Some(portion) = collector.take_portion() {
                assert!(collector.take_portion().is_none());
                // The portion stays in memory until it is counted.
                assert!(collector.buffered_bytes() >= PORTION_BYTES);
                let bytes: usize = portion.iter().map(String::len).sum();
                counted += bytes as u64;
                collector.portion_counted(Some(bytes as u64));
                assert!(collector.buffered_bytes() < 2 * PORTION_BYTES);
            }
        }
        assert!(counted > 600_000);
        let rest = collector.finish();
        assert_eq!((rest.known_tokens, rest.bytes() as u64 + counted), (counted, 100 * 7_000));
    }

    #[test]
    fn an_uncounted_portion_is_counted_at_the_end_unless_usage_was_reported() {
        let text = "a word ".repeat(6_000);
        let with_portion = || {
            let mut collector = TextCollector::default();
            collector.append(CONTENT, &text);
            assert!(collector.take_portion().is_some());
            collector
        };
        assert_eq!(with_portion().finish().bytes(), text.len());
        let mut failed = with_portion();
        failed.portion_counted(None);
        let rest = failed.finish();
        assert_eq!((rest.bytes() as u64 + 4 * rest.known_tokens).abs_diff(text.len() as u64) / 4, 0);
        let mut reported = with_portion();
        reported.usage_reported();
        reported.portion_counted(Some(9));
        assert_eq!(reported.finish(), TextToCount::default());
    }

    #[test]
    fn a_flood_of_choices_is_collected_in_bounded_memory() {
        let mut collector = TextCollector::default();
        for choice in 0..10_000 {
            collector.append(TextSlot { choice, ..CONTENT }, "a");
        }
        let collected = collector.finish();
        assert_eq!((collected.texts.len(), collected.bytes()), (MAX_TEXTS, 10_000));
    }
}
