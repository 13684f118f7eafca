//! The side glance at the bytes of an answer: what it reports, and what came of it.

use crate::usage::{Coding, Decoder, JsonReader, Nowhere, Received, Reported, SseReader, Texts};
use bytes::Bytes;
use http::HeaderValue;
use http::header::{self, HeaderMap};
use std::collections::VecDeque;
use std::io::{self, Write};

/// Looks at the bytes that pass.
// The large one is the usual one, and lives in a box with the rest of its answer.
#[allow(clippy::large_enum_variant)]
pub(super) enum Reader {
    Plain(Plain),
    /// Passes as it is, and is decoded to be looked at.
    Coded(Box<Decoder<Plain>>),
    /// Neither events nor JSON, or compressed in a way that is not known: only its length is.
    Opaque {
        bytes: u64,
        is_coded: bool,
    },
}

/// What looks at nothing.
impl Default for Reader {
    fn default() -> Self {
        Self::Opaque { bytes: 0, is_coded: false }
    }
}

/// What is looked at, without its code.
pub(super) enum Plain {
    Sse(SseReader),
    Json(JsonReader, Received),
}

impl Default for Plain {
    fn default() -> Self {
        Self::Json(JsonReader::default(), Received::default())
    }
}

impl Plain {
    fn reported(&self) -> Reported {
        match self {
            Self::Sse(reader) => reader.reported(),
            Self::Json(reader, _) => reader.reported(),
        }
    }

    fn kept_bytes(&self) -> usize {
        match self {
            Self::Sse(reader) => reader.kept_bytes(),
            Self::Json(_, received) => received.kept_bytes(),
        }
    }

    fn take_texts(&mut self, was_cut: bool) -> Texts {
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
        }
    }
}

/// What a decoder gives; the caller gets nothing of it.
impl Write for Plain {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        match self {
            Self::Sse(reader) => reader.feed(&Bytes::copy_from_slice(data), &mut Nowhere),
            Self::Json(reader, received) => {
                reader.feed(data);
                received.push_piece(data);
            }
        }
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Reader {
    /// By what the answer's head says of its body. Nothing is withheld from what is compressed.
    pub(super) fn of(headers: &HeaderMap, withholds: bool) -> Self {
        let is = |value: Option<&HeaderValue>, what: &[u8]| {
            value.is_some_and(|v| {
                v.as_bytes().len() >= what.len() && v.as_bytes()[..what.len()].eq_ignore_ascii_case(what)
            })
        };
        let is_coded = |v: &&HeaderValue| !v.as_bytes().trim_ascii().eq_ignore_ascii_case(b"identity");
        let mut encodings = headers.get_all(header::CONTENT_ENCODING).iter().filter(is_coded);
        let encoding = encodings.next();
        let content = headers.get(header::CONTENT_TYPE);
        let plain = if is(content, b"text/event-stream") {
            Plain::Sse(SseReader::new(withholds && encoding.is_none()))
        } else if content.is_none() || is(content, b"application/json") {
            Plain::default()
        } else {
            return Self::Opaque { bytes: 0, is_coded: encoding.is_some() };
        };
        let Some(encoding) = encoding else { return Self::Plain(plain) };
        let coding = Coding::named(encoding.as_bytes()).filter(|_| encodings.next().is_none());
        let decoder = coding.and_then(|coding| Decoder::new(coding, plain).ok());
        decoder.map_or(Self::Opaque { bytes: 0, is_coded: true }, |decoder| Self::Coded(Box::new(decoder)))
    }

    /// A stream that may be ended, or added to, by the gateway.
    pub(super) fn as_stream(&mut self) -> Option<&mut SseReader> {
        match self {
            Self::Plain(Plain::Sse(reader)) => Some(reader),
            _ => None,
        }
    }

    /// Whether the answer may become shorter or longer on its way.
    pub(super) fn is_stream(&self) -> bool {
        matches!(self, Self::Plain(Plain::Sse(_)))
    }

    /// The events of a stream, compressed or not.
    pub(super) fn events(&self) -> Option<&SseReader> {
        match self {
            Self::Plain(Plain::Sse(reader)) => Some(reader),
            Self::Coded(decoder) => match decoder.inner() {
                Plain::Sse(reader) => Some(reader),
                Plain::Json(..) => None,
            },
            _ => None,
        }
    }

    pub(super) fn events_mut(&mut self) -> Option<&mut SseReader> {
        match self {
            Self::Plain(Plain::Sse(reader)) => Some(reader),
            Self::Coded(decoder) => match decoder.inner_mut() {
                Plain::Sse(reader) => Some(reader),
                Plain::Json(..) => None,
            },
            _ => None,
        }
    }

    /// Whether it could not be read to its end, or not at all.
    pub(super) fn is_unreadable(&self) -> bool {
        match self {
            Self::Plain(_) => false,
            Self::Coded(decoder) => decoder.gave_up(),
            Self::Opaque { is_coded, .. } => *is_coded,
        }
    }

    /// Reads a piece and hands on what the caller is to receive.
    pub(super) fn feed(&mut self, data: Bytes, ready: &mut VecDeque<Bytes>) {
        match self {
            Self::Plain(Plain::Sse(reader)) => return reader.feed(&data, ready),
            Self::Plain(Plain::Json(reader, received)) => {
                reader.feed(&data);
                received.push_piece(&data);
            }
            Self::Coded(decoder) => decoder.feed(&data),
            Self::Opaque { bytes, .. } => *bytes += data.len() as u64,
        }
        ready.push_back(data);
    }

    /// The answer has ended.
    pub(super) fn finish(&mut self, ready: &mut VecDeque<Bytes>) {
        match self {
            Self::Plain(Plain::Sse(reader)) => reader.finish(ready),
            Self::Coded(decoder) => {
                if let Plain::Sse(reader) = decoder.inner_mut() {
                    reader.finish(&mut Nowhere);
                }
            }
            _ => {}
        }
    }

    /// What was reported so far.
    pub(super) fn reported(&self) -> Reported {
        match self {
            Self::Plain(plain) => plain.reported(),
            Self::Coded(decoder) => decoder.inner().reported(),
            Self::Opaque { .. } => Reported::default(),
        }
    }

    /// Bytes that have been kept to be counted.
    pub(super) fn kept_bytes(&self) -> usize {
        match self {
            Self::Plain(plain) => plain.kept_bytes(),
            Self::Coded(decoder) => decoder.inner().kept_bytes(),
            Self::Opaque { .. } => 0,
        }
    }

    /// What came and has to be counted; of what could not be read one token for four bytes.
    pub(super) fn take_texts(&mut self, was_cut: bool) -> Texts {
        match self {
            Self::Plain(plain) => plain.take_texts(was_cut),
            Self::Coded(decoder) => {
                let is_cut = was_cut || decoder.gave_up();
                let unread = if is_cut { decoder.unread() } else { 0 };
                let mut texts = decoder.inner_mut().take_texts(is_cut);
                texts.tokens += unread.div_ceil(4);
                texts
            }
            Self::Opaque { bytes, .. } => Texts { texts: Vec::new(), tokens: bytes.div_ceil(4) },
        }
    }
}
