//! `tollgate hash-key`: prints the SHA-256 of a key.

use super::output;
use anyhow::{Context as _, bail};
use sha2::{Digest as _, Sha256};
use std::fmt::Write as _;
use std::io::Read as _;
use std::process::ExitCode;

/// Maximum number of bytes that the command reads.
const MAX_INPUT_BYTES: u64 = 64 * 1024;

pub(super) fn run() -> anyhow::Result<ExitCode> {
    let mut key = Vec::new();
    std::io::stdin().lock().take(MAX_INPUT_BYTES).read_to_end(&mut key).context("cannot read the key")?;
    // A line end at the end of the input is not part of the key.
    let key = key.trim_ascii_end();
    if key.is_empty() {
        bail!("the key is empty: write it to standard input");
    }
    output::print(&format!("{}\n", hex_digest(key)))?;
    Ok(ExitCode::SUCCESS)
}

/// The SHA-256 of a key in hexadecimal digits, as the config has it.
pub(super) fn hex_digest(key: &[u8]) -> String {
    Sha256::digest(key).iter().fold(String::new(), |mut text, byte| {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}
