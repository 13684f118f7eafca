use super::*;
use crate::api::Api;
use crate::body::{Body, BodyText};
use crate::estimate::tools::separators;
use crate::estimate::{Models, Provider};
use serde_json::{Value, json};

/// The tokens that these messages or items add to a prompt.
fn added(api: Api, model: &str, provider: Provider, more: &[Value]) -> u64 {
    let field = if api == Api::Responses { "input" } else { "messages" };
    let rules = Models::default().named(model).at(provider);
    let user = json!({"role": "user", "content": "Look at it, please."});
    let [none, all] = [&[][..], more].map(|more| {
        let all = [std::slice::from_ref(&user), more].concat();
        let text = json!({ field: all }).to_string();
        let text = BodyText::of(text.as_bytes()).unwrap();
        Body::read(api, &text).unwrap().prompt.estimate(&rules).tokens()
    });
    all - none
}

fn tokens(model: &str, text: &str) -> u64 {
    Models::default().named(model).tokenizer.count(text)
}

const CALLS: [(&str, &str); 2] = [("read_map", r#"{"city":"Ulm","scale":7}"#), ("list_bridges", "{}")];
const RESULTS: [&str; 2] = ["A river and a lake", "Three bridges."];

/// A message with the first calls, and their results.
fn chat(calls: usize, results: [&str; 2]) -> Vec<Value> {
    let call = |(name, arguments): &(&str, &str)| json!({"id": name, "type": "function", "function": {"name": name, "arguments": arguments}});
    let calls: Vec<Value> = CALLS[..calls].iter().map(call).collect();
    let results = results[..calls.len()]
        .iter()
        .zip(CALLS)
        .map(|(text, (name, _))| json!({"role": "tool", "tool_call_id": name, "content": text}));
    [json!({"role": "assistant", "tool_calls": calls})].into_iter().chain(results).collect()
}

/// The first calls as items, and their results.
fn items(calls: usize, has_id: bool) -> Vec<Value> {
    let call = |(name, arguments): &(&str, &str)| {
        let id = if has_id { name } else { &"" };
        json!({"type": "function_call", "id": id, "call_id": name, "name": name, "arguments": arguments})
    };
    let result = |(text, (name, _)): (&&str, &(&str, &str))| json!({"type": "function_call_output", "call_id": name, "output": text});
    let calls = &CALLS[..calls];
    calls.iter().map(call).chain(RESULTS.iter().zip(calls).map(result)).collect()
}

/// The tokens of calls that stay apart: each name is there twice.
fn apart(model: &str, calls: usize) -> u64 {
    let call = |(name, arguments): &(&str, &str)| 2 * tokens(model, name) + tokens(model, arguments);
    let texts: u64 = RESULTS[..calls].iter().map(|text| tokens(model, text)).sum();
    CALLS[..calls].iter().map(call).sum::<u64>() + texts
}

/// The tokens of calls that are one call, and of their results in one message.
fn joined(model: &str, results: &str) -> u64 {
    let call = |(name, arguments): &(&str, &str)| {
        format!(r#"{{"recipient_name":"functions.{name}","parameters":{arguments}}}"#)
    };
    let all = CALLS.each_ref().map(call).join(",");
    tokens(model, &format!(r#"{{"tool_uses":[{all}]}}"#)) + tokens(model, results)
}

#[test]
fn openai_reads_several_calls_of_a_chat_message_as_one_call_with_one_result() {
    for (model, one, several) in [("gpt-4o", 13, 23), ("gpt-5", 19, 29), ("gpt-5.4", 19, 29)] {
        let cost = |messages: &[Value]| added(Api::Chat, model, Provider::OpenAi, messages);
        assert_eq!(cost(&chat(1, RESULTS)), apart(model, 1) + one, "{model}");
        assert_eq!(cost(&chat(2, RESULTS)), joined(model, &RESULTS.join("\n")) + several, "{model}");
        // A line break after a full stop is no token of its own.
        let ended = ["A river.", "None"];
        assert_eq!(cost(&chat(2, ended)), joined(model, &ended.join("\n")) + several, "{model}");
        // JSON gets a space after each colon and comma, and costs one token more.
        let results = [r#"{"a":[1,2]}"#, "None"];
        assert_eq!(cost(&chat(2, results)), joined(model, &results.join("\n")) + several + 3, "{model}");
    }
    // The calls of separate messages stay apart.
    let twice = [chat(1, RESULTS), chat(1, RESULTS)].concat();
    assert_eq!(added(Api::Chat, "gpt-4o", Provider::OpenAi, &twice), 2 * (apart("gpt-4o", 1) + 13));
}

#[test]
fn calls_of_the_responses_api_stay_apart_and_cost_by_model() {
    for (model, has_id, one, two) in [
        ("gpt-4o", false, 11, 22),
        ("gpt-4o", true, 14, 22),
        ("gpt-5", false, 17, 34),
        ("gpt-5.2", false, 17, 34),
        ("o4-mini", false, 17, 34),
        ("gpt-5.3-codex", false, 20, 50),
        ("gpt-5.4", false, 20, 50),
        ("gpt-6", false, 20, 50),
    ] {
        for (calls, more) in [(1, one), (2, two)] {
            let cost = added(Api::Responses, model, Provider::OpenAi, &items(calls, has_id));
            assert_eq!(cost, apart(model, calls) + more, "{model} {has_id} {calls}");
        }
        // Routers convert chats. The messages become items without roles.
        if !has_id && model.starts_with("gpt-5") {
            for (calls, more) in [(1, one), (2, two)] {
                let cost = added(Api::Chat, model, Provider::Router, &chat(calls, RESULTS));
                assert_eq!(cost, apart(model, calls) + more, "{model} {calls}");
            }
        }
    }
    // Each further call of one turn costs 14 tokens with gpt-5.4.
    let call = json!({"type": "function_call", "call_id": "c", "name": "look", "arguments": "{}"});
    let result = json!({"type": "function_call_output", "call_id": "c", "output": "7"});
    let cost = |n: usize| {
        let all = [vec![call.clone(); n], vec![result.clone(); n]].concat();
        added(Api::Responses, "gpt-5.4", Provider::OpenAi, &all)
    };
    assert_eq!([cost(3) - cost(2), cost(4) - cost(3)], [14 + 2 + 1 + 1; 2]);
}

#[test]
fn openai_reads_arguments_without_white_space_and_no_name_beside_a_result() {
    let cost = |model: &str, arguments: &str, name: &str| {
        let mut messages = chat(1, RESULTS);
        messages[0]["tool_calls"][0]["function"]["arguments"] = json!(arguments);
        messages[1]["name"] = json!(name);
        added(Api::Chat, model, Provider::Unknown, &messages)
    };
    let (spaced, plain) = ("{\"city\": \"Ulm\",\n \"scale\": 7}", CALLS[0].1);
    for (model, is_openai) in
        [("gpt-4o", true), ("gpt-5", true), ("gpt-3.5-turbo", false), ("qwen3-8b", false)]
    {
        let base = cost(model, plain, "");
        assert_eq!(cost(model, spaced, "") == base, is_openai, "{model}");
        assert_eq!(cost(model, plain, "read_map") == base, is_openai, "{model}");
    }
}

#[test]
fn each_earlier_answer_costs_more_in_chats_with_a_schema() {
    let cost = |model: &str, schema: Value, answers: usize| {
        let user = json!({"role": "user", "content": "?"});
        let answer = json!({"role": "assistant", "content": "{}"});
        let turns = vec![[answer, user.clone()]; answers].concat();
        let messages = [vec![user], turns].concat();
        let body = json!({"model": model, "messages": messages, "response_format": schema}).to_string();
        let text = BodyText::of(body.as_bytes()).unwrap();
        Body::read(Api::Chat, &text).unwrap().prompt.estimate(&Models::default().named(model)).tokens()
    };
    let schema = json!({"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}});
    for (model, more) in [("gpt-4o", 3), ("gpt-5.4", 3), ("grok-3", 0)] {
        let [with, without] =
            [schema.clone(), Value::Null].map(|s| cost(model, s.clone(), 2) - cost(model, s, 0));
        assert_eq!(with - without, 2 * more, "{model}");
    }
}

#[test]
fn any_texts_of_calls_are_counted_without_a_failure() {
    for arguments in ["", "{", "\"", "{\"a\\", "[ 1", "é {", "{ é\u{0}", "null"] {
        let call = json!({"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}});
        for calls in [1, 3] {
            let message = json!({"role": "assistant", "tool_calls": vec![call.clone(); calls]});
            let result = json!({"role": "tool", "content": arguments});
            assert!(added(Api::Chat, "gpt-4o", Provider::OpenAi, &[message, result]) > 0, "{arguments}");
        }
    }
}

#[test]
fn white_space_and_separators_count_between_the_tokens_of_json_only() {
    for (text, has_no_space, separated) in [
        (r#"{"a":"b, c: d","e":[1,2]}"#, true, Some(4)),
        (r#"{"a": "b", "c": 1}"#, false, Some(0)),
        (r#"{"a\" ":"\\"}"#, true, Some(1)),
        ("{ }", false, Some(0)),
        ("{a b, c}", false, None),
        ("plain text, no JSON: none", true, None),
        ("7", true, None),
        ("", true, None),
    ] {
        assert_eq!((is_compact(text), separators(text)), (has_no_space, separated), "{text}");
    }
}
