//! Finds the generated text in the JSON of an answer: one stream event or a whole document.
//!
//! The fields of the JSON select the API, not the route of the request: some upstreams answer in the formats of
//! several APIs.

mod anthropic;
mod chat;
mod cohere;
mod gemini;
mod responses;
#[cfg(test)]
mod tests;

use super::collector::{TextCollector, TextKind, TextSlot};
use crate::json::LooseText as Text;
use serde::Deserialize;
use serde_json::value::RawValue;

pub(super) use anthropic::open_block_after;

/// All fields that can hold text, of all APIs.
#[derive(Deserialize)]
struct Answer<'a> {
    #[serde(rename = "type", borrow, default)]
    kind: Text<'a>,
    #[serde(borrow)]
    error: Option<&'a RawValue>,
    #[serde(borrow)]
    choices: Option<Vec<chat::ChatChoice<'a>>>,
    #[serde(borrow)]
    candidates: Option<Vec<gemini::Candidate<'a>>>,
    /// Events of Anthropic, Cohere and the Responses API.
    #[serde(borrow)]
    delta: Option<&'a RawValue>,
    index: Option<u64>,
    #[serde(borrow)]
    content_block: Option<anthropic::Block<'a>>,
    /// Documents of Anthropic.
    #[serde(borrow)]
    content: Option<&'a RawValue>,
    /// Documents of Cohere; also in Anthropic's opening event.
    #[serde(borrow)]
    message: Option<&'a RawValue>,
    /// The fields from here on belong to the Responses API.
    #[serde(borrow)]
    output: Option<&'a RawValue>,
    #[serde(borrow, default)]
    status: Text<'a>,
    #[serde(borrow)]
    response: Option<&'a RawValue>,
    #[serde(borrow)]
    item: Option<responses::OutputItem<'a>>,
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

/// Collects the text of an event or document. An error object is not a completion and adds no text.
pub(super) fn collect(texts: &mut TextCollector, json: &[u8]) -> Result<(), serde_json::Error> {
    let json = json.trim_ascii();
    match json.first() {
        Some(b'{') => answer(texts, serde_json::from_slice(json)?),
        // Gemini can send a stream as one list. `[DONE]` ends a chat stream.
        Some(b'[') if json != b"[DONE]" => {
            for chunk in serde_json::from_slice::<Vec<&RawValue>>(json)? {
                if chunk.get().starts_with('{') {
                    answer(texts, serde_json::from_slice(chunk.get().as_bytes())?)?;
                }
            }
            Ok(())
        }
        _ => Ok(()),
    }
}

fn answer(texts: &mut TextCollector, answer: Answer) -> Result<(), serde_json::Error> {
    if is_present(answer.error) || answer.kind.0 == "error" {
        return Ok(());
    }
    let kind = &*answer.kind.0;
    if kind.starts_with("response.") {
        return responses::event(texts, &answer);
    }
    match kind {
        "content_block_start" | "content_block_delta" | "content_block_stop" => {
            return anthropic::event(texts, &answer);
        }
        "content-start" | "content-delta" | "tool-plan-delta" | "tool-call-start" | "tool-call-delta" => {
            return cohere::event(texts, &answer);
        }
        _ => {}
    }
    for choice in answer.choices.into_iter().flatten() {
        chat::choice(texts, choice);
    }
    for (position, candidate) in (0..).zip(answer.candidates.into_iter().flatten()) {
        gemini::candidate(texts, position, candidate);
    }
    if let Some(output) = answer.output.filter(|o| o.get().starts_with('[')) {
        responses::output(texts, output)?;
        if answer.status.0 == "completed" {
            texts.response_completed();
        }
    }
    if let Some(content) = answer.content.filter(|c| c.get().starts_with('[')) {
        anthropic::document(texts, content)?;
    }
    if let Some(message) = answer.message.filter(|m| kind != "message_start" && m.get().starts_with('{')) {
        cohere::message(texts, 0, message)?;
    }
    Ok(())
}

/// Whether a value is present and not null.
fn is_present(value: Option<&RawValue>) -> bool {
    value.is_some_and(|value| value.get() != "null")
}

/// JSON without whitespace between its tokens.
fn compact(json: &RawValue) -> Result<String, serde_json::Error> {
    Ok(serde_json::from_str::<serde_json::Value>(json.get())?.to_string())
}
