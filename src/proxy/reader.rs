//! Reads usage and delivered text from an answer while its bytes pass through unchanged.

use super::body_parser::{BodyParser, ParseRules};
use crate::usage::{
    AnswerIds, BodyFormat, ContentCoding, Decoder, Discard, Reported, SseReader, TextToCount,
};
use bytes::Bytes;
use http::header::{self, HeaderMap};
use http::response;
use std::collections::VecDeque;

/// Reads an answer's body in the form in which the upstream sends it.
#[derive(Default)]
pub(super) struct AnswerReader {
    body: EncodedBody,
    label: Option<BodyFormat>,
    /// Whether the caller is promised the length of the body, so that no event can be withheld or added.
    has_fixed_length: bool,
}

/// How the headers of a message describe the compression of its body.
pub(super) enum BodyCoding {
    Plain,
    Known(ContentCoding),
    /// An unknown coding, or more than one.
    Unknown,
}

impl BodyCoding {
    pub(super) fn of(headers: &HeaderMap) -> Self {
        // An empty member of the list means nothing (RFC 9110, 5.6.1).
        let is_compressed = |name: &&[u8]| !name.is_empty() && !name.eq_ignore_ascii_case(b"identity");
        let lists = headers.get_all(header::CONTENT_ENCODING).iter();
        let names =
            lists.flat_map(|list| list.as_bytes().split(|&byte| byte == b',')).map(<[u8]>::trim_ascii);
        let mut codings = names.filter(is_compressed);
        let Some(first) = codings.next() else { return Self::Plain };
        let known = ContentCoding::named(first).filter(|_| codings.next().is_none());
        known.map_or(Self::Unknown, Self::Known)
    }
}

/// A body with or without compression.
// The large variant is the usual one, and the enclosing `Metered` is boxed.
#[allow(clippy::large_enum_variant)]
enum EncodedBody {
    Plain(BodyParser),
    /// Compressed. The caller receives the compressed bytes; a decompressed copy is parsed.
    Compressed(Box<Decoder<BodyParser>>),
    /// Compressed with an unknown coding. Only the bytes are counted.
    Undecodable {
        bytes: u64,
    },
}

impl Default for EncodedBody {
    fn default() -> Self {
        Self::Plain(BodyParser::default())
    }
}

/// What the reader has to know of the request and of the status of its answer.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct AnswerFacts {
    /// The usage chunk is withheld from the caller, unless the answer is compressed.
    pub(super) withholds: bool,
    /// The number of choices that the request names.
    pub(super) choices: u64,
    pub(super) is_success: bool,
    /// Whether the body is known to begin as an event stream, whatever its label.
    pub(super) begins_as_stream: bool,
    /// Whether a model answers. Usage in any other answer counts only if its label is JSON or an event stream: a
    /// stored file can look like an answer.
    pub(super) is_of_model: bool,
}

impl AnswerReader {
    /// Prepares for an answer with these headers.
    pub(super) fn new(headers: &HeaderMap, facts: AnswerFacts) -> Self {
        let label = labelled_format(headers);
        let coding = BodyCoding::of(headers);
        let is_plain = matches!(coding, BodyCoding::Plain);
        let is_stream = is_plain && (label == Some(BodyFormat::Sse) || facts.begins_as_stream);
        let has_fixed_length = headers.contains_key(header::CONTENT_LENGTH) && !is_stream;
        let may_be_stream = is_stream || facts.is_success && !has_fixed_length;
        let withholds = facts.withholds && is_plain && may_be_stream;
        let rules = ParseRules { label, withholds, choices: facts.choices };
        let parser =
            if label.is_some() || facts.is_of_model { BodyParser::new(rules) } else { BodyParser::default() };
        let body = match coding {
            BodyCoding::Plain => EncodedBody::Plain(parser),
            BodyCoding::Known(coding) => EncodedBody::Compressed(Box::new(Decoder::new(coding, parser))),
            BodyCoding::Unknown => EncodedBody::Undecodable { bytes: 0 },
        };
        Self { body, label, has_fixed_length }
    }

    /// The SSE parser of an uncompressed stream to which the gateway may add events.
    pub(super) fn as_stream(&mut self) -> Option<&mut SseReader> {
        match &mut self.body {
            EncodedBody::Plain(parser) if !self.has_fixed_length => parser.as_stream(),
            _ => None,
        }
    }

    /// Whether the caller is promised the length that the upstream declares.
    pub(super) fn has_fixed_length(&self) -> bool {
        self.has_fixed_length
    }

    /// Whether the answer is labelled as an event stream.
    pub(super) fn is_labelled_as_stream(&self) -> bool {
        self.label == Some(BodyFormat::Sse)
    }

    fn parser(&self) -> Option<&BodyParser> {
        match &self.body {
            EncodedBody::Plain(parser) => Some(parser),
            EncodedBody::Compressed(decoder) => Some(decoder.inner()),
            EncodedBody::Undecodable { .. } => None,
        }
    }

    /// The text between the answer so far and another element, if the answer is an uncompressed JSON list of objects
    /// to which the gateway may add an element here.
    pub(super) fn list_separator(&self) -> Option<&'static str> {
        match &self.body {
            EncodedBody::Plain(parser) if !self.has_fixed_length => parser.list_separator(),
            _ => None,
        }
    }

    /// The SSE parser of a stream, compressed or not.
    pub(super) fn events(&self) -> Option<&SseReader> {
        self.parser()?.events()
    }

    pub(super) fn events_mut(&mut self) -> Option<&mut SseReader> {
        match &mut self.body {
            EncodedBody::Plain(parser) => parser.events_mut(),
            EncodedBody::Compressed(decoder) => decoder.inner_mut().events_mut(),
            EncodedBody::Undecodable { .. } => None,
        }
    }

    /// Whether the answer is compressed and could not be decompressed completely.
    pub(super) fn is_unreadable(&self) -> bool {
        match &self.body {
            EncodedBody::Plain(_) => false,
            EncodedBody::Compressed(decoder) => decoder.has_failed(),
            EncodedBody::Undecodable { .. } => true,
        }
    }

    /// Reads a piece and appends to `ready` what the caller receives.
    pub(super) fn feed(&mut self, data: Bytes, ready: &mut VecDeque<Bytes>) {
        match &mut self.body {
            EncodedBody::Plain(parser) => return parser.feed(&data, ready),
            EncodedBody::Compressed(decoder) => decoder.feed(&data),
            EncodedBody::Undecodable { bytes } => *bytes += data.len() as u64,
        }
        ready.push_back(data);
    }

    /// Flushes buffered bytes at the end of the answer.
    pub(super) fn finish(&mut self, ready: &mut VecDeque<Bytes>) {
        match &mut self.body {
            EncodedBody::Plain(parser) => parser.finish(ready),
            EncodedBody::Compressed(decoder) => decoder.inner_mut().finish(&mut Discard),
            EncodedBody::Undecodable { .. } => {}
        }
    }

    /// The usage reported so far.
    pub(super) fn reported(&self) -> Reported {
        self.parser().map_or_else(Reported::default, BodyParser::reported)
    }

    /// Whether the completion tokens of the final report are known. `choices`: how many the request names.
    pub(super) fn has_final_report(&self, choices: u64) -> bool {
        self.parser().is_some_and(|parser| parser.has_final_report(choices))
    }

    /// Whether the API's final event has passed, or a JSON document has ended.
    pub(super) fn is_whole(&self) -> bool {
        !self.is_unreadable() && self.parser().is_some_and(BodyParser::is_whole)
    }

    /// The ids of a complete response (Responses API).
    pub(super) fn answer_ids(&self) -> Option<AnswerIds> {
        self.parser().and_then(BodyParser::answer_ids)
    }

    /// The model that the answer names.
    pub(super) fn answer_model(&self) -> Option<String> {
        self.parser().and_then(BodyParser::answer_model)
    }

    /// Bytes buffered for counting.
    pub(super) fn buffered_bytes(&self) -> usize {
        self.parser().map_or(0, BodyParser::buffered_bytes)
    }

    /// Takes the delivered text, to be counted. Bytes that could not be parsed count as one token per four bytes.
    pub(super) fn take_text(&mut self, was_cut: bool) -> TextToCount {
        match &mut self.body {
            EncodedBody::Plain(parser) => parser.take_text(was_cut),
            EncodedBody::Compressed(decoder) => {
                let is_cut = was_cut || decoder.has_failed();
                let unread = if is_cut { decoder.undecoded_bytes() } else { 0 };
                let mut texts = decoder.inner_mut().take_text(is_cut);
                texts.known_tokens += unread.div_ceil(4);
                texts
            }
            EncodedBody::Undecodable { bytes } => {
                TextToCount { texts: Vec::new(), known_tokens: bytes.div_ceil(4) }
            }
        }
    }
}

/// Whether the head of an answer depends on its first bytes: it declares a length, which holds only if no event is
/// withheld.
pub(super) fn depends_on_first_bytes(head: &response::Parts, withholds: bool) -> bool {
    let headers = &head.headers;
    withholds
        && head.status.is_success()
        && headers.contains_key(header::CONTENT_LENGTH)
        && matches!(BodyCoding::of(headers), BodyCoding::Plain)
        && labelled_format(headers) != Some(BodyFormat::Sse)
}

/// The format that the `content-type` names. Without one it is JSON.
fn labelled_format(headers: &HeaderMap) -> Option<BodyFormat> {
    let Some(label) = headers.get(header::CONTENT_TYPE) else { return Some(BodyFormat::Json) };
    let has_prefix = |prefix: &[u8]| {
        label.as_bytes().get(..prefix.len()).is_some_and(|start| start.eq_ignore_ascii_case(prefix))
    };
    if has_prefix(b"text/event-stream") {
        Some(BodyFormat::Sse)
    } else {
        has_prefix(b"application/json").then_some(BodyFormat::Json)
    }
}
