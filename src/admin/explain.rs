//! `POST /api/explain`: what would happen to a request, without sending it or charging anything.

use super::environments::{level_json, unknown_environment};
use super::{Admin, refusal};
use crate::error::ProxyError;
use crate::estimate::PromptPart;
use crate::proxy::{self, Explanation};
use crate::quota::{QuotaLevel, Wait};
use axum::Json;
use axum::body::Bytes;
use axum::extract::{Query, State};
use axum::response::{IntoResponse as _, Response};
use http::StatusCode;
use serde_json::{Map, Value, json};

/// The query parameters.
#[derive(serde::Deserialize)]
pub(super) struct ExplainParameters {
    environment: String,
    /// Required if the environment has callers.
    caller: Option<String>,
}

/// Answers with the estimate, the quotas that apply, and whether the request would be admitted now.
pub(super) async fn explain(
    State(admin): State<Admin>,
    parameters: Result<Query<ExplainParameters>, axum::extract::rejection::QueryRejection>,
    body: Bytes,
) -> Response {
    let Ok(Query(ExplainParameters { environment, caller })) = parameters else {
        let message = "Name the environment, and the caller if the environment has keys: ?environment=NAME&caller=NAME.";
        return refusal(StatusCode::BAD_REQUEST, "invalid_value", message);
    };
    let snapshot = admin.state.current();
    let Some((at, settings)) = snapshot.config.environment(&environment) else {
        return unknown_environment();
    };
    let caller = caller.filter(|name| !name.is_empty());
    let index = caller.as_ref().map(|name| settings.callers.iter().position(|known| known.name == *name));
    let index = match index {
        Some(None) => return unknown_caller(),
        None if !settings.callers.is_empty() => return unknown_caller(),
        Some(Some(index)) => Some(index),
        None => None,
    };
    match proxy::explain(&admin.state, at, index, body).await {
        Ok(explanation) => Json(explanation_json(&explanation)).into_response(),
        Err(error) => refusal(error.shape().0, error.code(), &error.to_string()),
    }
}

fn unknown_caller() -> Response {
    let message = "The environment has no such caller. Name one of its keys: ?caller=NAME.";
    refusal(StatusCode::NOT_FOUND, "unknown_caller", message)
}

fn explanation_json(explanation: &Explanation) -> Value {
    let Explanation { api, model, prompt_tokens, counted, source, encoding, forecast, is_enforced, error } =
        explanation;
    let parts: Map<String, Value> =
        PromptPart::ALL.iter().map(|&part| (part.as_str().to_owned(), json!(counted.of(part)))).collect();
    let mut json = json!({
        "api": api,
        "model": model,
        "estimate": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": forecast.required.completion,
            "total_tokens": forecast.required.total,
            "source": source.as_str(),
            "counted": counted.tokens(),
            "parts": parts,
            "encoding": encoding,
        },
        "quotas": forecast.quotas.iter().map(|level| quota_json(level, explanation)).collect::<Vec<_>>(),
        "admitted": error.is_none() || !is_enforced,
        "retry_after_ms": error.as_ref().and_then(|error| wait_ms(error.shortfalls().first()?.wait)),
    });
    if let Some(error) = error {
        json["code"] = error.code().into();
        json["message"] = error.to_string().into();
    }
    json
}

/// A quota that applies, with the amount that the request needs of it.
fn quota_json(level: &QuotaLevel, explanation: &Explanation) -> Value {
    let mut json = level_json(level, None);
    let shortfalls = explanation.error.as_ref().map(ProxyError::shortfalls).unwrap_or_default();
    let shortfall = shortfalls.iter().find(|shortfall| shortfall.quota.is_same_as(&level.quota));
    json["requested"] = explanation.forecast.required.of(level.quota.kind).into();
    json["fits"] = shortfall.is_none().into();
    json["retry_after_ms"] = shortfall.and_then(|shortfall| wait_ms(shortfall.wait)).into();
    json
}

/// `None`: the request can never fit.
fn wait_ms(wait: Wait) -> Option<u64> {
    match wait {
        Wait::Ms(ms) => Some(ms.max(1)),
        Wait::Never => None,
    }
}
