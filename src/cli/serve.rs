//! `tollgate serve`: runs the gateway.

use super::load_or_explain;
use crate::app::{App, CallerTimeouts, ShutdownReport, Workers};
use crate::telemetry::{LogOutput, init_logging};
use anyhow::Context as _;
use std::path::PathBuf;
use std::pin::pin;
use std::process::ExitCode;
use tokio::runtime::{Builder, Runtime};
use tokio::signal::unix::{Signal, SignalKind, signal};

pub(super) fn run(config: Option<PathBuf>) -> anyhow::Result<ExitCode> {
    let loaded = match load_or_explain(config) {
        Ok(loaded) => loaded,
        Err(code) => return Ok(code),
    };
    let signals = StopSignals::listen()?;
    let log = init_logging();
    for warning in &loaded.warnings {
        tracing::warn!("{warning}");
    }
    let app = App::start_or_take_over(loaded.config, workers(), CallerTimeouts::default())?;
    tracing::info!(address = %app.address(), admin = %app.admin_address(), "serving");
    run_until_signal(app, signals, &log)
}

/// How requests are distributed over the cores. `TOLLGATE_RUNTIME=multi` is for benchmarks that compare both modes.
fn workers() -> Workers {
    match std::env::var("TOLLGATE_RUNTIME").as_deref() {
        Ok("multi") => Workers::WorkStealing,
        _ => Workers::PerCore,
    }
}

/// The signals that stop the gateway, SIGTERM and SIGINT, and SIGHUP, which reloads the config.
pub(super) struct StopSignals {
    runtime: Runtime,
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl StopSignals {
    /// Listens for the signals. After this they no longer end the process. Call this before the gateway starts, so
    /// that a signal always drains a gateway that serves requests.
    pub(super) fn listen() -> anyhow::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let guard = runtime.enter();
        let terminate = signal(SignalKind::terminate()).context("cannot listen for signals")?;
        let interrupt = signal(SignalKind::interrupt()).context("cannot listen for signals")?;
        let hangup = signal(SignalKind::hangup()).context("cannot listen for signals")?;
        drop(guard);
        Ok(Self { runtime, terminate, interrupt, hangup })
    }
}

/// Runs until SIGTERM or SIGINT, then shuts down in order, or until another process has replaced this one. A second signal
/// ends the process at once. SIGHUP reloads the config.
pub(super) fn run_until_signal(app: App, signals: StopSignals, log: &LogOutput) -> anyhow::Result<ExitCode> {
    let StopSignals { runtime, mut terminate, mut interrupt, mut hangup } = signals;
    let (reload, replaced) = (app.reload_handle(), app.replaced());
    runtime.block_on(async {
        let mut stop_signal = async || {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        };
        let mut replaced = pin!(replaced);
        let successor = loop {
            tokio::select! {
                () = stop_signal() => break None,
                pid = &mut replaced => break Some(pid),
                // The outcome is logged.
                Some(()) = hangup.recv() => drop(reload.reload().await),
            }
        };
        let end = if let Some(pid) = successor {
            tracing::info!(pid, "another process has replaced this one: open connections may end within server.drain_timeout");
            tokio::task::spawn_blocking(move || app.finish_handover())
        } else {
            tracing::info!("shutting down: no new request is accepted, and requests in flight may end within server.drain_timeout");
            tokio::task::spawn_blocking(move || app.shutdown())
        };
        let at_once = async {
            if successor.is_some() {
                // The process ends anyway. The first signal does not shorten that.
                stop_signal().await;
            }
            stop_signal().await;
        };
        let report = tokio::select! {
            report = end => Some(report?),
            () = at_once => None,
        };
        if let Some(ShutdownReport { in_flight, cut_off, took }) = report {
            tracing::info!(in_flight, cut_off, took_ms = took.as_millis(), "stopped");
        } else {
            tracing::warn!("stopped at once by a second signal: requests in flight were cut off");
        }
        log.flush();
        if report.is_none() {
            std::process::exit(i32::from(super::FAILED));
        }
        Ok(ExitCode::SUCCESS)
    })
}
