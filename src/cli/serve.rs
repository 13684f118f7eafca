//! `tollgate serve`: runs the gateway.

mod successor;

use super::{check_certificates, load_or_explain};
use crate::app::{App, CallerTimeouts, ShutdownReport, Workers};
use crate::reload::ReloadOutcome;
use crate::service_manager::{Notification, PassedListeners, notify};
use crate::telemetry::{LogOutput, init_logging};
use anyhow::Context as _;
use std::path::PathBuf;
use std::pin::pin;
use std::process::ExitCode;
use tokio::runtime::{Builder, Runtime};
use tokio::signal::unix::{Signal, SignalKind, signal};

pub(super) use successor::Program;

pub(super) fn run(config: Option<PathBuf>) -> anyhow::Result<ExitCode> {
    // The process has one thread here.
    let passed = PassedListeners::take()?;
    let program = Program::current();
    if let Some(program) = &program
        && Program::is_intermediate()
    {
        return Ok(program.start()?);
    }
    let loaded = match load_or_explain(config) {
        Ok(loaded) => loaded,
        Err(code) => return Ok(code),
    };
    // The start logs the warnings.
    if let Err(code) = check_certificates(&loaded.config) {
        return Ok(code);
    }
    raise_descriptor_limit();
    let signals = StopSignals::listen()?;
    let log = init_logging(&loaded.config.telemetry);
    for warning in &loaded.warnings {
        tracing::warn!("{warning}");
    }
    let mut app = App::start_or_take_over(loaded.config, passed, workers(), CallerTimeouts::default())?;
    app.start_watchdog()?;
    app.announce();
    notify(&Notification::Ready { status: &serving(&app) });
    run_until_signal(app, signals, &log, program.as_ref())
}

/// Raises the soft limit of open files to the hard limit: each connection needs one. Many systems set it to 1,024.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    // If it fails, the old limit stays.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
}

/// How requests are distributed over the cores. `TOLLGATE_RUNTIME=multi` is for benchmarks that compare both modes.
fn workers() -> Workers {
    match std::env::var("TOLLGATE_RUNTIME").as_deref() {
        Ok("multi") => Workers::WorkStealing,
        _ => Workers::PerCore,
    }
}

/// The state of the gateway in a line, for the service manager.
fn serving(app: &App) -> String {
    format!("serving callers at {} and administrators at {}", app.address(), app.admin_address())
}

/// The signals that stop the gateway, SIGTERM and SIGINT; SIGHUP, which reloads the config; and SIGUSR2, which starts a
/// new process that replaces this one.
pub(super) struct StopSignals {
    runtime: Runtime,
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
    replace: Signal,
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
        let replace = signal(SignalKind::user_defined2()).context("cannot listen for signals")?;
        drop(guard);
        Ok(Self { runtime, terminate, interrupt, hangup, replace })
    }
}

/// Runs until SIGTERM or SIGINT, then shuts down in order, or until another process has replaced this one. A second signal
/// ends the process at once. SIGHUP reloads the config. SIGUSR2 starts `program`, if there is one, to replace this process.
pub(super) fn run_until_signal(
    app: App,
    signals: StopSignals,
    log: &LogOutput,
    program: Option<&Program>,
) -> anyhow::Result<ExitCode> {
    let StopSignals { runtime, mut terminate, mut interrupt, mut hangup, mut replace } = signals;
    let status = serving(&app);
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
                Some(()) = hangup.recv() => {
                    notify(&Notification::Reloading);
                    let status = reloaded(&status, reload.reload_on_signal().await);
                    notify(&Notification::Ready { status: &status });
                }
                Some(()) = replace.recv() => {
                    if let Some(program) = program {
                        program.start_successor();
                    } else {
                        tracing::warn!("SIGUSR2 has no effect: this process cannot be replaced");
                    }
                }
            }
        };
        let end = if let Some(pid) = successor {
            tracing::info!(pid, "another process has replaced this one: open connections may end within server.drain_timeout");
            tokio::task::spawn_blocking(move || app.finish_handover())
        } else {
            notify(&Notification::Stopping { within: app.max_shutdown_time() });
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

/// The state of the gateway after a reload.
fn reloaded(status: &str, outcome: Option<ReloadOutcome>) -> String {
    match outcome {
        Some(ReloadOutcome::Refused { faults }) => format!(
            "{status}; the new config was refused: {}",
            faults.first().map_or("it has a fault", String::as_str)
        ),
        Some(ReloadOutcome::Adopted { .. }) | None => status.to_owned(),
    }
}
