//! What all workers of a gateway share.

use super::flood::Flood;
use super::headers;
use crate::calibrations::Calibrations;
use crate::config::{Config, Environment};
use crate::estimate::Models;
use crate::ledger::{Account, Persistence, RestoredState};
use crate::store::{Signal, Store};
use crate::telemetry::{Metrics, RequestIds, Series};
use http::header::HeaderValue;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// What all workers of a gateway share.
pub struct State {
    /// The settings.
    pub config: Arc<Config>,
    /// The counters of each environment, in the config's order.
    pub accounts: Vec<Arc<Account>>,
    /// The metrics.
    pub metrics: Arc<Metrics>,
    pub(super) names: Vec<Names>,
    pub(super) models: Models,
    /// How far estimates were off, by upstream in the config's order.
    pub(super) calibrations: Arc<Calibrations>,
    pub(super) callers: HashMap<[u8; 32], Owner>,
    pub(super) request_ids: RequestIds,
    pub(super) flood: Option<Flood>,
    /// Which upstreams have refused `stream_options`, in the config's order.
    refuses_stream_options: Vec<AtomicBool>,
    /// How the store does; `None`: nothing is kept.
    store: Option<Arc<Signal>>,
    draining: AtomicBool,
}

/// What every request of an environment needs, looked up once and shared instead of copied.
pub(super) struct Names {
    pub(super) series: Arc<Series>,
    /// Its index in the config.
    pub(super) upstream: usize,
    pub(super) environment: Arc<str>,
    pub(super) callers: Vec<Arc<str>>,
    pub(super) header: HeaderValue,
    pub(super) credential: Option<headers::Credential>,
}

/// Whose a key is: an environment and a caller of it, by index.
pub(super) type Owner = (usize, usize);

/// A name that no process has had before: what a cluster holds for this one is found under it.
fn session() -> anyhow::Result<String> {
    let random =
        || getrandom::u64().map_err(|error| anyhow::anyhow!("no random numbers are to be had: {error}"));
    Ok(format!("{:016x}{:016x}", random()?, random()?))
}

impl State {
    /// Opens the accounts of a config's environments, as the store has them.
    ///
    /// # Errors
    /// The metrics cannot be registered, the store cannot be read, or a tokenizer's file cannot be used.
    pub fn new(config: Arc<Config>, store: Option<&Store>) -> anyhow::Result<Self> {
        let metrics = Arc::new(Metrics::new()?);
        let calibrations = Calibrations::new(config.upstreams.iter().map(|u| u.name.as_str()));
        if let Some(store) = store {
            calibrations.restore(store.calibrations()?);
        }
        let mut names = Vec::new();
        for environment in &config.environments {
            let upstream = |u: &Arc<crate::config::Upstream>| Arc::ptr_eq(u, &environment.upstream);
            names.push(Names {
                series: Arc::new(metrics.of_environment(environment)),
                upstream: config.upstreams.iter().position(upstream).unwrap_or(0),
                environment: environment.name.as_str().into(),
                callers: environment.callers.iter().map(|c| c.name.as_str().into()).collect(),
                header: HeaderValue::from_str(&environment.name)?,
                credential: headers::credential(&environment.upstream),
            });
        }
        let session = session()?;
        let open = |environment: &Arc<Environment>| {
            let keeper = store.map(|store| -> Arc<dyn Persistence> { store.keeper() });
            let left = store.map_or_else(|| Ok(RestoredState::default()), |store| store.left(environment))?;
            let mut account = Account::open_with(environment, keeper, &left);
            if let Some(redis) = &config.store.redis {
                account.share(environment, redis, &session, config.written)?;
            }
            anyhow::Ok(Arc::new(account))
        };
        Ok(Self {
            accounts: config.environments.iter().map(open).collect::<anyhow::Result<_>>()?,
            names,
            models: Models::load(&config.models).map_err(anyhow::Error::msg)?,
            calibrations: Arc::new(calibrations),
            callers: config.callers_by_digest().into_iter().collect(),
            metrics,
            request_ids: RequestIds::new(),
            refuses_stream_options: config.upstreams.iter().map(|_| AtomicBool::new(false)).collect(),
            flood: config.server.flood_guard.and_then(Flood::new),
            store: store.map(Store::keeper),
            draining: AtomicBool::new(false),
            config,
        })
    }

    /// Every environment with its account.
    pub fn environments(&self) -> Vec<(Arc<Environment>, Arc<Account>)> {
        self.config.environments.iter().cloned().zip(self.accounts.iter().cloned()).collect()
    }

    /// What was learned of estimates.
    pub fn calibrations(&self) -> &Arc<Calibrations> {
        &self.calibrations
    }

    /// From now on new requests are refused.
    pub fn drain(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }

    /// Whether new requests are refused.
    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    /// Whether streams of an upstream are asked for their usage: unless its settings, or it, said otherwise.
    pub(super) fn asks_for_usage(&self, upstream: usize) -> bool {
        self.config.upstreams[upstream].ask_stream_usage
            && !self.refuses_stream_options[upstream].load(Ordering::Relaxed)
    }

    /// An upstream has refused `stream_options`: it is not asked again while this process runs.
    pub(super) fn ask_no_longer(&self, upstream: usize) {
        if !self.refuses_stream_options[upstream].swap(true, Ordering::Relaxed) {
            tracing::warn!(
                upstream = self.config.upstreams[upstream].name,
                "the upstream refuses stream_options: its streams are no longer asked for usage, and what they do \
                 not report is counted (upstreams.*.stream_usage: never spares it the first attempt)"
            );
        }
    }

    /// What keeps the store from writing; `None`: nothing.
    pub fn store_trouble(&self) -> Option<String> {
        self.store.as_ref()?.trouble()
    }

    /// Requests under way in all environments.
    pub fn in_flight(&self) -> u64 {
        self.accounts.iter().map(|a| a.in_flight()).sum()
    }
}
