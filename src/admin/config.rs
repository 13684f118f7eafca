//! `GET /api/config`: the effective config.

use super::{Admin, QueryResult, read_query, refusal};
use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse as _, Response};
use http::{StatusCode, header};

/// The query parameters.
#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ConfigParameters {
    #[serde(default)]
    format: String,
}

/// Answers with the config that new requests are served by: with defaults, and with secrets masked.
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
            let message = "The parameter 'format' is not valid. It is json or yaml.";
            refusal(StatusCode::BAD_REQUEST, "invalid_value", message)
        }
    }
}
