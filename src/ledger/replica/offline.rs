//! Counting without Redis, and the resync afterwards.

use super::{Offline, Replica};
use crate::clock::Timestamp;
use crate::config::OnStoreFailure;
use crate::quota::{CounterState, Quota, Quotas};

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
        self.count_offline(now, before, Vec::new());
    }

    /// Makes the counters by which this node counts without Redis. `before`: the shared quotas before the loss. `recorded`:
    /// the usage since then that the journal has.
    fn count_offline(&mut self, now: Timestamp, before: Quotas, recorded: Vec<OfflineUsage>) {
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
        self.offline = Some(Box::new(Offline { on_failure, nodes, before, unspent, spent, recorded }));
    }

    /// Sets `store.redis.on_failure`. It applies at once, also without Redis.
    pub(in crate::ledger) fn set_on_failure(&mut self, own: Timestamp, on_failure: OnStoreFailure) {
        self.config.on_failure = on_failure;
        let now = self.redis_time(own);
        // `closed` needs no counters, and leaves those of the setting before as they are.
        let needs_counters = |offline: &mut Box<Offline>| {
            on_failure != OnStoreFailure::Closed && offline.on_failure != on_failure
        };
        let Some(offline) = self.offline.take_if(needs_counters) else { return };
        let Offline { on_failure: counted_by, mut before, mut unspent, mut spent, recorded, .. } = *offline;
        let usage = offline_usage(unspent.states(now), spent.states(now));
        self.record_offline_usage(&usage);
        let usage = sum(usage, &recorded);
        if counted_by == OnStoreFailure::Closed {
            return self.count_offline(now, before, usage);
        }
        // The counters of the other setting were made from the same quotas, in another way.
        for (index, state) in before.states(now).iter().enumerate() {
            self.local.quotas.load_again(now, index, state);
        }
        self.count_offline(now, before, usage.clone());
        if on_failure == OnStoreFailure::Local {
            self.take_offline_usage(now, &usage);
        }
    }

    /// What happens to requests while Redis is unavailable.
    pub(in crate::ledger) fn on_failure(&self) -> OnStoreFailure {
        self.config.on_failure
    }

    /// Whether this node has usage that Redis has not confirmed.
    pub(in crate::ledger) fn has_unreported(&mut self, own: Timestamp) -> bool {
        let now = self.redis_time(own);
        let has_offline_usage = self.offline.as_mut().is_some_and(|offline| {
            let usage = offline_usage(offline.unspent.states(now), offline.spent.states(now));
            usage.iter().any(|usage| usage.amount > 0)
        });
        has_offline_usage || !self.journal.entries.is_empty()
    }

    /// Without Redis, puts the config in force again where an override has ended. Used amounts stay.
    pub(in crate::ledger) fn end_overrides(&mut self, own: Timestamp) {
        let now = self.redis_time(own);
        let Some(offline) = self.offline.as_mut().filter(|_| self.local.overrides.is_due(now)) else {
            return;
        };
        let before = self.local.overrides.set().clone();
        self.local.overrides.end_due(now);
        let overrides = &self.local.overrides;
        // Other quotas keep their limits, which may be those of another node's config.
        let has_ended = |quota: &Quota| before.of(quota).is_some() && overrides.set().of(quota).is_none();
        let ended: Vec<Option<&Quota>> =
            overrides.configured().iter().map(|quota| Some(quota).filter(|quota| has_ended(quota))).collect();
        // A lower limit forgives debt. Redis gets the whole usage.
        let usage = offline_usage(offline.unspent.states(now), offline.spent.states(now));
        restore_limits(&mut offline.before, &ended, 1, now);
        restore_limits(&mut offline.unspent, &ended, offline.nodes, now);
        restore_limits(&mut self.local.quotas, &ended, offline.nodes, now);
        offline.spent = offline.unspent.clone();
        offline.recorded = sum(usage.clone(), &offline.recorded);
        self.local.apply_enforce();
        self.record_offline_usage(&usage);
    }

    /// Takes the amounts that this node has spent without Redis from its counters.
    fn take_offline_usage(&mut self, now: Timestamp, usage: &[OfflineUsage]) {
        for (index, (mut state, usage)) in self.local.quotas.states(now).into_iter().zip(usage).enumerate() {
            match &mut state {
                CounterState::Rolling { level: (level, _), .. } => {
                    *level = level.saturating_sub_unsigned(usage.amount);
                }
                CounterState::Calendar { used, period_id, .. } if *period_id == usage.turn => {
                    *used = used.saturating_add(usage.amount);
                }
                CounterState::Calendar { .. } => {}
            }
            self.local.quotas.load_again(now, index, &state);
        }
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
            let Offline { before, mut unspent, mut spent, .. } = *offline;
            self.resyncing = Some(before);
            self.record_offline_usage(&offline_usage(unspent.states(now), spent.states(now)));
            self.report_counted();
        }
    }

    /// Adds the usage while offline to the journal.
    fn record_offline_usage(&mut self, usage: &[OfflineUsage]) {
        for (index, &OfflineUsage { amount, turn }) in (0..).zip(usage).filter(|(_, usage)| usage.amount > 0)
        {
            self.journal.push(self.commands.offline_usage_step(index, amount, turn));
        }
    }
}

/// Gives the quotas their share of these limits. `None`: the limit stays.
fn restore_limits(quotas: &mut Quotas, limits: &[Option<&Quota>], nodes: u64, now: Timestamp) {
    let share = |quota: &Quota| {
        let nodes = if quota.is_unlimited() { 1 } else { nodes };
        quota.with_limit(quota.limit / nodes, quota.capacity() / nodes)
    };
    let with_limit =
        |((quota, _), limit): ((&Quota, bool), Option<&Quota>)| limit.map_or_else(|| quota.clone(), share);
    let all: Vec<Quota> = quotas.cells().zip(limits.iter().copied()).map(with_limit).collect();
    quotas.set_limits(&all, now);
}

/// What a node has spent of one quota while it was offline.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct OfflineUsage {
    amount: u64,
    /// The number of the calendar period; 0 for a rolling quota.
    turn: u64,
}

/// The usage of each quota while offline, without the part that has been refilled since. `all`: the states as if nothing had
/// been spent.
fn offline_usage(all: Vec<CounterState>, left: Vec<CounterState>) -> Vec<OfflineUsage> {
    let of = |states| match states {
        (CounterState::Rolling { level: (all, _), .. }, CounterState::Rolling { level: (left, _), .. }) => {
            OfflineUsage { amount: u64::try_from(all.saturating_sub(left)).unwrap_or(0), turn: 0 }
        }
        (CounterState::Calendar { used: none, .. }, CounterState::Calendar { used, period_id: turn, .. }) => {
            OfflineUsage { amount: used.saturating_sub(none), turn }
        }
        _ => OfflineUsage::default(),
    };
    all.into_iter().zip(left).map(of).collect()
}

/// The usage since the loss. `recorded`: an earlier part of it.
fn sum(mut usage: Vec<OfflineUsage>, recorded: &[OfflineUsage]) -> Vec<OfflineUsage> {
    for (usage, recorded) in
        usage.iter_mut().zip(recorded).filter(|(usage, recorded)| usage.turn == recorded.turn)
    {
        usage.amount = usage.amount.saturating_add(recorded.amount);
    }
    usage
}
