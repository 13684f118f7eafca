//! One quota together with its counter, for both kinds of window.

use super::clock_count::ClockCount;
use super::exhaustion::Exhaustion;
use super::receipt::Hold;
use super::spending::Spending;
use super::{
    Amounts, CalendarPeriod, CounterState, Kind, PersistedCounter, Quota, QuotaLevel, QuotaStatus, Required,
    Shortfall, TokenBucket, UNLIMITED, Wait, Window,
};
use crate::clock::Timestamp;

/// One quota and its counter.
#[derive(Clone, Debug)]
pub(super) struct Cell {
    /// Identifies the cell in receipts, also after a reload has moved it.
    pub(super) id: u32,
    pub(super) quota: Quota,
    counter: Counter,
    /// Whether the config has the quota.
    pub(super) is_active: bool,
    /// Identifiers of earlier periods whose reservations the counter took over when its window changed. They count as
    /// admitted in the current period.
    taken_over: Vec<u64>,
    /// The used amount above the limit that a change has cut off, and until when it counts: once the limit is raised
    /// again.
    excess: Option<(u64, Timestamp)>,
    /// Amounts spent in the last minutes.
    spending: Spending,
    exhaustion: Exhaustion,
    /// Whether the counter has changed since `take_change` was called last.
    is_dirty: bool,
}

#[derive(Clone, Debug)]
enum Counter {
    /// The bucket decides while the quota has a limit. Otherwise it refills by the last limit, and the count is shown.
    Rolling(TokenBucket, ClockCount),
    Calendar(CalendarPeriod),
}

impl Cell {
    pub(super) fn full(id: u32, quota: Quota, now: Timestamp) -> Self {
        let counter = match &quota.window {
            Window::Rolling { burst } => {
                let (limit, burst) = if quota.is_unlimited() { (1, 0) } else { (quota.limit, *burst) };
                let bucket = TokenBucket::full(limit, burst, quota.per.ms, now);
                Counter::Rolling(bucket, ClockCount::new(quota.per.ms, now))
            }
            Window::Calendar { unit, zone } => {
                Counter::Calendar(CalendarPeriod::new(quota.limit, *unit, zone.clone(), now))
            }
        };
        Self {
            id,
            quota,
            counter,
            is_active: true,
            taken_over: Vec::new(),
            excess: None,
            spending: Spending::new(now),
            exhaustion: Exhaustion::new(now),
            is_dirty: true,
        }
    }

    /// Replaces the quota by one that differs in limit, burst and time zone only. The used amount stays, at most the new
    /// capacity.
    pub(super) fn set_quota(&mut self, quota: Quota, now: Timestamp) {
        self.advance(now);
        let was_unlimited = self.quota.is_unlimited();
        let has_changed = (self.quota.limit, self.quota.capacity()) != (quota.limit, quota.capacity());
        match (&mut self.counter, &quota.window) {
            (Counter::Rolling(..), _) if quota.is_unlimited() => {}
            (Counter::Rolling(bucket, _), _) => bucket.set_limit(quota.limit, quota.capacity(), now),
            (Counter::Calendar(calendar), window) => {
                calendar.set_limit(quota.limit);
                if let Window::Calendar { zone, .. } = window {
                    calendar.set_zone(zone, now);
                }
            }
        }
        self.quota = quota;
        self.is_dirty = true;
        if has_changed {
            self.exhaustion.on_room();
        }
        if was_unlimited {
            self.charge_clock_count();
        }
        if has_changed && !self.quota.is_unlimited() {
            self.fit_used(now);
        }
    }

    /// Raises the used amount of a bucket to the amount settled in the clock's period, if that is larger.
    fn charge_clock_count(&mut self) {
        if let Counter::Rolling(bucket, clock) = &mut self.counter
            && !self.quota.is_unlimited()
        {
            bucket.carry_over(clock.used().saturating_sub(bucket.used()));
        }
    }

    /// Limits the used amount to the capacity. The rest counts once the limit is raised within a period.
    pub(super) fn fit_used(&mut self, now: Timestamp) {
        let excess = self.excess_at(now);
        let (_, used) = self.held_and_used();
        let max = self.quota.max_carried();
        let left = used.saturating_add(excess).saturating_sub(max);
        self.excess = (left > 0).then(|| (left, now.plus_ms(self.quota.per.ms)));
        self.is_dirty = true;
        if used > max {
            self.limit_used(max);
        } else if excess > 0 {
            self.carry_over(excess.min(max - used));
        }
    }

    /// The amount above the limit that counts once the limit is raised.
    fn excess_at(&self, now: Timestamp) -> u64 {
        self.excess.filter(|(_, until)| now < *until).map_or(0, |(excess, _)| excess)
    }

    /// Continues from the counter that another process has persisted for the same quota. `keeps_held`: that process still
    /// serves the requests that hold amounts.
    pub(super) fn restore_own(
        &mut self,
        earlier: &Quota,
        persisted: &PersistedCounter,
        keeps_held: bool,
        now: Timestamp,
    ) {
        self.restore(persisted, keeps_held, now);
        if earlier.is_unlimited() {
            self.charge_clock_count();
        }
        if earlier.limit != self.quota.limit && !self.quota.is_unlimited() {
            self.fit_used(now);
        }
    }

    /// Takes over the used amount of another quota, which this one has replaced. Another process has persisted its counter.
    pub(super) fn replace(&mut self, earlier: &Quota, persisted: &PersistedCounter, now: Timestamp) {
        if matches!(earlier.window, Window::Calendar { .. }) && CalendarPeriod::has_ended(persisted, now) {
            return;
        }
        let mut before = Self::full(0, earlier.clone(), now);
        before.restore(persisted, false, now);
        self.advance(now);
        self.raise_used(before.carried(now).max(self.carried(now)), now);
    }

    fn carry_over(&mut self, used: u64) {
        match &mut self.counter {
            Counter::Rolling(bucket, _) => bucket.carry_over(used),
            Counter::Calendar(calendar) => calendar.carry_over(used),
        }
        self.is_dirty = true;
    }

    fn limit_used(&mut self, max: u64) {
        match &mut self.counter {
            Counter::Rolling(bucket, _) => bucket.limit_used(max),
            Counter::Calendar(calendar) => calendar.limit_used(max),
        }
        self.is_dirty = true;
    }

    /// Refills the bucket, or begins the next calendar period if the current one has ended.
    pub(super) fn advance(&mut self, now: Timestamp) {
        if !self.exhaustion.is_counted_to(now) {
            self.exhaustion.advance(now, self.empty_until());
        }
        match &mut self.counter {
            Counter::Rolling(bucket, clock) => {
                bucket.refill(now);
                clock.roll(now);
            }
            Counter::Calendar(calendar) => {
                if calendar.roll(now) {
                    self.taken_over.clear();
                }
            }
        }
    }

    /// The counter continues under a quota with another period or window. The used amount stays, at most the new
    /// capacity. Reservations stay held. Requires a preceding `advance`.
    pub(super) fn convert(&mut self, quota: Quota, now: Timestamp) {
        let (held, all) = self.held_and_used();
        let all = all.saturating_add(self.excess_at(now));
        let used = all.min(quota.max_carried());
        self.excess = Some((all - used, now.plus_ms(quota.per.ms)));
        if let Counter::Calendar(calendar) = &self.counter {
            self.taken_over.push(calendar.period_id());
        } else if !self.taken_over.contains(&0) {
            self.taken_over.push(0);
        }
        self.counter = Self::full(self.id, quota.clone(), now).counter;
        match &mut self.counter {
            Counter::Rolling(bucket, _) => bucket.begin_with(used, held),
            Counter::Calendar(calendar) => calendar.begin_with(used, held),
        }
        self.quota = quota;
        self.is_dirty = true;
    }

    /// A copy of a counter that another quota has taken over: nothing is held in it, and the held amount counts as used.
    pub(super) fn freeze(&mut self, id: u32) {
        let (held, used) = self.held_and_used();
        self.id = id;
        self.taken_over.clear();
        match &mut self.counter {
            Counter::Rolling(bucket, _) => bucket.begin_with(used.saturating_add(held), 0),
            Counter::Calendar(calendar) => calendar.begin_with(used.saturating_add(held), 0),
        }
        self.is_dirty = true;
    }

    /// Raises the used amount to `amount`, at most to the capacity, if it is less. Requires a preceding `advance`.
    pub(super) fn raise_used(&mut self, amount: u64, now: Timestamp) {
        let (held, used) = self.held_and_used();
        let committed = used.saturating_add(held);
        let raised = amount.min(self.quota.max_carried()).max(committed);
        self.excess = Some((amount.saturating_sub(raised), now.plus_ms(self.quota.per.ms)));
        self.is_dirty = true;
        if raised == committed {
            return;
        }
        let used = raised - held;
        match &mut self.counter {
            Counter::Rolling(bucket, _) => bucket.begin_with(used, held),
            Counter::Calendar(calendar) => calendar.begin_with(used, held),
        }
    }

    /// Used and held together, with the amount that a lower limit has cut off. Requires a preceding `advance`.
    pub(super) fn carried(&self, now: Timestamp) -> u64 {
        // Of an unlimited quota only the amount used while it had a limit: its own count is of another period.
        let used = match &self.counter {
            Counter::Rolling(bucket, _) => bucket.used().saturating_add(bucket.held()),
            Counter::Calendar(_) => self.committed(),
        };
        used.saturating_add(self.excess_at(now))
    }

    /// Used and held together. Requires a preceding `advance`.
    pub(super) fn committed(&self) -> u64 {
        let (held, used) = self.held_and_used();
        used.saturating_add(held)
    }

    /// The periods whose reservations count as admitted in the current one, the current one first. 0: no period.
    pub(super) fn periods(&self) -> Vec<u64> {
        let current = match &self.counter {
            Counter::Rolling(..) => 0,
            Counter::Calendar(calendar) => calendar.period_id(),
        };
        std::iter::once(current).chain(self.taken_over.iter().copied()).collect()
    }

    /// The amount held by requests in flight that the current period admitted.
    pub(super) fn held(&self) -> u64 {
        self.held_and_used().0
    }

    /// The period that admitted a reservation, as this counter knows it. `None`: a period that has ended.
    fn period_of(&self, hold: &Hold) -> Option<u64> {
        let is_taken_over = || self.taken_over.contains(&hold.period_id);
        match &self.counter {
            Counter::Rolling(..) => (hold.period_id == 0 || is_taken_over()).then_some(0),
            Counter::Calendar(calendar) if is_taken_over() => Some(calendar.period_id()),
            Counter::Calendar(_) => Some(hold.period_id),
        }
    }

    /// Whether the request fits now. Requires a preceding `advance`.
    pub(super) fn fits(&self, now: Timestamp, required: &Required) -> Result<(), Wait> {
        if self.quota.kind == Kind::CompletionTokens && !required.generates {
            return Ok(());
        }
        self.fits_amount(now, required.amounts.of(self.quota.kind))
    }

    pub(super) fn fits_amount(&self, now: Timestamp, amount: u64) -> Result<(), Wait> {
        match &self.counter {
            _ if self.quota.is_unlimited() => Ok(()),
            Counter::Rolling(bucket, _) => bucket.fits(amount),
            Counter::Calendar(calendar) => calendar.fits(amount, now),
        }
    }

    /// Holds `amount`. Returns the period that admitted it, 0 for a rolling quota.
    pub(super) fn reserve(&mut self, amount: u64) -> u64 {
        self.is_dirty = true;
        if amount > 0 {
            self.exhaustion.on_room();
        }
        match &mut self.counter {
            Counter::Rolling(bucket, _) => {
                bucket.reserve(amount);
                0
            }
            Counter::Calendar(calendar) => calendar.reserve(amount),
        }
    }

    /// Moves `amount` of a reservation from held to spent.
    pub(super) fn mark_spent(&mut self, now: Timestamp, hold: &Hold, amount: u64) {
        let Some(period_id) = self.period_of(hold) else { return };
        self.is_dirty = true;
        self.spending.add(now, amount);
        match &mut self.counter {
            Counter::Rolling(bucket, clock) => {
                bucket.mark_spent(amount);
                clock.add(amount.cast_signed());
            }
            Counter::Calendar(calendar) => calendar.mark_spent(period_id, amount),
        }
    }

    /// Replaces a reservation by the amounts spent. `marked_spent` is the part of `reserved` that `mark_spent` has
    /// already moved to spent.
    pub(super) fn settle(
        &mut self,
        now: Timestamp,
        hold: &Hold,
        reserved: Amounts,
        marked_spent: Amounts,
        spent: Amounts,
    ) {
        self.is_dirty = true;
        let kind = self.quota.kind;
        let (reserved, marked_spent, spent) = (reserved.of(kind), marked_spent.of(kind), spent.of(kind));
        self.spending.add(now, spent.saturating_sub(marked_spent));
        let period_id = self.period_of(hold);
        match &mut self.counter {
            // Its calendar period ended before the window changed: only an overrun is charged.
            Counter::Rolling(bucket, clock) if period_id.is_none() => {
                let owed = spent.saturating_sub(reserved).cast_signed();
                bucket.settle(0, owed);
                clock.add(owed);
            }
            Counter::Rolling(bucket, clock) => {
                let held = reserved.saturating_sub(marked_spent);
                let owed = spent.cast_signed() - marked_spent.cast_signed();
                bucket.settle(held, owed);
                clock.add(owed);
            }
            Counter::Calendar(calendar) => {
                calendar.settle(period_id.unwrap_or_default(), reserved, marked_spent, spent);
            }
        }
    }

    /// Counts what a request has spent that holds nothing here: the quota was unlimited when it was admitted.
    pub(super) fn count(&mut self, now: Timestamp, amount: u64) {
        if amount == 0 {
            return;
        }
        self.is_dirty = true;
        self.spending.add(now, amount);
        let is_unlimited = self.quota.is_unlimited();
        match &mut self.counter {
            Counter::Rolling(bucket, clock) => {
                clock.add(amount.cast_signed());
                if !is_unlimited {
                    bucket.settle(0, amount.cast_signed());
                }
            }
            Counter::Calendar(calendar) => calendar.carry_over(amount),
        }
    }

    /// The period in which a settled amount counts now. Requires a preceding `advance`.
    pub(super) fn count_period(&self) -> u64 {
        match &self.counter {
            Counter::Rolling(_, clock) => u64::try_from(clock.start().0).unwrap_or(0),
            Counter::Calendar(calendar) => calendar.period_id(),
        }
    }

    /// Charges the amounts spent by a request. Another copy of the counter holds the reservation.
    pub(super) fn charge_without_hold(&mut self, hold: &Hold, reserved: Amounts, spent: Amounts) {
        let (reserved, spent) = (reserved.of(self.quota.kind), spent.of(self.quota.kind));
        match &mut self.counter {
            Counter::Rolling(bucket, clock) => {
                bucket.settle(0, spent.cast_signed());
                clock.add(spent.cast_signed());
            }
            Counter::Calendar(calendar) => calendar.charge_without_hold(hold.period_id, reserved, spent),
        }
    }

    /// Makes the whole quota available again, except the held amounts.
    pub(super) fn reset(&mut self, now: Timestamp) {
        self.advance(now);
        match &mut self.counter {
            Counter::Rolling(bucket, clock) => {
                bucket.reset();
                clock.reset();
            }
            Counter::Calendar(calendar) => calendar.reset(),
        }
        self.excess = None;
        self.exhaustion.on_room();
        self.is_dirty = true;
    }

    /// The counter for the store, if it has changed since the last call.
    pub(super) fn take_change(&mut self) -> Option<PersistedCounter> {
        std::mem::take(&mut self.is_dirty).then(|| {
            let mut persisted = match &self.counter {
                Counter::Rolling(bucket, clock) => {
                    let mut persisted = bucket.to_persisted();
                    clock.persist(&mut persisted);
                    persisted
                }
                Counter::Calendar(calendar) => calendar.to_persisted(),
            };
            (persisted.excess, persisted.excess_until) = self.excess.unwrap_or_default();
            persisted.is_removed = !self.is_active;
            persisted
        })
    }

    /// Makes `take_change` return the counter.
    pub(super) fn mark_changed(&mut self) {
        self.is_dirty = true;
    }

    /// Continues from the counter that another process has persisted.
    pub(super) fn restore(&mut self, persisted: &PersistedCounter, keeps_held: bool, now: Timestamp) {
        let is_unlimited = self.quota.is_unlimited();
        match &mut self.counter {
            Counter::Rolling(bucket, clock) => {
                clock.restore(persisted, now);
                if !keeps_held {
                    clock.add(persisted.held.cast_signed());
                }
                if !is_unlimited {
                    bucket.restore(persisted, keeps_held, now);
                } else if keeps_held {
                    bucket.set_held(persisted.held);
                }
            }
            Counter::Calendar(calendar) => calendar.restore(persisted, keeps_held, now),
        }
        self.excess = (persisted.excess > 0).then_some((persisted.excess, persisted.excess_until));
        self.is_dirty = true;
    }

    pub(super) fn state(&mut self, now: Timestamp) -> CounterState {
        self.advance(now);
        match &self.counter {
            Counter::Rolling(bucket, clock) if self.quota.is_unlimited() => CounterState::Calendar {
                limit: UNLIMITED,
                used: clock.used(),
                held: bucket.held(),
                period: (clock.start(), clock.end()),
                period_id: self.count_period(),
            },
            Counter::Rolling(bucket, _) => bucket.state(),
            Counter::Calendar(calendar) => calendar.state(),
        }
    }

    /// Replaces the counter, and the limit and burst of the quota. An unlimited rolling quota has the state of a calendar
    /// period. Any other state of the other window is ignored: it does not belong to this quota.
    /// `is_repeated`: this state was loaded before.
    pub(super) fn load(&mut self, now: Timestamp, state: &CounterState, is_repeated: bool) {
        match (&mut self.counter, *state) {
            (
                Counter::Rolling(bucket, clock),
                CounterState::Calendar { limit: UNLIMITED, used, held, period, .. },
            ) => {
                bucket.set_held(held);
                clock.load(used, period.0);
                self.quota.set_limit(UNLIMITED, UNLIMITED);
            }
            (Counter::Rolling(bucket, _), CounterState::Rolling { limit, burst, level, held, at }) => {
                bucket.load(limit, burst, level, held, at);
                self.quota.set_limit(limit, burst);
            }
            (
                Counter::Calendar(calendar),
                CounterState::Calendar { limit, used, held, period, period_id },
            ) => {
                calendar.load(limit, used, held, period, period_id);
                self.quota.set_limit(limit, limit);
            }
            (Counter::Rolling(..), CounterState::Calendar { .. })
            | (Counter::Calendar(_), CounterState::Rolling { .. }) => return,
        }
        self.spending.load(now, state, self.quota.per.ms, is_repeated);
        self.is_dirty = true;
    }

    /// Reduces the quota to one of `nodes` equal shares: of its limit, and of the available amount. `held`
    /// is the amount that the requests of this node hold.
    ///
    /// Divisions round down, so the shares of all nodes together never exceed the quota.
    pub(super) fn reduce_to_share(&mut self, now: Timestamp, nodes: u64, held: u64) {
        if self.quota.is_unlimited() {
            return;
        }
        let share = match self.state(now) {
            CounterState::Rolling { limit, burst, level: (level, _), at, .. } => {
                let (burst, level) = (burst / nodes, level.div_euclid(nodes.cast_signed()));
                let level = level.min(burst.cast_signed().saturating_sub_unsigned(held));
                CounterState::Rolling { limit: limit / nodes, burst, level: (level, 0), held, at }
            }
            CounterState::Calendar { limit, used, held: held_by_all, period, period_id } => {
                let available = limit.saturating_sub(used).saturating_sub(held_by_all) / nodes;
                let limit = limit / nodes;
                let used = limit.saturating_sub(available).saturating_sub(held);
                CounterState::Calendar { limit, used, held, period, period_id }
            }
        };
        self.load(now, &share, true);
        self.spending.go_offline();
    }

    /// If nothing is left: when at least one token or request is available again, as far as that is known.
    fn empty_until(&self) -> Option<Timestamp> {
        match &self.counter {
            _ if self.quota.is_unlimited() => None,
            Counter::Rolling(bucket, _) => bucket.empty_until(),
            Counter::Calendar(calendar) => calendar.empty_until(),
        }
    }

    /// A request was refused because it does not fit. Requires a preceding `advance`.
    pub(super) fn on_refusal(&mut self, now: Timestamp, wait: Wait) {
        if let Wait::Ms(ms) = wait {
            self.exhaustion.on_refusal(now, ms);
        }
    }

    pub(super) fn level(&self) -> i64 {
        match &self.counter {
            _ if self.quota.is_unlimited() => i64::MAX,
            Counter::Rolling(bucket, _) => bucket.level(),
            Counter::Calendar(calendar) => calendar.level(),
        }
    }

    /// `level` is the result of `level()`, which the caller already has.
    pub(super) fn status(&self, now: Timestamp, level: i64) -> QuotaStatus {
        let remaining = u64::try_from(level).unwrap_or(0);
        QuotaStatus { limit: self.quota.limit, remaining, reset_ms: self.reset_ms(now, true) }
    }

    pub(super) fn shortfall(&self, requested: u64, wait: Wait) -> Shortfall {
        let (held, used) = self.held_and_used();
        let remaining = u64::try_from(self.level()).unwrap_or(0);
        Shortfall { quota: self.quota.clone(), remaining, used, held, requested, wait }
    }

    pub(super) fn quota_level(&mut self, now: Timestamp) -> QuotaLevel {
        self.advance(now);
        let (held, used) = self.held_and_used();
        let reset_ms = self.reset_ms(now, false);
        let (spent_recently, measured_ms) = (self.spending.recent(now), self.spending.measured_ms(now));
        QuotaLevel {
            quota: self.quota.clone(),
            level: self.level(),
            held,
            used,
            reset_ms,
            spent_recently,
            measured_ms,
            exhausted_ms: self.exhaustion.total_ms(),
        }
    }

    fn held_and_used(&self) -> (u64, u64) {
        match &self.counter {
            Counter::Rolling(bucket, clock) if self.quota.is_unlimited() => (bucket.held(), clock.used()),
            Counter::Rolling(bucket, _) => (bucket.held(), bucket.used()),
            Counter::Calendar(calendar) => (calendar.held(), calendar.used()),
        }
    }

    fn reset_ms(&self, now: Timestamp, includes_held: bool) -> u64 {
        match &self.counter {
            Counter::Rolling(_, clock) if self.quota.is_unlimited() => clock.end().ms_since(now),
            Counter::Rolling(bucket, _) => bucket.refill_ms(includes_held),
            Counter::Calendar(calendar) => calendar.remaining_ms(now),
        }
    }
}
