//! The connection of one account to Redis: it admits requests, and contains the state that requests share with the
//! account's task.
//!
//! This file is part of `ledger` and not of `redis`: it needs both the replica and the connection, and the replica needs the
//! commands of `redis`. Under `redis` it would make the two modules import each other.

mod joint;
mod task;

use super::demand::{Admission, Demand, Grant, NoRoom, Progress, Settlement};
use super::dependents::Dependents;
use super::overrides::{ChangeFault, EnforceOverride, LimitChange, QuotaKey};
use super::replica::admission::ReserveOutcome;
use super::replica::{Replica, ReplicaSettings};
use crate::clock;
use crate::quota::{Amounts, Subject};
use crate::redis::{self, CallRefusal, FailFastConnection, ScriptCommand, ScriptReply, Unavailable, Verdict};
use crate::wait_queue::WaitQueue;
pub(super) use joint::upstream_demand;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{Notify, oneshot};
use tokio::time::timeout;

/// Maximum attempts of one call whose reply requires a repetition, for example because a calendar period has ended.
const MAX_ATTEMPTS: usize = 4;
/// How long a reload of the config waits until Redis has the new quotas.
const MAX_ADOPTION_WAIT: Duration = Duration::from_secs(1);
/// Minimum of `SyncTimes::max_flush_wait`.
const MIN_FLUSH_WAIT: Duration = Duration::from_millis(250);
/// Allowance for the inaccuracy of a node's estimate of Redis's clock. A call that Redis runs after a stall shorter
/// than the timeout has not expired.
const CLOCK_TOLERANCE: Duration = Duration::from_millis(150);

/// Times that follow from `store.redis.timeout`.
#[derive(Clone, Copy, Debug)]
pub(super) struct SyncTimes {
    /// Redis ignores calls that it runs later than this after they were sent. A node that has lost Redis waits for
    /// this time before it joins again. After this time Redis ignores all calls from before the loss.
    pub(super) max_call_delay: Duration,
    /// Maximum time that a request waits until the task has sent everything to Redis. It is longer than the
    /// timeout.
    max_flush_wait: Duration,
}

impl SyncTimes {
    pub(super) fn new(timeout: Duration) -> Self {
        let max_call_delay = timeout + redis::catch_up_time(timeout) + CLOCK_TOLERANCE;
        Self { max_call_delay, max_flush_wait: MIN_FLUSH_WAIT.max(2 * timeout) }
    }
}

/// One account's replica, its connection to Redis, and the signals between the account's requests and the task.
#[derive(Debug)]
pub(super) struct RedisSync {
    replica: Mutex<Replica>,
    connection: FailFastConnection,
    /// The number of the connection on which this node has joined. Calls on another connection fail: its server may
    /// lack what this node has reported.
    generation: AtomicU64,
    keys: [String; 3],
    environment: String,
    wait_queue: Arc<WaitQueue>,
    dependents: Arc<Dependents>,
    times: SyncTimes,
    /// Wakes the task: the journal has new steps.
    wake: Notify,
    /// Requests that wait for the next flush.
    waiting_for_flush: Mutex<Vec<oneshot::Sender<()>>>,
    server_faults: Mutex<Vec<String>>,
    /// The config that the task adopts next.
    next_config: Mutex<Option<NextConfig>>,
}

/// A config that the task adopts, and the calls that wait for it.
#[derive(Debug)]
struct NextConfig {
    settings: ReplicaSettings,
    waiting: Vec<oneshot::Sender<()>>,
}

/// The state of an account's connection to Redis.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RedisStatus {
    /// Why this node counts without Redis for now. `None`: Redis is available.
    pub unavailable_reason: Option<String>,
    /// Nodes alive, according to the last reply of Redis.
    pub nodes: u64,
    /// How often this node has lost Redis.
    pub losses: u64,
    /// Settings of the server that are wrong for shared quotas.
    pub server_faults: Vec<String>,
}

/// A reservation that was requested from Redis. If the request is dropped before the reply, Redis's decision stays unknown.
/// Dropping this value then cancels the reservation.
struct PendingAdmission<'a> {
    sync: &'a RedisSync,
    id: Option<u64>,
}

impl Drop for PendingAdmission<'_> {
    fn drop(&mut self) {
        if let Some(id) = self.id {
            self.sync.cancel(id);
        }
    }
}

impl RedisSync {
    pub(super) fn new(
        replica: Replica,
        connection: FailFastConnection,
        keys: [String; 3],
        environment: String,
        (wait_queue, dependents): (Arc<WaitQueue>, Arc<Dependents>),
        times: SyncTimes,
    ) -> Self {
        Self {
            replica: Mutex::new(replica),
            connection,
            generation: AtomicU64::new(0),
            keys,
            environment,
            wait_queue,
            dependents,
            times,
            wake: Notify::new(),
            waiting_for_flush: Mutex::default(),
            server_faults: Mutex::default(),
            next_config: Mutex::default(),
        }
    }

    /// The connection.
    pub(super) fn connection(&self) -> &FailFastConnection {
        &self.connection
    }

    /// Runs `access` on the replica, under the account's lock.
    pub(super) fn with_replica<T>(&self, access: impl FnOnce(&mut Replica) -> T) -> T {
        // A panic elsewhere cannot leave the replica half changed: amounts are checked before anything changes.
        let mut replica = self.replica.lock().unwrap_or_else(PoisonError::into_inner);
        if replica.is_offline() {
            replica.end_overrides(clock::now());
        }
        access(&mut replica)
    }

    pub(super) fn status(&self) -> RedisStatus {
        let (is_available, nodes, losses) = self.with_replica(|replica| {
            (!replica.is_offline() && !replica.is_resyncing(), replica.nodes(), replica.losses())
        });
        let not_joined = || "this node has not joined the shared counters yet".to_owned();
        let unavailable_reason =
            (!is_available).then(|| self.connection.unavailable_reason().unwrap_or_else(not_joined));
        RedisStatus { unavailable_reason, nodes, losses, server_faults: self.lock_server_faults().clone() }
    }

    /// Reserves room for one request: from the lease, by one call to Redis, or, while Redis is unavailable, from this
    /// node's share. Does not count a denial. Dropping the future releases any reservation that Redis may have made.
    pub(super) async fn try_admit(&self, demand: &Demand<'_>) -> Result<Admission, NoRoom> {
        // During a resync Redis reports too much room, because it has not applied the offline usage of this node.
        if self.with_replica(|replica| replica.is_resyncing()) {
            self.refresh().await;
        }
        if let Some(admission) = self.with_replica(|replica| replica.admit_leased(clock::now(), demand)) {
            self.wake_task();
            return Ok(admission);
        }
        match self.try_admit_by_redis(demand).await {
            Some(decided) => decided,
            None => self.try_admit_offline(demand),
        }
    }

    /// `None`: Redis is unavailable or does not have this node's session.
    async fn try_admit_by_redis(&self, demand: &Demand<'_>) -> Option<Result<Admission, NoRoom>> {
        let mut has_refreshed = false;
        for _ in 0..MAX_ATTEMPTS {
            let permit = match self.connection.permit(self.generation.load(Ordering::Relaxed)).await {
                Ok(permit) => permit,
                // Redis is available, so nothing may be admitted without it.
                Err(CallRefusal::LineFull) if self.with_replica(|replica| replica.is_enforcing()) => {
                    return Some(Err(NoRoom::Unavailable));
                }
                Err(_) => return None,
            };
            let call = self.with_replica(|replica| replica.reserve_call(clock::now(), demand))?;
            let mut pending = PendingAdmission { sync: self, id: Some(call.id) };
            let reply = permit.call(&self.keys, &call.command).await.ok()?;
            pending.id = None;
            match self.with_replica(|replica| replica.on_reserve(clock::now(), demand, &call, &reply)) {
                // Redis may not yet have had the room that this node's requests released. Send the journal and try
                // once more.
                ReserveOutcome::Decided(Err(_)) if call.had_unsent_steps && !has_refreshed => {
                    has_refreshed = true;
                    self.refresh().await;
                }
                ReserveOutcome::Decided(decided) => return Some(decided),
                ReserveOutcome::Retry => {}
                ReserveOutcome::UnknownSession => return None,
            }
        }
        None
    }

    /// Cancels a reservation that was requested and whose decision is unknown.
    fn cancel(&self, id: u64) {
        self.with_replica(|replica| replica.cancel(id));
        self.wake_task();
    }

    fn try_admit_offline(&self, demand: &Demand<'_>) -> Result<Admission, NoRoom> {
        let admission = self.with_replica(|replica| {
            replica.go_offline(clock::now());
            replica.admit_offline(clock::now(), demand)
        })?;
        self.wake_task();
        Ok(admission)
    }

    pub(super) fn progress(&self, model: &str, grant: &mut Grant, spent: Amounts) -> Progress {
        let progress = self.with_replica(|replica| replica.progress(clock::now(), model, grant, spent));
        self.wake_task();
        progress
    }

    pub(super) fn settle(&self, subject: Subject<'_>, grant: Box<Grant>, settlement: Settlement) {
        self.with_replica(|replica| replica.settle(clock::now(), subject, grant, settlement));
        self.wake_task();
    }

    /// Waits until the task has sent the journal and received the state of all quotas, for at most `max_flush_wait`.
    /// If the time is over, the counters remain as in the last reply.
    pub(super) async fn refresh(&self) {
        if self.with_replica(|replica| replica.is_offline()) {
            return;
        }
        let (sender, receiver) = oneshot::channel();
        self.waiting_for_flush.lock().unwrap_or_else(PoisonError::into_inner).push(sender);
        self.wake.notify_one();
        drop(timeout(self.times.max_flush_wait, receiver).await);
    }

    /// Sets a limit for all nodes. Returns whether the quota exists.
    ///
    /// # Errors
    /// Redis is unavailable, or has sent no reply.
    pub(super) async fn set_limit(
        &self,
        key: QuotaKey<'_>,
        change: Option<&LimitChange>,
    ) -> Result<bool, ChangeFault> {
        let exists = self.run(|replica| replica.limit_command(clock::now(), key, change)).await?;
        self.refresh().await;
        Ok(exists)
    }

    /// Makes the task send another config to Redis and adopt it, and waits for that. While Redis is unavailable, the
    /// quotas stay as they are until it is available again.
    pub(super) async fn reconfigure(&self, settings: ReplicaSettings) {
        let (sender, receiver) = oneshot::channel();
        {
            let mut next = self.next_config.lock().unwrap_or_else(PoisonError::into_inner);
            let mut waiting = next.take().map_or_else(Vec::new, |superseded| superseded.waiting);
            waiting.push(sender);
            *next = Some(NextConfig { settings, waiting });
        }
        self.wake_task();
        if timeout(MAX_ADOPTION_WAIT, receiver).await.is_err() {
            tracing::warn!(
                environment = self.environment,
                "Redis is unavailable: the new quotas are in force when it is available again"
            );
        }
    }

    /// Sets whether quotas are enforced on all nodes.
    ///
    /// # Errors
    /// Redis is unavailable, or has sent no reply.
    pub(super) async fn set_enforce(&self, change: Option<&EnforceOverride>) -> Result<(), ChangeFault> {
        self.run(|replica| Some(replica.enforce_command(clock::now(), change))).await?;
        self.refresh().await;
        Ok(())
    }

    /// Resets quotas of all nodes to full. Returns whether a quota matches the key.
    ///
    /// # Errors
    /// Redis is unavailable, or has sent no reply.
    pub(super) async fn reset(&self, key: Option<QuotaKey<'_>>) -> Result<bool, ChangeFault> {
        let exists = self.run(|replica| replica.reset_command(clock::now(), key)).await?;
        self.refresh().await;
        Ok(exists)
    }

    /// Runs a command of an administrator. `false`: there is no command to run. If a calendar period ends before
    /// Redis runs the command, the command is built again.
    async fn run(
        &self,
        command: impl Fn(&mut Replica) -> Option<ScriptCommand>,
    ) -> Result<bool, ChangeFault> {
        for _ in 0..MAX_ATTEMPTS {
            let Some(command) = self.with_replica(&command) else { return Ok(false) };
            let generation = self.generation.load(Ordering::Relaxed);
            let permit =
                self.connection.permit_of_any(generation).await.map_err(|_| ChangeFault::Unavailable)?;
            let reply = permit.call(&self.keys, &command).await.map_err(|_| ChangeFault::Unconfirmed)?;
            match reply.verdict {
                Verdict::Done => return Ok(true),
                Verdict::StalePeriod | Verdict::DeadlinePassed => {}
                _ => return Err(ChangeFault::Unavailable),
            }
            self.with_replica(|replica| replica.record_time(clock::now(), &reply));
        }
        Err(ChangeFault::Unavailable)
    }

    async fn call(&self, command: &ScriptCommand) -> Result<ScriptReply, Unavailable> {
        let generation = self.generation.load(Ordering::Relaxed);
        self.connection.call_on(generation, &self.keys, command).await
    }

    fn wake_task(&self) {
        self.wake.notify_one();
    }

    fn take_waiting_for_flush(&self) -> Vec<oneshot::Sender<()>> {
        std::mem::take(&mut *self.waiting_for_flush.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn lock_server_faults(&self) -> MutexGuard<'_, Vec<String>> {
        self.server_faults.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
