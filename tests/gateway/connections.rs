//! Connections of callers: `Expect: 100-continue`, HTTP/1.0, and the number of headers in both directions.

use crate::support::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const STAGING: &str = "  staging: { upstream: backend, quotas: { requests: { limit: 1000, per: minute } } }\n  closed: { upstream: backend, keys: [{ name: a, secret: a-key-of-closed-1 }] }\ndefault_environment: staging";

async fn gateway(upstream: &Upstream) -> Gateway {
    Gateway::with(upstream, "", STAGING).await
}

#[tokio::test]
async fn a_refusal_before_the_body_closes_the_connection_if_the_caller_expects_100_continue() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let gateway = gateway(&upstream).await;
    for (line, headers, status) in [
        ("POST /closed/v1/chat/completions HTTP/1.1", "content-length: 70", 401),
        (
            "POST /v1/chat/completions HTTP/1.1",
            "authorization: Bearer a-key-of-closed-1\r\ncontent-length: 70",
            200,
        ),
        (
            "POST /staging/v1/chat/completions HTTP/1.1",
            "authorization: Bearer a-key-of-closed-1\r\ncontent-length: 70",
            403,
        ),
        ("POST /v1/nothing HTTP/1.1", "content-length: 70", 404),
        ("POST /nowhere/v1/chat/completions HTTP/1.1", "transfer-encoding: chunked", 404),
        ("PUT /v1/chat/completions HTTP/1.1", "content-length: 70", 405),
        ("POST /v1/chat/completions HTTP/1.1", "content-length: 9000000", 413),
        ("POST /v1/chat/completions HTTP/1.1", "content-encoding: gzip\r\ncontent-length: 70", 415),
        ("POST /v1/chat/completions HTTP/1.1", "host: other\r\ncontent-length: 70", 400),
    ] {
        let mut caller = gateway.caller().await;
        caller
            .send(format!("{line}\r\nhost: g\r\nexpect: 100-continue\r\n{headers}\r\n\r\n").as_bytes())
            .await;
        if status == 200 {
            assert_eq!(caller.head().await, "HTTP/1.1 100 Continue");
            continue;
        }
        let reply = caller.reply().await;
        assert_eq!((reply.status, reply.header("connection")), (status, Some("close")), "{line} {headers}");
        assert!(caller.is_closed().await, "{line} {headers}");
    }
    let mut caller = Caller::connect(gateway.admin).await;
    caller.send(b"PUT /api/environments HTTP/1.1\r\nhost: other\r\nexpect: 100-continue\r\ncontent-length: 5\r\n\r\n").await;
    let reply = caller.reply().await;
    assert_eq!((reply.status, reply.header("connection")), (403, Some("close")));
}

#[tokio::test]
async fn the_flood_guard_closes_the_connection_if_the_caller_expects_100_continue() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let gateway = Gateway::from_config(&format!(
        "server: {{ listen: '127.0.0.1:0', flood_guard: {{ requests: 1, per: hour }} }}\nadmin: {{ listen: '127.0.0.1:0' }}\nupstreams: {{ u: {{ base_url: 'http://{}' }} }}\n\
         environments: {{ e: {{ upstream: u }} }}\ndefault_environment: e\nstore: {{ memory: true }}",
        upstream.address
    ))
    .await;
    assert_eq!(gateway.chat(HELLO).await.status, 200);
    let mut caller = gateway.caller().await;
    let head =
        format!("POST {CHAT} HTTP/1.1\r\nhost: g\r\nexpect: 100-continue\r\ncontent-length: 70\r\n\r\n");
    caller.send(head.as_bytes()).await;
    let reply = caller.reply().await;
    assert_eq!((reply.refusal(), reply.header("connection")), ((429, "flood_guard".into()), Some("close")));
    assert!(caller.is_closed().await);
}

/// Sends a request over HTTP/1.0 and reads to the end of the connection. Returns the answer, and whether the connection
/// was reset.
async fn over_http_10(gateway: &Gateway, path: &str, body: &str) -> (String, bool) {
    let mut socket = TcpStream::connect(gateway.address).await.unwrap();
    let head = format!("POST {path} HTTP/1.0\r\nhost: g\r\ncontent-length: {}\r\n\r\n", body.len());
    socket.write_all((head + body).as_bytes()).await.unwrap();
    let mut all = Vec::new();
    let read = soon("the end of the connection", socket.read_to_end(&mut all)).await;
    let is_reset = read.is_err_and(|e| e.kind() == std::io::ErrorKind::ConnectionReset);
    (String::from_utf8(all).unwrap(), is_reset)
}

#[tokio::test]
async fn an_incomplete_answer_over_http_10_ends_with_a_reset() {
    let chunked = |kind: &str| format!("content-type: {kind}\r\ntransfer-encoding: chunked\r\n\r\n");
    let stream = hello(r#""stream":true"#);
    let json = chat_answer(&usage(8, 2));
    let half = &json[..json.len() / 2];
    let list = r#"[{"candidates":[{"content":{"parts":[{"text":"Hi"}]}}]}"#;
    let gemini = "/v1beta/models/gemini-2.5-flash:streamGenerateContent";
    for (path, body, head, part, error) in [
        (CHAT, HELLO, chunked("application/json"), half, ""),
        (CHAT, &stream, chunked("text/event-stream"), &delta("Hi"), "upstream_disconnected"),
        (CHAT, HELLO, chunked("text/plain"), "half", ""),
        (
            gemini,
            r#"{"contents":[{"parts":[{"text":"hello"}]}]}"#,
            chunked("application/json"),
            list,
            "UPSTREAM_DISCONNECTED",
        ),
    ] {
        let answer = Answer::of(vec![Step::Send(format!("HTTP/1.1 200 OK\r\n{head}").into())])
            .event(part)
            .then(Step::Gate);
        let upstream = Upstream::answering({
            let cut = answer.clone().then(Step::Cut);
            let whole = answer.end();
            move |seen| if seen.header("x-whole").is_some() { whole.clone() } else { cut.clone() }
        })
        .await;
        let gateway = gateway(&upstream).await;
        upstream.open_gate();
        let (text, is_reset) = over_http_10(&gateway, path, body).await;
        assert!(is_reset && text.contains(part) && text.contains(error), "{path} {head}: {text}");
        // A complete answer ends normally.
        upstream.open_gate();
        let path = format!("{path} HTTP/1.0\r\nx-whole: 1\r\nx-rest:");
        let (text, is_reset) = over_http_10(&gateway, &path, body).await;
        assert!(!is_reset && text.ends_with(part), "{path} {head}: {text}");
    }
}

#[tokio::test]
async fn an_answer_over_http_10_that_a_shutdown_cuts_ends_with_a_reset() {
    let upstream = Upstream::always(Answer::stream().event(&delta("Hi")).then(Step::Stall)).await;
    let mut gateway = Gateway::from_config(&format!(
        "server: {{ listen: '127.0.0.1:0', drain_timeout: 100ms }}\nadmin: {{ listen: '127.0.0.1:0' }}\nupstreams: {{ u: {{ base_url: 'http://{}' }} }}\n\
         environments: {{ e: {{ upstream: u }} }}\ndefault_environment: e\nstore: {{ memory: true }}",
        upstream.address
    ))
    .await;
    let body = hello(r#""stream":true"#);
    let mut socket = TcpStream::connect(gateway.address).await.unwrap();
    let head = format!("POST {CHAT} HTTP/1.0\r\nhost: g\r\ncontent-length: {}\r\n\r\n", body.len());
    socket.write_all((head + &body).as_bytes()).await.unwrap();
    let mut all = vec![0; 1_000];
    assert!(socket.read(&mut all).await.unwrap() > 0);
    let app = gateway.take();
    let stopped = tokio::task::spawn_blocking(move || app.shutdown());
    let mut rest = Vec::new();
    let read = soon("the end of the connection", socket.read_to_end(&mut rest)).await;
    assert_eq!(read.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
    assert!(String::from_utf8(rest).unwrap().contains("shutting_down"));
    stopped.await.unwrap();
}

#[tokio::test]
async fn more_than_100_request_headers_get_a_431_that_names_the_limit() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let gateway = gateway(&upstream).await;
    let headers = |count: usize| (0..count).map(|n| format!("x-{n}: 1\r\n")).collect::<Vec<_>>().concat();
    // Two more are sent by `request`.
    assert_eq!(gateway.send("POST", CHAT, &headers(98), HELLO).await.status, 200);
    let reply = gateway.send("POST", CHAT, &headers(99), HELLO).await;
    assert_eq!(reply.refusal(), (431, "headers_too_large".into()));
    let message = reply.json()["error"]["message"].as_str().unwrap().to_owned();
    assert!(message.contains("100 headers") && message.contains("64 KiB"), "{message}");
}

#[tokio::test]
async fn an_answer_may_have_any_number_of_headers_up_to_64_kib() {
    for (count, length, status) in
        [(200, 1, 200), (5_000, 1, 200), (300, 180, 200), (40_000, 1, 502), (300, 400, 502)]
    {
        let value = "v".repeat(length);
        let headers = (0..count).map(|n| format!("x-{n}: {value}\r\n")).collect::<Vec<_>>().concat();
        let upstream =
            Upstream::always(Answer::with_headers(200, &headers, &chat_answer(&usage(8, 2)))).await;
        let gateway = gateway(&upstream).await;
        let reply = gateway.chat(HELLO).await;
        assert_eq!(reply.status, status, "{count} headers of {length} bytes");
        let passed = reply.head.lines().filter(|line| line.ends_with(&format!(": {value}"))).count();
        assert_eq!(passed, if status == 200 { count } else { 0 });
    }
}
