//! The upstreams of a route in the order in which a request tries them.

use super::destination::Destination;
use super::upstream_context::UpstreamContext;
use crate::clock;
use crate::error::ProxyError;
use crate::telemetry::AttemptOutcome;
use crate::upstream::Incoming;
use crate::upstream::availability::{Attempt, Standing};
use http::response;
use smallvec::SmallVec;

/// The upstreams that a request has not tried yet. Each is tried at most once. Upstreams that have failed are passed over:
/// they are tried only by a request that no other upstream has received.
#[derive(Debug)]
pub(super) struct Candidates {
    /// Indices into the config. Those that are passed over are last.
    order: SmallVec<[usize; 4]>,
    /// The number of upstreams in `order` that are not passed over.
    available: usize,
    /// The next position in `order`.
    next: usize,
    /// Whether an upstream that is not passed over has received the request.
    is_sent: bool,
}

/// An upstream that a request may try.
#[derive(Debug)]
pub(super) struct Candidate {
    /// Index of the upstream in the config.
    pub(super) upstream: usize,
    /// Position in the order of the candidates.
    pub(super) position: usize,
    /// Reports whether the upstream works.
    pub(super) attempt: Attempt,
}

impl Candidates {
    pub(super) fn new(destination: &Destination, upstreams: &[UpstreamContext]) -> Self {
        let is_passed_over = |&upstream: &usize| is_left_out(upstream, upstreams);
        let all = destination.upstreams.iter().copied();
        let (passed_over, mut order): (SmallVec<[usize; 4]>, SmallVec<[usize; 4]>) =
            all.partition(is_passed_over);
        let available = order.len();
        order.extend(passed_over);
        Self { order, available, next: 0, is_sent: false }
    }

    /// Indices of the upstreams in the config, in the order in which they are tried.
    pub(super) fn order(&self) -> &[usize] {
        &self.order
    }

    /// Leaves out the upstreams before this position.
    pub(super) fn skip_to(&mut self, position: usize) {
        self.next = self.next.max(position);
    }

    /// The upstreams that are passed over. Empty: there are none, or there are no others.
    pub(super) fn passed_over(&self) -> &[usize] {
        if self.available == 0 { &[] } else { self.order.get(self.available..).unwrap_or_default() }
    }

    /// The upstream at this position, outside of the order. `None`: it has failed in the meantime, and another one may be
    /// tried.
    pub(super) fn at(&self, position: usize, upstreams: &[UpstreamContext]) -> Option<Candidate> {
        let &upstream = self.order.get(position)?;
        let availability = &upstreams[upstream].learned.availability;
        let attempt = match availability.attempt(clock::uptime_ms()) {
            Ok(attempt) => attempt,
            Err(_) if position < self.available && self.is_any_available(upstreams) => return None,
            Err(_) => availability.attempt_anyway(),
        };
        Some(Candidate { upstream, position, attempt })
    }

    fn is_any_available(&self, upstreams: &[UpstreamContext]) -> bool {
        self.order.iter().any(|&upstream| !is_left_out(upstream, upstreams))
    }

    /// The next upstream. `None`: there is none.
    pub(super) fn next(&mut self, upstreams: &[UpstreamContext]) -> Option<Candidate> {
        while let Some(&upstream) = self.order.get(self.next) {
            let position = self.next;
            self.next += 1;
            let learned = &upstreams[upstream].learned;
            match learned.availability.attempt(clock::uptime_ms()) {
                Ok(attempt) => return Some(Candidate { upstream, position, attempt }),
                // Another request has become its probe in the meantime.
                Err(_) if position < self.available => self.order.push(upstream),
                Err(_) if self.is_sent => {}
                Err(_) => {
                    let attempt = learned.availability.attempt_anyway();
                    return Some(Candidate { upstream, position, attempt });
                }
            }
        }
        None
    }

    /// Records that the upstream at this position receives the request.
    pub(super) fn on_sent(&mut self, position: usize) {
        self.is_sent |= position < self.available;
    }
}

/// Whether an upstream has failed and may not be tried yet.
fn is_left_out(upstream: usize, upstreams: &[UpstreamContext]) -> bool {
    let standing = upstreams[upstream].learned.availability.standing(clock::uptime_ms());
    matches!(standing, Standing::LeftOut { .. })
}

/// How an attempt ended with this answer.
pub(super) fn outcome(answer: &Result<(response::Parts, Incoming), ProxyError>) -> AttemptOutcome {
    match answer {
        Ok((parts, _)) => AttemptOutcome::of_status(parts.status.as_u16()),
        Err(ProxyError::UpstreamUnreachable { .. }) => AttemptOutcome::Unreachable,
        Err(ProxyError::UpstreamTimeout { .. }) => AttemptOutcome::TimedOut,
        Err(_) => AttemptOutcome::Cancelled,
    }
}

/// Whether the next upstream is tried after an attempt with this outcome.
pub(super) fn falls_back(outcome: AttemptOutcome) -> bool {
    use AttemptOutcome::{RateLimited, TimedOut, Unavailable, Unreachable};
    matches!(outcome, RateLimited | Unavailable | Unreachable | TimedOut)
}

/// Records whether the upstream works. One that limits its rate does.
pub(super) fn report(attempt: Attempt, outcome: AttemptOutcome, upstream: &str) {
    match outcome {
        AttemptOutcome::Answered | AttemptOutcome::RateLimited => {
            if attempt.succeeded() {
                tracing::info!(upstream, "an upstream that was passed over works again");
            }
        }
        AttemptOutcome::Unavailable | AttemptOutcome::Unreachable | AttemptOutcome::TimedOut => {
            if let Some(ms) = attempt.failed(clock::uptime_ms()) {
                let (seconds, outcome) = (ms / 1_000, outcome.as_str());
                tracing::warn!(upstream, seconds, outcome, "an upstream has failed and is passed over");
            }
        }
        _ => drop(attempt),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::parse;
    use crate::proxy::State;
    use std::sync::Arc;

    #[tokio::test]
    async fn a_waiting_request_skips_an_upstream_that_fails_unless_all_fail() {
        let text = "upstreams: { a: { base_url: 'http://127.0.0.1:1/v1' }, b: { base_url: 'http://127.0.0.1:2/v1' } }\n\
                    environments: { e: { upstream: a } }\nstore: { memory: true }\n";
        let loaded = parse(text, "test.yaml", &|_| None, &[]).unwrap_or_else(|faults| panic!("{faults}"));
        let state = State::new(Arc::new(loaded.config), crate::estimate::Models::default(), None).unwrap();
        let snapshot = state.current();
        let upstreams = &snapshot.upstreams;
        let candidates = Candidates::new(&Destination { upstreams: [0, 1].into(), model: None }, upstreams);
        let found = || [0, 1].map(|position| candidates.at(position, upstreams).map(|found| found.upstream));
        let fail = |upstream: usize| {
            while !is_left_out(upstream, upstreams) {
                let attempt = upstreams[upstream].learned.availability.attempt(clock::uptime_ms()).unwrap();
                attempt.failed(clock::uptime_ms());
            }
        };
        assert_eq!(found(), [Some(0), Some(1)]);
        fail(0);
        assert_eq!(found(), [None, Some(1)]);
        fail(1);
        assert_eq!(found(), [Some(0), Some(1)]);
    }
}
