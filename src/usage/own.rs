//! Replaces the fields of a report that are missing, not credible or not final by the gateway's own figures.

use super::Reported;
use crate::quota::{Amounts, MAX_AMOUNT};

/// The facts of an exchange that the gateway itself has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OwnFigures {
    /// The estimate of the prompt.
    pub prompt: u64,
    /// Whether the prompt has content. If so, a report of 0 prompt tokens is not credible.
    pub has_prompt: bool,
    /// The count of the delivered text that no final report covers.
    pub completion: u64,
    /// Whether the upstream has reported its final completion tokens. Before, a report can be a placeholder or the
    /// usage so far.
    pub is_final: bool,
}

impl Reported {
    /// The amounts to charge.
    ///
    /// A report of nothing but a total covers the prompt and the delivered text. The estimate replaces prompt tokens that
    /// are not reported, or 0 although the prompt has content. The count is
    /// added to final completion tokens, because it is the text after them. Otherwise, the completion is at least
    /// the count.
    pub fn amounts(&self, own: &OwnFigures) -> Amounts {
        let prompt = match self.prompt() {
            Some(total) if self.is_total_only() => total.checked_sub(own.completion).filter(|&rest| rest > 0),
            Some(0) if self.has_false_zero_prompt(own) => None,
            prompt => prompt,
        };
        let completion = match self.completion() {
            Some(reported) if own.is_final => reported.saturating_add(own.completion),
            reported => reported.unwrap_or(0).max(own.completion),
        };
        let prompt = prompt.unwrap_or(own.prompt).min(MAX_AMOUNT);
        let mut amounts = Amounts::of_request(prompt, completion);
        amounts.total = amounts.total.max(self.total().unwrap_or(0)).min(MAX_AMOUNT);
        if self.skips_cached {
            let cached = self.cached().min(amounts.prompt);
            amounts.prompt -= cached;
            amounts.total -= cached.min(amounts.total);
        }
        amounts
    }

    /// Whether the report has 0 for a prompt or a completion that was not empty.
    pub fn has_false_zero(&self, own: &OwnFigures) -> bool {
        let has_false_zero_completion = if self.is_total_only() {
            self.total() <= Some(own.completion)
        } else {
            self.completion() == Some(0) && own.completion > 0
        };
        self.has_false_zero_prompt(own) || has_false_zero_completion
    }

    /// Whether the count replaces completion tokens that were reported before the end of the answer.
    pub fn is_outgrown(&self, own: &OwnFigures) -> bool {
        !own.is_final && self.completion().is_some_and(|reported| reported > 0 && reported < own.completion)
    }

    fn has_false_zero_prompt(&self, own: &OwnFigures) -> bool {
        own.has_prompt && self.prompt() == Some(0)
    }

    /// The amounts of a running stream that has delivered this many completion tokens.
    pub fn amounts_so_far(&self, estimated_prompt: u64, completion: u64) -> Amounts {
        let prompt = self.prompt().filter(|&tokens| tokens > 0);
        Amounts::of_request(prompt.unwrap_or(estimated_prompt), completion)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: OwnFigures = OwnFigures { prompt: 100, has_prompt: true, completion: 50, is_final: false };

    fn charged(usage: &str, own: &OwnFigures) -> (u64, u64, u64) {
        let a = Reported::read(usage).amounts(own);
        (a.prompt, a.completion, a.total)
    }

    #[test]
    fn zero_is_not_credible_for_what_was_not_empty() {
        for (usage, want) in [
            (r#"{"prompt_tokens":0,"completion_tokens":0,"total_tokens":0}"#, (100, 50, 150)),
            (r#"{"prompt_tokens":7,"completion_tokens":0,"total_tokens":7}"#, (7, 50, 57)),
            (r#"{"prompt_tokens":0,"completion_tokens":60,"total_tokens":0}"#, (100, 60, 160)),
            (r#"{"prompt_tokens":0,"completion_tokens":0,"total_tokens":500}"#, (100, 50, 500)),
            (r#"{"total_tokens":0}"#, (100, 50, 150)),
            (r#"{"input_tokens":0,"cache_read_input_tokens":0,"output_tokens":0}"#, (100, 50, 150)),
            (r#"{"promptTokenCount":0,"candidatesTokenCount":0,"totalTokenCount":0}"#, (100, 50, 150)),
            // Without a field for the completion, a total that equals the prompt reports 0 completion tokens.
            (r#"{"promptTokenCount":7,"totalTokenCount":7}"#, (7, 50, 57)),
        ] {
            assert_eq!(charged(usage, &OWN), want, "{usage}");
            assert!(Reported::read(usage).has_false_zero(&OWN), "{usage}");
        }
        let empty = OwnFigures { completion: 0, has_prompt: false, ..OWN };
        for (usage, want) in [
            (r#"{"prompt_tokens":0,"completion_tokens":0,"total_tokens":0}"#, (0, 0, 0)),
            (r#"{"prompt_tokens":7,"completion_tokens":0,"total_tokens":7}"#, (7, 0, 7)),
            (r#"{"prompt_tokens":7,"total_tokens":7}"#, (7, 0, 7)),
        ] {
            assert_eq!(charged(usage, &empty), want, "{usage}");
            assert!(!Reported::read(usage).has_false_zero(&empty), "{usage}");
        }
        // A usage with nothing but a total covers the delivered text too.
        for (usage, own, want, is_credible) in [
            (r#"{"total_tokens":70}"#, OWN, (20, 50, 70), true),
            (r#"{"totalTokenCount":70}"#, OWN, (20, 50, 70), true),
            (r#"{"total_tokens":50}"#, OWN, (100, 50, 150), false),
            (r#"{"total_tokens":7}"#, OWN, (100, 50, 150), false),
            (r#"{"total_tokens":7}"#, empty, (7, 0, 7), true),
        ] {
            assert_eq!(charged(usage, &own), want, "{usage}");
            assert_eq!(Reported::read(usage).has_false_zero(&own), !is_credible, "{usage}");
        }
        let credible = r#"{"prompt_tokens":7,"completion_tokens":3,"total_tokens":0}"#;
        let is_final = OwnFigures { completion: 0, is_final: true, ..OWN };
        assert_eq!(charged(credible, &is_final), (7, 3, 10));
        assert!(!Reported::read(credible).has_false_zero(&is_final));
    }

    #[test]
    fn before_the_final_report_the_completion_is_at_least_the_count() {
        for (reported, is_final, want, is_outgrown) in
            [(1, false, 50, true), (60, false, 60, false), (1, true, 51, false), (60, true, 110, false)]
        {
            let usage = format!(r#"{{"prompt_tokens":7,"completion_tokens":{reported}}}"#);
            let own = OwnFigures { is_final, ..OWN };
            assert_eq!(charged(&usage, &own), (7, want, 7 + want), "{usage} {is_final}");
            assert_eq!(Reported::read(&usage).is_outgrown(&own), is_outgrown, "{usage} {is_final}");
        }
    }

    #[test]
    fn a_running_stream_without_credible_prompt_tokens_has_used_the_estimate() {
        for (usage, prompt) in [("{}", 100), (r#"{"prompt_tokens":0}"#, 100), (r#"{"prompt_tokens":9}"#, 9)] {
            assert_eq!(
                Reported::read(usage).amounts_so_far(100, 2),
                Amounts::of_request(prompt, 2),
                "{usage}"
            );
        }
    }
}
