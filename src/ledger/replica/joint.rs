//! Requests in the quotas of an environment and of its upstream together. One call of the script decides on both. Each replica
//! tracks its part and reports its settlement by itself.

use super::Replica;
use super::admission::{ReserveOutcome, Terms, report_difference};
use super::session::value;
use crate::clock::Timestamp;
use crate::ledger::demand::{Admission, Demand, Grant, NoRoom, Progress};
use crate::ledger::local::Backing;
use crate::quota::{Amounts, Applicable, CounterState, Required, Subject};
use crate::redis::{self, ReserveRequest, ScriptCommand, ScriptReply, UpstreamReserve, Verdict};

/// A call that requests a reservation in the quotas of an environment and of its upstream.
#[derive(Debug)]
pub(in crate::ledger) struct JointCall {
    pub(in crate::ledger) command: ScriptCommand,
    /// The part of the environment.
    pub(in crate::ledger) own: CallPart,
    pub(in crate::ledger) upstream: CallPart,
    allowance: u64,
    /// Redis may not yet have had the room that requests of this node released.
    pub(in crate::ledger) had_unsent_steps: bool,
}

/// One replica's part of a call.
#[derive(Debug)]
pub(in crate::ledger) struct CallPart {
    pub(in crate::ledger) id: u64,
    touched: Applicable,
    terms: Terms,
    /// `Replica::losses` when the call was made.
    losses: u64,
    /// The number of the first step that Redis had not acknowledged when the call was made.
    first_step: u64,
}

/// The upstream of a request: its replica, and the model by the name that is sent to it.
pub(in crate::ledger) struct UpstreamReplica<'a> {
    pub(in crate::ledger) replica: &'a mut Replica,
    pub(in crate::ledger) model: &'a str,
}

impl<'a> UpstreamReplica<'a> {
    fn subject(&self) -> Subject<'a> {
        Subject { caller: None, model: self.model }
    }

    fn backing(&mut self) -> Backing<'_> {
        Backing::new(self.replica.local_mut(), self.model)
    }

    /// The same, with the quotas on which Redis has decided.
    fn backing_of(&mut self, part: &CallPart) -> Backing<'_> {
        self.backing().with_quotas(part.touched.clone())
    }
}

impl Replica {
    /// The call that requests a reservation from Redis, in both. `None`: one of the two is offline.
    pub(in crate::ledger) fn reserve_call_at(
        &mut self,
        own: Timestamp,
        demand: &Demand<'_>,
        upstream: &mut UpstreamReplica<'_>,
    ) -> Option<JointCall> {
        if self.is_offline() || upstream.replica.is_offline() {
            return None;
        }
        let touched = self.local.quotas.applicable(demand.subject);
        let allowance = self.local.allowance(demand, &touched, Some(&upstream.backing()));
        let required = self.local.required(demand, allowance);
        let part = self.begin_part(own, touched);
        let of_upstream = upstream.replica.local.quotas.applicable(upstream.subject());
        let other = upstream.replica.begin_part(own, of_upstream);
        let max_in_flight = if self.is_enforcing() { self.local.rules.max_in_flight.unwrap_or(0) } else { 0 };
        let request = ReserveRequest {
            id: &part.id.to_string(),
            max_in_flight,
            on_shortage: self.on_shortage(demand, allowance),
            generates: required.generates,
            amounts: required.amounts,
            completions: demand.completions,
        };
        let at_upstream = UpstreamReserve {
            id: &other.id.to_string(),
            max_in_flight: upstream.replica.local.rules.max_in_flight.unwrap_or(0),
            touched: other.touched.limited(),
        };
        let commands = &mut upstream.replica.commands;
        let command = self.commands.reserve_at(&request, part.touched.limited(), commands, &at_upstream);
        let had_unsent_steps = self.has_unsent_steps() || upstream.replica.has_unsent_steps();
        Some(JointCall { command, own: part, upstream: other, allowance, had_unsent_steps })
    }

    fn begin_part(&mut self, own: Timestamp, touched: Applicable) -> CallPart {
        let id = self.take_id();
        self.pending.insert(id);
        self.set_command_time(own);
        CallPart { id, touched, terms: self.terms(), losses: self.losses, first_step: self.journal.first }
    }

    /// Applies the reply to a `JointCall`. Repeats the decision of Redis with the code that decides without Redis.
    pub(in crate::ledger) fn on_reserve_at(
        &mut self,
        own: Timestamp,
        demand: &Demand<'_>,
        call: &JointCall,
        reply: &ScriptReply,
        upstream: &mut UpstreamReplica<'_>,
    ) -> ReserveOutcome {
        self.pending.remove(&call.own.id);
        upstream.replica.pending.remove(&call.upstream.id);
        self.record_time(own, reply);
        upstream.replica.record_time(own, reply);
        let was_admitted = match reply.verdict {
            Verdict::Admitted => true,
            Verdict::Denied | Verdict::TooManyInFlight => false,
            Verdict::StalePeriod | Verdict::DeadlinePassed => return ReserveOutcome::Retry,
            Verdict::UnknownSession | Verdict::Done => {
                let unknown = if value(reply, 0) == 2 { &mut *upstream.replica } else { self };
                unknown.go_offline(own);
                return ReserveOutcome::UnknownSession;
            }
        };
        if self.has_lost(&call.own) || upstream.replica.has_lost(&call.upstream) {
            // Redis was lost after the call was sent, so its decision no longer applies.
            if was_admitted {
                self.cancel(call.own.id);
                upstream.replica.cancel(call.upstream.id);
            }
            return ReserveOutcome::Retry;
        }
        let (of_own, of_upstream) = reply.split(call.own.touched.limited().len());
        let newer = self.load_part(&call.own, &of_own);
        let newer_upstream = upstream.replica.load_part(&call.upstream, &of_upstream);
        let decided = self.decide_at(demand, call, (&of_own, &of_upstream), upstream);
        let outcome = self.align_at(decided, was_admitted, demand, call, (&of_own, &of_upstream), upstream);
        self.restore_part(&call.own, &of_own, &newer);
        upstream.replica.restore_part(&call.upstream, &of_upstream, &newer_upstream);
        outcome
    }

    fn has_lost(&self, part: &CallPart) -> bool {
        self.is_offline() || self.losses != part.losses
    }

    /// Loads the states of a reply. Returns the newer states, if Redis acknowledged steps after the call was made.
    fn load_part(&mut self, part: &CallPart, reply: &ScriptReply) -> Vec<CounterState> {
        let is_overtaken = self.journal.first != part.first_step;
        let newer = if is_overtaken {
            self.local.quotas.states_of(reply.now, part.touched.limited())
        } else {
            Vec::new()
        };
        redis::load_states(&mut self.local.quotas, part.touched.limited(), reply);
        self.nodes = value(reply, 1).max(1);
        newer
    }

    fn restore_part(&mut self, part: &CallPart, reply: &ScriptReply, newer: &[CounterState]) {
        for (&index, state) in part.touched.limited().iter().zip(newer) {
            self.local.quotas.load_again(reply.now, index as usize, state);
        }
    }

    fn decide_at(
        &mut self,
        demand: &Demand<'_>,
        call: &JointCall,
        (reply, of_upstream): (&ScriptReply, &ScriptReply),
        upstream: &mut UpstreamReplica<'_>,
    ) -> Result<Admission, NoRoom> {
        let is_full = |replica: &Self, reply: &ScriptReply| {
            replica.local.rules.max_in_flight.is_some_and(|max| value(reply, 0) >= max)
        };
        let is_upstream_full = is_full(upstream.replica, of_upstream);
        let is_full = is_full(self, reply);
        let mut backing = upstream.backing_of(&call.upstream).with_full(is_upstream_full);
        let own = &call.own.touched;
        self.local.try_admit_with(reply.now, demand, own, call.allowance, is_full, Some(&mut backing))
    }

    /// Replaces this node's decision by that of Redis, as `align_with_redis` does.
    fn align_at(
        &mut self,
        decided: Result<Admission, NoRoom>,
        was_admitted: bool,
        demand: &Demand<'_>,
        call: &JointCall,
        (reply, of_upstream): (&ScriptReply, &ScriptReply),
        upstream: &mut UpstreamReplica<'_>,
    ) -> ReserveOutcome {
        let has_changed = call.own.terms != self.terms() || call.upstream.terms != upstream.replica.terms();
        if !has_changed {
            report_difference(decided.is_ok(), was_admitted);
        }
        ReserveOutcome::Decided(match decided {
            Ok(admission) if was_admitted => Ok(self.track_at(call, admission, upstream)),
            Ok(admission) => {
                self.local.revert(reply.now, demand.subject.model, admission.grant);
                if let Some(mut grant) = admission.upstream {
                    upstream.replica.local.release_backing(of_upstream.now, &mut grant);
                }
                if has_changed {
                    return ReserveOutcome::Retry;
                }
                Err(NoRoom::InFlight { limit: value(reply, 0), upstream: None })
            }
            Err(_) if was_admitted => {
                let (own, allowance) = (&call.own.touched, call.allowance);
                let mut admission = self.local.admit_regardless(reply.now, demand, own, allowance);
                let required = self.local.required(demand, allowance);
                admission.back(reply.now, &mut upstream.backing_of(&call.upstream), &required);
                Ok(self.track_at(call, admission, upstream))
            }
            Err(no_room) => Err(no_room),
        })
    }

    fn track_at(
        &mut self,
        call: &JointCall,
        mut admission: Admission,
        upstream: &mut UpstreamReplica<'_>,
    ) -> Admission {
        if let Some(grant) = &mut admission.upstream {
            upstream.replica.track_backing(call.upstream.id, grant);
        }
        self.track_online(call.own.id, admission)
    }

    fn track_backing(&mut self, id: u64, grant: &mut Grant) {
        grant.id = Some(id);
        self.track(id, true, &grant.receipts);
    }

    /// Admits a request from the leases of both. `None`: one of the two has no lease, or too little left.
    pub(in crate::ledger) fn admit_leased_at(
        &mut self,
        own: Timestamp,
        demand: &Demand<'_>,
        upstream: &mut UpstreamReplica<'_>,
    ) -> Option<Admission> {
        if !self.may_use_lease() || !upstream.replica.may_use_lease() {
            return None;
        }
        let touched = self.local.quotas.applicable(demand.subject);
        let allowance = self.local.allowance(demand, &touched, Some(&upstream.backing()));
        let required = self.local.required(demand, allowance);
        let now = self.redis_time(own);
        let of_upstream = upstream.replica.local.quotas.applicable(upstream.subject());
        let (limited, of_upstream) = (touched.limited(), of_upstream.limited());
        if !upstream.replica.lease_has(now, of_upstream, &required) {
            return None;
        }
        self.lease.as_mut()?.take(now, self.local.overrides.configured(), limited, &required)?;
        let id = self.take_id();
        self.journal.push(self.commands.leased_admission_step(id.to_string(), required.amounts, limited));
        let mut admission = self.local.admit_regardless(now, demand, &touched, allowance);
        upstream.replica.take_leased(now, of_upstream, &required);
        admission.back(now, &mut upstream.backing(), &required);
        if let Some(grant) = &mut admission.upstream {
            let id = upstream.replica.take_id();
            let step = upstream.replica.commands.leased_admission_step(
                id.to_string(),
                required.amounts,
                of_upstream,
            );
            upstream.replica.journal.push(step);
            upstream.replica.track_backing(id, grant);
        }
        Some(self.track_online(id, admission))
    }

    fn lease_has(&mut self, now: Timestamp, touched: &[u32], required: &Required) -> bool {
        let quotas = self.local.overrides.configured();
        self.lease.as_mut().is_some_and(|lease| lease.has(now, quotas, touched, required))
    }

    fn take_leased(&mut self, now: Timestamp, touched: &[u32], required: &Required) {
        let quotas = self.local.overrides.configured();
        // `lease_has` was true.
        let _ = self.lease.as_mut().and_then(|lease| lease.take(now, quotas, touched, required));
    }

    /// Like `progress`, in both.
    pub(in crate::ledger) fn progress_at(
        &mut self,
        own: Timestamp,
        model: &str,
        grant: &mut Grant,
        spent: Amounts,
        (upstream, part): (&mut Self, &mut Grant),
    ) -> Progress {
        let now = self.redis_time(own);
        let of_upstream = Some((&mut upstream.local, &mut *part));
        let outcome = self.local.extend_if_outgrown(now, model, grant, spent, of_upstream);
        self.mark_spent(now, grant, spent);
        upstream.mark_spent(now, part, spent);
        outcome
    }
}
