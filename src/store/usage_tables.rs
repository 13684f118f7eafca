//! The tables of the usage history: a pair for environments, and a pair for upstreams with limits.

use super::database::{Database, Transaction, signed, unsigned};
use crate::clock::Timestamp;
use crate::ledger::{UPSTREAM_PREFIX, UsageRow};
use crate::quota::Amounts;
use rusqlite::{TransactionBehavior, params};

/// The tables of upstreams exist from this version of the schema on.
const VERSION_OF_UPSTREAMS: i64 = 5;
const MINUTES_PER_DAY: i64 = 1_440;
/// Maximum number of usage rows that one merge removes, so that a commit of a request has to wait only briefly.
const MAX_MERGED_ROWS: i64 = 2_000;

/// Whose usage a pair of tables has. One table has it by minute, the other one by day.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum UsageTables {
    /// Of environments, by model and caller.
    Environments,
    /// Of upstreams with limits, by model.
    Upstreams,
}

/// Adds a row to a table. Parameters: the minute, the owner, the model, the caller, and five counts.
macro_rules! add_row {
    ($table:literal, $key:literal) => {
        concat!(
            "INSERT INTO ",
            $table,
            " VALUES (",
            $key,
            ", ?5, ?6, ?7, ?8, ?9) ON CONFLICT DO UPDATE SET requests = requests + excluded.requests,
                 rejections = rejections + excluded.rejections,
                 prompt_tokens = prompt_tokens + excluded.prompt_tokens,
                 completion_tokens = completion_tokens + excluded.completion_tokens,
                 total_tokens = total_tokens + excluded.total_tokens"
        )
    };
}

impl UsageTables {
    const ALL: [Self; 2] = [Self::Environments, Self::Upstreams];

    /// The tables with the usage of an account, and the name of its owner there.
    pub(super) fn of_account(name: &str) -> (Self, &str) {
        match name.strip_prefix(UPSTREAM_PREFIX) {
            Some(upstream) => (Self::Upstreams, upstream),
            None => (Self::Environments, name),
        }
    }

    pub(super) fn by_minute(self) -> &'static str {
        match self {
            Self::Environments => "usage",
            Self::Upstreams => "upstream_usage",
        }
    }

    pub(super) fn by_day(self) -> &'static str {
        match self {
            Self::Environments => "usage_daily",
            Self::Upstreams => "upstream_usage_daily",
        }
    }

    /// The column with the name of the environment or the upstream.
    pub(super) fn owner(self) -> &'static str {
        match self {
            Self::Environments => "environment",
            Self::Upstreams => "upstream",
        }
    }

    /// The caller, as an expression.
    pub(super) fn caller(self) -> &'static str {
        match self {
            Self::Environments => "caller",
            Self::Upstreams => "''",
        }
    }

    /// The columns of the primary key after the time.
    fn key(self) -> &'static str {
        match self {
            Self::Environments => "environment, model, caller",
            Self::Upstreams => "upstream, model",
        }
    }

    fn key_descending(self) -> &'static str {
        match self {
            Self::Environments => "environment DESC, model DESC, caller DESC",
            Self::Upstreams => "upstream DESC, model DESC",
        }
    }

    fn add_row(self) -> &'static str {
        match self {
            Self::Environments => add_row!("usage", "?1, ?2, ?3, ?4"),
            Self::Upstreams => add_row!("upstream_usage", "?1, ?2, ?3"),
        }
    }
}

/// The usage of one model by one caller.
#[derive(Debug)]
pub(super) struct Used {
    pub(super) model: String,
    /// Empty for an upstream.
    pub(super) caller: String,
    pub(super) amounts: Amounts,
}

impl Database {
    /// Whether the file has these tables. A file of an earlier version that was opened read-only may lack them.
    pub(super) fn has(&self, tables: UsageTables) -> rusqlite::Result<bool> {
        if tables == UsageTables::Environments {
            return Ok(true);
        }
        let version: i64 = self.connection().pragma_query_value(None, "user_version", |row| row.get(0))?;
        Ok(version >= VERSION_OF_UPSTREAMS)
    }

    /// The usage of an account between two times, by model and caller. It is exact to the minute, or to the day where the
    /// rows are merged into days.
    pub(super) fn used_between(
        &self,
        account: &str,
        from: Timestamp,
        to: Timestamp,
    ) -> rusqlite::Result<Vec<Used>> {
        let (tables, owner) = UsageTables::of_account(account);
        if !self.has(tables)? {
            return Ok(Vec::new());
        }
        let (minutes, days, caller) = (tables.by_minute(), tables.by_day(), tables.caller());
        let column = tables.owner();
        let mut read = self.connection().prepare(&format!(
            "SELECT model, caller, sum(requests), sum(prompt_tokens), sum(completion_tokens), sum(total_tokens)
             FROM (SELECT {column} AS owner, model, {caller} AS caller, requests, prompt_tokens, completion_tokens, total_tokens
                   FROM {minutes} WHERE minute >= ?2 AND minute < ?3
                   UNION ALL
                   SELECT {column}, model, {caller}, requests, prompt_tokens, completion_tokens, total_tokens
                   FROM {days} WHERE (day + 1) * ?4 > ?2 AND day * ?4 < ?3)
             WHERE owner = ?1 GROUP BY model, caller",
        ))?;
        let minute = |at: Timestamp| at.0.div_euclid(60_000);
        let between = params![owner, minute(from), minute(to), MINUTES_PER_DAY];
        let rows = read.query_map(between, |row| {
            let n = |at: usize| row.get(at).map(unsigned);
            let amounts = Amounts { requests: n(2)?, prompt: n(3)?, completion: n(4)?, total: n(5)? };
            Ok(Used { model: row.get(0)?, caller: row.get(1)?, amounts })
        })?;
        rows.collect()
    }

    /// Merges some of the oldest rows before this minute into rows per day, in both pairs of tables. Returns whether it
    /// merged any.
    pub(super) fn merge_oldest_usage(&mut self, before_minute: i64) -> rusqlite::Result<bool> {
        let mut has_merged = false;
        for tables in UsageTables::ALL {
            has_merged |= self.merge_oldest(tables, before_minute)?;
        }
        Ok(has_merged)
    }

    /// Merges the oldest rows before this minute into one row per day and key: rows of one day, at most
    /// [`MAX_MERGED_ROWS`]. Returns whether it merged any.
    fn merge_oldest(&mut self, tables: UsageTables, before_minute: i64) -> rusqlite::Result<bool> {
        let (minutes, days) = (tables.by_minute(), tables.by_day());
        let (key, descending) = (tables.key(), tables.key_descending());
        let first = format!("SELECT min(minute) FROM {minutes}");
        let oldest: Option<i64> = self.connection().query_row(&first, [], |row| row.get(0))?;
        let Some(oldest) = oldest.filter(|&minute| minute < before_minute) else { return Ok(false) };
        let day = oldest.div_euclid(MINUTES_PER_DAY);
        let end = before_minute.min((day + 1) * MINUTES_PER_DAY);
        let transaction = self.connection_mut().transaction_with_behavior(TransactionBehavior::Immediate)?;
        // The temporary table contains the key of the last row to merge, in the order of the primary key.
        transaction
            .execute_batch(&format!("CREATE TEMP TABLE IF NOT EXISTS merged_{minutes} (minute, {key})"))?;
        transaction.execute(&format!("DELETE FROM temp.merged_{minutes}"), [])?;
        transaction.execute(
            &format!(
                "INSERT INTO temp.merged_{minutes} SELECT minute, {key} FROM (
                     SELECT minute, {key} FROM {minutes} WHERE minute < ?1 ORDER BY minute, {key} LIMIT ?2
                 ) ORDER BY minute DESC, {descending} LIMIT 1"
            ),
            [end, MAX_MERGED_ROWS],
        )?;
        let is_merged = format!("(minute, {key}) <= (SELECT minute, {key} FROM temp.merged_{minutes})");
        transaction.execute(
            &format!(
                "INSERT INTO {days}
                 SELECT ?1, {key}, sum(requests), sum(rejections), sum(prompt_tokens), sum(completion_tokens),
                        sum(total_tokens)
                 FROM {minutes} WHERE {is_merged} GROUP BY {key}
                 ON CONFLICT DO UPDATE SET requests = requests + excluded.requests,
                     rejections = rejections + excluded.rejections,
                     prompt_tokens = prompt_tokens + excluded.prompt_tokens,
                     completion_tokens = completion_tokens + excluded.completion_tokens,
                     total_tokens = total_tokens + excluded.total_tokens"
            ),
            [day],
        )?;
        transaction.execute(&format!("DELETE FROM {minutes} WHERE {is_merged}"), [])?;
        transaction.commit()?;
        Ok(true)
    }
}

impl Transaction<'_> {
    /// Adds usage of an account.
    pub(super) fn usage(
        &self,
        account: &str,
        model: &str,
        caller: &str,
        row: &UsageRow,
    ) -> rusqlite::Result<()> {
        let (tables, owner) = UsageTables::of_account(account);
        let mut write = self.connection().prepare_cached(tables.add_row())?;
        write.execute(params![
            row.minute,
            owner,
            model,
            caller,
            signed(row.spent.requests),
            signed(row.rejections),
            signed(row.spent.prompt),
            signed(row.spent.completion),
            signed(row.spent.total),
        ])?;
        Ok(())
    }
}
