//! Reads usage and delivered text from an answer while its bytes pass through unchanged.

use crate::usage::{
    ContentCoding, Decoder, Delivered, Discard, JsonReader, Reported, SseReader, TextToCount,
};
use bytes::Bytes;
use http::HeaderValue;
use http::header::{self, HeaderMap};
use std::collections::VecDeque;
use std::io::{self, Write};

/// Reads an answer's body in the form in which the upstream sends it.
// The large variant is the usual one, and the enclosing `Metered` is boxed.
#[allow(clippy::large_enum_variant)]
pub(super) enum AnswerReader {
    Plain(BodyParser),
    /// Compressed. The caller receives the compressed bytes; a decompressed copy is parsed.
    Compressed(Box<Decoder<BodyParser>>),
    /// Neither SSE nor JSON, or compressed with an unknown coding. Only the bytes are counted.
    Opaque {
        bytes: u64,
        is_compressed: bool,
    },
}

impl Default for AnswerReader {
    fn default() -> Self {
        Self::Opaque { bytes: 0, is_compressed: false }
    }
}

/// Parses the uncompressed body.
pub(super) enum BodyParser {
    Sse(SseReader),
    Json(JsonReader, Delivered),
}

impl Default for BodyParser {
    fn default() -> Self {
        Self::Json(JsonReader::default(), Delivered::default())
    }
}

impl BodyParser {
    fn reported(&self) -> Reported {
        match self {
            Self::Sse(reader) => reader.reported(),
            Self::Json(reader, _) => reader.reported(),
        }
    }

    fn buffered_bytes(&self) -> usize {
        match self {
            Self::Sse(reader) => reader.buffered_bytes(),
            Self::Json(_, received) => received.buffered_bytes(),
        }
    }

    fn take_text(&mut self, was_cut: bool) -> TextToCount {
        match self {
            Self::Sse(reader) => reader.take_text(),
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

/// Parses the output of a decoder. The caller does not receive it.
impl Write for BodyParser {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        match self {
            Self::Sse(reader) => reader.feed(&Bytes::copy_from_slice(data), &mut Discard),
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

impl AnswerReader {
    /// Chooses the parser by the answer's headers. `withholds`: the usage chunk is withheld from the caller, unless
    /// the answer is compressed.
    pub(super) fn new(headers: &HeaderMap, withholds: bool) -> Self {
        let has_prefix = |value: Option<&HeaderValue>, prefix: &[u8]| {
            let start = value.and_then(|value| value.as_bytes().get(..prefix.len()));
            start.is_some_and(|start| start.eq_ignore_ascii_case(prefix))
        };
        let is_compressed = |v: &&HeaderValue| !v.as_bytes().trim_ascii().eq_ignore_ascii_case(b"identity");
        let mut encodings = headers.get_all(header::CONTENT_ENCODING).iter().filter(is_compressed);
        let encoding = encodings.next();
        let content = headers.get(header::CONTENT_TYPE);
        let parser = if has_prefix(content, b"text/event-stream") {
            BodyParser::Sse(SseReader::new(withholds && encoding.is_none()))
        } else if content.is_none() || has_prefix(content, b"application/json") {
            BodyParser::default()
        } else {
            return Self::Opaque { bytes: 0, is_compressed: encoding.is_some() };
        };
        let Some(encoding) = encoding else { return Self::Plain(parser) };
        let coding = ContentCoding::named(encoding.as_bytes()).filter(|_| encodings.next().is_none());
        coding.map_or(Self::Opaque { bytes: 0, is_compressed: true }, |coding| {
            Self::Compressed(Box::new(Decoder::new(coding, parser)))
        })
    }

    /// The SSE parser of an uncompressed stream. The gateway can add events only to an uncompressed stream.
    pub(super) fn as_stream(&mut self) -> Option<&mut SseReader> {
        match self {
            Self::Plain(BodyParser::Sse(reader)) => Some(reader),
            _ => None,
        }
    }

    /// Whether the gateway may withhold or add events, so that the length of the body can change.
    pub(super) fn is_stream(&self) -> bool {
        matches!(self, Self::Plain(BodyParser::Sse(_)))
    }

    /// The SSE parser of a stream, compressed or not.
    pub(super) fn events(&self) -> Option<&SseReader> {
        match self {
            Self::Plain(BodyParser::Sse(reader)) => Some(reader),
            Self::Compressed(decoder) => match decoder.inner() {
                BodyParser::Sse(reader) => Some(reader),
                BodyParser::Json(..) => None,
            },
            _ => None,
        }
    }

    pub(super) fn events_mut(&mut self) -> Option<&mut SseReader> {
        match self {
            Self::Plain(BodyParser::Sse(reader)) => Some(reader),
            Self::Compressed(decoder) => match decoder.inner_mut() {
                BodyParser::Sse(reader) => Some(reader),
                BodyParser::Json(..) => None,
            },
            _ => None,
        }
    }

    /// Whether the answer is compressed and could not be decompressed completely.
    pub(super) fn is_unreadable(&self) -> bool {
        match self {
            Self::Plain(_) => false,
            Self::Compressed(decoder) => decoder.has_failed(),
            Self::Opaque { is_compressed, .. } => *is_compressed,
        }
    }

    /// Reads a piece and appends to `ready` what the caller receives.
    pub(super) fn feed(&mut self, data: Bytes, ready: &mut VecDeque<Bytes>) {
        match self {
            Self::Plain(BodyParser::Sse(reader)) => return reader.feed(&data, ready),
            Self::Plain(BodyParser::Json(reader, received)) => {
                reader.feed(&data);
                received.push_piece(&data);
            }
            Self::Compressed(decoder) => decoder.feed(&data),
            Self::Opaque { bytes, .. } => *bytes += data.len() as u64,
        }
        ready.push_back(data);
    }

    /// Flushes buffered bytes at the end of the answer.
    pub(super) fn finish(&mut self, ready: &mut VecDeque<Bytes>) {
        match self {
            Self::Plain(BodyParser::Sse(reader)) => reader.finish(ready),
            Self::Compressed(decoder) => {
                if let BodyParser::Sse(reader) = decoder.inner_mut() {
                    reader.finish(&mut Discard);
                }
            }
            _ => {}
        }
    }

    /// The usage reported so far.
    pub(super) fn reported(&self) -> Reported {
        match self {
            Self::Plain(plain) => plain.reported(),
            Self::Compressed(decoder) => decoder.inner().reported(),
            Self::Opaque { .. } => Reported::default(),
        }
    }

    /// Bytes buffered for counting.
    pub(super) fn buffered_bytes(&self) -> usize {
        match self {
            Self::Plain(plain) => plain.buffered_bytes(),
            Self::Compressed(decoder) => decoder.inner().buffered_bytes(),
            Self::Opaque { .. } => 0,
        }
    }

    /// Takes the delivered text, to be counted. Bytes that could not be parsed count as one token per four bytes.
    pub(super) fn take_text(&mut self, was_cut: bool) -> TextToCount {
        match self {
            Self::Plain(plain) => plain.take_text(was_cut),
            Self::Compressed(decoder) => {
                let is_cut = was_cut || decoder.has_failed();
                let unread = if is_cut { decoder.undecoded_bytes() } else { 0 };
                let mut texts = decoder.inner_mut().take_text(is_cut);
                texts.known_tokens += unread.div_ceil(4);
                texts
            }
            Self::Opaque { bytes, .. } => TextToCount { texts: Vec::new(), known_tokens: bytes.div_ceil(4) },
        }
    }
}
