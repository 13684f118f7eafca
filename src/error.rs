//! The errors that the gateway itself answers, and their HTTP shape.

mod denial;
mod dialects;
mod path_mistake;

use crate::api::Dialect;
use crate::body::BodyFault;
use crate::ledger::IN_FLIGHT_RETRY_MS;
use crate::quota::{Denied, Kind, Shortfall, Wait};
use dialects::ErrorContent;
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Response, StatusCode};
pub use path_mistake::PathMistake;
use serde_json::Value;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

/// The error codes of the gateway's answers.
pub(crate) const CODES: [&str; 23] = [
    "rate_limit_exceeded",
    "insufficient_quota",
    "request_exceeds_quota",
    "too_many_in_flight",
    "flood_guard",
    "invalid_api_key",
    "wrong_environment",
    "model_not_found",
    "unknown_path",
    "method_not_allowed",
    "bad_request",
    "headers_too_large",
    "unsupported_content_encoding",
    "request_body_too_large",
    "request_body_incomplete",
    "invalid_json",
    "invalid_value",
    "quota_store_unavailable",
    "upstream_unreachable",
    "upstream_timeout",
    "upstream_disconnected",
    "shutting_down",
    "internal_error",
];

/// What the headers of a request have in place of a valid key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GivenKey {
    /// No key.
    None,
    /// An `Authorization` header of another form than `Bearer KEY`.
    NoBearer,
    /// A key that the gateway does not know.
    Unknown,
}

/// An error that the caller receives instead of the upstream's answer. `Display` is the message for the caller. It
/// contains no key, no other caller and no upstream address.
#[derive(Debug)]
pub enum ProxyError {
    /// The path is not served.
    UnknownPath {
        /// The path that was requested.
        path: String,
        /// The path of the `base_url` that the message suggests.
        base_path: String,
        /// The kind of SDK that `base_path` is for.
        dialect: Dialect,
        /// The probable mistake in it.
        mistake: PathMistake,
    },
    /// The path is served, but not with this method.
    MethodNotAllowed {
        /// The methods that the path accepts.
        allow: &'static str,
    },
    /// The key is missing or unknown.
    InvalidKey {
        /// The key that the request has.
        given: GivenKey,
        /// The header in which the SDK of the path sends its key, and a placeholder for the key.
        header: &'static str,
    },
    /// The request addresses one environment, and its key belongs to another.
    WrongEnvironment {
        /// The header and form of a key, if the key has another form. It then did not select its environment.
        usual_form: Option<&'static str>,
    },
    /// The request's head is ambiguous or requests something unsupported. The text follows "The request head is not
    /// accepted: ".
    InvalidHead(&'static str),
    /// The request is not well-formed HTTP, or its head is too large. The status distinguishes them.
    MalformedHttp(StatusCode),
    /// The body has a `content-encoding`.
    UnsupportedContentEncoding,
    /// The body is larger than `server.max_request_body`.
    BodyTooLarge {
        /// The setting in bytes.
        limit: usize,
    },
    /// The body did not arrive completely. The text is the reason.
    BodyIncomplete(&'static str),
    /// The bodies of other requests occupy `server.buffered_bodies`.
    Overloaded,
    /// The API does not accept the body.
    InvalidBody(BodyFault),
    /// The model is not on the environment's allow-list.
    ModelNotFound {
        /// The most similar model that the environment allows.
        nearest: Option<String>,
        /// The model as the request names it.
        model: String,
        /// The environment's name.
        environment: String,
    },
    /// At least one quota has no room for the request.
    QuotaExceeded {
        /// The quotas without room.
        denied: Denied,
        /// The environment's name.
        environment: String,
        /// `retry_patience`: if the wait is longer, the answer has `x-should-retry: false`.
        retry_patience: Duration,
    },
    /// `max_in_flight` requests are in flight.
    TooManyInFlight {
        /// The setting.
        limit: u64,
        /// The environment's name.
        environment: String,
        /// The upstream that has the setting. `None`: the environment has it.
        upstream: Option<Arc<str>>,
    },
    /// Redis is unavailable, and `store.redis.on_failure` is `closed`.
    QuotaStoreUnavailable {
        /// The environment's name.
        environment: String,
    },
    /// No connection was established, or it broke before an answer arrived.
    UpstreamUnreachable {
        /// The upstream's name in the config.
        upstream: String,
        /// What failed, without addresses.
        what: &'static str,
    },
    /// A timeout of the upstream ran out.
    UpstreamTimeout {
        /// The upstream's name in the config.
        upstream: String,
        /// The setting below `timeouts`, and its value.
        timeout: (&'static str, Duration),
    },
    /// The answer is incomplete because the connection to the upstream broke.
    UpstreamDisconnected {
        /// The upstream's name in the config.
        upstream: String,
    },
    /// The upstream's provider would refuse the request by the limits it has stated (`provider_limits: follow`).
    UpstreamRateLimited {
        /// The upstream's name in the config.
        upstream: String,
        /// The time after which the request may be sent.
        wait: Duration,
        /// `retry_patience`: if the wait is longer, the answer has `x-should-retry: false`.
        retry_patience: Duration,
    },
    /// One address sends more requests than `server.flood_guard` allows.
    FloodGuard {
        /// The time after which the address may send its next request.
        wait: Duration,
    },
    /// The gateway is shutting down.
    ShuttingDown,
    /// The gateway itself failed.
    Internal,
}

impl ProxyError {
    /// HTTP status, OpenAI error type and error code.
    pub fn shape(&self) -> (StatusCode, &'static str, &'static str) {
        use StatusCode as S;
        const INVALID: &str = "invalid_request_error";
        match self {
            Self::UnknownPath { .. } => (S::NOT_FOUND, INVALID, "unknown_path"),
            Self::MethodNotAllowed { .. } => (S::METHOD_NOT_ALLOWED, INVALID, "method_not_allowed"),
            Self::InvalidKey { .. } => (S::UNAUTHORIZED, INVALID, "invalid_api_key"),
            Self::WrongEnvironment { .. } => (S::FORBIDDEN, INVALID, "wrong_environment"),
            Self::InvalidHead(_) => (S::BAD_REQUEST, INVALID, "bad_request"),
            Self::MalformedHttp(S::REQUEST_HEADER_FIELDS_TOO_LARGE) => {
                (S::REQUEST_HEADER_FIELDS_TOO_LARGE, INVALID, "headers_too_large")
            }
            Self::MalformedHttp(status) => (*status, INVALID, "bad_request"),
            Self::UnsupportedContentEncoding => {
                (S::UNSUPPORTED_MEDIA_TYPE, INVALID, "unsupported_content_encoding")
            }
            Self::BodyTooLarge { .. } => (S::PAYLOAD_TOO_LARGE, INVALID, "request_body_too_large"),
            Self::BodyIncomplete(_) => (S::BAD_REQUEST, INVALID, "request_body_incomplete"),
            Self::Overloaded => (S::SERVICE_UNAVAILABLE, "server_error", "overloaded"),
            Self::InvalidBody(BodyFault::Invalid(_)) => (S::BAD_REQUEST, INVALID, "invalid_json"),
            Self::InvalidBody(BodyFault::Value { .. }) => (S::BAD_REQUEST, INVALID, "invalid_value"),
            Self::ModelNotFound { .. } => (S::NOT_FOUND, INVALID, "model_not_found"),
            Self::QuotaExceeded { denied, .. } => quota_shape(denied),
            Self::TooManyInFlight { .. } => (S::TOO_MANY_REQUESTS, "requests", "too_many_in_flight"),
            Self::QuotaStoreUnavailable { .. } => {
                (S::SERVICE_UNAVAILABLE, "server_error", "quota_store_unavailable")
            }
            Self::UpstreamUnreachable { .. } => (S::BAD_GATEWAY, "upstream_error", "upstream_unreachable"),
            Self::UpstreamTimeout { .. } => (S::GATEWAY_TIMEOUT, "upstream_error", "upstream_timeout"),
            Self::UpstreamDisconnected { .. } => (S::BAD_GATEWAY, "upstream_error", "upstream_disconnected"),
            Self::UpstreamRateLimited { .. } => (S::TOO_MANY_REQUESTS, "requests", "upstream_rate_limited"),
            Self::FloodGuard { .. } => (S::TOO_MANY_REQUESTS, "requests", "flood_guard"),
            Self::ShuttingDown => (S::SERVICE_UNAVAILABLE, "server_error", "shutting_down"),
            Self::Internal => (S::INTERNAL_SERVER_ERROR, "server_error", "internal_error"),
        }
    }

    /// The error code.
    pub fn code(&self) -> &'static str {
        self.shape().2
    }

    /// The complete answer, in the shape that SDKs of this dialect parse.
    pub fn response(&self, dialect: Dialect) -> Response<Vec<u8>> {
        let (status, _, code) = self.shape();
        let mut response = Response::new(self.body(dialect).to_string().into_bytes());
        *response.status_mut() = status;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.insert("x-tollgate-error", HeaderValue::from_static(code));
        self.write_headers(headers);
        response
    }

    /// The quotas without room, longest wait first. Empty if no quota caused the error.
    pub(crate) fn shortfalls(&self) -> &[Shortfall] {
        match self {
            Self::QuotaExceeded { denied, .. } => denied.shortfalls(),
            _ => &[],
        }
    }

    /// Milliseconds until the same request may fit. `None`: it can never fit, or the time is not known.
    pub(crate) fn retry_after_ms(&self) -> Option<u64> {
        match self {
            Self::QuotaExceeded { denied, .. } => match denied.shortfalls().first()?.wait {
                Wait::Ms(ms) => Some(ms.max(1)),
                Wait::Never => None,
            },
            Self::UpstreamRateLimited { wait, .. } => u64::try_from(wait.as_millis()).ok(),
            Self::TooManyInFlight { .. } => Some(IN_FLIGHT_RETRY_MS),
            _ => None,
        }
    }

    /// The body of the answer.
    pub fn body(&self, dialect: Dialect) -> Value {
        self.content().body(dialect)
    }

    /// The SSE event that ends an interrupted stream. `sequence_number` is that of the event, for streams that number
    /// their events.
    pub fn event(&self, dialect: Dialect, sequence_number: Option<u64>) -> String {
        self.content().event(dialect, sequence_number)
    }

    fn content(&self) -> ErrorContent<'_> {
        let (status, kind, code) = self.shape();
        let param = match self {
            Self::InvalidBody(BodyFault::Value { param, .. }) => Some(*param),
            Self::ModelNotFound { .. } => Some("model"),
            _ => None,
        };
        let shortfalls = Some(self.shortfalls()).filter(|shortfalls| !shortfalls.is_empty());
        ErrorContent { status, kind, code, message: self.to_string(), param, shortfalls }
    }

    fn write_headers(&self, headers: &mut HeaderMap) {
        match self {
            Self::MethodNotAllowed { allow } => {
                headers.insert(header::ALLOW, HeaderValue::from_static(allow));
            }
            Self::QuotaExceeded { denied, retry_patience, .. } => {
                // A request that can never fit gets no retry headers.
                if let Some(Wait::Ms(ms)) = denied.shortfalls().first().map(|s| s.wait) {
                    write_retry_after(headers, ms, *retry_patience);
                }
            }
            Self::UpstreamRateLimited { wait, retry_patience, .. } => {
                let ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
                write_retry_after(headers, ms, *retry_patience);
            }
            Self::FloodGuard { wait } => {
                let ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
                write_retry_after(headers, ms.saturating_add(1), Duration::MAX);
            }
            Self::TooManyInFlight { .. } | Self::QuotaStoreUnavailable { .. } | Self::ShuttingDown => {
                headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
            }
            Self::Overloaded => {
                headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
                headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
            }
            // The connection is out of sync, or unread bytes of a body may follow.
            Self::InvalidHead(_)
            | Self::MalformedHttp(_)
            | Self::BodyTooLarge { .. }
            | Self::BodyIncomplete(_) => {
                headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
            }
            _ => {}
        }
    }
}

/// Status, type and code of a denial. The quota with the longest wait decides them.
pub(crate) fn quota_shape(denied: &Denied) -> (StatusCode, &'static str, &'static str) {
    match denied.shortfalls().first() {
        Some(Shortfall { wait: Wait::Never, .. }) => {
            (StatusCode::BAD_REQUEST, "invalid_request_error", "request_exceeds_quota")
        }
        Some(s) if s.quota.is_long() => {
            (StatusCode::TOO_MANY_REQUESTS, "insufficient_quota", "insufficient_quota")
        }
        Some(s) if s.quota.kind == Kind::Requests => {
            (StatusCode::TOO_MANY_REQUESTS, "requests", "rate_limit_exceeded")
        }
        _ => (StatusCode::TOO_MANY_REQUESTS, "tokens", "rate_limit_exceeded"),
    }
}

fn write_retry_after(headers: &mut HeaderMap, ms: u64, retry_patience: Duration) {
    let ms = ms.max(1);
    headers.insert(header::RETRY_AFTER, HeaderValue::from(ms.div_ceil(1_000)));
    headers.insert(HeaderName::from_static("retry-after-ms"), HeaderValue::from(ms));
    if u128::from(ms) > retry_patience.as_millis() {
        headers.insert(HeaderName::from_static("x-should-retry"), HeaderValue::from_static("false"));
    }
}

impl fmt::Display for ProxyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UnknownPath { path, base_path, dialect, mistake } => {
                mistake.write_message(f, path, base_path, dialects::sdk(*dialect))
            }
            Self::MethodNotAllowed { allow } => write!(f, "This path accepts {allow} only."),
            Self::InvalidKey { given: GivenKey::None, header } => write!(
                f,
                "The request has no API key. Send the key that the gateway's operator gave you as '{header}'."
            ),
            Self::InvalidKey { given: GivenKey::NoBearer, header } => write!(
                f,
                "The Authorization header has no 'Bearer ' before the key. Send the key that the gateway's operator gave you as '{header}'."
            ),
            Self::InvalidKey { given: GivenKey::Unknown, header } => write!(
                f,
                "The API key is not valid for this gateway. Ask its operator for a valid key and send it as '{header}'."
            ),
            Self::WrongEnvironment { usual_form: Some(form) } => write!(
                f,
                "The Authorization header has no 'Bearer ' before the key, so the key did not select its environment. Send it as '{form}'."
            ),
            Self::WrongEnvironment { usual_form: None } => f.write_str(
                "The API key belongs to a different environment. Use the base_url of the key's environment, or a base_url without an environment.",
            ),
            Self::InvalidHead(what) => write!(f, "The request head is not accepted: {what}."),
            Self::MalformedHttp(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE) => {
                f.write_str("The request head is larger than 64 KiB or has more than 100 headers.")
            }
            Self::MalformedHttp(_) => f.write_str("The request is not well-formed HTTP/1.1."),
            Self::UnsupportedContentEncoding => f.write_str("The gateway does not accept an encoded request body. Send the body without content-encoding."),
            Self::BodyTooLarge { limit } => {
                write!(f, "The request body is larger than the {limit} bytes that the gateway accepts (server.max_request_body).")
            }
            Self::BodyIncomplete(what) => write!(f, "The request body did not arrive completely: {what}."),
            Self::InvalidBody(fault) => fault.fmt(f),
            Self::ModelNotFound { model, environment, .. } if model.is_empty() => {
                write!(f, "The request names no model, and environment '{environment}' allows only the models of its allow-list (models).")
            }
            Self::ModelNotFound { model, environment, nearest } => {
                write!(f, "The model '{model}' does not exist, or environment '{environment}' does not allow it (models).")?;
                nearest.iter().try_for_each(|nearest| write!(f, " Did you mean '{nearest}'?"))
            }
            Self::QuotaExceeded { denied, environment, .. } => denial::write_message(f, denied, environment),
            Self::TooManyInFlight { limit, upstream: Some(upstream), .. } => {
                write!(f, "Upstream '{upstream}' already has {limit} requests in flight (max_in_flight). Try again when one of them has ended.")
            }
            Self::TooManyInFlight { limit, environment, upstream: None } => {
                write!(f, "Environment '{environment}' already has {limit} requests in flight (max_in_flight). Try again when one of them has ended.")
            }
            Self::QuotaStoreUnavailable { environment } => {
                write!(f, "Redis, which stores the quotas of environment '{environment}', is unavailable or too busy, and the gateway does not admit this request without it (store.redis.on_failure). Try again in a moment.")
            }
            Self::UpstreamUnreachable { upstream, what } => {
                write!(f, "The gateway cannot reach the upstream '{upstream}': {what}.")
            }
            Self::UpstreamTimeout { upstream, timeout: (setting, after) } => {
                write!(f, "The upstream '{upstream}' was too slow: timeouts.{setting} ({after:?}) ran out.")
            }
            Self::UpstreamDisconnected { upstream } => {
                write!(f, "The upstream '{upstream}' broke off the connection before its answer was complete.")
            }
            Self::UpstreamRateLimited { upstream, wait, .. } => {
                let wait = go_duration(u64::try_from(wait.as_millis()).unwrap_or(u64::MAX).max(1));
                write!(f, "The provider of upstream '{upstream}' has no room for this request now, by the limits that it states (provider_limits: follow). Try again in {wait}.")
            }
            Self::FloodGuard { wait } => {
                let ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX).saturating_add(1);
                let wait = go_duration(ms);
                write!(f, "Your address sends more requests than the gateway accepts (server.flood_guard). Try again in {wait}.")
            }
            Self::Overloaded => f.write_str("The gateway already buffers as many request bodies as it may (server.buffered_bodies). Try again in a moment."),
            Self::ShuttingDown => f.write_str("The gateway is shutting down. Try again in a moment."),
            Self::Internal => f.write_str("The gateway failed to process this request because of an internal error."),
        }
    }
}

/// Formats a duration as Go does, and OpenAI in its rate limit headers: `120ms`, `1.5s`, `6m0s`, `1h0m0s`.
pub fn go_duration(ms: u64) -> String {
    let mut text = String::with_capacity(16);
    push_go_duration(&mut text, ms);
    text
}

/// Appends a duration as `go_duration` formats it.
pub(crate) fn push_go_duration(text: &mut String, ms: u64) {
    if (1..1_000).contains(&ms) {
        push_number(text, ms);
        text.push_str("ms");
        return;
    }
    let (hours, minutes, seconds, millis) = (ms / 3_600_000, ms / 60_000 % 60, ms / 1_000 % 60, ms % 1_000);
    if hours > 0 {
        push_number(text, hours);
        text.push('h');
    }
    if hours > 0 || minutes > 0 {
        push_number(text, minutes);
        text.push('m');
    }
    push_number(text, seconds);
    if millis > 0 {
        // The digits of 1000 to 1999 are those of the milliseconds with their zeros in front.
        let mut digits = itoa::Buffer::new();
        let digits = digits.format(1_000 + millis).trim_end_matches('0');
        text.push('.');
        text.push_str(digits.get(1..).unwrap_or_default());
    }
    text.push('s');
}

/// Appends a number in decimal, without the standard library's formatter: each answer has a dozen numbers in its
/// headers.
pub(crate) fn push_number(text: &mut String, number: u64) {
    text.push_str(itoa::Buffer::new().format(number));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_formatted_in_decimal() {
        for number in [0, 9, 10, 12_345, 100_000, u64::MAX] {
            let mut text = "x".to_owned();
            push_number(&mut text, number);
            assert_eq!(text, format!("x{number}"));
        }
    }

    #[test]
    fn durations_are_formatted_as_in_go() {
        for (ms, text) in [
            (0, "0s"),
            (1, "1ms"),
            (120, "120ms"),
            (1_000, "1s"),
            (1_500, "1.5s"),
            (1_050, "1.05s"),
            (360_000, "6m0s"),
            (62_300, "1m2.3s"),
            (3_600_000, "1h0m0s"),
            (90_061_001, "25h1m1.001s"),
        ] {
            assert_eq!(go_duration(ms), text);
        }
    }
}
