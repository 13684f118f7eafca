//! `tollgate usage`: prints the usage history of the store, also while a gateway runs.

use super::{load_or_explain, output};
use crate::clock::{self, Timestamp};
use crate::config::Config;
use crate::store::{self, ReportColumn, ReportQuery, ReportRow, ReportStep, ReportSubject};
use anyhow::bail;
use serde_json::json;
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(clap::Args)]
pub(super) struct UsageArguments {
    /// Begin: a moment such as 2026-11-28 or 2026-11-28T10:00:00Z, or how long ago, such as 7d
    #[arg(long, default_value = "7d", value_parser = parse_moment)]
    from: Timestamp,
    /// End, in the same forms [default: now]
    #[arg(long, value_parser = parse_moment)]
    to: Option<Timestamp>,
    /// Length of a row: hour, day, week, month, or a duration such as 5m
    #[arg(long, default_value = "day", value_parser = parse_step)]
    by: ReportStep,
    /// Columns: any of environment,model,caller, or of upstream,model [default: environment, with --upstream: upstream]
    #[arg(long, value_parser = parse_columns)]
    group_by: Option<ReportColumns>,
    /// Only this environment
    #[arg(long)]
    environment: Option<String>,
    /// Only this upstream, which must have limits: what all environments have used of it
    #[arg(long)]
    upstream: Option<String>,
    #[arg(long, value_enum, default_value_t = ReportFormat::Table)]
    format: ReportFormat,
}

/// A list that clap reads from one argument.
#[derive(Clone, Debug)]
struct ReportColumns(Vec<ReportColumn>);

#[derive(Clone, Copy, clap::ValueEnum)]
enum ReportFormat {
    Table,
    Csv,
    Json,
}

fn parse_moment(text: &str) -> Result<Timestamp, String> {
    store::parse_moment(text, clock::now())
        .ok_or_else(|| "this is not a moment; write 2026-11-28, 2026-11-28T10:00:00Z or 7d".to_owned())
}

fn parse_step(text: &str) -> Result<ReportStep, String> {
    store::parse_step(text)
        .ok_or_else(|| "write hour, day, week, month or a duration of whole minutes".to_owned())
}

fn parse_columns(text: &str) -> Result<ReportColumns, String> {
    let columns = store::parse_columns(text).map(ReportColumns);
    columns.ok_or_else(|| "write any of environment,model,caller, or of upstream,model".to_owned())
}

pub(super) fn run(config: Option<PathBuf>, arguments: &UsageArguments) -> anyhow::Result<ExitCode> {
    let config = match load_or_explain(config) {
        Ok(loaded) => loaded.config,
        Err(code) => return Ok(code),
    };
    let settings = &config.store;
    if settings.memory {
        bail!("the config stores no history (store.memory: true)");
    }
    let UsageArguments { group_by, environment, upstream, .. } = arguments;
    let columns = group_by.as_ref().map(|columns| columns.0.clone());
    let Some(subject) = ReportSubject::new(columns, environment.clone(), upstream.clone()) else {
        bail!("{}", ReportSubject::FAULT)
    };
    let query = ReportQuery {
        from: arguments.from,
        // The current minute belongs to the report.
        to: arguments.to.unwrap_or_else(|| clock::now().plus_ms(60_000)),
        step: arguments.by,
        subject,
    };
    let rows = store::read_usage(&settings.path, &query)?;
    if rows.is_empty()
        && let Some(note) = unknown_name(&config, arguments)
    {
        output::report(&note);
    }
    output::print(&match arguments.format {
        ReportFormat::Table => table(&rows, &query.subject.group_by),
        ReportFormat::Csv => store::to_csv(&rows, &query.subject)?,
        ReportFormat::Json => format!("{}\n", json!({ "rows": rows })),
    })?;
    Ok(ExitCode::SUCCESS)
}

/// Why a report may be empty: its environment or upstream is not in the config. The history may have removed ones.
fn unknown_name(config: &Config, arguments: &UsageArguments) -> Option<String> {
    let UsageArguments { environment, upstream, .. } = arguments;
    let environment = environment.as_ref().filter(|name| config.environment(name).is_none());
    let upstream = upstream.as_ref().filter(|name| config.upstreams.iter().all(|known| known.name != **name));
    let (what, name) =
        environment.map(|name| ("environment", name)).or(upstream.map(|name| ("upstream", name)))?;
    Some(format!("note: the config has no {what} '{name}'"))
}

/// A table for people: only the columns that the report is grouped by, and numbers with separators.
fn table(rows: &[ReportRow], group_by: &[ReportColumn]) -> String {
    let mut cells = vec![header(group_by)];
    cells.extend(rows.iter().map(|row| line(row, group_by)));
    let widths: Vec<usize> = (0..cells[0].len())
        .map(|at| cells.iter().map(|line| line[at].chars().count()).max().unwrap_or(0))
        .collect();
    let mut text = String::new();
    for line in &cells {
        for (at, (cell, width)) in line.iter().zip(&widths).enumerate() {
            // Names are aligned to the left, numbers to the right.
            text +=
                &if at <= group_by.len() { format!("{cell:<width$}  ") } else { format!("{cell:>width$}  ") };
        }
        text.truncate(text.trim_end().len());
        text.push('\n');
    }
    if rows.is_empty() {
        text += "There is no usage in this time.\n";
    }
    text
}

fn header(group_by: &[ReportColumn]) -> Vec<String> {
    let names = group_by.iter().map(|column| column.as_str());
    let amounts = ["requests", "rejected", "prompt", "completion", "total"];
    ["from"].into_iter().chain(names).chain(amounts).map(str::to_owned).collect()
}

fn line(row: &ReportRow, group_by: &[ReportColumn]) -> Vec<String> {
    let name = |column: &ReportColumn| match column {
        ReportColumn::Environment => row.environment.clone(),
        ReportColumn::Upstream => row.upstream.clone(),
        ReportColumn::Model => row.model.clone(),
        ReportColumn::Caller => row.caller.clone(),
    };
    let amounts =
        [row.requests, row.rejected, row.prompt_tokens, row.completion_tokens, row.total_tokens].map(grouped);
    let names = group_by.iter().map(|column| name(column).unwrap_or_default());
    [row.from.clone()].into_iter().chain(names).chain(amounts).collect()
}

/// A number with separators: `1,234,567`.
pub(super) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() * 4 / 3);
    for (at, digit) in digits.char_indices() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_separators() {
        for (number, text) in [(0, "0"), (999, "999"), (1_000, "1,000"), (12_345_678, "12,345,678")] {
            assert_eq!(grouped(number), text);
        }
    }
}
