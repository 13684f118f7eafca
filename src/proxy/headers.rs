//! Which headers pass, in either direction, and those that the gateway adds.

use crate::api::Dialect;
use crate::config::{ApiKind, Upstream};
use crate::error::go_duration;
use crate::quota::{Kind, QuotaStatus};
use http::HeaderMap;
use http::header::{self, HeaderName, HeaderValue};
use smallvec::SmallVec;

/// Headers that can carry a caller's key, in the order in which they are looked at.
const KEY_HEADERS: [&str; 4] = ["authorization", "api-key", "x-api-key", "x-goog-api-key"];

const ENVIRONMENT: HeaderName = HeaderName::from_static("x-tollgate-environment");
const CLAMPED: HeaderName = HeaderName::from_static("x-tollgate-clamped-max-tokens");
const ESTIMATE: HeaderName = HeaderName::from_static("x-tollgate-estimated-prompt-tokens");
const RAW_ESTIMATE: HeaderName = HeaderName::from_static("x-tollgate-raw-estimated-prompt-tokens");

/// More keys than this in one request are a riddle, and work to look up.
const MOST_KEYS: usize = 8;

/// A key that a caller has sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SentKey<'h> {
    pub(super) key: &'h [u8],
    pub(super) header: KeyHeader,
    /// As it has to be sent; else it is looked at only so that it goes nowhere else.
    pub(super) is_regular: bool,
}

/// Which of `KEY_HEADERS` a key stands in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct KeyHeader(u8);

/// Headers whose values stay here, because a key of this gateway's stands among them.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct OurKeys(u8);

impl OurKeys {
    pub(super) fn add(&mut self, header: KeyHeader) {
        self.0 |= 1 << header.0;
    }

    fn stand_in(self, name: &str) -> bool {
        KEY_HEADERS.iter().position(|header| *header == name).is_some_and(|at| self.0 & (1 << at) != 0)
    }
}

/// Every key that a caller has sent, whichever header carries it, each value once in a header. `None`:
/// they are too many.
pub(super) fn sent_keys(headers: &HeaderMap) -> Option<SmallVec<[SentKey<'_>; 2]>> {
    let mut keys = SmallVec::new();
    for (at, name) in (0..).zip(KEY_HEADERS) {
        for value in headers.get_all(name) {
            let value = value.as_bytes().trim_ascii();
            let bearer = if at == 0 { bearer(value) } else { Some(value) };
            let key =
                SentKey { key: bearer.unwrap_or(value), header: KeyHeader(at), is_regular: bearer.is_some() };
            add_key(&mut keys, key);
            // Under another scheme, or none.
            if let (None, Some(space)) = (bearer, value.iter().rposition(|&b| b == b' ')) {
                add_key(&mut keys, SentKey { key: &value[space + 1..], ..key });
            }
        }
    }
    (keys.len() <= MOST_KEYS).then_some(keys)
}

fn add_key<'h>(keys: &mut SmallVec<[SentKey<'h>; 2]>, key: SentKey<'h>) {
    if !key.key.is_empty() && keys.len() <= MOST_KEYS && !keys.contains(&key) {
        keys.push(key);
    }
}

fn bearer(value: &[u8]) -> Option<&[u8]> {
    let (scheme, key) = value.split_at_checked(7)?;
    scheme.eq_ignore_ascii_case(b"bearer ").then(|| key.trim_ascii())
}

/// The headers of the request to the upstream. The caller's key goes along only where the upstream has
/// none of its own (`credential` is that), and a key of this gateway's never does.
pub(super) fn for_upstream(
    headers: HeaderMap,
    upstream: &Upstream,
    credential: Option<&Credential>,
    ours: OurKeys,
) -> Vec<(HeaderName, HeaderValue)> {
    let named = named_by_connection(&headers);
    let mut passed = Vec::with_capacity(headers.len() + 4);
    let mut last = None;
    for (name, value) in headers {
        // Of a header that stands there several times only the first carries the name.
        let Some(name) = name.or_else(|| last.clone()) else { continue };
        let is_key =
            ours.stand_in(name.as_str()) || credential.is_some() && KEY_HEADERS.contains(&name.as_str());
        let stays = is_key
            || is_hop_by_hop(&name)
            || is_ours_to_set(&name)
            || named.iter().any(|n| n == name.as_str())
            || upstream.headers.contains_key(&name);
        last = Some(name.clone());
        if !stays {
            passed.push((name, value));
        }
    }
    passed.push((header::ACCEPT_ENCODING, HeaderValue::from_static("identity")));
    passed.extend(credential.cloned());
    passed.extend(upstream.headers.iter().map(|(name, value)| (name.clone(), value.clone())));
    passed
}

/// The header that carries an upstream's own key.
pub(super) type Credential = (HeaderName, HeaderValue);

/// The credential of an upstream that has a key of its own.
pub(super) fn credential(upstream: &Upstream) -> Option<Credential> {
    let key = upstream.api_key.as_ref()?.expose();
    let (name, text) = match upstream.api {
        ApiKind::OpenAi => (header::AUTHORIZATION, format!("Bearer {key}")),
        ApiKind::Azure => (HeaderName::from_static("api-key"), key.to_owned()),
        ApiKind::Anthropic => (HeaderName::from_static("x-api-key"), key.to_owned()),
        ApiKind::Gemini => (HeaderName::from_static("x-goog-api-key"), key.to_owned()),
    };
    let mut value = HeaderValue::from_str(&text).expect("Config::load refuses keys that no header can carry");
    value.set_sensitive(true);
    Some((name, value))
}

/// The headers of the answer to the caller, in place.
pub(super) fn for_caller(headers: &mut HeaderMap) {
    for name in named_by_connection(headers) {
        headers.remove(name);
    }
    // One pass over the few that there are is cheaper than looking nine names up.
    let stays: SmallVec<[HeaderName; 4]> =
        headers.keys().filter(|name| is_hop_by_hop(name)).cloned().collect();
    for name in stays {
        headers.remove(name);
    }
}

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

/// What the caller says of these is not the upstream's business, or is said anew.
fn is_ours_to_set(name: &HeaderName) -> bool {
    let name = name.as_str();
    matches!(name, "host" | "content-length" | "accept-encoding" | "expect" | "cookie" | "forwarded")
        || name.starts_with("x-forwarded-")
}

/// Headers that `connection` names hold for one hop only.
fn named_by_connection(headers: &HeaderMap) -> Vec<String> {
    let mut named = Vec::new();
    for value in headers.get_all(header::CONNECTION) {
        for token in value.as_bytes().split(|&b| b == b',') {
            let token = token.trim_ascii().to_ascii_lowercase();
            if !matches!(token.as_slice(), b"" | b"keep-alive" | b"close") {
                named.extend(String::from_utf8(token));
            }
        }
    }
    named
}

/// The header names of one kind of quota: limit, remaining, reset.
fn names(kind: Kind) -> [HeaderName; 3] {
    // Constants: a name is checked when it is compiled, not for every answer.
    macro_rules! names {
        ($($name:literal),*) => {[$({
            const NAME: HeaderName = HeaderName::from_static($name);
            NAME
        }),*]};
    }
    match kind {
        Kind::Requests => names![
            "x-ratelimit-limit-requests",
            "x-ratelimit-remaining-requests",
            "x-ratelimit-reset-requests"
        ],
        Kind::TotalTokens => {
            names!["x-ratelimit-limit-tokens", "x-ratelimit-remaining-tokens", "x-ratelimit-reset-tokens"]
        }
        Kind::PromptTokens => names![
            "x-ratelimit-limit-prompt-tokens",
            "x-ratelimit-remaining-prompt-tokens",
            "x-ratelimit-reset-prompt-tokens"
        ],
        Kind::CompletionTokens => names![
            "x-ratelimit-limit-completion-tokens",
            "x-ratelimit-remaining-completion-tokens",
            "x-ratelimit-reset-completion-tokens"
        ],
    }
}

/// What every answer tells the caller beside the upstream's own headers, as far as it is known.
#[derive(Default)]
pub(super) struct Told {
    /// Whose SDK is told.
    pub(super) dialect: Dialect,
    pub(super) environment: Option<HeaderValue>,
    /// What is reserved for the prompt, and what was counted of it before that was corrected.
    pub(super) estimated_prompt: Option<(u64, u64)>,
    pub(super) standing: [Option<QuotaStatus>; 4],
    /// To how many tokens each completion was bounded.
    pub(super) clamped_to: Option<u64>,
    /// What of the request is answered without having been read.
    pub(super) unread: Unread,
}

/// How much of a body has not been read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Unread {
    #[default]
    Nothing,
    /// So little that reading it costs less than another connection.
    Little,
    Much,
}

impl Told {
    /// An upstream's header of the same name gives way only where there is such a quota.
    pub(super) fn write(self, headers: &mut HeaderMap) {
        if let Some(environment) = self.environment {
            headers.insert(ENVIRONMENT, environment);
        }
        if let Some(tokens) = self.clamped_to {
            headers.insert(CLAMPED, HeaderValue::from(tokens));
        }
        if let Some((tokens, raw)) = self.estimated_prompt {
            headers.insert(ESTIMATE, HeaderValue::from(tokens));
            if raw != tokens {
                headers.insert(RAW_ESTIMATE, HeaderValue::from(raw));
            }
        }
        if self.unread == Unread::Much {
            headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        for (kind, standing) in Kind::ALL.into_iter().zip(self.standing) {
            let Some(QuotaStatus { limit, remaining, reset_ms }) = standing else { continue };
            let [limit_name, remaining_name, reset_name] = names(kind);
            headers.insert(limit_name, HeaderValue::from(limit));
            headers.insert(remaining_name, HeaderValue::from(remaining));
            if let Ok(reset) = HeaderValue::from_maybe_shared(bytes::Bytes::from(go_duration(reset_ms))) {
                headers.insert(reset_name, reset);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(headers: &HeaderMap) -> Vec<(&str, bool)> {
        let keys = sent_keys(headers).unwrap();
        keys.iter().map(|k| (std::str::from_utf8(k.key).unwrap(), k.is_regular)).collect()
    }

    #[test]
    fn a_key_is_read_from_whichever_header_carries_it() {
        for (name, value, key) in [
            ("authorization", "Bearer k1", vec![("k1", true)]),
            ("authorization", "bearer  k1 ", vec![("k1", true)]),
            ("authorization", "Basic k1", vec![("Basic k1", false), ("k1", false)]),
            ("authorization", "k1", vec![("k1", false)]),
            ("authorization", "Bearer ", vec![("Bearer", false)]),
            ("api-key", "k1", vec![("k1", true)]),
            ("x-api-key", "k1", vec![("k1", true)]),
            ("x-goog-api-key", "k1", vec![("k1", true)]),
            ("x-api-key", "", vec![]),
        ] {
            let headers =
                HeaderMap::from_iter([(HeaderName::from_static(name), HeaderValue::from_static(value))]);
            assert_eq!(keys(&headers), key, "{name}: {value}");
        }
    }

    #[test]
    fn all_keys_are_read_each_once_and_too_many_refused() {
        let mut headers = HeaderMap::new();
        for value in ["a", "b", "a"] {
            headers.append("x-api-key", HeaderValue::from_static(value));
        }
        headers.append("authorization", HeaderValue::from_static("Bearer a"));
        assert_eq!(keys(&headers), [("a", true), ("a", true), ("b", true)]);
        for n in 0..7 {
            headers.append("api-key", HeaderValue::from(n));
        }
        assert!(sent_keys(&headers).is_none());
    }
}
