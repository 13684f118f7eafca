//! A table of fixed size from keyed hashes to a few numbers. It keeps the entries that were used last.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

/// Number of parts with a lock each, so that workers rarely wait for each other.
const SHARDS: usize = 64;
/// Number of slots in which an entry can be. A new entry replaces the one of them that was used least recently.
const WAYS: usize = 8;

/// The numbers of an entry.
pub(super) type Numbers = [u32; 5];

/// One entry in 32 bytes: the key, the time of the last use, and the numbers. An empty slot has the key 0.
type Slot = [u64; 4];

/// The table. Its memory is allocated at once and never grows; the operating system provides it on first use.
#[derive(Debug)]
pub(super) struct BoundedTable {
    shards: Box<[Mutex<Vec<Slot>>]>,
    /// Number of accesses so far. It orders the entries by their last use.
    clock: AtomicU32,
}

impl BoundedTable {
    /// A table with at least this many slots.
    pub(super) fn new(slots: usize) -> Self {
        let per_shard = slots.div_ceil(SHARDS).next_multiple_of(WAYS);
        Self {
            shards: (0..SHARDS).map(|_| Mutex::new(vec![Slot::default(); per_shard])).collect(),
            clock: AtomicU32::new(0),
        }
    }

    /// The numbers of an entry, which counts as used.
    pub(super) fn get(&self, key: u64) -> Option<Numbers> {
        self.with_set(key, |set, key, now| {
            let slot = set.iter_mut().find(|slot| slot[0] == key)?;
            let numbers = unpack(slot);
            *slot = pack(key, now, numbers);
            Some(numbers)
        })
    }

    /// Inserts an entry, or replaces its numbers by the result of `update`.
    pub(super) fn update(&self, key: u64, update: impl FnOnce(Option<Numbers>) -> Numbers) {
        self.with_set(key, |set, key, now| {
            if let Some(slot) = set.iter_mut().find(|slot| slot[0] == key) {
                *slot = pack(key, now, update(Some(unpack(slot))));
                return;
            }
            // The clock may wrap around: the age is the distance to now.
            let age = |slot: &Slot| if slot[0] == 0 { u32::MAX } else { now.wrapping_sub(used(slot)) };
            if let Some(oldest) = set.iter_mut().max_by_key(|slot| age(slot)) {
                *oldest = pack(key, now, update(None));
            }
        });
    }

    /// Calls `action` with the slots in which the key can be, the key without the value of empty slots, and the time.
    fn with_set<T>(&self, key: u64, action: impl FnOnce(&mut [Slot], u64, u32) -> T) -> T {
        let now = self.clock.fetch_add(1, Ordering::Relaxed);
        let (shard, rest) = (key % SHARDS as u64, key / SHARDS as u64);
        // Both are below the number of shards and sets.
        let shard = &self.shards[usize::try_from(shard).unwrap_or(0)];
        // A poisoned lock is usable: no update of a slot can panic halfway.
        let mut slots = shard.lock().unwrap_or_else(PoisonError::into_inner);
        let sets = (slots.len() / WAYS) as u64;
        let first = usize::try_from(rest % sets.max(1)).unwrap_or(0) * WAYS;
        action(&mut slots[first..first + WAYS], key.max(1), now)
    }
}

fn pack(key: u64, now: u32, numbers: Numbers) -> Slot {
    let pair = |high: u32, low: u32| u64::from(high) << 32 | u64::from(low);
    [key, pair(now, numbers[0]), pair(numbers[1], numbers[2]), pair(numbers[3], numbers[4])]
}

#[allow(clippy::cast_possible_truncation)] // takes the halves of a word
fn unpack(slot: &Slot) -> Numbers {
    let [_, first, second, third] = *slot;
    [first as u32, (second >> 32) as u32, second as u32, (third >> 32) as u32, third as u32]
}

#[allow(clippy::cast_possible_truncation)] // takes the half of a word
fn used(slot: &Slot) -> u32 {
    (slot[1] >> 32) as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    /// A number that looks like a hash.
    fn hash(n: u64) -> u64 {
        n.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
    }

    #[test]
    fn a_full_table_keeps_the_entries_that_were_used_last() {
        let table = BoundedTable::new(1 << 12);
        let slots: usize = table.shards.iter().map(|shard| shard.lock().unwrap().len()).sum();
        assert_eq!(slots, 1 << 12);
        for n in 0..100_000u32 {
            table.update(hash(u64::from(n)), |_| [n; 5]);
            assert_eq!(table.get(hash(0)), Some([0; 5]), "an entry in use is kept");
        }
        let kept = |range: std::ops::Range<u32>| {
            range.filter(|&n| table.get(hash(u64::from(n))) == Some([n; 5])).count()
        };
        assert!(kept(98_976..100_000) > 1_000);
        assert_eq!(kept(1..50_000), 0);
    }

    #[test]
    fn an_old_entry_stays_older_when_the_clock_wraps_around() {
        let table = BoundedTable::new(SHARDS * WAYS);
        table.clock.store(u32::MAX - 3, Ordering::Relaxed);
        // All these keys are in one set of one shard.
        let key = |n: u64| n * SHARDS as u64;
        (1..=8).for_each(|n| table.update(key(n), |_| [0; 5]));
        table.update(key(9), |_| [0; 5]);
        assert_eq!((table.get(key(1)), table.get(key(2))), (None, Some([0; 5])));
    }

    proptest! {
        #[test]
        fn a_table_with_room_behaves_like_a_map(steps in prop::collection::vec((0..40u64, any::<Numbers>()), 0..100)) {
            let (table, mut map) = (BoundedTable::new(1 << 14), HashMap::new());
            for (key, numbers) in steps {
                let key = hash(key);
                prop_assert_eq!(table.get(key), map.get(&key).copied());
                table.update(key, |before| {
                    assert_eq!(before, map.get(&key).copied());
                    numbers
                });
                map.insert(key, numbers);
            }
            for (key, numbers) in map {
                prop_assert_eq!(table.get(key), Some(numbers));
            }
        }
    }
}
