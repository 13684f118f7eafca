//! The calendar window: a limit per calendar minute, day or month. At the start of a period nothing is used.

use super::{ClockUnit, CounterState, PersistedCounter, Wait};
use crate::clock::Timestamp;
use jiff::ToSpan;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;

/// The counter of the current calendar period. Amounts are tokens or requests.
#[derive(Clone, Debug)]
pub struct CalendarPeriod {
    limit: u64,
    unit: ClockUnit,
    zone: TimeZone,
    start: Timestamp,
    end: Timestamp,
    /// Identifies the period. A reservation records it to find the period that admitted it.
    ///
    /// It is the start of the period in milliseconds, so that nodes agree on it without communication. If a step of
    /// the clock would repeat an identifier, the new identifier is the previous one plus 1.
    period_id: u64,
    used: u64,
    held: u64,
}

impl CalendarPeriod {
    /// Creates the counter for the period that contains `now`, with nothing used.
    pub fn new(limit: u64, unit: ClockUnit, zone: TimeZone, now: Timestamp) -> Self {
        let (start, end) = bounds(unit, &zone, now);
        Self { limit, unit, zone, start, end, period_id: id_of(start), used: 0, held: 0 }
    }

    /// Begins the next period if the current one has ended. Returns whether it did.
    ///
    /// A clock that was stepped back begins no new period: the used amount stays until the end of the period
    /// that the clock now shows. So stepping back grants nothing, and no request waits longer than a period.
    pub(crate) fn roll(&mut self, now: Timestamp) -> bool {
        let has_ended = now >= self.end;
        if has_ended {
            (self.start, self.end) = bounds(self.unit, &self.zone, now);
            self.period_id = id_of(self.start).max(self.period_id + 1);
            self.used = 0;
            self.held = 0;
        } else if now < self.start {
            (self.start, self.end) = bounds(self.unit, &self.zone, now);
        }
        has_ended
    }

    /// Whether `amount` fits now. Requires a preceding `roll`.
    ///
    /// # Errors
    /// The time until the same request fits.
    pub(super) fn fits(&self, amount: u64, now: Timestamp) -> Result<(), Wait> {
        if amount > self.limit {
            return Err(Wait::Never);
        }
        let needed = amount.max(1);
        if self.used.saturating_add(self.held).saturating_add(needed) <= self.limit {
            return Ok(());
        }
        Err(Wait::Ms(self.remaining_ms(now).max(1)))
    }

    /// Holds `amount`. Returns the identifier of the period that admitted it.
    pub(super) fn reserve(&mut self, amount: u64) -> u64 {
        self.held += amount;
        self.period_id
    }

    /// Moves `amount` of a reservation from held to used. Does nothing if the period that admitted the
    /// request has ended.
    pub(super) fn mark_spent(&mut self, admitted_in: u64, amount: u64) {
        if admitted_in == self.period_id {
            self.held = self.held.saturating_sub(amount);
            self.used = self.used.saturating_add(amount);
        }
    }

    /// Replaces `reserved` by `spent`. `marked_spent` is the part of `reserved` that `mark_spent` has already moved
    /// to used.
    ///
    /// If the period that admitted the request has ended, only an overrun is charged: a refund would
    /// belong to the ended period.
    pub(super) fn settle(&mut self, admitted_in: u64, reserved: u64, marked_spent: u64, spent: u64) {
        if admitted_in == self.period_id {
            self.held = self.held.saturating_sub(reserved.saturating_sub(marked_spent));
            self.used = self.used.saturating_add(spent).saturating_sub(marked_spent);
        } else {
            self.used = self.used.saturating_add(spent.saturating_sub(reserved));
        }
    }

    /// Charges a request. Another copy of this counter holds the reservation.
    ///
    /// The period that admitted the request is charged all of `spent`. A later period is charged only the overrun.
    pub(super) fn charge_without_hold(&mut self, admitted_in: u64, reserved: u64, spent: u64) {
        let owed = if admitted_in == self.period_id { spent } else { spent.saturating_sub(reserved) };
        self.used = self.used.saturating_add(owed);
    }

    /// Changes the limit. Used and held amounts stay.
    pub(super) fn set_limit(&mut self, limit: u64) {
        self.limit = limit;
    }

    /// Changes the time zone. The used amount stays until the end of the current period in the new zone.
    pub(super) fn set_zone(&mut self, zone: &TimeZone, now: Timestamp) {
        if self.zone != *zone {
            self.zone = zone.clone();
            (self.start, self.end) = bounds(self.unit, zone, now);
        }
    }

    /// Charges an amount that an earlier quota has counted.
    pub(super) fn carry_over(&mut self, used: u64) {
        self.used = self.used.saturating_add(used);
    }

    /// Limits the used amount: debt beyond it is forgiven.
    pub(super) fn limit_used(&mut self, max: u64) {
        self.used = self.used.min(max);
    }

    /// Whether the period of a persisted counter has ended.
    pub(super) fn has_ended(persisted: &PersistedCounter, now: Timestamp) -> bool {
        persisted.until != Timestamp::default() && persisted.until <= now
    }

    /// Sets the used and the held amount.
    pub(super) fn begin_with(&mut self, used: u64, held: u64) {
        (self.used, self.held) = (used, held);
    }

    /// The identifier of the current period.
    pub(super) fn period_id(&self) -> u64 {
        self.period_id
    }

    /// Sets the used amount to 0; the held amount stays.
    pub(super) fn reset(&mut self) {
        self.used = 0;
    }

    /// The counter for the store.
    pub(super) fn to_persisted(&self) -> PersistedCounter {
        PersistedCounter {
            used: i64::try_from(self.used).unwrap_or(i64::MAX),
            level_fraction: 0,
            held: self.held,
            at: self.start,
            until: self.end,
            ..PersistedCounter::default()
        }
    }

    /// Continues from the counter that another process has persisted, if its period has not ended. The
    /// amount that it held counts as used, or stays held with `keeps_held`.
    pub(super) fn restore(&mut self, persisted: &PersistedCounter, keeps_held: bool, now: Timestamp) {
        (self.start, self.end) = bounds(self.unit, &self.zone, now);
        self.period_id = id_of(self.start);
        // A later start means that the clock was stepped back since. An overlap means that the time zone has
        // changed; the whole amount may have been used since the current period began.
        if persisted.at >= self.start || persisted.until > self.start {
            let (held, spent) = if keeps_held { (persisted.held, 0) } else { (0, persisted.held) };
            self.used = u64::try_from(persisted.used).unwrap_or(0).saturating_add(spent);
            self.held = held;
        }
    }

    /// Replaces the whole state by the one in Redis.
    pub(super) fn load(
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

    /// The whole state, which `load` accepts.
    pub fn state(&self) -> CounterState {
        let Self { limit, used, held, period_id, .. } = *self;
        CounterState::Calendar { limit, used, held, period: (self.start, self.end), period_id }
    }

    /// The available amount; below zero: debt.
    pub(super) fn level(&self) -> i64 {
        let signed = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        signed(self.limit).saturating_sub(signed(self.used)).saturating_sub(signed(self.held))
    }

    /// If nothing is left: the end of the period.
    pub(super) fn empty_until(&self) -> Option<Timestamp> {
        (self.level() < 1).then_some(self.end)
    }

    /// The amount held by requests in flight that this period admitted.
    pub(super) fn held(&self) -> u64 {
        self.held
    }

    /// The amount settled in this period.
    pub(super) fn used(&self) -> u64 {
        self.used
    }

    /// Start of the period.
    pub fn start(&self) -> Timestamp {
        self.start
    }

    /// End of the period, exclusive.
    pub fn end(&self) -> Timestamp {
        self.end
    }

    /// Milliseconds until the period ends.
    pub(super) fn remaining_ms(&self, now: Timestamp) -> u64 {
        self.end.ms_since(now)
    }
}

/// The identifier of a period by its start.
fn id_of(start: Timestamp) -> u64 {
    u64::try_from(start.0).unwrap_or(0)
}

/// Start and end of the calendar period that contains `now`.
///
/// The time zone library resolves hours that daylight saving time repeats or skips. A period never ends
/// before it begins.
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

/// `None` outside the years of the time zone library.
fn civil_bounds(unit: ClockUnit, zone: &TimeZone, now: Timestamp) -> Option<(Timestamp, Timestamp)> {
    let zoned = jiff::Timestamp::from_millisecond(now.0).ok()?.to_zoned_datetime(zone.clone());
    let (start, end) = match unit {
        // An hour is 3,600 seconds from its :00. When the clocks go back, the repeated hour counts as
        // two periods.
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

/// Fallback length in milliseconds for times outside the years -9999 to 9999 of the time zone library.
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
    fn periods_follow_the_time_zone() {
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
        assert_eq!(c.level(), 100, "a refund of an ended period is dropped");
        c.settle(second, 40, 0, 70);
        assert_eq!(c.level(), 70, "an overrun of an ended period is charged");
    }

    #[test]
    fn amounts_marked_spent_are_counted_once() {
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
        assert_eq!((c.level(), c.held(), c.used()), (95, 0, 5), "only the overrun is charged");
    }

    #[test]
    fn a_restored_period_keeps_used_amounts_until_it_ends() {
        let now = at("2026-03-04T10:00:00Z");
        let mut c = CalendarPeriod::new(100, ClockUnit::Day, TimeZone::UTC, now);
        let period_id = c.reserve(60);
        c.settle(period_id, 50, 0, 30);
        let persisted = c.to_persisted();
        for (restart, left) in
            [("2026-03-04T23:59:59Z", 60), ("2026-03-05T00:00:00Z", 100), ("2026-03-03T12:00:00Z", 60)]
        {
            let mut after = CalendarPeriod::new(100, ClockUnit::Day, TimeZone::UTC, at(restart));
            after.restore(&persisted, false, at(restart));
            assert_eq!(after.level(), left, "{restart}");
        }
    }

    #[test]
    fn a_changed_time_zone_keeps_used_amounts_of_the_current_period() {
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
                after_restart.restore(&c.to_persisted(), false, now);
                assert_eq!(after_restart.level(), 60, "{unit:?} {before:?} {after:?} {hour}");
                c.set_zone(after, now);
                assert_eq!((c.level(), c.held(), c.start()), (60, 10, after_restart.start()));
                c.settle(period_id, 10, 0, 10);
                c.roll(c.end);
                assert_eq!(c.level(), 100, "the next period starts at zero");
            }
        }
    }

    #[test]
    fn a_clock_stepped_back_grants_nothing_and_blocks_nothing() {
        let now = at("2026-03-04T12:30:30Z");
        let mut c = CalendarPeriod::new(100, ClockUnit::Minute, TimeZone::UTC, now);
        let admitted_in = c.reserve(100);
        c.settle(admitted_in, 50, 0, 50);
        let back = at("2026-03-03T12:30:10Z");
        c.roll(back);
        assert_eq!((c.level(), c.held()), (0, 50));
        c.settle(admitted_in, 50, 0, 40);
        assert_eq!((c.level(), c.held()), (10, 0), "the period is still the same");
        c.roll(back.plus_ms(50_000));
        assert_eq!(c.level(), 100);
    }
}
