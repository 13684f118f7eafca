//! Gemini's: candidates and their parts. A call comes whole.

use super::{Part as Of, Received, Slot, Text, compact};
use serde::Deserialize;
use serde_json::value::RawValue;

#[derive(Deserialize)]
pub(super) struct Candidate<'a> {
    index: Option<u64>,
    #[serde(borrow)]
    content: Option<Content<'a>>,
}

#[derive(Deserialize)]
struct Content<'a> {
    #[serde(borrow)]
    parts: Option<Vec<Part<'a>>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Part<'a> {
    #[serde(borrow, default)]
    text: Text<'a>,
    thought: Option<bool>,
    #[serde(borrow)]
    function_call: Option<Call<'a>>,
    #[serde(borrow)]
    executable_code: Option<Code<'a>>,
}

#[derive(Deserialize)]
struct Call<'a> {
    #[serde(borrow, default)]
    name: Text<'a>,
    #[serde(borrow)]
    args: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Code<'a> {
    #[serde(borrow, default)]
    code: Text<'a>,
}

pub(super) fn candidate(received: &mut Received, at: u64, candidate: Candidate) {
    let choice = candidate.index.unwrap_or(at);
    let parts = candidate.content.and_then(|content| content.parts);
    for part in parts.into_iter().flatten() {
        let of = if part.thought == Some(true) { Of::Reasoning } else { Of::Content };
        received.append(Slot { choice, part: of }, &part.text.0);
        if let Some(call) = part.function_call {
            let arguments = call.args.and_then(|args| compact(args).ok()).unwrap_or_default();
            received.whole_call(choice, &call.name.0, &arguments);
        }
        if let Some(code) = part.executable_code {
            received.append(Slot { choice, part: Of::Code }, &code.code.0);
        }
    }
}
