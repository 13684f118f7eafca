//! The parts of a stream event that can hold usage, or that end a choice.

use super::choice_ends::{ChoiceEnds, carry_nothing};
use super::{Reported, fields};
use crate::json::LooseText;
use serde::Deserialize;
use serde_json::value::RawValue;

/// The fields of an event that can hold usage.
#[derive(Deserialize)]
pub(super) struct UsageEvent<'a> {
    #[serde(rename = "type", borrow, default)]
    kind: LooseText<'a>,
    #[serde(borrow)]
    choices: Option<&'a RawValue>,
    /// Gemini's choices.
    #[serde(borrow)]
    candidates: Option<&'a RawValue>,
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

/// The usage in one event.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct EventUsage {
    /// The usage of the whole answer. `None`: the event has none.
    pub(super) answer: Option<Reported>,
    /// The usage within a choice (Moonshot). `None`: the event has none.
    pub(super) choice: Option<Reported>,
}

/// What an event with usage reports.
pub(super) struct EventReport {
    pub(super) usage: EventUsage,
    /// The choices or candidates that have a finish reason in this event.
    pub(super) finished: Vec<u64>,
}

impl EventUsage {
    /// Replaces the fields that `later` reports.
    pub(super) fn update(&mut self, later: &Self) {
        self.answer = merged([self.answer, later.answer]);
        self.choice = merged([self.choice, later.choice]);
    }

    /// Both together. The usage of the answer takes precedence.
    pub(super) fn total(&self) -> Reported {
        merged([self.choice, self.answer]).unwrap_or_default()
    }
}

impl UsageEvent<'_> {
    /// The value of `type`. Empty in events of OpenAI's chat streams and of Gemini.
    pub(super) fn kind(&self) -> &str {
        &self.kind.0
    }

    /// What the event reports; `None`: it has no usage.
    pub(super) fn report(&self) -> Option<EventReport> {
        let nested = |parent: Option<&RawValue>| fields::read_within(parent?.get());
        let direct = |usage: Option<&RawValue>| {
            let usage = usage.map(RawValue::get).filter(|usage| *usage != "null")?;
            Some(Reported::read(usage))
        };
        let of_answer = [
            nested(self.response),
            nested(self.message),
            nested(self.delta),
            nested(self.x_groq),
            direct(self.usage_metadata),
            direct(self.usage),
        ];
        let choices = self.choices();
        let of_choices = choices.iter().map(|choice| direct(choice.usage));
        let usage = EventUsage { answer: merged(of_answer), choice: merged(of_choices) };
        let has_usage = usage.answer.is_some() || usage.choice.is_some();
        has_usage.then(|| EventReport { usage, finished: finished(&choices) })
    }

    /// Whether this is the extra event of a stream with `include_usage`: usage and an empty list of choices. After all
    /// choices have ended, the list may have choices that carry nothing.
    pub(super) fn is_usage_chunk(&self, choice_ends: &ChoiceEnds) -> bool {
        self.usage.is_some_and(|usage| usage.get() != "null")
            && self.choices.map(RawValue::get).is_some_and(|choices| {
                is_empty_array(choices) || choice_ends.all_ended() && carry_nothing(choices)
            })
    }

    /// Whether the event has the chat shape of a usage chunk, with or without an empty list of choices.
    pub(super) fn has_no_choices(&self) -> bool {
        let is_missing = |list: Option<&RawValue>| list.is_none_or(|list| list.get() == "null");
        let is_empty = self.choices.is_some_and(|choices| is_empty_array(choices.get()));
        is_missing(self.candidates) && (is_empty || is_missing(self.choices))
    }

    /// Whether the event is one of Gemini.
    pub(super) fn is_of_gemini(&self) -> bool {
        self.usage_metadata.is_some()
    }

    /// The choices or candidates that have a finish reason in this event.
    pub(super) fn finished(&self) -> Vec<u64> {
        finished(&self.choices())
    }

    /// The choices or candidates. Empty if the lists are anything else.
    fn choices(&self) -> Vec<EndedChoice<'_>> {
        let list = self.choices.or(self.candidates);
        list.and_then(|list| serde_json::from_str(list.get()).ok()).unwrap_or_default()
    }
}

fn merged(reports: impl IntoIterator<Item = Option<Reported>>) -> Option<Reported> {
    reports.into_iter().flatten().reduce(|mut all, next| {
        all.update(next);
        all
    })
}

/// The fields of a choice or candidate that report usage or its end.
#[derive(Deserialize)]
struct EndedChoice<'a> {
    #[serde(borrow)]
    index: Option<&'a RawValue>,
    #[serde(borrow, alias = "finishReason")]
    finish_reason: Option<&'a RawValue>,
    #[serde(borrow)]
    usage: Option<&'a RawValue>,
}

impl EndedChoice<'_> {
    /// Its index, or else its position, if it has a finish reason.
    fn finished(&self, position: u64) -> Option<u64> {
        self.finish_reason.filter(|reason| is_finish_reason(reason))?;
        Some(self.index.and_then(|index| index.get().parse().ok()).unwrap_or(position))
    }
}

/// Whether this value of `finish_reason` ends a choice.
pub(super) fn is_finish_reason(value: &RawValue) -> bool {
    !matches!(value.get(), "null" | "\"\"")
}

fn finished(choices: &[EndedChoice]) -> Vec<u64> {
    (0..).zip(choices).filter_map(|(at, choice)| choice.finished(at)).collect()
}

fn is_empty_array(json: &str) -> bool {
    json.strip_prefix('[').and_then(|j| j.strip_suffix(']')).is_some_and(|inside| inside.trim().is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(json: &str) -> UsageEvent<'_> {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn usage_within_a_choice_is_kept_apart_from_the_usage_of_the_answer() {
        let both = event(
            r#"{"choices":[{"index":0,"usage":{"completion_tokens":9}}],"usage":{"completion_tokens":3}}"#,
        );
        let usage = both.report().unwrap().usage;
        assert_eq!(usage.answer.unwrap().completion(), Some(3));
        assert_eq!(usage.choice.unwrap().completion(), Some(9));
        for none in [
            r#"{"choices":[{"index":0,"usage":null}],"usage":null}"#,
            r#"{"choices":{"usage":{"completion_tokens":9}}}"#,
            r#"{"choices":[[1]],"x_groq":"usage"}"#,
        ] {
            assert!(event(none).report().is_none(), "{none}");
        }
    }

    #[test]
    fn a_choice_is_finished_if_it_has_a_finish_reason() {
        for (json, want) in [
            (
                r#"{"choices":[{"index":1,"finish_reason":"stop"},{"index":0,"finish_reason":null}]}"#,
                &[1][..],
            ),
            (r#"{"choices":[{"finish_reason":"a"},{"finish_reason":"b"}]}"#, &[0, 1]),
            (r#"{"choices":[{"index":"x","finish_reason":"stop"}]}"#, &[0]),
            (r#"{"choices":[{"index":0,"finish_reason":""}]}"#, &[]),
            (r#"{"candidates":[{"finishReason":"STOP","index":2}]}"#, &[2]),
            (r#"{"choices":[]}"#, &[]),
            (r#"{"choices":"finish_reason"}"#, &[]),
        ] {
            assert_eq!(event(json).finished(), want, "{json}");
        }
    }
}
