//! How many connections to an upstream are open, and how many of them carry a request.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The connections of all workers to one upstream.
#[derive(Debug, Default)]
pub(super) struct ConnectionCounts {
    open: AtomicU64,
    active: AtomicU64,
}

/// An open connection. Dropping it ends the count of the connection.
#[derive(Debug)]
pub(super) struct OpenConnection {
    counts: Arc<ConnectionCounts>,
    is_active: bool,
}

impl ConnectionCounts {
    /// Connections that carry a request.
    pub(super) fn active(&self) -> u64 {
        self.active.load(Ordering::Relaxed)
    }

    /// Connections that carry none.
    pub(super) fn idle(&self) -> u64 {
        self.open.load(Ordering::Relaxed).saturating_sub(self.active())
    }

    /// Counts a connection that carries no request yet.
    pub(super) fn open(self: &Arc<Self>) -> OpenConnection {
        self.open.fetch_add(1, Ordering::Relaxed);
        OpenConnection { counts: self.clone(), is_active: false }
    }

    pub(super) fn add_active(&self) {
        self.active.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn remove_active(&self) {
        self.active.fetch_sub(1, Ordering::Relaxed);
    }
}

impl OpenConnection {
    /// Sets whether the connection carries a request.
    pub(super) fn set_active(&mut self, is_active: bool) {
        if is_active == self.is_active {
            return;
        }
        self.is_active = is_active;
        if is_active { self.counts.add_active() } else { self.counts.remove_active() }
    }
}

impl Drop for OpenConnection {
    fn drop(&mut self) {
        self.set_active(false);
        self.counts.open.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_counts_until_it_is_dropped() {
        let counts = Arc::new(ConnectionCounts::default());
        let (mut one, two) = (counts.open(), counts.open());
        one.set_active(true);
        one.set_active(true);
        assert_eq!((counts.active(), counts.idle()), (1, 1));
        drop(two);
        assert_eq!((counts.active(), counts.idle()), (1, 0));
        drop(one);
        assert_eq!((counts.active(), counts.idle()), (0, 0));
    }
}
