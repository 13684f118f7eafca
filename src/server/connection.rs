//! A new connection: its TLS handshake, and the choice between HTTP/1.1 and HTTP/2.

use super::certificate::{self, Certificate};
use super::http1::{self, CutOff};
use super::http2;
use super::limits::Slot;
use super::listener::{Listener, Protocols};
use super::peer::Peer;
use super::transport::Transport;
use super::{RunState, stopping_unused};
use crate::clock::Stopwatch;
use bytes::BytesMut;
use http::{Request, Response};
use hyper::body::{Body, Incoming};
use hyper::service::Service;
use std::error::Error;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpStream;
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

/// Bytes that are read at once to detect the protocol. Most requests fit.
const FIRST_READ_BYTES: usize = 8 * 1024;

/// What a connection needs besides its stream.
pub(super) struct Context {
    pub(super) address: SocketAddr,
    pub(super) opened: Stopwatch,
    pub(super) listener: Arc<Listener>,
    /// Whether the server closes each connection after its next answer.
    pub(super) closes: Arc<AtomicBool>,
    pub(super) state: watch::Receiver<RunState>,
    /// Also shows that the connection is open.
    pub(super) cut_offs: mpsc::UnboundedSender<CutOff>,
    /// Released when the connection ends.
    pub(super) slot: Slot,
}

/// Serves a connection to its end.
pub(super) async fn serve<S, B>(
    mut stream: TcpStream,
    mut context: Context,
    service_for: Arc<impl Fn(Arc<Peer>) -> S + Send + Sync + 'static>,
) where
    S: Service<Request<Incoming>, Response = Response<B>> + Send + 'static,
    S::Future: Send + 'static,
    S::Error: Into<Box<dyn Error + Send + Sync>>,
    B: Body<Data = bytes::Bytes> + Send + Unpin + 'static,
    B::Error: Into<Box<dyn Error + Send + Sync>>,
{
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "a connection failed when it was accepted");
        return;
    }
    let Protocols { certificate, http2, .. } = context.listener.protocols();
    // Boxed, so that the future of a connection with plain HTTP/1.1 does not contain the others.
    if let Some(certificate) = certificate {
        if let Some(stream) = Box::pin(handshake(stream, &certificate, &mut context)).await {
            let is_http2 = certificate::is_http2(stream.get_ref().1.alpn_protocol());
            Box::pin(serve_http(stream, BytesMut::new(), is_http2, context, service_for)).await;
        }
        return;
    }
    let mut read_ahead = BytesMut::new();
    if http2 {
        let detected = begins_with_preface(&mut stream, &mut read_ahead);
        let detected = tokio::select! {
            detected = timeout(context.listener.timeouts.head, detected) => detected,
            () = stopping_unused(&mut context.state, context.opened) => return,
        };
        match detected {
            Ok(Ok(false)) => {}
            Ok(Ok(true)) => {
                return Box::pin(serve_http(stream, read_ahead, true, context, service_for)).await;
            }
            Ok(Err(_)) | Err(_) => {
                tracing::debug!("a connection was closed before its first request");
                return;
            }
        }
    }
    serve_http(stream, read_ahead, false, context, service_for).await;
}

async fn serve_http<S, B>(
    transport: impl Transport,
    read_ahead: BytesMut,
    is_http2: bool,
    context: Context,
    service_for: Arc<impl Fn(Arc<Peer>) -> S + Send + Sync + 'static>,
) where
    S: Service<Request<Incoming>, Response = Response<B>> + Send + 'static,
    S::Future: Send + 'static,
    S::Error: Into<Box<dyn Error + Send + Sync>>,
    B: Body<Data = bytes::Bytes> + Send + Unpin + 'static,
    B::Error: Into<Box<dyn Error + Send + Sync>>,
{
    let Context { address, opened, listener, closes, state, cut_offs, slot } = context;
    if is_http2 {
        let caller = (address, opened, listener.timeouts);
        Box::pin(http2::serve(transport, read_ahead, caller, service_for, state, cut_offs)).await;
    } else {
        let requires_host = listener.protocols().requires_host;
        let peer = Peer::new(address, listener.timeouts)
            .opened_at(opened)
            .closed_by(closes)
            .requiring_host(requires_host);
        let peer = Arc::new(peer.with_head_lines());
        let service = service_for(peer.clone());
        http1::serve(transport, read_ahead, peer, service, state, cut_offs).await;
    }
    drop(slot);
}

/// `None`: the handshake failed, took too long, or the server stops.
async fn handshake(
    stream: TcpStream,
    certificate: &Certificate,
    context: &mut Context,
) -> Option<TlsStream<TcpStream>> {
    let Context { listener, opened, state, .. } = context;
    let handshake = async {
        // The semaphore is never closed.
        let _permit = listener.handshakes.acquire().await;
        TlsAcceptor::from(certificate.config.clone()).accept(stream).await
    };
    let done = tokio::select! {
        done = timeout(listener.timeouts.head, handshake) => done,
        () = stopping_unused(state, *opened) => return None,
    };
    match done {
        Ok(Ok(stream)) => Some(stream),
        Ok(Err(error)) => {
            tracing::debug!(%error, address = %context.address, "a TLS handshake failed");
            None
        }
        Err(_) => {
            tracing::debug!(address = %context.address, "a TLS handshake took too long");
            None
        }
    }
}

/// Reads bytes until they are the preface of HTTP/2 or differ from it.
async fn begins_with_preface(stream: &mut TcpStream, read: &mut BytesMut) -> io::Result<bool> {
    read.reserve(FIRST_READ_BYTES);
    loop {
        let length = read.len().min(http2::PREFACE.len());
        if read[..length] != http2::PREFACE[..length] {
            return Ok(false);
        }
        if length == http2::PREFACE.len() {
            return Ok(true);
        }
        if stream.read_buf(read).await? == 0 {
            // The server of HTTP/1.1 detects the end again.
            return Ok(false);
        }
    }
}
