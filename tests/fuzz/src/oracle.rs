//! Compares the reader of event streams with another parser, the crate `eventsource-stream`, where that one is sound: it
//! panics on a byte order mark and takes quadratic time, and it reads a CR at the end of a piece as a line end of its own.

use bytes::Bytes;
use eventsource_stream::{Event, Eventsource as _};
use futures_util::{FutureExt as _, StreamExt as _, stream};
use std::convert::Infallible;
use tollgate::usage::{Reported, SseReader, TextToCount};

/// The other parser takes quadratic time.
const MAX_BYTES: usize = 4 * 1024;

pub(crate) fn check(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    if text.len() > MAX_BYTES || text.contains(['\r', '\0', '\u{feff}']) {
        return;
    }
    let text = format!("{text}\n\n");
    // Two writings of the same events give the same usage and the same text.
    let plain: String = events(&text).iter().map(written).collect();
    assert_eq!(read(&text), read(&plain), "{}\n{}", text.escape_debug(), plain.escape_debug());
}

fn events(text: &str) -> Vec<Event> {
    let pieces = stream::iter([Ok::<_, Infallible>(text.to_owned())]);
    let events = pieces.eventsource().filter_map(|event| std::future::ready(event.ok()));
    events.collect().now_or_never().unwrap_or_default()
}

fn written(event: &Event) -> String {
    let name = if event.event.is_empty() { String::new() } else { format!("event: {}\n", event.event) };
    let data: String = event.data.split('\n').flat_map(|line| ["data: ", line, "\n"]).collect();
    format!("{name}{data}\n")
}

fn read(text: &str) -> (Reported, u64, TextToCount) {
    let mut reader = SseReader::new(false);
    let mut out: Vec<Bytes> = Vec::new();
    reader.feed(&Bytes::copy_from_slice(text.as_bytes()), &mut out);
    reader.finish(&mut out);
    (reader.reported(), reader.tokens_so_far(100_000), reader.take_text())
}
