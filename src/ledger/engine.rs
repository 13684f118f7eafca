//! The switch between the two engines: counters of this node alone, or a replica of counters in Redis.
//!
//! Each engine is behind one lock per account. The clock is read under that lock, so that the time never goes backwards
//! from one request to the next. A request with an upstream that has limits takes two locks: first that of its environment,
//! then, inside, that of the upstream. No code takes them in the other order.

use super::demand::{Admission, Backend, Demand, Forecast, Grant, NoRoom, Progress, Settlement, Shortage};
use super::local::{Backing, Local, Residence};
use super::overrides::{ChangeFault, EnforceOverride, LimitChange, OverrideSet, QuotaKey};
use super::reservation::UpstreamPart;
use super::sync::{RedisStatus, RedisSync, upstream_demand};
use super::usage_history::Totals;
use crate::clock::{self, Timestamp};
use crate::quota::{Amounts, QuotaLevel, Required, Subject};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// The counters of one account.
#[derive(Debug)]
pub(super) enum Engine {
    /// The counters belong to this node alone.
    Local(Box<Mutex<Local>>),
    /// The counters are in Redis. This node has a replica of them.
    Shared(Arc<RedisSync>),
}

/// The counters of an account.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// The time on the clock of the counters: Redis's if they are shared.
    pub at: Timestamp,
    /// Reservations that are not settled: those of all nodes if the counters are shared, or else those of this node.
    pub in_flight: u64,
    /// Reservations of this node that are not settled.
    pub in_flight_here: u64,
    /// The state of the connection to Redis. `None`: the counters belong to this node alone.
    pub redis: Option<RedisStatus>,
    /// Every quota, in the config's order.
    pub levels: Vec<QuotaLevel>,
    /// Sums since the store was created.
    pub totals: Totals,
    /// The overrides of an administrator.
    pub overrides: OverrideSet,
}

impl Engine {
    pub(super) fn local(counters: Local) -> Self {
        Self::Local(Box::new(Mutex::new(counters)))
    }

    /// Reserves room for a request at the first upstream with room, whose index is returned; does not count a denial. With
    /// local counters this future never suspends.
    pub(super) async fn try_admit(&self, demand: &Demand<'_>) -> Result<(Admission, usize), Shortage> {
        match self {
            Self::Local(_) => self.with_local(|local, now| match local.residence {
                Residence::Here => {
                    at_first(local, now, demand, Local::try_admit_at).map_err(|(shortage, _)| shortage)
                }
                Residence::Leaving(_) | Residence::Moved(_) => Err(Shortage::of(NoRoom::Unavailable)),
            }),
            // Boxed to keep the future small for local counters.
            Self::Shared(sync) => Box::pin(try_admit_by_redis(sync, demand)).await,
        }
    }

    /// Whether no request is admitted for now.
    fn is_closed(&self) -> bool {
        match self {
            Self::Local(_) => false,
            Self::Shared(sync) => sync.with_replica(|replica| replica.is_closed()),
        }
    }

    /// The time until the first override ends. `None`: the time is unknown, or no override ends by itself.
    pub(super) fn override_end(&self) -> Option<Duration> {
        // A little later, so that it has ended.
        self.with_local(|local, now| local.overrides.ms_to_next_end(now))
            .map(|ms| Duration::from_millis(ms + 1))
    }

    /// Why a request whose wait has failed is denied.
    pub(super) fn reason_to_deny(&self, demand: &Demand<'_>) -> NoRoom {
        let denied = self.at_first(demand, |local, now, demand, upstream| {
            Err::<(), _>(local.reason_to_deny(now, demand, upstream))
        });
        denied.map_or_else(|(shortage, _)| shortage.no_room, |_| NoRoom::Unavailable)
    }

    /// Why the request does not fit now. `None`: it fits. Reserves nothing.
    pub(super) fn shortage(&self, demand: &Demand<'_>) -> Option<Shortage> {
        let found = self.at_first(demand, |local, now, demand, upstream| {
            local.binding_obstacle(now, demand, upstream).map_or(Ok(()), Err)
        });
        found.err().map(|(shortage, _)| shortage)
    }

    /// What would happen to a request now. Reserves nothing.
    pub(super) fn forecast(&self, demand: &Demand<'_>) -> Forecast {
        let found = self.at_first(demand, |local, now, demand, upstream| {
            local.obstacle(now, demand, upstream).map_or(Ok(()), Err)
        });
        let (obstacle, backend) = match found {
            Ok(((), backend)) => (None, backend),
            Err((shortage, backend)) => (Some(shortage.no_room), backend),
        };
        let account = demand.backends.get(backend).and_then(|backend| backend.account);
        self.with_local(|local, now| {
            let (required, quotas) = match account {
                None => local.forecast(now, demand, None),
                Some(account) => account.engine.with_local(|counters, now| {
                    let model = demand.backends[backend].model;
                    local.forecast(now, demand, Some(&mut Backing::new(counters, model)))
                }),
            };
            Forecast { at: now, required, obstacle, backend, quotas }
        })
    }

    /// Runs `at_first` under the lock. While no request is admitted, it is not run.
    fn at_first<T>(
        &self,
        demand: &Demand<'_>,
        attempt: impl FnMut(&mut Local, Timestamp, &Demand<'_>, Option<&mut Backing<'_>>) -> Result<T, NoRoom>,
    ) -> Result<(T, usize), (Shortage, usize)> {
        if self.is_closed() {
            return Err((Shortage::of(NoRoom::Unavailable), 0));
        }
        self.with_local(|local, now| at_first(local, now, demand, attempt))
    }

    /// Reserves amounts in the quotas of an upstream for a request that has a reservation in its environment. `before`: the
    /// part that moves. If it is in these counters, it may be released first.
    ///
    /// # Errors
    /// There is no room, and nothing has changed.
    pub(super) async fn try_back(
        &self,
        model: &str,
        required: &Required,
        before: Option<&mut UpstreamPart>,
    ) -> Result<Backed, NoRoom> {
        match self {
            Self::Local(_) => self.with_local(|counters, now| match counters.residence {
                Residence::Here => back(counters, now, model, required, before),
                Residence::Leaving(_) | Residence::Moved(_) => Err(NoRoom::Unavailable),
            }),
            Self::Shared(sync) => {
                let demand = upstream_demand(required.amounts, required.generates, model);
                let Admission { grant, is_durable, .. } = Box::pin(sync.try_admit(&demand)).await?;
                Ok(Backed { grant, is_durable, has_released: false })
            }
        }
    }

    /// Counts a denied request, and records it in the quotas that had no room.
    pub(super) fn count_denial(&self, subject: Subject<'_>, no_room: &NoRoom) {
        self.with_local(|local, now| {
            local.count_denial(now, subject);
            local.record_refusal(now, subject, no_room);
        });
    }

    /// Records the amounts that a request has certainly used so far.
    pub(super) fn progress(
        &self,
        model: &str,
        grant: &mut Grant,
        spent: Amounts,
        upstream: Option<&mut UpstreamPart>,
    ) -> Progress {
        match self {
            Self::Local(_) => self.with_local(|local, now| match (&local.residence, upstream) {
                (Residence::Here, None) => local.progress(now, model, grant, spent),
                (Residence::Here, Some(part)) => part.account.engine.with_local(|counters, now| {
                    local.progress_at(now, model, grant, spent, Some((counters, &mut part.grant)))
                }),
                (Residence::Leaving(_) | Residence::Moved(_), upstream) => {
                    if let Some(UpstreamPart { account, model, grant }) = upstream {
                        account.engine.progress(model, grant, spent, None);
                    }
                    local.progress_elsewhere(model, grant, spent)
                }
            }),
            Self::Shared(sync) => match upstream.map(|part| (&part.account.engine, &mut part.grant)) {
                Some((Self::Shared(other), part)) => sync.progress_at(model, grant, spent, (other, part)),
                _ => sync.progress(model, grant, spent),
            },
        }
    }

    /// Releases the held amounts of a grant and charges the spent amounts.
    pub(super) fn settle(&self, subject: Subject<'_>, grant: Box<Grant>, settlement: Settlement) {
        match self {
            Self::Local(_) => self.with_local(|local, now| match local.residence {
                Residence::Here => local.settle(now, subject, grant, settlement),
                Residence::Leaving(_) | Residence::Moved(_) => {
                    local.settle_elsewhere(subject, grant, settlement);
                }
            }),
            Self::Shared(sync) => sync.settle(subject, grant, settlement),
        }
    }

    /// Overrides a limit. `None`: restores the limit of the config. Returns whether the quota exists.
    ///
    /// # Errors
    /// The counters are in Redis, and Redis is unavailable.
    pub(super) async fn set_limit(
        &self,
        key: QuotaKey<'_>,
        change: Option<&LimitChange>,
    ) -> Result<bool, ChangeFault> {
        let mut exists = false;
        if let Self::Shared(sync) = self {
            exists = sync.set_limit(key, change).await?;
            // Redis may not have the cell of a quota that the config does not have now. This node may know its override.
            if !exists && change.is_some() {
                return Ok(false);
            }
        }
        // This node may have removed the override already, because Redis no longer has it.
        Ok(self.with_local(|local, now| local.set_limit(now, key, change)) || exists)
    }

    /// Sets whether quotas are enforced. `None`: by the config.
    ///
    /// # Errors
    /// The counters are in Redis, and Redis is unavailable.
    pub(super) async fn set_enforce(&self, change: Option<EnforceOverride>) -> Result<(), ChangeFault> {
        if let Self::Shared(sync) = self {
            sync.set_enforce(change.as_ref()).await?;
        }
        self.with_local(|local, _| local.set_enforce(change));
        Ok(())
    }

    /// Resets a quota to full, or all of them. Held amounts stay held. Returns whether the quota exists.
    ///
    /// # Errors
    /// The counters are in Redis, and Redis is unavailable.
    pub(super) async fn reset(&self, key: Option<QuotaKey<'_>>) -> Result<bool, ChangeFault> {
        if let Self::Shared(sync) = self
            && !sync.reset(key).await?
        {
            return Ok(false);
        }
        Ok(self.with_local(|local, now| local.reset(now, key)))
    }

    pub(super) fn snapshot(&self) -> Snapshot {
        let (redis, shared_in_flight) = match self {
            Self::Local(_) => (None, None),
            Self::Shared(sync) => {
                (Some(sync.status()), Some(sync.with_replica(|replica| replica.in_flight())))
            }
        };
        self.with_local(|local, now| Snapshot {
            at: now,
            in_flight: shared_in_flight.unwrap_or(local.in_flight),
            in_flight_here: local.in_flight,
            redis,
            levels: local.levels(now),
            totals: local.totals,
            overrides: local.overrides.set().clone(),
        })
    }

    /// The connection to Redis and its replica. `None`: the counters are local.
    pub(super) fn sync(&self) -> Option<&RedisSync> {
        match self {
            Self::Local(_) => None,
            Self::Shared(sync) => Some(sync),
        }
    }

    /// Runs `access` under the lock, with this node's counters and the current time on the clock that they use.
    pub(super) fn with_local<T>(&self, access: impl FnOnce(&mut Local, Timestamp) -> T) -> T {
        match self {
            Self::Local(local) => {
                // A panic elsewhere cannot leave the counters half changed: amounts are checked before anything changes.
                let mut local = local.lock().unwrap_or_else(PoisonError::into_inner);
                let now = clock::now();
                local.end_overrides(now);
                access(&mut local, now)
            }
            Self::Shared(sync) => sync.with_replica(|replica| {
                let now = replica.redis_time(clock::now());
                access(replica.local_mut(), now)
            }),
        }
    }
}

/// The part of a reservation that an upstream has taken.
#[derive(Debug)]
pub(super) struct Backed {
    pub(super) grant: Box<Grant>,
    /// This node's store must persist it.
    pub(super) is_durable: bool,
    /// The part before was in the same counters and is released.
    pub(super) has_released: bool,
}

/// Tries the upstreams of a request in their order, until one succeeds. Returns the index of that upstream. If all fail, it
/// returns the shortage and the index of the one that fits first. A request is clamped only if no upstream has room for all
/// of it.
fn at_first<T>(
    local: &mut Local,
    now: Timestamp,
    demand: &Demand<'_>,
    mut attempt: impl FnMut(&mut Local, Timestamp, &Demand<'_>, Option<&mut Backing<'_>>) -> Result<T, NoRoom>,
) -> Result<(T, usize), (Shortage, usize)> {
    if let Some(unclamped) = demand.unclamped().filter(|_| local.clamps(demand))
        && let Ok(found) = in_order(local, now, &unclamped, &mut attempt)
    {
        return Ok(found);
    }
    in_order(local, now, demand, &mut attempt)
}

fn in_order<T>(
    local: &mut Local,
    now: Timestamp,
    demand: &Demand<'_>,
    attempt: &mut impl FnMut(&mut Local, Timestamp, &Demand<'_>, Option<&mut Backing<'_>>) -> Result<T, NoRoom>,
) -> Result<(T, usize), (Shortage, usize)> {
    let mut all: Option<(Shortage, usize)> = None;
    for (index, Backend { account, model }) in demand.backends.iter().enumerate() {
        let outcome = match account {
            None => attempt(local, now, demand, None),
            Some(account) if account.engine.is_closed() => Err(NoRoom::Unavailable),
            Some(account) => account.engine.with_local(|counters, now| {
                attempt(local, now, demand, Some(&mut Backing::new(counters, model)))
            }),
        };
        let no_room = match outcome {
            Ok(found) => return Ok((found, index)),
            Err(no_room) => no_room,
        };
        match &mut all {
            Some((shortage, first)) => {
                if shortage.add(no_room) {
                    *first = index;
                }
            }
            None => all = Some((Shortage::of(no_room), index)),
        }
    }
    match all {
        Some(all) => Err(all),
        // No upstream is named.
        None => attempt(local, now, demand, None)
            .map(|found| (found, 0))
            .map_err(|no_room| (Shortage::of(no_room), 0)),
    }
}

/// Moves a part of a reservation within an upstream, or into it.
fn back(
    counters: &mut Local,
    now: Timestamp,
    model: &str,
    required: &Required,
    before: Option<&mut UpstreamPart>,
) -> Result<Backed, NoRoom> {
    let take = |counters: &mut Local, model: &str, is_forced: bool| {
        let mut backing = Backing::new(counters, model);
        match backing.obstacle(now, required) {
            Some(no_room) if !is_forced => Err(no_room),
            _ => {
                let (grant, is_durable) = (backing.take(now, required), backing.needs_durability());
                Ok(Backed { grant, is_durable, has_released: false })
            }
        }
    };
    let Some(before) = before else { return take(counters, model, false) };
    counters.release_backing(now, &mut before.grant);
    match take(counters, model, false) {
        Ok(backed) => Ok(Backed { has_released: true, ..backed }),
        Err(no_room) => {
            if let Ok(again) = take(counters, &before.model, true) {
                before.grant = again.grant;
            }
            Err(no_room)
        }
    }
}

/// As `at_first`, in Redis.
async fn try_admit_by_redis(
    sync: &Arc<RedisSync>,
    demand: &Demand<'_>,
) -> Result<(Admission, usize), Shortage> {
    let clamps = sync.with_replica(|replica| replica.local_mut().clamps(demand));
    if let Some(unclamped) = demand.unclamped().filter(|_| clamps)
        && let Ok(admitted) = try_in_order_by_redis(sync, &unclamped).await
    {
        return Ok(admitted);
    }
    try_in_order_by_redis(sync, demand).await
}

async fn try_in_order_by_redis(
    sync: &Arc<RedisSync>,
    demand: &Demand<'_>,
) -> Result<(Admission, usize), Shortage> {
    let mut all: Option<Shortage> = None;
    for (index, Backend { account, model }) in demand.backends.iter().enumerate() {
        let outcome = match account.map(|account| &account.engine) {
            Some(Engine::Shared(upstream)) => sync.try_admit_at(demand, upstream, model).await,
            Some(Engine::Local(_)) | None => sync.try_admit(demand).await,
        };
        let no_room = match outcome {
            Ok(admission) => return Ok((admission, index)),
            Err(no_room) => no_room,
        };
        match &mut all {
            Some(shortage) => {
                shortage.add(no_room);
            }
            None => all = Some(Shortage::of(no_room)),
        }
    }
    match all {
        Some(shortage) => Err(shortage),
        // No upstream is named.
        None => sync.try_admit(demand).await.map(|admission| (admission, 0)).map_err(Shortage::of),
    }
}
