//! Every refusal and failure that the gateway itself answers with, and its HTTP shape.

mod dialects;

use crate::api::Dialect;
use crate::body::BodyFault;
use crate::quota::{Denied, Kind, Shortfall, Wait};
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Response, StatusCode};
use std::fmt;
use std::time::Duration;

/// Something a caller is told instead of the upstream's answer. `Display` is for the caller: it names
/// no key, no other caller and no upstream address.
#[derive(Debug)]
pub enum ProxyError {
    /// Nothing is served at this path.
    UnknownPath {
        /// What was asked.
        path: String,
        /// A `base_url` path that would be right.
        base_path: String,
        /// Whose SDK asks.
        dialect: Dialect,
    },
    /// The path is served, but not with this method.
    MethodNotAllowed {
        /// The methods it takes.
        allow: &'static str,
    },
    /// No key, or one that nobody has.
    InvalidKey {
        /// Whether there was one.
        given: bool,
    },
    /// The key belongs to another environment than the path names.
    WrongEnvironment,
    /// The request's head is ambiguous.
    BadHead(&'static str),
    /// It is no HTTP, or its head is too large: the status says which.
    Malformed(StatusCode),
    /// The body is encoded.
    ContentEncoding,
    /// The body is larger than `server.max_request_body`.
    BodyTooLarge {
        /// The setting, in bytes.
        limit: usize,
    },
    /// The body did not arrive.
    BodyIncomplete(&'static str),
    /// The body is not what the API takes.
    Body(BodyFault),
    /// Not on the environment's list.
    ModelNotFound {
        /// As the request names it.
        model: String,
        /// The environment.
        environment: String,
    },
    /// Quotas cannot hold it.
    Quota {
        /// Which ones.
        denied: Denied,
        /// The environment.
        environment: String,
        /// Longer waits say: do not retry.
        patience: Duration,
    },
    /// `max_in_flight` requests are under way.
    TooManyInFlight {
        /// The setting.
        limit: u64,
        /// The environment.
        environment: String,
    },
    /// The counters are shared, and cannot be asked.
    CountersAway {
        /// The environment.
        environment: String,
    },
    /// No connection, or it broke before an answer came.
    UpstreamUnreachable {
        /// The upstream's name in the config.
        upstream: String,
        /// What failed, in general words.
        what: &'static str,
    },
    /// It took too long.
    UpstreamTimeout {
        /// The upstream's name in the config.
        upstream: String,
        /// Which setting ran out, and after how long.
        timeout: (&'static str, Duration),
    },
    /// The answer broke off.
    UpstreamCut {
        /// The upstream's name in the config.
        upstream: String,
    },
    /// One address sends more requests than `server.flood_guard` allows.
    Flood {
        /// Until its next one is let through.
        wait: Duration,
    },
    /// The gateway is about to stop.
    ShuttingDown,
    /// Something in the gateway itself.
    Internal,
}

impl ProxyError {
    /// Status, OpenAI error type and code: the whole contract, in one table.
    pub fn shape(&self) -> (StatusCode, &'static str, &'static str) {
        use StatusCode as S;
        const INVALID: &str = "invalid_request_error";
        match self {
            Self::UnknownPath { .. } => (S::NOT_FOUND, INVALID, "unknown_path"),
            Self::MethodNotAllowed { .. } => (S::METHOD_NOT_ALLOWED, INVALID, "method_not_allowed"),
            Self::InvalidKey { .. } => (S::UNAUTHORIZED, INVALID, "invalid_api_key"),
            Self::WrongEnvironment => (S::FORBIDDEN, INVALID, "wrong_environment"),
            Self::BadHead(_) => (S::BAD_REQUEST, INVALID, "bad_request"),
            Self::Malformed(S::REQUEST_HEADER_FIELDS_TOO_LARGE) => {
                (S::REQUEST_HEADER_FIELDS_TOO_LARGE, INVALID, "headers_too_large")
            }
            Self::Malformed(status) => (*status, INVALID, "bad_request"),
            Self::ContentEncoding => (S::UNSUPPORTED_MEDIA_TYPE, INVALID, "unsupported_content_encoding"),
            Self::BodyTooLarge { .. } => (S::PAYLOAD_TOO_LARGE, INVALID, "request_body_too_large"),
            Self::BodyIncomplete(_) => (S::BAD_REQUEST, INVALID, "request_body_incomplete"),
            Self::Body(BodyFault::Invalid(_)) => (S::BAD_REQUEST, INVALID, "invalid_json"),
            Self::Body(BodyFault::Value { .. }) => (S::BAD_REQUEST, INVALID, "invalid_value"),
            Self::ModelNotFound { .. } => (S::NOT_FOUND, INVALID, "model_not_found"),
            Self::Quota { denied, .. } => quota_shape(denied),
            Self::TooManyInFlight { .. } => (S::TOO_MANY_REQUESTS, "requests", "too_many_in_flight"),
            Self::CountersAway { .. } => (S::SERVICE_UNAVAILABLE, "server_error", "quota_store_unavailable"),
            Self::UpstreamUnreachable { .. } => (S::BAD_GATEWAY, "upstream_error", "upstream_unreachable"),
            Self::UpstreamTimeout { .. } => (S::GATEWAY_TIMEOUT, "upstream_error", "upstream_timeout"),
            Self::UpstreamCut { .. } => (S::BAD_GATEWAY, "upstream_error", "upstream_disconnected"),
            Self::Flood { .. } => (S::TOO_MANY_REQUESTS, "requests", "flood_guard"),
            Self::ShuttingDown => (S::SERVICE_UNAVAILABLE, "server_error", "shutting_down"),
            Self::Internal => (S::INTERNAL_SERVER_ERROR, "server_error", "internal_error"),
        }
    }

    /// The code of the table above.
    pub fn code(&self) -> &'static str {
        self.shape().2
    }

    /// The whole answer, as an SDK of this dialect understands it.
    pub fn into_response(self, dialect: Dialect) -> Response<Vec<u8>> {
        let (status, _, code) = self.shape();
        let mut response = Response::new(self.body(dialect).to_string().into_bytes());
        *response.status_mut() = status;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.insert("x-tollgate-error", HeaderValue::from_static(code));
        self.write_headers(headers);
        response
    }

    fn write_headers(&self, headers: &mut HeaderMap) {
        match self {
            Self::MethodNotAllowed { allow } => {
                headers.insert(header::ALLOW, HeaderValue::from_static(allow));
            }
            Self::Quota { denied, patience, .. } => {
                // A 400 for what never fits has no time at which it would.
                if let Some(Wait::Ms(ms)) = denied.shortfalls().first().map(|s| s.wait) {
                    write_retry_after(headers, ms, *patience);
                }
            }
            Self::Flood { wait } => {
                let ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
                write_retry_after(headers, ms.saturating_add(1), Duration::MAX);
            }
            Self::TooManyInFlight { .. } | Self::CountersAway { .. } | Self::ShuttingDown => {
                headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
            }
            // What breaks the connection's framing, or may have left bytes of a body unread.
            Self::BadHead(_) | Self::Malformed(_) | Self::BodyTooLarge { .. } | Self::BodyIncomplete(_) => {
                headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
            }
            _ => {}
        }
    }
}

/// Status, type and code of a denial: those of the quota that takes longest.
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

fn write_retry_after(headers: &mut HeaderMap, ms: u64, patience: Duration) {
    let ms = ms.max(1);
    headers.insert(header::RETRY_AFTER, HeaderValue::from(ms.div_ceil(1_000)));
    headers.insert(HeaderName::from_static("retry-after-ms"), HeaderValue::from(ms));
    if u128::from(ms) > patience.as_millis() {
        headers.insert(HeaderName::from_static("x-should-retry"), HeaderValue::from_static("false"));
    }
}

impl fmt::Display for ProxyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UnknownPath { path, base_path, dialect } => write!(
                f,
                "Nothing is served at '{path}'. {} reaches this gateway with a base_url that ends in '{base_path}'.",
                dialects::sdk(*dialect)
            ),
            Self::MethodNotAllowed { allow } => write!(f, "This path takes {allow} only."),
            Self::InvalidKey { given: false } => f.write_str(
                "No API key was given. Send the key that the gateway's operator gave you as 'Authorization: Bearer <key>'.",
            ),
            Self::InvalidKey { given: true } => {
                f.write_str("The API key is not one of this gateway's. Ask its operator for one.")
            }
            Self::WrongEnvironment => f.write_str(
                "This API key belongs to another environment than the one asked for. Use its own base_url, or one without an environment.",
            ),
            Self::BadHead(what) => write!(f, "The request's head is refused: {what}."),
            Self::Malformed(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE) => {
                f.write_str("The request's head is too large, or has too many headers.")
            }
            Self::Malformed(_) => f.write_str("The request is not well-formed HTTP/1.1."),
            Self::ContentEncoding => f.write_str("The request body must not be encoded: send it as it is."),
            Self::BodyTooLarge { limit } => {
                write!(f, "The request body is larger than {limit} bytes (server.max_request_body).")
            }
            Self::BodyIncomplete(what) => write!(f, "The request body did not arrive: {what}."),
            Self::Body(fault) => fault.fmt(f),
            Self::ModelNotFound { model, environment } if model.is_empty() => {
                write!(f, "The request names no model; environment '{environment}' serves listed models only.")
            }
            Self::ModelNotFound { model, environment } => {
                write!(f, "The model '{model}' does not exist or environment '{environment}' may not use it.")
            }
            Self::Quota { denied, environment, .. } => write_denial(f, denied, environment),
            Self::TooManyInFlight { limit, environment } => {
                write!(f, "Environment '{environment}' has {limit} requests under way already (max_in_flight). Try again when one has ended.")
            }
            Self::CountersAway { environment } => {
                write!(f, "The quotas of environment '{environment}' cannot be reached, and without them nothing is let through (store.redis.on_failure: closed). Try again in a moment.")
            }
            Self::UpstreamUnreachable { upstream, what } => {
                write!(f, "The upstream '{upstream}' could not be reached: {what}.")
            }
            Self::UpstreamTimeout { upstream, timeout: (setting, after) } => {
                write!(f, "The upstream '{upstream}' took too long: nothing within {after:?} (timeouts.{setting}).")
            }
            Self::UpstreamCut { upstream } => {
                write!(f, "The upstream '{upstream}' broke off before its answer was complete.")
            }
            Self::Flood { wait } => {
                let ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX).saturating_add(1);
                let wait = go_duration(ms);
                write!(f, "Too many requests from your address (server.flood_guard). Try again in {wait}.")
            }
            Self::ShuttingDown => f.write_str("The gateway is shutting down. Try again in a moment."),
            Self::Internal => f.write_str("The gateway failed to handle this request."),
        }
    }
}

fn write_denial(f: &mut fmt::Formatter<'_>, denied: &Denied, environment: &str) -> fmt::Result {
    let Some(Shortfall { quota, used, held, requested, wait, .. }) = denied.shortfalls().first() else {
        return Ok(());
    };
    let (kind, per, limit) = (quota.kind.as_str(), &quota.per.text, quota.limit);
    match wait {
        Wait::Never => write!(
            f,
            "This request can never fit: it asks for {requested} {kind}, and environment '{environment}' holds at most {} per {per}.",
            quota.capacity()
        ),
        Wait::Ms(ms) => write!(
            f,
            "Rate limit reached for environment '{environment}' on {kind} per {per}: limit {limit}, used {used}, held by requests in flight {held}, requested {requested}. Try again in {}.",
            go_duration((*ms).max(1))
        ),
    }
}

/// A duration as Go prints it, and OpenAI in its rate limit headers: `120ms`, `1.5s`, `6m0s`, `1h0m0s`.
pub fn go_duration(ms: u64) -> String {
    use std::fmt::Write as _;
    let mut text = String::with_capacity(16);
    // Writing to a string cannot fail.
    if (1..1_000).contains(&ms) {
        let _ = write!(text, "{ms}ms");
        return text;
    }
    let (hours, minutes, seconds, millis) = (ms / 3_600_000, ms / 60_000 % 60, ms / 1_000 % 60, ms % 1_000);
    if hours > 0 {
        let _ = write!(text, "{hours}h");
    }
    if hours > 0 || minutes > 0 {
        let _ = write!(text, "{minutes}m");
    }
    let _ = write!(text, "{seconds}");
    if millis > 0 {
        let _ = write!(text, ".{millis:03}");
        text.truncate(text.trim_end_matches('0').len());
    }
    text.push('s');
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_as_go_prints_them() {
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
