//! API keys: where a caller may send them, and which of them belong to this gateway.

use crate::config::{Config, MAX_KEY_BYTES};
use http::HeaderMap;
use sha2::{Digest as _, Sha256};
use smallvec::SmallVec;
use std::collections::HashMap;
use subtle::{Choice, ConstantTimeEq as _};

/// Headers that can carry a caller's key, in the order in which they are searched.
pub(super) const KEY_HEADERS: [&str; 4] = ["authorization", "api-key", "x-api-key", "x-goog-api-key"];

/// A request with more keys than this is refused: each costs a hash and a lookup.
const MAX_KEYS: usize = 8;

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

    pub(super) fn contains(self, name: &str) -> bool {
        KEY_HEADERS.iter().position(|header| *header == name).is_some_and(|at| self.0 & (1 << at) != 0)
    }
}

/// Every key in a request's headers, without duplicates within one header. `None`: there are more than `MAX_KEYS`.
pub(super) fn presented_keys(headers: &HeaderMap) -> Option<SmallVec<[PresentedKey<'_>; 2]>> {
    let mut keys = SmallVec::new();
    for (at, name) in (0..).zip(KEY_HEADERS) {
        for value in headers.get_all(name) {
            let value = value.as_bytes().trim_ascii();
            let standard = if at == 0 { bearer(value) } else { Some(value) };
            let key = PresentedKey {
                key: standard.unwrap_or(value),
                header: KeyHeader(at),
                is_well_formed: standard.is_some(),
            };
            add_key(&mut keys, key);
            // `authorization` with another scheme than Bearer: the key may be the last word.
            if let (None, Some(space)) = (standard, value.iter().rposition(|&b| b == b' ')) {
                add_key(&mut keys, PresentedKey { key: &value[space + 1..], ..key });
            }
        }
    }
    (keys.len() <= MAX_KEYS).then_some(keys)
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
    fn keys_are_deduplicated_per_header_and_too_many_are_refused() {
        let mut headers = HeaderMap::new();
        for value in ["a", "b", "a"] {
            headers.append("x-api-key", HeaderValue::from_static(value));
        }
        headers.append("authorization", HeaderValue::from_static("Bearer a"));
        assert_eq!(keys(&headers), [("a", true), ("a", true), ("b", true)]);
        for n in 0..7 {
            headers.append("api-key", HeaderValue::from(n));
        }
        assert!(presented_keys(&headers).is_none());
    }
}
