//! The counters of the upstream that a request goes to, beside those of its environment.

use super::Local;
use crate::clock::Timestamp;
use crate::ledger::demand::{Grant, NoRoom, Settlement};
use crate::quota::{Amounts, Applicable, Denied, QuotaLevel, QuotaStatus, Required, Subject};

/// The counters of an upstream, for one request.
#[derive(Debug)]
pub struct Backing<'a> {
    counters: &'a mut Local,
    /// The quotas that apply to the request.
    applicable: Applicable,
    is_full: bool,
}

impl<'a> Backing<'a> {
    /// `counters`: those of the upstream. `model`: the model, by the name that is sent to the upstream.
    pub fn new(counters: &'a mut Local, model: &str) -> Self {
        let is_full = counters.is_full();
        let applicable = counters.quotas.applicable(Subject { caller: None, model });
        Self { counters, applicable, is_full }
    }

    /// The same counters, with the quotas that applied when the request was made.
    pub(in crate::ledger) fn with_quotas(self, applicable: Applicable) -> Self {
        Self { applicable, ..self }
    }

    /// The same counters. `is_full`: the maximum number of requests is in flight on all nodes.
    pub(in crate::ledger) fn with_full(self, is_full: bool) -> Self {
        Self { is_full, ..self }
    }

    /// Why the amounts do not fit now. `None`: they fit.
    pub(in crate::ledger) fn obstacle(&mut self, now: Timestamp, required: &Required) -> Option<NoRoom> {
        if let Some(limit) = self.counters.rules.max_in_flight.filter(|_| self.is_full) {
            return Some(NoRoom::InFlight { limit, upstream: self.counters.upstream.clone() });
        }
        self.counters.quotas.denial(now, &self.applicable, required).map(NoRoom::Quota)
    }

    pub(super) fn denial_behind_queue(&mut self, now: Timestamp, required: &Required) -> Option<Denied> {
        self.counters.quotas.denial_behind_queue(now, &self.applicable, required)
    }

    pub(super) fn largest_completion(&self, prompt: u64) -> u64 {
        self.counters.quotas.largest_completion(&self.applicable, prompt)
    }

    pub(super) fn completion_that_fits(&mut self, now: Timestamp, prompt: u64) -> u64 {
        self.counters.quotas.completion_that_fits(now, &self.applicable, prompt)
    }

    /// The quotas that apply to the request.
    pub(super) fn levels(&mut self, now: Timestamp) -> Vec<QuotaLevel> {
        self.counters.quotas.levels_of(now, &self.applicable)
    }

    pub(in crate::ledger) fn standing(&self, now: Timestamp) -> [Option<QuotaStatus>; 4] {
        self.counters.quotas.status_by_kind(now, &self.applicable)
    }

    pub(in crate::ledger) fn needs_durability(&self) -> bool {
        self.counters.quotas.need_durability(&self.applicable)
    }

    /// Holds the amounts, also if they do not fit.
    pub(in crate::ledger) fn take(&mut self, now: Timestamp, required: &Required) -> Box<Grant> {
        let receipt = self.counters.quotas.reserve_unchecked(now, &self.applicable, required);
        self.counters.in_flight += 1;
        self.counters.held = self.counters.held.saturating_add(required.amounts);
        Box::new(Grant {
            receipts: smallvec::smallvec![receipt],
            id: None,
            reserved: required.amounts,
            extension: 0,
            completions: 1,
            cap: u64::MAX,
            was_clamped: false,
            progress_threshold: u64::MAX,
            partial_length: None,
            in_flight_generation: None,
        })
    }
}

impl Local {
    /// Whether a grant of these counters can be extended.
    pub(super) fn can_extend(&mut self, now: Timestamp, grant: &Grant, more: Amounts) -> bool {
        grant.receipts.first().is_none_or(|first| self.quotas.can_extend(now, first, more))
    }

    /// Releases what a grant of an upstream holds. Nothing is charged, and the grant is empty.
    pub(in crate::ledger) fn release_backing(&mut self, now: Timestamp, grant: &mut Grant) {
        grant.settle_receipts(Amounts::default(), |receipt, part| self.quotas.settle(now, receipt, part));
        self.in_flight = self.in_flight.saturating_sub(1);
        self.held = self.held.saturating_sub(grant.reserved);
        grant.reserved = Amounts::default();
    }

    /// Releases a grant of an upstream and charges the spent amounts.
    pub fn settle_backing(&mut self, now: Timestamp, grant: Box<Grant>, spent: Amounts) {
        let subject = Subject { caller: None, model: "" };
        self.settle(now, subject, grant, Settlement { spent, is_complete: false });
    }
}
