//! TLS toward upstreams, HTTP/2 where it is offered, and no way round through anybody's proxy.

use crate::support::*;
use server::Server;
use std::time::Duration;

/// A gateway that trusts this server, or nobody, before it; with these timeouts.
async fn gateway(server: &Server, trusts: bool, timeouts: &str) -> Process {
    let sections = format!(
        "upstreams: {{ u: {{ base_url: 'https://localhost:{}/v1', api_key: sk-upstream, timeouts: {{ {timeouts} }} }} }}\n\
         environments: {{ e: {{ upstream: u }} }}\ndefault_environment: e",
        server.port
    );
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(&file, &server.certificate).unwrap();
    let trusted = [("SSL_CERT_FILE", file.path().to_str().unwrap())];
    Process::start(&sections, if trusts { &trusted } else { &[] }).await
}

/// A request for a stream with which the server does this.
fn asking_to(act: &str) -> String {
    hello(&format!(r#""stream":true,"user":"{act}""#))
}

#[tokio::test]
async fn answers_come_over_tls_with_http1_and_http2() {
    for protocol in [&b"http/1.1"[..], b"h2"] {
        let server = Server::start(protocol).await;
        for (trusts, status) in [(true, 200), (false, 502)] {
            let gateway = gateway(&server, trusts, "").await;
            for _ in 0..3 {
                let reply = gateway.chat(&hello(r#""stream":true"#)).await;
                assert_eq!(reply.status, status, "{protocol:?} {}", reply.text());
                if trusts {
                    assert_eq!(reply.text(), format!("{}{}", delta("Hi"), DONE));
                    let version = if protocol == b"h2" { "HTTP/2.0" } else { "HTTP/1.1" };
                    assert_eq!(reply.header("x-protocol"), Some(version));
                }
            }
            let charges = if trusts { [3, 3 * 8, 3, 3 * 9] } else { [0, 0, 0, 0] };
            assert_eq!(gateway.settled_charges().await, charges);
        }
    }
}

#[tokio::test]
async fn a_hang_up_cancels_its_stream_and_leaves_the_connection_to_others() {
    let server = Server::start(b"h2").await;
    let gateway = gateway(&server, true, "").await;
    for act in ["stall", "silence"].repeat(5) {
        let mut caller = gateway.caller().await;
        caller.request("POST", CHAT, "", asking_to(act).as_bytes()).await;
        if act == "stall" {
            caller.head().await;
            assert_eq!(caller.chunk().await.unwrap(), delta("Hi").into_bytes());
        } else {
            server.has_seen(act).await;
        }
        drop(caller);
        server.was_cancelled().await;
    }
    assert_eq!(gateway.chat(&hello(r#""stream":true"#)).await.status, 200);
    // Each worker has one.
    let workers = std::thread::available_parallelism().unwrap().get();
    assert!(server.connections() <= workers, "{}", server.connections());
    assert_eq!(gateway.settled_charges().await, [11, 11 * 8, 5 + 1, 11 * 8 + 5 + 1]);
}

#[tokio::test]
async fn a_stream_that_breaks_ends_with_an_error_event() {
    let server = Server::start(b"h2").await;
    let gateway = gateway(&server, true, "").await;
    let reply = gateway.chat(&asking_to("break")).await;
    let error = reply.text().strip_prefix(&delta("Hi")).unwrap();
    assert!(error.contains("upstream_disconnected") && !error.contains("[DONE]"), "{error}");
    assert_eq!(gateway.settled_charges().await, [1, 8, 1, 9]);
}

#[tokio::test]
async fn an_answer_of_known_length_is_whole_when_that_has_come() {
    let server = Server::start(b"h2").await;
    let gateway = gateway(&server, true, "").await;
    for (act, body) in [("measured", chat_answer(&usage(8, 1))), ("nothing", String::new())] {
        let reply = gateway.chat(&asking_to(act)).await;
        assert_eq!((reply.text(), reply.header("content-length")), (&*body, Some(&*body.len().to_string())));
    }
    assert_eq!(gateway.settled_charges().await[0], 2);
    let metrics = gateway.admin_get("/metrics").await;
    let answered = r#"tollgate_requests_total{api="chat",environment="e",outcome="answered"} 2"#;
    assert!(metrics.text().contains(answered), "{}", metrics.text());
}

#[tokio::test]
async fn the_timeouts_hold_for_http2_too() {
    let server = Server::start(b"h2").await;
    let gateway = gateway(&server, true, "first_byte: 300ms, idle: 300ms").await;
    let reply = gateway.chat(&asking_to("silence")).await;
    assert_eq!(reply.refusal(), (504, "upstream_timeout".into()));
    assert!(reply.text().contains("timeouts.first_byte"), "{}", reply.text());
    server.was_cancelled().await;
    let reply = gateway.chat(&asking_to("stall")).await;
    assert!(reply.text().contains("timeouts.idle"), "{}", reply.text());
    server.was_cancelled().await;
    assert_eq!(gateway.settled_charges().await, [2, 16, 1, 17]);
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

/// An upstream that does what the request's `user` says.
mod server {
    use crate::support::{DONE, chat_answer, delta, soon, usage, usage_event};
    use bytes::Bytes;
    use http_body_util::BodyExt;
    use hyper::body::{Body, Frame};
    use hyper_util::rt::{TokioExecutor, TokioIo};
    use std::collections::VecDeque;
    use std::convert::Infallible;
    use std::io;
    use std::pin::Pin;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::{Context, Poll};
    use tokio::sync::watch;
    use tokio_rustls::TlsAcceptor;
    use tokio_rustls::rustls::ServerConfig;
    use tokio_rustls::rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};

    pub struct Server {
        pub port: u16,
        pub certificate: String,
        connections: Arc<AtomicUsize>,
        seen: watch::Receiver<String>,
        /// Answers that were given up before their end, and have not been asked about.
        cancelled: watch::Sender<usize>,
    }

    /// What it tells of itself.
    #[derive(Clone)]
    struct Teller {
        seen: Arc<watch::Sender<String>>,
        cancelled: watch::Sender<usize>,
    }

    impl Server {
        pub async fn start(protocol: &[u8]) -> Self {
            let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
            let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(made.signing_key.serialize_der()));
            let provider = Arc::new(tokio_rustls::rustls::crypto::ring::default_provider());
            let mut config = ServerConfig::builder_with_provider(provider)
                .with_safe_default_protocol_versions()
                .unwrap()
                .with_no_client_auth()
                .with_single_cert(vec![made.cert.der().clone()], key)
                .unwrap();
            config.alpn_protocols = vec![protocol.to_vec()];
            let acceptor = TlsAcceptor::from(Arc::new(config));
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            let port = listener.local_addr().unwrap().port();
            let is_http2 = protocol == b"h2";
            let connections = Arc::new(AtomicUsize::new(0));
            let (seeing, seen) = watch::channel(String::new());
            let cancelled = watch::channel(0).0;
            let teller = Teller { seen: Arc::new(seeing), cancelled: cancelled.clone() };
            let count = connections.clone();
            tokio::spawn(async move {
                while let Ok((socket, _)) = listener.accept().await {
                    count.fetch_add(1, Ordering::Relaxed);
                    let (acceptor, teller) = (acceptor.clone(), teller.clone());
                    tokio::spawn(async move {
                        let Ok(stream) = acceptor.accept(socket).await else { return };
                        let service = hyper::service::service_fn(move |r| answer(r, teller.clone()));
                        if is_http2 {
                            let http2 = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
                            let _ = http2.serve_connection(TokioIo::new(stream), service).await;
                        } else {
                            let http1 = hyper::server::conn::http1::Builder::new();
                            let _ = http1.serve_connection(TokioIo::new(stream), service).await;
                        }
                    });
                }
            });
            Self { port, certificate: made.cert.pem(), connections, seen, cancelled }
        }

        pub fn connections(&self) -> usize {
            self.connections.load(Ordering::Relaxed)
        }

        /// Waits until a request says this.
        pub async fn has_seen(&self, act: &str) {
            let mut seen = self.seen.clone();
            soon("a request", async { drop(seen.wait_for(|body| body.contains(act)).await.unwrap()) }).await;
        }

        /// Waits until an answer has been given up.
        pub async fn was_cancelled(&self) {
            let mut cancelled = self.cancelled.subscribe();
            soon("a stream to be cancelled", async { drop(cancelled.wait_for(|n| *n > 0).await.unwrap()) })
                .await;
            self.cancelled.send_modify(|n| *n -= 1);
        }
    }

    /// Dropped before it was defused: somebody has given up.
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
        /// Before it breaks, so that what came before is read.
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
            let broken = || Err(io::Error::other("as the test wants it"));
            Poll::Ready((self.act == "break").then(broken))
        }
    }

    async fn answer(
        request: http::Request<hyper::body::Incoming>,
        teller: Teller,
    ) -> Result<http::Response<Events>, Infallible> {
        let version = format!("{:?}", request.version());
        assert_eq!(request.headers()["authorization"], "Bearer sk-upstream");
        let body = request.into_body().collect().await.unwrap().to_bytes();
        let body = String::from_utf8(body.to_vec()).unwrap();
        assert!(body.contains("include_usage"));
        let cancelled = Cancelled(Some(teller.cancelled));
        let act = ["stall", "break", "silence", "measured", "nothing"]
            .into_iter()
            .find(|act| body.contains(act))
            .unwrap_or("");
        teller.seen.send_replace(body);
        if act == "silence" {
            std::future::pending::<()>().await;
        }
        let mut ready = VecDeque::from([delta("Hi")]);
        if act.is_empty() {
            ready.extend([usage_event(8, 1), DONE.to_owned()]);
        }
        let mut response = http::Response::builder().header("x-protocol", version);
        if act == "measured" || act == "nothing" {
            let body = if act == "nothing" { String::new() } else { chat_answer(&usage(8, 1)) };
            response = response.header("content-length", body.len());
            ready = VecDeque::from(if body.is_empty() { vec![] } else { vec![body] });
        } else {
            response = response.header("content-type", "text/event-stream");
        }
        let pause = Box::pin(tokio::time::sleep(std::time::Duration::from_millis(100)));
        Ok(response.body(Events { ready, act, pause, cancelled }).unwrap())
    }
}
