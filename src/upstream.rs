//! One upstream: its connections and the exchange of one request.
//!
//! HTTP/2 is used where the upstream offers it by ALPN, otherwise HTTP/1.1. Redirects are not followed, nothing
//! is decompressed, and no proxy is taken from the environment variables.

mod answer;
pub(crate) mod availability;
mod connect;
mod connections;
mod diagnosis;
mod http1;
mod http2;
mod key_mask;
mod request;
mod tls;

use crate::clock::Stopwatch;
use crate::config;
use http::response;
use http1::Http1Connection;
use http2::{Http2Client, Http2Stream, Http2Timeouts};
use std::io::{self, ErrorKind};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::timeout_at;
use tokio_rustls::rustls::ClientConfig;

pub use answer::Incoming;
pub use connections::ConnectionCounts;
pub(crate) use diagnosis::{DiagnosisStep, StepFault};
#[cfg(feature = "fuzz")]
pub use http1::{ReadAnswer, read_answer};
pub use key_mask::KeyMask;
pub use request::{ExchangeError, Request, SendError};
use tls::TlsClient;
pub use tls::client_config;

/// Shorter than the usual keep-alive times of servers, which are 60 to 75 s.
const IDLE_TIMEOUT: Duration = Duration::from_secs(50);
/// A request that is sent on an HTTP/2 connection whose peer is gone waits at most 15 s before it is retried.
const HTTP2_TIMEOUTS: Http2Timeouts = Http2Timeouts {
    ping_interval: Duration::from_secs(10),
    ping_timeout: Duration::from_secs(5),
    idle: IDLE_TIMEOUT,
};

/// One upstream, as one worker uses it. Each worker has its own connections, so cores share no lock.
pub struct Upstream {
    settings: Arc<config::UpstreamSettings>,
    host: String,
    port: u16,
    /// The `host` header.
    authority: String,
    tls: Option<TlsClient>,
    http1: http1::IdlePool,
    http2: Http2Client,
    connections: Arc<ConnectionCounts>,
}

/// A connection over which a request can be sent.
enum Connected {
    Http1(Http1Connection),
    Http2(Http2Stream),
}

impl Upstream {
    /// Connects only with the first request. `connections` counts the open connections.
    ///
    /// # Errors
    /// The host cannot be a TLS server's name.
    pub fn new(
        settings: Arc<config::UpstreamSettings>,
        tls: &Arc<ClientConfig>,
        connections: Arc<ConnectionCounts>,
    ) -> anyhow::Result<Self> {
        let uri = &settings.base_url;
        let host = uri.host().unwrap_or_default().trim_matches(['[', ']']).to_owned();
        let is_tls = uri.scheme_str() == Some("https");
        let port = uri.port_u16().unwrap_or(if is_tls { 443 } else { 80 });
        let authority = uri.authority().map(ToString::to_string).unwrap_or_default();
        let tls = if is_tls { Some(TlsClient::new(tls.clone(), &host)?) } else { None };
        Ok(Self {
            settings,
            host,
            port,
            authority,
            tls,
            http1: http1::IdlePool::new(IDLE_TIMEOUT),
            http2: Http2Client::new(HTTP2_TIMEOUTS, connections.clone()),
            connections,
        })
    }

    /// The settings that it was created with.
    pub fn settings(&self) -> &config::UpstreamSettings {
        &self.settings
    }

    /// Sends a request and waits for the head of its answer.
    ///
    /// A request is retried once, on a new connection, if it is lost on a reused connection, or if the upstream has
    /// certainly not processed it. It is never retried after a byte of its answer has arrived.
    ///
    /// `observe_sent` is called with `true` before the first byte is written, and with `false` if the request
    /// turns out not to have been processed, or is about to be retried.
    ///
    /// # Errors
    /// See [`SendError`].
    pub async fn send(
        &self,
        request: &Request,
        started: Stopwatch,
        observe_sent: &mut (dyn FnMut(bool) + Send),
    ) -> Result<(response::Parts, Incoming), SendError> {
        let mut may_retry = true;
        if let Some(reused) = self.reuse() {
            observe_sent(true);
            match self.exchange(reused, request, started).await {
                Err(SendError::Broken(error)) if error.is_retriable_if_reused() => self.log_retry(&error),
                done => return done,
            }
            observe_sent(false);
            may_retry = false;
        }
        loop {
            // Boxed because connecting is rare and its state is large: every request's future would have room for it.
            let connected = Box::pin(self.connect(started)).await?;
            observe_sent(true);
            match Box::pin(self.exchange(connected, request, started)).await {
                Err(SendError::Broken(error)) if error.is_not_processed() => {
                    observe_sent(false);
                    if !std::mem::take(&mut may_retry) {
                        return Err(SendError::Broken(error));
                    }
                    self.log_retry(&error);
                }
                done => return done,
            }
        }
    }

    fn log_retry(&self, error: &ExchangeError) {
        tracing::debug!(%error, upstream = self.settings.name, "a request is retried on a new connection");
    }

    /// A connection that is open already.
    fn reuse(&self) -> Option<Connected> {
        self.http1.take().map(Connected::Http1).or_else(|| self.http2.reuse().map(Connected::Http2))
    }

    /// One attempt on one connection. Its time is bounded by `timeouts.first_byte` and `timeouts.total`.
    async fn exchange(
        &self,
        connected: Connected,
        request: &Request,
        started: Stopwatch,
    ) -> Result<(response::Parts, Incoming), SendError> {
        let (now, first_byte) = (Stopwatch::start(), self.settings.timeouts.first_byte);
        let (limit, out_of_time) =
            self.bound((started, now), first_byte, SendError::Timeout("first_byte", first_byte));
        let exchange = async {
            match connected {
                Connected::Http1(connection) => {
                    http1::exchange(connection, &self.authority, request, &self.http1)
                        .await
                        .map(|(parts, body)| (parts, Incoming::from(body)))
                }
                // Boxed because hyper's state is large.
                Connected::Http2(stream) => Box::pin(stream.exchange(&self.authority, request))
                    .await
                    .map(|(parts, body)| (parts, Incoming::from(body))),
            }
        };
        timeout_at(now.deadline(limit), exchange).await.map_err(|_| out_of_time)?.map_err(SendError::Broken)
    }

    /// The time limit of a step that begins `now`, shortened to the rest of `timeouts.total`, and the error when it
    /// elapses.
    fn bound(
        &self,
        (started, now): (Stopwatch, Stopwatch),
        step: Duration,
        error: SendError,
    ) -> (Duration, SendError) {
        let total = self.settings.timeouts.total;
        let left = total.saturating_sub(now.since(started));
        if left < step { (left, SendError::Timeout("total", total)) } else { (step, error) }
    }

    /// Opens a new connection. If the upstream refuses it, or closes it during the handshake, opens one more.
    async fn connect(&self, started: Stopwatch) -> Result<Connected, SendError> {
        let (now, connect) = (Stopwatch::start(), self.settings.timeouts.connect);
        let (limit, out_of_time) = self.bound((started, now), connect, SendError::ConnectTimeout);
        let attempts = async {
            match self.connect_once().await {
                Err(SendError::Unreachable(_, error)) if is_disconnect(&error) => self.connect_once().await,
                done => done,
            }
        };
        timeout_at(now.deadline(limit), attempts).await.unwrap_or(Err(out_of_time))
    }

    async fn connect_once(&self) -> Result<Connected, SendError> {
        let tcp = connect::connect(&self.host, self.port)
            .await
            .map_err(|e| SendError::Unreachable("no connection to its address", e))?;
        let http1 = |stream| Connected::Http1(Http1Connection::new(stream).counted(&self.connections));
        let Some(tls) = &self.tls else { return Ok(http1(Box::new(tcp))) };
        let stream =
            tls.connect(tcp).await.map_err(|e| SendError::Unreachable("the TLS handshake failed", e))?;
        if stream.get_ref().1.alpn_protocol() != Some(b"h2") {
            return Ok(http1(Box::new(stream)));
        }
        let failed =
            |e: hyper::Error| SendError::Unreachable("the HTTP/2 handshake failed", io::Error::other(e));
        self.http2.open(stream).await.map(Connected::Http2).map_err(failed)
    }
}

/// Whether a connection was refused, closed or reset.
fn is_disconnect(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::ConnectionRefused
            | ErrorKind::ConnectionReset
            | ErrorKind::ConnectionAborted
            | ErrorKind::BrokenPipe
            | ErrorKind::UnexpectedEof
    )
}
