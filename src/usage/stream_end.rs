//! Determines which report of a stream is final, and when the answer is whole.
//!
//! A report is final in the event that the API defines as final: the usage chunk of OpenAI, or a usage beside or after
//! the finish reasons of all choices; Anthropic's `message_delta`; the last event of a Responses or Cohere stream.
//! Earlier reports can be placeholders (Anthropic's `message_start`) or running sums.

use super::event::{EventReport, UsageEvent};
use memchr::memmem::Finder;
use std::sync::LazyLock;

static FINISH_REASON: LazyLock<Finder> = LazyLock::new(|| Finder::new(b"\"finish_reason\""));
static FINISH_REASON_OF_GEMINI: LazyLock<Finder> = LazyLock::new(|| Finder::new(b"\"finishReason\""));
static MESSAGE_STOP: LazyLock<Finder> = LazyLock::new(|| Finder::new(b"\"message_stop\""));
static RESPONSE: LazyLock<Finder> = LazyLock::new(|| Finder::new(b"\"response."));

/// The ends of a Responses stream, without their prefix `response.`.
const RESPONSE_ENDS: [&str; 3] = ["completed", "incomplete", "failed"];

/// The parts of a stream that have ended so far.
#[derive(Debug)]
pub(super) struct StreamEnd {
    /// The number of choices that the request names.
    choices: u64,
    /// The finished choices: a bit for each index below 128.
    finished: u128,
    /// Whether any event so far has reported usage.
    has_report: bool,
    has_final_report: bool,
    has_last_event: bool,
}

impl Default for StreamEnd {
    fn default() -> Self {
        Self { choices: 1, finished: 0, has_report: false, has_final_report: false, has_last_event: false }
    }
}

impl StreamEnd {
    /// The end of a stream with this number of choices.
    pub(super) fn of(choices: u64) -> Self {
        Self { choices: choices.max(1), ..Self::default() }
    }

    /// Whether the stream has several choices, so that a report may be the usage of one of them.
    pub(super) fn has_several_choices(&self) -> bool {
        self.choices > 1
    }

    /// Whether the final report of completion tokens has passed.
    pub(super) fn has_final_report(&self) -> bool {
        self.has_final_report
    }

    /// Whether the last event of the API has passed.
    pub(super) fn has_last_event(&self) -> bool {
        self.has_last_event
    }

    /// Records that the final report of completion tokens has passed.
    pub(super) fn final_report(&mut self) {
        self.has_final_report = true;
    }

    /// Reads the data of an event without usage.
    pub(super) fn read(&mut self, data: &[u8]) {
        if data.trim_ascii() == b"[DONE]" {
            self.has_last_event = true;
        } else if may_end(data)
            && let Ok(event) = serde_json::from_slice::<UsageEvent>(data)
        {
            self.finish(&event.finished());
            self.has_last_event |= is_last_kind(event.kind());
        }
    }

    /// Reads an event with usage. Returns whether its report of the whole answer is final.
    pub(super) fn read_report(&mut self, event: &UsageEvent, report: &EventReport) -> bool {
        let (was_finished, had_report) = (self.is_finished(), std::mem::replace(&mut self.has_report, true));
        let EventReport { usage, finished } = report;
        self.finish(finished);
        let kind = event.kind();
        self.has_last_event |=
            is_last_kind(kind) || event.is_of_gemini() && !finished.is_empty() && self.is_finished();
        if usage.answer.is_none() {
            // The usage within one of several choices is that choice's.
            return !self.has_several_choices() && self.is_finished();
        }
        match kind {
            "message_delta" => true,
            _ if is_last_kind(kind) => true,
            "message_start" => false,
            _ if kind.starts_with("response.") => false,
            _ if event.has_no_choices() && !event.is_of_gemini() => true,
            _ if was_finished || finished.len() as u64 >= self.choices => true,
            // Beside the last of several finish reasons. If other choices had reports too, it is the usage of one
            // choice (vLLM).
            _ => self.is_finished() && !had_report,
        }
    }

    fn finish(&mut self, indices: &[u64]) {
        for index in indices {
            self.finished |= u32::try_from(*index).ok().and_then(|at| 1_u128.checked_shl(at)).unwrap_or(0);
        }
    }

    /// Whether all choices have had a finish reason.
    fn is_finished(&self) -> bool {
        u64::from(self.finished.count_ones()) >= self.choices
    }
}

fn is_last_kind(kind: &str) -> bool {
    matches!(kind, "message_stop" | "message-end")
        || kind.strip_prefix("response.").is_some_and(|end| RESPONSE_ENDS.contains(&end))
}

/// Whether an event may hold a finish reason or end the stream. Searches for names and does not parse.
fn may_end(data: &[u8]) -> bool {
    let has_reason = |name: &Finder| {
        name.find_iter(data).any(|at| {
            let value = data[at + name.needle().len()..].trim_ascii_start();
            value.strip_prefix(b":").is_some_and(|value| value.trim_ascii_start().starts_with(b"\""))
        })
    };
    let is_response_end = || {
        RESPONSE.find_iter(data).any(|at| {
            let rest = &data[at + RESPONSE.needle().len()..];
            RESPONSE_ENDS.iter().any(|end| rest.starts_with(end.as_bytes()))
        })
    };
    has_reason(&FINISH_REASON)
        || has_reason(&FINISH_REASON_OF_GEMINI)
        || MESSAGE_STOP.find(data).is_some()
        || is_response_end()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether the last of these events has a final report, and whether the stream has had its last event.
    fn after(choices: u64, events: &[&str]) -> (bool, bool) {
        let (mut end, mut is_final) = (StreamEnd::of(choices), false);
        for data in events {
            let event = serde_json::from_str::<UsageEvent>(data).ok();
            match event.as_ref().and_then(|event| Some((event, event.report()?))) {
                Some((event, report)) => is_final = end.read_report(event, &report),
                None => end.read(data.as_bytes()),
            }
        }
        (is_final, end.has_last_event())
    }

    const USAGE: &str = r#""usage":{"completion_tokens":3}"#;

    fn choice(index: u64, rest: &str) -> String {
        format!(r#"{{"choices":[{{"index":{index},"delta":{{}}{rest}"#)
    }

    #[test]
    fn a_report_of_one_choice_is_final_beside_or_after_its_finish_reason() {
        let running = choice(0, r#"}],"usage":{"completion_tokens":3}}"#);
        let beside = choice(0, &format!(r#","finish_reason":"stop"}}],{USAGE}}}"#));
        let finish = choice(0, r#","finish_reason":"stop"}]}"#);
        let within = choice(0, &format!(r#","finish_reason":"stop",{USAGE}}}]}}"#));
        let early_within = choice(0, &format!(r#","finish_reason":null,{USAGE}}}]}}"#));
        let chunk = format!(r#"{{"choices":[],{USAGE}}}"#);
        let bare = format!("{{{USAGE}}}");
        for (events, is_final) in [
            (vec![running.as_str()], false),
            (vec![&beside], true),
            (vec![&finish, &running], true),
            (vec![&within], true),
            (vec![&early_within], false),
            (vec![&chunk], true),
            (vec![&bare], true),
        ] {
            assert_eq!(after(1, &events), (is_final, false), "{events:?}");
        }
    }

    #[test]
    fn with_several_choices_the_report_beside_one_finish_reason_is_not_final() {
        let beside = |index| choice(index, &format!(r#","finish_reason":"stop"}}],{USAGE}}}"#));
        let within = choice(1, &format!(r#","finish_reason":"stop",{USAGE}}}]}}"#));
        let chunk = format!(r#"{{"choices":[],{USAGE}}}"#);
        let both = format!(
            r#"{{"choices":[{{"index":0,"finish_reason":"a"}},{{"index":1,"finish_reason":"a"}}],{USAGE}}}"#
        );
        let (zero, one) = (beside(0), beside(1));
        let zero_without = choice(0, r#","finish_reason":"stop"}]}"#);
        let extra = choice(0, &format!(r"}}],{USAGE}}}"));
        for (events, is_final) in [
            (vec![zero.as_str()], false),
            (vec![&zero, &zero, &extra], false),
            (vec![&zero, &one], false),
            (vec![&zero_without, &one], true),
            (vec![&zero, &within], false),
            (vec![&zero, &one, &extra], true),
            (vec![&zero, &chunk], true),
            (vec![&both], true),
        ] {
            assert_eq!(after(2, &events).0, is_final, "{events:?}");
        }
        let far = choice(500, r#","finish_reason":"stop"}]}"#);
        assert!(!after(1, &[&far, &extra]).0);
    }

    #[test]
    fn other_apis_have_final_events_of_their_own() {
        for (event, is_final, is_last) in [
            (
                r#"{"type":"message_start","message":{"usage":{"input_tokens":3,"output_tokens":1}}}"#,
                false,
                false,
            ),
            (r#"{"type":"message_delta","delta":{},"usage":{"output_tokens":9}}"#, true, false),
            (r#"{"type":"message_stop"}"#, false, true),
            (r#"{"type":"message-end","delta":{"usage":{"tokens":{"output_tokens":9}}}}"#, true, true),
            (r#"{"type":"response.in_progress","response":{"usage":{"output_tokens":1}}}"#, false, false),
            (r#"{"type":"response.completed","response":{"usage":{"output_tokens":1}}}"#, true, true),
            (r#"{"type":"response.incomplete","response":{"usage":{"output_tokens":1}}}"#, true, true),
            (r#"{"type":"response.failed","response":{"usage":null}}"#, false, true),
            (r#"{"type":"response.completed.not","response":{}}"#, false, false),
            (r#"{"candidates":[{"content":{}}],"usageMetadata":{"candidatesTokenCount":1}}"#, false, false),
            (
                r#"{"candidates":[{"finishReason":"STOP"}],"usageMetadata":{"candidatesTokenCount":1}}"#,
                true,
                true,
            ),
            (r#"{"candidates":[{"finishReason":"STOP"}]}"#, false, false),
            (r#"{"usageMetadata":{"candidatesTokenCount":1}}"#, false, false),
            ("[DONE]", false, true),
            (r#"{"choices":[{"delta":{"content":"response.completed"}}]}"#, false, false),
            (r#"{"choices":[{"delta":{"content":"\"message_stop\""}}]}"#, false, false),
        ] {
            assert_eq!(after(1, &[event]), (is_final, is_last), "{event}");
        }
    }
}
