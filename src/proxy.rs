//! The life of a request, from its head to the last byte of its answer.
//!
//! [`Proxy::serve`] is the entry point. `admit` takes every step that can refuse the request: the path, the caller,
//! the body, the model, the quotas. `exchange` sends the admitted request to the upstream and passes the answer on.
//! The answer's body, `metered::Metered`, settles the reservation when it ends or is dropped.

mod address;
mod answer;
mod body_budget;
mod body_parser;
mod call;
mod caller;
mod charge;
mod explain;
mod first_bytes;
mod flood;
mod form;
mod headers;
mod keys;
mod metered;
mod model_list;
mod models_request;
mod query;
mod reader;
mod refusal;
mod route;
mod settlement;
mod snapshot;
mod state;
mod stream_options;
mod unserved;
mod worker;

use crate::api::Dialect;
use crate::clock::Stopwatch;
use crate::config::{Environment, OnDisconnect, UpstreamSettings};
use crate::error::ProxyError;
use crate::ledger::{Demand, NoRoom, Reservation};
use crate::provider_limits::{Pass, ProviderLimits};
use crate::quota::{Amounts, Subject};
use crate::server::Peer;
use crate::telemetry::Record;
use crate::upstream::{self, Replicas, Upstream};
use http::header;
use http::request::Parts;
use http::{Request, Response, StatusCode, Uri, response};
use hyper::body::Incoming;
use std::net::IpAddr;
use std::sync::Arc;
use tokio_rustls::rustls::ClientConfig;

pub use answer::AnswerBody;
use body_budget::BufferedBytes;
use call::Call;
use caller::IdentifiedCaller;
use charge::Charge;
pub(crate) use explain::{Explanation, explain};
#[cfg(feature = "fuzz")]
pub(crate) use form::read_form_model;
use headers::{AddedHeaders, UnreadBody};
use metered::{MeterContext, Metered};
pub(crate) use models_request::models_request;
use refusal::Refusal;
use route::{Endpoint, Route};
use settlement::WhenDurable;
pub use snapshot::Snapshot;
pub use state::{PreparedConfig, State};
pub use worker::WorkerProxy;

/// Serves the requests of one worker by one snapshot of the config, with the worker's own upstream connections. A request
/// uses one proxy from its first byte to its last.
pub struct Proxy {
    state: Arc<State>,
    snapshot: Arc<Snapshot>,
    /// In the order of the config.
    upstreams: Box<[Arc<Upstream>]>,
}

/// A request that may be sent to the upstream.
struct Admitted {
    outgoing: OutgoingRequest,
    /// `None`: the endpoint is not charged.
    reservation: Option<Reservation>,
    headers: AddedHeaders,
}

/// The request to the upstream and the context of its exchange. With `on_disconnect: drain` it moves to a separate
/// task, which outlives the caller's connection.
struct OutgoingRequest {
    request: upstream::Request,
    /// Index of the upstream in the config.
    upstream: usize,
    environment: Arc<Environment>,
    endpoint: Endpoint,
    call: Call,
    /// Whether the answer is a list of models from which those that the environment forbids are removed.
    lists_models: bool,
    /// The bytes of the body, which are freed when the answer begins.
    buffered: BufferedBytes,
    /// Whether the exchange continues after the caller disconnects (`on_disconnect: drain`).
    outlives_caller: bool,
    /// The permission of the provider's limits. `None`: the gateway does not follow them.
    pass: Option<Pass>,
    /// Runs since the body was read.
    received: Stopwatch,
}

impl Proxy {
    /// Creates the proxy of one worker. It connects to no upstream yet.
    ///
    /// # Errors
    /// An upstream's host is not a valid TLS server name.
    pub fn new(state: Arc<State>, tls: &Arc<ClientConfig>) -> anyhow::Result<Self> {
        let snapshot = state.current();
        Self::with_upstreams(state, snapshot, &[], tls)
    }

    /// Creates the proxy that serves the worker's next requests by another snapshot. Replicas that the upstream had before
    /// keep their connections.
    fn next(&self, snapshot: Arc<Snapshot>, tls: &Arc<ClientConfig>) -> anyhow::Result<Self> {
        Self::with_upstreams(self.state.clone(), snapshot, &self.upstreams, tls)
    }

    fn with_upstreams(
        state: Arc<State>,
        snapshot: Arc<Snapshot>,
        known: &[Arc<Upstream>],
        tls: &Arc<ClientConfig>,
    ) -> anyhow::Result<Self> {
        let connect = |(settings, replicas): (&Arc<UpstreamSettings>, &Replicas)| {
            let named = known.iter().find(|upstream| upstream.settings().name == settings.name);
            if let Some(same) = named.filter(|upstream| upstream.settings() == &**settings) {
                return Ok(same.clone());
            }
            Upstream::new(settings.clone(), tls, replicas, named.map(|known| &**known)).map(Arc::new)
        };
        let upstreams = snapshot.config.upstreams.iter().zip(&snapshot.replicas);
        let upstreams = upstreams.map(connect).collect::<anyhow::Result<_>>()?;
        Ok(Self { state, snapshot, upstreams })
    }

    /// Answers one request with the upstream's answer or with an error of the gateway.
    pub(crate) async fn serve(
        self: Arc<Self>,
        request: Request<Incoming>,
        peer: Arc<Peer>,
    ) -> Response<AnswerBody> {
        let mut record = Record::begin(self.state.metrics.clone());
        let dialect = route::dialect(request.uri().path());
        // This statement moves the parts out of the result of `admit`. If later code borrowed the result, the future
        // would contain a second copy of it during the exchange.
        let (outgoing, headers, charge) = match tokio::select! {
            biased;
            () = peer.cut_off() => Err(Refusal::at_shutdown()),
            admitted = self.admit(request, &peer, &mut record) => admitted,
        } {
            Ok(Some(Admitted { outgoing, reservation, headers })) => {
                (outgoing, headers, Charge { reservation, record })
            }
            Ok(None) => return refusal::respond_to_root_check(record),
            Err(refusal) => {
                // A lingering close would let a flood keep connections open.
                let is_flood = matches!(refusal.error, ProxyError::FloodGuard { .. });
                if refusal.headers.unread != UnreadBody::None && !is_flood {
                    peer.linger();
                }
                let charge = Charge { reservation: None, record };
                return refusal::respond(&self.state, refusal, charge, dialect);
            }
        };
        if outgoing.outlives_caller {
            let exchange = async move { self.exchange(outgoing, headers, charge, dialect, &peer).await };
            // Boxed, so that the future of every request does not contain both branches.
            return Box::pin(answer::outlive_caller(dialect, exchange)).await;
        }
        self.exchange(outgoing, headers, charge, dialect, &peer).await
    }

    /// Takes every step that can refuse a request, before the upstream receives any of it. `None`: the request is
    /// `HEAD /`, which the gateway answers itself.
    async fn admit(
        &self,
        request: Request<Incoming>,
        peer: &Peer,
        record: &mut Record,
    ) -> Result<Option<Admitted>, Refusal> {
        // Longer than a screen: all steps are here, in the order in which they can refuse.
        let (head, body) = request.into_parts();
        let unread = call::unread(&head.headers, &body);
        let mut headers = AddedHeaders { unread, ..AddedHeaders::default() };

        // Path and caller.
        let address =
            address::of(&head.headers, peer.address.ip(), &self.snapshot.config.server.trusted_proxies);
        record.address = Some(address);
        let addressed =
            self.address(&head, address, record).map_err(|error| Refusal::new(error, &headers))?;
        let Some((route, caller)) = addressed else { return Ok(None) };
        let environment = &self.snapshot.config.environments[caller.environment];
        let context = &self.snapshot.contexts[caller.environment];
        headers.environment = Some(context.header.clone());

        // Body and model.
        self.check_supported(&head, &route, environment).map_err(|error| Refusal::new(error, &headers))?;
        let mut buffered = BufferedBytes::none(&self.state.bodies);
        let body = call::read_body(body, &self.snapshot.config.server, peer.timeouts.body, &mut buffered)
            .await
            .map_err(|error| Refusal::new(error, &headers))?;
        headers.unread = UnreadBody::None;
        peer.on_body_received();
        let received = Stopwatch::start();
        let call = call::parse(self, caller, &route, &head, address, body)
            .await
            .map_err(|error| Refusal::new(error, &headers))?;
        call.describe(record);
        call.check_model(route.endpoint, environment).map_err(|error| Refusal::new(error, &headers))?;
        if let Endpoint::Counted(_) = route.endpoint {
            headers.estimated_prompt = Some((call.prompt_tokens, call.estimate.tokens()));
            call.record_estimate(record.metrics());
        }

        // Quotas.
        let reservation = match self.reserve(caller, route.endpoint, &call, record).await {
            Ok(reservation) => reservation,
            Err(no_room) => return Err(self.deny(no_room, caller, &call, headers)),
        };
        // The requests that a shutdown ends make room for requests that wait.
        if self.state.is_drain_over() {
            return Err(Refusal::new(ProxyError::ShuttingDown, &headers));
        }
        let pass = match &reservation {
            // Boxed, so that the future of every request does not contain it.
            Some(reservation) if self.limits_of(caller).are_followed() => {
                Box::pin(self.pass_provider(caller, &call, reservation, received)).await
            }
            _ => Ok(None),
        };
        let pass = match pass {
            Ok(pass) => pass,
            Err(error) => {
                drop(reservation);
                return Err(self.refuse_for_provider(error, caller, &call, headers));
            }
        };
        if let Some(reservation) = &reservation {
            record.reserved_tokens = Some(reservation.reserved().total);
            headers.quotas = *reservation.standing();
            headers.clamped_to = reservation.clamped_to();
            record.clamped_to = headers.clamped_to;
        }

        // The request to the upstream.
        let body = call.forwarded_body(headers.clamped_to).await;
        let body = body.map_err(|error| Refusal::new(error, &headers))?;
        let (target, endpoint) = (self.upstream_target(&head.uri, &route, caller), route.endpoint);
        let lists_models = route.lists_models && !environment.models.is_empty();
        let credential = context.credential.as_ref();
        let passed =
            headers::for_upstream(head.headers, &environment.upstream, credential, caller.key_headers);
        let request = upstream::Request { method: head.method, target, headers: passed, body };
        let outgoing = OutgoingRequest {
            request,
            upstream: context.upstream,
            environment: environment.clone(),
            endpoint,
            call,
            lists_models,
            buffered,
            outlives_caller: environment.on_disconnect == OnDisconnect::Drain,
            pass,
            received,
        };
        Ok(Some(Admitted { outgoing, reservation, headers }))
    }

    /// Finds the endpoint and the caller of a request by its head. `None`: the request is `HEAD /`.
    fn address<'h>(
        &self,
        head: &'h Parts,
        address: IpAddr,
        record: &mut Record,
    ) -> Result<Option<(Route<'h>, IdentifiedCaller)>, ProxyError> {
        if let Some(Err(wait)) = self.snapshot.flood.as_ref().map(|flood| flood.check(address)) {
            return Err(ProxyError::FloodGuard { wait });
        }
        if self.state.is_draining() {
            return Err(ProxyError::ShuttingDown);
        }
        record.begin_trace(self.snapshot.tracing.as_ref(), head);
        call::check_head(&head.headers, &head.uri, head.version)?;
        let route = route::find(&self.snapshot.config, &head.method, head.uri.path())?;
        record.api = route.endpoint.as_str();
        if route.endpoint == Endpoint::Root {
            return Ok(None);
        }
        let caller = caller::identify(&self.snapshot, &route, head);
        let environment = match &caller {
            Ok(caller) => Some(caller.environment),
            // A refusal counts in the environment that the request would have had without its key.
            Err(_) => route.environment.or(self.snapshot.config.default_environment),
        };
        if let Some(context) = environment.map(|environment| &self.snapshot.contexts[environment]) {
            record.environment = context.name.clone();
            record.series = Some(context.series.clone());
        }
        let caller = caller?;
        record.caller = self.caller_name(caller).cloned();
        record.caller_label = self.snapshot.contexts[caller.environment].series.caller_label(caller.index);
        Ok(Some((route, caller)))
    }

    /// Refuses what the gateway does not support, before the body is read.
    fn check_supported(
        &self,
        head: &Parts,
        route: &Route<'_>,
        environment: &Environment,
    ) -> Result<(), ProxyError> {
        if route.endpoint == Endpoint::Other && !environment.forward_other_paths {
            return Err(route::unknown_path(&self.snapshot.config, head.uri.path()));
        }
        call::check_upgrade(&head.headers)?;
        call::check_encoding(&head.headers)
    }

    /// Reserves room in every quota that applies to the request, and waits until the reservation is durable if a quota
    /// requires that. `None`: the endpoint is not charged.
    async fn reserve(
        &self,
        caller: IdentifiedCaller,
        endpoint: Endpoint,
        call: &Call,
        record: &mut Record,
    ) -> Result<Option<Reservation>, NoRoom> {
        if matches!(endpoint, Endpoint::Models | Endpoint::Root) {
            return Ok(None);
        }
        let demand = Demand {
            subject: Subject { caller: self.caller_name(caller), model: &call.model },
            prompt: call.prompt_tokens,
            generates: endpoint.generates(),
            cap: call.completion_cap,
            completions: call.completions.max(1),
            backends: &[self.snapshot.backend(caller.environment, &call.model)],
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
    fn deny(
        &self,
        no_room: NoRoom,
        caller: IdentifiedCaller,
        call: &Call,
        mut headers: AddedHeaders,
    ) -> Refusal {
        let subject = Subject { caller: self.caller_name(caller), model: &call.model };
        let backends = [self.snapshot.backend(caller.environment, &call.model)];
        headers.quotas = self.snapshot.accounts[caller.environment].standing(subject, &backends);
        let environment = &self.snapshot.config.environments[caller.environment];
        let has_redis = self.snapshot.config.store.redis.is_some();
        if no_room == NoRoom::Unavailable && self.state.is_closing() && !has_redis {
            // The process that has replaced this one, and has the counters, has ended.
            return Refusal { error: ProxyError::ShuttingDown, headers };
        }
        Refusal { error: refusal::denied(no_room, environment, &self.state.metrics), headers }
    }

    /// The limits that the provider of the environment's upstream states.
    fn limits_of(&self, caller: IdentifiedCaller) -> &ProviderLimits {
        &self.snapshot.provider_limits[self.snapshot.contexts[caller.environment].upstream]
    }

    /// Waits until the upstream's provider has room for the request, for at most the rest of `max_wait`.
    async fn pass_provider(
        &self,
        caller: IdentifiedCaller,
        call: &Call,
        reservation: &Reservation,
        received: Stopwatch,
    ) -> Result<Option<Pass>, ProxyError> {
        let environment = &self.snapshot.config.environments[caller.environment];
        let limits = self.limits_of(caller);
        // The estimate counts even if the environment's quotas do not reserve it.
        let prompt = Amounts::of_request(call.prompt_tokens, 0);
        let amounts = reservation.reserved().max(prompt);
        let max_wait = environment.reserve.max_wait.saturating_sub(received.elapsed());
        limits.pass(&call.model, amounts, max_wait).await.map_err(|wait| ProxyError::UpstreamRateLimited {
            upstream: environment.upstream.name.clone(),
            wait,
            retry_patience: environment.retry_patience,
        })
    }

    /// Refuses a request that the provider would refuse. Its reservation is settled with nothing spent.
    fn refuse_for_provider(
        &self,
        error: ProxyError,
        caller: IdentifiedCaller,
        call: &Call,
        mut headers: AddedHeaders,
    ) -> Refusal {
        let account = &self.snapshot.accounts[caller.environment];
        let subject = Subject { caller: self.caller_name(caller), model: &call.model };
        account.count_denial(subject);
        let backends = [self.snapshot.backend(caller.environment, &call.model)];
        headers.quotas = account.standing(subject, &backends);
        headers.clamped_to = None;
        let environment = &self.snapshot.config.environments[caller.environment];
        self.state.metrics.rejected(&environment.name, error.code(), None, false);
        Refusal { error, headers }
    }

    /// The caller's name, under which quotas and the usage history know it.
    fn caller_name(&self, caller: IdentifiedCaller) -> Option<&Arc<str>> {
        caller.index.map(|index| &self.snapshot.contexts[caller.environment].callers[index])
    }

    /// Path and query of the request to the upstream.
    fn upstream_target(&self, uri: &Uri, route: &Route<'_>, caller: IdentifiedCaller) -> String {
        let base_path = self.snapshot.config.environments[caller.environment].upstream.base_url.path();
        let has_credential = self.snapshot.contexts[caller.environment].credential.is_some();
        // Google's SDKs may send the caller's key in the query.
        let replaces_key = has_credential && route.endpoint.dialect() == Dialect::Google;
        let is_key = |text: &[u8]| self.snapshot.keys.owner(&self.snapshot.config, text).is_some();
        let query = query::without_keys(uri, replaces_key, caller.has_key_in_query.then_some(&is_key));
        route::upstream_path(base_path, route.path, query.as_deref())
    }

    /// Sends an admitted request to the upstream and passes the answer on.
    async fn exchange(
        &self,
        mut outgoing: OutgoingRequest,
        headers: AddedHeaders,
        mut charge: Charge,
        dialect: Dialect,
        peer: &Arc<Peer>,
    ) -> Response<AnswerBody> {
        let started = Stopwatch::start();
        charge.record.overhead = Some(started.since(outgoing.received));
        let (parts, incoming) = match tokio::select! {
            biased;
            () = peer.cut_off() => Err(ProxyError::ShuttingDown),
            answer = self.send(&mut outgoing, headers.clamped_to, started, &mut charge) => answer,
        } {
            Ok(answer) => answer,
            Err(error) => {
                return refusal::respond(&self.state, Refusal { error, headers }, charge, dialect);
            }
        };
        charge.record.first_byte = Some(started.elapsed());
        let limits = &self.snapshot.provider_limits[outgoing.upstream];
        limits.answered(outgoing.pass.take().as_ref(), &outgoing.call.model, parts.status, &parts.headers);
        let (mut parts, incoming) = (parts, incoming);
        let incoming = if outgoing.lists_models && parts.status.is_success() {
            let allowed = &outgoing.environment.models;
            Box::pin(model_list::restrict(incoming, &mut parts.headers, allowed)).await
        } else {
            incoming
        };
        peer.limit_answer(started, outgoing.environment.upstream.timeouts.total);
        let mut context = self.meter_context(outgoing, parts.status, started, peer.clone());
        let incoming = if reader::depends_on_first_bytes(&parts, context.withholds_usage) {
            let (begins_as_stream, incoming) = Box::pin(first_bytes::begins_as_stream(incoming)).await;
            context.begins_as_stream = begins_as_stream;
            incoming
        } else {
            incoming
        };
        let incoming = if parts.status.is_success() {
            incoming
        } else {
            self.mask_keys(&mut parts, incoming, &context.environment)
        };
        let (response, when_durable) = self.respond(parts, incoming, context, headers, charge);
        if let Some(when_durable) = when_durable {
            when_durable.await;
        }
        response
    }

    /// Sends a request and waits for the head of the answer. If the upstream refuses the `stream_options` that the
    /// gateway added, the request is sent once more without them.
    async fn send(
        &self,
        outgoing: &mut OutgoingRequest,
        clamped_to: Option<u64>,
        started: Stopwatch,
        charge: &mut Charge,
    ) -> Result<(response::Parts, upstream::Incoming), ProxyError> {
        charge.record.upstream = Some(outgoing.environment.upstream.clone());
        if let Some(parent) = charge.record.call_upstream() {
            headers::replace_trace_parent(&mut outgoing.request.headers, &parent);
        }
        let prompt = Amounts::of_request(outgoing.call.prompt_tokens, 0);
        // Once the upstream may have read the request, the prompt is charged, even if the caller disconnects.
        let mut reached = |is_reached| charge.observe(if is_reached { prompt } else { Amounts::default() });
        let upstream = &self.upstreams[outgoing.upstream];
        let failed = |error| refusal::send_failed(error, &outgoing.environment);
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
        outgoing.call.drop_usage_request();
        outgoing.request.body = outgoing.call.forwarded_body(clamped_to).await?;
        let answer = upstream.send(&outgoing.request, started, &mut reached).await.map_err(failed)?;
        // If the second request fails too, `stream_options` was not the cause.
        if answer.0.status.is_success() {
            self.snapshot.stop_requesting_stream_usage(outgoing.upstream);
        }
        Ok(answer)
    }

    /// Masks the upstream's keys in an answer that is not a success, and records that they were in it.
    fn mask_keys(
        &self,
        parts: &mut response::Parts,
        incoming: upstream::Incoming,
        environment: &Arc<Environment>,
    ) -> upstream::Incoming {
        let (metrics, name) = (self.state.metrics.clone(), environment.upstream.name.clone());
        let on_found = Box::new(move || {
            metrics.upstream_key_masked(&name);
            tracing::warn!(upstream = name, "an error of the upstream repeated its key, which was masked");
        });
        let Some(mut mask) = headers::key_mask(&environment.upstream, on_found) else { return incoming };
        headers::mask_keys(&mut parts.headers, &mut mask);
        // A compressed body would not be found in, and must not be changed.
        let coding = parts.headers.get(header::CONTENT_ENCODING);
        let is_plain = coding.is_none_or(|coding| coding.as_bytes().eq_ignore_ascii_case(b"identity"));
        if is_plain { incoming.masked(mask) } else { incoming }
    }

    fn meter_context(
        &self,
        outgoing: OutgoingRequest,
        status: StatusCode,
        started: Stopwatch,
        peer: Arc<Peer>,
    ) -> MeterContext {
        let OutgoingRequest { environment, endpoint, call, buffered, .. } = outgoing;
        drop(buffered);
        MeterContext {
            estimated_prompt: call.prompt_tokens,
            has_prompt: call.estimate.has_content(),
            completions: call.completions.max(1),
            tokenizer: call.tokenizer,
            withholds_usage: call.adds_usage_request(),
            begins_as_stream: false,
            estimate_update: call.estimate_update(&self.state.learned),
            status,
            endpoint,
            started,
            environment,
            peer,
        }
    }

    /// Builds the answer to the caller from the upstream's answer. The server never polls an empty body, so this
    /// function settles an answer with an empty body. The answer must not be passed on before the returned future
    /// resolves.
    fn respond(
        &self,
        mut parts: response::Parts,
        incoming: upstream::Incoming,
        context: MeterContext,
        added: AddedHeaders,
        mut charge: Charge,
    ) -> (Response<AnswerBody>, Option<WhenDurable>) {
        headers::for_caller(&mut parts.headers);
        charge.record.status = parts.status.as_u16();
        charge.record.request_id = headers::request_id(&mut parts.headers, &self.state.request_ids);
        let mut metered = Metered::new(incoming, &parts.headers, context, charge);
        let when_durable = if metered.is_empty() { metered.settle_empty() } else { None };
        if !metered.has_fixed_length() {
            parts.headers.remove(header::CONTENT_LENGTH);
        }
        added.write(&mut parts.headers);
        (Response::from_parts(parts, AnswerBody::from_upstream(metered)), when_durable)
    }
}

#[cfg(test)]
mod tests;
