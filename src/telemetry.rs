//! Metrics, and one log line for each request.

mod attempts;
mod catalogue;
mod causes;
mod code;
mod denial;
mod event_count;
mod exposition;
mod gen_ai;
mod intervals;
mod log;
mod metrics;
mod model_series;
mod process;
mod providers;
mod refusals;
mod rejections;
mod replicas;
mod series;
mod state;
mod summaries;
mod traces;

use crate::clock::Stopwatch;
use crate::config::UpstreamSettings;
use crate::estimate::EstimateSource;
use crate::quota::Amounts;
use http::Uri;
use http::request::Parts;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

pub(crate) use attempts::AttemptOutcome;
use attempts::Attempts;
pub(crate) use causes::LastDay;
pub(crate) use denial::Denial;
pub(crate) use event_count::EventCount;
pub(crate) use log::{
    LevelView, Line, LogOutput, configure_logging, init_logging, log_level, set_log_level, write_event,
};
pub(crate) use metrics::Metrics;
pub(crate) use refusals::RefusalCounts;
pub(crate) use rejections::{Rejection, RejectionView, Rejections};
pub(crate) use series::{CallerLabel, CallerLabels, ModelLabel, Series};
pub(crate) use state::StateSources;
pub(crate) use summaries::{EstimateFigures, UpstreamFigures};
pub(crate) use traces::{RequestTrace, Tracing};

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RequestOutcome {
    /// The caller got the upstream's complete answer.
    Answered,
    /// The caller got the upstream's complete answer, with a status of 400 or more.
    UpstreamError,
    /// The gateway answered with an error of its own.
    Refused,
    /// A quota denied the request.
    Rejected,
    /// The upstream gave no answer.
    UpstreamFailed,
    /// The upstream ended its answer before it was complete.
    UpstreamCut,
    /// The caller disconnected.
    CallerGone,
    /// The gateway ended a stream that exceeded its reservation when no quota was left.
    QuotaCut,
    /// The gateway ended the answer at its shutdown.
    ShutdownCut,
}

impl RequestOutcome {
    /// All outcomes, in the order of their discriminants.
    pub(crate) const ALL: [Self; 9] = [
        Self::Answered,
        Self::UpstreamError,
        Self::Refused,
        Self::Rejected,
        Self::UpstreamFailed,
        Self::UpstreamCut,
        Self::CallerGone,
        Self::QuotaCut,
        Self::ShutdownCut,
    ];

    /// The value of the `outcome` field of logs and the `outcome` label of metrics.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Answered => "answered",
            Self::UpstreamError => "upstream_error",
            Self::Refused => "refused",
            Self::Rejected => "rejected",
            Self::UpstreamFailed => "upstream_failed",
            Self::UpstreamCut => "upstream_cut",
            Self::CallerGone => "caller_gone",
            Self::QuotaCut => "quota_cut",
            Self::ShutdownCut => "shutdown_cut",
        }
    }
}

/// What the gateway logs and counts about one request. Dropping it writes the log line and updates the metrics, so no
/// request is left out, also not one whose caller disconnects.
#[derive(Debug)]
pub(crate) struct Record {
    metrics: Arc<Metrics>,
    started: Stopwatch,
    /// The upstream's request id, or one of [`RequestIds`].
    pub(crate) request_id: String,
    /// The caller's address. Behind a trusted proxy, the address that it reports.
    pub(crate) address: Option<IpAddr>,
    /// Name of the environment. Empty until it is identified.
    pub(crate) environment: Arc<str>,
    /// The caller's name. `None` in an open environment.
    pub(crate) caller: Option<Arc<str>>,
    /// The API of the endpoint, or the kind of path if the endpoint has no API.
    pub(crate) api: &'static str,
    /// The model that the request names.
    pub(crate) model: String,
    /// The label of `model` in metrics. The set of labels is bounded.
    pub(crate) model_label: Option<ModelLabel>,
    /// The label of `caller` in metrics.
    pub(crate) caller_label: CallerLabel,
    /// The upstream, once the request is sent to it.
    pub(crate) upstream: Option<Arc<UpstreamSettings>>,
    /// Index of its replica that the request was sent to last.
    pub(crate) replica: Option<usize>,
    /// The upstreams that the request tried before the last one, or left out.
    pub(crate) attempts: Attempts,
    /// The id of the trace that the request belongs to.
    pub(crate) trace_id: Option<Box<str>>,
    /// The spans of the request. `None`: the gateway sends no traces.
    pub(crate) trace: Option<Box<RequestTrace>>,
    /// Whether the body was parsed, so that the model and the estimate are known.
    pub(crate) is_parsed: bool,
    /// The tokens reserved when the request was admitted. `None`: nothing was reserved.
    pub(crate) reserved_tokens: Option<u64>,
    /// The metric series of the environment, once it is identified.
    pub(crate) series: Option<Arc<Series>>,
    /// How the request ended. `CallerGone` until another outcome is recorded.
    pub(crate) outcome: RequestOutcome,
    /// The status sent to the caller.
    pub(crate) status: u16,
    /// The code of the gateway's error. Empty if there is none.
    pub(crate) error: &'static str,
    /// The message of the gateway's error. `None`: there is no error, or other fields have its cause.
    pub(crate) error_message: Option<Box<str>>,
    /// The limit that denied the request; of several quotas, the one with the longest wait.
    pub(crate) denied_by: Option<Box<Denial>>,
    /// Whether the answer is an event stream.
    pub(crate) is_stream: bool,
    /// Prompt tokens reserved before the request was forwarded.
    pub(crate) estimated_prompt: u64,
    /// The prompt estimate before any correction.
    pub(crate) raw_estimate: u64,
    /// What `estimated_prompt` comes from.
    pub(crate) estimate_source: EstimateSource,
    /// The amounts charged.
    pub(crate) charged: Amounts,
    /// Whether the upstream reported its usage.
    pub(crate) is_usage_reported: bool,
    /// The prompt tokens that the upstream reported.
    pub(crate) reported_prompt: u64,
    /// Time from the end of the request to the head of the answer.
    pub(crate) first_byte: Option<Duration>,
    /// Time from the arrival of the request to the first token of its stream.
    pub(crate) first_token: Option<Duration>,
    /// Time that the gateway itself used before it sent the request to the upstream. `None`: it was not sent.
    pub(crate) overhead: Option<Duration>,
    /// Time that the request waited for room in its quotas, or at the provider of an upstream. `None`: it did not wait.
    pub(crate) queue_wait: Option<Duration>,
    /// The lowered limit of completion tokens per completion. `None`: the request was not clamped.
    pub(crate) clamped_to: Option<u64>,
    /// Whether the answer was read without the caller, which had disconnected.
    pub(crate) is_drained: bool,
}

impl Record {
    /// Begins the record of a request that has just arrived.
    pub(crate) fn begin(metrics: Arc<Metrics>) -> Self {
        Self {
            metrics,
            started: Stopwatch::start(),
            request_id: String::new(),
            address: None,
            // Unlike `"".into()`, this allocates nothing.
            environment: Arc::default(),
            caller: None,
            api: "none",
            model: String::new(),
            model_label: None,
            caller_label: CallerLabel::default(),
            upstream: None,
            replica: None,
            attempts: Attempts::default(),
            trace_id: None,
            trace: None,
            is_parsed: false,
            reserved_tokens: None,
            series: None,
            outcome: RequestOutcome::CallerGone,
            status: 0,
            error: "",
            error_message: None,
            denied_by: None,
            is_stream: false,
            estimated_prompt: 0,
            raw_estimate: 0,
            estimate_source: EstimateSource::default(),
            charged: Amounts::default(),
            is_usage_reported: false,
            reported_prompt: 0,
            first_byte: None,
            first_token: None,
            overhead: None,
            queue_wait: None,
            clamped_to: None,
            is_drained: false,
        }
    }

    /// Runs since the request arrived.
    pub(crate) fn started(&self) -> Stopwatch {
        self.started
    }

    fn is_answered(&self) -> bool {
        self.outcome == RequestOutcome::Answered
    }

    /// The URL of the server that the request was sent to last, or of the only one. `None`: it was sent to none.
    fn server(&self) -> Option<&Uri> {
        let upstream = self.upstream.as_ref()?;
        match (self.replica, &*upstream.base_urls) {
            (Some(index), urls) => urls.get(index),
            (None, [only]) => Some(only),
            (None, _) => None,
        }
    }

    /// Host and port of the replica that the request was sent to last. `None`: the upstream has only one, or it was sent to
    /// none.
    fn replica_address(&self) -> Option<String> {
        let [_, _, ..] = &*self.upstream.as_ref()?.base_urls else { return None };
        self.server().map(UpstreamSettings::address)
    }

    /// Prompt and completion tokens charged, which add up to the total. Tokens that the upstream reports in its total alone
    /// count as completion tokens. `None`: nothing was charged.
    fn charged_tokens(&self) -> Option<[u64; 2]> {
        let Amounts { prompt, completion, total, .. } = self.charged;
        let completion = completion.max(total.saturating_sub(prompt));
        (prompt > 0 || completion > 0).then_some([prompt, completion])
    }

    /// Begins the trace of the request, or its part of the caller's trace. Without `tracing` only the id is recorded.
    pub(crate) fn begin_trace(&mut self, tracing: Option<&Arc<Tracing>>, head: &Parts) {
        let parent = traces::parent_of(&head.headers);
        self.trace_id = parent.as_ref().map(|parent| parent.trace_id().to_string().into());
        let Some(tracing) = tracing else { return };
        let trace = RequestTrace::begin(tracing, parent, &head.method, self.started.elapsed());
        if let Some(trace) = trace {
            self.trace_id = Some(trace.id().into());
            self.trace = Some(Box::new(trace));
        }
    }

    /// Begins the call of the upstream. Returns the `traceparent` that the upstream gets instead of the caller's. `None`: the
    /// gateway sends no traces, and the caller's header is passed on.
    pub(crate) fn call_upstream(&mut self) -> Option<String> {
        let trace = self.trace.as_mut()?;
        Some(trace.call_upstream(self.started.elapsed()))
    }

    /// Records the model that the answer names, in the trace. Without one it is not looked for.
    pub(crate) fn answered_by(&mut self, model: impl FnOnce() -> Option<String>) {
        if let Some(trace) = &mut self.trace {
            trace.answered_by(model);
        }
    }

    /// Adds a wait for room that has just ended. `None`: the request has not waited.
    pub(crate) fn add_wait(&mut self, wait: Option<Duration>) {
        let Some(wait) = wait else { return };
        self.queue_wait = Some(self.queue_wait.unwrap_or_default() + wait);
        if let Some(trace) = &self.trace {
            trace.waited(wait, self.started.elapsed());
        }
    }

    /// Whether the answer is complete, and shows how far the estimate was off.
    fn has_reported_prompt(&self) -> bool {
        self.is_answered() && self.reported_prompt > 0 && self.raw_estimate > 0
    }

    /// The metrics that this record updates.
    pub(crate) fn metrics(&self) -> &Metrics {
        &self.metrics
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        let elapsed = self.started.elapsed();
        self.metrics.request(self, elapsed);
        log::request(self, elapsed);
        if let Some(trace) = self.trace.take() {
            trace.end(self, elapsed);
        }
    }
}

/// Generates request ids. They are unique across restarts and reveal nothing about the gateway.
#[derive(Debug)]
pub(crate) struct RequestIds {
    start: u64,
    next: std::sync::atomic::AtomicU64,
}

impl RequestIds {
    /// Starts at a random number.
    pub(crate) fn new() -> Self {
        Self { start: crate::random::number(), next: 0.into() }
    }

    /// Returns a new id.
    pub(crate) fn next(&self) -> String {
        let n = self.next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        // An odd factor maps the counter one to one to numbers that look random.
        let number = n.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        // `format!` would allocate the text more than once.
        let mut id = *b"req_................................";
        let bytes = [self.start, number].map(u64::to_be_bytes).into_iter().flatten();
        for (digits, byte) in id[4..].chunks_exact_mut(2).zip(bytes) {
            let digit = |number: u8| b"0123456789abcdef"[usize::from(number)];
            digits.copy_from_slice(&[digit(byte >> 4), digit(byte & 15)]);
        }
        String::from_utf8(id.to_vec()).unwrap_or_default()
    }
}

impl Default for RequestIds {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests;
