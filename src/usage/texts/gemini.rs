//! Gemini: candidates and their parts. A function call arrives complete in one event.

use super::{Text, TextCollector, TextKind, TextSlot, compact};
use serde::Deserialize;
use serde_json::value::RawValue;

#[derive(Deserialize)]
pub(super) struct Candidate<'a> {
    index: Option<u64>,
    #[serde(borrow)]
    content: Option<CandidateContent<'a>>,
}

#[derive(Deserialize)]
struct CandidateContent<'a> {
    #[serde(borrow)]
    parts: Option<Vec<CandidatePart<'a>>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct CandidatePart<'a> {
    #[serde(borrow, default)]
    text: Text<'a>,
    thought: Option<bool>,
    #[serde(borrow)]
    function_call: Option<GeminiFunctionCall<'a>>,
    #[serde(borrow)]
    executable_code: Option<ExecutableCode<'a>>,
}

#[derive(Deserialize)]
struct GeminiFunctionCall<'a> {
    #[serde(borrow, default)]
    name: Text<'a>,
    #[serde(borrow)]
    args: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct ExecutableCode<'a> {
    #[serde(borrow, default)]
    code: Text<'a>,
}

/// Collects a candidate. `position` is its position in the list. It replaces a missing `index`.
pub(super) fn candidate(texts: &mut TextCollector, position: u64, candidate: Candidate) {
    let choice = candidate.index.unwrap_or(position);
    let parts = candidate.content.and_then(|content| content.parts);
    for part in parts.into_iter().flatten() {
        let kind = if part.thought == Some(true) { TextKind::Reasoning } else { TextKind::Content };
        texts.append(TextSlot { choice, kind }, &part.text.0);
        if let Some(call) = part.function_call {
            let arguments = call.args.and_then(|args| compact(args).ok()).unwrap_or_default();
            texts.complete_call(choice, &call.name.0, &arguments);
        }
        if let Some(code) = part.executable_code {
            texts.append(TextSlot { choice, kind: TextKind::Code }, &code.code.0);
        }
    }
}
