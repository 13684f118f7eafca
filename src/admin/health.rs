//! Health checks and metrics.

use super::Admin;
use super::answers::{AccessErrors, ErrorBody, refusal};
use crate::config::OnStoreFailure;
use crate::ledger::RedisStatus;
use crate::redis;
use crate::telemetry::StateSources;
use axum::body::Body;
use axum::extract::State;
use axum::response::{IntoResponse as _, Response};
use http::{StatusCode, header};
use std::fmt::Write as _;
use tokio::task::spawn_blocking;

/// Whether the process runs.
#[utoipa::path(get, path = "/livez", tag = "health", security(()), responses(
    (status = 200, description = "The process runs.", body = str, content_type = "text/plain"),
))]
pub(super) async fn livez() -> &'static str {
    "alive\n"
}

/// Whether the gateway is ready to serve requests, and its limitations.
#[utoipa::path(get, path = "/readyz", tag = "health", security(()), responses(
    (status = 200, description = "Ready, with a line for each limitation.", body = str, content_type = "text/plain"),
    (status = 503, description = "Not ready: it shuts down, or it admits no request without Redis.", body = str, content_type = "text/plain"),
))]
pub(super) async fn readyz(State(admin): State<Admin>) -> (StatusCode, String) {
    if admin.state.is_closing() {
        return (StatusCode::SERVICE_UNAVAILABLE, "draining: the gateway is shutting down\n".into());
    }
    let (mut text, mut notes) = (String::new(), String::new());
    // The node stays ready: it serves requests, and only the durability of its counters is affected.
    if let Some(reason) = admin.state.store_failure() {
        let _ = writeln!(text, "ready, but the store cannot be written: {reason}");
    }
    let faults = admin.reload.faults();
    if let Some(fault) = faults.first() {
        let _ = writeln!(text, "ready, but the new config was refused and the old one is in force: {fault}");
    }
    for fault in admin.reload.certificate_faults() {
        let _ =
            writeln!(text, "ready, but the next start would fail; the certificate in force stays: {fault}");
    }
    let mut status = StatusCode::OK;
    let policy = admin.state.current().config.store.redis.as_ref().map(|redis| redis.on_failure);
    for (environment, account) in admin.state.current().environments() {
        let Some(redis) = account.redis_status() else { continue };
        let RedisStatus { unavailable_reason, nodes, server_faults, .. } = redis;
        let name = &environment.name;
        if let Some(trouble) = unavailable_reason {
            let consequence = match policy {
                Some(OnStoreFailure::Closed) if account.is_enforcing() => {
                    status = StatusCode::SERVICE_UNAVAILABLE;
                    "this node admits no request"
                }
                Some(OnStoreFailure::Open) => "this node admits up to the whole limits",
                _ if nodes > 1 => "this node admits from its share of the last known levels",
                _ => "this node admits by its own counters",
            };
            let _ = writeln!(text, "{name}: Redis is unavailable, {consequence}: {trouble}");
        }
        for fault in server_faults {
            let _ = match redis::note(&fault) {
                Some(note) => writeln!(notes, "note: {name}: Redis: {note}"),
                None => writeln!(text, "{name}: a setting of the Redis server is wrong for quotas: {fault}"),
            };
        }
    }
    // Notes do not limit the node.
    if text.is_empty() {
        text.push_str("ready\n");
    }
    (status, text + &notes)
}

/// All metrics in Prometheus's text format.
#[utoipa::path(get, path = "/metrics", tag = "health", responses(
    (status = 200, description = "The metrics.", body = str, content_type = "text/plain"),
    (status = 500, description = "The metrics cannot be encoded as text.", body = ErrorBody),
    AccessErrors,
))]
pub(super) async fn metrics(State(admin): State<Admin>) -> Response {
    let (state, reload) = (admin.state.clone(), admin.reload.clone());
    let render = move || {
        let current = state.current();
        let store_is_up = state.store_failure().is_none();
        let sources = StateSources {
            config: &current.config,
            accounts: &current.accounts,
            upstream_accounts: &current.upstream_accounts,
            provider_limits: &current.provider_limits,
            replicas: &current.replicas,
            store_is_up,
            reload_succeeded: reload.faults().is_empty(),
        };
        state.metrics.render(sources)
    };
    // On the blocking pool: with thousands of quotas it would delay the other requests of this listener.
    let error = match spawn_blocking(render).await {
        Ok(Ok(text)) => {
            let content_type = [(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")];
            return (content_type, Body::from(text)).into_response();
        }
        Ok(Err(error)) => error.to_string(),
        Err(error) => error.to_string(),
    };
    tracing::error!(error, "the metrics cannot be encoded as text");
    refusal(
        StatusCode::INTERNAL_SERVER_ERROR,
        "internal_error",
        "The metrics cannot be encoded as text. The log has the error.",
    )
}
