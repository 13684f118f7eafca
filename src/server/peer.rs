//! State shared by a caller's socket and the service that answers the caller's requests.

use crate::clock::Stopwatch;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::time::Duration;
use tokio::time::Instant;

/// How long the gateway waits for a caller.
#[derive(Clone, Copy, Debug)]
pub struct CallerTimeouts {
    /// For the head of a request. Also the idle timeout of a connection.
    pub head: Duration,
    /// For the next bytes of a request's body.
    pub body: Duration,
    /// For the caller to read any bytes of its answer.
    pub write: Duration,
    /// How long the rest of a refused request is read and discarded, so that the caller receives the refusal.
    pub linger: Duration,
}

impl Default for CallerTimeouts {
    fn default() -> Self {
        Self {
            head: Duration::from_secs(10),
            body: Duration::from_secs(30),
            write: Duration::from_mins(1),
            linger: Duration::from_secs(1),
        }
    }
}

/// The service's view of a caller's connection.
#[derive(Debug)]
pub(crate) struct Peer {
    /// The caller's address.
    pub(crate) address: SocketAddr,
    pub(crate) timeouts: CallerTimeouts,
    opened: Stopwatch,
    /// The time at which the current answer must be complete, in milliseconds since `opened`. 0: no limit.
    answer_deadline_ms: AtomicU64,
    /// Whether the caller may still be sending a body that is not read.
    lingers: AtomicBool,
    /// One of `BETWEEN_REQUESTS`, `IN_SERVICE`, `ANSWERED`.
    phase: AtomicU8,
}

/// All earlier answers are flushed, and the service has not received the next request.
const BETWEEN_REQUESTS: u8 = 0;
/// The service has a request, or its answer's body is not complete.
const IN_SERVICE: u8 = 1;
/// The service has completed its answer, which may not be flushed yet.
const ANSWERED: u8 = 2;

/// A request that the service has received. Dropping it marks the answer as complete.
#[derive(Debug)]
pub(super) struct ServedRequest(Arc<Peer>);

impl Drop for ServedRequest {
    fn drop(&mut self) {
        self.0.phase.store(ANSWERED, Ordering::Relaxed);
    }
}

impl Peer {
    pub(crate) fn new(address: SocketAddr, timeouts: CallerTimeouts) -> Self {
        Self {
            address,
            timeouts,
            opened: Stopwatch::start(),
            answer_deadline_ms: AtomicU64::new(0),
            lingers: AtomicBool::new(false),
            phase: AtomicU8::new(BETWEEN_REQUESTS),
        }
    }

    /// Records that the service has received a request. Resets the settings of the previous request.
    pub(super) fn begin_request(self: &Arc<Self>) -> ServedRequest {
        self.answer_deadline_ms.store(0, Ordering::Relaxed);
        self.lingers.store(false, Ordering::Relaxed);
        self.phase.store(IN_SERVICE, Ordering::Relaxed);
        ServedRequest(self.clone())
    }

    /// Records that hyper's write buffer is empty. An answer that the service has completed is now written.
    pub(super) fn on_flush(&self) {
        // Only this connection's task changes the phase.
        if self.phase.load(Ordering::Relaxed) == ANSWERED {
            self.phase.store(BETWEEN_REQUESTS, Ordering::Relaxed);
        }
    }

    /// Whether the next bytes that hyper writes are hyper's own answer.
    pub(super) fn is_between_requests(&self) -> bool {
        self.phase.load(Ordering::Relaxed) == BETWEEN_REQUESTS
    }

    /// Cuts off the current answer when `limit` has passed since `started`. This works even if the caller does not
    /// read, in which case hyper does not poll the body.
    pub(crate) fn limit_answer(&self, started: Stopwatch, limit: Duration) {
        let ms = u64::try_from((started.since(self.opened) + limit).as_millis()).unwrap_or(u64::MAX);
        self.answer_deadline_ms.store(ms.max(1), Ordering::Relaxed);
    }

    /// Marks the request as answered before its body was read. When the connection is closed, the body is read and
    /// discarded for a while. Otherwise the caller would receive a reset instead of the answer.
    pub(crate) fn linger(&self) {
        self.lingers.store(true, Ordering::Relaxed);
    }

    pub(super) fn lingers(&self) -> bool {
        self.lingers.load(Ordering::Relaxed)
    }

    /// The time at which a write fails if it has been blocked since `blocked_since`.
    pub(super) fn write_deadline(&self, blocked_since: Stopwatch) -> Instant {
        let idle = blocked_since.deadline(self.timeouts.write);
        match self.answer_deadline_ms.load(Ordering::Relaxed) {
            0 => idle,
            ms => idle.min(self.opened.deadline(Duration::from_millis(ms))),
        }
    }
}
