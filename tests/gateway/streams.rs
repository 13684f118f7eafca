//! Streams between a caller and an upstream that do not keep the same pace.

use crate::support::*;
use socket2::SockRef;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};

const ROOM: &str = "{ requests: { limit: 1000000, per: minute } }";

#[tokio::test]
async fn a_caller_that_hangs_up_ends_the_upstreams_call_within_a_tenth_of_a_second() {
    let mut took = Vec::new();
    for _ in 0..5 {
        let upstream = Upstream::always(Answer::stream().event(&delta("Hi")).then(Step::Gate).end()).await;
        let gateway = Gateway::before(&upstream, ROOM).await;
        let mut caller = gateway.caller().await;
        caller.request("POST", CHAT, "", hello(r#""stream":true"#).as_bytes()).await;
        caller.head().await;
        assert_eq!(caller.chunk().await.unwrap(), delta("Hi").into_bytes());
        let started = Instant::now();
        drop(caller);
        upstream.was_hung_up_on().await;
        took.push(started.elapsed());
    }
    took.sort();
    assert!(took[2] < Duration::from_millis(100), "{took:?}");
}

#[tokio::test]
async fn comments_that_keep_a_stream_alive_pass_at_once() {
    const PING: &str = ": keep-alive\n\n";
    let pings = (0..11).fold(Answer::stream(), |answer, _| answer.then(Step::Gate).event(PING));
    let upstream = Upstream::always(pings.then(Step::Gate).end()).await;
    let gateway = Gateway::before(&upstream, ROOM).await;
    for options in ["", r#","stream_options":{"include_usage":true}"#] {
        let mut caller = gateway.caller().await;
        caller.request("POST", CHAT, "", hello(&format!(r#""stream":true{options}"#)).as_bytes()).await;
        caller.head().await;
        let mut took = Vec::new();
        for _ in 0..11 {
            let started = Instant::now();
            upstream.open_gate();
            assert_eq!(caller.chunk().await.unwrap(), PING.as_bytes());
            took.push(started.elapsed());
        }
        upstream.open_gate();
        assert_eq!(caller.chunk().await, Some(vec![]));
        took.sort();
        assert!(took[5] < Duration::from_millis(5), "{took:?}");
    }
}

/// An upstream whose own socket keeps little, and that tells how much it could write before nothing more was
/// taken for so long.
async fn written_until_stuck(listener: TcpListener, patience: Duration) -> (usize, TcpStream) {
    let (mut socket, _) = listener.accept().await.unwrap();
    SockRef::from(&socket).set_send_buffer_size(SMALL).unwrap();
    let mut request = vec![0; 64 * 1024];
    assert!(socket.read(&mut request).await.unwrap() > 0);
    let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
    socket.write_all(head.as_bytes()).await.unwrap();
    let event = delta(&"x".repeat(1_000));
    let chunk = format!("{:x}\r\n{event}\r\n", event.len());
    let mut written = 0;
    loop {
        match tokio::time::timeout(patience, socket.write(&chunk.as_bytes()[written % chunk.len()..])).await {
            Ok(n) => written += n.unwrap(),
            Err(_) => return (written, socket),
        }
        assert!(written < ENDLESS, "the upstream is not held back");
    }
}

/// A socket's buffer.
const SMALL: usize = 16 * 1024;
/// What the gateway itself may keep of a stream.
const MOST: usize = 256 * 1024;
const ENDLESS: usize = 64 * 1024 * 1024;

#[tokio::test]
async fn a_caller_that_does_not_read_holds_the_upstream_back() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let writing = tokio::spawn(written_until_stuck(listener, Duration::from_secs(1)));
    let gateway = Gateway::from_config(&format!(
        "server: {{ listen: '127.0.0.1:0' }}\nadmin: {{ listen: '127.0.0.1:0' }}\nupstreams: {{ backend: {{ base_url: 'http://{address}' }} }}\n\
         environments: {{ staging: {{ upstream: backend }} }}\ndefault_environment: staging\nstore: {{ memory: true }}"
    ))
    .await;
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(u32::try_from(SMALL).unwrap()).unwrap();
    let mut caller = socket.connect(gateway.address).await.unwrap();
    let body = hello(r#""stream":true"#);
    let head = format!("POST {CHAT} HTTP/1.1\r\nhost: g\r\ncontent-length: {}\r\n\r\n", body.len());
    caller.write_all((head + &body).as_bytes()).await.unwrap();
    let (written, upstream) = soon("the upstream to be held back", writing).await.unwrap();
    let Ok(sockets) = std::fs::read_to_string("/proc/net/tcp") else { return };
    let in_sockets = queued(&sockets, [address.port(), gateway.address.port()]);
    let kept = written.saturating_sub(in_sockets);
    assert!(kept < MOST, "{kept} of {written} bytes are kept, {in_sockets} lie in the system's buffers");
    drop((caller, upstream));
}

/// Bytes in the system's buffers of all connections from or to these ports.
fn queued(sockets: &str, ports: [u16; 2]) -> usize {
    let number = |hex: &str| usize::from_str_radix(hex, 16).unwrap();
    let of_line = |line: &str| {
        let mut fields = line.split_whitespace().skip(1);
        let [local, remote, state, queues] = std::array::from_fn(|_| fields.next().unwrap());
        let port = |address: &str| number(address.rsplit(':').next().unwrap());
        let is_ours = ports.iter().any(|p| [port(local), port(remote)].contains(&usize::from(*p)));
        // Of what listens it is not bytes that are queued.
        if !is_ours || state == "0A" {
            return 0;
        }
        let (sent, received) = queues.split_once(':').unwrap();
        number(sent) + number(received)
    };
    sockets.lines().skip(1).map(of_line).sum()
}
