//! Replays a trace of calls through the quota engine on a virtual clock. The report shows which calls the quotas
//! admit, and compares several reservation modes with an oracle.
//!
//! Every answer is a stream: the first token follows after a delay, the others at a constant rate. A denied call
//! is not repeated, and no call waits in the wait queue (`max_wait` is ignored).

mod history;
mod report;
mod trace;

use crate::clock::Timestamp;
use crate::config::{CompletionReserve, Environment, OnOverrun, WhenShort};
use crate::ledger::{Demand, Grant, Local, NoRoom, Progress, Rules, Settlement};
use crate::quota::{Amounts, Kind, Quota, Scope, Subject, TokenBucket, Window};
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Duration;

pub use history::{history_start, refused_in_history};
pub use report::SimulationReport;
pub use trace::{TraceCall, TraceFault, read_trace};

/// Interval at which a stream reports its progress to the quotas (ms), as in the gateway.
const PROGRESS_INTERVAL_MS: u64 = 1_000;
/// Maximum number of progress reports per stream. Longer streams report at longer intervals.
const MAX_STEPS: u64 = 40;

/// The speed of all answers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pace {
    /// Delay from the request to the first token.
    pub first_token: Duration,
    /// Rate after the first token; more than 0.
    pub tokens_per_second: f64,
}

impl Default for Pace {
    fn default() -> Self {
        Self { first_token: Duration::from_millis(400), tokens_per_second: 30.0 }
    }
}

/// How a replay reserves tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Mode {
    /// By the settings of the environment.
    Configured,
    /// The prompt only.
    PromptOnly,
    /// Nothing. The answer is charged at its end.
    Afterwards,
    /// The prompt and `max_tokens` of the request, or `default_max_tokens`.
    MaxTokens,
    /// The prompt and this quantile of recent completions.
    Adaptive(f64),
    /// Exactly the amounts that the answer will use. A real gateway cannot predict them; the other modes are
    /// compared with this one.
    Oracle,
}

impl Mode {
    /// The modes that a report compares with the configured one.
    const OTHERS: [Self; 7] = [
        Self::Afterwards,
        Self::PromptOnly,
        Self::MaxTokens,
        Self::Adaptive(0.5),
        Self::Adaptive(0.9),
        Self::Adaptive(0.99),
        Self::Oracle,
    ];

    /// The name in reports.
    fn name(self) -> String {
        match self {
            Self::Configured => "as configured".into(),
            Self::Afterwards => "charge afterwards".into(),
            Self::PromptOnly => "prompt only".into(),
            Self::MaxTokens => "max_tokens".into(),
            Self::Adaptive(q) => format!("adaptive {q}"),
            Self::Oracle => "oracle".into(),
        }
    }

    fn rules(self, environment: &Environment) -> Rules {
        let mut rules = Rules::of(environment);
        let reserve = &mut rules.reserve;
        if self != Self::Configured {
            reserve.prompt = true;
            reserve.when_short = WhenShort::Reject;
            reserve.on_overrun = OnOverrun::Finish;
            // The comparison is between enforced quotas, also if the environment is in shadow mode.
            rules.enforce = true;
        }
        match self {
            Self::Configured => {}
            Self::Afterwards => {
                reserve.prompt = false;
                reserve.completion = CompletionReserve::None;
            }
            Self::PromptOnly => reserve.completion = CompletionReserve::None,
            // The replay sets the cap of an oracle call to the length of its answer.
            Self::MaxTokens | Self::Oracle => reserve.completion = CompletionReserve::MaxTokens,
            Self::Adaptive(quantile) => {
                reserve.completion = CompletionReserve::Adaptive;
                reserve.quantile = quantile;
            }
        }
        rules
    }
}

/// The result of replaying a trace.
#[derive(Clone, Debug, Default)]
struct ReplayOutcome {
    /// Number of admitted calls.
    admitted: u64,
    /// Number of denied calls.
    rejected: u64,
    /// Amounts that the admitted calls used.
    spent: Amounts,
    /// The results by quota, in the order of the config.
    quotas: Vec<QuotaOutcome>,
    /// Sum of the times from a denial to the next admission, in milliseconds.
    exhausted_ms: u64,
    /// Total tokens of all calls, by equal parts of the trace's duration.
    offered_by_time: Vec<u64>,
    /// Total tokens of the admitted calls, by the same parts.
    admitted_by_time: Vec<u64>,
}

impl ReplayOutcome {
    /// The largest overshoot of any quota, as a fraction of its capacity.
    fn overshoot(&self) -> f64 {
        self.quotas.iter().map(|q| q.overshoot).fold(0.0, f64::max)
    }

    /// The largest utilisation of any quota, as a fraction.
    fn utilisation(&self) -> f64 {
        self.quotas.iter().map(|q| q.utilisation).fold(0.0, f64::max)
    }
}

/// The result of a replay for one quota.
#[derive(Clone, Debug)]
struct QuotaOutcome {
    /// The quota.
    quota: Quota,
    /// Number of denials in which this quota could not hold the call.
    denials: u64,
    /// The spent amount as a fraction of the largest amount that the quota could admit during the trace.
    utilisation: f64,
    /// The largest excess over the permitted amount, as a fraction of the capacity.
    overshoot: f64,
    /// Sum of the times from a denial by this quota to the next admission, in milliseconds.
    exhausted_ms: u64,
}

/// Replays calls, sorted by time, through the quotas of an environment.
fn replay(environment: &Environment, calls: &[TraceCall], pace: Pace, mode: Mode) -> ReplayOutcome {
    let Some(first) = calls.first() else { return Replay::new(environment, calls, pace, mode).finish() };
    let mut replay = Replay::new(environment, calls, pace, mode);
    replay.now = first.at;
    for (at, call) in calls.iter().enumerate() {
        while let Some(&Reverse((due, ..))) = replay.events.peek()
            && due <= call.at
        {
            replay.step();
        }
        replay.now = call.at;
        replay.arrive(at);
    }
    while !replay.events.is_empty() {
        replay.step();
    }
    replay.finish()
}

/// Number of bars in a chart.
const CHART_COLUMNS: usize = 60;

/// A replay in progress.
struct Replay<'a> {
    local: Local,
    environment: &'a Environment,
    calls: &'a [TraceCall],
    pace: Pace,
    mode: Mode,
    now: Timestamp,
    /// Time, sequence number, and index into `in_flight` of each event. The sequence number orders events of the
    /// same time.
    events: BinaryHeap<Reverse<(Timestamp, u64, usize)>>,
    next_event: u64,
    /// `None` after the answer has ended.
    in_flight: Vec<Option<CallInFlight>>,
    meters: Vec<Meter>,
    outcome: ReplayOutcome,
    /// Time of the first denial since the last admission.
    denied_since: Option<Timestamp>,
}

/// An admitted call whose answer has not ended.
struct CallInFlight {
    /// Index of the call in the trace.
    call: usize,
    grant: Grant,
    /// Time of the first token.
    began: Timestamp,
    /// Tokens of the answer, after clamping.
    completion: u64,
    /// Milliseconds from the first token to the last.
    duration_ms: u64,
    /// Number of progress reports so far.
    steps: u64,
    /// Amounts that the meters have recorded.
    metered: Amounts,
}

/// Measures the overshoot of one quota independently of the engine: it charges an ideal counter of the same
/// size and rate at the moment of spending.
struct Meter {
    quota: Quota,
    ideal: IdealCounter,
    spent: u64,
    /// The lowest level of the ideal counter; below zero: overshoot.
    lowest_level: i64,
    denials: u64,
    denied_since: Option<Timestamp>,
    exhausted_ms: u64,
}

/// A counter that charges at the moment of spending.
enum IdealCounter {
    Rolling(Box<TokenBucket>),
    /// No separate counter: the debt in the engine's own counter is the overshoot.
    Calendar,
}

impl<'a> Replay<'a> {
    fn new(environment: &'a Environment, calls: &'a [TraceCall], pace: Pace, mode: Mode) -> Self {
        let start = calls.first().map_or(Timestamp(0), |call| call.at);
        let meter = |quota: &Quota| Meter {
            ideal: match quota.window {
                Window::Rolling { burst } => IdealCounter::Rolling(Box::new(TokenBucket::full(
                    quota.limit,
                    burst,
                    quota.per.ms,
                    start,
                ))),
                Window::Calendar { .. } => IdealCounter::Calendar,
            },
            quota: quota.clone(),
            spent: 0,
            lowest_level: 0,
            denials: 0,
            denied_since: None,
            exhausted_ms: 0,
        };
        Self {
            local: Local::new(mode.rules(environment), &environment.quotas, start),
            environment,
            calls,
            pace,
            mode,
            now: start,
            events: BinaryHeap::new(),
            next_event: 0,
            in_flight: Vec::new(),
            meters: environment.quotas.iter().map(meter).collect(),
            outcome: ReplayOutcome {
                offered_by_time: vec![0; CHART_COLUMNS],
                admitted_by_time: vec![0; CHART_COLUMNS],
                ..ReplayOutcome::default()
            },
            denied_since: None,
        }
    }

    /// Admits or denies a call.
    fn arrive(&mut self, at: usize) {
        let call = &self.calls[at];
        let tokens = call.prompt + call.completion;
        let column = self.column(call.at);
        self.outcome.offered_by_time[column] += tokens;
        let cap = if self.mode == Mode::Oracle { Some(call.completion) } else { call.max_tokens };
        let demand = Demand {
            subject: Subject { caller: None, model: &call.model },
            prompt: call.prompt,
            generates: true,
            cap,
            completions: 1,
        };
        match self.local.admit(self.now, &demand) {
            Ok(admission) => {
                self.outcome.admitted += 1;
                self.outcome.admitted_by_time[column] += tokens;
                self.end_denials();
                let bound = admission.clamped_to.or(call.max_tokens).unwrap_or(u64::MAX);
                self.begin(at, admission.grant, call.completion.min(bound));
            }
            Err(no_room) => self.record_denial(&no_room),
        }
    }

    fn begin(&mut self, call: usize, grant: Grant, completion: u64) {
        let began = self.now.plus_ms(ms(self.pace.first_token));
        let duration_ms = self.ms_for(completion);
        let running = CallInFlight {
            call,
            grant,
            began,
            completion,
            duration_ms,
            steps: 0,
            metered: Amounts::default(),
        };
        self.in_flight.push(Some(running));
        self.schedule(began, self.in_flight.len() - 1);
    }

    fn schedule(&mut self, at: Timestamp, index: usize) {
        self.next_event += 1;
        self.events.push(Reverse((at, self.next_event, index)));
    }

    /// Runs the next event: a stream begins, continues or ends.
    fn step(&mut self) {
        let Some(Reverse((at, _, index))) = self.events.pop() else { return };
        self.now = at;
        let Some(mut running) = self.in_flight[index].take() else { return };
        let streamed = at.ms_since(running.began);
        running.steps += 1;
        // With an extreme pace, the end of an answer is beyond the largest timestamp. The last step ends the answer
        // anyway.
        let is_last = running.steps > MAX_STEPS + 1;
        let within = if is_last { u64::MAX } else { self.tokens_within(streamed) };
        let delivered = within.min(running.completion);
        let prompt = self.calls[running.call].prompt;
        let spent = Amounts::of_request(prompt, delivered);
        self.meter(&mut running, spent);
        if delivered >= running.completion {
            self.end(running, spent);
            return;
        }
        let progress = self.local.progress(at, &self.calls[running.call].model, &mut running.grant, spent);
        if progress == Progress::Overrun && self.cuts() {
            self.end(running, spent);
            return;
        }
        let step = PROGRESS_INTERVAL_MS.max(running.duration_ms / MAX_STEPS);
        let next = streamed.saturating_add(step).min(running.duration_ms.max(streamed + 1));
        self.schedule(running.began.plus_ms(next), index);
        self.in_flight[index] = Some(running);
    }

    /// Whether an overrun ends the stream.
    fn cuts(&self) -> bool {
        let Environment { enforce, reserve, .. } = self.environment;
        self.mode == Mode::Configured && *enforce && reserve.on_overrun == OnOverrun::Cut
    }

    fn end(&mut self, running: CallInFlight, spent: Amounts) {
        let subject = Subject { caller: None, model: &self.calls[running.call].model };
        let settlement = Settlement { spent, is_complete: spent.completion >= running.completion };
        self.local.settle(self.now, subject, running.grant, settlement);
        self.outcome.spent = self.outcome.spent.saturating_add(spent);
        let is_calendar = |meter: &Meter| matches!(meter.ideal, IdealCounter::Calendar);
        if !self.meters.iter().any(is_calendar) {
            return;
        }
        let levels = self.local.levels(self.now);
        for (meter, level) in self.meters.iter_mut().zip(levels).filter(|(meter, _)| is_calendar(meter)) {
            meter.lowest_level = meter.lowest_level.min(level.level);
        }
    }

    fn meter(&mut self, running: &mut CallInFlight, spent: Amounts) {
        let more = spent.saturating_sub(running.metered);
        running.metered = spent;
        let model = &self.calls[running.call].model;
        for meter in self.meters.iter_mut().filter(|meter| meter.measures(model)) {
            meter.spend(self.now, more.of(meter.quota.kind));
        }
    }

    /// Records a denial.
    fn record_denial(&mut self, no_room: &NoRoom) {
        self.outcome.rejected += 1;
        self.denied_since.get_or_insert(self.now);
        let NoRoom::Quota(denied) = no_room else { return };
        for shortfall in denied.shortfalls() {
            let has_quota = |meter: &&mut Meter| meter.quota.is_same_as(&shortfall.quota);
            if let Some(meter) = self.meters.iter_mut().find(has_quota) {
                meter.denials += 1;
                meter.denied_since.get_or_insert(self.now);
            }
        }
    }

    /// Ends the time in which calls were denied, because a call was admitted.
    fn end_denials(&mut self) {
        if let Some(since) = self.denied_since.take() {
            self.outcome.exhausted_ms += self.now.ms_since(since);
        }
        for meter in &mut self.meters {
            if let Some(since) = meter.denied_since.take() {
                meter.exhausted_ms += self.now.ms_since(since);
            }
        }
    }

    fn finish(mut self) -> ReplayOutcome {
        self.end_denials();
        let span = self.calls.first().zip(self.calls.last()).map_or(0, |(a, b)| b.at.ms_since(a.at));
        self.outcome.quotas = self.meters.into_iter().map(|meter| meter.outcome(span)).collect();
        self.outcome
    }

    /// Index of the chart column of a time.
    fn column(&self, at: Timestamp) -> usize {
        let (Some(first), Some(last)) = (self.calls.first(), self.calls.last()) else { return 0 };
        let (since, span) = (at.ms_since(first.at), last.at.ms_since(first.at) + 1);
        usize::try_from(u128::from(since) * CHART_COLUMNS as u128 / u128::from(span))
            .unwrap_or(0)
            .min(CHART_COLUMNS - 1)
    }

    /// Tokens delivered `ms` milliseconds after the first token.
    fn tokens_within(&self, ms: u64) -> u64 {
        #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let more = (ms as f64 / 1_000.0 * self.pace.tokens_per_second + 1e-6) as u64;
        more.saturating_add(1)
    }

    /// Milliseconds from the first to the last of `tokens` tokens.
    fn ms_for(&self, tokens: u64) -> u64 {
        #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let ms = (tokens.saturating_sub(1) as f64 / self.pace.tokens_per_second * 1_000.0).ceil() as u64;
        ms
    }
}

impl Meter {
    /// Whether the quota applies to a call. Calls of a trace have no caller.
    fn measures(&self, model: &str) -> bool {
        match &self.quota.scope {
            Scope::Environment => true,
            Scope::Caller(_) => false,
            Scope::Model(pattern) => pattern.matches(model),
        }
    }

    fn spend(&mut self, now: Timestamp, amount: u64) {
        self.spent += amount;
        if let IdealCounter::Rolling(bucket) = &mut self.ideal {
            bucket.refill(now);
            bucket.reserve(amount);
            bucket.settle(amount, amount.cast_signed());
            self.lowest_level = self.lowest_level.min(bucket.level());
        }
    }

    #[allow(clippy::cast_precision_loss)] // fractions for display
    fn outcome(self, span_ms: u64) -> QuotaOutcome {
        let capacity = self.quota.capacity() as f64;
        let periods = span_ms as f64 / self.quota.per.ms as f64;
        let permitted = match self.quota.window {
            Window::Rolling { .. } => capacity + self.quota.limit as f64 * periods,
            Window::Calendar { .. } => capacity * periods.ceil().max(1.0),
        };
        QuotaOutcome {
            denials: self.denials,
            utilisation: self.spent as f64 / permitted,
            overshoot: self.lowest_level.unsigned_abs() as f64 / capacity,
            exhausted_ms: self.exhausted_ms,
            quota: self.quota,
        }
    }
}

fn ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Whether a quota counts tokens.
fn counts_tokens(quota: &Quota) -> bool {
    quota.kind != Kind::Requests
}

#[cfg(test)]
mod tests;
