//! What a replay has shown, in words, as JSON, and as a picture.

use super::{Call, Mode, Outcome, Pace, counts_tokens, replay};
use crate::config::Environment;
use serde_json::{Value, json};
use std::thread;

/// An environment's outcome as configured, and what other ways of reserving would have done.
#[derive(Clone, Debug)]
pub struct Report {
    /// The environment's name.
    pub environment: String,
    /// As configured.
    pub configured: Outcome,
    /// The others, the oracle last.
    pub others: Vec<(Mode, Outcome)>,
}

impl Report {
    /// Replays the calls in every mode, side by side.
    pub fn of(environment: &Environment, calls: &[Call], pace: Pace) -> Self {
        let (configured, others) = thread::scope(|scope| {
            let run = |mode| scope.spawn(move || replay(environment, calls, pace, mode));
            let configured = run(Mode::Configured);
            let others = Mode::OTHERS.map(|mode| (mode, run(mode)));
            // A replay only panics on a slip of this program's own; there is nothing to add to it.
            let done = |handle: thread::ScopedJoinHandle<'_, Outcome>| handle.join().unwrap_or_default();
            (done(configured), others.map(|(mode, handle)| (mode, done(handle))))
        });
        Self { environment: environment.name.clone(), configured, others: others.into() }
    }

    /// What an oracle admits.
    pub fn oracle(&self) -> Option<&Outcome> {
        self.others.iter().find(|(mode, _)| *mode == Mode::Oracle).map(|(_, outcome)| outcome)
    }

    /// For machines: shares as fractions, times in seconds.
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

    /// For people.
    pub fn in_words(&self) -> String {
        let Outcome { admitted, rejected, .. } = self.configured;
        let mut words = format!("environment {}: {} calls\n\n", self.environment, admitted + rejected);
        if admitted + rejected == 0 {
            return words;
        }
        words += &chart(&self.configured);
        words += &format!(
            "\n{:<20} {:>9} {:>9} {:>12} {:>11} {:>10} {:>12}\n",
            "reserved", "admitted", "rejected", "utilisation", "overshoot", "exhausted", "of oracle's"
        );
        let oracle = self.oracle().map_or(0, |o| o.admitted);
        words += &line("as configured", &self.configured, oracle);
        for (mode, outcome) in &self.others {
            words += &line(&mode.name(), outcome, oracle);
        }
        words += &format!(
            "\n{:<40} {:>9} {:>12} {:>11} {:>10}\n",
            "quota, as configured", "denials", "utilisation", "overshoot", "exhausted"
        );
        for q in &self.configured.quotas {
            let name = q.quota.scope.name();
            let of =
                if name.is_empty() { String::new() } else { format!(" ({} {name})", q.quota.scope.as_str()) };
            let what = format!("{} {} per {}{of}", q.quota.limit, q.quota.kind, q.quota.per.text);
            words += &format!(
                "{what:<40} {:>9} {:>12} {:>11} {:>9.0} s\n",
                q.denials,
                percent(q.utilisation),
                percent(q.overshoot),
                seconds(q.exhausted_ms)
            );
        }
        words
    }
}

fn line(name: &str, outcome: &Outcome, oracle: u64) -> String {
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

fn outcome_json(outcome: &Outcome) -> Value {
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

const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// Tokens offered and admitted over the trace's time, one bar for each part of it.
pub fn chart(outcome: &Outcome) -> String {
    let most = outcome.offered_by_time.iter().copied().max().unwrap_or(0).max(1);
    let bar = |&tokens: &u64| match usize::try_from(tokens * BARS.len() as u64 / most) {
        _ if tokens == 0 => ' ',
        Ok(height) => BARS[height.min(BARS.len() - 1)],
        Err(_) => ' ',
    };
    let bars = |by_time: &[u64]| by_time.iter().map(bar).collect::<String>();
    let pairs = || outcome.offered_by_time.iter().zip(&outcome.admitted_by_time);
    let refused: Vec<u64> = pairs().map(|(offered, admitted)| offered - admitted.min(offered)).collect();
    let mut chart = format!("  tokens offered   {}\n", bars(&outcome.offered_by_time));
    chart += &format!("  admitted         {}\n", bars(&outcome.admitted_by_time));
    chart += &format!("  refused          {}\n", bars(&refused));
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

#[allow(clippy::cast_precision_loss)] // seconds to show
fn seconds(ms: u64) -> f64 {
    ms as f64 / 1_000.0
}
