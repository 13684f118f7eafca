//! `GET /api/rejections`: the last requests that a quota or a limit rejected.

use super::Admin;
use super::answers::{AccessErrors, ErrorBody, QueryResult, read_query};
use crate::telemetry::{LastDay, RejectionView};
use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse as _, Response};
use serde::Serialize;
use utoipa::{IntoParams, ToSchema};

/// The query parameters.
#[derive(Default, serde::Deserialize, IntoParams)]
#[serde(deny_unknown_fields, default)]
#[into_params(parameter_in = Query)]
pub(super) struct RejectionParameters {
    /// Maximum number of rejections. Default: all that the gateway keeps, at most 1,000.
    limit: Option<usize>,
    /// Only those of this environment.
    environment: Option<String>,
    /// Only those of the caller with this name.
    caller: Option<String>,
}

/// The answer.
#[derive(Serialize, ToSchema)]
pub(super) struct RejectionList {
    /// Newest first.
    rejections: Vec<RejectionView>,
    /// Those of the last 24 hours by cause, also those that `rejections` no longer has. Of all callers.
    last_day: LastDay,
}

/// The last requests that a quota or a limit rejected, newest first.
#[utoipa::path(get, path = "/api/rejections", tag = "reports", params(RejectionParameters), responses(
    (status = 200, description = "The last rejections.", body = RejectionList),
    (status = 400, description = "`invalid_value`: a parameter is not valid.", body = ErrorBody),
    AccessErrors,
))]
pub(super) async fn rejections(
    State(admin): State<Admin>,
    query: QueryResult<RejectionParameters>,
) -> Response {
    let RejectionParameters { limit, environment, caller } = match read_query(query) {
        Ok(parameters) => parameters,
        Err(refusal) => return *refusal,
    };
    let named = |name: &Option<String>| name.as_deref().filter(|name| !name.is_empty()).map(str::to_owned);
    let (environment, caller) = (named(&environment), named(&caller));
    let limit = limit.unwrap_or(usize::MAX);
    let rejections = admin.state.rejections.last(limit, environment.as_deref(), caller.as_deref());
    let last_day = admin.state.rejections.last_day(environment.as_deref());
    Json(RejectionList { rejections, last_day }).into_response()
}
