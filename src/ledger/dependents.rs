//! The environments whose requests wait for room in the quotas of an upstream.

use crate::wait_queue::WaitQueue;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// The wait queues of these environments. There are at most as many as environments, so they are never removed.
#[derive(Debug, Default)]
pub(super) struct Dependents {
    has_any: AtomicBool,
    queues: Mutex<Vec<Arc<WaitQueue>>>,
}

impl Dependents {
    /// Adds the wait queue of an environment whose request is about to wait.
    pub(super) fn add(&self, queue: &Arc<WaitQueue>) {
        let mut queues = self.queues.lock().unwrap_or_else(PoisonError::into_inner);
        if !queues.iter().any(|known| Arc::ptr_eq(known, queue)) {
            queues.push(queue.clone());
        }
        self.has_any.store(true, Ordering::Release);
    }

    /// Wakes the request at the head of each queue.
    pub(super) fn notify_released(&self) {
        if self.has_any.load(Ordering::Acquire) {
            let queues = self.queues.lock().unwrap_or_else(PoisonError::into_inner);
            queues.iter().for_each(|queue| queue.notify_released());
        }
    }
}
