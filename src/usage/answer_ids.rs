//! The ids of a response and of its items, by which later requests refer to them (Responses API).

use super::Delivered;
use crate::json::{LooseText, Text};
use serde::Deserialize;
use serde_json::value::RawValue;

/// Further items are ignored.
const MAX_ITEMS: usize = 32;
/// An answer whose id is longer is ignored, and so is an item. Providers use some 60 bytes.
const MAX_ID_BYTES: usize = 256;

/// The ids of one response.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AnswerIds {
    /// The id of the response.
    pub response: String,
    /// Its items, in their order. They are empty if the response was too long to be kept.
    pub items: Vec<AnswerItem>,
}

/// An item of a response.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AnswerItem {
    /// Its id.
    pub id: String,
    /// Whether it holds reasoning.
    pub is_reasoning: bool,
    /// The size of its JSON.
    pub bytes: u64,
}

#[derive(Deserialize)]
struct ResponseBody<'a> {
    #[serde(borrow, default)]
    object: LooseText<'a>,
    #[serde(borrow)]
    id: Option<Text<'a>>,
    #[serde(borrow)]
    output: Option<Vec<&'a RawValue>>,
}

#[derive(Deserialize)]
struct ResponseEvent<'a> {
    #[serde(borrow)]
    response: ResponseBody<'a>,
}

#[derive(Deserialize)]
struct ResponseItem<'a> {
    #[serde(borrow)]
    id: Option<Text<'a>>,
    #[serde(rename = "type", borrow, default)]
    kind: LooseText<'a>,
}

impl AnswerIds {
    /// The ids in a complete JSON answer. `None`: it is not a response.
    pub fn of_document(delivered: &Delivered) -> Option<Self> {
        Self::read(serde_json::from_slice(delivered.document()).ok()?)
    }

    /// The ids in the last event of a complete stream, or else the response's id in the first one.
    pub fn of_stream(delivered: &Delivered) -> Option<Self> {
        let in_event =
            |event: &[u8]| Self::read(serde_json::from_slice::<ResponseEvent>(event).ok()?.response);
        let last = delivered.last_events().next();
        last.and_then(in_event).or_else(|| in_event(delivered.opening()))
    }

    fn read(body: ResponseBody<'_>) -> Option<Self> {
        let response = body.id.filter(|id| body.object.0 == "response" && id.0.len() <= MAX_ID_BYTES)?;
        let items = body.output.unwrap_or_default().into_iter().take(MAX_ITEMS).filter_map(|raw| {
            let item: ResponseItem<'_> = serde_json::from_str(raw.get()).ok()?;
            let id = item.id.filter(|id| id.0.len() <= MAX_ID_BYTES)?.0.into_owned();
            Some(AnswerItem { id, is_reasoning: item.kind.0 == "reasoning", bytes: raw.get().len() as u64 })
        });
        Some(Self { response: response.0.into_owned(), items: items.collect() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RESPONSE: &str = r#"{"id":"resp_1","object":"response","output":[{"id":"rs_1","type":"reasoning","summary":[]},{"type":"message","id":"msg_1","content":[{"text":"Hi"}]},{"type":"x"}],"usage":{"input_tokens":7,"output_tokens":3}}"#;

    fn names(ids: Option<AnswerIds>) -> Option<(String, Vec<(String, bool)>)> {
        ids.map(|ids| {
            (ids.response, ids.items.into_iter().map(|item| (item.id, item.is_reasoning)).collect())
        })
    }

    fn document(text: &str) -> Option<AnswerIds> {
        let mut delivered = Delivered::default();
        text.as_bytes().chunks(7).for_each(|piece| delivered.push_piece(piece));
        AnswerIds::of_document(&delivered)
    }

    #[test]
    fn ids_are_read_from_documents_and_streams() {
        let want = Some(("resp_1".to_owned(), vec![("rs_1".to_owned(), true), ("msg_1".to_owned(), false)]));
        assert_eq!(names(document(RESPONSE)), want);
        let mut delivered = Delivered::default();
        delivered.push_event(
            br#"{"type":"response.created","response":{"id":"resp_1","object":"response","output":[]}}"#,
        );
        assert_eq!(names(AnswerIds::of_stream(&delivered)), Some(("resp_1".to_owned(), vec![])));
        delivered.push_event(br#"{"type":"response.output_text.delta","delta":"Hi"}"#);
        assert_eq!(names(AnswerIds::of_stream(&delivered)), Some(("resp_1".to_owned(), vec![])));
        delivered.push_event(format!(r#"{{"type":"response.completed","response":{RESPONSE}}}"#).as_bytes());
        assert_eq!(names(AnswerIds::of_stream(&delivered)), want);
    }

    #[test]
    fn other_answers_have_no_ids_and_their_number_and_length_are_bounded() {
        for text in [
            "",
            "[]",
            "{}",
            r#"{"id":"c","object":"chat.completion"}"#,
            r#"{"object":"response"}"#,
            r#"{"id":3,"object":"response"}"#,
        ] {
            assert_eq!(document(text), None, "{text}");
        }
        assert_eq!(document(&RESPONSE.replace("resp_1", &"r".repeat(MAX_ID_BYTES + 1))), None);
        let items = vec![r#"{"id":"i"}"#; 1_000].join(",");
        let ids = document(&format!(r#"{{"id":"r","object":"response","output":[{items}]}}"#)).unwrap();
        assert_eq!(ids.items.len(), MAX_ITEMS);
    }
}
