//! The generated text in an answer's JSON, event or whole document, by its shape: routes do not tell, since
//! some upstreams have several APIs' shapes.

mod anthropic;
mod chat;
mod cohere;
mod gemini;
mod responses;
#[cfg(test)]
mod tests;

use super::received::Received;
use crate::json::LooseText as Text;
use serde::Deserialize;
use serde_json::value::RawValue;

pub(super) use anthropic::block;

/// Which text a delta belongs to: tokens straddle deltas, so they are joined before they are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Slot {
    /// Choice, output item, block or candidate.
    pub(super) choice: u64,
    pub(super) part: Part,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    Content,
    Refusal,
    Reasoning,
    Sound,
    Code,
    ToolCall(u64),
    /// Parts of an item of Responses.
    ItemContent(u64),
    ItemReasoning(u64),
    Summary(u64),
}

/// All fields that text can stand in, whatever the API.
#[derive(Deserialize)]
struct Answer<'a> {
    #[serde(rename = "type", borrow, default)]
    kind: Text<'a>,
    #[serde(borrow)]
    error: Option<&'a RawValue>,
    #[serde(borrow)]
    choices: Option<Vec<chat::Choice<'a>>>,
    #[serde(borrow)]
    candidates: Option<Vec<gemini::Candidate<'a>>>,
    /// An event's.
    #[serde(borrow)]
    delta: Option<&'a RawValue>,
    index: Option<u64>,
    #[serde(borrow)]
    content_block: Option<anthropic::Block<'a>>,
    /// Anthropic's document.
    #[serde(borrow)]
    content: Option<&'a RawValue>,
    /// Cohere's document, and what opens a stream of Anthropic's.
    #[serde(borrow)]
    message: Option<&'a RawValue>,
    /// Of Responses.
    #[serde(borrow)]
    output: Option<&'a RawValue>,
    #[serde(borrow, default)]
    status: Text<'a>,
    #[serde(borrow)]
    response: Option<&'a RawValue>,
    #[serde(borrow)]
    item: Option<responses::Item<'a>>,
    output_index: Option<u64>,
    content_index: Option<u64>,
    summary_index: Option<u64>,
    #[serde(borrow, default)]
    text: Text<'a>,
    #[serde(borrow, default)]
    refusal: Text<'a>,
    #[serde(borrow, default)]
    arguments: Text<'a>,
    #[serde(borrow, default)]
    input: Text<'a>,
}

/// Adds the texts of an event or document. An error is no completion, nor is what is no object.
pub(super) fn read(received: &mut Received, json: &[u8]) -> Result<(), serde_json::Error> {
    let json = json.trim_ascii();
    match json.first() {
        Some(b'{') => answer(received, serde_json::from_slice(json)?),
        // A stream of Gemini's as one list, a data line of `[DONE]`.
        Some(b'[') if json != b"[DONE]" => {
            for chunk in serde_json::from_slice::<Vec<&RawValue>>(json)? {
                if chunk.get().starts_with('{') {
                    answer(received, serde_json::from_str(chunk.get())?)?;
                }
            }
            Ok(())
        }
        _ => Ok(()),
    }
}

fn answer(received: &mut Received, answer: Answer) -> Result<(), serde_json::Error> {
    if is_some(answer.error) || answer.kind.0 == "error" {
        return Ok(());
    }
    let kind = &*answer.kind.0;
    if kind.starts_with("response.") {
        return responses::event(received, &answer);
    }
    match kind {
        "content_block_start" | "content_block_delta" | "content_block_stop" => {
            return anthropic::event(received, &answer);
        }
        "content-start" | "content-delta" | "tool-plan-delta" | "tool-call-start" | "tool-call-delta" => {
            return cohere::event(received, &answer);
        }
        _ => {}
    }
    for choice in answer.choices.into_iter().flatten() {
        chat::choice(received, choice);
    }
    for (at, candidate) in (0..).zip(answer.candidates.into_iter().flatten()) {
        gemini::candidate(received, at, candidate);
    }
    if let Some(output) = answer.output.filter(|o| o.get().starts_with('[')) {
        responses::output(received, output)?;
        if answer.status.0 == "completed" {
            received.ends();
        }
    }
    if let Some(content) = answer.content.filter(|c| c.get().starts_with('[')) {
        anthropic::document(received, content)?;
    }
    if let Some(message) = answer.message.filter(|m| kind != "message_start" && m.get().starts_with('{')) {
        cohere::message(received, 0, message)?;
    }
    Ok(())
}

fn is_some(value: Option<&RawValue>) -> bool {
    value.is_some_and(|value| value.get() != "null")
}

/// JSON without the spaces between its parts.
fn compact(json: &RawValue) -> Result<String, serde_json::Error> {
    Ok(serde_json::from_str::<serde_json::Value>(json.get())?.to_string())
}
