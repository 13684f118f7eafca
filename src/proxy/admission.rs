//! The room for a request in the quotas, and the refusal of a request that has none.

use super::Proxy;
use super::call::Call;
use super::caller::IdentifiedCaller;
use super::candidates::Candidates;
use super::destination::Destination;
use super::headers::AddedHeaders;
use super::refusal::{self, Refusal};
use super::route::Endpoint;
use crate::error::ProxyError;
use crate::ledger::{Backend, Demand, NoRoom, Reservation};
use crate::quota::Subject;
use crate::telemetry::{AttemptOutcome, Denial, Record};
use smallvec::SmallVec;
use std::sync::Arc;

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
            may_clamp: true,
        };
        let environment = &self.snapshot.config.environments[caller.environment];
        let account = &self.snapshot.accounts[caller.environment];
        let mut waited = None;
        let reservation = account.reserve_timed(&demand, environment.reserve.max_wait, &mut waited).await;
        record.add_wait(waited);
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
        mut headers: Box<AddedHeaders>,
    ) -> Refusal {
        let subject = Subject { caller: self.caller_name(caller), model: &call.model };
        let backends = self.backends(&self.destination(caller, call).upstreams, call);
        headers.quotas = self.snapshot.accounts[caller.environment].standing(subject, &backends);
        let environment = &self.snapshot.config.environments[caller.environment];
        let has_redis = self.snapshot.config.store.redis.is_some();
        if no_room == NoRoom::Unavailable && self.state.is_closing() && !has_redis {
            // The process that has replaced this one, and has the counters, has ended.
            return Refusal::with_headers(ProxyError::ShuttingDown, headers);
        }
        Refusal::with_headers(refusal::denied(no_room, environment, &self.state.metrics), headers)
    }

    /// Where a request goes.
    pub(super) fn destination(&self, caller: IdentifiedCaller, call: &Call) -> &Destination {
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

    /// Refuses a request that no upstream has room for. Its reservation is settled with nothing spent.
    pub(super) fn refuse_for_upstreams(
        &self,
        error: ProxyError,
        caller: IdentifiedCaller,
        call: &Call,
        mut headers: Box<AddedHeaders>,
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
        Refusal::with_headers(error, headers)
    }

    /// The caller's name, under which quotas and the usage history know it.
    pub(super) fn caller_name(&self, caller: IdentifiedCaller) -> Option<&Arc<str>> {
        caller.index.map(|index| &self.snapshot.contexts[caller.environment].callers[index])
    }
}
