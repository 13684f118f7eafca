//! The caller's request: reads its body up to a size limit and parses the fields that the gateway needs.

use super::Proxy;
use super::body_budget::BufferedBytes;
use super::caller::{self, IdentifiedCaller};
use super::charge::logged_name;
use super::destination::{self, DestinationIndex};
use super::form;
use super::headers::UnreadBody;
use super::model_lists;
use super::query;
use super::reader::BodyCoding;
use super::route::{Endpoint, Route};
use super::snapshot::Snapshot;
use super::state::State;
use crate::api::Api;
use crate::body::{Body, BodyFault, BodyText, Bounds, Edit, NamedModel, edited, named_model};
use crate::clock::Stopwatch;
use crate::config::{Environment, ServerSettings};
use crate::error::ProxyError;
use crate::estimate::{Model, Prompt, PromptEstimate, Tokenizer};
use crate::learned::{CorrectedPrompt, EstimateScope, EstimateUpdate, Learned, Recall};
use crate::quota::MAX_AMOUNT;
use crate::similar::most_similar;
use crate::telemetry::{Metrics, Record};
use bytes::Bytes;
use http::header::{self, HeaderMap, HeaderValue};
use http::request::Parts;
use hyper::body::{Body as _, Incoming};
use std::future::poll_fn;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::spawn_blocking;
use tokio::time::timeout_at;

/// Bodies up to this size are parsed on the event loop (about 50 microseconds), and counted there if that is quick.
/// Larger ones are parsed on the blocking pool, which adds 10 to 20 microseconds.
const MAX_INLINE_BODY: usize = 40 * 1024;
/// Larger bodies are edited on the blocking pool, because an edit copies the body.
const MAX_INLINE_EDIT: usize = 64 * 1024;
/// After a refusal that leaves more than this of the body unread, the connection is closed.
const MAX_SMALL_UNREAD: u64 = 64 * 1024;
/// The first size of the buffer for a body that arrives in several pieces, unless its declared length is smaller.
const MAX_INITIAL_BUFFER: usize = 256 * 1024;

/// A parsed request, and the bytes that are forwarded. It is large and passes through several functions, which return it in
/// a box.
#[derive(Debug, Default)]
pub(super) struct Call {
    /// The body as received.
    body: Bytes,
    /// Makes a stream report its usage. `None`: the caller requested usage itself, or the API needs no request.
    usage_request: Option<Edit>,
    /// Whether the upstream receives `usage_request`.
    requests_usage: bool,
    /// Replaces the model in the body. `None`: the caller's name is sent, or the path has the model.
    model_edit: Option<Box<Edit>>,
    bounds: Bounds,
    /// The model that the caller requests.
    pub(super) model: String,
    /// The model name that is sent instead. `None`: the caller's.
    pub(super) sent_model: Option<Arc<str>>,
    pub(super) destination: DestinationIndex,
    pub(super) streams: bool,
    /// The caller's own limit of completion tokens, over all completions.
    pub(super) completion_cap: Option<u64>,
    pub(super) completions: u64,
    pub(super) estimate: PromptEstimate,
    /// Tokens to reserve for the prompt: the corrected estimate, and an amount for content that the request only
    /// refers to.
    pub(super) prompt_tokens: u64,
    pub(super) corrected: CorrectedPrompt,
    /// The facts about the prompt from earlier answers. `None`: the environment neither corrects estimates nor learns.
    recall: Option<Recall>,
    pub(super) tokenizer: Option<Tokenizer>,
}

/// How to parse a body.
struct ParseOptions {
    api: Api,
    /// The model that the path names. It takes precedence over the body's.
    path_model: Option<String>,
    /// The path requests a stream.
    path_streams: bool,
    snapshot: Arc<Snapshot>,
    /// Index of the environment.
    environment: usize,
    /// Corrects the estimate. `None`: it is not corrected.
    learned: Option<Arc<Learned>>,
    principal: u64,
}

impl ParseOptions {
    /// How to parse a body of this API, whose path names no model.
    fn new(state: &State, snapshot: &Arc<Snapshot>, api: Api, environment: usize, principal: u64) -> Self {
        let corrects = snapshot.config.environments[environment].calibrate;
        Self {
            api,
            path_model: None,
            path_streams: false,
            snapshot: snapshot.clone(),
            environment,
            learned: corrects.then(|| state.learned.clone()),
            principal,
        }
    }
}

impl Call {
    /// A request whose prompt is counted, on the blocking pool unless that is quick.
    async fn counted(body: Bytes, options: ParseOptions) -> Result<Box<Self>, ProxyError> {
        let unseen_tokens = options.snapshot.config.environments[options.environment].unseen_prompt_tokens;
        let quick = if body.len() <= MAX_INLINE_BODY {
            Self::parse_with(&body, &options, estimate_if_quick)?
        } else {
            None
        };
        let parse = move || Self::parse_with(&body, &options, |prompt, model| Some(prompt.estimate(model)));
        let mut call = if let Some(call) = quick {
            call
        } else {
            let parsed = spawn_blocking(parse).await.map_err(|_| ProxyError::Internal)?;
            parsed?.ok_or(ProxyError::Internal)?
        };
        call.add_unseen(unseen_tokens);
        Ok(call)
    }

    /// A request whose body is forwarded without being parsed.
    pub(super) fn opaque(body: Bytes) -> Self {
        Self { body, ..Self::default() }
    }

    /// A request whose prompt is not counted. Only the model is read from its JSON, and from a form only if the
    /// environment depends on it.
    async fn uncounted(
        body: Bytes,
        content_type: Option<&HeaderValue>,
        route: &Route<'_>,
        snapshot: &Snapshot,
        environment: usize,
    ) -> Result<Box<Self>, ProxyError> {
        let model_matters = snapshot.config.environments[environment].depends_on_model();
        let (mut named, mut at) = (NamedModel::default(), None);
        match form::boundary(content_type) {
            Some(boundary) if model_matters => {
                (named.name, at) = form::model(body.clone(), boundary).await?;
            }
            Some(_) => {}
            None if body.len() <= MAX_INLINE_BODY => {
                named = named_model(&body).map_err(ProxyError::InvalidBody)?;
            }
            None => {
                let body = body.clone();
                let read = spawn_blocking(move || named_model(&body));
                named = read.await.map_err(|_| ProxyError::Internal)?.map_err(ProxyError::InvalidBody)?;
            }
        }
        let is_form = form::boundary(content_type).is_some();
        let mut call = Box::new(Self { body, model: named.name.clone(), ..Self::default() });
        if let Some(model) = route.model {
            model.clone_into(&mut call.model);
        }
        call.go_to(snapshot, environment, |environment, model| {
            destination::find(environment, route.endpoint.api(), model)
        });
        if let Some(sent) = call.sent_model.as_deref().filter(|_| route.model.is_none()) {
            let edit = match at {
                Some(at) => Some(Edit::plain_text(at, sent)),
                None if is_form && !call.model.is_empty() => {
                    let how = "writes its field 'model' in a way in which the gateway cannot replace it";
                    return Err(ProxyError::InvalidBody(BodyFault::Invalid(how.to_owned())));
                }
                None => named.replace(sent),
            };
            call.model_edit = edit.map(Box::new);
        }
        Ok(call)
    }

    /// Sets where the request goes, by its model.
    fn go_to(
        &mut self,
        snapshot: &Snapshot,
        environment: usize,
        find: impl FnOnce(&Environment, &str) -> DestinationIndex,
    ) {
        self.destination = find(&snapshot.config.environments[environment], &self.model);
        let destination = snapshot.contexts[environment].destinations.get(self.destination);
        self.sent_model.clone_from(&destination.model);
    }

    /// The model name that the upstream receives.
    pub(super) fn name_sent(&self) -> &str {
        self.sent_model.as_deref().unwrap_or(&self.model)
    }

    /// Whether the gateway requests usage where the caller did not. It then withholds the usage chunk.
    pub(super) fn adds_usage_request(&self) -> bool {
        self.requests_usage && self.usage_request.is_some()
    }

    /// Sets whether the gateway requests usage from the upstream where the caller did not.
    pub(super) fn request_usage(&mut self, requests_usage: bool) {
        self.requests_usage = requests_usage;
    }

    /// Adds this many tokens for each item that the request refers to but does not contain.
    fn add_unseen(&mut self, tokens_per_item: u64) {
        let unseen = tokens_per_item.saturating_mul(self.corrected.unseen);
        self.prompt_tokens = self.prompt_tokens.saturating_add(unseen).min(MAX_AMOUNT);
    }

    /// Writes the model, the stream flag and the estimate to a log record.
    pub(super) fn describe(&self, record: &mut Record) {
        record.model_label = record.series.as_ref().map(|series| series.label(&self.model));
        logged_name(&self.model).clone_into(&mut record.model);
        record.is_parsed = true;
        record.is_stream = self.streams;
        record.estimated_prompt = self.prompt_tokens;
        record.raw_estimate = self.estimate.tokens();
        record.estimate_source = self.corrected.source;
    }

    /// Records the estimate in metrics.
    pub(super) fn record_estimate(&self, metrics: &Metrics) {
        if let Some(tokenizer) = self.tokenizer {
            metrics.estimated(tokenizer, &self.estimate);
        }
    }

    /// Refuses a model that is not on the environment's allow-list.
    pub(super) fn check_model(
        &self,
        endpoint: Endpoint,
        environment: &Environment,
    ) -> Result<(), ProxyError> {
        let has_model = match endpoint {
            Endpoint::Counted(_) | Endpoint::Uncounted(_) | Endpoint::CountTokens(_) => true,
            // The list of models names none.
            Endpoint::Models => !self.model.is_empty(),
            Endpoint::Root | Endpoint::Other => false,
        };
        let is_allowed =
            environment.models.is_empty() || environment.models.iter().any(|glob| glob.matches(&self.model));
        if !has_model || is_allowed {
            return Ok(());
        }
        let (model, allowed) = (logged_name(&self.model).to_owned(), &environment.models);
        let allowed: Vec<&str> = allowed.iter().map(|glob| glob.as_str().trim_end_matches('*')).collect();
        let nearest = most_similar(&model, &allowed).map(str::to_owned);
        Err(ProxyError::ModelNotFound { model, environment: environment.name.clone(), nearest })
    }

    /// Learns from the answer's usage. `calibrations`: the corrections for the upstream that answered. `None`: the
    /// environment does not learn, or the estimate was one for another upstream.
    pub(super) fn estimate_update(
        self: Box<Self>,
        learned: &Arc<Learned>,
        calibrations: usize,
    ) -> Option<EstimateUpdate> {
        let Self { estimate, model, sent_model, completions, recall, .. } = *self;
        let model = sent_model.map_or(model, |sent| String::from(&*sent));
        let recall = recall.filter(|recall| recall.is_for(calibrations))?;
        Some(learned.update(recall, model, estimate, completions))
    }

    /// The body to forward: as received, except for the usage request, for the model that a route replaces, and for
    /// token limits that are lowered to `clamped_to` per completion.
    pub(super) async fn forwarded_body(&self, clamped_to: Option<u64>) -> Result<Bytes, ProxyError> {
        let clamp = |tokens| self.bounds.lower_to(tokens, self.name_sent(), &self.body);
        let mut edits = clamped_to.map_or_else(Vec::new, clamp);
        edits.extend(self.usage_request.clone().filter(|_| self.requests_usage));
        edits.extend(self.model_edit.as_deref().cloned());
        if edits.is_empty() {
            return Ok(self.body.clone());
        }
        if self.body.len() <= MAX_INLINE_EDIT {
            return Ok(edited(&self.body, edits));
        }
        let body = self.body.clone();
        spawn_blocking(move || edited(&body, edits)).await.map_err(|_| ProxyError::Internal)
    }

    /// `None`: `estimate` returned `None`.
    fn parse_with(
        bytes: &Bytes,
        options: &ParseOptions,
        estimate: impl FnOnce(&Prompt<'_>, &Model) -> Option<PromptEstimate>,
    ) -> Result<Option<Box<Self>>, ProxyError> {
        let text = BodyText::of(bytes).map_err(ProxyError::InvalidBody)?;
        let mut body = Body::read(options.api, &text).map_err(ProxyError::InvalidBody)?;
        let named = body.model.as_deref().unwrap_or_default();
        let model = options.path_model.as_deref().unwrap_or(named).to_owned();
        let (snapshot, api) = (&*options.snapshot, options.api);
        let environment = &snapshot.config.environments[options.environment];
        let index = destination::find(environment, api.as_str(), &model);
        let destination = snapshot.contexts[options.environment].destinations.get(index);
        let upstream = &snapshot.upstreams[destination.first()];
        // The model that reads the prompt is the one that is sent.
        let sent = destination.model.as_deref().unwrap_or(&model);
        let known = snapshot.models.named(sent).at(upstream.provider);
        let scope = EstimateScope { upstream: upstream.calibrations, principal: options.principal };
        let learned = options.learned.as_deref();
        let recall = learned.map(|learned| learned.recall(scope, api, sent, &mut body.prompt));
        let Some(estimate) = estimate(&body.prompt, &known) else { return Ok(None) };
        let corrected = match (learned, &recall) {
            (Some(learned), Some(recall)) => learned.correct(recall, sent, &estimate),
            _ => CorrectedPrompt::uncorrected(&estimate),
        };
        let may_request_usage = body.streams && api.reports_stream_usage_on_request() && !body.wants_usage();
        let replaced = destination.model.as_deref().filter(|_| options.path_model.is_none());
        Ok(Some(Box::new(Self {
            body: bytes.clone(),
            usage_request: may_request_usage.then(|| body.request_usage()),
            requests_usage: upstream.requests_stream_usage(),
            model_edit: replaced.and_then(|name| body.replace_model(name)).map(Box::new),
            sent_model: destination.model.clone(),
            destination: index,
            bounds: body.bounds(),
            streams: body.streams || options.path_streams,
            completion_cap: body.completion_cap(),
            completions: body.completions(),
            prompt_tokens: corrected.tokens,
            estimate,
            corrected,
            recall,
            tokenizer: Some(known.tokenizer),
            model,
        })))
    }
}

/// Parses the body, and estimates and corrects the prompt tokens if the endpoint is counted.
pub(super) async fn parse(
    Proxy { state, snapshot, .. }: &Proxy,
    caller: IdentifiedCaller,
    route: &Route<'_>,
    head: &Parts,
    address: IpAddr,
    body: Bytes,
) -> Result<Box<Call>, ProxyError> {
    let api = match route.endpoint {
        Endpoint::Counted(api) => api,
        Endpoint::Uncounted(_) | Endpoint::CountTokens(_) => {
            let content_type = form::content_type(&head.headers)?;
            return Call::uncounted(body, content_type, route, snapshot, caller.environment).await;
        }
        Endpoint::Models | Endpoint::Root | Endpoint::Other => {
            let model = route.model.map(query::decoded).unwrap_or_default();
            let mut call = Box::new(Call { model, ..Call::opaque(body) });
            call.go_to(snapshot, caller.environment, |environment, model| match route.model {
                Some(_) => {
                    let dialect = model_lists::dialect(route.path, &head.headers);
                    destination::find_for_description(environment, dialect, model)
                }
                None => snapshot.contexts[caller.environment].destinations.rest(),
            });
            return Ok(call);
        }
    };
    let principal = caller::principal(&state.learned, snapshot, caller, head, address);
    let options = ParseOptions {
        path_model: route.model.map(str::to_owned),
        path_streams: route.streams,
        ..ParseOptions::new(state, snapshot, api, caller.environment, principal)
    };
    Call::counted(body, options).await
}

/// Parses a body that a caller might send, as `parse` would.
pub(super) async fn parse_example(
    state: &State,
    snapshot: &Arc<Snapshot>,
    (environment, caller): (usize, Option<usize>),
    api: Api,
    body: Bytes,
) -> Result<Box<Call>, ProxyError> {
    let principal = caller::principal_of_caller(&state.learned, snapshot, environment, caller);
    Call::counted(body, ParseOptions::new(state, snapshot, api, environment, principal)).await
}

fn estimate_if_quick(prompt: &Prompt<'_>, model: &Model) -> Option<PromptEstimate> {
    prompt.estimate_if_quick(model)
}

/// Refuses protocol upgrades, because the gateway could not count what passes through them. Some clients offer
/// `h2c` with every request; that offer is ignored and not forwarded.
pub(super) fn check_upgrade(headers: &HeaderMap) -> Result<(), ProxyError> {
    let is_offer = |v: &http::HeaderValue| v.as_bytes().trim_ascii().eq_ignore_ascii_case(b"h2c");
    if headers.get_all(header::UPGRADE).iter().all(is_offer) {
        return Ok(());
    }
    Err(ProxyError::InvalidHead("it requests a protocol upgrade, and the gateway supports none"))
}

/// Refuses an encoded body, which the gateway could not parse without decoding it.
pub(super) fn check_encoding(headers: &HeaderMap) -> Result<(), ProxyError> {
    match BodyCoding::of(headers) {
        BodyCoding::Plain => Ok(()),
        BodyCoding::Known(_) | BodyCoding::Unknown => Err(ProxyError::UnsupportedContentEncoding),
    }
}

/// How much of a body is still unread.
pub(super) fn unread(headers: &HeaderMap, body: &Incoming) -> UnreadBody {
    match body.size_hint().exact() {
        _ if body.is_end_stream() => UnreadBody::None,
        // The caller may wait for `100 Continue` and send no body.
        _ if headers.contains_key(header::EXPECT) => UnreadBody::Large,
        Some(length) if length <= MAX_SMALL_UNREAD => UnreadBody::Small,
        _ => UnreadBody::Large,
    }
}

/// Reads a whole body within the bounds of the config. Fails if no bytes arrive for `idle`. `buffered` counts the bytes.
pub(super) async fn read_body(
    mut body: Incoming,
    bounds: &ServerSettings,
    idle: Duration,
    buffered: &mut BufferedBytes,
) -> Result<Bytes, ProxyError> {
    let limit = bounds.max_request_body;
    let too_large = || ProxyError::BodyTooLarge { limit };
    let declared = body.size_hint().exact();
    if declared.is_some_and(|length| length > limit as u64) {
        return Err(too_large());
    }
    let began = Stopwatch::start();
    let end = began.deadline(bounds.body_timeout);
    let mut idle_end = began.deadline(idle);
    let (mut first, mut whole) = (Bytes::new(), Vec::new());
    loop {
        let frame = match timeout_at(idle_end.min(end), poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)))
            .await
        {
            Err(_) if end <= idle_end => {
                return Err(ProxyError::BodyIncomplete("it did not arrive within server.body_timeout"));
            }
            Err(_) => return Err(ProxyError::BodyIncomplete("no more of it arrived in time")),
            Ok(None) => break,
            Ok(Some(Err(_))) => {
                return Err(ProxyError::BodyIncomplete("the connection broke, or the framing is invalid"));
            }
            Ok(Some(Ok(frame))) => frame,
        };
        let Ok(data) = frame.into_data() else { continue };
        if first.len() + whole.len() + data.len() > limit {
            return Err(too_large());
        }
        buffered.add(data.len()).await.map_err(|_| ProxyError::Overloaded)?;
        // Most bodies arrive in one piece, which is used without a copy.
        if first.is_empty() && whole.is_empty() {
            first = data;
        } else {
            let received = first.len() + whole.len() + data.len();
            reserve(&mut whole, received, declared);
            whole.extend_from_slice(&std::mem::take(&mut first));
            whole.extend_from_slice(&data);
        }
        // Most bodies end here, without another poll and another look at the clock.
        if body.is_end_stream() {
            break;
        }
        idle_end = Stopwatch::start().deadline(idle);
    }
    Ok(if whole.is_empty() { first } else { whole.into() })
}

/// Makes room for the bytes of a body so far. The buffer at most doubles, and never grows beyond the declared length, so
/// that it occupies at most twice the bytes received.
fn reserve(whole: &mut Vec<u8>, received: usize, declared: Option<u64>) {
    if received <= whole.capacity() {
        return;
    }
    let declared = declared.and_then(|length| usize::try_from(length).ok()).unwrap_or(usize::MAX);
    let wanted = (2 * whole.capacity()).max(MAX_INITIAL_BUFFER).min(declared).max(received);
    whole.reserve_exact(wanted - whole.len());
}
