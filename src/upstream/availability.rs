//! Whether a server that has failed is left out.
//!
//! After a number of failures in a row a server is left out for 5 s. Then one request tries it, the probe. If the probe
//! fails, the time doubles, up to 60 s; a success ends it. The time is an argument: milliseconds of a clock that never
//! goes back. All workers share one [`Availability`].

use std::num::NonZeroU32;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// How long a server is left out at first.
pub(crate) const FIRST_PAUSE_MS: u64 = 5_000;
/// The longest time for which a server is left out.
pub(crate) const MAX_PAUSE_MS: u64 = 60_000;

/// The failures of one server.
#[derive(Debug)]
pub(crate) struct Availability {
    /// Failures in a row after which the server is left out.
    threshold: NonZeroU32,
    /// Whether `state` differs from the initial one. While it does not, no request takes the lock.
    has_failed: AtomicBool,
    state: Mutex<State>,
    failures: AtomicU64,
}

#[derive(Debug, Default)]
struct State {
    failures_in_a_row: u32,
    left_out: Option<LeftOut>,
    /// The number of the last probe.
    last_probe: u64,
}

#[derive(Clone, Copy, Debug)]
struct LeftOut {
    pause_ms: u64,
    /// The time from which on a probe may try the server.
    due_ms: u64,
    /// The probe in flight.
    probe: Option<u64>,
}

/// What may be sent to a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    /// Every request.
    Available,
    /// One request, as a probe.
    ProbeIsDue,
    /// No request. A probe is due at this time, or is in flight.
    LeftOut { due_ms: u64 },
}

/// An attempt at a server, which reports the outcome. An attempt that is dropped without one changes nothing: if it was
/// the probe, the next request may be the probe.
#[derive(Debug)]
#[must_use]
pub(crate) struct Attempt {
    availability: Arc<Availability>,
    probe: Option<u64>,
}

impl Availability {
    /// A server that is available until it has failed `threshold` times in a row.
    pub(crate) fn new(threshold: NonZeroU32) -> Arc<Self> {
        Arc::new(Self {
            threshold,
            has_failed: AtomicBool::new(false),
            state: Mutex::default(),
            failures: AtomicU64::new(0),
        })
    }

    /// What may be sent to the server. It changes nothing.
    pub(crate) fn standing(&self, now_ms: u64) -> Standing {
        if !self.has_failed.load(Ordering::Acquire) {
            return Standing::Available;
        }
        self.lock().standing(now_ms)
    }

    /// Begins an attempt if one may be made: any attempt at an available server, or the probe that is due.
    ///
    /// # Errors
    /// The server is left out. The time at which a probe is due; a time in the past: a probe is in flight.
    pub(crate) fn attempt(self: &Arc<Self>, now_ms: u64) -> Result<Attempt, u64> {
        let probe = if self.has_failed.load(Ordering::Acquire) { self.lock().pass(now_ms)? } else { None };
        Ok(Attempt { availability: self.clone(), probe })
    }

    /// Begins an attempt at a server that is left out, for a request that has no other server. Its success ends the time
    /// for which the server is left out; its failure does not extend it.
    pub(crate) fn attempt_anyway(self: &Arc<Self>) -> Attempt {
        Attempt { availability: self.clone(), probe: None }
    }

    /// Failures since the start.
    pub(crate) fn failures(&self) -> u64 {
        self.failures.load(Ordering::Relaxed)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn standing(&self, now_ms: u64) -> Standing {
        match self.left_out {
            None => Standing::Available,
            Some(LeftOut { due_ms, probe: None, .. }) if now_ms >= due_ms => Standing::ProbeIsDue,
            Some(LeftOut { due_ms, .. }) => Standing::LeftOut { due_ms },
        }
    }

    /// The number of the probe, if the attempt is one.
    fn pass(&mut self, now_ms: u64) -> Result<Option<u64>, u64> {
        match self.standing(now_ms) {
            Standing::Available => Ok(None),
            Standing::LeftOut { due_ms } => Err(due_ms),
            Standing::ProbeIsDue => {
                self.last_probe += 1;
                if let Some(left_out) = &mut self.left_out {
                    left_out.probe = Some(self.last_probe);
                }
                Ok(Some(self.last_probe))
            }
        }
    }

    /// Returns the time for which the server is left out, if this failure has decided that.
    fn failed(&mut self, now_ms: u64, threshold: NonZeroU32, probe: Option<u64>) -> Option<u64> {
        self.failures_in_a_row = self.failures_in_a_row.saturating_add(1);
        let pause_ms = match &self.left_out {
            None if self.failures_in_a_row >= threshold.get() => FIRST_PAUSE_MS,
            Some(left_out) if probe.is_some() && left_out.probe == probe => {
                left_out.pause_ms.saturating_mul(2).min(MAX_PAUSE_MS)
            }
            // Requests that were sent before the server was left out do not extend the time.
            _ => return None,
        };
        let due_ms = now_ms.saturating_add(pause_ms);
        self.left_out = Some(LeftOut { pause_ms, due_ms, probe: None });
        Some(pause_ms)
    }
}

impl Attempt {
    /// The server has worked. Returns whether it was left out until now.
    pub(crate) fn succeeded(self) -> bool {
        let availability = &self.availability;
        if !availability.has_failed.load(Ordering::Acquire) {
            return false;
        }
        let mut state = availability.lock();
        let was_left_out = state.left_out.take().is_some();
        state.failures_in_a_row = 0;
        availability.has_failed.store(false, Ordering::Release);
        was_left_out
    }

    /// The server has failed. Returns for how many milliseconds it is left out, if this failure has decided that.
    pub(crate) fn failed(self, now_ms: u64) -> Option<u64> {
        let availability = &self.availability;
        availability.failures.fetch_add(1, Ordering::Relaxed);
        let mut state = availability.lock();
        availability.has_failed.store(true, Ordering::Release);
        state.failed(now_ms, availability.threshold, self.probe)
    }

    /// Whether the attempt is the probe of a server that is left out.
    pub(crate) fn is_probe(&self) -> bool {
        self.probe.is_some()
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        // Does nothing if the outcome is known.
        if self.probe.is_some()
            && let Some(left_out) = &mut self.availability.lock().left_out
            && left_out.probe == self.probe
        {
            left_out.probe = None;
        }
    }
}

#[cfg(test)]
mod tests;
