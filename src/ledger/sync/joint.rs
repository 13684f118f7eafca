//! Requests in the quotas of an environment and of its upstream, whose counters are in Redis.

use super::{MAX_ATTEMPTS, PendingAdmission, RedisSync};
use crate::clock;
use crate::ledger::demand::{Admission, Demand, Grant, NoRoom, Progress, Settlement};
use crate::ledger::replica::Replica;
use crate::ledger::replica::admission::ReserveOutcome;
use crate::ledger::replica::joint::UpstreamReplica;
use crate::quota::{Amounts, QuotaStatus, Subject};
use crate::redis::CallRefusal;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use tokio::runtime::Handle;
use tokio::time::sleep;

/// The upstream's part of a reservation that was requested on the environment's connection. If the request is dropped before
/// the reply, dropping this value cancels the part.
///
/// The upstream sends the cancellation on its own connection, where it could arrive before the reservation and have no
/// effect. So it is sent once a later call of the environment has ended, and again when Redis would refuse the reservation
/// because of its age: the environment may have lost its connection.
struct PendingPart<'a> {
    environment: &'a Arc<RedisSync>,
    upstream: &'a Arc<RedisSync>,
    id: Option<u64>,
}

impl Drop for PendingPart<'_> {
    fn drop(&mut self) {
        let Some(id) = self.id else { return };
        let (environment, upstream) = (self.environment.clone(), self.upstream.clone());
        let Ok(runtime) = Handle::try_current() else { return upstream.cancel(id) };
        runtime.spawn(async move {
            environment.refresh().await;
            upstream.with_replica(|replica| replica.push_cancellation(id));
            upstream.wake_task();
            sleep(environment.times.max_call_delay).await;
            upstream.cancel(id);
        });
    }
}

impl RedisSync {
    /// Like `try_admit`, in the quotas of the environment and of the upstream together. `model`: the name that is sent to
    /// the upstream.
    pub(in crate::ledger) async fn try_admit_at(
        self: &Arc<Self>,
        demand: &Demand<'_>,
        upstream: &Arc<Self>,
        model: &str,
    ) -> Result<Admission, NoRoom> {
        for sync in [self, upstream] {
            if sync.with_replica(|replica| replica.is_resyncing()) {
                sync.refresh().await;
            }
        }
        let leased = self.with_both(upstream, model, |replica, upstream| {
            replica.admit_leased_at(clock::now(), demand, upstream)
        });
        if let Some(admission) = leased {
            self.wake_task();
            upstream.wake_task();
            return Ok(admission);
        }
        match self.try_admit_at_by_redis(demand, upstream, model).await {
            Some(decided) => decided,
            None => self.try_admit_in_turn(demand, upstream, model).await,
        }
    }

    /// Runs `access` under both locks: first that of the environment, then that of the upstream.
    fn with_both<T>(
        &self,
        upstream: &Self,
        model: &str,
        access: impl FnOnce(&mut Replica, &mut UpstreamReplica<'_>) -> T,
    ) -> T {
        self.with_replica(|replica| {
            upstream.with_replica(|other| access(replica, &mut UpstreamReplica { replica: other, model }))
        })
    }

    /// One call to Redis for both. `None`: one of the two does not have Redis.
    async fn try_admit_at_by_redis(
        self: &Arc<Self>,
        demand: &Demand<'_>,
        upstream: &Arc<Self>,
        model: &str,
    ) -> Option<Result<Admission, NoRoom>> {
        let mut has_refreshed = false;
        for _ in 0..MAX_ATTEMPTS {
            let permit = match self.connection.permit(self.generation.load(Ordering::Relaxed)).await {
                Ok(permit) => permit,
                // Redis is available, so nothing may be admitted without it.
                Err(CallRefusal::LineFull) => return Some(Err(NoRoom::Unavailable)),
                Err(_) => return None,
            };
            let call = self.with_both(upstream, model, |replica, upstream| {
                replica.reserve_call_at(clock::now(), demand, upstream)
            })?;
            let mut pending = PendingAdmission { sync: self, id: Some(call.own.id) };
            let mut pending_upstream =
                PendingPart { environment: self, upstream, id: Some(call.upstream.id) };
            let keys = [&self.keys[..], &upstream.keys[..]].concat();
            let reply = permit.call(&keys, &call.command).await.ok()?;
            (pending.id, pending_upstream.id) = (None, None);
            let outcome = self.with_both(upstream, model, |replica, upstream| {
                replica.on_reserve_at(clock::now(), demand, &call, &reply, upstream)
            });
            match outcome {
                // Redis may not yet have had the room that this node's requests released. Send the journals and try
                // once more.
                ReserveOutcome::Decided(Err(_)) if call.had_unsent_steps && !has_refreshed => {
                    has_refreshed = true;
                    tokio::join!(self.refresh(), upstream.refresh());
                }
                ReserveOutcome::Decided(decided) => return Some(decided),
                ReserveOutcome::Retry => {}
                ReserveOutcome::UnknownSession => {
                    self.wake_task();
                    upstream.wake_task();
                    return None;
                }
            }
        }
        None
    }

    /// Reserves first in the environment, then in the upstream, each from Redis or offline. If the upstream has no room,
    /// the environment's part is released. Until then it is held, so nothing is admitted twice.
    async fn try_admit_in_turn(
        &self,
        demand: &Demand<'_>,
        upstream: &Self,
        model: &str,
    ) -> Result<Admission, NoRoom> {
        let mut admission = self.try_admit(demand).await?;
        let unused = UnusedAdmission { sync: self, subject: demand.subject, grant: Some(admission.grant) };
        let reserved = unused.grant.as_deref().map_or_else(Amounts::default, Grant::reserved);
        let other = upstream.try_admit(&upstream_demand(reserved, demand.generates, model)).await?;
        admission.grant = unused.into_grant().ok_or(NoRoom::Unavailable)?;
        admission.standing = QuotaStatus::tightest(admission.standing, other.standing);
        admission.is_durable |= other.is_durable;
        admission.upstream = Some(other.grant);
        Ok(admission)
    }

    /// Like `progress`, in both.
    pub(in crate::ledger) fn progress_at(
        &self,
        model: &str,
        grant: &mut Grant,
        spent: Amounts,
        (upstream, part): (&Self, &mut Grant),
    ) -> Progress {
        let progress = self.with_replica(|replica| {
            upstream
                .with_replica(|other| replica.progress_at(clock::now(), model, grant, spent, (other, part)))
        });
        self.wake_task();
        upstream.wake_task();
        progress
    }
}

/// What an upstream's own counters reserve for a request that holds these amounts in its environment.
pub(in crate::ledger) fn upstream_demand(amounts: Amounts, generates: bool, model: &str) -> Demand<'_> {
    Demand {
        subject: Subject { caller: None, model },
        prompt: amounts.prompt,
        generates,
        cap: Some(amounts.completion),
        completions: 1,
        backends: &[],
        may_clamp: true,
    }
}

/// A part in the environment whose part in the upstream is not decided yet. Dropping it releases the part.
struct UnusedAdmission<'a> {
    sync: &'a RedisSync,
    subject: Subject<'a>,
    grant: Option<Box<Grant>>,
}

impl UnusedAdmission<'_> {
    fn into_grant(mut self) -> Option<Box<Grant>> {
        self.grant.take()
    }
}

impl Drop for UnusedAdmission<'_> {
    fn drop(&mut self) {
        if let Some(grant) = self.grant.take() {
            self.sync.settle(self.subject, grant, Settlement::default());
        }
    }
}
