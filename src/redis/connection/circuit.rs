//! The circuit between this node's calls and the server. It is closed while there is a working connection, and lets
//! calls through. It is open while there is none, and calls fail at once.
//!
//! While the server stalls, calls wait: a few are in flight, the others in a queue. Both the queue and the waits are
//! bounded. When one call fails, the circuit opens, and all waiting calls fail.

use super::call_timer::CallTimer;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::sleep;

/// Maximum calls in flight on one connection. Redis reads everything that a connection has sent before it sends the
/// first reply. Without this limit, many nodes together would get no reply in time.
const MAX_CALLS_IN_FLIGHT: usize = 16;
/// Maximum number of calls in the queue. A further request is refused.
const MAX_QUEUED: usize = 5_000;
/// Maximum time in the queue, unless twice the timeout is longer. Calls that are made faster than the server runs them
/// wait here, although the server is available.
const MAX_QUEUE_TIME: Duration = Duration::from_secs(2);

/// Why a call was not made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CallRefusal {
    /// Redis is unavailable, or became so while the call was in the queue.
    CircuitOpen,
    /// Too many calls are in the queue, or the call was in it for too long. Redis is available.
    LineFull,
}

/// Why a call got no reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CallFailure {
    /// Another call or a probe found the server unavailable.
    CircuitOpened,
    /// The server was silent, or replied too slowly.
    NoReply,
}

#[derive(Debug)]
pub(super) struct Circuit {
    pub(super) timer: CallTimer,
    permits: Arc<Semaphore>,
    queued: AtomicUsize,
    /// The number of the working connection; 0 while the circuit is open.
    generation: watch::Sender<u64>,
}

/// Permission for one call on one connection.
#[derive(Debug)]
pub(super) struct CircuitPass {
    _permit: OwnedSemaphorePermit,
    current: watch::Receiver<u64>,
    generation: u64,
}

impl CircuitPass {
    /// Returns when the connection is lost.
    async fn wait_until_lost(&mut self) {
        let generation = self.generation;
        let _ = self.current.wait_for(|&current| current != generation).await;
    }
}

impl Circuit {
    /// An open circuit. `timeout`: a server that is silent for longer is unavailable.
    pub(super) fn new(timeout: Duration) -> Self {
        Self {
            timer: CallTimer::new(timeout),
            permits: Arc::new(Semaphore::new(MAX_CALLS_IN_FLIGHT)),
            queued: AtomicUsize::new(0),
            generation: watch::channel(0).0,
        }
    }

    /// Closes the circuit: there is a working connection with this number.
    pub(super) fn close(&self, generation: u64) {
        self.generation.send_replace(generation);
    }

    /// Opens the circuit: all calls fail now, those in flight and in the queue too.
    pub(super) fn open(&self) {
        self.generation.send_replace(0);
    }

    pub(super) fn watch_generation(&self) -> watch::Receiver<u64> {
        self.generation.subscribe()
    }

    /// Waits in the queue until fewer than the maximum of calls are in flight on the connection with this number.
    ///
    /// # Errors
    /// The circuit is open, or opened while this call was in the queue. `has_limit`: the queue was full, or did not move
    /// in time.
    pub(super) async fn enter(&self, generation: u64, has_limit: bool) -> Result<CircuitPass, CallRefusal> {
        let mut current = self.generation.subscribe();
        if *current.borrow() != generation {
            return Err(CallRefusal::CircuitOpen);
        }
        // Requests in the queue come first: while there are any, no permit is available.
        if let Ok(permit) = self.permits.clone().try_acquire_owned() {
            return Ok(CircuitPass { _permit: permit, current, generation });
        }
        let place = QueuePlace::take(&self.queued);
        if has_limit && place.is_beyond_limit {
            return Err(CallRefusal::LineFull);
        }
        let max_time = if has_limit { MAX_QUEUE_TIME.max(2 * self.timer.timeout()) } else { Duration::MAX };
        let permit = tokio::select! {
            biased;
            _ = current.wait_for(|&current| current != generation) => return Err(CallRefusal::CircuitOpen),
            permit = self.permits.clone().acquire_owned() => permit.map_err(|_| CallRefusal::CircuitOpen)?,
            () = sleep(max_time) => return Err(CallRefusal::LineFull),
        };
        Ok(CircuitPass { _permit: permit, current, generation })
    }

    /// Waits for the reply to one command. `extra` is added to the timeout. If this future is dropped before the reply,
    /// the command keeps its permit until then: the server has received it and will run it. Otherwise callers that
    /// hang up during a stall and return could send any number of commands.
    ///
    /// Returns the pass for another command.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        pass: CircuitPass,
        extra: Duration,
        command: impl Future<Output = T> + Send + 'static,
    ) -> Result<(T, CircuitPass), CallFailure> {
        let mut in_flight = CommandInFlight(Some((Box::pin(command), pass)));
        let Some((command, pass)) = &mut in_flight.0 else { return Err(CallFailure::CircuitOpened) };
        let outcome = tokio::select! {
            biased;
            reply = self.timer.run(extra, command.as_mut()) => reply.ok_or(CallFailure::NoReply),
            () = pass.wait_until_lost() => Err(CallFailure::CircuitOpened),
        };
        let (_, pass) = in_flight.0.take().ok_or(CallFailure::CircuitOpened)?;
        outcome.map(|reply| (reply, pass))
    }
}

/// A command without a reply so far.
struct CommandInFlight<T: Send + 'static>(Option<(BoxedCommand<T>, CircuitPass)>);

type BoxedCommand<T> = Pin<Box<dyn Future<Output = T> + Send>>;

impl<T: Send + 'static> Drop for CommandInFlight<T> {
    fn drop(&mut self) {
        let (Some((command, mut pass)), Ok(runtime)) = (self.0.take(), Handle::try_current()) else { return };
        runtime.spawn(async move {
            tokio::select! {
                _ = command => {}
                () = pass.wait_until_lost() => {}
            }
        });
    }
}

/// The place of one call in the queue. Dropping it leaves the queue.
struct QueuePlace<'a> {
    queued: &'a AtomicUsize,
    is_beyond_limit: bool,
}

impl<'a> QueuePlace<'a> {
    fn take(queued: &'a AtomicUsize) -> Self {
        let before = queued.fetch_add(1, Ordering::Relaxed);
        Self { queued, is_beyond_limit: before >= MAX_QUEUED }
    }
}

impl Drop for QueuePlace<'_> {
    fn drop(&mut self) {
        self.queued.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The pause before the next attempt to connect. It grows while connections are lost soon after they were made.
#[derive(Debug, Default)]
pub(super) struct ReconnectPause {
    next: Duration,
}

/// Pause between a failed attempt to connect and the next one.
pub(super) const RETRY_INTERVAL: Duration = Duration::from_millis(200);
/// A connection that lasted this long is replaced at once.
const MIN_STABLE_TIME: Duration = Duration::from_secs(1);
const MAX_RECONNECT_PAUSE: Duration = Duration::from_millis(1500);

impl ReconnectPause {
    /// The pause after a connection that lasted this long.
    pub(super) fn after(&mut self, lasted: Duration) -> Duration {
        if lasted >= MIN_STABLE_TIME {
            self.next = Duration::ZERO;
        }
        let pause = self.next;
        self.next = (pause * 2).clamp(RETRY_INTERVAL, MAX_RECONNECT_PAUSE);
        pause
    }
}

#[cfg(test)]
mod tests;
