//! `upstreams`: the servers that receive the requests.

use super::setting::{Section, Setting};
use super::{ApiKind, Timeouts, UpstreamSettings};
use http::{HeaderMap, HeaderName, HeaderValue, Uri};
use std::sync::Arc;
use std::time::Duration;
use tokio_rustls::rustls::pki_types::ServerName;

const EXAMPLE: &str = "upstreams: { openai: { base_url: https://api.openai.com/v1 } }";

/// Headers that the config must not set: hop-by-hop headers, and headers that the gateway sets itself.
const RESERVED_HEADERS: &[&str] = &[
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
    let setting = top.require("upstreams", EXAMPLE);
    let Some(section) = setting.and_then(|s| s.map("a mapping of names to upstreams")) else {
        return Vec::new();
    };
    if section.names().is_empty() {
        section.fault(format!("at least one upstream is required; for example: {EXAMPLE}"));
    }
    section.entries().filter_map(|(key, setting)| upstream(&key.name, &setting)).map(Arc::new).collect()
}

fn upstream(name: &str, setting: &Setting<'_>) -> Option<UpstreamSettings> {
    let section = setting.section(&["base_url", "api", "api_key", "timeouts", "headers", "stream_usage"])?;
    let apis = [
        ("openai", ApiKind::OpenAi),
        ("azure", ApiKind::Azure),
        ("anthropic", ApiKind::Anthropic),
        ("gemini", ApiKind::Gemini),
    ];
    let stream_usage = [("ask", true), ("never", false)];
    let base_url = section.require("base_url", "https://api.openai.com/v1");
    Some(UpstreamSettings {
        name: name.to_owned(),
        api: section.get("api").and_then(|s| s.choice(&apis)).unwrap_or(ApiKind::OpenAi),
        api_key: section.get("api_key").and_then(|s| s.secret()),
        timeouts: timeouts(&section),
        headers: section.get("headers").and_then(|s| headers(&s)).unwrap_or_default(),
        requests_stream_usage: section
            .get("stream_usage")
            .and_then(|s| s.choice(&stream_usage))
            .unwrap_or(true),
        base_url: base_url.and_then(|s| self::base_url(&s))?,
    })
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
    let section = upstream.section("timeouts", &["connect", "first_byte", "idle", "total"]);
    let get = |name: &str, default: u64| {
        let setting = section.get(name);
        let duration = setting.as_ref().and_then(Setting::duration);
        if let (Some(setting), Some(Duration::ZERO)) = (&setting, duration) {
            setting.fault("a timeout of 0 would fail every request; set a longer one or remove the key");
        }
        duration.unwrap_or(Duration::from_secs(default))
    };
    Timeouts {
        connect: get("connect", 5),
        first_byte: get("first_byte", 120),
        idle: get("idle", 60),
        total: get("total", 15 * 60),
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
