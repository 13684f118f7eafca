//! The admin listener: health, metrics, the state of every quota, and limits that are changed for now.

use crate::config::OnStoreFailure;
use crate::ledger::{Account, NoRoom, QuotaKey, Sharing, Snapshot};
use crate::proxy;
use crate::quota::{Kind, MAX_LIMIT, Quota, QuotaLevel, Scope, Window};
use axum::Router;
use axum::extract::{DefaultBodyLimit, Path, Query, Request, State};
use axum::middleware::{self, Next};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::{get, post, put};
use axum::{Json, body::Body};
use bytes::Bytes;
use http::header::{self, HeaderMap};
use http::{HeaderValue, StatusCode};
use hyper::body::Incoming;
use hyper_util::service::TowerToHyperService;
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::sync::Arc;
use subtle::ConstantTimeEq as _;

use crate::config::Environment;

/// No request to this listener has a larger body.
const LARGEST_BODY: usize = 64 * 1024;

#[derive(Clone)]
struct Admin {
    state: Arc<proxy::State>,
    /// Names under which a browser on this machine may call the listener.
    hosts: Arc<[String]>,
}

/// The service behind the admin listener at this address.
pub(crate) fn service(
    state: Arc<proxy::State>,
    address: SocketAddr,
) -> TowerToHyperService<axum::routing::RouterIntoService<Incoming>> {
    let port = address.port();
    let hosts = [
        address.to_string(),
        format!("localhost:{port}"),
        format!("127.0.0.1:{port}"),
        format!("[::1]:{port}"),
    ];
    let admin = Admin { state, hosts: hosts.into() };
    let router = Router::new()
        .route("/", get(page))
        .route("/livez", get(|| async { "alive\n" }))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .route("/api/environments", get(environments))
        .route("/api/environments/{environment}", get(environment))
        .route("/api/environments/{environment}/reset", post(reset))
        .route("/api/environments/{environment}/quotas/{kind}/{per}", put(set_limit).delete(unset_limit))
        .layer(DefaultBodyLimit::max(LARGEST_BODY))
        .fallback(|| async {
            refusal(StatusCode::NOT_FOUND, "unknown_path", "Nothing is served at this path.")
        })
        .layer(middleware::from_fn_with_state(admin.clone(), guard))
        .with_state(admin);
    TowerToHyperService::new(router.into_service())
}

/// Who may ask: with a token whoever has it; without one whoever can reach the loopback listener, but
/// no web page of another site that a browser on this machine has open.
async fn guard(State(admin): State<Admin>, request: Request, next: Next) -> Response {
    let open = matches!(request.uri().path(), "/livez" | "/readyz");
    let refused = match &admin.state.config.admin.token {
        Some(_) if open => None,
        Some(token) => (!has_token(request.headers(), token.expose())).then(|| {
            refusal(StatusCode::UNAUTHORIZED, "invalid_token", "Send 'Authorization: Bearer <admin.token>'.")
        }),
        None => (!is_own_site(request.headers(), &admin.hosts)).then(|| {
            refusal(
                StatusCode::FORBIDDEN,
                "foreign_site",
                "Without admin.token this listener answers only under its own address.",
            )
        }),
    };
    match refused {
        Some(refusal) => refusal,
        None => next.run(request).await,
    }
}

fn has_token(headers: &HeaderMap, token: &str) -> bool {
    let given = headers.get(header::AUTHORIZATION).map(HeaderValue::as_bytes).unwrap_or_default();
    let given = given.strip_prefix(b"Bearer ").unwrap_or_default();
    given.ct_eq(token.as_bytes()).into()
}

fn is_own_site(headers: &HeaderMap, hosts: &[String]) -> bool {
    let is_ours = |name: &str| hosts.iter().any(|host| host == name);
    let host = headers.get(header::HOST).and_then(|h| h.to_str().ok());
    let origin = headers.get(header::ORIGIN).map(|o| o.to_str().unwrap_or_default());
    host.is_some_and(is_ours) && origin.is_none_or(|o| o.strip_prefix("http://").is_some_and(is_ours))
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
    let mut said = String::new();
    // It serves: whoever takes it out of service loses more than the store does.
    if let Some(trouble) = admin.state.store_failure() {
        let _ = writeln!(said, "ready, but the store cannot be written: {trouble}");
    }
    let mut status = StatusCode::OK;
    let policy = admin.state.config.store.redis.as_ref().map(|redis| redis.on_failure);
    for (environment, account) in admin.state.environments() {
        let Some(Sharing { trouble, nodes, faults, .. }) = account.sharing() else { continue };
        let name = &environment.name;
        if let Some(trouble) = trouble {
            let instead = match policy {
                Some(OnStoreFailure::Closed) if environment.enforce => {
                    status = StatusCode::SERVICE_UNAVAILABLE;
                    "nothing is let through"
                }
                Some(OnStoreFailure::Open) => "this node admits by the whole limits",
                _ if nodes > 1 => "this node admits by its share of what was left",
                _ => "this node admits by its own counters",
            };
            let _ = writeln!(said, "{name}: Redis is away, {instead}: {trouble}");
        }
        for fault in faults {
            let _ = writeln!(said, "{name}: Redis is not set up as quotas need it: {fault}");
        }
    }
    if said.is_empty() {
        said.push_str("ready\n");
    }
    (status, said)
}

async fn metrics(State(admin): State<Admin>) -> Response {
    let state = &admin.state;
    match state.metrics.render(&state.environments(), state.store_failure().is_none()) {
        Ok(text) => {
            let kind = [(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")];
            (kind, Body::from(text)).into_response()
        }
        Err(error) => {
            tracing::error!(%error, "the metrics cannot be written");
            refusal(StatusCode::INTERNAL_SERVER_ERROR, "internal_error", "The metrics cannot be written.")
        }
    }
}

async fn environments(State(admin): State<Admin>) -> Json<Value> {
    let state = &admin.state;
    let mut all = Vec::new();
    for (environment, account) in state.config.environments.iter().zip(&state.accounts) {
        account.refresh().await;
        all.push(shown(environment, account));
    }
    Json(json!({"environments": all}))
}

async fn environment(State(admin): State<Admin>, Path(name): Path<String>) -> Response {
    match admin.state.config.environment(&name) {
        Some((index, environment)) => {
            let account = &admin.state.accounts[index];
            account.refresh().await;
            Json(shown(environment, account)).into_response()
        }
        None => unknown_environment(),
    }
}

/// The body of a `PUT`.
#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct NewLimit {
    limit: u64,
    /// Of a rolling quota; without it the limit.
    burst: Option<u64>,
}

/// Which of the quotas of one kind and period: of the environment, if nothing else is said.
#[derive(serde::Deserialize)]
struct Whose {
    #[serde(default = "of_environment")]
    scope: String,
    #[serde(default)]
    name: String,
}

fn of_environment() -> String {
    "environment".to_owned()
}

async fn set_limit(
    State(admin): State<Admin>,
    Path((environment, kind, per)): Path<(String, String, String)>,
    Query(whose): Query<Whose>,
    body: Bytes,
) -> Response {
    let new: NewLimit = match serde_json::from_slice(&body) {
        Ok(new) => new,
        Err(error) => {
            let said = format!("The body is not {{\"limit\": N, \"burst\": N}}: {error}.");
            return refusal(StatusCode::BAD_REQUEST, "invalid_json", &said);
        }
    };
    let burst = new.burst.unwrap_or(new.limit);
    if ![new.limit, burst].iter().all(|n| (1..=MAX_LIMIT).contains(n)) {
        let said = "limit and burst must be whole numbers from 1 to 2^50.";
        return refusal(StatusCode::BAD_REQUEST, "invalid_value", said);
    }
    change_limit(&admin, (&environment, &kind, &per), &whose, Some((new.limit, burst))).await
}

async fn unset_limit(
    State(admin): State<Admin>,
    Path((environment, kind, per)): Path<(String, String, String)>,
    Query(whose): Query<Whose>,
) -> Response {
    change_limit(&admin, (&environment, &kind, &per), &whose, None).await
}

async fn change_limit(
    admin: &Admin,
    (environment, kind, per): (&str, &str, &str),
    whose: &Whose,
    limit: Option<(u64, u64)>,
) -> Response {
    let Some((index, settings)) = admin.state.config.environment(environment) else {
        return unknown_environment();
    };
    let account = &admin.state.accounts[index];
    let Some(kind) = Kind::ALL.into_iter().find(|known| known.as_str() == kind) else {
        return unknown_quota();
    };
    let key = QuotaKey { scope: &whose.scope, name: &whose.name, kind, per };
    match account.set_limit(key, limit).await {
        Ok(true) => {}
        Ok(false) => return unknown_quota(),
        Err(no_room) => return away(&no_room),
    }
    tracing::info!(environment, %kind, per, scope = whose.scope, name = whose.name, ?limit, "a limit was changed by the admin API");
    Json(shown(settings, account)).into_response()
}

async fn reset(State(admin): State<Admin>, Path(environment): Path<String>) -> Response {
    let Some((index, settings)) = admin.state.config.environment(&environment) else {
        return unknown_environment();
    };
    let account = &admin.state.accounts[index];
    if let Err(no_room) = account.reset().await {
        return away(&no_room);
    }
    tracing::info!(environment, "its quotas were reset by the admin API");
    Json(shown(settings, account)).into_response()
}

fn away(_: &NoRoom) -> Response {
    let said = "The counters are shared, and Redis cannot be reached: nothing was changed. Try again when /readyz has nothing to say.";
    refusal(StatusCode::SERVICE_UNAVAILABLE, "quota_store_unavailable", said)
}

fn unknown_environment() -> Response {
    refusal(StatusCode::NOT_FOUND, "unknown_environment", "There is no such environment.")
}

fn unknown_quota() -> Response {
    let said = "The environment has no such quota: kind and period are those of the config, scope and name (if any) are parameters.";
    refusal(StatusCode::NOT_FOUND, "unknown_quota", said)
}

fn shown(environment: &Environment, account: &Account) -> Value {
    let Snapshot { in_flight, sharing, levels, totals, overrides } = account.snapshot();
    let is_override = |quota: &Quota| overrides.iter().any(|other| other.is_same_as(quota));
    let mut shown = json!({
        "name": environment.name,
        "upstream": environment.upstream.name,
        "in_flight": in_flight,
        "quotas": levels.iter().map(|shown| level(shown, is_override(&shown.quota))).collect::<Vec<_>>(),
        "totals": {
            "requests": totals.requests,
            "rejected": totals.rejected,
            "prompt_tokens": totals.prompt,
            "completion_tokens": totals.completion,
            "total_tokens": totals.total,
        },
    });
    if let Some(Sharing { trouble, nodes, .. }) = sharing {
        shown["shared"] =
            json!({"store": "redis", "up": trouble.is_none(), "nodes": nodes, "reason": trouble});
    }
    shown
}

fn level(shown: &QuotaLevel, is_override: bool) -> Value {
    let QuotaLevel { quota, level, held, used, reset_ms } = shown;
    let (scope, name) = match &quota.scope {
        Scope::Environment => ("environment", None),
        Scope::Caller(_, name) => ("caller", Some(name.as_str())),
        Scope::Model(pattern) => ("model", Some(pattern.as_str())),
    };
    let window = match quota.window {
        Window::Rolling { .. } => "rolling",
        Window::Calendar { .. } => "calendar",
    };
    #[allow(clippy::cast_precision_loss)] // seconds to show, exact below 285,000 years
    let reset_seconds = *reset_ms as f64 / 1_000.0;
    let mut shown = json!({
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
        "source": if is_override { "override" } else { "file" },
    });
    if let Some(name) = name {
        shown["name"] = json!(name);
    }
    shown
}
