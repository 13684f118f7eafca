//! The accept loop: accepts connections, serves their requests, and drains on shutdown.
//!
//! The gateway has its own accept loop for two reasons: it must detect slow and disconnected callers, and it must
//! complete answers in flight at a shutdown.

mod malformed;
mod peer;
mod served;
mod socket;

use crate::clock::Stopwatch;
use http::{Request, Response};
use hyper::body::{Body, Incoming};
use hyper::server::conn::http1;
use hyper::service::Service;
use hyper_util::rt::{TokioIo, TokioTimer};
use rustix::net::{AddressFamily, SocketType, sockopt};
use socket::{CallerSocket, SocketHandle};
use std::error::Error;
use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::time::{sleep, timeout, timeout_at};

pub use peer::CallerTimeouts;
pub(crate) use peer::Peer;

/// Maximum size of a request head, and maximum bytes of a body that hyper reads ahead.
const MAX_HEAD_BYTES: usize = 64 * 1024;
/// The pause after an error of `accept`, such as when the process has no more file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// While the server drains, callers have this long to complete a request that they have begun to send.
const MAX_DRAIN_RECEIVE: Duration = Duration::from_millis(400);
/// The server waits this much longer than its connections, so that they end by themselves.
const DRAIN_MARGIN: Duration = Duration::from_millis(50);
/// Connections that the kernel completes before they are accepted.
const LISTEN_BACKLOG: i32 = 4_096;

/// The requested state of a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RunState {
    /// Accepts no connections yet.
    Waiting,
    /// Accepts and serves connections.
    Running,
    /// Serves requests, and closes each connection after its next answer. `accepts`: it also accepts connections.
    Closing {
        /// Whether the server accepts connections.
        accepts: bool,
    },
    /// Accepts no more connections, and gives answers in flight time to end.
    Draining(DrainTimes),
    /// Stops at once.
    Stopped,
}

/// The times within which a server drains.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DrainTimes {
    /// Answers may end within this time.
    pub(crate) answers: Duration,
    /// After that, callers have this time to read how their interrupted answers end.
    pub(crate) endings: Duration,
}

/// Reports that the request of a connection did not end within the drain time.
struct CutOff;

/// Opens sockets that listen at one address, one for each worker. The kernel distributes connections over them.
///
/// # Errors
/// The address is in use, or the process cannot listen at it.
pub(crate) fn listen(address: SocketAddr, sockets: usize) -> io::Result<Vec<std::net::TcpListener>> {
    // The first socket is bound without `SO_REUSEPORT`, so that a second gateway at this address fails. It shares the
    // address from then on, and stays open, so that no other process can bind it in between.
    let first = bind(address, false)?;
    let address = first.local_addr()?;
    sockopt::set_socket_reuseport(&first, true)?;
    let mut all = vec![first];
    for _ in 1..sockets {
        all.push(bind(address, true)?);
    }
    Ok(all)
}

fn bind(address: SocketAddr, is_shared: bool) -> io::Result<std::net::TcpListener> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = rustix::net::socket(family, SocketType::STREAM, None)?;
    rustix::io::fcntl_setfd(&socket, rustix::io::FdFlags::CLOEXEC)?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    if is_shared {
        sockopt::set_socket_reuseport(&socket, true)?;
    }
    rustix::net::bind(&socket, &address)?;
    rustix::net::listen(&socket, LISTEN_BACKLOG)?;
    let listener = std::net::TcpListener::from(socket);
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Serves connections until `state` is `Draining` or `Stopped`. Returns when the last connection has ended or the drain
/// times have elapsed, with the number of connections whose requests did not end in time. If it no longer accepts
/// connections, it also returns when the last one has ended.
pub(crate) async fn serve<S, B>(
    listener: std::net::TcpListener,
    service_for: impl Fn(Arc<Peer>) -> S,
    timeouts: CallerTimeouts,
    mut state: watch::Receiver<RunState>,
) -> io::Result<usize>
where
    S: Service<Request<Incoming>, Response = Response<B>> + Send + 'static,
    S::Future: Send + 'static,
    S::Error: Into<Box<dyn Error + Send + Sync>>,
    B: Body<Data = bytes::Bytes> + Send + Unpin + 'static,
    B::Error: Into<Box<dyn Error + Send + Sync>>,
{
    let listener = TcpListener::from_std(listener)?;
    // Every connection holds a sender: the channel closes with the last connection.
    let (alive, mut cut_offs) = mpsc::unbounded_channel();
    let closes = Arc::new(AtomicBool::new(false));
    drop(state.wait_for(|state| *state != RunState::Waiting).await);
    loop {
        tokio::select! {
            biased;
            () = accept_ended(&mut state, &closes) => break,
            accepted = listener.accept() => match accepted {
                Ok((stream, address)) => {
                    let peer = Arc::new(Peer::new(address, timeouts).closed_by(closes.clone()));
                    let service = service_for(peer.clone());
                    tokio::spawn(serve_connection(stream, peer, service, state.clone(), alive.clone()));
                }
                Err(error) => {
                    tracing::warn!(%error, "a connection could not be accepted");
                    sleep(ACCEPT_PAUSE).await;
                }
            },
        }
    }
    drop(listener);
    drop(alive);
    let mut cut_off = 0;
    tokio::select! {
        biased;
        () = stopping(&mut state) => {}
        () = count_cut_offs(&mut cut_offs, &mut cut_off) => return Ok(cut_off),
    }
    let Some(DrainTimes { answers, endings }) = drain_times(&state) else { return Ok(0) };
    let all_ended = count_cut_offs(&mut cut_offs, &mut cut_off);
    drop(timeout(answers + endings + DRAIN_MARGIN, all_ended).await);
    Ok(cut_off)
}

/// Counts cut off connections until the last connection has ended.
async fn count_cut_offs(cut_offs: &mut mpsc::UnboundedReceiver<CutOff>, count: &mut usize) {
    while let Some(CutOff) = cut_offs.recv().await {
        *count += 1;
    }
}

/// Returns when the server must not accept connections any more. Records whether connections close after their next answer.
/// Also returns when the sender was dropped.
async fn accept_ended(state: &mut watch::Receiver<RunState>, closes: &AtomicBool) {
    loop {
        let now = *state.borrow_and_update();
        closes.store(!matches!(now, RunState::Waiting | RunState::Running), Ordering::Relaxed);
        match now {
            RunState::Closing { accepts: false } | RunState::Draining(_) | RunState::Stopped => return,
            RunState::Waiting | RunState::Running | RunState::Closing { accepts: true } => {}
        }
        if state.changed().await.is_err() {
            return;
        }
    }
}

/// Returns when the server must stop at once. Also returns when the sender was dropped.
pub(crate) async fn stopped(state: &mut watch::Receiver<RunState>) {
    drop(state.wait_for(|state| *state == RunState::Stopped).await);
}

/// Returns when the server must drain or stop. Also returns when the sender was dropped.
async fn stopping(state: &mut watch::Receiver<RunState>) {
    let is_stopping = |state: &RunState| matches!(state, RunState::Draining(_) | RunState::Stopped);
    drop(state.wait_for(is_stopping).await);
}

/// `None`: the server does not drain, but stops at once.
fn drain_times(state: &watch::Receiver<RunState>) -> Option<DrainTimes> {
    match *state.borrow() {
        RunState::Draining(times) => Some(times),
        RunState::Waiting | RunState::Running | RunState::Closing { .. } | RunState::Stopped => None,
    }
}

async fn serve_connection<S, B>(
    stream: TcpStream,
    peer: Arc<Peer>,
    service: S,
    mut state: watch::Receiver<RunState>,
    alive: mpsc::UnboundedSender<CutOff>,
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
    let head_timeout = peer.timeouts.head;
    let service = served::marking(service, peer.clone());
    let socket = CallerSocket::new(stream, peer.clone());
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(head_timeout)
        .max_buf_size(MAX_HEAD_BYTES)
        .max_header_size(MAX_HEAD_BYTES)
        .serve_connection(TokioIo::new(SocketHandle(&socket)), service);
    {
        let mut connection = pin!(connection);
        let result = tokio::select! {
            result = until_disconnected(connection.as_mut(), &socket) => result,
            () = stopping(&mut state) => match drain_times(&state) {
                Some(times) => {
                    connection.as_mut().graceful_shutdown();
                    drain(connection.as_mut(), &socket, &peer, times, &alive).await
                }
                None => None,
            }
        };
        match result {
            Some(Err(error)) => tracing::debug!(%error, "a connection failed"),
            None => tracing::debug!("a connection was closed, or its caller disconnected"),
            Some(Ok(())) => {}
        }
    }
    socket.close();
    drop(alive);
}

/// Serves a connection to its end while the server drains. `None`: the caller disconnected, or the connection is to be
/// closed.
async fn drain<F: Future>(
    mut connection: Pin<&mut F>,
    socket: &CallerSocket,
    peer: &Peer,
    DrainTimes { answers, endings }: DrainTimes,
    cut_offs: &mpsc::UnboundedSender<CutOff>,
) -> Option<F::Output> {
    peer.begin_drain();
    let began = Stopwatch::start();
    // A request that is not complete must not prolong the shutdown.
    let receive_end = began.deadline(answers.min(MAX_DRAIN_RECEIVE));
    if let Ok(ended) = timeout_at(receive_end, until_disconnected(connection.as_mut(), socket)).await {
        return ended;
    }
    if peer.is_between_requests() {
        return None;
    }
    if !peer.is_receiving() {
        let answers_end = began.deadline(answers);
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

/// Serves a connection to its end. `None`: the caller disconnected before the end.
async fn until_disconnected<F: Future>(
    mut connection: Pin<&mut F>,
    socket: &CallerSocket,
) -> Option<F::Output> {
    poll_fn(|cx| match connection.as_mut().poll(cx) {
        Poll::Ready(done) => Poll::Ready(Some(done)),
        Poll::Pending => socket.poll_disconnected(cx).map(|()| None),
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;
    use std::net::{Ipv4Addr, TcpListener, TcpStream};

    const ANY: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

    fn ports(listeners: &[TcpListener]) -> BTreeSet<u16> {
        listeners.iter().map(|listener| listener.local_addr().unwrap().port()).collect()
    }

    #[test]
    fn the_sockets_of_one_address_share_its_connections() {
        let listeners = listen(ANY, 3).unwrap();
        assert_eq!(ports(&listeners).len(), 1);
        let address = listeners[0].local_addr().unwrap();
        let callers: Vec<_> = (0..120).map(|_| TcpStream::connect(address).unwrap()).collect();
        let accepted = listeners.iter().map(|listener| std::iter::from_fn(|| listener.accept().ok()).count());
        let accepted: Vec<_> = accepted.collect();
        assert_eq!(accepted.iter().sum::<usize>(), callers.len(), "{accepted:?}");
        assert!(accepted.iter().all(|&connections| connections > 0), "{accepted:?}");
    }

    #[test]
    fn a_second_gateway_at_an_address_fails_to_start() {
        for (sockets, others) in [(1, 1), (1, 2), (2, 1), (2, 2)] {
            let listeners = listen(ANY, sockets).unwrap();
            let error = listen(listeners[0].local_addr().unwrap(), others).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        }
    }
}
