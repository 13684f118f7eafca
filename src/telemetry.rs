//! What the gateway tells of itself: metrics, and one log line per request.

mod log;
mod metrics;

use crate::clock::Stopwatch;
use crate::quota::Amounts;
use std::sync::Arc;
use std::time::Duration;

pub use log::{LogOutput, init_logging};
pub use metrics::Metrics;
pub(crate) use metrics::{ModelLabel, Series};

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The upstream's answer, whole.
    Answered,
    /// The upstream's answer, with a status of 400 or more.
    UpstreamError,
    /// The gateway answered in its own name.
    Refused,
    /// A quota was short: refused.
    Rejected,
    /// No answer came from the upstream.
    UpstreamFailed,
    /// The upstream broke off.
    UpstreamCut,
    /// The caller hung up.
    CallerGone,
    /// The stream had outgrown its reservation, and nothing was left: ended by the gateway.
    QuotaCut,
}

impl Outcome {
    /// All of them, in the order of their numbers.
    pub const ALL: [Self; 8] = [
        Self::Answered,
        Self::UpstreamError,
        Self::Refused,
        Self::Rejected,
        Self::UpstreamFailed,
        Self::UpstreamCut,
        Self::CallerGone,
        Self::QuotaCut,
    ];

    /// Its name in logs and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Answered => "answered",
            Self::UpstreamError => "upstream_error",
            Self::Refused => "refused",
            Self::Rejected => "rejected",
            Self::UpstreamFailed => "upstream_failed",
            Self::UpstreamCut => "upstream_cut",
            Self::CallerGone => "caller_gone",
            Self::QuotaCut => "quota_cut",
        }
    }
}

/// What is told of one request. Dropping it writes the log line and counts the request: every path
/// out of the gateway leads through here, a caller that hangs up included.
#[derive(Debug)]
pub struct Record {
    metrics: Arc<Metrics>,
    started: Stopwatch,
    /// The upstream's request id, or one made here.
    pub request_id: String,
    /// Empty until it is known.
    pub environment: Arc<str>,
    /// The caller's name; empty in an open environment.
    pub caller: Option<Arc<str>>,
    /// The API, or the kind of path.
    pub api: &'static str,
    /// As the request names it.
    pub model: String,
    /// What `model` is called in metrics: a bounded set of names.
    pub(crate) model_label: Option<ModelLabel>,
    /// The environment's counters, once it is known.
    pub(crate) series: Option<Arc<Series>>,
    /// How it ended; until something better is known the caller has gone.
    pub outcome: Outcome,
    /// Sent to the caller.
    pub status: u16,
    /// The code of the gateway's own error.
    pub error: &'static str,
    /// Whether the answer is an event stream.
    pub streams: bool,
    /// Reserved for the prompt before the call.
    pub estimated_prompt: u64,
    /// What was counted of it, before that was corrected.
    pub raw_estimate: u64,
    /// What was charged.
    pub charged: Amounts,
    /// Whether the upstream reported its usage.
    pub reported: bool,
    /// The prompt tokens that it reported.
    pub reported_prompt: u64,
    /// From the request sent to the answer's head.
    pub first_byte: Option<Duration>,
    /// The gateway's own time.
    pub overhead: Option<Duration>,
}

impl Record {
    /// A record of the request that has just come in.
    pub fn begin(metrics: Arc<Metrics>) -> Self {
        Self {
            metrics,
            started: Stopwatch::start(),
            request_id: String::new(),
            environment: "".into(),
            caller: None,
            api: "none",
            model: String::new(),
            model_label: None,
            series: None,
            outcome: Outcome::CallerGone,
            status: 0,
            error: "",
            streams: false,
            estimated_prompt: 0,
            raw_estimate: 0,
            charged: Amounts::default(),
            reported: false,
            reported_prompt: 0,
            first_byte: None,
            overhead: None,
        }
    }

    /// The metrics it will be counted in.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// Since the request came in.
    pub fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        self.metrics.request(self);
        log::request(self, self.started.elapsed());
    }
}

/// A request id of the gateway's own: unique across restarts, tells nothing.
#[derive(Debug)]
pub struct RequestIds {
    start: u64,
    next: std::sync::atomic::AtomicU64,
}

impl RequestIds {
    /// Starts at a random place.
    pub fn new() -> Self {
        let start = getrandom::u64().unwrap_or_else(|_| u64::from(std::process::id()));
        Self { start, next: 0.into() }
    }

    /// The next id.
    pub fn next(&self) -> String {
        let n = self.next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        // An odd factor maps the counter one to one onto numbers that look unrelated.
        format!("req_{:016x}{:016x}", self.start, n.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }
}

impl Default for RequestIds {
    fn default() -> Self {
        Self::new()
    }
}
