//! The counters of one environment that every request updates.

use super::summaries::{EstimateSummary, Summaries, UpstreamSummary};
use super::{Record, RequestOutcome};
use crate::config::Environment;
use crate::estimate::PUBLIC_MODELS;
use crate::glob::Glob;
use prometheus::{IntCounter, IntCounterVec};
use std::sync::{Arc, OnceLock};

/// The counters of one environment that every request updates. Each is looked up once. A lookup by label values for
/// every request took a microsecond.
#[derive(Debug)]
pub(crate) struct Series {
    environment: String,
    globs: Vec<Glob>,
    /// Indexed by API and outcome.
    requests: Box<[OnceLock<IntCounter>]>,
    /// Indexed by model label. Each has the counters of prompt, completion and total tokens.
    tokens: Box<[OnceLock<[IntCounter; 3]>]>,
    /// Indexed by model label.
    estimates: Box<[OnceLock<Arc<EstimateSummary>>]>,
    upstream: Arc<UpstreamSummary>,
}

/// The metrics that a [`Series`] belongs to.
#[derive(Debug)]
pub(super) struct SeriesMetrics {
    /// Labels: environment, API, outcome.
    pub(super) requests: IntCounterVec,
    /// Labels: environment, model, kind.
    pub(super) tokens: IntCounterVec,
    pub(super) summaries: Summaries,
}

/// The index of a model's label in metrics: known models, then the globs of the environment, then `other`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ModelLabel(usize);

/// Values of the `api` label. A request without an endpoint has the first one.
const APIS: &[&str] = &[
    "none",
    "chat",
    "completions",
    "responses",
    "embeddings",
    "messages",
    "gemini",
    "rerank",
    "moderations",
    "audio",
    "images",
    "count_tokens",
    "models",
    "root",
    "other",
];

impl Series {
    /// The series of an environment. It creates the most important ones, so that they exist before the first request.
    pub(super) fn new(metrics: &SeriesMetrics, environment: &Environment) -> Self {
        let models = PUBLIC_MODELS.len() + environment.models.len();
        let series = Self {
            environment: environment.name.clone(),
            globs: environment.models.clone(),
            requests: (0..APIS.len() * RequestOutcome::ALL.len()).map(|_| OnceLock::new()).collect(),
            tokens: (0..=models).map(|_| OnceLock::new()).collect(),
            estimates: (0..=models).map(|_| OnceLock::new()).collect(),
            upstream: metrics.summaries.upstream(&environment.upstream.name),
        };
        series.token_counters(metrics, ModelLabel(models));
        for outcome in [RequestOutcome::Answered, RequestOutcome::Rejected] {
            series.request_counter(metrics, "chat", outcome);
        }
        series
    }

    /// The label of a model: its name if it is a known one, else the glob of the environment that matches it, else `other`.
    /// So the config bounds the number of series.
    pub(crate) fn label(&self, model: &str) -> ModelLabel {
        let known = PUBLIC_MODELS.iter().position(|known| *known == model);
        let listed = || self.globs.iter().position(|glob| glob.matches(model));
        ModelLabel(known.unwrap_or_else(|| PUBLIC_MODELS.len() + listed().unwrap_or(self.globs.len())))
    }

    fn label_text(&self, label: ModelLabel) -> &str {
        let listed = || self.globs.get(label.0.saturating_sub(PUBLIC_MODELS.len())).map(Glob::as_str);
        PUBLIC_MODELS.get(label.0).copied().or_else(listed).unwrap_or("other")
    }

    fn request_counter(&self, metrics: &SeriesMetrics, api: &str, outcome: RequestOutcome) -> &IntCounter {
        let api = APIS.iter().position(|known| *known == api).unwrap_or(0);
        self.requests[api * RequestOutcome::ALL.len() + outcome as usize].get_or_init(|| {
            metrics.requests.with_label_values(&[&self.environment, APIS[api], outcome.as_str()])
        })
    }

    fn token_counters(&self, metrics: &SeriesMetrics, label: ModelLabel) -> &[IntCounter; 3] {
        self.tokens[label.0].get_or_init(|| {
            ["prompt", "completion", "total"].map(|kind| {
                metrics.tokens.with_label_values(&[self.environment.as_str(), self.label_text(label), kind])
            })
        })
    }

    /// Counts a request that has ended, and the tokens charged for it.
    pub(super) fn count(&self, metrics: &SeriesMetrics, record: &Record) {
        self.request_counter(metrics, record.api, record.outcome).inc();
        self.upstream.add(record);
        let Some(label) = record.model_label else { return };
        if record.has_reported_prompt() {
            let summary = || metrics.summaries.model(self.label_text(label));
            let estimates = self.estimates[label.0].get_or_init(summary);
            estimates.add(record.estimated_prompt, record.reported_prompt);
        }
        let charged = &record.charged;
        let counters = self.token_counters(metrics, label);
        for (counter, tokens) in counters.iter().zip([charged.prompt, charged.completion, charged.total]) {
            if tokens > 0 {
                counter.inc_by(tokens);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::Api;

    #[test]
    fn every_api_has_a_label() {
        for api in [Api::Chat, Api::Completions, Api::Responses, Api::Embeddings, Api::Messages, Api::Gemini]
        {
            assert!(APIS.contains(&api.as_str()), "{}", api.as_str());
        }
    }
}
