//! Counts of events in the last minutes or hours, in bounded memory.

use crate::clock::Timestamp;

/// Events of the last `SLOTS` intervals, each `SLOT_MS` milliseconds long.
#[derive(Clone, Copy, Debug)]
pub(super) struct Intervals<const SLOTS: usize, const SLOT_MS: i64> {
    /// The number of the current interval since the Unix epoch.
    current: i64,
    counts: [u32; SLOTS],
}

impl<const SLOTS: usize, const SLOT_MS: i64> Default for Intervals<SLOTS, SLOT_MS> {
    fn default() -> Self {
        Self { current: 0, counts: [0; SLOTS] }
    }
}

impl<const SLOTS: usize, const SLOT_MS: i64> Intervals<SLOTS, SLOT_MS> {
    /// Counts an event.
    pub(super) fn add(&mut self, now: Timestamp) {
        self.advance(now);
        let count = &mut self.counts[Self::slot(self.current)];
        *count = count.saturating_add(1);
    }

    /// The number of events in the current interval and the ones before it.
    pub(super) fn sum(&mut self, now: Timestamp) -> u64 {
        self.advance(now);
        self.counts.iter().map(|n| u64::from(*n)).sum()
    }

    /// Moves to the interval of `now`, and sets those in between to zero.
    fn advance(&mut self, now: Timestamp) {
        let slots = i64::try_from(SLOTS).unwrap_or(i64::MAX);
        let now = now.0.div_euclid(SLOT_MS);
        let passed = now.saturating_sub(self.current);
        // After a step back of the clock, counting continues in the interval that was the last one.
        for n in 1..=passed.clamp(0, slots) {
            self.counts[Self::slot(now - passed + n)] = 0;
        }
        if passed >= slots || passed < -slots {
            self.counts = [0; SLOTS];
            self.current = now;
        }
        self.current = self.current.max(now);
    }

    fn slot(interval: i64) -> usize {
        let slots = i64::try_from(SLOTS).unwrap_or(i64::MAX);
        usize::try_from(interval.rem_euclid(slots)).unwrap_or(0)
    }
}
