//! The charge that follows from the usage listed in a recording, and the positions where answers are cut.

use crate::exchange::Exchange;
use serde_json::Value;

/// Prompt, completion and total tokens to charge.
pub(crate) fn charged(exchange: &Exchange) -> Option<(u64, u64, u64)> {
    let usage = &exchange.usage;
    let of = |path: &str| usage.pointer(path).and_then(Value::as_u64);
    let sum = |paths: &[&str]| paths.iter().filter_map(|path| of(path)).sum::<u64>();
    if !usage.is_object() {
        return None;
    }
    let (prompt, completion, total) = match exchange.api.as_str() {
        _ if of("/promptTokenCount").is_some() => (
            sum(&["/promptTokenCount", "/toolUsePromptTokenCount"]),
            sum(&["/candidatesTokenCount", "/thoughtsTokenCount"]),
            of("/totalTokenCount"),
        ),
        // Also Anthropic models at other providers.
        api if api == "anthropic_messages"
            || usage.get("cache_read_input_tokens").is_some() && of("/prompt_tokens").is_none() =>
        {
            (
                sum(&["/input_tokens", "/cache_creation_input_tokens", "/cache_read_input_tokens"]),
                sum(&["/output_tokens"]),
                None,
            )
        }
        "responses" => (sum(&["/input_tokens"]), sum(&["/output_tokens"]), of("/total_tokens")),
        _ if usage.get("tokens").is_some() => {
            (sum(&["/tokens/input_tokens"]), sum(&["/tokens/output_tokens"]), None)
        }
        // Shapes of APIs that the gateway does not serve.
        "other" if of("/prompt_tokens").is_none() => return None,
        _ => {
            let (prompt, completion) = (sum(&["/prompt_tokens"]), sum(&["/completion_tokens"]));
            let total = of("/total_tokens");
            let more = total.unwrap_or(0).saturating_sub(prompt + completion);
            let is = |path: &str| more > 0 && of(path) == Some(more);
            let reasoning_is_separate = is("/completion_tokens_details/reasoning_tokens");
            let audio_is_separate = is("/prompt_tokens_details/audio_tokens");
            let is_total_alone = of("/prompt_tokens").is_none();
            let prompt = if is_total_alone {
                total.unwrap_or(0)
            } else {
                prompt + if audio_is_separate { more } else { 0 }
            };
            (prompt, completion + if reasoning_is_separate { more } else { 0 }, total)
        }
    };
    Some((prompt, completion, total.unwrap_or(0).max(prompt + completion)))
}

/// Random positions where an answer is cut. The same seed gives the same positions.
pub(crate) fn random_cuts(length: usize, seed: usize) -> Vec<usize> {
    let mut state = seed as u64 + 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(state >> 33).unwrap()
    };
    let mut cuts: Vec<usize> = (0..40).map(|_| next() % (length + 1)).collect();
    cuts.sort_unstable();
    cuts
}
