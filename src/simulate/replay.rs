//! One replay of a trace: calls arrive, stream and end on a virtual clock.

use super::meter::{Meter, QuotaOutcome};
use super::timeline::{PARTS, Timeline};
use super::{Mode, Pace, TraceCall};
use crate::clock::Timestamp;
use crate::config::{Environment, OnOverrun};
use crate::ledger::{Demand, Grant, Local, NoRoom, Progress, Settlement};
use crate::quota::{Amounts, Quota};
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Duration;

/// Interval at which a stream reports its progress to the quotas (ms), as in the gateway.
const PROGRESS_INTERVAL_MS: u64 = 1_000;
/// Maximum number of progress reports per stream. Longer streams report at longer intervals.
const MAX_STEPS: u64 = 40;
/// With more quotas, the levels are recorded once per part of the timelines only, and not after each call.
const MAX_QUOTAS_PER_CALL: usize = 64;

/// The result of replaying a trace.
#[derive(Clone, Debug, Default)]
pub(super) struct ReplayOutcome {
    /// Number of admitted calls.
    pub(super) admitted: u64,
    /// Number of denied calls.
    pub(super) rejected: u64,
    /// Number of calls denied by `max_in_flight`.
    pub(super) denied_in_flight: u64,
    /// Amounts that the admitted calls used.
    pub(super) spent: Amounts,
    /// The results by quota, in the order of the config.
    pub(super) quotas: Vec<QuotaOutcome>,
    /// Sum of the times from a denial to the next admission, in milliseconds.
    pub(super) exhausted_ms: u64,
}

impl ReplayOutcome {
    /// The largest overshoot of any quota, as a fraction of its capacity.
    pub(super) fn overshoot(&self) -> f64 {
        self.quotas.iter().map(|q| q.overshoot).fold(0.0, f64::max)
    }

    /// The largest utilisation of any quota, as a fraction.
    pub(super) fn utilisation(&self) -> f64 {
        self.quotas.iter().map(|q| q.utilisation).fold(0.0, f64::max)
    }
}

/// Replays calls, sorted by time, through the quotas of an environment.
pub(super) fn replay(
    environment: &Environment,
    calls: &[TraceCall],
    pace: Pace,
    mode: Mode,
) -> ReplayOutcome {
    let mut replay = Replay::new(environment, calls, pace, mode);
    if mode != Mode::Configured {
        replay.next_part = PARTS;
    }
    replay.run(|_| true);
    replay.finish()
}

/// Whether the quotas of an environment, as configured, admit all calls. Ends at the first denial.
pub(super) fn admits_all(environment: &Environment, calls: &[TraceCall], pace: Pace) -> bool {
    let mut replay = Replay::new(environment, calls, pace, Mode::Configured);
    replay.next_part = PARTS;
    replay.run(|replay| replay.outcome.rejected == 0);
    replay.outcome.rejected == 0
}

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
    /// The part of the timelines that begins next. [`PARTS`]: no timelines are recorded.
    next_part: usize,
}

/// An admitted call whose answer has not ended.
struct CallInFlight {
    /// Index of the call in the trace.
    call: usize,
    pace: Pace,
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

impl<'a> Replay<'a> {
    fn new(environment: &'a Environment, calls: &'a [TraceCall], pace: Pace, mode: Mode) -> Self {
        let (first, last) = span(calls);
        // An unlimited quota refuses nothing.
        let limited: Vec<Quota> =
            environment.quotas.iter().filter(|quota| !quota.is_unlimited()).cloned().collect();
        Self {
            local: Local::new(mode.rules(environment), &limited, first),
            environment,
            calls,
            pace,
            mode,
            now: first,
            events: BinaryHeap::new(),
            next_event: 0,
            in_flight: Vec::new(),
            meters: limited.iter().map(|quota| Meter::new(quota, first, last)).collect(),
            outcome: ReplayOutcome::default(),
            denied_since: None,
            next_part: 0,
        }
    }

    /// Replays all calls and their answers, as long as `continues` returns true after a call.
    fn run(&mut self, continues: impl Fn(&Self) -> bool) {
        let (first, last) = span(self.calls);
        let records_levels = self.next_part < PARTS && self.meters.len() <= MAX_QUOTAS_PER_CALL;
        for (at, call) in self.calls.iter().enumerate() {
            while self.next_part < PARTS {
                let begin = Timeline::begin_of(first, last, self.next_part);
                if begin > call.at {
                    break;
                }
                self.run_events_until(begin);
                self.record_levels();
                self.next_part += 1;
            }
            self.run_events_until(call.at);
            self.arrive(at);
            if records_levels {
                self.record_levels();
            }
            if !continues(self) {
                return;
            }
        }
        while !self.events.is_empty() {
            self.step();
        }
    }

    fn run_events_until(&mut self, until: Timestamp) {
        while let Some(&Reverse((due, ..))) = self.events.peek()
            && due <= until
        {
            self.step();
        }
        self.now = until;
    }

    fn record_levels(&mut self) {
        let now = self.now;
        for (meter, level) in self.meters.iter_mut().zip(self.local.levels(now)) {
            meter.record_level(now, &level);
        }
    }

    /// Admits or denies a call.
    fn arrive(&mut self, at: usize) {
        let call = &self.calls[at];
        let cap = if self.mode == Mode::Oracle { Some(call.completion) } else { call.max_tokens };
        let subject = call.subject();
        let demand = Demand {
            subject,
            prompt: call.prompt,
            generates: call.generates,
            cap,
            completions: 1,
            backends: &[],
        };
        self.meters.iter_mut().filter(|meter| meter.measures(subject)).for_each(Meter::count_call);
        match self.local.admit(self.now, &demand) {
            Ok(admission) => {
                self.outcome.admitted += 1;
                match &admission.would_deny {
                    Some(no_room) => self.record_shortfalls(no_room),
                    None => self.end_denials(),
                }
                let bound = admission.clamped_to.or(call.max_tokens).unwrap_or(u64::MAX);
                self.begin(at, admission.grant, call.completion.min(bound));
            }
            Err(no_room) => {
                self.outcome.rejected += 1;
                self.denied_since.get_or_insert(self.now);
                self.record_shortfalls(&no_room);
            }
        }
    }

    fn begin(&mut self, call: usize, grant: Grant, completion: u64) {
        let pace = self.calls[call].pace.unwrap_or(self.pace);
        let began = self.now.plus_ms(ms(pace.first_token));
        let duration_ms = pace.ms_for(completion);
        let running = CallInFlight {
            call,
            pace,
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
        let within = if is_last { u64::MAX } else { running.pace.tokens_within(streamed) };
        let delivered = within.min(running.completion);
        let prompt = self.calls[running.call].prompt;
        let spent = Amounts::of_request(prompt, delivered);
        self.meter(&mut running, spent);
        if delivered >= running.completion {
            self.end(running, spent);
            return;
        }
        let model = &self.calls[running.call].model;
        let progress = self.local.progress(at, model, &mut running.grant, spent);
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
        let subject = self.calls[running.call].subject();
        let settlement = Settlement { spent, is_complete: spent.completion >= running.completion };
        self.local.settle(self.now, subject, running.grant, settlement);
        self.outcome.spent = self.outcome.spent.saturating_add(spent);
        if !self.meters.iter().any(Meter::is_calendar) {
            return;
        }
        let levels = self.local.levels(self.now);
        for (meter, level) in self.meters.iter_mut().zip(levels).filter(|(meter, _)| meter.is_calendar()) {
            meter.record_debt(level.level);
        }
    }

    fn meter(&mut self, running: &mut CallInFlight, spent: Amounts) {
        let more = spent.saturating_sub(running.metered);
        running.metered = spent;
        let subject = self.calls[running.call].subject();
        for meter in self.meters.iter_mut().filter(|meter| meter.measures(subject)) {
            meter.spend(self.now, more.of(meter.quota.kind));
        }
    }

    /// Records which quotas deny a call, or would deny it in shadow mode.
    fn record_shortfalls(&mut self, no_room: &NoRoom) {
        let NoRoom::Quota(denied) = no_room else {
            self.outcome.denied_in_flight += 1;
            return;
        };
        for shortfall in denied.shortfalls() {
            let has_quota = |meter: &&mut Meter| meter.quota.is_same_as(&shortfall.quota);
            if let Some(meter) = self.meters.iter_mut().find(has_quota) {
                meter.record_denial(self.now);
            }
        }
    }

    /// Ends the time in which calls were denied, because a call was admitted.
    fn end_denials(&mut self) {
        if let Some(since) = self.denied_since.take() {
            self.outcome.exhausted_ms += self.now.ms_since(since);
        }
        let now = self.now;
        self.meters.iter_mut().for_each(|meter| meter.end_denials(now));
    }

    fn finish(mut self) -> ReplayOutcome {
        self.end_denials();
        let (first, last) = span(self.calls);
        self.outcome.quotas = self.meters.into_iter().map(|meter| meter.outcome(first, last)).collect();
        self.outcome
    }
}

impl Pace {
    /// Tokens delivered `ms` milliseconds after the first token.
    fn tokens_within(self, ms: u64) -> u64 {
        #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let more = (ms as f64 / 1_000.0 * self.tokens_per_second + 1e-6) as u64;
        more.saturating_add(1)
    }

    /// Milliseconds from the first to the last of `tokens` tokens.
    fn ms_for(self, tokens: u64) -> u64 {
        #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let ms = (tokens.saturating_sub(1) as f64 / self.tokens_per_second * 1_000.0).ceil() as u64;
        ms
    }
}

/// The times of the first and the last call.
fn span(calls: &[TraceCall]) -> (Timestamp, Timestamp) {
    calls.first().zip(calls.last()).map_or_else(Default::default, |(first, last)| (first.at, last.at))
}

fn ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
