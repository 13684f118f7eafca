//! The counters of every environment and upstream, and reservations that settle themselves when they are dropped.
//!
//! An [`Account`] has the counters of one environment, or of one upstream with limits, in one of two engines: [`Local`]
//! counters of this node alone, or a replica of counters that several nodes share in Redis. Environments that use the same
//! upstream share its account. A request is admitted by its environment and its upstream together, under both locks: first
//! that of the environment, then that of the upstream.

mod accounts;
mod allowance;
mod audit;
mod demand;
mod dependents;
mod durability;
mod engine;
mod handover;
mod local;
mod messages;
mod overrides;
mod owner;
mod replica;
mod reservation;
mod successor;
mod sync;
mod usage_history;

use crate::clock::{self, Stopwatch, Timestamp};
use crate::config::RedisSettings;
use crate::quota::{Quota, QuotaLevel, QuotaStatus, Restored, Subject, Takeover};
use crate::redis::FailFastConnection;
use crate::wait_queue::WaitQueue;
use dependents::Dependents;
use engine::Engine;
use handover::Handover;
use replica::{Replica, ReplicaConfig, ReplicaSettings};
use std::sync::{Arc, PoisonError};
use std::time::Duration;
use sync::{RedisSync, SyncTimes};
use tokio::sync::watch;

pub use accounts::{Accounts, NamedAccount};
pub use audit::{AuditEntry, AuditLog};
use demand::Shortage;
pub use demand::{
    Admission, Backend, Demand, Forecast, Grant, IN_FLIGHT_RETRY_MS, NoRoom, Progress, Settlement,
};
pub use durability::{Changes, Commits, Persistence, RestoredState};
pub use engine::Snapshot;
pub use local::{Backing, Local, Rules};
pub use messages::{FromSuccessor, LeftAccount, LeftBackend, LeftGrant, LeftNoRoom, LeftUsage, ToSuccessor};
pub use overrides::{
    ChangeFault, EnforceOverride, LimitChange, LimitOverride, OverrideOrigin, OverrideSet, QuotaKey,
};
pub use owner::Owner;
pub(crate) use owner::UPSTREAM_PREFIX;
pub use reservation::Reservation;
pub use successor::SuccessorLine;
pub use sync::RedisStatus;
pub(crate) use usage_history::OTHER_MODELS;
pub use usage_history::{Totals, UsageInterval, UsageRow};

/// Maximum time that a request waits for the store.
pub(crate) const MAX_STORE_WAIT: Duration = Duration::from_secs(1);

/// A quota as it would be with another limit.
#[derive(Clone, Debug)]
pub struct Preview {
    /// The time on the clock of the counters.
    pub at: Timestamp,
    /// The level. `None`: the environment has no such quota.
    pub level: Option<QuotaLevel>,
}

/// The counters of one environment, or of one upstream with limits, shared by all its requests.
#[derive(Debug)]
pub struct Account {
    /// The upstream that this account belongs to. `None`: it belongs to an environment.
    upstream: Option<Arc<str>>,
    engine: Engine,
    wait_queue: Arc<WaitQueue>,
    /// The environments whose requests wait for room in this account's quotas.
    dependents: Arc<Dependents>,
    persistence: Option<Arc<dyn Persistence>>,
    /// Where the counters are: in this process, or in the one that replaces it.
    handover: Handover,
}

/// Why an account of this process does not admit a request.
enum Refusal {
    NoRoom(NoRoom),
    /// The counters have left, or are leaving. The request may still wait this long for room.
    HasLeft(Duration),
}

impl Account {
    /// Opens an account with full quotas and no store.
    pub fn open<'a>(owner: impl Into<Owner<'a>>) -> Self {
        Self::open_with(owner, None, &RestoredState::default())
    }

    /// Opens an account with the restored state, if there is a store to persist further changes.
    pub fn open_with<'a>(
        owner: impl Into<Owner<'a>>,
        persistence: Option<Arc<dyn Persistence>>,
        restored: &RestoredState,
    ) -> Self {
        let now = clock::now();
        let mut local = owner.into().new_counters(now);
        let upstream = local.upstream.clone();
        if persistence.is_some() {
            local.restore(now, restored);
        }
        Self {
            upstream,
            engine: Engine::local(local),
            wait_queue: Arc::default(),
            dependents: Arc::default(),
            persistence,
            handover: Handover::default(),
        }
    }

    /// Adopts another config of the environment for requests that begin now. Used amounts carry over, and reservations
    /// in flight settle where they are held. `restored`: the state in the store, for quotas that were unknown so far.
    /// `redis`: the settings, and when the config was written. With shared counters this waits until Redis has the new
    /// quotas, at most a second.
    pub async fn reconfigure<'a>(
        &self,
        owner: impl Into<Owner<'a>>,
        restored: &RestoredState,
        redis: Option<(&RedisSettings, u64)>,
    ) {
        let owner = owner.into();
        let (rules, quotas) = (owner.rules(), owner.counted_quotas());
        self.engine.with_local(|local, _| local.set_model_patterns(owner.models()));
        match (&self.engine, redis) {
            (Engine::Shared(sync), Some((redis, stamp))) => {
                self.engine.with_local(|local, _| local.set_rules(rules));
                sync.with_replica(|replica| replica.set_on_failure(clock::now(), redis.on_failure));
                let settings = ReplicaSettings { stamp, leases: redis.lease, quotas };
                sync.reconfigure(settings).await;
            }
            _ => self.engine.with_local(|local, now| {
                local.set_rules(rules);
                local.reconfigure(now, &quotas, Takeover::InPlace, restored);
            }),
        }
        // A higher limit may have room for requests that wait.
        self.notify_released();
        self.notify_store(false);
    }

    /// Makes the counters shared through Redis. `session`: a name that no process has used before. `slot`: the hash tag of
    /// the keys, if several accounts share one. `stamp`: when the config was written.
    ///
    /// # Errors
    /// The URL is not a valid Redis URL.
    pub fn share<'a>(
        self,
        owner: impl Into<Owner<'a>>,
        redis: &RedisSettings,
        session: &str,
        (slot, stamp): (Option<&str>, u64),
    ) -> anyhow::Result<Self> {
        let Engine::Local(local) = self.engine else { return Ok(self) };
        let local = local.into_inner().unwrap_or_else(PoisonError::into_inner);
        let times = SyncTimes::new(redis.timeout);
        let config = ReplicaConfig {
            on_failure: redis.on_failure,
            stamp,
            leases: redis.lease,
            max_call_delay_ms: u64::try_from(times.max_call_delay.as_millis()).unwrap_or(u64::MAX),
        };
        let replica = Replica::new(local, config, session, clock::now());
        let name = owner.into().key().into_owned();
        let keys = replica.keys(&redis.prefix, slot, &name);
        let url = redis.url.expose();
        let connection = FailFastConnection::new(url, &redis.prefix, &keys[0], redis.timeout)
            .map_err(|error| anyhow::anyhow!("store.redis.url: {error}"))?;
        let waiting = (self.wait_queue.clone(), self.dependents.clone());
        let sync = RedisSync::new(replica, connection, keys, name, waiting, times);
        Ok(Self { engine: Engine::Shared(Arc::new(sync)), ..self })
    }

    /// Reserves room for one request in every quota that it touches, or in none. A request that does not fit waits
    /// for room for at most `max_wait`, behind the requests that are already waiting. Dropping the future reserves
    /// nothing and leaves the queue.
    ///
    /// With local counters and no wait, this future does not suspend and allocates nothing but the reservation.
    ///
    /// # Errors
    /// The reason why there is no room. A denied request changes only the count of denials.
    pub async fn reserve(
        self: &Arc<Self>,
        demand: &Demand<'_>,
        max_wait: Duration,
    ) -> Result<Reservation, NoRoom> {
        self.reserve_timed(demand, max_wait, &mut None).await
    }

    /// Like `reserve`. Sets `waited` to the time that the request spent in the wait queue, also if it is denied.
    ///
    /// # Errors
    /// See `reserve`.
    pub async fn reserve_timed(
        self: &Arc<Self>,
        demand: &Demand<'_>,
        max_wait: Duration,
        waited: &mut Option<Duration>,
    ) -> Result<Reservation, NoRoom> {
        match self.reserve_here(demand, max_wait, waited).await {
            Ok(reservation) => Ok(reservation),
            Err(Refusal::NoRoom(no_room)) => Err(no_room),
            Err(Refusal::HasLeft(max_wait)) => {
                Box::pin(self.reserve_after_leaving(demand, max_wait, waited)).await
            }
        }
    }

    /// Reserves room where the counters are when the hand-over to a new process has ended.
    async fn reserve_after_leaving(
        self: &Arc<Self>,
        demand: &Demand<'_>,
        mut max_wait: Duration,
        waited: &mut Option<Duration>,
    ) -> Result<Reservation, NoRoom> {
        loop {
            if let Some(successor) = self.handover.outcome().await {
                return self.reserve_elsewhere(&successor, demand, max_wait).await;
            }
            match self.reserve_here(demand, max_wait, waited).await {
                Ok(reservation) => return Ok(reservation),
                Err(Refusal::NoRoom(no_room)) => return Err(no_room),
                Err(Refusal::HasLeft(left)) => max_wait = left,
            }
        }
    }

    async fn reserve_here(
        self: &Arc<Self>,
        demand: &Demand<'_>,
        max_wait: Duration,
        waited: &mut Option<Duration>,
    ) -> Result<Reservation, Refusal> {
        let shortage = if max_wait.is_zero() || self.wait_queue.is_empty() {
            match self.try_reserve(demand).await {
                Ok(reservation) => return Ok(reservation),
                Err(_) if self.handover.has_left() => return Err(Refusal::HasLeft(max_wait)),
                Err(Shortage { no_room, .. }) if max_wait.is_zero() => {
                    self.record_denial(demand, &no_room);
                    return Err(Refusal::NoRoom(no_room));
                }
                Err(shortage) => Some(shortage),
            }
        } else {
            self.engine.shortage(demand)
        };
        for account in demand.backends.iter().filter_map(|backend| backend.account) {
            account.dependents.add(&self.wait_queue);
        }
        let clock = Stopwatch::start();
        // A request behind others is denied at once if it could not fit in time even at the head of the queue.
        let may_change = self.override_end(demand).is_some_and(|end| end <= max_wait);
        if may_change || shortage.is_none_or(|shortage| shortage.may_clear_within(max_wait)) {
            let attempt = async |left| {
                let reserved = self.try_reserve(demand).await;
                reserved.map_err(|shortage| self.retry_after(demand, &shortage, left))
            };
            let reservation = Box::pin(self.wait_queue.wait_in_turn(max_wait, attempt)).await;
            *waited = Some(waited.unwrap_or_default() + clock.elapsed());
            if let Some(reservation) = reservation {
                return Ok(reservation);
            }
        }
        if self.handover.has_left() {
            return Err(Refusal::HasLeft(max_wait.saturating_sub(clock.elapsed())));
        }
        // A request whose wait failed, or that found the queue full, must not overtake the queued requests.
        let no_room = self.engine.reason_to_deny(demand);
        self.record_denial(demand, &no_room);
        Err(Refusal::NoRoom(no_room))
    }

    /// The time after which a request that may wait for the rest of `left` tries again. `None`: it cannot fit in time.
    fn retry_after(&self, demand: &Demand<'_>, shortage: &Shortage, left: Duration) -> Option<Duration> {
        let end = self.override_end(demand).filter(|end| *end <= left);
        [shortage.retry_after(left), end].into_iter().flatten().min()
    }

    /// The time until the first override of the environment or of one of the upstreams ends, which may make room.
    fn override_end(&self, demand: &Demand<'_>) -> Option<Duration> {
        let of_upstreams = demand.backends.iter().filter_map(|backend| backend.account);
        let engines = of_upstreams.map(|account| &account.engine).chain([&self.engine]);
        engines.filter_map(Engine::override_end).min()
    }

    /// Counts a denied request, and records it in the quotas that had no room.
    fn record_denial(&self, demand: &Demand<'_>, no_room: &NoRoom) {
        self.engine.count_denial(demand.subject, no_room);
        demand.backends.iter().for_each(|backend| backend.count_denial(no_room));
        self.notify_store(false);
    }

    /// One attempt; does not count a denial.
    async fn try_reserve(self: &Arc<Self>, demand: &Demand<'_>) -> Result<Reservation, Shortage> {
        let (admission, backend) = self.engine.try_admit(demand).await?;
        let store = self.persistence.as_deref().filter(|store| admission.is_durable && store.is_writing());
        let commit = store.map(|store| store.commits().next());
        self.notify_store(commit.is_some());
        Ok(Reservation::new(self, demand, admission, backend, commit))
    }

    /// Wakes the requests that wait for room in this account's quotas.
    fn notify_released(&self) {
        self.wait_queue.notify_released();
        self.dependents.notify_released();
    }

    /// Waits for a commit, for at most `MAX_STORE_WAIT`.
    async fn wait_for_commit(&self, commit: u64) {
        let Some(store) = &self.persistence else { return };
        if tokio::time::timeout(MAX_STORE_WAIT, store.commits().wait_for(commit)).await.is_err() {
            store.on_wait_timeout();
        }
    }

    /// Notifies the store of a change. `urgent`: a request waits for its commit.
    pub fn notify_store(&self, urgent: bool) {
        if let Some(store) = &self.persistence {
            store.changed(urgent);
        }
    }

    /// Takes the changes since the last call. `None`: there are none.
    pub fn take_changes(&self) -> Option<Changes> {
        self.engine.with_local(|local, _| {
            let Restored { replaced, removed: mut quotas } = std::mem::take(&mut local.restored);
            local.quotas.take_changes(|quota, saved| quotas.push((quota.clone(), saved)));
            let usage = local.history.take();
            let overrides = local.overrides.take_changes();
            let is_nothing = quotas.is_empty() && usage.is_empty() && overrides.is_none();
            let (totals, held) = (local.totals, local.held);
            (!is_nothing).then_some(Changes { quotas, replaced, totals, held, usage, overrides })
        })
    }

    /// Counts a request of the subject that was denied after it had a reservation.
    pub fn count_denial(&self, subject: Subject<'_>) {
        self.engine.with_local(|local, now| local.count_denial(now, subject));
        self.notify_store(false);
    }

    /// What would happen to a request now. Reserves and counts nothing.
    pub fn forecast(&self, demand: &Demand<'_>) -> Forecast {
        self.engine.forecast(demand)
    }

    /// The tightest quota of each kind, in the order of `Kind::ALL`: of those of the subject and of its upstream. Of
    /// several upstreams, the one with the most room counts.
    pub fn standing(&self, subject: Subject<'_>, backends: &[Backend<'_>]) -> [Option<QuotaStatus>; 4] {
        let own = self.engine.with_local(|local, now| local.standing(now, subject));
        let of_backend = |Backend { account, model }: &Backend<'_>| {
            account.map_or([None; 4], |account| {
                account.engine.with_local(|local, now| local.standing(now, Subject { caller: None, model }))
            })
        };
        let of_backends = backends.iter().map(of_backend).reduce(QuotaStatus::loosest);
        of_backends.map_or(own, |other| QuotaStatus::tightest(own, other))
    }

    /// All counters at one moment.
    pub fn snapshot(&self) -> Snapshot {
        self.engine.snapshot()
    }

    /// Overrides a limit of the config. `None`: restores the limit of the config. Earlier usage still counts. Returns
    /// whether the quota exists. Returns when the change is durable and in force on all nodes.
    ///
    /// # Errors
    /// A new process has the counters. Or they are shared, and Redis is unavailable or has sent no reply.
    pub async fn set_limit(
        &self,
        key: QuotaKey<'_>,
        change: Option<&LimitChange>,
    ) -> Result<bool, ChangeFault> {
        self.check_residence().await.map_err(|_| ChangeFault::Unavailable)?;
        let exists = self.engine.set_limit(key, change).await?;
        if exists || self.engine.sync().is_none() {
            self.persist_admin_change().await;
        }
        Ok(exists)
    }

    /// Sets whether quotas are enforced. `None`: by the config. Returns when the change is durable and in force on all
    /// nodes.
    ///
    /// # Errors
    /// A new process has the counters. Or they are shared, and Redis is unavailable or has sent no reply.
    pub async fn set_enforce(&self, change: Option<EnforceOverride>) -> Result<(), ChangeFault> {
        self.check_residence().await.map_err(|_| ChangeFault::Unavailable)?;
        self.engine.set_enforce(change).await?;
        self.persist_admin_change().await;
        Ok(())
    }

    /// Resets a quota to full, or all of them. Held amounts stay held. Returns when the reset is durable and in force
    /// on all nodes, and whether the quota exists.
    ///
    /// # Errors
    /// A new process has the counters. Or they are shared, and Redis is unavailable or has sent no reply.
    pub async fn reset(&self, key: Option<QuotaKey<'_>>) -> Result<bool, ChangeFault> {
        self.check_residence().await.map_err(|_| ChangeFault::Unavailable)?;
        let exists = self.engine.reset(key).await?;
        if exists {
            self.persist_admin_change().await;
        }
        Ok(exists)
    }

    /// The time by which overrides end: that of Redis, if the counters are shared.
    pub fn now(&self) -> Timestamp {
        self.engine.with_local(|_, now| now)
    }

    /// The quota as it would be with the limit of `quota`. Changes nothing.
    pub fn preview(&self, quota: &Quota) -> Preview {
        self.engine.with_local(|local, now| Preview { at: now, level: local.preview(now, quota) })
    }

    /// The overrides in force.
    pub fn overrides(&self) -> OverrideSet {
        self.engine.with_local(|local, _| local.overrides.set().clone())
    }

    /// Logs what an administrator has set instead of the config.
    pub fn log_overrides<'a>(&self, owner: impl Into<Owner<'a>>) {
        let owner = owner.into();
        let set = self.overrides();
        let configured = owner.counted_quotas();
        let (environment, upstream) = match owner {
            Owner::Environment(environment) => (Some(environment), None),
            Owner::Upstream(upstream) => (None, Some(upstream.name.as_str())),
        };
        let name = environment.map(|environment| environment.name.as_str());
        for LimitOverride { quota, origin } in &set.limits {
            let file = configured.iter().find(|known| known.is_same_as(quota));
            tracing::warn!(
                environment = name,
                upstream,
                scope = quota.scope.as_str(),
                name = quota.scope.name(),
                kind = quota.kind.as_str(),
                per = quota.per.text,
                limit = quota.limit_text(),
                file_limit = file.map(Quota::limit_text),
                by = origin.by,
                until = origin.until.map(Timestamp::to_rfc3339),
                reason = origin.reason,
                "an administrator has set this limit: it is in force instead of the file's"
            );
        }
        if let Some(EnforceOverride { enforce, origin }) = &set.enforce {
            tracing::warn!(
                environment = name,
                enforce,
                file_enforce = environment.map(|environment| environment.enforce),
                by = origin.by,
                until = origin.until.map(Timestamp::to_rfc3339),
                reason = origin.reason,
                "an administrator has set enforce: it is in force instead of the file's"
            );
        }
    }

    /// Whether quotas are enforced now.
    pub fn is_enforcing(&self) -> bool {
        self.engine.with_local(|local, _| local.rules.enforce)
    }

    async fn persist_admin_change(&self) {
        self.notify_released();
        let Some(commit) = self.persistence.as_ref().map(|store| store.commits().next()) else { return };
        self.notify_store(true);
        self.wait_for_commit(commit).await;
    }

    /// Reservations of this node that are not settled.
    pub fn in_flight(&self) -> u64 {
        self.engine.with_local(|local, _| local.in_flight)
    }

    /// The name of the upstream that this account belongs to. `None`: it belongs to an environment.
    pub fn upstream(&self) -> Option<&Arc<str>> {
        self.upstream.as_ref()
    }

    /// Number of requests that wait for room.
    pub fn queue_length(&self) -> usize {
        self.wait_queue.len()
    }

    /// The state of the connection to Redis. `None`: the counters belong to this node alone.
    pub fn redis_status(&self) -> Option<RedisStatus> {
        self.engine.sync().map(RedisSync::status)
    }

    /// The connection to Redis, for the task that connects and reconnects.
    pub fn redis_connection(&self) -> Option<&FailFastConnection> {
        self.engine.sync().map(RedisSync::connection)
    }

    /// Waits until Redis has received all steps of this node's journal and this node has received the state of all
    /// quotas. Waits at most twice the timeout of Redis, or 250 ms.
    pub async fn refresh(&self) {
        if let Some(sync) = self.engine.sync() {
            sync.refresh().await;
        }
    }

    /// Synchronises the counters with Redis until `stop` is true, and then ends the session. All reservations must be
    /// settled before `stop` becomes true. Returns at once if the counters belong to this node alone.
    pub async fn run_redis_sync(self: Arc<Self>, stop: watch::Receiver<bool>) {
        if let Some(sync) = self.engine.sync() {
            sync.run_task(stop).await;
        }
    }
}

#[cfg(test)]
mod tests;
