use super::*;
use crate::api::Api;
use crate::body::{Body, BodyText};
use crate::estimate::{Models, PromptEstimate};
use proptest::prelude::*;
use serde_json::{Value, json};

/// The settings and the prefixes of a body, the longest one first.
fn identified(api: Api, body: &str) -> (u64, Vec<PromptPrefix>) {
    let text = BodyText::of(body.as_bytes()).unwrap();
    let body = Body::read(api, &text).unwrap();
    (body.prompt.settings(), body.prompt.prefixes().collect())
}

fn chat(messages: &[Value], settings: &Value) -> String {
    let mut body = json!({"model": "gpt-4o", "messages": messages});
    body.as_object_mut().unwrap().extend(settings.as_object().unwrap().clone());
    body.to_string()
}

fn said(role: &str, text: &str) -> Value {
    json!({"role": role, "content": text})
}

/// Bodies of one conversation before and after its second turn, in every API with conversations.
fn turns() -> [(Api, Value, Value); 4] {
    let text = "a text that is long enough to be hashed";
    let more = |mut body: Value, field: &str, items: &[Value]| {
        body[field].as_array_mut().unwrap().extend(items.to_vec());
        body
    };
    let chat = json!({"model": "gpt-4o", "messages": [said("system", text), said("user", "hi")]});
    let item = |role: &str, kind: &str| json!({"role": role, "content": [{"type": kind, "text": text}]});
    let responses = json!({"model": "gpt-4o", "input": [item("user", "input_text")], "instructions": text});
    let messages = json!({"model": "claude-sonnet-4-5", "messages": [said("user", text)], "system": text});
    let part = |role: &str| json!({"role": role, "parts": [{"text": text}]});
    let gemini = json!({"contents": [part("user")], "systemInstruction": {"parts": [{"text": text}]}});
    [
        (Api::Chat, chat.clone(), more(chat, "messages", &[said("assistant", text), said("user", "so?")])),
        (
            Api::Responses,
            responses.clone(),
            more(responses, "input", &[item("assistant", "output_text"), item("user", "input_text")]),
        ),
        (
            Api::Messages,
            messages.clone(),
            more(messages, "messages", &[said("assistant", text), said("user", text)]),
        ),
        (Api::Gemini, gemini.clone(), more(gemini, "contents", &[part("model"), part("user")])),
    ]
}

#[test]
fn the_next_request_of_a_conversation_begins_with_the_messages_of_the_last_one() {
    for (api, first, second) in turns() {
        let (settings, prefixes) = identified(api, &first.to_string());
        let (next_settings, next_prefixes) = identified(api, &second.to_string());
        assert_eq!(settings, next_settings, "{api:?}");
        assert_eq!(prefixes[..], next_prefixes[2..], "{api:?}");
        assert_ne!(prefixes[0].hash, next_prefixes[0].hash, "{api:?}");
    }
}

#[test]
fn what_the_model_does_not_read_does_not_change_an_identity() {
    let hashes = |api, body: &str| {
        let (settings, prefixes) = identified(api, body);
        (settings, prefixes.iter().map(|prefix| prefix.hash).collect::<Vec<_>>())
    };
    let plain = hashes(
        Api::Messages,
        r#"{"model":"m","system":"be kind","messages":[{"role":"user","content":[{"type":"text","text":"hi"}]}]}"#,
    );
    for same in [
        r#"{ "messages" : [ {"content":[{"text":"hi","type":"text","cache_control":{"type":"ephemeral"}}],"role":"user"} ], "system": "be kind", "model":"m"}"#,
        r#"{"model":"m","stream":true,"max_tokens":9,"system":[{"type":"text","text":"be kind"}],"messages":[{"role":"user","content":"h\u0069"}]}"#,
    ] {
        assert_eq!(hashes(Api::Messages, same), plain, "{same}");
    }
}

#[test]
fn what_the_model_reads_changes_an_identity() {
    let image = |url: &str| json!([said("user", "hi"), {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]);
    let file = |id: &str| json!([{"role": "user", "content": [{"type": "file", "file": {"file_id": id}}]}]);
    let bodies = [
        (json!([said("user", "hi")]), json!({})),
        (json!([said("user", "ho")]), json!({})),
        (json!([said("assistant", "hi")]), json!({})),
        (json!([said("user", "h"), said("user", "i")]), json!({})),
        (json!([said("user", "hi"), said("user", "")]), json!({})),
        (json!([said("user", "hi")]), json!({"tools": [{"type": "function", "function": {"name": "f"}}]})),
        (json!([said("user", "hi")]), json!({"tools": [{"type": "function", "function": {"name": "g"}}]})),
        (json!([said("user", "hi")]), json!({"tool_choice": "none"})),
        (json!([said("user", "hi")]), json!({"tool_choice": "required"})),
        (json!([said("user", "hi")]), json!({"reasoning_effort": "none"})),
        (
            json!([said("user", "hi")]),
            json!({"response_format": {"json_schema": {"name": "a", "schema": {}}}}),
        ),
        (image("https://example.com/a.png"), json!({})),
        (image("https://example.com/b.png"), json!({})),
        (file("file-1"), json!({})),
        (file("file-2"), json!({})),
    ];
    let identities = bodies.map(|(messages, settings)| {
        let (settings, prefixes) = identified(Api::Chat, &chat(messages.as_array().unwrap(), &settings));
        (settings, prefixes[0].hash)
    });
    for (at, identity) in identities.iter().enumerate() {
        assert_eq!(identities.iter().position(|other| other == identity), Some(at));
    }
}

#[test]
fn any_number_of_messages_keeps_a_bounded_number_of_prefixes() {
    let messages: Vec<Value> = (0..1_000).map(|n| said("user", &n.to_string())).collect();
    let (_, prefixes) = identified(Api::Chat, &chat(&messages, &json!({})));
    assert_eq!(prefixes.len(), MAX_PREFIXES);
    let (_, last) = identified(Api::Chat, &chat(&messages[..999], &json!({})));
    assert_eq!(prefixes[1], last[0]);
}

/// The estimate of a body, with a known prefix of this many messages.
fn estimate(api: Api, body: &str, known: Option<(usize, u64)>) -> PromptEstimate {
    let text = BodyText::of(body.as_bytes()).unwrap();
    let mut body = Body::read(api, &text).unwrap();
    if let Some((messages, tokens)) = known {
        let prefixes: Vec<_> = body.prompt.prefixes().collect();
        body.prompt.set_known(&prefixes[prefixes.len() - messages], tokens);
    }
    body.prompt.estimate(&Models::default().named(body.model.as_deref().unwrap_or("gemini-3-pro")))
}

#[test]
fn the_estimate_after_a_known_prefix_equals_that_of_the_whole_prompt() {
    for (api, first, second) in turns() {
        let before = estimate(api, &first.to_string(), None);
        let messages = identified(api, &first.to_string()).1.len();
        let whole = estimate(api, &second.to_string(), None);
        let after = estimate(api, &second.to_string(), Some((messages, before.message_texts)));
        assert_eq!(
            after.echo > 0,
            matches!(api, Api::Messages | Api::Gemini),
            "{api:?}: only texts of OpenAI's models count exactly"
        );
        assert_eq!(PromptEstimate { echo: 0, ..after }, whole, "{api:?}");
    }
}

#[test]
fn the_answer_after_a_known_prefix_is_all_that_the_model_said_before_the_next_result() {
    let text = "a text that is long enough to be hashed";
    let call = json!({"type": "function_call", "call_id": "1", "name": "look", "arguments": "{}"});
    let result = json!({"type": "function_call_output", "call_id": "1", "output": text});
    let echo = |more: &[&Value]| {
        let mut body = json!({"model": "claude-sonnet-4-5", "input": [said("user", text)]});
        body["input"].as_array_mut().unwrap().extend(more.iter().copied().cloned());
        estimate(Api::Responses, &body.to_string(), Some((1, 0))).echo
    };
    let said = said("assistant", text);
    let [message, one, both] = [echo(&[&said]), echo(&[&call]), echo(&[&said, &call])];
    assert!(message > 0 && one > 0);
    assert_eq!(both, message + one);
    assert_eq!(echo(&[&said, &call, &result]), both);
    assert_eq!(echo(&[&call, &result, &call]), one);
    assert_eq!(echo(&[&result, &said]), 0);
}

proptest! {
    #[test]
    fn estimates_add_up_wherever_a_conversation_is_cut(
        messages in prop::collection::vec((0..4usize, "[a-z ]{0,60}"), 2..9),
        cut in 1..8usize,
        has_tools in any::<bool>(),
        model in 0..4usize,
    ) {
        let roles = ["system", "user", "assistant", "tool"];
        let messages: Vec<Value> = messages.iter().map(|(role, text)| said(roles[*role], text)).collect();
        let cut = cut.min(messages.len() - 1);
        // The functions follow the first system message on a new line, so it must not come after the cut.
        let is_late = messages[cut..].iter().any(|m| m["role"] == "system")
            && !messages[..cut].iter().any(|m| m["role"] == "system");
        prop_assume!(!(has_tools && is_late));
        let model = ["gpt-4o", "gpt-5", "claude-sonnet-4-5", "who-knows"][model];
        let mut settings = json!({"model": model});
        if has_tools {
            settings["tools"] = json!([{"type": "function", "function": {"name": "look", "description": "Looks."}}]);
        }
        let (first, second) = (chat(&messages[..cut], &settings), chat(&messages, &settings));
        let before = estimate(Api::Chat, &first, None);
        let whole = estimate(Api::Chat, &second, None);
        let after = estimate(Api::Chat, &second, Some((cut, before.message_texts)));
        prop_assert_eq!(PromptEstimate { echo: 0, ..after }, whole);
    }
}
