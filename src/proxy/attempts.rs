//! The attempts to get an answer for an admitted request: one upstream after the other, in the order of its route.

use super::Proxy;
use super::candidates::{self, Candidate};
use super::charge::Charge;
use super::headers;
use super::outgoing::OutgoingRequest;
use super::refusal;
use super::stream_options;
use crate::clock::Stopwatch;
use crate::error::ProxyError;
use crate::ledger::Reservation;
use crate::provider_limits::Pass;
use crate::quota::Amounts;
use crate::upstream;
use http::response;
use std::time::Duration;

/// The head and the body of an upstream's answer.
type Answer = (response::Parts, upstream::Incoming);

impl Proxy {
    /// Sends a request and waits for the head of the answer. `sent` is started when the request is sent to the upstream
    /// that answers.
    pub(super) async fn send(
        &self,
        outgoing: &mut OutgoingRequest,
        clamped_to: Option<u64>,
        sent: &mut Stopwatch,
        charge: &mut Charge,
    ) -> Result<Answer, ProxyError> {
        if outgoing.alternatives.is_some() {
            // Boxed, so that the future of every request does not contain both branches.
            return Box::pin(self.send_in_order(outgoing, clamped_to, sent, charge)).await;
        }
        self.send_once(outgoing, clamped_to, *sent, charge).await
    }

    /// Sends a request to one upstream after the other, until one answers it or there is none left. The answer of the
    /// last one is passed on, whatever it is. Only that one is charged.
    async fn send_in_order(
        &self,
        outgoing: &mut OutgoingRequest,
        clamped_to: Option<u64>,
        sent: &mut Stopwatch,
        charge: &mut Charge,
    ) -> Result<Answer, ProxyError> {
        loop {
            let answer = self.send_once(outgoing, clamped_to, *sent, charge).await;
            let outcome = candidates::outcome(&answer);
            let context = &self.snapshot.upstreams[outgoing.upstream];
            if let Some(attempt) = outgoing.alternatives.as_mut().and_then(|others| others.attempt.take()) {
                candidates::report(attempt, outcome, &context.settings.name);
            }
            if !candidates::falls_back(outcome) {
                return answer;
            }
            charge.record.attempts.add(&context.settings, outcome);
            // While the next upstream is looked for, the failed attempt is not charged.
            let spent = charge.reservation.as_ref().map(Reservation::spent).unwrap_or_default();
            charge.observe(Amounts::default());
            let Some((candidate, pass)) = self.next_upstream(outgoing, charge).await else {
                charge.observe(spent);
                charge.record.attempts.end_with(&context.settings);
                return answer;
            };
            drop(answer);
            tracing::debug!(
                upstream = context.settings.name,
                outcome = outcome.as_str(),
                next = self.snapshot.upstreams[candidate.upstream].settings.name,
                "a request goes to the next upstream of its route"
            );
            self.redirect(outgoing, candidate, pass, clamped_to).await?;
            *sent = Stopwatch::start();
        }
    }

    /// The next upstream that has room for the request now, to which the reservation moves. `None`: there is none.
    async fn next_upstream(
        &self,
        outgoing: &mut OutgoingRequest,
        charge: &mut Charge,
    ) -> Option<(Candidate, Option<Pass>)> {
        let upstreams = &self.snapshot.upstreams;
        loop {
            let candidate = outgoing.alternatives.as_mut()?.candidates.next(upstreams)?;
            let (reservation, mut waited) = (charge.reservation.as_mut(), None);
            let tried = self
                .try_candidate(&candidate, &outgoing.call, reservation, Duration::ZERO, &mut waited)
                .await;
            charge.record.add_wait(waited);
            match tried {
                Ok(pass) => return Some((candidate, pass)),
                Err(obstacle) => {
                    let settings = &upstreams[candidate.upstream].settings;
                    charge.record.attempts.add(settings, obstacle.outcome());
                }
            }
        }
    }

    /// Makes the request to another upstream.
    async fn redirect(
        &self,
        outgoing: &mut OutgoingRequest,
        candidate: Candidate,
        pass: Option<Pass>,
        clamped_to: Option<u64>,
    ) -> Result<(), ProxyError> {
        let Candidate { upstream, position, attempt } = candidate;
        outgoing.pass = pass;
        outgoing.call.request_usage(self.snapshot.upstreams[upstream].requests_stream_usage());
        let body = outgoing.call.forwarded_body(clamped_to).await?;
        outgoing.send_to(self, upstream, body);
        if let Some(alternatives) = &mut outgoing.alternatives {
            alternatives.candidates.on_sent(position);
            alternatives.attempt = Some(attempt);
        }
        Ok(())
    }

    /// Sends a request to its upstream and waits for the head of the answer. If the upstream refuses the
    /// `stream_options` that the gateway added, the request is sent once more without them.
    async fn send_once(
        &self,
        outgoing: &mut OutgoingRequest,
        clamped_to: Option<u64>,
        started: Stopwatch,
        charge: &mut Charge,
    ) -> Result<Answer, ProxyError> {
        let answer = self.exchange_heads(outgoing, clamped_to, started, charge).await?;
        let limits = &self.snapshot.provider_limits[outgoing.upstream];
        let (parts, pass) = (&answer.0, outgoing.pass.take());
        limits.answered(pass.as_ref(), outgoing.call.name_sent(), parts.status, &parts.headers);
        Ok(answer)
    }

    async fn exchange_heads(
        &self,
        outgoing: &mut OutgoingRequest,
        clamped_to: Option<u64>,
        started: Stopwatch,
        charge: &mut Charge,
    ) -> Result<Answer, ProxyError> {
        let context = &self.snapshot.upstreams[outgoing.upstream];
        charge.record.upstream = Some(context.settings.clone());
        charge.record.replica = None;
        if let Some(parent) = charge.record.call_upstream() {
            headers::replace_trace_parent(&mut outgoing.request.headers, &parent);
        }
        let prompt = Amounts::of_request(outgoing.call.prompt_tokens, 0);
        // Once the upstream may have read the request, the prompt is charged, even if the caller disconnects.
        let mut reached = |replica: Option<usize>| {
            charge.record.replica = replica.or(charge.record.replica);
            charge.observe(if replica.is_some() { prompt } else { Amounts::default() });
        };
        let upstream = &self.upstreams[outgoing.upstream];
        let failed = |error| refusal::send_failed(error, &context.settings);
        let answer = upstream.send(&outgoing.request, started, &mut reached).await.map_err(failed)?;
        if !outgoing.call.adds_usage_request() || !stream_options::may_be_refusal(answer.0.status) {
            return Ok(answer);
        }
        let (parts, incoming) = answer;
        let (is_refusal, incoming) = Box::pin(stream_options::mentions_stream_options(incoming)).await;
        if !is_refusal {
            return Ok((parts, incoming));
        }
        drop(incoming);
        outgoing.call.request_usage(false);
        outgoing.request.body = outgoing.call.forwarded_body(clamped_to).await?;
        let answer = upstream.send(&outgoing.request, started, &mut reached).await.map_err(failed)?;
        // If the second request fails too, `stream_options` was not the cause.
        if answer.0.status.is_success() {
            context.stop_requesting_stream_usage();
        }
        Ok(answer)
    }
}
