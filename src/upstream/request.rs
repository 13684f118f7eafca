//! A request to an upstream, and the reasons why it has no answer.

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Method};
use std::error::Error;
use std::fmt;
use std::io;
use std::time::Duration;

/// A request as it is sent to the upstream. Its `Debug` prints no header value, query or body: any of them
/// can hold a key.
pub struct Request {
    /// Its method.
    pub method: Method,
    /// Path and query.
    pub target: String,
    /// All headers except `host` and `content-length`, which the connection adds. They are a list, because they are
    /// only written out.
    pub headers: Vec<(HeaderName, HeaderValue)>,
    /// The whole body.
    pub body: Bytes,
}

impl fmt::Debug for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.target.split('?').next().unwrap_or_default();
        let names: Vec<_> = self.headers.iter().map(|(name, _)| name.as_str()).collect();
        f.debug_struct("Request")
            .field("method", &self.method)
            .field("path", &path)
            .field("headers", &names)
            .field("body_bytes", &self.body.len())
            .finish()
    }
}

/// The reason why there is no answer.
#[derive(Debug)]
pub enum SendError {
    /// No connection could be made, so nothing was sent. The text names the step that failed.
    Unreachable(&'static str, io::Error),
    /// `timeouts.connect` elapsed; nothing was sent.
    ConnectTimeout,
    /// The named timeout, of this length, elapsed before an answer came.
    Timeout(&'static str, Duration),
    /// The connection failed, or the upstream's answer is not valid HTTP, after the request was sent.
    Broken(ExchangeError),
}

impl fmt::Display for SendError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreachable(step, source) => write!(f, "{step}: {source}"),
            Self::ConnectTimeout => {
                f.write_str("the connection was not established in time (timeouts.connect)")
            }
            Self::Timeout(setting, after) => write!(f, "timeouts.{setting} ({after:?}) ran out"),
            Self::Broken(source) => source.fmt(f),
        }
    }
}

/// The failure of one exchange on one connection, before the head of a final answer was complete.
#[derive(Debug)]
pub struct ExchangeError {
    source: io::Error,
    outcome: Outcome,
}

/// Whether the upstream may have processed the request of a failed exchange.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    /// The upstream has not processed it.
    NotProcessed,
    /// The connection was lost before the first byte of an answer. The upstream may have processed it.
    Unanswered,
    /// The upstream may have processed it, or has begun to answer it.
    Unknown,
    /// The head of the answer was not complete in time.
    OutOfTime,
}

impl ExchangeError {
    /// The upstream has certainly not processed the request.
    pub(super) fn not_processed(source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self { source: io::Error::other(source), outcome: Outcome::NotProcessed }
    }

    /// The connection was closed, reset or timed out before the first byte of an answer.
    pub(super) fn unanswered(source: io::Error) -> Self {
        Self { source, outcome: Outcome::Unanswered }
    }

    /// The head of the answer was not complete in time.
    pub(super) fn out_of_time() -> Self {
        Self { source: io::ErrorKind::TimedOut.into(), outcome: Outcome::OutOfTime }
    }

    /// Any other failure: the upstream may have processed the request.
    pub(super) fn unknown(source: io::Error) -> Self {
        Self { source, outcome: Outcome::Unknown }
    }

    /// Whether the upstream has certainly not processed the request, so that it costs nothing.
    pub(super) fn is_not_processed(&self) -> bool {
        self.outcome == Outcome::NotProcessed
    }

    /// Whether the request may be sent again: on a new connection, if this failure occurred on a reused one, or to another
    /// replica. A server that closes an idle connection or dies causes this failure.
    pub(super) fn is_retriable(&self) -> bool {
        matches!(self.outcome, Outcome::NotProcessed | Outcome::Unanswered)
    }

    /// Whether the time for the answer has run out.
    pub(super) fn is_out_of_time(&self) -> bool {
        self.outcome == Outcome::OutOfTime
    }
}

impl fmt::Display for ExchangeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let known = match self.outcome {
            Outcome::NotProcessed => "the upstream did not process the request: ",
            Outcome::Unanswered => "the connection was lost before an answer began: ",
            Outcome::Unknown | Outcome::OutOfTime => "",
        };
        write!(f, "{known}{}", self.source)
    }
}

impl Error for ExchangeError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        Some(&self.source)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_output_of_a_request_contains_no_key_and_no_body() {
        let request = Request {
            method: Method::POST,
            target: "/v1beta/models/m:generateContent?key=sk-canary".into(),
            headers: vec![(http::header::AUTHORIZATION, HeaderValue::from_static("Bearer sk-canary"))],
            body: Bytes::from_static(b"sk-canary"),
        };
        let text = format!("{request:?}");
        assert!(!text.contains("canary") && text.contains("authorization"), "{text}");
    }
}
