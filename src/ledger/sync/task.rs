//! The task that synchronises one account's replica with Redis: join, heartbeat, flush of the journal, lease, leave.

use super::{MAX_ATTEMPTS, RedisSync};
use crate::clock;
use crate::config::OnStoreFailure;
use crate::ledger::replica::session::Joined;
use crate::ledger::replica::{Replica, ReplicaSettings};
use crate::redis::{self, Verdict};
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep, sleep_until, timeout};

/// How often a node renews its session and reads the state of all quotas. A limit that an administrator sets on another node
/// is in force here after this time.
const HEARTBEAT_INTERVAL: Duration = Duration::from_millis(500);
/// Minimum of the time that a stopping node may spend on sending its journal. If the node has lost Redis, it must also
/// have time to join again.
const MIN_LEAVE_TIME: Duration = Duration::from_secs(2);

impl RedisSync {
    /// Synchronises the replica with Redis until `stop` is true, and then ends the session. All reservations must be
    /// settled before `stop` becomes true.
    pub(in crate::ledger) async fn run_task(&self, mut stop: watch::Receiver<bool>) {
        let mut connected = self.connection.watch_generation();
        let work = async {
            loop {
                // An error is impossible: the connection object lives as long as the account.
                if connected.wait_for(|number| *number != 0).await.is_err() {
                    return;
                }
                self.check_server_settings().await;
                if self.join().await.is_some() {
                    tracing::info!(environment = self.environment, "quotas are shared through Redis");
                    self.sync_until_lost().await;
                    self.log_loss();
                }
                self.with_replica(|replica| replica.go_offline(clock::now()));
                self.take_waiting_for_flush();
                sleep(self.times.max_call_delay).await;
            }
        };
        tokio::select! {
            () = work => {}
            _ = stop.wait_for(|stops| *stops) => {}
        }
        let max_time = MIN_LEAVE_TIME.max(2 * self.times.max_call_delay);
        let has_left = timeout(max_time, self.leave()).await.is_ok();
        if !has_left && self.with_replica(|replica| replica.has_unreported(clock::now())) {
            tracing::warn!(
                environment = self.environment,
                "Redis is unavailable: the usage that this node has not reported is lost"
            );
        }
    }

    /// Logs that Redis has become unavailable, and what happens to requests.
    fn log_loss(&self) {
        let environment = &self.environment;
        match self.with_replica(|replica| replica.on_failure()) {
            OnStoreFailure::Local => {
                tracing::warn!(environment, "Redis is unavailable: quotas are counted on this node");
            }
            OnStoreFailure::Open => {
                tracing::warn!(
                    environment,
                    "Redis is unavailable: this node starts with full quotas (store.redis.on_failure: open)"
                );
            }
            OnStoreFailure::Closed => {
                tracing::warn!(
                    environment,
                    "Redis is unavailable: requests are refused (store.redis.on_failure: closed)"
                );
            }
        }
    }

    /// Logs each setting of the server that is wrong for shared quotas, or worth a note, and was not at the last check.
    async fn check_server_settings(&self) {
        let Ok(faults) = self.connection.setting_faults().await else { return };
        let mut known = self.lock_server_faults();
        for fault in faults.iter().filter(|fault| !known.contains(fault)) {
            let environment = &self.environment;
            if let Some(note) = redis::note(fault) {
                tracing::info!(environment, note, "a note about the Redis server");
            } else {
                tracing::warn!(
                    environment,
                    fault,
                    "a setting of the Redis server is wrong for shared quotas"
                );
            }
        }
        *known = faults;
    }

    /// Sends the rest of the journal and ends the session. If Redis is unavailable, this waits until it is available again.
    async fn leave(&self) {
        self.with_replica(Replica::return_lease);
        self.with_replica(Replica::report_counted);
        let mut connected = self.connection.watch_generation();
        while !self.is_synced() || self.flush().await.is_none() {
            self.with_replica(|replica| replica.go_offline(clock::now()));
            sleep(self.times.max_call_delay).await;
            if connected.wait_for(|number| *number != 0).await.is_err() {
                return;
            }
            self.join().await;
        }
        let command = self.with_replica(Replica::leave_command);
        drop(self.call(&command).await);
    }

    /// Whether Redis has everything that this node holds and spent, except for the steps in the journal.
    fn is_synced(&self) -> bool {
        self.with_replica(|replica| !replica.is_offline() && !replica.is_resyncing())
    }

    /// Joins the shared counters. `None`: Redis is unavailable or sent an unexpected reply.
    async fn join(&self) -> Option<()> {
        self.generation.store(*self.connection.watch_generation().borrow(), Ordering::Relaxed);
        let Joined { differing_limits, wait_ms, lost_steps } = self.send_join().await?;
        if differing_limits > 0 {
            self.warn_of_differing_limits();
        }
        if lost_steps > 0 {
            tracing::warn!(
                environment = self.environment,
                lost_steps,
                "Redis has lost its last writes: this node repeats what it had reported"
            );
        }
        if wait_ms > 0 {
            tracing::warn!(
                environment = self.environment,
                "Redis has lost its data: the nodes restore it from their replicas"
            );
        }
        let others_have_joined = Instant::now() + Duration::from_millis(wait_ms);
        self.hold_all().await?;
        self.release_unlisted().await?;
        sleep_until(others_have_joined).await;
        self.with_replica(|replica| replica.begin_resync(clock::now()));
        // Now Redis also holds the reservations that were admitted offline.
        self.hold_all().await?;
        self.flush().await?;
        self.heartbeat().await
    }

    async fn send_join(&self) -> Option<Joined> {
        for _ in 0..MAX_ATTEMPTS {
            let command = self.with_replica(|replica| replica.join_command(clock::now()));
            let reply = self.call(&command).await.ok()?;
            if let Some(joined) = self.with_replica(|replica| replica.on_join(clock::now(), &reply)) {
                return Some(joined);
            }
        }
        None
    }

    /// Makes Redis hold this node's reservations, in batches.
    async fn hold_all(&self) -> Option<()> {
        let mut attempts = 0;
        loop {
            let next = self.with_replica(|replica| replica.hold_command(clock::now()));
            let Some((command, ids)) = next else { return Some(()) };
            let reply = self.call(&command).await.ok()?;
            let is_done = reply.verdict == Verdict::Done;
            self.with_replica(|replica| {
                replica.record_time(clock::now(), &reply);
                if is_done {
                    replica.confirm_held(&ids);
                }
            });
            match reply.verdict {
                Verdict::Done => attempts = 0,
                Verdict::UnknownSession => return None,
                _ if attempts == MAX_ATTEMPTS => return None,
                _ => attempts += 1,
            }
        }
    }

    /// Makes Redis charge, in batches, the reservations that it holds for this session and that this node does not
    /// track.
    async fn release_unlisted(&self) -> Option<()> {
        let mut attempts = 0;
        loop {
            let command = self.with_replica(|replica| replica.release_unlisted_command(clock::now()));
            let reply = self.call(&command).await.ok()?;
            self.with_replica(|replica| replica.record_time(clock::now(), &reply));
            match reply.verdict {
                Verdict::Done if reply.values.first() == Some(&0) => return Some(()),
                Verdict::Done => attempts = 0,
                Verdict::UnknownSession => return None,
                _ if attempts == MAX_ATTEMPTS => return None,
                _ => attempts += 1,
            }
        }
    }

    /// Sends the journal whenever it has new steps, and heartbeats. Returns when Redis is lost.
    async fn sync_until_lost(&self) {
        let joined = self.generation.load(Ordering::Relaxed);
        let mut connected = self.connection.watch_generation();
        let mut heartbeat = interval_at(Instant::now() + HEARTBEAT_INTERVAL, HEARTBEAT_INTERVAL);
        heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // A config may wait since before the join.
        self.wake_task();
        loop {
            let is_due = tokio::select! {
                // A new connection may lead to another server, or to one that has lost data.
                _ = connected.wait_for(|&number| number != joined) => return,
                () = self.wake.notified() => false,
                _ = heartbeat.tick() => true,
            };
            // Dropping this value resumes the requests that wait for a flush. It is dropped after the heartbeat.
            let waiting = self.take_waiting_for_flush();
            let needs_beat = is_due || !waiting.is_empty();
            if needs_beat {
                self.with_replica(Replica::report_counted);
            }
            let flushed = match self.adopt_next_config().await {
                Some(()) => self.flush_and_lease().await,
                None => None,
            };
            let beat = if needs_beat { self.heartbeat().await } else { Some(()) };
            drop(waiting);
            if flushed.is_none() || beat.is_none() || self.with_replica(|replica| replica.is_offline()) {
                return;
            }
        }
    }

    /// Adopts the config that waits for it: Redis gets the new quotas first, so that no request names a quota that Redis
    /// does not have.
    async fn adopt_next_config(&self) -> Option<()> {
        loop {
            let settings = {
                let next = self.next_config.lock().unwrap_or_else(PoisonError::into_inner);
                let Some(next) = &*next else { return Some(()) };
                next.settings.clone()
            };
            if !self.with_replica(|replica| replica.is_in_step()) {
                return Some(());
            }
            // The states of quotas that other nodes use already.
            self.flush().await?;
            self.heartbeat().await?;
            self.send_quotas(&settings).await?;
            let carried = self.with_replica(|replica| replica.adopt(clock::now(), &settings));
            self.heartbeat().await?;
            self.with_replica(|replica| replica.carry_over(clock::now(), &carried));
            self.flush().await?;
            let mut next = self.next_config.lock().unwrap_or_else(PoisonError::into_inner);
            let is_last = next.as_ref().is_some_and(|next| next.settings == settings);
            let adopted = if is_last { next.take() } else { None };
            drop(next);
            adopted.into_iter().flat_map(|next| next.waiting).for_each(|waiting| {
                let _ = waiting.send(());
            });
        }
    }

    async fn send_quotas(&self, settings: &ReplicaSettings) -> Option<()> {
        for _ in 0..MAX_ATTEMPTS {
            let command = self.with_replica(|replica| replica.adopt_command(clock::now(), settings));
            let reply = self.call(&command).await.ok()?;
            self.with_replica(|replica| replica.record_time(clock::now(), &reply));
            if reply.verdict == Verdict::Done {
                return Some(());
            }
        }
        None
    }

    async fn flush_and_lease(&self) -> Option<()> {
        self.flush().await?;
        if let Some(command) = self.with_replica(|replica| replica.lease_command(clock::now())) {
            let reply = self.call(&command).await.ok()?;
            return self.with_replica(|replica| replica.on_lease(clock::now(), &reply)).then_some(());
        }
        // The lease may have been returned, which is a step of the journal.
        self.flush().await
    }

    /// Sends the steps that the journal has now. Later steps wait for the next flush. Otherwise constantly added
    /// steps could delay the heartbeat for ever. `None`: Redis is lost, and the steps stay in the journal until the
    /// node has joined again.
    async fn flush(&self) -> Option<()> {
        let mut attempts = 0;
        let end = self.with_replica(|replica| replica.next_step());
        loop {
            let batch = self.with_replica(|replica| replica.next_batch(clock::now(), end));
            let Some(batch) = batch else { return Some(()) };
            let reply = self.call(&batch.command).await.ok()?;
            if self.with_replica(|replica| replica.on_batch(clock::now(), &batch, &reply)) {
                attempts = 0;
                continue;
            }
            if reply.verdict == Verdict::UnknownSession {
                return None;
            }
            attempts += 1;
            if attempts >= MAX_ATTEMPTS {
                return None;
            }
        }
    }

    async fn heartbeat(&self) -> Option<()> {
        for _ in 0..MAX_ATTEMPTS {
            let command = self.with_replica(|replica| replica.heartbeat_command(clock::now()));
            let reply = self.call(&command).await.ok()?;
            if let Some(limits_differ) =
                self.with_replica(|replica| replica.on_heartbeat(clock::now(), &reply))
            {
                if limits_differ {
                    self.warn_of_differing_limits();
                }
                // Other nodes may have released room that a request on this node waits for.
                self.wait_queue.notify_released();
                self.dependents.notify_released();
                if let Some(settings) = self.with_replica(Replica::settings_to_send) {
                    self.send_quotas(&settings).await?;
                }
                return self.read_origins().await;
            }
            if reply.verdict == Verdict::UnknownSession {
                return None;
            }
        }
        None
    }

    /// Reads the origins of the overrides, if an override has changed.
    async fn read_origins(&self) -> Option<()> {
        let Some(command) = self.with_replica(|replica| replica.origins_command(clock::now())) else {
            return Some(());
        };
        let reply = self.call(&command).await.ok()?;
        self.with_replica(|replica| replica.on_origins(clock::now(), &reply));
        Some(())
    }

    fn warn_of_differing_limits(&self) {
        tracing::warn!(
            environment = self.environment,
            "nodes have different limits: those of the newest config file are in force, and among equally old files \
             those of the node that started last"
        );
    }
}
