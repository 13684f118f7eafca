//! `GET /api/environments`: the state of every quota.

mod selection;

use super::Admin;
use super::answers::{AccessErrors, ErrorBody, QueryResult, read_query, refusal};
use super::origins::{OriginView, OverrideView};
use crate::clock::Timestamp;
use crate::config::Environment;
use crate::ledger::{Account, RedisStatus, Snapshot, Totals};
use crate::quota::{QuotaLevel, Window};
use crate::telemetry::RefusalCounts;
use axum::extract::{Path, State};
use axum::response::Response;
use futures_util::future::join_all;
use http::StatusCode;
use selection::Selection;
use serde::Serialize;
use std::sync::Arc;
use utoipa::{IntoParams, ToSchema};

/// The environment that a path names.
#[derive(serde::Deserialize, IntoParams)]
#[into_params(parameter_in = Path)]
pub(super) struct EnvironmentPath {
    /// The name of the environment.
    pub(super) environment: String,
}

/// The query parameters of `GET /api/environments`.
#[derive(Default, serde::Deserialize, IntoParams)]
#[serde(deny_unknown_fields, default)]
#[into_params(parameter_in = Query)]
pub(super) struct EnvironmentsParameters {
    /// `used`: the most used first. Default: the order of the config.
    sort: String,
    /// Only the first N environments, with at most 400 quotas.
    limit: String,
    /// Only these fields, separated by commas: `name,quotas.level`.
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
    /// Requests that this node has refused in the last minute.
    refused_last_minute: u64,
    quotas: Vec<QuotaView>,
    /// Number of quotas that `limit` has omitted. Absent: none.
    #[serde(skip_serializing_if = "is_zero")]
    quotas_omitted: usize,
    totals: TotalsView,
    /// Whether quotas are enforced now; `false`: shadow mode.
    enforce: bool,
    /// How `enforce` was set. Absent: the value of the file is in force.
    #[serde(skip_serializing_if = "Option::is_none")]
    enforce_override: Option<OriginView>,
    /// The state of the shared counters. Absent: the counters belong to this node alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    shared: Option<SharedView>,
}

/// An environment that has changed.
#[derive(Serialize, ToSchema)]
pub(super) struct EnvironmentChange {
    /// Whether `quotas` has all quotas, and replaces those before. If not, it has those that have changed.
    complete: bool,
    #[serde(flatten)]
    environment: EnvironmentView,
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
    /// `environment`, `caller`, `model`, `upstream` or `upstream_model`.
    scope: &'static str,
    /// The caller's name, the pattern of the models, the upstream's name, or `openai/gpt-4.1*`; `null` for the environment.
    name: Option<String>,
    /// `total_tokens`, `prompt_tokens`, `completion_tokens` or `requests`.
    kind: &'static str,
    /// The period as the config writes it: `minute`, `10s`.
    per: String,
    /// `rolling` or `calendar`.
    window: &'static str,
    /// The time zone of a calendar quota; `null` for a rolling one.
    timezone: Option<String>,
    /// `null`: unlimited.
    limit: Option<u64>,
    /// `null`: unlimited.
    burst: Option<u64>,
    /// The remaining amount; negative: debt; `null`: unlimited.
    level: Option<i64>,
    /// Whether the quota only counts and refuses nothing.
    unlimited: bool,
    /// Held by requests in flight.
    held: u64,
    used: u64,
    /// Seconds until the used amount is available again.
    reset_seconds: f64,
    /// The moment at which the used amount is available again (RFC 3339).
    resets_at: String,
    /// Spent per second, on the average of the last 10 minutes, or since the counter began (a minute at least).
    rate: f64,
    /// The moment at which nothing is left at the present `rate` (RFC 3339). `null`: not before the quota resets.
    exhausts_at: Option<String>,
    /// Requests that this node has refused in the last minute, because this quota had no room.
    refused_last_minute: u64,
    /// `file` or `override`. Absent in an explanation.
    #[serde(skip_serializing_if = "Option::is_none")]
    source: Option<&'static str>,
    /// How the limit was set. Absent: the limit of the file is in force.
    #[serde(skip_serializing_if = "Option::is_none", rename = "override")]
    overridden: Option<OverrideView>,
}

#[allow(clippy::trivially_copy_pass_by_ref)] // the signature that serde requires
fn is_zero(n: &usize) -> bool {
    *n == 0
}

/// The state of all environments and their quotas.
#[utoipa::path(get, path = "/api/environments", tag = "quotas", params(EnvironmentsParameters), responses(
    (status = 200, description = "All environments. With `fields`: only these fields.", body = EnvironmentList),
    (status = 400, description = "`invalid_value`: a parameter is not valid.", body = ErrorBody),
    AccessErrors,
))]
pub(super) async fn environments(
    State(admin): State<Admin>,
    query: QueryResult<EnvironmentsParameters>,
) -> Response {
    let selection = match read_query(query).and_then(|parameters| Selection::new(&parameters)) {
        Ok(selection) => selection,
        Err(refusal) => return *refusal,
    };
    selection.answer(EnvironmentState::of_all(&admin).await)
}

/// The environment with this name, and its account.
pub(super) fn find(admin: &Admin, name: &str) -> Option<(Arc<Environment>, Arc<Account>)> {
    let current = admin.state.current();
    let (index, environment) = current.config.environment(name)?;
    Some((environment.clone(), current.accounts[index].clone()))
}

/// The state of one environment and its quotas.
#[utoipa::path(
    get,
    path = "/api/environments/{environment}",
    tag = "quotas",
    params(EnvironmentPath, EnvironmentsParameters),
    responses(
        (status = 200, description = "The environment. With `fields`: only these fields.", body = EnvironmentView),
        (status = 400, description = "`invalid_value`: a parameter is not valid.", body = ErrorBody),
        (status = 404, description = "`unknown_environment`", body = ErrorBody),
        AccessErrors,
    )
)]
pub(super) async fn environment(
    State(admin): State<Admin>,
    Path(EnvironmentPath { environment: name }): Path<EnvironmentPath>,
    query: QueryResult<EnvironmentsParameters>,
) -> Response {
    let selection = match read_query(query).and_then(|parameters| Selection::new(&parameters)) {
        Ok(selection) => selection,
        Err(refusal) => return *refusal,
    };
    let Some((environment, account)) = find(&admin, &name) else { return unknown_environment() };
    account.refresh().await;
    selection.answer_one(EnvironmentState::of(&admin, &environment, &account))
}

pub(super) fn unknown_environment() -> Response {
    refusal(
        StatusCode::NOT_FOUND,
        "unknown_environment",
        "There is no such environment. GET /api/environments lists all.",
    )
}

/// The state of an environment, as its answer.
pub(super) fn environment_view(
    admin: &Admin,
    environment: &Arc<Environment>,
    account: &Account,
) -> EnvironmentView {
    EnvironmentState::of(admin, environment, account).view()
}

/// An environment with a snapshot of its counters.
pub(super) struct EnvironmentState {
    settings: Arc<Environment>,
    snapshot: Snapshot,
    /// Requests refused in the last minute.
    refused: u64,
    /// The same for each quota of the snapshot.
    refused_by_quota: Vec<u64>,
}

impl EnvironmentState {
    /// The present state of all environments, in the order of the config.
    pub(super) async fn of_all(admin: &Admin) -> Vec<Self> {
        let environments = admin.state.current().environments();
        join_all(environments.iter().map(|(_, account)| account.refresh())).await;
        let refusals = admin.state.rejections.last_minute();
        environments.iter().map(|(settings, account)| Self::with(settings, account, &refusals)).collect()
    }

    fn of(admin: &Admin, settings: &Arc<Environment>, account: &Account) -> Self {
        Self::with(settings, account, &admin.state.rejections.last_minute())
    }

    fn with(settings: &Arc<Environment>, account: &Account, refusals: &RefusalCounts) -> Self {
        let snapshot = account.snapshot();
        let refused = refusals.of_environment(&settings.name);
        let of_quota = |level: &QuotaLevel| refusals.of_quota(&settings.name, &level.quota);
        let refused_by_quota = snapshot.levels.iter().map(of_quota).collect();
        Self { settings: settings.clone(), snapshot, refused, refused_by_quota }
    }

    pub(super) fn name(&self) -> &str {
        &self.settings.name
    }

    /// The change that adds this environment.
    pub(super) fn as_new(&self) -> EnvironmentChange {
        EnvironmentChange { complete: true, environment: self.view() }
    }

    /// The changes since an earlier state of this environment. `None`: nothing has changed.
    pub(super) fn change_since(&self, before: &Self) -> Option<EnvironmentChange> {
        let (now, then) = (&self.snapshot, &before.snapshot);
        let has_same_quotas = now.levels.len() == then.levels.len()
            && now.levels.iter().zip(&then.levels).all(|(a, b)| a.quota.is_same_as(&b.quota));
        if !Arc::ptr_eq(&self.settings, &before.settings)
            || !has_same_quotas
            || now.overrides != then.overrides
        {
            return Some(self.as_new());
        }
        let is_changed = |&index: &usize| {
            let levels = now.levels.get(index).zip(then.levels.get(index));
            levels.is_some_and(|(now, then)| !is_same_level(now, then))
                || self.refused_by_quota.get(index) != before.refused_by_quota.get(index)
        };
        let changed: Vec<usize> = (0..now.levels.len()).filter(is_changed).collect();
        let is_same = (now.in_flight, &now.totals, &now.redis, self.refused)
            == (then.in_flight, &then.totals, &then.redis, before.refused);
        if changed.is_empty() && is_same {
            return None;
        }
        let environment = EnvironmentView { quotas_omitted: 0, ..self.view_of(&changed) };
        Some(EnvironmentChange { complete: false, environment })
    }

    /// Each quota in the order of the levels, with the share that is used or held.
    fn shares(&self) -> impl Iterator<Item = f64> {
        self.snapshot.levels.iter().map(used_share)
    }

    /// The whole answer.
    pub(super) fn view(&self) -> EnvironmentView {
        let order: Vec<usize> = (0..self.snapshot.levels.len()).collect();
        self.view_of(&order)
    }

    /// The answer with the quotas at these indices of the levels.
    fn view_of(&self, quotas: &[usize]) -> EnvironmentView {
        let Snapshot { at, in_flight, redis, levels, totals, overrides, .. } = &self.snapshot;
        let configured = self.settings.counted_quotas();
        let view = |&index: &usize| {
            let level = levels.get(index)?;
            let refused = self.refused_by_quota.get(index).copied().unwrap_or(0);
            let overridden = overrides.of(&level.quota).map(|set| OverrideView::new(set, &configured));
            let source = if overridden.is_some() { "override" } else { "file" };
            Some(QuotaView::new(level, *at, refused, Some(source)).overridden_by(overridden))
        };
        EnvironmentView {
            name: self.settings.name.clone(),
            upstream: self.settings.upstream.name.clone(),
            in_flight: *in_flight,
            refused_last_minute: self.refused,
            quotas: quotas.iter().filter_map(view).collect(),
            quotas_omitted: levels.len().saturating_sub(quotas.len()),
            totals: TotalsView::new(totals),
            enforce: overrides.enforce.as_ref().map_or(self.settings.enforce, |other| other.enforce),
            enforce_override: overrides.enforce.as_ref().map(|other| OriginView::new(&other.origin)),
            shared: redis.as_ref().map(SharedView::new),
        }
    }
}

/// Whether a quota is unchanged. Times do not count: they follow from the other fields.
fn is_same_level(a: &QuotaLevel, b: &QuotaLevel) -> bool {
    let amounts = |level: &QuotaLevel| (level.level, level.held, level.used, level.spent_recently);
    // The rate of a young counter falls while nothing is spent.
    let minutes = |level: &QuotaLevel| if level.spent_recently == 0 { 0 } else { level.measured_ms / 60_000 };
    amounts(a) == amounts(b) && minutes(a) == minutes(b) && a.quota == b.quota
}

/// The share of a quota that is used or held: more than 1 with debt.
#[allow(clippy::cast_precision_loss)] // compared, not counted
fn used_share(level: &QuotaLevel) -> f64 {
    if level.quota.is_unlimited() {
        return 0.0;
    }
    let capacity = level.quota.capacity().max(1);
    (i128::from(capacity) - i128::from(level.level)) as f64 / capacity as f64
}

impl TotalsView {
    pub(super) fn new(totals: &Totals) -> Self {
        let Totals { requests, rejected, prompt, completion, total } = *totals;
        Self { requests, rejected, prompt_tokens: prompt, completion_tokens: completion, total_tokens: total }
    }
}

impl SharedView {
    pub(super) fn new(status: &RedisStatus) -> Self {
        let RedisStatus { unavailable_reason, nodes, .. } = status;
        let reason = unavailable_reason.clone();
        Self { store: "redis", up: reason.is_none(), nodes: *nodes, reason }
    }
}

impl QuotaView {
    /// The same quota, with how its limit was set.
    pub(super) fn overridden_by(self, overridden: Option<OverrideView>) -> Self {
        Self { overridden, ..self }
    }

    /// `at`: when the level was read. `source`: where the limit comes from; `None`: the answer does not contain it.
    pub(super) fn new(
        level: &QuotaLevel,
        at: Timestamp,
        refused_last_minute: u64,
        source: Option<&'static str>,
    ) -> Self {
        let quota = &level.quota;
        let is_limited = !quota.is_unlimited();
        let (window, timezone) = match &quota.window {
            Window::Rolling { .. } => ("rolling", None),
            Window::Calendar { zone, .. } => ("calendar", Some(zone.iana_name().unwrap_or("UTC").to_owned())),
        };
        #[allow(clippy::cast_precision_loss)] // exact below 285,000 years
        let reset_seconds = level.reset_ms as f64 / 1_000.0;
        Self {
            scope: quota.scope.as_str(),
            name: Some(quota.scope.name().to_owned()).filter(|name| !name.is_empty()),
            kind: quota.kind.as_str(),
            per: quota.per.text.clone(),
            window,
            timezone,
            limit: is_limited.then_some(quota.limit),
            burst: is_limited.then(|| quota.capacity()),
            level: is_limited.then_some(level.level),
            unlimited: !is_limited,
            held: level.held,
            used: level.used,
            reset_seconds,
            resets_at: at.plus_ms(level.reset_ms).to_rfc3339(),
            rate: level.rate(),
            exhausts_at: level.exhausted_in_ms().map(|ms| at.plus_ms(ms).to_rfc3339()),
            refused_last_minute,
            source,
            overridden: None,
        }
    }
}
