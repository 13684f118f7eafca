//! How fast a quota was spent in the last minutes, and when nothing will be left at that rate.

use super::{CounterState, QuotaLevel, Window};
use crate::clock::Timestamp;

/// The rate of a quota is measured over this time (ms), or since its counter began if that is shorter.
const RATE_WINDOW_MS: u64 = MINUTES as u64 * MINUTE_MS;
const MINUTES: usize = 10;
const MINUTE_MS: u64 = 60_000;

/// The amounts that were spent of a quota in the last minutes. Adding an amount costs a comparison and an addition.
#[derive(Clone, Debug)]
pub(super) struct Spending {
    /// One sum per minute, as a ring: the current minute and those before it.
    sums: [u64; MINUTES + 1],
    current: usize,
    /// When the current minute began.
    began: Timestamp,
    /// When counting began.
    since: Timestamp,
    /// The last used amount from Redis. `None`: this process counts the spending of its own requests.
    shared: Option<SharedUsage>,
}

/// The used amount of a quota in Redis.
#[derive(Clone, Copy, Debug)]
struct SharedUsage {
    used: u64,
    at: Timestamp,
    /// 0 for a rolling quota.
    period_id: u64,
}

impl Spending {
    pub(super) fn new(now: Timestamp) -> Self {
        Self { sums: [0; MINUTES + 1], current: 0, began: now, since: now, shared: None }
    }

    /// Adds an amount that a request of this process has spent. With shared counters it counts once Redis reports it.
    pub(super) fn add(&mut self, now: Timestamp, amount: u64) {
        if self.shared.is_none() {
            self.count(now, amount);
        }
    }

    fn count(&mut self, now: Timestamp, amount: u64) {
        self.advance(now);
        if let Some(sum) = self.sums.get_mut(self.current) {
            *sum = sum.saturating_add(amount);
        }
    }

    /// Begins the minute of `now`.
    fn advance(&mut self, now: Timestamp) {
        let minutes = now.ms_since(self.began) / MINUTE_MS;
        if minutes == 0 {
            // A clock that was stepped back by more than a minute must not stop the ring until it has caught up.
            if self.began.ms_since(now) > MINUTE_MS {
                self.began = now;
            }
            return;
        }
        for _ in 0..minutes.min(self.sums.len() as u64) {
            self.current = (self.current + 1) % self.sums.len();
            self.sums[self.current] = 0;
        }
        self.began = self.began.plus_ms(minutes * MINUTE_MS);
    }

    /// Counts what all nodes have spent since the last state of Redis. In a rolling quota this omits amounts that were
    /// spent and refilled between the two states. `is_repeated`: this state restores one that was counted before.
    pub(super) fn load(&mut self, now: Timestamp, state: &CounterState, period_ms: u64, is_repeated: bool) {
        let usage = match *state {
            CounterState::Rolling { burst, level: (level, _), held, at, .. } => {
                let used = i128::from(burst) - i128::from(level) - i128::from(held);
                SharedUsage { used: u64::try_from(used).unwrap_or(0), at, period_id: 0 }
            }
            CounterState::Calendar { used, period_id, .. } => SharedUsage { used, at: now, period_id },
        };
        if let Some(before) = self.shared.replace(usage)
            && !is_repeated
        {
            let was_rolling = before.period_id == 0;
            let left = match *state {
                // A rolling quota got a limit or lost it. Its two used amounts cannot be compared.
                CounterState::Rolling { .. } if !was_rolling => usage.used,
                CounterState::Calendar { .. } if was_rolling => usage.used,
                CounterState::Rolling { limit, .. } => {
                    let refilled = u128::from(limit) * u128::from(usage.at.ms_since(before.at));
                    let refilled = refilled / u128::from(period_ms.max(1));
                    before.used.saturating_sub(u64::try_from(refilled).unwrap_or(u64::MAX))
                }
                CounterState::Calendar { period_id, .. } if period_id == before.period_id => before.used,
                CounterState::Calendar { .. } => 0,
            };
            self.count(now, usage.used.saturating_sub(left));
        }
    }

    /// From now on this process counts the spending of its own requests, because Redis is unavailable.
    pub(super) fn go_offline(&mut self) {
        self.shared = None;
    }

    /// The amount spent in the last [`RATE_WINDOW_MS`]. The oldest minute counts in proportion to the part of it that is in
    /// this time.
    pub(super) fn recent(&mut self, now: Timestamp) -> u64 {
        self.advance(now);
        let oldest = self.sums[(self.current + 1) % self.sums.len()];
        let elapsed = now.ms_since(self.began).min(MINUTE_MS);
        let share = u128::from(oldest) * u128::from(MINUTE_MS - elapsed) / u128::from(MINUTE_MS);
        let newer = self.sums.iter().fold(0_u64, |sum, n| sum.saturating_add(*n)).saturating_sub(oldest);
        newer.saturating_add(u64::try_from(share).unwrap_or(u64::MAX))
    }

    /// The time in which [`Self::recent`] was spent (ms): the window, or less if counting began later, but at least a
    /// minute.
    pub(super) fn measured_ms(&self, now: Timestamp) -> u64 {
        now.ms_since(self.since).clamp(MINUTE_MS, RATE_WINDOW_MS)
    }
}

impl QuotaLevel {
    /// Tokens or requests spent per second, on the average of the last ten minutes, or since the counter began.
    #[allow(clippy::cast_precision_loss)] // for display
    pub fn rate(&self) -> f64 {
        self.spent_recently as f64 * 1e3 / self.measured_ms.max(1) as f64
    }

    /// Milliseconds until nothing is left, if the quota is spent at [`Self::rate`]. 0: nothing is left now. `None`: it is
    /// not exhausted before it resets. A rolling quota refills meanwhile.
    pub fn exhausted_in_ms(&self) -> Option<u64> {
        if self.level <= 0 {
            return Some(0);
        }
        // Both in units of 1/(window * period) per millisecond.
        let (window, period) = (i128::from(self.measured_ms.max(1)), i128::from(self.quota.per.ms));
        let (drain, scale) = match self.quota.window {
            Window::Rolling { .. } => (
                i128::from(self.spent_recently) * period - i128::from(self.quota.limit) * window,
                window * period,
            ),
            Window::Calendar { .. } => (i128::from(self.spent_recently), window),
        };
        if drain <= 0 {
            return None;
        }
        let ms = u64::try_from(i128::from(self.level) * scale / drain).unwrap_or(u64::MAX);
        let is_in_time = matches!(self.quota.window, Window::Rolling { .. }) || ms < self.reset_ms;
        is_in_time.then_some(ms)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{ClockUnit, Kind, Period, Quota, Scope};
    use super::*;
    use jiff::tz::TimeZone;
    use proptest::prelude::*;

    fn at(seconds: i64) -> Timestamp {
        Timestamp(seconds * 1_000)
    }

    fn calendar(used: u64, period_id: u64) -> CounterState {
        let period = (at(0), at(86_400));
        CounterState::Calendar { limit: 1_000, used, held: 0, period, period_id }
    }

    fn rolling(level: i64, held: u64, at: Timestamp) -> CounterState {
        CounterState::Rolling { limit: 60, burst: 100, level: (level, 0), held, at }
    }

    #[test]
    fn spent_amounts_leave_the_window_after_ten_minutes() {
        let mut spending = Spending::new(at(0));
        spending.add(at(5), 600);
        assert_eq!(spending.recent(at(5)), 600);
        spending.add(at(599), 60);
        assert_eq!(spending.recent(at(599)), 660);
        // The first minute leaves the window little by little.
        assert_eq!(spending.recent(at(615)), 450 + 60);
        assert_eq!(spending.recent(at(660)), 60);
        assert_eq!(spending.recent(at(100_000)), 0);
    }

    #[test]
    fn a_young_counter_is_measured_since_it_began_but_over_a_minute_at_least() {
        let mut spending = Spending::new(at(0));
        spending.add(at(5), 600);
        for (seconds, expected) in [(5, 60), (60, 60), (90, 90), (600, 600), (5_000, 600)] {
            assert_eq!(spending.measured_ms(at(seconds)), expected * 1_000);
        }
        assert_eq!(spending.measured_ms(at(-50)), 60_000);
    }

    #[test]
    fn a_clock_that_steps_back_does_not_stop_the_measurement() {
        let mut spending = Spending::new(at(10_000));
        spending.add(at(10_000), 7);
        spending.add(at(0), 1);
        assert_eq!(spending.recent(at(0)), 8);
        assert_eq!(spending.recent(at(700)), 0);
    }

    #[test]
    fn the_shared_level_counts_what_all_nodes_spend() {
        let mut spending = Spending::new(at(0));
        spending.load(at(0), &calendar(500, 3), 86_400_000, false);
        assert_eq!(spending.recent(at(1)), 0, "spent before this process joined");
        spending.add(at(1), 40);
        spending.load(at(2), &calendar(540, 3), 86_400_000, false);
        // An older state and the newer one again change nothing.
        spending.load(at(2), &calendar(520, 3), 86_400_000, false);
        spending.load(at(2), &calendar(540, 3), 86_400_000, true);
        assert_eq!(spending.recent(at(2)), 40);
        spending.load(at(3), &calendar(5, 4), 86_400_000, false);
        assert_eq!(spending.recent(at(3)), 45);
        spending.go_offline();
        spending.add(at(3), 5);
        assert_eq!(spending.recent(at(3)), 50);
    }

    #[test]
    fn a_shared_rolling_level_counts_what_was_spent_in_spite_of_the_refill() {
        let mut spending = Spending::new(at(0));
        spending.load(at(0), &rolling(50, 10, at(0)), 60_000, false);
        // 40 were used, 10 of them have refilled, and 25 were spent.
        spending.load(at(10), &rolling(45, 0, at(10)), 60_000, false);
        assert_eq!(spending.recent(at(10)), 25);
    }

    fn level(window: Window, level: i64, spent_recently: u64) -> QuotaLevel {
        let per = Period { text: "day".into(), ms: 86_400_000 };
        let quota = Quota { scope: Scope::Environment, kind: Kind::TotalTokens, limit: 86_400, per, window };
        QuotaLevel {
            quota,
            level,
            held: 0,
            used: 0,
            reset_ms: 3_600_000,
            spent_recently,
            measured_ms: RATE_WINDOW_MS,
            exhausted_ms: 0,
        }
    }

    #[test]
    fn a_quota_is_exhausted_at_the_present_rate_or_resets_before() {
        let day = || Window::Calendar { unit: ClockUnit::Day, zone: TimeZone::UTC };
        let rolling = || Window::Rolling { burst: 86_400 };
        for (window, left, spent, expected) in [
            // 1 per second.
            (day(), 100, 600, Some(100_000)),
            (day(), 3_600, 600, None),
            (day(), 3_599, 600, Some(3_599_000)),
            (day(), 100, 0, None),
            (day(), 0, 0, Some(0)),
            (day(), -5, 600, Some(0)),
            // A rolling quota of 1 per second refills as fast as it is spent.
            (rolling(), 100, 600, None),
            (rolling(), 100, 1_200, Some(100_000)),
            (rolling(), 86_400, 601, Some(51_840_000_000)),
        ] {
            let level = level(window, left, spent);
            assert_eq!(level.exhausted_in_ms(), expected, "{left} {spent}");
        }
        assert_eq!(level(day(), 100, 90).rate().to_bits(), 0.15_f64.to_bits());
    }

    proptest! {
        #[test]
        fn the_sum_is_what_was_spent_within_the_window(
            spent in prop::collection::vec((0..2_000_i64, 0..1_000_u64), 0..40)
        ) {
            let mut spent = spent;
            spent.sort_unstable();
            let mut spending = Spending::new(at(0));
            spent.iter().for_each(|&(second, amount)| spending.add(at(second), amount));
            let sum_since = |start: i64| spent.iter().filter(|(second, _)| *second >= start).map(|(_, n)| n).sum::<u64>();
            let recent = spending.recent(at(2_000));
            // Minutes are aligned to the start, so the window has a tolerance of one minute at its beginning.
            prop_assert!(sum_since(2_000 - 540) <= recent && recent <= sum_since(2_000 - 660));
        }
    }
}
