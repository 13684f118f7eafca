//! `environments.*.keys`: the callers of an environment.

use super::CallerSettings;
use super::description::{DefaultSpec, KeySpec, NONE, SectionSpec, TextSpec, ValueSpec};
use super::quotas::{self, QUOTAS};
use super::setting::{Section, Setting};
use crate::quota::Quota;
use sha2::{Digest as _, Sha256};
use std::collections::{HashMap, HashSet};

/// A shorter key can be guessed, which is worth a warning.
const MIN_SECURE_KEY_BYTES: usize = 16;

/// Maximum number of keys of one caller.
const MAX_KEYS_PER_CALLER: usize = 16;

/// Maximum length of a caller's key. The gateway refuses a longer one without hashing it.
pub(crate) const MAX_KEY_BYTES: usize = 4 * 1024;

/// `environments.*.keys[]`.
pub(super) const CALLER: SectionSpec = SectionSpec {
    name: "caller",
    keys: &[
        KeySpec::new(
            "name",
            ValueSpec::Text(TextSpec {
                label: "1 to 64 letters, digits, `.`, `_`, `-`",
                pattern: "^[A-Za-z0-9._-]{1,64}$",
            }),
            DefaultSpec::Required("web-app"),
            "name of the caller in logs and in the store; unique in its environment",
        ),
        KeySpec::new(
            "secret",
            ValueSpec::OneOrMore(&ValueSpec::Secret(TextSpec {
                label: "secret of at most 4,096 visible ASCII characters",
                pattern: "^[!-~]{1,4096}$",
            })),
            DefaultSpec::Absent("one of the two is required"),
            "the key itself. Fewer than 16 characters give a warning",
        )
        .example("${WEB_KEY}"),
        KeySpec::new(
            "sha256",
            ValueSpec::OneOrMore(&ValueSpec::Secret(TextSpec {
                label: "64 hexadecimal digits",
                pattern: "^[0-9A-Fa-f]{64}$",
            })),
            DefaultSpec::Absent("one of the two is required"),
            "the digest of the key, as `tollgate new-key` and `tollgate hash-key` print it",
        )
        .example("6bdbadbe12892e29dbf4960e62217c6c984a8658a384dbdeddc4aaac0019ad00"),
        KeySpec::restriction(
            "quotas",
            ValueSpec::Section(&QUOTAS),
            NONE,
            "the caller's own quotas, in addition to those of the environment",
        )
        .example("{ requests: { limit: 60, per: minute } }"),
    ],
};

/// The path of the setting that declares each key. A key must be unique, because it identifies the environment.
pub(super) type Digests = HashMap<[u8; 32], String>;

/// Reads the callers of one environment and adds their own quotas to `quotas`.
pub(super) fn read(
    setting: &Setting<'_>,
    digests: &mut Digests,
    quotas: &mut Vec<Quota>,
) -> Vec<CallerSettings> {
    let mut names = HashSet::new();
    let mut callers = Vec::new();
    for setting in setting.list().unwrap_or_default() {
        let Some(key) = setting.section(&CALLER) else { continue };
        let name = key.require("name").and_then(|i| caller_name(&i, &mut names));
        let own_digests = own_digests(&key);
        for digest in own_digests.iter().flatten() {
            if let Some(other) = digests.insert(*digest, setting.path.clone()) {
                setting.fault(format!("this key is already used at {other}; use each key once"));
            }
        }
        if let Some(own) = key.get("quotas") {
            quotas::of_caller(&own, name.unwrap_or_default(), quotas);
        }
        if let (Some(name), Some(sha256)) = (name, own_digests) {
            callers.push(CallerSettings { name: name.to_owned(), sha256 });
        }
    }
    callers
}

/// Whether a text can be the name of a caller.
pub(crate) fn is_caller_name(name: &str) -> bool {
    let is_allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    (1..=64).contains(&name.len()) && name.bytes().all(is_allowed)
}

fn caller_name<'n>(setting: &Setting<'n>, names: &mut HashSet<&'n str>) -> Option<&'n str> {
    let name = setting.text()?;
    if !is_caller_name(name) {
        setting.fault(format!(
            "{} is not a valid caller name; use 1 to 64 letters, digits, \".\", \"_\" and \"-\"",
            setting.quoted()
        ));
        return None;
    }
    if !names.insert(name) {
        setting.fault(format!(
            "another caller of this environment has the name {}; give each caller a different name",
            setting.quoted()
        ));
    }
    Some(name)
}

/// The digests of all keys of a caller. A caller has several while its key is rotated.
fn own_digests(key: &Section<'_>) -> Option<Vec<[u8; 32]>> {
    let (setting, is_secret) = match (key.get("secret"), key.get("sha256")) {
        (Some(secret), None) => (secret, true),
        (None, Some(sha256)) => (sha256, false),
        _ => {
            key.fault("set either secret (the key, for example ${VARIABLE}) or sha256 (the output of `tollgate hash-key`)");
            return None;
        }
    };
    let keys = setting.one_or_more();
    match keys.len() {
        0 => setting
            .fault("the list is empty, so the caller would have no key; add a key or remove the caller"),
        n if n > MAX_KEYS_PER_CALLER => {
            setting
                .fault(format!("{n} keys are too many for one caller; the maximum is {MAX_KEYS_PER_CALLER}"));
        }
        _ => {
            let digest = |key| if is_secret { digest_of_secret(key) } else { digest_from_hex(key) };
            return keys.iter().map(digest).collect();
        }
    }
    None
}

fn digest_from_hex(setting: &Setting<'_>) -> Option<[u8; 32]> {
    let digest = digest_in_hex(setting.text()?);
    if digest.is_none() {
        // The message does not contain the value, which may be the key itself.
        setting
            .fault("this is not a SHA-256; write the 64 hexadecimal digits that `tollgate hash-key` prints");
    }
    digest
}

fn digest_of_secret(setting: &Setting<'_>) -> Option<[u8; 32]> {
    let secret = setting.text()?;
    if secret.is_empty() {
        setting.fault("this key is empty, so every request would match it; set a key or remove the caller");
        return None;
    }
    if !secret.bytes().all(|b| b.is_ascii_graphic()) {
        setting.fault(
            "this key contains a space or another character that a header must not contain; remove it",
        );
        return None;
    }
    if secret.len() > MAX_KEY_BYTES {
        setting.fault(format!("this key is longer than {MAX_KEY_BYTES} characters; use a shorter one"));
        return None;
    }
    if secret.len() < MIN_SECURE_KEY_BYTES {
        setting.warn(format!(
            "this key is shorter than {MIN_SECURE_KEY_BYTES} characters and can be guessed; use a longer one"
        ));
    }
    setting.warn_of_literal_reference(secret);
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
