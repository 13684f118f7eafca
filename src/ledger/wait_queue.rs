//! The queue of requests that wait for room: first come, first served, bounded in length and in time.

use super::demand::Shortage;
use crate::clock::Stopwatch;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::sync::{Notify, Semaphore};
use tokio::time::timeout;

/// Maximum requests that wait in one environment. A further request is denied at once.
const MAX_WAITING: usize = 1_000;
/// A request at the head of the queue retries after this time if the time of the next refill is not known.
const DEFAULT_RETRY_INTERVAL: Duration = Duration::from_secs(1);

/// The wait queue of one environment.
#[derive(Debug)]
pub(super) struct WaitQueue {
    /// The request that holds the permit is at the head. Tokio's semaphore is fair, and a request that stops waiting
    /// leaves the queue.
    head: Semaphore,
    waiting: AtomicUsize,
    released: Notify,
}

impl Default for WaitQueue {
    fn default() -> Self {
        Self { head: Semaphore::new(1), waiting: AtomicUsize::new(0), released: Notify::new() }
    }
}

impl WaitQueue {
    /// Whether no request waits.
    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Number of requests that wait.
    pub(super) fn len(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }

    /// Wakes the request at the head: a quota may have more room.
    pub(super) fn notify_released(&self) {
        if !self.is_empty() {
            self.released.notify_one();
        }
    }

    /// Waits in the queue and calls `reserve` when this request is at the head, for at most `max_wait`. Returns
    /// `None` if the queue is full, if the time is over, or if no room can become free in time.
    pub(super) async fn wait_in_turn<T, R>(&self, max_wait: Duration, reserve: impl Fn() -> R) -> Option<T>
    where
        R: Future<Output = Result<T, Shortage>>,
    {
        let _place = QueuePlace::take(self)?;
        let clock = Stopwatch::start();
        let in_turn = async {
            // The semaphore is never closed.
            let _head = self.head.acquire().await.ok()?;
            loop {
                let released = self.released.notified();
                let left = max_wait.saturating_sub(clock.elapsed());
                let retry_after = match reserve().await {
                    Ok(reservation) => return Some(reservation),
                    Err(shortage) if !shortage.may_clear_within(left) => return None,
                    Err(shortage) => shortage.refills_after().unwrap_or(DEFAULT_RETRY_INTERVAL),
                };
                // Both a release and the timeout lead to another attempt: the released room may be too small.
                drop(timeout(retry_after, released).await);
            }
        };
        timeout(max_wait, in_turn).await.ok().flatten()
    }
}

/// The place of one waiting request. Dropping it leaves the queue.
struct QueuePlace<'a>(&'a WaitQueue);

impl<'a> QueuePlace<'a> {
    fn take(wait_queue: &'a WaitQueue) -> Option<Self> {
        let before = wait_queue.waiting.fetch_add(1, Ordering::Relaxed);
        let place = Self(wait_queue);
        (before < MAX_WAITING).then_some(place)
    }
}

impl Drop for QueuePlace<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn at_most_a_thousand_requests_wait() {
        let wait_queue = WaitQueue::default();
        let mut places: Vec<QueuePlace<'_>> =
            (0..MAX_WAITING).map_while(|_| QueuePlace::take(&wait_queue)).collect();
        assert_eq!(places.len(), MAX_WAITING);
        assert!(QueuePlace::take(&wait_queue).is_none());
        places.pop();
        assert!(QueuePlace::take(&wait_queue).is_some(), "a request that leaves makes room");
        drop(places);
        assert!(wait_queue.is_empty());
    }
}
