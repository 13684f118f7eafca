//! `GET` and `PUT /api/log-level`.

use super::Admin;
use super::answers::{AccessErrors, ErrorBody, NoParameters, ParameterErrors, refusal};
use super::audit::{self, Action, Actor};
use super::json_body::read_object;
use crate::config::LogLevel;
use crate::telemetry::{LevelView, log_level, set_log_level};
use axum::Json;
use axum::body::Bytes;
use axum::extract::{Extension, State};
use axum::response::{IntoResponse as _, Response};
use http::StatusCode;
use serde_json::json;
use utoipa::ToSchema;

/// A level for the log.
#[derive(serde::Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct LevelBody {
    /// `error`, `warn`, `info`, `debug` or `trace`. `null`: the level of the config.
    #[serde(deserialize_with = "serde::Deserialize::deserialize")]
    level: Option<String>,
}

/// The level of the log.
#[utoipa::path(get, path = "/api/log-level", tag = "config", responses(
    (status = 200, description = "The level.", body = LevelView),
    ParameterErrors,
    AccessErrors,
))]
pub(super) async fn level(_: NoParameters) -> Response {
    Json(log_level()).into_response()
}

/// Sets the level of the log until the next start, or until a reload changes the level of the config.
#[utoipa::path(put, path = "/api/log-level", tag = "config", request_body = LevelBody, responses(
    (status = 200, description = "The level is in force.", body = LevelView),
    (status = 400, description = "`invalid_value`: the body is not valid, or there is a query parameter.", body = ErrorBody),
    AccessErrors,
))]
pub(super) async fn set_level(
    State(admin): State<Admin>,
    Extension(actor): Extension<Actor>,
    _: NoParameters,
    body: Bytes,
) -> Response {
    let level = match read_object::<LevelBody>(&body).map(|body| body.level) {
        Ok(None) => Some(None),
        Ok(Some(name)) => LogLevel::of(&name).map(Some),
        Err(_) => None,
    };
    let Some(level) = level else {
        let message = "The body must be {\"level\": LEVEL} with error, warn, info, debug or trace, or with null for the level of the config.";
        return refusal(StatusCode::BAD_REQUEST, "invalid_value", message);
    };
    let (before, after) = set_log_level(level);
    let (target, before, after_json) = ("log".to_owned(), json!(before), json!(after));
    let action = Action { name: "log_level_set", target, before, after: after_json, ..Action::default() };
    audit::record(&admin, actor, action).await;
    Json(after).into_response()
}
