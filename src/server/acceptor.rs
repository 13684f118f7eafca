//! Accepts the connections of one listening socket, within the bounds of its listener.

use super::limits::{ConnectionLimits, Slot};
use crate::clock::Stopwatch;
use std::future::poll_fn;
use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::yield_now;
use tokio::time::sleep;

/// The pause after an error of `accept`, such as when the process has no more file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(20);
/// Lines about connections that were not accepted are logged at most this often.
const LOG_INTERVAL: Duration = Duration::from_secs(1);

/// Counts connections that were not accepted, and logs their number at most once a second.
#[derive(Debug, Default)]
pub(super) struct Refused(Mutex<RefusedCount>);

#[derive(Debug, Default)]
struct RefusedCount {
    /// Since the last line.
    count: u64,
    logged: Option<Stopwatch>,
}

impl Refused {
    /// Counts one. Returns the number to log, if a line is due.
    fn add(&self) -> Option<u64> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.count += 1;
        if state.logged.is_some_and(|logged| logged.elapsed() < LOG_INTERVAL) {
            return None;
        }
        state.logged = Some(Stopwatch::start());
        Some(std::mem::take(&mut state.count))
    }
}

/// Accepts the connections of one listening socket.
pub(super) struct Acceptor<'l> {
    pub(super) listener: TcpListener,
    pub(super) limits: &'l Arc<ConnectionLimits>,
    /// Connections that failed.
    pub(super) failed: &'l Refused,
    /// Connections of addresses that have too many.
    pub(super) crowded: &'l Refused,
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
    fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<io::Result<(TcpStream, SocketAddr, Slot)>> {
        let slot = ready!(self.limits.poll_slot(cx));
        let (stream, address) = ready!(self.listener.poll_accept(cx))?;
        Poll::Ready(Ok((stream, address, slot)))
    }
}

/// Whether the caller has ended the connection before it was accepted. The next one can be accepted at once.
fn is_of_the_connection(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::ConnectionAborted | ErrorKind::ConnectionReset | ErrorKind::Interrupted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refused_connections_are_logged_at_most_once_a_second_with_their_number() {
        let refused = Refused::default();
        assert_eq!(refused.add(), Some(1));
        let began = Stopwatch::start();
        let (mut logged, mut added) = (0, 0u64);
        while began.elapsed() < LOG_INTERVAL + Duration::from_millis(200) {
            added += 1;
            if let Some(count) = refused.add() {
                assert_eq!(count, added);
                logged += 1;
                break;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(logged, 1);
        assert!(began.elapsed() + Duration::from_millis(20) >= LOG_INTERVAL);
    }
}
