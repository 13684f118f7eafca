//! The gate of one model at one upstream: it lets a request pass unless the last statement of the provider means that it
//! would be refused. Pure: `now` is an argument, in milliseconds of the monotonic clock.
//!
//! The first requests start slowly, because nothing is known yet: one is in flight, and each answer doubles that number. So
//! the first burst does not exceed limits that its own answers state.
//!
//! A refusal with a time to wait closes the gate. When the time is over, one request goes first, and the others after
//! its answer. While the gate is open, a request passes if the provider has enough left for it: the amount that it stated
//! last, plus the refill since, minus the cost of the requests that were sent later.

use super::statement::{KindStatement, Statement};
use crate::quota::{Amounts, Kind};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::time::Duration;

/// The gate stays closed for at most this long (ms). Then one request tries the provider again.
const MAX_CLOSED_MS: u64 = 60_000;
/// The wait of a request while another one tries the provider (ms).
const PROBE_WAIT_MS: u64 = 1_000;
/// The period of a limit whose reset the provider does not state (ms).
const DEFAULT_PERIOD_MS: u64 = 60_000;
/// A limit that refills evenly is full again a minute or more after nothing was left. A shorter reset (ms) is the end of
/// a fixed window.
const MIN_EVEN_RESET_MS: u64 = 50_000;
/// After as many statements in a row that nothing is left, with answers that show the opposite, a kind is ignored until
/// the next refusal.
const MAX_CONTRADICTIONS: u8 = 3;
/// A request that was sent earlier than the one that a statement belongs to may reach the provider later, by this time
/// at most (ms).
const OVERTAKE_MS: u64 = 200;
/// The slow start ends after this many answers, or this long after the first request (ms).
const SLOW_START: (u32, u64) = (6, 1_000);
/// The provider's cost of a request in thousandths of the estimate, at least and at most.
const COST_PERMILLE: (u64, u64) = (100, 20_000);

/// The gate of one model at one upstream.
#[derive(Debug, Default)]
pub(super) struct Gate {
    kinds: [KindState; 4],
    /// Requests that were sent after the last statement and have no statement of their own yet, the oldest first.
    later: VecDeque<Sent>,
    last_number: u64,
    /// The request that the last statement belongs to.
    stated_number: u64,
    /// Until when the provider refuses requests.
    closed_until: Option<u64>,
    /// The request that tries the provider after the gate was closed.
    probe: Option<u64>,
    /// When the first request was sent.
    first_sent: Option<u64>,
    answers: u32,
}

/// Why a request does not pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hold {
    /// The provider would refuse it. The time after which it may try again (ms), at least 1.
    Wait(u64),
    /// The slow start lasts at most this long (ms).
    SlowStart(u64),
}

impl Hold {
    /// The time after which the request may try again.
    pub(super) fn time(self) -> Duration {
        let (Self::Wait(ms) | Self::SlowStart(ms)) = self;
        Duration::from_millis(ms)
    }
}

/// The state of one kind of limit.
#[derive(Clone, Copy, Debug)]
struct KindState {
    stated: KindStatement,
    /// When the provider stated it.
    at: u64,
    /// The cost of a request at the provider, in thousandths of the estimate.
    cost_permille: u64,
    contradictions: u8,
}

impl Default for KindState {
    fn default() -> Self {
        Self { stated: KindStatement::default(), at: 0, cost_permille: 1_000, contradictions: 0 }
    }
}

/// A gate on its way to a new process. Its times count from now, because the clocks of two processes differ.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct LeftGate {
    kinds: [LeftKind; 4],
    /// Of the requests that were sent after the last statement.
    later: Amounts,
    closed_ms: Option<u64>,
    answers: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct LeftKind {
    limit: Option<u64>,
    remaining: Option<u64>,
    reset_ms: Option<u64>,
    age_ms: u64,
    cost_permille: u64,
    contradictions: u8,
}

#[derive(Clone, Copy, Debug)]
struct Sent {
    number: u64,
    at: u64,
    amounts: Amounts,
}

/// The provider's decision, by the status of its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The provider took the request.
    Accepted,
    /// The provider refused it: too many requests or tokens, or overloaded.
    Refused,
    /// Another error, which does not concern limits.
    Other,
}

/// The state of one kind, for display.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct KindView {
    pub(crate) kind: Kind,
    pub(crate) limit: Option<u64>,
    /// As the provider stated it.
    pub(crate) remaining: Option<u64>,
    /// Milliseconds until the provider has all of the limit again, from now on.
    pub(crate) reset_ms: Option<u64>,
}

impl Gate {
    /// Lets a request pass and returns its number. Every number must be passed to `answered` or `abandoned`.
    ///
    /// # Errors
    /// Why it does not pass.
    pub(super) fn pass(&mut self, now: u64, amounts: Amounts) -> Result<u64, Hold> {
        if let Some(until) = self.closed_until {
            if now < until {
                return Err(Hold::Wait(until - now));
            }
            self.closed_until = None;
            return Ok(self.begin_probe(now, amounts));
        }
        if self.probe.is_some() {
            return Err(Hold::Wait(PROBE_WAIT_MS));
        }
        let slow_start = now.saturating_sub(*self.first_sent.get_or_insert(now));
        if slow_start < SLOW_START.1 && self.answers < SLOW_START.0 && self.later.len() >= 1 << self.answers {
            return Err(Hold::SlowStart(SLOW_START.1 - slow_start));
        }
        match self.wait_for_room(now, amounts) {
            Some(wait) => Err(Hold::Wait(wait.clamp(1, MAX_CLOSED_MS))),
            // A statement without a limit and a reset does not state when it ends.
            None if self.is_blind(now, amounts) => Ok(self.begin_probe(now, amounts)),
            None => Ok(self.send(now, amounts)),
        }
    }

    /// Milliseconds for which a request would be held now. `None`: it would pass, or wait for the slow start only.
    pub(super) fn hold_of(&self, now: u64, amounts: Amounts) -> Option<u64> {
        match self.closed_until {
            Some(until) => (now < until).then(|| until - now),
            None if self.probe.is_some() => Some(PROBE_WAIT_MS),
            None => self.wait_for_room(now, amounts).map(|wait| wait.clamp(1, MAX_CLOSED_MS)),
        }
    }

    /// Lets a request pass without looking: the gateway only observes.
    pub(super) fn send(&mut self, now: u64, amounts: Amounts) -> u64 {
        self.last_number += 1;
        self.later.push_back(Sent { number: self.last_number, at: now, amounts });
        self.last_number
    }

    fn begin_probe(&mut self, now: u64, amounts: Amounts) -> u64 {
        let number = self.send(now, amounts);
        self.probe = Some(number);
        number
    }

    /// Milliseconds until the provider has enough of every kind. `None`: it has.
    fn wait_for_room(&self, now: u64, amounts: Amounts) -> Option<u64> {
        Kind::ALL.into_iter().filter_map(|kind| self.wait_for_kind(now, kind, amounts)).max()
    }

    fn wait_for_kind(&self, now: u64, kind: Kind, amounts: Amounts) -> Option<u64> {
        let state = self.kinds[kind as usize];
        let remaining = state.trusted_remaining()?;
        let needed = state.cost(amounts.of(kind));
        let needed = state.stated.limit.map_or(needed, |limit| needed.min(limit));
        if needed == 0 {
            return None;
        }
        let elapsed = now.saturating_sub(state.at);
        let Some(refill) = state.refill() else {
            let is_short = remaining.saturating_sub(self.cost_of_later(kind)) < needed;
            let ready = state.end_of_window().unwrap_or(PROBE_WAIT_MS);
            return (is_short && elapsed < ready).then(|| ready - elapsed);
        };
        let demand = needed.saturating_add(self.cost_of_later(kind));
        let ready = refill.ms_until(demand.saturating_sub(remaining)).max(state.end_of_window().unwrap_or(0));
        (ready > elapsed).then(|| ready - elapsed)
    }

    /// Whether a kind is short by a statement that does not state when it ends.
    fn is_blind(&self, now: u64, amounts: Amounts) -> bool {
        Kind::ALL.into_iter().any(|kind| {
            let state = self.kinds[kind as usize];
            let is_old = now.saturating_sub(state.at) >= PROBE_WAIT_MS;
            state.refill().is_none()
                && is_old
                && state.trusted_remaining().is_some_and(|remaining| {
                    remaining.saturating_sub(self.cost_of_later(kind)) < state.cost(amounts.of(kind))
                })
        })
    }

    /// What the requests cost that were sent after the last statement.
    fn cost_of_later(&self, kind: Kind) -> u64 {
        let sum = self.later.iter().fold(0_u64, |sum, sent| sum.saturating_add(sent.amounts.of(kind)));
        self.kinds[kind as usize].cost(sum)
    }

    /// Applies the answer to a request.
    pub(super) fn answered(&mut self, now: u64, number: u64, statement: &Statement, verdict: Verdict) {
        self.answers = self.answers.saturating_add(1);
        let is_probe = self.probe.take_if(|probe| *probe == number).is_some();
        if number < self.stated_number {
            // A later statement includes this request.
            self.later.retain(|sent| sent.number != number);
        } else if statement.kinds.iter().any(|kind| kind.remaining.is_some()) {
            self.adopt(now, number, statement, verdict, is_probe);
        } else {
            self.charge(number);
        }
        if verdict != Verdict::Refused {
            return;
        }
        for state in &mut self.kinds {
            state.contradictions = 0;
        }
        if let Some(wait) = statement.time_to_wait() {
            let until = now.saturating_add(wait.min(MAX_CLOSED_MS));
            self.closed_until = Some(self.closed_until.map_or(until, |before| before.max(until)));
        }
    }

    /// Forgets a request that got no answer. If it was the probe, the next request is one.
    pub(super) fn abandoned(&mut self, number: u64) {
        if self.probe.take_if(|probe| *probe == number).is_some() {
            // A time in the past: the gate is closed, and the time is over.
            self.closed_until.get_or_insert(0);
        }
        self.later.retain(|sent| sent.number != number);
    }

    /// A request whose answer states nothing: what it cost is subtracted from the last statement.
    fn charge(&mut self, number: u64) {
        let Some(at) = self.later.iter().position(|sent| sent.number == number) else { return };
        let Some(sent) = self.later.remove(at) else { return };
        for (kind, state) in Kind::ALL.into_iter().zip(&mut self.kinds) {
            let cost = state.cost(sent.amounts.of(kind));
            state.stated.remaining = state.stated.remaining.map(|remaining| remaining.saturating_sub(cost));
        }
    }

    /// Replaces the last statement by that of the request with this number, which includes all earlier requests.
    fn adopt(&mut self, now: u64, number: u64, statement: &Statement, verdict: Verdict, is_probe: bool) {
        let is_included = |sent: &Sent| {
            let may_be_behind = sent.number != number && now.saturating_sub(sent.at) < OVERTAKE_MS;
            sent.number <= number && !may_be_behind
        };
        for (kind, stated) in Kind::ALL.into_iter().zip(&statement.kinds) {
            let sum = self.later.iter().filter(|sent| is_included(sent)).fold(0_u64, |sum, sent| {
                // A refused request costs nothing.
                let is_free = sent.number == number && verdict != Verdict::Accepted;
                sum.saturating_add(if is_free { 0 } else { sent.amounts.of(kind) })
            });
            let state = &mut self.kinds[kind as usize];
            if stated.remaining.is_none() {
                let cost = state.cost(sum);
                state.stated.remaining = state.stated.remaining.map(|left| left.saturating_sub(cost));
                state.stated.limit = stated.limit.or(state.stated.limit);
                continue;
            }
            state.learn_cost(now, stated, sum, kind);
            state.check(stated, is_probe && verdict == Verdict::Accepted);
            (state.stated, state.at) = (*stated, now);
        }
        self.later.retain(|sent| !is_included(sent));
        self.stated_number = number;
    }

    /// What a new process continues with.
    pub(super) fn leave(&self, now: u64) -> LeftGate {
        let left = |kind: Kind| {
            let KindState { stated, at, cost_permille, contradictions } = self.kinds[kind as usize];
            let KindStatement { limit, remaining, reset_ms } = stated;
            LeftKind {
                limit,
                remaining,
                reset_ms,
                age_ms: now.saturating_sub(at),
                cost_permille,
                contradictions,
            }
        };
        // The answer to a probe does not reach the new process, which sends one of its own.
        let closed_ms = self.closed_until.map(|until| until.saturating_sub(now));
        let closed_ms = closed_ms.or(self.probe.map(|_| PROBE_WAIT_MS));
        let later = self.later.iter().fold(Amounts::default(), |sum, sent| sum.saturating_add(sent.amounts));
        LeftGate { kinds: Kind::ALL.map(left), later, closed_ms, answers: self.answers }
    }

    /// The gate of an old process.
    pub(super) fn continued(now: u64, left: &LeftGate) -> Self {
        let state = |kind: Kind| {
            let LeftKind { limit, remaining, reset_ms, age_ms, cost_permille, contradictions } =
                left.kinds[kind as usize];
            let stated = KindStatement { limit, remaining, reset_ms };
            KindState { stated, at: now.saturating_sub(age_ms), cost_permille, contradictions }
        };
        let closed_until = left.closed_ms.map(|ms| now.saturating_add(ms.min(MAX_CLOSED_MS)));
        // The next statement includes the requests of the old process.
        let later = Sent { number: 0, at: now, amounts: left.later };
        let later = (left.later != Amounts::default()).then_some(later).into_iter().collect();
        Self { kinds: Kind::ALL.map(state), later, closed_until, answers: left.answers, ..Self::default() }
    }

    /// Whether the gate knows anything about the provider, or has requests in flight.
    pub(super) fn is_informed(&self) -> bool {
        let has_limit = |state: &KindState| state.stated != KindStatement::default();
        self.kinds.iter().any(has_limit) || self.closed_until.is_some() || !self.later.is_empty()
    }

    /// Kinds that are ignored because answers contradict them.
    pub(super) fn ignored_kinds(&self) -> usize {
        self.kinds.iter().filter(|state| state.contradictions >= MAX_CONTRADICTIONS).count()
    }

    /// Milliseconds until the gate opens. `None`: it is open.
    pub(super) fn closed_ms(&self, now: u64) -> Option<u64> {
        self.closed_until?.checked_sub(now).filter(|&ms| ms > 0)
    }

    /// What the provider stated last.
    pub(super) fn view(&self, now: u64) -> Vec<KindView> {
        let view = |kind: Kind| {
            let KindState { stated: KindStatement { limit, remaining, reset_ms }, at, .. } =
                self.kinds[kind as usize];
            let reset_ms = reset_ms.map(|ms| ms.saturating_sub(now.saturating_sub(at)));
            (limit.is_some() || remaining.is_some()).then_some(KindView { kind, limit, remaining, reset_ms })
        };
        Kind::ALL.into_iter().filter_map(view).collect()
    }
}

/// How a limit refills: `amount` in `period_ms`.
#[derive(Clone, Copy, Debug)]
struct Refill {
    amount: u64,
    period_ms: u64,
}

impl Refill {
    /// Milliseconds in which this amount is refilled, rounded up.
    fn ms_until(self, amount: u64) -> u64 {
        let ms = (u128::from(amount) * u128::from(self.period_ms)).div_ceil(u128::from(self.amount.max(1)));
        u64::try_from(ms).unwrap_or(u64::MAX)
    }

    /// The amount that is refilled in this time.
    fn amount_in(self, ms: u64) -> u64 {
        let amount = u128::from(self.amount) * u128::from(ms) / u128::from(self.period_ms.max(1));
        u64::try_from(amount).unwrap_or(u64::MAX)
    }
}

impl KindState {
    /// What the provider has left. `None`: it has not stated it, or it contradicts itself.
    fn trusted_remaining(&self) -> Option<u64> {
        self.stated.remaining.filter(|_| self.contradictions < MAX_CONTRADICTIONS)
    }

    fn cost(&self, estimate: u64) -> u64 {
        let cost = (u128::from(estimate) * u128::from(self.cost_permille)).div_ceil(1_000);
        u64::try_from(cost).unwrap_or(u64::MAX)
    }

    /// The reset is the time in which the missing part is refilled. `None`: the provider states no limit.
    fn refill(&self) -> Option<Refill> {
        let KindStatement { limit, remaining, reset_ms } = self.stated;
        let (limit, remaining) = (limit?, remaining?);
        match reset_ms {
            Some(period_ms) if period_ms > 0 && remaining < limit => {
                Some(Refill { amount: limit - remaining, period_ms })
            }
            _ => Some(Refill { amount: limit, period_ms: DEFAULT_PERIOD_MS }),
        }
    }

    /// The time from the statement to the end of a fixed window of which nothing is left (ms). Nothing is refilled before.
    /// `None`: something is left, or the limit refills evenly.
    fn end_of_window(&self) -> Option<u64> {
        self.stated.reset_ms.filter(|&ms| self.stated.remaining == Some(0) && ms < MIN_EVEN_RESET_MS)
    }

    /// Compares what the provider has taken since the last statement with the estimates of the requests.
    fn learn_cost(&mut self, now: u64, stated: &KindStatement, estimated: u64, kind: Kind) {
        let (Some(before), Some(after)) = (self.stated.remaining, stated.remaining) else { return };
        let Some(refill) = self.refill().filter(|_| kind != Kind::Requests && estimated > 0) else { return };
        let full = self.stated.limit.unwrap_or(u64::MAX);
        let refilled = before.saturating_add(refill.amount_in(now.saturating_sub(self.at)));
        // A full bucket does not show how much was refilled.
        if refilled >= full || after >= refilled {
            return;
        }
        let sample = u128::from(refilled - after) * 1_000 / u128::from(estimated);
        let (low, high) = COST_PERMILLE;
        let sample = u64::try_from(sample).unwrap_or(high).clamp(low, high);
        // Rises at once and falls slowly: an underestimate leads to refusals.
        self.cost_permille =
            if sample > self.cost_permille { sample } else { (self.cost_permille * 9 + sample) / 10 };
    }

    /// Counts statements that the provider's own answers contradict: nothing is left, no time is stated, and the
    /// request that asked again was accepted.
    fn check(&mut self, stated: &KindStatement, was_accepted_as_probe: bool) {
        let names_no_time = stated.limit.is_none() || stated.reset_ms.is_none_or(|ms| ms == 0);
        if stated.remaining != Some(0) {
            self.contradictions = 0;
        } else if was_accepted_as_probe && names_no_time {
            self.contradictions = self.contradictions.saturating_add(1);
        }
    }
}

impl Statement {
    /// The time after which a refused request is accepted (ms): as stated, or that of a kind of which nothing is left.
    fn time_to_wait(&self) -> Option<u64> {
        let exhausted = self.kinds.iter().filter(|kind| kind.remaining == Some(0));
        self.retry_after_ms.or_else(|| exhausted.filter_map(|kind| kind.reset_ms).max())
    }
}

#[cfg(test)]
mod tests;
