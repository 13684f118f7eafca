//! The part of an account that speaks to Redis: asks it for room, and one task that tells it the rest.

use super::cluster::{Answered, LATEST_MS, Terms};
use super::{Account, Admission, Counters, Demand, NoRoom, QuotaKey};
use crate::clock;
use crate::config::{Environment, RedisSettings};
use crate::quota::Subject;
use crate::redis::{FailFastConnection, ScriptCommand, ScriptReply, Unavailable, Verdict};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{Notify, oneshot, watch};
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep, sleep_until, timeout};

/// How often a node shows that it is alive, and looks how all quotas stand: what an administrator sets at another node
/// holds here after so long.
const BEAT: Duration = Duration::from_millis(500);
/// A node takes part again so long after it has lost Redis: whatever it had asked is too late by then.
const PAUSE: Duration = Duration::from_millis(LATEST_MS);
/// A call that has to be made anew is, at most so often.
const ATTEMPTS: usize = 4;
/// Longer than this nobody waits for the task to have told Redis everything.
const PATIENCE: Duration = Duration::from_millis(250);
/// And a node that stops no longer than this.
const PATIENCE_AT_THE_END: Duration = Duration::from_secs(2);

/// How an account reaches the counters that it shares.
#[derive(Debug)]
pub(super) struct Node {
    connection: FailFastConnection,
    keys: [String; 3],
    environment: String,
    wake: Notify,
    waiting: Mutex<Vec<oneshot::Sender<()>>>,
    faults: Mutex<Vec<String>>,
}

/// How an environment's counters are shared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sharing {
    /// Why they are this node's own for now; `None`: they are shared.
    pub trouble: Option<String>,
    /// Nodes alive, as last heard.
    pub nodes: u64,
    /// How often Redis was lost.
    pub losses: u64,
    /// What is wrong with the server's settings.
    pub faults: Vec<String>,
}

/// Somebody who waits for Redis to admit a request may give up: then nobody knows what it has said.
struct Limbo<'a> {
    account: &'a Account,
    id: Option<u64>,
}

impl Drop for Limbo<'_> {
    fn drop(&mut self) {
        let Some(id) = self.id else { return };
        if let Some(cluster) = self.account.lock().cluster() {
            cluster.cancel(id);
        }
        self.account.tell();
    }
}

impl Node {
    fn flushed(&self) -> Vec<oneshot::Sender<()>> {
        std::mem::take(&mut *self.waiting.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn lock_faults(&self) -> MutexGuard<'_, Vec<String>> {
        self.faults.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell_of_limits(&self) {
        tracing::warn!(
            environment = self.environment,
            "nodes have differing limits: those of the config file that was written last hold"
        );
    }

    /// Looks at the server's settings, and tells what is new.
    async fn look_at_settings(&self) {
        let Ok(faults) = self.connection.setting_faults().await else { return };
        let mut known = self.lock_faults();
        for fault in faults.iter().filter(|fault| !known.contains(fault)) {
            tracing::warn!(environment = self.environment, fault, "Redis is not set up as quotas need it");
        }
        *known = faults;
    }

    async fn call(&self, command: &ScriptCommand) -> Result<ScriptReply, Unavailable> {
        self.connection.call(&self.keys, command).await
    }
}

impl Account {
    /// Shares the counters from now on, in an account that nobody else has yet. `session`: a name that no process
    /// has had before.
    ///
    /// # Errors
    /// The URL is none of Redis.
    pub fn share(
        &mut self,
        environment: &Environment,
        redis: &RedisSettings,
        session: &str,
        stamp: u64,
    ) -> anyhow::Result<()> {
        let terms = Terms { on_failure: redis.on_failure, stamp, leases: redis.lease };
        let mut counters = self.lock();
        counters.share(clock::now(), terms, session);
        let keys = counters.cluster().map(|cluster| cluster.keys(&redis.prefix, &environment.name));
        drop(counters);
        let Some(keys) = keys else { return Ok(()) };
        let connection = FailFastConnection::new(redis.url.expose(), &redis.prefix, &keys[0])
            .map_err(|error| anyhow::anyhow!("store.redis.url: {error}"))?;
        self.node = Some(Node {
            connection,
            keys,
            environment: environment.name.clone(),
            wake: Notify::new(),
            waiting: Mutex::default(),
            faults: Mutex::default(),
        });
        Ok(())
    }

    /// Whether a reservation may have to wait for Redis.
    pub fn is_shared(&self) -> bool {
        self.node.is_some()
    }

    /// How the counters are shared; `None`: they are this node's own.
    pub fn sharing(&self) -> Option<Sharing> {
        let node = self.node.as_ref()?;
        let mut counters = self.lock();
        let cluster = counters.cluster()?;
        let is_alone = cluster.is_alone() || cluster.is_returning();
        let (nodes, losses) = (cluster.nodes(), cluster.losses());
        drop(counters);
        let unknown = || "this node has not taken part again yet".to_owned();
        let trouble = is_alone.then(|| node.connection.unavailable_reason().unwrap_or_else(unknown));
        Some(Sharing { trouble, nodes, losses, faults: node.lock_faults().clone() })
    }

    /// The connection, for what has to keep it.
    pub fn connection(&self) -> Option<&FailFastConnection> {
        self.node.as_ref().map(|node| &node.connection)
    }

    /// There is something to tell Redis.
    pub(super) fn tell(&self) {
        if let Some(node) = &self.node {
            node.wake.notify_one();
        }
    }

    /// Redis is asked, in one call; while it is away the node's own part is.
    pub(super) async fn try_shared(&self, demand: &Demand<'_>) -> Result<(Admission, bool), NoRoom> {
        let Some(node) = &self.node else { return self.try_alone(demand) };
        if self.lock().cluster().is_some_and(|cluster| cluster.is_returning()) {
            self.refresh().await;
        }
        if let Some(admission) = self.lock().admit_leased(clock::now(), demand) {
            self.tell();
            return Ok((admission, false));
        }
        let mut has_waited = false;
        for _ in 0..ATTEMPTS {
            let Ok(permit) = node.connection.permit().await else { break };
            let Some(question) = self.lock().question(clock::now(), demand) else { break };
            let mut limbo = Limbo { account: self, id: Some(question.id) };
            let Ok(answer) = permit.call(&node.keys, &question.command).await else { break };
            limbo.id = None;
            match self.lock().answered(clock::now(), demand, &question, &answer) {
                // What has ended here is to be known there before anybody is denied.
                Answered::Decided(Err(_)) if question.is_early && !has_waited => has_waited = true,
                Answered::Decided(decided) => return decided.map(|admission| (admission, false)),
                Answered::Again => continue,
                Answered::Unknown => break,
            }
            self.refresh().await;
        }
        self.try_alone(demand)
    }

    fn try_alone(&self, demand: &Demand<'_>) -> Result<(Admission, bool), NoRoom> {
        let mut counters = self.lock();
        counters.lose(clock::now());
        let now = counters.now(clock::now());
        let admission = counters.admit_alone(now, demand)?;
        let is_durable = counters.are_durable(demand.subject);
        drop(counters);
        self.tell();
        Ok((admission, is_durable))
    }

    /// Waits until Redis has been told what has ended here, and has told how all quotas stand; not long if it is away.
    pub async fn refresh(&self) {
        let Some(node) = &self.node else { return };
        if self.lock().cluster().is_none_or(|cluster| cluster.is_alone()) {
            return;
        }
        let (sender, receiver) = oneshot::channel();
        node.waiting.lock().unwrap_or_else(PoisonError::into_inner).push(sender);
        node.wake.notify_one();
        // Whoever cannot be told finds the counters as they were last heard of.
        drop(timeout(PATIENCE, receiver).await);
    }

    /// Sets a limit for all nodes. `None`: there is no such quota.
    pub(super) async fn set_limit_for_all(
        &self,
        key: QuotaKey<'_>,
        limit: Option<(u64, u64)>,
    ) -> Result<bool, NoRoom> {
        let is_any = self.order(|counters| counters.limit_command(clock::now(), key, limit)).await?;
        self.refresh().await;
        Ok(is_any)
    }

    /// Makes the quotas of all nodes whole.
    pub(super) async fn reset_for_all(&self) -> Result<(), NoRoom> {
        self.order(|counters| counters.reset_command(clock::now())).await?;
        self.refresh().await;
        Ok(())
    }

    /// Has Redis do something for all nodes; whether there was anything to do. A period may turn on the way: then it is told
    /// anew.
    async fn order(&self, command: impl Fn(&mut Counters) -> Option<ScriptCommand>) -> Result<bool, NoRoom> {
        let node = self.node.as_ref().ok_or(NoRoom::Unavailable)?;
        for _ in 0..ATTEMPTS {
            let Some(command) = command(&mut self.lock()) else { return Ok(false) };
            let answer = node.call(&command).await.map_err(|_| NoRoom::Unavailable)?;
            match answer.verdict {
                Verdict::Done => return Ok(true),
                Verdict::StalePeriod | Verdict::DeadlinePassed => {}
                _ => return Err(NoRoom::Unavailable),
            }
            if let Some(cluster) = self.lock().cluster() {
                cluster.heard(clock::now(), &answer);
            }
        }
        Err(NoRoom::Unavailable)
    }

    /// Takes part in the cluster until `stops`, and then leaves it: everything has been settled by then. Returns at once
    /// where the counters are the node's own.
    pub async fn take_part(self: Arc<Self>, mut stops: watch::Receiver<bool>) {
        let Some(node) = &self.node else { return };
        let mut up = node.connection.watch_generation();
        let work = async {
            loop {
                // The connection lives as long as the account.
                if up.wait_for(|number| *number != 0).await.is_err() {
                    return;
                }
                node.look_at_settings().await;
                if self.join(node).await.is_some() {
                    tracing::info!(environment = node.environment, "its quotas are shared with other nodes");
                    self.keep_up(node).await;
                    tracing::warn!(environment = node.environment, "its quotas are this node's own for now");
                }
                self.lock().lose(clock::now());
                node.flushed();
                sleep(PAUSE).await;
            }
        };
        tokio::select! {
            () = work => {}
            _ = stops.wait_for(|stops| *stops) => {}
        }
        drop(timeout(PATIENCE_AT_THE_END, self.leave(node)).await);
    }

    /// Tells Redis the rest; should it be away just then, when it is back.
    async fn leave(&self, node: &Node) {
        self.lock().end_lease();
        let mut up = node.connection.watch_generation();
        while !self.takes_part() || self.flush(node).await.is_none() {
            self.lock().lose(clock::now());
            sleep(PAUSE).await;
            if up.wait_for(|number| *number != 0).await.is_err() {
                return;
            }
            self.join(node).await;
        }
        let command = self.lock().leave_command();
        if let Some(command) = command {
            drop(node.call(&command).await);
        }
    }

    /// Whether Redis knows all that this node holds.
    fn takes_part(&self) -> bool {
        self.lock().cluster().is_some_and(|cluster| !cluster.is_alone() && !cluster.is_returning())
    }

    /// Takes part again; `None`: Redis is away, or says something odd.
    async fn join(&self, node: &Node) -> Option<()> {
        let (differing, wait) = self.call_to_join(node).await?;
        if differing > 0 {
            node.tell_of_limits();
        }
        if wait > 0 {
            tracing::warn!(
                environment = node.environment,
                "Redis has lost its data: nodes bring back what they know"
            );
        }
        let others_are_here = Instant::now() + Duration::from_millis(wait);
        self.have_all_held(node).await?;
        self.have_nothing_else_held(node).await?;
        sleep_until(others_are_here).await;
        self.lock().return_from_alone(clock::now());
        // What was admitted meanwhile.
        self.have_all_held(node).await?;
        self.flush(node).await?;
        self.beat(node).await
    }

    async fn call_to_join(&self, node: &Node) -> Option<(u64, u64)> {
        for _ in 0..ATTEMPTS {
            let command = self.lock().join(clock::now())?;
            let answer = node.call(&command).await.ok()?;
            if let Some(joined) = self.lock().joined(clock::now(), &answer) {
                return Some(joined);
            }
        }
        None
    }

    /// Redis is told of what is in flight, some of it at a time.
    async fn have_all_held(&self, node: &Node) -> Option<()> {
        let mut attempts = 0;
        loop {
            let Some((command, ids)) = self.lock().hold(clock::now()) else { return Some(()) };
            let answer = node.call(&command).await.ok()?;
            let mut counters = self.lock();
            let cluster = counters.cluster()?;
            cluster.heard(clock::now(), &answer);
            match answer.verdict {
                Verdict::Done => {
                    cluster.are_held(&ids);
                    attempts = 0;
                }
                Verdict::UnknownSession => return None,
                _ if attempts == ATTEMPTS => return None,
                _ => attempts += 1,
            }
        }
    }

    async fn have_nothing_else_held(&self, node: &Node) -> Option<()> {
        let mut attempts = 0;
        loop {
            let command = self.lock().hold_only(clock::now())?;
            let answer = node.call(&command).await.ok()?;
            self.lock().cluster()?.heard(clock::now(), &answer);
            match answer.verdict {
                Verdict::Done if answer.values.first() == Some(&0) => return Some(()),
                Verdict::Done => attempts = 0,
                Verdict::UnknownSession => return None,
                _ if attempts == ATTEMPTS => return None,
                _ => attempts += 1,
            }
        }
    }

    /// Tells Redis what becomes of reservations, as soon as there is anything to tell, and shows that this node is
    /// alive; returns when that fails.
    async fn keep_up(&self, node: &Node) {
        let mut beat = interval_at(Instant::now() + BEAT, BEAT);
        beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let is_due = tokio::select! {
                () = node.wake.notified() => false,
                _ = beat.tick() => true,
            };
            let waiting = node.flushed();
            let told = self.flush_and_lease(node).await;
            let heard = if is_due || !waiting.is_empty() { self.beat(node).await } else { Some(()) };
            drop(waiting);
            if told.is_none() || heard.is_none() || self.lock().cluster().is_none_or(|c| c.is_alone()) {
                return;
            }
        }
    }

    async fn flush_and_lease(&self, node: &Node) -> Option<()> {
        self.flush(node).await?;
        let lease = self.lock().lease(clock::now());
        if let Some(command) = lease {
            let answer = node.call(&command).await.ok()?;
            return self.lock().leased(clock::now(), &answer).then_some(());
        }
        // Leases may have been given back.
        self.flush(node).await
    }

    /// Tells Redis what there is to tell by now: what comes meanwhile may never end, and something else is due too.
    async fn flush(&self, node: &Node) -> Option<()> {
        let mut attempts = 0;
        let end = self.lock().cluster()?.next_step();
        loop {
            let Some(batch) = self.lock().cluster().and_then(|c| c.batch(clock::now(), end)) else {
                return Some(());
            };
            let answer = node.call(&batch.command).await.ok()?;
            if self.lock().batch_is_told(clock::now(), &batch, &answer) {
                attempts = 0;
                continue;
            }
            // What is to be told is kept until it takes part again.
            if answer.verdict == Verdict::UnknownSession {
                return None;
            }
            attempts += 1;
            if attempts >= ATTEMPTS {
                return None;
            }
        }
    }

    async fn beat(&self, node: &Node) -> Option<()> {
        for _ in 0..ATTEMPTS {
            let command = self.lock().beat(clock::now())?;
            let answer = node.call(&command).await.ok()?;
            let mut counters = self.lock();
            if let Some(differs) = counters.beaten(clock::now(), &answer) {
                drop(counters);
                if differs {
                    node.tell_of_limits();
                }
                // Others may have given back what somebody here waits for.
                self.wait_queue.somebody_has_ended();
                return Some(());
            }
            drop(counters);
            if answer.verdict == Verdict::UnknownSession {
                return None;
            }
        }
        None
    }

    /// Denies a request as Redis has.
    pub(super) fn deny_shared(&self, no_room: NoRoom, subject: Subject<'_>) -> NoRoom {
        let mut counters = self.lock();
        let now = counters.now(clock::now());
        counters.count_denial(now, subject);
        drop(counters);
        self.changed(false);
        no_room
    }
}
