//! Fuzzes event streams: the bytes for the caller and the usage do not depend on where a stream is cut.

use bytes::Bytes;
use tollgate::usage::{SseReader, TextToCount};

pub(crate) fn check(how: u8, stream: &[u8]) {
    let stream = Bytes::copy_from_slice(stream);
    let withholds = how & 1 == 1;
    let whole = follow(&stream, withholds, usize::MAX);
    // Pieces of 1 to 128 bytes.
    let cut = follow(&stream, withholds, 1 + usize::from(how / 2));
    let shown = |given: &[u8]| given.escape_ascii().to_string();
    assert!(whole.given == cut.given, "whole: {}\ncut: {}", shown(&whole.given), shown(&cut.given));
    assert_eq!(whole.read, cut.read);
    if withholds {
        assert!(whole.given.len() <= stream.len());
    } else {
        assert!(whole.given == stream, "{}", shown(&whole.given));
    }
    let text = String::from_utf8(whole.ending.into()).unwrap();
    for event in text.split("\n\n").filter_map(|event| event.strip_prefix("data: ")) {
        let is_json = event == "[DONE]" || serde_json::from_str::<serde_json::Value>(event).is_ok();
        assert!(is_json, "{event}");
    }
}

struct Followed {
    /// The bytes that the caller receives.
    given: Vec<u8>,
    /// Usage, withheld events, tokens so far, texts.
    read: (tollgate::usage::Reported, u32, u64, TextToCount),
    /// The events that would end the stream at its token limit.
    ending: String,
}

fn follow(stream: &Bytes, withholds: bool, piece: usize) -> Followed {
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
    Followed { given: out.concat(), read, ending }
}
