//! The shared state of the writer thread and the requests: wakes the thread, and reports whether commits succeed.

use crate::ledger::{Commits, Persistence, SuccessorLine};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Upper bound of the delay of changes that no request waits for, so that one commit writes many settlements. It does
/// not delay a request that waits. Without it nearly every settlement has a commit of its own, also with quotas of less
/// than an hour. Measured with one quota per minute, that costs 10 us of CPU per request at 6,000 requests per second,
/// and 50 to 80 us at 500.
const LAZY_DELAY: Duration = Duration::from_millis(10);
/// Delay between a failed commit and the next attempt.
const RETRY_DELAY: Duration = Duration::from_millis(500);

/// Wakes the writer thread when there are changes, and reports whether the store can be written.
#[derive(Debug, Default)]
pub struct WriterControl {
    state: Mutex<WriterState>,
    /// Wakes the writer thread.
    wake: Condvar,
    /// Wakes both sides of a hand-over.
    decided: Condvar,
    pub(super) commits: Commits,
}

#[derive(Debug, Default)]
struct WriterState {
    /// A request waits for the next commit.
    is_urgent: bool,
    /// There are changes to write.
    has_changes: bool,
    /// The thread must write the last changes and end.
    is_stopping: bool,
    wakes_on: WakesOn,
    /// The error of the last commit, if it failed.
    commit_error: Option<String>,
    /// A request has waited too long for a commit. No request waits again before the next commit.
    is_late: bool,
    handover: StoreHandover,
}

/// The hand-over of the store to a new process.
#[derive(Debug, Default)]
enum StoreHandover {
    /// This process has the store.
    #[default]
    Idle,
    /// The thread must write the last changes and pause.
    Requested,
    /// The thread pauses. Whether everything is written.
    Paused { is_complete: bool },
    /// The new process has the store.
    Moved(Arc<SuccessorLine>),
}

/// The events that wake the writer thread. Waking it for every request would cost more than the commits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum WakesOn {
    /// The thread is awake.
    #[default]
    Nothing,
    UrgentChange,
    AnyChange,
}

impl WriterState {
    /// Whether the thread must write the last changes, to end or to pause.
    fn must_write_now(&self) -> bool {
        self.is_stopping || matches!(self.handover, StoreHandover::Requested)
    }
}

impl WriterControl {
    fn lock(&self) -> MutexGuard<'_, WriterState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Why the store is unavailable. `None`: it is available.
    pub fn unavailable_reason(&self) -> Option<String> {
        let state = self.lock();
        let late = || state.is_late.then(|| "a commit takes longer than a second".to_owned());
        state.commit_error.clone().or_else(late)
    }

    /// Makes the thread write the last changes and end.
    pub(super) fn stop(&self) {
        let mut state = self.lock();
        state.is_stopping = true;
        state.wakes_on = WakesOn::Nothing;
        drop(state);
        self.wake.notify_one();
        self.decided.notify_all();
    }

    /// Makes the thread write the last changes and pause, so that a new process can use the file. Blocks until it does, at
    /// most `max_wait`.
    ///
    /// # Errors
    /// The store cannot be written. `resume` must follow.
    pub(crate) fn pause(&self, max_wait: Duration) -> anyhow::Result<()> {
        let mut state = self.lock();
        state.handover = StoreHandover::Requested;
        state.wakes_on = WakesOn::Nothing;
        self.wake.notify_all();
        let is_pending = |state: &mut WriterState| matches!(state.handover, StoreHandover::Requested);
        let waited = self.decided.wait_timeout_while(state, max_wait, is_pending);
        let state = waited.unwrap_or_else(PoisonError::into_inner).0;
        match state.handover {
            StoreHandover::Paused { is_complete: true } => Ok(()),
            _ => anyhow::bail!("the store of the running gateway cannot be written"),
        }
    }

    /// Makes the paused thread continue: this process keeps the store.
    pub(crate) fn resume(&self) {
        self.lock().handover = StoreHandover::Idle;
        self.decided.notify_all();
    }

    /// Makes the paused thread release the store to the new process. From now on usage is sent to that process.
    pub(crate) fn move_to(&self, line: &Arc<SuccessorLine>) {
        self.lock().handover = StoreHandover::Moved(line.clone());
        self.decided.notify_all();
    }

    /// Whether the thread must pause after the next commit.
    pub(super) fn must_pause(&self) -> bool {
        matches!(self.lock().handover, StoreHandover::Requested)
    }

    /// Blocks the writer thread until a new process has the store or not. `is_complete`: everything is written. Returns the
    /// line to the new process.
    pub(super) fn wait_for_new_process(&self, is_complete: bool) -> Option<Arc<SuccessorLine>> {
        let mut state = self.lock();
        // The request may have been withdrawn.
        if matches!(state.handover, StoreHandover::Requested) {
            state.handover = StoreHandover::Paused { is_complete };
        }
        self.decided.notify_all();
        let is_pending = |state: &mut WriterState| {
            matches!(state.handover, StoreHandover::Paused { .. }) && !state.is_stopping
        };
        let waited = self.decided.wait_while(state, is_pending);
        let state = waited.unwrap_or_else(PoisonError::into_inner);
        match &state.handover {
            StoreHandover::Moved(line) => Some(line.clone()),
            _ => None,
        }
    }

    /// Blocks the writer thread until there is something to write, at most `max_wait`. It returns at once if a request
    /// waits for a commit. `is_behind`: the last commit failed. Returns whether the thread must stop.
    pub(super) fn wait(&self, is_behind: bool, max_wait: Duration) -> bool {
        let mut state = self.lock();
        if is_behind {
            // Requests do not wait for commits while the store is unavailable.
            state = self.sleep(state, WakesOn::UrgentChange, RETRY_DELAY, WriterState::must_write_now);
        } else {
            let is_woken = |state: &WriterState| state.wakes_on == WakesOn::Nothing;
            if !state.has_changes && !state.must_write_now() {
                state = self.sleep(state, WakesOn::AnyChange, max_wait, is_woken);
            }
            if state.has_changes && !state.is_urgent && !state.must_write_now() {
                state = self.sleep(state, WakesOn::UrgentChange, LAZY_DELAY, is_woken);
            }
        }
        state.is_urgent = false;
        state.has_changes = false;
        state.is_stopping
    }

    fn sleep<'a>(
        &'a self,
        mut state: MutexGuard<'a, WriterState>,
        wakes_on: WakesOn,
        max_wait: Duration,
        until: impl Fn(&WriterState) -> bool,
    ) -> MutexGuard<'a, WriterState> {
        state.wakes_on = wakes_on;
        let waited = self.wake.wait_timeout_while(state, max_wait, |state| !until(state));
        let mut state = waited.unwrap_or_else(PoisonError::into_inner).0;
        state.wakes_on = WakesOn::Nothing;
        state
    }

    /// Records the result of a commit.
    pub(super) fn record_commit(&self, result: rusqlite::Result<()>) {
        let mut state = self.lock();
        match result {
            Ok(()) => {
                state.is_late = false;
                if state.commit_error.take().is_some() {
                    drop(state);
                    tracing::info!("the store can be written again: all counters are durable");
                }
            }
            Err(error) => {
                let is_first = state.commit_error.replace(error.to_string()).is_none();
                drop(state);
                if is_first {
                    tracing::error!(
                        %error,
                        "the store cannot be written: counters stay in memory until it can; check the disk and the \
                         permissions of store.path"
                    );
                }
            }
        }
    }
}

impl Persistence for WriterControl {
    fn changed(&self, urgent: bool) {
        let mut state = self.lock();
        state.is_urgent |= urgent;
        state.has_changes = true;
        let wakes = match state.wakes_on {
            WakesOn::Nothing => false,
            WakesOn::UrgentChange => urgent,
            WakesOn::AnyChange => true,
        };
        if wakes {
            state.wakes_on = WakesOn::Nothing;
            drop(state);
            self.wake.notify_one();
        }
    }

    fn is_writing(&self) -> bool {
        let state = self.lock();
        let is_here = matches!(state.handover, StoreHandover::Idle);
        is_here && state.commit_error.is_none() && !state.is_late
    }

    fn commits(&self) -> &Commits {
        &self.commits
    }

    fn on_wait_timeout(&self) {
        let mut state = self.lock();
        if !std::mem::replace(&mut state.is_late, true) {
            tracing::error!(
                "a commit of the store takes longer than a second: requests do not wait for it any longer; move \
                 store.path to a faster disk"
            );
        }
    }
}
