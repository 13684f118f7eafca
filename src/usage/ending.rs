//! How a stream ends whose model has reached its bound, in the shape of each API.

use super::Received;
use memchr::memmem;
use serde_json::{Map, Value, json};
use std::fmt::Write as _;

type Object = Map<String, Value>;

/// Events that end an answer at its length after what came, of which `tokens` have been generated.
pub(super) fn of_length(received: &Received, choices: u64, tokens: u64) -> String {
    let opening = object(received.opening());
    let last = received.last_events().next().map(object).unwrap_or_default();
    let kind = |event: &Object| event.get("type").and_then(Value::as_str).unwrap_or_default().to_owned();
    let (first_kind, last_kind) = (kind(&opening), kind(&last));
    if first_kind.starts_with("response.") || last_kind.starts_with("response.") {
        return of_responses(opening, received);
    }
    if first_kind == "message_start" || last_kind.starts_with("content_block_") {
        return of_anthropic(received.open_block(), tokens);
    }
    if first_kind == "message-start" || last_kind.starts_with("content-") {
        return of_cohere(tokens);
    }
    if let Some(chunk) = last_with(received, b"\"candidates\"").filter(|c| c.contains_key("candidates")) {
        return of_gemini(chunk, choices);
    }
    of_chat(last_with(received, b"\"choices\"").unwrap_or(last), choices)
}

/// The number of the next event, where they have one (Responses).
pub(super) fn next_sequence_number(received: &Received) -> Option<u64> {
    let last = last_with(received, b"\"sequence_number\"")?;
    last.get("sequence_number")?.as_u64()?.checked_add(1)
}

fn object(json: &[u8]) -> Object {
    serde_json::from_slice(json).unwrap_or_default()
}

fn last_with(received: &Received, field: &[u8]) -> Option<Object> {
    received.last_events().find(|data| memmem::find(data, field).is_some()).map(object)
}

fn named(events: &mut String, event: &Value) {
    let name = event["type"].as_str().unwrap_or_default();
    // Writing to a string does not fail.
    let _ = write!(events, "event: {name}\ndata: {event}\n\n");
}

/// The last event of each choice with `finish_reason: "length"`, then `[DONE]`.
fn of_chat(mut chunk: Object, choices: u64) -> String {
    chunk.retain(|name, _| !matches!(name.as_str(), "choices" | "usage"));
    let is_text = chunk.get("object").and_then(Value::as_str) == Some("text_completion");
    let ended = |index| {
        if is_text {
            json!({"index": index, "text": "", "finish_reason": "length"})
        } else {
            json!({"index": index, "delta": {}, "finish_reason": "length"})
        }
    };
    chunk.insert("choices".into(), (0..choices).map(ended).collect());
    format!("data: {}\n\ndata: [DONE]\n\n", Value::Object(chunk))
}

/// The response as it was opened, now incomplete.
fn of_responses(mut opening: Object, received: &Received) -> String {
    let mut response = match opening.remove("response") {
        Some(Value::Object(response)) => response,
        _ => Object::from_iter([("object".into(), "response".into()), ("output".into(), json!([]))]),
    };
    response.insert("status".into(), "incomplete".into());
    response.insert("incomplete_details".into(), json!({"reason": "max_output_tokens"}));
    response.insert("usage".into(), Value::Null);
    let mut event = json!({"type": "response.incomplete", "response": response});
    if let Some(number) = next_sequence_number(received) {
        event["sequence_number"] = number.into();
    }
    let mut events = String::new();
    named(&mut events, &event);
    events
}

fn of_anthropic(open_block: Option<u64>, tokens: u64) -> String {
    let mut events = String::new();
    if let Some(index) = open_block {
        named(&mut events, &json!({"type": "content_block_stop", "index": index}));
    }
    named(
        &mut events,
        &json!({
            "type": "message_delta",
            "delta": {"stop_reason": "max_tokens", "stop_sequence": null},
            "usage": {"output_tokens": tokens},
        }),
    );
    named(&mut events, &json!({"type": "message_stop"}));
    events
}

fn of_cohere(tokens: u64) -> String {
    let mut events = String::new();
    let usage = json!({"tokens": {"output_tokens": tokens}});
    named(
        &mut events,
        &json!({"type": "message-end", "delta": {"finish_reason": "MAX_TOKENS", "usage": usage}}),
    );
    events
}

/// A chunk like the last one, without text.
fn of_gemini(mut chunk: Object, candidates: u64) -> String {
    let ended = |index| {
        let content = json!({"parts": [{"text": ""}], "role": "model"});
        json!({"content": content, "finishReason": "MAX_TOKENS", "index": index})
    };
    chunk.insert("candidates".into(), (0..candidates).map(ended).collect());
    format!("data: {}\n\n", Value::Object(chunk))
}
