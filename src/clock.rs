//! Time. This is the only file that reads a clock.

use serde::{Deserialize, Serialize};
use std::sync::LazyLock;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// A time of the wall clock, in milliseconds since the Unix epoch.
///
/// The quota arithmetic takes it as an argument, so that tests and replays can set any time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Timestamp(pub i64);

impl Timestamp {
    /// Adds milliseconds; saturates at `i64::MAX`.
    #[must_use]
    pub fn plus_ms(self, ms: u64) -> Self {
        Self(self.0.saturating_add(i64::try_from(ms).unwrap_or(i64::MAX)))
    }

    /// The moment in RFC 3339: `2026-11-28T10:00:00.25Z`.
    pub fn to_rfc3339(self) -> String {
        let moment = jiff::Timestamp::from_millisecond(self.0);
        moment.map_or_else(|_| self.0.to_string(), |moment| moment.to_string())
    }

    /// Milliseconds from `earlier` to this time; 0 if `earlier` is later.
    pub fn ms_since(self, earlier: Self) -> u64 {
        u64::try_from(self.0.saturating_sub(earlier.0)).unwrap_or(0)
    }
}

/// Reads the wall clock, for quotas and log lines.
#[allow(clippy::disallowed_methods)]
pub fn now() -> Timestamp {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp(i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
}

/// Reads the wall clock, for traces.
#[allow(clippy::disallowed_methods)]
pub(crate) fn system_time() -> SystemTime {
    SystemTime::now()
}

/// Reads the monotonic clock in microseconds, as a service manager expects it.
#[cfg(unix)]
pub(crate) fn monotonic_us() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let us = now.tv_sec.saturating_mul(1_000_000).saturating_add(now.tv_nsec / 1_000);
    u64::try_from(us).unwrap_or(0)
}

/// Milliseconds of the monotonic clock since this process has first called this function.
pub(crate) fn uptime_ms() -> u64 {
    Stopwatch::start().uptime_ms()
}

/// A time of the monotonic clock. It measures durations, which a step of the wall clock must not change.
#[derive(Clone, Copy, Debug)]
pub struct Stopwatch(Instant);

impl Stopwatch {
    /// Starts measuring.
    #[allow(clippy::disallowed_methods)]
    pub fn start() -> Self {
        Self(Instant::now())
    }

    /// Time since the start.
    #[allow(clippy::disallowed_methods)]
    pub fn elapsed(&self) -> Duration {
        Instant::now().saturating_duration_since(self.0)
    }

    /// Time from the start of an earlier stopwatch to the start of this one.
    pub fn since(&self, earlier: Self) -> Duration {
        self.0.saturating_duration_since(earlier.0)
    }

    /// The start in the milliseconds of [`uptime_ms`].
    pub(crate) fn uptime_ms(self) -> u64 {
        static ZERO: LazyLock<Stopwatch> = LazyLock::new(Stopwatch::start);
        u64::try_from(self.since(*ZERO).as_millis()).unwrap_or(u64::MAX)
    }

    /// Milliseconds since the start.
    pub fn elapsed_ms(&self) -> u64 {
        u64::try_from(self.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// The start plus `after`, for timers. `after` is capped at a year.
    pub fn deadline(&self, after: Duration) -> tokio::time::Instant {
        let far = Duration::from_hours(8760);
        tokio::time::Instant::from_std(self.0 + after.min(far))
    }
}
