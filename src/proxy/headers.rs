//! The headers that the gateway forwards in each direction, and the headers that it adds.

use super::charge::logged_name;
use super::keys::{GatewayKeyHeaders, KEY_HEADERS};
use crate::config::{ApiKind, UpstreamSettings};
use crate::error::{push_go_duration, push_number};
use crate::quota::{Kind, QuotaStatus};
use crate::server::Peer;
use bytes::Bytes;
use http::HeaderMap;
use http::header::{self, HeaderName, HeaderValue};
use smallvec::SmallVec;

pub(super) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const TRACE_PARENT: HeaderName = HeaderName::from_static("traceparent");
const TRACE_STATE: HeaderName = HeaderName::from_static("tracestate");

/// The name of a header that the gateway adds to answers.
struct AddedName {
    name: HeaderName,
    /// The end of the line before, and the name with its colon.
    line_begin: &'static str,
}

macro_rules! added_name {
    ($name:expr) => {
        AddedName { name: HeaderName::from_static($name), line_begin: concat!("\r\n", $name, ": ") }
    };
}

static NEW_ID: AddedName = added_name!("x-request-id");
static ENVIRONMENT: AddedName = added_name!("x-tollgate-environment");
static UPSTREAM: AddedName = added_name!("x-tollgate-upstream");
static CLAMPED: AddedName = added_name!("x-tollgate-clamped-max-tokens");
static ESTIMATE: AddedName = added_name!("x-tollgate-estimated-prompt-tokens");
static RAW_ESTIMATE: AddedName = added_name!("x-tollgate-raw-estimated-prompt-tokens");

/// The headers of the request to the upstream. The caller's own key is forwarded only if the upstream has no
/// `credential` configured. A key of this gateway is never forwarded.
pub(super) fn for_upstream(
    mut headers: HeaderMap,
    upstream: &UpstreamSettings,
    credential: Option<&Credential>,
    gateway_keys: GatewayKeyHeaders,
) -> Vec<(HeaderName, HeaderValue)> {
    remove_named_by_connection(&mut headers);
    let mut passed = Vec::with_capacity(headers.len() + 4);
    let mut last = None;
    for (name, mut value) in headers {
        // `HeaderMap` yields the name of a repeated header only with its first value.
        let Some(name) = name.or_else(|| last.clone()) else { continue };
        let is_key = gateway_keys.contains(name.as_str())
            || credential.is_some() && KEY_HEADERS.contains(&name.as_str());
        let is_dropped = is_key
            || is_hop_by_hop(&name)
            || is_never_forwarded(&name)
            || upstream.headers.contains_key(&name);
        last = Some(name.clone());
        if !is_dropped {
            // `Debug` then leaves a key out, and HTTP/2 does not put it into a compression table.
            value.set_sensitive(KEY_HEADERS.contains(&name.as_str()));
            passed.push((name, value));
        }
    }
    passed.push((header::ACCEPT_ENCODING, HeaderValue::from_static("identity")));
    passed.extend(credential.cloned());
    passed.extend(upstream.headers.iter().map(|(name, value)| (name.clone(), value.clone())));
    passed
}

/// Makes a span of the gateway the parent of what the upstream does. A `tracestate` belongs to its `traceparent`: without a
/// valid one it is not passed on.
pub(super) fn replace_trace_parent(headers: &mut Vec<(HeaderName, HeaderValue)>, parent: &str) {
    let trace_id = parent.split('-').nth(1).unwrap_or_default();
    let continues = |value: &HeaderValue| value.to_str().is_ok_and(|value| value.contains(trace_id));
    let is_continued = headers.iter().any(|(name, value)| *name == TRACE_PARENT && continues(value));
    headers.retain(|(name, _)| *name != TRACE_PARENT && (is_continued || *name != TRACE_STATE));
    if let Ok(value) = HeaderValue::from_str(parent) {
        headers.push((TRACE_PARENT, value));
    }
}

/// The header that carries an upstream's configured key.
pub(super) type Credential = (HeaderName, HeaderValue);

/// The credential of an upstream. `None`: no `api_key` is configured.
pub(super) fn credential(upstream: &UpstreamSettings) -> Option<Credential> {
    let key = upstream.api_key.as_ref()?.expose();
    let (name, text) = match upstream.api {
        ApiKind::OpenAi => (header::AUTHORIZATION, format!("Bearer {key}")),
        ApiKind::Azure => (HeaderName::from_static("api-key"), key.to_owned()),
        ApiKind::Anthropic => (HeaderName::from_static("x-api-key"), key.to_owned()),
        ApiKind::Gemini => (HeaderName::from_static("x-goog-api-key"), key.to_owned()),
    };
    let mut value = HeaderValue::from_str(&text).expect("Config::load refuses keys that are no header value");
    value.set_sensitive(true);
    Some((name, value))
}

/// Removes from an answer's headers those that are not passed on to the caller, and those that `added` replaces.
pub(super) fn for_caller(headers: &mut HeaderMap, added: &AddedHeaders) {
    remove_named_by_connection(headers);
    // One pass over the few headers of an answer is cheaper than nine lookups.
    let is_dropped = |name: &&HeaderName| {
        is_hop_by_hop(name) || name.as_str().starts_with(OWN_PREFIX) || added.has_rate_limit(name)
    };
    let dropped: SmallVec<[HeaderName; 4]> = headers.keys().filter(is_dropped).cloned().collect();
    for name in dropped {
        headers.remove(name);
    }
}

/// Headers that only the gateway sends. An upstream's own ones would be taken for the gateway's.
const OWN_PREFIX: &str = "x-tollgate-";

const HOP_BY_HOP: &[&str] = &[
    "connection",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

fn is_hop_by_hop(name: &HeaderName) -> bool {
    HOP_BY_HOP.contains(&name.as_str())
}

/// Headers of the caller that the gateway sets itself, or that must not reach the upstream.
fn is_never_forwarded(name: &HeaderName) -> bool {
    let name = name.as_str();
    matches!(name, "host" | "content-length" | "accept-encoding" | "expect" | "cookie" | "forwarded")
        || name.starts_with("x-forwarded-")
}

/// Removes the headers that `connection` declares as hop-by-hop. It may name thousands: each takes one lookup.
fn remove_named_by_connection(headers: &mut HeaderMap) {
    let values: SmallVec<[HeaderValue; 1]> = headers.get_all(header::CONNECTION).iter().cloned().collect();
    for value in &values {
        for token in value.as_bytes().split(|&b| b == b',') {
            let token = token.trim_ascii();
            let is_option = |option: &[u8]| token.eq_ignore_ascii_case(option);
            if !is_option(b"keep-alive")
                && !is_option(b"close")
                && let Ok(name) = std::str::from_utf8(token)
            {
                headers.remove(name);
            }
        }
    }
}

/// The rate limit headers of one kind of quota: limit, remaining, reset.
fn rate_limit_names(kind: Kind) -> &'static [AddedName; 3] {
    macro_rules! names {
        ($unit:literal) => {{
            static NAMES: [AddedName; 3] = [
                added_name!(concat!("x-ratelimit-limit-", $unit)),
                added_name!(concat!("x-ratelimit-remaining-", $unit)),
                added_name!(concat!("x-ratelimit-reset-", $unit)),
            ];
            &NAMES
        }};
    }
    match kind {
        Kind::Requests => names!("requests"),
        Kind::TotalTokens => names!("tokens"),
        Kind::PromptTokens => names!("prompt-tokens"),
        Kind::CompletionTokens => names!("completion-tokens"),
    }
}

/// The upstream's request id in an answer's headers, as it is logged.
pub(super) fn request_id(headers: &HeaderMap) -> Option<String> {
    let id = headers.get(REQUEST_ID)?;
    Some(logged_name(id.to_str().unwrap_or_default()).to_owned())
}

/// Response headers that the gateway adds. Values that are not known yet are absent.
#[derive(Clone, Default)]
pub(super) struct AddedHeaders {
    pub(super) environment: Option<HeaderValue>,
    /// The name of the upstream that answered.
    pub(super) upstream: Option<HeaderValue>,
    /// Prompt tokens reserved, and prompt tokens counted before calibration.
    pub(super) estimated_prompt: Option<(u64, u64)>,
    /// The status of the quotas of each kind, in the order of `Kind::ALL`.
    pub(super) quotas: [Option<QuotaStatus>; 4],
    /// The token limit to which each completion was clamped.
    pub(super) clamped_to: Option<u64>,
    pub(super) unread: UnreadBody,
}

/// How much of a request's body the gateway has left unread.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum UnreadBody {
    #[default]
    None,
    /// Discarding it costs less than a new connection.
    Small,
    /// The connection is closed after the answer.
    Large,
}

impl AddedHeaders {
    /// Adds the headers to an answer with the upstream's headers, which `for_caller` has prepared, and a request id if it is
    /// new. To HTTP/1.1 they are added as lines.
    pub(super) fn add_to_answer(&self, headers: &mut HeaderMap, new_id: Option<&str>, peer: &Peer) {
        if self.unread == UnreadBody::None && peer.takes_head_lines() {
            let mut lines = HeaderLines(String::with_capacity(USUAL_LINES));
            self.add_to(&mut lines, new_id);
            peer.add_head_lines(lines.0.into_bytes(), headers);
        } else {
            self.write_with_id(headers, new_id);
        }
    }

    /// Adds the headers. They replace headers of the same name. Rate limit headers are added only for kinds of quota that the
    /// environment has.
    pub(super) fn write(&self, headers: &mut HeaderMap) {
        self.write_with_id(headers, None);
    }

    fn write_with_id(&self, headers: &mut HeaderMap, new_id: Option<&str>) {
        let mut fields = HeaderFields::default();
        self.add_to(&mut fields, new_id);
        fields.insert_into(headers);
        if self.unread == UnreadBody::Large {
            headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
    }

    /// Adds the headers in their order.
    fn add_to(&self, sink: &mut impl HeaderSink, new_id: Option<&str>) {
        if let Some(id) = new_id {
            sink.add(&NEW_ID, |text| text.push_str(id));
        }
        if let Some(tokens) = self.clamped_to {
            sink.add(&CLAMPED, |text| push_number(text, tokens));
        }
        if let Some((tokens, raw)) = self.estimated_prompt {
            sink.add(&ESTIMATE, |text| push_number(text, tokens));
            if raw != tokens {
                sink.add(&RAW_ESTIMATE, |text| push_number(text, raw));
            }
        }
        for (kind, quotas) in Kind::ALL.into_iter().zip(&self.quotas) {
            let Some(QuotaStatus { limit, remaining, reset_ms }) = *quotas else { continue };
            let [limit_name, remaining_name, reset_name] = rate_limit_names(kind);
            sink.add(limit_name, |text| push_number(text, limit));
            sink.add(remaining_name, |text| push_number(text, remaining));
            sink.add(reset_name, |text| push_go_duration(text, reset_ms));
        }
        for (name, value) in [(&ENVIRONMENT, &self.environment), (&UPSTREAM, &self.upstream)] {
            // The names in a config are UTF-8.
            if let Some(Ok(value)) = value.as_ref().map(|value| std::str::from_utf8(value.as_bytes())) {
                sink.add(name, |text| text.push_str(value));
            }
        }
    }

    /// Whether this is a rate limit header that the gateway adds.
    fn has_rate_limit(&self, name: &HeaderName) -> bool {
        let is_of = |kind: Kind| rate_limit_names(kind).iter().any(|added| added.name == *name);
        name.as_str().starts_with("x-ratelimit-")
            && Kind::ALL.into_iter().zip(&self.quotas).any(|(kind, status)| status.is_some() && is_of(kind))
    }
}

/// Usual bytes of the lines that are added to an answer.
const USUAL_LINES: usize = 1_024;

/// Receives the headers that the gateway adds to an answer. Values have only characters that a header can have.
trait HeaderSink {
    /// `write` appends the value.
    fn add(&mut self, name: &'static AddedName, write: impl FnOnce(&mut String));
}

/// Lines of the head of an answer, each behind the end of the line before it.
struct HeaderLines(String);

impl HeaderSink for HeaderLines {
    fn add(&mut self, name: &'static AddedName, write: impl FnOnce(&mut String)) {
        self.0.push_str(name.line_begin);
        write(&mut self.0);
    }
}

/// Headers for a map. The values share one allocation.
#[derive(Default)]
struct HeaderFields {
    /// The names, each with the end of its value in `text`.
    ends: SmallVec<[(&'static HeaderName, usize); 18]>,
    text: String,
}

impl HeaderSink for HeaderFields {
    fn add(&mut self, name: &'static AddedName, write: impl FnOnce(&mut String)) {
        write(&mut self.text);
        self.ends.push((&name.name, self.text.len()));
    }
}

impl HeaderFields {
    fn insert_into(&mut self, headers: &mut HeaderMap) {
        let (text, mut start) = (Bytes::from(std::mem::take(&mut self.text)), 0);
        headers.reserve(self.ends.len());
        for &(name, end) in &self.ends {
            if let Ok(value) = HeaderValue::from_maybe_shared(text.slice(start..end)) {
                headers.insert(name, value);
            }
            start = end;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_that_connection_names_are_removed() {
        let mut headers = HeaderMap::new();
        for name in ["x-a", "x-b", "x-b", "x-c", "close"] {
            headers.append(name, HeaderValue::from_static("1"));
        }
        for value in ["close, X-A", "", " ,no header,x-d,\t x-b ,X-A"] {
            headers.append(header::CONNECTION, HeaderValue::from_static(value));
        }
        remove_named_by_connection(&mut headers);
        headers.remove(header::CONNECTION);
        let left: Vec<_> = headers.keys().map(HeaderName::as_str).collect();
        assert_eq!(left, ["x-c", "close"]);
    }

    #[test]
    fn a_forwarded_key_is_left_out_of_debug_output() {
        let config = "upstreams: { u: { base_url: 'http://127.0.0.1:1/v1' } }\nenvironments: { e: { upstream: u } }\nstore: { memory: true }";
        let config = crate::config::parse(config, "t.yaml", &|_| None, &[]).unwrap().config;
        let mut headers = HeaderMap::new();
        headers.insert("authorization", HeaderValue::from_static("Bearer sk-canary"));
        headers.insert("x-api-key", HeaderValue::from_static("sk-canary"));
        let passed = for_upstream(headers, &config.upstreams[0], None, GatewayKeyHeaders::default());
        assert_eq!(passed.iter().filter(|(_, value)| value.as_bytes().ends_with(b"sk-canary")).count(), 2);
        assert!(!format!("{passed:?}").contains("canary"), "{passed:?}");
    }
}
