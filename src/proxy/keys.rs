//! API keys: where a caller may send them, and which of them belong to this gateway.

use crate::config::{Config, MAX_KEY_BYTES};
use http::HeaderMap;
use http::header::{HeaderValue, ValueIter};
use sha2::{Digest as _, Sha256};
use smallvec::SmallVec;
use std::collections::HashMap;
use subtle::{Choice, ConstantTimeEq as _};

/// Headers that can carry a caller's key, in the order in which they are searched.
pub(super) const KEY_HEADERS: [&str; 4] = ["authorization", "api-key", "x-api-key", "x-goog-api-key"];

/// A request with more words in its key headers than this is refused: each costs a hash and a lookup.
const MAX_KEYS: usize = 32;

/// A key that a caller sent in a header. It has no `Debug`, which would print the key.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct PresentedKey<'h> {
    pub(super) key: &'h [u8],
    pub(super) header: KeyHeader,
    /// The header has the form that APIs define for it. Any other key grants no access; it is looked up only to
    /// keep a key of this gateway from reaching an upstream.
    pub(super) is_well_formed: bool,
}

/// Index of a header in `KEY_HEADERS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct KeyHeader(u8);

/// The set of headers that are not forwarded because they carry a key of this gateway.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct GatewayKeyHeaders(u8);

impl GatewayKeyHeaders {
    pub(super) fn add(&mut self, header: KeyHeader) {
        self.0 |= 1 << header.0;
    }

    pub(super) fn has(self, header: KeyHeader) -> bool {
        self.0 & (1 << header.0) != 0
    }

    pub(super) fn contains(self, name: &str) -> bool {
        // Compares no names for a request without keys of this gateway.
        self.0 != 0 && (0..).zip(KEY_HEADERS).any(|(at, header)| header == name && self.has(KeyHeader(at)))
    }
}

impl KeyHeader {
    pub(super) fn name(self) -> &'static str {
        KEY_HEADERS[usize::from(self.0)]
    }
}

/// The headers that can carry a key, in the order of `KEY_HEADERS`, with their values.
pub(super) fn key_headers(
    headers: &HeaderMap,
) -> impl Iterator<Item = (KeyHeader, ValueIter<'_, HeaderValue>)> {
    // One pass over the few headers of a request is cheaper than a lookup for each name.
    let mut present = [false; KEY_HEADERS.len()];
    for name in headers.keys() {
        if let Some(at) = KEY_HEADERS.iter().position(|header| *header == name.as_str()) {
            present[at] = true;
        }
    }
    (0..).zip(present).filter(|(_, is_present)| *is_present).map(|(at, _)| {
        let header = KeyHeader(at);
        (header, headers.get_all(header.name()).iter())
    })
}

/// Every key in a request's headers, without duplicates within one header.
///
/// # Errors
/// The gateway and an upstream could read different keys from these headers. The text is the reason.
pub(super) fn presented_keys(headers: &HeaderMap) -> Result<SmallVec<[PresentedKey<'_>; 2]>, &'static str> {
    let mut keys = SmallVec::new();
    for (header, mut values) in key_headers(headers) {
        let Some(value) = values.next() else { continue };
        let is_authorization = header.0 == 0;
        if is_authorization && values.next().is_some() {
            return Err("it has more than one Authorization header");
        }
        if values.any(|other| other != value) {
            return Err("it has two different API keys in headers of the same name");
        }
        let value = value.as_bytes().trim_ascii();
        let standard = if is_authorization { bearer(value) } else { Some(value) };
        let key = PresentedKey { key: standard.unwrap_or(value), header, is_well_formed: standard.is_some() };
        add_key(&mut keys, key);
        // Another scheme than Bearer, or a list: a key may be one of the words.
        let words = key.key.split(|byte| byte.is_ascii_whitespace() || b",;".contains(byte));
        for word in words.filter(|word| *word != key.key) {
            add_key(&mut keys, PresentedKey { key: word, is_well_formed: false, ..key });
        }
    }
    if keys.len() > MAX_KEYS { Err("its API key headers have too many words") } else { Ok(keys) }
}

fn add_key<'h>(keys: &mut SmallVec<[PresentedKey<'h>; 2]>, key: PresentedKey<'h>) {
    if !key.key.is_empty() && keys.len() <= MAX_KEYS && !keys.contains(&key) {
        keys.push(key);
    }
}

fn bearer(value: &[u8]) -> Option<&[u8]> {
    let (scheme, key) = value.split_at_checked(7)?;
    scheme.eq_ignore_ascii_case(b"bearer ").then(|| key.trim_ascii())
}

/// The caller that a key belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct KeyOwner {
    /// Index of the environment in the config.
    pub(super) environment: usize,
    /// Index of the caller in the environment.
    pub(super) caller: usize,
}

/// The SHA-256 digests of all callers' keys.
pub(super) struct KeyTable(HashMap<[u8; 32], KeyOwner>);

impl KeyTable {
    /// Whether no caller has a key.
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn new(config: &Config) -> Self {
        let owners = config.callers_by_digest().into_iter();
        Self(
            owners
                .map(|(digest, (environment, caller))| (digest, KeyOwner { environment, caller }))
                .collect(),
        )
    }

    /// Finds the owner of a key by its digest, and compares that with the configured digests in constant time.
    pub(super) fn owner(&self, config: &Config, key: &[u8]) -> Option<KeyOwner> {
        if self.0.is_empty() || key.len() > MAX_KEY_BYTES {
            return None;
        }
        let digest: [u8; 32] = Sha256::digest(key).into();
        let &owner = self.0.get(&digest)?;
        let configured = &config.environments[owner.environment].callers[owner.caller].sha256;
        let is_configured = configured.iter().fold(Choice::from(0), |found, own| found | own.ct_eq(&digest));
        bool::from(is_configured).then_some(owner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::{HeaderName, HeaderValue};

    fn keys(headers: &HeaderMap) -> Vec<(&str, bool)> {
        let keys = presented_keys(headers).unwrap();
        keys.iter().map(|k| (std::str::from_utf8(k.key).unwrap(), k.is_well_formed)).collect()
    }

    #[test]
    fn a_key_is_read_from_each_header_that_sdks_use() {
        for (name, value, key) in [
            ("authorization", "Bearer k1", vec![("k1", true)]),
            ("authorization", "bearer  k1 ", vec![("k1", true)]),
            ("authorization", "Basic k1", vec![("Basic k1", false), ("Basic", false), ("k1", false)]),
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
    fn every_word_of_a_header_is_looked_up() {
        for (value, words) in [
            ("k1, k2", vec![("k1, k2", true), ("k1", false), ("k2", false)]),
            ("k1;k2", vec![("k1;k2", true), ("k1", false), ("k2", false)]),
            ("k1 k1", vec![("k1 k1", true), ("k1", false)]),
        ] {
            let headers = HeaderMap::from_iter([(
                HeaderName::from_static("x-api-key"),
                HeaderValue::from_static(value),
            )]);
            assert_eq!(keys(&headers), words, "{value}");
        }
        let many = HeaderValue::from_str(&"k ".repeat(40).replace(' ', ",")).unwrap();
        let headers = HeaderMap::from_iter([(HeaderName::from_static("api-key"), many)]);
        assert!(presented_keys(&headers).is_ok(), "equal words count once");
        let many: Vec<_> = (0..40).map(|n| format!("{n},")).collect();
        let headers = HeaderMap::from_iter([(
            HeaderName::from_static("api-key"),
            HeaderValue::from_str(&many.concat()).unwrap(),
        )]);
        assert!(presented_keys(&headers).is_err());
    }

    #[test]
    fn ambiguous_headers_are_refused() {
        for (name, values, is_accepted) in [
            ("authorization", ["Bearer a", "Bearer a"], false),
            ("authorization", ["Bearer a", "Bearer b"], false),
            ("authorization", ["", ""], false),
            ("x-api-key", ["a", "a"], true),
            ("x-api-key", ["a", "b"], false),
            ("api-key", ["", "b"], false),
            ("x-goog-api-key", ["a", "b"], false),
        ] {
            let mut headers = HeaderMap::new();
            for value in values {
                headers.append(HeaderName::from_static(name), HeaderValue::from_static(value));
            }
            assert_eq!(presented_keys(&headers).is_ok(), is_accepted, "{name} {values:?}");
        }
    }
}
