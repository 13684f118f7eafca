//! The room for a request: in the quotas, and at the provider of the upstream that receives it.

use super::Proxy;
use super::call::Call;
use super::caller::IdentifiedCaller;
use super::candidates::{Candidate, Candidates};
use super::destination::Destination;
use super::headers::AddedHeaders;
use super::refusal::{self, Refusal};
use super::route::Endpoint;
use crate::clock::Stopwatch;
use crate::error::ProxyError;
use crate::ledger::{Backend, Demand, NoRoom, Reservation};
use crate::provider_limits::Pass;
use crate::quota::{Amounts, Subject, Wait};
use crate::telemetry::{AttemptOutcome, Denial, Record};
use crate::upstream::availability::Attempt;
use smallvec::SmallVec;
use std::sync::Arc;
use std::time::Duration;

/// How often a request that waits for the quotas of another upstream tries again: another request may have ended before
/// they are refilled.
const RETRY_INTERVAL: Duration = Duration::from_millis(100);
const MIN_RETRY_INTERVAL: Duration = Duration::from_millis(1);

/// The upstream that receives a request.
pub(super) struct Chosen {
    /// Index of the upstream in the config.
    pub(super) upstream: usize,
    /// The permission of the provider's limits. `None`: the gateway does not follow them.
    pub(super) pass: Option<Pass>,
    /// The upstreams after it, and the attempt at it. `None`: the route has one upstream.
    pub(super) others: Option<(Box<Candidates>, Attempt)>,
}

/// Why an upstream does not receive a request.
pub(super) enum Obstacle {
    /// Its provider would refuse the request for this time.
    Held(Duration),
    /// Its own quotas have no room.
    NoRoom(NoRoom),
}

impl Obstacle {
    /// Whether a request with this obstacle fits before one with the other obstacle.
    pub(super) fn fits_before(&self, other: &Self) -> bool {
        let order = |obstacle: &Self| match obstacle {
            Self::Held(wait) => (false, Wait::Ms(u64::try_from(wait.as_millis()).unwrap_or(u64::MAX))),
            Self::NoRoom(no_room) => (*no_room == NoRoom::Unavailable, no_room.retry_after()),
        };
        order(self) < order(other)
    }

    fn outcome(&self) -> AttemptOutcome {
        match self {
            Self::Held(_) => AttemptOutcome::Held,
            Self::NoRoom(_) => AttemptOutcome::NoRoom,
        }
    }
}

impl Chosen {
    /// The only upstream of a route.
    pub(super) fn only(upstream: usize) -> Self {
        Self { upstream, pass: None, others: None }
    }

    fn of(candidate: Candidate, pass: Option<Pass>, mut others: Box<Candidates>) -> Self {
        let Candidate { upstream, position, attempt } = candidate;
        others.on_sent(position);
        Self { upstream, pass, others: Some((others, attempt)) }
    }
}

/// Why the upstreams of a route cannot receive a request: the one that fits first of those that are waited for because of
/// their providers' limits, and of those whose own quotas have no room.
#[derive(Default)]
struct Obstacles {
    held: Option<(Duration, Candidate)>,
    no_room: Option<(NoRoom, Candidate)>,
}

/// What a request does if no upstream can receive it at once.
enum Waiting {
    /// It waits at the provider of this upstream, or is refused because of it.
    Held(Duration, Candidate),
    /// It waits for room in the quotas of this upstream, or is refused because of them.
    NoRoom(NoRoom, Candidate),
}

impl Obstacles {
    fn add(&mut self, obstacle: Obstacle, candidate: Candidate) {
        match obstacle {
            Obstacle::Held(wait) => {
                if self.held.as_ref().is_none_or(|(shortest, _)| wait < *shortest) {
                    self.held = Some((wait, candidate));
                }
            }
            Obstacle::NoRoom(reason) => {
                if self.no_room.as_ref().is_none_or(|(earlier, _)| reason.fits_before(earlier)) {
                    self.no_room = Some((reason, candidate));
                }
            }
        }
    }

    /// The upstream at which the request fits first. If that is after `max_wait`, another one whose requests in flight may
    /// end before.
    fn first(self, max_wait: Duration) -> Option<Waiting> {
        let ((wait, held), (reason, full)) = match (self.held, self.no_room) {
            (Some(held), Some(no_room)) => (held, no_room),
            (held, no_room) => {
                let held = held.map(|(wait, candidate)| Waiting::Held(wait, candidate));
                return held
                    .or_else(|| no_room.map(|(reason, candidate)| Waiting::NoRoom(reason, candidate)));
            }
        };
        let is_before = |other| matches!(other, Wait::Ms(ms) if Duration::from_millis(ms) < wait);
        let fits_before = reason.wait().is_some_and(is_before);
        // Nobody knows when a request in flight ends. A wait that is known goes first, unless it is too long.
        let is_late =
            wait > max_wait && (may_clear_within(&reason, max_wait) || is_before(reason.retry_after()));
        Some(if fits_before || is_late { Waiting::NoRoom(reason, full) } else { Waiting::Held(wait, held) })
    }
}

/// Whether quotas could have room for a request within this time.
fn may_clear_within(no_room: &NoRoom, time: Duration) -> bool {
    !time.is_zero() && matches!(no_room.soonest(), Wait::Ms(ms) if Duration::from_millis(ms) <= time)
}

impl Proxy {
    /// Reserves room in every quota that applies to the request, and waits until the reservation is durable if a quota
    /// requires that. Of several upstreams, the first one with room in its own quotas takes part. `None`: the endpoint is
    /// not charged.
    pub(super) async fn reserve(
        &self,
        caller: IdentifiedCaller,
        endpoint: Endpoint,
        call: &Call,
        candidates: Option<&Candidates>,
        record: &mut Record,
    ) -> Result<Option<Reservation>, NoRoom> {
        if matches!(endpoint, Endpoint::Models | Endpoint::Root) {
            return Ok(None);
        }
        let first = [self.destination(caller, call).first()];
        let backends = self.backends(candidates.map_or(&first, Candidates::order), call);
        let demand = Demand {
            subject: Subject { caller: self.caller_name(caller), model: &call.model },
            prompt: call.prompt_tokens,
            generates: endpoint.generates(),
            cap: call.completion_cap,
            completions: call.completions.max(1),
            backends: &backends,
        };
        let environment = &self.snapshot.config.environments[caller.environment];
        let account = &self.snapshot.accounts[caller.environment];
        let (max_wait, waited) = (environment.reserve.max_wait, &mut record.queue_wait);
        let reservation = account.reserve_timed(&demand, max_wait, waited).await;
        record.end_wait();
        let mut reservation = reservation?;
        if let Some(no_room) = reservation.would_deny() {
            refusal::record_shadow_denial(no_room, environment, record);
        }
        reservation.wait_until_durable().await;
        Ok(Some(reservation))
    }

    /// Refuses a request that does not fit its quotas, and reports their status.
    pub(super) fn deny(
        &self,
        no_room: NoRoom,
        caller: IdentifiedCaller,
        call: &Call,
        mut headers: AddedHeaders,
    ) -> Refusal {
        let subject = Subject { caller: self.caller_name(caller), model: &call.model };
        let backends = self.backends(&self.destination(caller, call).upstreams, call);
        headers.quotas = self.snapshot.accounts[caller.environment].standing(subject, &backends);
        let environment = &self.snapshot.config.environments[caller.environment];
        let has_redis = self.snapshot.config.store.redis.is_some();
        if no_room == NoRoom::Unavailable && self.state.is_closing() && !has_redis {
            // The process that has replaced this one, and has the counters, has ended.
            return Refusal { error: ProxyError::ShuttingDown, headers };
        }
        Refusal { error: refusal::denied(no_room, environment, &self.state.metrics), headers }
    }

    /// Where a request goes.
    fn destination(&self, caller: IdentifiedCaller, call: &Call) -> &Destination {
        self.snapshot.contexts[caller.environment].destinations.get(call.destination)
    }

    /// Upstreams with the quotas of their own, for the ledger.
    fn backends<'b>(&'b self, upstreams: &[usize], call: &'b Call) -> SmallVec<[Backend<'b>; 1]> {
        upstreams.iter().map(|&upstream| self.snapshot.backend(upstream, call.name_sent())).collect()
    }

    /// The upstreams of the request's route, in the order in which they are tried. `None`: there is one.
    pub(super) fn candidates(
        &self,
        caller: IdentifiedCaller,
        call: &Call,
        record: &mut Record,
    ) -> Option<Box<Candidates>> {
        let destination = self.destination(caller, call);
        if !destination.has_alternatives() {
            return None;
        }
        let candidates = Candidates::new(destination, &self.snapshot.upstreams);
        for &upstream in candidates.passed_over() {
            record.attempts.add(&self.snapshot.upstreams[upstream].settings, AttemptOutcome::PassedOver);
        }
        Some(Box::new(candidates))
    }

    /// The upstream, if the route has one and its provider's limits are not followed.
    pub(super) fn only_upstream(&self, caller: IdentifiedCaller, call: &Call) -> Option<usize> {
        let destination = self.destination(caller, call);
        let upstream = destination.first();
        let is_followed = self.snapshot.provider_limits[upstream].are_followed();
        (!destination.has_alternatives() && !is_followed).then_some(upstream)
    }

    /// Chooses the first upstream of the route that has room for the request, in its own quotas and at its provider. If none
    /// has, waits for at most `max_wait` for the one that has room first.
    pub(super) async fn choose_upstream(
        &self,
        caller: IdentifiedCaller,
        call: &Call,
        candidates: Option<Box<Candidates>>,
        mut reservation: Option<&mut Reservation>,
        max_wait: Duration,
        record: &mut Record,
    ) -> Result<Chosen, ProxyError> {
        let Some(mut candidates) = candidates else {
            let upstream = self.destination(caller, call).first();
            let pass = self.pass_provider(upstream, call, reservation.as_deref(), max_wait).await;
            let pass =
                pass.map_err(|wait| refusal::held(&self.snapshot, caller.environment, upstream, wait))?;
            return Ok(Chosen { upstream, pass, others: None });
        };
        let upstreams = &self.snapshot.upstreams;
        let with_room = reservation.as_ref().map_or(0, |reservation| reservation.backend());
        for &upstream in candidates.order().iter().take(with_room) {
            record.attempts.add(&upstreams[upstream].settings, AttemptOutcome::NoRoom);
        }
        candidates.skip_to(with_room);
        let mut obstacles = Obstacles::default();
        while let Some(candidate) = candidates.next(upstreams) {
            let settings = &upstreams[candidate.upstream].settings;
            match self.try_candidate(&candidate, call, reservation.as_deref_mut(), Duration::ZERO).await {
                Ok(pass) => return Ok(Chosen::of(candidate, pass, candidates)),
                Err(obstacle) => {
                    record.attempts.add(settings, obstacle.outcome());
                    obstacles.add(obstacle, candidate);
                }
            }
        }
        // No provider takes the request now. It may fit first at an upstream whose own quotas had no room.
        for candidate in (0..with_room).filter_map(|position| candidates.at(position, upstreams)) {
            match self.try_candidate(&candidate, call, reservation.as_deref_mut(), Duration::ZERO).await {
                Ok(pass) => return Ok(Chosen::of(candidate, pass, candidates)),
                Err(obstacle) => obstacles.add(obstacle, candidate),
            }
        }
        let (tried, candidate) = match obstacles.first(max_wait) {
            None => return Err(ProxyError::Internal),
            Some(Waiting::Held(wait, candidate)) if wait > max_wait => (Err(Obstacle::Held(wait)), candidate),
            Some(Waiting::Held(_, candidate)) => {
                (self.try_candidate(&candidate, call, reservation, max_wait).await, candidate)
            }
            Some(Waiting::NoRoom(reason, candidate)) => {
                (self.wait_for_room(reason, &candidate, call, reservation, max_wait).await, candidate)
            }
        };
        match tried {
            Ok(pass) => Ok(Chosen::of(candidate, pass, candidates)),
            Err(Obstacle::Held(wait)) => {
                Err(refusal::held(&self.snapshot, caller.environment, candidate.upstream, wait))
            }
            Err(Obstacle::NoRoom(reason)) => {
                self.snapshot.backend(candidate.upstream, call.name_sent()).count_denial(&reason);
                Err(self.no_room_at_upstream(reason, caller))
            }
        }
    }

    /// Waits until the quotas of an upstream have room, for at most `max_wait`. The request has its room in the quotas of the
    /// environment, so it is not in the environment's wait queue.
    async fn wait_for_room(
        &self,
        mut reason: NoRoom,
        candidate: &Candidate,
        call: &Call,
        mut reservation: Option<&mut Reservation>,
        max_wait: Duration,
    ) -> Result<Option<Pass>, Obstacle> {
        let clock = Stopwatch::start();
        loop {
            let left = max_wait.saturating_sub(clock.elapsed());
            if !may_clear_within(&reason, left) {
                return Err(Obstacle::NoRoom(reason));
            }
            let refill = match reason.wait() {
                Some(Wait::Ms(ms)) => Duration::from_millis(ms),
                Some(Wait::Never) | None => RETRY_INTERVAL,
            };
            tokio::time::sleep(refill.clamp(MIN_RETRY_INTERVAL, RETRY_INTERVAL).min(left)).await;
            match self.try_candidate(candidate, call, reservation.as_deref_mut(), Duration::ZERO).await {
                Err(Obstacle::NoRoom(again)) => reason = again,
                other => return other,
            }
        }
    }

    /// Takes the room of a request at an upstream: first at its provider, for which it waits at most `max_wait`, then in its
    /// own quotas, to which the reservation moves.
    pub(super) async fn try_candidate(
        &self,
        candidate: &Candidate,
        call: &Call,
        reservation: Option<&mut Reservation>,
        max_wait: Duration,
    ) -> Result<Option<Pass>, Obstacle> {
        let &Candidate { upstream, position, .. } = candidate;
        let pass = self.pass_provider(upstream, call, reservation.as_deref(), max_wait).await;
        let pass = pass.map_err(Obstacle::Held)?;
        if let Some(reservation) = reservation.filter(|reservation| reservation.backend() != position) {
            let backend = self.snapshot.backend(upstream, call.name_sent());
            reservation.move_to(position, &backend).await.map_err(Obstacle::NoRoom)?;
        }
        Ok(pass)
    }

    /// Waits until the provider of an upstream has room for the request, for at most `max_wait`.
    pub(super) async fn pass_provider(
        &self,
        upstream: usize,
        call: &Call,
        reservation: Option<&Reservation>,
        max_wait: Duration,
    ) -> Result<Option<Pass>, Duration> {
        let (limits, Some(reservation)) = (&self.snapshot.provider_limits[upstream], reservation) else {
            return Ok(None);
        };
        // The estimate counts even if the environment's quotas do not reserve it.
        let prompt = Amounts::of_request(call.prompt_tokens, 0);
        let amounts = reservation.reserved().max(prompt);
        limits.pass(call.name_sent(), amounts, max_wait).await
    }

    /// The error for a request for which the quotas of its upstreams have no room.
    fn no_room_at_upstream(&self, no_room: NoRoom, caller: IdentifiedCaller) -> ProxyError {
        refusal::no_room_error(no_room, &self.snapshot.config.environments[caller.environment])
    }

    /// Refuses a request that no upstream has room for. Its reservation is settled with nothing spent.
    pub(super) fn refuse_for_upstreams(
        &self,
        error: ProxyError,
        caller: IdentifiedCaller,
        call: &Call,
        mut headers: AddedHeaders,
    ) -> Refusal {
        let account = &self.snapshot.accounts[caller.environment];
        let subject = Subject { caller: self.caller_name(caller), model: &call.model };
        account.count_denial(subject);
        let backends = self.backends(&self.destination(caller, call).upstreams, call);
        headers.quotas = account.standing(subject, &backends);
        headers.clamped_to = None;
        let environment = &self.snapshot.config.environments[caller.environment];
        self.state.metrics.rejected(
            &environment.name,
            error.code(),
            Denial::of_error(&error).as_ref(),
            false,
        );
        Refusal { error, headers }
    }

    /// The caller's name, under which quotas and the usage history know it.
    pub(super) fn caller_name(&self, caller: IdentifiedCaller) -> Option<&Arc<str>> {
        caller.index.map(|index| &self.snapshot.contexts[caller.environment].callers[index])
    }
}
