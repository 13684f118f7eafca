//! Which headers pass, in either direction, and those that the gateway adds.

use crate::config::{ApiKind, Secret, Upstream};
use crate::error::go_duration;
use crate::quota::{Kind, Standing};
use http::HeaderMap;
use http::header::{self, HeaderName, HeaderValue};

/// Headers that can carry a caller's key, in the order in which they are looked at.
const KEY_HEADERS: [&str; 4] = ["authorization", "api-key", "x-api-key", "x-goog-api-key"];

/// The key that a caller has sent, whichever header carries it.
pub(super) fn callers_key(headers: &HeaderMap) -> Option<&[u8]> {
    KEY_HEADERS.iter().find_map(|name| {
        let value = headers.get(*name)?.as_bytes();
        let key = if *name == "authorization" { bearer(value)? } else { value };
        Some(key.trim_ascii()).filter(|key| !key.is_empty())
    })
}

fn bearer(value: &[u8]) -> Option<&[u8]> {
    let (scheme, key) = value.split_at_checked(7)?;
    scheme.eq_ignore_ascii_case(b"bearer ").then_some(key)
}

/// The headers of the request to the upstream. The caller's key goes along only where the upstream has
/// none of its own.
pub(super) fn for_upstream(headers: &HeaderMap, upstream: &Upstream) -> HeaderMap {
    let named = named_by_connection(headers);
    let mut passed = HeaderMap::with_capacity(headers.len() + 2);
    for (name, value) in headers {
        let is_key = KEY_HEADERS.contains(&name.as_str());
        let stays = is_hop_by_hop(name) || is_ours_to_set(name) || named.iter().any(|n| n == name.as_str());
        if !stays && !(is_key && upstream.api_key.is_some()) {
            passed.append(name.clone(), value.clone());
        }
    }
    passed.insert(header::ACCEPT_ENCODING, HeaderValue::from_static("identity"));
    if let Some(key) = &upstream.api_key {
        let (name, value) = credential(upstream.api, key);
        passed.insert(name, value);
    }
    for (name, value) in &upstream.headers {
        passed.insert(name.clone(), value.clone());
    }
    passed
}

fn credential(api: ApiKind, key: &Secret) -> (HeaderName, HeaderValue) {
    let (name, text) = match api {
        ApiKind::OpenAi => (header::AUTHORIZATION, format!("Bearer {}", key.expose())),
        ApiKind::Azure => (HeaderName::from_static("api-key"), key.expose().to_owned()),
        ApiKind::Anthropic => (HeaderName::from_static("x-api-key"), key.expose().to_owned()),
        ApiKind::Gemini => (HeaderName::from_static("x-goog-api-key"), key.expose().to_owned()),
    };
    let mut value = HeaderValue::from_str(&text).expect("Config::load refuses keys that no header can carry");
    value.set_sensitive(true);
    (name, value)
}

/// The headers of the answer to the caller, in place.
pub(super) fn for_caller(headers: &mut HeaderMap) {
    let named = named_by_connection(headers);
    for name in named {
        headers.remove(name);
    }
    for name in HOP_BY_HOP {
        headers.remove(*name);
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
    let n = HeaderName::from_static;
    match kind {
        Kind::Requests => [
            n("x-ratelimit-limit-requests"),
            n("x-ratelimit-remaining-requests"),
            n("x-ratelimit-reset-requests"),
        ],
        Kind::TotalTokens => {
            [n("x-ratelimit-limit-tokens"), n("x-ratelimit-remaining-tokens"), n("x-ratelimit-reset-tokens")]
        }
        Kind::PromptTokens => [
            n("x-ratelimit-limit-prompt-tokens"),
            n("x-ratelimit-remaining-prompt-tokens"),
            n("x-ratelimit-reset-prompt-tokens"),
        ],
        Kind::CompletionTokens => [
            n("x-ratelimit-limit-completion-tokens"),
            n("x-ratelimit-remaining-completion-tokens"),
            n("x-ratelimit-reset-completion-tokens"),
        ],
    }
}

/// Tells the caller how its quotas stand. An upstream's header of the same name gives way only where
/// there is such a quota.
pub(super) fn write_standing(headers: &mut HeaderMap, standing: &[Option<Standing>; 4]) {
    for (kind, standing) in Kind::ALL.into_iter().zip(standing) {
        let Some(Standing { limit, remaining, reset_ms }) = *standing else { continue };
        let [limit_name, remaining_name, reset_name] = names(kind);
        headers.insert(limit_name, HeaderValue::from(limit));
        headers.insert(remaining_name, HeaderValue::from(remaining));
        if let Ok(reset) = HeaderValue::try_from(go_duration(reset_ms)) {
            headers.insert(reset_name, reset);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_read_from_whichever_header_carries_it() {
        for (name, value, key) in [
            ("authorization", "Bearer k1", Some("k1")),
            ("authorization", "bearer  k1 ", Some("k1")),
            ("authorization", "Basic k1", None),
            ("authorization", "Bearer ", None),
            ("api-key", "k1", Some("k1")),
            ("x-api-key", "k1", Some("k1")),
            ("x-goog-api-key", "k1", Some("k1")),
            ("x-api-key", "", None),
        ] {
            let headers = HeaderMap::from_iter([(
                HeaderName::from_static(name),
                HeaderValue::from_static(value),
            )]);
            assert_eq!(callers_key(&headers), key.map(str::as_bytes), "{name}: {value}");
        }
    }
}
