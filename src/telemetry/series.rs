//! The counters of one environment that every request updates.

use super::catalogue::{CLAMPED, DRAINED, QUEUE_WAIT, REQUESTS};
use super::code::{CLASSES, class_of, code_of};
use super::model_series::{ModelMetrics, ModelSeries, SeriesOrigin};
use super::summaries::{Summaries, UpstreamSummary};
use super::{Record, RequestOutcome};
use crate::config::{Config, Environment, UpstreamSettings};
use crate::error::CODES;
use crate::estimate::PUBLIC_MODELS;
use crate::glob::Glob;
use crate::quota::Scope;
use prometheus::{Histogram, HistogramVec, IntCounter, IntCounterVec, Registry};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

/// Maximum number of callers with a label of their own. All others have the label `other`.
pub(super) const MAX_NAMED_CALLERS: usize = 200;

/// The counters of one environment that every request updates. Each is looked up once. A lookup by label values for
/// every request took a microsecond.
#[derive(Debug)]
pub(crate) struct Series {
    environment: String,
    /// Patterns of models: those of the allow-list, then those of quotas.
    patterns: Vec<Glob>,
    callers: CallerLabels,
    /// By API. Each has a counter for every combination of outcome and code that occurs.
    requests: [OnceLock<Box<[OnceLock<IntCounter>]>>; APIS.len()],
    /// The upstream for requests without a route, then those of the routes.
    upstreams: Box<[RoutedSeries]>,
    queue_wait: OnceLock<Histogram>,
    clamped: IntCounter,
    drained: IntCounter,
}

/// The series of the requests that one upstream answers.
#[derive(Debug)]
struct RoutedSeries {
    origin: SeriesOrigin,
    /// Indexed by model label.
    models: Box<[OnceLock<Box<ModelSeries>>]>,
    summary: Arc<UpstreamSummary>,
}

/// The metrics that a [`Series`] belongs to.
#[derive(Debug)]
pub(super) struct SeriesMetrics {
    pub(super) requests: IntCounterVec,
    pub(super) models: ModelMetrics,
    queue_wait: HistogramVec,
    clamped: IntCounterVec,
    drained: IntCounterVec,
    pub(super) summaries: Summaries,
}

impl SeriesMetrics {
    pub(super) fn new(registry: &Registry) -> prometheus::Result<Self> {
        Ok(Self {
            requests: REQUESTS.counters(registry)?,
            models: ModelMetrics::new(registry)?,
            queue_wait: QUEUE_WAIT.histograms(registry)?,
            clamped: CLAMPED.counters(registry)?,
            drained: DRAINED.counters(registry)?,
            summaries: Summaries::default(),
        })
    }
}

/// The index of a model's label in metrics: known models, then the patterns of the environment, then `other`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ModelLabel(usize);

/// The index of a caller's label in metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct CallerLabel(pub(super) usize);

/// The labels of an environment's callers: none, `other`, and names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct CallerLabels {
    /// `telemetry.caller_label`.
    is_enabled: bool,
    names: Vec<String>,
}

impl CallerLabels {
    /// The labels of each environment's callers, in the order of the config: the first [`MAX_NAMED_CALLERS`] have names.
    pub(crate) fn of(config: &Config) -> Vec<Self> {
        let is_enabled = config.telemetry.caller_label;
        let mut left = if is_enabled { MAX_NAMED_CALLERS } else { 0 };
        let of_environment = |environment: &Arc<Environment>| {
            let names: Vec<String> =
                environment.callers.iter().take(left).map(|caller| caller.name.clone()).collect();
            left -= names.len();
            Self { is_enabled, names }
        };
        config.environments.iter().map(of_environment).collect()
    }

    /// The label of the caller with this index in the environment. `None`: the request has no caller.
    fn label(&self, caller: Option<usize>) -> CallerLabel {
        match caller {
            Some(index) if index < self.names.len() => CallerLabel(index + 2),
            Some(_) if self.is_enabled => CallerLabel(1),
            _ => CallerLabel(0),
        }
    }

    pub(super) fn text(&self, label: CallerLabel) -> &str {
        match label.0 {
            0 => "",
            1 => "other",
            index => self.names.get(index - 2).map_or("other", String::as_str),
        }
    }

    /// Number of labels.
    pub(super) fn len(&self) -> usize {
        self.names.len() + 2
    }

    /// Whether this caller has a label of its own.
    pub(super) fn has_name(&self, name: &str) -> bool {
        self.names.iter().any(|named| named == name)
    }
}

/// Values of the `api` label. A request without an endpoint has the first one.
const APIS: [&str; 15] = [
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
    pub(super) fn new(
        metrics: &SeriesMetrics,
        environment: &Environment,
        callers: CallerLabels,
        has_gen_ai: bool,
    ) -> Self {
        let name = environment.name.as_str();
        let of_quota = |scope: &Scope| scope.models().cloned();
        let of_quotas = environment.quotas.iter().filter_map(|quota| of_quota(&quota.scope));
        let patterns: Vec<Glob> = environment.models.iter().cloned().chain(of_quotas).collect();
        let models = PUBLIC_MODELS.len() + patterns.len() + 1;
        let of_upstream = |upstream: &Arc<UpstreamSettings>| RoutedSeries {
            origin: SeriesOrigin {
                upstream: upstream.name.clone(),
                gen_ai_provider: has_gen_ai.then(|| super::gen_ai::provider(upstream.api)),
            },
            models: (0..models).map(|_| OnceLock::new()).collect(),
            summary: metrics.summaries.upstream(&upstream.name),
        };
        for (outcome, code) in [(RequestOutcome::Answered, "2xx"), (RequestOutcome::UpstreamError, "5xx")] {
            metrics.requests.with_label_values(&[name, "chat", outcome.as_str(), code]);
        }
        Self {
            environment: name.to_owned(),
            patterns,
            callers,
            requests: [const { OnceLock::new() }; APIS.len()],
            upstreams: all_upstreams(environment).into_iter().map(of_upstream).collect(),
            queue_wait: OnceLock::new(),
            clamped: metrics.clamped.with_label_values(&[name]),
            drained: metrics.drained.with_label_values(&[name]),
        }
    }

    /// The series of the upstream that a request was sent to last; of a request that was not sent, the first.
    fn routed(&self, record: &Record) -> &RoutedSeries {
        let name = record.upstream.as_ref().map(|upstream| upstream.name.as_str());
        let is_last = |routed: &&RoutedSeries| Some(routed.origin.upstream.as_str()) == name;
        // Most environments have one upstream.
        let others = self.upstreams.get(1..).unwrap_or_default();
        others.iter().find(is_last).unwrap_or(&self.upstreams[0])
    }

    /// The label of a model: its name if it is a known one, else the pattern of the environment that matches it, else
    /// `other`. So the config bounds the number of series.
    pub(crate) fn label(&self, model: &str) -> ModelLabel {
        let known = PUBLIC_MODELS.iter().position(|known| *known == model);
        let listed = || self.patterns.iter().position(|pattern| pattern.matches(model));
        let index = known.unwrap_or_else(|| PUBLIC_MODELS.len() + listed().unwrap_or(self.patterns.len()));
        ModelLabel(index)
    }

    /// The label of the caller with this index in the environment. `None`: the request has no caller.
    pub(crate) fn caller_label(&self, caller: Option<usize>) -> CallerLabel {
        self.callers.label(caller)
    }

    fn model_text(&self, label: ModelLabel) -> &str {
        let listed = || self.patterns.get(label.0.saturating_sub(PUBLIC_MODELS.len())).map(Glob::as_str);
        PUBLIC_MODELS.get(label.0).copied().or_else(listed).unwrap_or("other")
    }

    /// Counts a request that has ended after `elapsed`, the tokens charged for it, and its times.
    pub(super) fn count(&self, metrics: &SeriesMetrics, record: &Record, elapsed: Duration) {
        self.count_request(metrics, record);
        let routed = self.routed(record);
        if record.upstream.is_some() {
            routed.summary.add(record);
        }
        for (upstream, outcome) in record.attempts.earlier() {
            metrics.summaries.upstream(&upstream.name).add_attempt(*outcome);
        }
        if let Some(waited) = record.queue_wait {
            let by_name = || metrics.queue_wait.with_label_values(&[&self.environment]);
            self.queue_wait.get_or_init(by_name).observe(waited.as_secs_f64());
        }
        if record.clamped_to.is_some() {
            self.clamped.inc();
        }
        if record.is_drained {
            self.drained.inc();
        }
        let Some(label) = record.model_label else { return };
        let new = || {
            let (environment, model) = (self.environment.as_str(), self.model_text(label));
            Box::new(ModelSeries::new(
                &metrics.models,
                environment,
                model,
                &routed.origin,
                self.callers.len(),
            ))
        };
        let model = routed.models[label.0].get_or_init(new);
        let names =
            (self.environment.as_str(), self.model_text(label), self.callers.text(record.caller_label));
        model.count(&metrics.models, names, record, elapsed);
        if record.has_reported_prompt() {
            let summary = model.estimates(|| metrics.summaries.model(self.model_text(label)));
            summary.add(record.estimated_prompt, record.reported_prompt);
        }
    }

    fn count_request(&self, metrics: &SeriesMetrics, record: &Record) {
        let api = APIS.iter().position(|known| *known == record.api).unwrap_or(0);
        let by_labels = || {
            let labels = [self.environment.as_str(), APIS[api], record.outcome.as_str(), code_of(record)];
            metrics.requests.with_label_values(&labels)
        };
        let classes = CLASSES.len() * RequestOutcome::ALL.len();
        // An error code of the gateway has one outcome. The class of a status occurs with several.
        let slot = if record.error.is_empty() {
            Some(record.outcome as usize * CLASSES.len() + class_of(record))
        } else {
            CODES.iter().position(|code| *code == record.error).map(|code| classes + code)
        };
        let new = || (0..classes + CODES.len()).map(|_| OnceLock::new()).collect();
        match slot.and_then(|slot| self.requests[api].get_or_init(new).get(slot)) {
            Some(counter) => counter.get_or_init(by_labels).inc(),
            None => by_labels().inc(),
        }
    }
}

/// The upstream of an environment for requests without a route, then those of its routes, each once.
fn all_upstreams(environment: &Environment) -> Vec<&Arc<UpstreamSettings>> {
    let mut all = vec![&environment.upstream];
    for upstream in environment.routes.iter().flat_map(|route| &route.upstreams) {
        if all.iter().all(|known| known.name != upstream.name) {
            all.push(upstream);
        }
    }
    all
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

    #[test]
    fn two_hundred_callers_have_names_and_the_others_are_one() {
        let keys = |from: usize, to: usize| {
            let key = |n| format!("{{ name: c{n}, sha256: '{n:064x}' }}");
            (from..to).map(key).collect::<Vec<_>>().join(", ")
        };
        let config = |switch: &str| {
            let text = format!(
                "telemetry: {{ caller_label: {switch} }}\nupstreams: {{ u: {{ base_url: 'http://h' }} }}\nenvironments:\n  \
                 a: {{ upstream: u, keys: [{}] }}\n  b: {{ upstream: u, keys: [{}] }}\n  c: {{ upstream: u }}\n",
                keys(0, 150),
                keys(150, 250)
            );
            crate::config::parse(&text, "test.yaml", &|_| None, &[]).unwrap().config
        };
        let labels = CallerLabels::of(&config("true"));
        let text = |at: usize, caller| labels[at].text(labels[at].label(caller));
        assert_eq!((text(0, Some(149)), text(1, Some(49)), text(1, Some(50))), ("c149", "c199", "other"));
        assert_eq!((text(0, None), text(2, None)), ("", ""));
        assert!(labels[1].has_name("c199") && !labels[1].has_name("c200"));
        let labels = CallerLabels::of(&config("false"));
        assert_eq!(labels[0].text(labels[0].label(Some(0))), "");
    }
}
