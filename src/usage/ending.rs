//! Makes the events that end a stream early, as if the model had reached its token limit. Their format is that of
//! the delivered events.

use super::Delivered;
use memchr::memmem;
use serde_json::{Map, Value, json};
use std::fmt::Write as _;

type Object = Map<String, Value>;

/// The events that end a stream after the delivered ones; `tokens` is the number of completion tokens so far.
pub(super) fn at_length(delivered: &Delivered, choices: u64, tokens: u64) -> String {
    let opening = object(delivered.opening());
    let last = delivered.last_events().next().map(object).unwrap_or_default();
    let kind = |event: &Object| event.get("type").and_then(Value::as_str).unwrap_or_default().to_owned();
    let (first_kind, last_kind) = (kind(&opening), kind(&last));
    if first_kind.starts_with("response.") || last_kind.starts_with("response.") {
        return responses_ending(opening, delivered);
    }
    if first_kind == "message_start" || last_kind.starts_with("content_block_") {
        return anthropic_ending(delivered.open_block(), tokens);
    }
    if first_kind == "message-start" || last_kind.starts_with("content-") {
        return cohere_ending(tokens);
    }
    if let Some(chunk) =
        last_event_with(delivered, b"\"candidates\"").filter(|c| c.contains_key("candidates"))
    {
        return gemini_ending(chunk, choices);
    }
    chat_ending(last_event_with(delivered, b"\"choices\"").unwrap_or(last), choices)
}

/// The sequence number of the next event, if the events are numbered (Responses API).
pub(super) fn next_sequence_number(delivered: &Delivered) -> Option<u64> {
    let last = last_event_with(delivered, b"\"sequence_number\"")?;
    last.get("sequence_number")?.as_u64()?.checked_add(1)
}

fn object(json: &[u8]) -> Object {
    serde_json::from_slice(json).unwrap_or_default()
}

fn last_event_with(delivered: &Delivered, field: &[u8]) -> Option<Object> {
    delivered.last_events().find(|data| memmem::find(data, field).is_some()).map(object)
}

/// Writes an event named by its type.
fn write_named(events: &mut String, event: &Value) {
    let name = event["type"].as_str().unwrap_or_default();
    // Writing to a string cannot fail.
    let _ = write!(events, "event: {name}\ndata: {event}\n\n");
}

/// A chunk that ends all choices with `finish_reason: "length"`, and `[DONE]`.
fn chat_ending(mut chunk: Object, choices: u64) -> String {
    chunk.retain(|name, _| !matches!(name.as_str(), "choices" | "usage"));
    let is_text = chunk.get("object").and_then(Value::as_str) == Some("text_completion");
    let end_of_choice = |index| {
        if is_text {
            json!({"index": index, "text": "", "finish_reason": "length"})
        } else {
            json!({"index": index, "delta": {}, "finish_reason": "length"})
        }
    };
    chunk.insert("choices".into(), (0..choices).map(end_of_choice).collect());
    format!("data: {}\n\ndata: [DONE]\n\n", Value::Object(chunk))
}

/// An event with the response of the opening event, whose status becomes `incomplete`.
fn responses_ending(mut opening: Object, delivered: &Delivered) -> String {
    let mut response = match opening.remove("response") {
        Some(Value::Object(response)) => response,
        _ => Object::from_iter([("object".into(), "response".into()), ("output".into(), json!([]))]),
    };
    response.insert("status".into(), "incomplete".into());
    response.insert("incomplete_details".into(), json!({"reason": "max_output_tokens"}));
    response.insert("usage".into(), Value::Null);
    let mut event = json!({"type": "response.incomplete", "response": response});
    if let Some(number) = next_sequence_number(delivered) {
        event["sequence_number"] = number.into();
    }
    let mut events = String::new();
    write_named(&mut events, &event);
    events
}

fn anthropic_ending(open_block: Option<u64>, tokens: u64) -> String {
    let mut events = String::new();
    if let Some(index) = open_block {
        write_named(&mut events, &json!({"type": "content_block_stop", "index": index}));
    }
    write_named(
        &mut events,
        &json!({
            "type": "message_delta",
            "delta": {"stop_reason": "max_tokens", "stop_sequence": null},
            "usage": {"output_tokens": tokens},
        }),
    );
    write_named(&mut events, &json!({"type": "message_stop"}));
    events
}

fn cohere_ending(tokens: u64) -> String {
    let mut events = String::new();
    let usage = json!({"tokens": {"output_tokens": tokens}});
    write_named(
        &mut events,
        &json!({"type": "message-end", "delta": {"finish_reason": "MAX_TOKENS", "usage": usage}}),
    );
    events
}

/// A copy of the last chunk without its text.
fn gemini_ending(mut chunk: Object, candidates: u64) -> String {
    let end_of_choice = |index| {
        let content = json!({"parts": [{"text": ""}], "role": "model"});
        json!({"content": content, "finishReason": "MAX_TOKENS", "index": index})
    };
    chunk.insert("candidates".into(), (0..candidates).map(end_of_choice).collect());
    format!("data: {}\n\n", Value::Object(chunk))
}
