//! Determines which choices of a chat or completions stream have ended. After the end of all choices, some upstreams
//! send the usage in an event whose choices are not an empty list but carry nothing (LiteLLM).

use super::event::is_finish_reason;
use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;
use smallvec::SmallVec;

/// The most choices that a request may have.
const MAX_CHOICES: usize = 128;

/// The choices of one stream so far.
#[derive(Debug, Default)]
pub(super) struct ChoiceEnds {
    /// The index of each choice, and whether the choice has had its `finish_reason`.
    choices: SmallVec<[(u64, bool); 2]>,
    /// Whether an event could not be read, so that choices may be missing here.
    is_incomplete: bool,
}

/// The fields of an event that begin and end choices.
#[derive(Deserialize)]
struct ChoiceEvent<'a> {
    #[serde(borrow)]
    choices: Option<Vec<ChoiceState<'a>>>,
}

#[derive(Deserialize)]
struct ChoiceState<'a> {
    index: Option<u64>,
    #[serde(borrow)]
    finish_reason: Option<&'a RawValue>,
}

impl ChoiceEnds {
    /// Reads the data of the next event.
    pub(super) fn observe(&mut self, data: &[u8]) {
        if data.trim_ascii_start().first() != Some(&b'{') {
            return;
        }
        let Ok(event) = serde_json::from_slice::<ChoiceEvent>(data) else { return self.observe_unreadable() };
        for ChoiceState { index, finish_reason } in event.choices.into_iter().flatten() {
            let index = index.unwrap_or(0);
            let has_ended = finish_reason.is_some_and(is_finish_reason);
            if let Some((_, ended)) = self.choices.iter_mut().find(|(known, _)| *known == index) {
                *ended |= has_ended;
            } else if self.choices.len() < MAX_CHOICES {
                self.choices.push((index, has_ended));
            } else {
                self.observe_unreadable();
            }
        }
    }

    /// Records an event that was not read.
    pub(super) fn observe_unreadable(&mut self) {
        self.is_incomplete = true;
    }

    /// Whether there were choices and all of them have ended.
    pub(super) fn all_ended(&self) -> bool {
        !self.is_incomplete && !self.choices.is_empty() && self.choices.iter().all(|(_, ended)| *ended)
    }
}

/// Whether the items of a list of choices have an index and nothing else: no text, no delta, no `finish_reason`.
pub(super) fn carry_nothing(choices: &str) -> bool {
    let is_empty_member = |name: &str, value: &Value| match (name, value) {
        ("index", _) | (_, Value::Null) => true,
        ("delta", Value::Object(delta)) => delta.values().all(Value::is_null),
        ("text", Value::String(text)) => text.is_empty(),
        _ => false,
    };
    let Ok(Value::Array(choices)) = serde_json::from_str(choices) else { return false };
    choices.iter().all(|choice| {
        choice.as_object().is_some_and(|c| c.iter().all(|(name, value)| is_empty_member(name, value)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_choices_have_ended_when_each_has_had_its_finish_reason() {
        let ended = r#"{"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}"#;
        let other = r#"{"choices":[{"index":1,"text":"a"}]}"#;
        for (events, all_ended) in [
            (&[][..], false),
            (&[r#"{"choices":[]}"#, "[DONE]", r#"{"id":1}"#], false),
            (&[r#"{"choices":[{"index":0,"delta":{"content":"a"},"finish_reason":null}]}"#], false),
            (&[r#"{"choices":[{"index":0,"finish_reason":""}]}"#], false),
            (&[ended], true),
            (&[r#"{"choices":[{"finish_reason":"stop"}]}"#, "[DONE]"], true),
            (&[ended, other], false),
            (&[other, ended, r#"{"choices":[{"index":1,"finish_reason":"length"}]}"#], true),
            // What an unreadable event begins is unknown.
            (&[ended, "{"], false),
            (&[ended, r#"{"choices":[{"index":"1"}]}"#], false),
        ] {
            let mut ends = ChoiceEnds::default();
            events.iter().for_each(|event| ends.observe(event.as_bytes()));
            assert_eq!(ends.all_ended(), all_ended, "{events:?}");
        }
    }

    #[test]
    fn the_number_of_choices_is_bounded() {
        let event = |index: usize| format!(r#"{{"choices":[{{"index":{index},"finish_reason":"stop"}}]}}"#);
        let mut ends = ChoiceEnds::default();
        for index in 0..1_000 {
            ends.observe(event(index).as_bytes());
            assert_eq!(ends.all_ended(), index < MAX_CHOICES);
        }
        assert_eq!(ends.choices.len(), MAX_CHOICES);
    }

    #[test]
    fn choices_carry_nothing_if_only_their_index_is_set() {
        for (choices, is_nothing) in [
            (r#"[{"index":0,"delta":{}}]"#, true),
            (
                r#"[{"index":0,"delta":{"content":null,"role":null},"finish_reason":null,"logprobs":null}]"#,
                true,
            ),
            (r#"[{"delta":null},{"index":1}]"#, true),
            (r#"[{"index":0,"text":""}]"#, true),
            (r#"[{"index":0,"text":null}]"#, true),
            (r#"[{"index":0,"text":"a"}]"#, false),
            (r#"[{"index":0,"delta":{"content":""}}]"#, false),
            (r#"[{"index":0,"delta":{"tool_calls":[]}}]"#, false),
            (r#"[{"index":0,"delta":{"role":"assistant"}}]"#, false),
            (r#"[{"index":0,"delta":{},"finish_reason":"stop"}]"#, false),
            (r#"[{"index":0,"delta":{}},{"index":1,"delta":{"content":"a"}}]"#, false),
            (r#"[{"index":0,"delta":{},"content_filter_results":{"hate":{}}}]"#, false),
            ("[5]", false),
            ("{}", false),
        ] {
            assert_eq!(carry_nothing(choices), is_nothing, "{choices}");
        }
    }
}
