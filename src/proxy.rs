//! The life of a request, from its head to the last byte of its answer.
//!
//! [`Proxy::serve`] is the entry point. `admit` takes every step that can refuse the request: the path, the caller,
//! the body, the model, the quotas. `exchange` sends the admitted request to the upstream and passes the answer on.
//! The answer's body, `metered::Metered`, settles the reservation when it ends or is dropped.

mod address;
mod admission;
mod answer;
mod attempts;
mod body_budget;
mod body_parser;
mod call;
mod caller;
mod candidates;
mod charge;
mod choice;
mod destination;
mod explain;
mod first_bytes;
mod flood;
mod form;
mod headers;
mod key_masking;
mod keys;
mod metered;
mod model_list;
mod model_lists;
mod models_request;
mod outgoing;
mod query;
mod reader;
mod refusal;
mod route;
mod settlement;
mod snapshot;
mod state;
mod stream_options;
mod unserved;
mod upstream_context;
mod worker;

use crate::api::Dialect;
use crate::clock::Stopwatch;
use crate::config::{Environment, OnDisconnect, UpstreamSettings};
use crate::error::ProxyError;
use crate::ledger::Reservation;
use crate::server::{ParsedHead, Peer};
use crate::telemetry::Record;
use crate::upstream::{self, Replicas, Upstream};
use futures_util::future::join_all;
use http::header;
use http::request::Parts;
use http::{Request, Response, StatusCode, response};
use hyper::body::Incoming;
use std::net::IpAddr;
use std::sync::Arc;
use tokio_rustls::rustls::ClientConfig;

pub use answer::AnswerBody;
use body_budget::BufferedBytes;
use caller::IdentifiedCaller;
use charge::Charge;
use choice::Chosen;
pub(crate) use explain::{Explanation, explain};
#[cfg(feature = "fuzz")]
pub(crate) use form::read_form_model;
use headers::{AddedHeaders, UnreadBody};
use metered::{MeterContext, Metered};
pub(crate) use models_request::models_request;
use outgoing::{Alternatives, CallerTarget, OutgoingRequest};
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

/// What happens to a request that is not refused.
// Nearly always `Forward`.
#[allow(clippy::large_enum_variant)]
enum Admission {
    /// The gateway answers `HEAD /` itself.
    RootCheck,
    /// The gateway answers with the models of all upstreams of the environment.
    ModelList(ModelListRequest),
    Forward(Admitted),
}

/// A request for the list of models of an environment with routes.
struct ModelListRequest {
    environment: Arc<Environment>,
    dialect: Dialect,
    headers: Box<AddedHeaders>,
}

/// A request that may be sent to the upstream.
struct Admitted {
    /// Boxed, because it passes through several futures.
    outgoing: Box<OutgoingRequest>,
    /// `None`: the endpoint is not charged.
    reservation: Option<Reservation>,
    headers: Box<AddedHeaders>,
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
        let mut record = Box::new(Record::begin(self.state.metrics.clone()));
        let dialect = route::dialect(request.uri().path());
        // This statement moves the parts out of the result of `admit`. If later code borrowed the result, the future
        // would contain a second copy of it during the exchange.
        let (outgoing, headers, charge) = match tokio::select! {
            biased;
            () = peer.cut_off() => Err(Refusal::at_shutdown()),
            admitted = self.admit(request, &peer, &mut record) => admitted,
        } {
            Ok(Admission::Forward(Admitted { outgoing, reservation, headers })) => {
                (outgoing, headers, Charge { reservation, record })
            }
            Ok(Admission::RootCheck) => return refusal::respond_to_root_check(record),
            Ok(Admission::ModelList(request)) => {
                return Box::pin(self.list_models(request, record, dialect)).await;
            }
            Err(refusal) => {
                // A lingering close would let a flood keep connections open.
                let is_flood = matches!(*refusal.error, ProxyError::FloodGuard { .. });
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

    /// Takes every step that can refuse a request, before the upstream receives any of it.
    async fn admit(
        &self,
        request: Request<Incoming>,
        peer: &Peer,
        record: &mut Record,
    ) -> Result<Admission, Refusal> {
        // Longer than a screen: all steps are here, in the order in which they can refuse.
        let (head, body) = request.into_parts();
        let unread = call::unread(&head.headers, &body);
        // Boxed, as it passes through the same functions.
        let mut headers = Box::new(AddedHeaders { unread, ..AddedHeaders::default() });

        // Path and caller.
        let address =
            address::of(&head.headers, peer.address.ip(), &self.snapshot.config.server.trusted_proxies);
        record.address = Some(address);
        let addressed =
            self.address(&head, address, record).map_err(|error| Refusal::new(error, &headers))?;
        let Some((route, caller)) = addressed else { return Ok(Admission::RootCheck) };
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
        if route.lists_models && !environment.routes.is_empty() {
            let dialect = model_lists::dialect(route.path, &head.headers);
            let environment = environment.clone();
            return Ok(Admission::ModelList(ModelListRequest { environment, dialect, headers }));
        }
        let mut call = call::parse(self, caller, &route, &head, address, body)
            .await
            .map_err(|error| Refusal::new(error, &headers))?;
        call.describe(record);
        call.check_model(route.endpoint, environment).map_err(|error| Refusal::new(error, &headers))?;
        if let Endpoint::Counted(_) = route.endpoint {
            headers.estimated_prompt = Some((call.prompt_tokens, call.estimate.tokens()));
            call.record_estimate(record.metrics());
        }

        // Quotas.
        let candidates = self.candidates(caller, &call, record);
        let reservation = self.reserve(caller, route.endpoint, &call, candidates.as_deref(), record).await;
        let mut reservation = match reservation {
            Ok(reservation) => reservation,
            Err(no_room) => return Err(self.deny(no_room, caller, &call, headers)),
        };
        // The requests that a shutdown ends make room for requests that wait.
        if self.state.is_drain_over() {
            return Err(Refusal::new(ProxyError::ShuttingDown, &headers));
        }
        let chosen = if let Some(upstream) = self.only_upstream(caller, &call) {
            Ok(Chosen::only(upstream))
        } else {
            let rest = environment.reserve.max_wait.saturating_sub(received.elapsed());
            let held = reservation.as_mut();
            // Boxed, so that the future of every request does not contain it.
            Box::pin(self.choose_upstream(caller, &call, candidates, held, rest, record)).await
        };
        let Chosen { upstream, pass, others } = match chosen {
            Ok(chosen) => chosen,
            Err(error) => {
                drop(reservation);
                return Err(self.refuse_for_upstreams(error, caller, &call, headers));
            }
        };
        if let Some(reservation) = &reservation {
            record.reserved_tokens = Some(reservation.reserved().total);
            headers.quotas = *reservation.standing();
            headers.clamped_to = reservation.clamped_to();
            record.clamped_to = headers.clamped_to;
        }

        // The request to the upstream.
        call.request_usage(self.snapshot.upstreams[upstream].requests_stream_usage());
        let body = call.forwarded_body(headers.clamped_to).await;
        let body = body.map_err(|error| Refusal::new(error, &headers))?;
        let (path, endpoint) = (outgoing::path_sent(&route, &call), route.endpoint);
        let lists_models = route.lists_models && !environment.models.is_empty();
        let is_google = endpoint.dialect() == Dialect::Google;
        let target = CallerTarget { uri: &head.uri, path: &path, is_google, caller };
        let alternatives = others.map(|(others, attempt)| {
            Box::new(Alternatives::new(others, attempt, &target, head.headers.clone()))
        });
        let target = self.target(upstream, &target);
        let request = upstream::Request {
            method: head.method,
            target,
            headers: self.headers(upstream, head.headers, caller),
            body,
        };
        let outgoing = Box::new(OutgoingRequest {
            request,
            upstream,
            environment: environment.clone(),
            endpoint,
            call,
            lists_models,
            buffered,
            outlives_caller: environment.on_disconnect == OnDisconnect::Drain,
            pass,
            received,
            alternatives,
        });
        Ok(Admission::Forward(Admitted { outgoing, reservation, headers }))
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
        ParsedHead::from(head).check(true)?;
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

    /// Answers with the models of all upstreams of an environment. Those that fail to list theirs are left out.
    async fn list_models(
        &self,
        request: ModelListRequest,
        record: Box<Record>,
        error_dialect: Dialect,
    ) -> Response<AnswerBody> {
        let ModelListRequest { environment, dialect, headers } = request;
        let all = environment.all_upstreams();
        let known = || self.upstreams.iter().zip(&self.snapshot.upstreams);
        let find =
            |settings: &Arc<UpstreamSettings>| known().find(|(_, of)| Arc::ptr_eq(&of.settings, settings));
        let lists = all.into_iter().filter_map(find).map(|(upstream, of)| of.learned.models.get(upstream));
        let lists: Vec<_> = join_all(lists).await.into_iter().flatten().collect();
        if lists.is_empty() {
            let upstream = environment.upstream.name.clone();
            let error =
                ProxyError::UpstreamUnreachable { upstream, what: "no upstream has listed its models" };
            let charge = Charge { reservation: None, record };
            return refusal::respond(
                &self.state,
                Refusal::with_headers(error, headers),
                charge,
                error_dialect,
            );
        }
        let list = model_lists::union(lists, &environment.models, dialect).await;
        refusal::respond_with_json(&self.state, list, &headers, record)
    }

    /// Sends an admitted request to the upstream and passes the answer on.
    async fn exchange(
        &self,
        mut outgoing: Box<OutgoingRequest>,
        mut headers: Box<AddedHeaders>,
        mut charge: Charge,
        dialect: Dialect,
        peer: &Arc<Peer>,
    ) -> Response<AnswerBody> {
        let began = Stopwatch::start();
        let waited = charge.record.queue_wait.unwrap_or_default();
        charge.record.overhead = Some(began.since(outgoing.received).saturating_sub(waited));
        let mut started = began;
        let answer = tokio::select! {
            biased;
            () = peer.cut_off() => Err(ProxyError::ShuttingDown),
            answer = self.send(&mut outgoing, headers.clamped_to, &mut started, &mut charge) => answer,
        };
        // The reservation may have moved to another upstream.
        if let Some(reservation) = charge.reservation.as_ref().filter(|_| outgoing.alternatives.is_some()) {
            headers.quotas = *reservation.standing();
        }
        let (parts, incoming) = match answer {
            Ok(answer) => answer,
            Err(error) => {
                return refusal::respond(&self.state, Refusal::with_headers(error, headers), charge, dialect);
            }
        };
        charge.record.first_byte = Some(began.elapsed());
        let upstream = &self.snapshot.upstreams[outgoing.upstream];
        headers.upstream = upstream.header.clone();
        upstream.note_status(parts.status);
        let (mut parts, incoming) = (parts, incoming);
        let incoming = if outgoing.lists_models && parts.status.is_success() {
            let allowed = &outgoing.environment.models;
            Box::pin(model_list::restrict(incoming, &mut parts.headers, allowed)).await
        } else {
            incoming
        };
        peer.limit_answer(started, upstream.settings.timeouts.total);
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
            Box::pin(self.mask_keys(&mut parts, incoming, &context.upstream)).await
        };
        let (response, when_durable) = self.respond(parts, incoming, context, &headers, charge);
        if let Some(when_durable) = when_durable {
            when_durable.await;
        }
        response
    }

    fn meter_context(
        &self,
        outgoing: Box<OutgoingRequest>,
        status: StatusCode,
        started: Stopwatch,
        peer: Arc<Peer>,
    ) -> MeterContext {
        let OutgoingRequest { environment, endpoint, call, buffered, upstream, .. } = *outgoing;
        drop(buffered);
        let upstream = &self.snapshot.upstreams[upstream];
        MeterContext {
            estimated_prompt: call.prompt_tokens,
            has_prompt: call.estimate.has_content(),
            completions: call.completions.max(1),
            tokenizer: call.tokenizer,
            withholds_usage: call.adds_usage_request(),
            begins_as_stream: false,
            estimate_update: call.estimate_update(&self.state.learned, upstream.calibrations),
            status,
            endpoint,
            started,
            environment,
            upstream: upstream.settings.clone(),
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
        added: &AddedHeaders,
        mut charge: Charge,
    ) -> (Response<AnswerBody>, Option<WhenDurable>) {
        headers::for_caller(&mut parts.headers, added);
        charge.record.status = parts.status.as_u16();
        let known_id = headers::request_id(&parts.headers);
        let new_id = known_id.is_none().then(|| self.state.request_ids.next());
        added.add_to_answer(&mut parts.headers, new_id.as_deref(), &context.peer);
        charge.record.request_id = known_id.or(new_id).unwrap_or_default();
        let mut metered = Metered::new(incoming, &parts.headers, context, charge);
        let when_durable = if metered.is_empty() { metered.settle_empty() } else { None };
        if !metered.has_fixed_length() {
            parts.headers.remove(header::CONTENT_LENGTH);
        }
        (Response::from_parts(parts, AnswerBody::from_upstream(metered)), when_durable)
    }
}

#[cfg(test)]
mod tests;
