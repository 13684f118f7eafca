//! Writes the tables of both vocabularies. The library reads them in place (`src/tables.rs` describes them).

#[path = "src/format.rs"]
mod format;
#[path = "build/merges.rs"]
mod merges;
#[path = "build/trie.rs"]
mod trie;

use std::env::var_os;
use std::fs::{read, write};
use std::path::PathBuf;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let out = PathBuf::from(var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?);
    for name in ["o200k_base", "cl100k_base"] {
        let file = format!("data/{name}.tokens");
        let data = read(&file)?;
        let tokens = tokens_of(&data).ok_or_else(|| format!("{file} ends within a token"))?;
        if tokens.len() >= format::NO_TOKEN as usize {
            return Err(format!("{file} has more tokens than the tables can number").into());
        }
        let trie = trie::build(&tokens);
        let (records, merges) = merges::build(&tokens, &trie);
        write(out.join(format!("{name}.nodes")), bytes_of(&trie.nodes))?;
        let ends = trie.ranked_ends();
        write(out.join(format!("{name}.ends")), bytes_of(&ends.tokens))?;
        write(out.join(format!("{name}.block_starts")), bytes_of(&ends.block_starts))?;
        write(out.join(format!("{name}.ranks")), &ends.ranks)?;
        write(out.join(format!("{name}.merges")), bytes_of(&merges))?;
        write(
            out.join(format!("{name}.records")),
            records.iter().flat_map(|r| r.to_le_bytes()).collect::<Vec<_>>(),
        )?;
    }
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=build");
    println!("cargo::rerun-if-changed=src/format.rs");
    println!("cargo::rerun-if-changed=data");
    Ok(())
}

/// The tokens of a file in the order of their ids: for each, a byte with its length, and its bytes.
fn tokens_of(mut data: &[u8]) -> Option<Vec<&[u8]>> {
    let mut tokens = Vec::new();
    while let Some((length, rest)) = data.split_first() {
        let (token, rest) = rest.split_at_checked(usize::from(*length))?;
        tokens.push(token);
        data = rest;
    }
    Some(tokens)
}

fn bytes_of(table: &[u32]) -> Vec<u8> {
    table.iter().flat_map(|entry| entry.to_le_bytes()).collect()
}
