//! The admin listener: health, metrics and the state of every quota. Read-only so far.

use crate::ledger::{Account, Snapshot};
use crate::proxy::Shared;
use crate::quota::{Level, Scope, Window};
use axum::Router;
use axum::extract::{Path, Request, State};
use axum::middleware::{self, Next};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::get;
use axum::{Json, body::Body};
use http::header::{self, HeaderMap};
use http::{HeaderValue, StatusCode};
use hyper::body::Incoming;
use hyper_util::service::TowerToHyperService;
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::sync::Arc;
use subtle::ConstantTimeEq as _;

use crate::config::Environment;

#[derive(Clone)]
struct Admin {
    shared: Arc<Shared>,
    /// Names under which a browser on this machine may call the listener.
    hosts: Arc<[String]>,
}

/// The service behind the admin listener at this address.
pub(crate) fn service(
    shared: Arc<Shared>,
    address: SocketAddr,
) -> TowerToHyperService<axum::routing::RouterIntoService<Incoming>> {
    let port = address.port();
    let hosts = [
        address.to_string(),
        format!("localhost:{port}"),
        format!("127.0.0.1:{port}"),
        format!("[::1]:{port}"),
    ];
    let admin = Admin { shared, hosts: hosts.into() };
    let router = Router::new()
        .route("/", get(page))
        .route("/livez", get(|| async { "alive\n" }))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .route("/api/environments", get(environments))
        .route("/api/environments/{environment}", get(environment))
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
    let refused = match &admin.shared.config.admin.token {
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
    if admin.shared.is_draining() {
        return (StatusCode::SERVICE_UNAVAILABLE, "draining: the gateway is shutting down\n".into());
    }
    match admin.shared.store_trouble() {
        // It serves: whoever takes it out of service loses more than the store does.
        Some(trouble) => (StatusCode::OK, format!("ready, but the store cannot be written: {trouble}\n")),
        None => (StatusCode::OK, "ready\n".into()),
    }
}

async fn metrics(State(admin): State<Admin>) -> Response {
    let shared = &admin.shared;
    match shared.metrics.render(&shared.environments(), shared.store_trouble().is_none()) {
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
    let shared = &admin.shared;
    let all = shared.config.environments.iter().zip(&shared.accounts);
    Json(json!({"environments": all.map(|(e, account)| shown(e, account)).collect::<Vec<_>>()}))
}

async fn environment(State(admin): State<Admin>, Path(name): Path<String>) -> Response {
    match admin.shared.config.environment(&name) {
        Some((index, environment)) => Json(shown(environment, &admin.shared.accounts[index])).into_response(),
        None => refusal(StatusCode::NOT_FOUND, "unknown_environment", "There is no such environment."),
    }
}

fn shown(environment: &Environment, account: &Account) -> Value {
    let Snapshot { in_flight, levels, totals } = account.snapshot();
    json!({
        "name": environment.name,
        "upstream": environment.upstream.name,
        "in_flight": in_flight,
        "quotas": levels.iter().map(level).collect::<Vec<_>>(),
        "totals": {
            "requests": totals.requests,
            "rejected": totals.rejected,
            "prompt_tokens": totals.prompt,
            "completion_tokens": totals.completion,
            "total_tokens": totals.total,
        },
    })
}

fn level(shown: &Level) -> Value {
    let Level { quota, level, held, used, reset_ms } = shown;
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
        "per": quota.per.written,
        "window": window,
        "limit": quota.limit,
        "burst": quota.capacity(),
        "level": level,
        "held": held,
        "used": used,
        "reset_seconds": reset_seconds,
        "source": "file",
    });
    if let Some(name) = name {
        shown["name"] = json!(name);
    }
    shown
}
