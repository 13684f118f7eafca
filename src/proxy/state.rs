//! State that all workers of a gateway share for the life of the process.

use super::body_budget::BodyBudget;
use super::snapshot::Snapshot;
use crate::calibrations::Calibrations;
use crate::clock::{self, Stopwatch};
use crate::config::{Config, Environment};
use crate::estimate::Models;
use crate::learned::Learned;
use crate::ledger::{Account, Accounts, AuditEntry, MAX_STORE_WAIT, Persistence, RestoredState};
use crate::random;
use crate::store::{self, Store, WriterControl};
use crate::telemetry::{Metrics, Rejections, RequestIds, Tracing};
use futures_util::future::join_all;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;
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
    /// The accounts of all environments that a config of this process has had.
    accounts: Arc<Accounts>,
    /// The name of this process in Redis.
    session: String,
    current: Mutex<Arc<Snapshot>>,
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
    /// The environments whose account is new.
    added: Vec<(Arc<Environment>, Arc<Account>)>,
}

impl PreparedConfig {
    /// The snapshot that will be in force.
    pub(crate) fn snapshot(&self) -> &Arc<Snapshot> {
        &self.snapshot
    }

    /// The accounts of environments that no config of this process has had.
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
        let open = |environment: &Arc<Environment>| {
            let keeper = store.map(|store| -> Arc<dyn Persistence> { store.persistence() });
            let left = store
                .map_or_else(|| Ok(RestoredState::default()), |store| store.restored_state(environment))?;
            let account = Account::open_with(environment, keeper, &left);
            anyhow::Ok(Arc::new(match &config.store.redis {
                Some(redis) => account.share(environment, redis, &session, config.file_modified_ms)?,
                None => account,
            }))
        };
        let opened: Vec<_> = config.environments.iter().map(open).collect::<anyhow::Result<_>>()?;
        let accounts = Accounts::default();
        for (environment, account) in config.environments.iter().zip(&opened) {
            accounts.add(&environment.name, account.clone());
            account.log_overrides(environment);
        }
        let bodies = Arc::new(BodyBudget::default());
        bodies.set_max(config.server.buffered_bodies);
        let tracing = Tracing::start(&config, &metrics)?;
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
        let (mut accounts, mut known, mut added) = (Vec::new(), Vec::new(), Vec::new());
        for environment in &config.environments {
            let before = current.config.environment(&environment.name).map(|(_, before)| before);
            let account = self.accounts.of(&environment.name);
            let has_same_quotas = before.is_some_and(|before| before.quotas == environment.quotas);
            let restored = if account.is_some() && has_same_quotas {
                RestoredState::default()
            } else {
                self.stored_state(&config, environment)?
            };
            let account = if let Some(account) = account {
                known.push((environment.clone(), account.clone(), restored));
                account
            } else {
                let keeper = self.store.clone().map(|store| -> Arc<dyn Persistence> { store });
                let account = Account::open_with(environment, keeper, &restored);
                let account = Arc::new(match &config.store.redis {
                    Some(redis) => {
                        account.share(environment, redis, &self.session, config.file_modified_ms)?
                    }
                    None => account,
                });
                added.push((environment.clone(), account.clone()));
                account
            };
            accounts.push(account);
        }
        let parts = (&*self.metrics, &**self.calibrations());
        let tracing = if config.telemetry.otlp == current.config.telemetry.otlp {
            current.tracing.clone()
        } else {
            Tracing::start(&config, &self.metrics)?
        };
        let snapshot = Snapshot::new(config, accounts, models, parts, Some(&current))?;
        let snapshot = Arc::new(snapshot.with_tracing(tracing));
        Ok(PreparedConfig { snapshot, known, added })
    }

    fn stored_state(&self, config: &Config, environment: &Environment) -> anyhow::Result<RestoredState> {
        if self.store.is_none() {
            return Ok(RestoredState::default());
        }
        store::read_restored_state(&config.store.path, environment)
    }

    /// Puts a config in force for all accounts. `put_in_force` then does so for new requests.
    pub(crate) async fn reconfigure_accounts(&self, prepared: &PreparedConfig) {
        for (environment, account) in &prepared.added {
            self.accounts.add(&environment.name, account.clone());
        }
        let config = &prepared.snapshot.config;
        let redis = config.store.redis.as_ref().map(|redis| (redis, config.file_modified_ms));
        let known = prepared.known.iter();
        let all =
            known.map(|(environment, account, restored)| account.reconfigure(environment, restored, redis));
        join_all(all).await;
        for (environment, account, _) in &prepared.known {
            account.log_overrides(environment);
        }
    }

    /// Puts a config in force for everything except the workers.
    pub(crate) fn put_in_force(&self, prepared: PreparedConfig) {
        self.bodies.set_max(prepared.snapshot.config.server.buffered_bodies);
        *self.current.lock().unwrap_or_else(PoisonError::into_inner) = prepared.snapshot;
    }

    /// The snapshot of the config in force.
    pub fn current(&self) -> Arc<Snapshot> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The accounts of all environments that a config of this process has had.
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
        self.accounts.all().iter().map(|(_, account)| account.in_flight()).sum()
    }
}
