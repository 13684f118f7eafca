//! Invalid requests get a clear error, reach no upstream and are not charged.

use crate::support::*;

async fn gateway(upstream: &Upstream) -> Gateway {
    Gateway::in_front_of(upstream, "{ total_tokens: { limit: 1000000000, per: day } }").await
}

#[tokio::test]
async fn invalid_bodies_are_refused_before_the_upstream_receives_them() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let gateway = gateway(&upstream).await;
    let deep = format!(r#"{{"messages":{}{}}}"#, "[".repeat(128), "]".repeat(128));
    for (body, code, param) in [
        ("", "invalid_json", None),
        ("hello", "invalid_json", None),
        ("[]", "invalid_json", None),
        ("{\"model\":\"gpt-4o\",}", "invalid_json", None),
        (&deep, "invalid_json", None),
        (&"[".repeat(100_000), "invalid_json", None),
        (r#"{"model":"a","model":"b","messages":[]}"#, "invalid_json", None),
        (r#"{"model":"a","m\u006fdel":"b","messages":[]}"#, "invalid_json", None),
        (r#"{"stream":false,"Stream":true,"messages":[]}"#, "invalid_json", None),
        (&hello(r#""max_tokens":-1"#), "invalid_value", Some("max_tokens")),
        (&hello(r#""max_tokens":0"#), "invalid_value", Some("max_tokens")),
        (&hello(r#""max_tokens":99999999999999999999"#), "invalid_value", Some("max_tokens")),
        (&hello(r#""max_completion_tokens":"7""#), "invalid_value", Some("max_completion_tokens")),
        (&hello(r#""n":129"#), "invalid_value", Some("n")),
        (&hello(r#""best_of":0"#), "invalid_value", Some("best_of")),
        (&hello(r#""stream":"yes""#), "invalid_value", Some("stream")),
        (&hello(r#""stream_options":7"#), "invalid_value", Some("stream_options")),
        (r#"{"model":7,"messages":[]}"#, "invalid_value", Some("model")),
        (r#"{"model":"gpt-4o","messages":"hello"}"#, "invalid_json", None),
    ] {
        let reply = gateway.chat(body).await;
        assert_eq!(reply.refusal(), (400, code.to_owned()), "{body:.80}");
        assert_eq!(reply.json()["error"]["param"].as_str(), param, "{body:.80}");
        assert_eq!(reply.json()["error"]["type"], "invalid_request_error");
    }
    let mut caller = gateway.caller().await;
    caller.request("POST", CHAT, "", b"{\"model\":\"\xff\"}").await;
    assert_eq!(caller.reply().await.refusal(), (400, "invalid_json".into()));
    assert!(upstream.seen().is_empty());
    assert_eq!(gateway.settled_charges().await, [0, 0, 0, 0]);
}

#[tokio::test]
async fn a_streaming_request_is_refused_with_json() {
    let upstream = Upstream::always(Answer::silence()).await;
    let gateway = gateway(&upstream).await;
    let reply = gateway.chat(&hello(r#""stream":true,"n":0"#)).await;
    assert_eq!(reply.header("content-type"), Some("application/json"));
    assert_eq!(reply.status, 400);
}

#[tokio::test]
async fn a_body_over_the_limit_is_a_413_in_every_framing() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let gateway = gateway(&upstream).await;
    let large = hello(&format!(r#""x":"{}""#, "a".repeat(1 << 20)));
    assert_eq!(gateway.chat(&large).await.refusal(), (413, "request_body_too_large".into()));
    let mut caller = gateway.caller().await;
    let head =
        format!("POST {CHAT} HTTP/1.1\r\nhost: g\r\ntransfer-encoding: chunked\r\n\r\n{:x}\r\n", large.len());
    caller.send(&[head.as_bytes(), large.as_bytes(), b"\r\n0\r\n\r\n"].concat()).await;
    assert_eq!(caller.reply().await.refusal(), (413, "request_body_too_large".into()));
    // A body just below the limit passes.
    let fits = hello(&format!(r#""x":"{}""#, "a".repeat((1 << 20) - 200)));
    assert_eq!(gateway.chat(&fits).await.status, 200);
}

#[tokio::test]
async fn a_body_with_a_content_encoding_is_a_415() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let gateway = gateway(&upstream).await;
    for (encoding, status) in [("gzip", 415), ("identity, br", 415), ("identity", 200)] {
        let reply = gateway.send("POST", CHAT, &format!("content-encoding: {encoding}\r\n"), HELLO).await;
        assert_eq!(reply.status, status, "{encoding}");
    }
}

#[tokio::test]
async fn errors_take_precedence_in_the_order_path_key_body_model_quota() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let environments = "  staging: { upstream: backend, keys: [{ name: a, secret: a-key-of-staging-1 }], models: ['gpt-4o'], reserve: { completion: max_tokens }, quotas: { total_tokens: { limit: 9, per: minute } } }";
    let gateway = Gateway::with(&upstream, "", environments).await;
    let (bad_key, key) = ("api-key: unknown\r\n", "api-key: a-key-of-staging-1\r\n");
    let gzip = "content-encoding: gzip\r\n";
    let (bad_body, bad_model, large) =
        (r#"{"model":"gpt-9","n":0}"#, HELLO.replace("4o", "9"), hello(r#""max_tokens":100"#));
    for (path, headers, body, refusal) in [
        ("/v1/nothing", format!("{bad_key}{gzip}"), bad_body, (404, "unknown_path")),
        (CHAT, format!("{bad_key}{gzip}"), bad_body, (401, "invalid_api_key")),
        (CHAT, format!("{key}{gzip}"), bad_body, (415, "unsupported_content_encoding")),
        (
            CHAT,
            format!("{key}content-encoding: identity, gzip\r\n"),
            bad_body,
            (415, "unsupported_content_encoding"),
        ),
        // An empty list, or an empty member of it, names no coding.
        (CHAT, format!("{key}content-encoding: \r\n"), bad_body, (400, "invalid_value")),
        (CHAT, format!("{key}content-encoding: , identity\r\n"), bad_body, (400, "invalid_value")),
        (CHAT, key.to_owned(), bad_body, (400, "invalid_value")),
        (CHAT, key.to_owned(), &*bad_model, (404, "model_not_found")),
        (CHAT, key.to_owned(), &*large, (400, "request_exceeds_quota")),
    ] {
        let reply = gateway.send("POST", path, &headers, body).await;
        assert_eq!(reply.refusal(), (refusal.0, refusal.1.to_owned()), "{path} {headers} {body}");
    }
    let reply = gateway.send("PUT", CHAT, &format!("{bad_key}{gzip}"), bad_body).await;
    assert_eq!(reply.refusal(), (405, "method_not_allowed".into()));
    assert!(upstream.seen().is_empty());
}

#[tokio::test]
async fn an_ambiguous_head_is_refused() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let gateway = gateway(&upstream).await;
    for head in [
        format!("POST {CHAT} HTTP/1.1\r\nhost: a\r\nhost: b\r\ncontent-length: 2\r\n\r\n{{}}"),
        format!("POST {CHAT} HTTP/1.1\r\ncontent-length: 2\r\n\r\n{{}}"),
        format!("POST http://evil{CHAT} HTTP/1.1\r\nhost: gateway\r\ncontent-length: 2\r\n\r\n{{}}"),
        format!("POST {CHAT} HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\n{{}}"),
        format!("POST {CHAT} HTTP/1.1\r\nhost: a\r\ncontent-length: +2\r\n\r\n{{}}"),
    ] {
        let mut caller = gateway.caller().await;
        caller.send(head.as_bytes()).await;
        assert!(caller.head().await.starts_with("HTTP/1.1 400"), "{head}");
    }
    assert!(upstream.seen().is_empty());
}

#[tokio::test]
async fn malformed_http_is_refused_with_an_error_in_openais_shape() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let gateway = gateway(&upstream).await;
    let long = "x".repeat(100_000);
    let many = "x-a: 1\r\n".repeat(200);
    for (head, refusal) in [
        ("hello\r\n\r\n".to_owned(), (400, "bad_request")),
        (format!("POST {CHAT} HTTP/1.1\r\nhost: a\r\ncontent-length: +2\r\n\r\n{{}}"), (400, "bad_request")),
        (format!("GET /{long} HTTP/1.1\r\nhost: a\r\n\r\n"), (431, "headers_too_large")),
        (format!("GET / HTTP/1.1\r\nhost: a\r\nx: {long}\r\n\r\n"), (431, "headers_too_large")),
        (format!("GET / HTTP/1.1\r\nhost: a\r\n{many}\r\n"), (431, "headers_too_large")),
    ] {
        let mut caller = gateway.caller().await;
        // The same holds after a valid request on the same connection.
        caller.request("POST", CHAT, "", HELLO.as_bytes()).await;
        assert_eq!(caller.reply().await.status, 200);
        caller.send(head.as_bytes()).await;
        let reply = caller.reply().await;
        assert_eq!(reply.refusal(), (refusal.0, refusal.1.to_owned()), "{head:.60}");
        assert_eq!(reply.header("connection"), Some("close"));
        assert!(caller.is_closed().await);
    }
}

#[tokio::test]
async fn a_caller_that_hangs_up_within_its_body_costs_nothing() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let gateway = gateway(&upstream).await;
    let mut caller = gateway.caller().await;
    caller.send(format!("POST {CHAT} HTTP/1.1\r\nhost: g\r\ncontent-length: 100\r\n\r\n{{").as_bytes()).await;
    drop(caller);
    assert_eq!(gateway.chat(HELLO).await.status, 200);
    assert_eq!(gateway.settled_charges().await[0], 1);
}

#[tokio::test]
async fn a_slow_count_does_not_delay_other_requests() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let gateway = gateway(&upstream).await;
    // A megabyte of dashes is the slowest input for the tokenizer: it takes more than half a second.
    let hard = HELLO.replace("hello", &"-".repeat(900_000));
    let mut slow = gateway.caller().await;
    slow.request("POST", CHAT, "", hard.as_bytes()).await;
    let mut took = Vec::new();
    for _ in 0..9 {
        let started = std::time::Instant::now();
        assert_eq!(gateway.chat(HELLO).await.status, 200);
        took.push(started.elapsed());
    }
    took.sort();
    assert!(took[4] < std::time::Duration::from_millis(100), "{took:?}");
    assert_eq!(slow.reply().await.status, 200);
}
