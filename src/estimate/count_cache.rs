//! Cache of token counts for the whole process. Chats repeat their system prompt and history in every request.
//!
//! The key is a keyed hash of the text, with a random key, so that no caller can construct a collision. An
//! accidental collision is less likely than one in 10^12 lookups, and makes one estimate wrong.
//!
//! The table has a fixed size and no lock. A new text replaces the text in its slot, which is then counted again.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher as _, Hasher as _};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// Slots of 8 bytes: 512 KiB.
const SLOTS: u64 = 1 << 16;
/// Bits of a slot that hold the count. The other 40 bits hold a part of the hash.
const COUNT_BITS: u32 = 24;
const MAX_COUNT: u64 = (1 << COUNT_BITS) - 1;

static CACHE: LazyLock<CountCache> = LazyLock::new(|| CountCache {
    hash_key: RandomState::new(),
    slots: (0..SLOTS).map(|_| AtomicU64::new(0)).collect(),
});

struct CountCache {
    hash_key: RandomState,
    slots: Box<[AtomicU64]>,
}

/// The form of a text that a cached count belongs to.
#[derive(Clone, Copy, Debug)]
pub(super) enum CachedCount {
    /// A text as it is.
    Text,
    /// Tool definitions, rendered in `Style::Lines`.
    ToolsInLines,
    /// Tool definitions, rendered in `Style::Compact`.
    CompactTools,
    /// Tool definitions, rendered in `Style::Titled`.
    TitledTools,
    /// Tool definitions, rendered in `Style::Json`.
    JsonTools,
    /// A part of a text that is slow to count.
    Piece,
}

/// The hash of a text, its tokenizer and the form that is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct CacheKey(u64);

impl CacheKey {
    /// `tokenizer` identifies the tokenizer that counts.
    pub(super) fn of(tokenizer: u64, counted: CachedCount, text: &[u8]) -> Self {
        let mut hasher = CACHE.hash_key.build_hasher();
        hasher.write_u64(tokenizer);
        hasher.write_u8(counted as u8);
        hasher.write(text);
        Self(hasher.finish())
    }

    fn slot(self) -> Option<&'static AtomicU64> {
        CACHE.slots.get(usize::try_from(self.0 % SLOTS).ok()?)
    }

    fn tag(self) -> u64 {
        self.0 & !MAX_COUNT
    }

    /// The cached count.
    pub(super) fn cached(self) -> Option<u64> {
        // One word holds both the hash and the count, so a relaxed load cannot mix two entries.
        let slot = self.slot()?.load(Ordering::Relaxed);
        (slot & !MAX_COUNT == self.tag() && slot & MAX_COUNT > 0).then_some(slot & MAX_COUNT)
    }

    /// Caches a count. Does nothing if the count exceeds `MAX_COUNT`.
    pub(super) fn insert(self, count: u64) {
        if count <= MAX_COUNT
            && let Some(slot) = self.slot()
        {
            slot.store(self.tag() | count, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_whole_text_and_the_tokenizer_select_a_cached_count() {
        let key = CacheKey::of(0, CachedCount::Text, b"a text that only this test counts");
        assert_eq!(key.cached(), None);
        key.insert(7);
        assert_eq!(key.cached(), Some(7));
        assert_eq!(
            CacheKey::of(0, CachedCount::Text, b"a text that only this test counts").cached(),
            Some(7)
        );
        assert_eq!(CacheKey::of(1, CachedCount::Text, b"a text that only this test counts").cached(), None);
        assert_eq!(CacheKey::of(0, CachedCount::Text, b"a text that only this test count").cached(), None);
        key.insert(MAX_COUNT + 1);
        assert_eq!(key.cached(), Some(7), "a count that is too large is not cached");
    }
}
