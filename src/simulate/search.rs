//! The search for the smallest limit that refuses no call of a trace.

use super::meter::QuotaOutcome;
use super::parallel::run_jobs;
use super::replay::admits_all;
use super::words::{readable, readable_index};
use super::{Pace, TraceCall};
use crate::clock::Stopwatch;
use crate::config::Environment;
use crate::quota::{MAX_LIMIT, Quota};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// All searches of a simulation together take at most this time.
const MAX_TIME: Duration = Duration::from_mins(1);
/// Interval of progress reports.
const REPORT_INTERVAL: Duration = Duration::from_secs(2);
/// The first step upwards, in readable numbers: about the factor 3.
const FIRST_STEP: u32 = 45;

/// A limit that refuses no call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SufficientLimit {
    pub(super) limit: u64,
    /// The burst of the quota grows with its limit.
    pub(super) burst: u64,
    /// Whether the next smaller readable limit refuses a call. `false`: the time was over before that was known.
    pub(super) is_smallest: bool,
}

/// The time that is left for searches, and reports of their progress.
pub struct SearchBudget<'a> {
    /// Starts with the first search.
    clock: OnceLock<Stopwatch>,
    replays: AtomicU64,
    /// Number of reports so far.
    reports: AtomicU64,
    report: &'a (dyn Fn(&str) + Sync),
}

impl<'a> SearchBudget<'a> {
    /// Begins with the first search. `report` is called about every two seconds.
    pub fn new(report: &'a (dyn Fn(&str) + Sync)) -> Self {
        Self { clock: OnceLock::new(), replays: 0.into(), reports: 0.into(), report }
    }

    /// Counts a replay. Returns whether there is time for it.
    fn allows_replay(&self) -> bool {
        let elapsed = self.clock.get_or_init(Stopwatch::start).elapsed();
        let replays = self.replays.fetch_add(1, Ordering::Relaxed);
        let due = elapsed.as_secs() / REPORT_INTERVAL.as_secs();
        if replays > 0 && self.reports.fetch_max(due, Ordering::Relaxed) < due {
            let (seconds, max) = (elapsed.as_secs(), MAX_TIME.as_secs());
            (self.report)(&format!(
                "searching the smallest limits without refusals: {replays} replays in {seconds} s, at most {max} s"
            ));
        }
        elapsed < MAX_TIME
    }
}

/// For each quota of the environment, a limit that refuses no call if no other quota applies. So if every quota has this
/// limit, no call is refused, unless limits of an upstream refuse it. `None`: the quota applies to no call, no limit was found in time, or there is none. Unlimited quotas are
/// searched only if all are unlimited.
pub(super) fn sufficient_limits(
    environment: &Environment,
    outcomes: &[QuotaOutcome],
    calls: &[TraceCall],
    pace: Pace,
    budget: &SearchBudget<'_>,
) -> Vec<Option<SufficientLimit>> {
    let has_limit = outcomes.iter().any(|outcome| outcome.calls > 0 && !is_unlimited(&outcome.quota));
    let found =
        run_jobs(outcomes.len(), |at| search(environment, outcomes.get(at)?, has_limit, calls, pace, budget));
    found.into_iter().map(Option::flatten).collect()
}

/// Bisects the readable numbers. A replay proves that the result admits all calls. It is the smallest such number if a
/// larger limit never refuses more calls than a smaller one.
fn search(
    environment: &Environment,
    outcome: &QuotaOutcome,
    has_limit: bool,
    calls: &[TraceCall],
    pace: Pace,
    budget: &SearchBudget<'_>,
) -> Option<SufficientLimit> {
    let quota = &outcome.quota;
    if outcome.calls == 0 || is_unlimited(quota) && has_limit {
        return None;
    }
    let mut alone = environment.clone();
    alone.enforce = true;
    alone.max_in_flight = None;
    // `None`: the time is over, or the limit is too large.
    let mut suffices = |index: u32| {
        let limit = readable(index).filter(|limit| *limit <= MAX_LIMIT)?;
        alone.quotas = vec![with_limit(quota, limit)];
        budget.allows_replay().then(|| admits_all(&alone, calls, pace))
    };
    let start = if outcome.denials > 0 { quota.limit } else { quota.limit.min(outcome.spent) };
    // All numbers below `low` refuse a call; `high` refuses none.
    let (mut low, mut high, mut step) = (0, readable_index(start), FIRST_STEP);
    while !suffices(high)? {
        (low, high, step) = (high + 1, high + step, step.saturating_mul(2));
    }
    let mut is_smallest = true;
    while low < high {
        let middle = low.midpoint(high);
        match suffices(middle) {
            Some(true) => high = middle,
            Some(false) => low = middle + 1,
            None => {
                is_smallest = false;
                break;
            }
        }
    }
    let limit = readable(high)?;
    Some(SufficientLimit { limit, burst: with_limit(quota, limit).capacity(), is_smallest })
}

/// The quota with another limit, and a burst in proportion.
fn with_limit(quota: &Quota, limit: u64) -> Quota {
    let burst = u128::from(quota.capacity()) * u128::from(limit) / u128::from(quota.limit.max(1));
    quota.with_limit(limit, u64::try_from(burst).unwrap_or(MAX_LIMIT).clamp(1, MAX_LIMIT))
}

/// Whether the quota has no limit in practice.
pub(super) fn is_unlimited(quota: &Quota) -> bool {
    quota.limit >= MAX_LIMIT
}
