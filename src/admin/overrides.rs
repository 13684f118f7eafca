//! Overrides: an administrator changes a limit or `enforce` while the gateway runs, or resets quotas.

mod body;
mod description;
mod dry_run;
pub(super) mod report;
mod target;
pub(super) mod upstreams;

use super::Admin;
use super::answers::{AccessErrors, NoParameters, QueryResult, read_query, refusal};
use super::audit::{self, Action, Actor};
use super::environments::{EnvironmentPath, EnvironmentView, environment_view, find, unknown_environment};
use crate::clock::Timestamp;
use crate::ledger::{ChangeFault, EnforceOverride, LimitChange, OverrideOrigin, QuotaKey};
use axum::Json;
use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{Extension, Path, State};
use axum::response::{IntoResponse as _, Response};
use body::{EnforceBody, LimitBody, Terms};
use description::{BodyErrors, EnvironmentErrors, QuotaErrors, QuotaPath};
use http::StatusCode;
use serde_json::json;
use target::{Named, Target};

/// The query parameters that select a quota of one kind and period. Default: the quota of the environment.
#[derive(serde::Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields, default)]
#[into_params(parameter_in = Query)]
pub(super) struct QuotaParameters {
    /// `environment`, `caller` or `model`. Default: `environment`.
    scope: String,
    /// The caller's name or the pattern of the models.
    name: String,
}

impl Default for QuotaParameters {
    fn default() -> Self {
        Self { scope: "environment".to_owned(), name: String::new() }
    }
}

/// The query parameters of a new limit: those that select the quota, and `dry_run`.
#[derive(serde::Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields, default)]
#[into_params(parameter_in = Query)]
pub(super) struct LimitParameters {
    /// `environment`, `caller` or `model`. Default: `environment`.
    scope: String,
    /// The caller's name or the pattern of the models.
    name: String,
    /// Changes nothing, and answers with the effect that the limit would have.
    dry_run: bool,
}

impl Default for LimitParameters {
    fn default() -> Self {
        let QuotaParameters { scope, name } = QuotaParameters::default();
        Self { scope, name, dry_run: false }
    }
}

/// The query parameters that select a quota of an upstream, of one kind and period. Default: that of all its models.
#[derive(Default, serde::Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields, default)]
#[into_params(parameter_in = Query)]
pub(super) struct UpstreamQuotaParameters {
    /// The pattern of the models, as `model_quotas` has it.
    model: String,
}

/// The query parameters of a new limit of an upstream: those that select the quota, and `dry_run`.
#[derive(Default, serde::Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields, default)]
#[into_params(parameter_in = Query)]
pub(super) struct UpstreamLimitParameters {
    /// The pattern of the models, as `model_quotas` has it.
    model: String,
    /// Changes nothing, and answers with the effect that the limit would have.
    dry_run: bool,
}

/// The body of a request, or why it could not be read.
type BodyResult = Result<Bytes, BytesRejection>;

/// The answer to a new limit.
#[derive(utoipa::ToSchema)]
#[serde(untagged)]
#[allow(dead_code)] // describes answers, and is never made
enum LimitAnswer {
    /// The environment with the new limit.
    Changed(EnvironmentView),
    /// With `dry_run`: the effect that the limit would have.
    DryRun(dry_run::DryRunView),
}

/// Sets the limit of a quota.
#[utoipa::path(
    put,
    path = "/api/environments/{environment}/quotas/{kind}/{per}",
    tag = "quotas",
    params(QuotaPath, LimitParameters),
    request_body = body::LimitFields,
    responses(
        (status = 200, description = "The new state.", body = LimitAnswer),
        QuotaErrors,
        BodyErrors,
        AccessErrors,
    )
)]
pub(super) async fn set_limit(
    State(admin): State<Admin>,
    Extension(actor): Extension<Actor>,
    Path(path): Path<QuotaPath>,
    query: QueryResult<LimitParameters>,
    body: BodyResult,
) -> Response {
    let LimitParameters { scope, name, dry_run } = match read_query(query) {
        Ok(parameters) => parameters,
        Err(refusal) => return *refusal,
    };
    let target = Target::of_environment(&admin, &path, &QuotaParameters { scope, name }, Named::Configured);
    put_limit(&admin, actor, target, dry_run, body).await.unwrap_or_else(|refusal| *refusal)
}

async fn put_limit(
    admin: &Admin,
    actor: Actor,
    target: Result<Target, Box<Response>>,
    is_dry_run: bool,
    body: BodyResult,
) -> Result<Response, Box<Response>> {
    let target = target?;
    let LimitBody { limit, burst, terms } = LimitBody::read(body)?;
    let burst = target.burst(limit, burst)?;
    if is_dry_run {
        return dry_run::answer(admin, &target, limit, burst).await;
    }
    let change = LimitChange { limit, burst, origin: origin(actor, terms, target.account.now()) };
    change_limit(admin, actor, &target, Some(&change)).await
}

/// Returns to the limit of the config. Also removes the limit of a quota that the config does not have now.
#[utoipa::path(
    delete,
    path = "/api/environments/{environment}/quotas/{kind}/{per}",
    tag = "quotas",
    params(QuotaPath, QuotaParameters),
    responses(
        (status = 200, description = "The environment with the limit of the config.", body = EnvironmentView),
        QuotaErrors,
        AccessErrors,
    )
)]
pub(super) async fn unset_limit(
    State(admin): State<Admin>,
    Extension(actor): Extension<Actor>,
    Path(path): Path<QuotaPath>,
    query: QueryResult<QuotaParameters>,
) -> Response {
    let target = read_query(query)
        .and_then(|parameters| Target::of_environment(&admin, &path, &parameters, Named::Overridden));
    delete_limit(&admin, actor, target).await
}

async fn delete_limit(admin: &Admin, actor: Actor, target: Result<Target, Box<Response>>) -> Response {
    match target {
        Ok(target) => change_limit(admin, actor, &target, None).await.unwrap_or_else(|refusal| *refusal),
        Err(refusal) => *refusal,
    }
}

async fn change_limit(
    admin: &Admin,
    actor: Actor,
    target: &Target,
    change: Option<&LimitChange>,
) -> Result<Response, Box<Response>> {
    let key = target.key();
    let before = target.limit_in_force();
    let result = target.account.set_limit(key, change).await;
    let action = Action {
        name: if change.is_some() { "limit_set" } else { "limit_unset" },
        target: target.audited(),
        before,
        after: target.limit_until(change.and_then(|change| change.origin.until)),
        reason: change.and_then(|change| change.origin.reason.clone()),
    };
    match result {
        Ok(true) => {}
        Ok(false) => return Err(Box::new(target.unknown())),
        Err(fault) => return Err(failed(admin, actor, fault, action).await),
    }
    let by = actor.by.as_str();
    audit::record(admin, actor, action).await;
    let QuotaKey { scope, name, kind, per } = key;
    let (limit, source) = match change {
        Some(change) => (Some(target.quota.with_limit(change.limit, change.burst).limit_text()), "override"),
        None => (Some(target.quota.limit_text()).filter(|_| !target.is_removed), "file"),
    };
    let environment = target.environment();
    let origin = change.map(|change| &change.origin);
    let until = origin.and_then(|origin| origin.until).map(Timestamp::to_rfc3339);
    let reason = origin.and_then(|origin| origin.reason.as_deref());
    tracing::info!(environment, %kind, per, scope, name, limit, source, by, until, reason, "the admin API changed a limit");
    Ok(target.view(admin))
}

/// Sets the used amount of a quota to zero.
#[utoipa::path(
    post,
    path = "/api/environments/{environment}/quotas/{kind}/{per}/reset",
    tag = "quotas",
    params(QuotaPath, QuotaParameters),
    responses(
        (status = 200, description = "The environment after the reset.", body = EnvironmentView),
        QuotaErrors,
        AccessErrors,
    )
)]
pub(super) async fn reset_one(
    State(admin): State<Admin>,
    Extension(actor): Extension<Actor>,
    Path(path): Path<QuotaPath>,
    query: QueryResult<QuotaParameters>,
) -> Response {
    let target = read_query(query)
        .and_then(|parameters| Target::of_environment(&admin, &path, &parameters, Named::Configured));
    reset_quota(&admin, actor, target).await
}

async fn reset_quota(admin: &Admin, actor: Actor, target: Result<Target, Box<Response>>) -> Response {
    let target = match target {
        Ok(target) => target,
        Err(refusal) => return *refusal,
    };
    let key = target.key();
    let before = target.used();
    let action = Action { name: "reset", target: target.audited(), before, ..Action::default() };
    match target.account.reset(Some(key)).await {
        Ok(true) => {}
        Ok(false) => return target.unknown(),
        Err(fault) => return *failed(admin, actor, fault, action).await,
    }
    let by = actor.by.as_str();
    audit::record(admin, actor, action).await;
    let QuotaKey { scope, name, kind, per } = key;
    let environment = target.environment();
    tracing::info!(environment, %kind, per, scope, name, by, "the admin API reset a quota");
    target.view(admin)
}

/// Sets the used amount of every quota of an environment to zero.
#[utoipa::path(
    post,
    path = "/api/environments/{environment}/reset",
    tag = "quotas",
    params(EnvironmentPath),
    responses(
        (status = 200, description = "The environment after the reset.", body = EnvironmentView),
        EnvironmentErrors,
        AccessErrors,
    )
)]
pub(super) async fn reset(
    State(admin): State<Admin>,
    Extension(actor): Extension<Actor>,
    Path(EnvironmentPath { environment }): Path<EnvironmentPath>,
    _: NoParameters,
) -> Response {
    let Some((settings, account)) = find(&admin, &environment) else { return unknown_environment() };
    let target = audit::environment_target(&environment);
    let action = Action { name: "reset", target, ..Action::default() };
    if let Err(fault) = account.reset(None).await {
        return *failed(&admin, actor, fault, action).await;
    }
    let by = actor.by.as_str();
    audit::record(&admin, actor, action).await;
    tracing::info!(environment, by, "the admin API reset all quotas of this environment");
    Json(environment_view(&admin, &settings, &account)).into_response()
}

/// Sets whether the quotas of an environment are enforced.
#[utoipa::path(
    patch,
    path = "/api/environments/{environment}",
    tag = "quotas",
    params(EnvironmentPath),
    request_body = body::EnforceFields,
    responses(
        (status = 200, description = "The environment after the change.", body = EnvironmentView),
        EnvironmentErrors,
        BodyErrors,
        AccessErrors,
    )
)]
pub(super) async fn patch(
    State(admin): State<Admin>,
    Extension(actor): Extension<Actor>,
    Path(EnvironmentPath { environment }): Path<EnvironmentPath>,
    _: NoParameters,
    body: BodyResult,
) -> Response {
    let Some((settings, account)) = find(&admin, &environment) else { return unknown_environment() };
    let EnforceBody { enforce, terms } = match EnforceBody::read(body) {
        Ok(body) => body,
        Err(refusal) => return *refusal,
    };
    let reason = terms.reason.clone();
    let change =
        enforce.map(|enforce| EnforceOverride { enforce, origin: origin(actor, terms, account.now()) });
    let before = json!({ "enforce": account.is_enforcing() });
    let result = account.set_enforce(change).await;
    let action = Action {
        name: if enforce.is_some() { "enforce_set" } else { "enforce_unset" },
        target: audit::environment_target(&environment),
        before,
        after: json!({ "enforce": account.is_enforcing() }),
        reason,
    };
    if let Err(fault) = result {
        return *failed(&admin, actor, fault, action).await;
    }
    let by = actor.by.as_str();
    audit::record(&admin, actor, action).await;
    let source = if enforce.is_some() { "override" } else { "file" };
    let enforce = account.is_enforcing();
    tracing::info!(environment, enforce, source, by, "the admin API changed whether quotas are enforced");
    Json(environment_view(&admin, &settings, &account)).into_response()
}

fn origin(actor: Actor, Terms { duration_ms, reason }: Terms, since: Timestamp) -> OverrideOrigin {
    let until = duration_ms.map(|ms| since.plus_ms(ms));
    OverrideOrigin { by: actor.by.as_str().to_owned(), since, until, reason }
}

#[allow(clippy::unnecessary_box_returns)] // the error type of its callers
fn invalid(message: &str) -> Box<Response> {
    Box::new(refusal(StatusCode::BAD_REQUEST, "invalid_value", message))
}

/// The answer to a change that has failed. One that may have been made is in the audit log, with `unconfirmed`.
async fn failed(admin: &Admin, actor: Actor, fault: ChangeFault, action: Action) -> Box<Response> {
    let is_shared = admin.state.current().config.store.redis.is_some();
    if fault == ChangeFault::Unavailable && !is_shared {
        let message = "Nothing was changed, because a new process is replacing this one. Try again at once.";
        return Box::new(refusal(StatusCode::SERVICE_UNAVAILABLE, "shutting_down", message));
    }
    let message = match fault {
        ChangeFault::Unavailable => {
            "Nothing was changed, because the counters are shared and Redis is unavailable. Try again when /readyz no longer says that Redis is unavailable."
        }
        ChangeFault::Unconfirmed => {
            audit::record(admin, actor, Action { after: json!({ "unconfirmed": true }), ..action }).await;
            "The change may have been made, because Redis has not replied in time (store.redis.timeout). When /readyz no longer says that Redis is unavailable, look at the state, and try again if it is unchanged."
        }
    };
    Box::new(refusal(StatusCode::SERVICE_UNAVAILABLE, "quota_store_unavailable", message))
}
