//! The settings, checked: what `config/load.rs` makes of the YAML file.
//!
//! Every value here has passed its checks: names resolve, limits lie within the engine's range,
//! secrets are digests where a digest is enough. The YAML's own reference is `config/tollgate.yaml`.

mod callers;
mod check;
mod environments;
mod fault;
mod item;
mod load;
mod node;
mod overrides;
mod quotas;
mod units;
mod upstreams;
mod variables;
mod yaml;

use crate::glob::Glob;
use crate::quota::{Quota, Scope};
use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

pub(crate) use callers::LONGEST_KEY;
pub use fault::{Fault, Faults};
pub use load::{Loaded, Source, load, parse};
pub(crate) use units::duration;

/// A whole checked configuration.
#[derive(Clone, Debug)]
pub struct Config {
    /// The listener that callers use.
    pub server: Server,
    /// The listener of health, metrics and the admin API.
    pub admin: Admin,
    /// Backends, in the file's order.
    pub upstreams: Vec<Arc<Upstream>>,
    /// Environments, in the file's order.
    pub environments: Vec<Arc<Environment>>,
    /// For callers with neither path prefix nor key: an index into `environments`.
    pub default_environment: Option<usize>,
    /// Model name patterns and their tokenizers; the first match wins.
    pub models: Vec<ModelRule>,
    /// Where counters are kept.
    pub store: Store,
    /// When the file was written (ms since the Unix epoch): of nodes with differing limits the newest's hold. 0 where it
    /// was not read from a file.
    pub written: u64,
}

/// `server`: the listener that callers use.
#[derive(Clone, Debug)]
pub struct Server {
    /// Default `127.0.0.1:8080`.
    pub listen: SocketAddr,
    /// Largest request body in bytes. Default 32 MiB.
    pub max_request_body: usize,
    /// Requests of one peer address before anything is parsed; `None`: off. Default 1,000 a second.
    pub flood_guard: Option<FloodGuard>,
    /// At shutdown streams may end within this time. Default 30 s.
    pub drain_timeout: Duration,
    /// Certificate and key files for TLS toward callers. Default: plain HTTP.
    pub tls: Option<TlsFiles>,
}

/// `server.flood_guard`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FloodGuard {
    /// How many requests.
    pub requests: u32,
    /// In how long.
    pub per: Duration,
    /// Also of this machine's own addresses. Default: only where the file sets the guard, since a proxy
    /// on the same machine sends everybody's requests from one.
    pub guards_loopback: bool,
}

/// `server.tls`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// PEM file of the certificate chain.
    pub cert: PathBuf,
    /// PEM file of the private key.
    pub key: PathBuf,
}

/// `admin`: health, metrics, admin API.
#[derive(Clone, Debug)]
pub struct Admin {
    /// Default `127.0.0.1:9090`.
    pub listen: SocketAddr,
    /// Required unless `listen` is a loopback address.
    pub token: Option<Secret>,
}

/// How an upstream wants its key, and which paths it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ApiKind {
    /// `authorization: Bearer`.
    OpenAi,
    /// `api-key`.
    Azure,
    /// `x-api-key`.
    Anthropic,
    /// `x-goog-api-key`.
    Gemini,
}

/// One backend.
#[derive(Clone, Debug)]
pub struct Upstream {
    /// Its name in the file.
    pub name: String,
    /// `base_url`: scheme `http` or `https`, authority, path without trailing slash, no query.
    pub base_url: http::Uri,
    /// Default `openai`.
    pub api: ApiKind,
    /// `None`: the caller's own key is passed through.
    pub api_key: Option<Secret>,
    /// Bounds on waiting.
    pub timeouts: Timeouts,
    /// Headers added to every request, replacing the caller's of the same name.
    pub headers: http::HeaderMap,
    /// Whether streams are asked for usage. Default `ask`.
    pub ask_stream_usage: bool,
}

/// `upstreams.*.timeouts`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// TCP and TLS handshakes together. Default 5 s.
    pub connect: Duration,
    /// From the request sent to the answer's head. Default 120 s.
    pub first_byte: Duration,
    /// Between two pieces of the answer's body. Default 60 s.
    pub idle: Duration,
    /// The whole exchange. Default 15 min.
    pub total: Duration,
}

/// One environment: an upstream, callers and quotas.
#[derive(Clone, Debug)]
// Each is a switch of the file.
#[allow(clippy::struct_excessive_bools)]
pub struct Environment {
    /// Its name: `[a-z0-9][a-z0-9_-]*`.
    pub name: String,
    /// Where its requests go.
    pub upstream: Arc<Upstream>,
    /// Its callers; empty: the environment is open.
    pub callers: Vec<Caller>,
    /// Globs of the models it may use; empty: all.
    pub models: Vec<Glob>,
    /// Requests and streams under way at once. Default: no bound.
    pub max_in_flight: Option<u64>,
    /// Every quota: of the environment, of its callers, of its models.
    pub quotas: Vec<Quota>,
    /// `false`: would-be refusals are only counted. Default `true`.
    pub enforce: bool,
    /// How much is reserved before a request is forwarded.
    pub reserve: Reserve,
    /// What becomes of the upstream call when the caller hangs up. Default `cancel`.
    pub on_disconnect: OnDisconnect,
    /// Paths that the gateway does not know: `true` forwards them as one request. Default `false`.
    pub forward_other_paths: bool,
    /// Tokens reserved for what a request refers to but does not carry. Default 2,000.
    pub unseen_prompt_tokens: u64,
    /// Whether cache reads count as prompt tokens. Default `true`.
    pub count_cached_prompt_tokens: bool,
    /// Whether estimates are corrected by what was reported. Default `true`.
    pub calibrate: bool,
    /// A 429 that would have to wait longer says `x-should-retry: false`. Default 30 s.
    pub retry_patience: Duration,
}

impl Environment {
    /// Whether it makes a difference which model a request names.
    pub fn tells_models_apart(&self) -> bool {
        !self.models.is_empty() || self.quotas.iter().any(|quota| matches!(quota.scope, Scope::Model(_)))
    }
}

/// A caller of an environment. Its index in `Environment::callers` is its id in `quota::Scope`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// How logs and metrics call it.
    pub name: String,
    /// SHA-256 of its key; the key itself is not kept.
    pub sha256: [u8; 32],
}

/// What is reserved for the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CompletionReserve {
    /// What recent answers used.
    Adaptive,
    /// The request's own cap.
    MaxTokens,
    /// Nothing.
    None,
    /// Always this many tokens.
    Fixed(u64),
}

/// What to do with a request that has more to say than room is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WhenShort {
    /// Refuse it.
    Reject,
    /// Lower its max tokens.
    Clamp,
}

/// What to do with a stream that outgrows its allowance when nothing is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnOverrun {
    /// Let it end; the excess is debt.
    Finish,
    /// End it.
    Cut,
}

/// What becomes of the upstream call when the caller hangs up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnDisconnect {
    /// It is cancelled at once.
    Cancel,
    /// It is read to its end, within bounds, so that its usage is exact.
    Drain,
}

/// `environments.*.reserve`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Reserve {
    /// `false`: the prompt is not counted beforehand. Default `true`.
    pub prompt: bool,
    /// Default `adaptive`.
    pub completion: CompletionReserve,
    /// For `adaptive`, in 0 .. 1 (exclusive). Default 0.9.
    pub quantile: f64,
    /// For `max_tokens`, where the request names none. Default 4,096.
    pub default_max_tokens: u64,
    /// Default `reject`.
    pub when_short: WhenShort,
    /// Default `finish`.
    pub on_overrun: OnOverrun,
    /// How long a request may wait in line for room. Default 0: not at all.
    pub max_wait: Duration,
}

/// `models[]`: which tokenizer counts for the models that match.
#[derive(Clone, Debug)]
pub struct ModelRule {
    /// Model name pattern.
    pub pattern: Glob,
    /// The tokenizer.
    pub tokenizer: TokenizerChoice,
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
    /// Everything as for the model of this name.
    Like(String),
}

/// `store`: where counters are kept.
#[derive(Clone, Debug)]
pub struct Store {
    /// Default `data/tollgate.db`.
    pub path: PathBuf,
    /// How long usage is kept per minute. Default 35 days.
    pub history: Duration,
    /// Keep nothing. Default `false`.
    pub memory: bool,
    /// Shared counters of a cluster.
    pub redis: Option<Redis>,
}

/// `store.redis`.
#[derive(Clone, Debug)]
pub struct Redis {
    /// May hold a password: not for logs.
    pub url: Secret,
    /// Prefix of every key. Default `tollgate`.
    pub prefix: String,
    /// Default `local`.
    pub on_failure: OnStoreFailure,
    /// Default `false`.
    pub lease: bool,
}

/// `store.redis.on_failure`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnStoreFailure {
    /// Each node goes on with its share.
    Local,
    /// 503.
    Closed,
    /// Admits, rate-capped.
    Open,
}

/// A string that must not be printed: `Debug` shows `***`, there is no `Display` and no `Serialize`.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Takes the secret over.
    pub fn new(secret: impl Into<String>) -> Self {
        Self(secret.into())
    }

    /// The secret itself, for the one place that sends or compares it.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

impl Config {
    /// The environment of that name, with its index.
    pub fn environment(&self, name: &str) -> Option<(usize, &Arc<Environment>)> {
        self.environments.iter().enumerate().find(|(_, e)| e.name == name)
    }

    /// Which environment and caller each key digest belongs to.
    pub fn callers_by_digest(&self) -> BTreeMap<[u8; 32], (usize, usize)> {
        let mut all = BTreeMap::new();
        for (e, environment) in self.environments.iter().enumerate() {
            for (c, caller) in environment.callers.iter().enumerate() {
                all.insert(caller.sha256, (e, c));
            }
        }
        all
    }
}

#[cfg(test)]
mod tests;
