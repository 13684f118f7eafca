//! `upstreams`: where requests go.

use super::item::{Item, Section};
use super::load::secret;
use super::{ApiKind, Timeouts, Upstream};
use http::{HeaderMap, HeaderName, HeaderValue, Uri};
use std::sync::Arc;
use std::time::Duration;
use tokio_rustls::rustls::pki_types::ServerName;

const EXAMPLE: &str = "upstreams: { openai: { base_url: https://api.openai.com/v1 } }";

/// Headers that belong to one connection, and those that the gateway sets itself.
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

/// Reads every upstream; what is wrong is noted.
pub(super) fn read(top: &Section<'_>) -> Vec<Arc<Upstream>> {
    let item = top.require("upstreams", EXAMPLE);
    let Some(section) = item.and_then(|i| i.map("a mapping of names to upstreams")) else {
        return Vec::new();
    };
    if section.names().is_empty() {
        section.fault(format!("there has to be one; for example: {EXAMPLE}"));
    }
    section.items().filter_map(|(key, item)| upstream(&key.name, &item)).map(Arc::new).collect()
}

fn upstream(name: &str, item: &Item<'_>) -> Option<Upstream> {
    let section = item.section(&["base_url", "api", "api_key", "timeouts", "headers", "stream_usage"])?;
    let apis = [
        ("openai", ApiKind::OpenAi),
        ("azure", ApiKind::Azure),
        ("anthropic", ApiKind::Anthropic),
        ("gemini", ApiKind::Gemini),
    ];
    let stream_usage = [("ask", true), ("never", false)];
    let base_url = section.require("base_url", "https://api.openai.com/v1");
    Some(Upstream {
        name: name.to_owned(),
        api: section.get("api").and_then(|i| i.choice(&apis)).unwrap_or(ApiKind::OpenAi),
        api_key: section.get("api_key").and_then(|i| secret(&i)),
        timeouts: timeouts(&section),
        headers: section.get("headers").and_then(|i| headers(&i)).unwrap_or_default(),
        ask_stream_usage: section.get("stream_usage").and_then(|i| i.choice(&stream_usage)).unwrap_or(true),
        base_url: base_url.and_then(|i| self::base_url(&i))?,
    })
}

/// Not repeated in a message: it may hold a password.
fn base_url(item: &Item<'_>) -> Option<Uri> {
    let text = item.text()?;
    let uri = text.trim_end_matches('/').parse::<Uri>().ok();
    let authority = uri.as_ref().and_then(Uri::authority);
    let port_is_right = |a: &http::uri::Authority| {
        let port = a.as_str().rsplit_once(':').filter(|(_, port)| !port.ends_with(']'));
        port.is_none_or(|(_, port)| port.parse::<u16>().is_ok_and(|p| p > 0))
    };
    let scheme = uri.as_ref().and_then(Uri::scheme_str);
    if authority.is_some_and(|a| a.as_str().contains('@')) {
        item.fault("this must not hold a user name or password; the upstream's key is set as api_key");
    } else if text.contains(['?', '#']) {
        item.fault("this must not have a query or a fragment; the caller's own query is passed on");
    } else if !matches!(scheme, Some("http" | "https"))
        || !authority.is_some_and(|a| !a.host().is_empty() && port_is_right(a))
    {
        item.fault("this has to be an http or https URL such as https://api.openai.com/v1");
    } else if scheme == Some("https")
        && authority.is_none_or(|a| ServerName::try_from(a.host().trim_matches(['[', ']'])).is_err())
    {
        item.fault("the host cannot be the name of a TLS server");
    } else {
        return uri;
    }
    None
}

fn timeouts(upstream: &Section<'_>) -> Timeouts {
    let section = upstream.section("timeouts", &["connect", "first_byte", "idle", "total"]);
    let get = |name: &str, default: u64| {
        let item = section.get(name);
        let duration = item.as_ref().and_then(Item::duration);
        if let (Some(item), Some(Duration::ZERO)) = (&item, duration) {
            item.fault("a timeout of 0 would fail every request");
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

fn headers(item: &Item<'_>) -> Option<HeaderMap> {
    let section = item.map("a mapping of names to values")?;
    let mut headers = HeaderMap::new();
    for (key, item) in section.items() {
        let Ok(name) = key.name.parse::<HeaderName>() else {
            item.findings.fault(&key.place, &section.path, format!("\"{}\" is no header name", key.name));
            continue;
        };
        if RESERVED_HEADERS.contains(&name.as_str()) {
            item.findings.fault(&key.place, &item.path, "this header is the gateway's to set: remove it");
        }
        match item.text().map(HeaderValue::from_str) {
            Some(Ok(mut value)) => {
                value.set_sensitive(true);
                if headers.insert(name, value).is_some() {
                    item.findings.fault(&key.place, &item.path, "this header stands here twice");
                }
            }
            Some(Err(_)) => item.fault("this value has characters that no header can carry"),
            None => {}
        }
    }
    Some(headers)
}
