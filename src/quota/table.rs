//! All quotas of one environment or of one upstream. A request is admitted by every quota that applies to it, or by none.

use super::counter::Cell;
use super::receipt::{Hold, Receipt};
use super::succession::{Predecessors, predecessors};
use super::{
    Amounts, CounterState, Denied, Kind, PersistedCounter, Quota, QuotaLevel, QuotaStatus, Required, Scope,
    Takeover, Wait,
};
use crate::clock::Timestamp;
use foldhash::HashMap;
use smallvec::{Array, SmallVec};
use std::sync::Arc;

/// Retry delay for a request that would fit, but has to wait behind queued requests (ms).
const MIN_WAIT_BEHIND_QUEUE_MS: u64 = 1_000;

/// The origin of a request. It decides which quotas apply.
#[derive(Clone, Copy, Debug)]
pub struct Subject<'a> {
    /// The caller's name; `None` in an environment without keys.
    pub caller: Option<&'a Arc<str>>,
    /// Name of the model; empty if the request names none.
    pub model: &'a str,
}

/// The quotas of one environment or of one upstream with their counters.
#[derive(Clone, Debug)]
pub struct Quotas {
    /// Also those of quotas that the config no longer has. A cell never changes its index.
    pub(super) cells: Vec<Cell>,
    /// The indices of the active cells, in the order of the config.
    pub(super) order: Vec<usize>,
    /// The active cells with a limit.
    limited: ScopeIndex,
    /// The active cells that only count.
    unlimited: ScopeIndex,
    last_id: u32,
}

/// Indices of the cells that may apply to a request. A request costs the same with one caller quota as
/// with a thousand.
#[derive(Clone, Debug, Default)]
struct ScopeIndex {
    /// The cells that apply to every request.
    all: Vec<u32>,
    callers: HashMap<Arc<str>, Vec<u32>>,
    models: Vec<u32>,
}

/// The quotas that apply to one request, as indices of cells. They stay the same until the quotas are changed, so they are
/// found once for all steps of an admission.
#[derive(Clone, Debug, Default)]
pub struct Applicable {
    /// Those that decide on the request.
    limited: SmallVec<[u32; 16]>,
    /// Those that only count it.
    unlimited: SmallVec<[u32; 4]>,
}

impl Applicable {
    /// The quotas that decide on the request.
    pub fn limited(&self) -> &[u32] {
        &self.limited
    }
}

/// What the store must change after [`Quotas::restore`].
#[derive(Debug, Default)]
pub struct Restored {
    /// The persisted quotas that others have replaced. Their counters are not needed any more.
    pub replaced: Vec<Quota>,
    /// The counters of quotas that the config does not have any more.
    pub removed: Vec<(Quota, PersistedCounter)>,
}

/// Configuration.
impl Quotas {
    /// Creates quotas of which nothing is spent or held.
    pub fn new(quotas: &[Quota], now: Timestamp) -> Self {
        let mut all = Self {
            cells: Vec::new(),
            order: Vec::new(),
            limited: ScopeIndex::default(),
            unlimited: ScopeIndex::default(),
            last_id: 0,
        };
        all.reconfigure(quotas, now, Takeover::InPlace, |_| None);
        all
    }

    /// Changes limit, burst and time zone of the quota of each cell, in the order of the cells. Counters stay. Like the
    /// script of Redis, this advances all cells: after a step back of the clock, amounts depend on when that happens.
    pub fn set_limits(&mut self, quotas: &[Quota], now: Timestamp) {
        self.cells.iter_mut().for_each(|cell| cell.advance(now));
        for (cell, quota) in self.cells.iter_mut().zip(quotas).filter(|(cell, quota)| cell.quota != **quota) {
            cell.set_quota(quota.clone(), now);
        }
        self.rebuild_index();
    }

    /// The quota of each cell, and whether the config has it.
    pub fn cells(&self) -> impl Iterator<Item = (&Quota, bool)> {
        self.cells.iter().map(|cell| (&cell.quota, cell.is_active))
    }

    pub(super) fn next_id(&mut self) -> u32 {
        self.last_id += 1;
        self.last_id
    }

    pub(super) fn rebuild_index(&mut self) {
        self.limited = ScopeIndex::of(&self.cells, |quota| !quota.is_unlimited());
        self.unlimited = ScopeIndex::of(&self.cells, Quota::is_unlimited);
    }

    /// The quotas that apply to a request.
    pub fn applicable(&self, subject: Subject<'_>) -> Applicable {
        Applicable {
            limited: self.limited.find(&self.cells, subject),
            unlimited: self.unlimited.find(&self.cells, subject),
        }
    }

    /// Whether reservations must survive a crash: a quota of an hour or longer applies.
    pub fn need_durability(&self, applicable: &Applicable) -> bool {
        applicable.limited.iter().any(|&index| self.cells[index as usize].quota.is_durable())
    }
}

/// Admission.
impl Quotas {
    /// Reserves the required amounts in every quota that applies, or changes nothing.
    ///
    /// # Errors
    /// Lists all quotas that cannot hold the request.
    pub fn reserve(
        &mut self,
        now: Timestamp,
        applicable: &Applicable,
        required: &Required,
    ) -> Result<Receipt, Denied> {
        match self.denial(now, applicable, required) {
            Some(denied) => Err(denied),
            None => Ok(self.take(applicable, required.amounts)),
        }
    }

    /// Reserves the required amounts even if they do not fit. The excess becomes debt. Shadow mode uses this
    /// function.
    pub fn reserve_unchecked(
        &mut self,
        now: Timestamp,
        applicable: &Applicable,
        required: &Required,
    ) -> Receipt {
        for &index in &applicable.limited {
            self.cells[index as usize].advance(now);
        }
        self.take(applicable, required.amounts)
    }

    /// Advances the applicable quotas to `now`. Returns why `reserve` would deny the request, `None` if it would admit it.
    /// Reserves nothing.
    pub fn denial(&mut self, now: Timestamp, applicable: &Applicable, required: &Required) -> Option<Denied> {
        let mut shortfalls = Vec::new();
        for &index in &applicable.limited {
            let cell = &mut self.cells[index as usize];
            cell.advance(now);
            if let Err(wait) = cell.fits(now, required) {
                shortfalls.push(cell.shortfall(required.amounts.of(cell.quota.kind), wait));
            }
        }
        Denied::new(now, required, shortfalls)
    }

    /// Returns the denial of a request that must wait behind queued requests. If the request itself fits, the
    /// denial names the applicable quota with the lowest level, because the queued requests wait for that quota.
    /// `None` if no quota applies.
    pub fn denial_behind_queue(
        &mut self,
        now: Timestamp,
        applicable: &Applicable,
        required: &Required,
    ) -> Option<Denied> {
        self.denial(now, applicable, required).or_else(|| {
            let cells = applicable.limited.iter().map(|&index| &self.cells[index as usize]);
            let tightest = cells.min_by_key(|cell| cell.level())?;
            let wait = Wait::Ms(MIN_WAIT_BEHIND_QUEUE_MS);
            let shortfall = tightest.shortfall(required.amounts.of(tightest.quota.kind), wait);
            Denied::new(now, required, vec![shortfall])
        })
    }

    /// Records that a request was refused, in the quotas that had no room for it.
    pub fn record_refusal(&mut self, now: Timestamp, subject: Subject<'_>, denied: &Denied) {
        for index in self.applicable(subject).limited {
            let cell = &mut self.cells[index as usize];
            let short = denied.shortfalls().iter().find(|short| short.quota.is_same_as(&cell.quota));
            if let Some(short) = short {
                cell.advance(now);
                cell.on_refusal(now, short.wait);
            }
        }
    }

    /// Holds amounts in the limited quotas. The unlimited ones hold nothing.
    fn take(&mut self, applicable: &Applicable, amounts: Amounts) -> Receipt {
        let Applicable { limited, unlimited } = applicable;
        let mut holds = SmallVec::with_capacity(limited.len() + unlimited.len());
        for &index in limited {
            let cell = &mut self.cells[index as usize];
            let period_id = cell.reserve(amounts.of(cell.quota.kind));
            holds.push(Hold { index, id: cell.id, period_id });
        }
        for &index in unlimited {
            holds.push(Hold { index, id: self.cells[index as usize].id, period_id: 0 });
        }
        Receipt { holds, holding: limited.len(), reserved: amounts, marked_spent: Amounts::default() }
    }

    /// The largest completion that fits together with a prompt of this size if nothing is spent or held, in tokens.
    /// `u64::MAX` if no quota counts completion tokens.
    pub fn largest_completion(&self, applicable: &Applicable, prompt: u64) -> u64 {
        self.room_for_completion(applicable, prompt, |cell| cell.quota.capacity())
    }

    /// The largest completion that fits together with a prompt of this size now, in tokens. `u64::MAX` if no quota
    /// counts completion tokens.
    pub fn completion_that_fits(&mut self, now: Timestamp, applicable: &Applicable, prompt: u64) -> u64 {
        for &index in &applicable.limited {
            self.cells[index as usize].advance(now);
        }
        self.room_for_completion(applicable, prompt, |cell| u64::try_from(cell.level()).unwrap_or(0))
    }

    fn room_for_completion(&self, applicable: &Applicable, prompt: u64, room: impl Fn(&Cell) -> u64) -> u64 {
        let rooms = applicable.limited.iter().filter_map(|&index| {
            let cell = &self.cells[index as usize];
            match cell.quota.kind {
                Kind::TotalTokens => Some(room(cell).saturating_sub(prompt)),
                Kind::CompletionTokens => Some(room(cell)),
                Kind::PromptTokens | Kind::Requests => None,
            }
        });
        rooms.min().unwrap_or(u64::MAX)
    }

    /// The tightest applicable quota of each kind, in the order of `Kind::ALL`. Call it right after
    /// `reserve`: it does not refill the quotas.
    pub fn status_by_kind(&self, now: Timestamp, applicable: &Applicable) -> [Option<QuotaStatus>; 4] {
        let mut tightest: [Option<(i64, &Cell)>; 4] = [None; 4];
        for &index in &applicable.limited {
            let cell = &self.cells[index as usize];
            let level = cell.level();
            let slot = &mut tightest[cell.quota.kind as usize];
            if slot.is_none_or(|(lowest, _)| level < lowest) {
                *slot = Some((level, cell));
            }
        }
        tightest.map(|found| found.map(|(level, cell)| cell.status(now, level)))
    }
}

/// Reservations in flight.
impl Quotas {
    /// Reserves more for a request that has outgrown its reservation: in every quota of the receipt, or in
    /// none. `None` if it does not fit.
    pub fn extend(&mut self, now: Timestamp, receipt: &Receipt, more: Amounts) -> Option<Receipt> {
        let applicable = self.advance_quotas_of(now, receipt);
        self.has_room_for(now, &applicable, more).then(|| self.take(&applicable, more))
    }

    /// Whether `extend` would reserve more.
    pub fn can_extend(&mut self, now: Timestamp, receipt: &Receipt, more: Amounts) -> bool {
        let applicable = self.advance_quotas_of(now, receipt);
        self.has_room_for(now, &applicable, more)
    }

    fn has_room_for(&self, now: Timestamp, applicable: &Applicable, more: Amounts) -> bool {
        applicable.limited.iter().all(|&index| {
            let cell = &self.cells[index as usize];
            let amount = more.of(cell.quota.kind);
            amount == 0 || cell.fits_amount(now, amount).is_ok()
        })
    }

    /// Reserves more even if it does not fit, because the request has already used it. The excess becomes
    /// debt.
    pub fn extend_unchecked(&mut self, now: Timestamp, receipt: &Receipt, more: Amounts) -> Receipt {
        let applicable = self.advance_quotas_of(now, receipt);
        self.take(&applicable, more)
    }

    /// Advances the quotas in which a receipt holds amounts to `now`. Returns the quotas of the receipt that the config
    /// still has.
    fn advance_quotas_of(&mut self, now: Timestamp, receipt: &Receipt) -> Applicable {
        let active_index =
            |quotas: &Self, hold: &Hold| quotas.index_of(hold).filter(|&index| quotas.cells[index].is_active);
        let mut applicable = Applicable::default();
        for hold in receipt.limited_holds() {
            let Some(index) = active_index(self, hold) else { continue };
            self.cells[index].advance(now);
            applicable.limited.push(u32::try_from(index).unwrap_or(u32::MAX));
        }
        let counting = receipt.counted_holds().iter().filter_map(|hold| active_index(self, hold));
        applicable.unlimited.extend(counting.map(|index| u32::try_from(index).unwrap_or(u32::MAX)));
        applicable
    }

    /// Marks amounts of a reservation as spent while the answer is streaming. They refill from now on, so that one
    /// long answer does not block a bucket until its end. `spent` is the sum so far, not the increase.
    pub fn progress(&mut self, now: Timestamp, receipt: &mut Receipt, spent: Amounts) {
        let more = receipt.mark_spent(spent);
        if more == Amounts::default() {
            return;
        }
        for hold in receipt.limited_holds() {
            let Some(index) = self.index_of(hold) else { continue };
            let cell = &mut self.cells[index];
            cell.advance(now);
            cell.mark_spent(now, hold, more.of(cell.quota.kind));
        }
    }

    /// Replaces the reservation by the amounts spent, in every quota of the receipt.
    #[allow(clippy::needless_pass_by_value)] // a settled receipt no longer exists
    pub fn settle(&mut self, now: Timestamp, receipt: Receipt, spent: Amounts) {
        for hold in receipt.limited_holds() {
            let Some(index) = self.index_of(hold) else { continue };
            let cell = &mut self.cells[index];
            cell.advance(now);
            cell.settle(now, hold, receipt.reserved, receipt.marked_spent, spent);
        }
        for hold in receipt.counted_holds() {
            let Some(index) = self.index_of(hold) else { continue };
            let cell = &mut self.cells[index];
            cell.advance(now);
            cell.count(now, spent.of(cell.quota.kind));
        }
    }

    /// What a settled receipt adds to the quotas that were unlimited at its admission: the index of each, its period, and
    /// the amount.
    pub fn counted(&mut self, now: Timestamp, receipt: &Receipt, spent: Amounts) -> Vec<(u32, u64, u64)> {
        let count = |hold: &Hold| {
            let index = self.index_of(hold)?;
            let cell = &mut self.cells[index];
            cell.advance(now);
            let amount = spent.of(cell.quota.kind);
            (amount > 0).then(|| (u32::try_from(index).unwrap_or(u32::MAX), cell.count_period(), amount))
        };
        receipt.counted_holds().iter().filter_map(count).collect()
    }

    /// Charges the amounts spent by a request where it holds amounts. Another copy of these quotas holds the reservation.
    pub fn charge_without_hold(&mut self, now: Timestamp, receipt: &Receipt, spent: Amounts) {
        for hold in receipt.limited_holds() {
            let Some(index) = self.index_of(hold) else { continue };
            let cell = &mut self.cells[index];
            cell.advance(now);
            cell.charge_without_hold(hold, receipt.reserved, spent);
        }
    }

    /// The current index of a hold's cell; `None` if the quota was removed.
    fn index_of(&self, hold: &Hold) -> Option<usize> {
        let hint = hold.index as usize;
        if self.cells.get(hint).is_some_and(|cell| cell.id == hold.id) {
            return Some(hint);
        }
        self.cells.iter().position(|cell| cell.id == hold.id)
    }
}

/// State for the store, other nodes and the admin API.
impl Quotas {
    /// Makes every quota available again, except the held amounts.
    pub fn reset(&mut self, now: Timestamp) {
        self.cells.iter_mut().for_each(|cell| cell.reset(now));
    }

    /// Makes the quota at this index available again, except the held amount.
    pub fn reset_one(&mut self, index: usize, now: Timestamp) {
        if let Some(cell) = self.cells.get_mut(index) {
            cell.reset(now);
        }
    }

    /// Passes every counter that has changed since the last call to `persist`.
    pub fn take_changes(&mut self, mut persist: impl FnMut(&Quota, PersistedCounter)) {
        for cell in &mut self.cells {
            if let Some(counter) = cell.take_change() {
                persist(&cell.quota, counter);
            }
        }
    }

    /// Continues from the counters that another process has persisted, with the quotas that it had. Each quota
    /// continues those that [`predecessors`] finds. `keeps_held`: whether the other process still serves the requests that
    /// hold amounts in a quota.
    pub fn restore(
        &mut self,
        now: Timestamp,
        persisted: &[(Quota, PersistedCounter)],
        keeps_held: impl Fn(&Quota) -> bool,
    ) -> Restored {
        let quotas: Vec<Quota> = self.cells.iter().map(|cell| cell.quota.clone()).collect();
        let found = predecessors(persisted, &quotas);
        for (cell, &Predecessors { own, replaced }) in self.cells.iter_mut().zip(&found) {
            if let Some((quota, counter)) = own.map(|at| &persisted[at]) {
                cell.restore_own(quota, counter, keeps_held(quota), now);
            }
            if let Some((quota, counter)) = replaced.map(|at| &persisted[at]) {
                cell.replace(quota, counter, now);
            }
        }
        let is = |at: usize, of: fn(&Predecessors) -> Option<usize>| found.iter().any(|f| of(f) == Some(at));
        let mut restored = Restored::default();
        for (at, (quota, counter)) in persisted.iter().enumerate().filter(|(at, _)| !is(*at, |f| f.own)) {
            if is(at, |f| f.replaced) {
                restored.replaced.push(quota.clone());
            } else if !counter.is_removed {
                restored.removed.push((quota.clone(), PersistedCounter { is_removed: true, ..*counter }));
            }
        }
        restored
    }

    /// Counts what requests held that a crash has interrupted, in the unlimited quotas that count every request. Call it
    /// after `restore`.
    pub fn count_interrupted(
        &mut self,
        now: Timestamp,
        persisted: &[(Quota, PersistedCounter)],
        held: Amounts,
    ) {
        let counts_all =
            |cell: &&mut Cell| matches!(cell.quota.scope, Scope::Environment | Scope::Upstream(_));
        for cell in self.cells.iter_mut().filter(counts_all) {
            let is_same = |quota: &Quota| quota.is_unlimited() && quota.is_same_as(&cell.quota);
            if cell.quota.is_unlimited() && persisted.iter().any(|(quota, _)| is_same(quota)) {
                cell.advance(now);
                cell.count(now, held.of(cell.quota.kind));
            }
        }
    }

    /// Replaces the counter of the quota at this index, and its limit and burst, by the state in Redis.
    pub fn load(&mut self, now: Timestamp, index: usize, state: &CounterState) {
        self.load_with(now, index, state, false);
    }

    /// Restores a state that `load` has loaded before.
    pub fn load_again(&mut self, now: Timestamp, index: usize, state: &CounterState) {
        self.load_with(now, index, state, true);
    }

    fn load_with(&mut self, now: Timestamp, index: usize, state: &CounterState, is_repeated: bool) {
        let Some(cell) = self.cells.get_mut(index) else { return };
        let was_unlimited = cell.quota.is_unlimited();
        cell.load(now, state, is_repeated);
        if cell.quota.is_unlimited() != was_unlimited {
            self.rebuild_index();
        }
    }

    /// The states of all quotas, which `load` accepts.
    pub fn states(&mut self, now: Timestamp) -> Vec<CounterState> {
        self.cells.iter_mut().map(|cell| cell.state(now)).collect()
    }

    /// The states of the quotas at these indices.
    pub fn states_of(&mut self, now: Timestamp, indices: &[u32]) -> Vec<CounterState> {
        let mut state = |&index: &u32| Some(self.cells.get_mut(index as usize)?.state(now));
        indices.iter().filter_map(&mut state).collect()
    }

    /// Reduces every quota to the share of one node among `nodes`: of its limit, and of the available amount.
    /// `held` is the amount that this node's own requests hold, by quota.
    ///
    /// The shares of all nodes together never exceed the quota. A quota of fewer tokens than there are
    /// nodes admits nothing.
    pub fn reduce_to_share(&mut self, now: Timestamp, nodes: u64, held: &[u64]) {
        for (cell, &held) in self.cells.iter_mut().zip(held) {
            cell.reduce_to_share(now, nodes.max(1), held);
        }
    }

    /// The quotas that apply to a request, with their counters, in the order of the config.
    pub fn levels_of(&mut self, now: Timestamp, applicable: &Applicable) -> Vec<QuotaLevel> {
        let order: Vec<usize> = self
            .order
            .iter()
            .copied()
            .filter(|&at| applicable.limited.iter().any(|&index| index as usize == at))
            .collect();
        order.into_iter().map(|at| self.cells[at].quota_level(now)).collect()
    }

    /// Every cell with its counter, in the order of the cells.
    pub fn cell_levels(&mut self, now: Timestamp) -> Vec<QuotaLevel> {
        self.cells.iter_mut().map(|cell| cell.quota_level(now)).collect()
    }

    /// Every quota with its counter, in the order of the config.
    pub fn levels(&mut self, now: Timestamp) -> Vec<QuotaLevel> {
        self.order.iter().map(|&index| self.cells[index].quota_level(now)).collect()
    }
}

impl ScopeIndex {
    fn of(cells: &[Cell], includes: impl Fn(&Quota) -> bool) -> Self {
        let mut index = Self::default();
        let is_included = |cell: &Cell| cell.is_active && includes(&cell.quota);
        for (at, cell) in (0..).zip(cells).filter(|(_, cell)| is_included(cell)) {
            match &cell.quota.scope {
                Scope::Environment | Scope::Upstream(_) => index.all.push(at),
                Scope::Caller(caller) => index.callers.entry(caller.clone()).or_default().push(at),
                Scope::Model(_) | Scope::UpstreamModel(_) => index.models.push(at),
            }
        }
        index
    }

    /// The cells that apply to a request.
    fn find<A: Array<Item = u32>>(&self, cells: &[Cell], subject: Subject<'_>) -> SmallVec<A> {
        let mut applicable = SmallVec::from_slice(&self.all);
        if let Some(of_caller) = subject.caller.and_then(|caller| self.callers.get(&**caller)) {
            applicable.extend_from_slice(of_caller);
        }
        let matches = |index: &u32| {
            let models = cells[*index as usize].quota.scope.models();
            models.is_some_and(|pattern| pattern.matches(subject.model))
        };
        applicable.extend(self.models.iter().copied().filter(matches));
        applicable
    }
}
