//! `GET /api/openapi.json`: the description of all requests of the admin listener, made from the code.

use super::answers::{AccessErrors, NoParameters, ParameterErrors};
use super::events::{SnapshotEvent, UpdateEvent};
use super::{
    access, audit, config, environments, events, explain, health, log_level, overrides, page, rejections,
    reload, system, upstreams, usage,
};
use axum::response::{IntoResponse as _, Response};
use http::header;
use std::sync::OnceLock;
use utoipa::openapi::security::{ApiKey, ApiKeyValue, HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa::{Modify, OpenApi};

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Tollgate admin API",
        description = "Health, metrics, quotas and usage of a gateway. A request that requires authorization has `admin.token` as a bearer token, or the cookie of a session. Without `admin.token` the listener answers requests to its own loopback address only.",
    ),
    paths(
        page::index, page::file, health::livez, health::readyz, health::metrics,
        environments::environments, environments::environment,
        overrides::set_limit, overrides::unset_limit, overrides::reset, overrides::reset_one, overrides::patch, overrides::report::list,
        upstreams::upstreams, upstreams::upstream, overrides::upstreams::set_upstream_limit,
        overrides::upstreams::unset_upstream_limit, overrides::upstreams::reset_upstream_quota,
        audit::audit, config::config, log_level::level, log_level::set_level, reload::reload, events::events, description,
        rejections::rejections, access::sign_in, access::sign_out, system::system, usage::report, explain::explain,
    ),
    components(schemas(SnapshotEvent, UpdateEvent)),
    modifiers(&Security),
    security(("token" = []), ("session" = [])),
    tags(
        (name = "quotas", description = "The state of quotas, and changes of their limits."),
        (name = "reports", description = "Usage, rejections, and what would happen to a request."),
        (name = "config", description = "The config, and the node itself."),
        (name = "access", description = "Signing in, and the audit log."),
        (name = "health", description = "For monitoring."),
        (name = "page", description = "The dashboard."),
    ),
)]
struct Description;

/// Adds the two ways to authorize a request.
struct Security;

impl Modify for Security {
    fn modify(&self, openapi: &mut utoipa::openapi::OpenApi) {
        let components = openapi.components.get_or_insert_default();
        let token =
            HttpBuilder::new().scheme(HttpAuthScheme::Bearer).description(Some("`admin.token`")).build();
        components.add_security_scheme("token", SecurityScheme::Http(token));
        let text = "A browser that has signed in. A request that changes something repeats the cookie `tollgate_csrf` in the header `x-tollgate-csrf`.";
        let session = ApiKeyValue::with_description("tollgate_session", text);
        components.add_security_scheme("session", SecurityScheme::ApiKey(ApiKey::Cookie(session)));
    }
}

/// This description.
#[utoipa::path(get, path = "/api/openapi.json", tag = "config", responses(
    (status = 200, description = "An OpenAPI description.", body = serde_json::Value),
    ParameterErrors,
    AccessErrors,
))]
pub(super) async fn description(_: NoParameters) -> Response {
    static TEXT: OnceLock<String> = OnceLock::new();
    let text = TEXT.get_or_init(|| Description::openapi().to_json().unwrap_or_default());
    ([(header::CONTENT_TYPE, "application/json")], text.as_str()).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::routes;
    use std::collections::BTreeSet;

    #[test]
    fn every_route_is_described_and_every_description_is_a_route() {
        let described: serde_json::Value =
            serde_json::from_str(&Description::openapi().to_json().unwrap()).unwrap();
        let paths = described["paths"].as_object().unwrap();
        let methods = |(path, item): (&String, &serde_json::Value)| {
            let names: Vec<_> = item.as_object().unwrap().keys().cloned().collect();
            names.into_iter().map(|name| format!("{} {path}", name.to_uppercase())).collect::<Vec<_>>()
        };
        let described: BTreeSet<String> = paths.iter().flat_map(methods).collect();
        let routed: BTreeSet<String> =
            routes().all.iter().map(|(method, path)| format!("{method} {path}")).collect();
        assert_eq!(described, routed);
    }

    /// The document names every path under `/api`, every parameter and every field.
    #[test]
    fn the_description_and_its_document_agree() {
        let page = include_str!("../../docs/admin-api.md");
        let code: String = page.split('`').skip(1).step_by(2).flat_map(|code| [code, " "]).collect();
        let words: BTreeSet<&str> = code.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).collect();
        let described = serde_json::to_value(Description::openapi()).unwrap();
        let mut names = Vec::new();
        for (path, item) in described["paths"].as_object().unwrap() {
            let is_named = [format!("{path}`"), format!("{path}?")].iter().any(|name| page.contains(name));
            assert!(is_named || !path.starts_with("/api"), "{path}");
            let parameters = item.as_object().unwrap().values().filter_map(|of| of["parameters"].as_array());
            names.extend(parameters.flatten().filter_map(|parameter| parameter["name"].as_str()));
        }
        for schema in described["components"]["schemas"].as_object().unwrap().values() {
            let parts = schema["allOf"].as_array().into_iter().flatten().chain([schema]);
            let fields = parts.filter_map(|part| part["properties"].as_object());
            names.extend(fields.flat_map(|fields| fields.keys().map(String::as_str)));
        }
        let missing: BTreeSet<&str> = names.into_iter().filter(|name| !words.contains(name)).collect();
        assert!(missing.is_empty(), "docs/admin-api.md does not name {missing:?}");
    }
}
