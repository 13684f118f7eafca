//! `GET /api/upstreams`: the limits of upstreams, which hold for all environments together.

use super::Admin;
use super::answers::{AccessErrors, ErrorBody, NoParameters, ParameterErrors, refusal};
use super::environments::{QuotaView, SharedView, TotalsView};
use super::origins::OverrideView;
use crate::config::{Environment, UpstreamSettings};
use crate::ledger::{Account, Snapshot};
use crate::quota::QuotaLevel;
use crate::telemetry::RefusalCounts;
use axum::Json;
use axum::extract::{Path, State};
use axum::response::{IntoResponse as _, Response};
use futures_util::future::join_all;
use http::StatusCode;
use serde::Serialize;
use std::sync::Arc;
use utoipa::{IntoParams, ToSchema};

/// The upstream that a path names.
#[derive(serde::Deserialize, IntoParams)]
#[into_params(parameter_in = Path)]
pub(super) struct UpstreamPath {
    /// The name of the upstream.
    upstream: String,
}

/// The answer of `GET /api/upstreams`.
#[derive(Serialize, ToSchema)]
pub(super) struct UpstreamLimitsList {
    /// In the order of the config.
    upstreams: Vec<UpstreamLimitsView>,
}

/// The limits of an upstream, in the shape of an environment.
#[derive(Serialize, ToSchema)]
pub(super) struct UpstreamLimitsView {
    name: String,
    /// The environments whose requests may go to it.
    environments: Vec<String>,
    /// Requests and streams that are not settled; on all nodes if the counters are shared.
    in_flight: u64,
    /// `null`: no limit.
    max_in_flight: Option<u64>,
    /// Requests that this node has refused in the last minute, because a quota of the upstream had no room.
    refused_last_minute: u64,
    /// Empty: the upstream has no quotas.
    quotas: Vec<QuotaView>,
    /// `null`: the upstream has no limits, so nothing is counted for it.
    totals: Option<TotalsView>,
    /// The state of the shared counters. Absent: the counters belong to this node alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    shared: Option<SharedView>,
}

/// The limits of all upstreams.
#[utoipa::path(get, path = "/api/upstreams", tag = "quotas", responses(
    (status = 200, description = "All upstreams.", body = UpstreamLimitsList),
    ParameterErrors,
    AccessErrors,
))]
pub(super) async fn upstreams(State(admin): State<Admin>, _: NoParameters) -> Response {
    let snapshot = admin.state.current();
    join_all(snapshot.upstream_accounts.iter().flatten().map(|account| account.refresh())).await;
    let names = snapshot.config.upstreams.iter().map(|upstream| upstream.name.as_str());
    let upstreams = names.filter_map(|name| view(&admin, name)).collect();
    Json(UpstreamLimitsList { upstreams }).into_response()
}

/// The limits of one upstream.
#[utoipa::path(get, path = "/api/upstreams/{upstream}", tag = "quotas", params(UpstreamPath), responses(
    (status = 200, description = "The upstream.", body = UpstreamLimitsView),
    ParameterErrors,
    (status = 404, description = "`unknown_upstream`", body = ErrorBody),
    AccessErrors,
))]
pub(super) async fn upstream(
    State(admin): State<Admin>,
    Path(UpstreamPath { upstream: name }): Path<UpstreamPath>,
    _: NoParameters,
) -> Response {
    if let Some((_, Some(account))) = find(&admin, &name) {
        account.refresh().await;
    }
    view(&admin, &name).map_or_else(unknown_upstream, |view| Json(view).into_response())
}

/// The upstream with this name. Without limits it has no account.
pub(super) fn find(admin: &Admin, name: &str) -> Option<(Arc<UpstreamSettings>, Option<Arc<Account>>)> {
    let current = admin.state.current();
    let index = current.config.upstreams.iter().position(|upstream| upstream.name == name)?;
    Some((current.config.upstreams[index].clone(), current.upstream_accounts[index].clone()))
}

pub(super) fn unknown_upstream() -> Response {
    let message = "There is no such upstream. GET /api/upstreams lists all.";
    refusal(StatusCode::NOT_FOUND, "unknown_upstream", message)
}

/// The limits of the upstream with this name. `None`: there is none.
pub(super) fn view(admin: &Admin, name: &str) -> Option<UpstreamLimitsView> {
    let current = admin.state.current();
    let index = current.config.upstreams.iter().position(|upstream| upstream.name == name)?;
    let settings = &current.config.upstreams[index];
    let snapshot = current.upstream_accounts[index].as_ref().map(|account| account.snapshot());
    let refusals = admin.state.rejections.last_minute();
    let uses = |environment: &Environment| {
        let routed = environment.routes.iter().flat_map(|route| &route.upstreams);
        routed.chain([&environment.upstream]).any(|upstream| upstream.name == name)
    };
    let environments = current.config.environments.iter().filter(|environment| uses(environment));
    let at_replicas = || current.replicas[index].iter().map(|replica| replica.view().in_flight).sum();
    Some(UpstreamLimitsView {
        name: name.to_owned(),
        environments: environments.map(|environment| environment.name.clone()).collect(),
        in_flight: snapshot.as_ref().map_or_else(at_replicas, |snapshot| snapshot.in_flight),
        max_in_flight: settings.max_in_flight,
        refused_last_minute: refusals.of_upstream(name),
        quotas: snapshot.as_ref().map(|snapshot| quotas(settings, snapshot, &refusals)).unwrap_or_default(),
        totals: snapshot.as_ref().map(|snapshot| TotalsView::new(&snapshot.totals)),
        shared: snapshot.and_then(|snapshot| snapshot.redis.as_ref().map(SharedView::new)),
    })
}

fn quotas(settings: &UpstreamSettings, snapshot: &Snapshot, refusals: &RefusalCounts) -> Vec<QuotaView> {
    let view = |level: &QuotaLevel| {
        let overridden = snapshot.overrides.of(&level.quota);
        let overridden = overridden.map(|set| OverrideView::new(set, &settings.quotas));
        let source = if overridden.is_some() { "override" } else { "file" };
        let refused = refusals.of_quota("", &level.quota);
        QuotaView::new(level, snapshot.at, refused, Some(source)).overridden_by(overridden)
    };
    snapshot.levels.iter().map(view).collect()
}
