//! Connections with HTTP/1.1.

use super::peer::Peer;
use super::served;
use super::socket::{CallerSocket, SocketHandle};
use super::transport::Transport;
use super::{DrainRules, RunState, drain_rules, stopping};
use crate::clock::Stopwatch;
use bytes::BytesMut;
use http::{Request, Response};
use hyper::body::{Body, Incoming};
use hyper::server::conn::http1::{self, Connection};
use hyper::service::Service;
use hyper_util::rt::TokioIo;
use std::error::Error;
use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use tokio::sync::{mpsc, watch};
use tokio::time::{timeout, timeout_at};

/// Reports that a request did not end within the drain time.
pub(super) struct CutOff;

/// Serves a connection to its end. `read_ahead`: bytes that were read already.
pub(super) async fn serve<T, S, B>(
    transport: T,
    read_ahead: BytesMut,
    peer: Arc<Peer>,
    service: S,
    mut state: watch::Receiver<RunState>,
    cut_offs: mpsc::UnboundedSender<CutOff>,
) where
    T: Transport,
    S: Service<Request<Incoming>, Response = Response<B>> + Send + 'static,
    S::Future: Send + 'static,
    S::Error: Into<Box<dyn Error + Send + Sync>>,
    B: Body<Data = bytes::Bytes> + Send + Unpin + 'static,
    B::Error: Into<Box<dyn Error + Send + Sync>>,
{
    let service = served::marking(service, peer.clone());
    let socket = CallerSocket::new(transport, read_ahead, peer.clone());
    let connection = http1::Builder::new()
        // `CallerSocket` detects both: a head that does not arrive in time, and a caller that has disconnected.
        .header_read_timeout(None)
        .half_close(true)
        .max_buf_size(super::MAX_HEAD_BYTES)
        .max_header_size(super::MAX_HEAD_BYTES)
        .serve_connection(TokioIo::new(SocketHandle(&socket)), service);
    {
        let mut connection = pin!(connection);
        let result = tokio::select! {
            result = until_disconnected(connection.as_mut(), &socket) => result,
            () = stopping(&mut state) => match drain_rules(&state) {
                Some(rules) => {
                    let shut_down = |connection: Pin<&mut Connection<_, _>>| connection.graceful_shutdown();
                    drain(connection.as_mut(), shut_down, &socket, &peer, rules, &cut_offs).await
                }
                None => None,
            }
        };
        match result {
            Some(Err(error)) => {
                let cause = error.source().map(tracing::field::display);
                tracing::debug!(address = %peer.address, %error, cause, "a connection failed");
            }
            None => tracing::debug!("a connection was closed, or its caller disconnected"),
            Some(Ok(())) => {}
        }
    }
    socket.close();
}

/// Serves a connection to its end while the server drains. `None`: the caller disconnected, or the connection is to be
/// closed.
async fn drain<F: Future>(
    mut connection: Pin<&mut F>,
    shut_down: impl FnOnce(Pin<&mut F>),
    socket: &CallerSocket<impl Transport>,
    peer: &Peer,
    rules: DrainRules,
    cut_offs: &mpsc::UnboundedSender<CutOff>,
) -> Option<F::Output> {
    peer.begin_drain();
    let DrainRules { answers, endings, .. } = rules;
    let answers_end = Stopwatch::start().deadline(answers);
    let used = until_used(connection.as_mut(), socket);
    if let Ok(Some(ended)) = timeout_at(rules.first_request_end(peer.opened), used).await {
        return ended;
    }
    shut_down(connection.as_mut());
    // A request that is not complete must not prolong the shutdown.
    let receive_end = answers_end.min(Stopwatch::start().deadline(super::MAX_DRAIN_RECEIVE));
    if let Ok(ended) = timeout_at(receive_end, until_disconnected(connection.as_mut(), socket)).await {
        return ended;
    }
    if peer.is_between_requests() {
        return None;
    }
    if !peer.is_receiving() {
        if let Ok(ended) = timeout_at(answers_end, until_disconnected(connection.as_mut(), socket)).await {
            return ended;
        }
        // An error means that the server no longer counts.
        drop(cut_offs.send(CutOff));
    }
    peer.end_request();
    let ended = timeout(endings, until_disconnected(connection, socket)).await;
    ended.unwrap_or_else(|_| {
        peer.cut_answer();
        None
    })
}

/// Serves a connection to its end. `None`: the caller disconnected before the end, or its next request is late.
async fn until_disconnected<F: Future>(
    mut connection: Pin<&mut F>,
    socket: &CallerSocket<impl Transport>,
) -> Option<F::Output> {
    poll_fn(|cx| poll_disconnected(connection.as_mut(), socket, cx)).await
}

/// Serves a connection until hyper has received bytes. At a graceful shutdown hyper closes a connection from which it has read
/// nothing, even if a request is on its way. `Some`: the connection has ended.
async fn until_used<F: Future>(
    mut connection: Pin<&mut F>,
    socket: &CallerSocket<impl Transport>,
) -> Option<Option<F::Output>> {
    poll_fn(|cx| match poll_disconnected(connection.as_mut(), socket, cx) {
        Poll::Ready(ended) => Poll::Ready(Some(ended)),
        Poll::Pending if socket.is_used() => Poll::Ready(None),
        Poll::Pending => Poll::Pending,
    })
    .await
}

fn poll_disconnected<F: Future>(
    connection: Pin<&mut F>,
    socket: &CallerSocket<impl Transport>,
    cx: &mut Context<'_>,
) -> Poll<Option<F::Output>> {
    match connection.poll(cx) {
        Poll::Ready(done) => Poll::Ready(Some(done)),
        Poll::Pending => socket.poll_abandoned(cx).map(|()| None),
    }
}
