//! The calendar window: so much per minute, day or month of the clock, all back at its turn.

use super::{ClockUnit, Wait};
use crate::clock::Timestamp;
use jiff::ToSpan;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;

/// The counters of one clock period.
#[derive(Clone, Debug)]
pub struct Calendar {
    limit: u64,
    unit: ClockUnit,
    zone: TimeZone,
    start: Timestamp,
    end: Timestamp,
    used: u64,
    held: u64,
}

impl Calendar {
    /// Nothing used yet in the period that `now` lies in.
    pub fn new(limit: u64, unit: ClockUnit, zone: TimeZone, now: Timestamp) -> Self {
        let (start, end) = bounds(unit, &zone, now);
        Self { limit, unit, zone, start, end, used: 0, held: 0 }
    }

    /// Turns the period over if its end has come. Never backwards: a clock that is stepped back
    /// finds the later period still running.
    pub fn roll(&mut self, now: Timestamp) {
        if now >= self.end {
            (self.start, self.end) = bounds(self.unit, &self.zone, now);
            self.used = 0;
            self.held = 0;
        }
    }

    /// Whether `amount` fits in what is left (call `roll` first); if not, when it does.
    ///
    /// # Errors
    /// How long the same request has to wait, or that it never fits.
    pub fn fits(&self, amount: u64, now: Timestamp) -> Result<(), Wait> {
        if amount > self.limit {
            return Err(Wait::Never);
        }
        let needed = amount.max(1);
        if self.used.saturating_add(self.held).saturating_add(needed) <= self.limit {
            return Ok(());
        }
        Err(Wait::Ms(self.left_ms(now).max(1)))
    }

    /// Holds `amount`; the period that admitted it is named by `start`.
    pub fn reserve(&mut self, amount: u64) -> Timestamp {
        self.held += amount;
        self.start
    }

    /// Replaces `held` by `spent` in the period that admitted it. Of a request that a later period
    /// settles only the overrun is owed: a refund has nothing left to refund.
    pub fn settle(&mut self, admitted_in: Timestamp, held: u64, spent: u64) {
        if admitted_in == self.start {
            self.held = self.held.saturating_sub(held);
            self.used = self.used.saturating_add(spent);
        } else {
            self.used = self.used.saturating_add(spent.saturating_sub(held));
        }
    }

    /// What is left; below zero: debt.
    pub fn level(&self) -> i64 {
        let signed = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        signed(self.limit).saturating_sub(signed(self.used)).saturating_sub(signed(self.held))
    }

    /// Held by requests that this period admitted and that are in flight.
    pub fn held(&self) -> u64 {
        self.held
    }

    /// Settled in this period.
    pub fn used(&self) -> u64 {
        self.used
    }

    /// The limit.
    pub fn limit(&self) -> u64 {
        self.limit
    }

    /// Milliseconds until the period ends.
    pub fn left_ms(&self, now: Timestamp) -> u64 {
        self.end.ms_since(now)
    }
}

/// Start and end of the clock period that `now` lies in. Where daylight saving repeats or skips an
/// hour, the time zone library decides; the period never ends before it began.
fn bounds(unit: ClockUnit, zone: &TimeZone, now: Timestamp) -> (Timestamp, Timestamp) {
    let fixed = |ms: i64| {
        let start = now.0.div_euclid(ms).saturating_mul(ms);
        (Timestamp(start), Timestamp(start.saturating_add(ms)))
    };
    match unit {
        ClockUnit::Second => fixed(1_000),
        ClockUnit::Minute => fixed(60_000),
        _ => civil_bounds(unit, zone, now).unwrap_or_else(|| fixed(approximate_ms(unit))),
    }
}

fn civil_bounds(unit: ClockUnit, zone: &TimeZone, now: Timestamp) -> Option<(Timestamp, Timestamp)> {
    let zoned = jiff::Timestamp::from_millisecond(now.0).ok()?.to_zoned_datetime(zone.clone());
    let (start, end) = match unit {
        // An hour is counted on the line of time, from its :00: where the clocks go back, the
        // hour that is told twice is two hours.
        ClockUnit::Second | ClockUnit::Minute | ClockUnit::Hour => {
            let into = i64::from(zoned.minute()) * 60_000
                + i64::from(zoned.second()) * 1_000
                + i64::from(zoned.millisecond());
            let start = now.0 - into;
            return Some((Timestamp(start), Timestamp(start + 3_600_000)));
        }
        ClockUnit::Day => {
            let day = zoned.date();
            (day, day.checked_add(1.day()).ok()?)
        }
        ClockUnit::Week => {
            let back = i64::from(zoned.date().weekday().to_monday_zero_offset());
            let monday = zoned.date().checked_sub(back.days()).ok()?;
            (monday, monday.checked_add(7.days()).ok()?)
        }
        ClockUnit::Month => {
            let first = zoned.date().first_of_month();
            (first, first.checked_add(1.month()).ok()?)
        }
    };
    let start = midnight(start.to_datetime(jiff::civil::Time::midnight()), zone)?;
    let end = midnight(end.to_datetime(jiff::civil::Time::midnight()), zone)?;
    Some((start, end.max(now.plus_ms(1))))
}

fn midnight(civil: DateTime, zone: &TimeZone) -> Option<Timestamp> {
    Some(Timestamp(zone.to_timestamp(civil).ok()?.as_millisecond()))
}

/// Only for moments outside the calendar that the time zone library covers (years -9999 .. 9999).
fn approximate_ms(unit: ClockUnit) -> i64 {
    const DAY: i64 = 24 * 3_600_000;
    match unit {
        ClockUnit::Second => 1_000,
        ClockUnit::Minute => 60_000,
        ClockUnit::Hour => 3_600_000,
        ClockUnit::Day => DAY,
        ClockUnit::Week => 7 * DAY,
        ClockUnit::Month => 30 * DAY,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> Timestamp {
        Timestamp(text.parse::<jiff::Timestamp>().unwrap().as_millisecond())
    }

    fn berlin() -> TimeZone {
        TimeZone::get("Europe/Berlin").unwrap()
    }

    #[test]
    fn periods_follow_the_clock_of_their_zone() {
        for (unit, zone, now, start, end) in [
            (
                ClockUnit::Minute,
                TimeZone::UTC,
                "2026-03-04T05:06:07Z",
                "2026-03-04T05:06:00Z",
                "2026-03-04T05:07:00Z",
            ),
            (
                ClockUnit::Hour,
                TimeZone::UTC,
                "2026-03-04T05:06:07Z",
                "2026-03-04T05:00:00Z",
                "2026-03-04T06:00:00Z",
            ),
            (
                ClockUnit::Day,
                berlin(),
                "2026-03-04T23:30:00Z",
                "2026-03-04T23:00:00Z",
                "2026-03-05T23:00:00Z",
            ),
            // Clocks go forward on 29 March 2026: that day has 23 hours; and back on 25 October: 25.
            (
                ClockUnit::Day,
                berlin(),
                "2026-03-29T12:00:00Z",
                "2026-03-28T23:00:00Z",
                "2026-03-29T22:00:00Z",
            ),
            (
                ClockUnit::Day,
                berlin(),
                "2026-10-25T12:00:00Z",
                "2026-10-24T22:00:00Z",
                "2026-10-25T23:00:00Z",
            ),
            (
                ClockUnit::Week,
                TimeZone::UTC,
                "2026-11-22T12:00:00Z",
                "2026-11-16T00:00:00Z",
                "2026-11-23T00:00:00Z",
            ),
            (
                ClockUnit::Month,
                berlin(),
                "2026-02-10T12:00:00Z",
                "2026-01-31T23:00:00Z",
                "2026-02-28T23:00:00Z",
            ),
        ] {
            assert_eq!(bounds(unit, &zone, at(now)), (at(start), at(end)), "{unit:?} {now}");
        }
    }

    #[test]
    fn a_request_counts_in_the_period_that_admitted_it() {
        let now = at("2026-03-04T23:59:00Z");
        let mut c = Calendar::new(100, ClockUnit::Day, TimeZone::UTC, now);
        let first = c.reserve(60);
        let second = c.reserve(40);
        assert_eq!(c.fits(0, now), Err(Wait::Ms(60_000)));
        c.roll(now.plus_ms(60_000));
        assert_eq!((c.level(), c.held()), (100, 0));
        c.settle(first, 60, 10);
        assert_eq!(c.level(), 100, "a refund of yesterday's");
        c.settle(second, 40, 70);
        assert_eq!(c.level(), 70, "an overrun of yesterday's is owed today");
    }

    #[test]
    fn a_clock_stepped_back_does_not_open_a_new_period() {
        let now = at("2026-03-04T00:00:00Z");
        let mut c = Calendar::new(100, ClockUnit::Day, TimeZone::UTC, now);
        let admitted_in = c.reserve(100);
        c.settle(admitted_in, 100, 100);
        c.roll(at("2026-03-03T12:00:00Z"));
        assert_eq!(c.level(), 0);
    }
}
