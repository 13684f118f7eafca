//! The interface between an account and the store that persists it, and the wait for a commit.
//!
//! A store numbers its commits. A request waits for the commit that will contain its reservation. One commit ends the wait of
//! many requests, which belong to a few runtimes: the store's thread wakes one task per runtime, and that task wakes the
//! requests. Waking every request from the store's thread took two system calls per request.

use super::messages::LeftAccount;
use super::overrides::OverrideSet;
use super::usage_history::{Totals, UsageRow};
use crate::quota::{Amounts, PersistedCounter, Quota};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Poll, Waker};
use tokio::runtime::{Handle, Id};
use tokio::sync::watch;

/// A store that makes changes durable.
pub trait Persistence: Send + Sync + std::fmt::Debug {
    /// Notifies the store that an account has changed. `urgent`: a request waits until the change is durable.
    fn changed(&self, urgent: bool);

    /// Whether the store can write now. If not, requests do not wait for it.
    fn is_writing(&self) -> bool;

    /// Notifies the store that a request waited too long for a commit and continued without it.
    fn on_wait_timeout(&self);

    /// The commits that requests wait for.
    fn commits(&self) -> &Commits;
}

/// The changes of an account since the store last took them.
#[derive(Debug, Default)]
pub struct Changes {
    /// Every quota that changed.
    pub quotas: Vec<(Quota, PersistedCounter)>,
    /// Quotas that others have replaced. Their stored counters must be removed together with writing the others.
    pub replaced: Vec<Quota>,
    /// Sums since the store was created.
    pub totals: Totals,
    /// Amounts reserved by requests in flight. If the process dies now, they are charged in full.
    pub held: Amounts,
    /// Usage by minute, caller and model, with the model's name.
    pub usage: Vec<(UsageRow, Arc<str>)>,
    /// All overrides, if one of them changed.
    pub overrides: Option<OverrideSet>,
}

/// The state of an account that the store had when the process started.
#[derive(Debug, Default)]
pub struct RestoredState {
    /// All stored quotas with their counters, also those that the config no longer has.
    pub quotas: Vec<(Quota, PersistedCounter)>,
    /// Sums since the store was created, without the held amounts.
    pub totals: Totals,
    /// Amounts that were held when the last process died. They are charged in full.
    pub held: Amounts,
    /// The overrides of an administrator.
    pub overrides: OverrideSet,
    /// Amounts held by requests of the process that hands the counters over. `None`: no process serves them.
    pub left: Option<LeftAccount>,
}

impl RestoredState {
    /// The stored counter of a quota.
    pub(super) fn counter(&self, quota: &Quota) -> Option<PersistedCounter> {
        self.quotas.iter().find(|(stored, _)| stored.is_same_as(quota)).map(|(_, saved)| *saved)
    }
}

/// The commits of a store.
#[derive(Debug)]
pub struct Commits {
    begun: AtomicU64,
    done: watch::Sender<u64>,
    /// The waiting requests of each runtime.
    waiting: Mutex<Vec<(Id, Arc<WaitingRequests>)>>,
}

/// Requests of one runtime, each with the number of the commit that it waits for.
type WaitingRequests = Mutex<Vec<(u64, Waker)>>;

impl Default for Commits {
    fn default() -> Self {
        Self { begun: AtomicU64::new(0), done: watch::channel(0).0, waiting: Mutex::default() }
    }
}

impl Commits {
    /// Begins a commit, which will contain all changes made before this call. Returns its number.
    pub fn begin(&self) -> u64 {
        self.begun.fetch_add(1, Ordering::SeqCst) + 1
    }

    /// Ends a commit, successful or not: requests stop waiting for it.
    pub fn finish(&self, number: u64) {
        self.done.send_replace(number);
    }

    /// The number of the commit that will contain a change made just before this call.
    pub fn next(&self) -> u64 {
        // Sequentially consistent: a commit that began before the change is already counted here.
        self.begun.load(Ordering::SeqCst) + 1
    }

    /// Waits until a commit has ended.
    pub async fn wait_for(&self, number: u64) {
        let waiting = self.waiting_in_this_runtime();
        std::future::poll_fn(|cx| {
            if self.is_done(number) {
                return Poll::Ready(());
            }
            let mut all = waiting.lock().unwrap_or_else(PoisonError::into_inner);
            all.push((number, cx.waker().clone()));
            drop(all);
            // The commit may have ended before the waker was stored. Then nothing would wake this task.
            if self.is_done(number) { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }

    fn is_done(&self, number: u64) -> bool {
        *self.done.borrow() >= number
    }

    fn waiting_in_this_runtime(&self) -> Arc<WaitingRequests> {
        let runtime = Handle::current();
        let mut all = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, waiting)) = all.iter().find(|(id, _)| *id == runtime.id()) {
            return waiting.clone();
        }
        let waiting = Arc::new(WaitingRequests::default());
        all.push((runtime.id(), waiting.clone()));
        runtime.spawn(wake_after_commits(self.done.subscribe(), waiting.clone()));
        waiting
    }
}

/// Wakes the waiting requests of one runtime after each commit. Runs until the store is dropped.
async fn wake_after_commits(mut done: watch::Receiver<u64>, waiting: Arc<WaitingRequests>) {
    while done.changed().await.is_ok() {
        let number = *done.borrow_and_update();
        let mut all = waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let ready: Vec<_> = all.extract_if(.., |(wanted, _)| *wanted <= number).collect();
        drop(all);
        ready.into_iter().for_each(|(_, waker)| waker.wake());
    }
}
