//! Reports of the usage history, for the command line and the admin API.

use super::database::{Database, unsigned};
use super::usage_tables::UsageTables;
use crate::clock::Timestamp;
use anyhow::{Context as _, ensure};
use serde::Serialize;
use std::fmt;
use std::path::Path;

/// A report with more rows is refused: its reader should narrow it.
const MAX_ROWS: usize = 100_000;
const MINUTE_MS: i64 = 60_000;
const WEEK_MINUTES: i64 = 7 * 1_440;
/// Minutes from the Monday of the week of 1970-01-01, a Thursday, to that day.
const MONDAY_MINUTES: i64 = 3 * 1_440;

/// The length of one row of a report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ReportStep {
    /// This number of minutes, at least 1. Whole weeks begin on a Monday.
    Minutes(i64),
    /// A calendar month in UTC.
    Month,
}

/// A column that a report can be grouped by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ReportColumn {
    /// The environment's name.
    Environment,
    /// The upstream's name.
    Upstream,
    /// The name of the model.
    Model,
    /// The caller's name.
    Caller,
}

impl ReportColumn {
    pub(crate) const ALL: [Self; 4] = [Self::Environment, Self::Upstream, Self::Model, Self::Caller];

    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Environment => "environment",
            Self::Upstream => "upstream",
            Self::Model => "model",
            Self::Caller => "caller",
        }
    }
}

/// What a report contains.
#[derive(Clone, Debug)]
pub(crate) struct ReportQuery {
    /// Begin of the first row.
    pub(crate) from: Timestamp,
    /// End of the last row.
    pub(crate) to: Timestamp,
    pub(crate) step: ReportStep,
    pub(crate) subject: ReportSubject,
}

/// Whose usage a report contains, and its columns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ReportSubject {
    tables: UsageTables,
    /// Only this environment or upstream.
    owner: Option<String>,
    pub(crate) group_by: Vec<ReportColumn>,
}

impl ReportSubject {
    /// Why a subject is not valid.
    pub(crate) const FAULT: &'static str =
        "the usage of upstreams has no environments and no callers: group it by upstream or model";

    /// A report of environments, or of upstreams if one is named or the report is grouped by them. `None`: it combines
    /// upstreams with environments or callers, see [`Self::FAULT`].
    pub(crate) fn new(
        group_by: Option<Vec<ReportColumn>>,
        environment: Option<String>,
        upstream: Option<String>,
    ) -> Option<Self> {
        let has = |column| group_by.as_ref().is_some_and(|columns| columns.contains(&column));
        if upstream.is_none() && !has(ReportColumn::Upstream) {
            let group_by = group_by.unwrap_or_else(|| vec![ReportColumn::Environment]);
            return Some(Self { tables: UsageTables::Environments, owner: environment, group_by });
        }
        if environment.is_some() || has(ReportColumn::Environment) || has(ReportColumn::Caller) {
            return None;
        }
        let group_by = group_by.unwrap_or_else(|| vec![ReportColumn::Upstream]);
        Some(Self { tables: UsageTables::Upstreams, owner: upstream, group_by })
    }
}

/// The usage of one group in one step. A column that the report is not grouped by is `None`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub(crate) struct ReportRow {
    /// Begin of the step, in UTC.
    pub(crate) from: String,
    pub(crate) environment: Option<String>,
    /// Only in a report that is grouped by upstreams.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) upstream: Option<String>,
    pub(crate) model: Option<String>,
    pub(crate) caller: Option<String>,
    pub(crate) requests: u64,
    pub(crate) rejected: u64,
    pub(crate) prompt_tokens: u64,
    pub(crate) completion_tokens: u64,
    pub(crate) total_tokens: u64,
}

impl ReportRow {
    /// The names of the columns, in the order of the fields.
    const COLUMNS: [&'static str; 10] = [
        "from",
        "environment",
        "upstream",
        "model",
        "caller",
        "requests",
        "rejected",
        "prompt_tokens",
        "completion_tokens",
        "total_tokens",
    ];

    fn is_same_group(&self, other: &Self) -> bool {
        let group = |row: &Self| [&row.environment, &row.upstream, &row.model, &row.caller].map(Clone::clone);
        self.from == other.from && group(self) == group(other)
    }

    fn add(&mut self, other: &Self) {
        self.requests += other.requests;
        self.rejected += other.rejected;
        self.prompt_tokens += other.prompt_tokens;
        self.completion_tokens += other.completion_tokens;
        self.total_tokens += other.total_tokens;
    }
}

/// Reads a report from a store file, also while a gateway uses the file.
///
/// Usage older than `store.history` is stored per day. It counts at the start of its day.
///
/// # Errors
/// The file cannot be read, or the report would have too many rows.
pub(crate) fn read(path: &Path, query: &ReportQuery) -> anyhow::Result<Vec<ReportRow>> {
    let read = Database::open_read_only(path).and_then(|database| database.usage_report(query));
    let rows = read.with_context(|| format!("store.path, {}, cannot be read", path.display()))?;
    ensure!(rows.len() <= MAX_ROWS, TooManyRows);
    Ok(if query.step == ReportStep::Month { by_month(rows) } else { rows })
}

/// A report has more rows than an answer may have.
#[derive(Debug)]
pub(crate) struct TooManyRows;

impl fmt::Display for TooManyRows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "the report has more than {MAX_ROWS} rows: choose a shorter time, longer steps or fewer columns"
        )
    }
}

impl std::error::Error for TooManyRows {}

impl Database {
    fn usage_report(&self, query: &ReportQuery) -> rusqlite::Result<Vec<ReportRow>> {
        let ReportSubject { tables, owner, group_by } = &query.subject;
        if !self.has(*tables)? {
            return Ok(Vec::new());
        }
        let column = |column: ReportColumn| if group_by.contains(&column) { column.as_str() } else { "NULL" };
        let [environment, upstream, model, caller] = ReportColumn::ALL.map(column);
        let (minutes, days) = (tables.by_minute(), tables.by_day());
        let (of_owner, of_caller) = (tables.owner(), tables.caller());
        // The names of tables and columns come from this program only.
        let sql = format!(
            "SELECT (minute + ?6) / ?3 * ?3 - ?6 AS step, {environment}, {upstream}, {model}, {caller}, sum(requests), sum(rejections),
                    sum(prompt_tokens), sum(completion_tokens), sum(total_tokens)
             FROM (SELECT minute, {of_owner}, model, {of_caller} AS caller, requests, rejections, prompt_tokens,
                          completion_tokens, total_tokens
                   FROM {minutes} WHERE minute >= ?1 AND minute < ?2
                   UNION ALL
                   SELECT day * 1440, {of_owner}, model, {of_caller}, requests, rejections, prompt_tokens,
                          completion_tokens, total_tokens
                   FROM {days} WHERE day * 1440 >= ?1 AND day * 1440 < ?2)
             WHERE ?4 IS NULL OR {of_owner} = ?4
             GROUP BY 1, 2, 3, 4, 5 ORDER BY 1, 2, 3, 4, 5 LIMIT ?5"
        );
        let step = match query.step {
            ReportStep::Minutes(minutes) => minutes.max(1),
            ReportStep::Month => 1_440,
        };
        let offset = if step % WEEK_MINUTES == 0 { MONDAY_MINUTES } else { 0 };
        let minute = |at: Timestamp| at.0.div_euclid(MINUTE_MS);
        let limit = i64::try_from(MAX_ROWS).unwrap_or(i64::MAX).saturating_add(1);
        let mut read = self.connection().prepare(&sql)?;
        let parameters = rusqlite::params![minute(query.from), minute(query.to), step, owner, limit, offset];
        let rows = read.query_map(parameters, |row| {
            let n = |at: usize| row.get(at).map(unsigned);
            let minute: i64 = row.get(0)?;
            Ok(ReportRow {
                from: Timestamp(minute.saturating_mul(MINUTE_MS)).to_rfc3339(),
                environment: row.get(1)?,
                upstream: row.get(2)?,
                model: row.get(3)?,
                caller: row.get(4)?,
                requests: n(5)?,
                rejected: n(6)?,
                prompt_tokens: n(7)?,
                completion_tokens: n(8)?,
                total_tokens: n(9)?,
            })
        })?;
        rows.collect()
    }
}

/// Adds up the days of each month. `days` is sorted by time.
fn by_month(days: Vec<ReportRow>) -> Vec<ReportRow> {
    let mut months: Vec<ReportRow> = Vec::new();
    let mut first_of_month = 0;
    for mut day in days {
        let month = day.from.get(..7).unwrap_or_default();
        day.from = format!("{month}-01T00:00:00Z");
        if months.last().is_some_and(|last| last.from != day.from) {
            first_of_month = months.len();
        }
        match months[first_of_month..].iter_mut().find(|known| known.is_same_group(&day)) {
            Some(known) => known.add(&day),
            None => months.push(day),
        }
    }
    months
}

/// Reads a moment: `2026-11-28T10:00:00Z` with any offset, `2026-11-28T10:00` or `2026-11-28` in UTC, or a duration,
/// which means that long before `now`.
pub(crate) fn parse_moment(text: &str, now: Timestamp) -> Option<Timestamp> {
    if let Some(ago) = crate::config::duration(text) {
        let ms = i64::try_from(ago.as_millis()).ok()?;
        return Some(Timestamp(now.0.saturating_sub(ms)));
    }
    let moment = text.parse::<jiff::Timestamp>().ok().or_else(|| {
        let local = text.parse::<jiff::civil::DateTime>().ok()?;
        jiff::tz::TimeZone::UTC.to_timestamp(local).ok()
    })?;
    Some(Timestamp(moment.as_millisecond()))
}

/// Reads the length of a step: `hour`, `day`, `week`, `month`, or a duration of whole minutes.
pub(crate) fn parse_step(text: &str) -> Option<ReportStep> {
    if text == "month" {
        return Some(ReportStep::Month);
    }
    let ms = i64::try_from(crate::config::duration(text)?.as_millis()).ok()?;
    (ms >= MINUTE_MS && ms % MINUTE_MS == 0).then_some(ReportStep::Minutes(ms / MINUTE_MS))
}

/// Reads a list of columns: `environment,model`.
pub(crate) fn parse_columns(text: &str) -> Option<Vec<ReportColumn>> {
    let column = |name: &str| ReportColumn::ALL.into_iter().find(|known| known.as_str() == name);
    text.split(',').map(str::trim).filter(|name| !name.is_empty()).map(column).collect()
}

/// The rows as CSV with a header. It has a column of upstreams only if the report is grouped by them.
///
/// # Errors
/// The text cannot be built.
pub(crate) fn to_csv(rows: &[ReportRow], subject: &ReportSubject) -> anyhow::Result<String> {
    let mut writer = csv::WriterBuilder::new().has_headers(false).from_writer(Vec::new());
    let has_upstreams = subject.group_by.contains(&ReportColumn::Upstream);
    writer.write_record(ReportRow::COLUMNS.iter().filter(|name| has_upstreams || **name != "upstream"))?;
    for row in rows {
        writer.serialize(row)?;
    }
    Ok(String::from_utf8(writer.into_inner()?)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A store with usage in two minutes of a day, and with an older day and month that are merged already.
    fn store() -> (tempfile::TempDir, std::path::PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.db");
        let database = Database::open(&path, &path).unwrap();
        database
            .connection()
            .execute_batch(
                "INSERT INTO usage VALUES
                    (29764800, 'production', 'gpt-4o', 'web', 1, 0, 10, 5, 15),
                    (29764800, 'production', 'o3', 'batch', 2, 1, 20, 10, 30),
                    (29764865, 'production', 'gpt-4o', 'web', 4, 0, 40, 20, 60),
                    (29764865, 'sandbox', 'gpt-4o', '', 8, 0, 80, 40, 120);
                 INSERT INTO usage_daily VALUES
                    (20669, 'production', 'gpt-4o', 'web', 16, 2, 160, 80, 240),
                    (20640, 'production', 'gpt-4o', 'web', 32, 0, 320, 160, 480);
                 INSERT INTO upstream_usage VALUES
                    (29764800, 'openai', 'gpt-4o', 64, 3, 640, 320, 960),
                    (29764865, 'openai', 'o3', 128, 0, 1280, 640, 1920),
                    (29764865, 'azure', 'gpt-4o', 256, 0, 2560, 1280, 3840);
                 INSERT INTO upstream_usage_daily VALUES (20669, 'openai', 'gpt-4o', 512, 0, 5120, 2560, 7680);",
            )
            .unwrap();
        (folder, path)
    }

    fn report(from: &str, to: &str, step: &str, columns: &str, environment: Option<&str>) -> Vec<String> {
        let columns = parse_columns(columns);
        let subject = ReportSubject::new(columns, environment.map(str::to_owned), None).unwrap();
        report_of(from, to, step, subject)[1..].to_vec()
    }

    fn report_of(from: &str, to: &str, step: &str, subject: ReportSubject) -> Vec<String> {
        let now = parse_moment("2026-08-05T00:00:00Z", Timestamp(0)).unwrap();
        let query = ReportQuery {
            from: parse_moment(from, now).unwrap(),
            to: parse_moment(to, now).unwrap(),
            step: parse_step(step).unwrap(),
            subject,
        };
        let (_folder, path) = store();
        let csv = to_csv(&read(&path, &query).unwrap(), &query.subject).unwrap();
        csv.lines().map(str::to_owned).collect()
    }

    #[test]
    fn usage_is_added_up_by_step_and_group() {
        for ((from, to, step, columns, environment), want) in [
            (
                ("2026-08-05", "2026-08-06", "hour", "environment", None),
                vec![
                    "2026-08-05T00:00:00Z,production,,,3,1,30,15,45",
                    "2026-08-05T01:00:00Z,production,,,4,0,40,20,60",
                    "2026-08-05T01:00:00Z,sandbox,,,8,0,80,40,120",
                ],
            ),
            (
                ("2026-08-05", "2026-08-06", "day", "model,caller", Some("production")),
                vec![
                    "2026-08-05T00:00:00Z,,gpt-4o,web,5,0,50,25,75",
                    "2026-08-05T00:00:00Z,,o3,batch,2,1,20,10,30",
                ],
            ),
            (
                ("365d", "2026-09-01", "month", "", None),
                vec!["2026-07-01T00:00:00Z,,,,32,0,320,160,480", "2026-08-01T00:00:00Z,,,,31,3,310,155,465"],
            ),
            (
                ("2026-08-05T01:05", "2026-08-05T01:06:00Z", "1m", "environment", Some("sandbox")),
                vec!["2026-08-05T01:05:00Z,sandbox,,,8,0,80,40,120"],
            ),
            (
                ("2026-08-05", "2026-08-06", "week", "", None),
                // The Monday before.
                vec!["2026-08-03T00:00:00Z,,,,15,1,150,75,225"],
            ),
            (("2020-01-01", "2020-02-01", "day", "", None), vec![]),
        ] {
            assert_eq!(report(from, to, step, columns, environment), want, "{from} {step} {columns}");
        }
    }

    #[test]
    fn usage_of_upstreams_is_reported_apart_from_that_of_environments() {
        let report = |step, columns: Option<&str>, upstream: Option<&str>| {
            let columns = columns.map(|columns| parse_columns(columns).unwrap());
            let subject = ReportSubject::new(columns, None, upstream.map(str::to_owned)).unwrap();
            report_of("2026-08-05", "2026-08-06", step, subject)
        };
        assert_eq!(
            report("hour", Some("upstream"), None),
            [
                "from,environment,upstream,model,caller,requests,rejected,prompt_tokens,completion_tokens,total_tokens",
                "2026-08-05T00:00:00Z,,openai,,,64,3,640,320,960",
                "2026-08-05T01:00:00Z,,azure,,,256,0,2560,1280,3840",
                "2026-08-05T01:00:00Z,,openai,,,128,0,1280,640,1920",
            ]
        );
        assert_eq!(
            report("day", None, Some("azure"))[1..],
            ["2026-08-05T00:00:00Z,,azure,,,256,0,2560,1280,3840"]
        );
        assert_eq!(
            report("day", Some("model"), Some("openai")),
            [
                "from,environment,model,caller,requests,rejected,prompt_tokens,completion_tokens,total_tokens",
                "2026-08-05T00:00:00Z,,gpt-4o,,64,3,640,320,960",
                "2026-08-05T00:00:00Z,,o3,,128,0,1280,640,1920",
            ]
        );
        let month = ReportSubject::new(None, None, Some("openai".to_owned())).unwrap();
        let months = report_of("2026-08-01", "2026-09-01", "month", month);
        assert_eq!(months[1..], ["2026-08-01T00:00:00Z,,openai,,,704,3,7040,3520,10560"]);
    }

    #[test]
    fn upstreams_are_not_combined_with_environments_or_callers() {
        let some = |text: &str| Some(text.to_owned());
        for (columns, environment, upstream) in [
            ("upstream,environment", None, None),
            ("upstream,caller", None, None),
            ("upstream", some("production"), None),
            ("model", some("production"), some("openai")),
            ("environment", None, some("openai")),
            ("caller", None, some("openai")),
        ] {
            assert_eq!(ReportSubject::new(parse_columns(columns), environment, upstream), None, "{columns}");
        }
    }

    #[test]
    fn moments_steps_and_columns_are_read_strictly() {
        let now = Timestamp(86_400_000);
        assert_eq!(parse_moment("1h", now), Some(Timestamp(82_800_000)));
        assert_eq!(parse_moment("1970-01-01T02:00+02:00", now), Some(Timestamp(0)));
        for wrong in ["", "yesterday", "2026-13-01", "1"] {
            assert_eq!(parse_moment(wrong, now), None, "{wrong}");
        }
        assert_eq!(
            (parse_step("5m"), parse_step("hour")),
            (Some(ReportStep::Minutes(5)), Some(ReportStep::Minutes(60)))
        );
        for wrong in ["30s", "90s", "0m", "years"] {
            assert_eq!(parse_step(wrong), None, "{wrong}");
        }
        assert_eq!(parse_columns("environment, colour"), None);
    }
}
