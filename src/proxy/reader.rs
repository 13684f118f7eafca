//! The side glance at the bytes of an answer: what it reports, and what came of it.

use crate::usage::{JsonReader, Received, Reported, SseReader, Texts};
use bytes::Bytes;
use http::HeaderValue;
use http::header::{self, HeaderMap};
use std::collections::VecDeque;

/// Looks at the bytes that pass.
pub(super) enum Reader {
    Sse(SseReader),
    Json(JsonReader, Received),
    /// Compressed, or not JSON: only its length is known.
    Opaque(u64),
}

impl Reader {
    /// By what the answer's head says of its body.
    pub(super) fn of(headers: &HeaderMap, withholds: bool) -> Self {
        let is = |value: Option<&HeaderValue>, what: &[u8]| {
            value.is_some_and(|v| {
                v.as_bytes().len() >= what.len() && v.as_bytes()[..what.len()].eq_ignore_ascii_case(what)
            })
        };
        let encoding = headers.get(header::CONTENT_ENCODING);
        let content = headers.get(header::CONTENT_TYPE);
        if encoding.is_some() && !is(encoding, b"identity") {
            Self::Opaque(0)
        } else if is(content, b"text/event-stream") {
            Self::Sse(SseReader::new(withholds))
        } else if content.is_none() || is(content, b"application/json") {
            Self::Json(JsonReader::default(), Received::default())
        } else {
            Self::Opaque(0)
        }
    }

    /// Reads a piece and hands on what the caller is to receive.
    pub(super) fn feed(&mut self, data: Bytes, ready: &mut VecDeque<Bytes>) {
        match self {
            Self::Sse(reader) => reader.feed(&data, ready),
            Self::Json(reader, received) => {
                reader.feed(&data);
                received.push_piece(&data);
                ready.push_back(data);
            }
            Self::Opaque(bytes) => {
                *bytes += data.len() as u64;
                ready.push_back(data);
            }
        }
    }

    /// The answer has ended.
    pub(super) fn finish(&mut self, ready: &mut VecDeque<Bytes>) {
        if let Self::Sse(reader) = self {
            reader.finish(ready);
        }
    }

    /// What was reported so far.
    pub(super) fn reported(&self) -> Reported {
        match self {
            Self::Sse(reader) => reader.reported(),
            Self::Json(reader, _) => reader.reported(),
            Self::Opaque(_) => Reported::default(),
        }
    }

    /// Bytes that have been kept to be counted.
    pub(super) fn kept_bytes(&self) -> usize {
        match self {
            Self::Sse(reader) => reader.kept_bytes(),
            Self::Json(_, received) => received.kept_bytes(),
            Self::Opaque(_) => 0,
        }
    }

    /// What came and has to be counted.
    pub(super) fn take_texts(&mut self, was_cut: bool) -> Texts {
        match self {
            Self::Sse(reader) => reader.take_texts(),
            Self::Json(reader, received) => {
                let received = std::mem::take(received);
                if was_cut && !reader.is_complete() {
                    received.finish_cut_document()
                } else {
                    received.finish_document()
                }
            }
            Self::Opaque(bytes) => Texts { texts: Vec::new(), tokens: bytes.div_ceil(4) },
        }
    }
}
