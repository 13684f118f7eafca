//! `GET /api/environments`: the state of every quota.

use super::{Admin, refusal};
use crate::config::Environment;
use crate::ledger::{Account, RedisStatus, Snapshot};
use crate::quota::{Quota, QuotaLevel, Scope, Window};
use axum::Json;
use axum::extract::{Path, State};
use axum::response::{IntoResponse, Response};
use http::StatusCode;
use serde_json::{Value, json};
use std::sync::Arc;

pub(super) async fn environments(State(admin): State<Admin>) -> Json<Value> {
    let mut all = Vec::new();
    for (environment, account) in admin.state.current().environments() {
        account.refresh().await;
        all.push(environment_json(&environment, &account));
    }
    Json(json!({"environments": all}))
}

/// The environment with this name, and its account.
pub(super) fn find(admin: &Admin, name: &str) -> Option<(Arc<Environment>, Arc<Account>)> {
    let current = admin.state.current();
    let (index, environment) = current.config.environment(name)?;
    Some((environment.clone(), current.accounts[index].clone()))
}

pub(super) async fn environment(State(admin): State<Admin>, Path(name): Path<String>) -> Response {
    match find(&admin, &name) {
        Some((environment, account)) => {
            account.refresh().await;
            Json(environment_json(&environment, &account)).into_response()
        }
        None => unknown_environment(),
    }
}

pub(super) fn unknown_environment() -> Response {
    refusal(
        StatusCode::NOT_FOUND,
        "unknown_environment",
        "There is no such environment. GET /api/environments lists all.",
    )
}

pub(super) fn environment_json(environment: &Environment, account: &Account) -> Value {
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
pub(super) fn level_json(level: &QuotaLevel, is_override: Option<bool>) -> Value {
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
