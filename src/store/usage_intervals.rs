//! The usage history of the requests that one quota applies to.

use super::database::{Database, unsigned};
use super::usage_tables::UsageTables;
use crate::clock::Timestamp;
use crate::ledger::UsageInterval;
use crate::quota::{Amounts, Scope};
use anyhow::Context as _;
use std::collections::BTreeMap;
use std::path::Path;

const MINUTE_MS: i64 = 60_000;

/// Reads the usage of an account, of one of its callers, or of the models that match a pattern, from `from` until `now`: by
/// minute in the last hour, before that by hour, and by day where the store has days only. Sorted by begin. Works also while
/// a gateway uses the file. `account`: as [`Owner::key`](crate::ledger::Owner::key) returns it.
///
/// Usage of models without a separate entry is stored as model `other`.
///
/// # Errors
/// The file cannot be read.
pub fn read(
    path: &Path,
    account: &str,
    scope: &Scope,
    from: Timestamp,
    now: Timestamp,
) -> anyhow::Result<Vec<UsageInterval>> {
    let read = Database::open_read_only(path)
        .and_then(|database| database.usage_intervals(account, scope, from, now));
    read.with_context(|| format!("store.path, {}, cannot be read", path.display()))
}

impl Database {
    fn usage_intervals(
        &self,
        account: &str,
        scope: &Scope,
        from: Timestamp,
        now: Timestamp,
    ) -> rusqlite::Result<Vec<UsageInterval>> {
        let minute = |at: Timestamp| at.0.div_euclid(MINUTE_MS);
        let (first, last) = (minute(from), minute(now));
        let caller = match scope {
            Scope::Caller(name) => Some(&**name),
            _ => None,
        };
        let (tables, owner) = UsageTables::of_account(account);
        let (minutes, days, of_caller) = (tables.by_minute(), tables.by_day(), tables.caller());
        let column = tables.owner();
        // The names of tables and columns come from this program only.
        let model = if scope.models().is_some() { "model" } else { "NULL" };
        let sql = format!(
            "SELECT min(minute), max(minute) + 1, {model}, sum(rejections), sum(requests), sum(prompt_tokens),
                    sum(completion_tokens), sum(total_tokens)
             FROM {minutes}
             WHERE minute >= ?1 AND minute <= ?2 AND {column} = ?4 AND (?5 IS NULL OR {of_caller} = ?5)
             GROUP BY CASE WHEN minute >= ?3 THEN minute ELSE minute / 60 END, 3
             UNION ALL
             SELECT day * 1440, (day + 1) * 1440, {model}, sum(rejections), sum(requests), sum(prompt_tokens),
                    sum(completion_tokens), sum(total_tokens)
             FROM {days}
             WHERE day * 1440 >= ?1 AND day * 1440 < ?3 AND {column} = ?4 AND (?5 IS NULL OR {of_caller} = ?5)
             GROUP BY day, 3"
        );
        let hour = last.saturating_sub(60);
        let mut statement = self.connection().prepare(&sql)?;
        let mut rows = statement.query(rusqlite::params![first, last, hour, owner, caller])?;
        let mut intervals: BTreeMap<(i64, i64), (u64, Amounts)> = BTreeMap::new();
        while let Some(row) = rows.next()? {
            let applies = match scope.models() {
                Some(pattern) => pattern.matches(row.get_ref(2)?.as_str().unwrap_or_default()),
                None => true,
            };
            if !applies {
                continue;
            }
            let n = |at: usize| row.get(at).map(unsigned);
            let spent = Amounts { requests: n(4)?, prompt: n(5)?, completion: n(6)?, total: n(7)? };
            let (rejections, sum) = intervals.entry((row.get(0)?, row.get(1)?)).or_default();
            *rejections = rejections.saturating_add(n(3)?);
            *sum = sum.saturating_add(spent);
        }
        let at = |minute: i64| Timestamp(minute.saturating_mul(MINUTE_MS));
        let interval = |((start, end), (rejections, spent))| UsageInterval {
            start: at(start),
            end: at(end),
            rejections,
            spent,
        };
        Ok(intervals.into_iter().map(interval).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::glob::Glob;
    use crate::quota::UpstreamModels;

    /// 2026-08-05T02:30:00Z
    const NOW: i64 = 29_764_950;

    fn read_from(scope: &Scope, first_minute: i64) -> Vec<(i64, i64, u64, u64, u64)> {
        read_of("production", scope, first_minute)
    }

    fn read_of(account: &str, scope: &Scope, first_minute: i64) -> Vec<(i64, i64, u64, u64, u64)> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.db");
        let database = Database::open(&path, &path).unwrap();
        let row = |minute: i64, environment: &str, model: &str, caller: &str, requests: u64| {
            format!(
                "INSERT INTO usage VALUES ({minute}, '{environment}', '{model}', '{caller}', {requests}, 1, 10, 5, 15);"
            )
        };
        let rows = [
            row(NOW - 1_000, "production", "gpt-4o", "web", 1),
            row(NOW - 130, "production", "gpt-4o", "web", 2),
            row(NOW - 125, "production", "o3", "batch", 4),
            row(NOW - 59, "production", "gpt-4o", "web", 8),
            row(NOW - 59, "production", "o3", "batch", 16),
            row(NOW, "production", "gpt-4o-mini", "batch", 32),
            row(NOW - 1, "sandbox", "gpt-4o", "web", 64),
            "INSERT INTO usage_daily VALUES (20669, 'production', 'gpt-4o', 'web', 128, 1, 10, 5, 15);"
                .to_owned(),
            format!(
                "INSERT INTO upstream_usage VALUES
                    ({}, 'production', 'gpt-4o', 256, 1, 10, 5, 15), ({}, 'production', 'o3', 512, 1, 10, 5, 15),
                    ({}, 'other-upstream', 'o3', 1024, 1, 10, 5, 15);
                 INSERT INTO upstream_usage_daily VALUES (20669, 'production', 'gpt-4o', 2048, 1, 10, 5, 15);",
                NOW - 59,
                NOW - 1,
                NOW - 1
            ),
        ];
        database.connection().execute_batch(&rows.concat()).unwrap();
        let at = |minute: i64| Timestamp(minute * MINUTE_MS);
        let intervals = read(&path, account, scope, at(first_minute), at(NOW).plus_ms(30_000)).unwrap();
        let minutes = |at: Timestamp| at.0 / MINUTE_MS - NOW;
        intervals
            .iter()
            .map(|i| (minutes(i.start), minutes(i.end), i.spent.requests, i.rejections, i.spent.total))
            .collect()
    }

    #[test]
    fn usage_is_read_by_minute_hour_and_day() {
        let hour = [(-59, -58, 24, 2, 30), (0, 1, 32, 1, 15)];
        assert_eq!(read_from(&Scope::Environment, NOW - 60), hour);
        let earlier = [(-130, -124, 6, 2, 30)];
        assert_eq!(read_from(&Scope::Environment, NOW - 200), [&earlier[..], &hour].concat());
        let day = [(-1_590, -150, 128, 1, 15), (-1_000, -999, 1, 1, 15)];
        assert_eq!(read_from(&Scope::Environment, NOW - 2_000), [&day[..], &earlier, &hour].concat());
    }

    #[test]
    fn usage_of_a_caller_or_of_matching_models_is_read_alone() {
        let caller = Scope::Caller("batch".into());
        assert_eq!(read_from(&caller, NOW - 60), [(-59, -58, 16, 1, 15), (0, 1, 32, 1, 15)]);
        let models = Scope::Model(Glob::new("gpt-4o*"));
        assert_eq!(read_from(&models, NOW - 60), [(-59, -58, 8, 1, 15), (0, 1, 32, 1, 15)]);
        assert_eq!(read_from(&Scope::Model(Glob::new("claude-*")), NOW - 60), []);
    }

    #[test]
    fn usage_of_an_upstream_is_read_apart_from_that_of_an_environment_with_its_name() {
        let of_upstream = |scope, first| read_of("upstream:production", &scope, first);
        let all = Scope::Upstream("production".into());
        assert_eq!(of_upstream(all.clone(), NOW - 60), [(-59, -58, 256, 1, 15), (-1, 0, 512, 1, 15)]);
        assert_eq!(of_upstream(all, NOW - 2_000)[0], (-1_590, -150, 2_048, 1, 15));
        let models = Scope::UpstreamModel(UpstreamModels::new("production", Glob::new("o*")));
        assert_eq!(of_upstream(models, NOW - 60), [(-1, 0, 512, 1, 15)]);
    }
}
