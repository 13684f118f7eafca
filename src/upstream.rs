//! The way to one upstream: connections, kept and reused, and the exchange of one request.
//!
//! HTTP/2 where TLS's ALPN offers it, else HTTP/1.1 by `http1`, which reads the answer straight from
//! the socket in the task that serves the caller. No redirects are followed, nothing is decompressed,
//! no proxy is taken from the environment.

mod http1;
mod tls;

use crate::clock::Stopwatch;
use crate::config;
use bytes::Bytes;
use http::{HeaderName, HeaderValue, Method, Uri, response};
use http_body_util::Full;
use hyper::body::Body as _;
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time::timeout;

pub(crate) use tls::Tls;
pub use tls::client_config;

/// A request as it goes to the upstream.
#[derive(Debug)]
pub struct Request {
    /// Its method.
    pub method: Method,
    /// Path and query.
    pub target: String,
    /// All headers but `host` and those of the body's framing. A list: they are only written out.
    pub headers: Vec<(HeaderName, HeaderValue)>,
    /// The whole body.
    pub body: Bytes,
}

/// Why there is no answer.
#[derive(Debug)]
pub enum SendError {
    /// Nothing was sent: no connection came about.
    Unreachable(&'static str, io::Error),
    /// `timeouts.connect` ran out; nothing was sent.
    ConnectTimeout,
    /// This setting ran out, after so long, before an answer came.
    Timeout(&'static str, Duration),
    /// The connection broke, or what came is no HTTP, after the request was sent.
    Broken(io::Error),
}

/// One upstream as one worker sees it: its own connections, so that no lock is shared between cores.
pub struct Upstream {
    settings: Arc<config::UpstreamSettings>,
    host: String,
    port: u16,
    /// The `host` header.
    authority: String,
    tls: Option<Tls>,
    idle: http1::Pool,
    http2: Mutex<Option<http2::SendRequest<Full<Bytes>>>>,
}

/// A connection to an upstream.
pub(crate) trait Socket: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Socket for T {}

/// An answer's body, as it arrives.
pub struct Incoming {
    source: Source,
    /// What was read of it before it is passed on.
    read: Option<Box<Read>>,
}

struct Read {
    data: Bytes,
    broke_off: Option<io::Error>,
}

enum Source {
    Http1(http1::Incoming),
    Http2(hyper::body::Incoming),
}

impl Upstream {
    /// Nothing is connected before the first request.
    ///
    /// # Errors
    /// The host cannot be a TLS server's name.
    pub fn new(
        settings: Arc<config::UpstreamSettings>,
        tls: &Arc<tokio_rustls::rustls::ClientConfig>,
    ) -> anyhow::Result<Self> {
        let uri = &settings.base_url;
        let host = uri.host().unwrap_or_default().trim_matches(['[', ']']).to_owned();
        let is_tls = uri.scheme_str() == Some("https");
        let port = uri.port_u16().unwrap_or(if is_tls { 443 } else { 80 });
        let authority = uri.authority().map(ToString::to_string).unwrap_or_default();
        let tls = if is_tls { Some(Tls::new(tls.clone(), &host)?) } else { None };
        Ok(Self {
            settings,
            host,
            port,
            authority,
            tls,
            idle: http1::Pool::default(),
            http2: Mutex::default(),
        })
    }

    /// Sends a request and waits for the head of its answer. `reached` is told `true` when the first byte
    /// is about to be written, and `false` should it turn out that the upstream cannot have read it.
    ///
    /// # Errors
    /// See [`SendError`].
    pub async fn send(
        &self,
        request: &Request,
        started: Stopwatch,
        reached: &mut (dyn FnMut(bool) + Send),
    ) -> Result<(response::Parts, Incoming), SendError> {
        if let Some(kept) = self.idle.take() {
            reached(true);
            match self.first_byte(started, self.exchange_http1(kept, request)).await {
                // The upstream had closed a kept connection before it read anything of this.
                Err(SendError::Broken(e)) if http1::was_never_read(&e) => reached(false),
                done => return done,
            }
        }
        let shared = self.http2.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(sender) = shared.filter(|s| !s.is_closed()) {
            reached(true);
            match self.first_byte(started, Box::pin(self.exchange_http2(sender, request))).await {
                Err(SendError::Broken(e)) if http1::was_never_read(&e) => reached(false),
                done => return done,
            }
        }
        // Boxed, as is HTTP/2: their states are large, and every request's future would carry them along.
        let connected = Box::pin(self.connect(started)).await?;
        reached(true);
        let answer = match connected {
            Connected::Http1(socket) => {
                let exchange = self.exchange_http1(http1::Connection::new(socket), request);
                self.first_byte(started, Box::pin(exchange)).await
            }
            Connected::Http2(sender) => {
                self.first_byte(started, Box::pin(self.exchange_http2(sender, request))).await
            }
        };
        if let Err(SendError::Broken(e)) = &answer
            && http1::was_never_read(e)
        {
            reached(false);
        }
        answer
    }

    /// Waits for an answer's head as long as `first_byte` allows, and `total` of the whole exchange.
    async fn first_byte<T>(
        &self,
        started: Stopwatch,
        exchange: impl Future<Output = Result<T, SendError>>,
    ) -> Result<T, SendError> {
        let first_byte = self.settings.timeouts.first_byte;
        let (within, out_of_time) =
            self.bound(started, first_byte, SendError::Timeout("first_byte", first_byte));
        timeout(within, exchange).await.unwrap_or(Err(out_of_time))
    }

    /// A time for a step, or what `total` leaves of it; and what is told when that is over.
    fn bound(&self, started: Stopwatch, step: Duration, error: SendError) -> (Duration, SendError) {
        let total = self.settings.timeouts.total;
        let left = total.saturating_sub(started.elapsed());
        if left < step { (left, SendError::Timeout("total", total)) } else { (step, error) }
    }

    async fn exchange_http1(
        &self,
        connection: http1::Connection,
        request: &Request,
    ) -> Result<(response::Parts, Incoming), SendError> {
        let (parts, body) =
            connection.exchange(&self.authority, request, &self.idle).await.map_err(SendError::Broken)?;
        Ok((parts, Incoming { source: Source::Http1(body), read: None }))
    }

    async fn exchange_http2(
        &self,
        mut sender: http2::SendRequest<Full<Bytes>>,
        request: &Request,
    ) -> Result<(response::Parts, Incoming), SendError> {
        let broken = |e: hyper::Error| SendError::Broken(io::Error::other(e));
        let uri = Uri::builder()
            .scheme("https")
            .authority(self.authority.as_str())
            .path_and_query(request.target.as_str())
            .build()
            .map_err(|e| SendError::Broken(io::Error::other(e)))?;
        let mut message = http::Request::new(Full::new(request.body.clone()));
        *message.method_mut() = request.method.clone();
        *message.uri_mut() = uri;
        message
            .headers_mut()
            .extend(request.headers.iter().cloned().map(|(name, value)| (Some(name), value)));
        // It has ended: nothing of this was sent.
        sender.ready().await.map_err(|e| SendError::Broken(http1::never_read(e)))?;
        let (parts, body) = sender.send_request(message).await.map_err(broken)?.into_parts();
        Ok((parts, Incoming { source: Source::Http2(body), read: None }))
    }

    async fn connect(&self, started: Stopwatch) -> Result<Connected, SendError> {
        let connect = self.settings.timeouts.connect;
        let (within, out_of_time) = self.bound(started, connect, SendError::ConnectTimeout);
        timeout(within, self.connect_unbounded()).await.unwrap_or(Err(out_of_time))
    }

    async fn connect_unbounded(&self) -> Result<Connected, SendError> {
        let tcp = TcpStream::connect((self.host.as_str(), self.port))
            .await
            .map_err(|e| SendError::Unreachable("no connection to its address", e))?;
        tcp.set_nodelay(true).map_err(|e| SendError::Unreachable("its connection broke", e))?;
        let Some(tls) = &self.tls else { return Ok(Connected::Http1(Box::new(tcp))) };
        let stream =
            tls.connect(tcp).await.map_err(|e| SendError::Unreachable("the TLS handshake failed", e))?;
        if stream.get_ref().1.alpn_protocol() != Some(b"h2") {
            return Ok(Connected::Http1(Box::new(stream)));
        }
        let failed =
            |e: hyper::Error| SendError::Unreachable("the HTTP/2 handshake failed", io::Error::other(e));
        let (sender, connection) = http2::Builder::new(TokioExecutor::new())
            .timer(hyper_util::rt::TokioTimer::new())
            .keep_alive_interval(Duration::from_secs(20))
            .adaptive_window(true)
            .handshake(TokioIo::new(stream))
            .await
            .map_err(failed)?;
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "an HTTP/2 connection to an upstream has ended");
            }
        });
        *self.http2.lock().unwrap_or_else(PoisonError::into_inner) = Some(sender.clone());
        Ok(Connected::Http2(sender))
    }
}

enum Connected {
    Http1(Box<dyn Socket>),
    Http2(http2::SendRequest<Full<Bytes>>),
}

impl Incoming {
    /// The same, of which so much has been read, and perhaps how that ended: both are handed out first.
    #[must_use]
    pub fn with_read(self, data: Bytes, broke_off: Option<io::Error>) -> Self {
        Self { read: Some(Box::new(Read { data, broke_off })), ..self }
    }

    /// The next bytes of the body; `None` at its end. An error says that it broke off.
    pub fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Option<io::Result<Bytes>>> {
        if let Some(read) = &mut self.read {
            if !read.data.is_empty() {
                return Poll::Ready(Some(Ok(std::mem::take(&mut read.data))));
            }
            if let Some(error) = read.broke_off.take() {
                return Poll::Ready(Some(Err(error)));
            }
            self.read = None;
        }
        match &mut self.source {
            Source::Http1(body) => body.poll_data(cx),
            Source::Http2(body) => loop {
                match ready!(Pin::new(&mut *body).poll_frame(cx)) {
                    // Trailers say nothing that is counted or passed on.
                    Some(Ok(frame)) => {
                        if let Ok(data) = frame.into_data() {
                            return Poll::Ready(Some(Ok(data)));
                        }
                    }
                    Some(Err(e)) => return Poll::Ready(Some(Err(io::Error::other(e)))),
                    None => return Poll::Ready(None),
                }
            },
        }
    }

    /// Whether every byte has been handed out, as far as is known without reading on.
    pub fn is_end(&self) -> bool {
        if self.read.as_ref().is_some_and(|read| !read.data.is_empty() || read.broke_off.is_some()) {
            return false;
        }
        match &self.source {
            Source::Http1(body) => body.is_end(),
            Source::Http2(body) => body.is_end_stream(),
        }
    }
}
