//! The names, labels and buckets of all metrics, and one function for each event.

use super::Record;
use super::series::{Series, SeriesMetrics};
use super::summaries::Summaries;
use crate::clock::Timestamp;
use crate::config::Environment;
use crate::estimate::{Encoding, EstimateSource, PromptEstimate, Tokenizer};
use crate::ledger::Account;
use crate::quota::{Scope, Shortfall};
use prometheus::{
    Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
    TextEncoder,
};
use std::sync::Arc;

/// All metrics of one gateway.
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    reload_failures: IntCounter,
    last_reload: IntGauge,
    series: SeriesMetrics,
    rejections: IntCounterVec,
    usage_missing: IntCounterVec,
    overhead: Histogram,
    first_byte: Histogram,
    store_up: IntGauge,
    quotas: QuotaMetrics,
    estimates: EstimateMetrics,
    redis: RedisMetrics,
}

/// The state of an environment's quotas and requests. [`Metrics::render`] sets them.
#[derive(Debug)]
struct QuotaMetrics {
    limit: IntGaugeVec,
    level: IntGaugeVec,
    held: IntGaugeVec,
    in_flight: IntGaugeVec,
}

/// Prompt estimates and their errors.
#[derive(Debug)]
struct EstimateMetrics {
    /// By the source of the estimate, in the order of `EstimateSource::ALL`.
    ratios: [Histogram; EstimateSource::ALL.len()],
    raw_ratio: Histogram,
    /// Indexed by tokenizer and coverage.
    counts: Box<[IntCounter]>,
}

/// The state of the counters that are shared through Redis. [`Metrics::render`] sets them.
#[derive(Debug)]
struct RedisMetrics {
    up: IntGaugeVec,
    nodes: IntGaugeVec,
    faults: IntGaugeVec,
    losses: IntGaugeVec,
}

impl Metrics {
    /// Registers every metric.
    ///
    /// # Errors
    /// Two metrics have the same name. That is a mistake in this file, which every test detects.
    pub(crate) fn new() -> prometheus::Result<Self> {
        let r = Registry::new();
        Ok(Self {
            reload_failures: register(
                &r,
                IntCounter::new(
                    "tollgate_config_reload_failures_total",
                    "Reloads that failed because the new config was invalid.",
                )?,
            )?,
            last_reload: register(
                &r,
                IntGauge::new(
                    "tollgate_config_last_reload_success_timestamp_seconds",
                    "When the config in force was loaded, in seconds since the Unix epoch.",
                )?,
            )?,
            series: series_metrics(&r)?,
            rejections: counters(
                &r,
                "tollgate_rejections_total",
                "Requests that a quota or limit denied; shadow=\"true\": denials that were not enforced.",
                &["environment", "code", "scope", "kind", "per", "shadow"],
            )?,
            usage_missing: counters(
                &r,
                "tollgate_usage_missing_total",
                "Answers without credible usage, which the gateway charged by its own count.",
                &["environment", "reason"],
            )?,
            overhead: histogram(
                &r,
                "tollgate_overhead_seconds",
                "Time the gateway itself uses per request: reading, counting, reserving, preparing the answer.",
                &[0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.05, 0.25],
            )?,
            first_byte: histogram(
                &r,
                "tollgate_upstream_first_byte_seconds",
                "Time from the end of the request to the head of the upstream's answer.",
                &[0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0],
            )?,
            store_up: register(
                &r,
                IntGauge::new(
                    "tollgate_store_up",
                    "1 while the store can be written, so that counters are durable.",
                )?,
            )?,
            quotas: QuotaMetrics::new(&r)?,
            estimates: EstimateMetrics::new(&r)?,
            redis: RedisMetrics::new(&r)?,
            registry: r,
        })
    }

    /// Records that a config was loaded.
    pub(crate) fn config_loaded(&self, now: Timestamp) {
        self.last_reload.set(now.0 / 1_000);
    }

    /// Figures that the admin API shows.
    pub(crate) fn summaries(&self) -> &Summaries {
        &self.series.summaries
    }

    /// When the config in force was loaded, to the second.
    pub(crate) fn loaded_at(&self) -> Timestamp {
        Timestamp(self.last_reload.get().saturating_mul(1_000))
    }

    /// Counts a reload that was refused.
    pub(crate) fn reload_failed(&self) {
        self.reload_failures.inc();
    }

    /// Counts a request that has ended.
    pub(super) fn request(&self, record: &Record) {
        match &record.series {
            Some(series) => series.count(&self.series, record),
            None => self.series.requests.with_label_values(&["", record.api, record.outcome.as_str()]).inc(),
        }
        if let Some(first_byte) = record.first_byte {
            self.first_byte.observe(first_byte.as_secs_f64());
        }
        if let Some(overhead) = record.overhead {
            self.overhead.observe(overhead.as_secs_f64());
        }
        if record.has_reported_prompt() {
            #[allow(clippy::cast_precision_loss)] // ratios for a histogram
            let [reserved, counted, reported] =
                [record.estimated_prompt, record.raw_estimate, record.reported_prompt].map(|n| n as f64);
            self.estimates.ratios[record.estimate_source as usize].observe(reserved / reported);
            self.estimates.raw_ratio.observe(counted / reported);
        }
    }

    /// Counts a denial by a quota or limit. `shadow`: the environment does not enforce its quotas.
    pub(crate) fn rejected(&self, environment: &str, code: &str, worst: Option<&Shortfall>, shadow: bool) {
        // A denial without a quota is one of the whole environment.
        let (scope, kind, per) = worst.map_or(("environment", "", ""), |s| {
            (s.quota.scope.as_str(), s.quota.kind.as_str(), s.quota.per.text.as_str())
        });
        let shadow = if shadow { "true" } else { "" };
        self.rejections.with_label_values(&[environment, code, scope, kind, per, shadow]).inc();
    }

    /// Counts a prompt estimate.
    pub(crate) fn estimated(&self, tokenizer: Tokenizer, estimate: &PromptEstimate) {
        let tokenizer = match (tokenizer.encoding, estimate.is_known_model) {
            (Encoding::File(_), _) => 2,
            (_, false) => 4,
            _ if tokenizer.percent != 100 => 3,
            (Encoding::O200k, _) => 0,
            (Encoding::Cl100k, _) => 1,
        };
        let coverage = if estimate.is_rough { 2 } else { usize::from(estimate.is_partial) };
        if let Some(counter) = self.estimates.counts.get(tokenizer * COVERAGE.len() + coverage) {
            counter.inc();
        }
    }

    /// Counts an answer without credible usage.
    pub(crate) fn usage_missing(&self, environment: &str, reason: &str) {
        self.usage_missing.with_label_values(&[environment, reason]).inc();
    }

    /// Returns all metrics in Prometheus's text format, with the current levels of these accounts.
    ///
    /// # Errors
    /// A metric cannot be encoded as text.
    pub(crate) fn render(
        &self,
        accounts: &[(Arc<Environment>, Arc<Account>)],
        store_is_up: bool,
    ) -> prometheus::Result<String> {
        self.store_up.set(i64::from(store_is_up));
        // Without this, quotas and environments that a reload has removed would stay.
        self.quotas.clear();
        self.redis.clear();
        for (environment, account) in accounts {
            let name = environment.name.as_str();
            let snapshot = account.snapshot();
            self.quotas.in_flight.with_label_values(&[name]).set(signed(snapshot.in_flight));
            if let Some(redis) = &snapshot.redis {
                self.redis.up.with_label_values(&[name]).set(i64::from(redis.unavailable_reason.is_none()));
                self.redis.nodes.with_label_values(&[name]).set(signed(redis.nodes));
                self.redis.faults.with_label_values(&[name]).set(signed(redis.server_faults.len() as u64));
                self.redis.losses.with_label_values(&[name]).set(signed(redis.losses));
            }
            for level in snapshot.levels.iter().filter(|l| l.quota.scope == Scope::Environment) {
                let labels = [name, level.quota.kind.as_str(), &level.quota.per.text];
                if !level.quota.is_unlimited() {
                    self.quotas.limit.with_label_values(&labels).set(signed(level.quota.limit));
                    self.quotas.level.with_label_values(&labels).set(level.level);
                }
                self.quotas.held.with_label_values(&labels).set(signed(level.held));
            }
        }
        // An empty label equals an absent one in Prometheus. It is removed for other readers of this text.
        Ok(TextEncoder::new().encode_to_string(&self.registry.gather())?.replace(r#",shadow="""#, ""))
    }

    /// The series of an environment. It creates the most important ones, so that they exist before the first request.
    pub(crate) fn series_of(&self, environment: &Environment) -> Series {
        let series = Series::new(&self.series, environment);
        for quota in environment.quotas.iter().filter(|q| q.scope == Scope::Environment && !q.is_unlimited())
        {
            let code = if quota.is_long() { "insufficient_quota" } else { "rate_limit_exceeded" };
            let scope = quota.scope.as_str();
            let labels = [environment.name.as_str(), code, scope, quota.kind.as_str(), &quota.per.text, ""];
            self.rejections.with_label_values(&labels);
        }
        self.usage_missing.with_label_values(&[&environment.name, "not_reported"]);
        series
    }
}

fn series_metrics(r: &Registry) -> prometheus::Result<SeriesMetrics> {
    Ok(SeriesMetrics {
        requests: counters(
            r,
            "tollgate_requests_total",
            "Requests, by outcome.",
            &["environment", "api", "outcome"],
        )?,
        tokens: counters(r, "tollgate_tokens_total", "Tokens charged.", &["environment", "model", "kind"])?,
        summaries: Summaries::default(),
    })
}

impl QuotaMetrics {
    fn clear(&self) {
        [&self.limit, &self.level, &self.held, &self.in_flight].into_iter().for_each(IntGaugeVec::reset);
    }

    fn new(r: &Registry) -> prometheus::Result<Self> {
        let quota = ["environment", "kind", "per"];
        Ok(Self {
            limit: gauges(r, "tollgate_quota_limit", "Limit of a quota of the environment.", &quota)?,
            level: gauges(
                r,
                "tollgate_quota_level",
                "Amount that is left of the quota; below zero it is debt.",
                &quota,
            )?,
            held: gauges(
                r,
                "tollgate_quota_held",
                "Amount of the quota that requests in flight hold.",
                &quota,
            )?,
            in_flight: gauges(
                r,
                "tollgate_in_flight",
                "Requests in flight, streams included.",
                &["environment"],
            )?,
        })
    }
}

impl EstimateMetrics {
    fn new(r: &Registry) -> prometheus::Result<Self> {
        let ratios = [0.5, 0.75, 0.9, 0.95, 0.98, 0.999, 1.001, 1.02, 1.05, 1.1, 1.25, 1.5, 2.0];
        let counts = counters(
            r,
            "tollgate_estimates_total",
            "Prompt estimates, by tokenizer and by whether the whole prompt was counted.",
            &["tokenizer", "estimate"],
        )?;
        let by_source = HistogramVec::new(
            HistogramOpts::new(
                "tollgate_estimate_ratio",
                "Prompt tokens reserved for a request, divided by those the upstream reported, by the source of the estimate.",
            )
            .buckets(ratios.to_vec()),
            &["source"],
        )?;
        let by_source = register(r, by_source)?;
        Ok(Self {
            ratios: EstimateSource::ALL.map(|source| by_source.with_label_values(&[source.as_str()])),
            raw_ratio: histogram(
                r,
                "tollgate_raw_estimate_ratio",
                "Prompt tokens estimated without correction, divided by those the upstream reported.",
                &ratios,
            )?,
            counts: TOKENIZERS
                .iter()
                .flat_map(|tokenizer| {
                    COVERAGE.map(|coverage| counts.with_label_values(&[*tokenizer, coverage]))
                })
                .collect(),
        })
    }
}

impl RedisMetrics {
    fn clear(&self) {
        [&self.up, &self.nodes, &self.faults, &self.losses].into_iter().for_each(IntGaugeVec::reset);
    }

    fn new(r: &Registry) -> prometheus::Result<Self> {
        let labels = ["environment"];
        Ok(Self {
            up: gauges(
                r,
                "tollgate_shared_up",
                "1 while the counters of the environment are shared through Redis, 0 while this node is offline.",
                &labels,
            )?,
            nodes: gauges(
                r,
                "tollgate_shared_nodes",
                "Nodes that share the counters of the environment, by the last answer of Redis.",
                &labels,
            )?,
            faults: gauges(
                r,
                "tollgate_shared_faults",
                "Wrong settings of the Redis server, which can lose counts or refuse requests; the log and /readyz name \
                 them.",
                &labels,
            )?,
            losses: gauges(
                r,
                "tollgate_shared_losses_total",
                "Number of times the connection to Redis was lost.",
                &labels,
            )?,
        })
    }
}

/// Values of the `tokenizer` label. The first three are exact vocabularies of the model. `family` is a scaled vocabulary
/// for the model's family. `fallback` is a scaled vocabulary for unknown models.
const TOKENIZERS: [&str; 5] = ["o200k_base", "cl100k_base", "file", "family", "fallback"];
/// Values of the `estimate` label: the whole prompt was counted; a part is outside the request; the prompt was too long to
/// be counted exactly.
const COVERAGE: [&str; 3] = ["whole", "partial", "rough"];

fn signed(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

fn register<M: prometheus::core::Collector + Clone + 'static>(
    r: &Registry,
    metric: M,
) -> prometheus::Result<M> {
    r.register(Box::new(metric.clone()))?;
    Ok(metric)
}

fn counters(r: &Registry, name: &str, help: &str, labels: &[&str]) -> prometheus::Result<IntCounterVec> {
    register(r, IntCounterVec::new(Opts::new(name, help), labels)?)
}

fn gauges(r: &Registry, name: &str, help: &str, labels: &[&str]) -> prometheus::Result<IntGaugeVec> {
    register(r, IntGaugeVec::new(Opts::new(name, help), labels)?)
}

fn histogram(r: &Registry, name: &str, help: &str, buckets: &[f64]) -> prometheus::Result<Histogram> {
    register(r, Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets.to_vec()))?)
}
