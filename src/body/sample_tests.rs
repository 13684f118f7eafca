//! Bodies with most fields of each API: what an SDK may write in any of their objects and strings must not change how
//! they are read.

use super::*;
use crate::estimate::{Models, PromptPart, RequestKind};
use serde_json::{Value, json};

/// Every field that a reader of bodies knows, and some that it ignores.
const FIELDS: &str = "type text refusal image_url document_url detail input_audio file file_data file_id file_url \
    filename encrypted_content role content name reasoning_content reasoning function_call tool_calls function custom \
    arguments input output summary result code thinking source title context data citations cache_control media_type \
    enabled parts inlineData inline_data fileData functionCall functionResponse executableCode codeExecutionResult \
    thoughtSignature mimeType args response tools functions tool_choice parallel_tool_calls response_format \
    text_format format json_schema schema description strict parameters input_schema functionDeclarations \
    googleSearch parametersJsonSchema stream stream_options include_usage max_tokens max_completion_tokens \
    max_output_tokens n best_of stop suffix model instructions previous_response_id conversation prompt messages \
    contents system systemInstruction mcp_servers output_format output_config reasoning_effort effort mode \
    generationConfig maxOutputTokens candidateCount responseSchema responseJsonSchema cachedContent audio user \
    seed temperature signature metadata annotations id status document video_url url \
    audio_url candidate_count code_execution_result defer_loading disable_parallel_tool_use executable_code \
    function_declarations function_response mime_type parameters_json_schema reasoning_details \
    response_json_schema response_schema thinking_blocks thought_signature tool_name tool_references";

/// Values of these members are JSON that the model reads as it is.
const VERBATIM: [&str; 6] = ["input_schema", "parameters", "schema", "args", "response", "input"];

fn samples() -> Vec<(Api, Value)> {
    let schema = json!({"type": "object", "properties": {"city": {"type": "string", "description": "A city.", "enum": ["a", "b"]}}});
    let chat = json!({
        "model": "gpt-4o", "max_tokens": 50, "n": 2, "stream": true, "stream_options": {},
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "name": "ann", "content": [{"type": "text", "text": "Look:"},
                {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}},
                {"type": "input_audio", "input_audio": {"data": "UklGRg", "format": "wav"}},
                {"type": "file", "file": {"file_id": "file-1"}}]},
            {"role": "assistant", "content": "Yes", "reasoning_content": "Hm",
                "tool_calls": [{"id": "c", "type": "function", "function": {"name": "look", "arguments": "{\"city\":\"x\"}"}}]},
            {"role": "tool", "tool_call_id": "c", "content": "Seen."}],
        "tools": [{"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": schema}},
            {"type": "function", "function": {"name": "nothing"}}],
        "tool_choice": {"type": "function", "function": {"name": "look"}},
        "response_format": {"type": "json_schema", "json_schema": {"name": "r", "description": "An answer.", "schema": schema}},
    });
    let responses = json!({
        "model": "gpt-4.1", "instructions": "Be kind.", "reasoning": {"effort": "low"},
        "input": [{"role": "user", "content": [{"type": "input_text", "text": "Look:"},
                {"type": "input_image", "image_url": "https://example.com/a.png"},
                {"type": "input_file", "file_data": "data:text/plain;base64,aGVsbG8=", "filename": "a.txt"}]},
            {"type": "function_call", "call_id": "c", "name": "look", "arguments": "{\"city\":\"x\"}"},
            {"type": "function_call_output", "call_id": "c", "output": "Seen."}],
        "tools": [{"type": "function", "name": "look", "description": "Looks.", "parameters": schema}, {"type": "web_search"}],
        "text": {"format": {"type": "json_schema", "name": "r", "schema": schema}},
    });
    let messages = json!({
        "model": "claude-sonnet-4-5", "max_tokens": 50, "system": [{"type": "text", "text": "Be kind."}],
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Look:"},
                {"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}},
                {"type": "document", "title": "T", "source": {"type": "text", "media_type": "text/plain", "data": "hello"}}]},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "look", "input": {"city": "x"}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": [{"type": "text", "text": "Seen."}]}]}],
        "tools": [{"name": "look", "description": "Looks.", "input_schema": schema}],
        "tool_choice": {"type": "tool", "name": "look"},
    });
    let gemini = json!({
        "systemInstruction": {"parts": [{"text": "Be kind."}]},
        "contents": [{"role": "user", "parts": [{"text": "Look:"},
                {"inlineData": {"mimeType": "text/plain", "data": "aGVsbG8="}},
                {"fileData": {"mimeType": "text/plain", "fileUri": "x"}}]},
            {"role": "model", "parts": [{"functionCall": {"name": "look", "args": {"city": "x"}}}]},
            {"role": "user", "parts": [{"functionResponse": {"name": "look", "response": {"seen": "yes"}}}]}],
        "tools": [{"functionDeclarations": [{"name": "look", "description": "Looks.", "parameters": schema}]}],
        "generationConfig": {"maxOutputTokens": 50, "responseSchema": schema},
    });
    vec![
        (Api::Chat, chat),
        (Api::Responses, responses),
        (Api::Messages, messages),
        (Api::Gemini, gemini),
        (
            Api::Completions,
            json!({"model": "gpt-3.5-turbo-instruct", "prompt": ["a b", "c"], "suffix": "d", "max_tokens": 5}),
        ),
        (Api::Embeddings, json!({"model": "text-embedding-3-small", "input": ["a b", "c"]})),
    ]
}

/// The part of a body that decides permissions and costs.
#[derive(Debug, PartialEq)]
struct Facts {
    model: Option<String>,
    streams: bool,
    wants_usage: bool,
    completion_cap: Option<u64>,
    completions: u64,
    tokens: u64,
    parts: Vec<u64>,
    unseen: u64,
    is_partial: bool,
    kind: RequestKind,
}

fn facts(api: Api, json: &str) -> Facts {
    let text = BodyText::of(json.as_bytes()).unwrap_or_else(|fault| panic!("{fault} {json}"));
    let body = Body::read(api, &text).unwrap_or_else(|fault| panic!("{fault} {json}"));
    let rules = Models::default().named(body.model.as_deref().unwrap_or_default());
    let estimate = body.prompt.estimate(&rules);
    Facts {
        model: body.model.as_deref().map(str::to_owned),
        streams: body.streams,
        wants_usage: body.wants_usage(),
        completion_cap: body.completion_cap(),
        completions: body.completions(),
        tokens: estimate.tokens(),
        parts: PromptPart::ALL.iter().map(|&part| estimate.of(part)).collect(),
        unseen: estimate.unseen,
        is_partial: estimate.is_partial,
        kind: estimate.kind,
    }
}

/// Copies of a value, each with one more null member in one of its objects. The member's name begins with a character
/// that makes it the first or the last one in the sorted object.
fn with_one_null(value: &Value) -> Vec<Value> {
    let mut copies = Vec::new();
    match value {
        Value::Object(object) => {
            let letters = |name: &str| name.replace('_', "").to_lowercase();
            let is_new = |name: &&str| object.keys().all(|key| letters(key) != letters(name));
            for name in FIELDS.split_whitespace().filter(is_new) {
                for place in ['!', '~'] {
                    let mut object = object.clone();
                    object.insert(format!("{place}{name}"), Value::Null);
                    copies.push(Value::Object(object));
                }
            }
            for (key, inner) in object {
                if inner.is_object() && VERBATIM.contains(&key.as_str()) {
                    continue;
                }
                for copy in with_one_null(inner) {
                    let mut object = object.clone();
                    object[key] = copy;
                    copies.push(Value::Object(object));
                }
            }
        }
        Value::Array(list) => {
            for (at, inner) in list.iter().enumerate() {
                for copy in with_one_null(inner) {
                    let mut list = list.clone();
                    list[at] = copy;
                    copies.push(Value::Array(list));
                }
            }
        }
        _ => {}
    }
    copies
}

/// SDKs send every optional field of an object, with null for those that are not set.
#[test]
fn a_field_that_is_null_is_the_same_as_an_absent_one() {
    for (api, sample) in samples() {
        let expected = facts(api, &sample.to_string());
        assert!(expected.tokens > 0);
        for copy in with_one_null(&sample) {
            let json = copy.to_string().replace("\"!", "\"").replace("\"~", "\"");
            assert_eq!(facts(api, &json), expected, "{api:?} {json}");
        }
    }
}

/// The JSON of a value in which one string or key, at every place in turn, gets a suffix of `escape`.
fn with_one_escape(json: &str, escape: &str) -> Vec<String> {
    let mut copies = Vec::new();
    let (mut at, bytes) = (0, json.as_bytes());
    while let Some(quote) = json[at..].find('"') {
        let from = at + quote + 1;
        let end = from + crate::json::string_length(&bytes[from..]).unwrap();
        copies.push(format!("{}{escape}{}", &json[..end], &json[end..]));
        at = end + 1;
    }
    copies
}

#[test]
fn half_a_surrogate_pair_counts_as_one_replacement_character_in_every_string() {
    for (api, sample) in samples() {
        let json = sample.to_string();
        for (escape, replacement) in
            [(r"\ud83d", r"\ufffd"), (r"\uDE00", r"\ufffd"), (r"\ude00\ud83d", r"\ufffd\ufffd")]
        {
            let copies = |escape: &str| with_one_escape(&json, escape);
            for (copy, expected) in copies(escape).iter().zip(copies(replacement)) {
                let (with_half, expected) =
                    (facts_unless_refused(api, copy), facts_unless_refused(api, &expected));
                assert_eq!(with_half, expected, "{api:?} {copy}");
            }
        }
    }
}

/// The arguments of a call are JSON in a string, so an escape in them is escaped.
#[test]
fn half_a_surrogate_pair_in_the_arguments_of_a_call_hides_no_argument() {
    for (json, count) in [(r#"{"\ud83d":1,"b":"\ude00","c":2}"#, 3), (r#"{"\ud83d\ude00":{}}"#, 1)] {
        assert_eq!(super::content::member_count(json), count, "{json}");
    }
}

/// `None`: the body is refused. A changed key or type may be refused, whatever its escape.
fn facts_unless_refused(api: Api, json: &str) -> Option<Facts> {
    let text = BodyText::of(json.as_bytes()).ok()?;
    Body::read(api, &text).ok()?;
    Some(facts(api, json))
}

#[test]
fn a_null_in_a_text_part_costs_nothing() {
    for field in ["image_url", "input_audio", "file", "document_url", "file_id", "detail"] {
        let json = format!(
            r#"{{"model":"gpt-4o","messages":[{{"role":"user","content":[{{"type":"text","text":"hello","{field}":null}}]}}]}}"#
        );
        assert_eq!(facts(Api::Chat, &json).tokens, 8, "{field}");
    }
}
