//! State that all workers of a gateway share.

use super::flood::FloodLimiter;
use super::headers;
use super::keys::KeyTable;
use crate::calibrations::Calibrations;
use crate::config::{Config, Environment};
use crate::estimate::{Models, Provider};
use crate::ledger::{Account, Persistence, RestoredState};
use crate::random;
use crate::store::{Store, WriterControl};
use crate::telemetry::{Metrics, RequestIds, Series};
use http::header::HeaderValue;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// State that all workers of a gateway share.
pub struct State {
    /// The settings.
    pub config: Arc<Config>,
    /// The counters of each environment, in the order of the config.
    pub accounts: Vec<Arc<Account>>,
    /// The metrics.
    pub(crate) metrics: Arc<Metrics>,
    /// In the order of the config.
    pub(super) contexts: Vec<EnvironmentContext>,
    pub(super) models: Models,
    /// Corrections of prompt estimates, by upstream in the order of the config.
    pub(super) calibrations: Arc<Calibrations>,
    pub(super) keys: KeyTable,
    pub(super) request_ids: RequestIds,
    pub(super) flood: Option<FloodLimiter>,
    /// Whether each upstream has refused `stream_options`, in the order of the config.
    refuses_stream_options: Vec<AtomicBool>,
    /// The status of the store. `None`: nothing is persisted.
    store: Option<Arc<WriterControl>>,
    draining: AtomicBool,
}

/// Values of one environment that every request needs, prepared once so that requests share them.
pub(super) struct EnvironmentContext {
    pub(super) series: Arc<Series>,
    /// Index of the upstream in the config.
    pub(super) upstream: usize,
    /// The service behind the upstream.
    pub(super) provider: Provider,
    pub(super) name: Arc<str>,
    /// The callers' names, in the order of the config.
    pub(super) callers: Vec<Arc<str>>,
    /// The value of `x-tollgate-environment`.
    pub(super) header: HeaderValue,
    pub(super) credential: Option<headers::Credential>,
}

/// A unique random id of this process. Redis stores this process's reservations under it.
fn session_id() -> String {
    format!("{:016x}{:016x}", random::number(), random::number())
}

impl State {
    /// Opens the account of each environment and restores its counters from the store.
    ///
    /// # Errors
    /// The metrics cannot be registered, the store cannot be read, or a tokenizer file cannot be used.
    pub fn new(config: Arc<Config>, store: Option<&Store>) -> anyhow::Result<Self> {
        let metrics = Arc::new(Metrics::new()?);
        let calibrations = Calibrations::new(config.upstreams.iter().map(|u| u.name.as_str()));
        if let Some(store) = store {
            calibrations.restore(store.calibrations()?);
        }
        let mut contexts = Vec::new();
        for environment in &config.environments {
            let upstream = |u: &Arc<crate::config::UpstreamSettings>| Arc::ptr_eq(u, &environment.upstream);
            contexts.push(EnvironmentContext {
                series: Arc::new(metrics.series_of(environment)),
                upstream: config.upstreams.iter().position(upstream).unwrap_or(0),
                provider: Provider::of_upstream(&environment.upstream),
                name: environment.name.as_str().into(),
                callers: environment.callers.iter().map(|c| c.name.as_str().into()).collect(),
                header: HeaderValue::from_str(&environment.name)?,
                credential: headers::credential(&environment.upstream),
            });
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
        Ok(Self {
            accounts: config.environments.iter().map(open).collect::<anyhow::Result<_>>()?,
            contexts,
            models: Models::load(&config.models).map_err(anyhow::Error::msg)?,
            calibrations: Arc::new(calibrations),
            keys: KeyTable::new(&config),
            metrics,
            request_ids: RequestIds::new(),
            refuses_stream_options: config.upstreams.iter().map(|_| AtomicBool::new(false)).collect(),
            flood: config.server.flood_guard.and_then(FloodLimiter::new),
            store: store.map(Store::persistence),
            draining: AtomicBool::new(false),
            config,
        })
    }

    /// Every environment and its account.
    pub fn environments(&self) -> Vec<(Arc<Environment>, Arc<Account>)> {
        self.config.environments.iter().cloned().zip(self.accounts.iter().cloned()).collect()
    }

    /// The corrections of prompt estimates.
    pub fn calibrations(&self) -> &Arc<Calibrations> {
        &self.calibrations
    }

    /// Refuses new requests from now on.
    pub fn drain(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }

    /// Whether new requests are refused.
    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    /// Whether the gateway requests usage in streams of this upstream. It does not if `stream_usage` is `never`, or
    /// if the upstream has refused `stream_options`.
    pub(super) fn requests_stream_usage(&self, upstream: usize) -> bool {
        self.config.upstreams[upstream].requests_stream_usage
            && !self.refuses_stream_options[upstream].load(Ordering::Relaxed)
    }

    /// Records that an upstream refuses `stream_options`. The gateway adds them no more while this process runs.
    pub(super) fn stop_requesting_stream_usage(&self, upstream: usize) {
        if !self.refuses_stream_options[upstream].swap(true, Ordering::Relaxed) {
            tracing::warn!(
                upstream = self.config.upstreams[upstream].name,
                "the upstream refuses stream_options: the gateway no longer requests usage in its streams and counts \
                 the delivered text instead; set upstreams.*.stream_usage to never to avoid the refused first attempt"
            );
        }
    }

    /// Why the store cannot write. `None`: it can, or there is none.
    pub fn store_failure(&self) -> Option<String> {
        self.store.as_ref()?.unavailable_reason()
    }

    /// Requests in flight in all environments.
    pub fn in_flight(&self) -> u64 {
        self.accounts.iter().map(|a| a.in_flight()).sum()
    }
}
