//! The request to an upstream: made from the caller's request, for the first upstream and for each that follows it.

use super::Proxy;
use super::body_budget::BufferedBytes;
use super::call::Call;
use super::caller::IdentifiedCaller;
use super::candidates::Candidates;
use super::headers;
use super::query;
use super::route::{self, Endpoint, Route};
use crate::clock::Stopwatch;
use crate::config::Environment;
use crate::provider_limits::Pass;
use crate::upstream;
use crate::upstream::availability::Attempt;
use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Uri};
use std::borrow::Cow;
use std::sync::Arc;

/// The request to the upstream and the context of its exchange. With `on_disconnect: drain` it moves to a separate
/// task, which outlives the caller's connection.
pub(super) struct OutgoingRequest {
    pub(super) request: upstream::Request,
    /// Index of the upstream in the config.
    pub(super) upstream: usize,
    pub(super) environment: Arc<Environment>,
    pub(super) endpoint: Endpoint,
    pub(super) call: Box<Call>,
    /// Whether the answer is a list of models from which those that the environment forbids are removed.
    pub(super) lists_models: bool,
    /// The bytes of the body, which are freed when the answer begins.
    pub(super) buffered: BufferedBytes,
    /// Whether the exchange continues after the caller disconnects (`on_disconnect: drain`).
    pub(super) outlives_caller: bool,
    /// The permission of the provider's limits. `None`: the gateway does not follow them.
    pub(super) pass: Option<Pass>,
    /// Runs since the body was read.
    pub(super) received: Stopwatch,
    /// The other upstreams. `None`: the route has one upstream.
    pub(super) alternatives: Option<Box<Alternatives>>,
}

/// What a request needs to be sent to another upstream of its route.
pub(super) struct Alternatives {
    pub(super) candidates: Box<Candidates>,
    /// The attempt at the current upstream.
    pub(super) attempt: Option<Attempt>,
    uri: Uri,
    path: String,
    is_google: bool,
    caller: IdentifiedCaller,
    headers: HeaderMap,
}

/// What the target of a request is made from.
pub(super) struct CallerTarget<'h> {
    pub(super) uri: &'h Uri,
    /// The path without the environment, with the model that is sent.
    pub(super) path: &'h str,
    /// Whether the path is one of Google's.
    pub(super) is_google: bool,
    pub(super) caller: IdentifiedCaller,
}

/// The path without the environment. A model in it is replaced by the one that is sent.
pub(super) fn path_sent<'p>(route: &Route<'p>, call: &Call) -> Cow<'p, str> {
    match &call.sent_model {
        Some(sent) if route.model.is_some() => route::with_model(route, sent).into(),
        _ => route.path.into(),
    }
}

impl Alternatives {
    pub(super) fn new(
        candidates: Box<Candidates>,
        attempt: Attempt,
        target: &CallerTarget<'_>,
        headers: HeaderMap,
    ) -> Self {
        let CallerTarget { uri, path, is_google, caller } = *target;
        let (uri, path) = (uri.clone(), path.to_owned());
        Self { candidates, attempt: Some(attempt), uri, path, is_google, caller, headers }
    }
}

impl OutgoingRequest {
    /// Makes the request to another upstream of the route.
    pub(super) fn send_to(&mut self, proxy: &Proxy, upstream: usize, body: Bytes) {
        let Some(alternatives) = &self.alternatives else { return };
        let Alternatives { uri, path, is_google, caller, headers, .. } = &**alternatives;
        let (is_google, caller) = (*is_google, *caller);
        self.upstream = upstream;
        self.request.target = proxy.target(upstream, &CallerTarget { uri, path, is_google, caller });
        self.request.headers = proxy.headers(upstream, headers.clone(), caller);
        self.request.body = body;
    }
}

impl Proxy {
    /// Path and query of the request to an upstream.
    pub(super) fn target(&self, upstream: usize, target: &CallerTarget<'_>) -> String {
        let CallerTarget { uri, path, is_google, caller } = target;
        let context = &self.snapshot.upstreams[upstream];
        // Google's SDKs may send the caller's key in the query.
        let replaces_key = context.credential.is_some() && *is_google;
        let is_key = |text: &[u8]| self.snapshot.keys.owner(&self.snapshot.config, text).is_some();
        let query = query::without_keys(uri, replaces_key, caller.has_key_in_query.then_some(&is_key));
        route::upstream_path(context.settings.base_url.path(), path, query.as_deref())
    }

    /// The headers of the request to an upstream.
    pub(super) fn headers(
        &self,
        upstream: usize,
        headers: HeaderMap,
        caller: IdentifiedCaller,
    ) -> Vec<(HeaderName, HeaderValue)> {
        let context = &self.snapshot.upstreams[upstream];
        headers::for_upstream(headers, &context.settings, context.credential.as_ref(), caller.key_headers)
    }
}
