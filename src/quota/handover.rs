//! The hand-over of counters to another process, which continues to count. This process still serves the requests that
//! hold amounts in the counters.
//!
//! The new process restores the counters with the held amounts ([`Quotas::restore`]). It keeps the sum of what the old
//! process's requests hold in each quota. A request of the old process settles by its own receipt, which `adopt` translates
//! and takes out of the sum. When the old process has ended, the rest of the sum is charged in full.

use super::receipt::{Hold, Receipt};
use super::{Amounts, Quota, Quotas, Window};
use crate::clock::Timestamp;
use serde::{Deserialize, Serialize};
use smallvec::SmallVec;

/// A period that no counter has: reservations of it belong to a period that has ended.
const ENDED: u64 = u64::MAX;

/// Identifies a quota of an environment, whatever its limit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QuotaIdentity {
    scope: String,
    name: String,
    kind: String,
    per_ms: u64,
    is_calendar: bool,
}

impl QuotaIdentity {
    /// The identity of a quota.
    pub fn of(quota: &Quota) -> Self {
        Self {
            scope: quota.scope.as_str().to_owned(),
            name: quota.scope.name().to_owned(),
            kind: quota.kind.as_str().to_owned(),
            per_ms: quota.per.ms,
            is_calendar: matches!(quota.window, Window::Calendar { .. }),
        }
    }

    /// Whether this is the identity of a quota.
    pub fn is_of(&self, quota: &Quota) -> bool {
        (self.scope.as_str(), self.name.as_str(), self.kind.as_str(), self.per_ms, self.is_calendar)
            == (
                quota.scope.as_str(),
                quota.scope.name(),
                quota.kind.as_str(),
                quota.per.ms,
                matches!(quota.window, Window::Calendar { .. }),
            )
    }
}

/// A cell of the old process, in which receipts of that process hold amounts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeftCell {
    id: u32,
    quota: QuotaIdentity,
    /// The periods whose reservations count as admitted in the current one, the current one first.
    periods: Vec<u64>,
}

impl LeftCell {
    /// Whether this is the cell of a quota.
    pub fn is_of(&self, quota: &Quota) -> bool {
        self.quota.is_of(quota)
    }
}

/// A receipt of the old process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeftReceipt {
    /// The cells of the old process, each with the period that admitted the request.
    holds: Vec<(u32, u64)>,
    /// The cells of the old process that were unlimited when the request was admitted.
    #[serde(default)]
    counted: Vec<u32>,
    reserved: Amounts,
    marked_spent: Amounts,
}

/// The amounts that requests of an old process hold in the counters that it has handed over.
#[derive(Debug, Default)]
pub struct HeldElsewhere {
    cells: Vec<CellElsewhere>,
}

#[derive(Debug)]
struct CellElsewhere {
    left: LeftCell,
    /// The cell of this process, with the period that the left cell's current period became.
    hold: Hold,
    /// The amounts that the requests still hold.
    held: u64,
}

impl Receipt {
    /// The receipt, for the process that has taken the counters over.
    pub fn to_left(&self) -> LeftReceipt {
        LeftReceipt {
            holds: self.limited_holds().iter().map(|hold| (hold.id, hold.period_id)).collect(),
            counted: self.counted_holds().iter().map(|hold| hold.id).collect(),
            reserved: self.reserved,
            marked_spent: self.marked_spent,
        }
    }
}

impl Quotas {
    /// All cells, for the process that takes the counters over.
    pub fn left_cells(&self) -> Vec<LeftCell> {
        let left = |cell: &super::counter::Cell| LeftCell {
            id: cell.id,
            quota: QuotaIdentity::of(&cell.quota),
            periods: cell.periods(),
        };
        self.cells.iter().map(left).collect()
    }

    /// What the old process's requests hold in the counters that `restore` has just restored with their held amounts. Cells
    /// whose quota this process does not have are left out.
    pub fn held_elsewhere(&self, left: &[LeftCell]) -> HeldElsewhere {
        let find = |left: &LeftCell| {
            let is_it = |(_, cell): &(u32, &super::counter::Cell)| left.quota.is_of(&cell.quota);
            let (index, cell) = (0..).zip(&self.cells).find(is_it)?;
            let current = cell.periods().first().copied().unwrap_or(ENDED);
            let is_same_period = left.periods.first() == Some(&current) || cell.held() > 0;
            let period_id = if is_same_period { current } else { ENDED };
            let hold = Hold { index, id: cell.id, period_id };
            Some(CellElsewhere { left: left.clone(), hold, held: cell.held() })
        };
        HeldElsewhere { cells: left.iter().filter_map(find).collect() }
    }
}

impl HeldElsewhere {
    /// Translates a receipt of the old process and takes it out of the sum. From now on it must be settled by itself.
    pub fn adopt(&mut self, receipt: &LeftReceipt) -> Receipt {
        let LeftReceipt { holds, counted, reserved, marked_spent } = receipt;
        let mut own_holds = SmallVec::new();
        let held = reserved.saturating_sub(*marked_spent);
        for (id, period_id) in holds {
            let Some(cell) = self.cells.iter_mut().find(|cell| cell.left.id == *id) else { continue };
            let is_current = cell.left.periods.contains(period_id);
            let kind = super::Kind::ALL.into_iter().find(|kind| kind.as_str() == cell.left.quota.kind);
            if is_current && let Some(kind) = kind {
                cell.held = cell.held.saturating_sub(held.of(kind));
            }
            own_holds.push(if is_current { cell.hold } else { Hold { period_id: ENDED, ..cell.hold } });
        }
        let holding = own_holds.len();
        let counting = self.cells.iter().filter(|cell| counted.contains(&cell.left.id));
        own_holds.extend(counting.map(|cell| Hold { period_id: 0, ..cell.hold }));
        Receipt { holds: own_holds, holding, reserved: *reserved, marked_spent: *marked_spent }
    }

    /// Charges in full the amounts that the old process has not settled. That process has ended.
    pub fn charge(self, now: Timestamp, quotas: &mut Quotas) {
        for CellElsewhere { hold, held, .. } in self.cells {
            if held > 0 {
                let all = Amounts { requests: held, prompt: held, completion: held, total: held };
                let receipt = Receipt {
                    holds: smallvec::smallvec![hold],
                    holding: 1,
                    reserved: all,
                    marked_spent: Amounts::default(),
                };
                quotas.settle(now, receipt, all);
            }
        }
    }
}

#[cfg(test)]
mod tests;
