//! The amounts that an admitted request holds in its quotas.

use super::Amounts;
use smallvec::SmallVec;

/// The amounts that a request holds in each of its quotas. Only `Quotas::settle` releases them.
#[derive(Debug)]
#[must_use = "a receipt that is never settled holds its amounts for ever"]
pub struct Receipt {
    /// First the quotas in which the request holds amounts, then those that only count it.
    pub(super) holds: SmallVec<[Hold; 8]>,
    /// How many of `holds` hold amounts. The other quotas were unlimited at the admission: the spent amount counts there
    /// when the request settles.
    pub(super) holding: usize,
    pub(super) reserved: Amounts,
    /// The part of `reserved` that `Quotas::progress` has marked as spent.
    pub(super) marked_spent: Amounts,
}

/// The part of a receipt that belongs to one quota.
#[derive(Clone, Copy, Debug)]
pub(super) struct Hold {
    /// Index of the quota's cell when the request was admitted. A reload of the config may move the cell.
    pub(super) index: u32,
    /// Identifier of the cell; a reload does not change it.
    pub(super) id: u32,
    /// For a calendar quota: the period that admitted the request.
    pub(super) period_id: u64,
}

impl Receipt {
    /// The reserved amounts. Each quota holds the amount of its kind.
    pub fn reserved(&self) -> Amounts {
        self.reserved
    }

    /// The part of the reserved amounts that was marked as spent while the answer was streaming.
    pub fn marked_spent(&self) -> Amounts {
        self.marked_spent
    }

    /// Marks reserved amounts as spent. `spent` is the sum so far. Returns the increase. The counters stay as they are.
    pub fn mark_spent(&mut self, spent: Amounts) -> Amounts {
        let more = spent.min(self.reserved).saturating_sub(self.marked_spent);
        self.marked_spent = self.marked_spent.saturating_add(more);
        more
    }

    /// The quotas in which the request holds amounts: their index at admission, and the period that admitted the request.
    pub fn holds(&self) -> impl Iterator<Item = (u32, u64)> {
        self.limited_holds().iter().map(|hold| (hold.index, hold.period_id))
    }

    /// The quotas in which the request holds amounts.
    pub(super) fn limited_holds(&self) -> &[Hold] {
        &self.holds[..self.holding.min(self.holds.len())]
    }

    /// The quotas that were unlimited at the admission.
    pub(super) fn counted_holds(&self) -> &[Hold] {
        &self.holds[self.holding.min(self.holds.len())..]
    }

    /// Adds the amounts of `other` to this receipt, so that a stream that is extended a thousand times
    /// does not carry a thousand receipts.
    ///
    /// Returns `other` unless both receipts hold amounts in the same quotas and periods. They do not if a calendar
    /// period has ended between them, or a quota was removed.
    #[must_use = "a receipt that is never settled holds its amounts for ever"]
    pub fn merge(&mut self, other: Self) -> Option<Self> {
        let mut pairs = self.holds.iter().zip(&other.holds);
        if self.holds.len() != other.holds.len() || !pairs.all(|(a, b)| a.is_in_same_period(b)) {
            return Some(other);
        }
        self.reserved = self.reserved.saturating_add(other.reserved);
        self.marked_spent = self.marked_spent.saturating_add(other.marked_spent);
        None
    }
}

impl Hold {
    fn is_in_same_period(&self, other: &Self) -> bool {
        (self.id, self.period_id) == (other.id, other.period_id)
    }
}
