//! Idle connections, for reuse.

use super::connection::Http1Connection;
use crate::clock::Stopwatch;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
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
    /// Whether a task runs that closes connections after the idle timeout.
    has_reaper: bool,
}

impl IdlePool {
    /// The pool closes connections after `idle_timeout` without a request.
    pub(in crate::upstream) fn new(idle_timeout: Duration) -> Self {
        Self { idle: Arc::default(), idle_timeout }
    }

    /// Takes a connection that is still open.
    pub(in crate::upstream) fn take(&self) -> Option<Http1Connection> {
        loop {
            let (mut connection, since) = self.lock().connections.pop_back()?;
            if since.elapsed() < self.idle_timeout && connection.is_quiet() {
                return Some(connection);
            }
        }
    }

    /// Adds a connection. If the pool is full, the one that was idle longest is closed.
    pub(super) fn put(&self, connection: Http1Connection) {
        let mut idle = self.lock();
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

    /// Closes connections after the idle timeout. One task and one timer serve all connections; the task
    /// ends when the pool is empty.
    async fn reap(self) {
        while let Some(due) = self.close_expired() {
            sleep_until(due).await;
        }
    }

    /// Closes the connections whose idle timeout has elapsed, and returns when that of the next one will.
    fn close_expired(&self) -> Option<tokio::time::Instant> {
        let mut idle = self.lock();
        while idle.connections.front().is_some_and(|(_, since)| since.elapsed() >= self.idle_timeout) {
            idle.connections.pop_front();
        }
        let due = idle.connections.front().map(|(_, since)| since.deadline(self.idle_timeout));
        idle.has_reaper = due.is_some();
        due
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
        assert!(pool.take().is_some());
        for peer in &mut peers[1..MAX_IDLE_CONNECTIONS] {
            assert_eq!(peer.read(&mut [0]).await.unwrap(), 0);
        }
        assert!(pool.take().is_none() && !pool.lock().has_reaper);
    }
}
