//! One replica of an upstream, as one worker uses it: its address and its connections.

use super::connections::ConnectionCounts;
use super::http1::{self, Http1Connection};
use super::http2::{Http2Client, Http2Stream};
use super::replica_status::ReplicaStatus;
use super::tls::TlsClient;
use super::{ExchangeError, HTTP2_TIMEOUTS, IDLE_TIMEOUT, Incoming, Request, SendError, connect};
use crate::clock::Stopwatch;
use http::response;
use std::io;
use std::sync::Arc;
use tokio::time::{Instant, timeout_at};
use tokio_rustls::rustls::ClientConfig;

/// One replica. Each worker has its own connections, so cores share no lock.
pub(super) struct Replica {
    pub(super) host: String,
    pub(super) port: u16,
    /// The `host` header.
    authority: String,
    pub(super) tls: Option<TlsClient>,
    http1: http1::IdlePool,
    pub(super) http2: Http2Client,
    connections: Arc<ConnectionCounts>,
    pub(super) status: Arc<ReplicaStatus>,
}

/// A connection over which a request can be sent.
pub(super) enum Connected {
    Http1(Http1Connection),
    Http2(Http2Stream),
}

impl Replica {
    /// Connects only with the first request. `connections` counts the open connections.
    pub(super) fn new(
        status: Arc<ReplicaStatus>,
        tls: &Arc<ClientConfig>,
        connections: Arc<ConnectionCounts>,
    ) -> anyhow::Result<Self> {
        let uri = status.url();
        let host = uri.host().unwrap_or_default().trim_matches(['[', ']']).to_owned();
        let is_tls = uri.scheme_str() == Some("https");
        let port = uri.port_u16().unwrap_or(if is_tls { 443 } else { 80 });
        let authority = uri.authority().map(ToString::to_string).unwrap_or_default();
        let tls = if is_tls { Some(TlsClient::new(tls.clone(), &host)?) } else { None };
        let http1 = http1::IdlePool::new(IDLE_TIMEOUT);
        let http2 = Http2Client::new(HTTP2_TIMEOUTS, connections.clone());
        Ok(Self { host, port, authority, tls, http1, http2, connections, status })
    }

    /// A connection that is open already.
    pub(super) fn reuse(&self, now: Stopwatch) -> Option<Connected> {
        self.http1.take(now).map(Connected::Http1).or_else(|| self.http2.reuse().map(Connected::Http2))
    }

    /// Opens a new connection. The caller bounds the time.
    pub(super) async fn connect(&self) -> Result<Connected, SendError> {
        let addresses = connect::resolve(&self.host, self.port)
            .await
            .map_err(|e| SendError::Unreachable("its host name could not be resolved (DNS)", e))?;
        let tcp = connect::connect_to(addresses)
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

    /// Sends a request on a connection and waits for the head of its answer, which must be complete at `due`.
    pub(super) async fn exchange(
        &self,
        connected: Connected,
        request: &Request,
        due: Instant,
    ) -> Result<(response::Parts, Incoming), ExchangeError> {
        match connected {
            Connected::Http1(connection) => {
                http1::exchange(connection, &self.authority, request, due, &self.http1)
                    .await
                    .map(|(parts, body)| (parts, Incoming::from(body)))
            }
            // Boxed because hyper's state is large.
            Connected::Http2(stream) => timeout_at(due, Box::pin(stream.exchange(&self.authority, request)))
                .await
                .unwrap_or_else(|_| Err(ExchangeError::out_of_time()))
                .map(|(parts, body)| (parts, Incoming::from(body))),
        }
    }
}
