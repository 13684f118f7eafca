//! Determines what to charge for an answer: the usage that the upstream reports, or else a count of the delivered
//! text.
//!
//! Nothing here does I/O. The formats follow the providers' documentation and recorded answers. A field that is not
//! a whole number from 0 to 2^40 is not credible and does not count as reported.

mod answer_ids;
mod answer_model;
mod choice_ends;
mod choices;
mod collector;
mod decode;
mod delivered;
mod document;
mod ending;
mod event;
mod fields;
mod format;
mod own;
mod sink;
mod sse;
mod stream_end;
mod template;
mod texts;

pub use answer_ids::{AnswerIds, AnswerItem};
pub use answer_model::of_document as model_of_document;
pub use collector::TextToCount;
pub use decode::{ContentCoding, Decoder};
pub use delivered::{Delivered, DeliveredTokens};
pub use document::JsonReader;
pub use format::{BodyFormat, Detection, FormatDetector};
pub use own::OwnFigures;
pub use sink::{Discard, Sink};
pub use sse::SseReader;

/// A token count in a usage object. Some providers count parts of the prompt or the completion separately.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Field {
    Prompt,
    Completion,
    Total,
    /// Part of the prompt: read from the provider's cache.
    Cached,
    /// In addition to the prompt (Anthropic).
    CacheWritten,
    /// In addition to the prompt (Anthropic).
    CacheRead,
    /// In addition to the prompt (Gemini): results of the provider's own tools.
    ToolUse,
    /// In addition to the prompt if the total includes it separately (Mistral).
    PromptAudio,
    /// In addition to the completion (Gemini).
    Thoughts,
    /// In addition to the completion if the total includes it separately (xAI).
    Reasoning,
    /// Billed tokens, used only where nothing else is reported (Cohere).
    BilledPrompt,
    BilledCompletion,
}

const FIELD_COUNT: usize = 12;

impl Field {
    /// The bit of the field in [`Reported::known_fields`].
    fn bit(self) -> u16 {
        1 << self as u16
    }
}

/// The usage that an upstream has reported so far: of each field the last credible value that is not 0, or else 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reported {
    tokens: [u64; FIELD_COUNT],
    /// A bit for each field that was reported. The tokens of the other fields are 0.
    known_fields: u16,
    /// Whether a reported value was not credible: negative, not a whole number, or too large.
    has_incredible: bool,
    /// Whether `amounts` leaves out the tokens that the provider read from its cache.
    skips_cached: bool,
}

impl Reported {
    /// Reads one usage object of any provider's shape, as JSON text. `null` reports nothing.
    pub fn read(usage: &str) -> Self {
        fields::read(usage)
    }

    fn get(&self, field: Field) -> Option<u64> {
        (self.known_fields & field.bit() != 0).then_some(self.tokens[field as usize])
    }

    fn set(&mut self, field: Field, tokens: Option<u64>) {
        self.tokens[field as usize] = tokens.unwrap_or(0);
        self.known_fields = self.known_fields & !field.bit() | if tokens.is_some() { field.bit() } else { 0 };
    }

    /// Replaces the fields that `later` reports and keeps the others. A 0 replaces no value. Values are never added
    /// up.
    pub fn update(&mut self, later: Self) {
        for (known, later) in self.tokens.iter_mut().zip(later.tokens) {
            *known = if later > 0 { later } else { *known };
        }
        self.known_fields |= later.known_fields;
        self.has_incredible |= later.has_incredible;
    }

    /// Whether any credible amount was reported.
    pub fn has_any(&self) -> bool {
        self.prompt_without_total().is_some()
            || self.completion_without_total().is_some()
            || self.total().is_some()
    }

    /// Whether a reported value was not credible.
    pub fn has_incredible(&self) -> bool {
        self.has_incredible
    }

    fn total(&self) -> Option<u64> {
        self.get(Field::Total)
    }

    /// Prompt tokens, including the parts that the provider counts separately. `None` if only a total was reported,
    /// or nothing.
    fn prompt_without_total(&self) -> Option<u64> {
        let named = self.get(Field::Prompt).or(self.get(Field::BilledPrompt));
        let added = [Field::CacheWritten, Field::CacheRead, Field::ToolUse].map(|field| self.get(field));
        let sum = added.into_iter().flatten().fold(named.unwrap_or(0), u64::saturating_add);
        (named.is_some() || added.iter().any(Option::is_some))
            .then_some(sum + self.separate(Field::PromptAudio))
    }

    /// Completion tokens, including the parts that the provider counts separately. `None` if only a total was
    /// reported, or nothing.
    fn completion_without_total(&self) -> Option<u64> {
        let named = self.get(Field::Completion).or(self.get(Field::BilledCompletion));
        let thoughts = self.get(Field::Thoughts);
        if named.is_none() && thoughts.is_none() {
            return None;
        }
        Some(named.unwrap_or(0) + thoughts.unwrap_or(0) + self.separate(Field::Reasoning))
    }

    /// The value of `field` if the total exceeds prompt plus completion by exactly that value; else 0.
    fn separate(&self, field: Field) -> u64 {
        let all = (self.get(field), self.get(Field::Prompt), self.get(Field::Completion), self.total());
        let (Some(tokens), Some(prompt), Some(completion), Some(total)) = all else { return 0 };
        if total == prompt + completion + tokens { tokens } else { 0 }
    }

    /// Whether nothing but a total was reported, and it is not 0.
    pub fn is_total_only(&self) -> bool {
        self.prompt_without_total().is_none()
            && self.completion_without_total().is_none()
            && self.total().is_some_and(|total| total > 0)
    }

    /// Tokens that the model read. If only a total was reported, the whole total counts as prompt.
    pub fn prompt(&self) -> Option<u64> {
        let total = self.total();
        match self.completion_without_total() {
            None => self.prompt_without_total().or(total),
            Some(completion) => self.prompt_without_total().or(total.map(|t| t.saturating_sub(completion))),
        }
    }

    /// Tokens that the model generated. If they were not reported, the total minus the prompt.
    pub fn completion(&self) -> Option<u64> {
        self.completion_without_total().or_else(|| match (self.prompt_without_total(), self.total()) {
            (Some(prompt), Some(total)) => Some(total.saturating_sub(prompt)),
            (None, Some(_)) => Some(0),
            (_, None) => None,
        })
    }

    /// Tokens of the completion without its reasoning, which the next request of a conversation need not repeat.
    pub fn visible_completion(&self) -> Option<u64> {
        self.completion().map(|all| all.saturating_sub(self.reasoning()))
    }

    /// Completion tokens of reasoning.
    pub fn reasoning(&self) -> u64 {
        self.get(Field::Thoughts).or(self.get(Field::Reasoning)).unwrap_or(0)
    }

    /// Prompt tokens that the provider read from its cache.
    pub fn cached(&self) -> u64 {
        self.get(Field::Cached).or(self.get(Field::CacheRead)).unwrap_or(0)
    }

    /// Returns this usage with another rule for `amounts`: tokens that the provider read from its cache are not
    /// charged.
    #[must_use]
    pub fn without_cached(self) -> Self {
        Self { skips_cached: true, ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quota::Amounts;

    const OWN: OwnFigures = OwnFigures { prompt: 100, has_prompt: true, completion: 0, is_final: true };

    /// The charge if 100 prompt tokens were estimated and, without a report, 50 completion tokens counted.
    fn charged(usage: &str) -> (u64, u64, u64) {
        let reported = Reported::read(usage);
        let completion = if reported.completion().is_some() { 0 } else { 50 };
        let a = reported.amounts(&OwnFigures { completion, ..OWN });
        (a.prompt, a.completion, a.total)
    }

    #[test]
    fn reported_fields_are_charged_and_missing_ones_estimated() {
        for (usage, want) in [
            (r#"{"prompt_tokens":7,"completion_tokens":3,"total_tokens":10}"#, (7, 3, 10)),
            (r#"{"prompt_tokens":7,"completion_tokens":3,"total_tokens":25}"#, (7, 3, 25)),
            (r#"{"prompt_tokens":7,"completion_tokens":3,"total_tokens":2}"#, (7, 3, 10)),
            (r#"{"prompt_tokens":7,"total_tokens":7}"#, (7, 0, 7)),
            (r#"{"total_tokens":7}"#, (7, 0, 7)),
            (r#"{"prompt_tokens":7}"#, (7, 50, 57)),
            (r#"{"completion_tokens":3}"#, (100, 3, 103)),
            (r#"{"input_tokens":7,"output_tokens":3}"#, (7, 3, 10)),
            // Anthropic adds cache tokens to the input; other providers include them in the prompt.
            (
                r#"{"input_tokens":7,"cache_creation_input_tokens":20,"cache_read_input_tokens":100,"output_tokens":3}"#,
                (127, 3, 130),
            ),
            (
                r#"{"cache_read_input_tokens":5,"prompt_tokens":7,"completion_tokens":3,"cache_creation_input_tokens":1}"#,
                (7, 3, 10),
            ),
            // xAI counts reasoning separately if the total exceeds prompt plus completion by it.
            (
                r#"{"prompt_tokens":7,"completion_tokens":3,"total_tokens":60,"completion_tokens_details":{"reasoning_tokens":50}}"#,
                (7, 53, 60),
            ),
            (
                r#"{"prompt_tokens":7,"completion_tokens":53,"total_tokens":60,"completion_tokens_details":{"reasoning_tokens":50}}"#,
                (7, 53, 60),
            ),
            // Mistral counts audio separately in the same way.
            (
                r#"{"prompt_tokens":7,"completion_tokens":3,"total_tokens":40,"prompt_tokens_details":{"audio_tokens":30,"cached_tokens":2}}"#,
                (37, 3, 40),
            ),
            // Gemini.
            (
                r#"{"promptTokenCount":7,"candidatesTokenCount":3,"thoughtsTokenCount":20,"toolUsePromptTokenCount":9,"totalTokenCount":39}"#,
                (16, 23, 39),
            ),
            (r#"{"promptTokenCount":7,"thoughtsTokenCount":20,"totalTokenCount":27}"#, (7, 20, 27)),
            // Cohere: token counts come before billed units.
            (
                r#"{"billed_units":{"input_tokens":4,"output_tokens":2},"tokens":{"input_tokens":70,"output_tokens":3}}"#,
                (70, 3, 73),
            ),
            (r#"{"billed_units":{"input_tokens":4,"output_tokens":2}}"#, (4, 2, 6)),
            (r#"{"prompt_tokens":12.0,"completion_tokens":null}"#, (12, 50, 62)),
            ("null", (100, 50, 150)),
            ("{}", (100, 50, 150)),
        ] {
            assert_eq!(charged(usage), want, "{usage}");
            assert!(!Reported::read(usage).has_incredible(), "{usage}");
        }
    }

    #[test]
    fn reasoning_is_not_a_visible_part_of_the_completion() {
        for (usage, want) in [
            (r#"{"prompt_tokens":7,"completion_tokens":3}"#, Some(3)),
            (r#"{"output_tokens":53,"output_tokens_details":{"reasoning_tokens":50}}"#, Some(3)),
            // xAI and Gemini count reasoning separately.
            (
                r#"{"prompt_tokens":7,"completion_tokens":3,"total_tokens":60,"completion_tokens_details":{"reasoning_tokens":50}}"#,
                Some(3),
            ),
            (r#"{"promptTokenCount":7,"candidatesTokenCount":3,"thoughtsTokenCount":20}"#, Some(3)),
            (r#"{"prompt_tokens":7}"#, None),
        ] {
            assert_eq!(Reported::read(usage).visible_completion(), want, "{usage}");
        }
    }

    #[test]
    fn values_that_are_not_credible_are_ignored_and_recorded() {
        for bad in ["-1", "1.5", "\"12\"", "1e300", "1099511627777", "true", "[1]", "{\"a\":1}", "1e999"] {
            let usage = format!(r#"{{"prompt_tokens":{bad}}}"#);
            assert_eq!(charged(&usage), (100, 50, 150), "{usage}");
            assert!(Reported::read(&usage).has_incredible(), "{usage}");
        }
        // Details that are not credible do not affect the other fields.
        for details in ["null", "[]", "5", "{\"cached_tokens\":-1}"] {
            let usage =
                format!(r#"{{"prompt_tokens":7,"completion_tokens":3,"prompt_tokens_details":{details}}}"#);
            assert_eq!(charged(&usage), (7, 3, 10), "{usage}");
        }
        for bad in ["[]", "3", "\"x\"", "{"] {
            assert!(Reported::read(bad).has_incredible() && !Reported::read(bad).has_any(), "{bad}");
        }
    }

    #[test]
    fn cached_tokens_can_be_left_out() {
        for (usage, want) in [
            (
                r#"{"prompt_tokens":70,"completion_tokens":3,"prompt_tokens_details":{"cached_tokens":60}}"#,
                (10, 3, 13),
            ),
            (
                r#"{"input_tokens":70,"output_tokens":3,"total_tokens":73,"input_tokens_details":{"cached_tokens":60}}"#,
                (10, 3, 13),
            ),
            (
                r#"{"input_tokens":7,"cache_creation_input_tokens":20,"cache_read_input_tokens":100,"output_tokens":3}"#,
                (27, 3, 30),
            ),
            (
                r#"{"promptTokenCount":70,"candidatesTokenCount":3,"totalTokenCount":73,"cachedContentTokenCount":60}"#,
                (10, 3, 13),
            ),
            (
                r#"{"prompt_cache_hit_tokens":60,"prompt_cache_miss_tokens":10,"prompt_tokens":70,"completion_tokens":3}"#,
                (10, 3, 13),
            ),
            (r#"{"prompt_tokens":7,"completion_tokens":3,"cached_tokens":9000}"#, (0, 3, 3)),
        ] {
            let a = Reported::read(usage).without_cached().amounts(&OWN);
            assert_eq!((a.prompt, a.completion, a.total), want, "{usage}");
        }
    }

    #[test]
    fn the_last_report_of_a_field_counts_and_null_changes_nothing() {
        let mut r = Reported::read(r#"{"prompt_tokens":7,"completion_tokens":1}"#);
        r.update(Reported::read(r#"{"prompt_tokens":7,"completion_tokens":5,"total_tokens":12}"#));
        r.update(Reported::read(r#"{"prompt_tokens":null}"#));
        let amounts = r.amounts(&OwnFigures::default());
        assert_eq!(amounts, Amounts { requests: 1, prompt: 7, completion: 5, total: 12 });
    }

    #[test]
    fn a_later_zero_does_not_replace_a_value() {
        let mut r = Reported::read(
            r#"{"input_tokens":317,"cache_creation_input_tokens":4425,"cache_read_input_tokens":0,"output_tokens":1}"#,
        );
        r.update(Reported::read(
            r#"{"input_tokens":0,"cache_creation_input_tokens":0,"cache_read_input_tokens":0,"output_tokens":42}"#,
        ));
        assert_eq!((r.prompt(), r.completion()), (Some(4_742), Some(42)));
        // A 0 counts where nothing else was reported.
        let mut r = Reported::read("{}");
        r.update(Reported::read(r#"{"prompt_tokens":0,"completion_tokens":0}"#));
        assert_eq!((r.prompt(), r.completion()), (Some(0), Some(0)));
        // The order of the keys has no effect within one object either.
        let r = Reported::read(r#"{"tokens":{"output_tokens":3},"output_tokens":0}"#);
        assert_eq!(r.completion(), Some(3));
    }
}
