//! HTTP/2 towards callers: every feature works as over HTTP/1.1, and abuse is bounded.

use crate::support::http2::*;
use crate::support::*;
use std::time::{Duration, Instant};
use tokio::net::TcpStream;
use tollgate::app::CallerTimeouts;

const STAGING: &str = "  staging: { upstream: backend, reserve: { completion: max_tokens }, quotas: { requests: { limit: 100k, per: minute } } }\n  closed: { upstream: backend, keys: [{ name: a, secret: a-key-of-closed-1 }] }\ndefault_environment: staging";

fn short(millis: u64) -> CallerTimeouts {
    let timeout = Duration::from_millis(millis);
    CallerTimeouts { head: timeout, write: timeout, ..CallerTimeouts::default() }
}

async fn gateway(upstream: &Upstream) -> Gateway {
    Gateway::with(upstream, "", STAGING).await
}

#[tokio::test]
async fn answers_and_refusals_are_those_of_http1() {
    let upstream = Upstream::answering(|seen| {
        if seen.text().contains("\"stream\":true") {
            Answer::stream().event(&delta("Hi")).event(&usage_event(8, 2)).event(DONE).end()
        } else {
            Answer::chat(8, 2)
        }
    })
    .await;
    let gateway = gateway(&upstream).await;
    let mut caller = Http2Caller::connect(gateway.address).await;
    let large = hello(&format!(r#""user":"{}""#, "u".repeat(300_000)));
    let too_large = "x".repeat(1_200_000);
    let long = format!("x-long: {}\r\n", "v".repeat(70_000));
    let many = (0..120).fold(String::new(), |many, n| format!("{many}x-{n}: 1\r\n"));
    for (method, target, headers, body) in [
        ("POST", CHAT, "", HELLO),
        ("POST", "/closed/v1/chat/completions", "authorization: Bearer a-key-of-closed-1\r\n", HELLO),
        ("POST", CHAT, "", &*hello(r#""stream":true"#)),
        ("POST", CHAT, "", &large),
        ("HEAD", "/", "", ""),
        ("GET", "/v1/nothing", "", ""),
        ("GET", CHAT, "", ""),
        ("POST", "/closed/v1/chat/completions", "", HELLO),
        ("POST", CHAT, "authorization: Bearer a-key-of-closed-1\r\nauthorization: Bearer b\r\n", HELLO),
        ("POST", CHAT, "", "{"),
        ("POST", CHAT, "", &too_large),
        ("POST", CHAT, "content-encoding: gzip\r\n", HELLO),
        ("POST", CHAT, "host: other\r\nhost: another\r\n", HELLO),
        ("POST", CHAT, &many, HELLO),
        ("POST", CHAT, &long, HELLO),
        ("POST", CHAT, "content_length: 0\r\n", HELLO),
        ("POST", CHAT, "transfer_encoding: chunked\r\n", HELLO),
        ("POST", "/v1/messages", "", "{}"),
    ] {
        let first = gateway.send(method, target, headers, body).await;
        let second = caller.request(method, target, headers, body.as_bytes()).await;
        let what = format!("{method} {target} {headers} {body:.50}");
        assert_eq!(second.status, first.status, "{what}: {}", second.text());
        assert!(!second.is_incomplete, "{what}");
        if method != "HEAD" {
            assert_eq!(second.text(), first.text(), "{what}");
        }
        for name in [
            "x-tollgate-error",
            "x-tollgate-environment",
            "content-type",
            "x-tollgate-estimated-prompt-tokens",
        ] {
            assert_eq!(second.header(name), first.header(name), "{what}");
        }
        assert_eq!((second.header("connection"), second.header("transfer-encoding")), (None, None), "{what}");
    }
    // A body would be an error of the protocol.
    for (target, status) in [(CHAT, 405), ("/v1/nothing", 404)] {
        let reply = caller.request("HEAD", target, "", b"").await;
        assert_eq!((reply.status, reply.text(), reply.is_incomplete), (status, "", false), "{target}");
    }
    // The requests over HTTP/2 are charged too.
    assert_eq!(gateway.settled_charges().await[0], 2 * 3 + 2);
}

#[tokio::test]
async fn a_forwarded_head_request_is_answered() {
    let head = "HTTP/1.1 200 OK\r\ncontent-length: 17\r\n\r\n";
    let upstream = Upstream::always(Answer::of(vec![Step::Send(head.into())])).await;
    let environments = "  staging: { upstream: backend, other_paths: forward, quotas: { requests: { limit: 9, per: minute } } }\ndefault_environment: staging";
    let gateway = Gateway::with(&upstream, "", environments).await;
    let mut caller = Http2Caller::connect(gateway.address).await;
    let reply = caller.request("HEAD", "/v1/batches", "", b"").await;
    assert_eq!((reply.status, reply.header("content-length")), (200, Some("17")));
    gateway.settled().await;
    let metrics = gateway.admin_get("/metrics").await;
    let counted =
        r#"tollgate_requests_total{api="other",code="2xx",environment="staging",outcome="answered"} 1"#;
    assert!(metrics.text().contains(counted), "{}", metrics.text());
}

#[tokio::test]
async fn the_host_is_authority_and_a_differing_one_is_refused() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let gateway = gateway(&upstream).await;
    let mut raw = RawHttp2::connect(gateway.address, &[]).await;
    let body = HELLO.as_bytes();
    for (stream, (host, status)) in
        (1..).step_by(2).zip([(Some("gateway"), b"200"), (Some("other"), b"400"), (None, b"200")])
    {
        let mut fields = chat_fields();
        fields.extend(host.map(|host| ("host", host)));
        raw.send(&frame(HEADERS, 4, stream, &header_block(&fields))).await;
        raw.send(&frame(0, 1, stream, body)).await;
        let answer = raw.frame_of(&[HEADERS]).await.unwrap();
        assert_eq!(answer.stream, stream);
        let indexed = match answer.content[0] & 0x7f {
            8 => b"200",
            12 => b"400",
            _ => b"???",
        };
        assert_eq!(indexed, status, "{host:?} {:?}", answer.content);
    }
}

#[tokio::test]
async fn a_reset_cancels_the_upstream_at_once_and_leaves_the_connection_to_others() {
    let upstream = Upstream::answering(|seen| match seen.text() {
        text if text.contains("silence") => Answer::silence(),
        text if text.contains("stall") => Answer::stream().event(&delta("Hi")).then(Step::Stall),
        _ => Answer::chat(8, 2),
    })
    .await;
    let gateway = gateway(&upstream).await;
    let mut caller = Http2Caller::connect(gateway.address).await;
    let mut seen = 0;
    for act in ["silence", "stall"] {
        let mut fastest = Duration::MAX;
        for _ in 0..5 {
            let body = hello(&format!(r#""stream":true,"user":"{act}""#));
            let answer = caller.begin("POST", CHAT, "", body.as_bytes()).await;
            seen += 1;
            upstream.wait_until_seen(seen).await;
            if act == "stall" {
                drop(soon("the head", answer).await.unwrap());
            } else {
                drop(answer);
            }
            let began = Instant::now();
            upstream.wait_until_cut(seen).await;
            assert!(began.elapsed() < Duration::from_secs(2), "{act} {:?}", began.elapsed());
            fastest = fastest.min(began.elapsed());
        }
        // The fastest of some rounds, because other tests may use all cores.
        assert!(fastest < Duration::from_millis(100), "{act} {fastest:?}");
    }
    assert_eq!(caller.chat(HELLO).await.status, 200);
    assert_eq!(gateway.settled_charges().await[0], 11);
}

#[tokio::test]
async fn a_stream_that_breaks_ends_with_an_error_event_and_other_answers_are_reset() {
    let upstream = Upstream::answering(|seen| {
        if seen.text().contains("\"stream\":true") {
            Answer::stream().event(&delta("Hi")).then(Step::Cut)
        } else {
            Answer::of(vec![
            Step::Send(
                b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 900\r\n\r\n{\"id\""
                    .into(),
            ),
            Step::Cut,
        ])
        }
    })
    .await;
    let gateway = gateway(&upstream).await;
    let mut caller = Http2Caller::connect(gateway.address).await;
    let reply = caller.chat(&hello(r#""stream":true"#)).await;
    assert!(!reply.is_incomplete && reply.text().contains("upstream_disconnected"), "{}", reply.text());
    assert!(!reply.text().contains("[DONE]"));
    assert!(caller.chat(HELLO).await.is_incomplete);
}

#[tokio::test]
async fn a_stream_without_room_holds_the_upstream_back_and_is_cut_off_and_others_continue() {
    let events = vec![delta(&"x".repeat(64 * 1024)); 600];
    let upstream = Upstream::answering(move |seen| {
        if seen.text().contains("\"stream\":true") {
            Answer::stream().events(&events).then(Step::Stall)
        } else {
            Answer::chat(8, 2)
        }
    })
    .await;
    let gateway = Gateway::with_timeouts(&upstream, "", STAGING, short(500)).await;
    for window in [0, 1, 65_535] {
        let socket = TcpStream::connect(gateway.address).await.unwrap();
        let mut caller = Http2Caller::over(socket, window).await;
        let cut_before = upstream.cut();
        let answer = caller.begin("POST", CHAT, "", hello(r#""stream":true"#).as_bytes()).await;
        let answer = soon("the head", answer).await.unwrap();
        // It never reads.
        upstream.wait_until_cut(cut_before + 1).await;
        let (_, mut stream) = answer.into_parts();
        let ended = soon("the reset", async {
            loop {
                match stream.data().await {
                    Some(Ok(data)) => stream.flow_control().release_capacity(data.len()).unwrap(),
                    end => return end,
                }
            }
        })
        .await;
        assert!(matches!(ended, Some(Err(_))), "{ended:?}");
        if window > 0 {
            let next = caller.begin("POST", CHAT, "", HELLO.as_bytes()).await;
            assert_eq!(soon("the next answer", next).await.unwrap().status(), 200);
        }
    }
    gateway.settled().await;
}

#[tokio::test]
async fn a_slow_reader_receives_the_whole_answer() {
    let events = vec![delta(&"x".repeat(16 * 1024)); 100];
    let upstream = Upstream::always(Answer::stream().events(&events).end()).await;
    let gateway = Gateway::with_timeouts(&upstream, "", STAGING, short(500)).await;
    let mut caller = Http2Caller::connect(gateway.address).await;
    let answer = caller.begin("POST", CHAT, "", hello(r#""stream":true"#).as_bytes()).await;
    let (_, mut stream) = soon("the head", answer).await.unwrap().into_parts();
    let mut received = 0;
    while let Some(data) = stream.data().await {
        let data = data.unwrap();
        received += data.len();
        tokio::time::sleep(Duration::from_millis(8)).await;
        stream.flow_control().release_capacity(data.len()).unwrap();
    }
    assert!(received > 100 * 16 * 1024, "{received}");
}

#[tokio::test]
async fn a_shutdown_drains_by_goaway_and_ends_streams_with_an_event() {
    for on_disconnect in ["cancel", "drain"] {
        drain_by_goaway(on_disconnect).await;
    }
}

async fn drain_by_goaway(on_disconnect: &str) {
    let upstream = Upstream::answering(|seen| {
        if seen.text().contains("gate") {
            Answer::stream().event(&delta("Hi")).then(Step::Gate).event(DONE).end()
        } else {
            Answer::stream().event(&delta("Hi")).then(Step::Stall)
        }
    })
    .await;
    let config = format!(
        "server: {{ listen: '127.0.0.1:0', drain_timeout: 2s }}\nadmin: {{ listen: '127.0.0.1:0' }}\nupstreams: {{ backend: {{ base_url: 'http://{}/v1' }} }}\nenvironments:\n  e: {{ upstream: backend, on_disconnect: {on_disconnect} }}\ndefault_environment: e\nstore: {{ memory: true }}",
        upstream.address
    );
    let gateway = Gateway::from_config(&config).await;
    let mut caller = Http2Caller::connect(gateway.address).await;
    let mut heads = Vec::new();
    for user in ["gate", "stall"] {
        let body = hello(&format!(r#""stream":true,"user":"{user}""#));
        let answer = caller.begin("POST", CHAT, "", body.as_bytes()).await;
        heads.push(soon("the head", answer).await.unwrap());
    }
    let mut idle = Http2Caller::connect(gateway.address).await;
    assert_eq!(idle.request("HEAD", "/", "", b"").await.status, 200);
    let stopped = tokio::spawn(gateway.shutdown());
    // The idle connection ends at once, and the streams of the other one continue.
    soon("the idle connection to end", idle.connection).await.unwrap().unwrap();
    upstream.open_gate();
    let stalled = heads.pop().unwrap();
    let complete = whole(heads.pop().unwrap()).await;
    assert!(!complete.is_incomplete && complete.text().ends_with(DONE), "{}", complete.text());
    let cut = whole(stalled).await;
    assert!(!cut.is_incomplete && cut.text().contains("shutting_down"), "{}", cut.text());
    assert_eq!(stopped.await.unwrap().cut_off, 1);
    soon("the connection to end", caller.connection).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_connection_without_requests_ends_after_the_idle_timeout() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let gateway = Gateway::with_timeouts(&upstream, "", STAGING, short(300)).await;
    // The preface alone, and a connection whose requests have ended.
    for bytes in [
        &b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..],
        b"PRI * HT",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0",
    ] {
        let mut caller = gateway.caller().await;
        caller.send(bytes).await;
        soon("the end", async { while !caller.is_closed().await {} }).await;
    }
    let mut caller = Http2Caller::connect(gateway.address).await;
    assert_eq!(caller.chat(HELLO).await.status, 200);
    soon("the end", caller.connection).await.unwrap().unwrap();
    // A connection with a request in flight stays open.
    let upstream = Upstream::always(Answer::of(
        [vec![Step::Wait(Duration::from_millis(900))], Answer::chat(8, 2).steps()].concat(),
    ))
    .await;
    let gateway = Gateway::with_timeouts(&upstream, "", STAGING, short(300)).await;
    let mut caller = Http2Caller::connect(gateway.address).await;
    assert_eq!(caller.chat(HELLO).await.status, 200);
}

#[tokio::test]
async fn the_flood_guard_counts_requests_and_not_connections() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let gateway = Gateway::from_config(&format!(
        "server: {{ listen: '127.0.0.1:0', flood_guard: {{ requests: 2, per: hour }} }}\nadmin: {{ listen: '127.0.0.1:0' }}\nupstreams: {{ backend: {{ base_url: 'http://{}/v1' }} }}\nenvironments:\n{STAGING}\nstore: {{ memory: true }}",
        upstream.address
    ))
    .await;
    let mut caller = Http2Caller::connect(gateway.address).await;
    for status in [200, 200, 429, 429] {
        let reply = caller.chat(HELLO).await;
        assert_eq!(reply.status, status, "{}", reply.text());
    }
    assert_eq!(caller.chat(HELLO).await.refusal(), (429, "flood_guard".into()));
}

#[tokio::test]
async fn http2_can_be_turned_off() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let gateway = Gateway::from_config(&format!(
        "server: {{ listen: '127.0.0.1:0', http2: false }}\nadmin: {{ listen: '127.0.0.1:0' }}\nupstreams: {{ backend: {{ base_url: 'http://{}/v1' }} }}\nenvironments:\n{STAGING}\nstore: {{ memory: true }}",
        upstream.address
    ))
    .await;
    assert_eq!(gateway.chat(HELLO).await.status, 200);
    let mut caller = gateway.caller().await;
    caller.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await;
    assert_eq!(caller.reply().await.status, 400);
    assert!(caller.is_closed().await);
}

/// The requests of an abuse end: nothing is held, and others are served.
async fn check_health(gateway: &Gateway) {
    let mut healthy = Http2Caller::connect(gateway.address).await;
    assert_eq!(healthy.chat(HELLO).await.status, 200);
    assert_eq!(gateway.chat(HELLO).await.status, 200);
    gateway.settled().await;
}

#[tokio::test]
async fn rapid_resets_end_the_connection() {
    let upstream = Upstream::answering(|seen| match seen.text() {
        "" => Answer::silence(),
        _ => Answer::chat(8, 2),
    })
    .await;
    let gateway = gateway(&upstream).await;
    let mut raw = RawHttp2::connect(gateway.address, &[]).await;
    let block = header_block(&[
        (":method", "GET"),
        (":scheme", "http"),
        (":authority", "gateway"),
        (":path", "/v1/models"),
    ]);
    let mut sent = 0;
    for stream in (1..40_000).step_by(2) {
        let pair =
            [frame(HEADERS, WHOLE, stream, &block), frame(RST_STREAM, 0, stream, &[0, 0, 0, 8])].concat();
        if !raw.send(&pair).await {
            break;
        }
        sent += 1;
    }
    assert!(sent < 15_000, "{sent}");
    raw.end().await;
    check_health(&gateway).await;
}

#[tokio::test]
async fn floods_of_frames_that_request_nothing_end_the_connection() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let gateway = gateway(&upstream).await;
    for (what, one) in [
        ("pings", frame(6, 0, 0, &[7; 8])),
        ("settings", frame(4, 0, 0, &[])),
        ("priorities", frame(2, 0, 1, &[0, 0, 0, 0, 1])),
        ("unknown", frame(0xbe, 0, 0, b"?")),
    ] {
        let mut raw = RawHttp2::connect(gateway.address, &[]).await;
        let batch = one.repeat(100);
        let mut sent = 0;
        while sent < 5_000_000 && raw.send(&batch).await {
            sent += 100;
        }
        assert!(sent < 5_000_000, "{what}");
        raw.end().await;
    }
    check_health(&gateway).await;
}

#[tokio::test]
async fn endless_headers_end_the_connection() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let gateway = gateway(&upstream).await;
    for content in [vec![], header_block(&[("x-filler", &"f".repeat(1_000))])] {
        let mut raw = RawHttp2::connect(gateway.address, &[]).await;
        raw.send(&frame(HEADERS, 1, 1, &header_block(&chat_fields()))).await;
        let batch = frame(9, 0, 1, &content).repeat(50);
        let mut sent = 0;
        // The buffers of both sockets take many small frames before the gateway reads the first one.
        while sent < 5_000_000 && raw.send(&batch).await {
            sent += 50;
        }
        assert!(sent < 5_000_000, "{} bytes", content.len());
        raw.end().await;
    }
    check_health(&gateway).await;
}

#[tokio::test]
async fn headers_that_decode_to_too_much_are_not_decoded() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let gateway = gateway(&upstream).await;
    let mut raw = RawHttp2::connect(gateway.address, &[]).await;
    // One long value goes to the compression table. Each further byte repeats it.
    let mut block = header_block(&chat_fields());
    block.extend([0x40, 1, b'x', 0x7f, 0xa1, 0x1e]);
    block.extend(vec![b'v'; 127 + 0x21 + (0x1e << 7)]);
    block.extend(vec![0x80 | 0x3e; 4_000]);
    raw.send(&frame(HEADERS, WHOLE, 1, &block)).await;
    let answer = raw.frame_of(&[HEADERS, RST_STREAM, GOAWAY]).await.unwrap();
    // ENHANCE_YOUR_CALM: 16 MB of headers in 8 KB are no mistake.
    assert!(answer.kind == GOAWAY && answer.content[4..8] == [0, 0, 0, 11], "{answer:?}");
    raw.end().await;
    check_health(&gateway).await;
    assert_eq!(upstream.seen().len(), 2);
}

#[tokio::test]
async fn streams_beyond_the_bound_are_refused() {
    let upstream = Upstream::answering(|seen| match seen.text() {
        "" => Answer::silence(),
        _ => Answer::chat(8, 2),
    })
    .await;
    let gateway = gateway(&upstream).await;
    let mut raw = RawHttp2::connect(gateway.address, &[]).await;
    let block = header_block(&[
        (":method", "GET"),
        (":scheme", "http"),
        (":authority", "gateway"),
        (":path", "/v1/models"),
    ]);
    for n in 0..130 {
        raw.send(&frame(HEADERS, WHOLE, 2 * n + 1, &block)).await;
    }
    for _ in 0..30 {
        let reset = raw.frame_of(&[RST_STREAM, GOAWAY]).await.unwrap();
        // REFUSED_STREAM: the caller may retry.
        assert_eq!((reset.kind, &reset.content[..]), (RST_STREAM, &[0, 0, 0, 7][..]));
        assert!(reset.stream > 200);
    }
    upstream.wait_until_seen(100).await;
    drop(raw);
    check_health(&gateway).await;
    assert_eq!(upstream.seen().len(), 102);
}

#[tokio::test]
async fn malformed_requests_are_reset_and_never_forwarded() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let gateway = gateway(&upstream).await;
    let with = |name: &'static str, value: &'static str| {
        let mut fields = chat_fields();
        fields.push((name, value));
        fields
    };
    let without = |name: &str| {
        let mut fields = chat_fields();
        fields.retain(|field| field.0 != name);
        fields
    };
    let with_authority = |host: &'static str| {
        let mut fields = without(":authority");
        fields.insert(2, (":authority", host));
        fields
    };
    for fields in [
        with("connection", "close"),
        with("transfer-encoding", "chunked"),
        with("keep-alive", "timeout=5"),
        with("proxy-connection", "close"),
        with("upgrade", "websocket"),
        with("te", "gzip"),
        with("X-Upper", "1"),
        with(":unknown", "1"),
        with(":method", "GET"),
        with("content-length", "7"),
        with("content-length", "x"),
        without(":method"),
        without(":scheme"),
        without(":path"),
        with_authority("user:password@gateway"),
        with_authority("gateway:x"),
        [without(":authority"), vec![("host", "gateway/?")]].concat(),
        [without(":authority"), vec![("host", "a"), ("host", "a")]].concat(),
    ] {
        let mut raw = RawHttp2::connect(gateway.address, &[]).await;
        raw.send(&frame(HEADERS, 4, 1, &header_block(&fields))).await;
        raw.send(&frame(0, 1, 1, HELLO.as_bytes())).await;
        let answer = raw.frame_of(&[HEADERS, RST_STREAM, GOAWAY]).await.unwrap();
        // PROTOCOL_ERROR, or a refusal of the gateway.
        let is_reset = answer.kind == RST_STREAM && answer.content == [0, 0, 0, 1];
        let is_refusal = answer.kind == HEADERS && answer.content[0] & 0x7f == 12;
        assert!(is_reset || is_refusal || answer.kind == GOAWAY, "{fields:?} {answer:?}");
    }
    // Trailers and `te: trailers` are allowed.
    let mut caller = Http2Caller::connect(gateway.address).await;
    let reply = caller.request("POST", CHAT, "te: trailers\r\n", HELLO.as_bytes()).await;
    assert_eq!(reply.status, 200);
    assert_eq!(upstream.seen().len(), 1);
}
