//! Cancellation, keep-alive comments and back-pressure of streams.

use crate::support::*;
use socket2::SockRef;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};

const LARGE_QUOTAS: &str = "{ requests: { limit: 1000000, per: minute } }";

#[tokio::test]
async fn a_disconnect_cancels_the_upstream_call_within_100_ms() {
    let mut took = Vec::new();
    for _ in 0..5 {
        let upstream = Upstream::always(Answer::stream().event(&delta("Hi")).then(Step::Gate).end()).await;
        let gateway = Gateway::in_front_of(&upstream, LARGE_QUOTAS).await;
        let mut caller = gateway.caller().await;
        caller.request("POST", CHAT, "", hello(r#""stream":true"#).as_bytes()).await;
        caller.head().await;
        assert_eq!(caller.chunk().await.unwrap(), delta("Hi").into_bytes());
        let started = Instant::now();
        drop(caller);
        upstream.wait_until_disconnected().await;
        took.push(started.elapsed());
    }
    took.sort();
    assert!(took[2] < Duration::from_millis(100), "{took:?}");
}

#[tokio::test]
async fn keep_alive_comments_pass_without_delay() {
    const PING: &str = ": keep-alive\n\n";
    let pings = (0..11).fold(Answer::stream(), |answer, _| answer.then(Step::Gate).event(PING));
    let upstream = Upstream::always(pings.then(Step::Gate).end()).await;
    let gateway = Gateway::in_front_of(&upstream, LARGE_QUOTAS).await;
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

#[tokio::test]
async fn odd_bytes_of_a_stream_pass_unchanged_and_its_usage_is_read() {
    let usage = usage_event(8, 2);
    for (what, stream) in [
        (
            "a byte order mark",
            [b"\xef\xbb\xbf", delta("Hi").as_bytes(), usage.as_bytes(), DONE.as_bytes()].concat(),
        ),
        ("CR", (delta("Hi") + &usage + DONE).replace('\n', "\r").into_bytes()),
        ("CR LF", (delta("Hi") + &usage + DONE).replace('\n', "\r\n").into_bytes()),
        (
            "NUL",
            [
                b": \0\0\n\nid: a\0b\n",
                delta("Hi").as_bytes(),
                b"\0: x\n\n",
                usage.as_bytes(),
                DONE.as_bytes(),
            ]
            .concat(),
        ),
        (
            "invalid UTF-8",
            [
                b": \xff\xfe\n\ndata: \xc3\x28\n\n\xf0\x9f: \x80\n",
                delta("Hi").as_bytes(),
                usage.as_bytes(),
                DONE.as_bytes(),
            ]
            .concat(),
        ),
    ] {
        for step in [1, 7, stream.len()] {
            let head =
                "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
            let mut steps = vec![Step::Send(head.into())];
            for piece in stream.chunks(step) {
                let size = format!("{:x}\r\n", piece.len());
                steps.push(Step::Send([size.as_bytes(), piece, b"\r\n"].concat()));
            }
            let upstream = Upstream::always(Answer::of(steps).end()).await;
            let quotas =
                "{ requests: { limit: 100, per: minute }, total_tokens: { limit: 1M, per: minute } }";
            let gateway = Gateway::in_front_of(&upstream, quotas).await;
            let body = hello(r#""stream":true,"stream_options":{"include_usage":true}"#);
            let reply = gateway.chat(&body).await;
            assert!(!reply.is_incomplete && reply.body == stream, "{what} in steps of {step}");
            assert_eq!(gateway.settled_charges().await, [1, 8, 2, 10], "{what} in steps of {step}");
        }
    }
}

/// An upstream that streams without end. Returns the bytes written until a write made no progress for `stall`.
async fn write_until_stalled(listener: TcpListener, stall: Duration) -> (usize, TcpStream) {
    let (mut socket, _) = listener.accept().await.unwrap();
    SockRef::from(&socket).set_send_buffer_size(SOCKET_BUFFER).unwrap();
    let mut request = vec![0; 64 * 1024];
    assert!(socket.read(&mut request).await.unwrap() > 0);
    let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
    socket.write_all(head.as_bytes()).await.unwrap();
    let event = delta(&"x".repeat(1_000));
    let chunk = format!("{:x}\r\n{event}\r\n", event.len());
    let mut written = 0;
    loop {
        match tokio::time::timeout(stall, socket.write(&chunk.as_bytes()[written % chunk.len()..])).await {
            Ok(n) => written += n.unwrap(),
            Err(_) => return (written, socket),
        }
        assert!(written < ENDLESS, "there is no back-pressure");
    }
}

/// The buffer size of the sockets at both ends.
const SOCKET_BUFFER: usize = 16 * 1024;
/// At most this much of a stream may be buffered in the gateway.
const MAX_BUFFERED: usize = 256 * 1024;
/// If the upstream can write this much, there is no back-pressure.
const ENDLESS: usize = 64 * 1024 * 1024;

#[tokio::test]
async fn a_caller_that_does_not_read_causes_back_pressure_at_the_upstream() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let writing = tokio::spawn(write_until_stalled(listener, Duration::from_secs(1)));
    let gateway = Gateway::from_config(&format!(
        "server: {{ listen: '127.0.0.1:0' }}\nadmin: {{ listen: '127.0.0.1:0' }}\nupstreams: {{ backend: {{ base_url: 'http://{address}' }} }}\n\
         environments: {{ staging: {{ upstream: backend }} }}\ndefault_environment: staging\nstore: {{ memory: true }}"
    ))
    .await;
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(u32::try_from(SOCKET_BUFFER).unwrap()).unwrap();
    let mut caller = socket.connect(gateway.address).await.unwrap();
    let body = hello(r#""stream":true"#);
    let head = format!("POST {CHAT} HTTP/1.1\r\nhost: g\r\ncontent-length: {}\r\n\r\n", body.len());
    caller.write_all((head + &body).as_bytes()).await.unwrap();
    let (written, upstream) = soon("back-pressure at the upstream", writing).await.unwrap();
    let Ok(sockets) = std::fs::read_to_string("/proc/net/tcp") else { return };
    let in_sockets = queued(&sockets, [address.port(), gateway.address.port()]);
    let buffered = written.saturating_sub(in_sockets);
    assert!(
        buffered < MAX_BUFFERED,
        "the gateway buffers {buffered} of {written} bytes; socket buffers hold {in_sockets}"
    );
    drop((caller, upstream));
}

/// The bytes in the kernel's socket buffers of all connections from or to these ports.
fn queued(sockets: &str, ports: [u16; 2]) -> usize {
    let number = |hex: &str| usize::from_str_radix(hex, 16).unwrap();
    let of_line = |line: &str| {
        let mut fields = line.split_whitespace().skip(1);
        let [local, remote, state, queues] = std::array::from_fn(|_| fields.next().unwrap());
        let port = |address: &str| number(address.rsplit(':').next().unwrap());
        let is_ours = ports.iter().any(|p| [port(local), port(remote)].contains(&usize::from(*p)));
        // The queues of a listening socket count connections, not bytes.
        if !is_ours || state == "0A" {
            return 0;
        }
        let (sent, received) = queues.split_once(':').unwrap();
        number(sent) + number(received)
    };
    sockets.lines().skip(1).map(of_line).sum()
}
