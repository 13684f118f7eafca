//! Anthropic Messages: content blocks.

use super::{Answer, Text, TextCollector, TextKind, TextSlot, compact};
use memchr::memmem;
use serde::Deserialize;
use serde_json::value::RawValue;

#[derive(Deserialize)]
pub(super) struct Block<'a> {
    #[serde(rename = "type", borrow, default)]
    kind: Text<'a>,
    #[serde(borrow, default)]
    text: Text<'a>,
    #[serde(borrow, default)]
    thinking: Text<'a>,
    #[serde(borrow, default)]
    name: Text<'a>,
    #[serde(borrow)]
    input: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct BlockDelta<'a> {
    #[serde(borrow, default)]
    text: Text<'a>,
    #[serde(borrow, default)]
    thinking: Text<'a>,
    #[serde(borrow, default)]
    partial_json: Text<'a>,
}

pub(super) fn event(texts: &mut TextCollector, event: &Answer) -> Result<(), serde_json::Error> {
    let index = event.index.unwrap_or(0);
    if let Some(block) = &event.content_block {
        // The input arrives in deltas; here it is an empty placeholder.
        let is_empty = |input: &&RawValue| input.get().trim_matches(['{', '}', ' ']).is_empty();
        content(texts, index, block, block.input.filter(|input| !is_empty(input)))?;
    }
    if let Some(delta) = event.delta {
        let delta: BlockDelta = serde_json::from_str(delta.get())?;
        let slot = TextSlot { choice: index, kind: TextKind::Content };
        for text in [delta.text, delta.thinking, delta.partial_json] {
            texts.append(slot, &text.0);
        }
    }
    Ok(())
}

/// Collects the blocks of a complete message.
pub(super) fn document(texts: &mut TextCollector, blocks: &RawValue) -> Result<(), serde_json::Error> {
    let blocks: Vec<Block> = serde_json::from_str(blocks.get())?;
    for (index, block) in (0..).zip(&blocks) {
        content(texts, index, block, block.input)?;
    }
    Ok(())
}

fn content(
    texts: &mut TextCollector,
    index: u64,
    block: &Block,
    input: Option<&RawValue>,
) -> Result<(), serde_json::Error> {
    let slot = TextSlot { choice: index, kind: TextKind::Content };
    texts.append(slot, &block.text.0);
    texts.append(slot, &block.thinking.0);
    if block.kind.0.ends_with("tool_use") {
        texts.call(slot, &block.name.0);
        if let Some(input) = input {
            texts.append(slot, &compact(input)?);
        }
    }
    Ok(())
}

#[derive(Deserialize)]
struct BlockEvent<'a> {
    #[serde(rename = "type", borrow, default)]
    kind: Text<'a>,
    #[serde(default)]
    index: u64,
}

/// The content block that is open after an event; `None`: the event neither opens nor closes one.
pub(in crate::usage) fn open_block_after(data: &[u8]) -> Option<Option<u64>> {
    memmem::find(data, b"content_block_")?;
    let BlockEvent { kind, index } = serde_json::from_slice(data).ok()?;
    match &*kind.0 {
        "content_block_start" | "content_block_delta" => Some(Some(index)),
        "content_block_stop" => Some(None),
        _ => None,
    }
}
