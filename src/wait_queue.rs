//! The queue of requests that wait for room: first come, first served, bounded in length and in time.

use crate::clock::Stopwatch;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::sync::{Notify, Semaphore};
use tokio::time::timeout;

/// Maximum requests that wait in one queue. A further request does not wait.
const MAX_WAITING: usize = 1_000;

/// The requests that wait for room in one place: in the quotas of an environment, or at the provider of an upstream.
#[derive(Debug)]
pub(crate) struct WaitQueue {
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
    pub(crate) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Number of requests that wait.
    pub(crate) fn len(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }

    /// Wakes the request at the head: there may be more room.
    pub(crate) fn notify_released(&self) {
        if !self.is_empty() {
            self.released.notify_one();
        }
    }

    /// Waits in the queue and calls `attempt` when this request is at the head, for at most `max_wait`. `attempt` gets the
    /// time that is left, and returns the time after which it is called again. `None`: it cannot succeed in time.
    ///
    /// Returns `None` if the queue is full, if the time is over, or if no attempt can succeed in time.
    pub(crate) async fn wait_in_turn<T, R>(
        &self,
        max_wait: Duration,
        attempt: impl Fn(Duration) -> R,
    ) -> Option<T>
    where
        R: Future<Output = Result<T, Option<Duration>>>,
    {
        let _place = QueuePlace::take(self)?;
        let clock = Stopwatch::start();
        let in_turn = async {
            // The semaphore is never closed.
            let _head = self.head.acquire().await.ok()?;
            loop {
                let released = self.released.notified();
                let retry_after = match attempt(max_wait.saturating_sub(clock.elapsed())).await {
                    Ok(success) => return Some(success),
                    Err(retry_after) => retry_after?,
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
