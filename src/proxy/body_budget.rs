//! The bytes of request bodies that the gateway buffers, over all requests (`server.buffered_bodies`).

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::timeout;

/// How long a request waits for room for its body.
const MAX_WAIT: Duration = Duration::from_secs(5);

/// The bytes of all bodies that are buffered.
#[derive(Debug, Default)]
pub(super) struct BodyBudget {
    used: AtomicUsize,
    max: AtomicUsize,
    waiting: AtomicUsize,
    freed: Notify,
}

/// The bytes of one body. Dropping this frees them.
#[derive(Debug)]
pub(super) struct BufferedBytes {
    budget: Arc<BodyBudget>,
    bytes: usize,
}

/// There was no room in time.
#[derive(Debug)]
pub(super) struct NoRoomForBody;

impl BodyBudget {
    /// Changes the bound. Bodies that are buffered stay.
    pub(super) fn set_max(&self, max: usize) {
        self.max.store(max, Ordering::SeqCst);
        self.freed.notify_waiters();
    }

    fn try_take(&self, bytes: usize) -> bool {
        let max = self.max.load(Ordering::Relaxed);
        let take = |used: usize| used.checked_add(bytes).filter(|&used| used <= max);
        // SeqCst here and in `drop` orders this after `waiting`, so that no wake-up is lost.
        self.used.fetch_update(Ordering::SeqCst, Ordering::SeqCst, take).is_ok()
    }

    async fn wait_and_take(&self, bytes: usize, max_wait: Duration) -> Result<(), NoRoomForBody> {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let _waiting = Waiting(self);
        let take = async {
            loop {
                let mut freed = pin!(self.freed.notified());
                freed.as_mut().enable();
                if self.try_take(bytes) {
                    return;
                }
                freed.await;
            }
        };
        timeout(max_wait, take).await.map_err(|_| NoRoomForBody)
    }
}

/// A request that waits for room.
struct Waiting<'b>(&'b BodyBudget);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::SeqCst);
    }
}

impl BufferedBytes {
    pub(super) fn none(budget: &Arc<BodyBudget>) -> Self {
        Self { budget: budget.clone(), bytes: 0 }
    }

    /// Adds bytes that have arrived. Waits for room, at most [`MAX_WAIT`].
    ///
    /// # Errors
    /// There was no room in time.
    pub(super) async fn add(&mut self, bytes: usize) -> Result<(), NoRoomForBody> {
        self.add_within(MAX_WAIT, bytes).await
    }

    async fn add_within(&mut self, max_wait: Duration, bytes: usize) -> Result<(), NoRoomForBody> {
        if !self.budget.try_take(bytes) {
            self.budget.wait_and_take(bytes, max_wait).await?;
        }
        self.bytes += bytes;
        Ok(())
    }
}

impl Drop for BufferedBytes {
    fn drop(&mut self) {
        if self.bytes == 0 {
            return;
        }
        self.budget.used.fetch_sub(self.bytes, Ordering::SeqCst);
        if self.budget.waiting.load(Ordering::SeqCst) > 0 {
            self.budget.freed.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn budget(max: usize) -> Arc<BodyBudget> {
        let budget = Arc::new(BodyBudget::default());
        budget.set_max(max);
        budget
    }

    #[tokio::test]
    async fn a_body_waits_for_room_and_is_refused_if_none_comes() {
        let budget = budget(100);
        let mut first = BufferedBytes::none(&budget);
        first.add(60).await.unwrap();
        first.add(30).await.unwrap();
        let mut second = BufferedBytes::none(&budget);
        second.add(10).await.unwrap();
        assert!(second.add_within(Duration::from_millis(20), 1).await.is_err());
        let (added, ()) = tokio::join!(second.add(50), async { drop(first) });
        added.unwrap();
        assert_eq!(budget.used.load(Ordering::SeqCst), 60);
        let mut third = BufferedBytes::none(&budget);
        let (added, ()) = tokio::join!(third.add(90), async { budget.set_max(150) });
        added.unwrap();
        drop((second, third));
        assert_eq!((budget.used.load(Ordering::SeqCst), budget.waiting.load(Ordering::SeqCst)), (0, 0));
    }
}
