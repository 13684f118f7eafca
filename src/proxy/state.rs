//! State that all workers of a gateway share for the life of the process.

use super::body_budget::BodyBudget;
use super::snapshot::Snapshot;
use crate::calibrations::Calibrations;
use crate::clock::{self, Stopwatch};
use crate::config::{Config, Environment, UpstreamSettings};
use crate::estimate::Models;
use crate::learned::Learned;
use crate::ledger::{Account, Accounts, AuditEntry, MAX_STORE_WAIT, Owner, Persistence, RestoredState};
use crate::provider_limits::LeftLimits;
use crate::quota::Quota;
use crate::random;
use crate::store::{self, Store, WriterControl};
use crate::telemetry::{Metrics, Rejections, RequestIds, Tracing};
use futures_util::future::join_all;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::timeout;

/// State that all workers of a gateway share for the life of the process, and the snapshot of the config in force.
pub struct State {
    /// The metrics.
    pub(crate) metrics: Arc<Metrics>,
    /// Corrects prompt estimates.
    pub(super) learned: Arc<Learned>,
    pub(super) request_ids: RequestIds,
    /// The bodies of requests that are buffered.
    pub(super) bodies: Arc<BodyBudget>,
    /// The last rejected requests.
    pub(crate) rejections: Rejections,
    /// The accounts of all environments and upstreams that a config of this process has had.
    accounts: Arc<Accounts>,
    /// The name of this process in Redis.
    session: String,
    current: Mutex<Arc<Snapshot>>,
    /// Notifies of each new snapshot.
    reloads: watch::Sender<()>,
    /// The status of the store. `None`: nothing is persisted.
    store: Option<Arc<WriterControl>>,
    /// Whether the gateway closes its connections, because it shuts down or another process has replaced it.
    is_closing: AtomicBool,
    /// Set when the gateway drains.
    drain: OnceLock<DrainPeriod>,
}

/// The time during which the gateway drains at its shutdown.
struct DrainPeriod {
    began: Stopwatch,
    timeout: Duration,
}

/// A unique random id of this process. Redis stores this process's reservations under it.
fn session_id() -> String {
    format!("{:016x}{:016x}", random::number(), random::number())
}

/// A checked config that is not in force yet.
pub struct PreparedConfig {
    snapshot: Arc<Snapshot>,
    /// The environments whose account exists already, with the stored state for quotas that are new to it.
    known: Vec<(Arc<Environment>, Arc<Account>, RestoredState)>,
    /// The upstreams with limits whose account exists already, likewise.
    known_upstreams: Vec<(Arc<UpstreamSettings>, Arc<Account>, RestoredState)>,
    /// The accounts that are new, with their names.
    added: Vec<(String, Arc<Account>)>,
}

/// What accounts are opened with.
struct Opening<'a> {
    config: &'a Config,
    store: Option<Arc<dyn Persistence>>,
    /// The name of this process in Redis.
    session: &'a str,
}

impl Opening<'_> {
    fn open(&self, owner: Owner<'_>, restored: &RestoredState) -> anyhow::Result<Arc<Account>> {
        let account = Account::open_with(owner, self.store.clone(), restored);
        Ok(Arc::new(match &self.config.store.redis {
            Some(redis) => {
                let slot = self.config.shared_slot();
                account.share(owner, redis, self.session, (slot, self.config.file_modified_ms))?
            }
            None => account,
        }))
    }
}

impl PreparedConfig {
    /// The snapshot that will be in force.
    pub(crate) fn snapshot(&self) -> &Arc<Snapshot> {
        &self.snapshot
    }

    /// The accounts of environments and upstreams that no config of this process has had.
    pub(crate) fn added_accounts(&self) -> impl Iterator<Item = &Arc<Account>> {
        self.added.iter().map(|(_, account)| account)
    }
}

impl State {
    /// Opens the account of each environment and restores its counters from the store. `models`: the models of the config.
    ///
    /// # Errors
    /// The metrics cannot be registered, or the store cannot be read.
    pub fn new(config: Arc<Config>, models: Models, store: Option<&Store>) -> anyhow::Result<Self> {
        let metrics = Arc::new(Metrics::new()?);
        metrics.config_loaded(clock::now());
        let calibrations = Calibrations::new(config.upstreams.iter().map(|u| u.name.as_str()));
        if let Some(store) = store {
            calibrations.restore(store.calibrations()?);
        }
        let session = session_id();
        let accounts = Accounts::default();
        let opening = Opening {
            config: &config,
            store: store.map(|store| -> Arc<dyn Persistence> { store.persistence() }),
            session: &session,
        };
        let open = |owner: Owner<'_>| {
            let restored =
                store.map_or_else(|| Ok(RestoredState::default()), |store| store.restored_state(owner))?;
            let account = opening.open(owner, &restored)?;
            accounts.add(&owner.key(), account.clone());
            account.log_overrides(owner);
            anyhow::Ok(account)
        };
        let of_environments: Vec<_> =
            config.environments.iter().map(|one| open(one.into())).collect::<anyhow::Result<_>>()?;
        let of_upstream =
            |one: &Arc<UpstreamSettings>| one.has_limits().then(|| open(one.into())).transpose();
        let of_upstreams: Vec<_> = config.upstreams.iter().map(of_upstream).collect::<anyhow::Result<_>>()?;
        let bodies = Arc::new(BodyBudget::default());
        bodies.set_max(config.server.buffered_bodies);
        let tracing = Tracing::start(&config, &metrics)?;
        let opened = (of_environments, of_upstreams);
        let current = Snapshot::new(config, opened, models, (&metrics, &calibrations), None)?;
        let current = current.with_tracing(tracing);
        Ok(Self {
            learned: Arc::new(Learned::new(calibrations)),
            metrics,
            request_ids: RequestIds::new(),
            bodies,
            rejections: Rejections::default(),
            accounts: Arc::new(accounts),
            session,
            current: Mutex::new(Arc::new(current)),
            reloads: watch::Sender::new(()),
            store: store.map(Store::persistence),
            is_closing: AtomicBool::new(false),
            drain: OnceLock::new(),
        })
    }

    /// Prepares a config without any effect on the one in force.
    ///
    /// # Errors
    /// The store cannot be read, or a tokenizer file cannot be used.
    pub(crate) fn prepare(&self, config: Arc<Config>) -> anyhow::Result<PreparedConfig> {
        let current = self.current();
        let models = Models::load(&config.models).map_err(anyhow::Error::msg)?;
        let opening = Opening {
            config: &config,
            store: self.store.clone().map(|store| -> Arc<dyn Persistence> { store }),
            session: &self.session,
        };
        let (mut accounts, mut known, mut added) = (Vec::new(), Vec::new(), Vec::new());
        for environment in &config.environments {
            let before = current.config.environment(&environment.name).map(|(_, before)| &*before.quotas);
            let (account, restored) = self.find_account(&config, environment.into(), before)?;
            let account = if let Some(account) = account {
                known.push((environment.clone(), account.clone(), restored));
                account
            } else {
                let account = opening.open(environment.into(), &restored)?;
                added.push((environment.name.clone(), account.clone()));
                account
            };
            accounts.push(account);
        }
        let (mut upstream_accounts, mut known_upstreams) = (Vec::new(), Vec::new());
        for upstream in &config.upstreams {
            let before = current.config.upstreams.iter().find(|before| before.name == upstream.name);
            let before = before.map(|before| &*before.quotas);
            let (account, restored) = self.find_account(&config, upstream.into(), before)?;
            let account = match account {
                Some(account) => {
                    known_upstreams.push((upstream.clone(), account.clone(), restored));
                    Some(account)
                }
                None if upstream.has_limits() => {
                    let account = opening.open(upstream.into(), &restored)?;
                    added.push((Owner::from(upstream).key().into_owned(), account.clone()));
                    Some(account)
                }
                None => None,
            };
            upstream_accounts.push(account.filter(|_| upstream.has_limits()));
        }
        let parts = (&*self.metrics, &**self.calibrations());
        let tracing = if config.telemetry.otlp == current.config.telemetry.otlp {
            current.tracing.clone()
        } else {
            Tracing::start(&config, &self.metrics)?
        };
        let snapshot = Snapshot::new(config, (accounts, upstream_accounts), models, parts, Some(&current))?;
        let snapshot = Arc::new(snapshot.with_tracing(tracing));
        Ok(PreparedConfig { snapshot, known, known_upstreams, added })
    }

    /// The account of an owner, and the stored state for quotas that are new to it. `before`: the quotas of its last
    /// config.
    fn find_account(
        &self,
        config: &Config,
        owner: Owner<'_>,
        before: Option<&[Quota]>,
    ) -> anyhow::Result<(Option<Arc<Account>>, RestoredState)> {
        let account = self.accounts.of(&owner.key());
        let is_complete = account.is_some() && before == Some(owner.quotas());
        if is_complete || self.store.is_none() {
            return Ok((account, RestoredState::default()));
        }
        Ok((account, store::read_restored_state(&config.store.path, owner)?))
    }

    /// Puts a config in force for all accounts. `put_in_force` then does so for new requests.
    pub(crate) async fn reconfigure_accounts(&self, prepared: &PreparedConfig) {
        for (name, account) in &prepared.added {
            self.accounts.add(name, account.clone());
        }
        let config = &prepared.snapshot.config;
        let redis = config.store.redis.as_ref().map(|redis| (redis, config.file_modified_ms));
        let known = prepared.known.iter();
        let all =
            known.map(|(environment, account, restored)| account.reconfigure(environment, restored, redis));
        join_all(all).await;
        let known = prepared.known_upstreams.iter();
        let all = known.map(|(upstream, account, restored)| account.reconfigure(upstream, restored, redis));
        join_all(all).await;
        for (environment, account, _) in &prepared.known {
            account.log_overrides(environment);
        }
        for (upstream, account, _) in &prepared.known_upstreams {
            account.log_overrides(upstream);
        }
    }

    /// Puts a config in force for everything except the workers.
    pub(crate) fn put_in_force(&self, prepared: PreparedConfig) {
        self.bodies.set_max(prepared.snapshot.config.server.buffered_bodies);
        *self.current.lock().unwrap_or_else(PoisonError::into_inner) = prepared.snapshot;
        self.reloads.send_replace(());
    }

    /// What the answers of the providers have stated, for a process that replaces this one.
    pub(crate) fn left_provider_limits(&self) -> Vec<LeftLimits> {
        let current = self.current();
        let upstreams = current.config.upstreams.iter().zip(&current.provider_limits);
        upstreams.filter_map(|(settings, limits)| limits.leave(settings.provider_account())).collect()
    }

    /// Continues with what the process that this one replaces has left.
    pub(crate) fn take_over_provider_limits(&self, left: Vec<LeftLimits>) {
        let current = self.current();
        for left in left {
            let same = |settings: &Arc<UpstreamSettings>| settings.provider_account() == left.account;
            let at = current.config.upstreams.iter().position(same);
            if let Some(limits) = at.and_then(|at| current.provider_limits.get(at)) {
                limits.take_over(left);
            }
        }
    }

    /// Changes with each new snapshot.
    pub(crate) fn reloads(&self) -> watch::Receiver<()> {
        self.reloads.subscribe()
    }

    /// The snapshot of the config in force.
    pub fn current(&self) -> Arc<Snapshot> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The accounts of all environments and upstreams that a config of this process has had.
    pub fn accounts(&self) -> &Arc<Accounts> {
        &self.accounts
    }

    /// Adds an entry to the audit log. Returns when it is durable, at the latest after [`MAX_STORE_WAIT`].
    pub(crate) async fn record_action(&self, entry: AuditEntry) {
        self.accounts.audit().push(entry);
        let Some(store) = &self.store else { return };
        let commit = store.commits().next();
        store.changed(true);
        if store.is_writing() && timeout(MAX_STORE_WAIT, store.commits().wait_for(commit)).await.is_err() {
            store.on_wait_timeout();
        }
    }

    /// Adds an entry to the audit log, which becomes durable with the next commit.
    pub(crate) fn record_action_lazily(&self, entry: AuditEntry) {
        self.accounts.audit().push(entry);
        if let Some(store) = &self.store {
            store.changed(false);
        }
    }

    /// The corrections of prompt estimates.
    pub fn calibrations(&self) -> &Arc<Calibrations> {
        self.learned.calibrations()
    }

    /// Records that the gateway closes its connections. It still serves requests.
    pub(crate) fn begin_closing(&self) {
        self.is_closing.store(true, Ordering::Relaxed);
    }

    /// Whether the gateway closes its connections.
    pub(crate) fn is_closing(&self) -> bool {
        self.is_closing.load(Ordering::Relaxed)
    }

    /// Refuses new requests from now on.
    pub fn drain(&self, timeout: Duration) {
        // A second call changes nothing.
        let _ = self.drain.set(DrainPeriod { began: Stopwatch::start(), timeout });
    }

    /// Whether new requests are refused.
    pub fn is_draining(&self) -> bool {
        self.drain.get().is_some()
    }

    /// Whether the gateway sends no request to an upstream any more, because it stops.
    pub(super) fn is_drain_over(&self) -> bool {
        self.drain.get().is_some_and(|drain| drain.began.elapsed() >= drain.timeout)
    }

    /// Why the store cannot write. `None`: it can, or there is none.
    pub fn store_failure(&self) -> Option<String> {
        self.store.as_ref()?.unavailable_reason()
    }

    /// Requests in flight in all environments.
    pub fn in_flight(&self) -> u64 {
        let all = self.accounts.all();
        let of_environments = all.iter().filter(|(_, account)| account.upstream().is_none());
        of_environments.map(|(_, account)| account.in_flight()).sum()
    }
}
