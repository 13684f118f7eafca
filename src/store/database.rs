//! The SQLite file: its schema and all SQL statements.

use super::stored_quota::{limit_of, stored_limit, stored_quota};
use super::window_name;
use crate::calibrations::SavedCalibration;
use crate::clock::Timestamp;
use crate::estimate::{CalibrationSample, RequestKind};
use crate::ledger::{EnforceOverride, LimitOverride, OverrideOrigin, OverrideSet, Totals};
use crate::quota::{Amounts, PersistedCounter, Quota};
use anyhow::Context as _;
use rusqlite::{Connection, ErrorCode, OptionalExtension as _, params};
use std::path::Path;
use std::time::Duration;

/// The scripts that bring a file from each version to the next one. The first script creates the tables.
const SCHEMA: [&str; 6] = [
    include_str!("schema/1.sql"),
    include_str!("schema/2.sql"),
    include_str!("schema/3.sql"),
    include_str!("schema/4.sql"),
    include_str!("schema/5.sql"),
    include_str!("schema/6.sql"),
];
/// SQLite's application id of a Tollgate store: the letters "Tllg".
const APPLICATION_ID: i64 = 0x546c_6c67;
/// How long a statement waits for the lock of another process, for example of an SQLite shell.
const BUSY_TIMEOUT: Duration = Duration::from_millis(500);
/// SQLite writes the WAL back to the file when it has this many pages of 4 KiB: 16 MiB.
const CHECKPOINT_PAGES: i64 = 4_096;

/// A limit that an administrator has set, as the store has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct StoredOverride {
    pub(crate) environment: String,
    /// `environment`, `caller` or `model`.
    pub(crate) scope: String,
    /// The caller's name or the pattern of the models; empty for the environment.
    pub(crate) name: String,
    pub(crate) kind: String,
    /// The period as the config writes it.
    pub(crate) per: String,
    /// [`UNLIMITED`] if it is.
    pub(crate) limit: u64,
    pub(crate) burst: u64,
    pub(crate) until: Option<Timestamp>,
}

/// Whether quotas are enforced, where an administrator has set it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct StoredEnforce {
    pub(crate) environment: String,
    pub(crate) enforce: bool,
    pub(crate) until: Option<Timestamp>,
}

/// Everything that administrators have set, in all environments.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct StoredOverrides {
    pub(crate) limits: Vec<StoredOverride>,
    pub(crate) enforce: Vec<StoredEnforce>,
}

/// An open store file.
#[derive(Debug)]
pub(super) struct Database(Connection);

impl Database {
    /// Opens the file and brings its schema up to date. `path` is the path from the config, which may be a link to
    /// `file`. Error messages contain it.
    pub(super) fn open(file: &Path, path: &Path) -> anyhow::Result<Self> {
        let at = path.display();
        let fix = |e: &rusqlite::Error| match e.sqlite_error_code() {
            Some(ErrorCode::NotADatabase | ErrorCode::DatabaseCorrupt) => {
                "it is damaged or not a store of Tollgate: move it away to start with full quotas, or restore a copy"
            }
            Some(ErrorCode::ReadOnly | ErrorCode::PermissionDenied | ErrorCode::CannotOpen) => {
                "it cannot be written: make the file and its folder writable, or set another path"
            }
            Some(ErrorCode::DiskFull) => "the disk is full: make room, or set another path",
            _ => "set another path, or set store.memory: true to store nothing",
        };
        let connection = Self::prepare(file).map_err(|e| match e.downcast::<rusqlite::Error>() {
            Ok(e) => {
                let fix = fix(&e);
                anyhow::Error::new(e).context(format!("store.path, {at}, cannot be used: {fix}"))
            }
            Err(e) => e.context(format!("store.path, {at}, cannot be used")),
        })?;
        Ok(Self(connection))
    }

    fn prepare(path: &Path) -> anyhow::Result<Connection> {
        let db = Connection::open(path)?;
        db.busy_timeout(BUSY_TIMEOUT)?;
        db.set_prepared_statement_cache_capacity(32);
        let version: i64 = db.pragma_query_value(None, "user_version", |row| row.get(0))?;
        let application: i64 = db.pragma_query_value(None, "application_id", |row| row.get(0))?;
        let tables: i64 = db.query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0))?;
        let known = SCHEMA.len();
        if application == APPLICATION_ID && usize::try_from(version).is_ok_and(|version| version > known) {
            anyhow::bail!(
                "it has version {version}, but this Tollgate supports versions up to {known}: run the newer Tollgate, or set another path"
            );
        }
        if tables > 0 && application != APPLICATION_ID {
            anyhow::bail!("it is a database of another program: set another path");
        }
        // `journal_mode` answers with a row.
        db.pragma_update_and_check(None, "journal_mode", "wal", |_| Ok(()))?;
        db.pragma_update(None, "synchronous", "normal")?;
        db.pragma_update(None, "wal_autocheckpoint", CHECKPOINT_PAGES)?;
        if tables > 0 {
            Self::check(&db)?;
        }
        Self::migrate(&db, if tables > 0 { usize::try_from(version)? } else { 0 })?;
        Ok(db)
    }

    /// Brings the schema to the current version in one transaction.
    fn migrate(db: &Connection, version: usize) -> anyhow::Result<()> {
        if version == SCHEMA.len() {
            return Ok(());
        }
        let transaction = db.unchecked_transaction()?;
        for step in &SCHEMA[version..] {
            transaction.execute_batch(step)?;
        }
        transaction.pragma_update(None, "user_version", i64::try_from(SCHEMA.len())?)?;
        transaction.pragma_update(None, "application_id", APPLICATION_ID)?;
        transaction.commit().context("it has an older version and cannot be migrated")
    }

    /// Opens the file read-only, also while a gateway uses it.
    pub(super) fn open_read_only(path: &Path) -> rusqlite::Result<Self> {
        let db = Connection::open_with_flags(path, rusqlite::OpenFlags::SQLITE_OPEN_READ_ONLY)?;
        db.busy_timeout(BUSY_TIMEOUT)?;
        Ok(Self(db))
    }

    /// The connection, for statements of other files.
    pub(super) fn connection(&self) -> &Connection {
        &self.0
    }

    pub(super) fn connection_mut(&mut self) -> &mut Connection {
        &mut self.0
    }

    /// Detects a damaged or read-only file at start, before the first request does. It checks the small tables and not
    /// the usage history, which may be large.
    fn check(db: &Connection) -> anyhow::Result<()> {
        for table in ["quota", "totals", "limit_override"] {
            let mut check = db.prepare(&format!("PRAGMA quick_check({table})"))?;
            let result: String = check.query_row([], |row| row.get(0))?;
            anyhow::ensure!(
                result == "ok",
                "it is damaged ({result}): move it away to start with full quotas"
            );
        }
        // A write that changes nothing.
        let written = db.execute_batch("BEGIN IMMEDIATE; UPDATE totals SET requests = requests; COMMIT");
        match written {
            // The gateway starts in spite of a full disk. Counters stay in memory until there is space.
            Err(e) if e.sqlite_error_code() == Some(ErrorCode::DiskFull) => {
                tracing::error!(
                    "the disk of store.path is full: counters stay in memory until there is space; make room or set another path"
                );
                drop(db.execute_batch("ROLLBACK"));
                Ok(())
            }
            other => other.context("a test write failed"),
        }
    }

    /// The saved states of all quotas of an environment, also of those that its config no longer has. A calendar quota
    /// has no time zone here.
    pub(super) fn quotas(&self, environment: &str) -> rusqlite::Result<Vec<(Quota, PersistedCounter)>> {
        let mut read = self.0.prepare(
            r#"SELECT scope, name, kind, per_ms, "window", per, "limit", used, level_fraction, held, at_ms, until_ms,
                      clock_used, clock_at_ms, coalesce(excess, 0), coalesce(excess_until_ms, 0), coalesce(is_removed, 0)
               FROM quota LEFT JOIN quota_facts USING (environment, scope, name, kind, per_ms, "window")
               WHERE environment = ?"#,
        )?;
        let rows = read.query_map([environment], |row| {
            let counter = PersistedCounter {
                used: row.get(7)?,
                level_fraction: unsigned(row.get(8)?),
                held: unsigned(row.get(9)?),
                at: Timestamp(row.get(10)?),
                until: Timestamp(row.get(11)?),
                clock_used: unsigned(row.get(12)?),
                clock_at: Timestamp(row.get(13)?),
                excess: unsigned(row.get(14)?),
                excess_until: Timestamp(row.get(15)?),
                is_removed: row.get(16)?,
            };
            Ok(stored_quota(row, environment)?.map(|quota| (quota, counter)))
        })?;
        rows.filter_map(Result::transpose).collect()
    }

    /// The overrides of an environment, also those of quotas that its config no longer has.
    pub(super) fn overrides(&self, environment: &str) -> rusqlite::Result<OverrideSet> {
        let mut read = self.0.prepare(
            r#"SELECT scope, name, kind, per_ms, "window", per, "limit", burst, set_by, since_ms, until_ms, reason
               FROM limit_override WHERE environment = ?"#,
        )?;
        let rows = read.query_map([environment], |row| {
            let (burst, origin) = (limit_of(row.get(7)?), origin(row, 8)?);
            let of_quota = |quota: Quota| {
                let quota = quota.with_limit(quota.limit, burst);
                LimitOverride { quota, origin }
            };
            Ok(stored_quota(row, environment)?.map(of_quota))
        })?;
        let limits = rows.filter_map(Result::transpose).collect::<rusqlite::Result<_>>()?;
        let mut read = self.0.prepare(
            "SELECT enforce, set_by, since_ms, until_ms, reason FROM enforce_override WHERE environment = ?",
        )?;
        let enforce = read.query_row([environment], |row| {
            Ok(EnforceOverride { enforce: row.get(0)?, origin: origin(row, 1)? })
        });
        Ok(OverrideSet { limits, enforce: enforce.optional()? })
    }

    /// Everything that administrators have set, also in a file of an earlier version.
    pub(super) fn stored_overrides(&self) -> rusqlite::Result<StoredOverrides> {
        let version: i64 = self.0.pragma_query_value(None, "user_version", |row| row.get(0))?;
        let has_ends = version >= 4;
        let limits = self.stored_limits(if has_ends { "until_ms" } else { "NULL" })?;
        let enforce = if has_ends { self.stored_enforce()? } else { Vec::new() };
        Ok(StoredOverrides { limits, enforce })
    }

    fn stored_enforce(&self) -> rusqlite::Result<Vec<StoredEnforce>> {
        let mut read =
            self.0.prepare("SELECT environment, enforce, until_ms FROM enforce_override ORDER BY 1")?;
        let rows = read.query_map([], |row| {
            let until = row.get::<_, Option<i64>>(2)?.map(Timestamp);
            Ok(StoredEnforce { environment: row.get(0)?, enforce: row.get(1)?, until })
        })?;
        rows.collect()
    }

    /// `until`: the column with the end.
    fn stored_limits(&self, until: &str) -> rusqlite::Result<Vec<StoredOverride>> {
        let mut read = self.0.prepare(&format!(
            r#"SELECT environment, scope, name, kind, per, "limit", burst, {until} FROM limit_override
               ORDER BY environment, scope, name, kind, per_ms"#,
        ))?;
        let rows = read.query_map([], |row| {
            Ok(StoredOverride {
                environment: row.get(0)?,
                scope: row.get(1)?,
                name: row.get(2)?,
                kind: row.get(3)?,
                per: row.get(4)?,
                limit: limit_of(row.get(5)?),
                burst: limit_of(row.get(6)?),
                until: row.get::<_, Option<i64>>(7)?.map(Timestamp),
            })
        })?;
        rows.collect()
    }

    /// The totals of an environment, and what requests in flight held.
    pub(super) fn totals(&self, environment: &str) -> rusqlite::Result<(Totals, Amounts)> {
        let mut read = self.0.prepare_cached(
            "SELECT requests, rejected, prompt_tokens, completion_tokens, total_tokens,
                    held_requests, held_prompt, held_completion, held_total
             FROM totals WHERE environment = ?",
        )?;
        let found = read.query_row([environment], |row| {
            let n = |at: usize| row.get(at).map(unsigned);
            let totals =
                Totals { requests: n(0)?, rejected: n(1)?, prompt: n(2)?, completion: n(3)?, total: n(4)? };
            Ok((totals, Amounts { requests: n(5)?, prompt: n(6)?, completion: n(7)?, total: n(8)? }))
        });
        Ok(found.optional()?.unwrap_or_default())
    }

    /// All saved calibrations.
    pub(super) fn calibrations(&self) -> rusqlite::Result<Vec<SavedCalibration>> {
        let mut read = self.0.prepare("SELECT upstream, model, kind, answers FROM calibration")?;
        let rows = read.query_map([], |row| {
            let (model, kind, answers): (String, String, String) = (row.get(1)?, row.get(2)?, row.get(3)?);
            let known = RequestKind::ALL.into_iter().find(|known| known.as_str() == kind);
            let pairs = answers.split(' ').filter_map(|pair| {
                let (estimated, reported) = pair.split_once(':')?;
                Some(CalibrationSample {
                    estimated: estimated.parse().ok()?,
                    reported: reported.parse().ok()?,
                })
            });
            let upstream = row.get(0)?;
            Ok(known.map(|kind| SavedCalibration {
                upstream,
                model: model.into(),
                kind,
                answers: pairs.collect(),
            }))
        })?;
        rows.filter_map(Result::transpose).collect()
    }

    /// Runs `write` in one transaction and commits it.
    pub(super) fn commit(
        &self,
        write: impl FnOnce(&Transaction<'_>) -> rusqlite::Result<()>,
    ) -> rusqlite::Result<()> {
        // Cached statements, because this runs a thousand times a second. The transactions of rusqlite prepare theirs
        // each time.
        self.0.prepare_cached("BEGIN IMMEDIATE")?.execute([])?;
        let written = write(&Transaction(&self.0)).and_then(|()| {
            self.0.prepare_cached("COMMIT")?.execute([])?;
            Ok(())
        });
        if written.is_err() && !self.0.is_autocommit() {
            // The first error is returned. A failed rollback adds no information.
            drop(self.0.execute_batch("ROLLBACK"));
        }
        written
    }
}

/// The statements of one commit.
pub(super) struct Transaction<'a>(&'a Connection);

impl Transaction<'_> {
    /// The connection, for statements of other files.
    pub(super) fn connection(&self) -> &Connection {
        self.0
    }

    pub(super) fn quota(
        &self,
        environment: &str,
        quota: &Quota,
        saved: &PersistedCounter,
    ) -> rusqlite::Result<()> {
        let mut write = self.0.prepare_cached(
            "INSERT OR REPLACE INTO quota VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        )?;
        write.execute(params![
            environment,
            quota.scope.as_str(),
            quota.scope.name(),
            quota.kind.as_str(),
            signed(quota.per.ms),
            window_name(quota),
            quota.per.text,
            stored_limit(quota.limit),
            saved.used,
            signed(saved.level_fraction),
            signed(saved.held),
            saved.at.0,
            saved.until.0,
            signed(saved.clock_used),
            saved.clock_at.0,
        ])?;
        self.quota_facts(environment, quota, saved)
    }

    fn quota_facts(
        &self,
        environment: &str,
        quota: &Quota,
        saved: &PersistedCounter,
    ) -> rusqlite::Result<()> {
        if saved.excess == 0 && !saved.is_removed {
            return self.remove_from("quota_facts", environment, quota);
        }
        let mut write =
            self.0.prepare_cached("INSERT OR REPLACE INTO quota_facts VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)")?;
        write.execute(params![
            environment,
            quota.scope.as_str(),
            quota.scope.name(),
            quota.kind.as_str(),
            signed(quota.per.ms),
            window_name(quota),
            signed(saved.excess),
            saved.excess_until.0,
            saved.is_removed,
        ])?;
        Ok(())
    }

    /// Removes the state of a quota that another one has replaced.
    pub(super) fn remove_quota(&self, environment: &str, quota: &Quota) -> rusqlite::Result<()> {
        self.remove_from("quota", environment, quota)?;
        self.remove_from("quota_facts", environment, quota)
    }

    fn remove_from(&self, table: &str, environment: &str, quota: &Quota) -> rusqlite::Result<()> {
        let mut remove = self.0.prepare_cached(&format!(
            r#"DELETE FROM {table}
               WHERE environment = ? AND scope = ? AND name = ? AND kind = ? AND per_ms = ? AND "window" = ?"#
        ))?;
        remove.execute(params![
            environment,
            quota.scope.as_str(),
            quota.scope.name(),
            quota.kind.as_str(),
            signed(quota.per.ms),
            window_name(quota),
        ])?;
        Ok(())
    }

    pub(super) fn totals(&self, environment: &str, totals: &Totals, held: &Amounts) -> rusqlite::Result<()> {
        let mut write =
            self.0.prepare_cached("INSERT OR REPLACE INTO totals VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)")?;
        write.execute(params![
            environment,
            signed(totals.requests),
            signed(totals.rejected),
            signed(totals.prompt),
            signed(totals.completion),
            signed(totals.total),
            signed(held.requests),
            signed(held.prompt),
            signed(held.completion),
            signed(held.total),
        ])?;
        Ok(())
    }

    pub(super) fn overrides(&self, environment: &str, all: &OverrideSet) -> rusqlite::Result<()> {
        self.0.execute("DELETE FROM limit_override WHERE environment = ?", [environment])?;
        for LimitOverride { quota, origin } in &all.limits {
            self.0.execute(
                "INSERT OR REPLACE INTO limit_override VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                params![
                    environment,
                    quota.scope.as_str(),
                    quota.scope.name(),
                    quota.kind.as_str(),
                    signed(quota.per.ms),
                    window_name(quota),
                    quota.per.text,
                    stored_limit(quota.limit),
                    stored_limit(quota.capacity()),
                    origin.by,
                    origin.since.0,
                    origin.until.map(|until| until.0),
                    origin.reason,
                ],
            )?;
        }
        self.0.execute("DELETE FROM enforce_override WHERE environment = ?", [environment])?;
        if let Some(EnforceOverride { enforce, origin }) = &all.enforce {
            let OverrideOrigin { by, since, until, reason } = origin;
            let until = until.map(|until| until.0);
            self.0.execute(
                "INSERT INTO enforce_override VALUES (?, ?, ?, ?, ?, ?)",
                params![environment, enforce, by, since.0, until, reason],
            )?;
        }
        Ok(())
    }

    pub(super) fn calibration(&self, calibration: &SavedCalibration) -> rusqlite::Result<()> {
        let SavedCalibration { upstream, model, kind, answers } = calibration;
        if answers.is_empty() {
            let mut delete = self
                .0
                .prepare_cached("DELETE FROM calibration WHERE upstream = ? AND model = ? AND kind = ?")?;
            return delete.execute(params![upstream, model, kind.as_str()]).map(drop);
        }
        let pairs: Vec<String> = answers.iter().map(|p| format!("{}:{}", p.estimated, p.reported)).collect();
        let mut write = self.0.prepare_cached("INSERT OR REPLACE INTO calibration VALUES (?, ?, ?, ?)")?;
        write.execute(params![upstream, model, kind.as_str(), pairs.join(" ")]).map(drop)
    }
}

/// Who set an override: four columns, from this one on.
fn origin(row: &rusqlite::Row<'_>, at: usize) -> rusqlite::Result<OverrideOrigin> {
    let until: Option<i64> = row.get(at + 2)?;
    Ok(OverrideOrigin {
        by: row.get(at)?,
        since: Timestamp(row.get(at + 1)?),
        until: until.map(Timestamp),
        reason: row.get(at + 3)?,
    })
}

pub(super) fn signed(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

pub(super) fn unsigned(n: i64) -> u64 {
    u64::try_from(n).unwrap_or(0)
}
