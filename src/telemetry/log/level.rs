//! The level of the log: that of the config, of `RUST_LOG`, or the one that an administrator has set.

use crate::config::LogLevel;
use serde::Serialize;
use std::sync::{Mutex, MutexGuard, PoisonError};
use tracing::level_filters::LevelFilter;
use tracing_subscriber::Registry;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::reload;
use utoipa::ToSchema;

/// The variable that takes precedence over the config at the start.
const VARIABLE: &str = "RUST_LOG";

static LEVELS: Mutex<Levels> =
    Mutex::new(Levels { config: LogLevel::Info, variable: None, by_admin: None, handle: None });

/// The levels that were set. The last of them that is present is in force.
struct Levels {
    config: LogLevel,
    variable: Option<String>,
    by_admin: Option<LogLevel>,
    /// Puts a filter in force. `None`: the log is not initialised.
    handle: Option<reload::Handle<Targets, Registry>>,
}

/// The level of the log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub(crate) struct LevelView {
    /// `error`, `warn`, `info`, `debug` or `trace`; the text of `RUST_LOG` if that is in force.
    level: String,
    /// What set it: `config`, `RUST_LOG` or `api`.
    source: &'static str,
    /// The level of the config.
    config: &'static str,
}

fn levels() -> MutexGuard<'static, Levels> {
    LEVELS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The filter of a level. `debug` and `trace` apply to the gateway only: lines of libraries could contain parts of messages.
pub(super) fn filter(level: LogLevel) -> Targets {
    let level = match level {
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Trace => LevelFilter::TRACE,
    };
    Targets::new().with_default(level.min(LevelFilter::INFO)).with_target("tollgate", level)
}

/// Begins with the level of the config, or of `RUST_LOG`.
pub(super) fn begin(config: LogLevel, handle: reload::Handle<Targets, Registry>) {
    let variable = std::env::var(VARIABLE).ok().filter(|text| !text.trim().is_empty());
    let is_valid = variable.as_ref().is_none_or(|text| text.parse::<Targets>().is_ok());
    {
        let mut levels = levels();
        levels.config = config;
        levels.variable = variable.filter(|_| is_valid);
        levels.handle = Some(handle);
        levels.apply();
    }
    if !is_valid {
        tracing::warn!(
            "RUST_LOG is not valid and has no effect: write a level, or levels of modules such as info,tollgate=debug"
        );
    }
}

/// Adopts the level of another config. A level that differs replaces the one of an administrator and of `RUST_LOG`.
pub(super) fn configure(config: LogLevel) {
    let mut levels = levels();
    if levels.config != config {
        levels.config = config;
        levels.variable = None;
        levels.by_admin = None;
        levels.apply();
    }
}

/// The level in force.
pub(crate) fn log_level() -> LevelView {
    levels().view()
}

/// Sets the level until the next start, or until a reload changes the level of the config. `None`: that of `RUST_LOG` or of
/// the config. Returns the level before and after.
pub(crate) fn set_log_level(level: Option<LogLevel>) -> (LevelView, LevelView) {
    let mut levels = levels();
    let before = levels.view();
    levels.by_admin = level;
    levels.apply();
    (before, levels.view())
}

impl Levels {
    fn view(&self) -> LevelView {
        let (level, source) = match (&self.by_admin, &self.variable) {
            (Some(level), _) => (level.as_str().to_owned(), "api"),
            (None, Some(text)) => (text.clone(), VARIABLE),
            (None, None) => (self.config.as_str().to_owned(), "config"),
        };
        LevelView { level, source, config: self.config.as_str() }
    }

    fn apply(&self) {
        let Some(handle) = &self.handle else { return };
        let by_variable = || self.variable.as_ref().and_then(|text| text.parse().ok());
        let in_force = match self.by_admin {
            Some(level) => filter(level),
            None => by_variable().unwrap_or_else(|| filter(self.config)),
        };
        // An error means that the subscriber was dropped, and with it the log.
        drop(handle.reload(in_force));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tracing::Level;

    #[test]
    fn debug_and_trace_apply_to_the_gateway_only() {
        for (level, own, others) in [
            (LogLevel::Error, Level::ERROR, Level::ERROR),
            (LogLevel::Info, Level::INFO, Level::INFO),
            (LogLevel::Debug, Level::DEBUG, Level::INFO),
            (LogLevel::Trace, Level::TRACE, Level::INFO),
        ] {
            let filter = filter(level);
            for (target, most) in [("tollgate::proxy", own), ("h2::codec", others)] {
                for candidate in [Level::ERROR, Level::WARN, Level::INFO, Level::DEBUG, Level::TRACE] {
                    assert_eq!(
                        filter.would_enable(target, &candidate),
                        candidate <= most,
                        "{level:?} {target}"
                    );
                }
            }
        }
    }
}
