//! Who holds what: the counters of every environment, and reservations that settle themselves.

mod allowance;
mod cluster;
mod commits;
mod counters;
mod lease;
mod node;
mod overrides;
mod usage_history;
mod wait_queue;

use crate::clock::{self, Timestamp};
use crate::config::Environment;
use crate::quota::{Amounts, PersistedCounter, Quota, QuotaLevel, QuotaStatus, Subject};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

pub use commits::Commits;
pub use counters::{Admission, Counters, Demand, Ended, Grant, NoRoom, Progress, Rules, Totals};
use node::Node;
pub use node::Sharing;
pub use overrides::{AuditEntry, QuotaKey};
pub(crate) use usage_history::OTHER;
pub use usage_history::Row;
use wait_queue::WaitQueue;

/// A store that does not take a reservation within this time is not waited for any longer.
const LONGEST_WAIT_FOR_STORE: Duration = Duration::from_secs(1);

/// Who keeps what changes, so that it outlives the process.
pub trait Persistence: Send + Sync + std::fmt::Debug {
    /// Something has changed. `urgent`: somebody waits until it is kept.
    fn changed(&self, urgent: bool);

    /// Whether waiting is any use: a store that cannot write now would only hold requests up.
    fn is_writing(&self) -> bool;

    /// A wait for it has taken too long.
    fn is_late(&self);

    /// What a request waits for.
    fn commits(&self) -> &Commits;
}

/// The counters of one environment, shared by every request that draws on them.
#[derive(Debug)]
pub struct Account {
    counters: Mutex<Counters>,
    wait_queue: WaitQueue,
    keeper: Option<Arc<dyn Persistence>>,
    /// The way to Redis, where counters are shared.
    node: Option<Node>,
}

/// What an account looks like at one moment.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// Reservations not yet settled.
    pub in_flight: u64,
    /// How the counters are shared; `None`: they are this node's own.
    pub sharing: Option<Sharing>,
    /// Every quota, in the config's order.
    pub levels: Vec<QuotaLevel>,
    /// Sums since the store began.
    pub totals: Totals,
    /// Quotas whose limit is not the config's for now.
    pub overrides: Vec<Quota>,
}

/// What has changed in an account and has to be kept.
#[derive(Debug, Default)]
pub struct Changes {
    /// Every quota that has changed.
    pub quotas: Vec<(Quota, PersistedCounter)>,
    /// Sums since the store began.
    pub totals: Totals,
    /// What requests in flight have reserved: spent, should the process die now.
    pub held: Amounts,
    /// Usage by minute, caller and model, and the model's name.
    pub usage: Vec<(Row, Arc<str>)>,
    /// All overrides of limits, if they have changed.
    pub overrides: Option<Vec<Quota>>,
    /// What administrators have done.
    pub audit: Vec<AuditEntry>,
}

/// What another process has left of an account.
#[derive(Debug, Default)]
pub struct RestoredState {
    /// Quotas with what was kept of them.
    pub quotas: Vec<(Quota, PersistedCounter)>,
    /// Sums, without what was held.
    pub totals: Totals,
    /// What was in flight when the process died: charged in full.
    pub held: Amounts,
    /// Quotas with limits that an administrator has set.
    pub overrides: Vec<Quota>,
}

impl Account {
    /// Full quotas, kept by nobody.
    pub fn open(environment: &Environment) -> Self {
        Self::open_with(environment, None, &RestoredState::default())
    }

    /// The quotas as another process has left them, and `keeper` to keep them from now on.
    pub fn open_with(
        environment: &Environment,
        keeper: Option<Arc<dyn Persistence>>,
        left: &RestoredState,
    ) -> Self {
        let now = clock::now();
        let mut counters = Counters::new(Rules::of(environment), &environment.quotas, now);
        if keeper.is_some() {
            counters.take_over(now, left);
        }
        Self { counters: Mutex::new(counters), wait_queue: WaitQueue::default(), keeper, node: None }
    }

    /// Holds room for one request in every quota it touches, or in none. For counters that are this node's own.
    ///
    /// # Errors
    /// What is in the way. A denied request changes nothing but the count of denials.
    pub fn reserve(self: &Arc<Self>, demand: &Demand<'_>) -> Result<Reservation, NoRoom> {
        self.reserve_by(demand, Counters::admit)
    }

    /// The same where Redis may have to be asked. Dropping the future takes nothing.
    ///
    /// # Errors
    /// What is in the way.
    pub async fn reserve_shared(self: &Arc<Self>, demand: &Demand<'_>) -> Result<Reservation, NoRoom> {
        self.try_reserve(demand).await.map_err(|no_room| self.deny_shared(no_room, demand.subject))
    }

    /// The same, but a request that does not fit waits for room, at most so long, behind those that
    /// wait already. Dropping the future leaves the line.
    ///
    /// # Errors
    /// What is in the way, once no wait is left that could help.
    pub async fn reserve_in_line(
        self: &Arc<Self>,
        demand: &Demand<'_>,
        longest: Duration,
    ) -> Result<Reservation, NoRoom> {
        let reserve = || self.try_reserve(demand);
        let in_the_way = || {
            let mut counters = self.lock();
            let now = counters.now(clock::now());
            counters.in_the_way(now, demand)
        };
        let waited = wait_queue::wait(&self.wait_queue, longest, reserve, in_the_way).await;
        // Whoever has waited in vain, or has found no place, does not overtake those who stand before.
        waited.ok_or_else(|| self.deny(demand))
    }

    /// A denial is not counted: it may be tried again.
    async fn try_reserve(self: &Arc<Self>, demand: &Demand<'_>) -> Result<Reservation, NoRoom> {
        if !self.is_shared() {
            return self.reserve_by(demand, Counters::try_admit);
        }
        let (admission, is_durable) = self.try_shared(demand).await?;
        Ok(self.hold(demand, admission, is_durable))
    }

    fn deny(&self, demand: &Demand<'_>) -> NoRoom {
        let mut counters = self.lock();
        let now = counters.now(clock::now());
        let no_room = counters.deny(now, demand);
        drop(counters);
        self.changed(false);
        no_room
    }

    fn reserve_by(
        self: &Arc<Self>,
        demand: &Demand<'_>,
        admit: impl FnOnce(&mut Counters, Timestamp, &Demand<'_>) -> Result<Admission, NoRoom>,
    ) -> Result<Reservation, NoRoom> {
        let mut counters = self.lock();
        // Read under the lock, so that no request's clock runs behind that of the one before.
        let now = counters.now(clock::now());
        let admitted = admit(&mut counters, now, demand);
        let is_durable = counters.are_durable(demand.subject);
        drop(counters);
        match admitted {
            Ok(admission) => Ok(self.hold(demand, admission, is_durable)),
            Err(no_room) => {
                self.changed(false);
                Err(no_room)
            }
        }
    }

    fn hold(self: &Arc<Self>, demand: &Demand<'_>, admission: Admission, is_durable: bool) -> Reservation {
        let Admission { grant, clamped_to, would_deny, standing } = admission;
        let keeper = self.keeper.as_deref().filter(|keeper| is_durable && keeper.is_writing());
        let kept = keeper.map(|keeper| keeper.commits().next());
        self.changed(kept.is_some());
        Reservation {
            account: self.clone(),
            grant: Some(grant),
            subject: (demand.subject.caller, demand.subject.model.into()),
            ended: Ended::default(),
            standing,
            clamped_to,
            would_deny,
            is_durable: kept.is_some(),
            kept,
        }
    }

    /// Waits for a commit, but no longer than a store in order takes.
    async fn when_kept(&self, commit: u64) {
        let Some(keeper) = &self.keeper else { return };
        if tokio::time::timeout(LONGEST_WAIT_FOR_STORE, keeper.commits().done(commit)).await.is_err() {
            keeper.is_late();
        }
    }

    fn changed(&self, urgent: bool) {
        if let Some(keeper) = &self.keeper {
            keeper.changed(urgent);
        }
    }

    /// What has changed since the last call; `None`: nothing.
    pub fn take_changes(&self) -> Option<Changes> {
        let mut counters = self.lock();
        let mut quotas = Vec::new();
        counters.quotas.take_changes(|quota, saved| quotas.push((quota.clone(), saved)));
        let usage = counters.history.take();
        let (overrides, audit) = counters.limits.take_changes();
        let is_nothing = quotas.is_empty() && usage.is_empty() && audit.is_empty();
        let (totals, held) = (counters.totals, counters.held);
        (!is_nothing).then_some(Changes { quotas, totals, held, usage, overrides, audit })
    }

    /// What the subject is told of its quotas of each kind, in the order of `Kind::ALL`.
    pub fn standing(&self, subject: Subject<'_>) -> [Option<QuotaStatus>; 4] {
        let counters = self.lock();
        counters.quotas.status_by_kind(counters.now(clock::now()), subject)
    }

    /// All counters at one moment.
    pub fn snapshot(&self) -> Snapshot {
        let sharing = self.sharing();
        let mut counters = self.lock();
        let now = counters.now(clock::now());
        let levels = counters.quotas.levels(now);
        let overrides = counters.limits.overrides().to_vec();
        let of_all =
            counters.cluster().filter(|cluster| !cluster.is_alone()).map(|cluster| cluster.in_flight());
        let in_flight = of_all.unwrap_or(counters.in_flight);
        Snapshot { in_flight, sharing, levels, totals: counters.totals, overrides }
    }

    /// Sets a limit in place of the config's, or with `None` back to it: what was used stays used. Returns
    /// whether there is such a quota, once that is kept, and known to all nodes.
    ///
    /// # Errors
    /// The counters are shared, and cannot be reached.
    pub async fn set_limit(&self, key: QuotaKey<'_>, limit: Option<(u64, u64)>) -> Result<bool, NoRoom> {
        if self.is_shared() && !self.set_limit_for_all(key, limit).await? {
            return Ok(false);
        }
        let is_known = self.lock().set_limit(clock::now(), key, limit);
        self.keep().await;
        Ok(is_known)
    }

    /// Makes every quota whole again, but for what is held. Returns once that is kept, and known to all nodes.
    ///
    /// # Errors
    /// The counters are shared, and cannot be reached.
    pub async fn reset(&self) -> Result<(), NoRoom> {
        if self.is_shared() {
            self.reset_for_all().await?;
        }
        self.lock().reset(clock::now());
        self.keep().await;
        Ok(())
    }

    async fn keep(&self) {
        self.wait_queue.somebody_has_ended();
        let Some(commit) = self.keeper.as_ref().map(|keeper| keeper.commits().next()) else { return };
        self.changed(true);
        self.when_kept(commit).await;
    }

    /// Reservations not yet settled.
    pub fn in_flight(&self) -> u64 {
        self.lock().in_flight
    }

    fn settle(&self, subject: Subject<'_>, grant: Grant, ended: Ended) {
        let mut counters = self.lock();
        let now = counters.now(clock::now());
        counters.settle(now, subject, grant, ended);
        drop(counters);
        self.tell();
        self.wait_queue.somebody_has_ended();
        self.changed(false);
    }

    /// A panic elsewhere while the lock was held cannot have left it half changed: amounts are
    /// checked before anything is taken.
    fn lock(&self) -> MutexGuard<'_, Counters> {
        self.counters.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Room held in the quotas of one environment for one request. Dropping it settles the charge with
/// the last amounts observed, which are nothing until the request has gone to the upstream.
#[derive(Debug)]
#[must_use = "dropping a reservation settles it at once"]
pub struct Reservation {
    account: Arc<Account>,
    grant: Option<Grant>,
    subject: (Option<usize>, Box<str>),
    ended: Ended,
    standing: [Option<QuotaStatus>; 4],
    clamped_to: Option<u64>,
    would_deny: Option<NoRoom>,
    /// What it reserves has to outlive the process.
    is_durable: bool,
    /// The commit that will have it, until that was waited for.
    kept: Option<u64>,
}

impl Reservation {
    /// Records the latest word on what the request has cost.
    pub fn observe(&mut self, spent: Amounts) {
        self.ended.spent = spent;
    }

    /// The answer has come to its end: its length tells what to expect of the next.
    pub fn is_whole(&mut self) {
        self.ended.is_whole = true;
    }

    /// The latest word on what the request has cost.
    pub fn spent(&self) -> Amounts {
        self.ended.spent
    }

    /// Takes note of what has certainly been used so far, so that it is held no longer.
    pub fn progress(&mut self, spent: Amounts) -> Progress {
        let Some(grant) = &mut self.grant else { return Progress::Within };
        let before = grant.reserved();
        let mut counters = self.account.lock();
        let now = counters.now(clock::now());
        let progress = counters.progress(now, &self.subject.1, grant, spent);
        drop(counters);
        self.account.tell();
        let has_grown = grant.reserved() != before;
        self.account.wait_queue.somebody_has_ended();
        // Nobody waits for it, but what is delivered should be kept soon.
        self.account.changed(self.is_durable && has_grown);
        progress
    }

    /// The most completion tokens that the request allows its answer.
    pub fn cap(&self) -> u64 {
        self.grant.as_ref().map_or(u64::MAX, Grant::cap)
    }

    /// Beyond so many completion tokens `progress` has something to do at once; below, now and then.
    pub fn tell_beyond(&self) -> u64 {
        self.grant.as_ref().map_or(u64::MAX, Grant::tell_beyond)
    }

    /// Waits until the reservation would outlive the process, if one of its quotas asks for that.
    pub async fn kept(&mut self) {
        if let Some(commit) = self.kept.take() {
            self.account.when_kept(commit).await;
        }
    }

    /// Settles. Where more was used than was reserved, and that has to outlive the process, the last
    /// bytes of an answer must not be passed on before it would: what is returned waits for that.
    pub fn settle(self) -> Option<impl Future<Output = ()> + Send + 'static> {
        let spent = self.ended.spent;
        let exceeds = spent.saturating_sub(self.reserved()) != Amounts::default();
        let account = (exceeds && self.is_durable).then(|| self.account.clone());
        drop(self);
        let account = account?;
        let commit = account.keeper.as_ref().filter(|keeper| keeper.is_writing())?.commits().next();
        account.changed(true);
        Some(async move { account.when_kept(commit).await })
    }

    /// The quotas of each kind right after this reservation, in the order of `Kind::ALL`.
    pub fn standing(&self) -> &[Option<QuotaStatus>; 4] {
        &self.standing
    }

    /// To how many tokens each completion was bounded so that the request fits.
    pub fn clamped_to(&self) -> Option<u64> {
        self.clamped_to
    }

    /// Why the request would have been denied if its quotas were enforced.
    pub fn would_deny(&self) -> Option<&NoRoom> {
        self.would_deny.as_ref()
    }

    /// All that is reserved so far.
    pub fn reserved(&self) -> Amounts {
        self.grant.as_ref().map_or_else(Amounts::default, Grant::reserved)
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if let Some(grant) = self.grant.take() {
            let (caller, model) = &self.subject;
            self.account.settle(Subject { caller: *caller, model }, grant, self.ended);
        }
    }
}

#[cfg(test)]
mod tests;
