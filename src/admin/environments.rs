//! `GET /api/environments`: the state of every quota.

mod selection;

use super::{Admin, QueryResult, read_query, refusal};
use crate::clock::Timestamp;
use crate::config::Environment;
use crate::ledger::{Account, RedisStatus, Snapshot, Totals};
use crate::quota::{Quota, QuotaLevel, Window};
use axum::extract::{Path, State};
use axum::response::Response;
use futures_util::future::join_all;
use http::StatusCode;
use selection::Selection;
use serde::Serialize;
use std::sync::Arc;
use utoipa::ToSchema;

/// The query parameters of `GET /api/environments`.
#[derive(Default, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct EnvironmentsParameters {
    sort: String,
    limit: String,
    fields: String,
}

/// The answer of `GET /api/environments`.
#[derive(Serialize, ToSchema)]
pub(super) struct EnvironmentList {
    environments: Vec<EnvironmentView>,
}

/// The state of an environment.
#[derive(Serialize, ToSchema)]
pub(super) struct EnvironmentView {
    name: String,
    upstream: String,
    /// Requests and streams that are not settled; on all nodes if the counters are shared.
    in_flight: u64,
    quotas: Vec<QuotaView>,
    /// Number of quotas that `limit` has left out. Absent: none.
    #[serde(skip_serializing_if = "is_zero")]
    quotas_omitted: usize,
    totals: TotalsView,
    /// The state of the shared counters. Absent: the counters belong to this node alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    shared: Option<SharedView>,
}

/// Sums since the store began.
#[derive(Serialize, ToSchema)]
pub(super) struct TotalsView {
    requests: u64,
    rejected: u64,
    prompt_tokens: u64,
    completion_tokens: u64,
    total_tokens: u64,
}

/// The connection of an environment to its shared counters.
#[derive(Serialize, ToSchema)]
pub(super) struct SharedView {
    /// `redis`.
    store: &'static str,
    up: bool,
    /// Nodes that share the counters.
    nodes: u64,
    /// Why this node counts without Redis. `null`: it does not.
    reason: Option<String>,
}

/// The state of a quota. Amounts are tokens or requests, by its kind.
#[derive(Serialize, ToSchema)]
pub(super) struct QuotaView {
    /// `environment`, `caller` or `model`.
    scope: &'static str,
    /// The caller's name or the pattern of the models; `null` for the environment.
    name: Option<String>,
    /// `total_tokens`, `prompt_tokens`, `completion_tokens` or `requests`.
    kind: &'static str,
    /// The period as the config writes it: `minute`, `10s`.
    per: String,
    /// `rolling` or `calendar`.
    window: &'static str,
    limit: u64,
    burst: u64,
    /// What is left; below zero: debt.
    level: i64,
    /// Held by requests in flight.
    held: u64,
    used: u64,
    /// Seconds until the used amount is available again.
    reset_seconds: f64,
    /// The moment at which the used amount is available again (RFC 3339).
    resets_at: String,
    /// Spent per second, on the average of the last 10 minutes.
    rate: f64,
    /// The moment at which nothing is left if `rate` goes on (RFC 3339). `null`: not before the quota resets.
    exhausts_at: Option<String>,
    /// `file` or `override`. Absent in an explanation.
    #[serde(skip_serializing_if = "Option::is_none")]
    source: Option<&'static str>,
}

#[allow(clippy::trivially_copy_pass_by_ref)] // the signature that serde requires
fn is_zero(n: &usize) -> bool {
    *n == 0
}

/// `GET /api/environments`.
pub(super) async fn environments(
    State(admin): State<Admin>,
    query: QueryResult<EnvironmentsParameters>,
) -> Response {
    let selection = match read_query(query).and_then(|parameters| Selection::new(&parameters)) {
        Ok(selection) => selection,
        Err(refusal) => return *refusal,
    };
    let environments = admin.state.current().environments();
    join_all(environments.iter().map(|(_, account)| account.refresh())).await;
    let all =
        environments.iter().map(|(settings, account)| EnvironmentState::of(settings, account)).collect();
    selection.answer(all)
}

/// The environment with this name, and its account.
pub(super) fn find(admin: &Admin, name: &str) -> Option<(Arc<Environment>, Arc<Account>)> {
    let current = admin.state.current();
    let (index, environment) = current.config.environment(name)?;
    Some((environment.clone(), current.accounts[index].clone()))
}

/// `GET /api/environments/{environment}`.
pub(super) async fn environment(
    State(admin): State<Admin>,
    Path(name): Path<String>,
    query: QueryResult<EnvironmentsParameters>,
) -> Response {
    let selection = match read_query(query).and_then(|parameters| Selection::new(&parameters)) {
        Ok(selection) => selection,
        Err(refusal) => return *refusal,
    };
    let Some((environment, account)) = find(&admin, &name) else { return unknown_environment() };
    account.refresh().await;
    selection.answer_one(EnvironmentState::of(&environment, &account))
}

pub(super) fn unknown_environment() -> Response {
    refusal(
        StatusCode::NOT_FOUND,
        "unknown_environment",
        "There is no such environment. GET /api/environments lists all.",
    )
}

/// The state of an environment, as its answer.
pub(super) fn environment_view(environment: &Arc<Environment>, account: &Account) -> EnvironmentView {
    EnvironmentState::of(environment, account).view()
}

/// An environment with a snapshot of its counters.
struct EnvironmentState {
    settings: Arc<Environment>,
    snapshot: Snapshot,
}

impl EnvironmentState {
    fn of(settings: &Arc<Environment>, account: &Account) -> Self {
        Self { settings: settings.clone(), snapshot: account.snapshot() }
    }

    /// Each quota in the order of the levels, with the share that is used or held.
    fn shares(&self) -> impl Iterator<Item = f64> {
        self.snapshot.levels.iter().map(used_share)
    }

    fn view(&self) -> EnvironmentView {
        let order: Vec<usize> = (0..self.snapshot.levels.len()).collect();
        self.view_of(&order)
    }

    /// The answer with the quotas at these indices of the levels.
    fn view_of(&self, quotas: &[usize]) -> EnvironmentView {
        let Snapshot { at, in_flight, redis, levels, totals, overrides } = &self.snapshot;
        let source = |quota: &Quota| {
            if overrides.iter().any(|other| other.is_same_as(quota)) { "override" } else { "file" }
        };
        let view = |&index: &usize| {
            let level = levels.get(index)?;
            Some(QuotaView::new(level, *at, Some(source(&level.quota))))
        };
        EnvironmentView {
            name: self.settings.name.clone(),
            upstream: self.settings.upstream.name.clone(),
            in_flight: *in_flight,
            quotas: quotas.iter().filter_map(view).collect(),
            quotas_omitted: levels.len().saturating_sub(quotas.len()),
            totals: TotalsView::new(totals),
            shared: redis.as_ref().map(SharedView::new),
        }
    }
}

/// The share of a quota that is used or held: more than 1 with debt.
#[allow(clippy::cast_precision_loss)] // compared, not counted
fn used_share(level: &QuotaLevel) -> f64 {
    let capacity = level.quota.capacity().max(1);
    (i128::from(capacity) - i128::from(level.level)) as f64 / capacity as f64
}

impl TotalsView {
    fn new(totals: &Totals) -> Self {
        let Totals { requests, rejected, prompt, completion, total } = *totals;
        Self { requests, rejected, prompt_tokens: prompt, completion_tokens: completion, total_tokens: total }
    }
}

impl SharedView {
    fn new(status: &RedisStatus) -> Self {
        let RedisStatus { unavailable_reason, nodes, .. } = status;
        let reason = unavailable_reason.clone();
        Self { store: "redis", up: reason.is_none(), nodes: *nodes, reason }
    }
}

impl QuotaView {
    /// `at`: when the level was read. `source`: where the limit comes from; `None`: the answer does not contain it.
    pub(super) fn new(level: &QuotaLevel, at: Timestamp, source: Option<&'static str>) -> Self {
        let quota = &level.quota;
        let window = match quota.window {
            Window::Rolling { .. } => "rolling",
            Window::Calendar { .. } => "calendar",
        };
        #[allow(clippy::cast_precision_loss)] // exact below 285,000 years
        let reset_seconds = level.reset_ms as f64 / 1_000.0;
        Self {
            scope: quota.scope.as_str(),
            name: Some(quota.scope.name().to_owned()).filter(|name| !name.is_empty()),
            kind: quota.kind.as_str(),
            per: quota.per.text.clone(),
            window,
            limit: quota.limit,
            burst: quota.capacity(),
            level: level.level,
            held: level.held,
            used: level.used,
            reset_seconds,
            resets_at: at.plus_ms(level.reset_ms).to_rfc3339(),
            rate: level.rate(),
            exhausts_at: level.exhausted_in_ms().map(|ms| at.plus_ms(ms).to_rfc3339()),
            source,
        }
    }
}
