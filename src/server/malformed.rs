//! What the HTTP machinery answers by itself, when a request is no HTTP or its head too large, has no
//! body. Callers get one that their SDK understands.

use crate::api::Dialect;
use crate::error::ProxyError;
use http::StatusCode;

/// Headers of an answer that nobody but the machinery has made.
const ITS_OWN: [&[u8]; 3] = [b"connection", b"content-length", b"date"];

/// The answer to be written in place of this one, if the machinery has made it.
pub(super) fn instead_of(answer: &[u8]) -> Option<Vec<u8>> {
    let status = answer.strip_prefix(b"HTTP/1.1 ")?.get(..3)?;
    let head = answer.strip_suffix(b"\r\n\r\n").filter(|_| status[0] == b'4')?;
    let is_its_own = |line: &[u8]| {
        let colon = memchr::memchr(b':', line);
        colon.is_some_and(|at| ITS_OWN.iter().any(|name| line[..at].eq_ignore_ascii_case(name)))
    };
    if !head.split(|&b| b == b'\n').skip(1).all(is_its_own) {
        return None;
    }
    Some(whole_answer(ProxyError::MalformedHttp(StatusCode::from_bytes(status).ok()?)))
}

fn whole_answer(error: ProxyError) -> Vec<u8> {
    let (parts, body) = error.into_response(Dialect::OpenAi).into_parts();
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
    fn only_what_nobody_else_has_made_is_replaced() {
        let its_own = "HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\ndate: now\r\n\r\n";
        let instead = String::from_utf8(instead_of(its_own.as_bytes()).unwrap()).unwrap();
        assert!(instead.starts_with("HTTP/1.1 431 Request Header Fields Too Large\r\n"), "{instead}");
        assert!(instead.contains("\r\nconnection: close\r\n") && instead.ends_with("}}"), "{instead}");
        for not_its_own in [
            &its_own.replace("date", "x-request-id"),
            &its_own.replace("431", "200"),
            &format!("{its_own}body"),
            "HTTP/1.1 4",
            "",
        ] {
            assert!(instead_of(not_its_own.as_bytes()).is_none(), "{not_its_own}");
        }
    }
}
