use super::*;
use crate::api::Api;
use crate::body::{Body, BodyText};
use serde_json::{Value, json};

fn estimate(api: Api, body: &Value) -> PromptEstimate {
    let text = body.to_string();
    let text = BodyText::of(text.as_bytes()).unwrap();
    let body = Body::read(api, &text).unwrap();
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

const THOUGHT: &str = "First I look at the map. Then I count the bridges that lead across the river. ";

/// The tokens that reasoning adds to a chat before and after the last message of the user.
fn chat_thinking(model: &str, provider: Provider, thought: &Value) -> [u64; 2] {
    let tokens = |before: &Value, after: &Value| {
        let mut first = json!({"role": "assistant", "content": "7"});
        first.as_object_mut().unwrap().extend(before.as_object().unwrap().clone());
        let call = json!({"id": "1", "type": "function", "function": {"name": "look", "arguments": "{}"}});
        let mut second = json!({"role": "assistant", "tool_calls": [call]});
        second.as_object_mut().unwrap().extend(after.as_object().unwrap().clone());
        let messages = json!([{"role": "user", "content": "How many?"}, first,
            {"role": "user", "content": "Sure?"}, second,
            {"role": "tool", "tool_call_id": "1", "content": "7"}]);
        let text = json!({"model": model, "messages": messages}).to_string();
        let text = BodyText::of(text.as_bytes()).unwrap();
        let body = Body::read(Api::Chat, &text).unwrap();
        body.prompt.estimate(&Models::default().named(model).at(provider)).tokens()
    };
    let none = json!({});
    let without = tokens(&none, &none);
    [tokens(thought, &none) - without, tokens(&none, thought) - without]
}

#[test]
fn earlier_reasoning_counts_by_its_place_and_the_family_of_the_model() {
    let visible = json!({"reasoning_content": THOUGHT});
    let reads = |model: &str, provider: Provider| {
        chat_thinking(model, provider, &visible).map(|tokens| {
            assert!(tokens == 0 || (15..30).contains(&tokens), "{model}: {tokens}");
            tokens > 0
        })
    };
    for (model, expected) in [
        ("gpt-4o", [false, false]),
        ("gpt-5.6-sol", [false, false]),
        ("glm-5", [false, false]),
        ("glm-4.7", [false, true]),
        ("grok-4", [false, false]),
        ("deepseek-r1", [false, false]),
        ("claude-haiku-4-5", [false, true]),
        ("qwen3-8b", [false, true]),
        ("gpt-oss-20b", [false, true]),
        ("deepseek-chat", [false, true]),
        ("no-such-model", [false, true]),
        ("claude-sonnet-4-6", [true, true]),
        ("magistral-small", [true, true]),
    ] {
        assert_eq!(reads(model, Provider::Unknown), expected, "{model}");
    }
    for provider in [Provider::Groq, Provider::Ollama] {
        assert_eq!(reads("openai/gpt-oss-20b", provider), [false, false]);
        assert_eq!(reads("qwen3-8b", provider), [false, true]);
    }
}

#[test]
fn reasoning_that_is_sent_in_several_fields_counts_once() {
    let once = chat_thinking("qwen3-8b", Provider::Unknown, &json!({"reasoning": THOUGHT}));
    let block = json!({"type": "thinking", "thinking": THOUGHT, "signature": "c2ln"});
    let detail = json!({"type": "reasoning.text", "text": THOUGHT, "signature": "c2ln"});
    for thought in [
        json!({"reasoning_details": [detail]}),
        json!({"reasoning": THOUGHT, "reasoning_content": THOUGHT, "reasoning_details": [detail]}),
        json!({"reasoning_content": THOUGHT, "thinking_blocks": [block]}),
    ] {
        assert_eq!(chat_thinking("qwen3-8b", Provider::Unknown, &thought), once, "{thought}");
    }
    let unsigned = json!({"reasoning_details": [{"type": "reasoning.text", "text": THOUGHT}]});
    assert_eq!(chat_thinking("qwen3-8b", Provider::Unknown, &unsigned), [0, 0]);
    let blocks = json!([{"type": "thinking", "thinking": [{"type": "text", "text": THOUGHT}]}]);
    let [before, after] = chat_thinking("magistral-small", Provider::Unknown, &json!({"content": blocks}));
    // The first block replaces a short text.
    assert!((14..30).contains(&before) && after == before + 2, "{before} {after}");
    // Only encrypted reasoning counts for OpenAI's models.
    let encrypted = json!({"reasoning": THOUGHT, "reasoning_details":
        [{"type": "reasoning.summary", "summary": THOUGHT}, {"type": "reasoning.encrypted", "data": "A".repeat(2_000)}]});
    assert_eq!(chat_thinking("openai/gpt-5", Provider::Router, &encrypted), [0, 182]);
}

#[test]
fn encrypted_reasoning_in_responses_counts_after_the_last_message_of_the_user() {
    let cost = |model: &str, before: usize, after: usize| {
        let thought = |length: usize| json!({"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "A".repeat(length)});
        let input = json!([{"role": "user", "content": "Hi"}, thought(before),
            {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "Look."}, thought(after),
            {"type": "function_call", "call_id": "c", "name": "look", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": "ok"}]);
        estimate(Api::Responses, &json!({"model": model, "input": input})).tokens()
    };
    let none = cost("gpt-5-nano", 0, 0);
    assert_eq!([cost("gpt-5-nano", 6_000, 0), cost("gpt-5-nano", 0, 6_000)], [none, none + 790]);
    assert_eq!(cost("gpt-5.6-sol", 6_000, 6_000), cost("gpt-5.6-sol", 0, 0) + 2 * 790);
    assert_eq!(cost("gpt-4o", 6_000, 6_000), cost("gpt-4o", 0, 0));

    // A summary of earlier messages is always in the prompt, also before a message of the user.
    let compacted = |length: usize| {
        let summary = json!({"type": "compaction", "encrypted_content": "A".repeat(length)});
        let input = json!([summary, {"role": "user", "content": "Hi"}]);
        estimate(Api::Responses, &json!({"model": "gpt-5-nano", "input": input})).tokens()
    };
    assert_eq!(compacted(6_000) - compacted(0), 790);
}

#[test]
fn the_result_of_a_tool_is_no_message_of_the_user_at_anthropic() {
    let cost = |thinking: &Value, last: &Value| {
        let mut content = vec![json!({"type": "tool_use", "id": "t", "name": "look", "input": {}})];
        content.extend(thinking.as_array().unwrap().clone());
        let messages = json!([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": content},
            {"role": "user", "content": last}]);
        estimate(Api::Messages, &json!({"model": "claude-haiku-4-5", "messages": messages})).tokens()
    };
    let result =
        json!({"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": "ok"}]});
    let text = json!({"type": "text", "text": "And?"});
    for (thought, tokens) in [
        (json!([{"type": "thinking", "thinking": THOUGHT, "signature": "A".repeat(400)}]), 15..30),
        // The text is not shown: its signature has it.
        (json!([{"type": "thinking", "thinking": "", "signature": "A".repeat(1_235)}]), 188..189),
        (json!([{"type": "redacted_thinking", "data": "A".repeat(1_235)}]), 188..189),
    ] {
        let more = |last: &Value| cost(&thought, last) - cost(&json!([]), last);
        assert!(tokens.contains(&more(&json!([result]))), "{thought}");
        assert_eq!([more(&json!([result, text])), more(&json!("And?"))], [0, 0], "{thought}");
    }
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
fn calls_of_one_message_cost_other_tokens_than_the_same_calls_one_after_the_other() {
    let chat = |model: &str, calls: usize| {
        let call = json!({"id": "1", "type": "function", "function": {"name": "look", "arguments": "{}"}});
        let messages = json!([{"role": "user", "content": "?"},
            {"role": "assistant", "tool_calls": vec![call; calls]}]);
        estimate(Api::Chat, &json!({"model": model, "messages": messages})).tokens()
    };
    let messages = |model: &str, calls: usize| {
        let call = json!({"type": "tool_use", "id": "1", "name": "look", "input": {}});
        let messages = json!([{"role": "user", "content": "?"},
            {"role": "assistant", "content": vec![call; calls]}]);
        estimate(Api::Messages, &json!({"model": model, "messages": messages})).tokens()
    };
    // What the second call costs more than the third.
    let more = |of: &dyn Fn(&str, usize) -> u64, model: &str| {
        let [one, two, three] = [1, 2, 3].map(|calls| of(model, calls).cast_signed());
        2 * two - one - three
    };
    assert_eq!(
        ["claude-sonnet-4-5", "deepseek-chat", "qwen3-8b", "kimi-k2"].map(|model| more(&chat, model)),
        [26, -25, -6, 0]
    );
    assert_eq!(more(&messages, "claude-sonnet-4-5"), 26);
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

#[test]
fn tools_in_the_input_of_responses_count_like_other_tools() {
    let tool = json!({"type": "function", "name": "weather", "description": "Tells the weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "The city."}}}});
    for model in ["gpt-5", "gpt-4o", "grok-4"] {
        let item = json!({"type": "additional_tools", "role": "developer", "tools": [tool]});
        let input =
            |item: &Value| json!({"model": model, "input": [{"role": "user", "content": "Hi"}, item]});
        let of = |item: &Value| estimate(Api::Responses, &input(item)).of(PromptPart::Tools);
        let listed = json!({"model": model, "input": "Hi", "tools": [tool]});
        assert_eq!(of(&item), estimate(Api::Responses, &listed).of(PromptPart::Tools), "{model}");
        assert!(of(&item) > 20);
    }
}

#[test]
fn a_nested_function_counts_in_chats_only() {
    let inner = json!({"name": "weather", "description": THOUGHT, "parameters": {"type": "object", "properties":
        {"city": {"type": "string", "description": THOUGHT}}}});
    for model in ["gpt-4o", "gpt-5", "grok-4"] {
        let of = |api, tool: Value| {
            let body = json!({"model": model, "messages": [], "input": "Hi", "tools": [tool]});
            estimate(api, &body).of(PromptPart::Tools)
        };
        let named = json!({"type": "function", "name": "weather", "function": inner});
        let bare = json!({"type": "function", "name": "weather"});
        assert_eq!(of(Api::Responses, named.clone()), of(Api::Responses, bare), "{model}");
        let nested = json!({"type": "function", "function": inner});
        assert_eq!(of(Api::Chat, named), of(Api::Chat, nested.clone()), "{model}");
        assert!(of(Api::Responses, nested) > 30, "{model}");
    }
}

fn weather() -> Value {
    json!({"name": "weather", "description": "Tells the weather of a city.", "parameters": {"type": "object",
        "properties": {"city": {"type": "string", "description": "The city."}}, "required": ["city"]}})
}

/// The tokens of a chat at a provider, with these fields added.
fn chat(model: &str, provider: Provider, fields: &Value) -> i64 {
    let mut body = json!({"model": model, "messages": [{"role": "user", "content": "How is it in Rome?"}]});
    body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    let text = body.to_string();
    let text = BodyText::of(text.as_bytes()).unwrap();
    let body = Body::read(Api::Chat, &text).unwrap();
    i64::try_from(body.prompt.estimate(&Models::default().named(model).at(provider)).tokens()).unwrap()
}

#[test]
fn a_model_reads_another_prompt_at_some_providers() {
    let tools = json!({"tools": [{"type": "function", "function": weather()}]});
    let less = |model: &str, fields: &Value, [one, other]: [Provider; 2]| {
        chat(model, one, fields) - chat(model, other, fields)
    };
    for provider in [Provider::OpenAi, Provider::Azure, Provider::Unknown] {
        let more = less("gpt-5", &tools, [provider, Provider::Router]);
        assert!((76..86).contains(&more), "{provider:?}: {more}");
        assert_eq!(less("gpt-5", &json!({}), [provider, Provider::Router]), 0);
        assert_eq!(less("gpt-4o", &tools, [provider, Provider::Router]), 0);
    }
    // Routers send these to the Responses API too, where a required call costs 9 more.
    let required = json!({"tools": tools["tools"], "tool_choice": "required"});
    let more = |model: &str| chat(model, Provider::Router, &required) - chat(model, Provider::Router, &tools);
    assert_eq!(["gpt-4.1-mini", "gpt-4o-mini"].map(more), [9, 0]);
    assert_eq!(less("llama-3.3-8b", &json!({}), [Provider::Unknown, Provider::Router]), 23);
    assert_eq!(less("grok-4-1-fast-non-reasoning", &json!({}), [Provider::Unknown, Provider::Azure]), 166);
    assert_eq!(less("llama-4-scout-17b", &tools, [Provider::Groq, Provider::Unknown]), 506);
    assert_eq!(less("llama-3.3-70b", &tools, [Provider::Groq, Provider::Unknown]), 0);
}

#[test]
fn parallel_calls_that_are_forbidden_change_the_prompt_for_tools() {
    let serial = |model: &str, fields: Value| {
        let mut tools = json!({"tools": [{"type": "function", "function": weather()}]});
        tools.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        let mut forbidden = tools.clone();
        forbidden["parallel_tool_calls"] = json!(false);
        chat(model, Provider::Unknown, &forbidden) - chat(model, Provider::Unknown, &tools)
    };
    assert_eq!(
        ["claude-haiku-4-5", "claude-sonnet-4", "gpt-4o"].map(|m| serial(m, json!({}))),
        [-208, -20, 0]
    );
    assert_eq!(serial("claude-haiku-4-5", json!({"tool_choice": "required"})), 0);

    let tool = json!({"name": "look", "description": "Looks.", "input_schema": {"type": "object"}});
    let body = |choice: Value| {
        json!({"model": "claude-sonnet-4-6", "max_tokens": 9, "tools": [tool], "tool_choice": choice,
            "messages": [{"role": "user", "content": "Hi"}]})
    };
    let messages = |choice: Value| estimate(Api::Messages, &body(choice)).tokens();
    let free = messages(json!({"type": "auto"}));
    assert_eq!(free - messages(json!({"type": "auto", "disable_parallel_tool_use": true})), 206);
    assert_eq!(free, messages(json!({"type": "auto", "disable_parallel_tool_use": false})));

    let responses = |model: &str, more: &Value| {
        let mut tool = weather();
        tool["type"] = json!("function");
        let mut body = json!({"model": model, "input": "Hi", "tools": [tool]});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        estimate(Api::Responses, &body).tokens()
    };
    let forbidden = json!({"parallel_tool_calls": false});
    for (model, more) in [("gpt-5-nano", 78), ("gpt-4o", 21), ("grok-4.3", 0)] {
        assert_eq!(responses(model, &forbidden) - responses(model, &json!({})), more, "{model}");
    }
}

#[test]
fn a_system_prompt_is_not_a_message_for_some_models() {
    let system = |model: &str| {
        let messages = json!([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How is it in Rome?"}]);
        chat(model, Provider::Unknown, &json!({"messages": messages}))
            - chat(model, Provider::Unknown, &json!({}))
    };
    let text = i64::try_from(Models::default().named("gpt-4o").tokenizer.count_all(["Be brief."])).unwrap();
    // Four tokens for a message of gpt-4o.
    assert_eq!(system("gpt-4o"), text + 4);
    // A token of role, one of message, and what the family takes back.
    assert_eq!(["claude-haiku-4-5", "claude-sonnet-4-6"].map(system), [text + 1 + 2 - 3, text + 1 + 2 - 1]);
    // These have a prompt of their own without one.
    assert_eq!([system("minimax-m2"), system("gemma-3-27b")], [text + 1 + 3 - 25, text + 1 + 4 - 4]);
}

#[test]
fn a_description_of_the_model_is_in_chats_with_free_tools_only() {
    let tools =
        |choice: &str| json!({"tools": [{"type": "function", "function": weather()}], "tool_choice": choice});
    let of = |fields: &Value| chat("grok-3", Provider::Unknown, fields);
    assert!(of(&json!({})) < 20);
    assert_eq!(of(&tools("auto")) - of(&tools("required")), 112);
    assert_eq!(of(&tools("auto")) - of(&tools("none")), 112);
    let response = estimate(Api::Responses, &json!({"model": "grok-3", "input": "Hi"})).tokens();
    assert!(response > 118, "{response}");
}

#[test]
fn deferred_tools_count_once_the_conversation_has_loaded_them() {
    let tool = |name: &str, defers: bool| json!({"name": name, "description": THOUGHT, "input_schema": weather()["parameters"], "defer_loading": defers});
    let references = |names: &[&str]| -> Value {
        names.iter().map(|name| json!({"type": "tool_reference", "tool_name": name})).collect()
    };
    let of = |defers: bool, blocks: Value| {
        let body = json!({"model": "claude-sonnet-4-5", "max_tokens": 9,
            "tools": [tool("here", false), tool("one", defers), tool("two", defers)],
            "messages": [{"role": "user", "content": "Hi"}, {"role": "user", "content": blocks}]});
        estimate(Api::Messages, &body).of(PromptPart::Tools)
    };
    let result =
        |names: &[&str]| json!([{"type": "tool_result", "tool_use_id": "t", "content": references(names)}]);
    let searched = |names: &[&str]| {
        let found = json!({"type": "tool_search_tool_search_result", "tool_references": references(names)});
        json!([{"type": "tool_search_tool_result", "tool_use_id": "t", "content": found}])
    };
    let none = of(true, json!("Hi"));
    let (one, two) = (of(true, result(&["one"])), of(true, result(&["one", "two"])));
    assert!(one - none > 20 && two - one == one - none, "{none} {one} {two}");
    assert_eq!([of(true, searched(&["two", "other"])), of(true, result(&["other"]))], [one, none]);
    assert_eq!([of(false, json!("Hi")), of(false, result(&["one"]))], [two, two]);

    // A list in the input of a Responses request was loaded.
    let listed = |key: &str, item: &str| {
        let mut function = weather();
        function["type"] = json!("function");
        function["defer_loading"] = json!(true);
        let mut body = json!({"model": "gpt-5", "input": [{"type": item, key: [function]}]});
        body["tools"] = json!([function]);
        estimate(Api::Responses, &body).of(PromptPart::Tools)
    };
    assert_eq!(listed("other", "message"), 0);
    assert!(listed("tools", "tool_search_output") > 20);
}

/// The tokens of a part of a request to a model at a service.
fn at(provider: Provider, part: PromptPart, body: &Value) -> u64 {
    let text = body.to_string();
    let text = BodyText::of(text.as_bytes()).unwrap();
    let body = Body::read(Api::Gemini, &text).unwrap();
    let model = Models::default().named(body.model.as_deref().unwrap()).at(provider);
    body.prompt.estimate(&model).of(part)
}

#[test]
fn gemini_reads_words_at_vertex_and_json_at_ai_studio() {
    let schema = json!({"type": "object", "required": ["city"], "properties": {
        "city": {"type": "string", "description": "The city"}, "unit": {"type": "string", "enum": ["C", "F"]}}});
    let tools = json!([{"functionDeclarations": [{"name": "weather", "description": "Tells it.", "parameters": schema}]}]);
    let body =
        |model: &str| json!({"model": model, "contents": [{"parts": [{"text": "Hi"}]}], "tools": tools});
    // "weather Tells it. object city string The city unit string C F"
    for model in ["gemini-3-flash", "gemini-2.5-pro"] {
        assert_eq!(at(Provider::Vertex, PromptPart::Tools, &body(model)), 14, "{model}");
        assert!(at(Provider::AiStudio, PromptPart::Tools, &body(model)) > 30, "{model}");
    }
    assert_eq!(at(Provider::AiStudio, PromptPart::Tools, &body("gemini-2.0-flash")), 14 + 3);
    assert!(at(Provider::Router, PromptPart::Tools, &body("gemini-3.1-pro")) > 30);
    // The role of a message is not in the prompt at Vertex AI.
    let roles = |provider| at(provider, PromptPart::Messages, &body("gemini-2.5-pro"));
    assert_eq!(roles(Provider::AiStudio) - roles(Provider::Vertex), 1);
}

#[test]
fn a_tool_that_google_hosts_costs_nothing_by_itself() {
    let body = json!({"model": "gemini-2.5-pro", "contents": [{"parts": [{"text": "Hi"}]}],
        "tools": [{"googleSearch": {}}]});
    assert_eq!(at(Provider::AiStudio, PromptPart::Tools, &body), 0);
    assert!(estimate(Api::Gemini, &body).is_partial);
}

#[test]
fn gemini_3_reads_thoughts_after_the_last_message_of_the_user_at_ai_studio() {
    let thought = json!({"text": "7", "thoughtSignature": "A".repeat(1_147)});
    let [before, after] = [true, false].map(|is_answered| {
        let mut contents = vec![
            json!({"role": "user", "parts": [{"text": "?"}]}),
            json!({"role": "model", "parts": [thought]}),
        ];
        contents.extend(is_answered.then(|| json!({"role": "user", "parts": [{"text": "?"}]})));
        move |model: &str, provider| {
            let with = json!({"model": model, "contents": contents});
            let without = with.to_string().replace(&"A".repeat(1_147), "");
            let of = |body: &Value| at(provider, PromptPart::Messages, body);
            of(&with) - of(&serde_json::from_str(&without).unwrap())
        }
    });
    assert_eq!(after("gemini-3-flash", Provider::AiStudio), 204);
    assert_eq!(before("gemini-3-flash", Provider::AiStudio), 0);
    assert_eq!(after("gemini-3-flash", Provider::Vertex), 0);
    assert_eq!(before("gemini-3.5-flash", Provider::AiStudio), 191);
}
