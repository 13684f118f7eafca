//! Adopts another config while the replica is in step with Redis.
//!
//! Cells keep their indices, because the journal and the reservations in flight name them by index. A removed quota keeps
//! its cell. A quota with another period or window has another cell in Redis, so its used amount is charged there.

use super::Replica;
use crate::clock::Timestamp;
use crate::ledger::durability::RestoredState;
use crate::ledger::replica::lease::Lease;
use crate::quota::{CarriedAmount, CounterState, Quota, Takeover};
use crate::redis::{Cells, ScriptCommand};

/// The settings of a config that a replica adopts.
#[derive(Clone, Debug, PartialEq)]
pub(in crate::ledger) struct ReplicaSettings {
    pub(in crate::ledger) stamp: u64,
    pub(in crate::ledger) leases: bool,
    pub(in crate::ledger) quotas: Vec<Quota>,
}

impl Replica {
    /// The command that sends the quotas and the stamp of another config to Redis. It joins the same session again.
    pub(in crate::ledger) fn adopt_command(
        &mut self,
        own: Timestamp,
        settings: &ReplicaSettings,
    ) -> ScriptCommand {
        let now = self.set_command_time(own);
        let mut next = self.local.quotas.clone();
        let in_force = self.local.overrides.apply_to(&settings.quotas);
        next.reconfigure(&in_force, now, Takeover::Separate, |_| None);
        let cells = self.local.cells_of_config(&next, &settings.quotas);
        let states: Vec<_> = next
            .states(now)
            .into_iter()
            .zip(&cells)
            .map(|(state, (quota, is_in_config))| (state, self.override_mark(quota), *is_in_config))
            .collect();
        let quotas: Vec<Quota> = cells.into_iter().map(|(quota, _)| quota).collect();
        let mut commands = self.commands.clone();
        commands.set_cells(Cells::new(&quotas, now));
        let enforce = self.enforce_mark();
        commands.join(
            settings.stamp,
            Some(self.journal.sent(self.data_set, self.first_joined)),
            &states,
            enforce,
        )
    }

    /// The config in force, if Redis has the limits of a node that has gone and needs those of this node.
    pub(in crate::ledger) fn settings_to_send(&mut self) -> Option<ReplicaSettings> {
        let quotas = || self.local.overrides.active().map(|(_, quota)| quota.clone()).collect();
        std::mem::take(&mut self.must_send_limits).then(|| ReplicaSettings {
            stamp: self.config.stamp,
            leases: self.config.leases,
            quotas: quotas(),
        })
    }

    /// Adopts a config whose quotas Redis has. Returns the amounts that `carry_over` charges once the states of all
    /// cells have been read.
    pub(in crate::ledger) fn adopt(
        &mut self,
        own: Timestamp,
        settings: &ReplicaSettings,
    ) -> Vec<CarriedAmount> {
        let now = self.redis_time(own);
        let restored = RestoredState::default();
        let carried = self.local.reconfigure(now, &settings.quotas, Takeover::Separate, &restored);
        let quotas = self.local.overrides.configured();
        self.commands.set_cells(Cells::new(quotas, now));
        let cells = quotas.len();
        self.config.stamp = settings.stamp;
        if settings.leases {
            self.lease.get_or_insert_with(|| Lease::new(cells)).resize(cells);
        } else {
            self.return_lease();
            self.lease = None;
        }
        carried
    }

    /// Charges the amounts that were used before a period or window changed, as far as the cells in Redis do not have
    /// them yet.
    pub(in crate::ledger) fn carry_over(&mut self, own: Timestamp, carried: &[CarriedAmount]) {
        let now = self.redis_time(own);
        let levels = self.local.quotas.cell_levels(now);
        let states = self.local.quotas.states(now);
        for &CarriedAmount { cell, amount } in carried {
            let (Some(level), Some(state)) = (levels.get(cell), states.get(cell)) else { continue };
            let missing = amount.saturating_sub(level.used.saturating_add(level.held));
            let turn = match state {
                CounterState::Rolling { .. } => 0,
                CounterState::Calendar { period_id, .. } => *period_id,
            };
            if let Some(cell) = u32::try_from(cell).ok().filter(|_| missing > 0) {
                self.journal.push(self.commands.offline_usage_step(cell, missing, turn));
            }
        }
    }

    /// Whether the replica is in step with Redis, so that it can adopt another config.
    pub(in crate::ledger) fn is_in_step(&self) -> bool {
        !self.is_offline() && !self.is_resyncing()
    }
}
