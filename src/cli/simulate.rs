//! `tollgate simulate`: replays a trace through the quotas of the config.

use super::{load_or_explain, output};
use crate::clock::Stopwatch;
use crate::config::{Config, duration};
use crate::simulate::{Pace, SimulationReport, TraceCall, read_trace};
use anyhow::Context as _;
use serde_json::{Map, Value, json};
use std::fs::File;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

#[derive(clap::Args)]
pub(super) struct SimulateArguments {
    /// CSV file with the columns timestamp, prompt_tokens and completion_tokens, and optionally environment, max_tokens
    /// and model; the column names of the Azure traces of 2023 are accepted too
    #[arg(long, value_name = "CSV")]
    trace: PathBuf,
    /// Time from a request to its first token
    #[arg(long, default_value = "400ms", value_parser = parse_duration)]
    first_token: Duration,
    /// Speed of an answer after its first token
    #[arg(long, default_value_t = 30.0, value_parser = parse_rate)]
    tokens_per_second: f64,
    /// Print the results as JSON
    #[arg(long)]
    json: bool,
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
    let path = arguments.trace.display();
    let file = File::open(&arguments.trace).with_context(|| format!("cannot open {path}"))?;
    let clock = Stopwatch::start();
    let calls = read_trace(file).with_context(|| format!("the trace {path} cannot be read"))?;
    let pace = Pace { first_token: arguments.first_token, tokens_per_second: arguments.tokens_per_second };
    let reports: Vec<SimulationReport> = by_environment(&loaded.config, calls)?
        .into_iter()
        .map(|(index, calls)| SimulationReport::of(&loaded.config.environments[index], &calls, pace))
        .collect();
    if arguments.json {
        let all: Map<String, Value> = reports.iter().map(|r| (r.environment.clone(), r.as_json())).collect();
        output::print(&format!("{}\n", json!({ "environments": all })))?;
    } else {
        for report in &reports {
            output::print(&format!("{}\n", report.to_text()))?;
        }
        output::print(&format!("Replayed in {:.2} s.\n", clock.elapsed().as_secs_f64()))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The calls of each environment. Calls without an environment go to `default_environment`, or to the only environment.
fn by_environment(config: &Config, calls: Vec<TraceCall>) -> anyhow::Result<Vec<(usize, Vec<TraceCall>)>> {
    let mut all: Vec<(usize, Vec<TraceCall>)> =
        (0..config.environments.len()).map(|at| (at, Vec::new())).collect();
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
