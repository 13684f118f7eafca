//! One config with everything that is prepared from it. It never changes: a reload makes another one. A request uses one
//! snapshot from its first byte to its last.

use super::destination::Destinations;
use super::flood::FloodLimiter;
use super::keys::KeyTable;
use super::upstream_context::UpstreamContext;
use crate::calibrations::Calibrations;
use crate::config::{Config, Environment, UpstreamSettings};
use crate::estimate::Models;
use crate::ledger::{Account, Backend};
use crate::provider_limits::ProviderLimits;
use crate::telemetry::{CallerLabels, Metrics, Series};
use crate::upstream::{ReplicaStatus, Replicas, check_replicas};
use futures_util::future::join_all;
use http::header::HeaderValue;
use std::hash::DefaultHasher;
use std::sync::{Arc, OnceLock};
use tokio_rustls::rustls::ClientConfig;

/// One config with everything that is prepared from it.
pub struct Snapshot {
    /// The settings.
    pub config: Arc<Config>,
    /// The counters of each environment, in the order of the config.
    pub accounts: Vec<Arc<Account>>,
    /// The counters of each upstream, in the order of the config. `None`: it has no limits.
    pub upstream_accounts: Vec<Option<Arc<Account>>>,
    /// In the order of the config.
    pub(super) contexts: Vec<EnvironmentContext>,
    pub(super) models: Models,
    pub(super) keys: KeyTable,
    pub(super) flood: Option<Arc<FloodLimiter>>,
    /// Sends traces. `None`: the gateway sends none.
    pub(crate) tracing: Option<Arc<crate::telemetry::Tracing>>,
    /// In the order of the config.
    pub(super) upstreams: Vec<UpstreamContext>,
    /// The limits of each upstream's provider, in the order of the config.
    pub(crate) provider_limits: Vec<Arc<ProviderLimits>>,
    /// The replicas of each upstream, in the order of the config.
    pub(crate) replicas: Vec<Replicas>,
}

/// Values of one environment that every request needs, prepared once so that requests share them.
pub(super) struct EnvironmentContext {
    pub(super) series: Arc<Series>,
    pub(super) destinations: Destinations,
    /// Whether every upstream of the environment has a key of its own.
    pub(super) has_credentials: bool,
    pub(super) name: Arc<str>,
    /// The callers' names, in the order of the config.
    pub(super) callers: Vec<Arc<str>>,
    /// The beginnings of the hashes of principals: of a request without a known caller, then of each caller in the same
    /// order. Each is computed with its first request.
    pub(super) principals: Vec<OnceLock<DefaultHasher>>,
    /// The value of `x-tollgate-environment`.
    pub(super) header: HeaderValue,
}

impl Snapshot {
    /// Prepares a config. `accounts`: the account of each environment, and that of each upstream with limits, in the order
    /// of the config. `previous`: the snapshot that this one replaces, whose flood guard and knowledge of upstreams stay where their settings did not
    /// change.
    pub(super) fn new(
        config: Arc<Config>,
        (accounts, upstream_accounts): (Vec<Arc<Account>>, Vec<Option<Arc<Account>>>),
        models: Models,
        (metrics, calibrations): (&Metrics, &Calibrations),
        previous: Option<&Self>,
    ) -> anyhow::Result<Self> {
        let guard = config.server.flood_guard;
        let known = previous.filter(|previous| previous.config.server.flood_guard == guard);
        let flood = known.map_or_else(
            || guard.and_then(FloodLimiter::new).map(Arc::new),
            |previous| previous.flood.clone(),
        );
        let upstreams = config.upstreams.iter().map(|settings| {
            let known = previous.iter().flat_map(|previous| &previous.upstreams);
            UpstreamContext::new(settings, calibrations, known)
        });
        let provider_limits = config.upstreams.iter().map(|settings| {
            let same = previous.and_then(|previous| {
                let at =
                    previous.config.upstreams.iter().position(|known| has_same_limits(known, settings))?;
                previous.provider_limits.get(at).cloned()
            });
            same.unwrap_or_else(|| Arc::new(ProviderLimits::new(settings.provider_limits)))
        });
        let replicas = config.upstreams.iter().map(|settings| {
            let known = previous.and_then(|previous| {
                let at = previous.config.upstreams.iter().position(|known| known.name == settings.name)?;
                previous.replicas.get(at)
            });
            ReplicaStatus::of(settings, known)
        });
        Ok(Self {
            provider_limits: provider_limits.collect(),
            replicas: replicas.collect(),
            contexts: config
                .environments
                .iter()
                .zip(CallerLabels::of(&config))
                .map(|(environment, callers)| {
                    let series = metrics.series_of(environment, callers, config.telemetry.gen_ai_metrics);
                    EnvironmentContext::new(&config, environment, series)
                })
                .collect::<anyhow::Result<_>>()?,
            upstreams: upstreams.collect(),
            accounts,
            upstream_accounts,
            models,
            keys: KeyTable::new(&config),
            flood,
            tracing: None,
            config,
        })
    }

    /// The same snapshot, whose requests have traces.
    pub(super) fn with_tracing(self, tracing: Option<Arc<crate::telemetry::Tracing>>) -> Self {
        Self { tracing, ..self }
    }

    /// Checks the replicas of all upstreams whose settings require that, until the future is dropped.
    pub(crate) async fn check_replicas(&self, tls: &Arc<ClientConfig>) {
        let upstreams = self.config.upstreams.iter().zip(&self.replicas);
        let check = |(settings, replicas): (&Arc<UpstreamSettings>, &Replicas)| {
            check_replicas(settings.clone(), replicas.clone(), tls.clone())
        };
        join_all(upstreams.map(check)).await;
    }

    /// Every environment and its account.
    pub fn environments(&self) -> Vec<(Arc<Environment>, Arc<Account>)> {
        self.config.environments.iter().cloned().zip(self.accounts.iter().cloned()).collect()
    }

    /// An upstream, by its index. `model`: the name that is sent to it.
    pub(super) fn backend<'s>(&'s self, upstream: usize, model: &'s str) -> Backend<'s> {
        Backend { account: self.upstream_accounts[upstream].as_ref(), model }
    }
}

/// Whether the limits of the provider are those of another config's upstream.
fn has_same_limits(before: &UpstreamSettings, after: &UpstreamSettings) -> bool {
    before.name == after.name
        && before.shares_replica_with(after)
        && before.api_key == after.api_key
        && before.provider_limits == after.provider_limits
}

impl EnvironmentContext {
    fn new(config: &Config, environment: &Environment, series: Series) -> anyhow::Result<Self> {
        let routed = environment.routes.iter().flat_map(|route| &route.upstreams);
        Ok(Self {
            series: Arc::new(series),
            destinations: Destinations::new(config, environment),
            has_credentials: routed.chain([&environment.upstream]).all(|upstream| upstream.api_key.is_some()),
            name: environment.name.as_str().into(),
            callers: environment.callers.iter().map(|c| c.name.as_str().into()).collect(),
            principals: (0..=environment.callers.len()).map(|_| OnceLock::new()).collect(),
            header: HeaderValue::from_str(&environment.name)?,
        })
    }
}
