//! `tollgate init`: writes a config to start from, with the key of a first caller.

use super::hash_key::hex_digest;
use super::new_key::new_key;
use super::output;
use anyhow::{Context as _, bail};
use std::fs::{self, OpenOptions};
use std::io::{ErrorKind, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// The config; `FIRST_KEY_SHA256` stands for the digest of the first caller's key.
const TEMPLATE: &str = include_str!("init/config.yaml");

#[derive(clap::Args)]
pub(super) struct InitArguments {
    /// The file to write [default: the path of --config]
    file: Option<PathBuf>,
}

pub(super) fn run(config: Option<PathBuf>, arguments: &InitArguments) -> anyhow::Result<ExitCode> {
    let path = arguments.file.clone().unwrap_or_else(|| super::config_path_or_default(config));
    let shown = path.display();
    let key = new_key()?;
    match write_new(&path, &config_with(&key)) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            bail!(
                "{shown} exists already, and `init` overwrites no file; name another file: `tollgate init FILE`"
            )
        }
        result => result.with_context(|| format!("cannot write {shown}"))?,
    }
    output::print(&format!(
        "Wrote {shown}. The key of its caller first-app, which is not shown again:\n\n  {key}\n\n\
         Next:\n\n  export OPENAI_API_KEY=...          # the key of your OpenAI account\n  \
         tollgate check --config {shown}\n  tollgate serve --config {shown}\n\n\
         Applications use base_url=\"http://127.0.0.1:8080/v1\" and the key above.\n"
    ))?;
    Ok(ExitCode::SUCCESS)
}

fn config_with(key: &str) -> String {
    TEMPLATE.replace("FIRST_KEY_SHA256", &hex_digest(key.as_bytes()))
}

/// Writes a file that must not exist yet, and the folders above it.
fn write_new(path: &Path, text: &str) -> std::io::Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    OpenOptions::new().write(true).create_new(true).open(path)?.write_all(text.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::parse;
    use sha2::{Digest as _, Sha256};

    #[test]
    fn the_written_config_is_valid_and_accepts_the_printed_key() {
        let key = new_key().unwrap();
        let variable = |name: &str| (name == "OPENAI_API_KEY").then(|| "sk-of-the-upstream".to_owned());
        let loaded = parse(&config_with(&key), "tollgate.yaml", &variable, &[]).unwrap();
        assert!(loaded.warnings.is_empty(), "{:?}", loaded.warnings);
        let digests: Vec<_> = loaded.config.callers_by_digest().into_keys().collect();
        assert_eq!(digests, [<[u8; 32]>::from(Sha256::digest(key))]);
    }
}
