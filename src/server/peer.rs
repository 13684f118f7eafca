//! What the two ends of a connection's life know of each other: the loop that holds the socket, and the
//! service that answers its requests.

use crate::clock::Stopwatch;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use tokio::time::Instant;

/// How long callers are waited for.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// A request's head has to arrive within this time; so long may a connection also be idle.
    pub head: Duration,
    /// A body that stops arriving for so long is given up.
    pub body: Duration,
    /// A caller that takes nothing of its answer for so long has hung up.
    pub write: Duration,
    /// So long what a caller still sends is read and thrown away, so that it gets to see its refusal.
    pub linger: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            head: Duration::from_secs(10),
            body: Duration::from_secs(30),
            write: Duration::from_mins(1),
            linger: Duration::from_secs(1),
        }
    }
}

/// A caller's connection, as the service sees it.
#[derive(Debug)]
pub(crate) struct Peer {
    /// Whose it is.
    pub(crate) address: SocketAddr,
    pub(crate) patience: Patience,
    born: Stopwatch,
    /// Milliseconds since then at which the answer under way has to be over; 0: there is no bound.
    over_at: AtomicU64,
    /// The caller may still be sending what nobody will read.
    lingers: AtomicBool,
}

impl Peer {
    pub(crate) fn new(address: SocketAddr, patience: Patience) -> Self {
        let (over_at, lingers) = (AtomicU64::new(0), AtomicBool::new(false));
        Self { address, patience, born: Stopwatch::start(), over_at, lingers }
    }

    /// A new request has come: what was said of the last one is over.
    pub(crate) fn begin(&self) {
        self.over_at.store(0, Ordering::Relaxed);
        self.lingers.store(false, Ordering::Relaxed);
    }

    /// The answer under way is cut off when so much time has passed since `started`, though the caller
    /// does not read and so nobody asks for more of it.
    pub(crate) fn cut_off(&self, started: Stopwatch, after: Duration) {
        let ms = u64::try_from((started.since(self.born) + after).as_millis()).unwrap_or(u64::MAX);
        self.over_at.store(ms.max(1), Ordering::Relaxed);
    }

    /// The request is answered though its body was not read: when the connection closes, that is thrown
    /// away for a while, or the caller would see its connection reset instead of the answer.
    pub(crate) fn linger(&self) {
        self.lingers.store(true, Ordering::Relaxed);
    }

    pub(super) fn lingers(&self) -> bool {
        self.lingers.load(Ordering::Relaxed)
    }

    /// When a write that has been stuck since then is given up.
    pub(super) fn give_up_at(&self, stuck_since: Stopwatch) -> Instant {
        let idle = stuck_since.deadline(self.patience.write);
        match self.over_at.load(Ordering::Relaxed) {
            0 => idle,
            ms => idle.min(self.born.deadline(Duration::from_millis(ms))),
        }
    }
}
