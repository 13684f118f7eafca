//! What a request has cost: read out of the upstream's answer, or counted where it says nothing.
//!
//! Pure: bytes in, numbers out. The shapes and their meaning follow the providers' documents and
//! recorded answers; a field that is not a whole number from 0 to 2^40 does not count as reported.

mod choices;
mod decode;
mod ending;
mod fields;
mod json;
mod portions;
mod received;
mod sse;
mod template;
mod texts;

use crate::quota::{Amounts, MAX_AMOUNT};

pub use decode::{Coding, Decoder};
pub use json::JsonReader;
pub use received::{Received, SoFar, Texts};
pub use sse::{Nowhere, SseReader};

/// What a usage says of a call. Names of the providers that have them apart in brackets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Field {
    Prompt,
    Completion,
    Total,
    /// Within the prompt: read from a cache.
    Cached,
    /// Beside the prompt (Anthropic).
    CacheWritten,
    CacheRead,
    /// Beside the prompt (Gemini): results of tools that the provider brings along.
    ToolUse,
    /// Beside the prompt where the total says so (Mistral).
    PromptAudio,
    /// Beside the completion (Gemini).
    Thoughts,
    /// Beside the completion where the total says so (xAI).
    Reasoning,
    /// What is billed, where nothing else is said (Cohere).
    BilledPrompt,
    BilledCompletion,
}

const FIELDS: usize = 12;

/// What an upstream has reported so far. Each field is the last credible word on it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reported {
    fields: [Option<u64>; FIELDS],
    /// A field was there that cannot be true: negative, not a whole number, absurdly large.
    refused: bool,
    /// What was read from a cache is not charged.
    skips_cached: bool,
}

impl Reported {
    /// Reads one usage object of any provider's shape, as JSON text. What is not an object reports nothing;
    /// `null` neither.
    pub fn read(usage: &str) -> Self {
        fields::read(usage)
    }

    fn get(&self, field: Field) -> Option<u64> {
        self.fields[field as usize]
    }

    fn set(&mut self, field: Field, tokens: Option<u64>) {
        self.fields[field as usize] = tokens;
    }

    /// Takes over what `later` reports; what it leaves out stays. Nothing is added up.
    pub fn update(&mut self, later: Self) {
        for (known, later) in self.fields.iter_mut().zip(later.fields) {
            *known = later.or(*known);
        }
        self.refused |= later.refused;
    }

    /// Whether anything credible was reported.
    pub fn is_any(&self) -> bool {
        self.named_prompt().is_some() || self.named_completion().is_some() || self.total().is_some()
    }

    /// Whether something was reported that cannot be true.
    pub fn was_refused(&self) -> bool {
        self.refused
    }

    fn total(&self) -> Option<u64> {
        self.get(Field::Total)
    }

    /// The prompt as far as it is named, with what the provider has beside it.
    fn named_prompt(&self) -> Option<u64> {
        let named = self.get(Field::Prompt).or(self.get(Field::BilledPrompt));
        let beside = [Field::CacheWritten, Field::CacheRead, Field::ToolUse].map(|field| self.get(field));
        let sum = beside.into_iter().flatten().fold(named.unwrap_or(0), u64::saturating_add);
        (named.is_some() || beside.iter().any(Option::is_some))
            .then_some(sum + self.apart(Field::PromptAudio))
    }

    /// The completion as far as it is named, with what the provider has beside it.
    fn named_completion(&self) -> Option<u64> {
        let named = self.get(Field::Completion).or(self.get(Field::BilledCompletion));
        let thoughts = self.get(Field::Thoughts);
        if named.is_none() && thoughts.is_none() {
            return None;
        }
        Some(named.unwrap_or(0) + thoughts.unwrap_or(0) + self.apart(Field::Reasoning))
    }

    /// What is named besides, if it is just what the total has more than the other two.
    fn apart(&self, field: Field) -> u64 {
        let of = (self.get(field), self.get(Field::Prompt), self.get(Field::Completion), self.total());
        let (Some(tokens), Some(prompt), Some(completion), Some(total)) = of else { return 0 };
        if total == prompt + completion + tokens { tokens } else { 0 }
    }

    /// Tokens the model read. A usage with nothing but a total is the prompt's.
    pub fn prompt(&self) -> Option<u64> {
        let total = self.total();
        match self.named_completion() {
            None => self.named_prompt().or(total),
            Some(completion) => self.named_prompt().or(total.map(|t| t.saturating_sub(completion))),
        }
    }

    /// Tokens the model generated; what the total leaves beside the prompt where it is not named.
    pub fn completion(&self) -> Option<u64> {
        self.named_completion().or_else(|| match (self.named_prompt(), self.total()) {
            (Some(prompt), Some(total)) => Some(total.saturating_sub(prompt)),
            (None, Some(_)) => Some(0),
            (_, None) => None,
        })
    }

    /// Of the prompt: what the provider read from its cache.
    pub fn cached(&self) -> u64 {
        self.get(Field::Cached).or(self.get(Field::CacheRead)).unwrap_or(0)
    }

    /// The same, of which nothing is charged that was read from a cache.
    #[must_use]
    pub fn less_cached(self) -> Self {
        Self { skips_cached: true, ..self }
    }

    /// What is charged: what was reported, and for what was not the estimate and the count.
    pub fn amounts(&self, estimated_prompt: u64, counted_completion: u64) -> Amounts {
        self.amounts_of(estimated_prompt, self.completion().unwrap_or(counted_completion))
    }

    /// The same of an answer that broke off, of which so much has been counted that came after its last report.
    pub fn amounts_and_since(&self, estimated_prompt: u64, counted_since: u64) -> Amounts {
        self.amounts_of(estimated_prompt, self.completion().unwrap_or(0).saturating_add(counted_since))
    }

    fn amounts_of(&self, estimated_prompt: u64, completion: u64) -> Amounts {
        let prompt = self.prompt().unwrap_or(estimated_prompt).min(MAX_AMOUNT);
        let mut amounts = Amounts::of_request(prompt, completion);
        amounts.total = amounts.total.max(self.total().unwrap_or(0)).min(MAX_AMOUNT);
        if self.skips_cached {
            let cached = self.cached().min(amounts.prompt);
            amounts.prompt -= cached;
            amounts.total -= cached.min(amounts.total);
        }
        amounts
    }

    /// What a stream has used so far that has come to so many completion tokens, whatever it reported on
    /// its way.
    pub fn amounts_so_far(&self, estimated_prompt: u64, completion: u64) -> Amounts {
        Amounts::of_request(self.prompt().unwrap_or(estimated_prompt), completion)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn charged(usage: &str) -> (u64, u64, u64) {
        let a = Reported::read(usage).amounts(100, 50);
        (a.prompt, a.completion, a.total)
    }

    #[test]
    fn what_is_reported_is_charged_and_the_rest_is_counted() {
        for (usage, want) in [
            (r#"{"prompt_tokens":7,"completion_tokens":3,"total_tokens":10}"#, (7, 3, 10)),
            (r#"{"prompt_tokens":7,"completion_tokens":3,"total_tokens":25}"#, (7, 3, 25)),
            (r#"{"prompt_tokens":7,"completion_tokens":3,"total_tokens":2}"#, (7, 3, 10)),
            (r#"{"prompt_tokens":7,"total_tokens":7}"#, (7, 0, 7)),
            (r#"{"total_tokens":7}"#, (7, 0, 7)),
            (r#"{"prompt_tokens":7}"#, (7, 50, 57)),
            (r#"{"completion_tokens":3}"#, (100, 3, 103)),
            (r#"{"input_tokens":7,"output_tokens":3}"#, (7, 3, 10)),
            // Anthropic: caches beside the input; others who name them have them in it.
            (
                r#"{"input_tokens":7,"cache_creation_input_tokens":20,"cache_read_input_tokens":100,"output_tokens":3}"#,
                (127, 3, 130),
            ),
            (
                r#"{"cache_read_input_tokens":5,"prompt_tokens":7,"completion_tokens":3,"cache_creation_input_tokens":1}"#,
                (7, 3, 10),
            ),
            // xAI: reasoning apart, where the total says so.
            (
                r#"{"prompt_tokens":7,"completion_tokens":3,"total_tokens":60,"completion_tokens_details":{"reasoning_tokens":50}}"#,
                (7, 53, 60),
            ),
            (
                r#"{"prompt_tokens":7,"completion_tokens":53,"total_tokens":60,"completion_tokens_details":{"reasoning_tokens":50}}"#,
                (7, 53, 60),
            ),
            // Mistral: sound apart, likewise.
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
            // Cohere: what was counted before what is billed.
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
            assert!(!Reported::read(usage).was_refused(), "{usage}");
        }
    }

    #[test]
    fn what_cannot_be_true_is_refused() {
        for bad in ["-1", "1.5", "\"12\"", "1e300", "1099511627777", "true", "[1]", "{\"a\":1}", "1e999"] {
            let usage = format!(r#"{{"prompt_tokens":{bad}}}"#);
            assert_eq!(charged(&usage), (100, 50, 150), "{usage}");
            assert!(Reported::read(&usage).was_refused(), "{usage}");
        }
        // Details that make no sense take nothing from the rest.
        for details in ["null", "[]", "5", "{\"cached_tokens\":-1}"] {
            let usage =
                format!(r#"{{"prompt_tokens":7,"completion_tokens":3,"prompt_tokens_details":{details}}}"#);
            assert_eq!(charged(&usage), (7, 3, 10), "{usage}");
        }
        for bad in ["[]", "3", "\"x\"", "{"] {
            assert!(Reported::read(bad).was_refused() && !Reported::read(bad).is_any(), "{bad}");
        }
    }

    #[test]
    fn what_was_read_from_a_cache_can_be_left_out() {
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
            let a = Reported::read(usage).less_cached().amounts(100, 50);
            assert_eq!((a.prompt, a.completion, a.total), want, "{usage}");
        }
    }

    #[test]
    fn the_last_word_counts_and_null_takes_nothing_back() {
        let mut r = Reported::read(r#"{"prompt_tokens":7,"completion_tokens":1}"#);
        r.update(Reported::read(r#"{"prompt_tokens":7,"completion_tokens":5,"total_tokens":12}"#));
        r.update(Reported::read(r#"{"prompt_tokens":null}"#));
        assert_eq!(r.amounts(0, 0), Amounts { requests: 1, prompt: 7, completion: 5, total: 12 });
    }
}
