//! How long a call waits for its reply. A stall of the server that is shorter than the timeout only delays the calls.
//! A busy gateway must not mistake its own delay for a server that does not answer.

use crate::clock::Stopwatch;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{sleep, timeout};

/// Time that a server gets after a stall of this length to run the calls that arrived meanwhile, before calls fail. On a busy
/// machine with many nodes that takes tens of milliseconds.
pub fn catch_up_time(timeout: Duration) -> Duration {
    (timeout / 5).clamp(Duration::from_millis(10), Duration::from_millis(250))
}

/// Time that the runtime gets to read replies before a call fails.
const RECHECK_DELAY: Duration = Duration::from_millis(10);
/// If that takes longer than this, the machine is so busy that neither the runtime nor, perhaps, the server runs in
/// time. The runtime then gets the time again.
const MAX_RECHECK_DELAY: Duration = Duration::from_millis(15);
/// Maximum time for all rechecks of a call.
const MAX_RECHECK_TIME: Duration = Duration::from_millis(250);

/// How long calls wait. Times are counted from the start of the timer.
#[derive(Clone, Copy, Debug)]
struct Patience {
    /// A server that sends no reply to any call for this time is unavailable. It includes the time to catch up.
    max_silence: Duration,
}

impl Patience {
    /// How much longer a call waits that was sent at `sent`. `last_reply`: when the server last replied to any call.
    /// `None`: the call has failed. While the server replies to other calls, a call may take twice as long.
    fn time_left(self, sent: Duration, last_reply: Duration, now: Duration) -> Option<Duration> {
        let until_silent = sent.max(last_reply).saturating_add(self.max_silence);
        let until_too_slow = sent.saturating_add(self.max_silence.saturating_mul(2));
        Some(until_silent.min(until_too_slow).saturating_sub(now)).filter(|left| !left.is_zero())
    }
}

/// Times the calls of one connection.
#[derive(Debug)]
pub(super) struct CallTimer {
    timeout: Duration,
    clock: Stopwatch,
    /// When the server last replied to any call, in microseconds of `clock`.
    last_reply: AtomicU64,
    /// Requests to the runtime that reads the replies.
    rechecks: mpsc::UnboundedSender<oneshot::Sender<()>>,
    /// The receiver of `rechecks`, until `serve_rechecks` takes it.
    pending_rechecks: Mutex<Option<mpsc::UnboundedReceiver<oneshot::Sender<()>>>>,
}

impl CallTimer {
    pub(super) fn new(timeout: Duration) -> Self {
        let (rechecks, pending) = mpsc::unbounded_channel();
        Self {
            timeout,
            clock: Stopwatch::start(),
            last_reply: AtomicU64::new(0),
            rechecks,
            pending_rechecks: Mutex::new(Some(pending)),
        }
    }

    /// The timeout of a call that needs no additional time.
    pub(super) fn timeout(&self) -> Duration {
        self.timeout
    }

    /// Waits for the reply to `call`. `extra` is added to the timeout. `None`: the server does not reply, or replies
    /// too slowly.
    pub(super) async fn run<T>(
        &self,
        extra: Duration,
        mut call: Pin<&mut (impl Future<Output = T> + ?Sized)>,
    ) -> Option<T> {
        let max_silence = self.timeout + catch_up_time(self.timeout) + extra;
        let (sent, patience) = (self.clock.elapsed(), Patience { max_silence });
        let time_left = || patience.time_left(sent, self.last_reply(), self.clock.elapsed());
        loop {
            if let Some(left) = time_left() {
                let Ok(reply) = timeout(left, call.as_mut()).await else { continue };
                self.record_reply();
                return Some(reply);
            }
            if let Some(reply) = self.recheck_before_timeout(call.as_mut()).await {
                self.record_reply();
                return Some(reply);
            }
            // Other calls may have received their replies during the recheck.
            time_left()?;
        }
    }

    fn record_reply(&self) {
        let now = u64::try_from(self.clock.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.last_reply.fetch_max(now, Ordering::Relaxed);
    }

    fn last_reply(&self) -> Duration {
        Duration::from_micros(self.last_reply.load(Ordering::Relaxed))
    }
    /// Gives the runtime time to read replies. On a busy machine the reply may have arrived but not been read.
    async fn recheck_before_timeout<T>(
        &self,
        mut call: Pin<&mut (impl Future<Output = T> + ?Sized)>,
    ) -> Option<T> {
        let begun = Stopwatch::start();
        loop {
            let (pause, (request, is_done)) = (Stopwatch::start(), oneshot::channel());
            // If no task serves rechecks, there is no connection either.
            self.rechecks.send(request).ok()?;
            let time_left = MAX_RECHECK_TIME.saturating_sub(begun.elapsed());
            tokio::select! {
                biased;
                reply = call.as_mut() => return Some(reply),
                _ = timeout(time_left, is_done) => {}
            }
            if let Ok(reply) = timeout(Duration::ZERO, call.as_mut()).await {
                return Some(reply);
            }
            if pause.elapsed() <= MAX_RECHECK_DELAY || begun.elapsed() >= MAX_RECHECK_TIME {
                return None;
            }
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
            // All requests that arrived meanwhile are served by the same pause.
            let waiting = std::iter::from_fn(|| pending.try_recv().ok());
            for request in std::iter::once(request).chain(waiting) {
                // The call may have been cancelled.
                let _ = request.send(());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TIMEOUT: Duration = Duration::from_millis(250);

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// When a call that was sent at 0 fails on a server that replies to other calls at these times and to this call
    /// never. A virtual clock jumps to the end of each wait.
    fn failure_time(other_replies: &[u64]) -> Duration {
        let (patience, mut now) = (Patience { max_silence: TIMEOUT }, Duration::ZERO);
        loop {
            let last_reply = other_replies.iter().map(|&at| ms(at)).filter(|&at| at <= now).max();
            match patience.time_left(Duration::ZERO, last_reply.unwrap_or_default(), now) {
                Some(left) => now += left,
                None => return now,
            }
        }
    }

    #[test]
    fn a_call_fails_when_the_server_was_silent_for_the_timeout() {
        assert_eq!(failure_time(&[]), TIMEOUT);
        assert_eq!(failure_time(&[10, 90]), ms(90) + TIMEOUT);
        assert_eq!(failure_time(&[100, 351]), ms(100) + TIMEOUT, "the second reply comes too late");
        assert_eq!(
            failure_time(&[240, 480, 720]),
            2 * TIMEOUT,
            "the server replies to every call but this one"
        );
        let patience = Patience { max_silence: TIMEOUT };
        assert_eq!(
            patience.time_left(ms(1_000), ms(10), ms(1_100)),
            Some(ms(150)),
            "an old reply does not count"
        );
    }

    proptest! {
        /// The server replies in order, and stalls. The reply to this call is the last one.
        #[test]
        fn a_stall_below_the_timeout_fails_no_call(gaps in prop::collection::vec(1_u64..250, 1..9)) {
            let mut times: Vec<u64> = gaps.iter().scan(0, |at, gap| { *at += gap; Some(*at) }).collect();
            let own = times.pop().unwrap();
            // A call that is not answered after twice the timeout fails in any case.
            prop_assume!(own < 500);
            prop_assert!(failure_time(&times) > ms(own), "{times:?}, {own}");
        }

        #[test]
        fn a_silent_server_is_detected_after_the_timeout(replies in prop::collection::vec(0_u64..2_000, 0..20)) {
            let failed = failure_time(&replies);
            prop_assert!((TIMEOUT..=2 * TIMEOUT).contains(&failed));
            let last = replies.iter().map(|&at| ms(at)).filter(|&at| at <= failed).max().unwrap_or_default();
            prop_assert!(failed == 2 * TIMEOUT || failed >= last + TIMEOUT, "{replies:?}: {failed:?}");
        }
    }
}
