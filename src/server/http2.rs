//! Connections with HTTP/2.
//!
//! hyper serves each stream in a task of its own. Each stream has a [`Peer`], as a connection with HTTP/1.1 has one, so the
//! service does not depend on the version.

mod frames;
mod socket;
mod streams;

use super::http1::CutOff;
use super::peer::{CallerTimeouts, Peer};
use super::served;
use super::transport::Transport;
use super::{DrainRules, RunState, drain_rules, stopping};
use crate::clock::Stopwatch;
use bytes::BytesMut;
use futures_util::FutureExt as _;
use http::header::{HOST, HeaderValue};
use http::{Method, Request, Response};
use hyper::body::{Body, Incoming};
use hyper::server::conn::http2;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use std::error::Error;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;
use streams::{StreamBody, StreamExecutor, Streams};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, timeout, timeout_at};

pub(super) use frames::PREFACE;

/// Streams that a caller may have open in one connection.
const MAX_STREAMS: u32 = 100;
/// The h2 library refuses requests with larger headers, with a 431 without a body. From `MAX_HEAD_BYTES` on the gateway refuses
/// them, with a body that the caller's SDK can parse.
const MAX_READ_HEADER_BYTES: u32 = 96 * 1024;
/// Bytes of a request's body that a caller may send before the gateway reads them.
const STREAM_WINDOW: u32 = 128 * 1024;
/// The same for all streams of a connection.
const CONNECTION_WINDOW: u32 = 256 * 1024;
/// Bytes of an answer that wait in the h2 library until the caller takes them.
const MAX_SEND_BUFFER: usize = 64 * 1024;
/// Streams that a caller has reset before the gateway has accepted them.
const MAX_RESETS_BEFORE_ACCEPT: usize = 20;
/// Streams with a fault of the caller. The connection ends with the next one.
const MAX_FAULTY_STREAMS: usize = 100;
/// The gateway sends a ping this often, to detect a caller that has vanished.
const PING_INTERVAL: Duration = Duration::from_secs(30);
/// The caller has this long to answer a ping.
const PING_TIMEOUT: Duration = Duration::from_secs(30);
/// A connection that never had a stream has this long to end after its idle timeout.
const UNUSED_END: Duration = Duration::from_secs(1);

/// Serves a connection to its end. `read_ahead`: bytes that were read already.
pub(super) async fn serve<T, S, B>(
    transport: T,
    read_ahead: BytesMut,
    (address, opened, timeouts): (SocketAddr, Stopwatch, CallerTimeouts),
    service_for: Arc<impl Fn(Arc<Peer>) -> S + Send + Sync + 'static>,
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
    let streams = Arc::new(Streams::default());
    let announced = streams.clone();
    let service = service_fn(move |request: Request<Incoming>| {
        let peer = Arc::new(Peer::new(address, timeouts));
        let stream = announced.announce(&peer);
        let service = served::marking(service_for(peer.clone()), peer);
        let is_for_head = request.method() == Method::HEAD;
        let with_stream = move |inner| StreamBody { inner, stream, is_for_head };
        service.call(with_host(request)).map(move |answer| answer.map(|answer| answer.map(with_stream)))
    });
    let socket = socket::Http2Socket::new(transport, read_ahead, address.ip(), timeouts.write);
    let connection = builder(&streams).serve_connection(TokioIo::new(socket), service);
    let mut connection = pin!(connection);
    let mut watched = state.clone();
    let mut is_closing = false;
    let result = loop {
        // A caller that ignores `GOAWAY` must not keep the connection open.
        let idle_timeout = if !is_closing {
            timeouts.head
        } else if streams.started() == 0 {
            UNUSED_END.min(timeouts.head)
        } else {
            timeouts.write
        };
        tokio::select! {
            result = connection.as_mut() => break Some(result),
            () = stopping(&mut state) => {
                let Some(rules) = drain_rules(&state) else { break None };
                let began = Stopwatch::start();
                let first_request_end = rules.first_request_end(opened);
                if let Some(result) = until_used(connection.as_mut(), &streams, first_request_end).await {
                    break Some(result);
                }
                connection.as_mut().graceful_shutdown();
                break drain(connection.as_mut(), &streams, (rules, began), &cut_offs).await;
            }
            () = must_close(&mut watched, &streams, opened), if !is_closing => {}
            () = streams.idle_for(idle_timeout) => {
                if is_closing {
                    break None;
                }
            }
        }
        is_closing = true;
        connection.as_mut().graceful_shutdown();
    };
    match result {
        Some(Err(error)) => {
            let cause = error.source().map(tracing::field::display);
            tracing::debug!(%address, %error, cause, "a connection failed");
        }
        Some(Ok(())) => {}
        None => tracing::debug!("a connection was closed"),
    }
}

fn builder(streams: &Arc<Streams>) -> http2::Builder<StreamExecutor> {
    let mut builder = http2::Builder::new(StreamExecutor(streams.clone()));
    builder
        .timer(TokioTimer::new())
        .max_concurrent_streams(MAX_STREAMS)
        .max_header_list_size(MAX_READ_HEADER_BYTES)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_send_buf_size(MAX_SEND_BUFFER)
        .max_pending_accept_reset_streams(MAX_RESETS_BEFORE_ACCEPT)
        .max_local_error_reset_streams(MAX_FAULTY_STREAMS)
        .keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_TIMEOUT);
    builder
}

/// A request with the header `Host`, as HTTP/1.1 has it. In HTTP/2 the host is `:authority`.
fn with_host(mut request: Request<Incoming>) -> Request<Incoming> {
    if !request.headers().contains_key(HOST)
        && let Some(authority) = request.uri().authority()
        && let Ok(host) = HeaderValue::from_str(authority.as_str())
    {
        request.headers_mut().insert(HOST, host);
    }
    request
}

/// Returns when the connection must take no further streams, because the server closes its connections. If the server still
/// accepts connections, each of them may have one stream. If it does not, a
/// connection younger than `MAX_DRAIN_FIRST_REQUEST` may still begin its first stream.
async fn must_close(state: &mut watch::Receiver<RunState>, streams: &Streams, opened: Stopwatch) {
    let is_closing = |state: &RunState| matches!(state, RunState::Closing { .. });
    let accepts = state.wait_for(is_closing).await.map(|state| *state == RunState::Closing { accepts: true });
    if accepts.unwrap_or(false) {
        streams.first().await;
    } else {
        drop(timeout_at(opened.deadline(super::MAX_DRAIN_FIRST_REQUEST), streams.first()).await);
    }
}

/// Serves a connection until it has a stream or this time has come: after a GOAWAY the caller's first request would fail.
/// `Some`: the connection has ended.
async fn until_used<F: Future>(
    connection: Pin<&mut F>,
    streams: &Streams,
    end: Instant,
) -> Option<F::Output> {
    let used = timeout_at(end, streams.first());
    tokio::select! {
        ended = connection => Some(ended),
        _ = used => None,
    }
}

/// Serves a connection to its end while the server drains: it has announced that it takes no further streams. `None`: it
/// is to be closed.
async fn drain<F: Future>(
    mut connection: Pin<&mut F>,
    streams: &Streams,
    (DrainRules { answers, endings, .. }, began): (DrainRules, Stopwatch),
    cut_offs: &mpsc::UnboundedSender<CutOff>,
) -> Option<F::Output> {
    let answers_end = began.deadline(answers);
    // A request that is not complete must not prolong the shutdown.
    let receive_end = answers_end.min(Stopwatch::start().deadline(super::MAX_DRAIN_RECEIVE));
    if let Ok(ended) = timeout_at(receive_end, connection.as_mut()).await {
        return Some(ended);
    }
    let open = streams.open();
    if open.is_empty() {
        return None;
    }
    open.iter().filter(|stream| stream.is_receiving()).for_each(|stream| stream.end_request());
    if let Ok(ended) = timeout_at(answers_end, connection.as_mut()).await {
        return Some(ended);
    }
    for stream in streams.open() {
        if !stream.is_cut_off() {
            // An error means that the server no longer counts.
            drop(cut_offs.send(CutOff));
        }
        stream.end_request();
    }
    timeout(endings, connection).await.ok()
}
