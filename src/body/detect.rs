//! Detects the API of a request body whose path is not known.

use crate::api::Api;
use crate::json::replace_lone_surrogates;
use serde::de::IgnoredAny;
use serde_json::Value;

/// Detects the API of a body from its fields.
pub(crate) fn detect_api(json: &[u8]) -> Api {
    #[derive(Default, serde::Deserialize)]
    #[serde(default)]
    struct BodyShape {
        model: Value,
        messages: Option<IgnoredAny>,
        prompt: Option<IgnoredAny>,
        input: Option<IgnoredAny>,
        contents: Option<IgnoredAny>,
        system: Option<IgnoredAny>,
        instructions: Option<IgnoredAny>,
        max_output_tokens: Option<IgnoredAny>,
        dimensions: Option<IgnoredAny>,
        encoding_format: Option<IgnoredAny>,
    }
    let shape: BodyShape = serde_json::from_slice(&replace_lone_surrogates(json)).unwrap_or_default();
    let model = shape.model.as_str().unwrap_or_default();
    let is_embedding =
        shape.dimensions.is_some() || shape.encoding_format.is_some() || model.contains("embed");
    let is_response = shape.instructions.is_some() || shape.max_output_tokens.is_some() || !model.is_empty();
    match shape {
        BodyShape { contents: Some(_), .. } => Api::Gemini,
        BodyShape { messages: Some(_), system: Some(_), .. } => Api::Messages,
        BodyShape { messages: Some(_), .. } if model.starts_with("claude") => Api::Messages,
        BodyShape { messages: Some(_), .. } => Api::Chat,
        BodyShape { input: Some(_), .. } if is_embedding || !is_response => Api::Embeddings,
        BodyShape { input: Some(_), .. } | BodyShape { instructions: Some(_), .. } => Api::Responses,
        BodyShape { prompt: Some(_), .. } => Api::Completions,
        _ => Api::Chat,
    }
}
