//! The three ways to admit a request: by Redis, from a lease, or while offline from this node's share.

use super::Replica;
use super::lease::LeaseAction;
use super::session::value;
use crate::clock::Timestamp;
use crate::ledger::demand::{Admission, Demand, NoRoom};
use crate::ledger::overrides::QuotaKey;
use crate::quota::{Applicable, Shortfall, Wait};
use crate::redis::{self, OnShortage, ReserveRequest, ScriptCommand, ScriptReply, Verdict};

/// A call that requests a reservation from Redis.
#[derive(Debug)]
pub(in crate::ledger) struct ReserveCall {
    pub(in crate::ledger) command: ScriptCommand,
    pub(in crate::ledger) id: u64,
    allowance: u64,
    /// The quotas that apply to the request. Redis decides on these, and holds in the limited ones. So the request holds in
    /// the same ones here, even if a quota has got or lost its limit meanwhile.
    touched: Applicable,
    terms: Terms,
    /// `Replica::losses` when the call was made.
    losses: u64,
    /// The number of the first step that Redis had not acknowledged when the call was made.
    first_step: u64,
    /// The journal had unsent steps when the call was made. Redis may therefore not yet have had the room that this
    /// node's requests released.
    pub(in crate::ledger) had_unsent_steps: bool,
}

/// The rules of the config by which Redis decides on a call, and this node on the reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Terms {
    enforce: bool,
    max_in_flight: Option<u64>,
}

/// The outcome of a `ReserveCall`.
#[derive(Debug)]
#[allow(clippy::large_enum_variant)] // the large variant is the usual one and is taken apart at once
pub(in crate::ledger) enum ReserveOutcome {
    Decided(Result<Admission, NoRoom>),
    /// Nothing was reserved, and the call can be repeated.
    Retry,
    /// Redis does not have this node's session.
    UnknownSession,
}

impl Replica {
    /// The call that requests a reservation from Redis. `None`: this node is offline.
    pub(in crate::ledger) fn reserve_call(
        &mut self,
        own: Timestamp,
        demand: &Demand<'_>,
    ) -> Option<ReserveCall> {
        if self.is_offline() {
            return None;
        }
        let touched = self.local.quotas.applicable(demand.subject);
        let allowance = self.local.allowance(demand, &touched, None);
        let required = self.local.required(demand, allowance);
        let rules = &self.local.rules;
        let max_in_flight = if rules.enforce { rules.max_in_flight.unwrap_or(0) } else { 0 };
        let id = self.take_id();
        self.pending.insert(id);
        self.set_command_time(own);
        let request = ReserveRequest {
            id: &id.to_string(),
            max_in_flight,
            on_shortage: self.on_shortage(demand, allowance),
            generates: required.generates,
            amounts: required.amounts,
            completions: demand.completions,
        };
        let command = self.commands.reserve(&request, touched.limited());
        let (losses, first_step) = (self.losses, self.journal.first);
        let had_unsent_steps = self.has_unsent_steps();
        let terms = self.terms();
        Some(ReserveCall { command, id, allowance, touched, terms, losses, first_step, had_unsent_steps })
    }

    pub(super) fn terms(&self) -> Terms {
        let rules = &self.local.rules;
        Terms { enforce: rules.enforce, max_in_flight: rules.max_in_flight }
    }

    pub(super) fn on_shortage(&self, demand: &Demand<'_>, allowance: u64) -> OnShortage {
        if !self.local.rules.enforce {
            OnShortage::AdmitAnyway
        } else if self.local.clamps(demand) && allowance > 0 {
            OnShortage::Clamp
        } else {
            OnShortage::Reject
        }
    }

    /// Applies the reply to a `ReserveCall`. Repeats the decision of Redis with the code that decides without Redis.
    pub(in crate::ledger) fn on_reserve(
        &mut self,
        own: Timestamp,
        demand: &Demand<'_>,
        call: &ReserveCall,
        reply: &ScriptReply,
    ) -> ReserveOutcome {
        self.pending.remove(&call.id);
        self.record_time(own, reply);
        let was_admitted = match reply.verdict {
            Verdict::Admitted => true,
            Verdict::Denied | Verdict::TooManyInFlight => false,
            Verdict::StalePeriod | Verdict::DeadlinePassed => return ReserveOutcome::Retry,
            Verdict::UnknownSession | Verdict::Done => return ReserveOutcome::UnknownSession,
        };
        if self.is_offline() || self.losses != call.losses {
            // Redis was lost after the call was sent, so its decision no longer applies.
            if was_admitted {
                self.cancel(call.id);
            }
            return ReserveOutcome::Retry;
        }
        // If Redis acknowledged steps after this call was made, the states in this reply may not include them, and
        // the journal no longer contains them. The newer states are restored after the decision.
        let is_overtaken = self.journal.first != call.first_step;
        let newer_states = if is_overtaken {
            self.local.quotas.states_of(reply.now, call.touched.limited())
        } else {
            Vec::new()
        };
        redis::load_states(&mut self.local.quotas, call.touched.limited(), reply);
        let in_flight = value(reply, 0);
        self.nodes = value(reply, 1).max(1);
        let is_full = self.local.rules.max_in_flight.is_some_and(|max| in_flight >= max);
        let decided =
            self.local.try_admit_with(reply.now, demand, &call.touched, call.allowance, is_full, None);
        let outcome = self.align_with_redis(decided, was_admitted, demand, call, reply);
        for (&index, state) in call.touched.limited().iter().zip(&newer_states) {
            self.local.quotas.load_again(reply.now, index as usize, state);
        }
        outcome
    }

    /// Replaces this node's decision by that of Redis. They differ only if the rules have changed since the call was made, or
    /// if the node and the script have different versions of the code.
    fn align_with_redis(
        &mut self,
        decided: Result<Admission, NoRoom>,
        was_admitted: bool,
        demand: &Demand<'_>,
        call: &ReserveCall,
        reply: &ScriptReply,
    ) -> ReserveOutcome {
        let has_changed = call.terms != self.terms();
        if !has_changed {
            report_difference(decided.is_ok(), was_admitted);
        }
        ReserveOutcome::Decided(match decided {
            Ok(admission) if was_admitted => Ok(self.track_online(call.id, admission)),
            Ok(admission) => {
                self.local.revert(reply.now, demand.subject.model, admission.grant);
                if has_changed {
                    return ReserveOutcome::Retry;
                }
                Err(NoRoom::InFlight { limit: value(reply, 0), upstream: None })
            }
            Err(_) if was_admitted => {
                let admission = self.local.admit_regardless(reply.now, demand, &call.touched, call.allowance);
                Ok(self.track_online(call.id, admission))
            }
            Err(no_room) => Err(no_room),
        })
    }

    /// Admits a request from this node's lease. `None`: there is no lease, or it has too little left.
    pub(in crate::ledger) fn admit_leased(
        &mut self,
        own: Timestamp,
        demand: &Demand<'_>,
    ) -> Option<Admission> {
        if !self.may_use_lease() {
            return None;
        }
        let touched = self.local.quotas.applicable(demand.subject);
        let allowance = self.local.allowance(demand, &touched, None);
        let required = self.local.required(demand, allowance);
        let limited = touched.limited();
        let now = self.redis_time(own);
        self.lease.as_mut()?.take(now, self.local.overrides.configured(), limited, &required)?;
        let id = self.take_id();
        self.journal.push(self.commands.leased_admission_step(id.to_string(), required.amounts, limited));
        let admission = self.local.admit_regardless(now, demand, &touched, allowance);
        Some(self.track_online(id, admission))
    }

    /// Whether requests may be admitted from the lease. Only Redis counts the requests in flight on all nodes, and shadow
    /// mode needs a decision on the whole quota.
    pub(super) fn may_use_lease(&self) -> bool {
        let rules = &self.local.rules;
        self.lease.is_some()
            && rules.enforce
            && rules.max_in_flight.is_none()
            && !self.is_offline()
            && !self.has_large_backlog()
    }

    /// Admits a request without Redis, from this node's share.
    ///
    /// # Errors
    /// Why it does not fit.
    pub(in crate::ledger) fn admit_offline(
        &mut self,
        own: Timestamp,
        demand: &Demand<'_>,
    ) -> Result<Admission, NoRoom> {
        if self.is_closed() {
            return Err(NoRoom::Unavailable);
        }
        let now = self.redis_time(own);
        let admitted = self.local.try_admit(now, demand);
        let mut admission = admitted.map_err(|no_room| self.unavailable_if_shared(no_room))?;
        let id = self.take_id();
        admission.grant.id = Some(id);
        self.track(id, false, &admission.grant.receipts);
        Ok(admission)
    }

    /// Replaces the denial of a request that can never fit in this node's shares, but fits in the whole quotas: only Redis can
    /// admit it.
    fn unavailable_if_shared(&self, no_room: NoRoom) -> NoRoom {
        let NoRoom::Quota(denied) = &no_room else { return no_room };
        let mut too_small = denied.shortfalls().iter().filter(|short| short.wait == Wait::Never).peekable();
        if too_small.peek().is_none() {
            return no_room;
        }
        let whole = self.local.overrides.in_force();
        let fits_whole = |short: &Shortfall| {
            let key = QuotaKey::of(&short.quota);
            whole.iter().any(|quota| key.matches(quota) && short.requested <= quota.capacity())
        };
        if too_small.all(fits_whole) { NoRoom::Unavailable } else { no_room }
    }

    /// Tracks a reservation that Redis holds. Redis persists it, so this node's store need not.
    pub(super) fn track_online(&mut self, id: u64, mut admission: Admission) -> Admission {
        admission.grant.id = Some(id);
        admission.is_durable = false;
        self.track(id, true, &admission.grant.receipts);
        admission
    }

    /// The command that takes a larger lease, if the lease needs one now.
    pub(in crate::ledger) fn lease_command(&mut self, own: Timestamp) -> Option<ScriptCommand> {
        if self.is_offline() {
            return None;
        }
        let now = self.redis_time(own);
        let lease = self.lease.as_mut().filter(|lease| lease.is_due(now))?;
        match lease.review(now, &self.local.quotas.cell_levels(now), self.nodes) {
            LeaseAction::Keep => None,
            LeaseAction::Return => {
                self.return_lease();
                None
            }
            LeaseAction::Take(wanted) => {
                lease.mark_requested();
                self.set_command_time(own);
                Some(self.commands.lease(&wanted))
            }
        }
    }

    /// Applies the reply to `lease_command`. Returns `false` if Redis does not have this node's session.
    pub(in crate::ledger) fn on_lease(&mut self, own: Timestamp, reply: &ScriptReply) -> bool {
        self.record_time(own, reply);
        if reply.verdict != Verdict::Done || self.is_offline() {
            return reply.verdict != Verdict::UnknownSession;
        }
        let all: Vec<u32> = (0..).take(reply.states.len()).collect();
        redis::load_states(&mut self.local.quotas, &all, reply);
        if let Some(lease) = &mut self.lease {
            lease.grow(reply);
        }
        true
    }
}

/// Logs that Redis and this node decided differently about a request. They do so only if they have different versions of the
/// code.
pub(super) fn report_difference(was_admitted_here: bool, was_admitted_by_redis: bool) {
    if was_admitted_here != was_admitted_by_redis {
        tracing::error!(
            redis = was_admitted_by_redis,
            "Redis and this node decided differently about a request: the decision of Redis applies"
        );
    }
}
