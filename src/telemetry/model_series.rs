//! The counters and histograms of one model of one environment.

use super::catalogue::{ESTIMATE_RATIO, FIRST_BYTE, FIRST_TOKEN, PER_TOKEN, REQUEST_DURATION, TOKENS};
use super::gen_ai::{GenAiMetrics, GenAiSeries};
use super::summaries::EstimateSummary;
use super::{Record, RequestOutcome};
use crate::estimate::EstimateSource;
use crate::quota::{Amounts, Kind};
use prometheus::{Histogram, HistogramVec, IntCounter, IntCounterVec, Registry};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

/// The labels of an environment that its series of models share.
#[derive(Debug)]
pub(super) struct SeriesOrigin {
    pub(super) upstream: String,
    /// The provider's name by OpenTelemetry's conventions. `None`: metrics by these conventions are off.
    pub(super) gen_ai_provider: Option<&'static str>,
}

/// The metrics that a [`ModelSeries`] belongs to.
#[derive(Debug)]
pub(super) struct ModelMetrics {
    pub(super) tokens: IntCounterVec,
    duration: HistogramVec,
    first_byte: HistogramVec,
    first_token: HistogramVec,
    per_token: HistogramVec,
    estimate_ratio: HistogramVec,
    gen_ai: GenAiMetrics,
}

impl ModelMetrics {
    pub(super) fn new(registry: &Registry) -> prometheus::Result<Self> {
        Ok(Self {
            tokens: TOKENS.counters(registry)?,
            duration: REQUEST_DURATION.histograms(registry)?,
            first_byte: FIRST_BYTE.histograms(registry)?,
            first_token: FIRST_TOKEN.histograms(registry)?,
            per_token: PER_TOKEN.histograms(registry)?,
            estimate_ratio: ESTIMATE_RATIO.histograms(registry)?,
            gen_ai: GenAiMetrics::new(registry)?,
        })
    }
}

/// The counters and histograms of one model of one environment. Each is looked up once.
#[derive(Debug)]
pub(super) struct ModelSeries {
    /// Indexed by caller label. Each has the counters of prompt and completion tokens.
    tokens: Box<[OnceLock<[IntCounter; 2]>]>,
    duration: Histogram,
    first_byte: Histogram,
    /// Only streams have these two.
    stream: OnceLock<[Histogram; 2]>,
    upstream: String,
    /// By the source of the estimate.
    ratios: [OnceLock<Histogram>; EstimateSource::ALL.len()],
    estimates: OnceLock<Arc<EstimateSummary>>,
    gen_ai: Option<GenAiSeries>,
}

impl ModelSeries {
    pub(super) fn new(
        metrics: &ModelMetrics,
        environment: &str,
        model: &str,
        origin: &SeriesOrigin,
        caller_labels: usize,
    ) -> Self {
        let labels = [environment, model, origin.upstream.as_str()];
        Self {
            tokens: (0..caller_labels).map(|_| OnceLock::new()).collect(),
            duration: metrics.duration.with_label_values(&labels),
            first_byte: metrics.first_byte.with_label_values(&labels),
            stream: OnceLock::new(),
            upstream: origin.upstream.clone(),
            ratios: [const { OnceLock::new() }; EstimateSource::ALL.len()],
            estimates: OnceLock::new(),
            gen_ai: origin.gen_ai_provider.map(|provider| GenAiSeries::new(provider, model)),
        }
    }

    /// The sums of the estimates for this model.
    pub(super) fn estimates(&self, find: impl FnOnce() -> Arc<EstimateSummary>) -> &EstimateSummary {
        self.estimates.get_or_init(find)
    }

    /// Counts a request that has ended. `names`: environment, model and label of the caller.
    pub(super) fn count(
        &self,
        metrics: &ModelMetrics,
        names: (&str, &str, &str),
        record: &Record,
        elapsed: Duration,
    ) {
        let (environment, model, caller) = names;
        if let Some(tokens) = record.charged_tokens()
            && let Some(counters) = self.tokens.get(record.caller_label.0)
        {
            let counters = counters.get_or_init(|| {
                [Kind::PromptTokens, Kind::CompletionTokens].map(|kind| {
                    metrics.tokens.with_label_values(&[environment, model, kind.as_str(), caller])
                })
            });
            counters.iter().zip(tokens).for_each(|(counter, tokens)| counter.inc_by(tokens));
        }
        if record.has_reported_prompt() {
            let source = record.estimate_source;
            let ratio = self.ratios[source as usize]
                .get_or_init(|| metrics.estimate_ratio.with_label_values(&[model, source.as_str()]));
            ratio.observe(quotient(record.estimated_prompt, record.reported_prompt));
        }
        if record.overhead.is_none() {
            // It was not sent to the upstream.
            return;
        }
        self.duration.observe(elapsed.as_secs_f64());
        if let Some(first_byte) = record.first_byte {
            self.first_byte.observe(first_byte.as_secs_f64());
        }
        let times = stream_times(record, elapsed);
        if let Some((first_token, per_token)) = times {
            let labels = [environment, model, self.upstream.as_str()];
            let [first_tokens, per_tokens] = self.stream.get_or_init(|| {
                [&metrics.first_token, &metrics.per_token].map(|metric| metric.with_label_values(&labels))
            });
            first_tokens.observe(first_token);
            per_token.into_iter().for_each(|seconds| per_tokens.observe(seconds));
        }
        if let Some(gen_ai) = &self.gen_ai {
            gen_ai.count(&metrics.gen_ai, record, elapsed, times);
        }
    }
}

/// Seconds to the first token of a stream, and between two tokens after it. The second is known of a complete stream of
/// several tokens.
fn stream_times(record: &Record, elapsed: Duration) -> Option<(f64, Option<f64>)> {
    let first_token = record.first_token?;
    let Amounts { completion, .. } = record.charged;
    let is_complete = record.outcome == RequestOutcome::Answered && completion > 1;
    let per_token = is_complete.then(|| {
        #[allow(clippy::cast_precision_loss)] // for a histogram
        let later_tokens = (completion - 1) as f64;
        elapsed.saturating_sub(first_token).as_secs_f64() / later_tokens
    });
    Some((first_token.as_secs_f64(), per_token))
}

/// A ratio for a histogram.
#[allow(clippy::cast_precision_loss)]
pub(super) fn quotient(dividend: u64, divisor: u64) -> f64 {
    dividend as f64 / divisor as f64
}
