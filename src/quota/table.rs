//! All quotas of one environment: a request is admitted by every one that it touches, or by none.

use super::{Amounts, CalendarPeriod, Kind, PersistedCounter, Quota, Required, Scope, TokenBucket, Window};
use crate::clock::Timestamp;
use smallvec::SmallVec;
use std::collections::HashMap;

/// A request that would fit but for those who stand before it is told to come back after this time (ms).
const MIN_WAIT_FOR_OTHERS_MS: u64 = 1_000;

/// When a request that does not fit now would fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Wait {
    /// In so many milliseconds.
    Ms(u64),
    /// Not before its limit is raised: it is larger than the whole quota.
    Never,
}

/// Who asks: decides which scopes are touched.
#[derive(Clone, Copy, Debug)]
pub struct Subject<'a> {
    /// Index of the caller in its environment; `None` in an open one.
    pub caller: Option<usize>,
    /// The model's name; empty where the request names none.
    pub model: &'a str,
}

/// The quotas of one environment with their counters.
#[derive(Clone, Debug)]
pub struct Quotas {
    cells: Vec<Cell>,
    scopes: Scopes,
    next_id: u32,
}

/// Which cells a request touches, by index: a thousand callers with quotas of their own cost a request
/// no more than one does.
#[derive(Clone, Debug, Default)]
struct Scopes {
    environment: Vec<u32>,
    callers: HashMap<usize, Vec<u32>>,
    models: Vec<u32>,
}

#[derive(Clone, Debug)]
struct Cell {
    /// Names the cell for receipts, also when quotas come and go around it.
    id: u32,
    quota: Quota,
    counter: Counter,
    /// Whether it has changed since it was last saved.
    is_dirty: bool,
}

#[derive(Clone, Debug)]
enum Counter {
    Rolling(TokenBucket),
    Calendar(CalendarPeriod),
}

/// What a request holds in each quota it touched. Handing it to `settle` is the only way back.
#[derive(Debug)]
#[must_use = "a receipt that is not settled holds its room for ever"]
pub struct Receipt {
    holds: SmallVec<[Hold; 8]>,
    reserved: Amounts,
    /// How much of that was counted as spent on the way.
    moved: Amounts,
}

#[derive(Clone, Copy, Debug)]
struct Hold {
    /// Where the cell stood; `id` tells whether it still does.
    index: u32,
    id: u32,
    /// Of a calendar quota: the turn that admitted the request.
    period_id: u64,
}

/// Why a request was denied: every quota that could not hold it, the one that takes longest first.
#[derive(Clone, Debug, PartialEq)]
pub struct Denied {
    shortfalls: Vec<Shortfall>,
}

/// One quota that could not hold a request.
#[derive(Clone, Debug, PartialEq)]
pub struct Shortfall {
    /// The quota.
    pub quota: Quota,
    /// Whole tokens or requests left, never negative.
    pub remaining: u64,
    /// Spent and not yet back.
    pub used: u64,
    /// Held by requests in flight.
    pub held: u64,
    /// What was asked.
    pub requested: u64,
    /// When the same request would fit.
    pub wait: Wait,
}

/// A quota and its counters, as the admin API shows them.
#[derive(Clone, Debug)]
pub struct QuotaLevel {
    /// The quota.
    pub quota: Quota,
    /// What is left; below zero: debt.
    pub level: i64,
    /// Held by requests in flight.
    pub held: u64,
    /// Spent and not yet back.
    pub used: u64,
    /// Milliseconds until what is spent is back.
    pub reset_ms: u64,
}

/// The counters of one quota as another engine has them: those of a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CounterState {
    /// A token bucket.
    Rolling {
        /// Tokens per period.
        limit: u64,
        /// Capacity.
        burst: u64,
        /// Whole tokens that are left, and 1/period of one.
        level: (i64, u64),
        /// Held by requests in flight.
        held: u64,
        /// When it was last refilled.
        at: Timestamp,
    },
    /// A period of the clock.
    Calendar {
        /// Tokens in the period.
        limit: u64,
        /// Settled in it.
        used: u64,
        /// Held by requests that it admitted.
        held: u64,
        /// From when to when.
        period: (Timestamp, Timestamp),
        /// Which of the periods since the cell was made.
        period_id: u64,
    },
}

/// What a caller is told of its quotas of one kind: of several scopes and periods the tightest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QuotaStatus {
    /// The quota's limit.
    pub limit: u64,
    /// Whole tokens or requests left, never negative.
    pub remaining: u64,
    /// Milliseconds until the quota is whole again.
    pub reset_ms: u64,
}

impl Quotas {
    /// Full quotas.
    pub fn new(quotas: &[Quota], now: Timestamp) -> Self {
        let mut all = Self { cells: Vec::new(), scopes: Scopes::default(), next_id: 0 };
        all.set_quotas(quotas, now);
        all
    }

    /// Other quotas from now on. Those that stay (same scope, kind, period and window) keep what was
    /// used and what is held; those that are gone are forgotten, new ones are full.
    pub fn set_quotas(&mut self, quotas: &[Quota], now: Timestamp) {
        let mut old = std::mem::take(&mut self.cells);
        for quota in quotas {
            let kept = old.iter().position(|cell| cell.quota.is_same_as(quota));
            self.cells.push(if let Some(at) = kept {
                let mut cell = old.swap_remove(at);
                cell.set_limit(quota.clone(), now);
                cell
            } else {
                self.next_id += 1;
                Cell::full(self.next_id, quota.clone(), now)
            });
        }
        self.scopes = Scopes::of(&self.cells);
    }

    /// Takes what is asked out of every quota the subject touches and holds it, or changes nothing.
    ///
    /// # Errors
    /// Lists every quota that cannot hold it.
    pub fn reserve(
        &mut self,
        now: Timestamp,
        subject: Subject<'_>,
        required: &Required,
    ) -> Result<Receipt, Denied> {
        let touched = self.applicable(subject);
        match self.shortfalls_of(now, &touched, required) {
            Some(denied) => Err(denied),
            None => Ok(self.take(&touched, required.amounts)),
        }
    }

    /// Why a request is denied that stands behind others: what does not fit, or else the quota with the
    /// least left of those that it touches, which those before it wait for. `None`: it touches none.
    pub fn denial_behind_queue(
        &mut self,
        now: Timestamp,
        subject: Subject<'_>,
        required: &Required,
    ) -> Option<Denied> {
        let touched = self.applicable(subject);
        self.shortfalls_of(now, &touched, required).or_else(|| {
            let cells = touched.iter().map(|&index| &self.cells[index as usize]);
            let tightest = cells.min_by_key(|cell| cell.level())?;
            let wait = Wait::Ms(MIN_WAIT_FOR_OTHERS_MS);
            let shortfall = tightest.shortfall(required.amounts.of(tightest.quota.kind), wait);
            Some(Denied { shortfalls: vec![shortfall] })
        })
    }

    /// Why a request would be denied; `None`: it fits. Takes nothing.
    pub fn denial(&mut self, now: Timestamp, subject: Subject<'_>, required: &Required) -> Option<Denied> {
        let touched = self.applicable(subject);
        self.shortfalls_of(now, &touched, required)
    }

    /// The touched quotas that cannot hold it now, all brought up to now; `None`: it fits.
    fn shortfalls_of(&mut self, now: Timestamp, touched: &[u32], required: &Required) -> Option<Denied> {
        let mut shortfalls = Vec::new();
        for &index in touched {
            let cell = &mut self.cells[index as usize];
            cell.advance(now);
            if let Err(wait) = cell.fits(now, required) {
                shortfalls.push(cell.shortfall(required.amounts.of(cell.quota.kind), wait));
            }
        }
        shortfalls.sort_by_key(|s| std::cmp::Reverse(s.wait));
        (!shortfalls.is_empty()).then_some(Denied { shortfalls })
    }

    /// Takes what is asked whether it fits or not: for quotas that only watch. What does not fit is debt.
    pub fn reserve_unchecked(
        &mut self,
        now: Timestamp,
        subject: Subject<'_>,
        required: &Required,
    ) -> Receipt {
        let touched = self.applicable(subject);
        for &index in &touched {
            self.cells[index as usize].advance(now);
        }
        self.take(&touched, required.amounts)
    }

    /// Takes more for a request that has outgrown what was reserved for it, from all quotas that it
    /// touches or from none. `None`: it does not fit.
    pub fn extend(&mut self, now: Timestamp, receipt: &Receipt, more: Amounts) -> Option<Receipt> {
        let touched = self.touched_by(now, receipt);
        let fits = |&index: &u32| {
            let cell = &self.cells[index as usize];
            let amount = more.of(cell.quota.kind);
            amount == 0 || cell.fits_amount(now, amount).is_ok()
        };
        touched.iter().all(fits).then(|| self.take(&touched, more))
    }

    /// The same whether it fits or not: it has been used already, and what does not fit is debt.
    pub fn extend_unchecked(&mut self, now: Timestamp, receipt: &Receipt, more: Amounts) -> Receipt {
        let touched = self.touched_by(now, receipt);
        self.take(&touched, more)
    }

    /// What is left of the quotas that a receipt touches, as they stand now.
    fn touched_by(&mut self, now: Timestamp, receipt: &Receipt) -> SmallVec<[u32; 8]> {
        let mut touched = SmallVec::new();
        for hold in &receipt.holds {
            let Some(index) = self.index_of(hold) else { continue };
            self.cells[index].advance(now);
            touched.push(u32::try_from(index).unwrap_or(u32::MAX));
        }
        touched
    }

    fn take(&mut self, touched: &[u32], amounts: Amounts) -> Receipt {
        let hold = |&index: &u32| {
            let cell = &mut self.cells[index as usize];
            let period_id = cell.reserve(amounts.of(cell.quota.kind));
            Hold { index, id: cell.id, period_id }
        };
        Receipt { holds: touched.iter().map(hold).collect(), reserved: amounts, moved: Amounts::default() }
    }

    /// Counts as spent what certainly is: it stays held no longer, so that one long answer does not
    /// lock a bucket for as long as it runs. `spent` is all that was spent so far.
    pub fn progress(&mut self, now: Timestamp, receipt: &mut Receipt, spent: Amounts) {
        let spent = spent.min(receipt.reserved);
        let more = spent.saturating_sub(receipt.moved);
        if more == Amounts::default() {
            return;
        }
        receipt.moved = receipt.moved.saturating_add(more);
        for hold in &receipt.holds {
            let Some(index) = self.index_of(hold) else { continue };
            let cell = &mut self.cells[index];
            cell.advance(now);
            let amount = more.of(cell.quota.kind);
            match &mut cell.counter {
                Counter::Rolling(bucket) => bucket.mark_spent(amount),
                Counter::Calendar(calendar) => calendar.mark_spent(hold.period_id, amount),
            }
            cell.is_dirty = true;
        }
    }

    /// Replaces what a receipt holds by what was spent, in every quota it touched.
    pub fn settle(&mut self, now: Timestamp, receipt: Receipt, spent: Amounts) {
        let Receipt { holds, reserved, moved } = receipt;
        for hold in holds {
            let Some(index) = self.index_of(&hold) else { continue };
            let cell = &mut self.cells[index];
            cell.advance(now);
            let kind = cell.quota.kind;
            let (reserved, moved, spent) = (reserved.of(kind), moved.of(kind), spent.of(kind));
            match &mut cell.counter {
                Counter::Rolling(bucket) => {
                    bucket.settle(reserved.saturating_sub(moved), spent.cast_signed() - moved.cast_signed());
                }
                Counter::Calendar(calendar) => calendar.settle(hold.period_id, reserved, moved, spent),
            }
            cell.is_dirty = true;
        }
    }

    /// What the subject is told of its quotas of each kind, in the order of `Kind::ALL`. Call it right
    /// after `reserve`: it does not look at the clock anew.
    pub fn status_by_kind(&self, now: Timestamp, subject: Subject<'_>) -> [Option<QuotaStatus>; 4] {
        let mut tightest: [Option<(i64, &Cell)>; 4] = [None; 4];
        for index in self.applicable(subject) {
            let cell = &self.cells[index as usize];
            let level = cell.level();
            let slot = &mut tightest[cell.quota.kind as usize];
            if slot.is_none_or(|(least, _)| level < least) {
                *slot = Some((level, cell));
            }
        }
        tightest.map(|found| found.map(|(level, cell)| cell.status(now, level)))
    }

    /// The largest completion that the smallest quota could ever hold beside a prompt of this size.
    pub fn largest_completion(&self, subject: Subject<'_>, prompt: u64) -> u64 {
        self.room_for_completion(subject, prompt, |cell| cell.quota.capacity())
    }

    /// The largest completion that every quota can hold now beside a prompt of this size.
    pub fn completion_that_fits(&mut self, now: Timestamp, subject: Subject<'_>, prompt: u64) -> u64 {
        for index in self.applicable(subject) {
            self.cells[index as usize].advance(now);
        }
        self.room_for_completion(subject, prompt, |cell| u64::try_from(cell.level()).unwrap_or(0))
    }

    fn room_for_completion(&self, subject: Subject<'_>, prompt: u64, room: impl Fn(&Cell) -> u64) -> u64 {
        let rooms = self.applicable(subject).into_iter().filter_map(|index| {
            let cell = &self.cells[index as usize];
            match cell.quota.kind {
                Kind::TotalTokens => Some(room(cell).saturating_sub(prompt)),
                Kind::CompletionTokens => Some(room(cell)),
                Kind::PromptTokens | Kind::Requests => None,
            }
        });
        rooms.min().unwrap_or(u64::MAX)
    }

    /// Makes every quota whole again, but for what is held.
    pub fn reset(&mut self, now: Timestamp) {
        for cell in &mut self.cells {
            cell.advance(now);
            match &mut cell.counter {
                Counter::Rolling(bucket) => bucket.reset(),
                Counter::Calendar(calendar) => calendar.reset(),
            }
            cell.is_dirty = true;
        }
    }

    /// What has changed since the last call: every such quota with what has to be kept of it.
    pub fn take_changes(&mut self, mut keep: impl FnMut(&Quota, PersistedCounter)) {
        for cell in self.cells.iter_mut().filter(|cell| cell.is_dirty) {
            cell.is_dirty = false;
            keep(&cell.quota, cell.saved());
        }
    }

    /// Takes over what another process has left of the quotas, as far as they are still the same.
    pub fn restore(&mut self, now: Timestamp, saved: impl Fn(&Quota) -> Option<PersistedCounter>) {
        for cell in &mut self.cells {
            let Some(saved) = saved(&cell.quota) else { continue };
            match &mut cell.counter {
                Counter::Rolling(bucket) => bucket.restore(&saved, now),
                Counter::Calendar(calendar) => calendar.restore(&saved, now),
            }
            cell.is_dirty = true;
        }
    }

    /// Whether what this subject reserves has to outlive the process: it touches a quota of an hour or more.
    pub fn need_durability(&self, subject: Subject<'_>) -> bool {
        self.applicable(subject).into_iter().any(|index| self.cells[index as usize].quota.is_durable())
    }

    /// Takes over how a cluster has it. The quota gets the limit that is in force there.
    pub fn load(&mut self, index: usize, state: &CounterState) {
        if let Some(cell) = self.cells.get_mut(index) {
            cell.load(state);
        }
    }

    /// How every quota stands, as another engine takes it up: the reverse of `load`.
    pub fn states(&mut self, now: Timestamp) -> Vec<CounterState> {
        self.cells.iter_mut().map(|cell| cell.state(now)).collect()
    }

    /// Those of the quotas at these places.
    pub fn states_of(&mut self, now: Timestamp, places: &[u32]) -> Vec<CounterState> {
        let mut state = |&index: &u32| Some(self.cells.get_mut(index as usize)?.state(now));
        places.iter().filter_map(&mut state).collect()
    }

    /// One node's part of `nodes`: of the limits, and of what is left. `held` is what this node's own requests hold of
    /// each quota. The parts of all nodes together are never more than the whole: what is odd is nobody's, so that
    /// a quota of fewer tokens than there are nodes admits nothing.
    pub fn reduce_to_share(&mut self, now: Timestamp, nodes: u64, held: &[u64]) {
        let nodes = nodes.max(1);
        for (cell, &held) in self.cells.iter_mut().zip(held) {
            let part = match cell.state(now) {
                CounterState::Rolling { limit, burst, level: (level, _), at, .. } => {
                    let (burst, level) = (burst / nodes, level.div_euclid(nodes.cast_signed()));
                    let level = level.min(burst.cast_signed().saturating_sub_unsigned(held));
                    CounterState::Rolling { limit: limit / nodes, burst, level: (level, 0), held, at }
                }
                CounterState::Calendar { limit, used, held: all, period, period_id } => {
                    let left = limit.saturating_sub(used).saturating_sub(all) / nodes;
                    let limit = limit / nodes;
                    let used = limit.saturating_sub(left).saturating_sub(held);
                    CounterState::Calendar { limit, used, held, period, period_id }
                }
            };
            cell.load(&part);
        }
    }

    /// Owes what a receipt of another copy of these quotas has spent; nothing was held for it here.
    pub fn charge_without_hold(&mut self, now: Timestamp, receipt: &Receipt, spent: Amounts) {
        for hold in &receipt.holds {
            let Some(index) = self.index_of(hold) else { continue };
            let cell = &mut self.cells[index];
            cell.advance(now);
            let kind = cell.quota.kind;
            let (reserved, spent) = (receipt.reserved.of(kind), spent.of(kind));
            match &mut cell.counter {
                Counter::Rolling(bucket) => bucket.settle(0, spent.cast_signed()),
                Counter::Calendar(calendar) => calendar.charge_without_hold(hold.period_id, reserved, spent),
            }
        }
    }

    /// The quotas that a request touches, by their place in the config's order.
    pub fn applicable(&self, subject: Subject<'_>) -> SmallVec<[u32; 8]> {
        let mut touched = SmallVec::from_slice(&self.scopes.environment);
        if let Some(of_caller) = subject.caller.and_then(|caller| self.scopes.callers.get(&caller)) {
            touched.extend_from_slice(of_caller);
        }
        let matches = |index: &u32| match &self.cells[*index as usize].quota.scope {
            Scope::Model(pattern) => pattern.matches(subject.model),
            Scope::Environment | Scope::Caller(..) => false,
        };
        touched.extend(self.scopes.models.iter().copied().filter(matches));
        touched
    }

    fn index_of(&self, hold: &Hold) -> Option<usize> {
        let hint = hold.index as usize;
        if self.cells.get(hint).is_some_and(|cell| cell.id == hold.id) {
            return Some(hint);
        }
        self.cells.iter().position(|cell| cell.id == hold.id)
    }

    /// Every quota with its counters, in the config's order.
    pub fn levels(&mut self, now: Timestamp) -> Vec<QuotaLevel> {
        self.cells.iter_mut().map(|cell| cell.to_level(now)).collect()
    }
}

impl Receipt {
    /// What was reserved in each quota of its kind.
    pub fn reserved(&self) -> Amounts {
        self.reserved
    }

    /// How much of that was counted as spent on the way.
    pub fn marked_spent(&self) -> Amounts {
        self.moved
    }

    /// Where it holds: the quotas by their place when it was made, each with the turn that admitted it.
    pub fn holds(&self) -> impl Iterator<Item = (u32, u64)> {
        self.holds.iter().map(|hold| (hold.index, hold.period_id))
    }

    /// Makes one of two that hold in the same quotas and periods, so that a stream that is extended a
    /// thousand times does not carry a thousand receipts. Gives the other one back where they have to stay
    /// apart: a period has turned between them, or a quota is gone.
    #[must_use = "a receipt that is not settled holds its room for ever"]
    pub fn merge(&mut self, other: Self) -> Option<Self> {
        if self.holds.len() != other.holds.len() || !self.holds.iter().zip(&other.holds).all(Hold::is_in) {
            return Some(other);
        }
        self.reserved = self.reserved.saturating_add(other.reserved);
        self.moved = self.moved.saturating_add(other.moved);
        None
    }
}

impl Hold {
    fn is_in((a, b): (&Self, &Self)) -> bool {
        (a.id, a.period_id) == (b.id, b.period_id)
    }
}

impl Shortfall {
    /// The least that the wait can come to: if all that others hold came back now.
    pub fn min_wait(&self) -> Wait {
        let Wait::Ms(ms) = self.wait else { return Wait::Never };
        if self.held == 0 {
            return self.wait;
        }
        // `used` is rounded up, so that one less may be missing than it seems.
        let missing = (self.requested.max(1) + self.used).saturating_sub(self.quota.capacity());
        let min_wait = match self.quota.window {
            Window::Rolling { .. } => {
                u128::from(missing.saturating_sub(1)) * u128::from(self.quota.per.ms)
                    / u128::from(self.quota.limit.max(1))
            }
            Window::Calendar { .. } if missing > 0 => u128::from(ms),
            Window::Calendar { .. } => 0,
        };
        Wait::Ms(u64::try_from(min_wait).unwrap_or(u64::MAX).min(ms))
    }
}

impl Scopes {
    fn of(cells: &[Cell]) -> Self {
        let mut scopes = Self::default();
        for (index, cell) in (0..).zip(cells) {
            match cell.quota.scope {
                Scope::Environment => scopes.environment.push(index),
                Scope::Caller(caller, _) => scopes.callers.entry(caller).or_default().push(index),
                Scope::Model(_) => scopes.models.push(index),
            }
        }
        scopes
    }
}

impl Denied {
    /// Every quota that could not hold the request, the one that takes longest first; never empty.
    pub fn shortfalls(&self) -> &[Shortfall] {
        &self.shortfalls
    }
}

impl Cell {
    fn full(id: u32, quota: Quota, now: Timestamp) -> Self {
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

    /// Takes the limit and the time zone of a quota that is otherwise the same.
    fn set_limit(&mut self, quota: Quota, now: Timestamp) {
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

    fn load(&mut self, state: &CounterState) {
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
            // Another kind of window: not the same quota.
            (Counter::Rolling(_), CounterState::Calendar { .. })
            | (Counter::Calendar(_), CounterState::Rolling { .. }) => {
                return;
            }
        }
        self.is_dirty = true;
    }

    fn state(&mut self, now: Timestamp) -> CounterState {
        self.advance(now);
        match &self.counter {
            Counter::Rolling(bucket) => bucket.state(),
            Counter::Calendar(calendar) => calendar.state(),
        }
    }

    fn advance(&mut self, now: Timestamp) {
        match &mut self.counter {
            Counter::Rolling(bucket) => bucket.refill(now),
            Counter::Calendar(calendar) => calendar.roll(now),
        }
    }

    fn fits(&self, now: Timestamp, required: &Required) -> Result<(), Wait> {
        if self.quota.kind == Kind::CompletionTokens && !required.generates {
            return Ok(());
        }
        self.fits_amount(now, required.amounts.of(self.quota.kind))
    }

    fn fits_amount(&self, now: Timestamp, amount: u64) -> Result<(), Wait> {
        match &self.counter {
            Counter::Rolling(bucket) => bucket.fits(amount),
            Counter::Calendar(calendar) => calendar.fits(amount, now),
        }
    }

    /// Returns the turn of a calendar quota.
    fn reserve(&mut self, amount: u64) -> u64 {
        self.is_dirty = true;
        match &mut self.counter {
            Counter::Rolling(bucket) => {
                bucket.reserve(amount);
                0
            }
            Counter::Calendar(calendar) => calendar.reserve(amount),
        }
    }

    fn saved(&self) -> PersistedCounter {
        match &self.counter {
            Counter::Rolling(bucket) => bucket.saved(),
            Counter::Calendar(calendar) => calendar.saved(),
        }
    }

    fn level(&self) -> i64 {
        match &self.counter {
            Counter::Rolling(bucket) => bucket.level(),
            Counter::Calendar(calendar) => calendar.level(),
        }
    }

    fn held_and_used(&self) -> (u64, u64) {
        match &self.counter {
            Counter::Rolling(bucket) => (bucket.held(), bucket.used()),
            Counter::Calendar(calendar) => (calendar.held(), calendar.used()),
        }
    }

    fn status(&self, now: Timestamp, level: i64) -> QuotaStatus {
        let reset_ms = match &self.counter {
            Counter::Rolling(bucket) => bucket.refill_ms(true),
            Counter::Calendar(calendar) => calendar.left_ms(now),
        };
        QuotaStatus { limit: self.quota.limit, remaining: u64::try_from(level).unwrap_or(0), reset_ms }
    }

    fn shortfall(&self, requested: u64, wait: Wait) -> Shortfall {
        let (held, used) = self.held_and_used();
        let remaining = u64::try_from(self.level()).unwrap_or(0);
        Shortfall { quota: self.quota.clone(), remaining, used, held, requested, wait }
    }

    fn to_level(&mut self, now: Timestamp) -> QuotaLevel {
        self.advance(now);
        let (held, used) = self.held_and_used();
        let reset_ms = match &self.counter {
            Counter::Rolling(bucket) => bucket.refill_ms(false),
            Counter::Calendar(calendar) => calendar.left_ms(now),
        };
        QuotaLevel { quota: self.quota.clone(), level: self.level(), held, used, reset_ms }
    }
}
