//! Cohere Chat, version 2.

use super::chat::{ChatFunction, function};
use super::{Answer, Text, TextCollector, TextKind, TextSlot};
use serde::Deserialize;
use serde_json::value::RawValue;

#[derive(Deserialize)]
struct CohereDelta<'a> {
    #[serde(borrow)]
    message: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct CohereMessage<'a> {
    #[serde(borrow)]
    content: Option<&'a RawValue>,
    #[serde(borrow, default)]
    tool_plan: Text<'a>,
    #[serde(borrow)]
    tool_calls: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct CohereContent<'a> {
    #[serde(borrow, default)]
    text: Text<'a>,
    #[serde(borrow, default)]
    thinking: Text<'a>,
}

#[derive(Deserialize)]
struct CohereToolCall<'a> {
    #[serde(borrow)]
    function: Option<ChatFunction<'a>>,
}

pub(super) fn event(texts: &mut TextCollector, event: &Answer) -> Result<(), serde_json::Error> {
    let Some(delta) = event.delta.filter(|delta| delta.get().starts_with('{')) else { return Ok(()) };
    match serde_json::from_str::<CohereDelta>(delta.get())?.message {
        Some(json) if json.get().starts_with('{') => message(texts, event.index.unwrap_or(0), json),
        _ => Ok(()),
    }
}

/// Collects a message. A document has lists of contents and tool calls. An event has one item instead of a list,
/// and `index` is the position of this item.
pub(super) fn message(
    texts: &mut TextCollector,
    index: u64,
    json: &RawValue,
) -> Result<(), serde_json::Error> {
    let message: CohereMessage = serde_json::from_str(json.get())?;
    let slot = |choice, kind| TextSlot { choice, kind };
    texts.append(slot(0, TextKind::Reasoning), &message.tool_plan.0);
    for (choice, content) in (index..).zip(one_or_many::<CohereContent>(message.content)?) {
        texts.append(slot(choice, TextKind::Content), &content.text.0);
        texts.append(slot(choice, TextKind::Content), &content.thinking.0);
    }
    for (position, call) in (index..).zip(one_or_many::<CohereToolCall>(message.tool_calls)?) {
        if let Some(called) = call.function {
            function(texts, slot(0, TextKind::ToolCall(position)), &called);
        }
    }
    Ok(())
}

fn one_or_many<'a, T: Deserialize<'a>>(json: Option<&'a RawValue>) -> Result<Vec<T>, serde_json::Error> {
    match json.map(RawValue::get) {
        Some(list) if list.starts_with('[') => serde_json::from_str(list),
        Some(one) if one.starts_with('{') => Ok(vec![serde_json::from_str(one)?]),
        _ => Ok(Vec::new()),
    }
}
