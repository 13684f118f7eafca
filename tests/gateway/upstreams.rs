//! Upstreams that are slow, disconnect or answer early: the gateway's answer, its retries and the charge.

use crate::support::*;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

const STAGING: &str = "  staging: { upstream: backend, reserve: { completion: max_tokens }, quotas: { requests: { limit: 1000, per: minute } } }\ndefault_environment: staging";

/// A gateway with one upstream at this URL, with these settings.
async fn gateway_in_front_of(base_url: &str, settings: &str) -> Gateway {
    Gateway::from_config(&format!(
        "server: {{ listen: '127.0.0.1:0', max_request_body: 32MiB }}\nadmin: {{ listen: '127.0.0.1:0' }}\n\
         upstreams: {{ backend: {{ base_url: '{base_url}', {settings} }} }}\nenvironments:\n{STAGING}\nstore: {{ memory: true }}"
    ))
    .await
}

/// Accepts connections, sends these bytes on each, and then neither sends nor closes.
async fn sending_only(bytes: &'static [u8]) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let mut all = Vec::new();
        while let Ok((mut socket, _)) = listener.accept().await {
            socket.write_all(bytes).await.unwrap();
            all.push(socket);
        }
    });
    address
}

#[tokio::test]
async fn a_connect_timeout_gives_a_502_and_costs_nothing() {
    let silent = sending_only(b"").await;
    let gateway = gateway_in_front_of(&format!("https://{silent}/v1"), "timeouts: { connect: 50ms }").await;
    let reply = gateway.chat(HELLO).await;
    assert_eq!(reply.refusal(), (502, "upstream_unreachable".into()));
    assert!(reply.text().contains("timeouts.connect"), "{}", reply.text());
    assert_eq!(gateway.settled_charges().await, [0, 0, 0, 0]);
}

#[tokio::test]
async fn a_failed_tls_handshake_gives_a_502_and_costs_nothing() {
    let not_tls = sending_only(b"SSH-2.0-OpenSSH_9.2\r\n").await;
    let gateway = gateway_in_front_of(&format!("https://{not_tls}/v1"), "").await;
    assert_eq!(gateway.chat(HELLO).await.refusal(), (502, "upstream_unreachable".into()));
    assert_eq!(gateway.settled_charges().await, [0, 0, 0, 0]);
}

#[tokio::test]
async fn a_caller_that_disconnects_before_the_upstream_is_connected_is_charged_nothing() {
    let silent = sending_only(b"").await;
    let gateway = gateway_in_front_of(&format!("https://{silent}/v1"), "").await;
    let mut caller = gateway.caller().await;
    caller.request("POST", CHAT, "", HELLO.as_bytes()).await;
    soon("the request to be admitted", async { while gateway.environment().await["in_flight"] != 1 {} })
        .await;
    drop(caller);
    assert_eq!(gateway.settled_charges().await, [0, 0, 0, 0]);
}

#[tokio::test]
async fn the_total_timeout_covers_the_connection_the_head_and_the_body() {
    // The head arrives too late. The answer names the timeout that elapsed first.
    let upstream = Upstream::always(Answer::silence()).await;
    let gateway = Gateway::with(&upstream, "timeouts: { total: 50ms, first_byte: 5s }", STAGING).await;
    let reply = gateway.chat(HELLO).await;
    assert_eq!(reply.refusal(), (504, "upstream_timeout".into()));
    assert!(reply.text().contains("timeouts.total"), "{}", reply.text());
    assert_eq!(gateway.settled_charges().await, [1, HELLO_TOKENS, 0, HELLO_TOKENS]);
    // The total timeout includes the time until the head.
    let head = Answer::stream().steps();
    let late = [vec![Step::Wait(Duration::from_millis(700))], head, vec![Step::Stall]].concat();
    let upstream = Upstream::always(Answer::of(late)).await;
    let gateway = Gateway::with(&upstream, "timeouts: { total: 1s }", STAGING).await;
    let started = Instant::now();
    let reply = gateway.chat(&hello(r#""stream":true"#)).await;
    assert!(reply.text().contains("timeouts.total"), "{}", reply.text());
    assert!(started.elapsed() < Duration::from_millis(1_500), "{:?}", started.elapsed());
    // The total timeout includes the time to connect.
    let silent = sending_only(b"").await;
    let gateway = gateway_in_front_of(&format!("https://{silent}/v1"), "timeouts: { total: 50ms }").await;
    let reply = gateway.chat(HELLO).await;
    assert_eq!(reply.refusal(), (504, "upstream_timeout".into()));
    assert_eq!(gateway.settled_charges().await, [0, 0, 0, 0]);
}

#[tokio::test]
async fn a_refusal_that_is_sent_before_the_upstream_has_read_the_body_is_passed_on() {
    let refusal = Answer::json(413, r#"{"error":"too much"}"#).then(Step::Hold);
    let upstream = Upstream::not_reading_bodies(refusal).await;
    let settings = "timeouts: { first_byte: 5s }";
    let gateway = gateway_in_front_of(&format!("http://{}/v1", upstream.address), settings).await;
    let large = hello(&format!(r#""x":"{}""#, "a ".repeat(10 << 20)));
    for n in 1..=2 {
        let started = Instant::now();
        let reply = gateway.chat(&large).await;
        assert_eq!((reply.status, reply.text()), (413, r#"{"error":"too much"}"#));
        assert!(started.elapsed() < Duration::from_secs(4));
        // The connection is not reused, since the body was not sent completely.
        assert_eq!(upstream.seen().len(), n);
    }
    assert_eq!(gateway.settled_charges().await, [2, 0, 0, 0]);
}

#[tokio::test]
async fn an_upstream_that_answers_early_and_reads_slowly_receives_the_whole_body() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let reader = tokio::spawn(async move {
        let (mut socket, _) = listener.accept().await.unwrap();
        // An interim answer, then the head of the final one.
        socket
            .write_all(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n")
            .await
            .unwrap();
        let mut all = Vec::new();
        while !all.ends_with(b"the end\"}]}") {
            tokio::time::sleep(Duration::from_millis(1)).await;
            socket.read_buf(&mut all).await.unwrap();
            all.reserve(256 * 1024);
        }
        socket.write_all(b"{}").await.unwrap();
        all.len()
    });
    let gateway = gateway_in_front_of(&format!("http://{address}/v1"), "").await;
    let large = HELLO.replace("hello", &format!("{}the end", "a ".repeat(10 << 20)));
    let reply = gateway.chat(&large).await;
    assert_eq!((reply.status, reply.text()), (200, "{}"));
    assert!(reader.await.unwrap() > large.len());
}

/// Answers the first request of a connection, and does `step` with the second one.
fn answers_once_then(step: Step) -> impl Fn(&SeenRequest) -> Answer {
    let requests = AtomicUsize::new(0);
    move |_| match requests.fetch_add(1, Ordering::Relaxed) {
        1 => Answer::of(vec![step.clone()]),
        _ => Answer::chat(8, 2),
    }
}

#[tokio::test]
async fn a_request_lost_on_a_reused_connection_is_retried_once_and_charged_once() {
    for step in [Step::Cut, Step::Reset] {
        let upstream = Upstream::answering(answers_once_then(step.clone())).await;
        let gateway = Gateway::with(&upstream, "", STAGING).await;
        let mut caller = gateway.caller().await;
        for _ in 0..2 {
            caller.request("POST", CHAT, "", HELLO.as_bytes()).await;
            let reply = caller.reply().await;
            assert_eq!(reply.status, 200, "{step:?} {}", reply.text());
        }
        assert_eq!((upstream.seen().len(), upstream.connections()), (3, 2), "{step:?}");
        assert_eq!(gateway.settled_charges().await, [2, 16, 4, 20], "{step:?}");
    }
}

#[tokio::test]
async fn a_retry_is_not_repeated() {
    let requests = AtomicUsize::new(0);
    let upstream = Upstream::answering(move |_| match requests.fetch_add(1, Ordering::Relaxed) {
        0 => Answer::chat(8, 2),
        _ => Answer::of(vec![Step::Cut]),
    })
    .await;
    let gateway = Gateway::with(&upstream, "", STAGING).await;
    let mut caller = gateway.caller().await;
    caller.request("POST", CHAT, "", HELLO.as_bytes()).await;
    assert_eq!(caller.reply().await.status, 200);
    caller.request("POST", CHAT, "", HELLO.as_bytes()).await;
    assert_eq!(caller.reply().await.refusal(), (502, "upstream_unreachable".into()));
    assert_eq!((upstream.seen().len(), upstream.connections()), (3, 2));
    assert_eq!(gateway.settled_charges().await, [2, 8 + HELLO_TOKENS, 2, 10 + HELLO_TOKENS]);
}

#[tokio::test]
async fn a_request_is_not_retried_after_a_byte_of_its_answer_or_on_a_fresh_connection() {
    for step in [Step::Send(b"HTTP/1.1 2".into()), Step::Send(b"HTTP/1.1 103 Early Hints\r\n\r\n".into())] {
        let requests = AtomicUsize::new(0);
        let upstream = Upstream::answering(move |_| match requests.fetch_add(1, Ordering::Relaxed) {
            1 => Answer::of(vec![step.clone(), Step::Cut]),
            _ => Answer::chat(8, 2),
        })
        .await;
        let gateway = Gateway::with(&upstream, "", STAGING).await;
        let mut caller = gateway.caller().await;
        for status in [200, 502] {
            caller.request("POST", CHAT, "", HELLO.as_bytes()).await;
            assert_eq!(caller.reply().await.status, status);
        }
        assert_eq!((upstream.seen().len(), upstream.connections()), (2, 1));
        assert_eq!(gateway.settled_charges().await, [2, 8 + HELLO_TOKENS, 2, 10 + HELLO_TOKENS]);
    }
    let upstream = Upstream::always(Answer::of(vec![Step::Cut])).await;
    let gateway = Gateway::with(&upstream, "", STAGING).await;
    assert_eq!(gateway.chat(HELLO).await.refusal(), (502, "upstream_unreachable".into()));
    assert_eq!((upstream.seen().len(), upstream.connections()), (1, 1));
    assert_eq!(gateway.settled_charges().await, [1, HELLO_TOKENS, 0, HELLO_TOKENS]);
}

#[tokio::test]
async fn an_answer_that_begins_before_the_request_is_read_is_passed_on_while_the_request_is_sent() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    // The upstream reads the rest of the request only after its answer has been read.
    let answer = "x".repeat(16 << 20);
    let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", answer.len());
    let body = answer.clone();
    let reader = tokio::spawn(async move {
        let (mut socket, _) = listener.accept().await.unwrap();
        let mut all = Vec::new();
        socket.read_buf(&mut all).await.unwrap();
        socket.write_all(head.as_bytes()).await.unwrap();
        socket.write_all(body.as_bytes()).await.unwrap();
        while !all.ends_with(b"the end\"}]}") {
            socket.read_buf(&mut all).await.unwrap();
            all.reserve(256 * 1024);
        }
        all.len()
    });
    let gateway = gateway_in_front_of(&format!("http://{address}/v1"), "timeouts: { first_byte: 3s }").await;
    let large = HELLO.replace("hello", &format!("{}the end", "a ".repeat(10 << 20)));
    let reply = gateway.chat(&large).await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    assert!(reply.text() == answer && !reply.is_incomplete);
    drop(reader);
}
