//! `GET /api/config`: the effective config.

use super::Admin;
use super::answers::{AccessErrors, ErrorBody, QueryResult, read_query, refusal};
use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse as _, Response};
use http::{StatusCode, header};

/// The query parameters.
#[derive(serde::Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct ConfigParameters {
    /// `json` or `yaml`. Default: `json`.
    #[serde(default)]
    format: String,
}

/// The config in force for new requests, with defaults and with masked secrets.
#[utoipa::path(get, path = "/api/config", tag = "config", params(ConfigParameters), responses(
    (status = 200, description = "The config, in the shape of the config file.", body = serde_json::Value),
    (status = 400, description = "`invalid_value`: a parameter is not valid.", body = ErrorBody),
    AccessErrors,
))]
pub(super) async fn config(State(admin): State<Admin>, query: QueryResult<ConfigParameters>) -> Response {
    let parameters = match read_query(query) {
        Ok(parameters) => parameters,
        Err(refusal) => return *refusal,
    };
    let snapshot = admin.state.current();
    let effective = &snapshot.config.effective;
    match parameters.format.as_str() {
        "" | "json" => Json(effective).into_response(),
        "yaml" => ([(header::CONTENT_TYPE, "application/yaml")], effective.to_yaml()).into_response(),
        _ => {
            let message = "The parameter 'format' is not valid. Use json or yaml.";
            refusal(StatusCode::BAD_REQUEST, "invalid_value", message)
        }
    }
}
