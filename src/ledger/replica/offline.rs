//! Counting without Redis, and the resync afterwards.

use super::{Offline, Replica};
use crate::clock::Timestamp;
use crate::config::OnStoreFailure;
use crate::quota::{CounterState, Quota};

impl Replica {
    /// Goes offline, because Redis is unavailable: from now on this node counts within its share of the quotas. Has
    /// no effect if the node is offline already.
    pub(in crate::ledger) fn go_offline(&mut self, own: Timestamp) {
        if self.is_offline() {
            return;
        }
        let now = self.redis_time(own);
        self.losses += 1;
        self.return_lease();
        let before = self.resyncing.take().unwrap_or_else(|| self.local.quotas.clone());
        let states = self.local.quotas.states(now);
        let own_held = self.own_held(self.local.overrides.configured(), &states);
        let none_held = vec![0; own_held.len()];
        let on_failure = self.config.on_failure;
        let nodes = if on_failure == OnStoreFailure::Local { self.nodes } else { 1 };
        let mut unspent = self.local.quotas.clone();
        unspent.reduce_to_share(now, nodes, &none_held);
        match on_failure {
            OnStoreFailure::Local => self.local.quotas.reduce_to_share(now, nodes, &own_held),
            OnStoreFailure::Open => {
                self.local.quotas.reduce_to_share(now, 1, &own_held);
                self.local.quotas.reset(now);
            }
            OnStoreFailure::Closed => {}
        }
        let spent = unspent.clone();
        self.offline = Some(Box::new(Offline { before, unspent, spent }));
    }

    /// The amounts that this node's requests hold in each quota.
    fn own_held(&self, quotas: &[Quota], states: &[CounterState]) -> Vec<u64> {
        let mut held = vec![0_u64; quotas.len()];
        for piece in self.tracked.values().flat_map(|tracked| &tracked.pieces) {
            for &(index, turn) in &piece.cells {
                let index = index as usize;
                let is_over = matches!(states.get(index), Some(CounterState::Calendar { period_id: now, .. }) if *now != turn);
                if let (Some(held), Some(quota), false) = (held.get_mut(index), quotas.get(index), is_over) {
                    *held += piece.reserved.saturating_sub(piece.spent).of(quota.kind);
                }
            }
        }
        held
    }

    /// Begins the resync: Redis is available and holds again the reservations that it admitted. From now on Redis
    /// decides on requests. Adds the usage while offline to the journal. Redis does not yet hold reservations that
    /// were admitted offline, see `hold_command`.
    pub(in crate::ledger) fn begin_resync(&mut self, own: Timestamp) {
        let now = self.redis_time(own);
        if let Some(offline) = self.offline.take() {
            let Offline { before, mut unspent, mut spent } = *offline;
            self.resyncing = Some(before);
            self.record_offline_usage(unspent.states(now), spent.states(now));
            self.report_counted();
        }
    }

    /// Adds to the journal the usage of each quota while offline, without the part that has been refilled since.
    fn record_offline_usage(&mut self, unspent: Vec<CounterState>, spent: Vec<CounterState>) {
        for (index, states) in (0..).zip(unspent.into_iter().zip(spent)) {
            let (amount, turn) = match states {
                (
                    CounterState::Rolling { level: (all, _), .. },
                    CounterState::Rolling { level: (left, _), .. },
                ) => (all.saturating_sub(left), 0),
                (
                    CounterState::Calendar { used: none, .. },
                    CounterState::Calendar { used, period_id: turn, .. },
                ) => (i64::try_from(used.saturating_sub(none)).unwrap_or(i64::MAX), turn),
                _ => continue,
            };
            if let Some(amount) = u64::try_from(amount).ok().filter(|amount| *amount > 0) {
                self.journal.push(self.commands.offline_usage_step(index, amount, turn));
            }
        }
    }
}
