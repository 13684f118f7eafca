//! Metrics with the names of OpenTelemetry's conventions for generative AI (`telemetry.gen_ai_metrics`).

use super::Record;
use super::catalogue::{GEN_AI_DURATION, GEN_AI_FIRST_TOKEN, GEN_AI_PER_TOKEN, GEN_AI_TOKEN_USAGE};
use super::code::code_of;
use crate::config::ApiKind;
use prometheus::{Histogram, HistogramVec, Registry};
use std::sync::OnceLock;
use std::time::Duration;

/// All metrics by these conventions. Without the setting they have no samples.
#[derive(Debug)]
pub(super) struct GenAiMetrics {
    token_usage: HistogramVec,
    duration: HistogramVec,
    first_token: HistogramVec,
    per_token: HistogramVec,
}

impl GenAiMetrics {
    pub(super) fn new(registry: &Registry) -> prometheus::Result<Self> {
        Ok(Self {
            token_usage: GEN_AI_TOKEN_USAGE.histograms(registry)?,
            duration: GEN_AI_DURATION.histograms(registry)?,
            first_token: GEN_AI_FIRST_TOKEN.histograms(registry)?,
            per_token: GEN_AI_PER_TOKEN.histograms(registry)?,
        })
    }
}

/// The metrics of the requests for one model of one environment. Each is looked up once, except those of errors.
#[derive(Debug)]
pub(super) struct GenAiSeries {
    provider: &'static str,
    model: String,
    /// In the order of [`OPERATIONS`].
    answered: [OnceLock<AnsweredSeries>; OPERATIONS.len()],
}

/// The metrics of complete, successful answers.
#[derive(Debug)]
struct AnsweredSeries {
    duration: Histogram,
    /// Input and output tokens.
    token_usage: [Histogram; 2],
    stream: OnceLock<[Histogram; 2]>,
}

/// The names of the operations that the conventions have.
const OPERATIONS: [&str; 4] = ["chat", "text_completion", "embeddings", "generate_content"];
const TOKEN_TYPES: [&str; 2] = ["input", "output"];

impl GenAiSeries {
    pub(super) fn new(provider: &'static str, model: &str) -> Self {
        let answered = [const { OnceLock::new() }; OPERATIONS.len()];
        Self { provider, model: model.to_owned(), answered }
    }

    /// Counts a request that was sent to an upstream. `times`: seconds to the first token and between two tokens.
    pub(super) fn count(
        &self,
        metrics: &GenAiMetrics,
        record: &Record,
        elapsed: Duration,
        times: Option<(f64, Option<f64>)>,
    ) {
        let Some(operation) = operation(record.api) else { return };
        let labels = [OPERATIONS[operation], self.provider, self.model.as_str()];
        let with = |last: &'static str| [labels[0], labels[1], labels[2], last];
        let answered = self.answered[operation].get_or_init(|| AnsweredSeries {
            duration: metrics.duration.with_label_values(&with("")),
            token_usage: TOKEN_TYPES.map(|kind| metrics.token_usage.with_label_values(&with(kind))),
            stream: OnceLock::new(),
        });
        if record.is_answered() {
            answered.duration.observe(elapsed.as_secs_f64());
        } else {
            metrics.duration.with_label_values(&with(code_of(record))).observe(elapsed.as_secs_f64());
        }
        if let Some(tokens) = record.charged_tokens() {
            #[allow(clippy::cast_precision_loss)] // for a histogram
            answered.token_usage.iter().zip(tokens).for_each(|(usage, tokens)| usage.observe(tokens as f64));
        }
        if let Some((first_token, per_token)) = times {
            let [first_tokens, per_tokens] = answered.stream.get_or_init(|| {
                [&metrics.first_token, &metrics.per_token].map(|metric| metric.with_label_values(&labels))
            });
            first_tokens.observe(first_token);
            per_token.into_iter().for_each(|seconds| per_tokens.observe(seconds));
        }
    }
}

/// The index of the operation of an API. `None`: the conventions have none.
fn operation(api: &str) -> Option<usize> {
    Some(match api {
        "chat" | "responses" | "messages" => 0,
        "completions" => 1,
        "embeddings" => 2,
        "gemini" => 3,
        _ => return None,
    })
}

/// The name of the operation of an API. `None`: the conventions have none.
pub(super) fn operation_name(api: &str) -> Option<&'static str> {
    operation(api).map(|operation| OPERATIONS[operation])
}

/// The name of the provider behind an upstream.
pub(super) fn provider(api: ApiKind) -> &'static str {
    match api {
        ApiKind::OpenAi => "openai",
        ApiKind::Azure => "azure.ai.openai",
        ApiKind::Anthropic => "anthropic",
        ApiKind::Gemini => "gcp.gemini",
    }
}
