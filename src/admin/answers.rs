//! Answers that several requests have: refusals, in OpenAI's shape.

use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{FromRequestParts, Query};
use axum::response::{IntoResponse as _, Response};
use http::StatusCode;
use http::request::Parts;
use serde::Serialize;
use utoipa::{IntoResponses, ToSchema};

/// The refusals that every request may get, unless it needs no authorization.
#[derive(IntoResponses)]
#[allow(dead_code)] // describes answers, and is never made
pub(super) enum AccessErrors {
    /// `invalid_token`: the token is missing or wrong, or the session has ended.
    #[response(status = 401)]
    Unauthorized(ErrorBody),
    /// `csrf`: a session changes something without the header `x-tollgate-csrf`. `foreign_site`: there is no token, and `Host`
    /// or `Origin` is not the listener's.
    #[response(status = 403)]
    Forbidden(ErrorBody),
    /// `too_many_wrong_tokens`: the address has to wait for the time in `retry-after`.
    #[response(status = 429)]
    TooManyWrongTokens(ErrorBody),
}

/// The refusal of a request with query parameters, for paths that have none ([`NoParameters`]).
#[derive(IntoResponses)]
#[allow(dead_code)] // describes answers, and is never made
pub(super) enum ParameterErrors {
    /// `invalid_value`: the request has a query parameter.
    #[response(status = 400)]
    Invalid(ErrorBody),
}

/// The query parameters of a request, if they can be read.
pub(super) type QueryResult<T> = Result<Query<T>, QueryRejection>;

/// Returns the query parameters, or the answer to a query that cannot be read.
pub(super) fn read_query<T>(query: QueryResult<T>) -> Result<T, Box<Response>> {
    query.map(|Query(parameters)| parameters).map_err(|error| {
        let text = error.body_text();
        let fault = text.strip_prefix("Failed to deserialize query string: ").unwrap_or(&text);
        let message = format!("The query parameters are not valid: {fault}.");
        Box::new(refusal(StatusCode::BAD_REQUEST, "invalid_value", &message))
    })
}

/// Refuses a request with query parameters, for paths that have none: a parameter such as `dry_run` must not be ignored.
pub(super) struct NoParameters;

impl<S: Sync> FromRequestParts<S> for NoParameters {
    type Rejection = Response;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Response> {
        let Some(first) = parts.uri.query().filter(|query| !query.is_empty()) else { return Ok(Self) };
        let name = first.split(['&', '=']).next().unwrap_or_default();
        let message = format!("The parameter '{name}' is not valid: this request has no query parameters.");
        Err(refusal(StatusCode::BAD_REQUEST, "invalid_value", &message))
    }
}

pub(super) fn body_too_large() -> Response {
    let message = "The body may have at most 64 KiB, at POST /api/explain 32 MiB.";
    refusal(StatusCode::PAYLOAD_TOO_LARGE, "request_body_too_large", message)
}

/// The body of an error.
#[derive(Serialize, ToSchema)]
pub(super) struct ErrorBody {
    pub(super) error: ErrorView,
}

/// An error, in OpenAI's shape.
#[derive(Serialize, ToSchema)]
pub(super) struct ErrorView {
    /// What happened, whose setting decides it, and what to do.
    message: String,
    r#type: &'static str,
    /// Always `null`.
    param: Option<String>,
    code: &'static str,
}

impl ErrorBody {
    pub(super) fn new(code: &'static str, message: &str) -> Self {
        let message = message.to_owned();
        Self { error: ErrorView { message, r#type: "invalid_request_error", param: None, code } }
    }
}

pub(super) fn refusal(status: StatusCode, code: &'static str, message: &str) -> Response {
    let mut body = ErrorBody::new(code, message);
    if status.is_server_error() {
        body.error.r#type = "server_error";
    }
    (status, Json(body)).into_response()
}
