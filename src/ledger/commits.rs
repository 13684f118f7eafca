//! Waiting until what was reserved is kept.
//!
//! A store counts its commits; a request waits for the number of the one that will have its
//! reservation. A commit ends the wait of many requests, which belong to a few runtimes: each runtime is
//! woken once, and wakes its own. Waking every request from the store's thread cost two system calls a
//! request.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Poll, Waker};
use tokio::runtime::{Handle, Id};
use tokio::sync::watch;

/// The commits of a store.
#[derive(Debug)]
pub struct Commits {
    begun: AtomicU64,
    done: watch::Sender<u64>,
    /// Those who wait, by their runtime.
    waiting: Mutex<Vec<(Id, Arc<Waiting>)>>,
}

/// Requests of one runtime, each with the commit it waits for.
type Waiting = Mutex<Vec<(u64, Waker)>>;

impl Default for Commits {
    fn default() -> Self {
        Self { begun: AtomicU64::new(0), done: watch::channel(0).0, waiting: Mutex::default() }
    }
}

impl Commits {
    /// A commit begins: it will have all changes made before. Returns its number.
    pub fn begin(&self) -> u64 {
        self.begun.fetch_add(1, Ordering::SeqCst) + 1
    }

    /// That commit is done, or has failed: nobody need wait for it any longer.
    pub fn finish(&self, number: u64) {
        self.done.send_replace(number);
    }

    /// The number of the commit that will have a change that was just made.
    pub fn next(&self) -> u64 {
        // In the one order of these: if the commit had begun before, its number would be seen here.
        self.begun.load(Ordering::SeqCst) + 1
    }

    /// Waits for a commit.
    pub(super) async fn done(&self, number: u64) {
        let waiting = self.of_this_runtime();
        std::future::poll_fn(|cx| {
            if self.is_done(number) {
                return Poll::Ready(());
            }
            let mut all = waiting.lock().unwrap_or_else(PoisonError::into_inner);
            all.push((number, cx.waker().clone()));
            drop(all);
            // It may have been done meanwhile, and nobody would say so again.
            if self.is_done(number) { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }

    fn is_done(&self, number: u64) -> bool {
        *self.done.borrow() >= number
    }

    fn of_this_runtime(&self) -> Arc<Waiting> {
        let runtime = Handle::current();
        let mut all = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, waiting)) = all.iter().find(|(id, _)| *id == runtime.id()) {
            return waiting.clone();
        }
        let waiting = Arc::new(Waiting::default());
        all.push((runtime.id(), waiting.clone()));
        runtime.spawn(wake(self.done.subscribe(), waiting.clone()));
        waiting
    }
}

/// Runs in each runtime as long as the store does.
async fn wake(mut done: watch::Receiver<u64>, waiting: Arc<Waiting>) {
    while done.changed().await.is_ok() {
        let number = *done.borrow_and_update();
        let mut all = waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let ready: Vec<_> = all.extract_if(.., |(wanted, _)| *wanted <= number).collect();
        drop(all);
        ready.into_iter().for_each(|(_, waker)| waker.wake());
    }
}
