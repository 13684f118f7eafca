//! Fuzzes request bodies: an accepted body is counted within bounds and in time, and is still accepted after edits.

use serde_json::{Map, Value};
use tollgate::api::Api;
use tollgate::body::{Body, BodyText, edited};
use tollgate::estimate::{Models, PromptEstimate, PromptPart};

/// One model of each prompt format and each image rule. The empty name selects the model that the body names.
const MODELS: [&str; 16] = [
    "gpt-4o",
    "gpt-4",
    "gpt-5",
    "o3",
    "claude-sonnet-4-5",
    "gemini-2.5-pro",
    "gpt-4o-mini",
    "gpt-5.6",
    "claude-opus-4-7",
    "gemini-3-pro",
    "deepseek-v4",
    "llama-3.3-70b",
    "qwen3.5-vl",
    "pixtral-12b",
    "gpt-oss-120b",
    "",
];

pub(crate) fn check(api: Api, variant: u8, json: &[u8]) {
    let Ok(text) = BodyText::of(json) else { return };
    let Ok(body) = Body::read(api, &text) else { return };
    let model = match MODELS[usize::from(variant) % MODELS.len()] {
        "" => body.model.as_deref().unwrap_or_default(),
        name => name,
    };
    let known = Models::default().named(model);
    let quick = body.prompt.estimate_if_quick(&known);
    let estimate = body.prompt.estimate(&known);
    assert!(
        quick.is_none_or(|quick| quick == estimate),
        "quick estimate: {quick:?}, full estimate: {estimate:?}"
    );
    let again = body.prompt.estimate_if_quick(&known);
    assert!(
        again.is_none_or(|again| again == estimate),
        "with the count cache: {again:?}, without: {estimate:?}"
    );
    is_bounded(&estimate, json.len());
    assert!(body.completion_cap() >= body.max_tokens && body.completions() >= 1);
    if has_a_field(json) && api.generates() {
        edits(api, variant, json, &body, model);
    }
}

/// Upper bound of the tokens per byte of a body, for the worst model and the shortest spelling:
///
/// - Text: at most one token a byte, times 1.4 for the most expensive tokenizer; names count twice. An invalid byte in
///   base64 text becomes three bytes. Audio of unknown length is 1,920 tokens for 36 bytes. A byte of an Office
///   document inflates to at most 1,032 bytes of text.
/// - Tools: a provider's own tool is 300 tokens, times 1.6 in JSON, and may be as short as `1,`. A function is rendered
///   to at most 5 bytes for each byte.
/// - A response schema: 1.4 tokens a byte.
/// - Overhead: 50 tokens and those of a message for a call as short as `1,`.
/// - Images: at most 6,000,000 tokens (see the tests in `src/estimate/images.rs`) for 13 bytes, `{"detail":1},`. A byte
///   of a document inflates to at most 1,032 bytes, and four of these count as a token.
fn is_bounded(estimate: &PromptEstimate, bytes: usize) {
    /// Fixed tokens of a request: its template and an introduction to tools.
    const FIXED: u64 = 2_000;
    for part in PromptPart::ALL {
        let a_byte = match part {
            PromptPart::Messages => 1_100,
            PromptPart::Overhead => 64,
            PromptPart::Tools => 256,
            PromptPart::Schema => 8,
            PromptPart::Images => 500_000,
        };
        let most = FIXED + a_byte * bytes as u64;
        let tokens = estimate.of(part);
        assert!(tokens <= most, "{tokens} tokens of {part:?} from {bytes} bytes, {most} at most");
    }
}

fn has_a_field(json: &[u8]) -> bool {
    json.trim_ascii().strip_prefix(b"{").is_some_and(|rest| rest.trim_ascii_start().first() != Some(&b'}'))
}

/// Applies the edits of the gateway to a body, and checks that the result is still accepted.
fn edits(api: Api, variant: u8, json: &[u8], body: &Body<'_>, model: &str) {
    let bound = 1 + u64::from(variant);
    // The proxy does the same. The other APIs always report usage.
    let requests_usage = matches!(api, Api::Chat | Api::Completions) && body.streams && !body.wants_usage();
    let mut edits = body.bounds().lower_to(bound, model, json);
    edits.extend(requests_usage.then(|| body.request_usage()));
    let after = edited(json, edits);
    let text = String::from_utf8_lossy(&after);
    let text_after = BodyText::of(&after).unwrap_or_else(|fault| panic!("after edits: {fault} {text}"));
    let again = Body::read(api, &text_after).unwrap_or_else(|fault| panic!("after edits: {fault} {text}"));
    assert_eq!(again.wants_usage(), body.wants_usage() || requests_usage, "{text}");
    assert_eq!(
        edited(&after, again.bounds().lower_to(bound, model, &after)),
        after,
        "lowering the bound a second time changes nothing"
    );
    // Everything else is unchanged.
    assert_eq!(
        (&again.model, again.streams, again.choices, again.completions()),
        (&body.model, body.streams, body.choices, body.completions()),
        "{text}"
    );
    let known = Models::default().named(model);
    assert_eq!(again.prompt.estimate(&known), body.prompt.estimate(&known), "{text}");
    // The gateway accepts numbers that are too large for serde_json's tree.
    let (Some(tree), Some(tree_after)) = (tree(json), tree(&after)) else { return };
    // The chat API does not have this field, but some upstreams read it.
    let has_foreign_bound = api != Api::Responses && tree.contains_key("max_output_tokens");
    if !has_foreign_bound {
        assert_eq!(
            again.max_tokens,
            Some(body.max_tokens.map_or(bound, |before| before.min(bound))),
            "{text}"
        );
    }
    assert_eq!(without_edits(api, tree), without_edits(api, tree_after), "{text}");
}

fn tree(json: &[u8]) -> Option<Map<String, Value>> {
    let mut deserializer = serde_json::Deserializer::from_slice(json);
    deserializer.disable_recursion_limit();
    serde::Deserialize::deserialize(&mut deserializer).ok()
}

/// A body without the fields that edits set.
fn without_edits(api: Api, mut body: Map<String, Value>) -> Map<String, Value> {
    let mut remove_members = |object: &str, members: &[&str]| {
        let Some(inner) = body.get_mut(object) else { return };
        if let Value::Object(inner) = inner {
            inner.retain(|name, _| !members.contains(&name.as_str()));
        }
        let is_empty = inner.is_null() || inner.as_object().is_some_and(Map::is_empty);
        if is_empty {
            body.remove(object);
        }
    };
    match api {
        Api::Gemini => {
            remove_members("generationConfig", &["maxOutputTokens", "max_output_tokens"]);
            remove_members("generation_config", &["maxOutputTokens", "max_output_tokens"]);
        }
        Api::Responses => drop(body.remove("max_output_tokens")),
        _ => {
            remove_members("stream_options", &["include_usage"]);
            body.retain(|name, _| name != "max_tokens" && name != "max_completion_tokens");
        }
    }
    body
}
