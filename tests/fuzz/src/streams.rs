//! Fuzzes event streams: the bytes for the caller and the usage do not depend on where a stream is cut.

use bytes::Bytes;
use tollgate::usage::{SseReader, TextToCount};

pub(crate) fn check(variant: u8, stream: &[u8]) {
    let stream = Bytes::copy_from_slice(stream);
    let withholds = variant & 1 == 1;
    let whole = read_in_pieces(&stream, withholds, usize::MAX);
    // Pieces of 1 to 128 bytes.
    let cut = read_in_pieces(&stream, withholds, 1 + usize::from(variant / 2));
    let shown = |passed_on: &[u8]| passed_on.escape_ascii().to_string();
    assert!(
        whole.passed_on == cut.passed_on,
        "whole: {}\ncut: {}",
        shown(&whole.passed_on),
        shown(&cut.passed_on)
    );
    assert_eq!(whole.read, cut.read);
    if withholds {
        assert!(whole.passed_on.len() <= stream.len());
    } else {
        assert!(whole.passed_on == stream, "{}", shown(&whole.passed_on));
    }
    let text = String::from_utf8(whole.ending.into()).unwrap();
    for event in text.split("\n\n").filter_map(|event| event.strip_prefix("data: ")) {
        let is_json = event == "[DONE]" || serde_json::from_str::<serde_json::Value>(event).is_ok();
        assert!(is_json, "{event}");
    }
}

struct StreamResult {
    /// The bytes that the caller receives.
    passed_on: Vec<u8>,
    /// Usage, withheld events, tokens so far, texts.
    read: (tollgate::usage::Reported, u32, u64, TextToCount),
    /// The events that would end the stream at its token limit.
    ending: String,
}

fn read_in_pieces(stream: &Bytes, withholds: bool, piece: usize) -> StreamResult {
    let mut reader = SseReader::new(withholds);
    let mut out: Vec<Bytes> = Vec::new();
    let mut from = 0;
    while from < stream.len() {
        let to = from.saturating_add(piece).min(stream.len());
        reader.feed(&stream.slice(from..to), &mut out);
        from = to;
    }
    let ending = reader.length_ending(2);
    reader.finish(&mut out);
    let read = (reader.reported(), reader.withheld(), reader.tokens_so_far(100_000), reader.take_text());
    StreamResult { passed_on: out.concat(), read, ending }
}
