//! An upstream behind TLS that speaks HTTP/1.1 or HTTP/2, whose script decides about each request. It can die.

use super::server::Certificate;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Bytes;
use hyper_util::rt::{TokioExecutor, TokioIo};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;

/// What the upstream does with a request.
#[derive(Clone, Debug)]
pub enum Act {
    /// Answers with this status and this JSON body, after this time.
    Answer(u16, String, Duration),
    /// HTTP/2: refuses the stream, which shows that the request was not processed. HTTP/1.1: closes the connection.
    Refuse,
    /// HTTP/2: resets the stream with `INTERNAL_ERROR`. HTTP/1.1: closes the connection.
    Break,
    /// Never answers.
    Silence,
    /// Closes all its connections and accepts no further one.
    Die,
}

impl Act {
    pub fn answer(status: u16, body: &str) -> Self {
        Self::Answer(status, body.to_owned(), Duration::ZERO)
    }

    pub fn after(self, time: Duration) -> Self {
        match self {
            Self::Answer(status, body, _) => Self::Answer(status, body, time),
            act => act,
        }
    }
}

type Script = Arc<dyn Fn(usize) -> Act + Send + Sync>;

pub struct TlsUpstream {
    pub port: u16,
    seen: Arc<Mutex<Vec<Seen>>>,
}

/// A request as it arrived.
#[derive(Clone, Debug)]
pub struct Seen {
    /// The header `x-number`.
    pub number: String,
    pub authority: String,
    pub version: http::Version,
    pub path: String,
    pub content_type: String,
    pub body: Vec<u8>,
}

#[derive(Clone)]
struct Shared {
    script: Script,
    seen: Arc<Mutex<Vec<Seen>>>,
    is_dead: watch::Sender<bool>,
}

impl TlsUpstream {
    /// `script` gets the number of requests that arrived before.
    pub async fn start(
        certificate: &Certificate,
        protocol: &[u8],
        script: impl Fn(usize) -> Act + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (acceptor, is_http2) = (certificate.acceptor(protocol), protocol == b"h2");
        let seen = Arc::<Mutex<Vec<Seen>>>::default();
        let shared =
            Shared { script: Arc::new(script), seen: seen.clone(), is_dead: watch::Sender::new(false) };
        tokio::spawn(async move {
            let mut death = shared.is_dead.subscribe();
            loop {
                tokio::select! {
                    biased;
                    _ = death.wait_for(|is_dead| *is_dead) => return,
                    Ok((socket, _)) = listener.accept() => {
                        tokio::spawn(serve(socket, acceptor.clone(), is_http2, shared.clone()));
                    }
                }
            }
        });
        Self { port, seen }
    }

    pub fn url(&self) -> String {
        format!("https://localhost:{}/v1", self.port)
    }

    pub fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }
}

async fn serve(socket: TcpStream, acceptor: TlsAcceptor, is_http2: bool, shared: Shared) {
    let mut death = shared.is_dead.subscribe();
    let connection = async {
        let Ok(stream) = acceptor.accept(socket).await else { return };
        let service = hyper::service::service_fn(|request| answer(request, shared.clone()));
        if is_http2 {
            let http2 = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
            drop(http2.serve_connection(TokioIo::new(stream), service).await);
        } else {
            let http1 = hyper::server::conn::http1::Builder::new();
            drop(http1.serve_connection(TokioIo::new(stream), service).await);
        }
    };
    tokio::select! {
        () = connection => {}
        _ = death.wait_for(|is_dead| *is_dead) => {}
    }
}

async fn answer(
    request: http::Request<hyper::body::Incoming>,
    shared: Shared,
) -> Result<http::Response<Full<Bytes>>, h2::Error> {
    let header = |name: &str| request.headers().get(name).map(|value| value.to_str().unwrap().to_owned());
    let authority = request.uri().authority().map(ToString::to_string);
    let mut seen = Seen {
        number: header("x-number").unwrap_or_default(),
        authority: authority.or_else(|| header("host")).unwrap_or_default(),
        version: request.version(),
        path: request.uri().path().to_owned(),
        content_type: header("content-type").unwrap_or_default(),
        body: Vec::new(),
    };
    seen.body = request.into_body().collect().await.unwrap().to_bytes().to_vec();
    let before = {
        let mut all = shared.seen.lock().unwrap();
        all.push(seen);
        all.len() - 1
    };
    match (shared.script)(before) {
        Act::Answer(status, body, time) => {
            tokio::time::sleep(time).await;
            let response =
                http::Response::builder().status(status).header("content-type", "application/json");
            Ok(response.body(Full::from(body)).unwrap())
        }
        Act::Refuse => Err(h2::Reason::REFUSED_STREAM.into()),
        Act::Break => Err(h2::Reason::INTERNAL_ERROR.into()),
        Act::Silence => std::future::pending().await,
        Act::Die => {
            shared.is_dead.send_replace(true);
            std::future::pending().await
        }
    }
}
