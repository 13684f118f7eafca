//! Estimates of the next request of a conversation, and of requests with the same set-up.

use crate::support::*;
use serde_json::{Value, json};

const RAW: &str = "x-tollgate-raw-estimated-prompt-tokens";
const ESTIMATED: &str = "x-tollgate-estimated-prompt-tokens";
/// Prompt tokens that the upstream reports. No count of a prompt of these tests equals it.
const REPORTED: u64 = 60;

const OPEN: &str = "  staging:\n    upstream: backend\n    quotas: { requests: { limit: 999, per: minute } }\ndefault_environment: staging";

/// The estimate of a request, and the count from which it was made.
async fn estimate(gateway: &Gateway, path: &str, headers: &str, body: &str) -> (u64, u64) {
    let reply = gateway.send("POST", path, headers, body).await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    let number = |name: &str| reply.header(name).map(|n| n.parse::<u64>().unwrap());
    let estimated = number(ESTIMATED).unwrap();
    (estimated, number(RAW).unwrap_or(estimated))
}

fn said(role: &str, text: &str) -> Value {
    json!({"role": role, "content": text})
}

/// A chat whose turns were said by the user and the model in alternation.
fn chat(turns: &[&str]) -> String {
    let roles = ["user", "assistant"].into_iter().cycle();
    let messages: Vec<Value> = roles.zip(turns).map(|(role, text)| said(role, text)).collect();
    json!({"model": "gpt-4o", "messages": messages}).to_string()
}

type MakeBody<'a> = &'a dyn Fn(&[&str]) -> String;

#[tokio::test]
async fn the_next_request_of_a_conversation_starts_from_the_reported_tokens_in_every_api() {
    let gemini_path = "/v1beta/models/gemini-2.5-flash:generateContent";
    let gemini = |texts: &[&str]| {
        let part = |text: &&str| json!({"role": "user", "parts": [{"text": text}]});
        json!({"contents": texts.iter().map(part).collect::<Vec<_>>()}).to_string()
    };
    let messages = |texts: &[&str]| chat(texts).replace("gpt-4o", "claude-sonnet-4-5");
    let responses = |texts: &[&str]| chat(texts).replace("messages", "input");
    let of_gemini =
        format!(r#"{{"usageMetadata":{{"promptTokenCount":{REPORTED},"candidatesTokenCount":2}}}}"#);
    let of_anthropic = format!(
        r#"{{"type":"message","usage":{{"input_tokens":9,"cache_read_input_tokens":{},"output_tokens":2}}}}"#,
        REPORTED - 9
    );
    let of_responses = format!(
        "event: response.completed\ndata: {{\"type\":\"response.completed\",\"response\":{{\"usage\":{{\"input_tokens\":{REPORTED},\"output_tokens\":2}}}}}}\n\n"
    );
    let apis: [(&str, Answer, MakeBody<'_>); 5] = [
        (CHAT, Answer::chat(REPORTED, 2), &chat),
        (
            CHAT,
            Answer::stream().event(&delta("Hi")).event(&usage_event(REPORTED, 2)).event(DONE).end(),
            &|texts| chat(texts).replacen('{', r#"{"stream":true,"#, 1),
        ),
        ("/v1/responses", Answer::stream().event(&of_responses).end(), &responses),
        ("/v1/messages", Answer::json(200, &of_anthropic), &messages),
        (gemini_path, Answer::json(200, &of_gemini), &gemini),
    ];
    for (path, answer, body) in apis {
        let upstream = Upstream::always(answer).await;
        let gateway = Gateway::with(&upstream, "", OPEN).await;
        let (first, counted) = estimate(&gateway, path, "", &body(&["hello"])).await;
        assert_eq!(first, counted, "{path}");
        let (second, more) = estimate(&gateway, path, "", &body(&["hello", "Hi", "How are you?"])).await;
        assert_eq!(second, REPORTED + more - counted, "{path}");
        // One with another beginning, and the first request again.
        let (other, counted) = estimate(&gateway, path, "", &body(&["hallo", "Hi", "How are you?"])).await;
        assert_eq!(other, counted, "{path}");
        assert_eq!(estimate(&gateway, path, "", &body(&["hello"])).await.0, REPORTED, "{path}");
        let metrics = gateway.admin_get("/metrics").await;
        for source in ["conversation", "rules"] {
            let line = format!("source=\"{source}\"}} 2\n");
            assert!(metrics.text().contains(&line), "{path}: {line}\n{}", metrics.text());
        }
        for source in ["setup", "calibration"] {
            assert!(!metrics.text().contains(&format!("source=\"{source}\"")), "{path}: {source}");
        }
        // A restart forgets conversations.
        gateway.shutdown().await;
        let gateway = Gateway::with(&upstream, "", OPEN).await;
        let (again, counted) = estimate(&gateway, path, "", &body(&["hello"])).await;
        assert_eq!(again, counted, "{path}");
    }
}

#[tokio::test]
async fn no_caller_learns_from_an_estimate_what_another_one_sent() {
    let upstream = Upstream::always(Answer::chat(REPORTED, 2)).await;
    let environments = "  closed:\n    upstream: backend\n    keys: [{ name: one, secret: key-of-the-first-caller }, { name: two, secret: key-of-the-other-caller }]\n    quotas: { requests: { limit: 999, per: minute } }\n  \
         open:\n    upstream: backend\n    quotas: { requests: { limit: 999, per: minute } }";
    let turns = ["what is our secret plan?", "It is secret.", "And?"];
    let key = |key: &str| format!("authorization: Bearer {key}\r\n");
    let pairs = [
        ("/closed/v1/chat/completions", key("key-of-the-first-caller"), key("key-of-the-other-caller")),
        ("/open/v1/chat/completions", key("sk-one"), key("sk-two")),
        ("/open/v1/chat/completions", key("sk-three"), String::new()),
        ("/open/v1/chat/completions", "x-api-key: sk-one\r\n".into(), "x-api-key: sk-two\r\n".into()),
    ];
    for (path, one, two) in pairs {
        let gateway = Gateway::with(&upstream, "", environments).await;
        let (_, counted) = estimate(&gateway, path, &one, &chat(&turns[..1])).await;
        let (estimated, of_other) = estimate(&gateway, path, &two, &chat(&turns)).await;
        assert_eq!(estimated, of_other, "{path} {two}: nothing of this conversation was sent with this key");
        let (estimated, more) = estimate(&gateway, path, &one, &chat(&turns)).await;
        assert_eq!(estimated, REPORTED + more - counted, "{path} {one}");
    }
}

#[tokio::test]
async fn requests_with_the_same_tools_and_system_prompt_share_an_offset() {
    let upstream = Upstream::always(Answer::chat(REPORTED, 2)).await;
    let gateway = Gateway::with(&upstream, "", OPEN).await;
    let body = |system: &str, text: &str| {
        json!({"model": "gpt-4o", "messages": [said("system", system), said("user", text)]}).to_string()
    };
    let system =
        "You are a kind helper. You answer every question in one short sentence and never lie about a fact.";
    let ask = async |system: &str, text: &str| estimate(&gateway, CHAT, "", &body(system, text)).await;
    let (first, counted) = ask(system, "one").await;
    assert_eq!(first, counted);
    // Half of the offset after one answer, the whole offset once two answers agree.
    let offset = REPORTED - counted;
    assert_eq!(ask(system, "two").await, (counted + offset / 2, counted));
    assert_eq!(ask(system, "three").await, (counted + offset, counted));
    let other = system.replace("kind", "wild");
    assert_eq!(ask(&other, "four").await.0, counted + offset, "this is the calibration after three answers");
    let metrics = gateway.admin_get("/metrics").await;
    for (source, count) in [("rules", 1), ("setup", 2), ("calibration", 1)] {
        let line = format!("source=\"{source}\"}} {count}\n");
        assert!(metrics.text().contains(&line), "{line}\n{}", metrics.text());
    }
}

#[tokio::test]
async fn a_file_of_an_earlier_turn_is_part_of_the_reported_tokens() {
    let upstream = Upstream::always(Answer::chat(9_000, 2)).await;
    let gateway = Gateway::with(&upstream, "", OPEN).await;
    let body = |file: &str, more: &[Value]| {
        let question =
            json!([{"type": "text", "text": "hello"}, {"type": "file", "file": {"file_id": file}}]);
        let messages = [&[json!({"role": "user", "content": question})], more].concat();
        json!({"model": "gpt-4o", "messages": messages}).to_string()
    };
    let (first, counted) = estimate(&gateway, CHAT, "", &body("f-1", &[])).await;
    assert_eq!(first, counted + 2_000, "the default for each reference");
    let more = [said("assistant", "Hi"), said("user", "hello")];
    let (second, more_counted) = estimate(&gateway, CHAT, "", &body("f-1", &more)).await;
    assert_eq!(second, 9_000 + more_counted - counted);
    assert_eq!(estimate(&gateway, CHAT, "", &body("f-2", &more)).await.0, more_counted + 2_000);
}

#[tokio::test]
async fn only_complete_answers_with_reported_usage_teach() {
    let running_usage = delta("Hi").replace("null", &usage(REPORTED, 2));
    let broken = Answer::stream().event(&running_usage).then(Step::Cut);
    let unreported = Answer::json(200, r#"{"choices":[{"message":{"content":"Hi"}}]}"#);
    let incredible =
        Answer::json(200, r#"{"choices":[],"usage":{"prompt_tokens":-60,"completion_tokens":2}}"#);
    for answer in [Answer::json(500, &chat_answer(&usage(REPORTED, 2))), broken, unreported, incredible] {
        let upstream = Upstream::always(answer).await;
        let gateway = Gateway::with(&upstream, "", OPEN).await;
        for _ in 0..3 {
            let reply = gateway.chat(HELLO).await;
            assert_eq!((reply.header(ESTIMATED), reply.header(RAW)), (Some("8"), None));
        }
    }
    let upstream = Upstream::always(Answer::chat(REPORTED, 2)).await;
    let gateway = Gateway::with(&upstream, "", &OPEN.replace("quotas", "calibrate: false\n    quotas")).await;
    for _ in 0..3 {
        assert_eq!(gateway.chat(HELLO).await.header(ESTIMATED), Some("8"), "calibration is turned off");
    }
}

#[tokio::test]
async fn references_to_earlier_answers_count_as_reported() {
    let output = r#"[{"id":"rs_1","type":"reasoning","summary":[]},{"id":"msg_1","type":"message","content":[{"type":"output_text","text":"Hi"}]}]"#;
    let response = format!(
        r#"{{"id":"resp_1","object":"response","output":{output},"usage":{{"input_tokens":{REPORTED},"output_tokens":50,"output_tokens_details":{{"reasoning_tokens":30}}}}}}"#
    );
    let created =
        r#"data: {"type":"response.created","response":{"id":"resp_1","object":"response","output":[]}}"#;
    let stream = Answer::stream()
        .event(&format!("{created}\n\n"))
        .event("data: {\"type\":\"response.output_text.delta\",\"delta\":\"Hi\"}\n\n")
        .event(&format!("data: {{\"type\":\"response.completed\",\"response\":{response}}}\n\n"))
        .end();
    // Without the instructions (1 token of text), and with the answer without its reasoning.
    let conversation = REPORTED - 3 - 1 + 20 + 4;
    let first = json!({"model": "gpt-4o", "instructions": "hello", "input": "hello"});
    let user = json!({"role": "user", "content": "hello"});
    let result = json!({"type": "function_call_output", "call_id": "c", "output": "7"});
    let after =
        |id: &str, input: Value| json!({"model": "gpt-4o", "previous_response_id": id, "input": input});
    let of_items = |input: Value| json!({"model": "gpt-4o", "input": input});
    let reference = |id: &str| json!({"type": "item_reference", "id": id});
    let reasoning = json!({"type": "reasoning", "id": "rs_1", "summary": []});
    for answer in [Answer::json(200, &response), stream] {
        let upstream = Upstream::always(answer).await;
        let requests = [
            ("", after("resp_1", json!("hello")), conversation),
            ("", after("resp_2", json!("hello")), 2_000),
            ("authorization: Bearer sk-other\r\n", after("resp_1", json!("hello")), 2_000),
            // In a loop of tools the model reads its reasoning again.
            ("", after("resp_1", json!([result])), conversation + 30),
            ("", of_items(json!([reference("msg_1"), user])), 20 + 4),
            ("", of_items(json!([reference("msg_1"), reference("msg_2"), user])), 20 + 4 + 2_000),
            ("", of_items(json!([user, reasoning])), 30),
            ("", of_items(json!([reasoning, user])), 0),
        ];
        for (headers, body, known) in requests {
            // A new gateway, because each answer teaches.
            let gateway = Gateway::with(&upstream, "", OPEN).await;
            estimate(&gateway, "/v1/responses", "", &first.to_string()).await;
            let (estimated, counted) = estimate(&gateway, "/v1/responses", headers, &body.to_string()).await;
            assert_eq!(estimated - counted, known, "{body}");
        }
    }
}

#[tokio::test]
async fn reasoning_by_id_counts_where_the_model_reads_it_and_only_once() {
    let output =
        r#"[{"id":"rs_1","type":"reasoning","summary":[]},{"id":"msg_1","type":"message","content":[]}]"#;
    let answer = Answer::json(
        200,
        &format!(
            r#"{{"id":"resp_1","object":"response","output":{output},"usage":{{"input_tokens":{REPORTED},"output_tokens":50,"output_tokens_details":{{"reasoning_tokens":30}}}}}}"#
        ),
    );
    let upstream = Upstream::always(answer).await;
    let user = said("user", "hello");
    let reasoning = json!({"type": "reasoning", "id": "rs_1", "summary": []});
    let turn = [
        json!({"type": "function_call", "call_id": "c", "name": "look", "arguments": "{}"}),
        json!({"type": "function_call_output", "call_id": "c", "output": "7"}),
    ];
    let [call, result] = &turn;
    // The gateway has two figures of the last request besides its count: the reported prompt and the reasoning.
    for (model, inputs, reasoning_tokens) in [
        // Before the last message of the user.
        ("gpt-5", vec![json!([user]), json!([user, reasoning, said("assistant", "Hi"), user])], 0),
        ("grok-3-mini", vec![json!([user]), json!([user, reasoning, said("assistant", "Hi"), user])], 30),
        // In a loop of tools.
        ("gpt-5", vec![json!([user]), json!([user, reasoning, call, result])], 30),
        // The last report includes it.
        (
            "gpt-5",
            vec![
                json!([user]),
                json!([user, reasoning, call, result]),
                json!([user, reasoning, call, result, call, result]),
            ],
            0,
        ),
    ] {
        let gateway = Gateway::with(&upstream, "", OPEN).await;
        let (mut estimated, mut counted, mut before) = (0, 0, 0);
        for input in &inputs {
            before = counted;
            let body = json!({"model": model, "input": input}).to_string();
            (estimated, counted) = estimate(&gateway, "/v1/responses", "", &body).await;
        }
        assert_eq!(estimated, REPORTED + counted - before + reasoning_tokens, "{model} {inputs:?}");
    }
}
