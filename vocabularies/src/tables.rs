//! The tables of a vocabulary, read in place.

use crate::format::{BUCKET, FREE, Merges, PairKey, RANK_BLOCK, Record, longest_token};

/// Places a table so that no entry is in two cache lines.
#[repr(align(64))]
pub(crate) struct Aligned<T: ?Sized>(pub(crate) T);

pub(crate) struct Tables {
    nodes: &'static [[u8; 4]],
    ends: &'static [[u8; 4]],
    block_starts: &'static [[u8; 4]],
    ranks: &'static [u8],
    records: &'static [[u8; 8]],
    merges: &'static [[[u8; 4]; BUCKET]],
}

/// The tables of the vocabulary with this name.
macro_rules! tables {
    ($name:literal) => {{
        static NODES: &$crate::tables::Aligned<[u8]> =
            &$crate::tables::Aligned(*include_bytes!(concat!(env!("OUT_DIR"), "/", $name, ".nodes")));
        static ENDS: &$crate::tables::Aligned<[u8]> =
            &$crate::tables::Aligned(*include_bytes!(concat!(env!("OUT_DIR"), "/", $name, ".ends")));
        static BLOCK_STARTS: &$crate::tables::Aligned<[u8]> =
            &$crate::tables::Aligned(*include_bytes!(concat!(env!("OUT_DIR"), "/", $name, ".block_starts")));
        static RANKS: &$crate::tables::Aligned<[u8]> =
            &$crate::tables::Aligned(*include_bytes!(concat!(env!("OUT_DIR"), "/", $name, ".ranks")));
        static RECORDS: &$crate::tables::Aligned<[u8]> =
            &$crate::tables::Aligned(*include_bytes!(concat!(env!("OUT_DIR"), "/", $name, ".records")));
        static MERGES: &$crate::tables::Aligned<[u8]> =
            &$crate::tables::Aligned(*include_bytes!(concat!(env!("OUT_DIR"), "/", $name, ".merges")));
        $crate::tables::Tables::new([NODES, ENDS, BLOCK_STARTS, RANKS, RECORDS, MERGES])
    }};
}
pub(crate) use tables;

impl Tables {
    pub(crate) const fn new(
        [nodes, ends, block_starts, ranks, records, merges]: [&'static Aligned<[u8]>; 6],
    ) -> Self {
        Self {
            nodes: nodes.0.as_chunks().0,
            ends: ends.0.as_chunks().0,
            block_starts: block_starts.0.as_chunks().0,
            ranks: &ranks.0,
            records: records.0.as_chunks().0,
            merges: merges.0.as_chunks().0.as_chunks().0,
        }
    }

    /// The number of tokens.
    pub(crate) fn len(&self) -> usize {
        self.records.len()
    }

    /// The longest token at the start of the text.
    #[inline]
    pub(crate) fn longest_token(&self, text: &[u8]) -> Option<u32> {
        let place = longest_token(text, |place| u32::from_le_bytes(self.nodes[place]))?;
        let start = u32::from_le_bytes(self.block_starts[place / RANK_BLOCK]);
        Some(u32::from_le_bytes(self.ends[start as usize + usize::from(self.ranks[place])]))
    }
}

impl Merges for Tables {
    #[inline]
    fn merged(&self, left: u32, right: u32) -> Option<u32> {
        let key = PairKey::of(left, right);
        let mut number = key.bucket(self.merges.len());
        loop {
            let bucket = &self.merges[number];
            // Nearly always no entry matches, so all are compared before the first branch.
            if bucket.iter().fold(false, |any, entry| any | key.token(u32::from_le_bytes(*entry)).is_some()) {
                let found = bucket.iter().filter_map(|entry| key.token(u32::from_le_bytes(*entry)));
                let is_pair = |record: Record| (record.left(), record.right()) == (left, right);
                if let Some(token) = found.into_iter().find(|token| is_pair(self.record(*token))) {
                    return Some(token);
                }
            }
            if u32::from_le_bytes(bucket[BUCKET - 1]) == FREE {
                return None;
            }
            number = if number + 1 == self.merges.len() { 0 } else { number + 1 };
        }
    }

    #[inline]
    fn record(&self, token: u32) -> Record {
        Record(u64::from_le_bytes(self.records[token as usize]))
    }
}

impl std::fmt::Debug for Tables {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tables").field("tokens", &self.len()).finish_non_exhaustive()
    }
}
