//! Several replicas behind one upstream (`base_urls`).

use crate::support::port::free_port;
use crate::support::*;
use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

const OPEN: &str = "  staging: { upstream: backend, quotas: { requests: { limit: 100k, per: day } } }\ndefault_environment: staging";

fn config(urls: &[String], settings: &str) -> String {
    let urls: Vec<String> = urls.iter().map(|url| format!("'{url}'")).collect();
    format!(
        "server: {{ listen: '127.0.0.1:0', drain_timeout: 5s }}\nadmin: {{ listen: '127.0.0.1:0' }}\n\
         upstreams:\n  backend: {{ base_urls: [{}], {settings} }}\nenvironments:\n{OPEN}\nstore: {{ memory: true }}\n",
        urls.join(", ")
    )
}

fn url(port: u16) -> String {
    format!("http://127.0.0.1:{port}/v1")
}

async fn gateway_of(upstreams: &[&Upstream], settings: &str) -> Gateway {
    let urls: Vec<String> = upstreams.iter().map(|upstream| url(upstream.address.port())).collect();
    Gateway::from_config(&config(&urls, settings)).await
}

/// The replicas of the first upstream, as `GET /api/system` shows them.
async fn replicas(gateway: &Gateway) -> Vec<Value> {
    let system = gateway.admin_get("/api/system").await.json();
    system["upstreams"][0]["replicas"].as_array().unwrap().clone()
}

/// Waits until a replica has this value in a field.
async fn wait_for(gateway: &Gateway, index: usize, field: &str, expected: Value) {
    soon(field, async {
        while replicas(gateway).await[index][field] != expected {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
}

/// Sends this many chat requests from a few callers, back to back. Returns how many were not answered with 200.
async fn send(gateway: &Gateway, callers: usize, requests: usize) -> usize {
    let mut tasks = Vec::new();
    for first in 0..callers {
        let mut caller = gateway.caller().await;
        tasks.push(tokio::spawn(async move {
            let mut failed = 0;
            for _ in (first..requests).step_by(callers) {
                caller.request("POST", CHAT, "", HELLO.as_bytes()).await;
                let reply = caller.reply().await;
                if reply.status != 200 {
                    failed += 1;
                    eprintln!("{}", reply.text());
                }
            }
            failed
        }));
    }
    let mut failed = 0;
    for task in tasks {
        failed += task.await.unwrap();
    }
    failed
}

/// The rest of a stream.
async fn rest(caller: &mut Caller) -> String {
    let mut all = Vec::new();
    loop {
        let chunk = soon("the rest of a stream", caller.chunk()).await.unwrap();
        if chunk.is_empty() {
            return String::from_utf8(all).unwrap();
        }
        all.extend(chunk);
    }
}

/// A replica that a test starts and stops. A stop is orderly: requests in flight are answered first.
struct Replica {
    port: u16,
    served: Arc<AtomicUsize>,
    up: watch::Sender<bool>,
    listener: Option<JoinHandle<()>>,
}

impl Replica {
    fn stopped() -> Self {
        let up = watch::Sender::new(false);
        Self { port: free_port(), served: Arc::default(), up, listener: None }
    }

    async fn start(&mut self) {
        self.up.send_replace(true);
        let listener = TcpListener::bind(("127.0.0.1", self.port)).await.unwrap();
        let (served, up) = (self.served.clone(), self.up.subscribe());
        self.listener = Some(tokio::spawn(async move {
            let mut stop = up.clone();
            let accept = |socket| drop(tokio::spawn(serve(socket, served.clone(), up.clone())));
            loop {
                tokio::select! {
                    Ok((socket, _)) = listener.accept() => accept(socket),
                    _ = stop.wait_for(|is_up| !is_up) => break,
                }
            }
            // The kernel would reset the connections that are not accepted yet, after their requests were sent.
            let listener = listener.into_std().unwrap();
            while let Ok((socket, _)) = listener.accept() {
                socket.set_nonblocking(true).unwrap();
                accept(TcpStream::from_std(socket).unwrap());
            }
        }));
    }

    async fn stop(&mut self) {
        self.up.send_replace(false);
        if let Some(listener) = self.listener.take() {
            listener.await.unwrap();
        }
    }

    fn served(&self) -> usize {
        self.served.load(Ordering::Relaxed)
    }
}

async fn serve(mut socket: TcpStream, served: Arc<AtomicUsize>, mut up: watch::Receiver<bool>) {
    socket.set_nodelay(true).unwrap();
    let answer = chat_answer(&usage(8, 2));
    let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{answer}", answer.len());
    let mut bytes = Vec::new();
    // A new connection has a request, which may be on its way.
    let mut is_idle = false;
    loop {
        tokio::select! {
            biased;
            read = socket.read_buf(&mut bytes) => {
                if !read.is_ok_and(|count| count > 0) {
                    return;
                }
            }
            _ = up.wait_for(|is_up| !is_up), if is_idle && bytes.is_empty() => return,
        }
        if bytes.ends_with(b"}]}") {
            bytes.clear();
            served.fetch_add(1, Ordering::Relaxed);
            tokio::time::sleep(Duration::from_millis(1)).await;
            if socket.write_all(answer.as_bytes()).await.is_err() {
                return;
            }
            is_idle = true;
        }
    }
}

#[tokio::test]
async fn streams_spread_over_replicas_stay_where_they_began_and_free_their_places_however_they_end() {
    let answer =
        || Answer::stream().event(&delta("a")).then(Step::Gate).events(&[delta("b"), DONE.to_owned()]).end();
    let upstreams = [
        Upstream::always(answer()).await,
        Upstream::always(answer()).await,
        Upstream::always(answer()).await,
    ];
    let gateway = gateway_of(&upstreams.each_ref(), "").await;
    let mut callers = Vec::new();
    for _ in 0..30 {
        let mut caller = gateway.caller().await;
        caller.request("POST", CHAT, "", hello(r#""stream":true"#).as_bytes()).await;
        caller.head().await;
        callers.push(caller);
    }
    let counts: Vec<usize> = upstreams.iter().map(|upstream| upstream.seen().len()).collect();
    assert!(counts.iter().all(|n| (7..=13).contains(n)), "{counts:?}");
    for (upstream, shown) in upstreams.iter().zip(replicas(&gateway).await) {
        let address = upstream.address.to_string();
        assert_eq!((&shown["address"], &shown["up"]), (&json!(address), &json!(true)));
        assert_eq!((&shown["in_flight"], &shown["healthy"]), (&json!(upstream.seen().len()), &Value::Null));
        let seen = upstream.seen();
        assert!(seen.iter().all(|request| request.header("host") == Some(&address)), "{address}");
    }
    // Ten callers disconnect; the other answers end.
    drop(callers.split_off(20));
    for upstream in &upstreams {
        (0..15).for_each(|_| upstream.open_gate());
    }
    for mut caller in callers {
        assert!(rest(&mut caller).await.ends_with(&format!("{}{DONE}", delta("b"))));
    }
    for index in 0..3 {
        wait_for(&gateway, index, "in_flight", json!(0)).await;
    }
    let seen: usize = upstreams.iter().map(|upstream| upstream.seen().len()).sum();
    assert_eq!(seen, 30);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_replica_gets_fewer_requests() {
    let slow = Upstream::answering(|_| {
        Answer::of([vec![Step::Wait(Duration::from_millis(200))], Answer::chat(8, 2).steps()].concat())
    })
    .await;
    let fast = Upstream::always(Answer::chat(8, 2)).await;
    let gateway = gateway_of(&[&slow, &fast], "").await;
    assert_eq!(send(&gateway, 8, 600).await, 0);
    let (slow, fast) = (slow.seen().len(), fast.seen().len());
    assert!((1..120).contains(&slow) && slow + fast == 600, "{slow} {fast}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_refuses_connections_loses_no_request_and_is_left_out() {
    let live = Upstream::always(Answer::chat(8, 2)).await;
    let dead = free_port();
    let gateway = Gateway::from_config(&config(&[url(dead), url(live.address.port())], "")).await;
    let started = Instant::now();
    assert_eq!(send(&gateway, 4, 400).await, 0);
    assert_eq!(live.seen().len(), 400);
    let shown = replicas(&gateway).await;
    let failures = shown[0]["failures"].as_u64().unwrap();
    // Each worker may find out at the same time; afterwards one request every 5 s tries it.
    let most = 4 + started.elapsed().as_secs() / 5;
    assert!((1..=most).contains(&failures), "{failures}");
    assert_eq!(
        (&shown[0]["up"], &shown[1]["up"], &shown[1]["failures"]),
        (&json!(false), &json!(true), &json!(0))
    );
    assert!(shown[0]["left_out_ms"].as_u64().unwrap() <= 10_000, "{}", shown[0]);
    let metrics = gateway.admin_get("/metrics").await;
    for line in [
        format!(r#"tollgate_replica_up{{upstream="backend",replica="127.0.0.1:{dead}"}} 0"#),
        format!(r#"tollgate_replica_up{{upstream="backend",replica="{}"}} 1"#, live.address),
        format!(
            r#"tollgate_replica_failures_total{{upstream="backend",replica="127.0.0.1:{dead}",reason="unreachable"}} {failures}"#
        ),
        format!(r#"tollgate_replica_in_flight{{upstream="backend",replica="{}"}} 0"#, live.address),
    ] {
        assert!(metrics.text().contains(&line), "{line}");
    }
    assert_eq!(gateway.settled_charges().await, [400, 3_200, 800, 4_000]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_request_is_lost_while_replicas_stop_and_start_under_load() {
    let (mut one, mut two) = (Replica::stopped(), Replica::stopped());
    one.start().await;
    let gateway = Gateway::from_config(&config(&[url(one.port), url(two.port)], "")).await;
    let load = send(&gateway, 6, 3_000);
    let flapping = async {
        loop {
            for pause in [150, 20, 80] {
                two.start().await;
                tokio::time::sleep(Duration::from_millis(pause)).await;
                one.stop().await;
                tokio::time::sleep(Duration::from_millis(pause)).await;
                one.start().await;
                tokio::time::sleep(Duration::from_millis(pause)).await;
                two.stop().await;
            }
        }
    };
    let failed = tokio::select! {
        failed = load => failed,
        () = flapping => 0,
    };
    assert_eq!(failed, 0);
    assert_eq!(gateway.settled_charges().await, [3_000, 24_000, 6_000, 30_000]);
    // A replica is left out for most of the time after it could not be reached.
    assert!(one.served() > 20 && two.served() > 20, "{} {}", one.served(), two.served());
}

#[tokio::test]
async fn if_all_replicas_are_down_the_caller_gets_a_502_at_once_and_the_first_that_starts_is_found() {
    let (mut one, two) = (Replica::stopped(), Replica::stopped());
    let gateway = Gateway::from_config(&config(&[url(two.port), url(one.port)], "")).await;
    for _ in 0..5 {
        let started = Instant::now();
        assert_eq!(gateway.chat(HELLO).await.refusal(), (502, "upstream_unreachable".into()));
        assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
    }
    let shown = replicas(&gateway).await;
    assert!(shown.iter().all(|replica| replica["up"] == false), "{shown:?}");
    one.start().await;
    assert_eq!(gateway.chat(HELLO).await.status, 200);
    assert_eq!((one.served(), &replicas(&gateway).await[1]["up"]), (1, &json!(true)));
    assert_eq!(gateway.settled_charges().await, [1, 8, 2, 10]);
}

#[tokio::test]
async fn a_request_tries_each_replica_once() {
    // The TLS handshake fails, after the connection was counted.
    let mut accepted = Vec::new();
    let mut urls = Vec::new();
    for _ in 0..3 {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        urls.push(format!("https://127.0.0.1:{}/v1", listener.local_addr().unwrap().port()));
        let count = Arc::new(AtomicUsize::new(0));
        accepted.push(count.clone());
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                count.fetch_add(1, Ordering::Relaxed);
                drop(socket);
            }
        });
    }
    let gateway = Gateway::from_config(&config(&urls, "")).await;
    for requests in 1..=4 {
        assert_eq!(gateway.chat(HELLO).await.refusal(), (502, "upstream_unreachable".into()));
        let counts: Vec<usize> = accepted.iter().map(|count| count.load(Ordering::Relaxed)).collect();
        assert_eq!(counts, [requests; 3]);
    }
}

/// A replica with a health check, which `is_healthy` decides.
async fn checked(is_healthy: &Arc<AtomicBool>) -> Upstream {
    let is_healthy = is_healthy.clone();
    Upstream::answering(move |seen| match seen.target() {
        "/health?full=1" if is_healthy.load(Ordering::Relaxed) => Answer::json(204, ""),
        "/health?full=1" => Answer::json(503, "loading"),
        _ => Answer::chat(8, 2),
    })
    .await
}

fn chats(upstream: &Upstream) -> usize {
    upstream.seen().iter().filter(|seen| seen.head.starts_with("POST")).count()
}

const HEALTH: &str =
    "api_key: sk-upstream, headers: { x-team: a }, health: { path: '/health?full=1', every: 100ms }";

#[tokio::test]
async fn a_replica_that_fails_its_health_check_gets_no_request_until_it_passes_one() {
    let healthy = [Arc::new(AtomicBool::new(true)), Arc::new(AtomicBool::new(true))];
    let [one, two] = [checked(&healthy[0]).await, checked(&healthy[1]).await];
    let gateway = gateway_of(&[&one, &two], HEALTH).await;
    healthy[0].store(false, Ordering::Relaxed);
    wait_for(&gateway, 0, "healthy", json!(false)).await;
    let before = chats(&one);
    for _ in 0..20 {
        assert_eq!(gateway.chat(HELLO).await.status, 200);
    }
    assert_eq!((chats(&one), chats(&two)), (before, 20));
    let shown = replicas(&gateway).await[0].clone();
    assert_eq!(
        (&shown["up"], &shown["left_out_ms"], &shown["failures"]),
        (&json!(false), &Value::Null, &json!(0))
    );
    assert!(shown["failed_checks"].as_u64().unwrap() >= 1);
    let metrics = gateway.admin_get("/metrics").await;
    let series = format!(r#"replica="{}",reason="health_check"}} 0"#, two.address);
    assert!(metrics.text().contains(&series), "{}", metrics.text());
    // A check is no request of a caller.
    let check = one.seen().into_iter().find(|seen| seen.target() == "/health?full=1").unwrap();
    assert_eq!((check.header("authorization"), check.header("x-team")), (None, Some("a")));
    assert_eq!(check.header("host"), Some(&*one.address.to_string()));
    assert!(check.header("user-agent").unwrap().starts_with("tollgate/"));
    // If all are unhealthy, requests go to those that can be reached.
    healthy[1].store(false, Ordering::Relaxed);
    wait_for(&gateway, 1, "healthy", json!(false)).await;
    for _ in 0..20 {
        assert_eq!(gateway.chat(HELLO).await.status, 200);
    }
    assert!(chats(&one) > 0 && chats(&two) > 20, "{} {}", chats(&one), chats(&two));
    healthy[0].store(true, Ordering::Relaxed);
    wait_for(&gateway, 0, "up", json!(true)).await;
    let before = chats(&two);
    for _ in 0..20 {
        assert_eq!(gateway.chat(HELLO).await.status, 200);
    }
    assert_eq!(chats(&two), before);
}

#[tokio::test]
async fn health_checks_reuse_a_connection_end_at_shutdown_and_spare_an_only_replica() {
    let healthy = Arc::new(AtomicBool::new(true));
    let only = checked(&healthy).await;
    let gateway = gateway_of(&[&only], HEALTH).await;
    soon("checks", async {
        while only.seen().len() < 5 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    assert_eq!(only.connections(), 1);
    healthy.store(false, Ordering::Relaxed);
    wait_for(&gateway, 0, "up", json!(false)).await;
    assert_eq!(gateway.chat(HELLO).await.status, 200, "an only replica is used all the same");
    gateway.shutdown().await;
    let seen = only.seen().len();
    tokio::time::sleep(Duration::from_millis(400)).await;
    assert_eq!(only.seen().len(), seen);
}

#[tokio::test]
async fn a_reload_adds_and_removes_replicas_while_streams_run() {
    let answer = |seen: &SeenRequest| {
        if seen.text().contains("\"stream\":true") {
            Answer::stream().event(&delta("a")).then(Step::Gate).events(&[delta("b"), DONE.to_owned()]).end()
        } else {
            Answer::chat(8, 2)
        }
    };
    let [one, two] = [Upstream::answering(answer).await, Upstream::answering(answer).await];
    let urls = [&one, &two].map(|upstream| url(upstream.address.port()));
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("t.yaml");
    std::fs::write(&file, config(&urls[..1], "")).unwrap();
    let gateway = Gateway::from_file(&file).await;
    let reload = async |urls: &[String]| {
        let next = file.with_extension("next");
        std::fs::write(&next, config(urls, "")).unwrap();
        std::fs::rename(&next, &file).unwrap();
        let admin = gateway.admin;
        let mut caller = Caller::connect(admin).await;
        let head = format!("POST /api/config/reload HTTP/1.1\r\nhost: {admin}\r\ncontent-length: 0\r\n\r\n");
        caller.send(head.as_bytes()).await;
        let reply = caller.reply().await;
        assert_eq!(reply.status, 200, "{}", reply.text());
    };
    let stream = async || {
        let mut caller = gateway.caller().await;
        caller.request("POST", CHAT, "", hello(r#""stream":true"#).as_bytes()).await;
        caller.head().await;
        caller
    };
    let mut first = stream().await;
    reload(&urls).await;
    let shown = replicas(&gateway).await;
    let in_flight = |shown: &[Value]| -> Vec<u64> {
        shown.iter().map(|replica| replica["in_flight"].as_u64().unwrap()).collect()
    };
    assert_eq!(in_flight(&shown), [1, 0], "the state of a replica stays");
    // The new one has fewer requests in flight.
    let mut second = stream().await;
    assert_eq!((one.seen().len(), two.seen().len()), (1, 1));
    reload(&urls[1..]).await;
    assert_eq!(in_flight(&replicas(&gateway).await), [1]);
    for _ in 0..10 {
        assert_eq!(gateway.chat(HELLO).await.status, 200);
    }
    assert_eq!((one.seen().len(), two.seen().len()), (1, 11));
    // The stream of the replica that was removed continues.
    for (upstream, caller) in [(&one, &mut first), (&two, &mut second)] {
        upstream.open_gate();
        assert!(rest(caller).await.ends_with(&format!("{}{DONE}", delta("b"))));
    }
    reload(&urls).await;
    wait_for(&gateway, 1, "in_flight", json!(0)).await;
    assert_eq!(in_flight(&replicas(&gateway).await), [0, 0]);
    gateway.settled().await;
}
