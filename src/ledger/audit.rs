//! The audit log: the actions of administrators until the store takes them. Without a store it is the whole log.

use crate::clock::Timestamp;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Maximum number of entries in memory. A newer entry replaces the oldest one.
const MAX_ENTRIES: usize = 1_000;

/// An action of an administrator.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditEntry {
    /// When it was done.
    pub at: Timestamp,
    /// How the administrator was identified.
    pub by: String,
    /// The address that the request came from.
    pub address: Option<String>,
    /// The kind of action, such as `limit_set`.
    pub action: String,
    /// The object of the action.
    pub target: String,
    /// The state before the action, as JSON.
    pub before: Option<String>,
    /// The state after the action, as JSON.
    pub after: Option<String>,
    /// The reason that the administrator gave.
    pub reason: Option<String>,
}

/// The entries that the store has not written yet.
#[derive(Debug, Default)]
pub struct AuditLog(Mutex<Entries>);

#[derive(Debug, Default)]
struct Entries {
    /// Oldest first.
    entries: VecDeque<AuditEntry>,
    /// Number of entries removed so far.
    removed: u64,
}

impl Entries {
    fn remove_oldest(&mut self) {
        if self.entries.pop_front().is_some() {
            self.removed += 1;
        }
    }
}

impl AuditLog {
    fn lock(&self) -> MutexGuard<'_, Entries> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds an entry.
    pub fn push(&self, entry: AuditEntry) {
        let mut all = self.lock();
        if all.entries.len() >= MAX_ENTRIES {
            all.remove_oldest();
        }
        all.entries.push_back(entry);
    }

    /// The newest entries in memory, newest first.
    pub fn newest(&self, limit: usize) -> Vec<AuditEntry> {
        self.lock().entries.iter().rev().take(limit).cloned().collect()
    }

    /// The entries in memory, oldest first, and the value for `remove_written` once they are written.
    pub fn unwritten(&self) -> (u64, Vec<AuditEntry>) {
        let all = self.lock();
        (all.removed + all.entries.len() as u64, all.entries.iter().cloned().collect())
    }

    /// Removes the entries that an earlier `unwritten` has returned with this value.
    pub fn remove_written(&self, end: u64) {
        let mut all = self.lock();
        while all.removed < end && !all.entries.is_empty() {
            all.remove_oldest();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(n: usize) -> AuditEntry {
        AuditEntry { target: n.to_string(), ..AuditEntry::default() }
    }

    #[test]
    fn written_entries_leave_the_memory_and_later_ones_stay() {
        let log = AuditLog::default();
        (0..3).for_each(|n| log.push(entry(n)));
        let (end, entries) = log.unwritten();
        assert_eq!(entries, [entry(0), entry(1), entry(2)]);
        log.push(entry(3));
        log.remove_written(end);
        log.remove_written(end);
        assert_eq!(log.newest(9), [entry(3)]);
    }

    #[test]
    fn the_number_of_entries_is_bounded() {
        let log = AuditLog::default();
        (0..1_500).for_each(|n| log.push(entry(n)));
        let (end, entries) = log.unwritten();
        assert_eq!((entries.len(), &entries[0]), (1_000, &entry(500)));
        // Entries that were replaced meanwhile are not removed a second time.
        (1_500..1_600).for_each(|n| log.push(entry(n)));
        log.remove_written(end);
        let rest = log.newest(2_000);
        assert_eq!((rest.len(), &rest[0], &rest[99]), (100, &entry(1_599), &entry(1_500)));
    }
}
