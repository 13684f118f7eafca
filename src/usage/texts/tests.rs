//! Streams of each API that break off after each event, and formats that the fixtures lack.

use crate::usage::{Delivered, Discard, JsonReader, Reported, SseReader, TextToCount};
use bytes::Bytes;
use serde_json::Value;

fn fixture(name: &str) -> String {
    std::fs::read_to_string(format!("{}/fixtures/{name}", env!("CARGO_MANIFEST_DIR"))).unwrap()
}

/// The text that an event adds: its index and the addition.
type Adds = Option<(usize, &'static str)>;

const STREAMS: [(&str, &[Adds]); 5] = [
    ("chat_silent.sse", &[Some((0, "Hello")), Some((0, " there")), None]),
    (
        "responses_silent.sse",
        &[
            None,
            None,
            Some((0, "Hello")),
            Some((0, " there")),
            None,
            None,
            Some((1, "look")),
            Some((1, "{}")),
            None,
            None,
        ],
    ),
    (
        "anthropic_silent.sse",
        &[
            None,
            None,
            None,
            Some((0, "Hello")),
            Some((0, " there")),
            None,
            Some((1, "look")),
            Some((1, "{}")),
            None,
            None,
            None,
        ],
    ),
    ("gemini_silent.sse", &[Some((0, "Hello")), Some((0, " there")), Some((1, "look{}"))]),
    (
        "cohere_silent.sse",
        &[
            None,
            None,
            Some((0, "Hello")),
            Some((0, " there")),
            None,
            Some((1, "look")),
            Some((1, "{}")),
            None,
            None,
        ],
    ),
];

fn broken_off(stream: &str) -> SseReader {
    let mut reader = SseReader::new(false);
    reader.feed(&Bytes::copy_from_slice(stream.as_bytes()), &mut Vec::<Bytes>::new());
    reader.break_off();
    reader
}

#[test]
fn a_broken_stream_counts_the_text_of_its_complete_events() {
    for (name, adds) in STREAMS {
        let stream = fixture(name);
        let ends: Vec<usize> = stream.match_indices("\n\n").map(|(at, _)| at + 2).collect();
        assert_eq!(ends.len(), adds.len(), "{name}");
        for at in 0..=stream.len() {
            let whole = ends.iter().filter(|&&end| end <= at).count();
            let mut want = TextToCount::default();
            for &(text, more) in adds[..whole].iter().flatten() {
                want.texts.resize(want.texts.len().max(text + 1), String::new());
                want.texts[text].push_str(more);
                want.known_tokens += if more.starts_with("look") { 4 } else { 0 };
            }
            assert_eq!(broken_off(&stream[..at]).take_text(), want, "{name}, {at} bytes");
        }
    }
}

fn texts(events: &[&str]) -> (Vec<String>, u64) {
    let mut delivered = Delivered::default();
    events.iter().for_each(|event| delivered.push_event(event.as_bytes()));
    let TextToCount { texts, known_tokens } = delivered.finish_events();
    (texts, known_tokens)
}

fn document(json: &str) -> (Vec<String>, u64) {
    let mut delivered = Delivered::default();
    delivered.push_piece(json.as_bytes());
    let TextToCount { texts, known_tokens } = delivered.finish_document();
    (texts, known_tokens)
}

#[test]
fn repeated_text_counts_once() {
    let delta = r#"{"type":"response.output_text.delta","output_index":0,"content_index":0,"delta":"Hi"}"#;
    let done = r#"{"type":"response.output_text.done","output_index":0,"content_index":0,"text":"Hi"}"#;
    let call_done =
        r#"{"type":"response.function_call_arguments.done","output_index":1,"arguments":"{\"a\":1}"}"#;
    let call_added = r#"{"type":"response.output_item.added","output_index":1,"item":{"type":"function_call","name":"get","arguments":""}}"#;
    let summary =
        r#"{"type":"response.reasoning_summary_text.delta","output_index":2,"summary_index":0,"delta":"hm"}"#;
    let input = r#"{"type":"response.custom_tool_call_input.delta","output_index":3,"delta":"SELECT"}"#;
    let whole = r#"{"type":"response.incomplete","response":{"error":null,"output":[{"type":"message","content":[{"type":"output_text","text":"Hi"}]},{"type":"function_call","name":"get","arguments":"{\"a\":1}"},{"type":"reasoning","summary":[{"type":"summary_text","text":"hm"}]}]}}"#;
    let all = (vec!["Hi".to_owned(), r#"get{"a":1}"#.to_owned()], 4);
    assert_eq!(texts(&[delta, done, call_added, call_done]), all);
    assert_eq!(texts(&[done, call_added, call_done]), all);
    let with_summary = (vec!["Hi".to_owned(), r#"get{"a":1}"#.to_owned(), "hm".to_owned()], 4);
    assert_eq!(texts(&[whole]), with_summary);
    assert_eq!(texts(&[delta, call_added, call_done, summary, whole]), with_summary);
    assert_eq!(texts(&[input]).0, ["SELECT"]);
}

#[test]
fn a_completed_response_has_one_more_token_for_its_end() {
    let delta = r#"{"type":"response.output_text.delta","output_index":0,"content_index":0,"delta":"Hi"}"#;
    let call = r#"{"type":"response.output_item.added","output_index":1,"item":{"type":"function_call","name":"get","arguments":""}}"#;
    let [completed, incomplete] = ["completed", "incomplete"].map(|status| {
        format!(r#"{{"type":"response.{status}","response":{{"status":"{status}","output":null}}}}"#)
    });
    for (events, tokens) in [
        (&[delta][..], 0),
        (&[delta, &incomplete], 0),
        (&[delta, &completed], 1),
        (&[&completed], 0),
        (&[delta, call, &completed], 4),
    ] {
        assert_eq!(texts(events).1, tokens, "{events:?}");
    }
    for (status, tokens) in [("completed", 1), ("incomplete", 0)] {
        let output = r#"[{"type":"message","content":[{"type":"output_text","text":"Hi"}]}]"#;
        let json = format!(r#"{{"object":"response","status":"{status}","output":{output}}}"#);
        assert_eq!(document(&json), (vec!["Hi".to_owned()], tokens));
    }
}

#[test]
fn every_kind_of_text_counts_once() {
    let words = |text: &[&str]| text.iter().map(|&t| t.to_owned()).collect::<Vec<_>>();
    for (json, want, tokens) in [
        (
            r#"{"choices":[{"delta":{"reasoning":"hm","reasoning_details":[{"type":"reasoning.text","text":"hm"}]}}]}"#,
            &["hm"][..],
            0,
        ),
        (
            r#"{"choices":[{"delta":{"reasoning_details":[{"type":"reasoning.text","text":"hm"},{"type":"reasoning.encrypted","data":"eA"}]}}]}"#,
            &["hm"],
            0,
        ),
        (r#"{"choices":[{"message":{"content":null,"audio":{"transcript":"Hi","data":"eA"}}}]}"#, &["Hi"], 0),
        (
            r#"{"choices":[{"message":{"tool_calls":[{"type":"custom","custom":{"name":"sql","input":"SELECT"}}],"function_call":{"name":"f","arguments":"{}"}}}]}"#,
            &["f{}", "sqlSELECT"],
            8,
        ),
        (
            r#"{"type":"message","content":[{"type":"thinking","thinking":"hm","signature":"eA"},{"type":"tool_use","name":"get","input":{"a": 1}}]}"#,
            &["hm", r#"get{"a":1}"#],
            4,
        ),
        (
            r#"{"candidates":[{"content":{"parts":[{"text":"hm","thought":true},{"text":"Hi"},{"functionCall":{"name":"get","args":{"a": 1}}},{"executableCode":{"language":"PYTHON","code":"1"}}]}}]}"#,
            &["hm", "Hi", r#"get{"a":1}"#, "1"],
            4,
        ),
        // An error is not a completion, whatever other fields it has.
        (r#"{"error":{"message":"x"},"choices":[{"delta":{"content":"Hi"}}]}"#, &[], 0),
        (r#"{"type":"error","content":[{"type":"text","text":"Hi"}]}"#, &[], 0),
        (r#"{"message":"not allowed"}"#, &[], 0),
    ] {
        assert_eq!(texts(&[json]), (words(want), tokens), "event {json}");
        assert_eq!(document(json), (words(want), tokens), "document {json}");
    }
    let named = "event: error\ndata: {\"choices\":[{\"delta\":{\"content\":\"Hi\"}}]}\n\n";
    assert_eq!(broken_off(named).take_text(), TextToCount::default());
    assert_eq!(broken_off(named).tokens_so_far(9), 0);
}

/// The events of an ending: their names and data.
fn events(ending: &str) -> Vec<(&str, Value)> {
    ending
        .split_terminator("\n\n")
        .map(|event| {
            let (head, data) = event.split_once("data: ").unwrap();
            let name = head.trim().strip_prefix("event: ").unwrap_or_default();
            (name, serde_json::from_str(data).unwrap_or(Value::String(data.to_owned())))
        })
        .collect()
}

/// The ending of a fixture that breaks off after its first `after` events.
fn ending(name: &str, after: usize) -> String {
    let stream = fixture(name);
    let whole: String = stream.split_inclusive("\n\n").take(after).collect();
    broken_off(&whole).length_ending(1)
}

#[test]
fn a_response_ends_incomplete() {
    let ending = ending("responses_silent.sse", 4);
    let [(name, event)] = &events(&ending)[..] else { panic!("{ending}") };
    assert_eq!((*name, event["sequence_number"].as_u64()), ("response.incomplete", Some(4)));
    let response = &event["response"];
    assert_eq!((&response["id"], &response["status"]), (&"resp_a".into(), &"incomplete".into()));
    assert_eq!(response["incomplete_details"]["reason"], "max_output_tokens");
    assert!(response["usage"].is_null() && response["output"].is_array());
}

#[test]
fn an_anthropic_ending_closes_the_open_block() {
    for (after, open, tokens) in
        [(1, None, 0), (2, Some(0), 0), (3, Some(0), 0), (5, Some(0), 2), (6, None, 2), (8, Some(1), 4)]
    {
        let ending = ending("anthropic_silent.sse", after);
        let events = events(&ending);
        let names: Vec<_> = events.iter().map(|(name, _)| *name).collect();
        let all = ["content_block_stop", "message_delta", "message_stop"];
        assert_eq!(names, all[usize::from(open.is_none())..], "after {after}");
        assert!(events.iter().all(|(name, event)| event["type"] == *name));
        assert_eq!(events[0].1["index"].as_u64(), open, "after {after}");
        let delta = &events[events.len() - 2].1;
        assert_eq!(delta["delta"]["stop_reason"], "max_tokens");
        assert_eq!(delta["usage"]["output_tokens"], tokens, "after {after}");
    }
}

#[test]
fn an_open_block_is_known_after_its_events_were_dropped() {
    let start = "data: {\"type\":\"content_block_start\",\"index\":3,\"content_block\":{\"type\":\"text\",\"text\":\"\"}}\n\n";
    let opened = "data: {\"type\":\"message_start\",\"message\":{}}\n\n".to_owned() + start;
    let pings = "data: {\"type\":\"ping\"}\n\n".repeat(3000);
    let ending = broken_off(&(opened + &pings)).length_ending(1);
    assert_eq!(events(&ending)[0].1["index"], 3);
}

#[test]
fn endings_of_gemini_cohere_and_chat_resemble_the_last_chunk() {
    let gemini = ending("gemini_silent.sse", 2);
    let [(_, chunk)] = &events(&gemini)[..] else { panic!("{gemini}") };
    assert_eq!(
        (&chunk["modelVersion"], &chunk["candidates"][0]["finishReason"]),
        (&"a".into(), &"MAX_TOKENS".into())
    );
    assert_eq!(chunk["candidates"][0]["content"]["parts"][0]["text"], "");
    let cohere = ending("cohere_silent.sse", 3);
    assert_eq!(events(&cohere)[0].1["delta"]["finish_reason"], "MAX_TOKENS");
    let chat = ending("chat_silent.sse", 1);
    assert_eq!(events(&chat)[0].1["choices"][0]["finish_reason"], "length");
    assert_eq!(events(&chat)[1].1, "[DONE]");
}

fn has_ending(name: &str, ending: &str) -> bool {
    name.to_lowercase().ends_with(ending)
}

/// Usage and text of a stream or a document.
fn all_of(name: &str, content: &str) -> (Reported, Vec<String>, u64) {
    let (reported, text) = if has_ending(name, ".sse") {
        let mut reader = SseReader::new(false);
        reader.feed(&Bytes::copy_from_slice(content.as_bytes()), &mut Discard);
        reader.finish(&mut Discard);
        (reader.reported(), reader.take_text())
    } else {
        let (mut reader, mut delivered) = (JsonReader::default(), Delivered::default());
        reader.feed(content.as_bytes());
        delivered.push_piece(content.as_bytes());
        (reader.reported(), delivered.finish_document())
    };
    (reported, text.texts, text.known_tokens)
}

#[test]
fn half_a_surrogate_pair_in_any_string_of_an_answer_is_read_as_a_replacement_character() {
    let folder = std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures")).unwrap();
    let names = folder.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let is_answer = |name: &String| {
        has_ending(name, ".sse") || has_ending(name, ".json") && !has_ending(name, ".usage.json")
    };
    for name in names.filter(is_answer) {
        let content = fixture(&name);
        let (mut at, mut places) = (0, Vec::new());
        while let Some(quote) = content[at..].find('"') {
            let from = at + quote + 1;
            let end = from + crate::json::string_length(&content.as_bytes()[from..]).unwrap();
            places.push(end);
            at = end + 1;
        }
        for end in places {
            let with =
                |escape: &str| all_of(&name, &format!("{}{escape}{}", &content[..end], &content[end..]));
            assert_eq!(with(r"\ud83d"), with(r"\ufffd"), "{name} {end}");
        }
    }
}
