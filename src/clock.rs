//! The only place that asks what time it is.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// A moment of the wall clock: milliseconds since the Unix epoch.
///
/// The quota arithmetic takes it as an argument, so that tests and replays step time by hand.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Timestamp(pub i64);

impl Timestamp {
    /// The moment `ms` milliseconds later; saturates at the end of time.
    #[must_use]
    pub fn plus_ms(self, ms: u64) -> Self {
        Self(self.0.saturating_add(i64::try_from(ms).unwrap_or(i64::MAX)))
    }

    /// Milliseconds since `earlier`, 0 if that is not earlier.
    pub fn ms_since(self, earlier: Self) -> u64 {
        u64::try_from(self.0.saturating_sub(earlier.0)).unwrap_or(0)
    }
}

/// The wall clock, for quotas and log lines.
#[allow(clippy::disallowed_methods)]
pub fn now() -> Timestamp {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp(i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
}

/// A point of the monotonic clock, for durations that a step of the wall clock must not bend.
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

    /// Time from the start of an earlier one to the start of this.
    pub fn since(&self, earlier: Self) -> Duration {
        self.0.saturating_duration_since(earlier.0)
    }

    /// The monotonic moment at which `after` will have passed since the start.
    pub fn deadline(&self, after: Duration) -> tokio::time::Instant {
        let far = Duration::from_hours(8760);
        tokio::time::Instant::from_std(self.0 + after.min(far))
    }
}
