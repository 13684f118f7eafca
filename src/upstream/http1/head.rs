//! The heads of requests and answers, and the framing of an answer's body.

use crate::upstream::request::Request;
use bytes::{Buf as _, BytesMut};
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Method, StatusCode, response};
use smallvec::SmallVec;
use std::io::{self, ErrorKind, Write as _};
use std::mem::MaybeUninit;

/// Maximum length of an answer's head, in bytes. It also bounds the number of headers.
const MAX_HEAD_BYTES: usize = 64 * 1024;
/// An answer with more headers needs an allocation for its parser.
const USUAL_HEADERS: usize = 128;
/// The gateway adds one header to an answer over HTTP/1.1: the mark of its header lines. The map has room for it.
const ADDED_HEADERS: usize = 1;

/// The head of an answer.
#[derive(Debug)]
pub(super) struct AnswerHead {
    pub(super) parts: response::Parts,
    pub(super) framing: Framing,
    /// Whether the connection can be reused after the answer.
    pub(super) keeps_alive: bool,
}

/// How the end of an answer's body is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Framing {
    /// By `content-length`.
    Length(u64),
    /// By `transfer-encoding: chunked`.
    Chunked,
    /// The upstream closes the connection.
    UntilClose,
}

/// An error for bytes that are not valid HTTP/1.1.
pub(super) fn invalid(what: &'static str) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, what)
}

/// Encodes the head of a request.
pub(super) fn encode(authority: &str, request: &Request) -> Vec<u8> {
    let mut head = Vec::with_capacity(1_024);
    let mut put = |parts: [&[u8]; 4]| parts.iter().for_each(|part| head.extend_from_slice(part));
    put([request.method.as_str().as_bytes(), b" ", request.target.as_bytes(), b" HTTP/1.1\r\n"]);
    put([b"host: ", authority.as_bytes(), b"\r\n", b""]);
    for (name, value) in &request.headers {
        put([name.as_str().as_bytes(), b": ", value.as_bytes(), b"\r\n"]);
    }
    if request.method != Method::GET || !request.body.is_empty() {
        // Writing to a vector cannot fail, and does not allocate as `to_string` would.
        drop(write!(head, "content-length: {}\r\n", request.body.len()));
    }
    head.extend_from_slice(b"\r\n");
    head
}

/// Finds the head of an answer whose bytes arrive in pieces. An incomplete head is parsed again only when it is twice as long or
/// has an empty line. So the time is linear, however small the pieces are.
#[derive(Debug, Default)]
pub(super) struct HeadSearch {
    /// The length that was parsed last.
    parsed: usize,
    /// The length that was searched for an empty line.
    searched: usize,
    /// Bytes of empty lines before the head.
    skipped: usize,
}

impl HeadSearch {
    /// Removes a head from the front of the buffer; `None` if it is not complete. `method` is the request's.
    pub(super) fn take(&mut self, buffer: &mut BytesMut, method: &Method) -> io::Result<Option<AnswerHead>> {
        if self.parsed == 0 {
            let begin = buffer.iter().position(|&b| b != b'\r' && b != b'\n').unwrap_or(buffer.len());
            buffer.advance(begin);
            self.skipped += begin;
            if self.skipped > MAX_HEAD_BYTES {
                return Err(invalid("there are too many empty lines before the answer's head"));
            }
        }
        if buffer.is_empty() || !self.is_due(buffer) {
            return Ok(None);
        }
        self.parsed = buffer.len();
        let head = take(buffer, method)?;
        if head.is_some() {
            *self = Self::default();
        }
        Ok(head)
    }

    /// Whether bytes have arrived that are no longer in the buffer.
    pub(super) fn has_skipped(&self) -> bool {
        self.skipped > 0
    }

    fn is_due(&mut self, bytes: &[u8]) -> bool {
        let new = &bytes[self.searched.saturating_sub(2)..];
        self.searched = bytes.len();
        let has = |line: &[u8]| memchr::memmem::find(new, line).is_some();
        bytes.len() >= 2 * self.parsed || bytes.len() > MAX_HEAD_BYTES || has(b"\n\r\n") || has(b"\n\n")
    }
}

/// Removes a head from the front of the buffer; `None` if it is not complete.
fn take(buffer: &mut BytesMut, method: &Method) -> io::Result<Option<AnswerHead>> {
    let mut fields = [const { MaybeUninit::uninit() }; USUAL_HEADERS];
    let mut spans = SmallVec::new();
    let parsed = match parse(&mut fields, buffer, &mut spans) {
        Err(httparse::Error::TooManyHeaders) => {
            // Each header takes a line.
            let head = &buffer[..buffer.len().min(MAX_HEAD_BYTES)];
            let lines = memchr::memchr_iter(b'\n', head).count();
            parse(&mut vec![MaybeUninit::uninit(); lines], buffer, &mut spans)
        }
        parsed => parsed,
    };
    let parsed = parsed.map_err(|e| io::Error::new(ErrorKind::InvalidData, e))?;
    if parsed.as_ref().map_or(buffer.len(), |head| head.length) > MAX_HEAD_BYTES {
        return Err(invalid("the answer's head is too long"));
    }
    let Some(ParsedHead { length, status, is_http11 }) = parsed else { return Ok(None) };
    let status = StatusCode::from_u16(status).map_err(|_| invalid("the status is not valid"))?;
    let bytes = buffer.split_to(length).freeze();
    let too_many = || invalid("the answer has too many headers");
    let mut headers = HeaderMap::try_with_capacity(spans.len() + ADDED_HEADERS).map_err(|_| too_many())?;
    for (name, at, length) in spans.drain(..) {
        let name = name.ok_or_else(|| invalid("a header name is not valid"))?;
        let value = HeaderValue::from_maybe_shared(bytes.slice(at..at + length))
            .map_err(|_| invalid("a header value is not valid"))?;
        headers.try_append(name, value).map_err(|_| too_many())?;
    }
    let framing = framing(&headers, status, method)?;
    let keeps_alive = is_http11 && framing != Framing::UntilClose && !has_connection_close(&headers);
    let (mut parts, ()) = http::Response::new(()).into_parts();
    parts.status = status;
    parts.headers = headers;
    Ok(Some(AnswerHead { parts, framing, keeps_alive }))
}

/// A complete head.
struct ParsedHead {
    length: usize,
    status: u16,
    is_http11: bool,
}

/// Name, position and length of each value: the values share the bytes of the head without a copy. No name: it is not
/// valid.
type Spans = SmallVec<[(Option<HeaderName>, usize, usize); 16]>;

/// Parses a head with these fields, and adds its headers to `spans`; `None`: it is not complete.
fn parse<'b>(
    fields: &mut [MaybeUninit<httparse::Header<'b>>],
    buffer: &'b [u8],
    spans: &mut Spans,
) -> Result<Option<ParsedHead>, httparse::Error> {
    let mut head = httparse::Response::new(&mut []);
    let parsed =
        httparse::ParserConfig::default().parse_response_with_uninit_headers(&mut head, buffer, fields)?;
    let httparse::Status::Complete(length) = parsed else { return Ok(None) };
    let base = buffer.as_ptr() as usize;
    let span = |h: &httparse::Header| {
        let name = HeaderName::from_bytes(h.name.as_bytes()).ok();
        (name, h.value.as_ptr() as usize - base, h.value.len())
    };
    spans.extend(head.headers.iter().map(span));
    Ok(Some(ParsedHead { length, status: head.code.unwrap_or(0), is_http11: head.version == Some(1) }))
}

fn has_connection_close(headers: &HeaderMap) -> bool {
    let values = headers.get_all(header::CONNECTION).iter();
    let mut tokens = values.flat_map(|value| value.as_bytes().split(|&b| b == b','));
    tokens.any(|token| token.trim_ascii().eq_ignore_ascii_case(b"close"))
}

/// Determines the framing by RFC 9112, section 6.3. Differing lengths, or a length together with a transfer coding,
/// are rejected as response smuggling.
fn framing(headers: &HeaderMap, status: StatusCode, method: &Method) -> io::Result<Framing> {
    let mut codings = headers.get_all(header::TRANSFER_ENCODING).iter();
    let mut lengths = headers.get_all(header::CONTENT_LENGTH).iter();
    let (coding, length) = (codings.next(), lengths.next());
    if codings.next().is_some()
        || lengths.any(|l| Some(l) != length)
        || (coding.is_some() && length.is_some())
    {
        return Err(invalid("the answer's length is ambiguous"));
    }
    if method == Method::HEAD
        || status.is_informational()
        || status == StatusCode::NO_CONTENT
        || status == StatusCode::NOT_MODIFIED
    {
        return Ok(Framing::Length(0));
    }
    if let Some(coding) = coding {
        return if coding.as_bytes().trim_ascii().eq_ignore_ascii_case(b"chunked") {
            Ok(Framing::Chunked)
        } else {
            Err(invalid("the answer has a transfer coding other than chunked"))
        };
    }
    let Some(length) = length else { return Ok(Framing::UntilClose) };
    let digits = length.to_str().ok().filter(|l| !l.is_empty() && l.bytes().all(|b| b.is_ascii_digit()));
    let length =
        digits.and_then(|l| l.parse().ok()).ok_or_else(|| invalid("the answer's length is not a number"))?;
    Ok(Framing::Length(length))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(head: &str) -> io::Result<Option<AnswerHead>> {
        HeadSearch::default().take(&mut BytesMut::from(head), &Method::POST)
    }

    #[test]
    fn a_head_in_small_pieces_is_found_at_its_end_and_takes_linear_time() {
        let head = format!("\r\n\nHTTP/1.1 200 OK\r\n{}content-length: 1\r\n\r\n", "a: b\r\n".repeat(40));
        for (ends, head) in [("CR and LF", head.clone()), ("LF", head.replace('\r', ""))] {
            let (mut search, mut buffer) = (HeadSearch::default(), BytesMut::new());
            for &byte in &head.as_bytes()[..head.len() - 1] {
                buffer.extend_from_slice(&[byte]);
                assert!(search.take(&mut buffer, &Method::POST).unwrap().is_none(), "{ends}");
            }
            buffer.extend_from_slice(b"\nrest");
            assert!(search.take(&mut buffer, &Method::POST).unwrap().is_some(), "{ends}");
            assert_eq!(&buffer[..], b"rest", "{ends}");
        }
        let (mut search, mut buffer, mut parsed) = (HeadSearch::default(), BytesMut::new(), 0);
        for &byte in format!("HTTP/1.1 200 OK\r\n{}", "a: b\r\n".repeat(9_000)).as_bytes() {
            buffer.extend_from_slice(&[byte]);
            let before = search.parsed;
            assert!(search.take(&mut buffer, &Method::POST).unwrap().is_none());
            parsed += if search.parsed == before { 0 } else { search.parsed };
        }
        assert!(parsed <= 2 * buffer.len(), "{parsed} bytes were parsed of {}", buffer.len());
    }

    #[test]
    fn empty_lines_before_a_head_are_bounded() {
        let mut search = HeadSearch::default();
        assert!(search.take(&mut BytesMut::from("\r\n"), &Method::POST).unwrap().is_none());
        assert!(search.has_skipped());
        let mut lines = BytesMut::from(&*"\n".repeat(MAX_HEAD_BYTES));
        assert!(search.take(&mut lines, &Method::POST).is_err());
    }

    #[test]
    fn a_head_determines_the_framing_of_its_body() {
        for (fields, framing, keeps_alive) in [
            ("content-length: 12\r\n", Framing::Length(12), true),
            ("Transfer-Encoding: Chunked\r\n", Framing::Chunked, true),
            ("connection: keep-alive, Close\r\ncontent-length: 1\r\n", Framing::Length(1), false),
            ("content-length: 7\r\ncontent-length: 7\r\n", Framing::Length(7), true),
            ("", Framing::UntilClose, false),
        ] {
            let head = parse(&format!("HTTP/1.1 200 OK\r\n{fields}\r\n")).unwrap().unwrap();
            assert_eq!((head.framing, head.keeps_alive), (framing, keeps_alive), "{fields}");
        }
        assert_eq!(parse("HTTP/1.1 204 No Content\r\n\r\n").unwrap().unwrap().framing, Framing::Length(0));
        assert!(!parse("HTTP/1.0 200 OK\r\ncontent-length: 1\r\n\r\n").unwrap().unwrap().keeps_alive);
        assert!(parse("HTTP/1.1 200 OK\r\ncontent-le").unwrap().is_none());
    }

    #[test]
    fn a_long_head_is_rejected_whether_it_is_complete_or_not() {
        let head = |bytes: usize, end: &str| format!("HTTP/1.1 200 OK\r\na: {}{end}", "x".repeat(bytes));
        assert!(parse(&head(60_000, "\r\n\r\n")).unwrap().is_some());
        assert!(parse(&head(60_000, "")).unwrap().is_none());
        for end in ["\r\n\r\n", ""] {
            assert!(parse(&head(70_000, end)).is_err());
        }
    }

    #[test]
    fn an_ambiguous_length_is_rejected() {
        for fields in [
            "content-length: 1\r\ncontent-length: 2\r\n",
            "content-length: 1\r\ntransfer-encoding: chunked\r\n",
            "transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n",
            "transfer-encoding: gzip, chunked\r\n",
            "content-length: +1\r\n",
            "content-length: -1\r\n",
            "content-length: 1, 1\r\n",
            "content-length: 99999999999999999999\r\n",
        ] {
            assert!(parse(&format!("HTTP/1.1 200 OK\r\n{fields}\r\n")).is_err(), "{fields}");
        }
    }

    proptest! {
        #[test]
        fn no_answer_makes_the_parser_panic(wire in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = HeadSearch::default().take(&mut BytesMut::from(&wire[..]), &Method::POST);
        }
    }
}
