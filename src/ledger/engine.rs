//! The switch between the two engines: counters of this node alone, or a replica of counters in Redis.
//!
//! Each engine is behind one lock per environment. The clock is read under that lock, so that the time never goes backwards
//! from one request to the next.

use super::demand::{Admission, Demand, Grant, NoRoom, Progress, Settlement};
use super::local::{Local, Residence};
use super::overrides::{EnforceOverride, LimitChange, OverrideSet, QuotaKey};
use super::sync::{RedisStatus, RedisSync};
use super::usage_history::Totals;
use crate::clock::{self, Timestamp};
use crate::quota::{Amounts, QuotaLevel, Subject};
use std::sync::{Mutex, PoisonError};

/// The counters of one environment.
#[derive(Debug)]
pub(super) enum Engine {
    /// The counters belong to this node alone.
    Local(Box<Mutex<Local>>),
    /// The counters are in Redis. This node has a replica of them.
    Shared(Box<RedisSync>),
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

    /// Reserves room for a request; does not count a denial. With local counters this future never suspends.
    pub(super) async fn try_admit(&self, demand: &Demand<'_>) -> Result<Admission, NoRoom> {
        match self {
            Self::Local(_) => self.with_local(|local, now| match local.residence {
                Residence::Here => local.try_admit(now, demand),
                Residence::Leaving(_) | Residence::Moved(_) => Err(NoRoom::Unavailable),
            }),
            // Boxed to keep the future small for local counters.
            Self::Shared(sync) => Box::pin(sync.try_admit(demand)).await,
        }
    }

    /// Denies a request whose wait has failed.
    pub(super) fn deny(&self, demand: &Demand<'_>) -> NoRoom {
        match self {
            Self::Local(_) => self.with_local(|local, now| local.deny(now, demand)),
            Self::Shared(sync) => sync.with_replica(|replica| replica.deny(clock::now(), demand)),
        }
    }

    /// The reason why the request does not fit now. `None`: it fits. Reserves nothing.
    pub(super) fn obstacle(&self, demand: &Demand<'_>) -> Option<NoRoom> {
        match self {
            Self::Local(_) => self.with_local(|local, now| local.obstacle(now, demand)),
            Self::Shared(sync) => sync.with_replica(|replica| replica.obstacle(clock::now(), demand)),
        }
    }

    /// Counts a denied request, and records it in the quotas that had no room.
    pub(super) fn count_denial(&self, subject: Subject<'_>, no_room: &NoRoom) {
        self.with_local(|local, now| {
            local.count_denial(now, subject);
            local.record_refusal(now, subject, no_room);
        });
    }

    /// Records a refusal in the quotas that had no room.
    pub(super) fn record_refusal(&self, subject: Subject<'_>, no_room: &NoRoom) {
        self.with_local(|local, now| local.record_refusal(now, subject, no_room));
    }

    /// Records the amounts that a request has certainly used so far.
    pub(super) fn progress(&self, model: &str, grant: &mut Grant, spent: Amounts) -> Progress {
        match self {
            Self::Local(_) => self.with_local(|local, now| match local.residence {
                Residence::Here => local.progress(now, model, grant, spent),
                Residence::Leaving(_) | Residence::Moved(_) => local.progress_elsewhere(model, grant, spent),
            }),
            Self::Shared(sync) => sync.progress(model, grant, spent),
        }
    }

    /// Releases the held amounts of a grant and charges the spent amounts.
    pub(super) fn settle(&self, subject: Subject<'_>, grant: Grant, settlement: Settlement) {
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
    ) -> Result<bool, NoRoom> {
        if let Self::Shared(sync) = self
            && !sync.set_limit(key, change).await?
        {
            return Ok(false);
        }
        Ok(self.with_local(|local, now| local.set_limit(now, key, change)))
    }

    /// Sets whether quotas are enforced. `None`: by the config.
    ///
    /// # Errors
    /// The counters are in Redis, and Redis is unavailable.
    pub(super) async fn set_enforce(&self, change: Option<EnforceOverride>) -> Result<(), NoRoom> {
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
    pub(super) async fn reset(&self, key: Option<QuotaKey<'_>>) -> Result<bool, NoRoom> {
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
