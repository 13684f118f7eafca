//! Shutdown: what callers receive whose requests do not end within `server.drain_timeout`, and what does not prolong it.

use crate::support::http2::Http2Caller;
use crate::support::{self, *};
use serde_json::Value;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tollgate::app::{App, ShutdownReport};

const GEMINI: &str = "/v1beta/models/gemini-2.5-flash:streamGenerateContent";
const GEMINI_BODY: &str = r#"{"contents":[{"parts":[{"text":"hello"}]}]}"#;

/// A gateway with an open environment `staging`, and this `drain_timeout`.
async fn gateway(upstream: &Upstream, drain_timeout: &str, settings: &str) -> Gateway {
    Gateway::from_config(&config(upstream, drain_timeout, settings, "memory: true")).await
}

fn config(upstream: &Upstream, drain_timeout: &str, settings: &str, store: &str) -> String {
    format!(
        "server: {{ listen: '127.0.0.1:0', drain_timeout: {drain_timeout} }}\nadmin: {{ listen: '127.0.0.1:0' }}\n\
         upstreams: {{ backend: {{ base_url: 'http://{}' }} }}\nenvironments: {{ staging: {{ upstream: backend, {settings} \
         quotas: {{ total_tokens: {{ limit: 1M, per: day }} }} }} }}\ndefault_environment: staging\nstore: {{ {store} }}\n",
        upstream.address
    )
}

fn begin_shutdown(app: App) -> tokio::task::JoinHandle<ShutdownReport> {
    tokio::task::spawn_blocking(move || app.shutdown())
}

/// Waits until the gateway refuses new requests.
async fn draining(admin: SocketAddr) {
    soon("the gateway to drain", async {
        while support::gateway::admin_get_at(admin, "/readyz").await.status != 503 {}
    })
    .await;
}

/// A caller whose request the gateway has begun to read. The body, of this length, is to be sent.
async fn expecting_caller(gateway: &Gateway, length: usize) -> Caller {
    let mut caller = gateway.caller().await;
    let head = format!(
        "POST {CHAT} HTTP/1.1\r\nhost: g\r\nexpect: 100-continue\r\ncontent-length: {length}\r\n\r\n"
    );
    caller.send(head.as_bytes()).await;
    assert_eq!(caller.head().await, "HTTP/1.1 100 Continue");
    caller
}

/// All chunks up to the end of the answer, which must be complete.
async fn rest(caller: &mut Caller) -> String {
    let mut all = Vec::new();
    loop {
        match caller.chunk().await {
            Some(chunk) if chunk.is_empty() => return String::from_utf8(all).unwrap(),
            Some(chunk) => all.extend(chunk),
            None => panic!("the answer broke off after {}", String::from_utf8_lossy(&all)),
        }
    }
}

fn data(event: &str) -> Value {
    let data = event.lines().find_map(|line| line.strip_prefix("data: ")).unwrap();
    serde_json::from_str(data).unwrap()
}

#[tokio::test]
async fn a_stream_ends_with_an_error_event_after_the_drain_timeout() {
    let anthropic = "event: content_block_delta\ndata: {\"type\":\"content_block_delta\",\"index\":0,\"delta\":{\"type\":\"text_delta\",\"text\":\"Hi\"}}\n\n";
    let responses = "event: response.output_text.delta\ndata: {\"type\":\"response.output_text.delta\",\"delta\":\"Hi\",\"sequence_number\":4}\n\n";
    let gemini = "data: {\"candidates\":[{\"content\":{\"parts\":[{\"text\":\"Hi\"}]}}]}\n\n";
    let chat = delta("Hi");
    let gemini_path = format!("{GEMINI}?alt=sse");
    let stream = r#""stream":true"#;
    let messages = r#"{"stream":true,"model":"claude-sonnet-4","max_tokens":9,"messages":[{"role":"user","content":"hello"}]}"#;
    for (path, body, event, name, code) in [
        (CHAT, hello(stream), chat.as_str(), "", "/error/code=shutting_down"),
        (CHAT, hello(stream), ": ping\n", "", "/error/code=shutting_down"),
        // The beginning of the next event is dropped, or ended by a blank line if it has passed.
        (CHAT, hello(stream), "data: {\"id\"", "", "/error/code=shutting_down"),
        (CHAT, hello(stream), "data: {\"choices\":[{", "\n\n", "/error/code=shutting_down"),
        (
            "/v1/completions",
            r#"{"stream":true,"model":"m","prompt":"hello"}"#.into(),
            chat.as_str(),
            "",
            "/error/code=shutting_down",
        ),
        (
            "/v1/responses",
            r#"{"stream":true,"model":"gpt-4o","input":"hello"}"#.into(),
            responses,
            "event: error\n",
            "/code=shutting_down",
        ),
        ("/v1/messages", messages.into(), anthropic, "event: error\n", "/error/type=overloaded_error"),
        (&gemini_path, GEMINI_BODY.into(), gemini, "", "/error/status=UNAVAILABLE"),
    ] {
        for settings in ["", "on_disconnect: drain,"] {
            let upstream =
                Upstream::always(Answer::stream().event(&delta("A")).event(event).then(Step::Stall)).await;
            let mut gateway = gateway(&upstream, "300ms", settings).await;
            let mut caller = gateway.caller().await;
            caller.request("POST", path, "", body.as_bytes()).await;
            caller.head().await;
            assert!(caller.chunk().await.is_some());
            let shutdown = begin_shutdown(gateway.take());
            let text = rest(&mut caller).await;
            assert!(caller.is_closed().await);
            let passed = text.strip_prefix(event).unwrap_or(&text);
            assert!(
                passed.starts_with(name) && text.ends_with("}\n\n") && !text.contains("[DONE]"),
                "{path}: {text}"
            );
            let (pointer, value) = code.split_once('=').unwrap();
            assert_eq!(
                data(&text[text.rfind("data: ").unwrap()..]).pointer(pointer).unwrap(),
                value,
                "{text}"
            );
            let report = shutdown.await.unwrap();
            assert_eq!((report.in_flight, report.cut_off), (1, 1));
            assert!(report.took < Duration::from_secs(5), "{:?}", report.took);
        }
    }
}

#[tokio::test]
async fn a_gemini_list_ends_with_an_error_element() {
    let chunk = r#"{"candidates":[{"content":{"parts":[{"text":"Hi"}]}}]}"#;
    let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n";
    for (begin, elements) in [
        ("[".to_owned(), 1),
        (format!("[{chunk}"), 2),
        (format!("[{chunk}\r\n,\r\n{chunk},"), 3),
        (format!("[{chunk}\r\n,\r\n{chunk}\r\n"), 3),
    ] {
        for ending in [Step::Stall, Step::Cut] {
            let is_cut = matches!(ending, Step::Cut);
            let answer =
                Answer::of(vec![Step::Send(head.into())]).event(&begin).then(Step::Gate).then(ending);
            let upstream = Upstream::always(answer).await;
            let mut gateway = gateway(&upstream, "200ms", "").await;
            let mut caller = gateway.caller().await;
            caller.request("POST", GEMINI, "", GEMINI_BODY.as_bytes()).await;
            caller.head().await;
            let mut text = String::from_utf8(caller.chunk().await.unwrap()).unwrap();
            upstream.open_gate();
            let shutdown = (!is_cut).then(|| begin_shutdown(gateway.take()));
            text += &rest(&mut caller).await;
            let list: Vec<Value> = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"));
            assert_eq!(list.len(), elements, "{text}");
            let reason = if is_cut { "UPSTREAM_DISCONNECTED" } else { "SHUTTING_DOWN" };
            assert_eq!(list[elements - 1]["error"]["details"][0]["reason"], reason);
            if let Some(shutdown) = shutdown {
                shutdown.await.unwrap();
            }
        }
    }
}

#[tokio::test]
async fn an_answer_that_is_no_stream_is_aborted_after_the_drain_timeout() {
    let json = "content-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n5\r\n{\"id\"\r\n";
    // An element that has begun cannot be ended.
    let list = "content-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n5\r\n[{\"a\"\r\n";
    let fixed = "content-type: application/json\r\ncontent-length: 50\r\n\r\n{\"id\"";
    for (path, body, answer) in [(CHAT, HELLO, json), (GEMINI, GEMINI_BODY, list), (CHAT, HELLO, fixed)] {
        let head = format!("HTTP/1.1 200 OK\r\n{answer}");
        let upstream = Upstream::always(Answer::of(vec![Step::Send(head.into()), Step::Stall])).await;
        let mut gateway = gateway(&upstream, "200ms", "").await;
        let mut caller = gateway.caller().await;
        caller.request("POST", path, "", body.as_bytes()).await;
        upstream.wait_until_seen(1).await;
        let shutdown = begin_shutdown(gateway.take());
        assert!(caller.reply().await.is_incomplete, "{answer}");
        shutdown.await.unwrap();
    }
}

#[tokio::test]
async fn a_request_without_an_answer_gets_a_503_after_the_drain_timeout() {
    for settings in ["", "on_disconnect: drain,"] {
        let upstream = Upstream::always(Answer::silence()).await;
        let folder = tempfile::tempdir().unwrap();
        let config = config(
            &upstream,
            "200ms",
            settings,
            &format!("path: '{}'", folder.path().join("t.db").display()),
        );
        let mut gateway = Gateway::from_config(&config).await;
        let mut caller = gateway.caller().await;
        caller.request("POST", CHAT, "", HELLO.as_bytes()).await;
        upstream.wait_until_seen(1).await;
        let shutdown = begin_shutdown(gateway.take());
        let reply = caller.reply().await;
        assert_eq!(reply.refusal(), (503, "shutting_down".into()));
        assert_eq!((reply.header("retry-after"), reply.header("connection")), (Some("1"), Some("close")));
        assert_eq!(shutdown.await.unwrap().cut_off, 1);
        // The upstream may have read the prompt.
        let again = Gateway::from_config(&config).await;
        assert_eq!(again.charged().await, [1, HELLO_TOKENS, 0, HELLO_TOKENS]);
    }
}

#[tokio::test]
async fn a_request_that_waits_for_room_gets_a_503_after_the_drain_timeout() {
    let upstream = Upstream::always(Answer::silence()).await;
    let text = config(&upstream, "200ms", "max_in_flight: 1, reserve: { max_wait: 60s },", "memory: true");
    let mut gateway = Gateway::from_config(&text).await;
    let mut first = gateway.caller().await;
    first.request("POST", CHAT, "", HELLO.as_bytes()).await;
    upstream.wait_until_seen(1).await;
    let mut second = expecting_caller(&gateway, HELLO.len()).await;
    second.send(HELLO.as_bytes()).await;
    let shutdown = begin_shutdown(gateway.take());
    for caller in [&mut first, &mut second] {
        assert_eq!(caller.reply().await.refusal(), (503, "shutting_down".into()));
    }
    shutdown.await.unwrap();
    assert_eq!(upstream.seen().len(), 1);
}

#[tokio::test]
async fn incomplete_requests_and_idle_connections_do_not_prolong_a_shutdown() {
    let events = [delta("Hi"), DONE.to_owned()];
    let upstream =
        Upstream::always(Answer::stream().event(&events[0]).then(Step::Gate).event(&events[1]).end()).await;
    for has_stream in [false, true] {
        let mut gateway = gateway(&upstream, "30s", "").await;
        let mut stream = gateway.caller().await;
        if has_stream {
            stream.request("POST", CHAT, "", hello(r#""stream":true"#).as_bytes()).await;
            stream.head().await;
            stream.chunk().await.unwrap();
        }
        let mut idle = gateway.caller().await;
        idle.request("GET", "/nothing", "", b"").await;
        idle.reply().await;
        let silent = gateway.caller().await;
        let mut half_head = gateway.caller().await;
        half_head.send(b"POST /v1/chat/completions HTTP/1.1\r\nhost: g\r\n").await;
        let mut half_body = expecting_caller(&gateway, 100).await;
        half_body.send(b"{").await;
        let mut without_body = expecting_caller(&gateway, 100).await;
        let mut half_admin = Caller::connect(gateway.admin).await;
        half_admin.send(b"GET /metrics HTTP/1.1\r\n").await;
        let admin = gateway.admin;
        let shutdown = begin_shutdown(gateway.take());
        for caller in [&mut half_body, &mut without_body] {
            assert_eq!(caller.reply().await.refusal(), (503, "shutting_down".into()));
        }
        assert!(idle.is_closed().await && half_head.is_closed().await);
        if has_stream {
            draining(admin).await;
            upstream.open_gate();
            assert_eq!(rest(&mut stream).await, events[1]);
        }
        let ended = Instant::now();
        let report = shutdown.await.unwrap();
        assert_eq!((report.in_flight, report.cut_off), (u64::from(has_stream), 0));
        let took = if has_stream { ended.elapsed() } else { report.took };
        // A busy machine is slow, but without a bound the half-sent head takes 10 s and the body 30 s.
        assert!(took < Duration::from_secs(4), "{took:?}");
        drop(silent);
    }
}

/// Whether the gateway at this address has accepted the connection from this port. The kernel gives a connection an inode
/// when a process accepts it.
fn is_accepted(gateway: SocketAddr, caller_port: u16) -> bool {
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
    let of_port = |address: &str, port: u16| address.ends_with(&format!(":{port:04X}"));
    table.lines().skip(1).any(|line| {
        let fields: Vec<_> = line.split_whitespace().collect();
        of_port(fields[1], gateway.port()) && of_port(fields[2], caller_port) && fields[9] != "0"
    })
}

/// Sends a request on a connection that the gateway has accepted. Returns the status and the text of the answer.
async fn late_answer(mut socket: tokio::net::TcpStream, is_http2: bool) -> std::io::Result<(u16, String)> {
    if is_http2 {
        let mut caller = Http2Caller::over(socket, 65_535).await;
        let reply = caller.request("GET", "/nothing", "", b"").await;
        return Ok((reply.status, reply.text().to_owned()));
    }
    socket.write_all(b"GET /nothing HTTP/1.1\r\nhost: g\r\n\r\n").await?;
    let mut answer = String::new();
    soon("the answer", socket.read_to_string(&mut answer)).await?;
    assert!(answer.contains("connection: close"), "{answer}");
    Ok((answer[9..12].parse().unwrap(), answer))
}

/// A caller that has just connected may have sent its request, and cannot know that the gateway shuts down.
#[tokio::test]
async fn a_caller_that_has_just_connected_is_answered_during_a_shutdown() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    // The gateway detects the protocol by the first bytes only where it has the choice.
    for (allows_http2, is_http2) in [(false, false), (true, false), (true, true)] {
        let settings = format!("drain_timeout: 5s, http2: {allows_http2}");
        let text = config(&upstream, "5s", "", "memory: true").replace("drain_timeout: 5s", &settings);
        let mut complete_rounds = 0;
        for _ in 0..60 {
            let mut gateway = Gateway::from_config(&text).await;
            let connected = Instant::now();
            let socket = tokio::net::TcpStream::connect(gateway.address).await.unwrap();
            let port = socket.local_addr().unwrap().port();
            soon("the gateway to accept", async {
                while !is_accepted(gateway.address, port) {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            })
            .await;
            let shutdown = begin_shutdown(gateway.take());
            // All workers drain when a connection is refused.
            soon("the listener to close", async {
                while tokio::net::TcpStream::connect(gateway.address).await.is_ok() {}
            })
            .await;
            let was_slow = connected.elapsed() > Duration::from_millis(300);
            if !was_slow {
                let (status, text) = late_answer(socket, is_http2).await.unwrap();
                assert_eq!(status, 503, "{text}");
                assert!(text.contains("shutting_down"), "{text}");
                complete_rounds += 1;
            }
            shutdown.await.unwrap();
            if complete_rounds == 3 {
                break;
            }
        }
        assert_eq!(complete_rounds, 3, "the machine is too slow for this test");
    }
}

#[tokio::test]
async fn a_caller_that_does_not_read_prolongs_a_shutdown_by_a_second_at_most() {
    // More than the buffers of all sockets hold.
    let events = vec![delta(&"x".repeat(64 * 1024)); 600];
    let upstream = Upstream::always(Answer::stream().events(&events).then(Step::Stall)).await;
    let mut gateway = gateway(&upstream, "300ms", "").await;
    let mut caller = gateway.caller().await;
    caller.request("POST", CHAT, "", hello(r#""stream":true"#).as_bytes()).await;
    caller.head().await;
    let report = begin_shutdown(gateway.take()).await.unwrap();
    assert_eq!((report.in_flight, report.cut_off), (1, 1));
    // On a busy machine. Without a bound it takes the write timeout of a minute.
    assert!(report.took < Duration::from_secs(5), "{:?}", report.took);
    drop(caller);
}

#[tokio::test]
async fn a_request_that_is_completed_in_time_is_answered_during_a_shutdown() {
    let answer = [vec![Step::Gate], Answer::chat(8, 2).steps()].concat();
    let upstream = Upstream::always(Answer::of(answer)).await;
    let mut gateway = gateway(&upstream, "30s", "").await;
    let mut caller = expecting_caller(&gateway, HELLO.len()).await;
    let (begin, end) = HELLO.split_at(20);
    caller.send(begin.as_bytes()).await;
    let admin = gateway.admin;
    let shutdown = begin_shutdown(gateway.take());
    caller.send(end.as_bytes()).await;
    draining(admin).await;
    upstream.open_gate();
    assert_eq!(caller.reply().await.status, 200);
    assert!(caller.is_closed().await);
    assert_eq!(shutdown.await.unwrap().cut_off, 0);
}

/// A gateway in a process of its own, whose ports are known before it listens.
struct Starting {
    child: Child,
    admin: SocketAddr,
    _folder: tempfile::TempDir,
}

impl Starting {
    fn new() -> Self {
        let [listen, admin] =
            [(); 2].map(|()| SocketAddr::from((Ipv4Addr::LOCALHOST, support::port::free_port())));
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("t.yaml");
        let text = format!(
            "server: {{ listen: '{listen}' }}\nadmin: {{ listen: '{admin}' }}\nupstreams: {{ u: {{ base_url: 'http://127.0.0.1:9' }} }}\n\
             environments: {{ e: {{ upstream: u }} }}\nstore: {{ memory: true }}\n"
        );
        std::fs::write(&file, text).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_tollgate"));
        command.args(["serve", "--config", file.to_str().unwrap()]).stderr(Stdio::null());
        Self { child: command.spawn().unwrap(), admin, _folder: folder }
    }

    /// Sends a signal and returns the exit code. `None`: the signal killed the process.
    fn stop(&mut self, signal: &str) -> Option<i32> {
        let status = Command::new("kill").args([signal, &self.child.id().to_string()]).status().unwrap();
        assert!(status.success());
        self.child.wait().unwrap().code()
    }
}

impl Drop for Starting {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_signal_right_after_the_start_drains_the_gateway() {
    for round in 0..16 {
        let mut starting = Starting::new();
        let admin = starting.admin;
        // The kernel accepts connections from the moment at which the gateway listens.
        let listens = async {
            while TcpStream::connect(admin).is_err() {
                tokio::task::yield_now().await;
            }
        };
        soon("the gateway to listen", listens).await;
        if round % 2 == 0 {
            soon("the gateway to be ready", async {
                while support::gateway::admin_get_at(admin, "/readyz").await.status != 200 {}
            })
            .await;
        }
        let signal = if round % 4 < 2 { "-TERM" } else { "-INT" };
        let code = tokio::task::spawn_blocking(move || starting.stop(signal)).await.unwrap();
        assert_eq!(code, Some(0), "round {round}, {signal}");
    }
}
