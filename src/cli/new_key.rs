//! `tollgate new-key`: makes a random key for a caller.

use super::hash_key::hex_digest;
use super::output;
use crate::config::is_caller_name;
use crate::random;
use anyhow::{Context as _, bail};
use std::process::ExitCode;

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
    let secret = random::secret().context("the operating system provides no random numbers")?;
    Ok(format!("sk-tollgate-{secret}"))
}
