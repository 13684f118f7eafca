//! Reports of replays: text, JSON and charts.

use super::chart::chart;
use super::meter::QuotaOutcome;
use super::parallel::run_jobs;
use super::replay::{ReplayOutcome, replay, replay_configured};
use super::search::{SearchBudget, SufficientLimit, is_unlimited, sufficient_limits};
use super::traffic::{Member, Traffic};
use super::words::{a_period, amount, duration, grouped, utc};
use super::{Mode, Pace, TraceCall, words};
use crate::config::Environment;
use crate::quota::Quota;
use serde_json::{Value, json};
use std::sync::Arc;

/// Maximum number of charts of an environment.
const MAX_CHARTS: usize = 8;
/// Width of the column of quotas, unless the titles of upstreams' quotas are longer.
const TITLE_WIDTH: usize = 38;

/// The results of one environment: with its own settings, and in the other modes.
#[derive(Clone, Debug)]
pub struct SimulationReport {
    /// Name of the environment.
    pub environment: String,
    /// Whether the environment is in shadow mode.
    is_shadow: bool,
    /// The result with the settings of the environment.
    configured: ReplayOutcome,
    /// Whether limits of upstreams apply.
    has_upstream_limits: bool,
    /// By quota, a limit that refuses no call. `None` for the quotas of upstreams.
    sufficient: Vec<Option<SufficientLimit>>,
    /// The results of the other modes, the oracle last.
    others: Vec<(Mode, ReplayOutcome)>,
}

/// The reports of all environments, in the order of the config. `all`: the environments with their calls, each sorted by
/// time.
///
/// Environments that share upstreams with limits are replayed together: once as configured, and once for each environment
/// in each other mode. Then the smallest limits that refuse no call are searched.
pub fn reports(
    all: &[(Arc<Environment>, Vec<TraceCall>)],
    pace: Pace,
    budget: &SearchBudget<'_>,
) -> Vec<SimulationReport> {
    let groups = Traffic::groups(all);
    let replayed: Vec<_> = groups.iter().map(|group| replay_group(group, pace)).collect();
    let members = groups.iter().flat_map(|group| &group.members).zip(replayed.into_iter().flatten());
    let mut members: Vec<(&Member<'_>, Replayed)> = members.collect();
    members.sort_by_key(|(member, _)| member.place);
    members
        .into_iter()
        .map(|(member, replayed)| SimulationReport::of(member, replayed, pace, budget))
        .collect()
}

/// The outcomes of one environment.
pub(super) struct Replayed {
    pub(super) configured: ReplayOutcome,
    /// The other modes, the oracle last.
    pub(super) others: Vec<(Mode, ReplayOutcome)>,
}

/// Replays a group in all modes. Returns the outcomes of its environments in their order.
pub(super) fn replay_group(traffic: &Traffic<'_>, pace: Pace) -> Vec<Replayed> {
    // Without a call, the modes do not differ. Some modes are that of the config.
    let differs =
        |member: &Member<'_>, mode: Mode| !member.calls.is_empty() && !mode.is_configured(member.environment);
    let members = traffic.members.iter().enumerate();
    let in_modes: Vec<(usize, Mode)> = members
        .flat_map(|(index, member)| {
            let modes = Mode::OTHERS.into_iter().filter(move |mode| differs(member, *mode));
            modes.map(move |mode| (index, mode))
        })
        .collect();
    // The first job is the largest one: it measures all environments.
    let mut done = run_jobs(1 + in_modes.len(), |job| match job.checked_sub(1) {
        None => replay_configured(traffic, pace),
        Some(at) => vec![replay(traffic, in_modes[at].0, pace, in_modes[at].1)],
    });
    let others: Vec<_> =
        done.split_off(1).into_iter().map(|done| done.and_then(|mut one| one.pop())).collect();
    let mut configured = done.pop().flatten().unwrap_or_default();
    configured.resize_with(traffic.members.len(), ReplayOutcome::default);
    let of_member = |(index, configured): (usize, ReplayOutcome)| {
        let in_mode = |mode: Mode| match in_modes.iter().position(|job| *job == (index, mode)) {
            Some(at) => (mode, others[at].clone().unwrap_or_default()),
            None => (mode, configured.clone()),
        };
        let others = Mode::OTHERS.map(in_mode).into();
        Replayed { configured, others }
    };
    configured.into_iter().enumerate().map(of_member).collect()
}

impl SimulationReport {
    /// Searches the smallest limits that refuse no call.
    pub(super) fn of(member: &Member<'_>, replayed: Replayed, pace: Pace, budget: &SearchBudget<'_>) -> Self {
        let Replayed { configured, others } = replayed;
        let Member { environment, calls, upstreams, .. } = member;
        let own = configured.quotas.iter().take_while(|q| !is_of_upstream(&q.quota)).count();
        let mut sufficient = sufficient_limits(environment, &configured.quotas[..own], calls, pace, budget);
        sufficient.resize(configured.quotas.len(), None);
        Self {
            environment: environment.name.clone(),
            is_shadow: !environment.enforce,
            has_upstream_limits: !upstreams.is_empty(),
            sufficient,
            configured,
            others,
        }
    }

    /// The result of the oracle.
    fn oracle(&self) -> Option<&ReplayOutcome> {
        self.others.iter().find(|(mode, _)| *mode == Mode::Oracle).map(|(_, outcome)| outcome)
    }

    /// The report as JSON: shares as fractions, times in seconds.
    pub fn as_json(&self) -> Value {
        let mut all = outcome_json(&self.configured);
        all["oracle_admitted"] = json!(self.oracle().map(|o| o.admitted));
        if self.has_upstream_limits {
            all["denied_by_upstream"] = json!(self.configured.denied_by_upstream);
        }
        all["quotas"] = self
            .configured
            .quotas
            .iter()
            .zip(&self.sufficient)
            .map(|(q, sufficient)| {
                json!({
                    "scope": q.quota.scope.as_str(),
                    "name": q.quota.scope.name(),
                    "kind": q.quota.kind.as_str(),
                    "per": q.quota.per.text,
                    "limit": q.quota.limit,
                    "calls": q.calls,
                    "denials": q.denials,
                    "utilisation": rounded(q.utilisation),
                    "overshoot": rounded(q.overshoot),
                    "exhausted_seconds": seconds(q.exhausted_ms),
                    "smallest_limit_without_refusals": sufficient.map(|s| s.limit),
                    "burst_without_refusals": sufficient.map(|s| s.burst),
                    "smallest_limit_is_exact": sufficient.map(|s| s.is_smallest),
                })
            })
            .collect();
        let modes = self.others.iter().map(|(mode, outcome)| (mode.name(), outcome_json(outcome)));
        all["modes"] = Value::Object(modes.collect());
        all
    }

    /// The report as text. `chart_width`: the width of charts in characters; `None`: no charts.
    pub fn to_text(&self, chart_width: Option<usize>) -> String {
        let ReplayOutcome { admitted, rejected, .. } = self.configured;
        let calls = admitted + rejected;
        let mut text = format!("environment {}: {} calls", self.environment, grouped(calls));
        if calls == 0 || self.configured.quotas.is_empty() && !self.has_upstream_limits {
            return text + "\n";
        }
        let (first, last) = self.configured.span;
        let last_form = if utc(first, "%F") == utc(last, "%F") { "%T" } else { "%F %T" };
        text += &format!(", {} to {} UTC\n\n", utc(first, "%F %T"), utc(last, last_form));
        if let Some(width) = chart_width {
            text += &self.charts(width);
        }
        text += &self.tables();
        text += "\n";
        for (quota, sufficient) in self.configured.quotas.iter().zip(&self.sufficient) {
            text += &self.verdict(quota, *sufficient);
        }
        if self.configured.denied_in_flight > 0 {
            text += &format!("max_in_flight refuses {}.\n", grouped(self.configured.denied_in_flight));
        }
        text + &self.verdict_of_upstreams(calls)
    }

    /// How many calls of the environment limits of upstreams refuse.
    fn verdict_of_upstreams(&self, calls: u64) -> String {
        match self.configured.denied_by_upstream {
            0 => String::new(),
            denials => format!(
                "Limits of upstreams refuse {} ({}) of the calls of this environment, whatever its own limits are.\n",
                words::share(denials, calls),
                grouped(denials)
            ),
        }
    }

    /// A chart of each quota with a limit that applies to a call. If there are too many, those with the most denials.
    fn charts(&self, width: usize) -> String {
        let mut drawn: Vec<&QuotaOutcome> =
            self.configured.quotas.iter().filter(|q| q.calls > 0 && !is_unlimited(&q.quota)).collect();
        let all = drawn.len();
        if all > MAX_CHARTS {
            drawn.sort_by_key(|q| std::cmp::Reverse(q.denials));
            drawn.truncate(MAX_CHARTS);
        }
        let mut text = String::new();
        for q in drawn {
            text += &format!("{}: █ used, ░ held, × refused\n\n{}\n", title(&q.quota), chart(q, width));
        }
        if all > MAX_CHARTS {
            text += &format!(
                "The {MAX_CHARTS} charts are those of the quotas with the most denials, of {all}.\n\n"
            );
        }
        text
    }

    fn tables(&self) -> String {
        let mut text = format!(
            "{:<17} {:>9} {:>9} {:>11} {:>9} {:>9} {:>9}\n",
            "mode", "admitted", "rejected", "utilisation", "overshoot", "exhausted", "of oracle"
        );
        let oracle = self.oracle().map_or(0, |o| o.admitted);
        text += &line("as configured", &self.configured, oracle);
        for (mode, outcome) in &self.others {
            text += &line(&mode.name(), outcome, oracle);
        }
        let widths = self.configured.quotas.iter().map(|q| title(&q.quota).chars().count());
        let width = widths.max().unwrap_or_default().max(TITLE_WIDTH);
        text += &format!(
            "\n{:<width$} {:>8} {:>11} {:>9} {:>9}\n",
            "quota, as configured", "denials", "utilisation", "overshoot", "exhausted"
        );
        for q in &self.configured.quotas {
            text += &format!(
                "{:<width$} {:>8} {:>11} {:>9} {:>9}\n",
                title(&q.quota),
                grouped(q.denials),
                percent(q.utilisation),
                percent(q.overshoot),
                duration(q.exhausted_ms)
            );
        }
        text
    }

    /// The refusals of the quota, and the limit that would refuse no call.
    fn verdict(&self, q: &QuotaOutcome, sufficient: Option<SufficientLimit>) -> String {
        if q.calls == 0 {
            return String::new();
        }
        if is_unlimited(&q.quota) {
            let would = |found: SufficientLimit| {
                let limit = format!("{} {}", amount(found.limit), a_period(&q.quota.per.text));
                format!("{}: unlimited; {limit} would refuse none.\n", subject(&q.quota))
            };
            return sufficient.map(would).unwrap_or_default();
        }
        let limit = format!("{} {}", amount(q.quota.limit), a_period(&q.quota.per.text));
        let refuses = if self.is_shadow && !is_of_upstream(&q.quota) { "would refuse" } else { "refuses" };
        let did = match q.denials {
            0 => format!("{refuses} none"),
            denials => format!(
                "{refuses} {} ({}) for {}",
                words::share(denials, q.calls),
                grouped(denials),
                duration(q.exhausted_ms)
            ),
        };
        if is_of_upstream(&q.quota) {
            return format!("{}: {limit} {did}.\n", subject(&q.quota));
        }
        let would = match sufficient {
            Some(found) => {
                let burst = if found.burst == found.limit || q.quota.capacity() == q.quota.limit {
                    String::new()
                } else {
                    format!(" with a burst of {}", amount(found.burst))
                };
                let note = if found.is_smallest {
                    ""
                } else {
                    " (the search ended before the smallest such limit was found)"
                };
                format!("{}{burst} would refuse none{note}", amount(found.limit))
            }
            None => "no limit that would refuse none was found".to_owned(),
        };
        format!("{}: {limit} {did}; {would}.\n", subject(&q.quota))
    }
}

fn is_of_upstream(quota: &Quota) -> bool {
    quota.scope.upstream().is_some()
}

/// The kind of a quota, with its scope unless that is the environment.
fn subject(quota: &Quota) -> String {
    format!("{}{}", quota.kind, scope(quota))
}

/// ` (caller web)`, ` (upstream openai, of all environments)`; empty for the environment.
fn scope(quota: &Quota) -> String {
    let (kind, name) = (quota.scope.as_str(), quota.scope.name());
    let note = if is_of_upstream(quota) { ", of all environments" } else { "" };
    if name.is_empty() { String::new() } else { format!(" ({kind} {name}{note})") }
}

fn title(quota: &Quota) -> String {
    let burst = if quota.capacity() == quota.limit {
        String::new()
    } else {
        format!(", burst {}", amount(quota.capacity()))
    };
    let limit = if is_unlimited(quota) { "unlimited".to_owned() } else { amount(quota.limit) };
    format!("{limit} {} per {}{burst}{}", quota.kind, quota.per.text, scope(quota))
}

fn line(name: &str, outcome: &ReplayOutcome, oracle: u64) -> String {
    format!(
        "{name:<17} {:>9} {:>9} {:>11} {:>9} {:>9} {:>9}\n",
        grouped(outcome.admitted),
        grouped(outcome.rejected),
        percent(outcome.utilisation()),
        percent(outcome.overshoot()),
        duration(outcome.exhausted_ms),
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
