//! Who is admitted: by Redis's verdict, out of a lease, or out of this node's own part while it is alone.

use super::{Answered, Cluster, Question, Terms, told};
use crate::clock::Timestamp;
use crate::config::OnStoreFailure;
use crate::ledger::lease::Wants;
use crate::ledger::{Admission, Counters, Demand, Grant, NoRoom};
use crate::redis::{self, OnShortage, ReserveRequest, ScriptCommand, ScriptReply, Verdict};

impl Counters {
    /// Takes part in a cluster from now on; alone, until it has joined.
    pub(in crate::ledger) fn share(&mut self, now: Timestamp, terms: Terms, session: &str) {
        let quotas = self.limits.configured().to_vec();
        self.cluster = Some(Box::new(Cluster::new(terms, session, &quotas, now, &self.quotas)));
    }

    pub(in crate::ledger) fn cluster(&mut self) -> Option<&mut Cluster> {
        self.cluster.as_deref_mut()
    }

    /// By whose clock the quotas count.
    pub(in crate::ledger) fn now(&self, own: Timestamp) -> Timestamp {
        self.cluster.as_ref().map_or(own, |cluster| cluster.now(own))
    }

    /// What to ask Redis; `None`: it cannot be asked.
    pub(in crate::ledger) fn question(&mut self, own: Timestamp, demand: &Demand<'_>) -> Option<Question> {
        let allowance = self.allowance(demand);
        let required = self.required(demand, allowance);
        let touched = self.quotas.applicable(demand.subject);
        let on_shortage = self.otherwise(allowance);
        let max_in_flight = if self.rules.enforce { self.rules.max_in_flight.unwrap_or(0) } else { 0 };
        let cluster = self.cluster.as_deref_mut().filter(|cluster| !cluster.is_alone())?;
        let now = cluster.now(own);
        let id = cluster.next_id;
        cluster.next_id += 1;
        cluster.asked.insert(id);
        cluster.commands.set_redis_time(now);
        let reserve = ReserveRequest {
            id: &id.to_string(),
            max_in_flight,
            on_shortage,
            generates: required.generates,
            amounts: required.amounts,
            completions: demand.completions,
        };
        let command = cluster.commands.reserve(&reserve, &touched);
        let (losses, first, is_early) = (cluster.losses, cluster.journal.first, cluster.is_behind());
        Some(Question { command, id, allowance, touched, losses, first, is_early })
    }

    /// Admits out of what this node leases; `None`: that does not reach.
    pub(in crate::ledger) fn admit_leased(
        &mut self,
        own: Timestamp,
        demand: &Demand<'_>,
    ) -> Option<Admission> {
        // Requests in flight are counted by Redis alone, and what only watches has to see whether it fits.
        if !self.rules.enforce || self.rules.max_in_flight.is_some() {
            return None;
        }
        self.cluster.as_deref()?.lease.as_ref()?;
        let allowance = self.allowance(demand);
        let required = self.required(demand, allowance);
        let touched = self.quotas.applicable(demand.subject);
        let is_apart = |cluster: &&mut Cluster| cluster.is_alone() || cluster.is_far_behind();
        let cluster = self.cluster.as_deref_mut().filter(|cluster| !is_apart(cluster))?;
        let now = cluster.now(own);
        cluster.lease.as_mut()?.take(now, self.limits.configured(), &touched, &required)?;
        let id = cluster.next_id;
        cluster.next_id += 1;
        let step = cluster.commands.leased_admission_step(id.to_string(), required.amounts, &touched);
        cluster.journal.push(step);
        let mut admission = self.admit_regardless(now, demand, allowance);
        admission.grant.id = Some(id);
        self.keep(true, &admission.grant);
        Some(admission)
    }

    /// The call that leases more, if it is time for that.
    pub(in crate::ledger) fn lease(&mut self, own: Timestamp) -> Option<ScriptCommand> {
        let cluster = self.cluster.as_deref_mut().filter(|cluster| !cluster.is_alone())?;
        let now = cluster.now(own);
        let lease = cluster.lease.as_mut().filter(|lease| lease.is_due(now))?;
        let levels = self.quotas.levels(now);
        match lease.wants(now, &levels, cluster.nodes) {
            Wants::Nothing => None,
            Wants::ToGiveBack => {
                cluster.give_lease_back();
                None
            }
            Wants::More(wanted) => {
                lease.is_asked_for();
                cluster.commands.set_redis_time(now);
                Some(cluster.commands.lease(&wanted))
            }
        }
    }

    /// Redis has answered to that; `false`: it does not know this node.
    pub(in crate::ledger) fn leased(&mut self, own: Timestamp, answer: &ScriptReply) -> bool {
        let Some(cluster) = self.cluster.as_deref_mut() else { return false };
        cluster.heard(own, answer);
        if answer.verdict != Verdict::Done || cluster.is_alone() {
            return answer.verdict != Verdict::UnknownSession;
        }
        let all: Vec<u32> = (0..).take(answer.states.len()).collect();
        redis::load_states(&mut self.quotas, &all, answer);
        if let Some(lease) = &mut cluster.lease {
            lease.grow(answer);
        }
        true
    }

    /// Comes to the verdict that Redis has come to.
    pub(in crate::ledger) fn answered(
        &mut self,
        own: Timestamp,
        demand: &Demand<'_>,
        question: &Question,
        answer: &ScriptReply,
    ) -> Answered {
        let Some(cluster) = self.cluster.as_deref_mut() else { return Answered::Unknown };
        cluster.asked.remove(&question.id);
        cluster.heard(own, answer);
        let was_admitted = match answer.verdict {
            Verdict::Admitted => true,
            Verdict::Denied | Verdict::TooManyInFlight => false,
            Verdict::StalePeriod | Verdict::DeadlinePassed => return Answered::Again,
            Verdict::UnknownSession | Verdict::Done => return Answered::Unknown,
        };
        if cluster.is_alone() || cluster.losses != question.losses {
            // Redis was lost meanwhile, and what it said then is worth nothing now.
            if was_admitted {
                cluster.cancel(question.id);
            }
            return Answered::Again;
        }
        // What this node has told meanwhile may not be in what the quotas were then, and is remembered nowhere else.
        let is_overtaken = cluster.journal.first != question.first;
        let kept =
            if is_overtaken { self.quotas.states_of(answer.now, &question.touched) } else { Vec::new() };
        redis::load_states(&mut self.quotas, &question.touched, answer);
        let in_flight = told(answer, 0);
        cluster.nodes = told(answer, 1).max(1);
        let is_full = self.rules.max_in_flight.is_some_and(|most| in_flight >= most);
        let decided = self.decide(answer.now, demand, question.allowance, is_full);
        if decided.is_ok() != was_admitted {
            tracing::error!(
                redis = was_admitted,
                "Redis and this node disagree about a request: Redis counts"
            );
        }
        let decided = self.as_decided_there(decided, was_admitted, demand, question, answer);
        for (&index, state) in question.touched.iter().zip(&kept) {
            self.quotas.load(index as usize, state);
        }
        Answered::Decided(decided)
    }

    /// Redis's verdict, explained by this node's own where they are the same.
    fn as_decided_there(
        &mut self,
        decided: Result<Admission, NoRoom>,
        was_admitted: bool,
        demand: &Demand<'_>,
        question: &Question,
        answer: &ScriptReply,
    ) -> Result<Admission, NoRoom> {
        match decided {
            Ok(mut admission) if was_admitted => {
                admission.grant.id = Some(question.id);
                self.keep(true, &admission.grant);
                Ok(admission)
            }
            Ok(admission) => {
                self.undo(answer.now, demand.subject.model, admission.grant);
                Err(NoRoom::InFlight { limit: told(answer, 0) })
            }
            Err(_) if was_admitted => {
                let mut admission = self.admit_regardless(answer.now, demand, question.allowance);
                admission.grant.id = Some(question.id);
                self.keep(true, &admission.grant);
                Ok(admission)
            }
            Err(no_room) => Err(no_room),
        }
    }

    /// Admits without Redis, out of this node's own part.
    pub(in crate::ledger) fn admit_alone(
        &mut self,
        now: Timestamp,
        demand: &Demand<'_>,
    ) -> Result<Admission, NoRoom> {
        if self.is_closed() {
            return Err(NoRoom::Unavailable);
        }
        let mut admission = self.try_admit(now, demand)?;
        if let (Some(cluster), Some(receipt)) = (&mut self.cluster, admission.grant.receipts.first()) {
            admission.grant.id = Some(cluster.begin(false, receipt));
        }
        Ok(admission)
    }

    /// Whether nothing is let through for now. Quotas that only watch never stand in the way.
    pub(in crate::ledger) fn is_closed(&self) -> bool {
        let is_closed =
            |cluster: &Cluster| cluster.is_alone() && cluster.terms.on_failure == OnStoreFailure::Closed;
        self.rules.enforce && self.cluster.as_deref().is_some_and(is_closed)
    }

    fn keep(&mut self, is_known: bool, grant: &Grant) {
        if let (Some(cluster), Some(id)) = (&mut self.cluster, grant.id) {
            cluster.keep(id, is_known, &grant.receipts);
        }
    }

    fn otherwise(&self, allowance: u64) -> OnShortage {
        if !self.rules.enforce {
            OnShortage::AdmitAnyway
        } else if self.clamps() && allowance > 0 {
            OnShortage::Clamp
        } else {
            OnShortage::Reject
        }
    }
}
