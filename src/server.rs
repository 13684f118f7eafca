//! The accept loop: accepts connections, serves their requests, and drains on shutdown.
//!
//! The gateway has its own accept loop for two reasons: it must detect slow and disconnected callers, and it must
//! complete answers in flight at a shutdown.

mod acceptor;
mod certificate;
mod checked;
mod connection;
mod head_lines;
mod http1;
mod http2;
mod limits;
mod listener;
mod malformed;
mod not_after;
mod parsed_head;
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
use tokio::time::{Instant, timeout, timeout_at};

pub(crate) use certificate::{Certificate, PemFile, load as load_certificate};
pub(crate) use limits::{ConnectionBounds, network_of};
pub(crate) use listener::{Listener, Protocols};
pub(crate) use parsed_head::{HeadFault, ParsedHead};
pub use peer::CallerTimeouts;
pub(crate) use peer::Peer;
#[cfg(feature = "fuzz")]
pub(crate) use request_check::{Refused, RequestCheck};

/// Maximum size of a request head, and maximum bytes of a body that hyper reads ahead.
const MAX_HEAD_BYTES: usize = 64 * 1024;
/// While the server drains, callers have this long to complete a request that they have begun to send.
const MAX_DRAIN_RECEIVE: Duration = Duration::from_millis(400);
/// While the server drains, it closes a connection without a request when the connection is this old.
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
    Draining(DrainRules),
    /// Stops at once.
    Stopped,
}

impl RunState {
    /// Whether a server accepts connections in this state, or may later.
    fn may_accept(self) -> bool {
        match self {
            Self::Waiting | Self::Running | Self::Closing { accepts: true } => true,
            Self::Closing { accepts: false } | Self::Draining(_) | Self::Stopped => false,
        }
    }
}

/// How a server drains.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DrainRules {
    /// Answers may end within this time.
    pub(crate) answers: Duration,
    /// After that, callers have this time to read how their interrupted answers end.
    pub(crate) endings: Duration,
    /// Whether the connections that wait in the kernel's queue are accepted. `false`: another process can accept them, or
    /// nobody needs an answer.
    pub(crate) empties_queue: bool,
}

impl DrainRules {
    /// The time at which a connection without a request is closed.
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
        state: state.clone(),
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
    if drain_rules(&state).is_some_and(|rules| rules.empties_queue) {
        // Closing the socket would reset these connections.
        for _ in 0..LISTEN_BACKLOG {
            let Some((stream, address, slot)) = acceptor.next_queued().await else { break };
            tokio::spawn(connection::serve(stream, context(address, slot), service_for.clone()));
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
    let Some(DrainRules { answers, endings, .. }) = drain_rules(&state) else { return Ok(0) };
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
        if !now.may_accept() || state.changed().await.is_err() {
            return;
        }
    }
}

/// Returns when the server must stop at once. Also returns when the sender was dropped.
pub(crate) async fn stopped(state: &mut watch::Receiver<RunState>) {
    drop(state.wait_for(|state| *state == RunState::Stopped).await);
}

/// Returns when the server must not accept any more. Also returns when the sender was dropped.
pub(crate) async fn closing(state: &mut watch::Receiver<RunState>) {
    drop(state.wait_for(|state| !state.may_accept()).await);
}

/// Returns when the server must drain or stop. Also returns when the sender was dropped.
async fn stopping(state: &mut watch::Receiver<RunState>) {
    let is_stopping = |state: &RunState| matches!(state, RunState::Draining(_) | RunState::Stopped);
    drop(state.wait_for(is_stopping).await);
}

/// Returns when a connection without a request must be closed: at once if the server stops, and at `first_request_end` if
/// it drains.
async fn stopping_unused(state: &mut watch::Receiver<RunState>, opened: Stopwatch) {
    stopping(state).await;
    if let Some(rules) = drain_rules(state) {
        drop(timeout_at(rules.first_request_end(opened), stopped(state)).await);
    }
}

/// `None`: the server does not drain, but stops at once.
fn drain_rules(state: &watch::Receiver<RunState>) -> Option<DrainRules> {
    match *state.borrow() {
        RunState::Draining(rules) => Some(rules),
        RunState::Waiting | RunState::Running | RunState::Closing { .. } | RunState::Stopped => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::Full;
    use hyper::service::service_fn;
    use std::collections::BTreeSet;
    use std::io::{Read as _, Write as _};
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

    /// Callers whose connections the kernel has completed and no server has accepted. Returns their answers.
    async fn answers_of_queued(empties_queue: bool) -> Vec<io::Result<String>> {
        let socket = listen(ANY, 1).unwrap().pop().unwrap();
        let address = socket.local_addr().unwrap();
        let mut callers: Vec<_> = (0..20).map(|_| TcpStream::connect(address).unwrap()).collect();
        for caller in &mut callers {
            caller.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            caller.write_all(b"GET / HTTP/1.1\r\nhost: g\r\nconnection: close\r\n\r\n").unwrap();
        }
        let protocols = Protocols { certificate: None, http2: true, requires_host: true };
        // The maximum number of connections does not matter.
        let bounds =
            ConnectionBounds { total: 1, per_address: None, bounds_loopback: false, exempt: Vec::new() };
        let listener = Listener::new(CallerTimeouts::default(), bounds, protocols);
        let service =
            |_| service_fn(|_| async { Ok::<_, io::Error>(Response::new(Full::<bytes::Bytes>::default())) });
        let rules = DrainRules { answers: Duration::from_secs(5), endings: Duration::ZERO, empties_queue };
        let (_state, receiver) = watch::channel(RunState::Draining(rules));
        serve(socket, listener, service, receiver).await.unwrap();
        let answer = |mut caller: TcpStream| {
            let mut answer = String::new();
            caller.read_to_string(&mut answer).map(|_| answer)
        };
        callers.into_iter().map(answer).collect()
    }

    #[tokio::test]
    async fn callers_in_the_kernels_queue_are_answered_when_the_server_drains() {
        for answer in answers_of_queued(true).await {
            assert!(answer.as_ref().is_ok_and(|answer| answer.starts_with("HTTP/1.1 200 OK")), "{answer:?}");
        }
        for answer in answers_of_queued(false).await {
            assert!(answer.is_err(), "{answer:?}");
        }
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
