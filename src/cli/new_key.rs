//! `tollgate new-key`: makes a random key for a caller.

use super::hash_key::hex_digest;
use super::output;
use crate::config::is_caller_name;
use anyhow::{Context as _, bail};
use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use std::process::ExitCode;
use tokio_rustls::rustls::crypto::ring::default_provider;

/// Random bytes of a key: 256 bits cannot be guessed.
const KEY_BYTES: usize = 32;

#[derive(clap::Args)]
pub(super) struct NewKeyArguments {
    /// Name of the caller that gets the key
    name: String,
}

pub(super) fn run(arguments: &NewKeyArguments) -> anyhow::Result<ExitCode> {
    let name = &arguments.name;
    if !is_caller_name(name) {
        bail!("\"{name}\" is not a valid caller name; use 1 to 64 letters, digits, \".\", \"_\" and \"-\"");
    }
    let key = new_key()?;
    output::print(&format!(
        "The key of caller {name}. It is not shown again; give it to the caller over a secure channel:\n\n  {key}\n\n\
         The line for the config, in `keys` of an environment. To rotate a key, add its digest to the list of the caller:\n\n  \
         - {{ name: {name}, sha256: [{}] }}\n",
        hex_digest(key.as_bytes())
    ))?;
    Ok(ExitCode::SUCCESS)
}

/// A key that no other party can guess. Its prefix lets scanners find keys in public code.
pub(super) fn new_key() -> anyhow::Result<String> {
    let mut bytes = [0; KEY_BYTES];
    let random = default_provider().secure_random;
    random.fill(&mut bytes).ok().context("the operating system provides no random numbers")?;
    Ok(format!("sk-tollgate-{}", BASE64_URL_SAFE_NO_PAD.encode(bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_differ_and_fit_a_header() {
        let keys: std::collections::HashSet<String> = (0..100).map(|_| new_key().unwrap()).collect();
        assert_eq!(keys.len(), 100);
        assert!(keys.iter().all(|key| key.len() == 55 && key.bytes().all(|b| b.is_ascii_graphic())));
    }
}
