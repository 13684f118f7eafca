//! The checked configuration. `config/load.rs` builds it from the YAML file.
//!
//! Every value here has passed its checks: names resolve, limits lie within the engine's range, and callers' keys
//! are stored as digests. The reference of the YAML file itself is `config/tollgate.yaml`.

mod callers;
mod changes;
mod contradictions;
mod description;
mod effective;
mod environments;
mod fault;
mod listeners;
mod load;
mod models;
mod overrides;
mod quotas;
mod reference;
mod routes;
mod schema;
mod setting;
mod store;
mod telemetry;
mod top;
mod tree;
mod units;
mod upstreams;
mod variables;
mod yaml;

use crate::glob::Glob;
use crate::quota::{Quota, Scope};
use ipnet::IpNet;
use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

pub(crate) use callers::{MAX_KEY_BYTES, is_caller_name};
pub(crate) use changes::{changes, restart_faults};
pub use effective::EffectiveConfig;
pub use fault::{Fault, Faults};
pub use load::{Loaded, parse};
pub(crate) use load::{load, modified_ms};
pub(crate) use reference::reference;
pub use routes::RouteSettings;
pub(crate) use routes::api_of_routes;
pub(crate) use schema::schema;
pub(crate) use units::{amount, duration};
pub use upstreams::{ApiKind, HealthCheckSettings, ProviderLimitsMode, Timeouts, UpstreamSettings};

/// The checked configuration of one gateway.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// The listener for callers.
    pub server: ServerSettings,
    /// The listener for health checks, metrics and the admin API.
    pub admin: AdminSettings,
    /// The upstreams, in the order of the file.
    pub upstreams: Vec<Arc<UpstreamSettings>>,
    /// The environments, in the order of the file.
    pub environments: Vec<Arc<Environment>>,
    /// The environment of requests that name none by path prefix or key: an index into `environments`.
    pub default_environment: Option<usize>,
    /// Model name patterns with their tokenizers. The first match wins.
    pub models: Vec<ModelRule>,
    /// Where counters are stored.
    pub store: StoreSettings,
    /// The log, traces and metrics.
    pub telemetry: TelemetrySettings,
    /// When the file was last modified, in milliseconds since the Unix epoch. If the nodes of a cluster have different
    /// limits, the limits of the newest file apply. 0 if the configuration was not read from a file.
    pub file_modified_ms: u64,
    /// The config file. `None`: the configuration was not read from a file.
    pub file: Option<PathBuf>,
    /// The files that the config names and the gateway reads: of `${file:...}`, of tokenizers and of TLS.
    pub named_files: Vec<PathBuf>,
    /// The settings as the file could contain them, with all defaults, and with secrets masked.
    pub effective: EffectiveConfig,
}

/// `server`: the listener for callers.
#[derive(Clone, Debug, PartialEq)]
pub struct ServerSettings {
    /// Default `127.0.0.1:8080`.
    pub listen: SocketAddr,
    /// Maximum size of a request body in bytes. Default 32 MiB.
    pub max_request_body: usize,
    /// Limits the requests of one peer address, before the gateway parses them. `None` turns the guard off.
    /// Default 1,000 requests per second.
    pub flood_guard: Option<FloodGuard>,
    /// Networks whose `X-Forwarded-For` names the caller's address. Default: none.
    pub trusted_proxies: Vec<IpNet>,
    /// After SIGTERM, the gateway still accepts connections for this long. Default 0.
    pub drain_delay: Duration,
    /// At shutdown, the gateway waits this long for requests in flight. Default 30 s.
    pub drain_timeout: Duration,
    /// Certificate and key files for TLS with callers. Default: plain HTTP.
    pub tls: Option<TlsFiles>,
    /// Whether callers may use HTTP/2. Default `true`.
    pub http2: bool,
    /// Maximum number of open connections. Default 10,000.
    pub max_connections: usize,
    /// Maximum number of open connections from one address. `None`: no bound. Default 1,000.
    pub max_connections_per_address: Option<AddressBound>,
    /// A whole request body must arrive within this time. Default 60 s.
    pub body_timeout: Duration,
    /// Maximum bytes of all request bodies that are buffered. Default 1 GiB.
    pub buffered_bodies: usize,
}

/// `server.max_connections_per_address`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AddressBound {
    /// Maximum number of connections.
    pub connections: usize,
    /// Whether the bound also applies to loopback addresses. It does so only if the file sets it, because a proxy on the
    /// same machine sends the requests of all callers from one address.
    pub bounds_loopback: bool,
}

/// `server.flood_guard`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FloodGuard {
    /// Maximum number of requests per `per`.
    pub requests: u32,
    /// Length of the period.
    pub per: Duration,
    /// Whether the guard also limits loopback addresses. It does so only if the file sets the guard, because a proxy
    /// on the same machine sends the requests of all callers from one address.
    pub guards_loopback: bool,
}

/// `server.tls` or `admin.tls`.
#[derive(Clone, Debug)]
pub struct TlsFiles {
    /// PEM file of the certificate chain.
    pub cert: PathBuf,
    /// PEM file of the private key.
    pub key: PathBuf,
    /// The locations of the two settings, for faults: `tollgate.yaml:7:13`.
    pub(crate) locations: TlsLocations,
}

/// The locations of the settings in `TlsFiles`.
#[derive(Clone, Debug)]
pub(crate) struct TlsLocations {
    pub(crate) cert: String,
    pub(crate) key: String,
}

/// Equal if the files are the same. The locations change when other lines of the config do.
impl PartialEq for TlsFiles {
    fn eq(&self, other: &Self) -> bool {
        (&self.cert, &self.key) == (&other.cert, &other.key)
    }
}

/// `admin`: the listener for health checks, metrics and the admin API.
#[derive(Clone, Debug, PartialEq)]
pub struct AdminSettings {
    /// Default `127.0.0.1:9090`.
    pub listen: SocketAddr,
    /// Bearer token of the admin API. Required unless `listen` is a loopback address.
    pub token: Option<Secret>,
    /// Certificate and key files for TLS. Default: plain HTTP.
    pub tls: Option<TlsFiles>,
}

/// `environments.*`: an upstream, its callers and their quotas.
#[derive(Clone, Debug, PartialEq)]
pub struct Environment {
    /// Its name: `[a-z0-9][a-z0-9_-]*`.
    pub name: String,
    /// The upstream that receives the requests for which there is no route.
    pub upstream: Arc<UpstreamSettings>,
    /// Where requests for certain models go. The first match wins.
    pub routes: Vec<RouteSettings>,
    /// Its callers. Empty: the environment is open to all callers.
    pub callers: Vec<CallerSettings>,
    /// Patterns of the models that callers may use. Empty: all models.
    pub models: Vec<Glob>,
    /// Maximum number of requests in flight. Default: no limit.
    pub max_in_flight: Option<u64>,
    /// The quotas of the file: those of the environment, of its callers and of its models.
    pub quotas: Vec<Quota>,
    /// `false` is shadow mode: the gateway counts denials but forwards the request. Default `true`.
    pub enforce: bool,
    /// How much the gateway reserves before it forwards a request.
    pub reserve: ReserveSettings,
    /// What the gateway does with the upstream's answer when the caller disconnects. Default `cancel`.
    pub on_disconnect: OnDisconnect,
    /// Whether the gateway forwards unknown paths and charges each as one request. Default `false`: it answers 404.
    pub forward_other_paths: bool,
    /// Prompt tokens reserved for each item that the request refers to but does not contain. Default 2,000.
    pub unseen_prompt_tokens: u64,
    /// Whether prompt tokens that the upstream read from its cache are charged. Default `true`.
    pub count_cached_prompt_tokens: bool,
    /// Whether prompt estimates are corrected by the usage that upstreams reported before. Default `true`.
    pub calibrate: bool,
    /// If a caller would have to wait longer than this, its 429 carries `x-should-retry: false`. Default 30 s.
    pub retry_patience: Duration,
}

impl Environment {
    /// The quotas of the file, and an unlimited one per minute of each kind that the file does not name for the
    /// environment.
    pub fn counted_quotas(&self) -> Vec<Quota> {
        let mut all = self.quotas.clone();
        all.extend(Quota::implicit(&self.quotas));
        all
    }

    /// Whether the model of a request affects its admission or its way.
    pub(crate) fn depends_on_model(&self) -> bool {
        !self.models.is_empty()
            || !self.routes.is_empty()
            || self.quotas.iter().any(|quota| matches!(quota.scope, Scope::Model(_)))
    }

    /// The index of the route that takes a request. `None`: no route takes it. `api`: the name of its API. `model`: the name
    /// that the caller requests.
    pub(crate) fn route_of(&self, api: &str, model: &str) -> Option<usize> {
        self.routes.iter().position(|route| route.takes_api(api) && route.takes_model(model))
    }

    /// The upstreams that receive requests of this environment, each once: those of the routes in their order, then the
    /// one for all other requests, unless a route takes every request.
    pub(crate) fn all_upstreams(&self) -> Vec<&Arc<UpstreamSettings>> {
        let takes_all =
            |route: &RouteSettings| route.apis.is_empty() && route.models.iter().any(Glob::is_any);
        let routed = self.routes.iter().flat_map(|route| &route.upstreams);
        let rest = (!self.routes.iter().any(takes_all)).then_some(&self.upstream);
        let mut all: Vec<&Arc<UpstreamSettings>> = Vec::new();
        for upstream in routed.chain(rest) {
            if all.iter().all(|known| known.name != upstream.name) {
                all.push(upstream);
            }
        }
        all
    }
}

/// `environments.*.keys[]`: a caller of an environment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CallerSettings {
    /// The caller's name in logs and metrics.
    pub name: String,
    /// SHA-256 of each of the caller's keys. The keys themselves are not stored.
    pub sha256: Vec<[u8; 32]>,
}

/// `reserve.completion`: how many completion tokens the gateway reserves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CompletionReserve {
    /// A quantile of the completion tokens of recent answers.
    Adaptive,
    /// The request's own token limit, or `default_max_tokens`.
    MaxTokens,
    /// No tokens.
    None,
    /// This number of tokens.
    Fixed(u64),
}

/// `reserve.when_short`: what the gateway does with a request whose completion tokens do not fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WhenShort {
    /// It answers 429.
    Reject,
    /// It lowers the request's token limit to the remaining amount.
    Clamp,
}

/// `reserve.on_overrun`: what the gateway does with a stream that exceeds its allowance when no quota is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnOverrun {
    /// The stream continues. The excess becomes debt.
    Finish,
    /// The gateway ends the stream.
    Cut,
}

/// `on_disconnect`: what the gateway does with the upstream's answer when the caller disconnects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnDisconnect {
    /// It cancels the upstream request at once.
    Cancel,
    /// It reads the answer to its end, within bounds, and charges the reported usage.
    Drain,
}

/// `environments.*.reserve`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ReserveSettings {
    /// Whether the gateway reserves the estimated prompt tokens. Default `true`.
    pub prompt: bool,
    /// How many completion tokens it reserves. Default `adaptive`.
    pub completion: CompletionReserve,
    /// The quantile for `adaptive`, between 0 and 1 (both excluded). Default 0.9.
    pub quantile: f64,
    /// Completion tokens that `max_tokens` reserves if the request has no limit. Default 4,096.
    pub default_max_tokens: u64,
    /// What happens to a request that does not fit. Default `reject`.
    pub when_short: WhenShort,
    /// What happens to a stream that exceeds its allowance. Default `finish`.
    pub on_overrun: OnOverrun,
    /// How long a request may stay in the wait queue. Default 0: it does not wait.
    pub max_wait: Duration,
}

/// `models[]`: how to count for the models whose names match a pattern.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelRule {
    /// Model name pattern.
    pub pattern: Glob,
    /// The tokenizer; `None`: that of the built-in table.
    pub tokenizer: Option<TokenizerChoice>,
    /// `overhead`: tokens per request besides the messages.
    pub overhead: Option<u32>,
    /// `tool_factor` in thousandths: multiplies the tokens of the tools.
    pub tool_factor: Option<u32>,
}

/// `models[].encoding`, `models[].tokenizer` or `models[].model`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TokenizerChoice {
    /// `o200k_base` (also written `o200k_harmony`, which counts alike).
    O200k,
    /// `cl100k_base`.
    Cl100k,
    /// A `tokenizer.json` file.
    File(PathBuf),
    /// The tokenizer and the counting rules of the model with this name.
    SameAs(String),
}

/// `store`: where counters are stored.
#[derive(Clone, Debug, PartialEq)]
pub struct StoreSettings {
    /// The SQLite file. Default `data/tollgate.db`.
    pub path: PathBuf,
    /// How long the store has one usage row per minute. Older rows are merged into one per day. Default 35 days.
    pub history: Duration,
    /// Whether counters are only in memory. Default `false`.
    pub memory: bool,
    /// The Redis server that has the shared counters of a cluster.
    pub redis: Option<RedisSettings>,
}

/// `store.redis`.
#[derive(Clone, Debug, PartialEq)]
pub struct RedisSettings {
    /// The URL, which may contain a password.
    pub url: Secret,
    /// Prefix of every Redis key. Default `tollgate`.
    pub prefix: String,
    /// A server that is silent for longer is unavailable. A shorter stall only delays requests. Default 250 ms.
    pub timeout: Duration,
    /// What a node does while Redis is unavailable. Default `local`.
    pub on_failure: OnStoreFailure,
    /// Whether nodes lease parts of the quotas, so that most requests do not wait for Redis. Default `false`.
    pub lease: bool,
}

/// `store.redis.on_failure`: how a node admits requests while Redis is unavailable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnStoreFailure {
    /// Each node admits from its share of the last known levels.
    Local,
    /// The node answers 503.
    Closed,
    /// Each node admits up to the whole limits.
    Open,
}

/// `telemetry`: the log, traces and metrics.
#[derive(Clone, Debug, PartialEq)]
pub struct TelemetrySettings {
    /// The form of the log. `None`: for people if standard error is a terminal, else JSON.
    pub log: Option<LogForm>,
    /// The least severe lines that are written. Default `info`.
    pub level: LogLevel,
    /// The requests that have a line in the log. Default `all`.
    pub requests: RequestLines,
    /// Where traces are sent. `None`: as the variables of OpenTelemetry say.
    pub otlp: Option<OtlpSettings>,
    /// Whether metrics name callers. Default `true`.
    pub caller_label: bool,
    /// Whether there are also metrics with the names of OpenTelemetry's conventions for generative AI. Default `false`.
    pub gen_ai_metrics: bool,
}

/// `telemetry.log`: the form of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogForm {
    /// One JSON object a line.
    Json,
    /// Text for people.
    Human,
}

/// `telemetry.level`: the least severe lines that are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogLevel {
    /// Failures that need an operator.
    Error,
    /// Also settings that are probably not intended.
    Warn,
    /// Also requests and changes.
    Info,
    /// Also single steps of the gateway.
    Debug,
    /// Also its smallest steps.
    Trace,
}

impl LogLevel {
    /// All levels, the most severe first.
    pub(crate) const ALL: [Self; 5] = [Self::Error, Self::Warn, Self::Info, Self::Debug, Self::Trace];

    /// The level with this name.
    pub(crate) fn of(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|level| level.as_str() == name)
    }

    /// The name in the config and in the admin API.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
            Self::Trace => "trace",
        }
    }
}

/// `telemetry.requests`: the requests that have a line in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestLines {
    /// All requests.
    All,
    /// Requests without a complete, successful answer.
    Errors,
    /// No request.
    None,
}

/// `telemetry.otlp`: where traces are sent.
#[derive(Clone, Debug, PartialEq)]
pub struct OtlpSettings {
    /// The URL that takes traces. `None`: as the variables of OpenTelemetry say.
    pub endpoint: Option<http::Uri>,
    /// Headers of each request to the collector.
    pub headers: http::HeaderMap,
    /// The share of requests that are traced, from 0 to 1. `None`: as the variables of OpenTelemetry say.
    pub sample: Option<f64>,
}

/// A string that must not be printed. `Debug` prints `***`; the type has no `Display` and no `Serialize`.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Wraps a secret.
    pub(crate) fn new(secret: impl Into<String>) -> Self {
        Self(secret.into())
    }

    /// The secret itself, for the code that sends or compares it.
    pub(crate) fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

impl Config {
    /// Returns the environment with this name, and its index.
    pub fn environment(&self, name: &str) -> Option<(usize, &Arc<Environment>)> {
        self.environments.iter().enumerate().find(|(_, e)| e.name == name)
    }

    /// The hash tag that all keys in a Redis Cluster share, so that one call can reserve in the quotas of an environment and
    /// of its upstream. `None`: it is no cluster, or no upstream has limits; each environment has a slot of its own.
    pub(crate) fn shared_slot(&self) -> Option<&'static str> {
        let redis = self.store.redis.as_ref()?;
        let (scheme, _) = redis.url.expose().split_once(':')?;
        let is_cluster = scheme.to_ascii_lowercase().ends_with("+cluster");
        (is_cluster && self.upstreams.iter().any(|upstream| upstream.has_limits())).then_some("environments")
    }

    /// Maps the digest of each key of each caller to the indexes of its environment and its caller.
    pub(crate) fn callers_by_digest(&self) -> BTreeMap<[u8; 32], (usize, usize)> {
        let mut all = BTreeMap::new();
        for (e, environment) in self.environments.iter().enumerate() {
            for (c, caller) in environment.callers.iter().enumerate() {
                all.extend(caller.sha256.iter().map(|digest| (*digest, (e, c))));
            }
        }
        all
    }
}

#[cfg(test)]
mod tests;
