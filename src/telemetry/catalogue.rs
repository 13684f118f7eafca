//! Names, labels, buckets and help texts of all metrics. docs/metrics.md describes each of them.

use prometheus::core::Collector;
use prometheus::{HistogramOpts, HistogramVec, IntCounterVec, Opts, Registry};

/// The description of one metric.
#[derive(Debug)]
pub(super) struct Metric {
    pub(super) name: &'static str,
    pub(super) kind: MetricKind,
    pub(super) labels: &'static [&'static str],
    pub(super) help: &'static str,
}

#[derive(Debug)]
pub(super) enum MetricKind {
    Counter,
    Gauge,
    /// The upper bounds of its buckets.
    Histogram(&'static [f64]),
}

impl Metric {
    /// Registers a counter.
    pub(super) fn counters(&self, registry: &Registry) -> prometheus::Result<IntCounterVec> {
        register(registry, IntCounterVec::new(Opts::new(self.name, self.help), self.labels)?)
    }

    /// Registers a histogram.
    pub(super) fn histograms(&self, registry: &Registry) -> prometheus::Result<HistogramVec> {
        let MetricKind::Histogram(buckets) = self.kind else {
            return Err(prometheus::Error::Msg(format!("{} is not a histogram", self.name)));
        };
        let options = HistogramOpts::new(self.name, self.help).buckets(buckets.to_vec());
        register(registry, HistogramVec::new(options, self.labels)?)
    }

    /// The word for its type in Prometheus's text format.
    pub(super) fn type_name(&self) -> &'static str {
        match self.kind {
            MetricKind::Counter => "counter",
            MetricKind::Gauge => "gauge",
            MetricKind::Histogram(_) => "histogram",
        }
    }
}

fn register<M: Collector + Clone + 'static>(registry: &Registry, metric: M) -> prometheus::Result<M> {
    registry.register(Box::new(metric.clone()))?;
    Ok(metric)
}

const fn counter(name: &'static str, labels: &'static [&'static str], help: &'static str) -> Metric {
    Metric { name, kind: MetricKind::Counter, labels, help }
}

const fn gauge(name: &'static str, labels: &'static [&'static str], help: &'static str) -> Metric {
    Metric { name, kind: MetricKind::Gauge, labels, help }
}

const fn histogram(
    name: &'static str,
    labels: &'static [&'static str],
    buckets: &'static [f64],
    help: &'static str,
) -> Metric {
    Metric { name, kind: MetricKind::Histogram(buckets), labels, help }
}

// The buckets that OpenTelemetry's conventions for generative AI advise.
const DURATION_BUCKETS: &[f64] =
    &[0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92];
const FIRST_TOKEN_BUCKETS: &[f64] =
    &[0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0];
const PER_TOKEN_BUCKETS: &[f64] = &[0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5];
const TOKEN_BUCKETS: &[f64] = &[
    1.0,
    4.0,
    16.0,
    64.0,
    256.0,
    1_024.0,
    4_096.0,
    16_384.0,
    65_536.0,
    262_144.0,
    1_048_576.0,
    4_194_304.0,
    16_777_216.0,
    67_108_864.0,
];

const OVERHEAD_BUCKETS: &[f64] =
    &[0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.05, 0.25];
const WAIT_BUCKETS: &[f64] = &[0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];
const RATIO_BUCKETS: &[f64] = &[0.5, 0.75, 0.9, 0.95, 0.98, 0.999, 1.001, 1.02, 1.05, 1.1, 1.25, 1.5, 2.0];

// In alphabetical order, as the library writes the labels of the others.
const QUOTA: &[&str] = &["environment", "kind", "name", "per", "scope"];
const REPLICA: &[&str] = &["upstream", "replica"];
const PROVIDER: &[&str] = &["kind", "model", "upstream"];
const ENVIRONMENT: &[&str] = &["environment"];
const REJECTION: &[&str] = &["environment", "scope", "kind", "per", "code"];
const EXCHANGE: &[&str] = &["environment", "model", "upstream"];
const GEN_AI: &[&str] = &["gen_ai_operation_name", "gen_ai_provider_name", "gen_ai_request_model"];

pub(super) const REQUESTS: Metric = counter(
    "tollgate_requests_total",
    &["environment", "api", "outcome", "code"],
    "Requests that have ended, by outcome and by status class or error code of the gateway.",
);
pub(super) const REJECTIONS: Metric = counter(
    "tollgate_rejections_total",
    REJECTION,
    "Requests that a quota or limit denied, by the quota with the longest wait.",
);
pub(super) const SHADOW_REJECTIONS: Metric = counter(
    "tollgate_shadow_rejections_total",
    REJECTION,
    "Requests that a quota would have denied, in an environment that does not enforce its quotas.",
);
pub(super) const TOKENS: Metric =
    counter("tollgate_tokens_total", &["environment", "model", "kind", "caller"], "Tokens charged.");
pub(super) const USAGE_MISSING: Metric = counter(
    "tollgate_usage_missing_total",
    &["environment", "reason"],
    "Answers without credible usage, which the gateway charged by its own count.",
);
pub(super) const UPSTREAM_KEYS_MASKED: Metric = counter(
    "tollgate_upstream_keys_masked_total",
    &["upstream"],
    "Errors of an upstream that repeated the gateway's key, which was masked.",
);
pub(super) const CLAMPED: Metric = counter(
    "tollgate_clamped_total",
    ENVIRONMENT,
    "Requests whose token limit was lowered to what the quotas had left.",
);
pub(super) const DRAINED: Metric = counter(
    "tollgate_drained_total",
    ENVIRONMENT,
    "Answers that were read without their caller, which had disconnected.",
);
pub(super) const REQUEST_DURATION: Metric = histogram(
    "tollgate_request_duration_seconds",
    EXCHANGE,
    DURATION_BUCKETS,
    "Time from the arrival of a request to the end of its answer, of requests sent to an upstream.",
);
pub(super) const FIRST_TOKEN: Metric = histogram(
    "tollgate_time_to_first_token_seconds",
    EXCHANGE,
    FIRST_TOKEN_BUCKETS,
    "Time from the arrival of a request to the first event of its stream.",
);
pub(super) const PER_TOKEN: Metric = histogram(
    "tollgate_time_per_output_token_seconds",
    EXCHANGE,
    PER_TOKEN_BUCKETS,
    "Time between two completion tokens of a stream after the first one, on the average of the stream.",
);
pub(super) const FIRST_BYTE: Metric = histogram(
    "tollgate_upstream_first_byte_seconds",
    EXCHANGE,
    DURATION_BUCKETS,
    "Time from the end of a request to the head of the upstream's answer.",
);
pub(super) const OVERHEAD: Metric = histogram(
    "tollgate_overhead_seconds",
    &[],
    OVERHEAD_BUCKETS,
    "Time the gateway itself uses per request: reading, counting, reserving.",
);
pub(super) const QUEUE_WAIT: Metric = histogram(
    "tollgate_queue_wait_seconds",
    ENVIRONMENT,
    WAIT_BUCKETS,
    "Time that requests waited for room in quotas or at a provider, of requests that had to wait.",
);
pub(super) const QUEUE_LENGTH: Metric =
    gauge("tollgate_queue_length", ENVIRONMENT, "Requests that wait for room in their quotas.");
pub(super) const IN_FLIGHT: Metric =
    gauge("tollgate_in_flight", ENVIRONMENT, "Requests in flight on this node, streams included.");
pub(super) const UPSTREAM_CONNECTIONS: Metric = gauge(
    "tollgate_upstream_connections",
    &["upstream", "replica", "state"],
    "Open connections to a replica.",
);
pub(super) const REPLICA_IN_FLIGHT: Metric = gauge(
    "tollgate_replica_in_flight",
    REPLICA,
    "Requests of this node in flight at a replica of an upstream, streams included.",
);
pub(super) const REPLICA_UP: Metric = gauge(
    "tollgate_replica_up",
    REPLICA,
    "1 while requests go to a replica, 0 while it is left out, because it could not be reached or is not healthy.",
);
pub(super) const REPLICA_FAILURES: Metric = counter(
    "tollgate_replica_failures_total",
    &["upstream", "replica", "reason"],
    "How often a replica could not be reached, or failed its health check.",
);
pub(super) const UPSTREAM_ATTEMPTS: Metric = counter(
    "tollgate_upstream_attempts_total",
    &["upstream", "outcome"],
    "Attempts to send a request to an upstream, and requests that a route with several upstreams did not send to it.",
);
pub(super) const PROVIDER_LIMIT: Metric = gauge(
    "tollgate_provider_limit",
    PROVIDER,
    "Limit that the provider of an upstream states, in tokens or requests per period of its own.",
);
pub(super) const PROVIDER_REMAINING: Metric = gauge(
    "tollgate_provider_remaining",
    PROVIDER,
    "What the provider of an upstream has stated to be left of its limit.",
);
pub(super) const PROVIDER_REFUSALS: Metric = counter(
    "tollgate_provider_refusals_total",
    &["upstream", "model"],
    "Answers of an upstream with status 429, 503 or 529.",
);
pub(super) const PROVIDER_IGNORED: Metric = counter(
    "tollgate_provider_ignored_values_total",
    &["upstream"],
    "Values in the rate limit headers of an upstream that cannot be true.",
);

pub(super) const QUOTA_LIMIT: Metric =
    gauge("tollgate_quota_limit", QUOTA, "Limit of a quota, in tokens or requests per period.");
pub(super) const QUOTA_BURST: Metric = gauge(
    "tollgate_quota_burst",
    QUOTA,
    "Largest amount that a quota can admit at once. For a calendar quota: the limit.",
);
pub(super) const QUOTA_LEVEL: Metric =
    gauge("tollgate_quota_level", QUOTA, "Amount that is left of a quota; below zero it is debt.");
pub(super) const QUOTA_USED: Metric =
    gauge("tollgate_quota_used", QUOTA, "Amount of a quota that is spent and not available again.");
pub(super) const QUOTA_HELD: Metric =
    gauge("tollgate_quota_held", QUOTA, "Amount of a quota that requests in flight hold.");
pub(super) const QUOTA_RESET: Metric = gauge(
    "tollgate_quota_reset_timestamp_seconds",
    QUOTA,
    "When the spent amount of a quota is available again, in seconds since the Unix epoch.",
);
pub(super) const QUOTA_EXHAUSTED: Metric = counter(
    "tollgate_quota_exhausted_seconds_total",
    QUOTA,
    "Time for which nothing was left of a quota, or it had no room for a request that it had refused.",
);
pub(super) const OVERRIDE_ACTIVE: Metric = gauge(
    "tollgate_override_active",
    QUOTA,
    "1 while an administrator's setting is in force instead of the file's. Without kind: of enforce.",
);
pub(super) const OVERRIDE_SINCE: Metric = gauge(
    "tollgate_override_since_timestamp_seconds",
    QUOTA,
    "When an override was set, in seconds since the Unix epoch.",
);

pub(super) const ESTIMATE_RATIO: Metric = histogram(
    "tollgate_estimate_ratio",
    &["model", "source"],
    RATIO_BUCKETS,
    "Prompt tokens reserved for a request, divided by those the upstream reported, by the source of the estimate.",
);
pub(super) const RAW_ESTIMATE_RATIO: Metric = histogram(
    "tollgate_raw_estimate_ratio",
    &[],
    RATIO_BUCKETS,
    "Prompt tokens estimated without correction, divided by those the upstream reported.",
);
pub(super) const ESTIMATES: Metric = counter(
    "tollgate_estimates_total",
    &["tokenizer", "estimate"],
    "Prompt estimates, by tokenizer and by whether the whole prompt was counted.",
);

pub(super) const BUILD_INFO: Metric =
    gauge("tollgate_build_info", &["version"], "The version of this process. The value is 1.");
pub(super) const LAST_RELOAD: Metric = gauge(
    "tollgate_config_last_reload_success_timestamp_seconds",
    &[],
    "When the config in force was loaded, in seconds since the Unix epoch.",
);
pub(super) const LAST_RELOAD_SUCCESSFUL: Metric = gauge(
    "tollgate_config_last_reload_successful",
    &[],
    "0 from a reload that was refused until one succeeds, else 1.",
);
pub(super) const CERTIFICATE_EXPIRY: Metric = gauge(
    "tollgate_tls_certificate_expiry_timestamp_seconds",
    &["listener"],
    "When the certificate of a listener expires, in seconds since the Unix epoch.",
);
pub(super) const RELOAD_FAILURES: Metric = counter(
    "tollgate_config_reload_failures_total",
    &[],
    "Reloads that failed because the new config was invalid.",
);
pub(super) const TRACE_SPANS: Metric = counter(
    "tollgate_trace_spans_total",
    &["outcome"],
    "Spans of traces: sent to the collector, failed to be sent, or dropped because the queue was full.",
);
pub(super) const STORE_UP: Metric =
    gauge("tollgate_store_up", &[], "1 while the store can be written, so that counters are durable.");
pub(super) const REDIS_UP: Metric = gauge(
    "tollgate_redis_up",
    &[],
    "1 while the counters of all environments are shared through Redis, 0 while this node counts without it.",
);
pub(super) const REDIS_LOSSES: Metric = counter(
    "tollgate_redis_losses_total",
    ENVIRONMENT,
    "Number of times this node has lost the connection to Redis.",
);
pub(super) const REDIS_FAULTS: Metric = gauge(
    "tollgate_redis_faults",
    ENVIRONMENT,
    "Wrong settings of the Redis server, which can lose counts or refuse requests; the log and /readyz name them.",
);
pub(super) const NODES: Metric = gauge(
    "tollgate_nodes",
    &[],
    "Nodes that share the counters, by the last answer of Redis; 1 without Redis.",
);

pub(super) const PROCESS_CPU: Metric =
    counter("process_cpu_seconds_total", &[], "CPU time that the process has used, in seconds.");
pub(super) const PROCESS_RESIDENT: Metric =
    gauge("process_resident_memory_bytes", &[], "Resident memory of the process in bytes.");
pub(super) const PROCESS_VIRTUAL: Metric =
    gauge("process_virtual_memory_bytes", &[], "Virtual memory of the process in bytes.");
pub(super) const PROCESS_OPEN_FDS: Metric =
    gauge("process_open_fds", &[], "Open file descriptors of the process.");
pub(super) const PROCESS_MAX_FDS: Metric =
    gauge("process_max_fds", &[], "Maximum number of open file descriptors of the process.");
pub(super) const PROCESS_START: Metric =
    gauge("process_start_time_seconds", &[], "When the process started, in seconds since the Unix epoch.");

pub(super) const GEN_AI_TOKEN_USAGE: Metric = histogram(
    "gen_ai_client_token_usage",
    &["gen_ai_operation_name", "gen_ai_provider_name", "gen_ai_request_model", "gen_ai_token_type"],
    TOKEN_BUCKETS,
    "Prompt and completion tokens of a request.",
);
pub(super) const GEN_AI_DURATION: Metric = histogram(
    "gen_ai_server_request_duration_seconds",
    &["gen_ai_operation_name", "gen_ai_provider_name", "gen_ai_request_model", "error_type"],
    DURATION_BUCKETS,
    "Time from the arrival of a request to the end of its answer.",
);
pub(super) const GEN_AI_FIRST_TOKEN: Metric = histogram(
    "gen_ai_server_time_to_first_token_seconds",
    GEN_AI,
    FIRST_TOKEN_BUCKETS,
    "Time from the arrival of a request to the first event of its stream.",
);
pub(super) const GEN_AI_PER_TOKEN: Metric = histogram(
    "gen_ai_server_time_per_output_token_seconds",
    GEN_AI,
    PER_TOKEN_BUCKETS,
    "Time between two completion tokens of a stream after the first one, on the average of the stream.",
);

/// All metrics.
#[cfg(test)]
pub(super) const ALL: &[Metric] = &[
    REQUESTS,
    REJECTIONS,
    SHADOW_REJECTIONS,
    TOKENS,
    USAGE_MISSING,
    UPSTREAM_KEYS_MASKED,
    CLAMPED,
    DRAINED,
    REQUEST_DURATION,
    FIRST_TOKEN,
    PER_TOKEN,
    FIRST_BYTE,
    OVERHEAD,
    QUEUE_WAIT,
    QUEUE_LENGTH,
    IN_FLIGHT,
    UPSTREAM_CONNECTIONS,
    REPLICA_IN_FLIGHT,
    REPLICA_UP,
    REPLICA_FAILURES,
    UPSTREAM_ATTEMPTS,
    PROVIDER_LIMIT,
    PROVIDER_REMAINING,
    PROVIDER_REFUSALS,
    PROVIDER_IGNORED,
    QUOTA_LIMIT,
    QUOTA_BURST,
    QUOTA_LEVEL,
    QUOTA_USED,
    QUOTA_HELD,
    QUOTA_RESET,
    QUOTA_EXHAUSTED,
    OVERRIDE_ACTIVE,
    OVERRIDE_SINCE,
    ESTIMATE_RATIO,
    RAW_ESTIMATE_RATIO,
    ESTIMATES,
    BUILD_INFO,
    LAST_RELOAD,
    LAST_RELOAD_SUCCESSFUL,
    CERTIFICATE_EXPIRY,
    RELOAD_FAILURES,
    TRACE_SPANS,
    STORE_UP,
    REDIS_UP,
    REDIS_LOSSES,
    REDIS_FAULTS,
    NODES,
    PROCESS_CPU,
    PROCESS_RESIDENT,
    PROCESS_VIRTUAL,
    PROCESS_OPEN_FDS,
    PROCESS_MAX_FDS,
    PROCESS_START,
    GEN_AI_TOKEN_USAGE,
    GEN_AI_DURATION,
    GEN_AI_FIRST_TOKEN,
    GEN_AI_PER_TOKEN,
];
