//! Replaces the answers that hyper makes to malformed requests. Hyper's answers have no body. The replacements have a
//! body that the caller's SDK can parse.

use crate::api::Dialect;
use crate::error::ProxyError;
use crate::telemetry::EventCount;
use http::StatusCode;
use std::net::IpAddr;

/// Requests that hyper refused.
static REFUSED: EventCount = EventCount::new();
/// The only headers of an answer that hyper makes.
const HYPER_HEADERS: [&[u8]; 3] = [b"connection", b"content-length", b"date"];

/// The error that replaces `answer`, if hyper made that one. Call this only for the first bytes that hyper
/// writes after a request head that the service has not received. A body can contain the same bytes. `refused_head`: the
/// reason why hyper did not receive that head.
pub(super) fn replacement_for(answer: &[u8], refused_head: Option<&'static str>) -> Option<ProxyError> {
    let status = answer.strip_prefix(b"HTTP/1.1 ")?.get(..3)?;
    let head = answer.strip_suffix(b"\r\n\r\n").filter(|_| status[0] == b'4')?;
    let is_from_hyper = |line: &[u8]| {
        let colon = memchr::memchr(b':', line);
        colon.is_some_and(|at| HYPER_HEADERS.iter().any(|name| line[..at].eq_ignore_ascii_case(name)))
    };
    if !head.split(|&b| b == b'\n').skip(1).all(is_from_hyper) {
        return None;
    }
    let status = StatusCode::from_bytes(status).ok()?;
    let refused = refused_head.filter(|_| status == StatusCode::BAD_REQUEST).map(ProxyError::InvalidHead);
    Some(refused.unwrap_or(ProxyError::MalformedHttp(status)))
}

/// Logs a request that was refused before the service received it. Such a request has no line of its own.
pub(super) fn log(error: &ProxyError, address: IpAddr) {
    if let Some(requests) = REFUSED.add() {
        tracing::info!(requests, %address, %error, "requests were refused because of their head");
    }
}

/// The answer with this error.
pub(super) fn encode(error: &ProxyError) -> Vec<u8> {
    let (parts, body) = error.response(Dialect::OpenAi).into_parts();
    let mut answer = format!("HTTP/1.1 {}\r\n", parts.status).into_bytes();
    let mut put = |name: &str, value: &[u8]| {
        answer.extend([name.as_bytes(), b": ", value, b"\r\n"].concat());
    };
    parts.headers.iter().for_each(|(name, value)| put(name.as_str(), value.as_bytes()));
    put("content-length", body.len().to_string().as_bytes());
    answer.extend_from_slice(b"\r\n");
    answer.extend_from_slice(&body);
    answer
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_answers_that_hyper_made_are_replaced() {
        let from_hyper = "HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\ndate: now\r\n\r\n";
        let replacement =
            String::from_utf8(encode(&replacement_for(from_hyper.as_bytes(), None).unwrap())).unwrap();
        assert!(replacement.starts_with("HTTP/1.1 431 Request Header Fields Too Large\r\n"), "{replacement}");
        assert!(replacement.contains("\r\nconnection: close\r\n"), "{replacement}");
        assert!(replacement.ends_with("}}"), "{replacement}");
        for other in [
            &from_hyper.replace("date", "x-request-id"),
            &from_hyper.replace("431", "200"),
            &format!("{from_hyper}body"),
            "HTTP/1.1 4",
            "",
        ] {
            assert!(replacement_for(other.as_bytes(), None).is_none(), "{other}");
        }
    }
}
