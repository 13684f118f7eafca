//! Replays the usage history through a quota that is not in force: how many requests would it have refused?

use crate::clock::Timestamp;
use crate::ledger::UsageInterval;
use crate::quota::{Amounts, CounterState, Kind, Quota, Quotas, Required, Scope, Subject};

const HOUR_MS: u64 = 3_600_000;
/// The history is read from at most this long before the last hour: 31 days.
const MAX_EARLIER_MS: u64 = 31 * 24 * HOUR_MS;
/// Maximum number of arrivals that a replay simulates in the last hour, and again before it. If there were more
/// requests, several arrive together.
const MAX_ARRIVALS: u64 = 25_000;

/// The time from which [`refused_in_history`] needs the history, at most 31 days before the last hour. For a calendar
/// quota: the begin of the period in which the hour begins. For a rolling one: early enough to fill an empty bucket.
pub fn history_start(quota: &Quota, now: Timestamp) -> Timestamp {
    let hour = hour_before(now);
    let earliest = minus_ms(hour, MAX_EARLIER_MS);
    let start = match Quotas::new(std::slice::from_ref(quota), hour).states(hour).first() {
        Some(&CounterState::Calendar { period: (start, _), .. }) => start,
        Some(&CounterState::Rolling { limit, burst, .. }) => {
            let full_ms = u128::from(burst) * u128::from(quota.per.ms) / u128::from(limit.max(1)) + 1;
            minus_ms(hour, u64::try_from(full_ms).unwrap_or(u64::MAX))
        }
        None => hour,
    };
    start.max(earliest)
}

/// How many requests of the last hour `quota` would have refused, if it had been in force since [`history_start`] and
/// had been full then.
///
/// `history` is the usage of the requests that the quota applies to. The store reads it:
///
/// ```ignore
/// let from = history_start(&quota, now);
/// let history = store::read_usage_intervals(path, environment, &quota.scope, from, now)?;
/// let refused = refused_in_history(&quota, &history, now);
/// ```
///
/// The result is an estimate, because the history contains sums and no single requests:
///
/// - The requests of an interval (a minute in the last hour) arrive evenly spread over it, at the time of their
///   settlement. A burst within a minute is not seen.
/// - Each request has the mean size of the charged requests of its interval. Without any in the interval, it has the mean
///   size of the whole history.
/// - Denied requests count as demand too, whichever quota denied them, also if they repeat an earlier one.
/// - The answer is charged at once, with its actual size. The real gateway holds an estimate while the answer runs.
/// - No other quota applies, and no request waits.
/// - Of more than 25,000 requests in the hour, several arrive together. If not all of them fit, the first ones that do
///   are admitted.
///
/// With requests of one size, a lower limit and burst never refuse fewer requests. With several sizes they may: a lower
/// limit may refuse one large request and admit several small ones.
///
/// Returns `None` if the quota counts tokens and the size of no request is known: the history has denied requests only.
///
/// Takes up to 50 ms, so it belongs on the blocking pool (`cargo bench --bench engine`).
pub fn refused_in_history(quota: &Quota, history: &[UsageInterval], now: Timestamp) -> Option<u64> {
    let all = history.iter().fold(Amounts::default(), |sum, interval| sum.saturating_add(interval.spent));
    let is_size_known = all.requests > 0 || quota.kind == Kind::Requests;
    if !is_size_known {
        let denied = history.iter().any(|interval| interval.rejections > 0);
        return if denied { None } else { Some(0) };
    }
    let hour = hour_before(now);
    let demands: Vec<IntervalDemand> = history.iter().map(|i| IntervalDemand::of(i, all, now)).collect();
    let mut arrivals = arrivals(&demands, hour);
    arrivals.sort_by_key(|arrival| arrival.at);
    let Some(first) = arrivals.first() else { return Some(0) };
    // The history contains only requests that the quota applies to.
    let quota = Quota { scope: Scope::Environment, ..quota.clone() };
    let mut quotas = Quotas::new(&[quota], first.at);
    let mut refused = 0_u64;
    for arrival in &arrivals {
        let admitted = admit(&mut quotas, arrival, &demands[arrival.interval]);
        if arrival.at >= hour {
            refused = refused.saturating_add(arrival.requests - admitted);
        }
    }
    Some(refused)
}

/// The requests of one interval, charged and denied.
struct IntervalDemand {
    start: Timestamp,
    length_ms: u64,
    requests: u64,
    /// What all of them together use.
    total: Amounts,
}

/// Requests of one interval that arrive at the same time.
struct Arrival {
    at: Timestamp,
    /// Index of the interval.
    interval: usize,
    /// Index of the first request in its interval.
    first: u64,
    requests: u64,
}

impl IntervalDemand {
    /// `all`: the charged amounts of the whole history.
    fn of(interval: &UsageInterval, all: Amounts, now: Timestamp) -> Self {
        let spent = interval.spent;
        let requests = spent.requests.saturating_add(interval.rejections);
        let mean = if spent.requests > 0 { spent } else { all };
        let scaled = |amount: u64| scale(amount, requests, mean.requests);
        Self {
            start: interval.start,
            // The current minute has not ended yet.
            length_ms: interval.end.min(now).ms_since(interval.start).max(1),
            requests,
            total: Amounts {
                requests,
                prompt: scaled(mean.prompt),
                completion: scaled(mean.completion),
                total: scaled(mean.total),
            },
        }
    }

    fn time_of(&self, request: u64) -> Timestamp {
        self.start.plus_ms(scale(self.length_ms, request, self.requests))
    }

    /// What `count` requests use, from request `first` on. The sizes of two requests of an interval differ by at most 1.
    fn amounts(&self, first: u64, count: u64) -> Amounts {
        let until = |request: u64| Amounts {
            requests: request,
            prompt: scale(self.total.prompt, request, self.requests),
            completion: scale(self.total.completion, request, self.requests),
            total: scale(self.total.total, request, self.requests),
        };
        until(first + count).saturating_sub(until(first))
    }
}

/// All requests in groups: single ones, unless there are too many.
fn arrivals(demands: &[IntervalDemand], hour: Timestamp) -> Vec<Arrival> {
    let is_last_hour = |demand: &IntervalDemand| demand.start.plus_ms(demand.length_ms) > hour;
    let group_size = |in_last_hour: bool| {
        let counted = demands.iter().filter(|demand| is_last_hour(demand) == in_last_hour);
        let requests = counted.fold(0_u64, |sum, demand| sum.saturating_add(demand.requests));
        requests.div_ceil(MAX_ARRIVALS).max(1)
    };
    let (earlier, last_hour) = (group_size(false), group_size(true));
    let mut arrivals = Vec::new();
    for (interval, demand) in demands.iter().enumerate() {
        let size = if is_last_hour(demand) { last_hour } else { earlier };
        let mut first = 0;
        while first < demand.requests {
            let requests = size.min(demand.requests - first);
            arrivals.push(Arrival { at: demand.time_of(first), interval, first, requests });
            first += requests;
        }
    }
    arrivals
}

/// Admits as many requests of an arrival as fit, and charges them. Returns their number.
fn admit(quotas: &mut Quotas, arrival: &Arrival, demand: &IntervalDemand) -> u64 {
    let applicable = quotas.applicable(Subject { caller: None, model: "" });
    let required = |count| Required { amounts: demand.amounts(arrival.first, count), generates: true };
    let all = required(arrival.requests);
    if let Ok(receipt) = quotas.reserve(arrival.at, &applicable, &all) {
        quotas.settle(arrival.at, receipt, all.amounts);
        return arrival.requests;
    }
    let (mut fits, mut misfits) = (0, arrival.requests);
    while misfits - fits > 1 {
        let middle = fits.midpoint(misfits);
        match quotas.denial(arrival.at, &applicable, &required(middle)) {
            None => fits = middle,
            Some(_) => misfits = middle,
        }
    }
    if fits > 0
        && let Ok(receipt) = quotas.reserve(arrival.at, &applicable, &required(fits))
    {
        quotas.settle(arrival.at, receipt, required(fits).amounts);
    }
    fits
}

/// `amount * part / whole`, rounded down.
fn scale(amount: u64, part: u64, whole: u64) -> u64 {
    let scaled = u128::from(amount) * u128::from(part) / u128::from(whole.max(1));
    u64::try_from(scaled).unwrap_or(u64::MAX)
}

fn hour_before(now: Timestamp) -> Timestamp {
    minus_ms(now, HOUR_MS)
}

fn minus_ms(at: Timestamp, ms: u64) -> Timestamp {
    Timestamp(at.0.saturating_sub(i64::try_from(ms).unwrap_or(i64::MAX)))
}

#[cfg(test)]
mod tests {
    use super::super::replay::replay;
    use super::super::traffic::Traffic;
    use super::super::{Mode, Pace, TraceCall};
    use super::*;
    use crate::config::{Environment, parse};
    use crate::quota::MAX_LIMIT;
    use proptest::prelude::*;
    use std::time::Duration;

    const NOW: Timestamp = Timestamp(1_774_700_040_000);
    const MINUTE_MS: u64 = 60_000;
    const ROLLING: &str = "per: minute";

    fn environment(kind: &str, limit: u64, more: &str) -> Environment {
        let text = format!(
            "upstreams: {{ u: {{ base_url: http://u/v1 }} }}\nenvironments: {{ e: {{ upstream: u, quotas: {{ {kind}: {{ limit: {limit}, {more} }} }} }} }}\nstore: {{ memory: true }}\n"
        );
        let loaded = parse(&text, "test.yaml", &|_| None, &[]).unwrap_or_else(|faults| panic!("{faults}"));
        (*loaded.config.environments[0]).clone()
    }

    fn quota(kind: &str, limit: u64, more: &str) -> Quota {
        environment(kind, limit, more).quotas[0].clone()
    }

    /// The usage of the minute that begins this many minutes before the current one.
    fn minute(ago: u64, requests: u64, rejections: u64, prompt: u64) -> UsageInterval {
        let start = minus_ms(NOW, ago * MINUTE_MS);
        let spent = Amounts { requests, prompt, completion: 0, total: prompt };
        UsageInterval { start, end: start.plus_ms(MINUTE_MS), rejections, spent }
    }

    /// An hour of minutes, the oldest first. Each tuple: requests, rejections and prompt tokens of a request.
    fn hour_of(minutes: &[(u64, u64, u64)]) -> Vec<UsageInterval> {
        let numbered = (1..).zip(minutes.iter().rev());
        let mut hour: Vec<_> = numbered
            .map(|(ago, &(requests, denied, each))| minute(ago, requests, denied, requests * each))
            .collect();
        hour.reverse();
        hour
    }

    /// The requests that the history stands for, as a trace.
    fn trace_of(history: &[UsageInterval]) -> Vec<TraceCall> {
        let all = history.iter().fold(Amounts::default(), |sum, i| sum.saturating_add(i.spent));
        let mut calls = Vec::new();
        for demand in history.iter().map(|interval| IntervalDemand::of(interval, all, NOW)) {
            calls.extend((0..demand.requests).map(|request| TraceCall {
                at: demand.time_of(request),
                prompt: demand.amounts(request, 1).prompt,
                completion: 0,
                environment: None,
                max_tokens: None,
                api: Some("chat"),
                model: String::new(),
                caller: None,
                generates: true,
                pace: None,
            }));
        }
        calls
    }

    fn minutes() -> impl Strategy<Value = Vec<(u64, u64, u64)>> {
        proptest::collection::vec((0..40_u64, 0..10_u64, 0..200_u64), 1..60)
    }

    fn windows() -> impl Strategy<Value = &'static str> {
        prop_oneof![
            Just(ROLLING),
            Just("per: 10s"),
            Just("per: minute, burst: 300"),
            Just("per: hour"),
            Just("per: minute, window: calendar"),
            Just("per: day")
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn an_unlimited_quota_refuses_nothing(minutes in minutes(), window in windows()) {
            for kind in ["requests", "total_tokens"] {
                let quota = quota(kind, MAX_LIMIT, window).with_limit(MAX_LIMIT, MAX_LIMIT);
                prop_assert_eq!(refused_in_history(&quota, &hour_of(&minutes), NOW).unwrap_or(0), 0);
            }
        }

        #[test]
        fn the_result_is_that_of_a_simulation(minutes in minutes(), window in windows(), limit in 1..3_000_u64) {
            let history = hour_of(&minutes);
            for kind in ["requests", "prompt_tokens", "total_tokens"] {
                let environment = environment(kind, limit, window);
                let instant = Pace { first_token: Duration::ZERO, tokens_per_second: 1e9 };
                let simulated = replay(&Traffic::alone(&environment, &trace_of(&history)), 0, instant, Mode::Oracle);
                if let Some(refused) = refused_in_history(&environment.quotas[0], &history, NOW) {
                    prop_assert_eq!(refused, simulated.rejected, "{}", kind);
                }
            }
        }

        #[test]
        fn a_lower_limit_refuses_no_fewer_requests_of_one_size(
            counts in proptest::collection::vec((0..40_u64, 0..10_u64), 1..60),
            each in 0..200_u64,
            window in windows(),
            limits in (1..3_000_u64, 1..3_000_u64),
        ) {
            let history = hour_of(&counts.iter().map(|&(n, denied)| (n, denied, each)).collect::<Vec<_>>());
            for kind in ["requests", "total_tokens"] {
                let refused = |limit| {
                    let quota = quota(kind, 1, window).with_limit(limit, limit * 3 / 2 + 1);
                    refused_in_history(&quota, &history, NOW)
                };
                let (lower, higher) = (limits.0.min(limits.1), limits.0.max(limits.1));
                prop_assert!(refused(lower) >= refused(higher), "{:?} {:?}", refused(lower), refused(higher));
            }
        }
    }

    #[test]
    fn a_lower_limit_may_admit_small_requests_in_place_of_a_large_one() {
        // A minute with one request of 1,000 tokens, then one with ten of 100.
        let history = [minute(2, 1, 0, 1_000), minute(1, 10, 0, 1_000)];
        let refused = |limit| refused_in_history(&quota("total_tokens", limit, "per: day"), &history, NOW);
        assert_eq!((refused(1_000), refused(999)), (Some(10), Some(2)));
    }

    #[test]
    fn requests_before_the_hour_use_the_quota_but_are_not_counted() {
        let quota = quota("requests", 100, "per: day");
        let before = minute(90, 60, 30, 0);
        let start = history_start(&quota, NOW);
        assert!(start <= before.start, "{start:?}");
        assert_eq!(refused_in_history(&quota, &[before, minute(30, 40, 0, 0)], NOW), Some(30));
        assert_eq!(refused_in_history(&quota, &[minute(30, 40, 0, 0)], NOW), Some(0));
        let minutes_before = |kind, limit, more| {
            hour_before(NOW)
                .ms_since(history_start(&super::tests::quota(kind, limit, more), NOW))
                .div_ceil(MINUTE_MS)
        };
        assert_eq!(minutes_before("requests", 60, "per: minute"), 2);
        assert_eq!(minutes_before("requests", 60, "per: minute, burst: 600"), 11);
        assert_eq!(minutes_before("requests", 1, "per: month, window: rolling, burst: 600"), 31 * 24 * 60);
    }

    #[test]
    fn denied_requests_have_the_mean_size() {
        let quota = quota("total_tokens", 1_000, "per: hour, burst: 1000");
        // Ten requests of 100 tokens, and two denied ones of the same size.
        let refused = refused_in_history(&quota, &[minute(2, 10, 0, 1_000), minute(1, 0, 2, 0)], NOW);
        assert_eq!(refused, Some(2));
        let only_denied = [minute(1, 0, 2, 0)];
        assert_eq!(refused_in_history(&quota, &only_denied, NOW), None);
        assert_eq!(refused_in_history(&quota, &[], NOW), Some(0));
        let of_requests = super::tests::quota("requests", 1, "per: hour, burst: 1");
        assert_eq!(refused_in_history(&of_requests, &only_denied, NOW), Some(1));
    }

    #[test]
    fn many_requests_arrive_in_groups() {
        let quota = quota("requests", 1_000, ROLLING);
        let refused = |each: u64| {
            let history: Vec<_> = (1..=60).rev().map(|ago| minute(ago, each, 0, 0)).collect();
            refused_in_history(&quota, &history, NOW).unwrap()
        };
        // The bucket admits 1,000 at once, and 1,000 a minute.
        for each in [1_600, 5_000, u64::MAX / 60] {
            let admitted = each * 60 - refused(each);
            assert!((60_900..=61_000).contains(&admitted), "{each}: {admitted}");
        }
    }

    #[test]
    fn extreme_amounts_are_accepted() {
        let most = UsageInterval {
            start: Timestamp(i64::MIN),
            end: Timestamp(i64::MAX),
            rejections: u64::MAX,
            spent: Amounts { requests: u64::MAX, prompt: u64::MAX, completion: u64::MAX, total: u64::MAX },
        };
        for (window, limit, now) in [(ROLLING, 1, NOW), ("per: day", MAX_LIMIT, Timestamp(i64::MAX))] {
            let quota = quota("total_tokens", 1, window).with_limit(limit, limit);
            assert!(refused_in_history(&quota, &[most, minute(1, 1, 1, u64::MAX)], now).is_some());
            history_start(&quota, Timestamp(i64::MIN));
        }
    }
}
