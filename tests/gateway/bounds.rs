//! Bounds of what callers occupy: connections, bodies, and the time of a body and of an exchange.

use crate::support::*;
use std::net::SocketAddr;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{sleep, timeout};

/// A gateway with these settings of `server`.
async fn gateway(upstream: &Upstream, server: &str) -> Gateway {
    Gateway::from_config(&config(upstream, server)).await
}

fn config(upstream: &Upstream, server: &str) -> String {
    format!(
        "server: {{ listen: '127.0.0.1:0', drain_timeout: 5s, {server} }}\nadmin: {{ listen: '127.0.0.1:0' }}\n\
         upstreams: {{ u: {{ base_url: 'http://{}/v1' }} }}\n\
         environments: {{ e: {{ upstream: u, quotas: {{ requests: {{ limit: 1M, per: minute }} }} }} }}\ndefault_environment: e\nstore: {{ memory: true }}",
        upstream.address
    )
}

/// A request of `length` bytes, of which only `sent` have been sent.
async fn unfinished(gateway: &Gateway, length: usize, sent: usize) -> Caller {
    let mut caller = gateway.caller().await;
    let head = format!("POST {CHAT} HTTP/1.1\r\nhost: g\r\ncontent-length: {length}\r\n\r\n");
    caller.send(&[head.as_bytes(), &vec![b' '; sent]].concat()).await;
    caller
}

#[tokio::test]
async fn a_body_that_trickles_is_refused_after_the_body_timeout() {
    let upstream = Upstream::always(Answer::chat(8, 1)).await;
    let gateway = gateway(&upstream, "body_timeout: 400ms").await;
    let mut caller = unfinished(&gateway, 1_000, 0).await;
    let began = Instant::now();
    let trickle = async {
        loop {
            caller.send(b" ").await;
            if let Ok(reply) = timeout(Duration::from_millis(50), caller.reply()).await {
                return reply;
            }
        }
    };
    let reply = soon("the refusal", trickle).await;
    assert_eq!(reply.refusal(), (400, "request_body_incomplete".into()));
    assert!(reply.text().contains("server.body_timeout"), "{}", reply.text());
    assert!(began.elapsed() >= Duration::from_millis(350), "{:?}", began.elapsed());
    assert!(upstream.seen().is_empty());
    assert_eq!(gateway.settled_charges().await, [0; 4]);
}

#[tokio::test]
async fn bodies_beyond_the_bound_wait_and_get_a_503() {
    let upstream = Upstream::always(Answer::chat(8, 1)).await;
    let gateway = gateway(&upstream, "max_request_body: 100KiB, buffered_bodies: 200KiB").await;
    let first = unfinished(&gateway, 100_000, 99_000).await;
    let second = unfinished(&gateway, 100_000, 99_000).await;
    // The bodies have arrived when a third one has no room.
    let large = hello(&format!(r#""user":"{}""#, "u".repeat(50_000)));
    let refused = soon("a refusal", async {
        loop {
            let reply = gateway.chat(&large).await;
            if reply.status != 200 {
                return reply;
            }
        }
    })
    .await;
    assert_eq!(refused.refusal(), (503, "overloaded".into()));
    assert_eq!(refused.header("retry-after"), Some("1"));
    // A request that fits is served, and one that waits is served as soon as there is room.
    assert_eq!(gateway.chat(HELLO).await.status, 200);
    let (reply, ()) = tokio::join!(gateway.chat(&large), async {
        sleep(Duration::from_millis(100)).await;
        drop(first);
    });
    assert_eq!(reply.status, 200);
    drop(second);
    soon("room", async { while gateway.chat(&large).await.status != 200 {} }).await;
}

#[tokio::test]
async fn a_connection_beyond_the_bound_waits_until_another_one_ends() {
    let upstream = Upstream::always(Answer::chat(8, 1)).await;
    let gateway = gateway(&upstream, "max_connections: 3").await;
    let mut open = Vec::new();
    for _ in 0..3 {
        let mut caller = gateway.caller().await;
        caller.request("POST", CHAT, "", HELLO.as_bytes()).await;
        assert_eq!(caller.reply().await.status, 200);
        open.push(caller);
    }
    let mut waiting = gateway.caller().await;
    waiting.request("POST", CHAT, "", HELLO.as_bytes()).await;
    assert!(timeout(Duration::from_millis(300), waiting.reply()).await.is_err());
    assert_eq!(upstream.seen().len(), 3);
    // The admin listener has bounds of its own.
    assert_eq!(gateway.admin_get("/livez").await.status, 200);
    drop(open.pop());
    assert_eq!(waiting.reply().await.status, 200);
}

#[tokio::test]
async fn an_address_with_too_many_connections_gets_no_more_and_others_are_served() {
    let upstream = Upstream::always(Answer::chat(8, 1)).await;
    let connections = async |gateway: &Gateway| {
        let mut callers = Vec::new();
        for _ in 0..5 {
            let mut caller = gateway.caller().await;
            caller.request("POST", CHAT, "", HELLO.as_bytes()).await;
            callers.push(caller);
        }
        let mut served = 0;
        for caller in &mut callers {
            served += usize::from(!caller.is_closed().await);
        }
        served
    };
    for (server, served) in [
        ("max_connections_per_address: 2", 2),
        ("max_connections_per_address: 2, trusted_proxies: ['127.0.0.1']", 5),
        ("max_connections_per_address: 0", 5),
        ("", 5),
    ] {
        let gateway = gateway(&upstream, server).await;
        assert_eq!(connections(&gateway).await, served, "{server}");
    }
}

/// An upstream that answers with a stream without an end and without a pause.
async fn endless_upstream() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let (mut socket, _) = listener.accept().await.unwrap();
        let mut request = vec![0; 64 * 1024];
        assert!(socket.read(&mut request).await.unwrap() > 0);
        let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
        socket.write_all(head.as_bytes()).await.unwrap();
        let event = delta(&"x".repeat(16 * 1024));
        let chunk = format!("{:x}\r\n{event}\r\n", event.len()).repeat(8);
        while socket.write_all(chunk.as_bytes()).await.is_ok() {}
    });
    address
}

#[tokio::test]
async fn the_total_timeout_ends_an_answer_that_never_pauses() {
    let upstream = endless_upstream().await;
    let gateway = Gateway::from_config(&format!(
        "server: {{ listen: '127.0.0.1:0' }}\nadmin: {{ listen: '127.0.0.1:0' }}\n\
         upstreams: {{ u: {{ base_url: 'http://{upstream}/v1', timeouts: {{ total: 700ms }} }} }}\n\
         environments: {{ e: {{ upstream: u }} }}\ndefault_environment: e\nstore: {{ memory: true }}"
    ))
    .await;
    let body = hello(r#""stream":true"#);
    let mut socket = TcpStream::connect(gateway.address).await.unwrap();
    let head = format!("POST {CHAT} HTTP/1.1\r\nhost: g\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    socket.write_all(head.as_bytes()).await.unwrap();
    let mut piece = vec![0; 1 << 20];
    let mut last = Vec::new();
    // The caller reads as fast as it can.
    let read = async {
        while let Ok(n @ 1..) = socket.read(&mut piece).await {
            last.extend_from_slice(&piece[..n]);
            let excess = last.len().saturating_sub(4_096);
            last.drain(..excess);
            if last.ends_with(b"0\r\n\r\n") {
                break;
            }
        }
    };
    soon("the end of the stream", read).await;
    assert!(String::from_utf8_lossy(&last).contains("timeouts.total"), "{}", String::from_utf8_lossy(&last));
}

#[tokio::test]
async fn the_listener_recovers_at_once_when_descriptors_are_free_again() {
    let upstream = Upstream::always(Answer::chat(8, 1)).await;
    let gateway = Process::start(
        &format!(
            "upstreams: {{ u: {{ base_url: 'http://{}/v1' }} }}\nenvironments: {{ e: {{ upstream: u }} }}\ndefault_environment: e",
            upstream.address
        ),
        &[],
    )
    .await;
    assert_eq!(gateway.chat(HELLO).await.status, 200);
    let open = std::fs::read_dir(format!("/proc/{}/fd", gateway.id())).unwrap().count();
    gateway.limit_descriptors(open + 8);
    let mut callers = Vec::new();
    for _ in 0..40 {
        callers.push(gateway.caller().await);
    }
    let line = soon("a log line", gateway.log_line("message", "connections could not be accepted")).await;
    assert!(line["errors"].as_u64().unwrap() >= 1, "{line}");
    sleep(Duration::from_millis(2_500)).await;
    let lines = gateway.log_text();
    let lines = lines.lines().filter(|line| line.contains("could not be accepted")).count();
    assert!((1..=4).contains(&lines), "{lines} lines in 2.5 s");
    // The last callers were not accepted yet.
    drop(callers);
    let began = Instant::now();
    assert_eq!(gateway.chat(HELLO).await.status, 200);
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
}

/// The memory that a process occupies, in MiB.
fn resident(process: &Process) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", process.id())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() / 1_024
}

/// Streams that are open at the same time and then end. Returns the memory with all of them open.
async fn storm(gateway: &Process, upstream: &Upstream, streams: usize) -> u64 {
    let body = hello(&format!(r#""stream":true,"user":"{}""#, "u".repeat(60_000)));
    let seen = upstream.seen().len();
    let mut callers = Vec::new();
    for n in 1..=streams {
        let mut caller = gateway.caller().await;
        caller.request("POST", CHAT, "", body.as_bytes()).await;
        callers.push(caller);
        if n % 100 == 0 {
            upstream.wait_until_seen(seen + n).await;
        }
    }
    let peak = resident(gateway);
    (0..streams).for_each(|_| upstream.open_gate());
    for caller in &mut callers {
        caller.head().await;
        while caller.chunk().await.is_some_and(|chunk| !chunk.is_empty()) {}
    }
    peak
}

#[tokio::test]
async fn after_a_storm_the_memory_goes_back() {
    const STORM: usize = 800;
    let steps = [vec![Step::Gate], Answer::stream().event(&delta("Hi")).event(DONE).end().steps()].concat();
    let upstream = Upstream::always(Answer::of(steps)).await;
    let gateway = Process::start(
        &format!(
            "upstreams: {{ u: {{ base_url: 'http://{}/v1' }} }}\nenvironments: {{ e: {{ upstream: u }} }}\ndefault_environment: e",
            upstream.address
        ),
        &[],
    )
    .await;
    // A smaller storm first: caches have entries then, and the code is in memory.
    storm(&gateway, &upstream, STORM / 4).await;
    sleep(Duration::from_secs(12)).await;
    let base = resident(&gateway);
    let peak = storm(&gateway, &upstream, STORM).await;
    let bound = base + base / 5;
    assert!(peak > bound, "the storm is too small: {base} MiB before it, {peak} MiB in it");
    let began = Instant::now();
    while resident(&gateway) > bound {
        let now = resident(&gateway);
        assert!(
            began.elapsed() < Duration::from_mins(1),
            "{base} MiB before, {peak} MiB in it, {now} MiB after"
        );
        sleep(Duration::from_millis(500)).await;
    }
}
