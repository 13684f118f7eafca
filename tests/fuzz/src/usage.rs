//! Fuzzes usage in JSON answers: the usage does not depend on where the answer is cut, and it agrees with the plain usage
//! that a complete JSON parser reads.

use serde_json::Value;
use tollgate::usage::{JsonReader, Reported};

pub(crate) fn check(variant: u8, json: &[u8]) {
    let whole = read(json, usize::MAX);
    assert_eq!(whole, read(json, 1 + usize::from(variant)), "{}", json.escape_ascii());
    let Ok(Value::Object(answer)) = serde_json::from_slice(json) else { return };
    if whole == Reported::default() {
        return;
    }
    // A report comes from somewhere: a name in the answer, which may be escaped. Of equal keys the parser keeps the last.
    let (text, raw) = (Value::Object(answer).to_string(), String::from_utf8_lossy(json));
    let has_name = |text: &str| ["sage", "timings", "meta"].iter().any(|name| text.contains(name));
    assert!(has_name(&text) || has_name(&raw) || raw.contains('\\'), "{text} {whole:?}");
}

fn read(json: &[u8], piece: usize) -> Reported {
    let mut reader = JsonReader::default();
    json.chunks(piece.min(json.len().max(1))).for_each(|piece| reader.feed(piece));
    reader.reported()
}
