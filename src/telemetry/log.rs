//! The log: one line for each request, and lines about the gateway itself, on standard error, as JSON or as text for people.
//!
//! Form, level and requests follow the config, also after a reload. The admin API can change the level at run time.

mod event;
mod level;
mod line;
mod output;
mod request;
mod time;

use crate::config::{LogForm, RequestLines, TelemetrySettings};
use std::io::IsTerminal as _;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, Ordering};
use tracing::Level;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::reload;
use tracing_subscriber::util::SubscriberInitExt as _;

pub(crate) use level::{LevelView, log_level, set_log_level};
pub(crate) use line::Line;
pub(crate) use output::LogOutput;
pub(super) use request::request;

/// The log of this process, once it is initialised.
static LOG: OnceLock<Log> = OnceLock::new();

/// Where lines go, and in which form.
struct Log {
    output: LogOutput,
    /// A [`LogForm`].
    form: AtomicU8,
    /// A [`RequestLines`].
    requests: AtomicU8,
}

impl Log {
    fn get() -> Option<&'static Self> {
        LOG.get()
    }

    fn configure(&self, settings: &TelemetrySettings) {
        let by_default = || if std::io::stderr().is_terminal() { LogForm::Human } else { LogForm::Json };
        self.form.store(settings.log.unwrap_or_else(by_default) as u8, Ordering::Relaxed);
        self.requests.store(settings.requests as u8, Ordering::Relaxed);
    }

    fn form(&self) -> LogForm {
        if self.form.load(Ordering::Relaxed) == LogForm::Human as u8 { LogForm::Human } else { LogForm::Json }
    }

    fn requests(&self) -> RequestLines {
        match self.requests.load(Ordering::Relaxed) {
            n if n == RequestLines::None as u8 => RequestLines::None,
            n if n == RequestLines::Errors as u8 => RequestLines::Errors,
            _ => RequestLines::All,
        }
    }
}

/// Initialises the log of the process. It has no effect if the log was initialised before.
pub(crate) fn init_logging(settings: &TelemetrySettings) -> LogOutput {
    let log = Log { output: LogOutput::start(), form: AtomicU8::new(0), requests: AtomicU8::new(0) };
    log.configure(settings);
    let output = log.output.clone();
    let (filter, handle) = reload::Layer::new(level::filter(settings.level));
    // The first initialisation decides where lines go.
    if tracing_subscriber::registry().with(filter).with(event::EventLines).try_init().is_ok() {
        drop(LOG.set(log));
        level::begin(settings.level, handle);
    }
    output
}

/// Adopts the settings of another config.
pub(crate) fn configure_logging(settings: &TelemetrySettings) {
    if let Some(log) = Log::get() {
        log.configure(settings);
    }
    level::configure(settings.level);
}

/// Writes a line with fields that `tracing` cannot carry: `add` adds them to a JSON object, and `text` is what people read
/// instead. The level is `info`.
pub(crate) fn write_event(
    target: &'static str,
    message: &'static str,
    add: impl FnOnce(&mut Line<'_>),
    text: impl FnOnce() -> String,
) {
    let Some(log) = Log::get() else { return };
    match log.form() {
        LogForm::Json => log.output.add(|buffer, timestamp| {
            let mut line = Line::begin(buffer, LogForm::Json, timestamp, Level::INFO, target, message);
            add(&mut line);
            line.end();
        }),
        LogForm::Human => {
            let text = text();
            log.output.add(|buffer, _| buffer.extend_from_slice(text.as_bytes()));
        }
    }
}
