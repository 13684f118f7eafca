//! Deadlines for calls. A busy gateway must not mistake its own delay for a server that does not answer.

use crate::clock::Stopwatch;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{sleep, timeout};

/// Time that the runtime gets to read answers before a call fails.
const RECHECK_DELAY: Duration = Duration::from_millis(10);
/// A call fails after this time even if the server answers others. A call with a long deadline gets twice the deadline.
const MAX_CALL_TIME: Duration = Duration::from_millis(200);

/// Times the calls of one connection.
#[derive(Debug)]
pub(super) struct CallTimer {
    /// Counts the answers to all calls.
    answers: AtomicU64,
    /// Requests to the runtime that reads the answers.
    rechecks: mpsc::UnboundedSender<oneshot::Sender<()>>,
    /// The other end, until `serve_rechecks` takes it.
    pending_rechecks: Mutex<Option<mpsc::UnboundedReceiver<oneshot::Sender<()>>>>,
}

impl CallTimer {
    pub(super) fn new() -> Self {
        let (rechecks, pending) = mpsc::unbounded_channel();
        Self { answers: AtomicU64::new(0), rechecks, pending_rechecks: Mutex::new(Some(pending)) }
    }

    /// Waits for the answer to `call`. A call past its deadline is still waited for while the server answers other
    /// calls, up to [`MAX_CALL_TIME`]. `None`: the server does not answer, or answers too slowly.
    pub(super) async fn run<T>(&self, deadline: Duration, call: impl Future<Output = T>) -> Option<T> {
        let answers = || self.answers.load(Ordering::Relaxed);
        let (mut call, elapsed, mut answers_before) = (pin!(call), Stopwatch::start(), answers());
        let max_time = MAX_CALL_TIME.max(2 * deadline);
        loop {
            let mut answer = timeout(deadline, call.as_mut()).await.ok();
            if answer.is_none() {
                let time_left = max_time.saturating_sub(elapsed.elapsed());
                answer = self.recheck_before_timeout(call.as_mut(), time_left).await;
            }
            if answer.is_some() {
                self.answers.fetch_add(1, Ordering::Relaxed);
                return answer;
            }
            let answers_now = answers();
            if answers_now == answers_before || elapsed.elapsed() >= max_time {
                return None;
            }
            answers_before = answers_now;
        }
    }

    /// Gives the runtime that reads the answers one more chance. On a busy machine the answer may have arrived without
    /// being read.
    async fn recheck_before_timeout<T>(
        &self,
        mut call: Pin<&mut impl Future<Output = T>>,
        time_left: Duration,
    ) -> Option<T> {
        let (request, is_done) = oneshot::channel();
        // Without a task that serves rechecks there is no connection either.
        self.rechecks.send(request).ok()?;
        tokio::select! {
            biased;
            answer = call.as_mut() => Some(answer),
            _ = timeout(time_left, is_done) => timeout(Duration::ZERO, call).await.ok(),
        }
    }

    /// Answers the requests of [`recheck_before_timeout`](Self::recheck_before_timeout). Runs in the runtime that reads
    /// the answers; a second call returns at once.
    pub(super) async fn serve_rechecks(&self) {
        let pending = self.pending_rechecks.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(mut pending) = pending else { return };
        while let Some(request) = pending.recv().await {
            // While this task sleeps, the runtime reads the answers that have arrived.
            sleep(RECHECK_DELAY).await;
            // The call may have been cancelled.
            let _ = request.send(());
        }
    }
}
