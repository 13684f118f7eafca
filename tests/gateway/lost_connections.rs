//! Upstreams that close connections without announcing it: no request is lost, and each is charged once.

use crate::support::caller::header;
use crate::support::*;
use crate::tls::server::Certificate;
use bytes::Bytes;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// When the upstream closes a connection that can be reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Closes {
    /// After every answer, at once.
    AfterEachAnswer,
    /// After some answers, at once or up to a millisecond later.
    AfterSomeAnswers,
    /// When a further request arrives, which it does not read or does not answer.
    AtReuse,
}

/// What the upstream did with each request, by its number.
#[derive(Clone, Default)]
struct Log {
    /// How often a request was read, and how often an answer to it has begun.
    requests: Arc<Mutex<HashMap<u64, (u32, u32)>>>,
    choices: Arc<AtomicU64>,
}

impl Log {
    /// A number below `end`, from a fixed sequence.
    fn choose(&self, end: u64) -> u64 {
        let n = self.choices.fetch_add(1, Ordering::Relaxed).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        ((n ^ (n >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 33) % end
    }
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// Serves one connection. A connection's first request is always answered.
async fn serve(stream: &mut dyn Stream, closes: Closes, log: Log) -> Option<()> {
    let answer = chat_answer(&usage(8, 2));
    let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{answer}", answer.len());
    let mut bytes = Vec::new();
    for count in 0.. {
        let is_lost = count > 0 && closes == Closes::AtReuse && log.choose(3) > 0;
        if is_lost && log.choose(2) == 0 {
            // The rest is not read, so the kernel resets the connection.
            return stream.read_u8().await.ok().map(drop);
        }
        while !bytes.ends_with(b"}]}") {
            if stream.read_buf(&mut bytes).await.ok()? == 0 {
                return None;
            }
        }
        let text = String::from_utf8(std::mem::take(&mut bytes)).unwrap();
        let number = header(&text, "x-number").unwrap().parse().unwrap();
        log.requests.lock().unwrap().entry(number).or_default().0 += 1;
        if is_lost {
            return None;
        }
        log.requests.lock().unwrap().entry(number).or_default().1 += 1;
        stream.write_all(answer.as_bytes()).await.ok()?;
        stream.flush().await.ok()?;
        match closes {
            Closes::AfterEachAnswer => return None,
            Closes::AfterSomeAnswers if log.choose(3) == 0 => {
                tokio::time::sleep(Duration::from_micros(100 * log.choose(30))).await;
                return None;
            }
            _ => {}
        }
    }
    None
}

/// Serves one HTTP/2 connection. Its first stream is always answered.
async fn serve_http2(stream: impl Stream, closes: Closes, log: Log) -> Option<()> {
    let answer = Bytes::from(chat_answer(&usage(8, 2)));
    let mut connection = h2::server::handshake(stream).await.ok()?;
    for count in 0.. {
        let (request, mut respond) = connection.accept().await?.ok()?;
        let number = request.headers()["x-number"].to_str().unwrap().parse().unwrap();
        log.requests.lock().unwrap().entry(number).or_default().0 += 1;
        if count > 0 && closes == Closes::AtReuse && log.choose(3) > 0 {
            match log.choose(3) {
                0 => respond.send_reset(h2::Reason::REFUSED_STREAM),
                1 => connection.abrupt_shutdown(h2::Reason::NO_ERROR),
                _ => return None,
            }
            continue;
        }
        log.requests.lock().unwrap().entry(number).or_default().1 += 1;
        let mut body = respond.send_response(http::Response::new(()), false).unwrap();
        body.send_data(answer.clone(), true).unwrap();
        match closes {
            Closes::AfterEachAnswer => connection.graceful_shutdown(),
            Closes::AfterSomeAnswers if log.choose(3) == 0 => {
                // The answer is written while the connection is polled.
                let pause = Duration::from_micros(500 + 100 * log.choose(30));
                let (request, _respond) =
                    tokio::time::timeout(pause, connection.accept()).await.ok()??.ok()?;
                let number = request.headers()["x-number"].to_str().unwrap().parse().unwrap();
                log.requests.lock().unwrap().entry(number).or_default().0 += 1;
                return None;
            }
            _ => {}
        }
    }
    None
}

/// Starts an upstream. With a certificate it serves TLS and this protocol. Returns its port.
async fn upstream(closes: Closes, tls: Option<(&Certificate, &'static [u8])>) -> (u16, Log) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let acceptor = tls.map(|(certificate, protocol)| (certificate.acceptor(protocol), protocol == b"h2"));
    let log = Log::default();
    let seen = log.clone();
    let accept = move || async move {
        while let Ok((socket, _)) = listener.accept().await {
            socket.set_nodelay(true).unwrap();
            let (acceptor, log) = (acceptor.clone(), seen.clone());
            tokio::spawn(async move {
                let mut socket: TcpStream = socket;
                match acceptor {
                    None => drop(serve(&mut socket, closes, log).await),
                    Some((acceptor, true)) => {
                        let Ok(stream) = acceptor.accept(socket).await else { return };
                        serve_http2(stream, closes, log).await;
                    }
                    Some((acceptor, false)) => {
                        let Ok(mut stream) = acceptor.accept(socket).await else { return };
                        serve(&mut stream, closes, log.clone()).await;
                        if log.choose(2) == 0 {
                            let _ = stream.shutdown().await;
                        }
                    }
                }
            });
        }
    };
    tokio::spawn(accept());
    (port, log)
}

/// Sends this many requests from a few callers, back to back. Returns how many failed.
async fn send(gateway: &Process, count: u64, requests: u64) -> usize {
    let mut callers = Vec::new();
    for first in 0..count {
        let mut caller = gateway.caller().await;
        callers.push(tokio::spawn(async move {
            let mut failed = 0;
            for number in (first..requests).step_by(usize::try_from(count).unwrap()) {
                caller.request("POST", CHAT, &format!("x-number: {number}\r\n"), HELLO.as_bytes()).await;
                failed += usize::from(caller.reply().await.status != 200);
            }
            failed
        }));
    }
    let mut failed = 0;
    for caller in callers {
        failed += caller.await.unwrap();
    }
    failed
}

/// A gateway in front of the upstream at this port. It trusts the certificate, if there is one.
async fn gateway(port: u16, certificate: Option<&Certificate>) -> Process {
    let scheme = if certificate.is_some() { "https" } else { "http" };
    let sections = format!(
        "upstreams: {{ u: {{ base_url: '{scheme}://localhost:{port}/v1' }} }}\nenvironments: {{ e: {{ upstream: u }} }}\ndefault_environment: e"
    );
    let Some(certificate) = certificate else { return Process::start(&sections, &[]).await };
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(&file, &certificate.pem).unwrap();
    Process::start(&sections, &[("SSL_CERT_FILE", file.path().to_str().unwrap())]).await
}

/// 10,200 requests over the three protocols.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_request_is_lost_to_an_upstream_that_closes_connections() {
    // With HTTP/2 there is one caller: a connection that breaks would take answers of others with it.
    for (protocol, callers, requests) in [(&b""[..], 4, 2_000), (b"http/1.1", 4, 700), (b"h2", 1, 700)] {
        for closes in [Closes::AfterEachAnswer, Closes::AfterSomeAnswers, Closes::AtReuse] {
            let certificate = (!protocol.is_empty()).then(Certificate::new);
            let (port, log) = upstream(closes, certificate.as_ref().map(|c| (c, protocol))).await;
            let gateway = gateway(port, certificate.as_ref()).await;
            let case = format!("{closes:?} {}", protocol.escape_ascii());
            assert_eq!(send(&gateway, callers, requests).await, 0, "failed requests: {case}");
            let seen = log.requests.lock().unwrap().clone();
            assert!(seen.values().all(|&(read, begun)| read <= 2 && begun == 1), "{case} {seen:?}");
            let charges = [requests, 8 * requests, 2 * requests, 10 * requests];
            assert_eq!(gateway.settled_charges().await, charges, "{case}");
        }
    }
}
