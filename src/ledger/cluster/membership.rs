//! Losing Redis, taking part again, and showing that this node is alive; what administrators set for all nodes.

use super::{Alone, LONGEST_REGAIN_MS, limit, told};
use crate::clock::Timestamp;
use crate::config::OnStoreFailure;
use crate::ledger::{Counters, QuotaKey};
use crate::quota::{Quota, State};
use crate::shared::{self, Answer, Command, Verdict};

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
        unspent.share(now, nodes, &nobodys);
        match cluster.terms.on_failure {
            OnStoreFailure::Local => self.quotas.share(now, nodes, &own_holds),
            OnStoreFailure::Open => {
                self.quotas.share(now, 1, &own_holds);
                self.quotas.reset(now);
            }
            OnStoreFailure::Closed => {}
        }
        let spent = unspent.clone();
        cluster.alone = Some(Box::new(Alone { before, unspent, spent }));
    }

    /// The call that takes part again, with what Redis may have lost.
    pub(in crate::ledger) fn join(&mut self, own: Timestamp) -> Option<Command> {
        let cluster = self.cluster.as_deref_mut()?;
        let now = cluster.now(own);
        cluster.speaker.set_about(now);
        let quotas = self.limits.configured();
        let states = match (&mut cluster.alone, &mut cluster.before) {
            (Some(alone), _) => alone.before.states(now),
            (None, Some(before)) => before.states(now),
            (None, None) => self.quotas.states(now),
        };
        let overridden = quotas.iter().map(|quota| self.limits.is_overridden(quota));
        let states: Vec<_> = states.into_iter().zip(overridden).collect();
        let held = cluster.to_take_up();
        let (stamp, is_alone) = (cluster.terms.stamp, cluster.is_alone());
        if !is_alone {
            cluster.all_is_told();
        }
        Some(cluster.speaker.join(stamp, cluster.was_here, is_alone, &states, &held))
    }

    /// Redis has answered to that. Returns how many quotas had other limits there, and for how many milliseconds others
    /// are to be waited for; `None`: it has to be asked anew.
    pub(in crate::ledger) fn joined(&mut self, own: Timestamp, answer: &Answer) -> Option<(u64, u64)> {
        let cluster = self.cluster.as_deref_mut()?;
        cluster.heard(own, answer);
        if answer.verdict != Verdict::Done {
            return None;
        }
        cluster.was_here = true;
        // The server's clock may have been stepped back.
        Some((told(answer, 1), told(answer, 3).min(LONGEST_REGAIN_MS)))
    }

    /// From now on Redis is asked. What was spent meanwhile is paid in, and what is in flight has to be told by one more
    /// call to join.
    pub(in crate::ledger) fn return_from_alone(&mut self, own: Timestamp) {
        let Some(cluster) = self.cluster.as_deref_mut() else { return };
        let now = cluster.now(own);
        if let Some(alone) = cluster.alone.take() {
            cluster.before = Some(alone.before.clone());
            cluster.pay(now, *alone);
        }
    }

    /// Redis knows of everything that is in flight.
    pub(in crate::ledger) fn all_is_known(&mut self) {
        let Some(cluster) = self.cluster.as_deref_mut() else { return };
        // What was admitted since it was lost once more it has not heard of.
        cluster.all_open().for_each(|open| open.is_certain = open.is_known);
    }

    /// The call that shows that this node is alive, and asks how all quotas stand.
    pub(in crate::ledger) fn beat(&mut self, own: Timestamp) -> Option<Command> {
        let cluster = self.cluster.as_deref_mut()?;
        let now = cluster.now(own);
        cluster.speaker.set_about(now);
        Some(cluster.speaker.beat())
    }

    /// Redis has answered to that. Returns whether quotas have other limits there than in this node's config, if that is
    /// news; `None`: it has to be asked anew.
    pub(in crate::ledger) fn beaten(&mut self, own: Timestamp, answer: &Answer) -> Option<bool> {
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
        let all: Vec<u32> = (0..).take(answer.states.len()).collect();
        shared::load(&mut self.quotas, &all, answer);
        for (index, (state, is_override)) in answer.states.iter().enumerate() {
            self.limits.follow(index, is_override.then(|| limit(state)));
        }
        let differs = |(quota, (state, is_override)): (&Quota, &(State, bool))| {
            !is_override && limit(state) != (quota.limit, quota.capacity())
        };
        let differs = self.limits.configured().iter().zip(&answer.states).any(differs);
        Some(differs && !std::mem::replace(&mut cluster.differs, differs))
    }

    /// The calls that set a limit: of each quota so named. Empty: there is none.
    pub(in crate::ledger) fn limit_commands(
        &mut self,
        own: Timestamp,
        key: QuotaKey<'_>,
        limit: Option<(u64, u64)>,
    ) -> Vec<Command> {
        let Some(cluster) = self.cluster.as_deref_mut() else { return Vec::new() };
        let now = cluster.now(own);
        cluster.speaker.set_about(now);
        let named = self.limits.configured().iter().enumerate().filter(|(_, quota)| key.names(quota));
        let command = |(index, quota): (usize, &Quota)| {
            let (new, burst) = limit.unwrap_or((quota.limit, quota.capacity()));
            let new_burst = quota.with_limit(new, burst).capacity();
            cluster.speaker.limit(index, new, new_burst, limit.is_some())
        };
        named.map(command).collect()
    }

    pub(in crate::ledger) fn reset_command(&mut self, own: Timestamp) -> Option<Command> {
        let cluster = self.cluster.as_deref_mut()?;
        let now = cluster.now(own);
        cluster.speaker.set_about(now);
        Some(cluster.speaker.reset())
    }

    /// The node stops: what it leases goes back.
    pub(in crate::ledger) fn end_lease(&mut self) {
        if let Some(cluster) = self.cluster.as_deref_mut() {
            cluster.give_lease_back();
        }
    }

    pub(in crate::ledger) fn leave_command(&mut self) -> Option<Command> {
        Some(self.cluster.as_deref_mut()?.speaker.leave())
    }
}
