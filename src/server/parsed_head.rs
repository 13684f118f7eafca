//! Checks a request head that hyper has parsed. For HTTP/1.1, `request_check` has checked its bytes before. HTTP/2 has other
//! bytes, so the rules that concern its headers are applied here.

use super::MAX_HEAD_BYTES;
use super::request_check::{AMBIGUOUS_NAME, NOT_A_TARGET, SEVERAL_FRAMINGS, is_ambiguous_name, is_host};
use crate::error::ProxyError;
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::request::Parts;
use http::{Method, Request, StatusCode, Uri, Version};

/// Maximum number of headers of a request.
const MAX_HEADERS: usize = 100;
/// What HTTP/2 adds to the size of each header: RFC 9113, section 6.5.2.
const HEADER_OVERHEAD: usize = 32;

/// A request head that hyper has parsed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ParsedHead<'h> {
    method: &'h Method,
    uri: &'h Uri,
    version: Version,
    headers: &'h HeaderMap,
}

impl<'h> From<&'h Parts> for ParsedHead<'h> {
    fn from(head: &'h Parts) -> Self {
        Self { method: &head.method, uri: &head.uri, version: head.version, headers: &head.headers }
    }
}

impl<'h, B> From<&'h Request<B>> for ParsedHead<'h> {
    fn from(request: &'h Request<B>) -> Self {
        let (method, uri, headers) = (request.method(), request.uri(), request.headers());
        Self { method, uri, version: request.version(), headers }
    }
}

/// Why a head is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HeadFault {
    /// It has too many headers, or too many bytes.
    TooLarge,
    /// The reason, which follows "The request head is not accepted: ".
    Invalid(&'static str),
}

impl From<HeadFault> for ProxyError {
    fn from(fault: HeadFault) -> Self {
        match fault {
            HeadFault::TooLarge => Self::MalformedHttp(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE),
            HeadFault::Invalid(reason) => Self::InvalidHead(reason),
        }
    }
}

impl ParsedHead<'_> {
    /// Refuses a head that is too large, and one that two servers could read differently. `requires_host`: whether HTTP/1.1
    /// must name a host.
    pub(crate) fn check(self, requires_host: bool) -> Result<(), HeadFault> {
        if self.headers.len() > MAX_HEADERS {
            return Err(HeadFault::TooLarge);
        }
        if self.version == Version::HTTP_2 {
            self.check_http2()?;
        }
        self.check_hosts(requires_host).map_err(HeadFault::Invalid)
    }

    fn check_http2(self) -> Result<(), HeadFault> {
        let size =
            |(name, value): (&HeaderName, &HeaderValue)| name.as_str().len() + value.len() + HEADER_OVERHEAD;
        if self.headers.iter().map(size).sum::<usize>() > MAX_HEAD_BYTES {
            return Err(HeadFault::TooLarge);
        }
        if self.method == Method::CONNECT {
            return Err(HeadFault::Invalid(NOT_A_TARGET));
        }
        if self.headers.keys().any(|name| is_ambiguous_name(name.as_str().as_bytes())) {
            return Err(HeadFault::Invalid(AMBIGUOUS_NAME));
        }
        if self.headers.get_all(header::CONTENT_LENGTH).iter().nth(1).is_some() {
            return Err(HeadFault::Invalid(SEVERAL_FRAMINGS));
        }
        Ok(())
    }

    fn check_hosts(self, requires_host: bool) -> Result<(), &'static str> {
        let mut hosts = self.headers.get_all(header::HOST).iter();
        let host = hosts.next();
        if hosts.next().is_some() {
            return Err("it has more than one Host header");
        }
        if host.is_none() && requires_host && self.version == Version::HTTP_11 {
            return Err("it has no Host header");
        }
        // For HTTP/1.1 this was checked before the head was parsed.
        if self.version == Version::HTTP_2 && host.is_some_and(|host| !is_host(host.as_bytes())) {
            return Err("its Host header is not a host name or address with an optional port");
        }
        if let (Some(authority), Some(host)) = (self.uri.authority(), host)
            && !authority.as_str().as_bytes().eq_ignore_ascii_case(host.as_bytes())
        {
            return Err("the host in its target differs from its Host header");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fault(method: &str, headers: &[(&str, &str)], version: Version) -> Option<HeadFault> {
        let mut request = Request::builder().method(method).uri("http://gate/v1/models").version(version);
        for (name, value) in headers.iter().chain(&[("host", "gate")]) {
            request = request.header(*name, *value);
        }
        ParsedHead::from(&request.body(()).unwrap()).check(true).err()
    }

    #[test]
    fn a_head_of_http2_is_refused_where_one_of_http1_is() {
        let long = "v".repeat(MAX_HEAD_BYTES);
        let invalid = |reason| Some(HeadFault::Invalid(reason));
        for (method, headers, expected) in [
            ("POST", vec![("content_length", "0")], invalid(AMBIGUOUS_NAME)),
            ("POST", vec![("transfer_encoding", "chunked")], invalid(AMBIGUOUS_NAME)),
            ("POST", vec![("content-length", "1"), ("content-length", "1")], invalid(SEVERAL_FRAMINGS)),
            ("CONNECT", vec![], invalid(NOT_A_TARGET)),
            ("POST", vec![("x-long", &*long)], Some(HeadFault::TooLarge)),
            ("POST", vec![("content-length", "1"), ("content_type", "a"), ("x", "b")], None),
        ] {
            assert_eq!(fault(method, &headers, Version::HTTP_2), expected, "{method} {headers:.60?}");
            // For HTTP/1.1, these are found in the bytes.
            assert_eq!(fault(method, &headers, Version::HTTP_11), None, "{method} {headers:.60?}");
        }
        let many = vec![("x", "1"); MAX_HEADERS];
        assert_eq!(fault("POST", &many, Version::HTTP_11), Some(HeadFault::TooLarge));
        assert_eq!(fault("POST", &many[1..], Version::HTTP_11), None);
    }
}
