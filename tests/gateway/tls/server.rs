//! A TLS upstream whose behaviour is set by the request's `user` field.

use crate::support::{DONE, chat_answer, delta, soon, usage, usage_event};
use bytes::Bytes;
use h2::Reason;
use http_body_util::BodyExt;
use hyper::body::{Body, Frame};
use hyper_util::rt::{TokioExecutor, TokioIo};
use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};

/// Values of the `user` field that select what the server does. It answers any other request with a complete stream.
const ACTS: [&str; 7] =
    ["stall", "break", "no-answer", "known-length", "empty-body", "refuse-once", "refuse-always"];

/// A self-signed certificate of `localhost` and its key.
pub struct Certificate {
    pub pem: String,
    key: Vec<u8>,
    der: Vec<u8>,
}

impl Certificate {
    pub fn new() -> Self {
        Self::of(&rcgen::CertificateParams::new(["localhost".to_owned()]).unwrap())
    }

    pub fn of(parameters: &rcgen::CertificateParams) -> Self {
        let key = rcgen::KeyPair::generate().unwrap();
        let made = parameters.self_signed(&key).unwrap();
        Self { pem: made.pem(), key: key.serialize_der(), der: made.der().to_vec() }
    }

    /// Accepts TLS connections, and only this protocol by ALPN.
    pub fn acceptor(&self, protocol: &[u8]) -> TlsAcceptor {
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(self.key.clone()));
        let provider = Arc::new(tokio_rustls::rustls::crypto::ring::default_provider());
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![self.der.clone().into()], key)
            .unwrap();
        config.alpn_protocols = vec![protocol.to_vec()];
        TlsAcceptor::from(Arc::new(config))
    }
}

pub struct Server {
    pub port: u16,
    pub certificate: Certificate,
    log: ServerLog,
    to_close: Arc<AtomicUsize>,
}

/// What the server has received.
#[derive(Clone)]
struct ServerLog {
    connections: Arc<AtomicUsize>,
    requests: Arc<AtomicUsize>,
    /// The body of the last request.
    last: watch::Sender<String>,
    /// Answers that the gateway cancelled and that `wait_until_cancelled` has not consumed.
    cancelled: watch::Sender<usize>,
}

impl Server {
    pub async fn start(protocol: &[u8]) -> Self {
        Self::with(protocol, Certificate::new()).await
    }

    pub async fn with(protocol: &[u8], certificate: Certificate) -> Self {
        let acceptor = certificate.acceptor(protocol);
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let is_http2 = protocol == b"h2";
        let log = ServerLog {
            connections: Arc::default(),
            requests: Arc::default(),
            last: watch::channel(String::new()).0,
            cancelled: watch::channel(0).0,
        };
        let to_close = Arc::new(AtomicUsize::new(0));
        let server = Self { port, certificate, log: log.clone(), to_close: to_close.clone() };
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let is_closed = |left: usize| left.checked_sub(1);
                if to_close.fetch_update(Ordering::Relaxed, Ordering::Relaxed, is_closed).is_ok() {
                    continue;
                }
                log.connections.fetch_add(1, Ordering::Relaxed);
                tokio::spawn(serve(socket, acceptor.clone(), is_http2, log.clone()));
            }
        });
        server
    }

    /// Closes the next connections before their TLS handshake.
    pub fn close_next_connections(&self, count: usize) {
        self.to_close.store(count, Ordering::Relaxed);
    }

    pub fn connections(&self) -> usize {
        self.log.connections.load(Ordering::Relaxed)
    }

    pub fn requests(&self) -> usize {
        self.log.requests.load(Ordering::Relaxed)
    }

    /// Waits for a request with this text in its body.
    pub async fn wait_until_seen(&self, act: &str) {
        let mut last = self.log.last.subscribe();
        soon("a request", async { drop(last.wait_for(|body| body.contains(act)).await.unwrap()) }).await;
    }

    /// Waits until the gateway has cancelled an answer.
    pub async fn wait_until_cancelled(&self) {
        let mut cancelled = self.log.cancelled.subscribe();
        soon("a stream to be cancelled", async { drop(cancelled.wait_for(|n| *n > 0).await.unwrap()) }).await;
        self.log.cancelled.send_modify(|n| *n -= 1);
    }
}

async fn serve(socket: TcpStream, acceptor: TlsAcceptor, is_http2: bool, log: ServerLog) {
    let Ok(stream) = acceptor.accept(socket).await else { return };
    let service = hyper::service::service_fn(move |request| answer(request, log.clone()));
    if is_http2 {
        let http2 = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
        let _ = http2.serve_connection(TokioIo::new(stream), service).await;
    } else {
        let http1 = hyper::server::conn::http1::Builder::new();
        let _ = http1.serve_connection(TokioIo::new(stream), service).await;
    }
}

/// Counts as a cancelled answer if it is dropped while it holds a sender.
struct Cancelled(Option<watch::Sender<usize>>);

impl Drop for Cancelled {
    fn drop(&mut self) {
        if let Some(cancelled) = self.0.take() {
            cancelled.send_modify(|n| *n += 1);
        }
    }
}

struct Events {
    ready: VecDeque<String>,
    act: &'static str,
    /// The pause before the stream breaks. During it the gateway reads the earlier events.
    pause: Pin<Box<tokio::time::Sleep>>,
    cancelled: Cancelled,
}

impl Body for Events {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        if let Some(event) = self.ready.pop_front() {
            return Poll::Ready(Some(Ok(Frame::data(event.into()))));
        }
        if self.act == "stall" {
            return Poll::Pending;
        }
        if self.act == "break" {
            std::task::ready!(self.pause.as_mut().poll(cx));
        }
        self.cancelled.0 = None;
        let broken = || Err(io::Error::other("the test breaks the stream"));
        Poll::Ready((self.act == "break").then(broken))
    }
}

async fn answer(
    request: http::Request<hyper::body::Incoming>,
    log: ServerLog,
) -> Result<http::Response<Events>, h2::Error> {
    let version = format!("{:?}", request.version());
    assert_eq!(request.headers()["authorization"], "Bearer sk-upstream");
    let is_list = request.method() == http::Method::GET;
    let body = request.into_body().collect().await.unwrap().to_bytes();
    let body = String::from_utf8(body.to_vec()).unwrap();
    assert!(is_list || body.contains("include_usage"));
    let mut cancelled = Cancelled(Some(log.cancelled.clone()));
    let act = ACTS.into_iter().find(|act| body.contains(act)).unwrap_or("");
    let is_repeated = *log.last.borrow() == body;
    log.requests.fetch_add(1, Ordering::Relaxed);
    log.last.send_replace(body);
    if act == "no-answer" {
        std::future::pending::<()>().await;
    }
    if act == "refuse-always" || act == "refuse-once" && !is_repeated {
        cancelled.0 = None;
        return Err(Reason::REFUSED_STREAM.into());
    }
    let mut ready = VecDeque::from([delta("Hi")]);
    if act.is_empty() || act == "refuse-once" {
        ready.extend([usage_event(8, 1), DONE.to_owned()]);
    }
    let mut response = http::Response::builder().header("x-protocol", version);
    if act == "known-length" || act == "empty-body" {
        let body = if act == "empty-body" { String::new() } else { chat_answer(&usage(8, 1)) };
        response = response.header("content-length", body.len());
        ready = VecDeque::from(if body.is_empty() { vec![] } else { vec![body] });
    } else {
        response = response.header("content-type", "text/event-stream");
    }
    let pause = Box::pin(tokio::time::sleep(std::time::Duration::from_millis(100)));
    Ok(response.body(Events { ready, act, pause, cancelled }).unwrap())
}
