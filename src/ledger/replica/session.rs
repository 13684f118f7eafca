//! The session of this node in Redis: join, heartbeat, batches, leave.

use super::Replica;
use super::journal::{Batch, MAX_BATCH, TrackedReservation};
use crate::clock::Timestamp;
use crate::quota::{CounterState, Quota};
use crate::redis::{self, HeldReservation, OverrideMark, ScriptCommand, ScriptReply, Verdict};
use std::collections::HashSet;

/// Maximum time to wait for other nodes that restore lost data (ms), even if Redis replies with a longer time.
const MAX_RECOVERY_WAIT_MS: u64 = 2_000;
/// A node repeats acknowledged steps only if the last reply of Redis is not older than this. Redis remembers a session
/// for longer.
const MAX_REPEAT_AGE_MS: u64 = 12 * 3_600_000;

/// The outcome of a join.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::ledger) struct Joined {
    /// How many quotas have other limits in this node's config than in those of other nodes.
    pub(in crate::ledger) differing_limits: u64,
    /// How long to wait for other nodes that restore lost data.
    pub(in crate::ledger) wait_ms: u64,
    /// How many acknowledged steps Redis has lost. This node repeats them.
    pub(in crate::ledger) lost_steps: u64,
}

impl Replica {
    /// The command that joins the shared counters.
    pub(in crate::ledger) fn join_command(&mut self, own: Timestamp) -> ScriptCommand {
        let now = self.set_command_time(own);
        let states = match (&mut self.offline, &mut self.resyncing) {
            (Some(offline), _) => offline.before.states(now),
            (None, Some(before)) => before.states(now),
            (None, None) => self.local.quotas.states(now),
        };
        self.all_tracked().for_each(|(_, tracked)| tracked.is_confirmed = false);
        let cells = self.local.overrides.cells();
        let cells = cells.map(|(quota, is_in_config)| (self.override_mark(quota), is_in_config));
        let states: Vec<_> = states
            .into_iter()
            .zip(cells)
            .map(|(state, (mark, is_in_config))| (state, mark, is_in_config))
            .collect();
        // Redis may have forgotten an old session although it has applied all its steps.
        if own.ms_since(self.last_reply) > MAX_REPEAT_AGE_MS {
            self.journal.forget_acknowledged();
        }
        let sent = (self.first_joined > 0).then(|| self.journal.sent(self.data_set, self.first_joined));
        let enforce = self.enforce_mark();
        self.commands.join(self.config.stamp, sent, &states, enforce)
    }

    /// Applies the reply to `join_command`. If Redis has lost steps that it had acknowledged, the journal begins with
    /// them again. `None`: the command must be repeated.
    pub(in crate::ledger) fn on_join(&mut self, own: Timestamp, reply: &ScriptReply) -> Option<Joined> {
        self.record_time(own, reply);
        if reply.verdict != Verdict::Done {
            return None;
        }
        if self.first_joined == 0 {
            self.first_joined = u64::try_from(reply.now.0).unwrap_or(0).max(1);
        }
        self.data_set = value(reply, 5);
        self.redis_had_session = value(reply, 2) == 1;
        let lost_steps = if self.redis_had_session { self.journal.rewind(value(reply, 4)) } else { 0 };
        // Bounded, because Redis's clock may have been set back.
        let wait_ms = value(reply, 3).min(MAX_RECOVERY_WAIT_MS);
        let differing_limits = value(reply, 1);
        self.limits_differ |= differing_limits > 0;
        Some(Joined { differing_limits, wait_ms, lost_steps })
    }

    /// The command that makes Redis hold up to `MAX_BATCH` of this node's reservations again, and the numbers of
    /// these reservations. A reservation that was admitted offline is included only after `begin_resync`. `None`:
    /// Redis has confirmed all of them.
    pub(in crate::ledger) fn hold_command(&mut self, own: Timestamp) -> Option<(ScriptCommand, Vec<u64>)> {
        self.set_command_time(own);
        let (ids, held) = self.next_to_hold();
        (!ids.is_empty()).then(|| (self.commands.hold(self.redis_had_session, &held), ids))
    }

    /// The next reservations that Redis has not confirmed. From now on Redis may have them, even if its reply is lost.
    pub(super) fn next_to_hold(&mut self) -> (Vec<u64>, Vec<HeldReservation>) {
        let is_offline = self.is_offline();
        let unsettled = self.tracked.iter().filter(|(_, tracked)| tracked.may_be_in_redis || !is_offline);
        let all = unsettled.map(|(&id, tracked)| (id, tracked, 0)).chain(self.journal.settled());
        let unconfirmed = all.filter(|(_, tracked, _)| !tracked.is_confirmed).take(MAX_BATCH);
        let held = |(id, tracked, settled_by): (u64, &TrackedReservation, u64)| {
            (id, HeldReservation { id: id.to_string(), settled_by, pieces: tracked.acknowledged_pieces() })
        };
        let (ids, held): (Vec<u64>, Vec<HeldReservation>) = unconfirmed.map(held).unzip();
        self.update(&ids, |tracked| tracked.may_be_in_redis = true);
        (ids, held)
    }

    /// Records that Redis has confirmed that it holds these reservations.
    pub(in crate::ledger) fn confirm_held(&mut self, ids: &[u64]) {
        self.update(ids, |tracked| tracked.is_confirmed = true);
    }

    fn update(&mut self, ids: &[u64], change: impl Fn(&mut TrackedReservation)) {
        let ids: HashSet<u64> = ids.iter().copied().collect();
        self.all_tracked().filter(|(id, _)| ids.contains(id)).for_each(|(_, tracked)| change(tracked));
    }

    /// The command that makes Redis release everything that it holds for this session and that this node does not
    /// track. Redis charges untracked reservations in full and returns an untracked lease.
    pub(in crate::ledger) fn release_unlisted_command(&mut self, own: Timestamp) -> ScriptCommand {
        self.set_command_time(own);
        let pending: Vec<u64> = self.pending.iter().copied().collect();
        let ids: Vec<u64> = self.all_tracked().map(|(id, _)| id).chain(pending).collect();
        self.commands.release_unlisted(&ids)
    }

    /// Applies the reply to a batch. Returns `false` if Redis did not apply the batch. Applied steps are removed from
    /// the journal, because the received states of the quotas include them.
    pub(in crate::ledger) fn on_batch(&mut self, own: Timestamp, batch: &Batch, reply: &ScriptReply) -> bool {
        self.record_time(own, reply);
        if reply.verdict != Verdict::Done {
            return false;
        }
        // While offline or resyncing, `local` contains this node's share, and the shared quotas are stored
        // separately.
        let shared = match (&mut self.offline, &mut self.resyncing) {
            (Some(offline), _) => &mut offline.before,
            (None, Some(before)) => before,
            (None, None) => &mut self.local.quotas,
        };
        redis::load_states(shared, &batch.cells, reply);
        self.acknowledge(batch.steps);
        true
    }

    /// The command that renews the session and reads the state of all quotas.
    pub(in crate::ledger) fn heartbeat_command(&mut self, own: Timestamp) -> ScriptCommand {
        self.set_command_time(own);
        self.commands.heartbeat()
    }

    /// Applies the reply to a heartbeat. Returns `true` if quotas in Redis have other limits than this node's config
    /// and did not have them at the last heartbeat. `None`: the command must be repeated.
    pub(in crate::ledger) fn on_heartbeat(&mut self, own: Timestamp, reply: &ScriptReply) -> Option<bool> {
        self.record_time(own, reply);
        if reply.verdict != Verdict::Done {
            return None;
        }
        (self.nodes, self.in_flight) = (value(reply, 0).max(1), value(reply, 1));
        if self.is_offline() {
            return Some(false);
        }
        self.resyncing = None;
        if let Some(lease) = &mut self.lease {
            lease.request_review();
        }
        let all: Vec<u32> = (0..).take(reply.states.len()).collect();
        redis::load_states(&mut self.local.quotas, &all, reply);
        self.follow_overrides(reply);
        let differs = |(quota, (state, mark)): (&Quota, &(CounterState, OverrideMark))| {
            !mark.is_set() && limit_of(state) != (quota.limit, quota.capacity())
        };
        self.must_send_limits = value(reply, 5) == 1;
        let differ = |(cell, quota): (usize, &Quota)| {
            reply.states.get(cell).is_some_and(|state| differs((quota, state)))
        };
        let limits_differ = !self.must_send_limits && self.local.overrides.active().any(differ);
        let differed = std::mem::replace(&mut self.limits_differ, limits_differ);
        Some(limits_differ && !differed)
    }

    /// The command that ends the session.
    pub(in crate::ledger) fn leave_command(&mut self) -> ScriptCommand {
        self.commands.leave()
    }
}

/// A value of a reply. A missing or negative one is 0.
pub(super) fn value(reply: &ScriptReply, index: usize) -> u64 {
    reply.values.get(index).map_or(0, |&n| u64::try_from(n).unwrap_or(0))
}

/// Limit and burst.
pub(super) fn limit_of(state: &CounterState) -> (u64, u64) {
    match *state {
        CounterState::Rolling { limit, burst, .. } => (limit, burst),
        CounterState::Calendar { limit, .. } => (limit, limit),
    }
}
