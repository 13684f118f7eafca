//! Keyed hashes of texts and of sequences of numbers, by foldhash.
//!
//! foldhash executes fewer instructions than SipHash. An attacker who sees its hashes could in principle find the key
//! and construct collisions. These hashes only select entries of tables: they are never sent, stored or logged. The key
//! is random and lasts as long as the process, and no table grows by collisions. A collision makes
//! one estimate wrong, and the answer corrects it. An accidental one has a probability of about 2^-64 for each pair of
//! inputs.

use foldhash::SharedSeed;
use foldhash::quality::FoldHasher;
use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::sync::LazyLock;

/// The random numbers of this process.
struct HashKey {
    start: u64,
    seed: SharedSeed,
}

static KEY: LazyLock<HashKey> = LazyLock::new(|| {
    // The standard library's random keys are its only source of random numbers.
    let random = RandomState::new();
    HashKey { start: random.hash_one(0), seed: SharedSeed::from_u64(random.hash_one(1)) }
});

/// The hash of a text, or of the numbers that were added so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct KeyedHash(u64);

impl Default for KeyedHash {
    fn default() -> Self {
        Self(KEY.start)
    }
}

impl KeyedHash {
    pub(crate) fn add(&mut self, number: u64) {
        let mut hasher = FoldHasher::with_seed(self.0, &KEY.seed);
        hasher.write_u64(number);
        self.0 = hasher.finish();
    }

    /// The same hash with another number.
    pub(crate) fn with(mut self, number: u64) -> Self {
        self.add(number);
        self
    }

    pub(crate) fn value(self) -> u64 {
        self.0
    }

    /// The hash of a text.
    pub(crate) fn of_text(text: &[u8]) -> Self {
        let key = &*KEY;
        let mut hasher = FoldHasher::with_seed(key.start, &key.seed);
        hasher.write(text);
        hasher.write_usize(text.len());
        Self(hasher.finish())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;

    #[test]
    fn texts_that_differ_in_one_bit_or_in_length_have_different_hashes() {
        let text = [0u8; 200];
        let mut hashes = HashSet::new();
        for length in 0..=text.len() {
            assert!(hashes.insert(text_hash(&text[..length])), "{length}");
            for bit in 0..length * 8 {
                let mut other = text[..length].to_vec();
                other[bit / 8] ^= 1 << (bit % 8);
                assert!(hashes.insert(text_hash(&other)), "bit {bit} of {length} bytes");
            }
        }
    }

    #[test]
    fn parts_of_a_text_in_another_order_have_another_hash() {
        let part = |letter: u8| [letter; 16];
        let letters = *b"abcdefghijkl";
        let mut hashes = HashSet::new();
        for first in 0..letters.len() {
            for second in 0..first {
                let mut swapped = letters;
                swapped.swap(first, second);
                assert!(hashes.insert(text_hash(swapped.map(part).as_flattened())), "{first} {second}");
            }
        }
        assert!(hashes.insert(text_hash(letters.map(part).as_flattened())));
    }

    #[test]
    fn every_bit_of_a_hash_depends_on_each_part() {
        let mut text = [7u8; 300];
        let before = text_hash(&text);
        let mut changed = 0;
        for at in 0..text.len() {
            text[at] ^= 1;
            changed |= text_hash(&text) ^ before;
            text[at] ^= 1;
        }
        assert_eq!(changed, u64::MAX);
    }

    #[test]
    fn the_order_and_the_number_of_numbers_count() {
        let hash =
            |numbers: &[u64]| numbers.iter().fold(KeyedHash::default(), |hash, n| hash.with(*n)).value();
        let sequences: [&[u64]; 7] = [&[], &[0], &[0, 0], &[1, 0], &[0, 1], &[1], &[1, 1]];
        let hashes: HashSet<u64> = sequences.map(hash).into();
        assert_eq!(hashes.len(), sequences.len());
    }

    fn text_hash(text: &[u8]) -> u64 {
        KeyedHash::of_text(text).value()
    }

    proptest! {
        #[test]
        fn equal_texts_have_equal_hashes_and_others_do_not(
            a in prop::collection::vec(0u8..3, 0..150),
            b in prop::collection::vec(0u8..3, 0..150),
        ) {
            prop_assert_eq!(text_hash(&a) == text_hash(&b), a == b);
            prop_assert_eq!(text_hash(&a), text_hash(&a.clone()));
        }
    }
}
