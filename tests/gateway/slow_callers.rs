//! Callers that are slow, do not read or disconnect; malformed requests; and a gateway that shuts down.

use crate::support::*;
use std::collections::BTreeSet;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tollgate::app::CallerTimeouts;

const STAGING: &str = "  staging: { upstream: backend, reserve: { completion: max_tokens }, quotas: { requests: { limit: 1000, per: minute } } }\ndefault_environment: staging";

fn short(millis: u64) -> CallerTimeouts {
    let timeout = Duration::from_millis(millis);
    CallerTimeouts { head: timeout, body: timeout, write: timeout, ..CallerTimeouts::default() }
}

/// A stream without an end, larger than the socket buffers between upstream and caller.
fn endless() -> Answer {
    let events = vec![delta(&"x".repeat(64 * 1024)); 600];
    Answer::stream().events(&events).then(Step::Stall)
}

#[tokio::test]
async fn a_caller_that_does_not_read_is_disconnected_and_settled() {
    let upstream = Upstream::always(endless()).await;
    let gateway = Gateway::with_timeouts(&upstream, "", STAGING, short(300)).await;
    let mut caller = gateway.caller().await;
    caller.request("POST", CHAT, "", hello(r#""stream":true"#).as_bytes()).await;
    upstream.wait_until_disconnected().await;
    let [requests, prompt, completion, _] = gateway.settled_charges().await;
    assert_eq!((requests, prompt), (1, HELLO_TOKENS));
    assert!(completion > 10_000, "{completion}");
    // The metric is recorded shortly after the request has settled.
    let disconnected =
        r#"tollgate_requests_total{api="chat",code="2xx",environment="staging",outcome="caller_gone"} 1"#;
    soon("the metric", async { while !gateway.admin_get("/metrics").await.text().contains(disconnected) {} })
        .await;
    drop(caller);
}

#[tokio::test]
async fn a_caller_that_reads_slowly_receives_the_whole_answer() {
    let events = vec![delta(&"x".repeat(64 * 1024)); 200];
    let upstream = Upstream::always(Answer::stream().events(&events).end()).await;
    let gateway = Gateway::with_timeouts(&upstream, "", STAGING, short(500)).await;
    let mut socket = TcpStream::connect(gateway.address).await.unwrap();
    let body = hello(r#""stream":true"#);
    let head = format!(
        "POST {CHAT} HTTP/1.1\r\nhost: g\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    socket.write_all((head + &body).as_bytes()).await.unwrap();
    let (mut all, mut piece) = (Vec::new(), vec![0; 1 << 20]);
    loop {
        tokio::time::sleep(Duration::from_millis(100)).await;
        let n = socket.read(&mut piece).await.unwrap();
        if n == 0 {
            break;
        }
        all.extend_from_slice(&piece[..n]);
    }
    assert!(all.ends_with(b"0\r\n\r\n") && all.len() > 200 * 64 * 1024);
}

#[tokio::test]
async fn the_total_timeout_applies_if_the_caller_does_not_read() {
    let upstream = Upstream::always(endless()).await;
    let gateway = Gateway::with(&upstream, "timeouts: { total: 500ms }", STAGING).await;
    let mut caller = gateway.caller().await;
    caller.request("POST", CHAT, "", hello(r#""stream":true"#).as_bytes()).await;
    let started = Instant::now();
    upstream.wait_until_disconnected().await;
    assert!(started.elapsed() < Duration::from_secs(3), "{:?}", started.elapsed());
    assert_eq!(gateway.settled_charges().await[0], 1);
    drop(caller);
}

#[tokio::test]
async fn a_disconnect_is_detected_behind_unread_bytes() {
    for (n, rest) in
        ["\r\n", "GET /v1/models HTTP/1.1\r\nhost: g\r\n\r\n", &"x".repeat(30_000)].into_iter().enumerate()
    {
        for answer in [Answer::silence(), Answer::stream().event(&delta("Hello")).then(Step::Stall)] {
            let upstream = Upstream::always(answer).await;
            let gateway = Gateway::with(&upstream, "", STAGING).await;
            let mut caller = gateway.caller().await;
            let body = hello(r#""stream":true"#);
            caller.request("POST", CHAT, "", body.as_bytes()).await;
            upstream.wait_until_seen(1).await;
            caller.send(rest.as_bytes()).await;
            tokio::time::sleep(Duration::from_millis(20)).await;
            drop(caller);
            upstream.wait_until_disconnected().await;
            assert_eq!(gateway.settled_charges().await[0], 1, "{n}");
        }
    }
}

#[tokio::test]
async fn pipelined_requests_are_answered_in_order() {
    let upstream = Upstream::answering(|seen| {
        let n = seen.text().len() as u64;
        Answer::of([vec![Step::Wait(Duration::from_millis(20))], Answer::chat(n, 1).steps()].concat())
    })
    .await;
    let gateway = Gateway::with(&upstream, "", STAGING).await;
    let mut caller = gateway.caller().await;
    let bodies: Vec<_> = (0..20).map(|n| hello(&format!(r#""user":"{}""#, "u".repeat(n * 400)))).collect();
    for body in &bodies {
        caller.request("POST", CHAT, "", body.as_bytes()).await;
    }
    let mut ids = BTreeSet::new();
    for body in &bodies {
        let reply = caller.reply().await;
        assert_eq!(reply.json()["usage"]["prompt_tokens"], body.len());
        ids.extend(reply.headers_named("x-request-id").into_iter().map(str::to_owned));
    }
    assert_eq!(ids.len(), bodies.len(), "each answer has the headers that the gateway adds to it");
}

#[tokio::test]
async fn a_caller_that_is_still_sending_receives_its_refusal() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let keys = "  staging: { upstream: backend, keys: [{ name: a, secret: a-key-of-staging-1 }] }";
    let gateway = Gateway::with(&upstream, "", keys).await;
    for (path, length, code) in [
        (CHAT, 20 << 20, "invalid_api_key"),
        ("/staging/nothing", 3 << 20, "unknown_path"),
        (CHAT, 300_000, "invalid_api_key"),
    ] {
        let mut caller = gateway.caller().await;
        let head = format!("POST {path} HTTP/1.1\r\nhost: g\r\ncontent-length: {length}\r\n\r\n");
        caller.send(head.as_bytes()).await;
        // The gateway has already refused the request. The caller continues to send.
        tokio::time::sleep(Duration::from_millis(50)).await;
        for _ in 0..length / 50_000 {
            assert!(caller.try_send(&vec![b'x'; 50_000]).await, "{path} {length}");
            tokio::task::yield_now().await;
        }
        let reply = caller.reply().await;
        assert_eq!((reply.code().as_str(), reply.header("connection")), (code, Some("close")));
    }
    // A small body is read, and the connection stays open.
    let mut caller = gateway.caller().await;
    for _ in 0..3 {
        caller.request("POST", CHAT, "", HELLO.as_bytes()).await;
        let reply = caller.reply().await;
        assert_eq!((reply.status, reply.header("connection")), (401, None));
    }
}

#[tokio::test]
async fn a_connection_is_closed_if_a_head_is_incomplete_after_the_head_timeout() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let gateway = Gateway::with_timeouts(&upstream, "", STAGING, short(100)).await;
    for head in ["", "P", "POST /v1/chat/completions HTTP/1.1\r\nhost: g\r\n"] {
        let mut caller = gateway.caller().await;
        caller.send(head.as_bytes()).await;
        assert!(caller.is_closed().await, "{head}");
    }
    // A head that arrives byte by byte gets no more time.
    let mut caller = gateway.caller().await;
    let (started, mut sent) = (Instant::now(), 0);
    while caller.try_send(b"x").await && sent < 200 {
        sent += 1;
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
}

#[tokio::test]
async fn the_head_timeout_applies_to_each_head_of_a_connection_and_to_no_answer() {
    let answer = Answer::of([vec![Step::Gate], Answer::chat(8, 2).steps()].concat());
    let upstream = Upstream::always(answer).await;
    let timeouts = CallerTimeouts { head: Duration::from_secs(2), ..CallerTimeouts::default() };
    let gateway = Gateway::with_timeouts(&upstream, "", STAGING, timeouts).await;
    let mut caller = gateway.caller().await;
    for _ in 0..2 {
        caller.request("POST", CHAT, "", HELLO.as_bytes()).await;
        tokio::time::sleep(Duration::from_millis(2_200)).await;
        upstream.open_gate();
        assert_eq!(caller.reply().await.status, 200);
    }
    let answered = Instant::now();
    caller.send(b"POST /v1/chat/completions HTTP/1.1\r\n").await;
    assert!(caller.is_closed().await);
    // The timeout counts from the answer before, which the gateway has sent earlier than the test has read it.
    assert!(answered.elapsed() > Duration::from_millis(500), "{:?}", answered.elapsed());
}

/// A refusal needs no upstream, so that its request can begin and end within one poll.
#[tokio::test]
async fn the_head_timeout_counts_from_the_last_answer_also_if_all_answers_are_refusals() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let gateway = Gateway::with_timeouts(&upstream, "", STAGING, short(600)).await;
    let mut caller = gateway.caller().await;
    for _ in 0..12 {
        tokio::time::sleep(Duration::from_millis(150)).await;
        caller.request("POST", "/nothing", "", b"{}").await;
        assert_eq!(caller.reply().await.status, 404);
    }
}

#[tokio::test]
async fn a_request_whose_body_stops_arriving_gets_a_400_and_costs_nothing() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let gateway = Gateway::with_timeouts(&upstream, "", STAGING, short(100)).await;
    let mut caller = gateway.caller().await;
    let head = format!("POST {CHAT} HTTP/1.1\r\nhost: g\r\ncontent-length: 100\r\n\r\n{{\"model\"");
    caller.send(head.as_bytes()).await;
    assert_eq!(caller.reply().await.refusal(), (400, "request_body_incomplete".into()));
    assert!(caller.is_closed().await);
    assert_eq!(gateway.settled_charges().await, [0, 0, 0, 0]);
    assert!(upstream.seen().is_empty());
}

#[tokio::test]
async fn a_request_during_a_shutdown_gets_a_503() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let mut gateway = Gateway::with(&upstream, "", STAGING).await;
    let mut caller = gateway.caller().await;
    caller.send(format!("POST {CHAT} HTTP/1.1\r\nhost: g\r\n").as_bytes()).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    let app = gateway.take();
    let stopped = tokio::task::spawn_blocking(move || app.shutdown());
    soon("the listener to close", async {
        while tokio::net::TcpStream::connect(gateway.address).await.is_ok() {}
    })
    .await;
    caller.send(format!("content-length: {}\r\n\r\n{HELLO}", HELLO.len()).as_bytes()).await;
    let reply = caller.reply().await;
    assert_eq!(reply.refusal(), (503, "shutting_down".into()));
    assert_eq!(
        (reply.json()["error"]["type"].as_str(), reply.header("retry-after")),
        (Some("server_error"), Some("1"))
    );
    stopped.await.unwrap();
    assert!(upstream.seen().is_empty());
}

#[tokio::test]
async fn a_stream_cut_off_by_a_shutdown_is_charged_for_every_delivered_token() {
    let words = delta(&"word ".repeat(20));
    let events = vec![words.clone(); 1_000];
    let upstream = Upstream::always(Answer::stream().events(&events).then(Step::Stall)).await;
    for settings in ["", "on_disconnect: drain,"] {
        let folder = tempfile::tempdir().unwrap();
        let config = format!(
            "server: {{ listen: '127.0.0.1:0', drain_timeout: 100ms }}\nadmin: {{ listen: '127.0.0.1:0' }}\nupstreams: {{ backend: {{ base_url: 'http://{}/v1' }} }}\n\
             environments: {{ staging: {{ upstream: backend, {settings} quotas: {{ total_tokens: {{ limit: 10M, per: day }} }} }} }}\ndefault_environment: staging\nstore: {{ path: '{}' }}",
            upstream.address,
            folder.path().join("t.db").display()
        );
        let gateway = Gateway::from_config(&config).await;
        let mut callers = Vec::new();
        for _ in 0..8 {
            let mut caller = gateway.caller().await;
            caller.request("POST", CHAT, "", hello(r#""stream":true"#).as_bytes()).await;
            callers.push(caller);
        }
        for caller in &mut callers {
            caller.head().await;
            let mut received = 0;
            while received < 1_000 * words.len() {
                received += caller.chunk().await.unwrap().len();
            }
        }
        assert_eq!(gateway.shutdown().await.cut_off, 8);
        let again = Gateway::from_config(&config).await;
        assert_eq!(
            again.charged().await,
            [8, 8 * HELLO_TOKENS, 8 * 20_001, 8 * (HELLO_TOKENS + 20_001)],
            "{settings}"
        );
    }
}

#[tokio::test]
async fn a_body_piece_that_looks_like_a_refusal_passes_unchanged() {
    let piece = "HTTP/1.1 400 Bad Request\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";
    let head =
        format!("HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: {}\r\n\r\n", 2 * piece.len());
    let upstream = Upstream::always(Answer::of(vec![
        Step::Send(head.into()),
        Step::Wait(Duration::from_millis(20)),
        Step::Send(piece.into()),
        Step::Wait(Duration::from_millis(20)),
        Step::Send(piece.into()),
    ]))
    .await;
    let gateway = Gateway::with(&upstream, "", STAGING).await;
    let mut caller = gateway.caller().await;
    for _ in 0..2 {
        caller.request("POST", CHAT, "", HELLO.as_bytes()).await;
        assert_eq!(caller.reply().await.text(), piece.repeat(2));
    }
    // A malformed request after them still gets an answer with a body.
    caller.send(b"nonsense\r\n\r\n").await;
    let reply = caller.reply().await;
    assert_eq!((reply.status, reply.code().as_str()), (400, "bad_request"));
}
