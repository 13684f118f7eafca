//! The model that an answer names, for traces. It is read when the answer has ended, of traced requests only.

use super::Delivered;
use crate::json::{Found, MemberScanner, Text};

/// Further bytes of an answer or an event are not searched. Providers name the model near the beginning.
const MAX_SEARCHED_BYTES: usize = 16 * 1024;
/// A longer name is ignored.
const MAX_NAME_BYTES: usize = 256;
/// Number of events at the end of a stream that are searched.
const MAX_EVENTS: usize = 4;

/// Where the value of a key holds the model.
#[derive(Clone, Copy, PartialEq)]
enum Holder {
    Model,
    /// An object with a `model`: the response in an event of the Responses API, the message in Anthropic's first event.
    Parent,
}

/// The model that a JSON answer names.
pub fn of_document(delivered: &Delivered) -> Option<String> {
    in_json(delivered.document(), true)
}

/// The model that the events of a stream name.
pub(super) fn of_stream(delivered: &Delivered) -> Option<String> {
    let mut events = std::iter::once(delivered.opening()).chain(delivered.last_events().take(MAX_EVENTS));
    events.find_map(|event| in_json(event, true))
}

fn in_json(json: &[u8], is_outermost: bool) -> Option<String> {
    let json = &json[..json.len().min(MAX_SEARCHED_BYTES)];
    let (mut scanner, mut holder, mut value, mut model) = (MemberScanner::default(), None, Vec::new(), None);
    scanner.feed(json, |found| match found {
        Found::Key { key, .. } => {
            holder = match key {
                _ if model.is_some() => None,
                b"model" | b"modelVersion" => Some(Holder::Model),
                b"response" | b"message" if is_outermost => Some(Holder::Parent),
                _ => None,
            };
            value.clear();
        }
        Found::Value { part, is_last } => {
            if holder.is_some() {
                value.extend_from_slice(part);
            }
            if !is_last {
                return;
            }
            if holder.take() == Some(Holder::Model) {
                model = name(&value);
            } else if !value.is_empty() {
                model = in_json(std::mem::take(&mut value).trim_ascii(), false);
            }
        }
    });
    // The search may have ended within the object.
    model.or_else(|| if holder == Some(Holder::Parent) { in_json(value.trim_ascii(), false) } else { None })
}

fn name(json: &[u8]) -> Option<String> {
    let text: Text<'_> = serde_json::from_slice(json).ok()?;
    Some(text.0.into_owned()).filter(|name| !name.is_empty() && name.len() <= MAX_NAME_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn document(text: &str) -> Option<String> {
        let mut delivered = Delivered::default();
        text.as_bytes().chunks(5).for_each(|piece| delivered.push_piece(piece));
        of_document(&delivered)
    }

    fn stream(events: &[&str]) -> Option<String> {
        let mut delivered = Delivered::default();
        events.iter().for_each(|event| delivered.push_event(event.as_bytes()));
        of_stream(&delivered)
    }

    #[test]
    fn the_model_is_read_from_documents_and_streams_of_every_api() {
        let m = Some("m-1".to_owned());
        assert_eq!(document(r#"{"id":"c","model":"m-1","choices":[]}"#), m);
        assert_eq!(document(r#"{"candidates":[{"model":"x"}],"modelVersion":"m-1"}"#), m);
        assert_eq!(stream(&[r#"{"choices":[],"model":"m-1"}"#, "[DONE]"]), m);
        assert_eq!(stream(&[r#"{"type":"message_start","message":{"id":"a","model":"m-1"}}"#]), m);
        let created = r#"{"type":"response.created","response":{"id":"a","model":"m-1","instructions":"@"}}"#;
        assert_eq!(stream(&[created]), m);
        assert_eq!(stream(&[&created.replace('@', &"x".repeat(MAX_SEARCHED_BYTES))]), m);
    }

    #[test]
    fn other_answers_have_no_model() {
        for text in [
            "",
            "[]",
            r#"{"model":3}"#,
            r#"{"model":""}"#,
            r#"{"a":{"model":"x"}}"#,
            r#"{"response":{"response":{"model":"x"}}}"#,
            r#"{"message":"model"}"#,
            r#"{"model"#,
        ] {
            assert_eq!(document(text), None, "{text}");
        }
        assert_eq!(document(&format!(r#"{{"model":"{}"}}"#, "x".repeat(MAX_NAME_BYTES + 1))), None);
        assert_eq!(document(&format!(r#"{{"a":"{}","model":"x"}}"#, "x".repeat(MAX_SEARCHED_BYTES))), None);
        assert_eq!(stream(&[]), None);
    }
}
