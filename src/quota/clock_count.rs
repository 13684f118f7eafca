//! The amount that a rolling quota has settled in the clock's current period. An unlimited quota shows this amount.
//! When it gets a limit, the bucket starts with the amount.

use super::PersistedCounter;
use crate::clock::Timestamp;

const WEEK_MS: u64 = 604_800_000;
/// The first Monday after the Unix epoch.
const FIRST_MONDAY_MS: i64 = 345_600_000;

/// The amount settled in the current period of the clock. Periods are blocks of the quota's length since the Unix epoch,
/// which are minutes, hours and days in UTC. A week begins on Monday. The script of Redis counts in the same way.
#[derive(Clone, Debug)]
pub(super) struct ClockCount {
    length_ms: i64,
    start: Timestamp,
    used: u64,
}

impl ClockCount {
    /// Nothing is used in the period that contains `now`.
    pub(super) fn new(period_ms: u64, now: Timestamp) -> Self {
        let length_ms = i64::try_from(period_ms).unwrap_or(i64::MAX).max(1);
        let mut count = Self { length_ms, start: now, used: 0 };
        count.start = count.start_at(now);
        count
    }

    fn start_at(&self, now: Timestamp) -> Timestamp {
        let offset = if self.length_ms.unsigned_abs() == WEEK_MS { FIRST_MONDAY_MS } else { 0 };
        let block = now.0.saturating_sub(offset).div_euclid(self.length_ms);
        Timestamp(block.saturating_mul(self.length_ms).saturating_add(offset))
    }

    /// Begins the next period if the current one has ended. If the clock was stepped back, the used amount stays.
    pub(super) fn roll(&mut self, now: Timestamp) {
        if (self.start..self.end()).contains(&now) {
            return;
        }
        if now > self.start {
            self.used = 0;
        }
        self.start = self.start_at(now);
    }

    /// Adds a settled amount. A negative one corrects an earlier one.
    pub(super) fn add(&mut self, amount: i64) {
        self.used = self.used.saturating_add_signed(amount);
    }

    pub(super) fn reset(&mut self) {
        self.used = 0;
    }

    pub(super) fn used(&self) -> u64 {
        self.used
    }

    /// Start of the current period.
    pub(super) fn start(&self) -> Timestamp {
        self.start
    }

    /// End of the current period, exclusive.
    pub(super) fn end(&self) -> Timestamp {
        Timestamp(self.start.0.saturating_add(self.length_ms))
    }

    /// Writes the count into a counter for the store.
    pub(super) fn persist(&self, persisted: &mut PersistedCounter) {
        (persisted.clock_used, persisted.clock_at) = (self.used, self.start);
    }

    /// Continues from a persisted count, if its period has not ended. A later period means that the clock was stepped
    /// back since.
    pub(super) fn restore(&mut self, persisted: &PersistedCounter, now: Timestamp) {
        self.start = self.start_at(now);
        self.used = if persisted.clock_at >= self.start { persisted.clock_used } else { 0 };
    }

    /// Replaces the count by the one in Redis.
    pub(super) fn load(&mut self, used: u64, start: Timestamp) {
        (self.used, self.start) = (used, start);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn periods_follow_the_clock() {
        let at = |text: &str| Timestamp(text.parse::<jiff::Timestamp>().unwrap().as_millisecond());
        for (ms, now, start) in [
            (60_000, "2026-03-04T05:06:07Z", "2026-03-04T05:06:00Z"),
            (10_000, "2026-03-04T05:06:17Z", "2026-03-04T05:06:10Z"),
            (86_400_000, "2026-03-04T05:06:17Z", "2026-03-04T00:00:00Z"),
            (WEEK_MS, "2026-11-22T12:00:00Z", "2026-11-16T00:00:00Z"),
        ] {
            let count = ClockCount::new(ms, at(now));
            assert_eq!(count.start(), at(start), "{ms} {now}");
        }
    }

    #[test]
    fn a_count_ends_with_its_period_and_survives_a_step_back() {
        let mut count = ClockCount::new(60_000, Timestamp(90_000));
        count.add(70);
        count.roll(Timestamp(119_999));
        assert_eq!(count.used(), 70);
        count.roll(Timestamp(30_000));
        assert_eq!((count.used(), count.start()), (70, Timestamp(0)));
        count.roll(Timestamp(60_000));
        assert_eq!(count.used(), 0);
    }
}
