//! All metrics: their registration, one function for each event, and their text.

use super::Record;
use super::catalogue;
use super::catalogue::{
    CERTIFICATE_EXPIRY, ESTIMATES, LAST_RELOAD, OVERHEAD, RAW_ESTIMATE_RATIO, REJECTIONS, RELOAD_FAILURES,
    SHADOW_REJECTIONS, UPSTREAM_KEYS_MASKED, USAGE_MISSING,
};
use super::code::code_of;
use super::denial::Denial;
use super::exposition::{Family, labels};
use super::model_series::quotient;
use super::process;
use super::series::{CallerLabels, Series, SeriesMetrics};
use super::state::{self, StateSources};
use super::summaries::Summaries;
use super::traces::SpanCounts;
use crate::clock::{self, Timestamp};
use crate::config::Environment;
use crate::estimate::{Encoding, PromptEstimate, Tokenizer};
use prometheus::{Histogram, IntCounter, IntCounterVec, Registry, TextEncoder};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// All metrics of one gateway.
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    started: Timestamp,
    reload_failures: AtomicU64,
    spans: Arc<SpanCounts>,
    /// In milliseconds since the Unix epoch.
    last_reload: AtomicI64,
    /// When the certificate of each listener expires.
    certificates: Mutex<BTreeMap<&'static str, Timestamp>>,
    series: SeriesMetrics,
    rejections: IntCounterVec,
    shadow_rejections: IntCounterVec,
    usage_missing: IntCounterVec,
    upstream_keys_masked: IntCounterVec,
    overhead: Histogram,
    raw_ratio: Histogram,
    /// Prompt estimates, indexed by tokenizer and coverage.
    estimates: Box<[IntCounter]>,
}

impl Metrics {
    /// Registers every metric.
    ///
    /// # Errors
    /// Two metrics have the same name. That is a mistake in the catalogue, which every test detects.
    pub(crate) fn new() -> prometheus::Result<Self> {
        let r = Registry::new();
        let estimates = ESTIMATES.counters(&r)?;
        let by_tokenizer =
            |tokenizer: &&str| COVERAGE.map(|coverage| estimates.with_label_values(&[*tokenizer, coverage]));
        Ok(Self {
            started: clock::now(),
            reload_failures: AtomicU64::new(0),
            spans: Arc::default(),
            last_reload: AtomicI64::new(0),
            certificates: Mutex::default(),
            series: SeriesMetrics::new(&r)?,
            rejections: REJECTIONS.counters(&r)?,
            shadow_rejections: SHADOW_REJECTIONS.counters(&r)?,
            usage_missing: USAGE_MISSING.counters(&r)?,
            upstream_keys_masked: UPSTREAM_KEYS_MASKED.counters(&r)?,
            overhead: OVERHEAD.histograms(&r)?.with_label_values::<&str>(&[]),
            raw_ratio: RAW_ESTIMATE_RATIO.histograms(&r)?.with_label_values::<&str>(&[]),
            estimates: TOKENIZERS.iter().flat_map(by_tokenizer).collect(),
            registry: r,
        })
    }

    /// Records that a config was loaded.
    pub(crate) fn config_loaded(&self, now: Timestamp) {
        self.last_reload.store(now.0, Ordering::Relaxed);
    }

    /// Records when the certificate of a listener expires. `None`: it has none.
    pub(crate) fn certificate_expires(&self, listener: &'static str, expires: Option<Timestamp>) {
        let mut certificates = self.certificates.lock().unwrap_or_else(PoisonError::into_inner);
        match expires {
            Some(expires) => certificates.insert(listener, expires),
            None => certificates.remove(listener),
        };
    }

    /// Figures that the admin API shows.
    pub(crate) fn summaries(&self) -> &Summaries {
        &self.series.summaries
    }

    /// When the config in force was loaded, to the second.
    pub(crate) fn loaded_at(&self) -> Timestamp {
        Timestamp(self.last_reload.load(Ordering::Relaxed) / 1_000 * 1_000)
    }

    /// Counts the spans of traces.
    pub(super) fn span_counts(&self) -> &Arc<SpanCounts> {
        &self.spans
    }

    /// Counts a reload that was refused.
    pub(crate) fn reload_failed(&self) {
        self.reload_failures.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a request that has ended after `elapsed`.
    pub(super) fn request(&self, record: &Record, elapsed: Duration) {
        if let Some(series) = &record.series {
            series.count(&self.series, record, elapsed);
        } else {
            let labels = ["", record.api, record.outcome.as_str(), code_of(record)];
            self.series.requests.with_label_values(&labels).inc();
        }
        if let Some(overhead) = record.overhead {
            self.overhead.observe(overhead.as_secs_f64());
        }
        if record.has_reported_prompt() {
            self.raw_ratio.observe(quotient(record.raw_estimate, record.reported_prompt));
        }
    }

    /// Counts a denial by a limit. `None`: the environment as a whole has no room. `shadow`: the environment does not enforce its quotas.
    pub(crate) fn rejected(&self, environment: &str, code: &str, denied_by: Option<&Denial>, shadow: bool) {
        let scope = denied_by.map_or("environment", |denial| denial.scope);
        let quota = denied_by.and_then(|denial| denial.quota.as_ref());
        let (kind, per) = quota.map_or(("", ""), |quota| (quota.kind, quota.per.as_str()));
        let counters = if shadow { &self.shadow_rejections } else { &self.rejections };
        counters.with_label_values(&[environment, scope, kind, per, code]).inc();
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
        if let Some(counter) = self.estimates.get(tokenizer * COVERAGE.len() + coverage) {
            counter.inc();
        }
    }

    /// Counts an error of an upstream in which its key was masked.
    pub(crate) fn upstream_key_masked(&self, upstream: &str) {
        self.upstream_keys_masked.with_label_values(&[upstream]).inc();
    }

    /// Counts an answer without credible usage.
    pub(crate) fn usage_missing(&self, environment: &str, reason: &str) {
        self.usage_missing.with_label_values(&[environment, reason]).inc();
    }

    /// Returns all metrics in Prometheus's text format. With many quotas this takes milliseconds, and it reads files.
    ///
    /// # Errors
    /// A metric cannot be encoded as text.
    pub(crate) fn render(&self, sources: StateSources<'_>) -> prometheus::Result<String> {
        let text = TextEncoder::new().encode_to_string(&self.registry.gather())?;
        // An empty label equals an absent one in Prometheus. These two are the first labels of their metrics.
        let mut text = text.replace("{caller=\"\",", "{").replace("{error_type=\"\",", "{");
        let mut append = |metric, value: &dyn std::fmt::Display| {
            let mut family = Family::new(metric);
            family.add("", value);
            family.append_to(&mut text);
        };
        append(&RELOAD_FAILURES, &self.reload_failures.load(Ordering::Relaxed));
        append(&LAST_RELOAD, &(self.last_reload.load(Ordering::Relaxed) / 1_000));
        let mut expiry = Family::new(&CERTIFICATE_EXPIRY);
        for (listener, expires) in &*self.certificates.lock().unwrap_or_else(PoisonError::into_inner) {
            expiry.add(&labels(CERTIFICATE_EXPIRY.labels, &[listener]), expires.0 / 1_000);
        }
        expiry.append_to(&mut text);
        let mut spans = Family::new(&catalogue::TRACE_SPANS);
        for (outcome, count) in self.spans.by_outcome() {
            spans.add(&labels(catalogue::TRACE_SPANS.labels, &[outcome]), count);
        }
        spans.append_to(&mut text);
        process::append(&mut text, self.started);
        state::append(&mut text, sources, self.summaries());
        Ok(text)
    }

    /// The series of an environment. It creates the most important ones, so that they exist before the first request.
    pub(crate) fn series_of(
        &self,
        environment: &Environment,
        callers: CallerLabels,
        has_gen_ai: bool,
    ) -> Series {
        let series = Series::new(&self.series, environment, callers, has_gen_ai);
        for quota in environment.quotas.iter().filter(|quota| !quota.is_unlimited()) {
            let code = if quota.is_long() { "insufficient_quota" } else { "rate_limit_exceeded" };
            let scope = quota.scope.as_str();
            let labels = [environment.name.as_str(), scope, quota.kind.as_str(), &quota.per.text, code];
            self.rejections.with_label_values(&labels);
        }
        self.usage_missing.with_label_values(&[&environment.name, "not_reported"]);
        series
    }
}

/// Values of the `tokenizer` label. The first three are exact vocabularies of the model. `family` is a scaled vocabulary
/// for the model's family. `fallback` is a scaled vocabulary for unknown models.
const TOKENIZERS: [&str; 5] = ["o200k_base", "cl100k_base", "file", "family", "fallback"];
/// Values of the `estimate` label: the whole prompt was counted; a part is outside the request; the prompt was too long to
/// be counted exactly.
const COVERAGE: [&str; 3] = ["whole", "partial", "rough"];
