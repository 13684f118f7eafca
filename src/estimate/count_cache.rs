//! Cache of token counts for the whole process. Chats repeat their system prompt and history in every request.
//!
//! The key is made from a keyed hash of the text (`keyed_hash`), so that no caller can construct a collision. An
//! accidental collision is less likely than one in 10^12 lookups, and makes one estimate wrong.
//!
//! The table has a fixed size and no lock. A new text replaces the text in its slot, which is then counted again.

use super::keyed_hash::KeyedHash;
use std::borrow::Cow;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// Slots of 8 bytes: 512 KiB.
const SLOTS: u64 = 1 << 16;
/// Bits of a slot that hold the count. The other 40 bits hold a part of the hash.
const COUNT_BITS: u32 = 24;
const MAX_COUNT: u64 = (1 << COUNT_BITS) - 1;

static CACHE: LazyLock<Box<[AtomicU64]>> = LazyLock::new(|| (0..SLOTS).map(|_| AtomicU64::new(0)).collect());

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
    /// Tool definitions, rendered in `Style::Words`.
    ToolWords,
    /// A part of a text that is slow to count.
    Piece,
}

/// Texts below this size (bytes) are not cached: counting them is as fast as a lookup.
const MIN_CACHED_BYTES: usize = 24;

/// The keyed hash of a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TextHash(pub(super) u64);

impl TextHash {
    pub(super) fn of(text: &[u8]) -> Self {
        Self(KeyedHash::of_text(text).value())
    }
}

/// A text with its hash, so that it is hashed only once for the cache and for the identity of its prompt.
#[derive(Debug)]
pub(super) struct HashedText<'a> {
    pub(super) text: Cow<'a, str>,
    /// `None`: the text is too short for the cache.
    pub(super) hash: Option<TextHash>,
}

impl<'a> HashedText<'a> {
    pub(super) fn of(text: Cow<'a, str>) -> Self {
        let hash = (text.len() >= MIN_CACHED_BYTES).then(|| TextHash::of(text.as_bytes()));
        Self { text, hash }
    }
}

impl<'a> From<&'a str> for HashedText<'a> {
    fn from(text: &'a str) -> Self {
        Self::of(Cow::Borrowed(text))
    }
}

impl From<String> for HashedText<'_> {
    fn from(text: String) -> Self {
        Self::of(Cow::Owned(text))
    }
}

/// The hash of a text, its tokenizer and the form that is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct CacheKey(u64);

impl CacheKey {
    /// `tokenizer` identifies the tokenizer that counts.
    pub(super) fn of(tokenizer: u64, counted: CachedCount, text: TextHash) -> Self {
        // No caller knows the hash of a text, so this need not be a hash itself.
        let form = tokenizer.wrapping_mul(0x9e37_79b9_7f4a_7c15)
            ^ (counted as u64).wrapping_mul(0xff51_afd7_ed55_8ccd);
        Self(text.0 ^ form)
    }

    fn slot(self) -> Option<&'static AtomicU64> {
        CACHE.get(usize::try_from(self.0 % SLOTS).ok()?)
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
        let key = |tokenizer: u64, counted, text: &str| {
            CacheKey::of(tokenizer, counted, TextHash::of(text.as_bytes()))
        };
        let text = "a text that only this test counts";
        let inserted = key(0, CachedCount::Text, text);
        assert_eq!(inserted.cached(), None);
        inserted.insert(7);
        assert_eq!(inserted.cached(), Some(7));
        assert_eq!(key(0, CachedCount::Text, text).cached(), Some(7));
        assert_eq!(key(1, CachedCount::Text, text).cached(), None);
        assert_eq!(key(0, CachedCount::Piece, text).cached(), None);
        assert_eq!(key(0, CachedCount::Text, &text[1..]).cached(), None);
        inserted.insert(MAX_COUNT + 1);
        assert_eq!(inserted.cached(), Some(7), "a count that is too large is not cached");
    }
}
