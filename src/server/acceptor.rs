//! Accepts the connections of one listening socket, within the bounds of its listener.

use super::RunState;
use super::limits::{ConnectionLimits, Slot};
use crate::telemetry::EventCount;
use std::future::poll_fn;
use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::yield_now;
use tokio::time::sleep;

/// The pause after an error of `accept`, such as when the process has no more file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(20);

/// Accepts the connections of one listening socket.
pub(super) struct Acceptor<'l> {
    pub(super) listener: TcpListener,
    pub(super) limits: &'l Arc<ConnectionLimits>,
    /// Connections that failed.
    pub(super) failed: &'l EventCount,
    /// Connections of addresses that have too many.
    pub(super) crowded: &'l EventCount,
    pub(super) state: watch::Receiver<RunState>,
}

impl Acceptor<'_> {
    /// Waits for a connection. Cancel safe: no accepted connection is lost.
    pub(super) async fn next(&self) -> (TcpStream, SocketAddr, Slot) {
        loop {
            match poll_fn(|cx| self.poll_accept(cx)).await {
                Ok((stream, address, slot)) => {
                    if let Some(slot) = slot.count_for(address.ip()) {
                        return (stream, address, slot);
                    }
                    if let Some(connections) = self.crowded.add() {
                        tracing::warn!(
                            connections,
                            address = %address.ip(),
                            "connections were closed, because their address has too many (server.max_connections_per_address)"
                        );
                    }
                }
                Err(error) => {
                    if let Some(errors) = self.failed.add() {
                        tracing::warn!(%error, errors, "connections could not be accepted");
                    }
                    if !is_of_the_connection(&error) {
                        sleep(ACCEPT_PAUSE).await;
                    }
                }
            }
        }
    }

    /// A connection that waits in the kernel's queue. The maximum number of connections does not apply, because the server
    /// accepts no more. `None`: there is none, or it cannot be accepted.
    pub(super) async fn next_queued(&self) -> Option<(TcpStream, SocketAddr, Slot)> {
        tokio::select! {
            biased;
            accepted = poll_fn(|cx| self.listener.poll_accept(cx)) => {
                let (stream, address) = accepted.ok()?;
                Some((stream, address, self.limits.extra_slot()))
            }
            // The runtime looks at the socket in between.
            () = yield_now() => None,
        }
    }

    /// Takes a slot before a connection, and not the other way round: a connection without a slot stays in the kernel's
    /// queue. The slot is given back if no connection waits here, so that another socket can use it.
    ///
    /// The slot may come from a connection that has just ended because the server drains. The task learns of a new state by a
    /// notification, which may arrive later, so this reads the state itself. The task then wakes by that notification.
    fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<io::Result<(TcpStream, SocketAddr, Slot)>> {
        let slot = ready!(self.limits.poll_slot(cx));
        if !self.state.borrow().may_accept() {
            return Poll::Pending;
        }
        let (stream, address) = ready!(self.listener.poll_accept(cx))?;
        Poll::Ready(Ok((stream, address, slot)))
    }
}

/// Whether the caller has ended the connection before it was accepted. The next one can be accepted at once.
fn is_of_the_connection(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::ConnectionAborted | ErrorKind::ConnectionReset | ErrorKind::Interrupted)
}
