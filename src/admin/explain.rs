//! `POST /api/explain`: what would happen to a request, without sending it or charging anything.

use super::Admin;
use super::answers::{AccessErrors, ErrorBody, QueryResult, refusal};
use super::environments::{QuotaView, unknown_environment};
use crate::error::ProxyError;
use crate::estimate::PromptPart;
use crate::proxy::{self, Explanation};
use crate::quota::{QuotaLevel, Wait};
use crate::telemetry::RefusalCounts;
use axum::Json;
use axum::body::Bytes;
use axum::extract::{Query, State};
use axum::response::{IntoResponse as _, Response};
use http::StatusCode;
use serde::Serialize;
use std::collections::BTreeMap;
use utoipa::{IntoParams, ToSchema};

/// The query parameters.
#[derive(serde::Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct ExplainParameters {
    /// The name of the environment.
    environment: String,
    /// Required if the environment has callers.
    caller: Option<String>,
}

/// What would happen to a request now, without sending it or charging anything: its estimate, the quotas that apply, and
/// whether it would be admitted.
#[utoipa::path(
    post,
    path = "/api/explain",
    tag = "reports",
    params(ExplainParameters),
    request_body(content = serde_json::Value, description = "The body of the request."),
    responses(
        (status = 200, description = "The outcome.", body = ExplanationView),
        (status = 400, description = "A parameter is not valid, or the gateway would not accept the body.", body = ErrorBody),
        (status = 404, description = "`unknown_environment`, `unknown_caller`, `model_not_found`", body = ErrorBody),
        (status = 413, description = "`request_body_too_large`: the body is larger than 32 MiB, or than `server.max_request_body`.", body = ErrorBody),
        AccessErrors,
    )
)]
pub(super) async fn explain(
    State(admin): State<Admin>,
    query: QueryResult<ExplainParameters>,
    body: Bytes,
) -> Response {
    let Ok(Query(ExplainParameters { environment, caller })) = query else {
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
        Some(None) => {
            return unknown_caller("The environment has no such caller. Name one of its keys: ?caller=NAME.");
        }
        None if !settings.callers.is_empty() => {
            return unknown_caller(
                "The environment has keys. Name the caller whose request this would be: ?caller=NAME.",
            );
        }
        Some(Some(index)) => Some(index),
        None => None,
    };
    match proxy::explain(&admin.state, at, index, body).await {
        Ok(explanation) => {
            let refusals = admin.state.rejections.last_minute();
            Json(ExplanationView::new(&explanation, &environment, &refusals)).into_response()
        }
        Err(error) => refusal(error.shape().0, error.code(), &error.to_string()),
    }
}

fn unknown_caller(message: &str) -> Response {
    refusal(StatusCode::NOT_FOUND, "unknown_caller", message)
}

/// What would happen to a request.
#[derive(Serialize, ToSchema)]
pub(super) struct ExplanationView {
    /// The API of the body.
    api: &'static str,
    model: String,
    route: ExplainedRouteView,
    estimate: EstimateView,
    /// The quotas that apply to the request.
    quotas: Vec<RequestedQuotaView>,
    /// Whether the request would be admitted now. In shadow mode only limits of upstreams deny it.
    admitted: bool,
    /// Milliseconds until the request would fit. `null`: it fits, or it can never fit. If another request has to end first,
    /// 1,000.
    retry_after_ms: Option<u64>,
    /// The code of the error that the request would get if quotas are enforced. Absent: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    code: Option<&'static str>,
    /// The message of that error.
    #[serde(skip_serializing_if = "Option::is_none")]
    message: Option<String>,
}

/// Where a request would go.
#[derive(Serialize, ToSchema)]
pub(super) struct ExplainedRouteView {
    /// The number of the route in the environment's `routes`, from 1. `null`: no route takes the request.
    number: Option<usize>,
    /// The upstreams in the order in which they would be tried.
    upstreams: Vec<String>,
    /// The model name that would be sent.
    model: String,
}

/// The amounts that a request would reserve.
#[derive(Serialize, ToSchema)]
pub(super) struct EstimateView {
    prompt_tokens: u64,
    completion_tokens: u64,
    total_tokens: u64,
    /// The source of the prompt estimate.
    source: &'static str,
    /// The count of the prompt before any correction.
    counted: u64,
    /// The parts of that count, in tokens.
    parts: BTreeMap<&'static str, u64>,
    /// The name of the vocabulary.
    encoding: &'static str,
}

/// A quota that applies, with the amount that the request needs of it.
#[derive(Serialize, ToSchema)]
pub(super) struct RequestedQuotaView {
    #[serde(flatten)]
    quota: QuotaView,
    requested: u64,
    fits: bool,
    /// Milliseconds until the request would fit. `null`: it fits, or it can never fit.
    retry_after_ms: Option<u64>,
}

impl ExplanationView {
    fn new(explanation: &Explanation, environment: &str, refusals: &RefusalCounts) -> Self {
        let quota_view = |level: &QuotaLevel| {
            let refused = refusals.of_quota(environment, &level.quota);
            RequestedQuotaView::new(level, refused, explanation)
        };
        let Explanation {
            api,
            model,
            route,
            upstreams,
            sent_model,
            prompt_tokens,
            counted,
            source,
            encoding,
            forecast,
            is_admitted,
            error,
        } = explanation;
        Self {
            api,
            model: model.clone(),
            route: ExplainedRouteView {
                number: *route,
                upstreams: upstreams.clone(),
                model: sent_model.clone(),
            },
            estimate: EstimateView {
                prompt_tokens: *prompt_tokens,
                completion_tokens: forecast.required.completion,
                total_tokens: forecast.required.total,
                source: source.as_str(),
                counted: counted.tokens(),
                parts: PromptPart::ALL.iter().map(|&part| (part.as_str(), counted.of(part))).collect(),
                encoding,
            },
            quotas: forecast.quotas.iter().map(quota_view).collect(),
            admitted: *is_admitted,
            retry_after_ms: error.as_ref().and_then(ProxyError::retry_after_ms),
            code: error.as_ref().map(ProxyError::code),
            message: error.as_ref().map(ToString::to_string),
        }
    }
}

impl RequestedQuotaView {
    fn new(level: &QuotaLevel, refused: u64, explanation: &Explanation) -> Self {
        let shortfalls = explanation.error.as_ref().map(ProxyError::shortfalls).unwrap_or_default();
        let shortfall = shortfalls.iter().find(|shortfall| shortfall.quota.is_same_as(&level.quota));
        Self {
            quota: QuotaView::new(level, explanation.forecast.at, refused, None),
            requested: explanation.forecast.required.of(level.quota.kind),
            fits: shortfall.is_none(),
            retry_after_ms: shortfall.and_then(|shortfall| wait_ms(shortfall.wait)),
        }
    }
}

/// `None`: the request can never fit.
fn wait_ms(wait: Wait) -> Option<u64> {
    match wait {
        Wait::Ms(ms) => Some(ms.max(1)),
        Wait::Never => None,
    }
}
