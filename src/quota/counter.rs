//! One quota together with its counter, for both kinds of window.

use super::receipt::Hold;
use super::{
    Amounts, CalendarPeriod, CounterState, Kind, PersistedCounter, Quota, QuotaLevel, QuotaStatus, Required,
    Shortfall, TokenBucket, Wait, Window,
};
use crate::clock::Timestamp;

/// One quota and its counter.
#[derive(Clone, Debug)]
pub(super) struct Cell {
    /// Identifies the cell in receipts, also after a reload has moved it.
    pub(super) id: u32,
    pub(super) quota: Quota,
    counter: Counter,
    /// Whether the counter has changed since `take_change` was called last.
    is_dirty: bool,
}

#[derive(Clone, Debug)]
enum Counter {
    Rolling(TokenBucket),
    Calendar(CalendarPeriod),
}

impl Cell {
    pub(super) fn full(id: u32, quota: Quota, now: Timestamp) -> Self {
        let counter = match &quota.window {
            Window::Rolling { burst } => {
                Counter::Rolling(TokenBucket::full(quota.limit, *burst, quota.per.ms, now))
            }
            Window::Calendar { unit, zone } => {
                Counter::Calendar(CalendarPeriod::new(quota.limit, *unit, zone.clone(), now))
            }
        };
        Self { id, quota, counter, is_dirty: true }
    }

    /// Replaces the quota by one that differs in limit, burst and time zone only. The counter stays.
    pub(super) fn set_quota(&mut self, quota: Quota, now: Timestamp) {
        match (&mut self.counter, &quota.window) {
            (Counter::Rolling(bucket), _) => bucket.set_limit(quota.limit, quota.capacity(), now),
            (Counter::Calendar(calendar), window) => {
                calendar.roll(now);
                calendar.set_limit(quota.limit);
                if let Window::Calendar { zone, .. } = window {
                    calendar.set_zone(zone, now);
                }
            }
        }
        self.quota = quota;
        self.is_dirty = true;
    }

    /// The cell of a quota that continues this one, after a change of the config. The used amount stays, up to the
    /// new limit.
    ///
    /// Requests in flight settle here if period and window are the same. Otherwise what they hold counts as used. `id`:
    /// the identifier of the cell in that case.
    pub(super) fn succeeded_by(&self, id: u32, quota: Quota, now: Timestamp) -> Self {
        let mut successor = self.clone();
        if self.quota.is_same_as(&quota) {
            let is_changed = self.quota.limit != quota.limit || self.quota.capacity() != quota.capacity();
            let max = quota.max_carried();
            successor.set_quota(quota, now);
            if is_changed {
                successor.limit_used(max);
            }
            return successor;
        }
        successor.advance(now);
        let (held, used) = successor.held_and_used();
        let carried = used.saturating_add(held).min(quota.max_carried());
        let mut successor = Self::full(id, quota, now);
        successor.carry_over(carried);
        successor
    }

    /// Continues from the counter that another process has persisted for an earlier quota.
    pub(super) fn restore_from(&mut self, earlier: &Quota, persisted: &PersistedCounter, now: Timestamp) {
        let max = self.quota.max_carried();
        if earlier.is_same_as(&self.quota) {
            self.restore(persisted, now);
            if earlier.limit != self.quota.limit {
                self.limit_used(max);
            }
            return;
        }
        let is_over =
            matches!(earlier.window, Window::Calendar { .. }) && CalendarPeriod::has_ended(persisted, now);
        if !is_over {
            let mut before = Self::full(0, earlier.clone(), now);
            before.restore(persisted, now);
            self.carry_over(before.held_and_used().1.min(max));
        }
    }

    fn carry_over(&mut self, used: u64) {
        match &mut self.counter {
            Counter::Rolling(bucket) => bucket.carry_over(used),
            Counter::Calendar(calendar) => calendar.carry_over(used),
        }
        self.is_dirty = true;
    }

    fn limit_used(&mut self, max: u64) {
        match &mut self.counter {
            Counter::Rolling(bucket) => bucket.limit_used(max),
            Counter::Calendar(calendar) => calendar.limit_used(max),
        }
        self.is_dirty = true;
    }

    /// Refills the bucket, or begins the next calendar period if the current one has ended.
    pub(super) fn advance(&mut self, now: Timestamp) {
        match &mut self.counter {
            Counter::Rolling(bucket) => bucket.refill(now),
            Counter::Calendar(calendar) => calendar.roll(now),
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
            Counter::Rolling(bucket) => bucket.fits(amount),
            Counter::Calendar(calendar) => calendar.fits(amount, now),
        }
    }

    /// Holds `amount`. Returns the period that admitted it, 0 for a rolling quota.
    pub(super) fn reserve(&mut self, amount: u64) -> u64 {
        self.is_dirty = true;
        match &mut self.counter {
            Counter::Rolling(bucket) => {
                bucket.reserve(amount);
                0
            }
            Counter::Calendar(calendar) => calendar.reserve(amount),
        }
    }

    /// Moves `amount` of a reservation from held to spent.
    pub(super) fn mark_spent(&mut self, hold: &Hold, amount: u64) {
        self.is_dirty = true;
        match &mut self.counter {
            Counter::Rolling(bucket) => bucket.mark_spent(amount),
            Counter::Calendar(calendar) => calendar.mark_spent(hold.period_id, amount),
        }
    }

    /// Replaces a reservation by the amounts spent. `marked_spent` is the part of `reserved` that `mark_spent` has
    /// already moved to spent.
    pub(super) fn settle(&mut self, hold: &Hold, reserved: Amounts, marked_spent: Amounts, spent: Amounts) {
        self.is_dirty = true;
        let kind = self.quota.kind;
        let (reserved, marked_spent, spent) = (reserved.of(kind), marked_spent.of(kind), spent.of(kind));
        match &mut self.counter {
            Counter::Rolling(bucket) => {
                let held = reserved.saturating_sub(marked_spent);
                bucket.settle(held, spent.cast_signed() - marked_spent.cast_signed());
            }
            Counter::Calendar(calendar) => calendar.settle(hold.period_id, reserved, marked_spent, spent),
        }
    }

    /// Charges the amounts spent by a request. Another copy of the counter holds the reservation.
    pub(super) fn charge_without_hold(&mut self, hold: &Hold, reserved: Amounts, spent: Amounts) {
        let (reserved, spent) = (reserved.of(self.quota.kind), spent.of(self.quota.kind));
        match &mut self.counter {
            Counter::Rolling(bucket) => bucket.settle(0, spent.cast_signed()),
            Counter::Calendar(calendar) => calendar.charge_without_hold(hold.period_id, reserved, spent),
        }
    }

    /// Makes the whole quota available again, except the held amounts.
    pub(super) fn reset(&mut self, now: Timestamp) {
        self.advance(now);
        match &mut self.counter {
            Counter::Rolling(bucket) => bucket.reset(),
            Counter::Calendar(calendar) => calendar.reset(),
        }
        self.is_dirty = true;
    }

    /// The counter for the store, if it has changed since the last call.
    pub(super) fn take_change(&mut self) -> Option<PersistedCounter> {
        std::mem::take(&mut self.is_dirty).then(|| match &self.counter {
            Counter::Rolling(bucket) => bucket.to_persisted(),
            Counter::Calendar(calendar) => calendar.to_persisted(),
        })
    }

    /// Continues from the counter that another process has persisted.
    fn restore(&mut self, persisted: &PersistedCounter, now: Timestamp) {
        match &mut self.counter {
            Counter::Rolling(bucket) => bucket.restore(persisted, now),
            Counter::Calendar(calendar) => calendar.restore(persisted, now),
        }
        self.is_dirty = true;
    }

    pub(super) fn state(&mut self, now: Timestamp) -> CounterState {
        self.advance(now);
        match &self.counter {
            Counter::Rolling(bucket) => bucket.state(),
            Counter::Calendar(calendar) => calendar.state(),
        }
    }

    /// Replaces the counter, and the limit and burst of the quota. A state of the other window is ignored:
    /// it does not belong to this quota.
    pub(super) fn load(&mut self, state: &CounterState) {
        match (&mut self.counter, *state) {
            (Counter::Rolling(bucket), CounterState::Rolling { limit, burst, level, held, at }) => {
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
            (Counter::Rolling(_), CounterState::Calendar { .. })
            | (Counter::Calendar(_), CounterState::Rolling { .. }) => return,
        }
        self.is_dirty = true;
    }

    /// Reduces the quota to one of `nodes` equal shares: of its limit, and of the available amount. `held`
    /// is the amount that the requests of this node hold.
    ///
    /// Divisions round down, so the shares of all nodes together never exceed the quota.
    pub(super) fn reduce_to_share(&mut self, now: Timestamp, nodes: u64, held: u64) {
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
        self.load(&share);
    }

    pub(super) fn level(&self) -> i64 {
        match &self.counter {
            Counter::Rolling(bucket) => bucket.level(),
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
        QuotaLevel { quota: self.quota.clone(), level: self.level(), held, used, reset_ms }
    }

    fn held_and_used(&self) -> (u64, u64) {
        match &self.counter {
            Counter::Rolling(bucket) => (bucket.held(), bucket.used()),
            Counter::Calendar(calendar) => (calendar.held(), calendar.used()),
        }
    }

    fn reset_ms(&self, now: Timestamp, includes_held: bool) -> u64 {
        match &self.counter {
            Counter::Rolling(bucket) => bucket.refill_ms(includes_held),
            Counter::Calendar(calendar) => calendar.remaining_ms(now),
        }
    }
}
