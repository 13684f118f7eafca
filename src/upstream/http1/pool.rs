//! Idle connections, for reuse.

use super::connection::Http1Connection;
use crate::clock::Stopwatch;
use std::collections::VecDeque;
use std::future::poll_fn;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::time::sleep_until;

const MAX_IDLE_CONNECTIONS: usize = 256;

/// Connections that wait for their next request. The most recently used one is reused first.
#[derive(Clone)]
pub(in crate::upstream) struct IdlePool {
    idle: Arc<Mutex<IdleConnections>>,
    idle_timeout: Duration,
}

#[derive(Default)]
struct IdleConnections {
    /// Each connection with the time since which it is idle. The most recently used one is last.
    connections: VecDeque<(Http1Connection, Stopwatch)>,
    /// Whether a task runs that closes connections which the upstream has closed, or whose idle timeout has elapsed.
    has_reaper: bool,
    /// Wakes that task.
    reaper: Option<Waker>,
}

impl IdlePool {
    /// The pool closes connections after `idle_timeout` without a request.
    pub(in crate::upstream) fn new(idle_timeout: Duration) -> Self {
        Self { idle: Arc::default(), idle_timeout }
    }

    /// Takes a connection that is still open.
    pub(in crate::upstream) fn take(&self, now: Stopwatch) -> Option<Http1Connection> {
        loop {
            let (mut connection, since) = self.lock().connections.pop_back()?;
            if now.since(since) < self.idle_timeout && connection.can_be_reused() {
                connection.set_active(true);
                return Some(connection);
            }
        }
    }

    /// Adds a connection. If the pool is full, the one that was idle longest is closed.
    pub(super) fn put(&self, mut connection: Http1Connection) {
        connection.set_active(false);
        let mut idle = self.lock();
        if let Some(reaper) = &idle.reaper
            && !connection.is_quiet(&mut Context::from_waker(reaper))
        {
            return;
        }
        if idle.connections.len() >= MAX_IDLE_CONNECTIONS {
            idle.connections.pop_front();
        }
        idle.connections.push_back((connection, Stopwatch::start()));
        if !idle.has_reaper
            && let Ok(runtime) = Handle::try_current()
        {
            idle.has_reaper = true;
            runtime.spawn(self.clone().reap());
        }
    }

    /// Closes connections when their upstream closes them, and after the idle timeout. One task and one timer serve all
    /// connections; the task ends when the pool is empty.
    async fn reap(self) {
        while let Some(due) = self.close_expired() {
            tokio::select! {
                () = sleep_until(due) => {}
                () = poll_fn(|cx| self.poll_closed(cx)) => {}
            }
        }
    }

    /// Closes the connections whose idle timeout has elapsed, and returns when that of the next one will.
    fn close_expired(&self) -> Option<tokio::time::Instant> {
        let mut idle = self.lock();
        while idle.connections.front().is_some_and(|(_, since)| since.elapsed() >= self.idle_timeout) {
            idle.connections.pop_front();
        }
        let due = idle.connections.front().map(|(_, since)| since.deadline(self.idle_timeout));
        if due.is_none() {
            (idle.has_reaper, idle.reaper) = (false, None);
        }
        due
    }

    /// Closes the connections that their upstreams have closed. Ready if there was one.
    fn poll_closed(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut idle = self.lock();
        idle.reaper = Some(cx.waker().clone());
        let count = idle.connections.len();
        idle.connections.retain_mut(|(connection, _)| connection.is_quiet(cx));
        if idle.connections.len() < count { Poll::Ready(()) } else { Poll::Pending }
    }

    fn lock(&self) -> MutexGuard<'_, IdleConnections> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncReadExt as _;

    #[tokio::test]
    async fn idle_connections_are_closed_when_the_pool_is_full_and_after_the_idle_timeout() {
        let pool = IdlePool::new(Duration::from_millis(100));
        let mut peers = Vec::new();
        for _ in 0..=MAX_IDLE_CONNECTIONS {
            let (ours, theirs) = tokio::io::duplex(64);
            pool.put(Http1Connection::new(Box::new(ours)));
            peers.push(theirs);
        }
        // The pool is full, so the oldest connection is closed at once; the others after the timeout.
        assert_eq!(peers[0].read(&mut [0]).await.unwrap(), 0);
        assert!(pool.take(Stopwatch::start()).is_some());
        for peer in &mut peers[1..MAX_IDLE_CONNECTIONS] {
            assert_eq!(peer.read(&mut [0]).await.unwrap(), 0);
        }
        assert!(pool.take(Stopwatch::start()).is_none() && !pool.lock().has_reaper);
    }

    #[tokio::test]
    async fn a_connection_that_its_upstream_closes_leaves_the_pool_at_once() {
        let pool = IdlePool::new(Duration::from_mins(1));
        let mut peers = Vec::new();
        for _ in 0..3 {
            let (ours, theirs) = tokio::io::duplex(64);
            pool.put(Http1Connection::new(Box::new(ours)));
            peers.push(theirs);
            tokio::task::yield_now().await;
        }
        for left in (0..3).rev() {
            drop(peers.remove(0));
            while pool.lock().connections.len() > left {
                tokio::task::yield_now().await;
            }
        }
        while pool.lock().has_reaper {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn a_connection_is_not_reused_after_its_upstream_has_closed_it() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let pool = IdlePool::new(Duration::from_mins(1));
        let ours = tokio::net::TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        pool.put(Http1Connection::new(Box::new(ours)));
        // The runtime does not look at its sockets between this and the reuse.
        drop(listener.accept().unwrap());
        assert!(pool.take(Stopwatch::start()).is_none());
    }
}
