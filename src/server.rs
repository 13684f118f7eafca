//! The accept loop: connections in, requests to a service, an orderly end.
//!
//! It is the gateway's own because callers that are slow, or gone, have to be noticed, and because a
//! shutdown lets answers end that are under way.

mod malformed;
mod peer;
mod socket;

use http::{Request, Response};
use hyper::body::{Body, Incoming};
use hyper::server::conn::http1;
use hyper::service::Service;
use hyper_util::rt::{TokioIo, TokioTimer};
use socket::{Handle, Socket as Connection};
use socket2::{Domain, Protocol, Socket, Type};
use std::error::Error;
use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::time::{sleep, timeout};

pub use peer::Patience;
pub(crate) use peer::Peer;

/// A request's head, and what is read ahead of a body, is no larger than this.
const LARGEST_HEAD: usize = 64 * 1024;
/// So long nothing is accepted when the process has run out of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// What a server is told by whoever started it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// Serve.
    Run,
    /// Accept nothing more, let answers end within this time, then stop.
    Drain(Duration),
}

/// Sockets that listen at one address, one for each worker: the kernel shares connections out.
///
/// # Errors
/// The address is taken or cannot be listened at.
pub(crate) fn listen(address: SocketAddr, sockets: usize) -> io::Result<Vec<std::net::TcpListener>> {
    // The first one is bound without sharing: two gateways at one address must not go unnoticed. It shares only from then
    // on, and is never let go, so that nobody can come between.
    let first = socket(address, false)?;
    let address = first.local_addr()?.as_socket().unwrap_or(address);
    let mut all = vec![first];
    if sockets > 1 {
        all[0].set_reuse_port(true)?;
    }
    for _ in 1..sockets {
        all.push(socket(address, true)?);
    }
    Ok(all.into_iter().map(Into::into).collect())
}

fn socket(address: SocketAddr, shared: bool) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    if shared {
        socket.set_reuse_port(true)?;
    }
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(4_096)?;
    Ok(socket)
}

/// Serves until it is told to drain, and returns when the last connection has ended or the time for
/// that is over. Returns how many connections were cut off then.
pub(crate) async fn serve<S, B>(
    listener: std::net::TcpListener,
    service_for: impl Fn(Arc<Peer>) -> S,
    patience: Patience,
    mut orders: watch::Receiver<Order>,
) -> io::Result<usize>
where
    S: Service<Request<Incoming>, Response = Response<B>> + Send + 'static,
    S::Future: Send + 'static,
    S::Error: Into<Box<dyn Error + Send + Sync>>,
    B: Body<Data = bytes::Bytes> + Send + 'static,
    B::Error: Into<Box<dyn Error + Send + Sync>>,
{
    let listener = TcpListener::from_std(listener)?;
    // Every connection holds a sender: when all are dropped, all have ended.
    let (alive, mut all_ended) = mpsc::channel::<()>(1);
    loop {
        tokio::select! {
            biased;
            () = told_to_drain(&mut orders) => break,
            accepted = listener.accept() => match accepted {
                Ok((stream, peer)) => {
                    let peer = Arc::new(Peer::new(peer, patience));
                    let service = service_for(peer.clone());
                    let connection = connection(stream, peer, service, orders.clone(), alive.clone());
                    tokio::spawn(connection);
                }
                Err(error) => {
                    tracing::warn!(%error, "a connection could not be accepted");
                    sleep(ACCEPT_PAUSE).await;
                }
            },
        }
    }
    drop(listener);
    let within = match *orders.borrow() {
        Order::Drain(within) => within,
        Order::Run => Duration::ZERO,
    };
    let cut_off = alive.strong_count() - 1;
    drop(alive);
    let ended = timeout(within, all_ended.recv()).await.is_ok();
    Ok(if ended { 0 } else { cut_off })
}

/// Returns when nothing more is to be accepted; whoever gave the orders being gone means that too.
async fn told_to_drain(orders: &mut watch::Receiver<Order>) {
    drop(orders.wait_for(|order| *order != Order::Run).await);
}

async fn connection<S, B>(
    stream: TcpStream,
    peer: Arc<Peer>,
    service: S,
    mut orders: watch::Receiver<Order>,
    alive: mpsc::Sender<()>,
) where
    S: Service<Request<Incoming>, Response = Response<B>> + Send + 'static,
    S::Future: Send + 'static,
    S::Error: Into<Box<dyn Error + Send + Sync>>,
    B: Body<Data = bytes::Bytes> + Send + 'static,
    B::Error: Into<Box<dyn Error + Send + Sync>>,
{
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "a connection broke at once");
        return;
    }
    let head = peer.patience.head;
    let socket = Connection::new(stream, peer);
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(head)
        .max_buf_size(LARGEST_HEAD)
        .max_header_size(LARGEST_HEAD)
        .serve_connection(TokioIo::new(Handle(&socket)), service);
    let mut connection = pin!(connection);
    let result = tokio::select! {
        result = unless_hung_up(connection.as_mut(), &socket) => result,
        () = told_to_drain(&mut orders) => {
            connection.as_mut().graceful_shutdown();
            unless_hung_up(connection.as_mut(), &socket).await
        }
    };
    match result {
        Some(Err(error)) => tracing::debug!(%error, "a connection has ended early"),
        None => tracing::debug!("a caller has hung up"),
        Some(Ok(())) => {}
    }
    drop(alive);
}

/// Serves a connection to its end. `None`: the caller has hung up before.
async fn unless_hung_up<F: Future>(mut connection: Pin<&mut F>, socket: &Connection) -> Option<F::Output> {
    poll_fn(|cx| match connection.as_mut().poll(cx) {
        Poll::Ready(done) => Poll::Ready(Some(done)),
        Poll::Pending => socket.poll_hung_up(cx).map(|()| None),
    })
    .await
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::net::{Ipv4Addr, TcpListener, TcpStream};

    use super::*;

    const ANY: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

    fn ports(listeners: &[TcpListener]) -> BTreeSet<u16> {
        listeners.iter().map(|listener| listener.local_addr().unwrap().port()).collect()
    }

    #[test]
    fn sockets_of_one_address_share_its_connections_out() {
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
    fn a_second_gateway_at_an_address_is_told_so() {
        for (sockets, others) in [(1, 1), (1, 2), (2, 1), (2, 2)] {
            let listeners = listen(ANY, sockets).unwrap();
            let error = listen(listeners[0].local_addr().unwrap(), others).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        }
    }
}
