//! Losing Redis, taking part again, and showing that this node is alive; what administrators set for all nodes.

use super::{Alone, Batch, LONGEST_REGAIN_MS, limit, told};
use crate::clock::Timestamp;
use crate::config::OnStoreFailure;
use crate::ledger::{Counters, QuotaKey};
use crate::quota::{CounterState, Quota};
use crate::redis::{self, NewLimit, ScriptCommand, ScriptReply, Verdict};

impl Counters {
    /// Redis cannot be asked any more: from now on this node counts alone.
    pub(in crate::ledger) fn lose(&mut self, own: Timestamp) {
        let Some(cluster) = self.cluster.as_deref_mut().filter(|cluster| !cluster.is_alone()) else { return };
        let now = cluster.now(own);
        cluster.losses += 1;
        cluster.give_lease_back();
        let before = cluster.before.take().unwrap_or_else(|| self.quotas.clone());
        let states = self.quotas.states(now);
        let own_holds = cluster.own_holds(self.limits.configured(), &states);
        let nobodys = vec![0; own_holds.len()];
        let nodes = if cluster.terms.on_failure == OnStoreFailure::Local { cluster.nodes } else { 1 };
        let mut unspent = self.quotas.clone();
        unspent.reduce_to_share(now, nodes, &nobodys);
        match cluster.terms.on_failure {
            OnStoreFailure::Local => self.quotas.reduce_to_share(now, nodes, &own_holds),
            OnStoreFailure::Open => {
                self.quotas.reduce_to_share(now, 1, &own_holds);
                self.quotas.reset(now);
            }
            OnStoreFailure::Closed => {}
        }
        let spent = unspent.clone();
        cluster.alone = Some(Box::new(Alone { before, unspent, spent }));
    }

    /// The call that takes part again.
    pub(in crate::ledger) fn join(&mut self, own: Timestamp) -> Option<ScriptCommand> {
        let cluster = self.cluster.as_deref_mut()?;
        let now = cluster.now(own);
        cluster.commands.set_redis_time(now);
        let quotas = self.limits.configured();
        let states = match (&mut cluster.alone, &mut cluster.before) {
            (Some(alone), _) => alone.before.states(now),
            (None, Some(before)) => before.states(now),
            (None, None) => self.quotas.states(now),
        };
        let overridden = quotas.iter().map(|quota| self.limits.is_overridden(quota));
        let states: Vec<_> = states.into_iter().zip(overridden).collect();
        cluster.all_open().for_each(|(_, open)| open.is_certain = false);
        Some(cluster.commands.join(cluster.terms.stamp, cluster.was_here, &states))
    }

    /// Redis has answered to that. Returns how many quotas had other limits there, and for how many milliseconds others
    /// are to be waited for; `None`: it has to be asked anew.
    pub(in crate::ledger) fn joined(&mut self, own: Timestamp, answer: &ScriptReply) -> Option<(u64, u64)> {
        let cluster = self.cluster.as_deref_mut()?;
        cluster.heard(own, answer);
        if answer.verdict != Verdict::Done {
            return None;
        }
        cluster.was_here = true;
        cluster.was_kept = told(answer, 2) == 1;
        // The server's clock may have been stepped back.
        Some((told(answer, 1), told(answer, 3).min(LONGEST_REGAIN_MS)))
    }

    /// The call that has Redis hold again what is in flight, or some of it, and the numbers of those that it tells of; of what
    /// was admitted without Redis only when that is asked again. `None`: it has said that it knows of all.
    pub(in crate::ledger) fn hold(&mut self, own: Timestamp) -> Option<(ScriptCommand, Vec<u64>)> {
        let cluster = self.cluster.as_deref_mut()?;
        let now = cluster.now(own);
        cluster.commands.set_redis_time(now);
        let (ids, held) = cluster.next_to_hold();
        (!ids.is_empty()).then(|| (cluster.commands.hold(cluster.was_kept, &held), ids))
    }

    /// The call that says that there is nothing else.
    pub(in crate::ledger) fn hold_only(&mut self, own: Timestamp) -> Option<ScriptCommand> {
        let cluster = self.cluster.as_deref_mut()?;
        let now = cluster.now(own);
        cluster.commands.set_redis_time(now);
        let asked: Vec<u64> = cluster.asked.iter().copied().collect();
        let ids: Vec<u64> = cluster.all_open().map(|(id, _)| id).chain(asked).collect();
        Some(cluster.commands.release_unlisted(&ids))
    }

    /// From now on Redis is asked. What was spent meanwhile is paid in, and what was admitted meanwhile has still to be held.
    pub(in crate::ledger) fn return_from_alone(&mut self, own: Timestamp) {
        let Some(cluster) = self.cluster.as_deref_mut() else { return };
        let now = cluster.now(own);
        if let Some(alone) = cluster.alone.take() {
            cluster.before = Some(alone.before.clone());
            cluster.pay(now, *alone);
        }
    }

    /// Redis has answered to a call that tells what has become of reservations; `false`: it was not taken note of. What was,
    /// nobody here remembers any more: from now on it is known by how the quotas stand.
    pub(in crate::ledger) fn batch_is_told(
        &mut self,
        own: Timestamp,
        batch: &Batch,
        answer: &ScriptReply,
    ) -> bool {
        let Some(cluster) = self.cluster.as_deref_mut() else { return false };
        cluster.heard(own, answer);
        if answer.verdict != Verdict::Done {
            return false;
        }
        // While it returns its own quotas are its part, and those of all are kept apart.
        let all = match (&mut cluster.alone, &mut cluster.before) {
            (Some(alone), _) => &mut alone.before,
            (None, Some(before)) => before,
            (None, None) => &mut self.quotas,
        };
        redis::load_states(all, &batch.cells, answer);
        cluster.told(batch.steps);
        true
    }

    /// The call that shows that this node is alive, and asks how all quotas stand.
    pub(in crate::ledger) fn beat(&mut self, own: Timestamp) -> Option<ScriptCommand> {
        let cluster = self.cluster.as_deref_mut()?;
        let now = cluster.now(own);
        cluster.commands.set_redis_time(now);
        Some(cluster.commands.heartbeat())
    }

    /// Redis has answered to that. Returns whether quotas have other limits there than in this node's config, if that is
    /// news; `None`: it has to be asked anew.
    pub(in crate::ledger) fn beaten(&mut self, own: Timestamp, answer: &ScriptReply) -> Option<bool> {
        let cluster = self.cluster.as_deref_mut()?;
        cluster.heard(own, answer);
        if answer.verdict != Verdict::Done {
            return None;
        }
        (cluster.nodes, cluster.in_flight) = (told(answer, 0).max(1), told(answer, 1));
        if cluster.is_alone() {
            return Some(false);
        }
        cluster.before = None;
        if let Some(lease) = &mut cluster.lease {
            lease.look();
        }
        let all: Vec<u32> = (0..).take(answer.states.len()).collect();
        redis::load_states(&mut self.quotas, &all, answer);
        for (index, (state, is_override)) in answer.states.iter().enumerate() {
            self.limits.follow(index, is_override.then(|| limit(state)));
        }
        let differs = |(quota, (state, is_override)): (&Quota, &(CounterState, bool))| {
            !is_override && limit(state) != (quota.limit, quota.capacity())
        };
        let differs = self.limits.configured().iter().zip(&answer.states).any(differs);
        Some(differs && !std::mem::replace(&mut cluster.differs, differs))
    }

    /// The call that sets the limit of each quota so named. `None`: there is none.
    pub(in crate::ledger) fn limit_command(
        &mut self,
        own: Timestamp,
        key: QuotaKey<'_>,
        limit: Option<(u64, u64)>,
    ) -> Option<ScriptCommand> {
        let cluster = self.cluster.as_deref_mut()?;
        let now = cluster.now(own);
        cluster.commands.set_redis_time(now);
        let named = self.limits.configured().iter().enumerate().filter(|(_, quota)| key.names(quota));
        let change = |(index, quota): (usize, &Quota)| {
            let (limit, burst) = limit.unwrap_or((quota.limit, quota.capacity()));
            (index, NewLimit { limit, burst: quota.with_limit(limit, burst).capacity() })
        };
        let changes: Vec<_> = named.map(change).collect();
        (!changes.is_empty()).then(|| cluster.commands.limit(limit.is_some(), &changes))
    }

    pub(in crate::ledger) fn reset_command(&mut self, own: Timestamp) -> Option<ScriptCommand> {
        let cluster = self.cluster.as_deref_mut()?;
        let now = cluster.now(own);
        cluster.commands.set_redis_time(now);
        Some(cluster.commands.reset())
    }

    /// The node stops: what it leases goes back.
    pub(in crate::ledger) fn end_lease(&mut self) {
        if let Some(cluster) = self.cluster.as_deref_mut() {
            cluster.give_lease_back();
        }
    }

    pub(in crate::ledger) fn leave_command(&mut self) -> Option<ScriptCommand> {
        Some(self.cluster.as_deref_mut()?.commands.leave())
    }
}
