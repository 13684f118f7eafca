//! `environments.*.keys`: who may call.

use super::Caller;
use super::item::{Item, Section};
use super::quotas;
use crate::quota::Quota;
use sha2::{Digest as _, Sha256};
use std::collections::{HashMap, HashSet};

/// Shorter keys can be guessed.
const SHORT_SECRET: usize = 16;

/// Longer ones are no key's: hashing them would only take time.
pub(crate) const LONGEST_KEY: usize = 4 * 1024;

/// Where each key of the config stands: a key says to which environment a request belongs.
pub(super) type Digests = HashMap<[u8; 32], String>;

/// Reads the callers of one environment, and adds their own quotas.
pub(super) fn read(item: &Item<'_>, digests: &mut Digests, quotas: &mut Vec<Quota>) -> Vec<Caller> {
    let mut names = HashSet::new();
    let mut callers = Vec::new();
    for item in item.list().unwrap_or_default() {
        let Some(key) = item.section(&["name", "secret", "sha256", "quotas"]) else { continue };
        let name = key.require("name", "web-app").and_then(|i| caller_name(&i, &mut names));
        let digest = digest(&key);
        if let Some(other) = digest.and_then(|digest| digests.insert(digest, item.path.clone())) {
            item.fault(format!("this key stands at {other} too; every caller needs a key of its own"));
        }
        if let Some(own) = key.bound("quotas") {
            quotas::of_caller(&own, callers.len(), name.unwrap_or_default(), quotas);
        }
        if let (Some(name), Some(sha256)) = (name, digest) {
            callers.push(Caller { name: name.to_owned(), sha256 });
        }
    }
    callers
}

fn caller_name<'n>(item: &Item<'n>, names: &mut HashSet<&'n str>) -> Option<&'n str> {
    let name = item.text()?;
    let is_allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    if !(1..=64).contains(&name.len()) || !name.bytes().all(is_allowed) {
        item.fault(format!(
            "{} is not a caller's name: 1 to 64 letters, digits, \".\", \"_\" and \"-\"",
            item.shown()
        ));
        return None;
    }
    if !names.insert(name) {
        item.fault(format!(
            "another caller of this environment has the name {}; give each its own",
            item.shown()
        ));
    }
    Some(name)
}

fn digest(key: &Section<'_>) -> Option<[u8; 32]> {
    match (key.get("secret"), key.get("sha256")) {
        (Some(secret), None) => digest_of_secret(&secret),
        (None, Some(sha256)) => {
            let digest = digest_in_hex(sha256.text()?);
            if digest.is_none() {
                // Not repeated: it may be the key itself.
                sha256.fault("this is not the SHA-256 of a key: 64 hexadecimal digits, as `tollgate hash-key` prints them");
            }
            digest
        }
        _ => {
            key.fault("give either the key, as secret: ${VARIABLE}, or what `tollgate hash-key` makes of it, as sha256");
            None
        }
    }
}

fn digest_of_secret(item: &Item<'_>) -> Option<[u8; 32]> {
    let secret = item.text()?;
    if secret.is_empty() {
        item.fault("this key is empty, so that everybody would have it; set it, or remove the caller");
        return None;
    }
    if !secret.bytes().all(|b| b.is_ascii_graphic()) {
        item.fault("this key has spaces, or characters that no header can carry");
        return None;
    }
    if secret.len() > LONGEST_KEY {
        item.fault(format!("this key is longer than {LONGEST_KEY} characters"));
        return None;
    }
    if secret.len() < SHORT_SECRET {
        item.warn(format!("this key is shorter than {SHORT_SECRET} characters: it can be guessed"));
    }
    Some(Sha256::digest(secret).into())
}

fn digest_in_hex(text: &str) -> Option<[u8; 32]> {
    let nibble = |b: u8| char::from(b).to_digit(16).and_then(|d| u8::try_from(d).ok());
    let bytes: Option<Vec<u8>> = text
        .as_bytes()
        .chunks(2)
        .map(|pair| Some(nibble(*pair.first()?)? << 4 | nibble(*pair.get(1)?)?))
        .collect();
    bytes?.try_into().ok()
}
