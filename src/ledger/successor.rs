//! Sends the messages of moved accounts to the new process, which has their counters.

use super::audit::AuditEntry;
use super::demand::{Grant, Progress, Settlement};
use super::messages::{FromSuccessor, LeftGrant, LeftUsage, ToSuccessor};
use crate::quota::{Amounts, Receipt, Subject};
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::{mpsc, oneshot};

/// A stream of a moved account reports its progress again after this many tokens.
const PROGRESS_STEP: u64 = 64;

/// The messages to the new process and its replies. All moved accounts share them.
#[derive(Debug)]
pub struct SuccessorLine {
    messages: mpsc::UnboundedSender<ToSuccessor>,
    last_id: AtomicU64,
    replies: Mutex<Replies>,
}

#[derive(Debug, Default)]
struct Replies {
    waiting: HashMap<u64, oneshot::Sender<FromSuccessor>>,
    /// The last answer to a progress of each stream.
    progress: HashMap<u64, StreamProgress>,
    /// The new process has ended.
    is_closed: bool,
}

#[derive(Clone, Copy, Debug)]
struct StreamProgress {
    is_overrun: bool,
    reserved: Amounts,
    progress_threshold: u64,
}

impl SuccessorLine {
    /// Returns the line, and the messages to send.
    pub fn new() -> (Arc<Self>, mpsc::UnboundedReceiver<ToSuccessor>) {
        let (messages, receiver) = mpsc::unbounded_channel();
        let line = Self { messages, last_id: AtomicU64::new(0), replies: Mutex::default() };
        (Arc::new(line), receiver)
    }

    /// Handles a reply of the new process.
    pub fn on_reply(&self, reply: FromSuccessor) {
        let mut replies = self.lock();
        match reply {
            FromSuccessor::Progressed { id, is_overrun, reserved, progress_threshold } => {
                // The entry is missing if the stream has ended.
                if let Some(known) = replies.progress.get_mut(&id) {
                    *known = StreamProgress { is_overrun, reserved, progress_threshold };
                }
            }
            FromSuccessor::Reserved { id, .. }
            | FromSuccessor::Denied { id, .. }
            | FromSuccessor::Moved { id, .. }
            | FromSuccessor::Committed { id } => {
                if let Some(waiting) = replies.waiting.remove(&id) {
                    // An error means that nothing waits for the answer any more.
                    drop(waiting.send(reply));
                }
            }
        }
    }

    /// Ends all waits for replies, because the new process has ended.
    pub fn on_close(&self) {
        let mut replies = self.lock();
        replies.is_closed = true;
        replies.waiting.clear();
    }

    /// Sends usage of an account that does not move.
    pub fn send_usage(&self, environment: &Arc<str>, rows: Vec<LeftUsage>) {
        self.send(ToSuccessor::Usage { environment: environment.to_string(), rows });
    }

    /// Sends entries of the audit log.
    pub fn send_audit(&self, entries: Vec<AuditEntry>) {
        self.send(ToSuccessor::Audit { entries });
    }

    fn lock(&self) -> MutexGuard<'_, Replies> {
        self.replies.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn next_id(&self) -> u64 {
        self.last_id.fetch_add(1, Ordering::Relaxed) + 1
    }

    fn send(&self, message: ToSuccessor) {
        // An error means that the new process has ended. The next start charges in full the held amounts in the store.
        let _ = self.messages.send(message);
    }

    /// Waits for the answer to the message with this id. `None`: the new process has ended.
    pub(super) async fn call(self: &Arc<Self>, id: u64, message: ToSuccessor) -> Option<FromSuccessor> {
        let (sender, receiver) = oneshot::channel();
        {
            let mut replies = self.lock();
            if replies.is_closed {
                return None;
            }
            replies.waiting.insert(id, sender);
        }
        let mut cancel = CancelOnDrop { line: self, id, is_answered: false };
        self.send(message);
        let reply = receiver.await.ok();
        cancel.is_answered = true;
        reply
    }
}

/// Cancels a call whose caller does not wait for the answer any more.
struct CancelOnDrop<'a> {
    line: &'a SuccessorLine,
    id: u64,
    is_answered: bool,
}

impl Drop for CancelOnDrop<'_> {
    fn drop(&mut self) {
        if !self.is_answered {
            self.line.lock().waiting.remove(&self.id);
            self.line.send(ToSuccessor::Cancel { id: self.id });
        }
    }
}

/// An account in the new process.
#[derive(Clone, Debug)]
pub(super) struct Successor {
    pub(super) line: Arc<SuccessorLine>,
    pub(super) environment: Arc<str>,
}

impl Successor {
    fn adopt(&self, model: &str, grant: &Grant) -> u64 {
        let id = self.line.next_id();
        let grant = LeftGrant {
            receipts: grant.receipts.iter().map(Receipt::to_left).collect(),
            reserved: grant.reserved,
            extension: grant.extension,
            completions: grant.completions,
            cap: grant.cap,
            was_clamped: grant.was_clamped,
            progress_threshold: grant.progress_threshold,
        };
        let environment = self.environment.to_string();
        self.line.send(ToSuccessor::Adopt { id, environment, model: model.to_owned(), grant });
        id
    }

    pub(super) fn settle(&self, subject: Subject<'_>, grant: &Grant, settlement: Settlement) {
        let id = grant.id.unwrap_or_else(|| self.adopt(subject.model, grant));
        self.line.lock().progress.remove(&id);
        let Settlement { spent, is_complete } = settlement;
        self.line.send(ToSuccessor::Settle {
            id,
            caller: subject.caller.map(ToString::to_string),
            spent,
            is_complete,
        });
    }

    /// Reports the progress of a stream. Returns the outcome of the last reply: the reply to this report arrives later.
    pub(super) fn progress(&self, model: &str, grant: &mut Grant, spent: Amounts) -> Progress {
        let id = self.reservation(model, grant);
        self.line.send(ToSuccessor::Progress { id, spent });
        let known = self.line.lock().progress.get(&id).copied();
        let reported_again_at = spent.completion.saturating_add(PROGRESS_STEP);
        grant.progress_threshold = known.map_or(0, |known| known.progress_threshold).max(reported_again_at);
        let Some(known) = known else { return Progress::Within };
        grant.reserved = known.reserved;
        if known.is_overrun { Progress::Overrun } else { Progress::Within }
    }

    /// The id of a reservation, which the new process adopts now if it has not yet.
    pub(super) fn reservation(&self, model: &str, grant: &mut Grant) -> u64 {
        if let Some(id) = grant.id {
            return id;
        }
        let id = self.adopt(model, grant);
        self.begin_progress(id, grant.reserved, grant.progress_threshold);
        grant.id = Some(id);
        id
    }

    pub(super) fn begin_progress(&self, id: u64, reserved: Amounts, progress_threshold: u64) {
        let begun = StreamProgress { is_overrun: false, reserved, progress_threshold };
        self.line.lock().progress.insert(id, begun);
    }
}
