//! The admin listener: health checks, metrics, the state of every quota, and overrides of limits.

mod access;
mod audit;
mod config;
mod environments;
mod events;
mod explain;
mod guesses;
mod overrides;
mod page;
mod sessions;
mod system;
mod usage;

use crate::config::OnStoreFailure;
use crate::ledger::RedisStatus;
use crate::proxy;
use crate::reload::{ReloadHandle, ReloadOutcome};
use crate::server::Peer;
use access::Access;
use audit::{Action, Actor};
use axum::Router;
use axum::extract::rejection::QueryRejection;
use axum::extract::{DefaultBodyLimit, Extension, Query, State};
use axum::middleware;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post, put};
use axum::{Json, body::Body};
use events::EventHub;
use http::StatusCode;
use http::header;
use hyper::body::Incoming;
use hyper_util::service::TowerToHyperService;
use serde_json::json;
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::sync::Arc;
use system::Process;

/// Maximum size of a request body in bytes.
const MAX_BODY_BYTES: usize = 64 * 1024;
/// Maximum size of a body for `POST /api/explain` in bytes.
const MAX_EXPLAINED_BYTES: usize = 32 * 1024 * 1024;

#[derive(Clone)]
struct Admin {
    state: Arc<proxy::State>,
    reload: ReloadHandle,
    access: Arc<Access>,
    events: Arc<EventHub>,
    process: Process,
}

/// The address of the client that sent a request.
#[derive(Clone, Copy, Debug)]
struct PeerAddress(SocketAddr);

/// The HTTP service of the admin listener, for the connections of each client. `address`: the address of the admin listener;
/// `callers`: that of the listener for callers.
pub(crate) fn service(
    state: Arc<proxy::State>,
    reload: ReloadHandle,
    address: SocketAddr,
    callers: SocketAddr,
) -> impl Fn(Arc<Peer>) -> TowerToHyperService<axum::routing::RouterIntoService<Incoming>> {
    let admin = Admin {
        state,
        reload,
        access: Arc::new(Access::new(address)),
        events: Arc::default(),
        process: Process::new(callers),
    };
    let router = Router::new()
        .route("/", get(page::index))
        .route("/page/{name}", get(page::file))
        .route("/livez", get(|| async { "alive\n" }))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .route("/api/environments", get(environments::environments))
        .route("/api/environments/{environment}", get(environments::environment).patch(overrides::patch))
        .route("/api/environments/{environment}/reset", post(overrides::reset))
        .route(
            "/api/environments/{environment}/quotas/{kind}/{per}",
            put(overrides::set_limit).delete(overrides::unset_limit),
        )
        .route("/api/audit", get(audit::audit))
        .route("/api/events", get(events::events))
        .route("/api/system", get(system::system))
        .route("/api/environments/{environment}/quotas/{kind}/{per}/reset", post(overrides::reset_one))
        .route("/api/overrides", get(overrides::list))
        .route("/api/usage", get(usage::report))
        .route("/api/rejections", get(rejections))
        .route("/api/session", post(access::sign_in).delete(access::sign_out))
        .route("/api/config", get(config::config))
        .route("/api/config/reload", post(reload_config))
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
        // Requests of callers may be larger than those of administrators.
        .route("/api/explain", post(explain::explain).layer(DefaultBodyLimit::max(MAX_EXPLAINED_BYTES)))
        .fallback(|| async {
            refusal(StatusCode::NOT_FOUND, "unknown_path", "There is no such path on the admin listener.")
        })
        .layer(middleware::from_fn_with_state(admin.clone(), access::authorize))
        .with_state(admin);
    move |peer| {
        let router = router.clone().layer(Extension(PeerAddress(peer.address)));
        TowerToHyperService::new(router.into_service())
    }
}

/// The query parameters of a request, if they can be read.
type QueryResult<T> = Result<Query<T>, QueryRejection>;

/// Returns the query parameters, or the answer to a query that cannot be read.
fn read_query<T>(query: QueryResult<T>) -> Result<T, Box<Response>> {
    query.map(|Query(parameters)| parameters).map_err(|error| {
        let message = format!("The query cannot be read: {}.", error.body_text());
        Box::new(refusal(StatusCode::BAD_REQUEST, "invalid_value", &message))
    })
}

fn refusal(status: StatusCode, code: &str, message: &str) -> Response {
    let body =
        json!({"error": {"message": message, "type": "invalid_request_error", "param": null, "code": code}});
    (status, Json(body)).into_response()
}

async fn readyz(State(admin): State<Admin>) -> (StatusCode, String) {
    if admin.state.is_closing() {
        return (StatusCode::SERVICE_UNAVAILABLE, "draining: the gateway is shutting down\n".into());
    }
    let mut text = String::new();
    // The node stays ready: it serves requests, and only the durability of its counters is affected.
    if let Some(reason) = admin.state.store_failure() {
        let _ = writeln!(text, "ready, but the store cannot be written: {reason}");
    }
    let faults = admin.reload.faults();
    if let Some(fault) = faults.first() {
        let _ = writeln!(text, "ready, but the new config was refused and the old one is in force: {fault}");
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
            let _ = writeln!(text, "{name}: a setting of the Redis server is wrong for quotas: {fault}");
        }
    }
    if text.is_empty() {
        text.push_str("ready\n");
    }
    (status, text)
}

async fn metrics(State(admin): State<Admin>) -> Response {
    let state = &admin.state;
    match state.metrics.render(&state.current().environments(), state.store_failure().is_none()) {
        Ok(text) => {
            let content_type = [(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")];
            (content_type, Body::from(text)).into_response()
        }
        Err(error) => {
            tracing::error!(%error, "the metrics cannot be encoded as text");
            refusal(
                StatusCode::INTERNAL_SERVER_ERROR,
                "internal_error",
                "The metrics cannot be encoded as text. The log has the error.",
            )
        }
    }
}

/// The query parameters of `GET /api/rejections`.
#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct RejectionParameters {
    /// Number of rejections.
    #[serde(default = "all_rejections")]
    limit: usize,
    environment: Option<String>,
    caller: Option<String>,
}

fn all_rejections() -> usize {
    usize::MAX
}

async fn rejections(State(admin): State<Admin>, query: QueryResult<RejectionParameters>) -> Response {
    let RejectionParameters { limit, environment, caller } = match read_query(query) {
        Ok(parameters) => parameters,
        Err(refusal) => return *refusal,
    };
    let last = admin.state.rejections.last(limit, environment.as_deref(), caller.as_deref());
    Json(json!({ "rejections": last })).into_response()
}

/// Reloads the config file. 200 with what changed, or 422 with all faults.
async fn reload_config(State(admin): State<Admin>, Extension(actor): Extension<Actor>) -> Response {
    let outcome = admin.reload.reload().await;
    if let Some(outcome) = &outcome {
        let (target, after) = ("config".to_owned(), outcome.audited());
        let action = Action { name: "config_reload", target, after, ..Action::default() };
        audit::record(&admin, actor, action).await;
    }
    match outcome {
        Some(ReloadOutcome::Adopted { changes, warnings }) => {
            Json(json!({"changes": changes, "warnings": warnings})).into_response()
        }
        Some(ReloadOutcome::Refused { faults }) => {
            let message = format!(
                "The new config was refused, and the old one stays in force. Its faults: {}",
                faults.join("; ")
            );
            let error = json!({"message": message, "type": "invalid_request_error", "param": null, "code": "invalid_config"});
            let body = json!({"error": error, "faults": faults});
            (StatusCode::UNPROCESSABLE_ENTITY, Json(body)).into_response()
        }
        None => refusal(StatusCode::SERVICE_UNAVAILABLE, "shutting_down", "The gateway is shutting down."),
    }
}
