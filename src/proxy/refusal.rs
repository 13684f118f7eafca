//! Requests that the gateway answers itself: denials by quotas, and failures to get an answer from the upstream.

use super::answer::AnswerBody;
use super::charge::Charge;
use super::headers::{AddedHeaders, REQUEST_ID, UnreadBody};
use super::snapshot::Snapshot;
use super::state::State;
use crate::api::Dialect;
use crate::body::BodyFault;
use crate::config::{Environment, UpstreamSettings};
use crate::error::{ProxyError, quota_shape};
use crate::ledger::NoRoom;
use crate::telemetry::{Denial, Metrics, Record, Rejection, RequestOutcome};
use crate::upstream::SendError;
use http::header::{self, HeaderValue};
use http::{Response, StatusCode};
use std::time::Duration;

/// Maximum length of an error's message in the log, in characters.
const MAX_LOGGED_MESSAGE: usize = 300;

/// A request that is not forwarded, and the headers that the gateway adds to the error answer.
// Small, because each step that can refuse a request returns it.
pub(super) struct Refusal {
    pub(super) error: Box<ProxyError>,
    pub(super) headers: Box<AddedHeaders>,
}

impl Refusal {
    /// A refusal with a copy of these headers.
    // Not inlined: its many callers would contain the code that copies the headers.
    #[cold]
    #[inline(never)]
    pub(super) fn new(error: ProxyError, headers: &AddedHeaders) -> Self {
        Self::with_headers(error, Box::new(headers.clone()))
    }

    /// A refusal with these headers.
    pub(super) fn with_headers(error: ProxyError, headers: Box<AddedHeaders>) -> Self {
        Self { error: Box::new(error), headers }
    }

    /// The refusal of a request that is not forwarded before the gateway stops. Its body may not be read.
    pub(super) fn at_shutdown() -> Self {
        let headers = AddedHeaders { unread: UnreadBody::Large, ..AddedHeaders::default() };
        Self::with_headers(ProxyError::ShuttingDown, Box::new(headers))
    }
}

/// Builds the error answer. The charge settles before the caller receives it.
pub(super) fn respond(
    state: &State,
    refusal: Refusal,
    mut charge: Charge,
    dialect: Dialect,
) -> Response<AnswerBody> {
    let Refusal { error, headers } = refusal;
    let record = &mut charge.record;
    record.error = error.code();
    record.denied_by = Denial::of_error(&error).map(Box::new);
    record.outcome = outcome(&error);
    // A path can contain a key by mistake.
    let is_logged = !matches!(*error, ProxyError::ShuttingDown | ProxyError::UnknownPath { .. });
    if record.outcome == RequestOutcome::Refused && is_logged {
        record.error_message = Some(logged_message(&error));
    }
    record.request_id = state.request_ids.next();
    let mut response = error.response(dialect);
    record.status = response.status().as_u16();
    headers.write(response.headers_mut());
    if let Ok(id) = HeaderValue::from_str(&record.request_id) {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    if matches!(*error, ProxyError::ShuttingDown) {
        // The connection may not know of the shutdown yet.
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    // A flood from one address must not push out the rejections of quotas.
    if record.outcome == RequestOutcome::Rejected && !matches!(*error, ProxyError::FloodGuard { .. }) {
        state.rejections.add(Rejection::new(record, *error));
    }
    drop(charge);
    response.map(|body| AnswerBody::from_gateway(Some(body.into())))
}

/// Answers `HEAD /` with 200 and no body.
pub(super) fn respond_to_root_check(mut record: Box<Record>) -> Response<AnswerBody> {
    record.status = StatusCode::OK.as_u16();
    record.outcome = RequestOutcome::Answered;
    Response::new(AnswerBody::from_gateway(None))
}

/// Answers with a document of the gateway.
pub(super) fn respond_with_json(
    state: &State,
    document: String,
    headers: &AddedHeaders,
    mut record: Box<Record>,
) -> Response<AnswerBody> {
    record.status = StatusCode::OK.as_u16();
    record.outcome = RequestOutcome::Answered;
    record.request_id = state.request_ids.next();
    let mut response = Response::new(AnswerBody::from_gateway(Some(document.into())));
    headers.write(response.headers_mut());
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    if let Ok(id) = HeaderValue::from_str(&record.request_id) {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    response
}

/// The message of an error for the log, cut to `MAX_LOGGED_MESSAGE` characters.
fn logged_message(error: &ProxyError) -> Box<str> {
    let message = error.to_string();
    let logged = match error {
        // A parser's error, which can quote the body, follows a colon. Bodies are not logged.
        ProxyError::InvalidBody(BodyFault::Invalid(_)) => message.split(": ").next().unwrap_or_default(),
        _ => &message,
    };
    logged.chars().take(MAX_LOGGED_MESSAGE).collect()
}

fn outcome(error: &ProxyError) -> RequestOutcome {
    match error {
        ProxyError::QuotaExceeded { .. }
        | ProxyError::TooManyInFlight { .. }
        | ProxyError::UpstreamRateLimited { .. }
        | ProxyError::FloodGuard { .. } => RequestOutcome::Rejected,
        ProxyError::UpstreamUnreachable { .. } | ProxyError::UpstreamTimeout { .. } => {
            RequestOutcome::UpstreamFailed
        }
        _ => RequestOutcome::Refused,
    }
}

/// Counts a denial in metrics and converts it to an error.
pub(super) fn denied(no_room: NoRoom, environment: &Environment, metrics: &Metrics) -> ProxyError {
    metrics.rejected(&environment.name, no_room_code(&no_room), denial(&no_room).as_ref(), false);
    no_room_error(no_room, environment)
}

/// The error of a request that gets no reservation.
pub(super) fn no_room_error(no_room: NoRoom, environment: &Environment) -> ProxyError {
    let name = environment.name.clone();
    match no_room {
        NoRoom::Quota(denied) => ProxyError::QuotaExceeded {
            denied,
            environment: name,
            retry_patience: environment.retry_patience,
        },
        NoRoom::InFlight { limit, upstream } => {
            ProxyError::TooManyInFlight { limit, environment: name, upstream }
        }
        NoRoom::Unavailable => ProxyError::QuotaStoreUnavailable { environment: name },
    }
}

/// The error for a request that the provider of an upstream would refuse.
pub(super) fn held(snapshot: &Snapshot, environment: usize, upstream: usize, wait: Duration) -> ProxyError {
    ProxyError::UpstreamRateLimited {
        upstream: snapshot.upstreams[upstream].settings.name.clone(),
        wait,
        retry_patience: snapshot.config.environments[environment].retry_patience,
    }
}

/// Counts and logs, in shadow mode, the denial that enforced quotas would have caused.
pub(super) fn record_shadow_denial(no_room: &NoRoom, environment: &Environment, record: &Record) {
    let (code, worst) = (no_room_code(no_room), no_room.worst());
    record.metrics().rejected(&environment.name, code, denial(no_room).as_ref(), true);
    tracing::info!(
        environment = environment.name,
        caller = record.caller.as_deref(),
        code,
        scope = worst.map(|s| s.quota.scope.as_str()),
        name = worst.map(|s| s.quota.scope.name()).filter(|name| !name.is_empty()),
        kind = worst.map(|s| s.quota.kind.as_str()),
        per = worst.map(|s| s.quota.per.text.as_str()),
        requested = worst.map(|s| s.requested),
        remaining = worst.map(|s| s.remaining),
        limit = worst.map(|s| s.quota.limit),
        "enforced quotas would have denied this request (shadow mode, enforce: false)"
    );
}

fn denial(no_room: &NoRoom) -> Option<Denial> {
    match no_room {
        NoRoom::Quota(_) => no_room.worst().map(Denial::of_quota),
        NoRoom::InFlight { limit, upstream } => {
            Some(Denial::of_requests_in_flight(*limit, upstream.as_deref()))
        }
        NoRoom::Unavailable => None,
    }
}

fn no_room_code(no_room: &NoRoom) -> &'static str {
    match no_room {
        NoRoom::Quota(denied) => quota_shape(denied).2,
        NoRoom::InFlight { .. } => "too_many_in_flight",
        NoRoom::Unavailable => "quota_store_unavailable",
    }
}

/// The error for a request that got no answer from the upstream.
pub(super) fn send_failed(error: SendError, upstream: &UpstreamSettings) -> ProxyError {
    let upstream = upstream.name.clone();
    match error {
        SendError::Unreachable(what, source) => {
            tracing::warn!(error = %source, upstream, what, "the gateway cannot reach an upstream");
            ProxyError::UpstreamUnreachable { upstream, what }
        }
        SendError::ConnectTimeout => {
            let what = "the connection was not established in time (timeouts.connect)";
            ProxyError::UpstreamUnreachable { upstream, what }
        }
        SendError::Timeout(setting, after) => {
            ProxyError::UpstreamTimeout { upstream, timeout: (setting, after) }
        }
        SendError::Broken(source) => {
            tracing::warn!(error = %source, upstream, "an upstream broke off the connection before it answered");
            ProxyError::UpstreamUnreachable {
                upstream,
                what: "it broke off the connection before it answered",
            }
        }
    }
}
