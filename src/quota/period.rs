//! The calendar window: so much per minute, day or month of the clock, all back at its turn.

use super::{ClockUnit, CounterState, PersistedCounter, Wait};
use crate::clock::Timestamp;
use jiff::ToSpan;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;

/// The counters of one clock period.
#[derive(Clone, Debug)]
pub struct CalendarPeriod {
    limit: u64,
    unit: ClockUnit,
    zone: TimeZone,
    start: Timestamp,
    end: Timestamp,
    /// Names the period: a reservation says by this which one admitted it. It is the period's start, so that nodes
    /// of a cluster agree on it without asking, or one more than the last where the clock was stepped back.
    period_id: u64,
    used: u64,
    held: u64,
}

impl CalendarPeriod {
    /// Nothing used yet in the period that `now` lies in.
    pub fn new(limit: u64, unit: ClockUnit, zone: TimeZone, now: Timestamp) -> Self {
        let (start, end) = bounds(unit, &zone, now);
        Self { limit, unit, zone, start, end, period_id: id_of(start), used: 0, held: 0 }
    }

    /// Turns the period over if its end has come. A clock that was stepped back opens no new period:
    /// what was used stays used until the end of the period that the clock now shows, so that nothing
    /// is granted by stepping back and nobody waits longer than one period.
    pub fn roll(&mut self, now: Timestamp) {
        if now >= self.end {
            (self.start, self.end) = bounds(self.unit, &self.zone, now);
            self.period_id = id_of(self.start).max(self.period_id + 1);
            self.used = 0;
            self.held = 0;
        } else if now < self.start {
            (self.start, self.end) = bounds(self.unit, &self.zone, now);
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

    /// Holds `amount`; returns the turn that admitted it.
    pub fn reserve(&mut self, amount: u64) -> u64 {
        self.held += amount;
        self.period_id
    }

    /// What is certainly spent of a reservation does not stay held.
    pub fn mark_spent(&mut self, admitted_in: u64, amount: u64) {
        if admitted_in == self.period_id {
            self.held = self.held.saturating_sub(amount);
            self.used = self.used.saturating_add(amount);
        }
    }

    /// Replaces `reserved`, of which `moved` was counted as spent on the way, by `spent`, in the period
    /// that admitted it. Of a request that a later period settles only the overrun is owed: a refund
    /// has nothing left to refund.
    pub fn settle(&mut self, admitted_in: u64, reserved: u64, moved: u64, spent: u64) {
        if admitted_in == self.period_id {
            self.held = self.held.saturating_sub(reserved.saturating_sub(moved));
            self.used = self.used.saturating_add(spent).saturating_sub(moved);
        } else {
            self.used = self.used.saturating_add(spent.saturating_sub(reserved));
        }
    }

    /// Charges what was spent of a reservation that is held elsewhere: all of it in the period that admitted it, in
    /// a later one the overrun.
    pub fn charge_without_hold(&mut self, admitted_in: u64, reserved: u64, spent: u64) {
        let owed = if admitted_in == self.period_id { spent } else { spent.saturating_sub(reserved) };
        self.used = self.used.saturating_add(owed);
    }

    /// Another limit from now on: what was used stays used, what is held stays held.
    pub fn set_limit(&mut self, limit: u64) {
        self.limit = limit;
    }

    /// Follows the clock of another time zone from now on. What was used in the period that is running
    /// stays used until the new one's end.
    pub fn set_zone(&mut self, zone: &TimeZone, now: Timestamp) {
        if self.zone != *zone {
            self.zone = zone.clone();
            (self.start, self.end) = bounds(self.unit, zone, now);
        }
    }

    /// Nothing used any more, but for what is held.
    pub fn reset(&mut self) {
        self.used = 0;
    }

    /// What has to be kept so that the period outlives the process.
    pub fn saved(&self) -> PersistedCounter {
        PersistedCounter {
            used: i64::try_from(self.used).unwrap_or(i64::MAX),
            level_fraction: 0,
            held: self.held,
            at: self.start,
            until: self.end,
        }
    }

    /// Takes over what another process has left, if its period is still running: what it used, and, in
    /// full, what it held.
    pub fn restore(&mut self, saved: &PersistedCounter, now: Timestamp) {
        (self.start, self.end) = bounds(self.unit, &self.zone, now);
        self.period_id = id_of(self.start);
        // A later start than the clock shows: it was stepped back meanwhile. Periods that only overlap: the
        // time zone is another now, and all of it may have been used since this period began.
        if saved.at >= self.start || saved.until > self.start {
            self.used = u64::try_from(saved.used).unwrap_or(0).saturating_add(saved.held);
        }
    }

    /// Goes on from a state that another engine has reached, in the period from `start` to `end`.
    pub fn load(
        &mut self,
        limit: u64,
        used: u64,
        held: u64,
        (start, end): (Timestamp, Timestamp),
        period_id: u64,
    ) {
        (self.limit, self.used, self.held, self.period_id) = (limit, used, held, period_id);
        (self.start, self.end) = (start, end);
    }

    /// The state that `load` goes on from.
    pub fn state(&self) -> CounterState {
        let Self { limit, used, held, period_id, .. } = *self;
        CounterState::Calendar { limit, used, held, period: (self.start, self.end), period_id }
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

    /// When the period began.
    pub fn start(&self) -> Timestamp {
        self.start
    }

    /// When it ends.
    pub fn end(&self) -> Timestamp {
        self.end
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

fn id_of(start: Timestamp) -> u64 {
    u64::try_from(start.0).unwrap_or(0)
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
        let mut c = CalendarPeriod::new(100, ClockUnit::Day, TimeZone::UTC, now);
        let first = c.reserve(60);
        let second = c.reserve(40);
        assert_eq!(c.fits(0, now), Err(Wait::Ms(60_000)));
        c.roll(now.plus_ms(60_000));
        assert_eq!((c.level(), c.held()), (100, 0));
        c.settle(first, 60, 0, 10);
        assert_eq!(c.level(), 100, "a refund of yesterday's");
        c.settle(second, 40, 0, 70);
        assert_eq!(c.level(), 70, "an overrun of yesterday's is owed today");
    }

    #[test]
    fn what_is_spent_on_the_way_is_counted_once() {
        let now = at("2026-03-04T23:59:00Z");
        let mut c = CalendarPeriod::new(100, ClockUnit::Day, TimeZone::UTC, now);
        let period_id = c.reserve(60);
        c.mark_spent(period_id, 40);
        assert_eq!((c.level(), c.held(), c.used()), (40, 20, 40));
        let mut early = c.clone();
        early.settle(period_id, 60, 40, 50);
        assert_eq!((early.level(), early.held(), early.used()), (50, 0, 50));
        c.roll(now.plus_ms(60_000));
        c.mark_spent(period_id, 10);
        c.settle(period_id, 60, 50, 65);
        assert_eq!((c.level(), c.held(), c.used()), (95, 0, 5), "only the overrun is owed");
    }

    #[test]
    fn a_period_outlives_its_process_if_it_still_runs() {
        let now = at("2026-03-04T10:00:00Z");
        let mut c = CalendarPeriod::new(100, ClockUnit::Day, TimeZone::UTC, now);
        let period_id = c.reserve(60);
        c.settle(period_id, 50, 0, 30);
        let saved = c.saved();
        for (restart, left) in
            [("2026-03-04T23:59:59Z", 60), ("2026-03-05T00:00:00Z", 100), ("2026-03-03T12:00:00Z", 60)]
        {
            let mut after = CalendarPeriod::new(100, ClockUnit::Day, TimeZone::UTC, at(restart));
            after.restore(&saved, at(restart));
            assert_eq!(after.level(), left, "{restart}");
        }
    }

    #[test]
    fn another_time_zone_forgets_nothing_of_the_running_period() {
        let kiritimati = TimeZone::get("Pacific/Kiritimati").unwrap();
        let honolulu = TimeZone::get("Pacific/Honolulu").unwrap();
        let zones = [TimeZone::UTC, berlin(), kiritimati, honolulu];
        for unit in [ClockUnit::Day, ClockUnit::Week, ClockUnit::Month] {
            for (before, after, hour) in
                zones.iter().flat_map(|b| zones.iter().flat_map(move |a| (0..24).map(move |h| (b, a, h))))
            {
                let now = at("2026-03-31T00:00:00Z").plus_ms(hour * 3_600_000);
                let mut c = CalendarPeriod::new(100, unit, before.clone(), now);
                let period_id = c.reserve(60);
                c.settle(period_id, 50, 0, 30);
                let mut after_restart = CalendarPeriod::new(100, unit, after.clone(), now);
                after_restart.restore(&c.saved(), now);
                assert_eq!(after_restart.level(), 60, "{unit:?} {before:?} {after:?} {hour}");
                c.set_zone(after, now);
                assert_eq!((c.level(), c.held(), c.start()), (60, 10, after_restart.start()));
                c.settle(period_id, 10, 0, 10);
                c.roll(c.end);
                assert_eq!(c.level(), 100, "and no longer than that");
            }
        }
    }

    #[test]
    fn a_clock_stepped_back_neither_grants_nor_sticks() {
        let now = at("2026-03-04T12:30:30Z");
        let mut c = CalendarPeriod::new(100, ClockUnit::Minute, TimeZone::UTC, now);
        let admitted_in = c.reserve(100);
        c.settle(admitted_in, 50, 0, 50);
        let back = at("2026-03-03T12:30:10Z");
        c.roll(back);
        assert_eq!((c.level(), c.held()), (0, 50));
        c.settle(admitted_in, 50, 0, 40);
        assert_eq!((c.level(), c.held()), (10, 0), "it is still the same period_id");
        c.roll(back.plus_ms(50_000));
        assert_eq!(c.level(), 100);
    }
}
