//! Counters that a new process takes over, and counters that were taken over from an old one.

use super::Local;
use crate::clock::Timestamp;
use crate::ledger::demand::{Grant, Progress, Settlement};
use crate::ledger::messages::{LeftAccount, LeftGrant};
use crate::ledger::successor::Successor;
use crate::quota::{Amounts, HeldElsewhere, Subject};
use std::sync::Arc;

/// Where the counters of an account are.
#[derive(Debug, Default)]
pub(in crate::ledger) enum Residence {
    /// In this process.
    #[default]
    Here,
    /// A new process reads them. Settlements wait.
    Leaving(Vec<DeferredSettlement>),
    /// In a new process.
    Moved(Successor),
}

/// A request that ended while its account was leaving.
#[derive(Debug)]
pub(in crate::ledger) struct DeferredSettlement {
    caller: Option<Arc<str>>,
    model: Box<str>,
    grant: Box<Grant>,
    settlement: Settlement,
}

/// What the requests of an old process hold in the counters that this process has taken over.
#[derive(Debug, Default)]
pub(super) struct Elsewhere {
    in_flight: u64,
    held: Amounts,
    quotas: HeldElsewhere,
    /// The old process ended while the account was leaving.
    has_ended: bool,
}

impl Local {
    /// Continues the counters of a process that still serves these requests.
    pub(super) fn begin_takeover(&mut self, left: &LeftAccount) {
        self.lengths.take_over(&left.lengths);
        self.in_flight = left.in_flight;
        self.held = left.held;
        let quotas = self.quotas.held_elsewhere(&left.cells);
        self.elsewhere = Elsewhere { in_flight: left.in_flight, held: left.held, quotas, has_ended: false };
    }

    pub(in crate::ledger) fn adopt(&mut self, left: &LeftGrant) -> Grant {
        let elsewhere = &mut self.elsewhere;
        elsewhere.in_flight = elsewhere.in_flight.saturating_sub(1);
        elsewhere.held = elsewhere.held.saturating_sub(left.reserved);
        Grant {
            receipts: left.receipts.iter().map(|receipt| elsewhere.quotas.adopt(receipt)).collect(),
            id: None,
            reserved: left.reserved,
            extension: left.extension,
            completions: left.completions,
            cap: left.cap,
            was_clamped: left.was_clamped,
            progress_threshold: left.progress_threshold,
            partial_length: None,
            in_flight_generation: None,
        }
    }

    /// The old process has ended: what its requests still hold is charged in full.
    pub(in crate::ledger) fn end_takeover(&mut self, now: Timestamp) {
        match self.residence {
            Residence::Here => {}
            Residence::Leaving(_) => {
                self.elsewhere.has_ended = true;
                return;
            }
            // The new process charges what this process has not settled.
            Residence::Moved(_) => return,
        }
        let Elsewhere { in_flight, held, quotas, .. } = std::mem::take(&mut self.elsewhere);
        self.in_flight = self.in_flight.saturating_sub(in_flight);
        self.held = self.held.saturating_sub(held);
        self.totals.add(held);
        self.history.record_recovered(now, held);
        quotas.charge(now, &mut self.quotas);
    }

    pub(in crate::ledger) fn leave(&mut self) -> LeftAccount {
        self.residence = Residence::Leaving(Vec::new());
        LeftAccount {
            in_flight: self.in_flight,
            held: self.held,
            cells: self.quotas.left_cells(),
            lengths: self.lengths.leave(),
        }
    }

    /// What a new process continues with while the counters stay in Redis.
    pub(in crate::ledger) fn leave_lengths(&self) -> LeftAccount {
        LeftAccount { lengths: self.lengths.leave(), ..LeftAccount::default() }
    }

    pub(in crate::ledger) fn stay(&mut self, now: Timestamp) {
        let Residence::Leaving(deferred) = std::mem::take(&mut self.residence) else { return };
        for DeferredSettlement { caller, model, grant, settlement } in deferred {
            self.settle(now, Subject { caller: caller.as_ref(), model: &model }, grant, settlement);
        }
        if self.elsewhere.has_ended {
            self.end_takeover(now);
        }
    }

    pub(in crate::ledger) fn move_to(&mut self, successor: Successor) {
        let before = std::mem::replace(&mut self.residence, Residence::Moved(successor));
        let Residence::Leaving(deferred) = before else { return };
        for DeferredSettlement { caller, model, grant, settlement } in deferred {
            self.settle_elsewhere(Subject { caller: caller.as_ref(), model: &model }, grant, settlement);
        }
    }

    /// Settles a request of an account that is leaving or has moved.
    pub(in crate::ledger) fn settle_elsewhere(
        &mut self,
        subject: Subject<'_>,
        grant: Box<Grant>,
        settlement: Settlement,
    ) {
        match &mut self.residence {
            Residence::Here => {}
            Residence::Leaving(deferred) => deferred.push(DeferredSettlement {
                caller: subject.caller.cloned(),
                model: subject.model.into(),
                grant,
                settlement,
            }),
            Residence::Moved(successor) => {
                self.in_flight = self.in_flight.saturating_sub(1);
                successor.settle(subject, &grant, settlement);
            }
        }
    }

    /// Reports the progress of a stream of an account that is leaving or has moved.
    pub(in crate::ledger) fn progress_elsewhere(
        &self,
        model: &str,
        grant: &mut Grant,
        spent: Amounts,
    ) -> Progress {
        match &self.residence {
            // The next report has these amounts too.
            Residence::Here | Residence::Leaving(_) => Progress::Within,
            Residence::Moved(successor) => successor.progress(model, grant, spent),
        }
    }
}
