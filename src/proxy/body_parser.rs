//! Parses the uncompressed body of an answer as JSON or as an event stream. Its first bytes decide, and not its label.

use crate::usage::{
    AnswerIds, BodyFormat, Delivered, Detection, Discard, FormatDetector, JsonReader, Reported, Sink,
    SseReader, TextToCount, model_of_document,
};
use bytes::Bytes;
use std::io::{self, Write};

/// Reads an uncompressed body.
// The large variant is the usual one, and the enclosing `Metered` is boxed.
#[allow(clippy::large_enum_variant)]
pub(super) enum BodyParser {
    /// No byte has arrived that shows the format.
    Undecided(UndecidedBody),
    Sse(SseReader),
    Json(JsonReader, Delivered),
    /// Neither. Only the bytes are counted.
    Opaque {
        bytes: u64,
    },
}

/// How to parse a body.
#[derive(Clone, Copy, Debug)]
pub(super) struct ParseRules {
    /// The format of the label, for a body whose first bytes are of neither format. `None`: neither.
    pub(super) label: Option<BodyFormat>,
    /// Whether the usage chunk of a stream is withheld from the caller.
    pub(super) withholds: bool,
    /// The number of choices that the request names.
    pub(super) choices: u64,
}

/// The start of a body.
pub(super) struct UndecidedBody {
    detector: FormatDetector,
    /// The bytes after white space; at most 5. If the usage chunk is withheld, they have not been passed on.
    start: Vec<u8>,
    rules: ParseRules,
}

impl Default for BodyParser {
    fn default() -> Self {
        Self::Opaque { bytes: 0 }
    }
}

impl BodyParser {
    /// Parses a body whose first bytes decide the format.
    pub(super) fn new(rules: ParseRules) -> Self {
        Self::Undecided(UndecidedBody { detector: FormatDetector::default(), start: Vec::new(), rules })
    }

    fn with_format(format: Option<BodyFormat>, rules: ParseRules) -> Self {
        match format {
            Some(BodyFormat::Sse) => Self::Sse(SseReader::new(rules.withholds).with_choices(rules.choices)),
            Some(BodyFormat::Json) => Self::Json(JsonReader::default(), Delivered::default()),
            None => Self::default(),
        }
    }

    /// Reads a piece and passes on the bytes for the caller.
    #[inline]
    pub(super) fn feed(&mut self, piece: &Bytes, out: &mut impl Sink) {
        if let Self::Sse(reader) = self {
            reader.feed(piece, out);
        } else {
            self.feed_other(piece, out);
        }
    }

    fn feed_other(&mut self, piece: &Bytes, out: &mut impl Sink) {
        match self {
            Self::Sse(_) => return,
            Self::Undecided(_) => return self.feed_start(piece, out),
            Self::Json(reader, received) => {
                reader.feed(piece);
                received.push_piece(piece);
            }
            Self::Opaque { bytes } => *bytes += piece.len() as u64,
        }
        out.push(piece.clone());
    }

    fn feed_start(&mut self, piece: &Bytes, out: &mut impl Sink) {
        let Self::Undecided(UndecidedBody { detector, start, rules }) = self else { return };
        let rules = *rules;
        let bytes = if start.is_empty() { piece.clone() } else { Bytes::from([start, &piece[..]].concat()) };
        if !rules.withholds {
            out.push(piece.clone());
        }
        let (skipped, format) = match detector.feed(&bytes) {
            Detection::Pending(skipped) => {
                *start = bytes[skipped..].to_vec();
                return pass_on(rules, bytes.slice(..skipped), out);
            }
            Detection::Found(skipped, Some(format)) => (skipped, Some(format)),
            // By its label. White space can then be a part of the first line.
            Detection::Found(_, None) => (0, rules.label),
        };
        pass_on(rules, bytes.slice(..skipped), out);
        *self = Self::with_format(format, rules);
        self.feed_rest(&bytes.slice(skipped..), rules, out);
    }

    fn feed_rest(&mut self, rest: &Bytes, rules: ParseRules, out: &mut impl Sink) {
        if rest.is_empty() {
        } else if rules.withholds {
            self.feed(rest, out);
        } else {
            self.feed(rest, &mut Discard);
        }
    }

    /// Decides by the label, because no more bytes arrive.
    fn decide_by_label(&mut self, out: &mut impl Sink) {
        let Self::Undecided(UndecidedBody { start, rules, .. }) = self else { return };
        let (start, rules) = (Bytes::from(std::mem::take(start)), *rules);
        *self = Self::with_format(rules.label, rules);
        self.feed_rest(&start, rules, out);
    }

    /// Flushes buffered bytes at the end of the answer.
    pub(super) fn finish(&mut self, out: &mut impl Sink) {
        self.decide_by_label(out);
        if let Self::Sse(reader) = self {
            reader.finish(out);
        }
    }

    /// The parser of an event stream. `None`: the body is of another format, or so far empty and not labelled as a
    /// stream.
    pub(super) fn as_stream(&mut self) -> Option<&mut SseReader> {
        if let Self::Undecided(UndecidedBody { rules, .. }) = self
            && rules.label == Some(BodyFormat::Sse)
        {
            // The few bytes are a part of an event, so they are not passed on.
            self.decide_by_label(&mut Discard);
        }
        self.events_mut()
    }

    /// The text between the body so far and another element, if the body is a JSON list of objects that can be
    /// continued here.
    pub(super) fn list_separator(&self) -> Option<&'static str> {
        if let Self::Json(reader, _) = self { reader.list_separator() } else { None }
    }

    pub(super) fn events(&self) -> Option<&SseReader> {
        if let Self::Sse(reader) = self { Some(reader) } else { None }
    }

    pub(super) fn events_mut(&mut self) -> Option<&mut SseReader> {
        if let Self::Sse(reader) = self { Some(reader) } else { None }
    }

    pub(super) fn reported(&self) -> Reported {
        match self {
            Self::Sse(reader) => reader.reported(),
            Self::Json(reader, _) => reader.reported(),
            Self::Undecided(_) | Self::Opaque { .. } => Reported::default(),
        }
    }

    /// Whether the completion tokens of the final report are known. `choices`: how many the request names.
    pub(super) fn has_final_report(&self, choices: u64) -> bool {
        match self {
            Self::Sse(reader) => reader.has_final_report(),
            Self::Json(reader, _) => reader.has_final_report(choices),
            Self::Undecided(_) | Self::Opaque { .. } => false,
        }
    }

    /// Whether the answer is whole, whatever becomes of the connection.
    pub(super) fn is_whole(&self) -> bool {
        match self {
            Self::Sse(reader) => reader.has_last_event() || reader.has_final_report(),
            Self::Json(reader, _) => reader.is_complete(),
            Self::Undecided(_) | Self::Opaque { .. } => false,
        }
    }

    /// The ids of a complete response (Responses API).
    pub(super) fn answer_ids(&self) -> Option<AnswerIds> {
        match self {
            Self::Sse(reader) => reader.answer_ids(),
            Self::Json(_, received) => AnswerIds::of_document(received),
            Self::Undecided(_) | Self::Opaque { .. } => None,
        }
    }

    /// The model that the answer names.
    pub(super) fn answer_model(&self) -> Option<String> {
        match self {
            Self::Sse(reader) => reader.answer_model(),
            Self::Json(_, received) => model_of_document(received),
            Self::Undecided(_) | Self::Opaque { .. } => None,
        }
    }

    pub(super) fn buffered_bytes(&self) -> usize {
        match self {
            Self::Sse(reader) => reader.buffered_bytes(),
            Self::Json(_, received) => received.buffered_bytes(),
            Self::Undecided(_) | Self::Opaque { .. } => 0,
        }
    }

    pub(super) fn take_text(&mut self, was_cut: bool) -> TextToCount {
        match self {
            Self::Sse(reader) => reader.take_text(),
            Self::Json(reader, received) => {
                let received = std::mem::take(received);
                let is_reported = reader.reported().completion().is_some_and(|tokens| tokens > 0);
                if !was_cut || reader.is_complete() {
                    received.finish_document()
                } else if is_reported {
                    received.finish_cut_list()
                } else {
                    received.finish_cut_document()
                }
            }
            Self::Opaque { bytes } => TextToCount { texts: Vec::new(), known_tokens: bytes.div_ceil(4) },
            Self::Undecided(UndecidedBody { start, .. }) => {
                TextToCount { texts: Vec::new(), known_tokens: start.len().div_ceil(4) as u64 }
            }
        }
    }
}

/// Passes on white space that has been held back.
fn pass_on(rules: ParseRules, space: Bytes, out: &mut impl Sink) {
    if rules.withholds && !space.is_empty() {
        out.push(space);
    }
}

/// Parses the output of a decoder. The caller does not receive it.
impl Write for BodyParser {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        match self {
            Self::Json(reader, received) => {
                reader.feed(data);
                received.push_piece(data);
            }
            Self::Opaque { bytes } => *bytes += data.len() as u64,
            Self::Sse(_) | Self::Undecided(_) => self.feed(&Bytes::copy_from_slice(data), &mut Discard),
        }
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const STREAM: &str = "data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"Hi\"}}]}\n\ndata: {\"choices\":[],\"usage\":{\"completion_tokens\":2}}\n\ndata: [DONE]\n\n";
    const WITHOUT_USAGE: &str =
        "data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"Hi\"}}]}\n\ndata: [DONE]\n\n";

    /// What the caller receives of a body that arrives in these pieces, and the parser.
    fn parse(pieces: &[&[u8]], rules: ParseRules) -> (Vec<Vec<u8>>, BodyParser) {
        let (mut parser, mut passed) = (BodyParser::new(rules), Vec::new());
        for piece in pieces {
            let mut out = Vec::<Bytes>::new();
            parser.feed(&Bytes::copy_from_slice(piece), &mut out);
            passed.push(out.concat());
        }
        let mut out = Vec::<Bytes>::new();
        parser.finish(&mut out);
        passed.push(out.concat());
        (passed, parser)
    }

    fn rules(label: Option<BodyFormat>, withholds: bool) -> ParseRules {
        ParseRules { label, withholds, choices: 1 }
    }

    #[test]
    fn a_stream_is_read_under_any_label_and_its_usage_chunk_withheld() {
        for label in [None, Some(BodyFormat::Json), Some(BodyFormat::Sse)] {
            for start in ["", "\u{feff}", "\r\n\n", "\u{feff} \n"] {
                let body = format!("{start}{STREAM}");
                let single: Vec<&[u8]> = body.as_bytes().chunks(1).collect();
                for pieces in [vec![body.as_bytes()], single] {
                    let (passed, parser) = parse(&pieces, rules(label, true));
                    assert_eq!(
                        String::from_utf8(passed.concat()).unwrap(),
                        format!("{start}{WITHOUT_USAGE}")
                    );
                    assert_eq!(parser.reported().completion(), Some(2), "{label:?} {start:?}");
                    let (passed, parser) = parse(&pieces, rules(label, false));
                    // Each piece is passed on at once.
                    assert!(passed.iter().zip(&pieces).all(|(passed, piece)| passed == piece));
                    assert_eq!(parser.reported().completion(), Some(2), "{label:?} {start:?}");
                    assert!(parser.is_whole() && parser.has_final_report(1));
                }
            }
        }
    }

    #[test]
    fn json_is_read_under_any_label() {
        let body =
            " \n{\"choices\":[{\"message\":{\"content\":\"Hi\"}}],\"usage\":{\"completion_tokens\":2}}";
        for label in [None, Some(BodyFormat::Json), Some(BodyFormat::Sse)] {
            for withholds in [false, true] {
                let single: Vec<&[u8]> = body.as_bytes().chunks(1).collect();
                for pieces in [vec![body.as_bytes()], single] {
                    let (passed, mut parser) = parse(&pieces, rules(label, withholds));
                    assert!(passed.iter().zip(&pieces).all(|(passed, piece)| passed == piece));
                    assert_eq!(parser.reported().completion(), Some(2));
                    assert!(parser.is_whole() && parser.take_text(false).texts == ["Hi"]);
                }
            }
        }
    }

    #[test]
    fn a_body_of_neither_format_is_read_by_its_label() {
        for body in ["", "\n", "dat", "<html>", "\"data: \"", " data: {}\n\n"] {
            for withholds in [false, true] {
                for pieces in [vec![body.as_bytes()], body.as_bytes().chunks(1).collect()] {
                    let (passed, parser) = parse(&pieces, rules(Some(BodyFormat::Sse), withholds));
                    assert!(parser.events().is_some() && passed.concat() == body.as_bytes(), "{body:?}");
                    let (passed, parser) = parse(&pieces, rules(Some(BodyFormat::Json), withholds));
                    assert!(matches!(parser, BodyParser::Json(..)) && passed.concat() == body.as_bytes());
                    let (passed, mut parser) = parse(&pieces, rules(None, withholds));
                    assert!(passed.concat() == body.as_bytes());
                    // White space before the body is not counted.
                    let tokens = parser.take_text(false).known_tokens;
                    assert!(
                        tokens <= body.len().div_ceil(4) as u64 && (tokens > 0 || body.trim().is_empty())
                    );
                }
            }
        }
    }

    #[test]
    fn white_space_passes_at_once_and_the_start_of_a_line_is_held_only_if_it_may_be_withheld() {
        let pieces: Vec<&[u8]> = vec![b"\n", b" \n", b"da", b"ta: {\"choices\":[", b"1]}\n\n"];
        let (passed, _) = parse(&pieces, rules(None, true));
        assert_eq!(passed, [&b"\n"[..], b" \n", b"", b"", b"data: {\"choices\":[1]}\n\n", b""]);
    }

    #[test]
    fn a_stream_that_breaks_before_its_first_byte_is_a_stream_by_its_label_only() {
        for (label, is_stream) in
            [(Some(BodyFormat::Sse), true), (Some(BodyFormat::Json), false), (None, false)]
        {
            for (start, withholds, is_passed_on) in
                [("", true, false), ("ev", true, false), ("ev", false, true)]
            {
                let mut parser = BodyParser::new(rules(label, withholds));
                parser.feed(&Bytes::from(start), &mut Vec::<Bytes>::new());
                assert_eq!(parser.as_stream().map(SseReader::break_off), is_stream.then_some(is_passed_on));
            }
        }
    }

    proptest! {
        #[test]
        fn results_do_not_depend_on_cuts(
            start in "(\u{feff})?[ \n\r]{0,4}(data: |event|id:|: ?|retry:1|\\{|\\[|x|da)?[a-z\n ]{0,6}",
            has_stream in any::<bool>(),
            withholds in any::<bool>(),
            label in prop_oneof![Just(None), Just(Some(BodyFormat::Json)), Just(Some(BodyFormat::Sse))],
            mut cuts in prop::collection::vec(0usize..60, 0..6),
        ) {
            let body = if has_stream { format!("{start}\n\n{STREAM}") } else { start };
            cuts.sort_unstable();
            let (mut pieces, mut from) = (Vec::new(), 0);
            for cut in cuts.into_iter().chain([body.len()]) {
                let cut = cut.clamp(from, body.len());
                pieces.push(&body.as_bytes()[from..cut]);
                from = cut;
            }
            let (whole, mut a) = parse(&[body.as_bytes()], rules(label, withholds));
            let (cut, mut b) = parse(&pieces, rules(label, withholds));
            prop_assert_eq!(whole.concat(), cut.concat());
            prop_assert_eq!(a.reported(), b.reported());
            if !body.starts_with([' ', '\n', '\r', '\u{feff}']) {
                prop_assert_eq!(a.take_text(false), b.take_text(false));
            }
            if !withholds {
                prop_assert_eq!(whole.concat(), body.as_bytes());
            }
        }
    }
}
