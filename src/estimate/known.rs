//! Texts that were counted before: chats repeat their system prompt and their history in every request.
//!
//! A text is known by a keyed hash of it, so that nobody can choose two that collide; that two do by
//! chance is less likely than one in 10^12 a lookup, and then one estimate is off. One table for the whole
//! process, without a lock, of fixed size: a text whose slot another takes is counted again.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher as _, Hasher as _};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// Half a MiB.
const SLOTS: u64 = 1 << 16;
/// A slot is 40 bits of the hash and the count.
const COUNT_BITS: u32 = 24;
const LARGEST_COUNT: u64 = (1 << COUNT_BITS) - 1;

static KNOWN: LazyLock<Known> = LazyLock::new(|| Known {
    keys: RandomState::new(),
    slots: (0..SLOTS).map(|_| AtomicU64::new(0)).collect(),
});

struct Known {
    keys: RandomState,
    slots: Box<[AtomicU64]>,
}

/// What a text is counted as.
#[derive(Clone, Copy, Debug)]
pub(super) enum Thing {
    Text,
    /// Definitions of tools, by how they are rendered.
    ToolsInLines,
    CompactTools,
    TitledTools,
    JsonTools,
    /// A part of a text that is slow to count.
    Piece,
}

/// The hash of a text with what counts it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Key(u64);

impl Key {
    /// Of a text that so counted, as this thing.
    pub(super) fn of(tokenizer: u64, thing: Thing, text: &[u8]) -> Self {
        let mut hasher = KNOWN.keys.build_hasher();
        hasher.write_u64(tokenizer);
        hasher.write_u8(thing as u8);
        hasher.write(text);
        Self(hasher.finish())
    }

    fn slot(self) -> Option<&'static AtomicU64> {
        KNOWN.slots.get(usize::try_from(self.0 % SLOTS).ok()?)
    }

    fn tag(self) -> u64 {
        self.0 & !LARGEST_COUNT
    }

    /// The count that was remembered.
    pub(super) fn count(self) -> Option<u64> {
        // One word says both which text it is and its count: no order between words is needed.
        let slot = self.slot()?.load(Ordering::Relaxed);
        (slot & !LARGEST_COUNT == self.tag() && slot & LARGEST_COUNT > 0).then_some(slot & LARGEST_COUNT)
    }

    pub(super) fn remember(self, count: u64) {
        if count <= LARGEST_COUNT
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
    fn a_text_is_known_by_all_of_it_and_by_what_counts_it() {
        let key = Key::of(0, Thing::Text, b"a text that only this test counts");
        assert_eq!(key.count(), None);
        key.remember(7);
        assert_eq!(key.count(), Some(7));
        assert_eq!(Key::of(0, Thing::Text, b"a text that only this test counts").count(), Some(7));
        assert_eq!(Key::of(1, Thing::Text, b"a text that only this test counts").count(), None);
        assert_eq!(Key::of(0, Thing::Text, b"a text that only this test count").count(), None);
        key.remember(LARGEST_COUNT + 1);
        assert_eq!(key.count(), Some(7), "what does not fit is not remembered");
    }
}
