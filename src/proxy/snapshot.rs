//! One config with everything that is prepared from it. It never changes: a reload makes another one. A request uses one
//! snapshot from its first byte to its last.

use super::flood::FloodLimiter;
use super::headers;
use super::keys::KeyTable;
use crate::calibrations::Calibrations;
use crate::config::{Config, Environment, UpstreamSettings};
use crate::estimate::{Models, Provider};
use crate::ledger::{Account, Backend};
use crate::provider_limits::ProviderLimits;
use crate::telemetry::{CallerLabels, Metrics, Series};
use crate::upstream::{ReplicaStatus, Replicas, check_replicas};
use futures_util::future::join_all;
use http::header::HeaderValue;
use std::sync::atomic::{AtomicBool, Ordering};
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
    /// Whether each upstream has refused `stream_options`, in the order of the config.
    refuses_stream_options: Vec<Arc<AtomicBool>>,
    /// The limits of each upstream's provider, in the order of the config.
    pub(crate) provider_limits: Vec<Arc<ProviderLimits>>,
    /// The replicas of each upstream, in the order of the config.
    pub(crate) replicas: Vec<Replicas>,
}

/// Values of one environment that every request needs, prepared once so that requests share them.
pub(super) struct EnvironmentContext {
    pub(super) series: Arc<Series>,
    /// Index of the upstream in the config.
    pub(super) upstream: usize,
    /// Index of the upstream's corrections of prompt estimates.
    pub(super) calibrations: usize,
    /// The service behind the upstream.
    pub(super) provider: Provider,
    pub(super) name: Arc<str>,
    /// The callers' names, in the order of the config.
    pub(super) callers: Vec<Arc<str>>,
    /// Each caller as a principal of estimates, in the same order; computed with its first request.
    pub(super) principals: Vec<OnceLock<u64>>,
    /// The value of `x-tollgate-environment`.
    pub(super) header: HeaderValue,
    pub(super) credential: Option<headers::Credential>,
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
        let refuses_stream_options = config.upstreams.iter().map(|settings| {
            let same = previous.and_then(|previous| {
                let is_same = |known: &Arc<UpstreamSettings>| known.is_same_backend(settings);
                let at = previous.config.upstreams.iter().position(is_same)?;
                previous.refuses_stream_options.get(at).cloned()
            });
            same.unwrap_or_default()
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
                    EnvironmentContext::new(&config, environment, series, calibrations)
                })
                .collect::<anyhow::Result<_>>()?,
            refuses_stream_options: refuses_stream_options.collect(),
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

    /// The upstream of an environment, by its index. `model`: the name that is sent to it.
    pub(super) fn backend<'s>(&'s self, environment: usize, model: &'s str) -> Backend<'s> {
        let upstream = self.contexts[environment].upstream;
        Backend { account: self.upstream_accounts[upstream].as_ref(), model }
    }

    /// Whether the gateway requests usage in streams of this upstream. It does not if `stream_usage` is `never`, or
    /// if the upstream has refused `stream_options`.
    pub(super) fn requests_stream_usage(&self, upstream: usize) -> bool {
        self.config.upstreams[upstream].requests_stream_usage
            && !self.refuses_stream_options[upstream].load(Ordering::Relaxed)
    }

    /// Records that an upstream refuses `stream_options`. The gateway adds them no more while this process runs, or
    /// until the upstream's settings change.
    pub(super) fn stop_requesting_stream_usage(&self, upstream: usize) {
        if !self.refuses_stream_options[upstream].swap(true, Ordering::Relaxed) {
            tracing::warn!(
                upstream = self.config.upstreams[upstream].name,
                "the upstream refuses stream_options: the gateway no longer requests usage in its streams and counts \
                 the delivered text instead; set upstreams.*.stream_usage to never to avoid the refused first attempt"
            );
        }
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
    fn new(
        config: &Config,
        environment: &Environment,
        series: Series,
        calibrations: &Calibrations,
    ) -> anyhow::Result<Self> {
        let upstream = config.upstreams.iter().position(|u| Arc::ptr_eq(u, &environment.upstream));
        Ok(Self {
            series: Arc::new(series),
            upstream: upstream.unwrap_or(0),
            calibrations: calibrations.index_of(&environment.upstream.name),
            provider: Provider::of_upstream(&environment.upstream),
            name: environment.name.as_str().into(),
            callers: environment.callers.iter().map(|c| c.name.as_str().into()).collect(),
            principals: environment.callers.iter().map(|_| OnceLock::new()).collect(),
            header: HeaderValue::from_str(&environment.name)?,
            credential: headers::credential(&environment.upstream),
        })
    }
}
