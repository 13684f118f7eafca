//! One node's replica of the counters that several nodes share in Redis. Pure: replies and `now` are arguments.
//!
//! Redis decides which requests are admitted. The node's own quotas mirror Redis: they explain a denial, decide
//! whether a stream gets an extension, and are displayed. While Redis is unavailable the node is *offline*: its
//! quotas are reduced to its share of the remaining amounts, and it records what it spends. When Redis is available
//! again, the node *resyncs*: it sends what it spent. Every change of a reservation goes into a journal. The journal
//! is sent in numbered batches, so that Redis applies no change twice.

pub(super) mod admission;
pub(super) mod joint;
pub(super) mod journal;
mod lease;
mod offline;
mod overrides;
mod reconfigure;
pub(super) mod session;

use super::demand::{Grant, Progress, Settlement};
use super::local::Local;
use crate::clock::Timestamp;
use crate::config::OnStoreFailure;
use crate::quota::{Amounts, Quotas, Receipt, Subject};
use crate::redis::{Cells, CommandBuilder, LEASE_ID, ScriptReply, Step, StepKind};
use journal::{Batch, Journal, JournalEntry, MAX_BATCH, TrackedReservation};
use lease::Lease;
use offline::OfflineUsage;
pub(super) use reconfigure::ReplicaSettings;
use std::collections::{HashMap, HashSet};

/// With more unsent steps than this, a node admits nothing from its lease. Otherwise it could add steps faster than
/// Redis applies them.
const MAX_BACKLOG: usize = 10_000;

/// How a node takes part in the shared counters.
#[derive(Clone, Copy, Debug)]
pub(super) struct ReplicaConfig {
    /// What happens to requests while Redis is unavailable.
    pub(super) on_failure: OnStoreFailure,
    /// When the config was written. If nodes have different limits, those of the newest config of the nodes alive are in
    /// force.
    pub(super) stamp: u64,
    /// Redis ignores a call that it runs later than this after the call was sent (ms), because the request no longer
    /// waits for the reply.
    pub(super) max_call_delay_ms: u64,
    /// Whether the node leases part of each quota and admits requests from it.
    pub(super) leases: bool,
}

/// One node's replica of the shared counters.
#[derive(Debug)]
pub(super) struct Replica {
    local: Local,
    config: ReplicaConfig,
    commands: CommandBuilder,
    /// `Some` while Redis is unavailable.
    offline: Option<Box<Offline>>,
    /// The shared quotas as they were before the node went offline. `Some` during a resync, which ends with the first
    /// heartbeat. Until then, `local` contains only this node's share.
    resyncing: Option<Quotas>,
    /// How often this node has lost Redis. It ignores replies to calls that it sent before the last loss.
    losses: u64,
    /// When this node joined for the first time, on Redis's clock (ms); 0: it has not joined. Among equally old configs,
    /// that of the node that joined last is the newest.
    first_joined: u64,
    /// The data set in Redis at the last join; 0 before the first one. Data that Redis restores has another number.
    data_set: u64,
    /// When the last reply of Redis arrived, on this node's clock.
    last_reply: Timestamp,
    /// At the last join, Redis still had this node's session.
    redis_had_session: bool,
    /// Nodes alive, and requests in flight on all nodes, according to the last reply.
    nodes: u64,
    in_flight: u64,
    /// The version of the overrides in Redis, and the one whose origins this node has read.
    overrides_in_redis: u64,
    overrides_known: u64,
    /// Amounts that unlimited quotas have counted and that the journal does not contain yet: by cell, the period and the
    /// amount.
    counted: HashMap<u32, (u64, u64)>,
    /// Quotas in Redis have other limits than in this node's config.
    limits_differ: bool,
    /// This node has the newest config of the nodes alive, and Redis has the limits of a node that has gone.
    must_send_limits: bool,
    /// Redis's clock minus this node's clock (ms).
    clock_offset_ms: i64,
    next_id: u64,
    /// Reservations that are not settled, by number.
    tracked: HashMap<u64, TrackedReservation>,
    /// Reservations requested from Redis whose reply has not arrived.
    pending: HashSet<u64>,
    journal: Journal,
    lease: Option<Lease>,
}

/// The state of a node while Redis is unavailable.
#[derive(Debug)]
struct Offline {
    /// The setting by which the node's counters were made.
    on_failure: OnStoreFailure,
    /// The number of nodes by which limits and levels were divided.
    nodes: u64,
    /// The shared quotas as they were before the loss.
    before: Quotas,
    /// This node's share, as if it had spent nothing offline and with its usage. The resync sends the difference.
    unspent: Quotas,
    spent: Quotas,
    /// The usage since the loss that the journal has already, because `on_failure` has changed or an override has ended.
    recorded: Vec<OfflineUsage>,
}

impl Replica {
    /// Makes a replica of local counters. The replica is offline until it has joined. `session`: a name never used
    /// before.
    pub(super) fn new(local: Local, config: ReplicaConfig, session: &str, now: Timestamp) -> Self {
        let quotas = local.overrides.configured();
        let mut commands = CommandBuilder::new(Cells::new(quotas, now), session, now);
        commands.set_max_delay_ms(config.max_call_delay_ms);
        let lease = config.leases.then(|| Lease::new(quotas.len()));
        let own = &local.quotas;
        let (before, unspent, spent) = (own.clone(), own.clone(), own.clone());
        let (on_failure, recorded) = (config.on_failure, Vec::new());
        let offline = Offline { on_failure, nodes: 1, before, unspent, spent, recorded };
        Self {
            local,
            config,
            commands,
            offline: Some(Box::new(offline)),
            resyncing: None,
            losses: 0,
            first_joined: 0,
            data_set: 0,
            last_reply: now,
            redis_had_session: false,
            nodes: 1,
            in_flight: 0,
            overrides_in_redis: 0,
            overrides_known: 0,
            counted: HashMap::new(),
            limits_differ: false,
            must_send_limits: false,
            clock_offset_ms: 0,
            next_id: 1,
            tracked: HashMap::new(),
            pending: HashSet::new(),
            journal: Journal::new(),
            lease,
        }
    }

    /// This node's own counters.
    pub(super) fn local_mut(&mut self) -> &mut Local {
        &mut self.local
    }

    /// Whether Redis is unavailable.
    pub(super) fn is_offline(&self) -> bool {
        self.offline.is_some()
    }

    /// Whether Redis is available again but has not applied everything that this node spent offline. Until then Redis may
    /// over-admit.
    pub(super) fn is_resyncing(&self) -> bool {
        self.resyncing.is_some()
    }

    /// Whether quotas are enforced. In shadow mode the node always admits requests.
    pub(super) fn is_enforcing(&self) -> bool {
        self.local.rules.enforce
    }

    /// Whether this node admits no request for now.
    pub(super) fn is_closed(&self) -> bool {
        self.is_enforcing() && self.is_offline() && self.config.on_failure == OnStoreFailure::Closed
    }

    /// The time on Redis's clock, which all nodes use. `own`: the time on this node's clock.
    pub(super) fn redis_time(&self, own: Timestamp) -> Timestamp {
        Timestamp(own.0.saturating_add(self.clock_offset_ms))
    }

    /// Nodes alive, according to the last reply.
    pub(super) fn nodes(&self) -> u64 {
        self.nodes
    }

    /// How often this node has lost Redis.
    pub(super) fn losses(&self) -> u64 {
        self.losses
    }

    /// Requests in flight on all nodes. While offline: those on this node.
    pub(super) fn in_flight(&self) -> u64 {
        if self.is_offline() { self.local.in_flight } else { self.in_flight }
    }

    pub(super) fn keys(&self, prefix: &str, slot: Option<&str>, account: &str) -> [String; 3] {
        self.commands.keys(prefix, slot, account)
    }

    /// Updates the offset to Redis's clock from the time in a reply.
    pub(super) fn record_time(&mut self, own: Timestamp, reply: &ScriptReply) {
        self.clock_offset_ms = reply.now.0.saturating_sub(own.0);
        self.last_reply = own;
        self.commands.set_redis_time(reply.now);
    }

    /// Prepares for a command: sets the time from which its deadline is counted. Returns that time.
    fn set_command_time(&mut self, own: Timestamp) -> Timestamp {
        let now = self.redis_time(own);
        self.commands.set_redis_time(now);
        now
    }

    /// Moves amounts that a request has certainly used from held to spent, and may extend its reservation.
    pub(super) fn progress(
        &mut self,
        own: Timestamp,
        model: &str,
        grant: &mut Grant,
        spent: Amounts,
    ) -> Progress {
        let now = self.redis_time(own);
        let outcome = self.local.extend_if_outgrown(now, model, grant, spent, None);
        self.mark_spent(now, grant, spent);
        outcome
    }

    /// Moves amounts of a grant from held to spent. While online, the mirrored quotas change with the reply of Redis.
    /// Until then, only the journal contains the amounts: if Redis loses its data, this node sends the states of the
    /// quotas, and then the journal.
    fn mark_spent(&mut self, now: Timestamp, grant: &mut Grant, spent: Amounts) {
        if self.is_offline() {
            self.local.mark_spent(now, grant, spent);
        } else {
            grant.mark_receipts(spent, |receipt, left| {
                receipt.mark_spent(left);
            });
        }
        if let Some(id) = grant.id {
            self.record_progress(id, &grant.receipts, spent);
        }
    }

    fn record_progress(&mut self, id: u64, receipts: &[Receipt], spent: Amounts) {
        let Some(before) = self.tracked.get(&id) else { return };
        let (may_be_in_redis, reserved_before) = (before.may_be_in_redis, before.reserved());
        // While offline, progress of a reservation that Redis may have is not recorded. If Redis loses the
        // reservation, this node restores the state that Redis acknowledged. The settlement reports the rest.
        if may_be_in_redis && self.is_offline() {
            return;
        }
        self.track(id, may_be_in_redis, receipts);
        let Some(tracked) = self.tracked.get(&id).filter(|tracked| tracked.may_be_in_redis) else { return };
        let more = tracked.reserved().saturating_sub(reserved_before);
        let mut push = |kind, amounts| self.journal.push(Step::new(kind, id.to_string(), amounts));
        if more != Amounts::default() {
            push(StepKind::Extend, more);
        }
        push(StepKind::Progress, spent);
    }

    /// Releases the held amounts of a grant and charges the spent amounts.
    pub(super) fn settle(
        &mut self,
        own: Timestamp,
        subject: Subject<'_>,
        mut grant: Box<Grant>,
        settlement: Settlement,
    ) {
        let now = self.redis_time(own);
        let id = grant.id;
        let may_be_in_redis = id.and_then(|id| self.tracked.get(&id)).is_some_and(|t| t.may_be_in_redis);
        grant.settle_receipts(settlement.spent, |receipt, part| {
            for (cell, period, amount) in self.local.quotas.counted(now, &receipt, part) {
                // The count of an ended period is no longer needed.
                let sum = self.counted.entry(cell).or_insert((period, 0));
                let before = if sum.0 == period { sum.1 } else { 0 };
                *sum = (period, before.saturating_add(amount));
            }
            // While online, the mirrored quotas change with the reply of Redis. Until then, only the journal contains
            // the settlement.
            let Some(offline) = &mut self.offline else { return };
            // Redis does not have this reservation. The resync sends its usage, in one sum with that of others.
            if !may_be_in_redis {
                offline.spent.charge_without_hold(now, &receipt, part);
            }
            self.local.quotas.settle(now, receipt, part);
        });
        if let Some((id, tracked)) = id.and_then(|id| self.tracked.remove_entry(&id))
            && (tracked.may_be_in_redis || !self.is_offline())
        {
            self.journal.push_settlement(id, settlement.spent, tracked);
        }
        self.local.close(now, subject, &grant, settlement);
    }

    fn take_id(&mut self) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        id
    }

    /// Tracks a reservation, or updates its held amounts.
    fn track(&mut self, id: u64, may_be_in_redis: bool, receipts: &[Receipt]) {
        let pieces = receipts.iter().map(journal::piece).collect();
        let before = self.tracked.get(&id);
        let (is_confirmed, acknowledged) =
            before.map_or((may_be_in_redis, Amounts::default()), |t| (t.is_confirmed, t.acknowledged));
        let tracked = TrackedReservation { may_be_in_redis, is_confirmed, pieces, acknowledged };
        self.tracked.insert(id, tracked);
    }

    /// All reservations that are open, or that Redis may still hold.
    fn all_tracked(&mut self) -> impl Iterator<Item = (u64, &mut TrackedReservation)> {
        let unsettled = self.tracked.iter_mut().map(|(&id, tracked)| (id, tracked));
        unsettled.chain(self.journal.settled_mut())
    }

    /// Cancels a reservation that was requested from Redis and whose decision is unknown. If Redis admitted it, Redis
    /// releases it.
    pub(super) fn cancel(&mut self, id: u64) {
        self.pending.remove(&id);
        self.push_cancellation(id);
    }

    /// Like `cancel`, but another cancellation follows. Until then Redis may get the reservation.
    pub(super) fn push_cancellation(&mut self, id: u64) {
        let (pieces, acknowledged) = (smallvec::SmallVec::new(), Amounts::default());
        let nothing = TrackedReservation { may_be_in_redis: true, is_confirmed: false, pieces, acknowledged };
        self.journal.push_settlement(id, Amounts::default(), nothing);
    }

    /// Returns the unused rest of the lease to Redis.
    pub(super) fn return_lease(&mut self) {
        if self.lease.as_mut().is_some_and(Lease::clear) {
            self.journal.push(Step::new(StepKind::Settle, LEASE_ID.to_owned(), Amounts::default()));
        }
    }

    /// Adds the amounts that unlimited quotas have counted to the journal. A step for each quota now and then costs less
    /// than one for each request.
    pub(in crate::ledger) fn report_counted(&mut self) {
        for (cell, (period, amount)) in std::mem::take(&mut self.counted) {
            self.journal.push(self.commands.offline_usage_step(cell, amount, period));
        }
    }

    fn has_unsent_steps(&self) -> bool {
        !self.journal.entries.is_empty()
    }

    fn has_large_backlog(&self) -> bool {
        self.journal.entries.len() >= MAX_BACKLOG
    }

    /// The number that the next step of the journal will get.
    pub(super) fn next_step(&self) -> u64 {
        self.journal.next_step()
    }

    /// The next call that sends steps of the journal. `None`: all steps before the step `end` are acknowledged.
    pub(super) fn next_batch(&mut self, own: Timestamp, end: u64) -> Option<Batch> {
        if self.journal.first >= end {
            return None;
        }
        let entries = || self.journal.entries.iter().take(MAX_BATCH);
        let steps: Vec<Step> = entries().map(|entry| entry.step.clone()).collect();
        let mut cells: Vec<u32> = entries().flat_map(|entry| self.cells_of(entry)).collect();
        cells.sort_unstable();
        cells.dedup();
        self.set_command_time(own);
        let command = self.commands.apply(self.journal.first, &steps, &cells);
        Some(Batch { command, steps: steps.len(), cells })
    }

    /// The cells that a step changes.
    fn cells_of(&self, JournalEntry { step, settled }: &JournalEntry) -> Vec<u32> {
        if step.id == LEASE_ID {
            return (0..).take(self.commands.cell_count()).collect();
        }
        let of_step = step.cells.iter().copied();
        // The reservation may be settled by a later step of the journal.
        let find_settled =
            |id| self.journal.settled().find(|(other, ..)| *other == id).map(|(_, tracked, _)| tracked);
        let find = |id: u64| self.tracked.get(&id).or_else(|| find_settled(id));
        let reservation =
            settled.as_ref().map(|(_, tracked)| tracked).or_else(|| find(step.id.parse().ok()?));
        let pieces = reservation.into_iter().flat_map(|tracked| &tracked.pieces);
        of_step.chain(pieces.flat_map(|piece| piece.cells.iter().map(|cell| cell.0))).collect()
    }

    /// Records that Redis has applied the first steps of the journal.
    fn acknowledge(&mut self, steps: usize) {
        for (id, spent) in self.journal.acknowledge(steps) {
            if let Some(tracked) = self.tracked.get_mut(&id) {
                tracked.acknowledged = spent;
            } else if let Some((_, settled)) = self.journal.settled_mut().find(|(other, _)| *other == id) {
                settled.acknowledged = spent;
            }
        }
    }
}

#[cfg(test)]
mod tests;
