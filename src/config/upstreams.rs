//! `upstreams`: the servers that receive the requests.

use super::Secret;
use super::description::{DefaultSpec, KeySpec, NONE, SECRET, SectionSpec, TextSpec, ValueSpec, Word, text};
use super::quotas::{self, QUOTAS};
use super::setting::{Section, Setting};
use crate::quota::Quota;
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderName, HeaderValue, Uri};
use sha2::{Digest as _, Sha256};
use std::sync::Arc;
use std::time::Duration;
use tokio_rustls::rustls::pki_types::ServerName;

/// `upstreams.*.api`: the header that carries the upstream's key, and the paths that the upstream serves.
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

/// `upstreams.*`: one upstream.
#[derive(Clone, Debug, PartialEq)]
pub struct UpstreamSettings {
    /// Its name in the file.
    pub name: String,
    /// `base_url`: an `http` or `https` URL without query. Its path has no trailing slash. With several replicas: the first
    /// one's.
    pub base_url: Uri,
    /// The URLs of all replicas, at least one. They differ in host and port only.
    pub base_urls: Vec<Uri>,
    /// `None`: the replicas are not checked.
    pub health: Option<HealthCheckSettings>,
    /// Default `openai`.
    pub api: ApiKind,
    /// The upstream's key. `None`: the gateway passes the caller's key through.
    pub api_key: Option<Secret>,
    /// How long the gateway waits for the upstream.
    pub timeouts: Timeouts,
    /// Headers that the gateway adds to every request. They replace the caller's headers of the same name.
    pub headers: HeaderMap,
    /// Whether the gateway requests usage for streams (`stream_usage: ask`). Default `true`.
    pub requests_stream_usage: bool,
    /// Always `Ignore` without an `api_key`: each caller's key has limits of its own. Default `Observe`.
    pub provider_limits: ProviderLimitsMode,
    /// The quotas of the upstream and of its models, for all environments together.
    pub quotas: Vec<Quota>,
    /// Maximum number of requests in flight, of all environments together. Default: no limit.
    pub max_in_flight: Option<u64>,
}

/// `upstreams.*.health`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HealthCheckSettings {
    /// Path and query from the root of the host.
    pub path: String,
    /// Time between two checks of a replica. Default 5 s.
    pub every: Duration,
}

impl UpstreamSettings {
    /// Whether requests to the upstream are limited, whatever the quotas of their environments allow.
    pub fn has_limits(&self) -> bool {
        !self.quotas.is_empty() || self.max_in_flight.is_some()
    }

    /// A server that is no backend: nothing is added to its requests, and it has no limits.
    pub(crate) fn of_server(name: &str, url: Uri, timeouts: Timeouts) -> Self {
        Self {
            name: name.to_owned(),
            base_urls: vec![url.clone()],
            base_url: url,
            health: None,
            api: ApiKind::OpenAi,
            api_key: None,
            timeouts,
            headers: HeaderMap::new(),
            requests_stream_usage: false,
            provider_limits: ProviderLimitsMode::Ignore,
            quotas: Vec::new(),
            max_in_flight: None,
        }
    }

    /// Host and port of a replica with this URL, as logs and metrics name it.
    pub(crate) fn address(url: &Uri) -> String {
        address(url)
    }

    /// Whether both have a replica in common.
    pub(crate) fn shares_replica_with(&self, other: &Self) -> bool {
        self.base_urls.iter().any(|url| other.base_urls.contains(url))
    }

    /// Identifies the provider's account behind the upstream, without its key: the limits of the provider belong to it.
    pub(crate) fn provider_account(&self) -> String {
        let key = self.api_key.as_ref().map_or("", Secret::expose);
        let digest = Sha256::digest(format!("{} {:?} {key}", self.name, self.base_urls));
        format!("{:?} {digest:x?}", self.provider_limits)
    }

    /// Whether both have a replica in common, and equal settings apart from limits, health checks and the list of replicas.
    pub(crate) fn is_same_backend(&self, other: &Self) -> bool {
        let as_other = Self {
            base_url: other.base_url.clone(),
            base_urls: other.base_urls.clone(),
            health: other.health.clone(),
            quotas: other.quotas.clone(),
            max_in_flight: other.max_in_flight,
            ..self.clone()
        };
        self.shares_replica_with(other) && as_other == *other
    }
}

/// `upstreams.*.provider_limits`: what the gateway does with the limits that the provider states.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProviderLimitsMode {
    /// Sends no request that the provider would refuse by the limits it has stated.
    Follow,
    /// Shows them.
    Observe,
    /// Does not read them.
    Ignore,
}

/// `upstreams.*.timeouts`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// Name lookup, TCP handshake and TLS handshake together. Default 5 s.
    pub connect: Duration,
    /// From the end of the request to the head of the answer. Default 120 s.
    pub first_byte: Duration,
    /// Between two chunks of the answer's body. Default 60 s.
    pub idle: Duration,
    /// The whole exchange. Default 15 min.
    pub total: Duration,
}

pub(super) const EXAMPLE: &str = "upstreams: { openai: { base_url: https://api.openai.com/v1 } }";

/// `upstreams.*`.
pub(super) const UPSTREAM: SectionSpec = SectionSpec {
    name: "upstream",
    keys: &[
        KeySpec::new(
            "base_url",
            ValueSpec::Text(TextSpec {
                label: "`http` or `https` URL without user, query or fragment",
                pattern: URL_PATTERN,
            }),
            DefaultSpec::Absent("one of the two is required"),
            "where the gateway sends requests. It appends the caller's path. If the URL ends in `/v1`, `/v1beta`, `/openai` or `/openai/v1` and the path begins with the same, the gateway does not repeat it",
        )
        .example(URL_EXAMPLE),
        KeySpec::new(
            "base_urls",
            ValueSpec::List(&ValueSpec::Text(TextSpec { label: "URL", pattern: URL_PATTERN })),
            DefaultSpec::Absent("one of the two is required"),
            "instead of `base_url`: the replicas of one backend, at most 64. Their URLs differ in host and port only. A request goes to one of them ([operations.md](operations.md#replicas))",
        )
        .example("[http://10.0.0.1:8000/v1, http://10.0.0.2:8000/v1]"),
        KeySpec::new(
            "health",
            ValueSpec::Section(&HEALTH),
            NONE,
            "checks each replica regularly. One that fails its check gets no requests until it passes one",
        )
        .example("{ path: /health }"),
        KeySpec::new(
            "api",
            ValueSpec::Words(&[
                Word("openai", "`authorization: Bearer`"),
                Word("azure", "`api-key`"),
                Word("anthropic", "`x-api-key`"),
                Word("gemini", "`x-goog-api-key`"),
            ]),
            DefaultSpec::Value("openai"),
            "the header that carries `api_key`",
        ),
        KeySpec::new(
            "api_key",
            SECRET,
            NONE,
            "the upstream's key, which the gateway sends instead of the caller's key. Without it the gateway forwards the caller's key",
        )
        .example("${OPENAI_API_KEY}"),
        KeySpec::new(
            "timeouts",
            ValueSpec::Section(&TIMEOUTS),
            DefaultSpec::Section,
            "time limits of a request",
        )
        .example("{ idle: 5m }"),
        KeySpec::new(
            "headers",
            ValueSpec::Names(text("names and values"), &ValueSpec::Secret(text("value of a header"))),
            NONE,
            "added to every request; they replace the caller's headers of the same names. Hop-by-hop headers, and headers that the gateway sets itself, are faults",
        )
        .example("{ OpenAI-Organization: org-1 }"),
        KeySpec::new(
            "stream_usage",
            ValueSpec::Words(&[
                Word("ask", "it requests usage"),
                Word("never", "avoids one failed attempt at a backend that refuses `stream_options`"),
            ]),
            DefaultSpec::Value("ask"),
            "whether the gateway requests usage in streams ([counting.md](counting.md#usage-requests-in-streams))",
        ),
        KeySpec::new(
            "provider_limits",
            ValueSpec::Words(&[
                Word("follow", "it sends no request that the provider would refuse by the limits it has stated"),
                Word("observe", "it shows them"),
                Word("ignore", "it does not read them"),
            ]),
            DefaultSpec::Value("observe"),
            "what the gateway does with the limits that the provider states in its answers ([quotas.md](quotas.md#limits-of-the-provider)). Without `api_key` it ignores them: each caller's key has limits of its own",
        ),
        KeySpec::restriction(
            "quotas",
            ValueSpec::Section(&QUOTAS),
            NONE,
            "quotas of the upstream, for the requests of all environments together ([quotas.md](quotas.md#quotas-of-an-upstream))",
        )
        .example("{ total_tokens: { limit: 2M, per: minute }, requests: { limit: 10k, per: minute } }"),
        KeySpec::restriction(
            "model_quotas",
            ValueSpec::Names(text("patterns and quotas"), &ValueSpec::Section(&QUOTAS)),
            NONE,
            "quotas of models of the upstream, by the names that are sent to it; all models that match a pattern share its quotas",
        )
        .example("{ \"gpt-4.1*\": { total_tokens: { limit: 450k, per: minute } } }"),
        KeySpec::restriction(
            "max_in_flight",
            ValueSpec::Amount { min: 1, max: u64::MAX },
            DefaultSpec::Absent("no limit"),
            "maximum number of requests in flight to the upstream, of all environments together; further requests get a 429",
        )
        .example("500"),
    ],
};

/// `upstreams.*.health`.
const HEALTH: SectionSpec = SectionSpec {
    name: "health",
    keys: &[
        KeySpec::new(
            "path",
            ValueSpec::Text(TextSpec { label: "path from the root of the host", pattern: "^/[^#]*$" }),
            DefaultSpec::Required("/health"),
            "the path of a check. A check is a `GET` without `api_key` and with `headers`. The replica is healthy if it answers with a status from 200 to 299 within `timeouts.connect`",
        ),
        KeySpec::new(
            "every",
            ValueSpec::Duration,
            DefaultSpec::Value("5s"),
            "time between two checks of a replica, on average; at least 100 ms",
        )
        .example("10s"),
    ],
};

/// Maximum number of replicas of one upstream.
const MAX_REPLICAS: usize = 64;
/// The shortest time between two checks.
const MIN_CHECK_INTERVAL: Duration = Duration::from_millis(100);
const URL_PATTERN: &str = "^[Hh][Tt][Tt][Pp][Ss]?://[^?#@]+$";
const URL_EXAMPLE: &str = "https://api.openai.com/v1";

const TIMEOUTS: SectionSpec = SectionSpec {
    name: "timeouts",
    keys: &[
        KeySpec::new(
            "connect",
            ValueSpec::Duration,
            DefaultSpec::Value("5s"),
            "maximum time for name lookup, TCP and TLS together; then the caller gets a 502",
        )
        .example("2s"),
        KeySpec::new(
            "first_byte",
            ValueSpec::Duration,
            DefaultSpec::Value("120s"),
            "maximum time from the end of the request to the head of the answer; then the caller gets a 504",
        )
        .example("5m"),
        KeySpec::new(
            "idle",
            ValueSpec::Duration,
            DefaultSpec::Value("60s"),
            "maximum time between two pieces of an answer; then the gateway cuts off the answer",
        )
        .example("5m"),
        KeySpec::new(
            "total",
            ValueSpec::Duration,
            DefaultSpec::Value("15m"),
            "maximum time from the start of the request to the end of the answer; then the gateway cuts off the answer",
        )
        .example("1h"),
    ],
};

/// Headers that the config must not set: hop-by-hop headers, and headers that the gateway sets itself.
pub(super) const RESERVED_HEADERS: &[&str] = &[
    "accept-encoding",
    "connection",
    "content-length",
    "host",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

/// The ends of paths that the gateway serves. A `base_url` with one of them would contain it twice.
const ENDPOINTS: [&str; 7] = [
    "/chat/completions",
    "/completions",
    "/embeddings",
    "/responses",
    "/messages",
    "/rerank",
    "/moderations",
];

/// Reads every upstream and records its faults.
pub(super) fn read(top: &Section<'_>) -> Vec<Arc<UpstreamSettings>> {
    let setting = top.require("upstreams");
    let Some(section) = setting.and_then(|s| s.map("a mapping of names to upstreams")) else {
        return Vec::new();
    };
    if section.names().is_empty() {
        section.fault(format!("at least one upstream is required; for example: {EXAMPLE}"));
    }
    section.entries().filter_map(|(key, setting)| upstream(&key.name, &setting)).map(Arc::new).collect()
}

fn upstream(name: &str, setting: &Setting<'_>) -> Option<UpstreamSettings> {
    if name.contains(char::is_control) {
        setting.fault("the name of an upstream must not contain a control character, because answers have it in a header");
    }
    let section = setting.section(&UPSTREAM)?;
    let base_urls = base_urls(&section);
    let health = section.get("health").and_then(|s| health(&s));
    let api_key = section.get("api_key").and_then(|s| s.secret());
    let mut quotas = Vec::new();
    if let Some(setting) = section.get("quotas") {
        quotas::of_upstream(&setting, name, &mut quotas);
    }
    if let Some(setting) = section.get("model_quotas") {
        quotas::of_upstream_models(&setting, name, &mut quotas);
    }
    Some(UpstreamSettings {
        name: name.to_owned(),
        api: match section.word("api") {
            "azure" => ApiKind::Azure,
            "anthropic" => ApiKind::Anthropic,
            "gemini" => ApiKind::Gemini,
            _ => ApiKind::OpenAi,
        },
        provider_limits: match section.word("provider_limits") {
            _ if api_key.is_none() => ProviderLimitsMode::Ignore,
            "follow" => ProviderLimitsMode::Follow,
            "ignore" => ProviderLimitsMode::Ignore,
            _ => ProviderLimitsMode::Observe,
        },
        api_key,
        timeouts: timeouts(&section),
        headers: section.get("headers").and_then(|s| headers(&s)).unwrap_or_default(),
        requests_stream_usage: section.word("stream_usage") == "ask",
        quotas,
        max_in_flight: section.get("max_in_flight").and_then(|s| {
            s.positive(u64::MAX, "0 would refuse every request; leave the key out for no limit")
        }),
        base_url: base_urls.as_ref()?.first()?.clone(),
        base_urls: base_urls?,
        health,
    })
}

/// The URLs of all replicas, at least one.
fn base_urls(upstream: &Section<'_>) -> Option<Vec<Uri>> {
    match (upstream.get("base_url"), upstream.get("base_urls")) {
        (Some(_), Some(list)) => {
            list.fault("base_url is set too; set base_url for one server, or base_urls for its replicas");
            None
        }
        (Some(one), None) => Some(vec![base_url(&one)?]),
        (None, Some(list)) => replicas(&list),
        (None, None) => {
            let _ = upstream.require_as("base_url", URL_EXAMPLE);
            None
        }
    }
}

fn replicas(list: &Setting<'_>) -> Option<Vec<Uri>> {
    let settings = list.list()?;
    match settings.len() {
        0 => list.fault(format!("the list is empty; add the URL of a replica, such as {URL_EXAMPLE}")),
        n if n > MAX_REPLICAS => {
            list.fault(format!("{n} replicas are too many for one upstream; the maximum is {MAX_REPLICAS}"));
        }
        _ => {}
    }
    let mut urls: Vec<Uri> = Vec::new();
    for setting in &settings {
        let Some(url) = base_url(setting) else { continue };
        if urls.iter().any(|other| address(other) == address(&url)) {
            setting.fault("this replica is in the list twice; remove one of them");
        }
        if urls.first().is_some_and(|first| first.scheme() != url.scheme() || first.path() != url.path()) {
            setting.fault(
                "replicas of one backend must have the same scheme and path as the first one; declare another upstream for another backend",
            );
        }
        urls.push(url);
    }
    let is_complete = urls.len() == settings.len() && (1..=MAX_REPLICAS).contains(&urls.len());
    is_complete.then_some(urls)
}

/// Host and port of a URL.
pub(super) fn address(url: &Uri) -> String {
    let default = if url.scheme_str() == Some("https") { 443 } else { 80 };
    let host = url.host().unwrap_or_default().to_ascii_lowercase();
    format!("{host}:{}", url.port_u16().unwrap_or(default))
}

fn health(setting: &Setting<'_>) -> Option<HealthCheckSettings> {
    let section = setting.section(&HEALTH)?;
    let every = section.duration("every");
    if let Some(setting) = section.get("every").filter(|_| every < MIN_CHECK_INTERVAL) {
        setting.fault("this interval is too short; write 100ms or more");
    }
    let setting = section.require("path")?;
    let path = setting.text()?;
    if !path.starts_with('/') || path.contains('#') || path.parse::<PathAndQuery>().is_err() {
        setting.fault("this must be a path that begins with \"/\", such as /health");
        return None;
    }
    Some(HealthCheckSettings { path: path.to_owned(), every })
}

/// A valid base URL. It may contain a password, so no message contains it.
fn base_url(setting: &Setting<'_>) -> Option<Uri> {
    let text = setting.text()?;
    let uri = text.trim_end_matches('/').parse::<Uri>().ok();
    let authority = uri.as_ref().and_then(Uri::authority);
    let has_valid_port = |a: &http::uri::Authority| {
        let port = a.as_str().rsplit_once(':').filter(|(_, port)| !port.ends_with(']'));
        port.is_none_or(|(_, port)| port.parse::<u16>().is_ok_and(|p| p > 0))
    };
    let scheme = uri.as_ref().and_then(Uri::scheme_str);
    if authority.is_some_and(|a| a.as_str().contains('@')) {
        setting.fault("this URL must not contain a user name or password; set the upstream's key as api_key");
    } else if text.contains(['?', '#']) {
        setting.fault("this URL must not have a query or a fragment; remove it (the gateway forwards the caller's query)");
    } else if !matches!(scheme, Some("http" | "https"))
        || !authority.is_some_and(|a| !a.host().is_empty() && has_valid_port(a))
    {
        setting.fault("this must be an http or https URL such as https://api.openai.com/v1");
    } else if scheme == Some("https")
        && authority.is_none_or(|a| ServerName::try_from(a.host().trim_matches(['[', ']'])).is_err())
    {
        setting.fault("the host is not a valid name of a TLS server; write a DNS name or an IP address");
    } else if let Some(endpoint) =
        ENDPOINTS.iter().find(|endpoint| text.trim_end_matches('/').ends_with(*endpoint))
    {
        setting.fault(format!(
            "this URL ends in {endpoint}, the path of an endpoint, which the gateway appends itself; remove it from the URL"
        ));
    } else {
        return uri;
    }
    None
}

fn timeouts(upstream: &Section<'_>) -> Timeouts {
    let section = upstream.section("timeouts");
    let get = |name: &str| {
        let duration = section.duration(name);
        if let Some(setting) = section.get(name).filter(|_| duration.is_zero()) {
            setting.fault("a timeout of 0 would fail every request; set a longer one or remove the key");
        }
        duration
    };
    Timeouts {
        connect: get("connect"),
        first_byte: get("first_byte"),
        idle: get("idle"),
        total: get("total"),
    }
}

fn headers(setting: &Setting<'_>) -> Option<HeaderMap> {
    let section = setting.map("a mapping of names to values")?;
    let mut headers = HeaderMap::new();
    for (key, setting) in section.entries() {
        let Ok(name) = key.name.parse::<HeaderName>() else {
            setting.findings.fault(
                &key.location,
                &section.path,
                format!("\"{}\" is not a valid header name", key.name),
            );
            continue;
        };
        if RESERVED_HEADERS.contains(&name.as_str()) {
            setting.findings.fault(
                &key.location,
                &setting.path,
                "the gateway sets this header itself; remove it",
            );
        }
        match setting.text().map(HeaderValue::from_str) {
            Some(Ok(mut value)) => {
                value.set_sensitive(true);
                if headers.insert(name, value).is_some() {
                    setting.findings.fault(
                        &key.location,
                        &setting.path,
                        "this header is set twice; remove one of them",
                    );
                }
            }
            Some(Err(_)) => {
                setting.fault("this value contains a character that a header must not contain; remove it");
            }
            None => {}
        }
    }
    Some(headers)
}
