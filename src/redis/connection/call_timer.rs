//! Deadlines for calls. A busy gateway must not mistake its own delay for a server that does not answer.

use crate::clock::Stopwatch;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{sleep, timeout};

/// Time that the runtime gets to read replies before a call fails.
const RECHECK_DELAY: Duration = Duration::from_millis(10);
/// A call fails after this time even if the server replies to other calls. A call with a long deadline fails after
/// twice its deadline.
const MAX_CALL_TIME: Duration = Duration::from_millis(200);

/// Times the calls of one connection.
#[derive(Debug)]
pub(super) struct CallTimer {
    /// Counts the replies to all calls.
    replies: AtomicU64,
    /// Requests to the runtime that reads the replies.
    rechecks: mpsc::UnboundedSender<oneshot::Sender<()>>,
    /// The receiver of `rechecks`, until `serve_rechecks` takes it.
    pending_rechecks: Mutex<Option<mpsc::UnboundedReceiver<oneshot::Sender<()>>>>,
}

impl CallTimer {
    pub(super) fn new() -> Self {
        let (rechecks, pending) = mpsc::unbounded_channel();
        Self { replies: AtomicU64::new(0), rechecks, pending_rechecks: Mutex::new(Some(pending)) }
    }

    /// Waits for the reply to `call`. Continues to wait past the deadline, up to [`MAX_CALL_TIME`], while the server
    /// replies to other calls. `None`: the server does not reply, or replies too slowly.
    pub(super) async fn run<T>(&self, deadline: Duration, call: impl Future<Output = T>) -> Option<T> {
        let replies = || self.replies.load(Ordering::Relaxed);
        let (mut call, elapsed, mut replies_before) = (pin!(call), Stopwatch::start(), replies());
        let max_time = MAX_CALL_TIME.max(2 * deadline);
        loop {
            let mut reply = timeout(deadline, call.as_mut()).await.ok();
            if reply.is_none() {
                let time_left = max_time.saturating_sub(elapsed.elapsed());
                reply = self.recheck_before_timeout(call.as_mut(), time_left).await;
            }
            if reply.is_some() {
                self.replies.fetch_add(1, Ordering::Relaxed);
                return reply;
            }
            let replies_now = replies();
            if replies_now == replies_before || elapsed.elapsed() >= max_time {
                return None;
            }
            replies_before = replies_now;
        }
    }

    /// Gives the runtime time to read replies. On a busy machine the reply may have arrived but not been read.
    async fn recheck_before_timeout<T>(
        &self,
        mut call: Pin<&mut impl Future<Output = T>>,
        time_left: Duration,
    ) -> Option<T> {
        let (request, is_done) = oneshot::channel();
        // If no task serves rechecks, there is no connection either.
        self.rechecks.send(request).ok()?;
        tokio::select! {
            biased;
            reply = call.as_mut() => Some(reply),
            _ = timeout(time_left, is_done) => timeout(Duration::ZERO, call).await.ok(),
        }
    }

    /// Serves the requests of [`recheck_before_timeout`](Self::recheck_before_timeout). Runs in the runtime that
    /// reads the replies. A second call returns at once.
    pub(super) async fn serve_rechecks(&self) {
        let pending = self.pending_rechecks.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(mut pending) = pending else { return };
        while let Some(request) = pending.recv().await {
            // While this task sleeps, the runtime reads the replies that have arrived.
            sleep(RECHECK_DELAY).await;
            // The call may have been cancelled.
            let _ = request.send(());
        }
    }
}
