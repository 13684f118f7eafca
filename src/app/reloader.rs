//! Reloads the config while the gateway runs: on request, on SIGHUP, and when a file changes.
//!
//! A config is read, checked and prepared as a whole. If anything is wrong, nothing changes. Otherwise new requests are
//! served by it, and requests in flight end by the old one.

use super::MAX_REDIS_WAIT;
use super::file_watch::FileWatch;
use super::listeners::Listeners;
use crate::clock;
use crate::config::{self, Config, Loaded};
use crate::ledger::{Account, AuditEntry};
use crate::proxy::{PreparedConfig, State, WorkerProxy};
use crate::reload::{ReloadHandle, ReloadOutcome, ReloadRequest};
use crate::server::RunState;
use crate::telemetry::configure_logging;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::time::{interval, sleep, timeout};
use tokio_rustls::rustls::ClientConfig;

/// How often certificates that expire soon are logged.
const EXPIRY_CHECK_INTERVAL: Duration = Duration::from_hours(24);

/// Reloads the config of one gateway.
pub(super) struct Reloader {
    pub(super) state: Arc<State>,
    pub(super) workers: Vec<Arc<WorkerProxy>>,
    pub(super) listeners: Listeners,
    pub(super) tls: Arc<ClientConfig>,
    /// Takes the accounts of new environments to the thread that communicates with Redis.
    pub(super) redis: Option<mpsc::UnboundedSender<Arc<Account>>>,
    pub(super) handle: ReloadHandle,
    /// The files that the last config names, if it was refused. A change of one of them can correct it.
    pub(super) refused_files: Vec<PathBuf>,
}

impl Reloader {
    /// The files of the config in force, as they are now. A config file that was written since it was read counts as
    /// changed.
    pub(super) fn file_watch(&self) -> FileWatch {
        let mut files = FileWatch::of(&self.files());
        let config = &self.state.current().config;
        if let Some(file) = &config.file
            && config::modified_ms(file) != config.file_modified_ms
        {
            files.mark_as_changed(file);
        }
        files
    }

    /// Reloads the config whenever it is requested or a file changes, until the gateway stops.
    pub(super) async fn run(
        mut self,
        mut files: FileWatch,
        mut requests: mpsc::Receiver<ReloadRequest>,
        mut run_state: watch::Receiver<RunState>,
    ) {
        files.follow(&self.files());
        let mut expiry_checks = interval(EXPIRY_CHECK_INTERVAL);
        // The start has checked it.
        expiry_checks.reset();
        loop {
            let request = tokio::select! {
                biased;
                _ = run_state.wait_for(|state| *state == RunState::Stopped) => return,
                request = requests.recv() => match request {
                    Some(request) => Some(request),
                    None => return,
                },
                () = files.changed() => None,
                _ = expiry_checks.tick() => {
                    self.listeners.warn_of_expiry();
                    continue;
                }
            };
            // A change from now on is noticed after this reload.
            files.mark();
            let outcome = self.reload(&mut files).await;
            let by = request.as_ref().map_or(Some("file"), |request| request.by);
            by.into_iter().for_each(|by| self.record(by, &outcome));
            files.follow(&self.files());
            // An error means that the caller does not wait any longer.
            request.into_iter().for_each(|request| drop(request.outcome.send(outcome.clone())));
        }
    }

    /// The config file, and the files that it and a refused config name.
    fn files(&self) -> Vec<PathBuf> {
        let config = &self.state.current().config;
        let Some(file) = &config.file else { return Vec::new() };
        std::iter::once(file).chain(&config.named_files).chain(&self.refused_files).cloned().collect()
    }

    async fn reload(&mut self, files: &mut FileWatch) -> ReloadOutcome {
        let outcome = match self.try_reload(files).await {
            Ok((changes, warnings)) => ReloadOutcome::Adopted { changes, warnings },
            Err(faults) => ReloadOutcome::Refused { faults },
        };
        match &outcome {
            ReloadOutcome::Adopted { changes, warnings } => {
                warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
                changes.iter().for_each(|change| tracing::info!(change, "the config has changed"));
                tracing::info!(changes = changes.len(), "the config was reloaded");
                self.state.metrics.config_loaded(clock::now());
                self.handle.set_faults(Vec::new());
            }
            ReloadOutcome::Refused { faults } => {
                faults.iter().for_each(|fault| {
                    tracing::error!(fault, "the new config was refused: the old one stays in force");
                });
                self.state.metrics.reload_failed();
                self.handle.set_faults(faults.clone());
            }
        }
        outcome
    }

    /// Records a reload by a changed file or a signal in the audit log. The admin API records its own.
    fn record(&self, by: &str, outcome: &ReloadOutcome) {
        self.state.record_action_lazily(AuditEntry {
            at: clock::now(),
            by: by.to_owned(),
            action: "config_reload".to_owned(),
            target: "config".to_owned(),
            after: Some(outcome.audited().to_string()),
            ..AuditEntry::default()
        });
    }

    /// Returns what changed, and warnings.
    ///
    /// # Errors
    /// All faults of the new config. The old one stays in force.
    async fn try_reload(&mut self, files: &mut FileWatch) -> Result<(Vec<String>, Vec<String>), Vec<String>> {
        let one = |message: String| vec![message];
        let current = self.state.current();
        let file = current.config.file.as_deref();
        let file = file.ok_or_else(|| one("this gateway has no config file to reload".to_owned()))?;
        // Reading a pipe or a device could block for ever.
        if std::fs::metadata(file).is_ok_and(|found| !found.is_file() && !found.is_dir()) {
            return Err(one(format!("{}: this is not a regular file", file.display())));
        }
        let loaded = config::load(file);
        self.refused_files = match &loaded {
            Ok(loaded) => loaded.config.named_files.clone(),
            Err(faults) => faults.named_files.clone(),
        };
        // A change from now on is noticed after this reload.
        files.follow(&self.files());
        let Loaded { mut config, warnings } =
            loaded.map_err(|faults| faults.to_string().lines().map(str::to_owned).collect::<Vec<_>>())?;
        let restart_faults = config::restart_faults(&current.config, &config);
        if !restart_faults.is_empty() {
            return Err(restart_faults);
        }
        config.file_modified_ms = stamp(&current.config, &config);
        let listeners = self.listeners.prepare(&current.config, &config)?;
        let mut changes = config::changes(&current.config, &config);
        changes.extend(listeners.changes.iter().cloned());
        let failed = |error: anyhow::Error| one(format!("{error:#}"));
        let prepared = self.state.prepare(Arc::new(config)).map_err(failed)?;
        let prepare = |worker: &Arc<WorkerProxy>| worker.prepare(prepared.snapshot().clone(), &self.tls);
        let proxies: Vec<_> = self.workers.iter().map(prepare).collect::<Result<_, _>>().map_err(failed)?;
        // From here on nothing can fail.
        for account in prepared.added_accounts() {
            self.redis.iter().for_each(|redis| drop(redis.send(account.clone())));
        }
        wait_until_connected(&prepared).await;
        self.state.reconfigure_accounts(&prepared).await;
        self.state.put_in_force(prepared);
        let warnings: Vec<String> =
            warnings.iter().map(ToString::to_string).chain(listeners.warnings.iter().cloned()).collect();
        self.handle.set_certificate_faults(listeners.certificate_faults.clone());
        self.listeners.put_in_force(listeners, &self.state.metrics);
        configure_logging(&self.state.current().config.telemetry);
        self.workers.iter().zip(proxies).for_each(|(worker, proxy)| worker.replace(proxy));
        self.refused_files.clear();
        Ok((changes, warnings))
    }
}

/// Waits until the accounts of new environments are connected to Redis, at most [`MAX_REDIS_WAIT`]. Without this wait the
/// node would admit their first requests by its own counters.
async fn wait_until_connected(prepared: &PreparedConfig) {
    let is_offline = |account: &Arc<Account>| {
        account.redis_status().is_some_and(|redis| redis.unavailable_reason.is_some())
    };
    let connected = async {
        while prepared.added_accounts().any(is_offline) {
            sleep(Duration::from_millis(5)).await;
        }
    };
    // Redis is unavailable: the account counts on this node until it is available.
    drop(timeout(MAX_REDIS_WAIT, connected).await);
}

/// When the new config was written. Nodes use the limits of the newest config. A file that is older than the one in
/// force, such as a copy that is put back, counts as written now if it changes quotas.
fn stamp(old: &Config, new: &Config) -> u64 {
    let quotas = |config: &Config| -> Vec<_> {
        let environments = config.environments.iter().map(|e| (e.name.clone(), e.quotas.clone()));
        let upstreams = config.upstreams.iter().map(|u| (u.name.clone(), u.quotas.clone()));
        environments.chain(upstreams).collect()
    };
    if new.file_modified_ms > old.file_modified_ms || quotas(old) == quotas(new) {
        return new.file_modified_ms.max(old.file_modified_ms);
    }
    u64::try_from(clock::now().0).unwrap_or(0).max(old.file_modified_ms + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::parse;

    #[test]
    fn an_older_file_counts_as_written_now_if_it_changes_quotas() {
        let config = |limits: [u64; 2], file_modified_ms| {
            let quotas =
                limits.map(|limit| format!("quotas: {{ requests: {{ limit: {limit}, per: minute }} }}"));
            let text = format!(
                "upstreams: {{ u: {{ base_url: 'http://127.0.0.1:1/v1', {} }} }}\nenvironments: {{ e: {{ upstream: u, {} }} }}\n\
                 default_environment: e\nstore: {{ memory: true }}",
                quotas[0], quotas[1]
            );
            let config = parse(&text, "t.yaml", &|_| None, &[]).unwrap().config;
            Config { file_modified_ms, ..config }
        };
        let old = config([5, 5], 2_000);
        assert_eq!(stamp(&old, &config([5, 5], 1_000)), 2_000);
        assert_eq!(stamp(&old, &config([6, 6], 3_000)), 3_000);
        for limits in [[6, 5], [5, 6]] {
            assert!(stamp(&old, &config(limits, 1_000)) > 1_700_000_000_000, "{limits:?}");
        }
    }
}
