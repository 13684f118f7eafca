//! Replays a trace through the real quota engine on a virtual clock: what would these quotas have done
//! to this traffic, and how close would each way of reserving have come to an oracle?
//!
//! Every call is a stream: its first token comes after a while, the others at an even pace; a call that
//! is denied is gone. Requests do not wait in line (`max_wait`).

mod report;
mod trace;

use crate::clock::Timestamp;
use crate::config::{CompletionReserve, Environment, OnOverrun, WhenShort};
use crate::ledger::{Demand, Grant, Local, NoRoom, Progress, Rules, Settlement};
use crate::quota::{Amounts, Kind, Quota, Scope, Subject, TokenBucket, Window};
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Duration;

pub use report::{Report, chart};
pub use trace::{Call, TraceFault, read_trace};

/// How often a stream tells what it has used, as in the gateway.
const PROGRESS_MS: u64 = 1_000;
/// And so often at most: of an answer that lasts longer, in larger steps.
const MOST_STEPS: u64 = 40;

/// How answers come.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pace {
    /// From the request to the first token.
    pub first_token: Duration,
    /// From then on; more than 0.
    pub tokens_per_second: f64,
}

impl Default for Pace {
    fn default() -> Self {
        Self { first_token: Duration::from_millis(400), tokens_per_second: 30.0 }
    }
}

/// A way of reserving the completion.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Mode {
    /// As the environment is configured.
    Configured,
    /// Nothing but the prompt.
    PromptOnly,
    /// Nothing at all: charged afterwards.
    Afterwards,
    /// The request's own cap, or the default.
    MaxTokens,
    /// What this share of recent answers stayed within.
    Adaptive(f64),
    /// Exactly what the answer will use: nobody can know that.
    Oracle,
}

impl Mode {
    /// Those that a report compares with the configured one.
    pub const OTHERS: [Self; 7] = [
        Self::Afterwards,
        Self::PromptOnly,
        Self::MaxTokens,
        Self::Adaptive(0.5),
        Self::Adaptive(0.9),
        Self::Adaptive(0.99),
        Self::Oracle,
    ];

    /// Its name in reports.
    pub fn name(self) -> String {
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
            // What is asked is what quotas that are enforced would do.
            rules.enforce = true;
        }
        match self {
            Self::Configured => {}
            Self::Afterwards => {
                reserve.prompt = false;
                reserve.completion = CompletionReserve::None;
            }
            Self::PromptOnly => reserve.completion = CompletionReserve::None,
            // The oracle's cap is the answer's own length.
            Self::MaxTokens | Self::Oracle => reserve.completion = CompletionReserve::MaxTokens,
            Self::Adaptive(quantile) => {
                reserve.completion = CompletionReserve::Adaptive;
                reserve.quantile = quantile;
            }
        }
        rules
    }
}

/// What became of a trace.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// Calls admitted.
    pub admitted: u64,
    /// Calls denied.
    pub rejected: u64,
    /// What the admitted ones used.
    pub spent: Amounts,
    /// Every quota, in the config's order.
    pub quotas: Vec<QuotaOutcome>,
    /// From a denial to the next admission, all together.
    pub exhausted_ms: u64,
    /// Total tokens offered, and of those admitted, in equal parts of the trace's time.
    pub offered_by_time: Vec<u64>,
    /// See `offered_by_time`.
    pub admitted_by_time: Vec<u64>,
}

impl Outcome {
    /// The largest overshoot of any quota, as a share of what it can hold.
    pub fn overshoot(&self) -> f64 {
        self.quotas.iter().map(|q| q.overshoot).fold(0.0, f64::max)
    }

    /// The largest utilisation of any quota.
    pub fn utilisation(&self) -> f64 {
        self.quotas.iter().map(|q| q.utilisation).fold(0.0, f64::max)
    }
}

/// What became of one quota.
#[derive(Clone, Debug)]
pub struct QuotaOutcome {
    /// The quota.
    pub quota: Quota,
    /// Denials in which it had no room.
    pub denials: u64,
    /// What was spent of it, as a share of all that it could let through in the trace's time.
    pub utilisation: f64,
    /// The largest excess over what it may let through, as a share of what it can hold.
    pub overshoot: f64,
    /// From a denial for want of its room to the next admission, all together.
    pub exhausted_ms: u64,
}

/// Replays the calls, which are in the order of time, through an environment's quotas.
pub fn replay(environment: &Environment, calls: &[Call], pace: Pace, mode: Mode) -> Outcome {
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

/// Parts of time that a chart shows.
const COLUMNS: usize = 60;

struct Replay<'a> {
    local: Local,
    environment: &'a Environment,
    calls: &'a [Call],
    pace: Pace,
    mode: Mode,
    now: Timestamp,
    /// When, and which flight; the second number keeps the order of what is due at once.
    events: BinaryHeap<Reverse<(Timestamp, u64, usize)>>,
    next_event: u64,
    flights: Vec<Option<Flight>>,
    meters: Vec<Meter>,
    outcome: Outcome,
    /// Since when calls are denied.
    denied_since: Option<Timestamp>,
}

/// A call that is being answered.
struct Flight {
    call: usize,
    grant: Grant,
    began: Timestamp,
    /// Its answer's length, after any clamping.
    completion: u64,
    /// How long it takes from its first token to its last, and how often it has been looked at.
    whole_ms: u64,
    steps: u64,
    /// What the meters have been told.
    metered: Amounts,
}

/// Measures one quota from outside: what an ideal bucket of its size and rate makes of the spending.
struct Meter {
    quota: Quota,
    ideal: Ideal,
    spent: u64,
    worst: i64,
    denials: u64,
    denied_since: Option<Timestamp>,
    exhausted_ms: u64,
}

enum Ideal {
    Rolling(Box<TokenBucket>),
    /// The engine's own count serves: debt is excess.
    Calendar,
}

impl<'a> Replay<'a> {
    fn new(environment: &'a Environment, calls: &'a [Call], pace: Pace, mode: Mode) -> Self {
        let start = calls.first().map_or(Timestamp(0), |call| call.at);
        let meter = |quota: &Quota| Meter {
            ideal: match quota.window {
                Window::Rolling { burst } => {
                    Ideal::Rolling(Box::new(TokenBucket::full(quota.limit, burst, quota.per.ms, start)))
                }
                Window::Calendar { .. } => Ideal::Calendar,
            },
            quota: quota.clone(),
            spent: 0,
            worst: 0,
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
            flights: Vec::new(),
            meters: environment.quotas.iter().map(meter).collect(),
            outcome: Outcome {
                offered_by_time: vec![0; COLUMNS],
                admitted_by_time: vec![0; COLUMNS],
                ..Outcome::default()
            },
            denied_since: None,
        }
    }

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
                self.admitted_again();
                let bound = admission.clamped_to.or(call.max_tokens).unwrap_or(u64::MAX);
                self.begin(at, admission.grant, call.completion.min(bound));
            }
            Err(no_room) => self.denied(&no_room),
        }
    }

    fn begin(&mut self, call: usize, grant: Grant, completion: u64) {
        let began = self.now.plus_ms(ms(self.pace.first_token));
        let whole_ms = self.ms_for(completion);
        let flight =
            Flight { call, grant, began, completion, whole_ms, steps: 0, metered: Amounts::default() };
        self.flights.push(Some(flight));
        self.schedule(began, self.flights.len() - 1);
    }

    fn schedule(&mut self, at: Timestamp, flight: usize) {
        self.next_event += 1;
        self.events.push(Reverse((at, self.next_event, flight)));
    }

    /// The next thing that happens: a stream begins, goes on or ends.
    fn step(&mut self) {
        let Some(Reverse((at, _, index))) = self.events.pop() else { return };
        self.now = at;
        let Some(mut flight) = self.flights[index].take() else { return };
        let streamed = at.ms_since(flight.began);
        flight.steps += 1;
        // Times beyond the end of time never come: the last step is the answer's end all the same.
        let is_last = flight.steps > MOST_STEPS + 1;
        let within = if is_last { u64::MAX } else { self.tokens_within(streamed) };
        let delivered = within.min(flight.completion);
        let prompt = self.calls[flight.call].prompt;
        let spent = Amounts::of_request(prompt, delivered);
        self.meter(&mut flight, spent);
        if delivered >= flight.completion {
            self.end(flight, spent);
            return;
        }
        let progress = self.local.progress(at, &self.calls[flight.call].model, &mut flight.grant, spent);
        if progress == Progress::Overrun && self.cuts() {
            self.end(flight, spent);
            return;
        }
        let step = PROGRESS_MS.max(flight.whole_ms / MOST_STEPS);
        let next = streamed.saturating_add(step).min(flight.whole_ms.max(streamed + 1));
        self.schedule(flight.began.plus_ms(next), index);
        self.flights[index] = Some(flight);
    }

    fn cuts(&self) -> bool {
        let Environment { enforce, reserve, .. } = self.environment;
        self.mode == Mode::Configured && *enforce && reserve.on_overrun == OnOverrun::Cut
    }

    fn end(&mut self, flight: Flight, spent: Amounts) {
        let subject = Subject { caller: None, model: &self.calls[flight.call].model };
        let settlement = Settlement { spent, is_complete: spent.completion >= flight.completion };
        self.local.settle(self.now, subject, flight.grant, settlement);
        self.outcome.spent = self.outcome.spent.saturating_add(spent);
        let is_calendar = |meter: &Meter| matches!(meter.ideal, Ideal::Calendar);
        if !self.meters.iter().any(is_calendar) {
            return;
        }
        let levels = self.local.levels(self.now);
        for (meter, level) in self.meters.iter_mut().zip(levels).filter(|(meter, _)| is_calendar(meter)) {
            meter.worst = meter.worst.min(level.level);
        }
    }

    fn meter(&mut self, flight: &mut Flight, spent: Amounts) {
        let more = spent.saturating_sub(flight.metered);
        flight.metered = spent;
        let model = &self.calls[flight.call].model;
        for meter in self.meters.iter_mut().filter(|meter| meter.measures(model)) {
            meter.spend(self.now, more.of(meter.quota.kind));
        }
    }

    fn denied(&mut self, no_room: &NoRoom) {
        self.outcome.rejected += 1;
        self.denied_since.get_or_insert(self.now);
        let NoRoom::Quota(denied) = no_room else { return };
        for shortfall in denied.shortfalls() {
            let is_it = |meter: &&mut Meter| meter.quota.is_same_as(&shortfall.quota);
            if let Some(meter) = self.meters.iter_mut().find(is_it) {
                meter.denials += 1;
                meter.denied_since.get_or_insert(self.now);
            }
        }
    }

    fn admitted_again(&mut self) {
        if let Some(since) = self.denied_since.take() {
            self.outcome.exhausted_ms += self.now.ms_since(since);
        }
        for meter in &mut self.meters {
            if let Some(since) = meter.denied_since.take() {
                meter.exhausted_ms += self.now.ms_since(since);
            }
        }
    }

    fn finish(mut self) -> Outcome {
        self.admitted_again();
        let span = self.calls.first().zip(self.calls.last()).map_or(0, |(a, b)| b.at.ms_since(a.at));
        self.outcome.quotas = self.meters.into_iter().map(|meter| meter.outcome(span)).collect();
        self.outcome
    }

    fn column(&self, at: Timestamp) -> usize {
        let (Some(first), Some(last)) = (self.calls.first(), self.calls.last()) else { return 0 };
        let (since, span) = (at.ms_since(first.at), last.at.ms_since(first.at) + 1);
        usize::try_from(u128::from(since) * COLUMNS as u128 / u128::from(span)).unwrap_or(0).min(COLUMNS - 1)
    }

    /// Tokens delivered so long after the first one.
    fn tokens_within(&self, ms: u64) -> u64 {
        #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let more = (ms as f64 / 1_000.0 * self.pace.tokens_per_second + 1e-6) as u64;
        more.saturating_add(1)
    }

    /// How long after its first token an answer of so many is whole.
    fn ms_for(&self, tokens: u64) -> u64 {
        #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let ms = (tokens.saturating_sub(1) as f64 / self.pace.tokens_per_second * 1_000.0).ceil() as u64;
        ms
    }
}

impl Meter {
    /// Calls of a trace have no caller.
    fn measures(&self, model: &str) -> bool {
        match &self.quota.scope {
            Scope::Environment => true,
            Scope::Caller(..) => false,
            Scope::Model(pattern) => pattern.matches(model),
        }
    }

    fn spend(&mut self, now: Timestamp, amount: u64) {
        self.spent += amount;
        if let Ideal::Rolling(bucket) = &mut self.ideal {
            bucket.refill(now);
            bucket.reserve(amount);
            bucket.settle(amount, amount.cast_signed());
            self.worst = self.worst.min(bucket.level());
        }
    }

    #[allow(clippy::cast_precision_loss)] // shares to show
    fn outcome(self, span_ms: u64) -> QuotaOutcome {
        let capacity = self.quota.capacity() as f64;
        let periods = span_ms as f64 / self.quota.per.ms as f64;
        let most = match self.quota.window {
            Window::Rolling { .. } => capacity + self.quota.limit as f64 * periods,
            Window::Calendar { .. } => capacity * periods.ceil().max(1.0),
        };
        QuotaOutcome {
            denials: self.denials,
            utilisation: self.spent as f64 / most,
            overshoot: self.worst.unsigned_abs() as f64 / capacity,
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
