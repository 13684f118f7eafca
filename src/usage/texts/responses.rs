//! OpenAI Responses: output items. Their parts arrive in deltas. Later events repeat each complete part.

use super::{Answer, Text, TextCollector, TextKind, TextSlot};
use serde::Deserialize;
use serde_json::value::RawValue;

#[derive(Deserialize)]
pub(super) struct OutputItem<'a> {
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

pub(super) fn event(texts: &mut TextCollector, event: &Answer) -> Result<(), serde_json::Error> {
    let choice = event.output_index.unwrap_or(0);
    let event_type = event.kind.0.strip_prefix("response.").unwrap_or_default();
    match event_type {
        "output_item.added" | "output_item.done" => {
            if let Some(output_item) = &event.item {
                item(texts, choice, output_item, event_type == "output_item.done");
            }
            return Ok(());
        }
        "completed" | "incomplete" | "failed" => {
            if event_type == "completed" {
                texts.response_completed();
            }
            let Some(response) = event.response else { return Ok(()) };
            let Response { output: Some(items) } = serde_json::from_str(response.get())? else {
                return Ok(());
            };
            return if items.get() == "null" { Ok(()) } else { output(texts, items) };
        }
        _ => {}
    }
    let (name, is_done) = match (event_type.strip_suffix(".delta"), event_type.strip_suffix(".done")) {
        (Some(name), _) => (name, false),
        (_, Some(name)) => (name, true),
        _ => return Ok(()),
    };
    let part = event.content_index.unwrap_or(0);
    let (kind, complete_text) = match name {
        "output_text" => (TextKind::ItemContent(part), &event.text),
        "refusal" => (TextKind::ItemContent(part), &event.refusal),
        "reasoning_text" | "reasoning" => (TextKind::ItemReasoning(part), &event.text),
        "reasoning_summary_text" => (TextKind::Summary(event.summary_index.unwrap_or(0)), &event.text),
        "function_call_arguments" | "mcp_call_arguments" => (TextKind::ToolCall(0), &event.arguments),
        "custom_tool_call_input" => (TextKind::ToolCall(0), &event.input),
        _ => return Ok(()),
    };
    let slot = TextSlot { choice, kind };
    if is_done {
        texts.append_once(slot, &complete_text.0);
    } else if let Some(delta) = event.delta {
        texts.append(slot, &serde_json::from_str::<Text>(delta.get())?.0);
    }
    Ok(())
}

/// Collects the items of a complete response.
pub(super) fn output(texts: &mut TextCollector, output: &RawValue) -> Result<(), serde_json::Error> {
    let items: Vec<OutputItem> = serde_json::from_str(output.get())?;
    for (choice, output_item) in (0..).zip(&items) {
        item(texts, choice, output_item, true);
    }
    Ok(())
}

fn item(texts: &mut TextCollector, choice: u64, item: &OutputItem, is_done: bool) {
    let slot = |kind| TextSlot { choice, kind };
    if item.kind.0.ends_with("_call") && !item.name.0.is_empty() {
        let arguments = if item.arguments.0.is_empty() { &item.input } else { &item.arguments };
        let arguments = if is_done { &*arguments.0 } else { "" };
        texts.call_once(slot(TextKind::ToolCall(0)), &item.name.0, arguments);
        return;
    }
    if !is_done {
        return; // its parts arrive in deltas
    }
    texts.append_once(slot(TextKind::Code), &item.code.0);
    for (position, part) in (0..).zip(item.content.iter().flatten()) {
        let is_reasoning = part.kind.0 == "reasoning_text" || item.kind.0 == "reasoning";
        let kind =
            if is_reasoning { TextKind::ItemReasoning(position) } else { TextKind::ItemContent(position) };
        let text = if part.text.0.is_empty() { &part.refusal } else { &part.text };
        texts.append_once(slot(kind), &text.0);
    }
    for (position, part) in (0..).zip(item.summary.iter().flatten()) {
        texts.append_once(slot(TextKind::Summary(position)), &part.text.0);
    }
}
