//! Which headers pass, in either direction, and those that the gateway adds.

use crate::config::{ApiKind, Upstream};
use crate::error::go_duration;
use crate::quota::{Kind, Standing};
use http::HeaderMap;
use http::header::{self, HeaderName, HeaderValue};
use smallvec::SmallVec;

/// Headers that can carry a caller's key, in the order in which they are looked at.
const KEY_HEADERS: [&str; 4] = ["authorization", "api-key", "x-api-key", "x-goog-api-key"];

const ENVIRONMENT: HeaderName = HeaderName::from_static("x-tollgate-environment");
const CLAMPED: HeaderName = HeaderName::from_static("x-tollgate-clamped-max-tokens");
const ESTIMATE: HeaderName = HeaderName::from_static("x-tollgate-estimated-prompt-tokens");
const RAW_ESTIMATE: HeaderName = HeaderName::from_static("x-tollgate-raw-estimated-prompt-tokens");

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
/// none of its own; `credential` is that.
pub(super) fn for_upstream(
    headers: HeaderMap,
    upstream: &Upstream,
    credential: Option<&Credential>,
) -> Vec<(HeaderName, HeaderValue)> {
    let named = named_by_connection(&headers);
    let mut passed = Vec::with_capacity(headers.len() + 4);
    let mut last = None;
    for (name, value) in headers {
        // Of a header that stands there several times only the first carries the name.
        let Some(name) = name.or_else(|| last.clone()) else { continue };
        let is_key = credential.is_some() && KEY_HEADERS.contains(&name.as_str());
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
    pub(super) environment: Option<HeaderValue>,
    /// What is reserved for the prompt, and what was counted of it before that was corrected.
    pub(super) estimated_prompt: Option<(u64, u64)>,
    pub(super) standing: [Option<Standing>; 4],
    /// To how many tokens each completion was bounded.
    pub(super) clamped_to: Option<u64>,
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
        for (kind, standing) in Kind::ALL.into_iter().zip(self.standing) {
            let Some(Standing { limit, remaining, reset_ms }) = standing else { continue };
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
            let headers =
                HeaderMap::from_iter([(HeaderName::from_static(name), HeaderValue::from_static(value))]);
            assert_eq!(callers_key(&headers), key.map(str::as_bytes), "{name}: {value}");
        }
    }
}
