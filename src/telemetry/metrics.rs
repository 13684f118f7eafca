//! Names, labels and buckets of every metric, and one function per event.

use super::{Outcome, Record};
use crate::config::Environment;
use crate::estimate::{Encoding, PromptEstimate, Tokenizer};
use crate::glob::Glob;
use crate::ledger::Account;
use crate::quota::{Scope, Shortfall};
use prometheus::{
    Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder,
};
use std::sync::{Arc, OnceLock};

/// All metrics of one gateway.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    requests: IntCounterVec,
    rejections: IntCounterVec,
    tokens: IntCounterVec,
    quota_limit: IntGaugeVec,
    quota_level: IntGaugeVec,
    quota_held: IntGaugeVec,
    in_flight: IntGaugeVec,
    overhead: Histogram,
    first_byte: Histogram,
    estimate_ratio: Histogram,
    raw_estimate_ratio: Histogram,
    estimates: Box<[IntCounter]>,
    usage_missing: IntCounterVec,
    store_up: IntGauge,
    shared_up: IntGaugeVec,
    shared_nodes: IntGaugeVec,
    shared_faults: IntGaugeVec,
    shared_losses: IntGaugeVec,
}

impl Metrics {
    /// Registers every metric.
    ///
    /// # Errors
    /// Two metrics have one name: a slip in this file that every test finds.
    pub fn new() -> prometheus::Result<Self> {
        let r = Registry::new();
        let quota = ["environment", "kind", "per"];
        let ratios = [0.5, 0.75, 0.9, 0.95, 0.98, 0.999, 1.001, 1.02, 1.05, 1.1, 1.25, 1.5, 2.0];
        let estimates = counters(
            &r,
            "tollgate_estimates_total",
            "Prompt estimates by what counted them and by whether all of the prompt could be counted.",
            &["tokenizer", "estimate"],
        )?;
        let metrics = Self {
            requests: counters(
                &r,
                "tollgate_requests_total",
                "Requests by how they ended.",
                &["environment", "api", "outcome"],
            )?,
            rejections: counters(
                &r,
                "tollgate_rejections_total",
                "Requests refused for want of room.",
                &["environment", "code", "kind", "per", "shadow"],
            )?,
            tokens: counters(
                &r,
                "tollgate_tokens_total",
                "Tokens charged.",
                &["environment", "model", "kind"],
            )?,
            quota_limit: gauges(&r, "tollgate_quota_limit", "Limit of an environment's quota.", &quota)?,
            quota_level: gauges(&r, "tollgate_quota_level", "What is left of it; below zero: debt.", &quota)?,
            quota_held: gauges(&r, "tollgate_quota_held", "What requests in flight hold of it.", &quota)?,
            in_flight: gauges(&r, "tollgate_in_flight", "Requests and streams under way.", &["environment"])?,
            overhead: histogram(
                &r,
                "tollgate_overhead_seconds",
                "The gateway's own time per request: reading it, counting, reserving, preparing the answer.",
                &[0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.05, 0.25],
            )?,
            first_byte: histogram(
                &r,
                "tollgate_upstream_first_byte_seconds",
                "From the request sent to the head of the answer.",
                &[0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0],
            )?,
            estimate_ratio: histogram(
                &r,
                "tollgate_estimate_ratio",
                "Prompt tokens reserved before the call, divided by those reported after it.",
                &ratios,
            )?,
            raw_estimate_ratio: histogram(
                &r,
                "tollgate_raw_estimate_ratio",
                "The same before estimates are corrected by what was learned.",
                &ratios,
            )?,
            estimates: TOKENIZERS
                .iter()
                .flat_map(|tokenizer| {
                    COVERAGE.map(|coverage| estimates.with_label_values(&[*tokenizer, coverage]))
                })
                .collect(),
            usage_missing: counters(
                &r,
                "tollgate_usage_missing_total",
                "Answers whose usage was counted here.",
                &["environment", "reason"],
            )?,
            store_up: register(&r, IntGauge::new("tollgate_store_up", "1 while counters can be kept.")?)?,
            shared_up: gauges(
                &r,
                "tollgate_shared_up",
                "1 while an environment's counters are shared through Redis, 0 while they are this node's own.",
                &["environment"],
            )?,
            shared_nodes: gauges(
                &r,
                "tollgate_shared_nodes",
                "Nodes that share an environment's counters, as last heard.",
                &["environment"],
            )?,
            shared_faults: gauges(
                &r,
                "tollgate_shared_faults",
                "Settings of the Redis server that lose counts or refuse calls; the log and /readyz name them.",
                &["environment"],
            )?,
            shared_losses: gauges(
                &r,
                "tollgate_shared_losses_total",
                "How often Redis was lost.",
                &["environment"],
            )?,
            registry: r,
        };
        // Stays at 0 until configs are reloaded; dashboards can be built on it already.
        register(
            &metrics.registry,
            IntCounter::new("tollgate_config_reload_failures_total", "New configs that were refused.")?,
        )?;
        Ok(metrics)
    }

    /// A request has ended.
    pub(super) fn request(&self, record: &Record) {
        match &record.series {
            Some(series) => series.request(self, record),
            None => self.requests.with_label_values(&["", record.api, record.outcome.as_str()]).inc(),
        }
        if let Some(first_byte) = record.first_byte {
            self.first_byte.observe(first_byte.as_secs_f64());
        }
        if let Some(overhead) = record.overhead {
            self.overhead.observe(overhead.as_secs_f64());
        }
        if record.outcome == Outcome::Answered && record.reported_prompt > 0 && record.raw_estimate > 0 {
            #[allow(clippy::cast_precision_loss)] // ratios for a histogram
            let [reserved, counted, reported] =
                [record.estimated_prompt, record.raw_estimate, record.reported_prompt].map(|n| n as f64);
            self.estimate_ratio.observe(reserved / reported);
            self.raw_estimate_ratio.observe(counted / reported);
        }
    }

    /// A request was refused for want of room; with `shadow` it would have been, were quotas enforced.
    pub fn rejected(&self, environment: &str, code: &str, worst: Option<&Shortfall>, shadow: bool) {
        let (kind, per) = worst.map_or(("", ""), |s| (s.quota.kind.as_str(), s.quota.per.text.as_str()));
        let shadow = if shadow { "true" } else { "" };
        self.rejections.with_label_values(&[environment, code, kind, per, shadow]).inc();
    }

    /// A prompt was estimated.
    pub fn estimated(&self, tokenizer: Tokenizer, estimate: &PromptEstimate) {
        let by = match (tokenizer.encoding, estimate.knows_model) {
            (Encoding::File(_), _) => 2,
            (_, false) => 4,
            _ if tokenizer.percent != 100 => 3,
            (Encoding::O200k, _) => 0,
            (Encoding::Cl100k, _) => 1,
        };
        let coverage = if estimate.is_rough { 2 } else { usize::from(estimate.is_partial) };
        if let Some(counter) = self.estimates.get(by * COVERAGE.len() + coverage) {
            counter.inc();
        }
    }

    /// An answer did not say what it cost, or not credibly.
    pub fn usage_missing(&self, environment: &str, reason: &str) {
        self.usage_missing.with_label_values(&[environment, reason]).inc();
    }

    /// Everything in Prometheus's text format, with the counters of these accounts as they stand now.
    ///
    /// # Errors
    /// A metric cannot be written as text.
    pub fn render(
        &self,
        accounts: &[(Arc<Environment>, Arc<Account>)],
        store_is_up: bool,
    ) -> prometheus::Result<String> {
        self.store_up.set(i64::from(store_is_up));
        for (environment, account) in accounts {
            let name = environment.name.as_str();
            let snapshot = account.snapshot();
            self.in_flight.with_label_values(&[name]).set(signed(snapshot.in_flight));
            if let Some(sharing) = &snapshot.sharing {
                self.shared_up.with_label_values(&[name]).set(i64::from(sharing.trouble.is_none()));
                self.shared_nodes.with_label_values(&[name]).set(signed(sharing.nodes));
                self.shared_faults.with_label_values(&[name]).set(signed(sharing.faults.len() as u64));
                self.shared_losses.with_label_values(&[name]).set(signed(sharing.losses));
            }
            for level in snapshot.levels.iter().filter(|l| l.quota.scope == Scope::Environment) {
                let labels = [name, level.quota.kind.as_str(), &level.quota.per.text];
                self.quota_limit.with_label_values(&labels).set(signed(level.quota.limit));
                self.quota_level.with_label_values(&labels).set(level.level);
                self.quota_held.with_label_values(&labels).set(signed(level.held));
            }
        }
        // To Prometheus a label without a value is no label; other readers need not know that.
        Ok(TextEncoder::new().encode_to_string(&self.registry.gather())?.replace(r#",shadow="""#, ""))
    }

    /// The series of an environment, visible before its first request.
    pub(crate) fn of_environment(&self, environment: &Environment) -> Series {
        let series = Series {
            environment: environment.name.clone(),
            globs: environment.models.clone(),
            requests: (0..APIS.len() * Outcome::ALL.len()).map(|_| OnceLock::new()).collect(),
            tokens: (0..=KNOWN_MODELS.len() + environment.models.len()).map(|_| OnceLock::new()).collect(),
        };
        series.tokens(self, ModelLabel(KNOWN_MODELS.len() + environment.models.len()));
        for outcome in [Outcome::Answered, Outcome::Rejected] {
            series.requests(self, "chat", outcome);
        }
        for quota in environment.quotas.iter().filter(|q| q.scope == Scope::Environment) {
            let code = if quota.is_long() { "insufficient_quota" } else { "rate_limit_exceeded" };
            let labels = [environment.name.as_str(), code, quota.kind.as_str(), &quota.per.text, ""];
            self.rejections.with_label_values(&labels);
        }
        self.usage_missing.with_label_values(&[&environment.name, "not_reported"]);
        series
    }
}

/// The counters of one environment that every request adds to, each looked up once: by label values
/// they took a microsecond of every request.
#[derive(Debug)]
pub(crate) struct Series {
    environment: String,
    globs: Vec<Glob>,
    /// By API and outcome.
    requests: Box<[OnceLock<IntCounter>]>,
    /// By model label: prompt, completion, total.
    tokens: Box<[OnceLock<[IntCounter; 3]>]>,
}

/// What a model is called in metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ModelLabel(usize);

/// What counts: a vocabulary of the model's own; one in proportion to which its family counts; one in
/// proportion to which models that nobody knows are taken to count.
const TOKENIZERS: [&str; 5] = ["o200k_base", "cl100k_base", "file", "family", "fallback"];
/// All of the prompt was counted; some of it is elsewhere; there was too much of it.
const COVERAGE: [&str; 3] = ["whole", "partial", "rough"];

/// Values of the `api` label.
const APIS: &[&str] = &["none", "chat", "completions", "embeddings", "models", "root", "other"];

impl Series {
    /// A known name, the entry of the environment's list that allows it, or `other`: the number of
    /// series is bounded by the config.
    pub(crate) fn label(&self, model: &str) -> ModelLabel {
        let known = KNOWN_MODELS.iter().position(|known| *known == model);
        let listed = || self.globs.iter().position(|glob| glob.matches(model));
        ModelLabel(known.unwrap_or_else(|| KNOWN_MODELS.len() + listed().unwrap_or(self.globs.len())))
    }

    fn label_text(&self, label: ModelLabel) -> &str {
        let listed = || self.globs.get(label.0.saturating_sub(KNOWN_MODELS.len())).map(Glob::as_str);
        KNOWN_MODELS.get(label.0).copied().or_else(listed).unwrap_or("other")
    }

    fn requests(&self, metrics: &Metrics, api: &str, outcome: Outcome) -> &IntCounter {
        let api = APIS.iter().position(|known| *known == api).unwrap_or(0);
        self.requests[api * Outcome::ALL.len() + outcome as usize].get_or_init(|| {
            metrics.requests.with_label_values(&[&self.environment, APIS[api], outcome.as_str()])
        })
    }

    fn tokens(&self, metrics: &Metrics, label: ModelLabel) -> &[IntCounter; 3] {
        self.tokens[label.0].get_or_init(|| {
            ["prompt", "completion", "total"].map(|kind| {
                metrics.tokens.with_label_values(&[self.environment.as_str(), self.label_text(label), kind])
            })
        })
    }

    fn request(&self, metrics: &Metrics, record: &Record) {
        self.requests(metrics, record.api, record.outcome).inc();
        let Some(label) = record.model_label else { return };
        let charged = &record.charged;
        let counters = self.tokens(metrics, label);
        for (counter, tokens) in counters.iter().zip([charged.prompt, charged.completion, charged.total]) {
            if tokens > 0 {
                counter.inc_by(tokens);
            }
        }
    }
}

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

/// Models whose names are public: they may stand in metrics. Any other name a caller can make up.
const KNOWN_MODELS: &[&str] = &[
    "gpt-3.5-turbo",
    "gpt-4",
    "gpt-4-turbo",
    "gpt-4.1",
    "gpt-4.1-mini",
    "gpt-4.1-nano",
    "gpt-4o",
    "gpt-4o-mini",
    "gpt-5",
    "gpt-5-mini",
    "gpt-5-nano",
    "gpt-5.1",
    "o1",
    "o3",
    "o3-mini",
    "o4-mini",
    "text-embedding-3-large",
    "text-embedding-3-small",
    "text-embedding-ada-002",
];
