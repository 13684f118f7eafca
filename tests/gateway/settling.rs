//! What a request costs, for each way in which it can end.

use crate::support::*;

const LARGE_QUOTAS: &str =
    "{ total_tokens: { limit: 10000000, per: day }, requests: { limit: 1000, per: minute } }";

#[tokio::test]
async fn reported_usage_is_charged() {
    let upstream = Upstream::always(Answer::chat(11, 5)).await;
    let gateway = Gateway::in_front_of(&upstream, LARGE_QUOTAS).await;
    let reply = gateway.chat(HELLO).await;
    assert_eq!(reply.text(), chat_answer(&usage(11, 5)));
    // The charge is visible at the latest with the last byte of the answer.
    assert_eq!(gateway.charged().await, [1, 11, 5, 16]);
    assert_eq!(gateway.settled_charges().await, [1, 11, 5, 16]);
}

#[tokio::test]
async fn reported_usage_of_a_stream_is_charged() {
    let events = [delta("Hi"), usage_event(11, 5), DONE.to_owned()];
    let upstream = Upstream::always(Answer::stream().events(&events).end()).await;
    let gateway = Gateway::in_front_of(&upstream, LARGE_QUOTAS).await;
    let reply = gateway.chat(&hello(r#""stream":true,"stream_options":{"include_usage":true}"#)).await;
    assert_eq!(reply.text(), events.concat());
    assert_eq!(gateway.charged().await, [1, 11, 5, 16]);
}

#[tokio::test]
async fn an_answer_without_usage_costs_the_estimate_and_the_delivered_tokens() {
    // "Hello there" is two tokens, in one piece or in two deltas.
    let json = Upstream::always(Answer::json(200, &chat_answer("null"))).await;
    let gateway = Gateway::in_front_of(&json, LARGE_QUOTAS).await;
    gateway.chat(HELLO).await;
    assert_eq!(gateway.charged().await, [1, HELLO_TOKENS, 2, HELLO_TOKENS + 2]);

    let events = [delta("Hello"), delta(" there"), DONE.to_owned()];
    let stream = Upstream::always(Answer::stream().events(&events).end()).await;
    let gateway = Gateway::in_front_of(&stream, LARGE_QUOTAS).await;
    gateway.chat(&hello(r#""stream":true"#)).await;
    assert_eq!(gateway.charged().await, [1, HELLO_TOKENS, 2, HELLO_TOKENS + 2]);
}

#[tokio::test]
async fn a_long_answer_without_usage_is_counted_before_its_last_byte() {
    let text = "word ".repeat(20_000);
    let body = format!(r#"{{"choices":[{{"message":{{"content":"{text}"}}}}]}}"#);
    let upstream = Upstream::always(Answer::json(200, &body)).await;
    let gateway = Gateway::in_front_of(&upstream, LARGE_QUOTAS).await;
    assert_eq!(gateway.chat(HELLO).await.text(), body);
    assert_eq!(gateway.charged().await[2], 20_001);
}

#[tokio::test]
async fn a_long_stream_without_usage_is_counted_in_portions() {
    // Each event has 10,000 tokens, so the stream is counted in several portions.
    let events = vec![delta(&" word".repeat(10_000)); 4];
    let gates = events.iter().fold(Answer::stream(), |answer, event| answer.event(event).then(Step::Gate));
    let upstream = Upstream::always(gates.end()).await;
    for read in [4, 3] {
        let gateway = Gateway::in_front_of(&upstream, LARGE_QUOTAS).await;
        let mut caller = gateway.caller().await;
        caller.request("POST", CHAT, "", hello(r#""stream":true"#).as_bytes()).await;
        caller.head().await;
        for event in &events[..read] {
            let mut received = 0;
            while received < event.len() {
                received += caller.chunk().await.unwrap().len();
            }
            upstream.open_gate();
        }
        // The caller reads to the end, or disconnects while a portion may still be counted.
        if read == 4 {
            assert_eq!(caller.chunk().await, Some(vec![]));
        }
        drop(caller);
        let [requests, prompt, completion, _] = gateway.settled_charges().await;
        assert_eq!((requests, prompt), (1, HELLO_TOKENS));
        let all = if read == 4 { 40_000..=40_000 } else { 30_000..=40_000 };
        assert!(all.contains(&completion), "{completion}");
    }
}

#[tokio::test]
async fn usage_that_is_not_credible_is_replaced_by_the_count() {
    for bad in [
        r#"{"prompt_tokens":-3,"completion_tokens":-5,"total_tokens":-8}"#,
        r#"{"prompt_tokens":"3","completion_tokens":"5"}"#,
        r#"{"prompt_tokens":1152921504606846976,"completion_tokens":1e300}"#,
        r#"{"prompt_tokens":0.5,"completion_tokens":[]}"#,
        r"[1,2]",
        r#""many""#,
    ] {
        let upstream = Upstream::always(Answer::json(200, &chat_answer(bad))).await;
        let gateway = Gateway::in_front_of(&upstream, LARGE_QUOTAS).await;
        assert_eq!(gateway.chat(HELLO).await.text(), chat_answer(bad), "the answer passes unchanged");
        assert_eq!(gateway.settled_charges().await, [1, HELLO_TOKENS, 2, HELLO_TOKENS + 2], "{bad}");
        let metrics = gateway.admin_get("/metrics").await;
        assert!(
            metrics
                .text()
                .contains(r#"tollgate_usage_missing_total{environment="staging",reason="not_credible"} 1"#)
        );
    }
}

#[tokio::test]
async fn credible_fields_are_charged_even_if_another_field_is_not_credible() {
    let reported = r#"{"prompt_tokens":9,"completion_tokens":4,"total_tokens":-1}"#;
    let upstream = Upstream::always(Answer::json(200, &chat_answer(reported))).await;
    let gateway = Gateway::in_front_of(&upstream, LARGE_QUOTAS).await;
    gateway.chat(HELLO).await;
    assert_eq!(gateway.settled_charges().await, [1, 9, 4, 13]);
    assert_eq!(gateway.usage_missing("not_credible").await, 1);
    assert_eq!(gateway.usage_missing("not_reported").await, 0);
}

#[tokio::test]
async fn an_endpoint_that_generates_nothing_costs_no_completion_tokens() {
    let long = format!(r#"{{"data":"{}","choices":[{{"text":"so many words"}}]}}"#, "x".repeat(4_000));
    let stream = format!("data: {long}\n\n");
    for (kind, body) in
        [("application/json", &long), ("text/event-stream", &stream), ("application/octet-stream", &long)]
    {
        let answer = Answer::with_headers(200, &format!("content-type: {kind}\r\n"), body);
        let upstream = Upstream::always(answer).await;
        let environments = "  staging: { upstream: backend, other_paths: forward, quotas: { requests: { limit: 9, per: minute } } }\ndefault_environment: staging";
        let gateway = Gateway::with(&upstream, "", environments).await;
        assert_eq!(gateway.post("/v1/batches", "{}").await.text(), body);
        assert_eq!(gateway.settled_charges().await, [1, 0, 0, 0], "{kind}");
        let embeddings = r#"{"model":"text-embedding-3-small","input":"hello"}"#;
        assert_eq!(gateway.post("/v1/embeddings", embeddings).await.text(), body);
        assert_eq!(gateway.settled_charges().await, [2, 1, 0, 1], "{kind}");
        // The gateway expects usage from embeddings.
        assert_eq!(gateway.usage_missing("not_reported").await, 1, "{kind}");
    }
}

#[tokio::test]
async fn missing_usage_is_not_counted_for_endpoints_that_are_not_charged() {
    let upstream = Upstream::always(Answer::json(200, r#"{"object":"list","data":[]}"#)).await;
    let gateway = Gateway::in_front_of(&upstream, LARGE_QUOTAS).await;
    assert_eq!(gateway.send("GET", "/v1/models", "", "").await.status, 200);
    assert_eq!(gateway.settled_charges().await, [0, 0, 0, 0]);
    assert_eq!(gateway.usage_missing("not_reported").await, 0);
}

#[tokio::test]
async fn an_answer_without_a_body_is_settled_and_recorded() {
    for (method, head, outcome) in [
        ("POST", "200 OK\r\ncontent-length: 0", "answered"),
        ("POST", "204 No Content", "answered"),
        ("HEAD", "200 OK\r\ncontent-length: 17\r\ncontent-type: application/json", "answered"),
        ("POST", "503 Some\r\ncontent-length: 0", "upstream_error"),
    ] {
        let upstream =
            Upstream::always(Answer::of(vec![Step::Send(format!("HTTP/1.1 {head}\r\n\r\n").into())])).await;
        let environments = "  staging: { upstream: backend, other_paths: forward, quotas: { requests: { limit: 9, per: minute } } }\ndefault_environment: staging";
        let gateway = Gateway::with(&upstream, "", environments).await;
        let mut caller = gateway.caller().await;
        caller.request(method, "/v1/batches", "", b"{}").await;
        let got = caller.head().await;
        assert!(got.starts_with(&format!("HTTP/1.1 {}", &head[..3])), "{got}");
        if method == "HEAD" {
            assert!(got.contains("content-length: 17"), "{got}");
        }
        // The charge is visible at the latest with the last byte of the answer.
        assert_eq!(gateway.charged().await[0], 1, "{method} {head}");
        gateway.settled().await;
        let counted = format!(
            r#"tollgate_requests_total{{api="other",code="{}xx",environment="staging",outcome="{outcome}"}} 1"#,
            &head[..1]
        );
        let metrics = gateway.admin_get("/metrics").await;
        assert!(metrics.text().contains(&counted), "{method} {head}\n{}", metrics.text());
    }
}

#[tokio::test]
async fn a_cancelled_stream_is_charged_for_delivered_tokens() {
    let upstream =
        Upstream::always(Answer::stream().event(&delta("Hello")).event(&delta(" there")).then(Step::Gate))
            .await;
    let gateway = Gateway::in_front_of(&upstream, LARGE_QUOTAS).await;
    let mut caller = gateway.caller().await;
    caller.request("POST", CHAT, "", hello(r#""stream":true"#).as_bytes()).await;
    caller.head().await;
    let mut received = Vec::new();
    while received.len() < (delta("Hello") + &delta(" there")).len() {
        received.extend(caller.chunk().await.unwrap());
    }
    drop(caller);
    // The upstream call is cancelled at once.
    upstream.wait_until_disconnected().await;
    assert_eq!(gateway.settled_charges().await, [1, HELLO_TOKENS, 2, HELLO_TOKENS + 2]);
}

#[tokio::test]
async fn a_stream_that_is_cancelled_after_any_event_is_charged_for_what_was_delivered() {
    let events: Vec<String> = (0..8).map(|n| delta(&format!(" {n}"))).collect();
    for delivered in 0..=events.len() {
        let sent = Answer::stream().events(&events[..delivered]).then(Step::Gate);
        let upstream = Upstream::always(sent).await;
        let gateway = Gateway::in_front_of(&upstream, LARGE_QUOTAS).await;
        let mut caller = gateway.caller().await;
        caller.request("POST", CHAT, "", hello(r#""stream":true"#).as_bytes()).await;
        caller.head().await;
        let (mut received, all) = (Vec::new(), events[..delivered].concat());
        while received.len() < all.len() {
            received.extend(caller.chunk().await.unwrap());
        }
        drop(caller);
        upstream.wait_until_disconnected().await;
        // A space and a digit are two tokens.
        let completion = 2 * delivered as u64;
        let charge = [1, HELLO_TOKENS, completion, HELLO_TOKENS + completion];
        assert_eq!(gateway.settled_charges().await, charge, "{delivered}");
    }
}

#[tokio::test]
async fn a_cancelled_stream_is_charged_for_reported_usage_and_tokens_delivered_after_it() {
    let upstream = Upstream::always(
        Answer::stream()
            .event(&delta("Hello"))
            .event(&usage_event(9, 40))
            .event(&delta("x"))
            .then(Step::Gate),
    )
    .await;
    let gateway = Gateway::in_front_of(&upstream, LARGE_QUOTAS).await;
    let mut caller = gateway.caller().await;
    caller.request("POST", CHAT, "", hello(r#""stream":true"#).as_bytes()).await;
    caller.head().await;
    let mut received = Vec::new();
    while !received.ends_with(delta("x").as_bytes()) {
        received.extend(caller.chunk().await.unwrap());
    }
    drop(caller);
    assert_eq!(gateway.settled_charges().await, [1, 9, 41, 50]);
}

#[tokio::test]
async fn usage_at_the_beginning_of_a_cut_stream_does_not_replace_the_count() {
    let event = |data: &str| format!("data: {data}\n\n");
    let start = event(
        r#"{"type":"message_start","message":{"id":"m","usage":{"input_tokens":9,"output_tokens":1}}}"#,
    );
    let text = event(
        r#"{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"Hello there"}}"#,
    );
    // The total of Gemini's first chunks may contain the prompt tokens only.
    let chunk = event(
        r#"{"candidates":[{"content":{"parts":[{"text":"Hello there"}]}}],"usageMetadata":{"promptTokenCount":9,"totalTokenCount":9}}"#,
    );
    let more = event(r#"{"candidates":[{"content":{"parts":[{"text":"Hello there"}]}}]}"#);
    for (events, charged) in [(vec![start, text], [1, 9, 2, 11]), (vec![chunk, more], [1, 9, 4, 13])] {
        let upstream = Upstream::always(Answer::stream().events(&events).then(Step::Cut)).await;
        let gateway = Gateway::in_front_of(&upstream, LARGE_QUOTAS).await;
        gateway.chat(&hello(r#""stream":true"#)).await;
        assert_eq!(gateway.settled_charges().await, charged, "{events:?}");
    }
}

#[tokio::test]
async fn a_request_cancelled_before_its_answer_costs_the_prompt() {
    let upstream = Upstream::always(Answer::silence()).await;
    let gateway = Gateway::in_front_of(&upstream, LARGE_QUOTAS).await;
    let mut caller = gateway.caller().await;
    caller.request("POST", CHAT, "", HELLO.as_bytes()).await;
    upstream.wait_until_seen(1).await;
    assert_eq!(gateway.environment().await["in_flight"], 1);
    drop(caller);
    upstream.wait_until_disconnected().await;
    assert_eq!(gateway.settled_charges().await, [1, HELLO_TOKENS, 0, HELLO_TOKENS]);
}

#[tokio::test]
async fn a_stream_whose_upstream_disconnects_ends_with_an_error_event_and_no_done() {
    let upstream = Upstream::always(Answer::stream().event(&delta("Hello")).then(Step::Cut)).await;
    let gateway = Gateway::in_front_of(&upstream, LARGE_QUOTAS).await;
    let reply = gateway.chat(&hello(r#""stream":true"#)).await;
    assert!(!reply.is_incomplete);
    let error = reply.text().strip_prefix(&delta("Hello")).unwrap();
    let error: serde_json::Value = serde_json::from_str(error.strip_prefix("data: ").unwrap()).unwrap();
    assert_eq!(error["error"]["type"], "upstream_error");
    assert!(!reply.text().contains("[DONE]"));
    assert_eq!(gateway.settled_charges().await, [1, HELLO_TOKENS, 1, HELLO_TOKENS + 1]);
}

#[tokio::test]
async fn an_error_event_is_separated_from_a_half_delivered_event() {
    let half = &delta("Hello")[..40];
    let upstream =
        Upstream::always(Answer::stream().event(&delta("Hello")).event(half).then(Step::Cut)).await;
    let gateway = Gateway::in_front_of(&upstream, LARGE_QUOTAS).await;
    for fields in [r#""stream":true"#, r#""stream":true,"stream_options":{"include_usage":true}"#] {
        let reply = gateway.chat(&hello(fields)).await;
        let last = reply.text().trim_end().rsplit("\n\n").next().unwrap();
        let error: serde_json::Value = serde_json::from_str(last.strip_prefix("data: ").unwrap()).unwrap();
        assert_eq!(error["error"]["code"], "upstream_disconnected");
    }
}

#[tokio::test]
async fn a_json_answer_cut_in_the_middle_is_charged_by_bytes_and_aborts_the_connection() {
    let whole = chat_answer(&usage(8, 2));
    let head = format!(
        "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        whole.len()
    );
    let half = [head.as_bytes(), &whole.as_bytes()[..80]].concat();
    let upstream = Upstream::always(Answer::of(vec![Step::Send(half), Step::Cut])).await;
    let gateway = Gateway::in_front_of(&upstream, LARGE_QUOTAS).await;
    let reply = gateway.chat(HELLO).await;
    assert!(reply.is_incomplete);
    assert_eq!(reply.body, &whole.as_bytes()[..80]);
    assert_eq!(gateway.settled_charges().await, [1, HELLO_TOKENS, 20, HELLO_TOKENS + 20]);
}

#[tokio::test]
async fn an_error_of_the_upstream_passes_unchanged_and_costs_one_request() {
    for (status, body) in
        [(400, r#"{"error":"text"}"#), (429, r#"{"detail":"slow down"}"#), (500, "oops"), (503, "")]
    {
        let answer =
            Answer::with_headers(status, "content-type: application/json\r\nretry-after: 7\r\n", body);
        let upstream = Upstream::always(answer).await;
        let gateway = Gateway::in_front_of(&upstream, LARGE_QUOTAS).await;
        let reply = gateway.chat(HELLO).await;
        assert_eq!((reply.status, reply.text(), reply.header("retry-after")), (status, body, Some("7")));
        assert_eq!(reply.header("x-tollgate-error"), None);
        assert_eq!(gateway.settled_charges().await, [1, 0, 0, 0]);
    }
}

#[tokio::test]
async fn an_unreachable_upstream_costs_nothing() {
    let upstream = Upstream::always(Answer::silence()).await;
    let gateway = Gateway::from_config(
        "server: { listen: '127.0.0.1:0' }\nadmin: { listen: '127.0.0.1:0' }\nupstreams: { gone: { base_url: 'http://127.0.0.1:9' }, nowhere: { base_url: 'http://no-such-host.invalid' } }\n\
         environments: { gone: { upstream: gone, quotas: { requests: { limit: 9, per: day } } }, nowhere: { upstream: nowhere } }\nstore: { memory: true }",
    )
    .await;
    for environment in ["gone", "nowhere"] {
        let reply = gateway.post(&format!("/{environment}{CHAT}"), HELLO).await;
        assert_eq!(reply.refusal(), (502, "upstream_unreachable".into()));
        assert_eq!(reply.json()["error"]["type"], "upstream_error");
        assert!(
            !reply.text().contains("127.0.0.1") && !reply.text().contains("invalid\""),
            "the error contains no address"
        );
    }
    assert_eq!(gateway.settled_charges().await, [0, 0, 0, 0]);
    assert!(upstream.seen().is_empty());
}

#[tokio::test]
async fn an_upstream_that_closes_without_an_answer_is_a_502_and_costs_the_prompt() {
    for first in [&b""[..], b"HTTP/1.1 200 OK\r\ncontent-le", b"garbage\r\n\r\n"] {
        let upstream = Upstream::always(Answer::of(vec![Step::Send(first.into()), Step::Cut])).await;
        let gateway = Gateway::in_front_of(&upstream, LARGE_QUOTAS).await;
        assert_eq!(gateway.chat(HELLO).await.refusal(), (502, "upstream_unreachable".into()));
        assert_eq!(gateway.settled_charges().await, [1, HELLO_TOKENS, 0, HELLO_TOKENS]);
        assert_eq!(upstream.seen().len(), 1, "a request that the upstream has read is not retried");
    }
}

fn open_staging() -> &'static str {
    "  staging: { upstream: backend, reserve: { completion: max_tokens }, quotas: { requests: { limit: 1000, per: minute } } }\ndefault_environment: staging"
}

#[tokio::test]
async fn a_first_byte_timeout_is_a_504_and_costs_the_prompt() {
    let upstream = Upstream::always(Answer::silence()).await;
    let gateway = Gateway::with(&upstream, "timeouts: { first_byte: 50ms }", open_staging()).await;
    let reply = gateway.chat(HELLO).await;
    assert_eq!(reply.refusal(), (504, "upstream_timeout".into()));
    assert!(reply.text().contains("first_byte"));
    assert_eq!(gateway.settled_charges().await, [1, HELLO_TOKENS, 0, HELLO_TOKENS]);
}

#[tokio::test]
async fn a_stream_that_stalls_ends_with_an_error_event() {
    for (setting, event) in [("idle: 50ms", "idle"), ("total: 80ms", "total")] {
        let upstream = Upstream::always(Answer::stream().event(&delta("Hello")).then(Step::Stall)).await;
        let gateway = Gateway::with(&upstream, &format!("timeouts: {{ {setting} }}"), open_staging()).await;
        let reply = gateway.chat(&hello(r#""stream":true"#)).await;
        assert!(
            reply.text().contains("upstream_timeout") && reply.text().contains(event),
            "{}",
            reply.text()
        );
        upstream.wait_until_disconnected().await;
        assert_eq!(gateway.settled_charges().await, [1, HELLO_TOKENS, 1, HELLO_TOKENS + 1]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn after_any_mix_of_endings_nothing_is_held_and_every_charge_is_counted() {
    let upstream = Upstream::answering(|seen| match seen.text().matches('x').count() % 6 {
        // Reports the estimated prompt tokens, so that calibration changes nothing.
        0 => Answer::chat(HELLO_TOKENS, 5),
        1 => Answer::stream().event(&delta("Hello")).event(&usage_event(HELLO_TOKENS, 5)).event(DONE).end(),
        2 => Answer::stream().event(&delta("Hello")).then(Step::Cut),
        3 => Answer::json(500, "{}"),
        4 => Answer::stream().event(&delta("Hello")).then(Step::Stall),
        _ => Answer::of(vec![Step::Cut]),
    })
    .await;
    let gateway = std::sync::Arc::new(Gateway::in_front_of(&upstream, LARGE_QUOTAS).await);
    let mut calls = tokio::task::JoinSet::new();
    for n in 0..120_usize {
        let gateway = gateway.clone();
        calls.spawn(async move {
            let body = hello(&format!(r#""user":"{}","stream":true"#, "x".repeat(n)));
            let mut caller = gateway.caller().await;
            caller.request("POST", CHAT, "", body.as_bytes()).await;
            if n % 6 == 4 {
                caller.head().await;
                caller.chunk().await;
            } else {
                caller.reply().await;
            }
        });
    }
    while let Some(call) = calls.join_next().await {
        call.unwrap();
    }
    // Twenty requests each: usage reported (twice), cut (prompt + 1), error, cancelled (prompt + 1), no answer.
    let (p, n) = (HELLO_TOKENS, 20);
    assert_eq!(
        gateway.settled_charges().await,
        [6 * n, 5 * p * n, (5 + 5 + 1 + 1) * n, (5 * p + 5 + 5 + 1 + 1) * n]
    );
}

#[tokio::test]
async fn cached_prompt_tokens_are_charged_unless_the_config_skips_them() {
    let usage = r#"{"prompt_tokens":1000,"completion_tokens":5,"total_tokens":1005,"prompt_tokens_details":{"cached_tokens":900}}"#;
    let upstream = Upstream::always(Answer::json(200, &chat_answer(usage))).await;
    for (setting, charged) in [("count", [1, 1_000, 5, 1_005]), ("skip", [1, 100, 5, 105])] {
        let environments = format!(
            "  staging:\n    upstream: backend\n    cached_prompt_tokens: {setting}\n    quotas: {{ total_tokens: {{ limit: 9999, per: hour }} }}\ndefault_environment: staging"
        );
        let gateway = Gateway::with(&upstream, "", &environments).await;
        assert_eq!(gateway.chat(HELLO).await.status, 200);
        assert_eq!(gateway.settled_charges().await, charged, "{setting}");
        // The estimate metric compares with the whole prompt, including its cached part.
        let metrics = gateway.admin_get("/metrics").await;
        assert!(
            metrics.text().contains(r#"tollgate_estimate_ratio_sum{model="gpt-4o",source="rules"} 0.008"#),
            "{}",
            metrics.text()
        );
    }
}
