//! `GET /api/system`: the gateway itself, its config, store, Redis and upstreams, and the error of estimates.

use super::Admin;
use super::answers::{AccessErrors, NoParameters, ParameterErrors};
use super::events::ConfigState;
use crate::clock::{self, Stopwatch, Timestamp};
use crate::config::{OnStoreFailure, ProviderLimitsMode, UpstreamSettings};
use crate::ledger::RedisStatus;
use crate::provider_limits::{KindView, ModelView, ProviderLimits};
use crate::proxy::Snapshot;
use crate::telemetry::{EstimateFigures, UpstreamFigures};
use crate::upstream::{ReplicaView, Replicas};
use axum::Json;
use axum::extract::State;
use http::uri::Authority;
use serde::Serialize;
use std::net::SocketAddr;
use std::sync::Arc;
use utoipa::ToSchema;

/// Facts that stay the same while the process runs.
#[derive(Clone, Copy, Debug)]
pub(super) struct Process {
    started: Stopwatch,
    started_at: Timestamp,
    /// The address of the listener for callers.
    listen: SocketAddr,
}

impl Process {
    /// The facts about a process that starts now.
    pub(super) fn new(listen: SocketAddr) -> Self {
        Self { started: Stopwatch::start(), started_at: clock::now(), listen }
    }
}

/// The answer of `GET /api/system`.
#[derive(Serialize, ToSchema)]
pub(super) struct SystemView {
    /// The version of Tollgate.
    version: &'static str,
    /// When the process started (RFC 3339).
    started_at: String,
    uptime_seconds: u64,
    /// The address of the listener for callers.
    listen: String,
    /// Whether the listener for callers expects TLS.
    tls: bool,
    /// Requests and streams of this node that are not settled.
    in_flight: u64,
    /// Whether the gateway shuts down.
    draining: bool,
    config: ConfigView,
    store: StoreView,
    /// The shared counters. `null`: the counters belong to this node alone.
    redis: Option<RedisView>,
    /// In the order of the config.
    upstreams: Vec<UpstreamView>,
    /// By model, since the process started.
    estimates: Vec<EstimateErrorView>,
}

/// The config file.
#[derive(Serialize, ToSchema)]
struct ConfigView {
    /// `null`: there is no file.
    file: Option<String>,
    #[serde(flatten)]
    state: ConfigState,
}

/// The store.
#[derive(Serialize, ToSchema)]
struct StoreView {
    /// `sqlite` or `memory`.
    kind: &'static str,
    /// `null`: nothing is stored.
    path: Option<String>,
    /// Whether it can be written.
    up: bool,
    /// Why it cannot be written.
    reason: Option<String>,
}

/// The counters that nodes share.
#[derive(Serialize, ToSchema)]
struct RedisView {
    /// Whether all environments are connected.
    up: bool,
    /// Nodes that share the counters.
    nodes: u64,
    /// `local`, `closed` or `open`.
    on_failure: &'static str,
    /// Why environments are not connected, each reason once.
    reasons: Vec<String>,
    /// Settings of the server that are wrong for quotas, each once.
    faults: Vec<String>,
    /// How often this node has lost the connection, the largest number of an environment.
    losses: u64,
}

/// An upstream. All figures are of this node, since the process started.
#[derive(Serialize, ToSchema)]
struct UpstreamView {
    name: String,
    /// Without user name and password.
    base_url: String,
    /// Requests of its environments that are not settled.
    in_flight: u64,
    /// Requests sent to it.
    requests: u64,
    errors: UpstreamErrorsView,
    /// Milliseconds to the head of the answer, of the last 512 answers. `null`: it has not answered yet.
    first_byte_ms: Option<FirstByteView>,
    provider_limits: ProviderLimitsView,
    /// In the order of the config. An upstream with `base_url` has one.
    replicas: Vec<UpstreamReplicaView>,
}

/// A replica of an upstream.
#[derive(Serialize, ToSchema)]
struct UpstreamReplicaView {
    /// Host and port, as in the label `replica` of metrics.
    address: String,
    /// Whether requests go to it.
    up: bool,
    /// Milliseconds until a request tries it again, if it could not be reached. `null`: it is not left out for that.
    left_out_ms: Option<u64>,
    /// Whether it has passed its last health check. `null`: it is not checked.
    healthy: Option<bool>,
    /// Requests in flight.
    in_flight: u64,
    /// How often it could not be reached.
    failures: u64,
    failed_checks: u64,
    /// Connections that carry a request.
    active_connections: u64,
    idle_connections: u64,
}

/// What the provider states about its own limits (`provider_limits`).
#[derive(Serialize, ToSchema)]
struct ProviderLimitsView {
    /// `follow`, `observe` or `ignore`.
    mode: &'static str,
    /// Stated values that could not be true, since the process started.
    ignored_values: u64,
    models: Vec<ProviderModelView>,
}

/// What the provider states about one model.
#[derive(Serialize, ToSchema)]
struct ProviderModelView {
    /// The name that goes to the upstream.
    model: String,
    /// Answers with status 429, 503 or 529, since the process started.
    refusals: u64,
    /// Milliseconds for which no request of this model is sent. `null`: requests are sent.
    closed_ms: Option<u64>,
    /// Kinds that are ignored because the provider's own answers contradict them.
    ignored_kinds: usize,
    limits: Vec<ProviderLimitView>,
}

/// One limit, as the provider stated it last.
#[derive(Serialize, ToSchema)]
struct ProviderLimitView {
    /// `total_tokens`, `prompt_tokens`, `completion_tokens` or `requests`.
    kind: &'static str,
    limit: Option<u64>,
    remaining: Option<u64>,
    /// Milliseconds until the provider has all of the limit again.
    reset_ms: Option<u64>,
}

/// Requests to an upstream that failed.
#[derive(Serialize, ToSchema)]
struct UpstreamErrorsView {
    /// Answers with a status of 400 or more.
    answers: u64,
    /// Requests without an answer: unreachable, or too slow.
    unanswered: u64,
    /// Answers that ended before they were complete.
    incomplete: u64,
}

/// Times to the first byte in milliseconds.
#[derive(Serialize, ToSchema)]
struct FirstByteView {
    p50: u32,
    p95: u32,
    /// Number of answers.
    answers: usize,
}

/// The error of prompt estimates for a model.
#[derive(Serialize, ToSchema)]
struct EstimateErrorView {
    /// As in the label `model` of metrics.
    model: String,
    /// Answers that reported their prompt tokens.
    answers: u64,
    /// Estimated prompt tokens divided by the reported ones.
    ratio: f64,
    /// The sum of the absolute differences, divided by the reported prompt tokens.
    mean_error: f64,
}

/// This node: its config, store, Redis and upstreams, and the error of estimates.
#[utoipa::path(get, path = "/api/system", tag = "config", responses(
    (status = 200, description = "The node.", body = SystemView),
    ParameterErrors,
    AccessErrors,
))]
pub(super) async fn system(State(admin): State<Admin>, _: NoParameters) -> Json<SystemView> {
    let snapshot = admin.state.current();
    let Process { started, started_at, listen } = admin.process;
    let upstream =
        |((settings, limits), replicas): ((&Arc<UpstreamSettings>, &Arc<ProviderLimits>), &Replicas)| {
            // An environment may use several upstreams.
            let in_flight = replicas.iter().map(|replica| replica.in_flight()).sum();
            let figures = admin.state.metrics.summaries().upstream(&settings.name).figures();
            UpstreamView::new(settings, in_flight, figures, limits, replicas)
        };
    let upstreams = snapshot.config.upstreams.iter().zip(&snapshot.provider_limits).zip(&snapshot.replicas);
    let estimates = admin.state.metrics.summaries().models();
    Json(SystemView {
        version: env!("CARGO_PKG_VERSION"),
        started_at: started_at.to_rfc3339(),
        uptime_seconds: started.elapsed().as_secs(),
        listen: listen.to_string(),
        tls: snapshot.config.server.tls.is_some(),
        in_flight: admin.state.in_flight(),
        draining: admin.state.is_closing(),
        config: ConfigView {
            file: snapshot.config.file.as_ref().map(|file| file.display().to_string()),
            state: ConfigState::of(&admin),
        },
        store: StoreView::of(&admin, &snapshot),
        redis: RedisView::of(&snapshot),
        upstreams: upstreams.map(upstream).collect(),
        estimates: estimates.into_iter().map(EstimateErrorView::from).collect(),
    })
}

impl StoreView {
    fn of(admin: &Admin, snapshot: &Snapshot) -> Self {
        let settings = &snapshot.config.store;
        let reason = admin.state.store_failure();
        let path = (!settings.memory).then(|| settings.path.display().to_string());
        let kind = if settings.memory { "memory" } else { "sqlite" };
        Self { kind, path, up: reason.is_none(), reason }
    }
}

impl RedisView {
    fn of(snapshot: &Snapshot) -> Option<Self> {
        let on_failure = match snapshot.config.store.redis.as_ref()?.on_failure {
            OnStoreFailure::Local => "local",
            OnStoreFailure::Closed => "closed",
            OnStoreFailure::Open => "open",
        };
        let mut view =
            Self { up: true, nodes: 0, on_failure, reasons: Vec::new(), faults: Vec::new(), losses: 0 };
        for status in snapshot.accounts.iter().filter_map(|account| account.redis_status()) {
            let RedisStatus { unavailable_reason, nodes, losses, server_faults } = status;
            view.up &= unavailable_reason.is_none();
            view.nodes = view.nodes.max(nodes);
            view.losses = view.losses.max(losses);
            view.reasons.extend(unavailable_reason);
            view.faults.extend(server_faults);
        }
        for texts in [&mut view.reasons, &mut view.faults] {
            texts.sort_unstable();
            texts.dedup();
        }
        Some(view)
    }
}

impl UpstreamView {
    fn new(
        settings: &UpstreamSettings,
        in_flight: u64,
        figures: UpstreamFigures,
        limits: &ProviderLimits,
        replicas: &Replicas,
    ) -> Self {
        let UpstreamSettings { name, base_url, health, .. } = settings;
        let UpstreamFigures { requests, error_answers, failed, cut, timed, first_byte_ms } = figures;
        let authority = base_url.authority().map(Authority::as_str).unwrap_or_default();
        let address = authority.rsplit('@').next().unwrap_or_default();
        let scheme = base_url.scheme_str().unwrap_or("http");
        Self {
            name: name.clone(),
            base_url: format!("{scheme}://{address}{}", base_url.path()),
            in_flight,
            requests,
            errors: UpstreamErrorsView { answers: error_answers, unanswered: failed, incomplete: cut },
            first_byte_ms: first_byte_ms.map(|(p50, p95)| FirstByteView { p50, p95, answers: timed }),
            provider_limits: ProviderLimitsView::of(settings.provider_limits, limits),
            replicas: replicas.iter().map(|r| UpstreamReplicaView::of(r.view(), health.is_some())).collect(),
        }
    }
}

impl UpstreamReplicaView {
    fn of(view: ReplicaView<'_>, is_checked: bool) -> Self {
        Self {
            address: view.address.to_owned(),
            up: view.is_up(),
            left_out_ms: view.left_out_ms,
            healthy: is_checked.then_some(!view.is_unhealthy),
            in_flight: view.in_flight,
            failures: view.failures,
            failed_checks: view.failed_checks,
            active_connections: view.active_connections,
            idle_connections: view.idle_connections,
        }
    }
}

impl ProviderLimitsView {
    fn of(mode: ProviderLimitsMode, limits: &ProviderLimits) -> Self {
        let mode = match mode {
            ProviderLimitsMode::Follow => "follow",
            ProviderLimitsMode::Observe => "observe",
            ProviderLimitsMode::Ignore => "ignore",
        };
        let models = limits.view().into_iter().map(ProviderModelView::from).collect();
        Self { mode, ignored_values: limits.ignored(), models }
    }
}

impl From<ModelView> for ProviderModelView {
    fn from(view: ModelView) -> Self {
        let ModelView { model, kinds, closed_ms, refusals, ignored_kinds } = view;
        let limit = |view: KindView| {
            let KindView { kind, limit, remaining, reset_ms } = view;
            ProviderLimitView { kind: kind.as_str(), limit, remaining, reset_ms }
        };
        Self { model, refusals, closed_ms, ignored_kinds, limits: kinds.into_iter().map(limit).collect() }
    }
}

impl From<(String, EstimateFigures)> for EstimateErrorView {
    #[allow(clippy::cast_precision_loss)] // for display
    fn from((model, figures): (String, EstimateFigures)) -> Self {
        let EstimateFigures { answers, estimated, reported, error } = figures;
        let of_reported = |tokens: u64| tokens as f64 / reported.max(1) as f64;
        Self { model, answers, ratio: of_reported(estimated), mean_error: of_reported(error) }
    }
}
