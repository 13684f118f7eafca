//! The life of a request, from its head to the last byte of its answer.

mod answer;
mod call;
mod flood;
mod form;
mod headers;
mod metered;
mod query;
mod reader;
mod refusal;
mod route;
mod state;
mod unsettled;

use crate::api::Dialect;
use crate::calibrations::Lesson;
use crate::clock::Stopwatch;
use crate::config::{Environment, LONGEST_KEY, OnDisconnect};
use crate::error::ProxyError;
use crate::ledger::{Demand, NoRoom, Reservation};
use crate::quota::{Amounts, Subject};
use crate::server::Peer;
use crate::telemetry::{Outcome, Record};
use crate::upstream::{self, SendError, Upstream};
use bytes::Bytes;
use http::header::{self, HeaderName, HeaderValue};
use http::{Request, Response, StatusCode, response};
use hyper::body::Incoming;
use sha2::{Digest as _, Sha256};
use smallvec::SmallVec;
use std::borrow::Cow;
use std::sync::Arc;
use subtle::ConstantTimeEq as _;

pub use answer::AnswerBody;
use call::{Call, Reading};
use headers::{OurKeys, SentKey, Told, Unread};
use metered::{Kept, Metered, Terms};
use route::{Endpoint, NoRoute, Route};
use state::Owner;
pub use state::State;

/// One worker's way to serve requests: what is shared, and its own upstream connections.
#[derive(Clone)]
pub struct Proxy {
    state: Arc<State>,
    upstreams: Arc<[Arc<Upstream>]>,
}

/// What a request holds and what will be told of it. Dropping it settles the one and writes the other.
pub(crate) struct Charge {
    reservation: Option<Reservation>,
    record: Record,
}

impl Charge {
    /// Records the latest word on what the request has cost.
    fn observe(&mut self, spent: Amounts) {
        if let Some(reservation) = &mut self.reservation {
            reservation.observe(spent);
            self.record.charged = spent;
        }
    }
}

/// Who asks, and of which environment.
#[derive(Clone, Copy)]
struct Caller {
    environment: usize,
    /// Its index among those of the environment.
    index: Option<usize>,
    /// Where keys of this gateway's stand, which are not passed on.
    keys: OurKeys,
    /// One of them in the query.
    key_in_query: bool,
}

impl Proxy {
    /// A worker's own proxy. Nothing is connected yet.
    ///
    /// # Errors
    /// An upstream's host cannot be a TLS server's name.
    pub fn new(state: Arc<State>, tls: &Arc<tokio_rustls::rustls::ClientConfig>) -> anyhow::Result<Self> {
        let connect = |u: &Arc<crate::config::Upstream>| Upstream::new(u.clone(), tls).map(Arc::new);
        let upstreams = state.config.upstreams.iter().map(connect).collect::<anyhow::Result<_>>()?;
        Ok(Self { state, upstreams })
    }

    /// Serves one request: the upstream's answer, or the gateway's own refusal.
    pub(crate) async fn serve(&self, request: Request<Incoming>, peer: &Arc<Peer>) -> Response<AnswerBody> {
        peer.begin();
        let record = Record::begin(self.state.metrics.clone());
        let mut charge = Charge { reservation: None, record };
        let dialect = route::dialect(request.uri().path());
        let mut told = Told { dialect, ..Told::default() };
        match self.admit(request, peer, &mut charge, &mut told).await {
            Ok(Some(forward)) if forward.environment.on_disconnect == OnDisconnect::Drain => {
                let (proxy, peer) = (self.clone(), peer.clone());
                // Boxed, or every request's future would be as large as both ways together.
                let exchange = async move { proxy.exchange(forward, charge, told, &peer).await };
                Box::pin(answer::outlive_caller(dialect, exchange)).await
            }
            Ok(Some(forward)) => self.exchange(forward, charge, told, peer).await,
            Ok(None) => empty_answer(charge),
            Err(error) => {
                // A flood is to cost nothing.
                if told.unread != Unread::Nothing && !matches!(error, ProxyError::Flood { .. }) {
                    peer.linger();
                }
                self.refuse(error, charge, told)
            }
        }
    }

    /// Every step that can refuse a request comes before the upstream sees it. `None`: there is
    /// nothing to say but that somebody is there.
    async fn admit(
        &self,
        request: Request<Incoming>,
        peer: &Peer,
        charge: &mut Charge,
        told: &mut Told,
    ) -> Result<Option<Forward>, ProxyError> {
        let (head, body) = request.into_parts();
        told.unread = call::unread(&body);
        if let Some(Err(wait)) = self.state.flood.as_ref().map(|flood| flood.check(peer.address.ip())) {
            return Err(ProxyError::Flood { wait });
        }
        if self.state.is_draining() {
            return Err(ProxyError::ShuttingDown);
        }
        call::check_head(&head.headers, &head.uri, head.version)?;
        let route = self.route(&head)?;
        charge.record.api = route.endpoint.as_str();
        if route.endpoint == Endpoint::Root {
            return Ok(None);
        }
        let who = self.identify(&route, &head)?;
        let environment = &self.state.config.environments[who.environment];
        self.name(who, &mut charge.record, told);
        if route.endpoint == Endpoint::Other {
            if !environment.forward_other_paths {
                return Err(self.unknown_path(&head));
            }
            call::check_upgrade(&head.headers)?;
        }
        call::check_encoding(&head.headers)?;

        let most = self.state.config.server.max_request_body;
        let body = call::read_body(body, most, peer.patience.body).await?;
        told.unread = Unread::Nothing;
        let received = Stopwatch::start();
        let call = self.understand(who, &route, head.headers.get(header::CONTENT_TYPE), body).await?;
        describe(&call, &route, environment, &mut charge.record, told)?;
        self.reserve(who, environment, &route, &call, charge, told).await?;

        let names = &self.state.names[who.environment];
        let endpoint = route.endpoint;
        let credential = names.credential.as_ref();
        // Google's clients may have their key in the query.
        let has_own_key = credential.is_some() && endpoint.dialect() == Dialect::Google;
        let query = head.uri.query().map(Cow::Borrowed);
        let query = if who.key_in_query || has_own_key {
            query.and_then(|query| query::without_keys(&query)).map(Cow::Owned)
        } else {
            query
        };
        let base = environment.upstream.base_url.path();
        let target = route::upstream_path(base, route.path, query.as_deref());
        let headers = headers::for_upstream(head.headers, &environment.upstream, credential, who.keys);
        let body = call.forwarded(told.clamped_to).await?;
        Ok(Some(Forward {
            request: upstream::Request { method: head.method, target, headers, body },
            upstream: names.upstream,
            environment: environment.clone(),
            endpoint,
            call,
            received,
        }))
    }

    /// Sends an admitted request on and passes the answer back.
    async fn exchange(
        &self,
        mut forward: Forward,
        mut charge: Charge,
        told: Told,
        peer: &Peer,
    ) -> Response<AnswerBody> {
        charge.record.overhead = Some(forward.received.elapsed());
        let started = Stopwatch::start();
        let (parts, incoming) = match self.send(&mut forward, started, &told, &mut charge).await {
            Ok(answer) => answer,
            Err(error) => return self.refuse(error, charge, told),
        };
        let Forward { upstream, environment, endpoint, call, .. } = forward;
        charge.record.first_byte = Some(started.elapsed());
        peer.cut_off(started, environment.upstream.timeouts.total);
        let terms = Terms {
            estimated_prompt: call.prompt_tokens,
            completions: call.completions.max(1),
            tokenizer: call.tokenizer,
            status: parts.status,
            endpoint,
            started,
            environment,
        };
        let withholds = call.asks_for_usage();
        let lesson = terms.environment.calibrate.then(|| call.lesson(upstream, &self.state.calibrations));
        let lesson = lesson.flatten();
        let (response, kept) =
            self.respond(Answer { parts, incoming, withholds, terms, lesson, told }, charge);
        if let Some(kept) = kept {
            kept.await;
        }
        response
    }

    /// Sends a request and waits for the head of its answer; once more, if the upstream refuses what the
    /// gateway added to it.
    async fn send(
        &self,
        forward: &mut Forward,
        started: Stopwatch,
        told: &Told,
        charge: &mut Charge,
    ) -> Result<(response::Parts, upstream::Incoming), ProxyError> {
        let prompt = Amounts::of_request(forward.call.prompt_tokens, 0);
        // Once the upstream may have read of it the request is paid for, whatever becomes of the caller.
        let mut reached = |is_so| charge.observe(if is_so { prompt } else { Amounts::default() });
        let upstream = &self.upstreams[forward.upstream];
        let failed = |error| no_answer(error, &forward.environment);
        let answer = upstream.send(&forward.request, started, &mut reached).await.map_err(failed)?;
        if !forward.call.asks_for_usage() || !refusal::is_possible(answer.0.status) {
            return Ok(answer);
        }
        let (parts, incoming) = answer;
        let (is_refusal, incoming) = Box::pin(refusal::names_stream_options(incoming)).await;
        if !is_refusal {
            return Ok((parts, incoming));
        }
        drop(incoming);
        forward.call.ask_no_longer();
        forward.request.body = forward.call.forwarded(told.clamped_to).await?;
        let answer = upstream.send(&forward.request, started, &mut reached).await.map_err(failed)?;
        // Else it was not what the gateway had added.
        if answer.0.status.is_success() {
            self.state.ask_no_longer(forward.upstream);
        }
        Ok(answer)
    }

    fn route<'a>(&self, head: &'a http::request::Parts) -> Result<Route<'a>, ProxyError> {
        let path = head.uri.path();
        match route::find(&self.state.config, &head.method, path) {
            Ok(route) => Ok(route),
            Err(NoRoute::Method(allow)) => Err(ProxyError::MethodNotAllowed { allow }),
            Err(NoRoute::Unknown) => Err(self.unknown_path(head)),
        }
    }

    fn unknown_path(&self, head: &http::request::Parts) -> ProxyError {
        let dialect = route::dialect(head.uri.path());
        let base_path = route::base_path(&self.state.config, head.uri.path(), dialect);
        let path = head.uri.path().chars().take(200).collect();
        ProxyError::UnknownPath { path, base_path, dialect }
    }

    /// The environment is named by the path, else by the key, else by `default_environment`; who has
    /// keys takes only its own. A key that belongs to another one is refused wherever it stands, since
    /// the upstream would get to see it.
    fn identify(&self, route: &Route<'_>, head: &http::request::Parts) -> Result<Caller, ProxyError> {
        let Some(sent) = headers::sent_keys(&head.headers) else {
            return Err(ProxyError::BadHead("it has too many API keys"));
        };
        let unknown = || ProxyError::InvalidKey { given: sent.iter().any(|key| key.is_regular) };
        let known: SmallVec<[_; 2]> =
            self.callers_of(&sent).filter_map(|(key, of)| of.map(|of| (key, of))).collect();
        let first = known.iter().find(|(key, _)| key.is_regular).map(|&(_, of)| of);
        let default = self.state.config.default_environment;
        let named = route.environment.or(first.map(|(environment, _)| environment)).or(default);
        let environment = named.ok_or_else(unknown)?;
        if known.iter().any(|(_, (of_key, _))| *of_key != environment) {
            return Err(ProxyError::WrongEnvironment);
        }
        let caller = first.map(|(_, caller)| caller);
        if caller.is_none() && !self.state.config.environments[environment].callers.is_empty() {
            return Err(unknown());
        }
        let mut keys = OurKeys::default();
        known.iter().for_each(|(key, _)| keys.add(key.header));
        let key_in_query = self.has_key_in_query(head.uri.query(), environment)?;
        Ok(Caller { environment, index: caller, keys, key_in_query })
    }

    /// Whether a key of this gateway's stands in the query. It opens nothing there, and goes no further.
    fn has_key_in_query(&self, query: Option<&str>, environment: usize) -> Result<bool, ProxyError> {
        let mut is_there = false;
        for key in query::keys(query.unwrap_or_default()).take(MOST_KEYS_IN_QUERY) {
            match self.caller_of(key.as_bytes()) {
                Some((of_key, _)) if of_key != environment => return Err(ProxyError::WrongEnvironment),
                owner => is_there |= owner.is_some(),
            }
        }
        Ok(is_there)
    }

    /// Environment and caller of each key, if it is one of this gateway's. What stands in several
    /// headers is looked up once.
    fn callers_of<'k>(
        &self,
        sent: &'k [SentKey<'k>],
    ) -> impl Iterator<Item = (&'k SentKey<'k>, Option<Owner>)> {
        let mut last: Option<(&[u8], Option<Owner>)> = None;
        sent.iter().map(move |sent| {
            let found = last.filter(|(key, _)| *key == sent.key).map(|(_, found)| found);
            let found = found.unwrap_or_else(|| self.caller_of(sent.key));
            last = Some((sent.key, found));
            (sent, found)
        })
    }

    /// Environment and caller of a key: found by its digest, compared in constant time.
    fn caller_of(&self, key: &[u8]) -> Option<Owner> {
        if self.state.callers.is_empty() || key.len() > LONGEST_KEY {
            return None;
        }
        let digest: [u8; 32] = Sha256::digest(key).into();
        let &(environment, caller) = self.state.callers.get(&digest)?;
        let stored = &self.state.config.environments[environment].callers[caller].sha256;
        bool::from(stored.ct_eq(&digest)).then_some((environment, caller))
    }

    fn name(&self, who: Caller, record: &mut Record, told: &mut Told) {
        let names = &self.state.names[who.environment];
        record.environment = names.environment.clone();
        record.series = Some(names.series.clone());
        record.caller = who.index.map(|index| names.callers[index].clone());
        told.environment = Some(names.header.clone());
    }

    /// Reads the body and estimates its prompt, as far as it is known by now how that is to be corrected.
    async fn understand(
        &self,
        who: Caller,
        route: &Route<'_>,
        content_type: Option<&HeaderValue>,
        body: Bytes,
    ) -> Result<Call, ProxyError> {
        let environment = &self.state.config.environments[who.environment];
        let api = match route.endpoint {
            Endpoint::Counted(api) => api,
            Endpoint::Uncounted(_) => {
                let mut call = Call::uncounted(body, content_type, environment.tells_models_apart()).await?;
                if let Some(model) = route.model {
                    model.clone_into(&mut call.model);
                }
                return Ok(call);
            }
            Endpoint::Models | Endpoint::Root | Endpoint::Other => return Ok(Call::unread(body)),
        };
        let upstream = self.state.names[who.environment].upstream;
        let reading = Reading {
            api,
            model: route.model.map(str::to_owned),
            streams: route.streams,
            models: self.state.models.clone(),
            ask_for_usage: self.state.asks_for_usage(upstream),
        };
        let mut call = Call::read(body, reading).await?;
        if environment.calibrate {
            call.correct(self.state.calibrations.correction(upstream, &call.model, call.estimate.kind));
        }
        call.add_unseen(environment.unseen_prompt_tokens);
        Ok(call)
    }

    /// Holds room for the request in every quota that it touches, and waits for what has to be waited for.
    async fn reserve(
        &self,
        who: Caller,
        environment: &Environment,
        route: &Route<'_>,
        call: &Call,
        charge: &mut Charge,
        told: &mut Told,
    ) -> Result<(), ProxyError> {
        if matches!(route.endpoint, Endpoint::Models | Endpoint::Root) {
            return Ok(());
        }
        let account = &self.state.accounts[who.environment];
        let demand = Demand {
            subject: Subject { caller: who.index, model: &call.model },
            prompt: call.prompt_tokens,
            generates: route.endpoint.generates(),
            cap: call.completion_cap,
            completions: call.completions.max(1),
        };
        let longest = environment.reserve.max_wait;
        let reserved = if !longest.is_zero() {
            Box::pin(account.reserve_in_line(&demand, longest)).await
        } else if account.is_shared() {
            Box::pin(account.reserve_shared(&demand)).await
        } else {
            account.reserve(&demand)
        };
        let mut reservation = match reserved {
            Ok(reservation) => reservation,
            Err(no_room) => {
                told.standing = account.standing(demand.subject);
                return Err(self.denied(no_room, environment));
            }
        };
        if let Some(no_room) = reservation.would_deny() {
            self.would_deny(no_room, environment, &charge.record);
        }
        told.standing = *reservation.standing();
        told.clamped_to = reservation.clamped_to();
        reservation.kept().await;
        charge.reservation = Some(reservation);
        Ok(())
    }

    fn denied(&self, no_room: NoRoom, environment: &Environment) -> ProxyError {
        let (code, worst) = (no_room_code(&no_room), no_room.worst());
        self.state.metrics.rejected(&environment.name, code, worst, false);
        let name = environment.name.clone();
        match no_room {
            NoRoom::Quota(denied) => {
                ProxyError::Quota { denied, environment: name, patience: environment.retry_patience }
            }
            NoRoom::InFlight { limit } => ProxyError::TooManyInFlight { limit, environment: name },
            NoRoom::Unavailable => ProxyError::CountersAway { environment: name },
        }
    }

    /// The quotas only watch: what they would have done is logged and counted apart.
    fn would_deny(&self, no_room: &NoRoom, environment: &Environment, record: &Record) {
        let (code, worst) = (no_room_code(no_room), no_room.worst());
        self.state.metrics.rejected(&environment.name, code, worst, true);
        tracing::info!(
            environment = environment.name,
            caller = record.caller.as_deref(),
            code,
            kind = worst.map(|s| s.quota.kind.as_str()),
            per = worst.map(|s| s.quota.per.text.as_str()),
            requested = worst.map(|s| s.requested),
            remaining = worst.map(|s| s.remaining),
            "a request would have been refused if the quotas were enforced (enforce: false)"
        );
    }

    /// Passes an answer on: its status, its headers but for those of one hop, and its body as it comes.
    /// Nobody asks for the bytes of an answer without a body: it is settled here, and what that has to
    /// wait for comes with it.
    fn respond(&self, answer: Answer, mut charge: Charge) -> (Response<AnswerBody>, Option<Kept>) {
        let Answer { mut parts, incoming, withholds, terms, lesson, told } = answer;
        headers::for_caller(&mut parts.headers);
        let record = &mut charge.record;
        record.status = parts.status.as_u16();
        if let Some(id) = parts.headers.get(REQUEST_ID) {
            let id = id.to_str().unwrap_or_default();
            id[..id.floor_char_boundary(LONGEST_SHOWN)].clone_into(&mut record.request_id);
        } else {
            record.request_id = self.state.request_ids.next();
            if let Ok(id) = HeaderValue::from_str(&record.request_id) {
                parts.headers.insert(REQUEST_ID, id);
            }
        }
        let mut metered = Metered::new(incoming, &parts.headers, withholds, charge, terms, lesson);
        let kept = if metered.is_empty() { metered.settle_empty() } else { None };
        if metered.is_stream() {
            parts.headers.remove(header::CONTENT_LENGTH);
        }
        told.write(&mut parts.headers);
        (Response::from_parts(parts, AnswerBody::metered(metered)), kept)
    }

    /// The gateway's own answer.
    fn refuse(&self, error: ProxyError, mut charge: Charge, told: Told) -> Response<AnswerBody> {
        let record = &mut charge.record;
        record.error = error.code();
        record.outcome = match &error {
            ProxyError::Quota { .. } | ProxyError::TooManyInFlight { .. } | ProxyError::Flood { .. } => {
                Outcome::Rejected
            }
            ProxyError::UpstreamUnreachable { .. } | ProxyError::UpstreamTimeout { .. } => {
                Outcome::UpstreamFailed
            }
            _ => Outcome::Refused,
        };
        if record.request_id.is_empty() {
            record.request_id = self.state.request_ids.next();
        }
        let mut response = error.into_response(told.dialect);
        record.status = response.status().as_u16();
        told.write(response.headers_mut());
        if let Ok(id) = HeaderValue::from_str(&record.request_id) {
            response.headers_mut().insert(REQUEST_ID, id);
        }
        // Settled before the caller reads of it.
        drop(charge);
        response.map(|body| AnswerBody::whole(Some(body.into())))
    }
}

/// More keys than this in a query are not looked at: none of them goes further.
const MOST_KEYS_IN_QUERY: usize = 8;
/// Names that others chose are shown up to so many bytes.
const LONGEST_SHOWN: usize = 128;
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// An admitted request on its way to the upstream.
struct Forward {
    request: upstream::Request,
    /// Its index in the config.
    upstream: usize,
    environment: Arc<Environment>,
    endpoint: Endpoint,
    call: Call,
    /// Since its body was read.
    received: Stopwatch,
}

/// An upstream's answer on its way to the caller.
struct Answer {
    parts: http::response::Parts,
    incoming: upstream::Incoming,
    withholds: bool,
    terms: Terms,
    lesson: Option<Lesson>,
    told: Told,
}

/// Notes what the call is, and refuses a model that the environment may not use.
fn describe(
    call: &Call,
    route: &Route<'_>,
    environment: &Environment,
    record: &mut Record,
    told: &mut Told,
) -> Result<(), ProxyError> {
    record.model_label = record.series.as_ref().map(|series| series.label(&call.model));
    call.model[..call.model.floor_char_boundary(LONGEST_SHOWN)].clone_into(&mut record.model);
    record.streams = call.streams;
    record.estimated_prompt = call.prompt_tokens;
    record.raw_estimate = call.estimate.tokens();
    if !matches!(route.endpoint, Endpoint::Counted(_) | Endpoint::Uncounted(_)) {
        return Ok(());
    }
    let listed = environment.models.iter().any(|glob| glob.matches(&call.model));
    if !environment.models.is_empty() && !listed {
        return Err(ProxyError::ModelNotFound {
            model: record.model.clone(),
            environment: environment.name.clone(),
        });
    }
    if !matches!(route.endpoint, Endpoint::Counted(_)) {
        return Ok(());
    }
    told.estimated_prompt = Some((call.prompt_tokens, call.estimate.tokens()));
    if let Some(tokenizer) = call.tokenizer {
        record.metrics().estimated(tokenizer, &call.estimate);
    }
    Ok(())
}

fn no_room_code(no_room: &NoRoom) -> &'static str {
    match no_room {
        NoRoom::Quota(denied) => crate::error::quota_shape(denied).2,
        NoRoom::InFlight { .. } => "too_many_in_flight",
        NoRoom::Unavailable => "quota_store_unavailable",
    }
}

/// What the caller of a request that got no answer is told.
fn no_answer(error: SendError, environment: &Environment) -> ProxyError {
    let upstream = environment.upstream.name.clone();
    match error {
        SendError::Unreachable(what, source) => {
            tracing::warn!(error = %source, upstream, what, "an upstream could not be reached");
            ProxyError::UpstreamUnreachable { upstream, what }
        }
        SendError::ConnectTimeout => {
            let what = "no connection came about in time (timeouts.connect)";
            ProxyError::UpstreamUnreachable { upstream, what }
        }
        SendError::Timeout(setting, after) => {
            ProxyError::UpstreamTimeout { upstream, timeout: (setting, after) }
        }
        SendError::Broken(source) => {
            tracing::warn!(error = %source, upstream, "an upstream broke off before it answered");
            ProxyError::UpstreamUnreachable { upstream, what: "it broke off before it answered" }
        }
    }
}

fn empty_answer(mut charge: Charge) -> Response<AnswerBody> {
    charge.record.status = StatusCode::OK.as_u16();
    charge.record.outcome = Outcome::Answered;
    Response::new(AnswerBody::whole(None))
}
