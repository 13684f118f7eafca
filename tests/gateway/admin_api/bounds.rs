//! Bounds: many environments, and hostile requests.

use super::{TOKEN, bearer, error, request};
use crate::support::redis::has_shared_counters;
use crate::support::*;
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tollgate::app::CallerTimeouts;

/// The shortest of several times of a request, and its answer.
async fn timed(gateway: &Gateway, target: &str) -> (Duration, Reply) {
    let mut best: Option<(Duration, Reply)> = None;
    for _ in 0..5 {
        let started = Instant::now();
        let reply = gateway.admin_get(target).await;
        let took = started.elapsed();
        if best.as_ref().is_none_or(|(shortest, _)| took < *shortest) {
            best = Some((took, reply));
        }
    }
    best.unwrap()
}

#[tokio::test]
async fn five_hundred_environments_of_twenty_callers_are_shown_in_a_small_answer_and_quickly() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let mut environments = String::new();
    for n in 0..500 {
        let key = |m: usize| {
            let number = n * 20 + m;
            format!(
                "{{ name: caller-{m}, sha256: '{number:064x}', quotas: {{ total_tokens: {{ limit: 9k, per: minute }} }} }}"
            )
        };
        let keys: Vec<String> = (0..20).map(key).collect();
        let quotas = "{ total_tokens: [{ limit: 100k, per: minute }, { limit: 50M, per: month }], requests: { limit: 600, per: minute } }";
        writeln!(
            environments,
            "  env-{n}: {{ upstream: backend, quotas: {quotas}, keys: [{}] }}",
            keys.join(", ")
        )
        .unwrap();
    }
    let gateway = Gateway::with(&upstream, "", &environments).await;
    let (overview, reply) = timed(&gateway, "/api/environments?sort=used&limit=50").await;
    let size = reply.body.len();
    let (metrics, _) = timed(&gateway, "/metrics").await;
    let (all, whole) = timed(&gateway, "/api/environments").await;
    println!(
        "500 environments of 20 callers: overview {overview:?} and {size} bytes, metrics {metrics:?}, all {all:?} and {} bytes",
        whole.body.len()
    );
    assert_eq!(reply.json()["environments"].as_array().unwrap().len(), 50);
    assert!(size < 200_000, "{size}");
    let omitted: u64 = reply.json()["environments"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|e| e["quotas_omitted"].as_u64())
        .sum();
    let shown: usize = reply.json()["environments"]
        .as_array()
        .unwrap()
        .iter()
        .map(|e| e["quotas"].as_array().unwrap().len())
        .sum();
    let of_environment = &whole.json()["environments"][0]["quotas"];
    assert_eq!(omitted + shown as u64, 50 * of_environment.as_array().unwrap().len() as u64);
    assert_eq!(shown, 400);
    // With shared counters, the state of each environment is read from Redis first.
    let bound = if has_shared_counters() { 1000 } else { 50 };
    assert!(overview < Duration::from_millis(bound), "{overview:?}");
    assert!(metrics < Duration::from_millis(200), "{metrics:?}");
}

const ENVIRONMENTS: &str = "  staging:\n    upstream: backend\n    quotas: { requests: { limit: 1000, per: day } }\ndefault_environment: staging";
const UNSAFE: [(&str, &str); 7] = [
    ("PUT", "/api/environments/staging/quotas/requests/day"),
    ("DELETE", "/api/environments/staging/quotas/requests/day"),
    ("POST", "/api/environments/staging/reset"),
    ("POST", "/api/config/reload"),
    ("POST", "/api/session"),
    ("DELETE", "/api/session"),
    ("POST", "/api/explain?environment=staging"),
];

async fn with_short_timeouts(upstream: &Upstream) -> Gateway {
    let body = Duration::from_millis(300);
    let timeouts = CallerTimeouts { body, ..CallerTimeouts::default() };
    Gateway::with_timeouts(upstream, "", ENVIRONMENTS, timeouts).await
}

/// The state that no request of these tests may change.
async fn state(gateway: &Gateway) -> Value {
    let environment = gateway.environment().await;
    let quota = &environment["quotas"][0];
    json!([quota["limit"], quota["level"], quota["source"], gateway.admin_get("/api/config").await.json()])
}

#[tokio::test]
async fn hostile_bodies_get_a_4xx_and_change_nothing() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let gateway = with_short_timeouts(&upstream).await;
    assert_eq!(gateway.chat(&hello(r#""max_tokens":2"#)).await.status, 200);
    let before = state(&gateway).await;
    let keys: Vec<String> = (0..4_000).map(|n| format!("\"k{n}\":1")).collect();
    let bodies: [(&str, Vec<u8>); 8] = [
        ("nesting", "[".repeat(60_000).into_bytes()),
        ("nested objects", "{\"limit\":".repeat(6_000).into_bytes()),
        ("many keys", format!("{{{}}}", keys.join(",")).into_bytes()),
        ("the same key", format!("{{{}\"limit\":1}}", "\"limit\":7,".repeat(5_000)).into_bytes()),
        ("no JSON", b"limit=7".to_vec()),
        ("invalid UTF-8", b"{\"limit\":\"\xff\xfe\"}".to_vec()),
        ("a huge number", format!("{{\"limit\":1{}}}", "0".repeat(60_000)).into_bytes()),
        ("nothing", Vec::new()),
    ];
    for (method, target) in UNSAFE.into_iter().filter(|(method, target)| {
        *method == "PUT"
            || *target == "/api/session" && *method == "POST"
            || target.starts_with("/api/explain")
    }) {
        for (name, body) in &bodies {
            let started = Instant::now();
            let mut caller = Caller::connect(gateway.admin).await;
            let head = format!(
                "{method} {target} HTTP/1.1\r\nhost: {}\r\ncontent-length: {}\r\n\r\n",
                gateway.admin,
                body.len()
            );
            caller.send(&[head.as_bytes(), body].concat()).await;
            let reply = caller.reply().await;
            // A request to explain may have fields that the gateway does not govern, as a request of a caller may.
            if target.starts_with("/api/explain")
                && ["many keys", "the same key", "a huge number"].contains(name)
            {
                assert!(reply.status < 500, "{name}: {}", reply.status);
                continue;
            }
            assert!(
                (400..500).contains(&reply.status),
                "{method} {target} {name}: {} {}",
                reply.status,
                reply.text()
            );
            assert!(
                !reply.code().is_empty() && !reply.json()["error"]["message"].as_str().unwrap().is_empty(),
                "{name}"
            );
            assert!(reply.body.len() < 2_000, "{method} {target} {name}: {} bytes", reply.body.len());
            assert!(started.elapsed() < Duration::from_secs(5), "{name}");
        }
    }
    assert_eq!(state(&gateway).await, before);
}

#[tokio::test]
async fn a_body_of_100_mb_is_refused_without_being_read() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let gateway = with_short_timeouts(&upstream).await;
    let before = state(&gateway).await;
    for (method, target) in UNSAFE {
        for framing in ["content-length: 104857600\r\n", "transfer-encoding: chunked\r\n"] {
            let is_chunked = framing.starts_with("transfer");
            let mut socket = TcpStream::connect(gateway.admin).await.unwrap();
            let head = format!("{method} {target} HTTP/1.1\r\nhost: {}\r\n{framing}\r\n", gateway.admin);
            socket.write_all(head.as_bytes()).await.unwrap();
            let (mut reader, mut writer) = socket.into_split();
            let mut piece = vec![b' '; 64 * 1024];
            if is_chunked {
                piece = [format!("{:x}\r\n", piece.len()).as_bytes(), &piece, b"\r\n"].concat();
            }
            let write = async {
                let mut sent = 0;
                while sent < 104_857_600 && writer.write_all(&piece).await.is_ok() {
                    sent += piece.len();
                }
                sent
            };
            let read = async {
                let mut received = Vec::new();
                // The connection may be reset after the answer.
                let _ = reader.read_to_end(&mut received).await;
                received
            };
            let (sent, received) = soon("a refusal", async { tokio::join!(write, read) }).await;
            let status = String::from_utf8_lossy(&received).get(9..12).unwrap_or_default().to_owned();
            assert_eq!(status, "413", "{method} {target} {framing}");
            // The buffers of the sockets take a part; a request to explain may have 32 MiB.
            let max = if target.starts_with("/api/explain") && is_chunked { 64 << 20 } else { 16 << 20 };
            assert!(sent < max, "{method} {target} {framing}: {sent} bytes were read");
        }
    }
    assert_eq!(state(&gateway).await, before);
}

#[tokio::test]
async fn a_body_that_arrives_too_slowly_gets_a_408() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let gateway = with_short_timeouts(&upstream).await;
    let before = state(&gateway).await;
    for (method, target) in UNSAFE {
        let started = Instant::now();
        let mut socket = TcpStream::connect(gateway.admin).await.unwrap();
        let head =
            format!("{method} {target} HTTP/1.1\r\nhost: {}\r\ncontent-length: 100\r\n\r\n{{", gateway.admin);
        socket.write_all(head.as_bytes()).await.unwrap();
        let mut received = Vec::new();
        let _ = soon("the end of the connection", socket.read_to_end(&mut received)).await;
        let text = String::from_utf8_lossy(&received);
        assert!(
            text.starts_with("HTTP/1.1 408") && text.contains("request_timeout"),
            "{method} {target}: {text}"
        );
        assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    }
    assert_eq!(state(&gateway).await, before);
}

#[tokio::test]
async fn a_token_of_a_megabyte_is_refused_in_the_header_and_in_the_body() {
    let (upstream, folder) = (Upstream::always(Answer::chat(8, 2)).await, tempfile::tempdir().unwrap());
    let gateway = super::gateway(&upstream, &folder).await;
    let long = "x".repeat(1_000_000);
    let in_header = request(&gateway, "GET", "/api/environments", &bearer(&long), "").await;
    assert_eq!(in_header.status, 431);
    let in_body = request(&gateway, "POST", "/api/session", "", &json!({ "token": long }).to_string()).await;
    assert_eq!(error(&in_body), (413, "request_body_too_large".into()));
    let in_query = request(
        &gateway,
        "GET",
        &format!("/api/environments?fields={}", "x,".repeat(20_000)),
        &bearer(TOKEN),
        "",
    )
    .await;
    assert_eq!(error(&in_query), (400, "invalid_value".into()));
    assert_eq!(request(&gateway, "GET", "/api/environments", &bearer(TOKEN), "").await.status, 200);
}
