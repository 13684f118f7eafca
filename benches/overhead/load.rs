//! The load generator: each connection sends its next request when it has received the complete answer.

use crate::Measured;
use crate::bodies::{EVENTS, KEY, request};
use crate::peers::Peer;
use memchr::memmem;
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Seconds of load before each measurement, in which connections are established and caches fill.
const WARM_UP: f64 = 0.4;

/// Runs the load generator in a separate process, and measures the CPU time of the peer during the run.
pub(crate) fn measure(
    peer: &Peer,
    address: SocketAddr,
    scenario: &str,
    connections: usize,
    seconds: f64,
) -> Measured {
    let load = |seconds: f64| {
        let arguments =
            [address.to_string(), scenario.to_owned(), connections.to_string(), seconds.to_string()];
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--role", "load"])
            .args(arguments)
            .stderr(Stdio::inherit())
            .output()
            .unwrap();
        assert!(output.status.success(), "{scenario} against {} failed", peer.name);
        serde_json::from_slice::<Value>(&output.stdout).unwrap()
    };
    load(WARM_UP);
    let before = peer.cpu();
    let result = load(seconds);
    let cpu = peer.cpu().saturating_sub(before);
    let figure = |name: &str| result[name].as_f64().unwrap();
    Measured {
        cpu_us: cpu.as_secs_f64() * 1e6 / figure("units"),
        per_second: figure("units") / figure("seconds"),
        p50_us: figure("p50_us"),
        p99_us: figure("p99_us"),
    }
}

/// The main function of the load generator's process. It prints one JSON line.
pub(crate) fn run(address: SocketAddr, scenario: &str, connections: usize, seconds: f64) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let body = request(scenario);
    let request = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: bench\r\nauthorization: Bearer {KEY}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    let is_stream = scenario.starts_with("stream");
    let started = Instant::now();
    let until = started + Duration::from_secs_f64(seconds);
    let mut latencies: Vec<u32> = runtime.block_on(async {
        let mut callers = tokio::task::JoinSet::new();
        for _ in 0..connections {
            callers.spawn(caller(address, request.clone(), is_stream, until));
        }
        callers.join_all().await.concat()
    });
    let seconds = started.elapsed().as_secs_f64();
    latencies.sort_unstable();
    let at = |share: f64| latencies[((latencies.len() - 1) as f64 * share) as usize];
    let units = latencies.len() * if is_stream { EVENTS + 2 } else { 1 };
    println!("{}", json!({"units": units, "seconds": seconds, "p50_us": at(0.5), "p99_us": at(0.99)}));
}

/// Sends requests on one connection until `until`. Returns the latency of each in microseconds.
async fn caller(address: SocketAddr, request: String, is_stream: bool, until: Instant) -> Vec<u32> {
    let mut socket = TcpStream::connect(address).await.unwrap();
    socket.set_nodelay(true).unwrap();
    let (mut buffer, mut latencies) = (Vec::with_capacity(64 * 1024), Vec::new());
    while Instant::now() < until || latencies.is_empty() {
        let started = Instant::now();
        socket.write_all(request.as_bytes()).await.unwrap();
        buffer.clear();
        while !is_whole(&buffer, is_stream) {
            assert!(socket.read_buf(&mut buffer).await.unwrap() > 0, "the connection was closed");
        }
        assert!(buffer.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&buffer));
        latencies.push(started.elapsed().as_micros() as u32);
    }
    latencies
}

fn is_whole(answer: &[u8], is_stream: bool) -> bool {
    if is_stream {
        return answer.ends_with(b"\r\n0\r\n\r\n");
    }
    let Some(head) = memmem::find(answer, b"\r\n\r\n") else { return false };
    let mut fields = [httparse::EMPTY_HEADER; 64];
    let mut response = httparse::Response::new(&mut fields);
    response.parse(answer).unwrap();
    let length = response.headers.iter().find(|h| h.name.eq_ignore_ascii_case("content-length"));
    match length {
        Some(h) => answer.len() >= head + 4 + std::str::from_utf8(h.value).unwrap().parse::<usize>().unwrap(),
        None => answer.ends_with(b"\r\n0\r\n\r\n"),
    }
}
