//! Finds the two tokens that each token was merged from.

use crate::format::{self, BUCKET, FREE, Merges, NO_TOKEN, PairKey, Record};
use crate::trie::Trie;
use std::collections::HashMap;

/// Places of the table of merges per 100 merges.
const PLACES_PER_CENT: usize = 180;

struct Found {
    merges: HashMap<(u32, u32), u32>,
    records: Vec<Record>,
}

impl Merges for Found {
    fn merged(&self, left: u32, right: u32) -> Option<u32> {
        self.merges.get(&(left, right)).copied()
    }

    fn record(&self, token: u32) -> Record {
        self.records[token as usize]
    }
}

/// The record of each token and the table of merges.
pub(crate) fn build(tokens: &[&[u8]], trie: &Trie) -> (Vec<u64>, Vec<u32>) {
    let mut found = Found { merges: HashMap::new(), records: Vec::with_capacity(tokens.len()) };
    for (token, bytes) in (0..).zip(tokens) {
        let shorter = trie.longest_token(&bytes[..bytes.len() - 1]);
        let parts = parts_of(token, bytes, tokens, trie, &found);
        let (left, right) = parts.unwrap_or((token, token));
        if parts.is_some() {
            found.merges.insert((left, right), token);
        } else {
            assert_eq!(bytes.len(), 1, "token {token} cannot be merged from others");
        }
        let length = u32::try_from(bytes.len()).unwrap_or(0);
        found.records.push(Record::new(left, right, shorter.unwrap_or(NO_TOKEN), length));
    }
    (found.records.iter().map(|record| record.0).collect(), table(&found.merges))
}

/// The last merge that makes the token out of single bytes, as byte-pair encoding with earlier tokens does it.
fn parts_of(token: u32, bytes: &[u8], tokens: &[&[u8]], trie: &Trie, found: &Found) -> Option<(u32, u32)> {
    (1..bytes.len()).rev().find_map(|split| {
        let part = |bytes: &[u8]| {
            let part = trie.longest_token(bytes)?;
            (part < token && tokens[part as usize] == bytes).then_some(part)
        };
        let (left, right) = (part(&bytes[..split])?, part(&bytes[split..])?);
        format::can_follow(found, left, right).then_some((left, right))
    })
}

/// A hash table of buckets. An entry that finds its bucket full is in the next one.
fn table(merges: &HashMap<(u32, u32), u32>) -> Vec<u32> {
    let buckets = merges.len() * PLACES_PER_CENT / 100 / BUCKET;
    let mut table = vec![FREE; buckets * BUCKET];
    let mut sorted: Vec<_> = merges.iter().map(|((left, right), token)| (*token, *left, *right)).collect();
    sorted.sort_unstable();
    for (token, left, right) in sorted {
        let key = PairKey::of(left, right);
        let mut place = key.bucket(buckets) * BUCKET;
        while table[place] != FREE {
            place = (place + 1) % table.len();
        }
        table[place] = key.entry(token);
    }
    table
}
