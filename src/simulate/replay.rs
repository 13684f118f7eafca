//! One replay of a trace: calls arrive, stream and end on a virtual clock.

use super::meter::{Meter, QuotaOutcome};
use super::timeline::{PARTS, Timeline};
use super::traffic::{Member, Target, Traffic};
use super::{Mode, Pace, TraceCall};
use crate::clock::Timestamp;
use crate::config::{Environment, OnOverrun, UpstreamSettings};
use crate::ledger::{Admission, Backing, Demand, Grant, Local, NoRoom, Progress, Settlement};
use crate::quota::{Amounts, Quota, Subject};
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Duration;

/// Interval at which a stream reports its progress to the quotas (ms), as in the gateway.
const PROGRESS_INTERVAL_MS: u64 = 1_000;
/// Maximum number of progress reports per stream. Longer streams report at longer intervals.
const MAX_STEPS: u64 = 40;
/// With more quotas, the levels are recorded once per part of the timelines only, and not after each call.
const MAX_QUOTAS_PER_CALL: usize = 64;

/// The result of replaying a trace, for one environment.
#[derive(Clone, Debug, Default)]
pub(super) struct ReplayOutcome {
    /// Number of admitted calls.
    pub(super) admitted: u64,
    /// Number of denied calls.
    pub(super) rejected: u64,
    /// Number of calls denied by `max_in_flight`, of the environment or of an upstream.
    pub(super) denied_in_flight: u64,
    /// Number of calls that quotas or `max_in_flight` of an upstream deny.
    pub(super) denied_by_upstream: u64,
    /// Amounts that the admitted calls used.
    pub(super) spent: Amounts,
    /// The results by quota, in the order of the config. Those of upstreams come last; they measure the calls of all
    /// environments.
    pub(super) quotas: Vec<QuotaOutcome>,
    /// Sum of the times from a denial to the next admission, in milliseconds.
    pub(super) exhausted_ms: u64,
    /// The times of the first and the last call.
    pub(super) span: (Timestamp, Timestamp),
}

impl ReplayOutcome {
    /// The quotas of the environment. If it has none, those of its upstreams.
    fn decisive(&self) -> impl Iterator<Item = &QuotaOutcome> {
        let own = self.quotas.iter().take_while(|q| q.quota.scope.upstream().is_none()).count();
        self.quotas.iter().take(if own > 0 { own } else { self.quotas.len() })
    }

    /// The largest overshoot of a quota of the environment, as a fraction of its capacity.
    pub(super) fn overshoot(&self) -> f64 {
        self.decisive().map(|q| q.overshoot).fold(0.0, f64::max)
    }

    /// The largest utilisation of a quota of the environment, as a fraction.
    pub(super) fn utilisation(&self) -> f64 {
        self.decisive().map(|q| q.utilisation).fold(0.0, f64::max)
    }
}

/// Replays calls through the quotas of their environments and upstreams, as configured. Returns the outcome of each
/// environment.
pub(super) fn replay_configured(traffic: &Traffic<'_>, pace: Pace) -> Vec<ReplayOutcome> {
    let mut replay = Replay::new(traffic, pace, |_| Some(Mode::Configured));
    replay.next_part = 0;
    replay.run(|_| true);
    replay.finish()
}

/// Replays calls with one environment in this mode. The others reserve as configured. Returns the outcome of that
/// environment; without timelines in another mode than the configured one.
pub(super) fn replay(traffic: &Traffic<'_>, focus: usize, pace: Pace, mode: Mode) -> ReplayOutcome {
    let mut replay = Replay::new(traffic, pace, |index| (index == focus).then_some(mode));
    if mode == Mode::Configured {
        replay.next_part = 0;
    }
    replay.run(|_| true);
    replay.finish().swap_remove(focus)
}

/// Whether the quotas of an environment, as configured, admit all calls. Ends at the first denial. Limits of upstreams do
/// not apply.
pub(super) fn admits_all(environment: &Environment, calls: &[TraceCall], pace: Pace) -> bool {
    let traffic = Traffic::alone(environment, calls);
    let mut replay = Replay::new(&traffic, pace, |_| Some(Mode::Configured));
    let has_denied = |replay: &Replay<'_>| replay.environments[0].outcome.rejected > 0;
    replay.run(|replay| !has_denied(replay));
    !has_denied(&replay)
}

/// A replay in progress.
struct Replay<'a> {
    traffic: &'a Traffic<'a>,
    environments: Vec<EnvironmentInReplay>,
    upstreams: Vec<UpstreamInReplay>,
    pace: Pace,
    now: Timestamp,
    /// Time, sequence number, and index into `in_flight` of each event. The sequence number orders events of the
    /// same time.
    events: BinaryHeap<Reverse<(Timestamp, u64, usize)>>,
    next_event: u64,
    /// `None` after the answer has ended.
    in_flight: Vec<Option<CallInFlight<'a>>>,
    /// The part of the timelines that begins next. [`PARTS`]: no timelines are recorded.
    next_part: usize,
}

/// An environment in a replay.
struct EnvironmentInReplay {
    mode: Mode,
    local: Local,
    /// Those of its quotas; empty if it is not measured.
    meters: Vec<Meter>,
    /// Whether its levels are recorded after each call.
    records_calls: bool,
    outcome: ReplayOutcome,
    /// Time of the first denial since the last admission.
    denied_since: Option<Timestamp>,
}

impl EnvironmentInReplay {
    /// `mode`: `None` if it is not measured.
    fn new(member: &Member<'_>, mode: Option<Mode>, (first, last): (Timestamp, Timestamp)) -> Self {
        let quotas = limited(&member.environment.quotas);
        let measured = if mode.is_some() { &quotas[..] } else { &[] };
        let meters = measured.iter().map(|quota| Meter::new(quota, first, last)).collect();
        let mode = mode.unwrap_or(Mode::Configured);
        Self {
            mode,
            local: Local::new(mode.rules(member.environment), &quotas, first),
            meters,
            records_calls: false,
            outcome: ReplayOutcome { span: member.span(), ..ReplayOutcome::default() },
            denied_since: None,
        }
    }

    /// Ends the time in which calls were denied, because a call was admitted.
    fn end_denials(&mut self, now: Timestamp) {
        if let Some(since) = self.denied_since.take() {
            self.outcome.exhausted_ms += now.ms_since(since);
        }
        self.meters.iter_mut().for_each(|meter| meter.end_denials(now));
    }
}

/// An upstream with limits.
struct UpstreamInReplay {
    local: Local,
    /// Those of its quotas; empty if no environment that is measured uses it.
    meters: Vec<Meter>,
    /// Whether its levels are recorded after each call.
    records_calls: bool,
}

impl UpstreamInReplay {
    fn new(settings: &UpstreamSettings, is_measured: bool, (first, last): (Timestamp, Timestamp)) -> Self {
        let settings = UpstreamSettings { quotas: limited(&settings.quotas), ..settings.clone() };
        let measured = if is_measured { &settings.quotas[..] } else { &[] };
        Self {
            meters: measured.iter().map(|quota| Meter::new(quota, first, last)).collect(),
            local: Local::of_upstream(&settings, first),
            records_calls: false,
        }
    }
}

/// The quotas that can refuse a call. An unlimited quota refuses nothing.
fn limited(quotas: &[Quota]) -> Vec<Quota> {
    quotas.iter().filter(|quota| !quota.is_unlimited()).cloned().collect()
}

/// An admitted call whose answer has not ended.
struct CallInFlight<'a> {
    /// Index of its environment.
    environment: usize,
    call: &'a TraceCall,
    target: Target<'a>,
    pace: Pace,
    grant: Box<Grant>,
    /// What it holds in the quotas of the upstream.
    upstream_grant: Option<Box<Grant>>,
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
    /// `mode`: that of each environment; `None`: it reserves as configured and is not measured.
    fn new(traffic: &'a Traffic<'a>, pace: Pace, mode: impl Fn(usize) -> Option<Mode>) -> Self {
        let span = traffic.span();
        let members = || traffic.members.iter().enumerate();
        let uses = |at: usize| {
            members().any(|(index, member)| mode(index).is_some() && member.upstreams.contains(&at))
        };
        let upstreams = traffic.upstreams.iter().enumerate();
        let mut replay = Self {
            environments: members()
                .map(|(index, member)| EnvironmentInReplay::new(member, mode(index), span))
                .collect(),
            upstreams: upstreams
                .map(|(at, settings)| UpstreamInReplay::new(settings, uses(at), span))
                .collect(),
            traffic,
            pace,
            now: span.0,
            events: BinaryHeap::new(),
            next_event: 0,
            in_flight: Vec::new(),
            next_part: PARTS,
        };
        replay.choose_recorded();
        replay
    }

    /// Chooses the quotas whose levels are recorded after each call: those of an environment and its upstreams, unless they
    /// are too many.
    fn choose_recorded(&mut self) {
        let Self { environments, upstreams, traffic, .. } = self;
        for (environment, member) in environments.iter_mut().zip(&traffic.members) {
            let shared: usize = member.upstreams.iter().map(|&at| upstreams[at].meters.len()).sum();
            environment.records_calls = environment.meters.len() + shared <= MAX_QUOTAS_PER_CALL;
            for &at in &member.upstreams {
                upstreams[at].records_calls |= environment.records_calls;
            }
        }
    }

    /// Replays all calls and their answers, as long as `continues` returns true after a call.
    fn run(&mut self, continues: impl Fn(&Self) -> bool) {
        let (first, last) = self.traffic.span();
        let records_levels = self.next_part < PARTS;
        for at in 0..self.traffic.len() {
            let (environment, call) = self.traffic.call(at);
            while self.next_part < PARTS {
                let begin = Timeline::begin_of(first, last, self.next_part);
                if begin > call.at {
                    break;
                }
                self.run_events_until(begin);
                self.record_levels(|_| true);
                self.next_part += 1;
            }
            self.run_events_until(call.at);
            self.arrive(environment, call);
            if records_levels {
                self.record_levels(|records_calls| records_calls);
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

    /// Records the levels of the accounts of which `is_due` returns true for `records_calls`.
    fn record_levels(&mut self, is_due: impl Fn(bool) -> bool) {
        let now = self.now;
        let own =
            self.environments.iter_mut().map(|own| (&mut own.local, &mut own.meters, own.records_calls));
        let shared =
            self.upstreams.iter_mut().map(|all| (&mut all.local, &mut all.meters, all.records_calls));
        for (local, meters, _) in
            own.chain(shared).filter(|(_, meters, at)| is_due(*at) && !meters.is_empty())
        {
            for (meter, level) in meters.iter_mut().zip(local.levels(now)) {
                meter.record_level(now, &level);
            }
        }
    }

    /// Admits or denies a call.
    fn arrive(&mut self, environment: usize, call: &'a TraceCall) {
        let (decided, target) = self.admit(environment, call);
        for meter in self.meters_of(environment, call, target) {
            meter.count_call();
        }
        match decided {
            Ok(admission) => {
                self.end_denials_of_upstream(target);
                let now = self.now;
                let own = &mut self.environments[environment];
                own.outcome.admitted += 1;
                match &admission.would_deny {
                    Some(no_room) => self.record_shortfalls(no_room, environment),
                    None => own.end_denials(now),
                }
                self.begin(environment, call, target, admission);
            }
            Err(no_room) => {
                let own = &mut self.environments[environment];
                own.outcome.rejected += 1;
                own.denied_since.get_or_insert(self.now);
                self.record_shortfalls(&no_room, environment);
            }
        }
    }

    /// Tries the upstreams of a call in their order, as the gateway does. Returns the one that admits it. If none does, it
    /// returns the one that fits first, and why it has no room.
    fn admit(&mut self, environment: usize, call: &'a TraceCall) -> (Result<Admission, NoRoom>, Target<'a>) {
        let own = &mut self.environments[environment];
        let demand = Demand {
            subject: call.subject(),
            prompt: call.prompt,
            generates: call.generates,
            cap: if own.mode == Mode::Oracle { Some(call.completion) } else { call.max_tokens },
            completions: 1,
            backends: &[],
            may_clamp: true,
        };
        let local = &mut own.local;
        let mut best: Option<(NoRoom, Target<'a>)> = None;
        for target in self.traffic.targets(environment, call) {
            let counters = target.upstream.map(|at| &mut self.upstreams[at].local);
            let mut backing = counters.map(|counters| Backing::new(counters, target.model));
            match local.try_admit_at(self.now, &demand, backing.as_mut()) {
                Ok(admission) => return (Ok(admission), target),
                Err(no_room) => {
                    if best.as_ref().is_none_or(|(earlier, _)| no_room.fits_before(earlier)) {
                        best = Some((no_room, target));
                    }
                }
            }
        }
        if let Some((no_room, target)) = best {
            return (Err(no_room), target);
        }
        // No upstream is named.
        let target = Target { upstream: None, model: &call.model };
        (local.try_admit_at(self.now, &demand, None), target)
    }

    fn begin(&mut self, environment: usize, call: &'a TraceCall, target: Target<'a>, admission: Admission) {
        let bound = admission.clamped_to.or(call.max_tokens).unwrap_or(u64::MAX);
        let completion = call.completion.min(bound);
        let pace = call.pace.unwrap_or(self.pace);
        let began = self.now.plus_ms(ms(pace.first_token));
        let running = CallInFlight {
            environment,
            call,
            target,
            pace,
            grant: admission.grant,
            upstream_grant: admission.upstream,
            began,
            completion,
            duration_ms: pace.ms_for(completion),
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
        let spent = Amounts::of_request(running.call.prompt, delivered);
        self.meter(&mut running, spent);
        if delivered >= running.completion {
            self.end(running, spent);
            return;
        }
        let progress = self.progress(&mut running, spent);
        if progress == Progress::Overrun && self.cuts(running.environment) {
            self.end(running, spent);
            return;
        }
        let step = PROGRESS_INTERVAL_MS.max(running.duration_ms / MAX_STEPS);
        let next = streamed.saturating_add(step).min(running.duration_ms.max(streamed + 1));
        self.schedule(running.began.plus_ms(next), index);
        self.in_flight[index] = Some(running);
    }

    fn progress(&mut self, running: &mut CallInFlight<'a>, spent: Amounts) -> Progress {
        let counters = running.target.upstream.map(|at| &mut self.upstreams[at].local);
        let upstream = counters.zip(running.upstream_grant.as_deref_mut());
        let local = &mut self.environments[running.environment].local;
        local.progress_at(self.now, &running.call.model, &mut running.grant, spent, upstream)
    }

    /// Whether an overrun ends the streams of an environment.
    fn cuts(&self, environment: usize) -> bool {
        let Environment { reserve, .. } = self.traffic.members[environment].environment;
        let is_as_configured = self.environments[environment].mode == Mode::Configured;
        is_as_configured && reserve.on_overrun == OnOverrun::Cut
    }

    fn end(&mut self, running: CallInFlight<'a>, spent: Amounts) {
        let (now, subject) = (self.now, running.call.subject());
        let settlement = Settlement { spent, is_complete: spent.completion >= running.completion };
        let own = &mut self.environments[running.environment];
        own.local.settle(now, subject, running.grant, settlement);
        own.outcome.spent = own.outcome.spent.saturating_add(spent);
        record_debts(&mut own.meters, &mut own.local, now);
        if let Some((at, grant)) = running.target.upstream.zip(running.upstream_grant) {
            let UpstreamInReplay { local, meters, .. } = &mut self.upstreams[at];
            local.settle_backing(now, grant, spent);
            record_debts(meters, local, now);
        }
    }

    fn meter(&mut self, running: &mut CallInFlight<'a>, spent: Amounts) {
        let now = self.now;
        let more = spent.saturating_sub(running.metered);
        running.metered = spent;
        for meter in self.meters_of(running.environment, running.call, running.target) {
            meter.spend(now, more.of(meter.quota.kind));
        }
    }

    /// The meters that measure a call: those of its environment, and those of the upstream.
    fn meters_of(
        &mut self,
        environment: usize,
        call: &'a TraceCall,
        target: Target<'a>,
    ) -> impl Iterator<Item = &mut Meter> {
        let own = self.environments[environment].meters.iter_mut();
        let own = own.filter(|meter| meter.measures(call.subject()));
        let upstream = target.upstream.map(|at| &mut self.upstreams[at]);
        let sent = Subject { caller: None, model: target.model };
        let shared = upstream.into_iter().flat_map(|upstream| &mut upstream.meters);
        own.chain(shared.filter(move |meter| meter.measures(sent)))
    }

    /// Records which quotas deny a call, or would deny it in shadow mode.
    fn record_shortfalls(&mut self, no_room: &NoRoom, environment: usize) {
        let now = self.now;
        let EnvironmentInReplay { outcome, meters, .. } = &mut self.environments[environment];
        outcome.denied_by_upstream += u64::from(no_room.is_of_upstream());
        let NoRoom::Quota(denied) = no_room else {
            outcome.denied_in_flight += 1;
            return;
        };
        for shortfall in denied.shortfalls() {
            let shared = self.upstreams.iter_mut().flat_map(|upstream| &mut upstream.meters);
            let mut meters = meters.iter_mut().chain(shared);
            if let Some(meter) = meters.find(|meter| meter.quota.is_same_as(&shortfall.quota)) {
                meter.record_denial(now);
            }
        }
    }

    fn end_denials_of_upstream(&mut self, target: Target<'a>) {
        let now = self.now;
        if let Some(at) = target.upstream {
            self.upstreams[at].meters.iter_mut().for_each(|meter| meter.end_denials(now));
        }
    }

    /// The outcome of each environment.
    fn finish(self) -> Vec<ReplayOutcome> {
        let (now, (begin, end)) = (self.now, self.traffic.span());
        let of_upstream = |upstream: UpstreamInReplay| -> Vec<QuotaOutcome> {
            let ended = upstream.meters.into_iter().map(|mut meter| {
                meter.end_denials(now);
                meter.outcome(begin, end)
            });
            ended.collect()
        };
        let shared: Vec<Vec<QuotaOutcome>> = self.upstreams.into_iter().map(of_upstream).collect();
        let outcome = |(mut own, member): (EnvironmentInReplay, &Member<'_>)| {
            own.end_denials(now);
            let (first, last) = own.outcome.span;
            let quotas = own.meters.into_iter().map(|meter| meter.outcome(first, last));
            let of_upstreams = member.upstreams.iter().flat_map(|&at| shared[at].iter().cloned());
            ReplayOutcome { quotas: quotas.chain(of_upstreams).collect(), ..own.outcome }
        };
        self.environments.into_iter().zip(&self.traffic.members).map(outcome).collect()
    }
}

/// Records the debt of calendar quotas.
fn record_debts(meters: &mut [Meter], local: &mut Local, now: Timestamp) {
    if !meters.iter().any(Meter::is_calendar) {
        return;
    }
    for (meter, level) in meters.iter_mut().zip(local.levels(now)).filter(|(meter, _)| meter.is_calendar()) {
        meter.record_debt(level.level);
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

fn ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
