//! What a change of the config does to the counters of an environment.
//!
//! Used amounts carry over. A quota whose limit, burst or time zone changes keeps its counter. A quota whose period or
//! window changes starts with the amount that was used before, at most its new burst (of a calendar quota, its new limit).
//! A removed quota keeps its counter out of sight, so that it continues when the quota comes back. So no sequence of
//! configs serves more than one period's limit.

use super::counter::Cell;
use super::table::Quotas;
use super::{ClockUnit, Kind, PersistedCounter, Quota, Window};
use crate::clock::Timestamp;
use std::collections::HashMap;

/// How a quota whose period or window has changed takes over the counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Takeover {
    /// The counter continues under the new quota, with the reservations that it holds.
    InPlace,
    /// A new counter starts, in which held amounts count as used. The old one stays at its index, where reservations
    /// settle. The counters of several nodes in Redis work this way.
    Separate,
}

/// The amount that was used in a quota before its period or window changed, at most the new burst or limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CarriedAmount {
    /// Index of the cell of the new quota.
    pub cell: usize,
    /// The used and held amount.
    pub amount: u64,
}

/// Everything that identifies a quota, see [`Quota::is_same_as`].
type Identity<'q> = (&'static str, &'q str, Kind, u64, Option<ClockUnit>);

fn identity(quota: &Quota) -> Identity<'_> {
    let unit = match quota.window {
        Window::Rolling { .. } => None,
        Window::Calendar { unit, .. } => Some(unit),
    };
    (quota.scope.as_str(), quota.scope.name(), quota.kind, quota.per.ms, unit)
}

/// Everything that a quota has in common with the one that replaces it.
fn subject(quota: &Quota) -> (&'static str, &str, Kind) {
    (quota.scope.as_str(), quota.scope.name(), quota.kind)
}

impl Quotas {
    /// Replaces the quotas. `persisted` returns the counter that an earlier process has persisted; it is used for a
    /// quota that this process does not know yet. A cell never changes its index. Returns the amounts that carried over
    /// to quotas with another period or window.
    pub fn reconfigure(
        &mut self,
        quotas: &[Quota],
        now: Timestamp,
        takeover: Takeover,
        persisted: impl Fn(&Quota) -> Option<PersistedCounter>,
    ) -> Vec<CarriedAmount> {
        self.cells.iter_mut().for_each(|cell| cell.advance(now));
        let before: HashMap<_, _> =
            self.cells.iter().enumerate().map(|(at, c)| (identity(&c.quota), at)).collect();
        let known: Vec<Option<usize>> =
            quotas.iter().map(|quota| before.get(&identity(quota)).copied()).collect();
        drop(before);
        let mut stays = vec![false; self.cells.len()];
        known.iter().flatten().for_each(|&at| stays[at] = true);
        // The cells that no new quota matches, by what they limit.
        let mut replaced: HashMap<(&'static str, String, Kind), Replaced> = HashMap::new();
        for (at, cell) in self.cells.iter().enumerate().filter(|(at, _)| !stays[*at]) {
            let (scope, name, kind) = subject(&cell.quota);
            let (amount, is_active) = (cell.carried(now), cell.is_active);
            let entry = replaced.entry((scope, name.to_owned(), kind)).or_default();
            // An unlimited quota holds nothing that another one could take over.
            if cell.quota.is_unlimited() {
                entry.amount = entry.amount.max(amount);
                continue;
            }
            if entry.at.is_none() || (is_active, amount) > (entry.is_active, entry.amount_at) {
                (entry.at, entry.is_active, entry.amount_at) = (Some(at), is_active, amount);
            }
            entry.amount = entry.amount.max(amount);
        }
        let was_active: Vec<bool> = self.cells.iter().map(|cell| cell.is_active).collect();
        let was_unlimited: Vec<bool> = self.cells.iter().map(|cell| cell.quota.is_unlimited()).collect();
        self.cells.iter_mut().for_each(|cell| cell.is_active = false);
        self.order.clear();
        let mut carried = Vec::new();
        for (quota, known) in quotas.iter().zip(known) {
            let (scope, name, kind) = subject(quota);
            let key = (scope, name.to_owned(), kind);
            let continues_itself =
                quota.is_unlimited() || known.is_some_and(|at| was_active[at] && !was_unlimited[at]);
            let replaced = if continues_itself { None } else { replaced.get_mut(&key) };
            let amount =
                replaced.as_ref().map(|replaced| replaced.amount.min(quota.max_carried())).filter(|n| *n > 0);
            let at = self.place(quota, known, replaced, now, takeover, &persisted);
            carried.extend(amount.map(|amount| CarriedAmount { cell: at, amount }));
            self.cells[at].is_active = true;
            self.order.push(at);
        }
        for (cell, was_active) in self.cells.iter_mut().zip(was_active) {
            if cell.is_active != was_active {
                cell.mark_changed();
            }
        }
        self.rebuild_index();
        carried
    }

    /// Puts a quota into a cell and returns its index. `known`: the index of its earlier cell.
    fn place(
        &mut self,
        quota: &Quota,
        known: Option<usize>,
        replaced: Option<&mut Replaced>,
        now: Timestamp,
        takeover: Takeover,
        persisted: &impl Fn(&Quota) -> Option<PersistedCounter>,
    ) -> usize {
        if let Some(replaced) = replaced.filter(|replaced| replaced.amount > 0) {
            let amount = replaced.amount;
            // Requests in flight count in a quota that was unlimited.
            let is_counting = known.is_some_and(|at| self.cells[at].quota.is_unlimited());
            let is_free = takeover == Takeover::InPlace && !is_counting;
            let free = if is_free { replaced.at.take() } else { None };
            let at = match free {
                Some(from) => self.take_over(from, quota, known, now),
                None => known.unwrap_or_else(|| self.push(quota.clone(), now)),
            };
            self.cells[at].set_quota(quota.clone(), now);
            let counter = if known.is_none() { persisted(quota) } else { None };
            let earlier = counter.map_or(0, |counter| {
                let mut cell = Cell::full(0, quota.clone(), now);
                cell.restore(&counter, false, now);
                cell.committed()
            });
            let own = self.cells[at].carried(now);
            self.cells[at].raise_used(amount.max(earlier).max(own), now);
            return at;
        }
        if let Some(at) = known {
            self.cells[at].set_quota(quota.clone(), now);
            return at;
        }
        let at = self.push(quota.clone(), now);
        if let Some(counter) = persisted(quota) {
            self.cells[at].restore(&counter, false, now);
            // The limit may be higher than the one that has cut it off.
            if counter.excess > 0 && !quota.is_unlimited() {
                self.cells[at].fit_used(now);
            }
        }
        at
    }

    /// The cell at `from` continues under another quota. A copy of its counter stays behind, in case the old quota comes
    /// back.
    fn take_over(&mut self, from: usize, quota: &Quota, known: Option<usize>, now: Timestamp) -> usize {
        let mut copy = self.cells[from].clone();
        copy.freeze(self.next_id());
        let cell = &mut self.cells[from];
        cell.convert(quota.clone(), now);
        if let Some(known) = known {
            let earlier = self.cells[known].carried(now).max(self.cells[from].carried(now));
            self.cells[from].raise_used(earlier, now);
            self.cells[known] = copy;
        } else {
            self.cells.push(copy);
        }
        from
    }

    fn push(&mut self, quota: Quota, now: Timestamp) -> usize {
        let id = self.next_id();
        self.cells.push(Cell::full(id, quota, now));
        self.cells.len() - 1
    }
}

/// The cells of one scope and kind whose quotas the new config does not have. An active one comes first, then the one with
/// the largest amount.
#[derive(Default)]
struct Replaced {
    /// The cell that a new quota may take over. `None`: one has.
    at: Option<usize>,
    is_active: bool,
    /// The used and held amount of that cell.
    amount_at: u64,
    /// The largest used and held amount.
    amount: u64,
}

#[cfg(test)]
mod tests;
