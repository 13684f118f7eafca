use super::*;
use crate::api::Api;
use crate::body::Body;
use serde_json::{Value, json};

fn estimate(api: Api, body: &Value) -> PromptEstimate {
    let text = body.to_string();
    let body = Body::read(api, text.as_bytes()).unwrap();
    body.prompt.estimate(&Models::default().named(body.model.as_deref().unwrap_or_default()))
}

/// The tokens that these fields add to a request.
fn more(api: Api, body: &Value, fields: &Value) -> i64 {
    let mut with = body.clone();
    let fields = fields.as_object().unwrap().clone();
    with.as_object_mut().unwrap().extend(fields);
    let [without, with] = [body, &with].map(|b| i64::try_from(estimate(api, b).tokens()).unwrap());
    with - without
}

#[test]
fn a_required_tool_call_costs_more_at_anthropic() {
    let tool = json!({"name": "look", "description": "Looks.", "input_schema": {"type": "object"}});
    let body = json!({"model": "claude-sonnet-4-6", "max_tokens": 9, "tools": [tool],
        "messages": [{"role": "user", "content": "Hi"}]});
    let more = |choice: Value| more(Api::Messages, &body, &json!({"tool_choice": choice}));
    assert_eq!(more(json!({"type": "auto"})), 0);
    assert_eq!(more(json!({"type": "none"})), 0);
    let any = more(json!({"type": "any"}));
    assert!(any > 50, "{any}");
    let named = more(json!({"type": "tool", "name": "look"}));
    assert!((any + 1..any + 4).contains(&named), "{named}");
}

#[test]
fn earlier_reasoning_counts_for_models_that_read_it_again() {
    let thought = "First I look at the map. Then I count the bridges that lead across the river. ";
    let cost = |model: &str| {
        let [without, with] = ["", thought].map(|thought| {
            let messages = json!([{"role": "user", "content": "How many?"},
                {"role": "assistant", "content": "7", "reasoning_content": thought}]);
            estimate(Api::Chat, &json!({"model": model, "messages": messages})).tokens()
        });
        with - without
    };
    assert_eq!([cost("gpt-4o"), cost("glm-4.7"), cost("grok-4")], [0, 0, 0]);
    assert!(cost("deepseek-chat") > 15 && cost("qwen3-8b") > 15);
    let signed = |model: &str| {
        let part = json!({"text": "7", "thoughtSignature": "A".repeat(180)});
        estimate(Api::Gemini, &json!({"model": model, "contents": [{"role": "model", "parts": [part]}]}))
    };
    assert_eq!(signed("gemini-3-pro").tokens() - signed("gemini-2.5-pro").tokens(), 30);
}

#[test]
fn tool_call_arguments_cost_tokens_at_anthropic() {
    let cost = |model: &str, arguments: Value| {
        let call = json!({"id": "1", "type": "function",
            "function": {"name": "add", "arguments": arguments.to_string()}});
        let messages = json!([{"role": "user", "content": "?"}, {"role": "assistant", "tool_calls": [call]}]);
        estimate(Api::Chat, &json!({"model": model, "messages": messages})).of(PromptPart::Overhead)
    };
    let [none, two] =
        [json!({}), json!({"a": {"x": 1, "y": 2}, "b": 2})].map(|a| cost("claude-sonnet-4-6", a));
    assert_eq!(two - none, 20);
    assert_eq!(cost("gpt-4o", json!({})), cost("gpt-4o", json!({"a": 1})));
}

#[test]
fn every_function_of_a_list_adds_the_same_number_of_tokens() {
    let schema =
        json!({"type": "object", "properties": {"city": {"type": "string", "description": "The city."}}});
    let tool = json!({"type": "function", "function": {"name": "weather", "description": "Tells it.",
        "parameters": schema}});
    let of = |tools: Vec<&Value>| {
        let messages = json!([{"role": "user", "content": "?"}]);
        estimate(Api::Chat, &json!({"model": "mistral-large", "messages": messages, "tools": tools}))
            .of(PromptPart::Tools)
    };
    let [one, two, three] = [vec![&tool], vec![&tool; 2], vec![&tool; 3]].map(of);
    assert!((30..90).contains(&(two - one)), "{one} {two}");
    assert!((two - one).abs_diff(three - two) <= 2, "{one} {two} {three}");
}

#[test]
fn content_outside_the_request_makes_an_estimate_partial() {
    let message = |part: Value| json!([{"role": "user", "content": [part]}]);
    let part = |url: &str| message(json!({"type": "document_url", "document_url": url}));
    let of = |messages: Value| estimate(Api::Chat, &json!({"model": "mistral-large", "messages": messages}));
    assert!(of(part("https://example.com/a.pdf")).is_partial);
    // "%PDF-1.4 /Type /Page "
    let pdf = of(part("data:application/pdf;base64,JVBERi0xLjQgL1R5cGUgL1BhZ2Ug"));
    assert!(!pdf.is_partial && pdf.of(PromptPart::Images) > 0);
    let pro = |mode: &str| {
        estimate(Api::Responses, &json!({"model": "gpt-5.6-x", "input": "Hi", "reasoning": {"mode": mode}}))
    };
    assert!(pro("pro").is_partial && !pro("standard").is_partial);
}
