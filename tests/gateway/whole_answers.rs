//! An answer is whole, and is learned from, when the final event of its API has passed. Callers often close then,
//! before the upstream's connection has ended.

use crate::support::*;
use std::time::Duration;

const RAW: &str = "x-tollgate-raw-estimated-prompt-tokens";

async fn gateway(upstream: &Upstream, more: &str) -> Gateway {
    Gateway::from_config(&format!(
        "server: {{ listen: '127.0.0.1:0' }}\nadmin: {{ listen: '127.0.0.1:0' }}\n\
         upstreams: {{ backend: {{ base_url: 'http://{}' }} }}\n\
         environments: {{ staging: {{ upstream: backend, quotas: {{ total_tokens: {{ limit: 1M, per: day, window: calendar }} }} {more} }} }}\n\
         default_environment: staging\nstore: {{ memory: true }}",
        upstream.address
    ))
    .await
}

fn events(data: &[&str]) -> Vec<String> {
    data.iter().map(|data| format!("data: {data}\n\n")).collect()
}

/// For each API: a request, and a stream that reports 50 prompt tokens more than estimated and 20 completion tokens.
fn streams() -> Vec<(&'static str, String, Vec<String>)> {
    const MESSAGES: &str = r#"{"model":"claude-sonnet-4-5","max_tokens":640,"stream":true,"messages":[{"role":"user","content":"hello"}]}"#;
    let chat = hello(r#""stream":true,"stream_options":{"include_usage":true}"#);
    let beside = format!(
        r#"{{"choices":[{{"index":0,"delta":{{}},"finish_reason":"stop"}}],"usage":{}}}"#,
        usage(58, 20)
    );
    vec![
        (CHAT, chat.clone(), vec![delta("Hi"), usage_event(58, 20), DONE.to_owned()]),
        // Without `[DONE]` the final usage is the last event.
        (CHAT, chat, [vec![delta("Hi")], events(&[&beside])].concat()),
        (
            "/v1/messages",
            MESSAGES.to_owned(),
            events(&[
                r#"{"type":"message_start","message":{"usage":{"input_tokens":58,"output_tokens":1}}}"#,
                r#"{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"Hi"}}"#,
                r#"{"type":"message_delta","usage":{"output_tokens":20}}"#,
                r#"{"type":"message_stop"}"#,
            ]),
        ),
        (
            "/v1/responses",
            r#"{"model":"gpt-4o","input":"hello","stream":true}"#.to_owned(),
            events(&[
                r#"{"type":"response.output_text.delta","delta":"Hi"}"#,
                r#"{"type":"response.completed","response":{"usage":{"input_tokens":58,"output_tokens":20}}}"#,
            ]),
        ),
        (
            "/v1beta/models/gemini-2.5-flash:streamGenerateContent?alt=sse",
            r#"{"contents":[{"role":"user","parts":[{"text":"hello"}]}]}"#.to_owned(),
            events(&[
                r#"{"candidates":[{"content":{"parts":[{"text":"Hi"}]}}],"usageMetadata":{"promptTokenCount":58}}"#,
                r#"{"candidates":[{"finishReason":"STOP"}],"usageMetadata":{"promptTokenCount":58,"candidatesTokenCount":20}}"#,
            ]),
        ),
    ]
}

/// Sends a request, reads the whole body of a stream, and closes the connection.
async fn read_and_close(gateway: &Gateway, path: &str, body: &str, length: usize) -> String {
    let mut caller = gateway.caller().await;
    caller.request("POST", path, "", body.as_bytes()).await;
    let head = caller.head().await;
    let mut received = 0;
    while received < length {
        received += caller.chunk().await.unwrap().len();
    }
    head
}

fn remaining(head: &str) -> u64 {
    let line = head.lines().find_map(|line| line.strip_prefix("x-ratelimit-remaining-tokens: "));
    line.unwrap().parse().unwrap()
}

#[tokio::test]
async fn an_answer_is_learned_from_if_its_caller_closes_after_the_final_event() {
    for (path, body, events) in streams() {
        let length = events.concat().len();
        for more in ["", ", on_disconnect: drain"] {
            // The upstream does not end its answer before the caller has disconnected.
            let answer = Answer::stream().events(&events).then(Step::Wait(Duration::from_millis(200))).end();
            let upstream = Upstream::always(answer).await;
            let gateway = gateway(&upstream, more).await;
            let mut heads = Vec::new();
            for n in 0..26 {
                heads.push(read_and_close(&gateway, path, &body, length).await);
                let charged = gateway.settled_charges().await;
                assert_eq!(charged, [n + 1, 58 * (n + 1), 20 * (n + 1), 78 * (n + 1)], "{path}");
            }
            let metrics = gateway.admin_get("/metrics").await.text().to_owned();
            assert!(metrics.contains(r#"outcome="answered"} 26"#), "{path} {metrics}");
            // The estimate is corrected by the reported prompt tokens.
            let last = heads.last().unwrap();
            assert!(last.contains(RAW), "{path} {last}");
            assert!(last.contains("x-tollgate-estimated-prompt-tokens: 58"), "{path} {last}");
            // The allowance of the first answer is the prior of 512; the last one is near 20.
            let held = 1_000_000 - 25 * 78 - remaining(last);
            assert!((58 + 15..58 + 40).contains(&held), "{path}: {held}");
        }
    }
}

#[tokio::test]
async fn an_answer_is_not_learned_from_if_its_caller_closes_before_the_final_event() {
    for (path, body, events) in streams() {
        let length = events[..1].concat().len();
        let upstream = Upstream::always(Answer::stream().events(&events[..1]).then(Step::Gate)).await;
        let gateway = gateway(&upstream, "").await;
        for _ in 0..4 {
            read_and_close(&gateway, path, &body, length).await;
            gateway.settled().await;
        }
        let head = read_and_close(&gateway, path, &body, length).await;
        assert!(!head.contains(RAW), "{path} {head}");
        assert_eq!(
            gateway.usage_missing("not_reported").await,
            0,
            "{path}: the caller has not waited for it"
        );
        let metrics = gateway.admin_get("/metrics").await.text().to_owned();
        assert!(
            metrics.contains(r#"outcome="caller_gone"} "#) && !metrics.contains(r#"outcome="answered"} 1"#)
        );
    }
}

#[tokio::test]
async fn a_document_is_whole_at_its_last_bracket() {
    let text = chat_answer(&usage(58, 20));
    let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n";
    let answer = Answer::of(vec![Step::Send(head.into())]).event(&text).then(Step::Gate);
    let upstream = Upstream::always(answer).await;
    let gateway = gateway(&upstream, "").await;
    for _ in 0..3 {
        read_and_close(&gateway, CHAT, HELLO, text.len()).await;
        gateway.settled().await;
    }
    assert!(read_and_close(&gateway, CHAT, HELLO, text.len()).await.contains(RAW));
    assert_eq!(gateway.settled_charges().await, [4, 4 * 58, 4 * 20, 4 * 78]);
}

#[tokio::test]
async fn an_upstream_that_breaks_after_the_last_event_causes_no_error_event() {
    for (path, body, events) in streams() {
        let upstream = Upstream::always(Answer::stream().events(&events).then(Step::Cut)).await;
        let gateway = gateway(&upstream, "").await;
        let reply = gateway.post(path, &body).await;
        let text = events.concat();
        let rest = reply.text().strip_prefix(text.as_str()).unwrap();
        // A chat stream without `[DONE]` may go on after its usage.
        let is_certain = path != CHAT || text.ends_with(DONE);
        assert_eq!(rest.is_empty(), is_certain, "{path}: {rest}");
        assert!(!reply.is_incomplete);
        assert_eq!(gateway.settled_charges().await, [1, 58, 20, 78]);
    }
}
