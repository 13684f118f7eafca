//! Measures one quota during a replay, and draws its amounts over time.

use super::timeline::Timeline;
use crate::clock::Timestamp;
use crate::quota::{ClockUnit, CounterState, Quota, QuotaLevel, Quotas, Scope, Subject, TokenBucket, Window};

/// Maximum number of days, weeks or months that [`periods_touched`] counts one by one.
const MAX_PERIODS: u64 = 100_000;

/// The result of a replay for one quota.
#[derive(Clone, Debug)]
pub(super) struct QuotaOutcome {
    pub(super) quota: Quota,
    /// Number of calls that the quota applies to.
    pub(super) calls: u64,
    /// Number of denials in which this quota could not hold the call. In shadow mode: that it would have caused.
    pub(super) denials: u64,
    /// The amount that the admitted calls used.
    pub(super) spent: u64,
    /// The spent amount as a fraction of the largest amount that the quota could admit during the trace. A calendar
    /// quota could admit its limit in each period that the trace touches.
    pub(super) utilisation: f64,
    /// The largest excess over the permitted amount, as a fraction of the capacity.
    pub(super) overshoot: f64,
    /// Sum of the times from a denial by this quota to the next admission, in milliseconds.
    pub(super) exhausted_ms: u64,
    pub(super) timeline: Timeline,
}

/// Measures the overshoot of one quota independently of the engine: it charges an ideal counter of the same
/// size and rate at the moment of spending.
pub(super) struct Meter {
    pub(super) quota: Quota,
    ideal: IdealCounter,
    /// Number of calls that the quota applies to.
    calls: u64,
    spent: u64,
    /// The lowest level of the ideal counter; below zero: overshoot.
    lowest_level: i64,
    denials: u64,
    denied_since: Option<Timestamp>,
    exhausted_ms: u64,
    timeline: Timeline,
}

/// A counter that charges at the moment of spending.
enum IdealCounter {
    Rolling(Box<TokenBucket>),
    /// No separate counter: the debt in the engine's own counter is the overshoot.
    Calendar,
}

impl Meter {
    pub(super) fn new(quota: &Quota, first: Timestamp, last: Timestamp) -> Self {
        let ideal = match quota.window {
            Window::Rolling { burst } => {
                IdealCounter::Rolling(Box::new(TokenBucket::full(quota.limit, burst, quota.per.ms, first)))
            }
            Window::Calendar { .. } => IdealCounter::Calendar,
        };
        Self {
            ideal,
            quota: quota.clone(),
            calls: 0,
            spent: 0,
            lowest_level: 0,
            denials: 0,
            denied_since: None,
            exhausted_ms: 0,
            timeline: Timeline::new(first, last),
        }
    }

    pub(super) fn is_calendar(&self) -> bool {
        matches!(self.ideal, IdealCounter::Calendar)
    }

    /// Whether the quota applies to a call.
    pub(super) fn measures(&self, subject: Subject<'_>) -> bool {
        match &self.quota.scope {
            Scope::Environment | Scope::Upstream(_) => true,
            Scope::Caller(name) => subject.caller == Some(name),
            Scope::Model(pattern) => pattern.matches(subject.model),
            Scope::UpstreamModel(models) => models.pattern().matches(subject.model),
        }
    }

    pub(super) fn count_call(&mut self) {
        self.calls += 1;
    }

    pub(super) fn spend(&mut self, now: Timestamp, amount: u64) {
        self.spent = self.spent.saturating_add(amount);
        if let IdealCounter::Rolling(bucket) = &mut self.ideal {
            bucket.refill(now);
            bucket.reserve(amount);
            bucket.settle(amount, amount.cast_signed());
            self.lowest_level = self.lowest_level.min(bucket.level());
        }
    }

    /// Records the engine's counter after an answer has ended.
    pub(super) fn record_debt(&mut self, level: i64) {
        self.lowest_level = self.lowest_level.min(level);
    }

    pub(super) fn record_denial(&mut self, now: Timestamp) {
        self.denials += 1;
        self.denied_since.get_or_insert(now);
        self.timeline.record_denial(now);
    }

    pub(super) fn end_denials(&mut self, now: Timestamp) {
        if let Some(since) = self.denied_since.take() {
            self.exhausted_ms += now.ms_since(since);
        }
    }

    pub(super) fn record_level(&mut self, now: Timestamp, level: &QuotaLevel) {
        self.timeline.record_level(now, level.used, level.held);
    }

    #[allow(clippy::cast_precision_loss)] // fractions for display
    pub(super) fn outcome(self, first: Timestamp, last: Timestamp) -> QuotaOutcome {
        let capacity = self.quota.capacity() as f64;
        let permitted = match self.quota.window {
            Window::Rolling { .. } => {
                let periods = last.ms_since(first) as f64 / self.quota.per.ms as f64;
                capacity + self.quota.limit as f64 * periods
            }
            Window::Calendar { unit, .. } => {
                capacity * periods_touched(&self.quota, unit, first, last) as f64
            }
        };
        QuotaOutcome {
            calls: self.calls,
            denials: self.denials,
            spent: self.spent,
            utilisation: self.spent as f64 / permitted,
            overshoot: self.lowest_level.unsigned_abs() as f64 / capacity,
            exhausted_ms: self.exhausted_ms,
            timeline: self.timeline,
            quota: self.quota,
        }
    }
}

/// The number of calendar periods that contain a part of the time from `first` to `last`, which are in one or several.
/// Each of them grants the whole limit.
fn periods_touched(quota: &Quota, unit: ClockUnit, first: Timestamp, last: Timestamp) -> u64 {
    let period_at = |at| match Quotas::new(std::slice::from_ref(quota), at).states(at).first() {
        Some(&CounterState::Calendar { period, .. }) => period,
        Some(CounterState::Rolling { .. }) | None => (at, at),
    };
    let (start, mut end) = period_at(first);
    if matches!(unit, ClockUnit::Second | ClockUnit::Minute | ClockUnit::Hour) {
        return last.ms_since(start) / quota.per.ms.max(1) + 1;
    }
    let mut periods = 1;
    while end <= last && periods < MAX_PERIODS {
        let next = period_at(end).1;
        if next <= end {
            break;
        }
        (end, periods) = (next, periods + 1);
    }
    periods
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quota::{Kind, Period};
    use jiff::tz::TimeZone;

    #[test]
    fn periods_are_counted_in_their_time_zone() {
        let at = |text: &str| Timestamp(text.parse::<jiff::Timestamp>().unwrap().as_millisecond());
        for (unit, ms, first, last, periods) in [
            (ClockUnit::Minute, 60_000, "2026-03-01T10:00:59Z", "2026-03-01T10:01:00Z", 2),
            (ClockUnit::Hour, 3_600_000, "2026-03-01T10:00:00Z", "2026-03-01T10:59:59Z", 1),
            (ClockUnit::Day, 86_400_000, "2026-03-01T22:30:00Z", "2026-03-01T22:59:59Z", 1),
            // Midnight in Berlin.
            (ClockUnit::Day, 86_400_000, "2026-03-01T22:30:00Z", "2026-03-01T23:00:00Z", 2),
            (ClockUnit::Month, 2_592_000_000, "2026-01-31T12:00:00Z", "2026-04-01T12:00:00Z", 4),
        ] {
            let quota = Quota {
                scope: Scope::Environment,
                kind: Kind::TotalTokens,
                limit: 10,
                per: Period { text: String::new(), ms },
                window: Window::Calendar { unit, zone: TimeZone::get("Europe/Berlin").unwrap() },
            };
            assert_eq!(
                periods_touched(&quota, unit, at(first), at(last)),
                periods,
                "{unit:?} {first} {last}"
            );
        }
    }
}
