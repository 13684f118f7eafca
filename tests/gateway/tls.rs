//! TLS to upstreams, HTTP/2 where it is offered, retries over HTTP/2, and no proxy from the environment variables.

pub(crate) mod server;
pub(crate) mod upstream;

use crate::support::*;
use server::{Certificate, Server};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

/// A gateway with this server as its upstream. It trusts the server's certificate if `is_trusting`, else no certificate.
async fn gateway(server: &Server, is_trusting: bool, timeouts: &str) -> Process {
    gateway_in_front_of(server.port, is_trusting.then_some(&server.certificate), timeouts).await
}

async fn gateway_in_front_of(port: u16, trusted: Option<&Certificate>, timeouts: &str) -> Process {
    let sections = format!(
        "upstreams: {{ u: {{ base_url: 'https://localhost:{port}/v1', api_key: sk-upstream, timeouts: {{ {timeouts} }} }} }}\n\
         environments: {{ e: {{ upstream: u }} }}\ndefault_environment: e"
    );
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(&file, trusted.map_or("", |certificate| &certificate.pem)).unwrap();
    let variable = [("SSL_CERT_FILE", file.path().to_str().unwrap())];
    Process::start(&sections, if trusted.is_some() { &variable } else { &[] }).await
}

/// A request for a stream whose `user` field selects what the server does (`server::ACTS`).
fn stream_with(act: &str) -> String {
    hello(&format!(r#""stream":true,"user":"{act}""#))
}

#[tokio::test]
async fn answers_arrive_over_tls_with_http1_and_http2() {
    for protocol in [&b"http/1.1"[..], b"h2"] {
        let server = Server::start(protocol).await;
        for (is_trusting, status) in [(true, 200), (false, 502)] {
            let gateway = gateway(&server, is_trusting, "").await;
            for _ in 0..3 {
                let reply = gateway.chat(&hello(r#""stream":true"#)).await;
                assert_eq!(reply.status, status, "{protocol:?} {}", reply.text());
                if is_trusting {
                    assert_eq!(reply.text(), format!("{}{}", delta("Hi"), DONE));
                    let version = if protocol == b"h2" { "HTTP/2.0" } else { "HTTP/1.1" };
                    assert_eq!(reply.header("x-protocol"), Some(version));
                }
            }
            let charges = if is_trusting { [3, 3 * 8, 3, 3 * 9] } else { [0, 0, 0, 0] };
            assert_eq!(gateway.settled_charges().await, charges);
        }
    }
}

#[tokio::test]
async fn a_disconnect_cancels_its_stream_and_leaves_the_connection_to_others() {
    let server = Server::start(b"h2").await;
    let gateway = gateway(&server, true, "").await;
    for act in ["stall", "no-answer"].repeat(5) {
        let mut caller = gateway.caller().await;
        caller.request("POST", CHAT, "", stream_with(act).as_bytes()).await;
        if act == "stall" {
            caller.head().await;
            assert_eq!(caller.chunk().await.unwrap(), delta("Hi").into_bytes());
        } else {
            server.wait_until_seen(act).await;
        }
        drop(caller);
        server.wait_until_cancelled().await;
    }
    assert_eq!(gateway.chat(&hello(r#""stream":true"#)).await.status, 200);
    // Each worker has one connection.
    let workers = std::thread::available_parallelism().unwrap().get();
    assert!(server.connections() <= workers, "{}", server.connections());
    assert_eq!(gateway.settled_charges().await, [11, 11 * 8, 5 + 1, 11 * 8 + 5 + 1]);
}

#[tokio::test]
async fn a_stream_that_breaks_ends_with_an_error_event() {
    let server = Server::start(b"h2").await;
    let gateway = gateway(&server, true, "").await;
    let reply = gateway.chat(&stream_with("break")).await;
    let error = reply.text().strip_prefix(&delta("Hi")).unwrap();
    assert!(error.contains("upstream_disconnected") && !error.contains("[DONE]"), "{error}");
    assert_eq!(gateway.settled_charges().await, [1, 8, 1, 9]);
}

#[tokio::test]
async fn an_answer_of_known_length_is_complete_after_its_last_byte() {
    let server = Server::start(b"h2").await;
    let gateway = gateway(&server, true, "").await;
    for (act, body) in [("known-length", chat_answer(&usage(8, 1))), ("empty-body", String::new())] {
        let reply = gateway.chat(&stream_with(act)).await;
        assert_eq!((reply.text(), reply.header("content-length")), (&*body, Some(&*body.len().to_string())));
    }
    assert_eq!(gateway.settled_charges().await[0], 2);
    let metrics = gateway.admin_get("/metrics").await;
    let answered = r#"tollgate_requests_total{api="chat",code="2xx",environment="e",outcome="answered"} 2"#;
    assert!(metrics.text().contains(answered), "{}", metrics.text());
}

#[tokio::test]
async fn the_timeouts_apply_to_http2_too() {
    let server = Server::start(b"h2").await;
    let gateway = gateway(&server, true, "first_byte: 300ms, idle: 300ms").await;
    let reply = gateway.chat(&stream_with("no-answer")).await;
    assert_eq!(reply.refusal(), (504, "upstream_timeout".into()));
    assert!(reply.text().contains("timeouts.first_byte"), "{}", reply.text());
    server.wait_until_cancelled().await;
    let reply = gateway.chat(&stream_with("stall")).await;
    assert!(reply.text().contains("timeouts.idle"), "{}", reply.text());
    server.wait_until_cancelled().await;
    assert_eq!(gateway.settled_charges().await, [2, 16, 1, 17]);
}

#[tokio::test]
async fn a_stream_refused_on_a_reused_connection_is_retried_once_and_charged_once() {
    for (act, status, requests, charges) in
        [("refuse-once", 200, 3, [2, 16, 2, 18]), ("refuse-always", 502, 3, [1, 8, 1, 9])]
    {
        let server = Server::start(b"h2").await;
        let gateway = gateway(&server, true, "").await;
        let mut caller = gateway.caller().await;
        caller.request("POST", CHAT, "", hello(r#""stream":true"#).as_bytes()).await;
        assert_eq!(caller.reply().await.status, 200);
        caller.request("POST", CHAT, "", stream_with(act).as_bytes()).await;
        let reply = caller.reply().await;
        assert_eq!(reply.status, status, "{act} {}", reply.text());
        assert_eq!((server.requests(), server.connections()), (requests, 2), "{act}");
        assert_eq!(gateway.settled_charges().await, charges, "{act}");
    }
}

#[tokio::test]
async fn a_stream_refused_on_a_fresh_connection_is_retried_once() {
    for (act, status, charges) in [("refuse-once", 200, [1, 8, 1, 9]), ("refuse-always", 502, [0, 0, 0, 0])] {
        let server = Server::start(b"h2").await;
        let gateway = gateway(&server, true, "").await;
        let reply = gateway.chat(&stream_with(act)).await;
        assert_eq!(reply.status, status, "{act} {}", reply.text());
        assert_eq!((server.requests(), server.connections()), (2, 2), "{act}");
        assert_eq!(gateway.settled_charges().await, charges, "{act}");
    }
}

#[tokio::test]
async fn a_connection_that_is_closed_during_the_tls_handshake_is_opened_once_more() {
    let server = Server::start(b"h2").await;
    let gateway = gateway(&server, true, "").await;
    server.close_next_connections(1);
    assert_eq!(gateway.chat(&hello(r#""stream":true"#)).await.status, 200);
    assert_eq!(gateway.settled_charges().await, [1, 8, 1, 9]);
    let gateway = self::gateway(&server, true, "").await;
    server.close_next_connections(2);
    let reply = gateway.chat(&hello(r#""stream":true"#)).await;
    assert_eq!(reply.refusal(), (502, "upstream_unreachable".into()));
    assert_eq!(gateway.settled_charges().await, [0, 0, 0, 0]);
}

#[tokio::test]
async fn a_body_until_close_is_complete_only_with_a_close_notify() {
    for is_notified in [true, false] {
        let certificate = Certificate::new();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let acceptor = certificate.acceptor(b"http/1.1");
        tokio::spawn(async move {
            let (socket, _) = listener.accept().await.unwrap();
            let mut stream = acceptor.accept(socket).await.unwrap();
            let mut request = Vec::new();
            while !request.ends_with(b"}") {
                stream.read_buf(&mut request).await.unwrap();
            }
            let answer = format!("HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n{}", delta("Hi"));
            stream.write_all(answer.as_bytes()).await.unwrap();
            stream.flush().await.unwrap();
            if is_notified {
                stream.shutdown().await.unwrap();
            }
        });
        let gateway = gateway_in_front_of(port, Some(&certificate), "").await;
        let reply = gateway.chat(&hello(r#""stream":true"#)).await;
        let error = reply.text().strip_prefix(&delta("Hi")).unwrap();
        assert_eq!(error.contains("upstream_disconnected"), !is_notified, "{error}");
        assert_eq!(gateway.settled_charges().await, [1, 8, 1, 9]);
    }
}

#[tokio::test]
async fn no_proxy_is_taken_from_the_environment() {
    let trap = Upstream::always(Answer::chat(1, 1)).await;
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let sections = format!(
        "upstreams: {{ u: {{ base_url: 'http://{}/v1' }} }}\nenvironments: {{ e: {{ upstream: u }} }}\ndefault_environment: e",
        upstream.address
    );
    let proxy = format!("http://{}", trap.address);
    let names = ["HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"];
    let gateway = Process::start(&sections, &names.map(|name| (name, &*proxy))).await;
    assert_eq!(gateway.chat(HELLO).await.status, 200);
    assert_eq!((upstream.seen().len(), trap.seen().len()), (1, 0));
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(trap.connections(), 0);
}
