//! `tollgate simulate`: replays a trace or the gateway's log through the quotas of the config.

use super::{load_or_explain, output};
use crate::clock::Stopwatch;
use crate::config::{Config, Environment, duration};
use crate::simulate::{Pace, SearchBudget, TraceCall, read_request_log, read_trace, reports};
use anyhow::Context as _;
use serde_json::{Map, Value, json};
use std::fs::File;
use std::io::{self, BufReader, IsTerminal as _};
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;
use std::time::Duration;

/// The width of charts if standard output is no terminal, or its width is unknown.
const DEFAULT_WIDTH: usize = 80;
const MAX_WIDTH: usize = 240;

#[derive(clap::Args)]
#[command(group = clap::ArgGroup::new("input").required(true))]
pub(super) struct SimulateArguments {
    /// CSV file with the columns timestamp, prompt_tokens and completion_tokens, and optionally environment, caller,
    /// model and max_tokens; the column names of the Azure traces of 2023 are accepted too
    #[arg(long, value_name = "CSV", group = "input")]
    trace: Option<PathBuf>,
    /// Request log of the gateway: the lines that `tollgate serve` writes to standard error, as JSON or for people
    #[arg(long, value_name = "FILE", group = "input")]
    log: Option<PathBuf>,
    /// Time from a request to its first token; requests of a log have their own
    #[arg(long, default_value = "400ms", value_parser = parse_duration)]
    first_token: Duration,
    /// Speed of an answer after its first token; answers of a log have their own
    #[arg(long, default_value_t = 30.0, value_parser = parse_rate)]
    tokens_per_second: f64,
    /// Print the results as JSON
    #[arg(long)]
    json: bool,
    /// Draw no charts
    #[arg(long)]
    no_chart: bool,
    /// Width of the charts in characters, at most 240; default: the width of the terminal, else 80
    #[arg(long, value_name = "CHARACTERS")]
    width: Option<usize>,
}

fn parse_duration(text: &str) -> Result<Duration, String> {
    duration(text).ok_or_else(|| "this is not a duration; write for example 400ms or 2s".to_owned())
}

fn parse_rate(text: &str) -> Result<f64, String> {
    let rate = text.parse().ok().filter(|rate: &f64| rate.is_finite() && *rate > 0.0);
    rate.ok_or_else(|| "this is not a number above 0; write for example 30".to_owned())
}

pub(super) fn run(config: Option<PathBuf>, arguments: &SimulateArguments) -> anyhow::Result<ExitCode> {
    let loaded = match load_or_explain(config) {
        Ok(loaded) => loaded,
        Err(code) => return Ok(code),
    };
    let clock = Stopwatch::start();
    let calls = read_calls(arguments)?;
    let pace = Pace { first_token: arguments.first_token, tokens_per_second: arguments.tokens_per_second };
    let budget = SearchBudget::new(&output::report);
    let all = by_environment(&loaded.config, calls)?;
    let reports = reports(&all, pace, &budget);
    if arguments.json {
        let all: Map<String, Value> = reports.iter().map(|r| (r.environment.clone(), r.as_json())).collect();
        output::print(&format!("{}\n", json!({ "environments": all })))?;
        return Ok(ExitCode::SUCCESS);
    }
    let width = (!arguments.no_chart).then(|| arguments.width.unwrap_or_else(terminal_width).min(MAX_WIDTH));
    let texts: Vec<String> = reports.iter().map(|report| report.to_text(width)).collect();
    output::print(&texts.join("\n"))?;
    output::report(&format!("Replayed in {:.2} s.", clock.elapsed().as_secs_f64()));
    Ok(ExitCode::SUCCESS)
}

/// Reads the trace or the log.
fn read_calls(arguments: &SimulateArguments) -> anyhow::Result<Vec<TraceCall>> {
    let open = |path: &PathBuf| File::open(path).with_context(|| format!("cannot open {}", path.display()));
    if let Some(path) = &arguments.trace {
        return read_trace(open(path)?)
            .with_context(|| format!("the trace {} cannot be read", path.display()));
    }
    let path = arguments.log.as_ref().context("neither --trace nor --log was given")?;
    let log = read_request_log(BufReader::new(open(path)?))
        .with_context(|| format!("the log {} cannot be read", path.display()))?;
    output::report(&format!(
        "The log has {} requests that a quota decided on, {} of them denied. {} other lines are skipped.",
        log.calls.len(),
        log.denied,
        log.skipped
    ));
    Ok(log.calls)
}

/// The width of the terminal that standard output is. `stty` reports the size of its standard input.
fn terminal_width() -> usize {
    let size = || {
        let terminal = File::open("/dev/tty").ok()?;
        let stty = Command::new("stty").arg("size").stdin(terminal).stderr(Stdio::null()).output().ok()?;
        let text = String::from_utf8(stty.stdout).ok()?;
        text.split_whitespace().nth(1)?.parse().ok().filter(|width: &usize| *width > 0)
    };
    if io::stdout().is_terminal() { size().unwrap_or(DEFAULT_WIDTH) } else { DEFAULT_WIDTH }
}

/// The calls of each environment. Calls without an environment go to `default_environment`, or to the only environment.
fn by_environment(
    config: &Config,
    calls: Vec<TraceCall>,
) -> anyhow::Result<Vec<(Arc<Environment>, Vec<TraceCall>)>> {
    let mut all: Vec<(Arc<Environment>, Vec<TraceCall>)> =
        config.environments.iter().map(|environment| (environment.clone(), Vec::new())).collect();
    let only = (config.environments.len() == 1).then_some(0);
    for call in calls {
        let at = match &call.environment {
            Some(name) => config.environment(name).map(|(at, _)| at).with_context(|| {
                format!("the trace contains the environment \"{name}\", which is not in the config")
            })?,
            None => config.default_environment.or(only).context(
                "the trace has calls without an environment: add a column environment, or set default_environment in the config",
            )?,
        };
        all[at].1.push(call);
    }
    Ok(all)
}
