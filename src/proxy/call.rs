//! The caller's request: reads its body up to a size limit and parses the fields that the gateway needs.

use super::Proxy;
use super::body_budget::BufferedBytes;
use super::caller::{self, IdentifiedCaller};
use super::charge::logged_name;
use super::form;
use super::headers::UnreadBody;
use super::query;
use super::route::{Endpoint, Route};
use super::snapshot::Snapshot;
use super::state::State;
use crate::api::Api;
use crate::body::{Body, BodyText, Bounds, Edit, edited, named_model};
use crate::clock::Stopwatch;
use crate::config::{Environment, ServerSettings};
use crate::error::ProxyError;
use crate::estimate::{Model, Models, Prompt, PromptEstimate, Provider, Tokenizer};
use crate::learned::{CorrectedPrompt, EstimateScope, EstimateUpdate, Learned, Recall};
use crate::quota::MAX_AMOUNT;
use crate::similar::most_similar;
use crate::telemetry::{Metrics, Record};
use bytes::Bytes;
use http::StatusCode;
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

/// Maximum number of headers of a request. hyper checks it for HTTP/1.1.
const MAX_HEADERS: usize = 100;

/// A parsed request, and the bytes that are forwarded.
#[derive(Debug, Default)]
pub(super) struct Call {
    /// The body as received.
    body: Bytes,
    /// Makes a stream report its usage. `None`: the caller requested usage itself, or usage is not requested.
    usage_request: Option<Edit>,
    bounds: Bounds,
    pub(super) model: String,
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
    models: Models,
    /// The service that will receive the request.
    provider: Provider,
    /// Whether to request usage in a stream where the caller did not.
    requests_stream_usage: bool,
    /// Corrects the estimate. `None`: it is not corrected.
    learned: Option<Arc<Learned>>,
    scope: EstimateScope,
}

impl Call {
    /// A request whose prompt is counted, on the blocking pool unless that is quick.
    async fn counted(body: Bytes, options: ParseOptions) -> Result<Self, ProxyError> {
        if body.len() <= MAX_INLINE_BODY
            && let Some(call) = Self::parse_with(&body, &options, estimate_if_quick)?
        {
            return Ok(call);
        }
        let parse = move || Self::parse_with(&body, &options, |prompt, model| Some(prompt.estimate(model)));
        spawn_blocking(parse).await.map_err(|_| ProxyError::Internal)??.ok_or(ProxyError::Internal)
    }

    /// A request whose body is forwarded without being parsed.
    pub(super) fn opaque(body: Bytes) -> Self {
        Self { body, ..Self::default() }
    }

    /// A request whose prompt is not counted. Only the model is read from its JSON, and from a form only if
    /// `model_matters`.
    async fn uncounted(
        body: Bytes,
        content_type: Option<&HeaderValue>,
        model_matters: bool,
    ) -> Result<Self, ProxyError> {
        let model = match form::boundary(content_type) {
            Some(boundary) if model_matters => form::model(body.clone(), boundary).await?,
            Some(_) => String::new(),
            None if body.len() <= MAX_INLINE_BODY => named_model(&body).map_err(ProxyError::InvalidBody)?,
            None => {
                let body = body.clone();
                let read = spawn_blocking(move || named_model(&body));
                read.await.map_err(|_| ProxyError::Internal)?.map_err(ProxyError::InvalidBody)?
            }
        };
        Ok(Self { body, model, ..Self::default() })
    }

    /// Whether the gateway requests usage where the caller did not. It then withholds the usage chunk.
    pub(super) fn adds_usage_request(&self) -> bool {
        self.usage_request.is_some()
    }

    /// Forwards the request without a usage request of the gateway.
    pub(super) fn drop_usage_request(&mut self) {
        self.usage_request = None;
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

    /// Learns from the answer's usage. `None`: the environment does not learn.
    pub(super) fn estimate_update(self, learned: &Arc<Learned>) -> Option<EstimateUpdate> {
        let Self { estimate, model, completions, recall, .. } = self;
        Some(learned.update(recall?, model, estimate, completions))
    }

    /// The body to forward: as received, except for the usage request and for token limits that are lowered to
    /// `clamped_to` per completion.
    pub(super) async fn forwarded_body(&self, clamped_to: Option<u64>) -> Result<Bytes, ProxyError> {
        let clamp =
            clamped_to.map_or_else(Vec::new, |tokens| self.bounds.lower_to(tokens, &self.model, &self.body));
        let edits: Vec<Edit> = clamp.into_iter().chain(self.usage_request.clone()).collect();
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
    ) -> Result<Option<Self>, ProxyError> {
        let text = BodyText::of(bytes).map_err(ProxyError::InvalidBody)?;
        let mut body = Body::read(options.api, &text).map_err(ProxyError::InvalidBody)?;
        let named = body.model.as_deref().unwrap_or_default();
        let model = options.path_model.as_deref().unwrap_or(named).to_owned();
        let known = options.models.named(&model).at(options.provider);
        let learned = options.learned.as_deref();
        let recall =
            learned.map(|learned| learned.recall(options.scope, options.api, &model, &mut body.prompt));
        let Some(estimate) = estimate(&body.prompt, &known) else { return Ok(None) };
        let corrected = match (learned, &recall) {
            (Some(learned), Some(recall)) => learned.correct(recall, &model, &estimate),
            _ => CorrectedPrompt::uncorrected(&estimate),
        };
        let adds_usage_request = options.requests_stream_usage
            && body.streams
            && options.api.reports_stream_usage_on_request()
            && !body.wants_usage();
        Ok(Some(Self {
            body: bytes.clone(),
            usage_request: adds_usage_request.then(|| body.request_usage()),
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
        }))
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
) -> Result<Call, ProxyError> {
    let environment = &snapshot.config.environments[caller.environment];
    let api = match route.endpoint {
        Endpoint::Counted(api) => api,
        Endpoint::Uncounted(_) | Endpoint::CountTokens(_) => {
            let content_type = head.headers.get(header::CONTENT_TYPE);
            let mut call = Call::uncounted(body, content_type, environment.depends_on_model()).await?;
            if let Some(model) = route.model {
                model.clone_into(&mut call.model);
            }
            return Ok(call);
        }
        Endpoint::Models | Endpoint::Root | Endpoint::Other => {
            let model = route.model.map(query::decoded).unwrap_or_default();
            return Ok(Call { model, ..Call::opaque(body) });
        }
    };
    let context = &snapshot.contexts[caller.environment];
    let options = ParseOptions {
        api,
        path_model: route.model.map(str::to_owned),
        path_streams: route.streams,
        models: snapshot.models.clone(),
        provider: context.provider,
        requests_stream_usage: snapshot.requests_stream_usage(context.upstream),
        learned: environment.calibrate.then(|| state.learned.clone()),
        scope: EstimateScope {
            upstream: context.calibrations,
            principal: caller::principal(&state.learned, snapshot, caller, head, address),
        },
    };
    let mut call = Call::counted(body, options).await?;
    call.add_unseen(environment.unseen_prompt_tokens);
    Ok(call)
}

/// Parses a body that a caller might send, as `parse` would.
pub(super) async fn parse_example(
    state: &State,
    snapshot: &Snapshot,
    (environment, caller): (usize, Option<usize>),
    api: Api,
    body: Bytes,
) -> Result<Call, ProxyError> {
    let settings = &snapshot.config.environments[environment];
    let context = &snapshot.contexts[environment];
    let options = ParseOptions {
        api,
        path_model: None,
        path_streams: false,
        models: snapshot.models.clone(),
        provider: context.provider,
        requests_stream_usage: snapshot.requests_stream_usage(context.upstream),
        learned: settings.calibrate.then(|| state.learned.clone()),
        scope: EstimateScope {
            upstream: context.calibrations,
            principal: caller::principal_of_caller(&state.learned, snapshot, environment, caller),
        },
    };
    let mut call = Call::counted(body, options).await?;
    call.add_unseen(settings.unseen_prompt_tokens);
    Ok(call)
}

fn estimate_if_quick(prompt: &Prompt<'_>, model: &Model) -> Option<PromptEstimate> {
    prompt.estimate_if_quick(model)
}

/// Refuses a head from which caller, gateway and upstream could read different hosts.
pub(super) fn check_head(
    headers: &HeaderMap,
    uri: &http::Uri,
    version: http::Version,
) -> Result<(), ProxyError> {
    if headers.len() > MAX_HEADERS {
        return Err(ProxyError::MalformedHttp(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE));
    }
    let mut hosts = headers.get_all(header::HOST).iter();
    let host = hosts.next();
    if hosts.next().is_some() {
        return Err(ProxyError::InvalidHead("it has more than one Host header"));
    }
    if host.is_none() && version == http::Version::HTTP_11 {
        return Err(ProxyError::InvalidHead("it has no Host header"));
    }
    if let (Some(authority), Some(host)) = (uri.authority(), host)
        && !authority.as_str().as_bytes().eq_ignore_ascii_case(host.as_bytes())
    {
        return Err(ProxyError::InvalidHead("the host in its target differs from its Host header"));
    }
    Ok(())
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
    let is_identity = |v: &http::HeaderValue| v.as_bytes().trim_ascii().eq_ignore_ascii_case(b"identity");
    if headers.get_all(header::CONTENT_ENCODING).iter().any(|v| !is_identity(v)) {
        return Err(ProxyError::UnsupportedContentEncoding);
    }
    Ok(())
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
/// that it occupies little more than what has arrived.
fn reserve(whole: &mut Vec<u8>, received: usize, declared: Option<u64>) {
    if received <= whole.capacity() {
        return;
    }
    let declared = declared.and_then(|length| usize::try_from(length).ok()).unwrap_or(usize::MAX);
    let wanted = (2 * whole.capacity()).max(MAX_INITIAL_BUFFER).min(declared).max(received);
    whole.reserve_exact(wanted - whole.len());
}
