//! JSON that SDKs really send and strict parsers refuse: it is forwarded byte for byte.

use crate::support::*;

/// A request of each API, with a text, a tool and a schema.
const REQUESTS: [(&str, &str); 6] = [
    (
        "/v1/chat/completions",
        r#"{"model":"gpt-4o","messages":[{"role":"user","content":"MARK"},{"role":"assistant","tool_calls":[{"id":"c","type":"function","function":{"name":"MARK","arguments":"{\"MARK\":1}"}}]}],"tools":[{"type":"function","function":{"name":"MARK","description":"MARK","parameters":{"type":"object","properties":{"MARK":{"type":"string","description":"MARK","enum":["MARK"]}}}}}],"MARK":{"MARK":["MARK"]}}"#,
    ),
    ("/v1/completions", r#"{"model":"gpt-4o","prompt":["MARK"],"suffix":"MARK","user":"MARK"}"#),
    (
        "/v1/responses",
        r#"{"model":"gpt-4o","instructions":"MARK","input":[{"role":"user","content":[{"type":"input_text","text":"MARK"}]}],"tools":[{"type":"function","name":"MARK","description":"MARK","parameters":{"MARK":"MARK"}}],"metadata":{"MARK":"MARK"}}"#,
    ),
    ("/v1/embeddings", r#"{"model":"text-embedding-3-small","input":["MARK"],"MARK":"MARK"}"#),
    (
        "/v1/messages",
        r#"{"model":"claude-sonnet-4-5","max_tokens":5,"system":"MARK","messages":[{"role":"user","content":[{"type":"text","text":"MARK"},{"type":"tool_use","id":"t","name":"MARK","input":{"MARK":"MARK"}}]}],"tools":[{"name":"MARK","description":"MARK","input_schema":{"MARK":"MARK"}}]}"#,
    ),
    (
        "/v1beta/models/gemini-2.5-pro:generateContent",
        r#"{"contents":[{"role":"user","parts":[{"text":"MARK"},{"functionCall":{"name":"MARK","args":{"MARK":"MARK"}}}]}],"tools":[{"functionDeclarations":[{"name":"MARK","description":"MARK","parameters":{"MARK":"MARK"}}]}]}"#,
    ),
];

/// A gateway whose estimates do not depend on earlier answers.
async fn gateway(upstream: &Upstream) -> Gateway {
    let environments = "  staging: { upstream: backend, calibrate: false, quotas: { requests: { limit: 999, per: minute } } }\ndefault_environment: staging";
    Gateway::with(upstream, "", environments).await
}

#[tokio::test]
async fn half_a_surrogate_pair_is_forwarded_unchanged_on_every_api() {
    const ESTIMATE: &str = "x-tollgate-estimated-prompt-tokens";
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let gateway = gateway(&upstream).await;
    for (path, request) in REQUESTS {
        let whole = gateway.post(path, &request.replace("MARK", r"a\ufffd")).await;
        for half in [r"a\ud83d", r"a\uDE00"] {
            let body = request.replace("MARK", half);
            let reply = gateway.post(path, &body).await;
            assert_eq!(reply.status, 200, "{path} {}", reply.text());
            assert_eq!(upstream.seen().pop().unwrap().text(), body);
            let differs_in_json_text =
                request.contains("\\\"MARK") || request.contains("args") || request.contains("\"input\":{");
            if !differs_in_json_text {
                assert_eq!(reply.header(ESTIMATE), whole.header(ESTIMATE), "{path} {half}");
            }
        }
    }
    // Bodies whose prompt is not counted.
    for path in ["/v1/rerank", "/v1/moderations", "/v1/images/generations", "/v1/messages/count_tokens"] {
        let body = r#"{"model":"m\ud83d","\ude00":"\ud83d","input":["\ud83d"]}"#;
        assert_eq!(gateway.post(path, body).await.status, 200, "{path}");
        assert_eq!(upstream.seen().pop().unwrap().text(), body);
    }
}

#[tokio::test]
async fn a_stream_that_cuts_an_emoji_in_two_is_counted_and_passed_on() {
    let events = [delta(r"Hi \ud83d"), delta(r"\ude00"), DONE.to_owned()];
    let upstream = Upstream::always(Answer::stream().events(&events).end()).await;
    let gateway = gateway(&upstream).await;
    let reply = gateway.chat(&hello(r#""stream":true"#)).await;
    assert_eq!(reply.text(), events.concat());
    let [_, _, completion, _] = gateway.settled_charges().await;
    let text = "Hi \u{fffd}\u{fffd}";
    let expected = tiktoken_rs::o200k_base_singleton().encode_ordinary(text).len() as u64;
    assert_eq!(completion, expected);
}

#[tokio::test]
async fn null_is_the_same_as_an_absent_field() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let gateway = gateway(&upstream).await;
    for field in [
        "tools",
        "tool_choice",
        "functions",
        "stream",
        "stream_options",
        "n",
        "best_of",
        "max_tokens",
        "max_completion_tokens",
        "stop",
        "response_format",
        "reasoning_effort",
        "user",
        "seed",
    ] {
        let body = hello(&format!("\"{field}\":null"));
        let reply = gateway.chat(&body).await;
        assert_eq!(
            (reply.status, reply.header("x-tollgate-estimated-prompt-tokens")),
            (200, Some("8")),
            "{field} {}",
            reply.text()
        );
        assert_eq!(upstream.seen().pop().unwrap().text(), body);
    }
}

#[tokio::test]
async fn numbers_are_whole_in_every_notation() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let quotas = "{ completion_tokens: { limit: 5000, per: day } }";
    let gateway = Gateway::in_front_of(&upstream, quotas).await;
    for (field, remaining) in [("\"max_tokens\":1e3", "4000"), ("\"max_tokens\":1024.0,\"n\":2.0", "2950")] {
        let body = hello(field);
        let reply = gateway.chat(&body).await;
        assert_eq!(reply.header("x-ratelimit-remaining-completion-tokens"), Some(remaining), "{field}");
        assert_eq!(upstream.seen().pop().unwrap().text(), body);
        gateway.settled().await;
    }
}
