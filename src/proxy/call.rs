//! The caller's request: its body within bounds, and the few fields of it that are needed.

use super::form;
use super::headers::Unread;
use crate::api::Api;
use crate::body::{Body, Bounds, Edit, edited, named_model};
use crate::calibrations::{Calibrations, Lesson};
use crate::error::ProxyError;
use crate::estimate::{Correction, Model, Models, Prompt, PromptEstimate, Tokenizer};
use crate::quota::MAX_AMOUNT;
use bytes::{Bytes, BytesMut};
use http::header::{self, HeaderMap, HeaderValue};
use http_body_util::BodyExt as _;
use hyper::body::{Body as _, Incoming};
use std::sync::Arc;
use std::time::Duration;
use tokio::task::spawn_blocking;
use tokio::time::timeout;

/// Bodies up to this size are parsed where they arrive (about 50 microseconds), and counted there too if
/// that is quick; all others on a thread for such work, which costs 10 to 20 more.
const INLINE_BODY: usize = 40 * 1024;
/// Changes to a larger body are made on a thread for such work, since they copy it.
const INLINE_EDIT: usize = 64 * 1024;
/// A body that is left unread is no more than this, or else the connection is closed.
const LITTLE: u64 = 64 * 1024;
/// A buffer for a body grows as bytes arrive; it does not trust a length it was told beyond this.
const FIRST_BUFFER: usize = 256 * 1024;

/// A request as far as the gateway understands it, and the bytes it forwards.
#[derive(Debug, Default)]
pub(super) struct Call {
    /// As it came.
    body: Bytes,
    /// What asks for usage where the caller did not.
    asks_for_usage: Option<Edit>,
    bounds: Bounds,
    pub(super) model: String,
    pub(super) streams: bool,
    /// The caller's own bound on all its completions together.
    pub(super) completion_cap: Option<u64>,
    pub(super) completions: u64,
    /// What was counted of the prompt.
    pub(super) estimate: PromptEstimate,
    /// What is reserved for it: the estimate, corrected, and what it refers to but does not carry.
    pub(super) prompt_tokens: u64,
    pub(super) tokenizer: Option<Tokenizer>,
}

/// What the reading of a body depends on.
#[derive(Clone)]
pub(super) struct Reading {
    pub(super) api: Api,
    /// The model that the path names in place of the body.
    pub(super) model: Option<String>,
    /// The path asks for a stream.
    pub(super) streams: bool,
    pub(super) models: Models,
    pub(super) ask_for_usage: bool,
}

impl Call {
    /// Parses and counts a body, on this thread if that is quick.
    pub(super) async fn read(body: Bytes, reading: Reading) -> Result<Self, ProxyError> {
        if body.len() <= INLINE_BODY
            && let Some(call) = Self::parse(&body, &reading, if_quick)?
        {
            return Ok(call);
        }
        let parse = move || Self::parse(&body, &reading, |prompt, model| Some(prompt.estimate(model)));
        spawn_blocking(parse).await.map_err(|_| ProxyError::Internal)??.ok_or(ProxyError::Internal)
    }

    /// A request whose body is not looked into.
    pub(super) fn unread(body: Bytes) -> Self {
        Self { body, ..Self::default() }
    }

    /// A request whose prompt is not counted: of its JSON or form no more is read than the model. Of forms
    /// not even that where nothing depends on it.
    pub(super) async fn uncounted(
        body: Bytes,
        content_type: Option<&HeaderValue>,
        model_matters: bool,
    ) -> Result<Self, ProxyError> {
        let model = match form::boundary(content_type) {
            Some(boundary) if model_matters => form::model(body.clone(), boundary).await?,
            Some(_) => String::new(),
            None if body.len() <= INLINE_BODY => named_model(&body).map_err(ProxyError::Body)?,
            None => {
                let body = body.clone();
                let read = spawn_blocking(move || named_model(&body));
                read.await.map_err(|_| ProxyError::Internal)?.map_err(ProxyError::Body)?
            }
        };
        Ok(Self { body, model, ..Self::default() })
    }

    /// Whether the gateway asks for usage where the caller did not.
    pub(super) fn asks_for_usage(&self) -> bool {
        self.asks_for_usage.is_some()
    }

    /// From now on it does not.
    pub(super) fn ask_no_longer(&mut self) {
        self.asks_for_usage = None;
    }

    /// Corrects the estimate by what was learned of the like.
    pub(super) fn correct(&mut self, correction: Correction) {
        self.prompt_tokens = correction.apply(self.estimate.tokens());
    }

    /// Adds so many tokens for each thing that the request refers to but does not carry.
    pub(super) fn add_unseen(&mut self, each: u64) {
        let unseen = each.saturating_mul(self.estimate.unseen);
        self.prompt_tokens = self.prompt_tokens.saturating_add(unseen).min(MAX_AMOUNT);
    }

    /// What its answer will teach of estimates; of a prompt that was not seen whole, or not counted, nothing.
    pub(super) fn lesson(self, upstream: usize, calibrations: &Arc<Calibrations>) -> Option<Lesson> {
        let Self { estimate, model, .. } = self;
        let is_clear = !estimate.is_partial && !estimate.is_rough && estimate.tokens() > 0;
        is_clear.then(|| Lesson {
            calibrations: calibrations.clone(),
            upstream,
            model,
            kind: estimate.kind,
            estimated: estimate.tokens(),
        })
    }

    /// What is forwarded: as it came, but for a stream's usage that is asked for, and each completion's
    /// bound if it is to be lowered.
    pub(super) async fn forwarded(&self, bound: Option<u64>) -> Result<Bytes, ProxyError> {
        let bound =
            bound.map_or_else(Vec::new, |tokens| self.bounds.lower_to(tokens, &self.model, &self.body));
        let edits: Vec<Edit> = bound.into_iter().chain(self.asks_for_usage.clone()).collect();
        if edits.is_empty() {
            return Ok(self.body.clone());
        }
        if self.body.len() <= INLINE_EDIT {
            return Ok(edited(&self.body, edits));
        }
        let body = self.body.clone();
        spawn_blocking(move || edited(&body, edits)).await.map_err(|_| ProxyError::Internal)
    }

    /// `None` if the prompt was not estimated.
    fn parse(
        bytes: &Bytes,
        reading: &Reading,
        estimate: impl FnOnce(&Prompt<'_>, &Model) -> Option<PromptEstimate>,
    ) -> Result<Option<Self>, ProxyError> {
        let body = Body::read(reading.api, bytes).map_err(ProxyError::Body)?;
        let named = body.model.as_deref().unwrap_or_default();
        let model = reading.model.as_deref().unwrap_or(named).to_owned();
        let known = reading.models.named(&model);
        let Some(estimate) = estimate(&body.prompt, &known) else { return Ok(None) };
        let asks =
            reading.ask_for_usage && body.streams && reading.api.reports_if_asked() && !body.wants_usage();
        Ok(Some(Self {
            body: bytes.clone(),
            asks_for_usage: asks.then(|| body.ask_for_usage()),
            bounds: body.bounds(),
            streams: body.streams || reading.streams,
            completion_cap: body.completion_cap(),
            completions: body.completions(),
            prompt_tokens: estimate.tokens(),
            estimate,
            tokenizer: Some(known.tokenizer),
            model,
        }))
    }
}

fn if_quick(prompt: &Prompt<'_>, model: &Model) -> Option<PromptEstimate> {
    prompt.estimate_if_quick(model)
}

/// Refuses what makes a request's head ambiguous or asks for more than is served.
pub(super) fn check_head(
    headers: &HeaderMap,
    uri: &http::Uri,
    version: http::Version,
) -> Result<(), ProxyError> {
    let mut hosts = headers.get_all(header::HOST).iter();
    let host = hosts.next();
    if hosts.next().is_some() {
        return Err(ProxyError::BadHead("it has more than one Host"));
    }
    if host.is_none() && version == http::Version::HTTP_11 {
        return Err(ProxyError::BadHead("it has no Host"));
    }
    if let (Some(authority), Some(host)) = (uri.authority(), host)
        && !authority.as_str().as_bytes().eq_ignore_ascii_case(host.as_bytes())
    {
        return Err(ProxyError::BadHead("its target and its Host differ"));
    }
    Ok(())
}

/// Refuses what asks for a tunnel, where nobody knows what would go through it. HTTP/2 is what some
/// clients offer to everybody; that offer stays here.
pub(super) fn check_upgrade(headers: &HeaderMap) -> Result<(), ProxyError> {
    let is_offer = |v: &http::HeaderValue| v.as_bytes().trim_ascii().eq_ignore_ascii_case(b"h2c");
    if headers.get_all(header::UPGRADE).iter().all(is_offer) {
        return Ok(());
    }
    Err(ProxyError::BadHead("it asks for an upgrade, and none is served"))
}

/// Refuses a body that would have to be decoded before it is read.
pub(super) fn check_encoding(headers: &HeaderMap) -> Result<(), ProxyError> {
    let is_identity = |v: &http::HeaderValue| v.as_bytes().trim_ascii().eq_ignore_ascii_case(b"identity");
    if headers.get_all(header::CONTENT_ENCODING).iter().any(|v| !is_identity(v)) {
        return Err(ProxyError::ContentEncoding);
    }
    Ok(())
}

/// How much of a body is still to be read.
pub(super) fn unread(body: &Incoming) -> Unread {
    match body.size_hint().exact() {
        _ if body.is_end_stream() => Unread::Nothing,
        Some(length) if length <= LITTLE => Unread::Little,
        _ => Unread::Much,
    }
}

/// Reads a whole body of at most `limit` bytes. One that stops arriving for as long as `idle` is given up.
pub(super) async fn read_body(mut body: Incoming, limit: usize, idle: Duration) -> Result<Bytes, ProxyError> {
    let too_large = || ProxyError::BodyTooLarge { limit };
    let told = body.size_hint().exact();
    if told.is_some_and(|length| length > limit as u64) {
        return Err(too_large());
    }
    let mut first = Bytes::new();
    let mut whole = BytesMut::new();
    loop {
        let frame = match timeout(idle, body.frame()).await {
            Err(_) => return Err(ProxyError::BodyIncomplete("nothing more of it came")),
            Ok(None) => break,
            Ok(Some(Err(_))) => {
                return Err(ProxyError::BodyIncomplete("the connection broke, or its framing is wrong"));
            }
            Ok(Some(Ok(frame))) => frame,
        };
        let Ok(data) = frame.into_data() else { continue };
        if first.len() + whole.len() + data.len() > limit {
            return Err(too_large());
        }
        // Most bodies come in one piece, which is then passed on as it is.
        if first.is_empty() && whole.is_empty() {
            first = data;
            continue;
        }
        if whole.is_empty() {
            let room = told.and_then(|n| usize::try_from(n).ok()).unwrap_or(0).min(FIRST_BUFFER);
            whole.reserve(room.max(first.len() + data.len()));
            whole.extend_from_slice(&std::mem::take(&mut first));
        }
        whole.extend_from_slice(&data);
    }
    Ok(if whole.is_empty() { first } else { whole.freeze() })
}
