//! `POST /api/config/reload`.

use super::Admin;
use super::answers::{AccessErrors, ErrorBody, ErrorView, NoParameters, ParameterErrors, refusal};
use super::audit::{self, Action, Actor};
use crate::reload::ReloadOutcome;
use axum::Json;
use axum::extract::{Extension, State};
use axum::response::{IntoResponse as _, Response};
use http::StatusCode;
use serde::Serialize;
use utoipa::ToSchema;

/// The answer to a reload that succeeded.
#[derive(Serialize, ToSchema)]
pub(super) struct ReloadView {
    /// What changed, one line each.
    changes: Vec<String>,
    /// Settings that are allowed but probably not intended.
    warnings: Vec<String>,
}

/// The answer to a reload of a faulty config.
#[derive(Serialize, ToSchema)]
pub(super) struct ReloadErrorBody {
    error: ErrorView,
    /// Everything that is wrong with the file.
    faults: Vec<String>,
}

/// Reloads the config file. A faulty file changes nothing.
#[utoipa::path(post, path = "/api/config/reload", tag = "config", responses(
    (status = 200, description = "The file is in force.", body = ReloadView),
    ParameterErrors,
    (status = 422, description = "`invalid_config`: the old config stays in force.", body = ReloadErrorBody),
    (status = 503, description = "`shutting_down`: the gateway is shutting down.", body = ErrorBody),
    AccessErrors,
))]
pub(super) async fn reload(
    State(admin): State<Admin>,
    Extension(actor): Extension<Actor>,
    _: NoParameters,
) -> Response {
    let Some(outcome) = admin.reload.reload().await else {
        return refusal(StatusCode::SERVICE_UNAVAILABLE, "shutting_down", "The gateway is shutting down.");
    };
    let (target, after) = ("config".to_owned(), outcome.audited());
    let action = Action { name: "config_reload", target, after, ..Action::default() };
    audit::record(&admin, actor, action).await;
    match outcome {
        ReloadOutcome::Adopted { changes, warnings } => {
            Json(ReloadView { changes, warnings }).into_response()
        }
        ReloadOutcome::Refused { faults } => {
            let message = format!(
                "The new config was refused, and the old one stays in force. Its faults: {}",
                faults.join("; ")
            );
            let ErrorBody { error } = ErrorBody::new("invalid_config", &message);
            (StatusCode::UNPROCESSABLE_ENTITY, Json(ReloadErrorBody { error, faults })).into_response()
        }
    }
}
