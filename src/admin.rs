//! The admin listener: health checks, metrics, the state of every quota, and overrides of limits.

mod access;
mod explain;
mod guesses;
mod sessions;
mod usage;

use crate::config::{Environment, OnStoreFailure};
use crate::ledger::{Account, NoRoom, QuotaKey, RedisStatus, Snapshot};
use crate::proxy;
use crate::quota::{Kind, MAX_LIMIT, Quota, QuotaLevel, Scope, Window};
use crate::reload::{ReloadHandle, ReloadOutcome};
use crate::server::Peer;
use access::Access;
use axum::Router;
use axum::extract::{DefaultBodyLimit, Extension, Path, Query, State};
use axum::middleware;
use axum::response::{Html, IntoResponse, Response};
use axum::routing::{get, post, put};
use axum::{Json, body::Body};
use bytes::Bytes;
use http::StatusCode;
use http::header;
use hyper::body::Incoming;
use hyper_util::service::TowerToHyperService;
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::sync::Arc;

/// Maximum size of a request body in bytes.
const MAX_BODY_BYTES: usize = 64 * 1024;
/// Maximum size of a body for `POST /api/explain` in bytes.
const MAX_EXPLAINED_BYTES: usize = 32 * 1024 * 1024;

#[derive(Clone)]
struct Admin {
    state: Arc<proxy::State>,
    reload: ReloadHandle,
    access: Arc<Access>,
}

/// The address of the client that sent a request.
#[derive(Clone, Copy, Debug)]
struct PeerAddress(SocketAddr);

/// The HTTP service of the admin listener at this address, for the connections of each client.
pub(crate) fn service(
    state: Arc<proxy::State>,
    reload: ReloadHandle,
    address: SocketAddr,
) -> impl Fn(Arc<Peer>) -> TowerToHyperService<axum::routing::RouterIntoService<Incoming>> {
    let admin = Admin { state, reload, access: Arc::new(Access::new(address)) };
    let router = Router::new()
        .route("/", get(page))
        .route("/livez", get(|| async { "alive\n" }))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .route("/api/environments", get(environments))
        .route("/api/environments/{environment}", get(environment))
        .route("/api/environments/{environment}/reset", post(reset))
        .route("/api/environments/{environment}/quotas/{kind}/{per}", put(set_limit).delete(unset_limit))
        .route("/api/usage", get(usage::report))
        .route("/api/rejections", get(rejections))
        .route("/api/session", post(access::sign_in).delete(access::sign_out))
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

fn refusal(status: StatusCode, code: &str, message: &str) -> Response {
    let body =
        json!({"error": {"message": message, "type": "invalid_request_error", "param": null, "code": code}});
    (status, Json(body)).into_response()
}

async fn page() -> Html<&'static str> {
    Html(include_str!("admin/page.html"))
}

async fn readyz(State(admin): State<Admin>) -> (StatusCode, String) {
    if admin.state.is_draining() {
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
                Some(OnStoreFailure::Closed) if environment.enforce => {
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

async fn environments(State(admin): State<Admin>) -> Json<Value> {
    let mut all = Vec::new();
    for (environment, account) in admin.state.current().environments() {
        account.refresh().await;
        all.push(environment_json(&environment, &account));
    }
    Json(json!({"environments": all}))
}

/// The environment with this name, and its account.
fn find(admin: &Admin, name: &str) -> Option<(Arc<Environment>, Arc<Account>)> {
    let current = admin.state.current();
    let (index, environment) = current.config.environment(name)?;
    Some((environment.clone(), current.accounts[index].clone()))
}

async fn environment(State(admin): State<Admin>, Path(name): Path<String>) -> Response {
    match find(&admin, &name) {
        Some((environment, account)) => {
            account.refresh().await;
            Json(environment_json(&environment, &account)).into_response()
        }
        None => unknown_environment(),
    }
}

/// The query parameters of `GET /api/rejections`.
#[derive(serde::Deserialize)]
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

async fn rejections(
    State(admin): State<Admin>,
    Query(RejectionParameters { limit, environment, caller }): Query<RejectionParameters>,
) -> Json<Value> {
    let last = admin.state.rejections.last(limit, environment.as_deref(), caller.as_deref());
    Json(json!({ "rejections": last }))
}

/// The body of a `PUT` request.
#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct LimitBody {
    limit: u64,
    /// For a rolling quota. Default: `limit`.
    burst: Option<u64>,
}

/// The query parameters that select a quota of one kind and period. Default: the quota of the environment.
#[derive(serde::Deserialize)]
struct QuotaScope {
    #[serde(default = "environment_scope")]
    scope: String,
    #[serde(default)]
    name: String,
}

fn environment_scope() -> String {
    "environment".to_owned()
}

async fn set_limit(
    State(admin): State<Admin>,
    Path((environment, kind, per)): Path<(String, String, String)>,
    Query(scope): Query<QuotaScope>,
    body: Bytes,
) -> Response {
    let new: LimitBody = match serde_json::from_slice(&body) {
        Ok(new) => new,
        Err(error) => {
            let message = format!("The body is not {{\"limit\": N, \"burst\": N}}: {error}.");
            return refusal(StatusCode::BAD_REQUEST, "invalid_json", &message);
        }
    };
    let burst = new.burst.unwrap_or(new.limit);
    if ![new.limit, burst].iter().all(|n| (1..=MAX_LIMIT).contains(n)) {
        let message = "limit and burst must be whole numbers from 1 to 2^50.";
        return refusal(StatusCode::BAD_REQUEST, "invalid_value", message);
    }
    change_limit(&admin, (&environment, &kind, &per), &scope, Some((new.limit, burst))).await
}

async fn unset_limit(
    State(admin): State<Admin>,
    Path((environment, kind, per)): Path<(String, String, String)>,
    Query(scope): Query<QuotaScope>,
) -> Response {
    change_limit(&admin, (&environment, &kind, &per), &scope, None).await
}

async fn change_limit(
    admin: &Admin,
    (environment, kind, per): (&str, &str, &str),
    scope: &QuotaScope,
    limit: Option<(u64, u64)>,
) -> Response {
    let Some((settings, account)) = find(admin, environment) else { return unknown_environment() };
    let Some(kind) = Kind::ALL.into_iter().find(|known| known.as_str() == kind) else {
        return unknown_quota();
    };
    let key = QuotaKey { scope: &scope.scope, name: &scope.name, kind, per };
    match account.set_limit(key, limit).await {
        Ok(true) => {}
        Ok(false) => return unknown_quota(),
        Err(no_room) => return redis_unavailable(&no_room),
    }
    tracing::info!(environment, %kind, per, scope = scope.scope, name = scope.name, ?limit, "the admin API changed a limit");
    Json(environment_json(&settings, &account)).into_response()
}

/// Reloads the config file. 200 with what changed, or 422 with all faults.
async fn reload_config(State(admin): State<Admin>) -> Response {
    match admin.reload.reload().await {
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

async fn reset(State(admin): State<Admin>, Path(environment): Path<String>) -> Response {
    let Some((settings, account)) = find(&admin, &environment) else { return unknown_environment() };
    if let Err(no_room) = account.reset().await {
        return redis_unavailable(&no_room);
    }
    tracing::info!(environment, "the admin API reset all quotas of this environment");
    Json(environment_json(&settings, &account)).into_response()
}

fn redis_unavailable(_: &NoRoom) -> Response {
    let message = "Nothing was changed, because the counters are shared and Redis is unavailable. Try again when /readyz answers 'ready'.";
    refusal(StatusCode::SERVICE_UNAVAILABLE, "quota_store_unavailable", message)
}

fn unknown_environment() -> Response {
    refusal(
        StatusCode::NOT_FOUND,
        "unknown_environment",
        "There is no such environment. GET /api/environments lists all.",
    )
}

fn unknown_quota() -> Response {
    let message = "The environment has no such quota. Write kind and period as in the config, and scope and name as query parameters.";
    refusal(StatusCode::NOT_FOUND, "unknown_quota", message)
}

fn environment_json(environment: &Environment, account: &Account) -> Value {
    let Snapshot { in_flight, redis, levels, totals, overrides } = account.snapshot();
    let is_override = |quota: &Quota| overrides.iter().any(|other| other.is_same_as(quota));
    let mut json = json!({
        "name": environment.name,
        "upstream": environment.upstream.name,
        "in_flight": in_flight,
        "quotas": levels.iter().map(|level| level_json(level, Some(is_override(&level.quota)))).collect::<Vec<_>>(),
        "totals": {
            "requests": totals.requests,
            "rejected": totals.rejected,
            "prompt_tokens": totals.prompt,
            "completion_tokens": totals.completion,
            "total_tokens": totals.total,
        },
    });
    if let Some(RedisStatus { unavailable_reason, nodes, .. }) = redis {
        json["shared"] = json!({"store": "redis", "up": unavailable_reason.is_none(), "nodes": nodes, "reason": unavailable_reason});
    }
    json
}

/// `is_override`: whether an administrator has set the limit; `None`: the JSON does not say.
fn level_json(level: &QuotaLevel, is_override: Option<bool>) -> Value {
    let QuotaLevel { quota, level, held, used, reset_ms } = level;
    let (scope, name) = match &quota.scope {
        Scope::Environment => ("environment", None),
        Scope::Caller(name) => ("caller", Some(&**name)),
        Scope::Model(pattern) => ("model", Some(pattern.as_str())),
    };
    let window = match quota.window {
        Window::Rolling { .. } => "rolling",
        Window::Calendar { .. } => "calendar",
    };
    #[allow(clippy::cast_precision_loss)] // exact below 285,000 years
    let reset_seconds = *reset_ms as f64 / 1_000.0;
    let mut json = json!({
        "scope": scope,
        "kind": quota.kind.as_str(),
        "per": quota.per.text,
        "window": window,
        "limit": quota.limit,
        "burst": quota.capacity(),
        "level": level,
        "held": held,
        "used": used,
        "reset_seconds": reset_seconds,
    });
    if let Some(is_override) = is_override {
        json["source"] = json!(if is_override { "override" } else { "file" });
    }
    if let Some(name) = name {
        json["name"] = json!(name);
    }
    json
}
