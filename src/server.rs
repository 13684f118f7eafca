//! The accept loop: accepts connections, serves their requests, and drains on shutdown.
//!
//! The gateway has its own accept loop for two reasons: it must detect slow and disconnected callers, and it must
//! complete answers in flight at a shutdown.

mod acceptor;
mod certificate;
mod checked;
mod connection;
mod head_lines;
mod hosts;
mod http1;
mod http2;
mod limits;
mod listener;
mod malformed;
mod not_after;
mod peer;
mod request_check;
mod served;
mod socket;
mod transport;

use crate::clock::Stopwatch;
use acceptor::Acceptor;
use http::{Request, Response};
use http1::CutOff;
use hyper::body::{Body, Incoming};
use hyper::service::Service;
use rustix::net::{AddressFamily, SocketType, sockopt};
use std::error::Error;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::task::yield_now;
use tokio::time::{Instant, timeout, timeout_at};

pub(crate) use certificate::{Certificate, load as load_certificate};
pub(crate) use hosts::check_hosts;
pub(crate) use limits::{ConnectionBounds, network_of};
pub(crate) use listener::{Listener, Protocols};
pub use peer::CallerTimeouts;
pub(crate) use peer::Peer;
use request_check::is_host;
#[cfg(feature = "fuzz")]
pub(crate) use request_check::{Refused, RequestCheck};

/// Maximum size of a request head, and maximum bytes of a body that hyper reads ahead.
const MAX_HEAD_BYTES: usize = 64 * 1024;
/// While the server drains, callers have this long to complete a request that they have begun to send.
const MAX_DRAIN_RECEIVE: Duration = Duration::from_millis(400);
/// If the server begins to drain, a caller has this long after it has connected to send its first request.
const MAX_DRAIN_FIRST_REQUEST: Duration = Duration::from_millis(400);
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

impl DrainTimes {
    /// The time at which a connection is closed that has no request.
    fn first_request_end(self, opened: Stopwatch) -> Instant {
        opened.deadline(self.answers.min(MAX_DRAIN_FIRST_REQUEST))
    }
}

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

/// Serves the connections of a socket until `state` is `Draining` or `Stopped`. Returns when the last connection has ended or
/// the drain times have elapsed, with the number of requests that did not end in time. If it no longer accepts connections, it
/// also returns when the last one has ended.
pub(crate) async fn serve<S, B>(
    socket: std::net::TcpListener,
    listener: Arc<Listener>,
    service_for: impl Fn(Arc<Peer>) -> S + Send + Sync + 'static,
    mut state: watch::Receiver<RunState>,
) -> io::Result<usize>
where
    S: Service<Request<Incoming>, Response = Response<B>> + Send + 'static,
    S::Future: Send + 'static,
    S::Error: Into<Box<dyn Error + Send + Sync>>,
    B: Body<Data = bytes::Bytes> + Send + Unpin + 'static,
    B::Error: Into<Box<dyn Error + Send + Sync>>,
{
    let acceptor = Acceptor {
        listener: TcpListener::from_std(socket)?,
        limits: &listener.limits,
        failed: &listener.failed,
        crowded: &listener.crowded,
    };
    let service_for = Arc::new(service_for);
    // Every connection holds a sender: the channel closes with the last connection.
    let (alive, mut cut_offs) = mpsc::unbounded_channel();
    let closes = Arc::new(AtomicBool::new(false));
    drop(state.wait_for(|state| *state != RunState::Waiting).await);
    let states = state.clone();
    let context = |address, slot| connection::Context {
        address,
        opened: Stopwatch::start(),
        listener: listener.clone(),
        closes: closes.clone(),
        state: states.clone(),
        cut_offs: alive.clone(),
        slot,
    };
    loop {
        tokio::select! {
            biased;
            () = accept_ended(&mut state, &closes) => break,
            (stream, address, slot) = acceptor.next() => {
                tokio::spawn(connection::serve(stream, context(address, slot), service_for.clone()));
            }
        }
    }
    // Closing the socket resets the connections in its queue.
    let max_queued = if listener.empties_queue && drain_times(&state).is_some() { LISTEN_BACKLOG } else { 0 };
    for _ in 0..max_queued {
        tokio::select! {
            biased;
            (stream, address, slot) = acceptor.next() => {
                tokio::spawn(connection::serve(stream, context(address, slot), service_for.clone()));
            }
            () = yield_now() => break,
        }
    }
    drop(acceptor);
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

/// Returns when the server must stop or drain, and a connection that was opened then and has no request must be closed.
async fn stopping_unused(state: &mut watch::Receiver<RunState>, opened: Stopwatch) {
    stopping(state).await;
    if let Some(times) = drain_times(state) {
        drop(timeout_at(times.first_request_end(opened), stopped(state)).await);
    }
}

/// `None`: the server does not drain, but stops at once.
fn drain_times(state: &watch::Receiver<RunState>) -> Option<DrainTimes> {
    match *state.borrow() {
        RunState::Draining(times) => Some(times),
        RunState::Waiting | RunState::Running | RunState::Closing { .. } | RunState::Stopped => None,
    }
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
