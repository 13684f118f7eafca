//! The hand-over of an account to a new process, for a restart without a gap.
//!
//! An account is *here*, *leaving* or *moved*. While it is leaving it admits nothing, and settlements wait: the new process
//! reads the counters. Then the account moves, or it stays and continues where it stopped. The requests of an account that has
//! moved use the counters of the new process: messages reserve, extend and settle there.
//!
//! The new process keeps the sum of what the old one's requests hold. A request of the old process becomes a reservation of
//! the new one with its first message (`Adopt`). When the old process ends, the rest of the sum is charged in full.

use super::demand::{Backend, Demand, Grant, NoRoom, Settlement};
use super::local::Local;
use super::messages::{
    FromSuccessor, LeftAccount, LeftBackend, LeftGrant, LeftNoRoom, LeftUsage, ToSuccessor,
};
use super::reservation::{ElsewhereReservation, HeldRoom};
use super::successor::{Successor, SuccessorLine};
use super::{Account, MAX_STORE_WAIT, Reservation};
use crate::quota::{Amounts, Quota};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::timeout;

/// The part of an account that knows where its counters are.
#[derive(Debug)]
pub(super) struct Handover {
    has_left: AtomicBool,
    phase: watch::Sender<Phase>,
}

#[derive(Clone, Debug)]
enum Phase {
    Here,
    Leaving,
    Moved(Successor),
}

impl Default for Handover {
    fn default() -> Self {
        Self { has_left: AtomicBool::new(false), phase: watch::Sender::new(Phase::Here) }
    }
}

impl Handover {
    /// Whether the account is leaving or has moved.
    pub(super) fn has_left(&self) -> bool {
        self.has_left.load(Ordering::Acquire)
    }

    fn set(&self, phase: Phase) {
        self.has_left.store(!matches!(phase, Phase::Here), Ordering::Release);
        self.phase.send_replace(phase);
    }

    /// Waits until the account stays or has moved. `None`: it stays.
    pub(super) async fn outcome(&self) -> Option<Successor> {
        let mut phase = self.phase.subscribe();
        let decided = phase.wait_for(|phase| !matches!(phase, Phase::Leaving)).await;
        // An error is impossible: the account has the sender.
        match &*decided.ok()? {
            Phase::Moved(successor) => Some(successor.clone()),
            Phase::Here | Phase::Leaving => None,
        }
    }
}

/// In the old process.
impl Account {
    /// Stops admitting requests and settling them, so that a new process can read the counters. If they are in Redis, the
    /// account continues.
    pub fn leave(&self) -> LeftAccount {
        if self.engine.sync().is_some() {
            return self.engine.with_local(|local, _| local.leave_lengths());
        }
        let left = self.engine.with_local(|local, _| {
            self.handover.set(Phase::Leaving);
            local.leave()
        });
        // The queued requests wait for the new process.
        self.notify_released();
        left
    }

    /// Reverses `leave`, because no new process has taken the counters over.
    pub fn stay(&self) {
        if self.engine.sync().is_none() {
            self.engine.with_local(|local, now| {
                local.stay(now);
                self.handover.set(Phase::Here);
            });
            self.notify_store(false);
        }
    }

    /// Uses the counters of the new process from now on.
    pub fn move_to(&self, line: &Arc<SuccessorLine>, environment: &Arc<str>) {
        if self.engine.sync().is_none() {
            let successor = Successor { line: line.clone(), environment: environment.clone() };
            self.engine.with_local(|local, _| {
                local.move_to(successor.clone());
                self.handover.set(Phase::Moved(successor));
            });
        }
    }

    /// Waits while the account is leaving.
    ///
    /// # Errors
    /// The account has moved: the new process decides.
    pub(super) async fn check_residence(&self) -> Result<(), NoRoom> {
        if !self.handover.has_left() {
            return Ok(());
        }
        self.handover.outcome().await.map_or(Ok(()), |_| Err(NoRoom::Unavailable))
    }

    /// Reserves room in the new process.
    pub(super) async fn reserve_elsewhere(
        self: &Arc<Self>,
        successor: &Successor,
        demand: &Demand<'_>,
        max_wait: Duration,
    ) -> Result<Reservation, NoRoom> {
        let id = successor.line.next_id();
        let message = ToSuccessor::Reserve {
            id,
            environment: successor.environment.to_string(),
            caller: demand.subject.caller.map(ToString::to_string),
            model: demand.subject.model.to_owned(),
            prompt: demand.prompt,
            generates: demand.generates,
            cap: demand.cap,
            completions: demand.completions,
            max_wait_ms: u64::try_from(max_wait.as_millis()).unwrap_or(u64::MAX),
            backends: demand.backends.iter().map(LeftBackend::of).collect(),
        };
        match successor.line.call(id, message).await {
            Some(FromSuccessor::Reserved {
                reserved,
                cap,
                progress_threshold,
                clamped_to,
                would_deny,
                standing,
                backend,
                ..
            }) => {
                successor.begin_progress(id, reserved, progress_threshold);
                let grant = Box::new(Grant {
                    receipts: smallvec::smallvec![],
                    id: Some(id),
                    reserved,
                    extension: 0,
                    completions: demand.completions.max(1),
                    cap,
                    was_clamped: clamped_to.is_some(),
                    progress_threshold,
                    partial_length: None,
                    in_flight_generation: None,
                });
                self.engine.with_local(|local, _| local.in_flight += 1);
                let would_deny = would_deny.map(|left| Box::new(self.to_no_room(left, demand.backends)));
                let reservation = ElsewhereReservation { grant, backend, standing, clamped_to, would_deny };
                Ok(Reservation::elsewhere(self, demand, reservation))
            }
            Some(FromSuccessor::Denied { no_room, .. }) => Err(self.to_no_room(no_room, demand.backends)),
            _ => Err(NoRoom::Unavailable),
        }
    }

    fn to_no_room(&self, left: LeftNoRoom, backends: &[Backend<'_>]) -> NoRoom {
        let quotas_of = |account: &Self| {
            account.engine.with_local(|local, _| {
                local.quotas.cells().map(|(quota, _)| quota.clone()).collect::<Vec<Quota>>()
            })
        };
        let upstreams = backends.iter().filter_map(|backend| backend.account);
        let of_upstreams = upstreams.flat_map(|account| quotas_of(account));
        left.into_no_room(&quotas_of(self).into_iter().chain(of_upstreams).collect::<Vec<Quota>>())
    }

    /// Waits until the settlements so far are durable where the counters are, at most [`MAX_STORE_WAIT`].
    pub(super) async fn wait_for_commit_elsewhere(&self) {
        match self.handover.outcome().await {
            None => {
                let Some(commit) = self.persistence.as_ref().map(|store| store.commits().next()) else {
                    return;
                };
                self.notify_store(true);
                self.wait_for_commit(commit).await;
            }
            Some(successor) => {
                let id = successor.line.next_id();
                let message = ToSuccessor::Commit { id, environment: successor.environment.to_string() };
                drop(timeout(MAX_STORE_WAIT, successor.line.call(id, message)).await);
            }
        }
    }
}

/// In the old process.
impl Reservation {
    /// Moves the reservation to another upstream in the new process, which adopts it if it has not yet.
    pub(super) async fn move_elsewhere(
        &mut self,
        successor: &Successor,
        index: usize,
        backend: &Backend<'_>,
    ) -> Result<(), NoRoom> {
        let HeldRoom { account, grant, subject, generates, .. } = &mut *self.0;
        let Some(grant) = grant else { return Ok(()) };
        let (id, reservation) = (successor.line.next_id(), successor.reservation(&subject.1, grant));
        let message = ToSuccessor::Move {
            id,
            reservation,
            caller: subject.0.as_deref().map(str::to_owned),
            generates: *generates,
            index,
            backend: LeftBackend::of(backend),
        };
        match successor.line.call(id, message).await {
            Some(FromSuccessor::Moved { standing, .. }) => {
                self.release_upstream();
                (self.0.backend, self.0.standing) = (index, standing);
                Ok(())
            }
            Some(FromSuccessor::Denied { no_room, .. }) => {
                Err(account.to_no_room(no_room, std::slice::from_ref(backend)))
            }
            _ => Err(NoRoom::Unavailable),
        }
    }
}

/// In the new process.
impl Account {
    /// Takes over a request that the old process still serves. It is charged in full if the old process ends without settling
    /// it.
    pub fn adopt(self: &Arc<Self>, model: &str, grant: &LeftGrant) -> Reservation {
        let grant = self.engine.with_local(|local, _| local.adopt(grant));
        Reservation::adopted(self, model, grant)
    }

    /// Charges in full the amounts that requests of the old process still hold. That process has ended.
    pub fn end_takeover(&self) {
        if self.engine.sync().is_none() {
            self.engine.with_local(Local::end_takeover);
            self.notify_released();
            self.notify_store(false);
        }
    }

    /// Adds usage that the old process has recorded to the history and the totals.
    pub fn add_usage(&self, rows: &[LeftUsage]) {
        self.engine.with_local(|local, _| {
            for row in rows {
                local.totals.add(row.spent);
                local.totals.rejected += row.rejections;
                local.history.add(row);
            }
        });
        self.notify_store(false);
    }

    /// Waits until everything so far is durable, at most [`MAX_STORE_WAIT`].
    pub async fn commit(&self) {
        if self.handover.has_left() {
            return self.wait_for_commit_elsewhere().await;
        }
        let Some(commit) = self.persistence.as_ref().map(|store| store.commits().next()) else { return };
        self.notify_store(true);
        self.wait_for_commit(commit).await;
    }
}

impl Reservation {
    /// Moves a request of the old process to another upstream. `generates`: whether its answer has tokens.
    ///
    /// # Errors
    /// The other upstream has no room. The reservation stays as it is.
    pub async fn move_as(
        &mut self,
        (caller, generates): (Option<Arc<str>>, bool),
        index: usize,
        backend: &Backend<'_>,
    ) -> Result<(), NoRoom> {
        (self.0.subject.0, self.0.generates) = (caller, generates);
        self.move_to(index, backend).await
    }

    /// Settles a request of the old process.
    pub fn settle_as(mut self, caller: Option<Arc<str>>, spent: Amounts, is_complete: bool) {
        self.0.subject.0 = caller;
        self.0.settlement = Settlement { spent, is_complete };
    }
}
