//! Overrides: an administrator changes the limit of a quota, or resets quotas.

use super::audit::{self, Action, Actor};
use super::environments::{environment_view, find, unknown_environment};
use super::{Admin, refusal};
use crate::ledger::{Account, NoRoom, QuotaKey};
use crate::quota::{Kind, MAX_LIMIT};
use axum::Json;
use axum::extract::{Extension, Path, Query, State};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http::StatusCode;
use serde_json::{Value, json};

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
pub(super) struct QuotaScope {
    #[serde(default = "environment_scope")]
    scope: String,
    #[serde(default)]
    name: String,
}

fn environment_scope() -> String {
    "environment".to_owned()
}

pub(super) async fn set_limit(
    State(admin): State<Admin>,
    Extension(actor): Extension<Actor>,
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
    change_limit(&admin, actor, (&environment, &kind, &per), &scope, Some((new.limit, burst))).await
}

pub(super) async fn unset_limit(
    State(admin): State<Admin>,
    Extension(actor): Extension<Actor>,
    Path((environment, kind, per)): Path<(String, String, String)>,
    Query(scope): Query<QuotaScope>,
) -> Response {
    change_limit(&admin, actor, (&environment, &kind, &per), &scope, None).await
}

async fn change_limit(
    admin: &Admin,
    actor: Actor,
    (environment, kind, per): (&str, &str, &str),
    scope: &QuotaScope,
    limit: Option<(u64, u64)>,
) -> Response {
    let Some((settings, account)) = find(admin, environment) else { return unknown_environment() };
    let Some(kind) = Kind::ALL.into_iter().find(|known| known.as_str() == kind) else {
        return unknown_quota();
    };
    let key = QuotaKey { scope: &scope.scope, name: &scope.name, kind, per };
    let before = limit_of(&account, key);
    match account.set_limit(key, limit).await {
        Ok(true) => {}
        Ok(false) => return unknown_quota(),
        Err(no_room) => return redis_unavailable(&no_room),
    }
    let action = Action {
        name: if limit.is_some() { "limit_set" } else { "limit_unset" },
        target: audit::quota_target(environment, key),
        before,
        after: limit_of(&account, key),
        reason: None,
    };
    audit::record(admin, actor, action).await;
    tracing::info!(environment, %kind, per, scope = scope.scope, name = scope.name, ?limit, "the admin API changed a limit");
    Json(environment_view(admin, &settings, &account)).into_response()
}

pub(super) async fn reset(
    State(admin): State<Admin>,
    Extension(actor): Extension<Actor>,
    Path(environment): Path<String>,
) -> Response {
    let Some((settings, account)) = find(&admin, &environment) else { return unknown_environment() };
    if let Err(no_room) = account.reset().await {
        return redis_unavailable(&no_room);
    }
    let target = audit::environment_target(&environment);
    audit::record(&admin, actor, Action { name: "reset", target, ..Action::default() }).await;
    tracing::info!(environment, "the admin API reset all quotas of this environment");
    Json(environment_view(&admin, &settings, &account)).into_response()
}

/// The limit and burst in force, for the audit log.
fn limit_of(account: &Account, key: QuotaKey<'_>) -> Value {
    let levels = account.snapshot().levels;
    let quota = levels.iter().map(|level| &level.quota).find(|quota| key.matches(quota));
    quota.map_or(Value::Null, |quota| json!({ "limit": quota.limit, "burst": quota.capacity() }))
}

fn redis_unavailable(_: &NoRoom) -> Response {
    let message = "Nothing was changed, because the counters are shared and Redis is unavailable. Try again when /readyz answers 'ready'.";
    refusal(StatusCode::SERVICE_UNAVAILABLE, "quota_store_unavailable", message)
}

fn unknown_quota() -> Response {
    let message = "The environment has no such quota. Write kind and period as in the config, and scope and name as query parameters.";
    refusal(StatusCode::NOT_FOUND, "unknown_quota", message)
}
