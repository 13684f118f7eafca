//! OpenAI's Responses: items, whose parts come in deltas and are repeated when they are done.

use super::{Answer, Part, Received, Slot, Text};
use serde::Deserialize;
use serde_json::value::RawValue;

#[derive(Deserialize)]
pub(super) struct Item<'a> {
    #[serde(rename = "type", borrow, default)]
    kind: Text<'a>,
    #[serde(borrow)]
    content: Option<Vec<ItemPart<'a>>>,
    #[serde(borrow)]
    summary: Option<Vec<ItemPart<'a>>>,
    #[serde(borrow, default)]
    name: Text<'a>,
    #[serde(borrow, default)]
    arguments: Text<'a>,
    #[serde(borrow, default)]
    input: Text<'a>,
    #[serde(borrow, default)]
    code: Text<'a>,
}

#[derive(Deserialize)]
struct ItemPart<'a> {
    #[serde(rename = "type", borrow, default)]
    kind: Text<'a>,
    #[serde(borrow, default)]
    text: Text<'a>,
    #[serde(borrow, default)]
    refusal: Text<'a>,
}

#[derive(Deserialize)]
struct Response<'a> {
    #[serde(borrow)]
    output: Option<&'a RawValue>,
}

pub(super) fn event(received: &mut Received, event: &Answer) -> Result<(), serde_json::Error> {
    let choice = event.output_index.unwrap_or(0);
    let kind = event.kind.0.strip_prefix("response.").unwrap_or_default();
    match kind {
        "output_item.added" | "output_item.done" => {
            if let Some(of) = &event.item {
                item(received, choice, of, kind == "output_item.done");
            }
            return Ok(());
        }
        "completed" | "incomplete" | "failed" => {
            if kind == "completed" {
                received.ends();
            }
            let Some(response) = event.response else { return Ok(()) };
            let Response { output: Some(items) } = serde_json::from_str(response.get())? else {
                return Ok(());
            };
            return if items.get() == "null" { Ok(()) } else { output(received, items) };
        }
        _ => {}
    }
    let (name, is_done) = match (kind.strip_suffix(".delta"), kind.strip_suffix(".done")) {
        (Some(name), _) => (name, false),
        (_, Some(name)) => (name, true),
        _ => return Ok(()),
    };
    let part = event.content_index.unwrap_or(0);
    let (part, whole) = match name {
        "output_text" => (Part::ItemContent(part), &event.text),
        "refusal" => (Part::ItemContent(part), &event.refusal),
        "reasoning_text" | "reasoning" => (Part::ItemReasoning(part), &event.text),
        "reasoning_summary_text" => (Part::Summary(event.summary_index.unwrap_or(0)), &event.text),
        "function_call_arguments" | "mcp_call_arguments" => (Part::ToolCall(0), &event.arguments),
        "custom_tool_call_input" => (Part::ToolCall(0), &event.input),
        _ => return Ok(()),
    };
    let slot = Slot { choice, part };
    if is_done {
        received.repeat(slot, &whole.0);
    } else if let Some(delta) = event.delta {
        received.append(slot, &serde_json::from_str::<Text>(delta.get())?.0);
    }
    Ok(())
}

/// The items of a whole response.
pub(super) fn output(received: &mut Received, output: &RawValue) -> Result<(), serde_json::Error> {
    let items: Vec<Item> = serde_json::from_str(output.get())?;
    for (choice, of) in (0..).zip(&items) {
        item(received, choice, of, true);
    }
    Ok(())
}

fn item(received: &mut Received, choice: u64, item: &Item, is_done: bool) {
    let slot = |part| Slot { choice, part };
    if item.kind.0.ends_with("_call") && !item.name.0.is_empty() {
        let arguments = if item.arguments.0.is_empty() { &item.input } else { &item.arguments };
        let arguments = if is_done { &*arguments.0 } else { "" };
        received.repeat_call(slot(Part::ToolCall(0)), &item.name.0, arguments);
        return;
    }
    if !is_done {
        return; // its parts come in deltas
    }
    received.repeat(slot(Part::Code), &item.code.0);
    for (at, part) in (0..).zip(item.content.iter().flatten()) {
        let is_reasoning = part.kind.0 == "reasoning_text" || item.kind.0 == "reasoning";
        let of = if is_reasoning { Part::ItemReasoning(at) } else { Part::ItemContent(at) };
        let text = if part.text.0.is_empty() { &part.refusal } else { &part.text };
        received.repeat(slot(of), &text.0);
    }
    for (at, part) in (0..).zip(item.summary.iter().flatten()) {
        received.repeat(slot(Part::Summary(at)), &part.text.0);
    }
}
