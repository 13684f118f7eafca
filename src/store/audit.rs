//! The audit log in the store. It has a bounded number of entries.

use super::database::{Database, Transaction};
use crate::clock::Timestamp;
use crate::ledger::AuditEntry;
use anyhow::Context as _;
use rusqlite::params;
use std::path::Path;

/// Maximum number of entries, not counting wrong tokens.
const MAX_ENTRIES: i64 = 10_000;
/// Maximum number of entries about wrong tokens. They have a bound of their own, so that guesses push out no other entry.
const MAX_WRONG_TOKENS: i64 = 1_000;
/// The entries are counted each time that this many were added.
const TRIM_INTERVAL: i64 = 100;
/// The action of an entry about a wrong token.
pub(crate) const WRONG_TOKEN: &str = "wrong_token";

/// Reads the newest entries, newest first, also while a gateway uses the file.
///
/// # Errors
/// The file cannot be read.
pub(crate) fn read_audit(path: &Path, limit: usize) -> anyhow::Result<Vec<AuditEntry>> {
    let read = Database::open_read_only(path).and_then(|database| database.newest_audit(limit));
    read.with_context(|| format!("store.path, {}, cannot be read", path.display()))
}

impl Database {
    fn newest_audit(&self, limit: usize) -> rusqlite::Result<Vec<AuditEntry>> {
        let mut read = self.connection().prepare(
            r#"SELECT at_ms, "by", address, action, target, "before", "after", reason FROM audit ORDER BY id DESC LIMIT ?"#,
        )?;
        let rows = read.query_map([i64::try_from(limit).unwrap_or(i64::MAX)], |row| {
            Ok(AuditEntry {
                at: Timestamp(row.get(0)?),
                by: row.get(1)?,
                address: row.get(2)?,
                action: row.get(3)?,
                target: row.get(4)?,
                before: row.get(5)?,
                after: row.get(6)?,
                reason: row.get(7)?,
            })
        })?;
        rows.collect()
    }
}

impl Transaction<'_> {
    /// Adds an entry, and removes the oldest ones when there are too many.
    pub(super) fn audit(&self, entry: &AuditEntry) -> rusqlite::Result<()> {
        let AuditEntry { at, by, address, action, target, before, after, reason } = entry;
        let mut insert = self.connection().prepare_cached(
            r#"INSERT INTO audit (at_ms, "by", address, action, target, "before", "after", reason) VALUES (?, ?, ?, ?, ?, ?, ?, ?)"#,
        )?;
        let id = insert.insert(params![at.0, by, address, action, target, before, after, reason])?;
        if id % TRIM_INTERVAL == 0 {
            for (filter, max) in [("action <> ?1", MAX_ENTRIES), ("action = ?1", MAX_WRONG_TOKENS)] {
                let sql = format!(
                    "DELETE FROM audit WHERE {filter} AND id <= (SELECT id FROM audit WHERE {filter} ORDER BY id DESC LIMIT 1 OFFSET ?2)"
                );
                self.connection().prepare_cached(&sql)?.execute(params![WRONG_TOKEN, max])?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(action: &str, n: usize) -> AuditEntry {
        let (by, action, target) = ("token".to_owned(), action.to_owned(), n.to_string());
        AuditEntry { at: Timestamp(i64::try_from(n).unwrap()), by, action, target, ..AuditEntry::default() }
    }

    #[test]
    fn wrong_tokens_push_out_no_other_entry_and_both_are_bounded() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.db");
        let database = Database::open(&path, &path).unwrap();
        let write = |action: &str, count: usize| {
            let all = |transaction: &Transaction<'_>| {
                (0..count).try_for_each(|n| transaction.audit(&entry(action, n)))
            };
            database.commit(all).unwrap();
        };
        let count = |filter: &str| -> i64 {
            let sql = format!("SELECT count(*) FROM audit WHERE action {filter} 'wrong_token'");
            database.connection().query_row(&sql, [], |row| row.get(0)).unwrap()
        };
        write("limit_set", 50);
        write(WRONG_TOKEN, 12_000);
        assert_eq!((count("<>"), count("=")), (50, 1_050));
        write("limit_set", 11_000);
        assert!((10_000..=10_100).contains(&count("<>")), "{}", count("<>"));
        let newest = read_audit(&path, 3).unwrap();
        assert_eq!(newest, [10_999, 10_998, 10_997].map(|n| entry("limit_set", n)));
    }
}
