//! The oracle: an independent count of each quota.

use crate::random::{DAY, Random};
use jiff::tz::TimeZone;
use std::collections::HashMap;
use std::sync::{Arc, LazyLock};
use tollgate::glob::Glob;
use tollgate::quota::{Amounts, ClockUnit, Kind, Period, Quota, QuotaLevel, Scope, Subject, Window};

const CALLERS: u64 = 3;

pub(crate) fn quota(scope: Scope, kind: Kind, limit: u64, ms: u64, window: Window) -> Quota {
    Quota { scope, kind, limit, per: Period { text: format!("{ms}ms"), ms }, window }
}

/// The quotas of both walks.
pub(crate) fn quotas() -> Vec<Quota> {
    let rolling = |burst| Window::Rolling { burst };
    let calendar = |unit, zone: &str| Window::Calendar { unit, zone: TimeZone::get(zone).unwrap() };
    let day = calendar(ClockUnit::Day, "Europe/Berlin");
    let month = calendar(ClockUnit::Month, "America/New_York");
    let caller = |n: u64| Scope::Caller(name_of(n));
    let model = |pattern: &str| Scope::Model(Glob::new(pattern));
    vec![
        quota(Scope::Environment, Kind::TotalTokens, 60_000, 60_000, rolling(4_000)),
        quota(Scope::Environment, Kind::PromptTokens, 700, 1_000, rolling(900)),
        quota(Scope::Environment, Kind::CompletionTokens, 100_000, 3_600_000, rolling(100_000)),
        quota(Scope::Environment, Kind::Requests, 97, 60_000, rolling(50)),
        quota(Scope::Environment, Kind::TotalTokens, 900_000, DAY.cast_unsigned(), day),
        quota(caller(0), Kind::TotalTokens, 30_000, 60_000, rolling(2_000)),
        quota(caller(1), Kind::Requests, 7, 1_000, rolling(7)),
        quota(model("m-*"), Kind::CompletionTokens, 50_000, 60_000, rolling(3_000)),
        quota(model("m-1"), Kind::TotalTokens, 2_000_000, 30 * DAY.cast_unsigned(), month),
    ]
}

/// An independent count of one quota. It sums the held amounts from a list each time.
pub(crate) struct Recount {
    pub(crate) quota: Quota,
    /// Spent and not yet refilled; for a rolling quota, in units of 1/`period_ms` token.
    pub(crate) spent: i128,
    /// Time of the last `advance`.
    at: i64,
    /// For a calendar quota: number of the current period.
    period: u64,
    /// For a calendar quota: start and end of the current period.
    bounds: (i64, i64),
    /// For a rolling quota: the amount settled in the clock's period, and the start of that period.
    clock: (i128, i64),
    /// For a rolling quota: the last limit.
    rate: i128,
    /// The used amount that a lower limit has cut off, and until when it counts.
    excess: (i128, i64),
    /// Reservations in flight by number.
    pub(crate) open: HashMap<u64, HeldAmount>,
}

/// The name of a caller in the walks.
fn name_of(caller: u64) -> Arc<str> {
    format!("caller-{caller}").into()
}

/// Names of the models in the walks.
pub(crate) const MODELS: [&str; 3] = ["m-1", "m-2", "other"];

/// The caller and the model of a request, by index.
#[derive(Clone, Copy)]
pub(crate) struct Origin {
    pub(crate) caller: u64,
    /// Index into `MODELS`.
    pub(crate) model: usize,
}

impl Origin {
    pub(crate) fn random(random: &mut Random) -> Self {
        let model = |random: &mut Random| usize::try_from(random.below(MODELS.len() as u64)).unwrap();
        Self { caller: random.below(CALLERS), model: model(random) }
    }

    pub(crate) fn subject(self) -> Subject<'static> {
        static NAMES: LazyLock<Vec<Arc<str>>> = LazyLock::new(|| (0..CALLERS).map(name_of).collect());
        Subject { caller: NAMES.get(usize::try_from(self.caller).unwrap()), model: MODELS[self.model] }
    }
}

/// Start and end of the day or month that contains `now`.
fn bounds_of(quota: &Quota, now: i64) -> (i64, i64) {
    let Window::Calendar { unit, zone } = &quota.window else { return (0, 0) };
    let day = jiff::Timestamp::from_millisecond(now)
        .unwrap()
        .to_zoned_datetime(zone.clone())
        .start_of_day()
        .unwrap();
    let (start, span) = match unit {
        ClockUnit::Day => (day, jiff::Span::new().days(1)),
        ClockUnit::Month => (day.first_of_month().unwrap(), jiff::Span::new().months(1)),
        _ => panic!("{unit:?}"),
    };
    let end = start.checked_add(span).unwrap();
    (start.timestamp().as_millisecond(), end.timestamp().as_millisecond())
}

#[derive(Clone, Copy)]
pub(crate) struct HeldAmount {
    reserved: i128,
    marked_spent: i128,
    period: u64,
    /// The quota was unlimited at the admission.
    is_counted: bool,
}

impl Recount {
    pub(crate) fn new(quota: Quota, now: i64) -> Self {
        let bounds = bounds_of(&quota, now);
        let rate = i128::from(quota.limit);
        let (clock, excess) = ((0, now), (0, 0));
        Self { quota, spent: 0, at: now, period: 0, bounds, clock, rate, excess, open: HashMap::new() }
    }

    fn is_rolling(&self) -> bool {
        matches!(self.quota.window, Window::Rolling { .. })
    }

    pub(crate) fn scale(&self) -> i128 {
        if self.is_rolling() { i128::from(self.quota.per.ms) } else { 1 }
    }

    pub(crate) fn held(&self) -> i128 {
        let held = self.open.values().filter(|hold| !hold.is_counted);
        let now = held.filter(|hold| self.is_rolling() || hold.period == self.period);
        now.map(|hold| hold.reserved - hold.marked_spent).sum()
    }

    /// The available amount in units of 1/`scale`.
    pub(crate) fn left(&self) -> i128 {
        (i128::from(self.quota.capacity()) - self.held()) * self.scale() - self.spent
    }

    pub(crate) fn advance(&mut self, now: i64) {
        if self.is_rolling() {
            let back = self.rate * i128::from((now - self.at).max(0));
            self.spent = (self.spent - back).max(0).min(self.spent);
            let per = self.quota.per.ms.cast_signed();
            let start = now.div_euclid(per) * per;
            self.clock = (if start > self.clock.1 { 0 } else { self.clock.0 }, start);
        } else if !(self.bounds.0..self.bounds.1).contains(&now) {
            let before = std::mem::replace(&mut self.bounds, bounds_of(&self.quota, now));
            if self.bounds.0 > before.0 {
                self.period += 1;
                self.spent = 0;
            }
        }
        self.at = now;
    }

    pub(crate) fn applies_to(&self, Origin { caller, model }: Origin) -> bool {
        match &self.quota.scope {
            Scope::Caller(name) => *name == name_of(caller),
            Scope::Model(pattern) => {
                pattern.as_str() == MODELS[model] || model < 2 && pattern.as_str() == "m-*"
            }
            Scope::Environment | Scope::Upstream(_) => true,
            Scope::UpstreamModel(models) => model < 2 && models.pattern().as_str() == "m-*",
        }
    }

    pub(crate) fn hold(&mut self, id: u64, amounts: Amounts) {
        let reserved = i128::from(amounts.of(self.quota.kind));
        let is_counted = self.quota.is_unlimited();
        self.open.insert(id, HeldAmount { reserved, marked_spent: 0, period: self.period, is_counted });
    }

    /// An extension of the reservation `first`.
    pub(crate) fn hold_more(&mut self, first: u64, id: u64, amounts: Amounts) {
        let Some(&HeldAmount { is_counted, .. }) = self.open.get(&first) else { return };
        self.hold(id, amounts);
        self.open.entry(id).and_modify(|hold| hold.is_counted = is_counted);
    }

    /// Whether an extension of the reservation `first` fits.
    pub(crate) fn fits_more(&self, first: u64, amount: i128) -> bool {
        self.open.get(&first).is_none_or(|hold| hold.is_counted) || amount == 0 || self.fits(amount)
    }

    /// Changes limit and burst. The used amount counts, at most up to the new capacity. The rest counts when the limit is
    /// raised within a period. An unlimited quota counts by the clock.
    pub(crate) fn change(&mut self, quota: Quota) {
        let was_unlimited = self.quota.is_unlimited();
        let has_changed = (quota.limit, quota.capacity()) != (self.quota.limit, self.quota.capacity());
        self.quota = quota;
        if self.quota.is_unlimited() || !has_changed {
            return;
        }
        let scale = self.scale();
        if self.is_rolling() {
            self.rate = i128::from(self.quota.limit);
            let used = (self.spent + scale - 1).div_euclid(scale);
            if was_unlimited && self.clock.0 > used {
                self.spent += (self.clock.0 - used) * scale;
            }
        }
        let used = (self.spent + scale - 1).div_euclid(scale);
        let most = i128::from(self.quota.capacity());
        let excess = if self.at < self.excess.1 { self.excess.0 } else { 0 };
        self.excess = ((used + excess - most).max(0), self.at + self.quota.per.ms.cast_signed());
        if used > most {
            self.spent = most * scale;
        } else {
            self.spent += excess.min(most - used) * scale;
        }
    }

    pub(crate) fn reset(&mut self) {
        (self.spent, self.clock.0, self.excess.0) = (0, 0, 0);
    }

    pub(crate) fn fits(&self, amount: i128) -> bool {
        self.quota.is_unlimited()
            || amount <= i128::from(self.quota.capacity()) && self.left() >= amount.max(1) * self.scale()
    }

    pub(crate) fn settle(&mut self, id: u64, spent: i128) {
        let Some(hold) = self.open.remove(&id) else { return };
        if hold.is_counted {
            self.clock.0 += spent;
            if !self.is_rolling() || !self.quota.is_unlimited() {
                self.spent += spent * self.scale();
            }
            return;
        }
        if self.is_rolling() {
            self.clock.0 = (self.clock.0 + spent - hold.marked_spent).max(0);
            // A refund never exceeds the spent amount.
            self.spent = (self.spent + (spent - hold.marked_spent) * self.scale()).max(0);
        } else if hold.period == self.period {
            self.spent = (self.spent + spent - hold.marked_spent).max(0);
        } else {
            self.spent += (spent - hold.reserved).max(0);
        }
    }

    pub(crate) fn progress(&mut self, id: u64, spent: i128) {
        let (period, scale, rolling) = (self.period, self.scale(), self.is_rolling());
        let Some(hold) = self.open.get_mut(&id).filter(|hold| !hold.is_counted) else { return };
        let more = (spent.min(hold.reserved) - hold.marked_spent).max(0);
        hold.marked_spent += more;
        self.clock.0 += more;
        if rolling || hold.period == period {
            self.spent += more * scale;
        }
    }

    /// Simulates a crash of the process: held amounts count as spent, and are never settled.
    pub(crate) fn restart(&mut self) {
        self.clock.0 += self.held();
        self.spent += self.held() * self.scale();
        if self.quota.is_unlimited() && self.is_rolling() {
            self.spent = 0;
        }
        self.open.clear();
        self.period = 0;
    }
}

/// Checks the levels of the engine against the recounts.
pub(crate) fn compare(levels: &[QuotaLevel], recounts: &mut [Recount], now: i64) {
    assert_eq!(levels.len(), recounts.len());
    for (shown, r) in levels.iter().zip(recounts) {
        r.advance(now);
        let what = &r.quota;
        assert_eq!(shown.quota, *what);
        assert_eq!(i128::from(shown.held), r.held(), "held amount of {what:?}");
        if what.is_unlimited() {
            let used = if r.is_rolling() { r.clock.0 } else { r.spent };
            assert_eq!((shown.level, i128::from(shown.used)), (i64::MAX, used), "used amount of {what:?}");
            continue;
        }
        assert_eq!(i128::from(shown.level), r.left().div_euclid(r.scale()), "level of {what:?}");
        assert!(r.spent >= 0, "spent amount of {what:?}");
        assert!(shown.level.saturating_add_unsigned(shown.held) <= what.capacity() as i64);
    }
}
