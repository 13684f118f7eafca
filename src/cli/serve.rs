//! `tollgate serve`

use super::load_or_explain;
use crate::app::{App, ShutdownReport, Workers};
use crate::telemetry::{LogOutput, init_logging};
use anyhow::Context as _;
use std::path::PathBuf;
use std::process::ExitCode;
use tokio::signal::unix::{SignalKind, signal};

pub(super) fn run(config: Option<PathBuf>) -> anyhow::Result<ExitCode> {
    let loaded = match load_or_explain(config) {
        Ok(loaded) => loaded,
        Err(code) => return Ok(code),
    };
    let log = init_logging();
    for warning in &loaded.warnings {
        tracing::warn!("{warning}");
    }
    let app = App::start_with(loaded.config, workers())?;
    tracing::info!(address = %app.address(), admin = %app.admin_address(), "serving");
    run_until_told(app, &log)
}

/// `TOLLGATE_RUNTIME=multi` is for comparing the two (see "What it costs" in the README).
fn workers() -> Workers {
    match std::env::var("TOLLGATE_RUNTIME").as_deref() {
        Ok("multi") => Workers::WorkStealing,
        _ => Workers::PerCore,
    }
}

/// Runs until SIGTERM or SIGINT, then stops in order; a second signal stops at once.
pub(super) fn run_until_told(app: App, log: &LogOutput) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate()).context("cannot listen for signals")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for signals")?;
        let mut told = async || {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        };
        told().await;
        tracing::info!("shutting down: what is under way may end, nothing new is accepted");
        let ending = tokio::task::spawn_blocking(move || app.shutdown());
        let ended = tokio::select! {
            report = ending => Some(report?),
            () = told() => None,
        };
        if let Some(ShutdownReport { under_way, cut_off, took }) = ended {
            tracing::info!(under_way, cut_off, took_ms = took.as_millis(), "stopped");
        } else {
            tracing::warn!("stopped at once");
        }
        log.flush();
        if ended.is_none() {
            std::process::exit(i32::from(super::FAILED));
        }
        Ok(ExitCode::SUCCESS)
    })
}
