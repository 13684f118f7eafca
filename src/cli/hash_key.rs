//! `tollgate hash-key`

use anyhow::{Context as _, bail};
use sha2::{Digest as _, Sha256};
use std::fmt::Write as _;
use std::io::Read as _;
use std::process::ExitCode;

/// No key is longer than this.
const LONGEST_KEY: u64 = 64 * 1024;

pub(super) fn run() -> anyhow::Result<ExitCode> {
    let mut key = Vec::new();
    std::io::stdin().lock().take(LONGEST_KEY).read_to_end(&mut key).context("cannot read the key")?;
    // A line end is the terminal's, not the key's.
    let key = key.trim_ascii_end();
    if key.is_empty() {
        bail!("the key is empty: give it on standard input");
    }
    println!("{}", hex(&Sha256::digest(key)));
    Ok(ExitCode::SUCCESS)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}
