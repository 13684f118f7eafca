//! Cohere's chat, version 2.

use super::chat::{Function, function};
use super::{Answer, Part, Received, Slot, Text};
use serde::Deserialize;
use serde_json::value::RawValue;

#[derive(Deserialize)]
struct Delta<'a> {
    #[serde(borrow)]
    message: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Message<'a> {
    #[serde(borrow)]
    content: Option<&'a RawValue>,
    #[serde(borrow, default)]
    tool_plan: Text<'a>,
    #[serde(borrow)]
    tool_calls: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Content<'a> {
    #[serde(borrow, default)]
    text: Text<'a>,
    #[serde(borrow, default)]
    thinking: Text<'a>,
}

#[derive(Deserialize)]
struct Call<'a> {
    #[serde(borrow)]
    function: Option<Function<'a>>,
}

pub(super) fn event(received: &mut Received, event: &Answer) -> Result<(), serde_json::Error> {
    let Some(delta) = event.delta.filter(|delta| delta.get().starts_with('{')) else { return Ok(()) };
    match serde_json::from_str::<Delta>(delta.get())?.message {
        Some(of) if of.get().starts_with('{') => message(received, event.index.unwrap_or(0), of),
        _ => Ok(()),
    }
}

/// A message, whole or a part of it: what a whole one has in a list stands alone in an event.
pub(super) fn message(received: &mut Received, index: u64, of: &RawValue) -> Result<(), serde_json::Error> {
    let message: Message = serde_json::from_str(of.get())?;
    let slot = |choice, part| Slot { choice, part };
    received.append(slot(0, Part::Reasoning), &message.tool_plan.0);
    for (choice, content) in (index..).zip(one_or_many::<Content>(message.content)?) {
        received.append(slot(choice, Part::Content), &content.text.0);
        received.append(slot(choice, Part::Content), &content.thinking.0);
    }
    for (at, call) in (index..).zip(one_or_many::<Call>(message.tool_calls)?) {
        if let Some(of) = call.function {
            function(received, slot(0, Part::ToolCall(at)), &of);
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
