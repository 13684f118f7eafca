//! State shared by a caller's socket and the service that answers the caller's requests.

use super::head_lines::HeadLines;
use crate::clock::Stopwatch;
use futures_util::task::AtomicWaker;
use http::{HeaderMap, Version};
use std::future::poll_fn;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::Poll;
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

/// While the server drains, the rest of a refused request is read for at most this long.
const DRAIN_LINGER: Duration = Duration::from_millis(200);

/// The service's view of a caller's connection.
#[derive(Debug)]
pub(crate) struct Peer {
    /// The caller's address.
    pub(crate) address: SocketAddr,
    pub(crate) timeouts: CallerTimeouts,
    pub(super) opened: Stopwatch,
    /// The time at which the current answer must be complete, in milliseconds since `opened`. 0: no limit.
    answer_deadline_ms: AtomicU64,
    /// Whether the caller may still be sending a body that is not read.
    lingers: AtomicBool,
    /// One of `BETWEEN_REQUESTS`, `RECEIVING`, `IN_SERVICE`, `ANSWERED`.
    phase: AtomicU8,
    /// The requests that have begun.
    requests: AtomicU64,
    /// Whether the server drains.
    is_draining: AtomicBool,
    /// Whether the request must end here, because the server stops.
    is_cut_off: AtomicBool,
    /// The task that waits in `cut_off`.
    cut_off_waker: AtomicWaker,
    /// Whether an answer of unknown length ends with the connection (HTTP/1.0).
    ends_answers_by_close: AtomicBool,
    /// Whether the current answer ended before it was complete.
    is_answer_cut: AtomicBool,
    /// Whether the server closes each connection after its next answer.
    closes: Arc<AtomicBool>,
    /// Whether a request is refused that names no host.
    pub(super) requires_host: bool,
    /// The reason why a head was refused before hyper received it. It is the last one of its connection.
    refused_head: OnceLock<&'static str>,
    /// Header lines that go past hyper. `None`: HTTP/2 has none.
    pub(super) head_lines: Option<HeadLines>,
}

/// All earlier answers are flushed, and the service has not received the next request.
const BETWEEN_REQUESTS: u8 = 0;
/// The service has the head of a request, and not all of its body.
const RECEIVING: u8 = 1;
/// The service has a request, or its answer's body is not complete.
const IN_SERVICE: u8 = 2;
/// The service has completed its answer, which may not be flushed yet.
const ANSWERED: u8 = 3;

/// A request that the service has received. Dropping it marks the answer as complete.
#[derive(Debug)]
pub(super) struct ServedRequest(Arc<Peer>);

impl ServedRequest {
    /// Whether the connection closes after this answer.
    pub(super) fn closes_connection(&self) -> bool {
        self.0.closes.load(Ordering::Relaxed)
    }

    /// Records that the answer ends before it is complete.
    pub(super) fn cut_answer(&self) {
        self.0.cut_answer();
    }
}

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
            requests: AtomicU64::new(0),
            is_draining: AtomicBool::new(false),
            is_cut_off: AtomicBool::new(false),
            cut_off_waker: AtomicWaker::new(),
            ends_answers_by_close: AtomicBool::new(false),
            is_answer_cut: AtomicBool::new(false),
            closes: Arc::default(),
            requires_host: true,
            refused_head: OnceLock::new(),
            head_lines: None,
        }
    }

    /// The connection has HTTP/1.1, whose answers can have lines that go past hyper.
    #[must_use]
    pub(super) fn with_head_lines(self) -> Self {
        Self { head_lines: Some(HeadLines::default()), ..self }
    }

    /// Whether `add_head_lines` can be called.
    pub(crate) fn takes_head_lines(&self) -> bool {
        self.head_lines.is_some()
    }

    /// Adds header lines, each behind the end of the line before it, to the head of the next answer, whose headers these
    /// are. The answer must be sent.
    pub(crate) fn add_head_lines(&self, lines: Vec<u8>, headers: &mut HeaderMap) {
        if let Some(head_lines) = &self.head_lines {
            head_lines.add(lines, headers);
        }
    }

    /// The connection closes after its next answer once `closes` is set.
    #[must_use]
    pub(super) fn closed_by(self, closes: Arc<AtomicBool>) -> Self {
        Self { closes, ..self }
    }

    /// Sets when the connection was accepted.
    #[must_use]
    pub(super) fn opened_at(self, opened: Stopwatch) -> Self {
        Self { opened, ..self }
    }

    /// Whether a request is refused that names no host.
    #[must_use]
    pub(super) fn requiring_host(self, requires_host: bool) -> Self {
        Self { requires_host, ..self }
    }

    /// Records that the service has received the head of a request. Resets the settings of the previous request.
    pub(super) fn begin_request(self: &Arc<Self>, version: Version) -> ServedRequest {
        self.answer_deadline_ms.store(0, Ordering::Relaxed);
        self.lingers.store(false, Ordering::Relaxed);
        self.ends_answers_by_close.store(version < Version::HTTP_11, Ordering::Relaxed);
        self.phase.store(RECEIVING, Ordering::Relaxed);
        self.requests.fetch_add(1, Ordering::Relaxed);
        ServedRequest(self.clone())
    }

    /// How many requests have begun.
    pub(super) fn requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }

    /// Records that a head is refused before hyper receives it.
    pub(super) fn refuse_head(&self, reason: &'static str) {
        // Only the first reason counts.
        self.refused_head.get_or_init(|| reason);
    }

    /// The reason why a head was refused, if one was.
    pub(super) fn refused_head(&self) -> Option<&'static str> {
        self.refused_head.get().copied()
    }

    /// Records that the body of the request has arrived.
    pub(crate) fn on_body_received(&self) {
        self.phase.store(IN_SERVICE, Ordering::Relaxed);
    }

    /// Records that hyper's write buffer is empty. An answer that the service has completed is now written.
    pub(super) fn on_flush(&self) {
        // Only this connection's task changes the phase.
        if self.phase.load(Ordering::Relaxed) == ANSWERED {
            self.phase.store(BETWEEN_REQUESTS, Ordering::Relaxed);
        }
    }

    /// Whether the service has no request, and every answer is written. The next bytes that hyper writes are hyper's
    /// own answer.
    pub(super) fn is_between_requests(&self) -> bool {
        self.phase.load(Ordering::Relaxed) == BETWEEN_REQUESTS
    }

    /// Whether the body of the current request is still arriving.
    pub(super) fn is_receiving(&self) -> bool {
        self.phase.load(Ordering::Relaxed) == RECEIVING
    }

    /// Records that the server drains.
    pub(super) fn begin_drain(&self) {
        self.is_draining.store(true, Ordering::Relaxed);
    }

    /// Makes the current request end: without an answer it is refused, and an answer is interrupted. The connection
    /// must be polled after this.
    pub(super) fn end_request(&self) {
        self.is_cut_off.store(true, Ordering::Release);
        self.cut_off_waker.wake();
    }

    /// Whether the current request must end, because the server stops.
    pub(crate) fn is_cut_off(&self) -> bool {
        self.is_cut_off.load(Ordering::Acquire)
    }

    /// Completes when the current request must end. Only one task at a time may wait for it.
    pub(crate) fn cut_off(&self) -> impl Future<Output = ()> + Send + '_ {
        poll_fn(|cx| {
            self.cut_off_waker.register(cx.waker());
            if self.is_cut_off() { Poll::Ready(()) } else { Poll::Pending }
        })
    }

    /// Whether an answer of unknown length ends with the connection, so that its caller takes a closed connection for
    /// the end of a complete answer.
    pub(crate) fn ends_answers_by_close(&self) -> bool {
        self.ends_answers_by_close.load(Ordering::Relaxed)
    }

    /// Records that the current answer ends before it is complete.
    pub(super) fn cut_answer(&self) {
        self.is_answer_cut.store(true, Ordering::Relaxed);
    }

    /// Whether the connection must be reset, because its caller would take a cut answer for a complete one.
    pub(super) fn must_reset(&self) -> bool {
        self.is_answer_cut.load(Ordering::Relaxed) && self.ends_answers_by_close()
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

    /// How long the rest of a refused request is read. `None`: nothing is left to read.
    pub(super) fn linger_time(&self) -> Option<Duration> {
        let limit = if self.is_draining.load(Ordering::Relaxed) { DRAIN_LINGER } else { Duration::MAX };
        self.lingers.load(Ordering::Relaxed).then(|| self.timeouts.linger.min(limit))
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
