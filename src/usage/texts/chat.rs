//! OpenAI's chat and completions, and what others have beside them.

use super::{Part, Received, Slot, Text};
use serde::Deserialize;

#[derive(Deserialize)]
pub(super) struct Choice<'a> {
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
    /// OpenRouter's, mostly the same as `reasoning` once more.
    #[serde(borrow)]
    reasoning_details: Option<Vec<Detail<'a>>>,
    #[serde(borrow)]
    audio: Option<Audio<'a>>,
    #[serde(borrow)]
    function_call: Option<Function<'a>>,
    #[serde(borrow)]
    tool_calls: Option<Vec<ToolCall<'a>>>,
}

#[derive(Deserialize)]
struct Detail<'a> {
    #[serde(borrow, default)]
    text: Text<'a>,
    #[serde(borrow, default)]
    summary: Text<'a>,
}

#[derive(Deserialize)]
struct Audio<'a> {
    #[serde(borrow, default)]
    transcript: Text<'a>,
}

#[derive(Deserialize)]
struct ToolCall<'a> {
    index: Option<u64>,
    #[serde(borrow, alias = "custom")]
    function: Option<Function<'a>>,
}

#[derive(Deserialize)]
pub(super) struct Function<'a> {
    #[serde(borrow, default)]
    pub(super) name: Text<'a>,
    #[serde(borrow, default, alias = "input")]
    pub(super) arguments: Text<'a>,
}

pub(super) fn choice(received: &mut Received, choice: Choice) {
    let Choice { index, delta, text } = choice;
    let slot = |part| Slot { choice: index, part };
    received.append(slot(Part::Content), &text.0);
    let Some(delta) = delta else { return };
    received.append(slot(Part::Content), &delta.content.0);
    received.append(slot(Part::Refusal), &delta.refusal.0);
    // Of several fields one is read: they say the same.
    let reasoning = [&delta.reasoning_content, &delta.reasoning];
    match reasoning.into_iter().find(|text| !text.0.is_empty()) {
        Some(text) => received.append(slot(Part::Reasoning), &text.0),
        None => {
            for detail in delta.reasoning_details.into_iter().flatten() {
                received.append(slot(Part::Reasoning), &detail.text.0);
                received.append(slot(Part::Reasoning), &detail.summary.0);
            }
        }
    }
    if let Some(audio) = delta.audio {
        received.append(slot(Part::Sound), &audio.transcript.0);
    }
    if let Some(call) = delta.function_call {
        function(received, slot(Part::ToolCall(u64::MAX)), &call);
    }
    for (at, call) in (0..).zip(delta.tool_calls.unwrap_or_default()) {
        if let Some(call_of) = call.function {
            function(received, slot(Part::ToolCall(call.index.unwrap_or(at))), &call_of);
        }
    }
}

pub(super) fn function(received: &mut Received, slot: Slot, function: &Function) {
    received.call(slot, &function.name.0);
    received.append(slot, &function.arguments.0);
}
