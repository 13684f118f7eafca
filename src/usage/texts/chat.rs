//! Chat and text completions of OpenAI, with the fields that other providers add.

use super::{Text, TextCollector, TextKind, TextSlot};
use serde::Deserialize;

#[derive(Deserialize)]
pub(super) struct ChatChoice<'a> {
    #[serde(default)]
    index: u64,
    #[serde(borrow, alias = "message")]
    delta: Option<ChoiceDelta<'a>>,
    #[serde(borrow, default)]
    text: Text<'a>,
}

#[derive(Deserialize)]
struct ChoiceDelta<'a> {
    #[serde(borrow, default)]
    content: Text<'a>,
    #[serde(borrow, default)]
    refusal: Text<'a>,
    #[serde(borrow, default)]
    reasoning_content: Text<'a>,
    #[serde(borrow, default)]
    reasoning: Text<'a>,
    /// Sent by OpenRouter. Mostly repeats `reasoning`.
    #[serde(borrow)]
    reasoning_details: Option<Vec<ReasoningDetail<'a>>>,
    #[serde(borrow)]
    audio: Option<Audio<'a>>,
    #[serde(borrow)]
    function_call: Option<ChatFunction<'a>>,
    #[serde(borrow)]
    tool_calls: Option<Vec<ChatToolCall<'a>>>,
}

#[derive(Deserialize)]
struct ReasoningDetail<'a> {
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
struct ChatToolCall<'a> {
    index: Option<u64>,
    #[serde(borrow, alias = "custom")]
    function: Option<ChatFunction<'a>>,
}

#[derive(Deserialize)]
pub(super) struct ChatFunction<'a> {
    #[serde(borrow, default)]
    pub(super) name: Text<'a>,
    #[serde(borrow, default, alias = "input")]
    pub(super) arguments: Text<'a>,
}

pub(super) fn choice(texts: &mut TextCollector, choice: ChatChoice) {
    let ChatChoice { index, delta, text } = choice;
    let slot = |kind| TextSlot { choice: index, kind };
    texts.append(slot(TextKind::Content), &text.0);
    let Some(delta) = delta else { return };
    texts.append(slot(TextKind::Content), &delta.content.0);
    texts.append(slot(TextKind::Refusal), &delta.refusal.0);
    // These fields repeat each other, so only one of them counts.
    let reasoning = [&delta.reasoning_content, &delta.reasoning];
    match reasoning.into_iter().find(|text| !text.0.is_empty()) {
        Some(text) => texts.append(slot(TextKind::Reasoning), &text.0),
        None => {
            for detail in delta.reasoning_details.into_iter().flatten() {
                texts.append(slot(TextKind::Reasoning), &detail.text.0);
                texts.append(slot(TextKind::Reasoning), &detail.summary.0);
            }
        }
    }
    if let Some(audio) = delta.audio {
        texts.append(slot(TextKind::AudioTranscript), &audio.transcript.0);
    }
    if let Some(call) = delta.function_call {
        function(texts, slot(TextKind::ToolCall(u64::MAX)), &call);
    }
    for (position, call) in (0..).zip(delta.tool_calls.unwrap_or_default()) {
        if let Some(called) = call.function {
            function(texts, slot(TextKind::ToolCall(call.index.unwrap_or(position))), &called);
        }
    }
}

pub(super) fn function(texts: &mut TextCollector, slot: TextSlot, function: &ChatFunction) {
    texts.call(slot, &function.name.0);
    texts.append(slot, &function.arguments.0);
}
