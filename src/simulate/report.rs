//! Reports of replays: text, JSON and a chart.

use super::{Mode, Pace, ReplayOutcome, TraceCall, counts_tokens, replay};
use crate::config::Environment;
use serde_json::{Value, json};
use std::thread;

/// The results of one environment: with its own settings, and in the other modes.
#[derive(Clone, Debug)]
pub struct SimulationReport {
    /// Name of the environment.
    pub environment: String,
    /// The result with the settings of the environment.
    configured: ReplayOutcome,
    /// The results of the other modes, the oracle last.
    others: Vec<(Mode, ReplayOutcome)>,
}

impl SimulationReport {
    /// Replays the calls in all modes, each on its own thread.
    pub fn of(environment: &Environment, calls: &[TraceCall], pace: Pace) -> Self {
        let (configured, others) = thread::scope(|scope| {
            let run = |mode| scope.spawn(move || replay(environment, calls, pace, mode));
            let configured = run(Mode::Configured);
            let others = Mode::OTHERS.map(|mode| (mode, run(mode)));
            // A replay panics only on a bug. The panic message is already printed.
            let done =
                |handle: thread::ScopedJoinHandle<'_, ReplayOutcome>| handle.join().unwrap_or_default();
            (done(configured), others.map(|(mode, handle)| (mode, done(handle))))
        });
        Self { environment: environment.name.clone(), configured, others: others.into() }
    }

    /// The result of the oracle.
    fn oracle(&self) -> Option<&ReplayOutcome> {
        self.others.iter().find(|(mode, _)| *mode == Mode::Oracle).map(|(_, outcome)| outcome)
    }

    /// The report as JSON: shares as fractions, times in seconds.
    pub fn as_json(&self) -> Value {
        let mut all = outcome_json(&self.configured);
        all["oracle_admitted"] = json!(self.oracle().map(|o| o.admitted));
        all["quotas"] = self
            .configured
            .quotas
            .iter()
            .map(|q| {
                json!({
                    "scope": q.quota.scope.as_str(),
                    "name": q.quota.scope.name(),
                    "kind": q.quota.kind.as_str(),
                    "per": q.quota.per.text,
                    "limit": q.quota.limit,
                    "denials": q.denials,
                    "utilisation": rounded(q.utilisation),
                    "overshoot": rounded(q.overshoot),
                    "exhausted_seconds": seconds(q.exhausted_ms),
                })
            })
            .collect();
        let modes = self.others.iter().map(|(mode, outcome)| (mode.name(), outcome_json(outcome)));
        all["modes"] = Value::Object(modes.collect());
        all
    }

    /// The report as text.
    pub fn to_text(&self) -> String {
        let ReplayOutcome { admitted, rejected, .. } = self.configured;
        let mut text = format!("environment {}: {} calls\n\n", self.environment, admitted + rejected);
        if admitted + rejected == 0 {
            return text;
        }
        text += &chart(&self.configured);
        text += &format!(
            "\n{:<20} {:>9} {:>9} {:>12} {:>11} {:>10} {:>12}\n",
            "mode", "admitted", "rejected", "utilisation", "overshoot", "exhausted", "% of oracle"
        );
        let oracle = self.oracle().map_or(0, |o| o.admitted);
        text += &line("as configured", &self.configured, oracle);
        for (mode, outcome) in &self.others {
            text += &line(&mode.name(), outcome, oracle);
        }
        text += &format!(
            "\n{:<40} {:>9} {:>12} {:>11} {:>10}\n",
            "quota, as configured", "denials", "utilisation", "overshoot", "exhausted"
        );
        for q in &self.configured.quotas {
            let name = q.quota.scope.name();
            let of =
                if name.is_empty() { String::new() } else { format!(" ({} {name})", q.quota.scope.as_str()) };
            let what = format!("{} {} per {}{of}", q.quota.limit, q.quota.kind, q.quota.per.text);
            text += &format!(
                "{what:<40} {:>9} {:>12} {:>11} {:>9.0} s\n",
                q.denials,
                percent(q.utilisation),
                percent(q.overshoot),
                seconds(q.exhausted_ms)
            );
        }
        text
    }
}

fn line(name: &str, outcome: &ReplayOutcome, oracle: u64) -> String {
    format!(
        "{name:<20} {:>9} {:>9} {:>12} {:>11} {:>8.0} s {:>12}\n",
        outcome.admitted,
        outcome.rejected,
        percent(outcome.utilisation()),
        percent(outcome.overshoot()),
        seconds(outcome.exhausted_ms),
        share(outcome.admitted, oracle).map_or_else(String::new, percent)
    )
}

fn outcome_json(outcome: &ReplayOutcome) -> Value {
    json!({
        "admitted": outcome.admitted,
        "rejected": outcome.rejected,
        "utilisation": rounded(outcome.utilisation()),
        "overshoot": rounded(outcome.overshoot()),
        "exhausted_seconds": seconds(outcome.exhausted_ms),
        "prompt_tokens": outcome.spent.prompt,
        "completion_tokens": outcome.spent.completion,
        "total_tokens": outcome.spent.total,
    })
}

/// Bars by height.
const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// A chart of offered, admitted and denied tokens: one bar for each part of the trace's duration.
fn chart(outcome: &ReplayOutcome) -> String {
    let most = outcome.offered_by_time.iter().copied().max().unwrap_or(0).max(1);
    let bar = |&tokens: &u64| match usize::try_from(tokens * BARS.len() as u64 / most) {
        _ if tokens == 0 => ' ',
        Ok(height) => BARS[height.min(BARS.len() - 1)],
        Err(_) => ' ',
    };
    let bars = |by_time: &[u64]| by_time.iter().map(bar).collect::<String>();
    let pairs = || outcome.offered_by_time.iter().zip(&outcome.admitted_by_time);
    let denied: Vec<u64> = pairs().map(|(offered, admitted)| offered - admitted.min(offered)).collect();
    let mut chart = format!("  tokens offered   {}\n", bars(&outcome.offered_by_time));
    chart += &format!("  admitted         {}\n", bars(&outcome.admitted_by_time));
    chart += &format!("  denied           {}\n", bars(&denied));
    if let Some(tightest) =
        outcome.quotas.iter().filter(|q| counts_tokens(&q.quota)).max_by_key(|q| q.denials)
        && tightest.denials > 0
    {
        let quota = &tightest.quota;
        chart += &format!("  most denials     by {} {} per {}\n", quota.limit, quota.kind, quota.per.text);
    }
    chart
}

fn share(part: u64, whole: u64) -> Option<f64> {
    #[allow(clippy::cast_precision_loss)]
    (whole > 0).then(|| part as f64 / whole as f64)
}

fn percent(share: f64) -> String {
    format!("{:.2} %", share * 100.0)
}

fn rounded(share: f64) -> f64 {
    (share * 1e6).round() / 1e6
}

#[allow(clippy::cast_precision_loss)] // seconds for display
fn seconds(ms: u64) -> f64 {
    ms as f64 / 1_000.0
}
