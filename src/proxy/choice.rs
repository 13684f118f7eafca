//! Chooses the upstream of a request: the first one of its route that has room, in its own quotas and at its provider.
//!
//! The request has its room in the quotas of the environment, and of the first upstream whose own quotas had room. If the
//! provider of that one would refuse the request, the room moves to another upstream. If no upstream has room, the request
//! waits for any of them.

use super::Proxy;
use super::call::Call;
use super::caller::IdentifiedCaller;
use super::candidates::{Candidate, Candidates};
use super::refusal;
use crate::clock::Stopwatch;
use crate::error::ProxyError;
use crate::ledger::{NoRoom, Reservation};
use crate::provider_limits::Pass;
use crate::quota::{Amounts, Wait};
use crate::telemetry::{AttemptOutcome, Record};
use crate::upstream::availability::Attempt;
use std::ops::Range;
use std::time::Duration;

/// How often a request that waits for any of several upstreams tries them again: a request in flight may have ended before
/// their quotas are refilled.
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

/// Why the upstreams of a route cannot receive a request.
#[derive(Default)]
struct Obstacles {
    /// The obstacle at the upstream at which the request fits first, and the index of this upstream in the config.
    first: Option<(Obstacle, usize)>,
    /// The attempt at that upstream.
    candidate: Option<Candidate>,
    /// Whether a provider could take the request in time.
    provider_may_clear: bool,
    /// Whether an upstream's own quotas could have room in time.
    quotas_may_clear: bool,
}

/// A request that looks for an upstream of its route, which has several.
struct Search<'a> {
    proxy: &'a Proxy,
    call: &'a Call,
    candidates: Box<Candidates>,
    reservation: Option<&'a mut Reservation>,
    /// How long it may wait in all.
    max_wait: Duration,
    /// Runs since the search began.
    clock: Stopwatch,
    /// How long it has waited. `None`: it has not.
    waited: Option<Duration>,
}

/// An upstream that has room.
type Found = (Candidate, Option<Pass>);

impl Chosen {
    /// The only upstream of a route.
    pub(super) fn only(upstream: usize) -> Self {
        Self { upstream, pass: None, others: None }
    }
}

impl Obstacle {
    /// Whether a request with this obstacle fits before one with the other obstacle.
    pub(super) fn fits_before(&self, other: &Self) -> bool {
        let order = |obstacle: &Self| (obstacle.is_unavailable(), obstacle.retry_after());
        order(self) < order(other)
    }

    fn is_unavailable(&self) -> bool {
        matches!(self, Self::NoRoom(NoRoom::Unavailable))
    }

    /// The time after which the caller is advised to try again.
    fn retry_after(&self) -> Wait {
        match self {
            Self::Held(wait) => Wait::Ms(u64::try_from(wait.as_millis()).unwrap_or(u64::MAX)),
            Self::NoRoom(no_room) => no_room.retry_after(),
        }
    }

    /// Whether the request could fit within this time. Room that requests in flight hold may become free at any moment.
    fn may_clear_within(&self, time: Duration) -> bool {
        match self {
            Self::Held(wait) => *wait <= time,
            Self::NoRoom(no_room) => {
                matches!(no_room.soonest(), Wait::Ms(ms) if Duration::from_millis(ms) <= time)
            }
        }
    }

    pub(super) fn outcome(&self) -> AttemptOutcome {
        match self {
            Self::Held(_) => AttemptOutcome::Held,
            Self::NoRoom(_) => AttemptOutcome::NoRoom,
        }
    }
}

impl Obstacles {
    /// `left`: how long the request may still wait.
    fn add(&mut self, obstacle: Obstacle, candidate: Candidate, left: Duration) {
        let may_clear = !left.is_zero() && obstacle.may_clear_within(left);
        match obstacle {
            Obstacle::Held(_) => self.provider_may_clear |= may_clear,
            Obstacle::NoRoom(_) => self.quotas_may_clear |= may_clear,
        }
        if self.first.as_ref().is_none_or(|(first, _)| obstacle.fits_before(first)) {
            self.first = Some((obstacle, candidate.upstream));
            self.candidate = Some(candidate);
        }
    }

    /// Whether the request could fit at one of the upstreams in time.
    fn may_clear(&self) -> bool {
        self.provider_may_clear || self.quotas_may_clear
    }

    /// The time until the request fits at the first upstream, or may do so.
    fn retry_after(&self) -> Duration {
        match self.first.as_ref().map(|(obstacle, _)| obstacle.retry_after()) {
            Some(Wait::Ms(ms)) => Duration::from_millis(ms).clamp(MIN_RETRY_INTERVAL, RETRY_INTERVAL),
            Some(Wait::Never) | None => RETRY_INTERVAL,
        }
    }
}

impl Search<'_> {
    /// Tries the upstreams in their order, and then waits for any of them.
    async fn run(&mut self, record: &mut Record) -> Result<Found, Obstacles> {
        let upstreams = &self.proxy.snapshot.upstreams;
        let with_room = self.reservation.as_ref().map_or(0, |reservation| reservation.backend());
        for &upstream in self.candidates.order().iter().take(with_room) {
            record.attempts.add(&upstreams[upstream].settings, AttemptOutcome::NoRoom);
        }
        self.candidates.skip_to(with_room);
        let mut obstacles = Obstacles::default();
        while let Some(candidate) = self.candidates.next(upstreams) {
            let settings = &upstreams[candidate.upstream].settings;
            match self.try_at(&candidate).await {
                Ok(pass) => return Ok((candidate, pass)),
                Err(obstacle) => {
                    record.attempts.add(settings, obstacle.outcome());
                    obstacles.add(obstacle, candidate, self.left());
                }
            }
        }
        // No provider takes the request now. It may fit first at an upstream whose own quotas had no room.
        if let Some(found) = self.try_all(0..with_room, &mut obstacles).await {
            return Ok(found);
        }
        if !obstacles.may_clear() {
            return Err(obstacles);
        }
        let (began, before) = (Stopwatch::start(), self.waited.unwrap_or_default());
        let found = self.wait(obstacles).await;
        self.waited = Some(before + began.elapsed());
        found
    }

    /// Waits until one of the upstreams has room.
    async fn wait(&mut self, mut obstacles: Obstacles) -> Result<Found, Obstacles> {
        while obstacles.may_clear() {
            let mut pause = obstacles.retry_after();
            // While only providers can make room, the request waits in the queue of the one that does so first. Otherwise the
            // attempt is dropped: another request may be the probe of that upstream.
            if let (Some(candidate), Some((Obstacle::Held(_), _))) =
                (obstacles.candidate.take(), &obstacles.first)
                && !obstacles.quotas_may_clear
            {
                let (left, reservation) = (self.left(), self.reservation.as_deref_mut());
                let tried =
                    self.proxy.try_candidate(&candidate, self.call, reservation, left, &mut None).await;
                if let Ok(pass) = tried {
                    return Ok((candidate, pass));
                }
                pause = RETRY_INTERVAL;
            }
            tokio::time::sleep(pause.min(self.left())).await;
            let mut again = Obstacles::default();
            let all = 0..self.candidates.order().len();
            if let Some(found) = self.try_all(all, &mut again).await {
                return Ok(found);
            }
            if again.first.is_none() {
                // Other requests are the probes of all upstreams.
                (again.first, again.quotas_may_clear) = (obstacles.first, !self.left().is_zero());
            }
            obstacles = again;
        }
        Err(obstacles)
    }

    /// Tries the upstreams at these positions of the order.
    async fn try_all(&mut self, positions: Range<usize>, obstacles: &mut Obstacles) -> Option<Found> {
        for position in positions {
            let Some(candidate) = self.candidates.at(position, &self.proxy.snapshot.upstreams) else {
                continue;
            };
            match self.try_at(&candidate).await {
                Ok(pass) => return Some((candidate, pass)),
                Err(obstacle) => obstacles.add(obstacle, candidate, self.left()),
            }
        }
        None
    }

    async fn try_at(&mut self, candidate: &Candidate) -> Result<Option<Pass>, Obstacle> {
        let reservation = self.reservation.as_deref_mut();
        self.proxy.try_candidate(candidate, self.call, reservation, Duration::ZERO, &mut self.waited).await
    }

    fn left(&self) -> Duration {
        self.max_wait.saturating_sub(self.clock.elapsed())
    }
}

impl Proxy {
    /// The upstream, if the route has one and its provider's limits are not followed.
    pub(super) fn only_upstream(&self, caller: IdentifiedCaller, call: &Call) -> Option<usize> {
        let destination = self.destination(caller, call);
        let upstream = destination.first();
        let is_followed = self.snapshot.provider_limits[upstream].are_followed();
        (!destination.has_alternatives() && !is_followed).then_some(upstream)
    }

    /// Chooses the first upstream of the route that has room for the request, in its own quotas and at its provider. If none
    /// has, waits for at most `max_wait` for the first one that has room.
    pub(super) async fn choose_upstream(
        &self,
        caller: IdentifiedCaller,
        call: &Call,
        candidates: Option<Box<Candidates>>,
        reservation: Option<&mut Reservation>,
        max_wait: Duration,
        record: &mut Record,
    ) -> Result<Chosen, ProxyError> {
        let held = |upstream, wait| refusal::held(&self.snapshot, caller.environment, upstream, wait);
        let Some(candidates) = candidates else {
            let (upstream, mut waited) = (self.destination(caller, call).first(), None);
            let pass =
                self.pass_provider(upstream, call, reservation.as_deref(), max_wait, &mut waited).await;
            record.add_wait(waited);
            let pass = pass.map_err(|wait| held(upstream, wait))?;
            return Ok(Chosen { upstream, pass, others: None });
        };
        let clock = Stopwatch::start();
        let mut search = Search { proxy: self, call, candidates, reservation, max_wait, clock, waited: None };
        let found = search.run(record).await;
        record.add_wait(search.waited);
        match found {
            Ok((Candidate { upstream, position, attempt }, pass)) => {
                let mut others = search.candidates;
                others.on_sent(position);
                Ok(Chosen { upstream, pass, others: Some((others, attempt)) })
            }
            Err(obstacles) => Err(match obstacles.first {
                Some((Obstacle::Held(wait), at)) => held(at, wait),
                Some((Obstacle::NoRoom(no_room), at)) => {
                    self.snapshot.backend(at, call.name_sent()).count_denial(&no_room);
                    let environment = &self.snapshot.config.environments[caller.environment];
                    refusal::no_room_error(no_room, environment)
                }
                None => ProxyError::Internal,
            }),
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
        waited: &mut Option<Duration>,
    ) -> Result<Option<Pass>, Obstacle> {
        let &Candidate { upstream, position, .. } = candidate;
        let pass = self.pass_provider(upstream, call, reservation.as_deref(), max_wait, waited).await;
        let pass = pass.map_err(Obstacle::Held)?;
        if let Some(reservation) = reservation.filter(|reservation| reservation.backend() != position) {
            let backend = self.snapshot.backend(upstream, call.name_sent());
            reservation.move_to(position, &backend).await.map_err(Obstacle::NoRoom)?;
        }
        Ok(pass)
    }

    /// Waits until the provider of an upstream has room for the request, for at most `max_wait`.
    async fn pass_provider(
        &self,
        upstream: usize,
        call: &Call,
        reservation: Option<&Reservation>,
        max_wait: Duration,
        waited: &mut Option<Duration>,
    ) -> Result<Option<Pass>, Duration> {
        let (limits, Some(reservation)) = (&self.snapshot.provider_limits[upstream], reservation) else {
            return Ok(None);
        };
        // The estimate counts even if the environment's quotas do not reserve it.
        let prompt = Amounts::of_request(call.prompt_tokens, 0);
        let amounts = reservation.reserved().max(prompt);
        limits.pass(call.name_sent(), amounts, max_wait, waited).await
    }
}
