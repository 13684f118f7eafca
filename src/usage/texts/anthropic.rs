//! Anthropic's messages: content blocks.

use super::{Answer, Part, Received, Slot, Text, compact};
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
struct Delta<'a> {
    #[serde(borrow, default)]
    text: Text<'a>,
    #[serde(borrow, default)]
    thinking: Text<'a>,
    #[serde(borrow, default)]
    partial_json: Text<'a>,
}

pub(super) fn event(received: &mut Received, event: &Answer) -> Result<(), serde_json::Error> {
    let index = event.index.unwrap_or(0);
    if let Some(of) = &event.content_block {
        // The input comes in deltas; what stands for it until then is empty.
        let is_empty = |input: &&RawValue| input.get().trim_matches(['{', '}', ' ']).is_empty();
        content(received, index, of, of.input.filter(|input| !is_empty(input)))?;
    }
    if let Some(delta) = event.delta {
        let delta: Delta = serde_json::from_str(delta.get())?;
        let slot = Slot { choice: index, part: Part::Content };
        for text in [delta.text, delta.thinking, delta.partial_json] {
            received.append(slot, &text.0);
        }
    }
    Ok(())
}

/// The blocks of a whole message.
pub(super) fn document(received: &mut Received, blocks: &RawValue) -> Result<(), serde_json::Error> {
    let blocks: Vec<Block> = serde_json::from_str(blocks.get())?;
    for (index, block) in (0..).zip(&blocks) {
        content(received, index, block, block.input)?;
    }
    Ok(())
}

fn content(
    received: &mut Received,
    index: u64,
    block: &Block,
    input: Option<&RawValue>,
) -> Result<(), serde_json::Error> {
    let slot = Slot { choice: index, part: Part::Content };
    received.append(slot, &block.text.0);
    received.append(slot, &block.thinking.0);
    if block.kind.0.ends_with("tool_use") {
        received.call(slot, &block.name.0);
        if let Some(input) = input {
            received.append(slot, &compact(input)?);
        }
    }
    Ok(())
}

#[derive(Deserialize)]
struct Place<'a> {
    #[serde(rename = "type", borrow, default)]
    kind: Text<'a>,
    #[serde(default)]
    index: u64,
}

/// The block that is open after an event; `None`: the event says nothing of blocks.
pub(in crate::usage) fn block(data: &[u8]) -> Option<Option<u64>> {
    memmem::find(data, b"content_block_")?;
    let Place { kind, index } = serde_json::from_slice(data).ok()?;
    match &*kind.0 {
        "content_block_start" | "content_block_delta" => Some(Some(index)),
        "content_block_stop" => Some(None),
        _ => None,
    }
}
