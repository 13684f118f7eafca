//! What all sockets of one listener share: its bounds, its protocols and its certificate. A reload changes them.

use super::certificate::Certificate;
use super::limits::{ConnectionBounds, ConnectionLimits};
use super::peer::CallerTimeouts;
use crate::telemetry::EventCount;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::Semaphore;

/// TLS handshakes in progress. Further ones wait, within the time of a handshake.
const MAX_HANDSHAKES: usize = 1_024;

/// What all sockets of one listener share.
#[derive(Debug)]
pub(crate) struct Listener {
    pub(super) timeouts: CallerTimeouts,
    pub(super) limits: Arc<ConnectionLimits>,
    /// Connections that could not be accepted.
    pub(super) failed: EventCount,
    /// Connections of addresses that have too many.
    pub(super) crowded: EventCount,
    pub(super) handshakes: Semaphore,
    protocols: Mutex<Protocols>,
}

/// How new connections are served.
#[derive(Clone, Debug)]
pub(crate) struct Protocols {
    /// `None`: without TLS.
    pub(crate) certificate: Option<Certificate>,
    /// Whether callers may choose HTTP/2: by ALPN with TLS, else by prior knowledge.
    pub(crate) http2: bool,
    /// Whether a request over HTTP/1.1 is refused that names no host.
    pub(crate) requires_host: bool,
}

impl Listener {
    /// A listener that nothing uses yet.
    pub(crate) fn new(timeouts: CallerTimeouts, bounds: ConnectionBounds, protocols: Protocols) -> Arc<Self> {
        Arc::new(Self {
            timeouts,
            limits: ConnectionLimits::new(bounds),
            failed: EventCount::new(),
            crowded: EventCount::new(),
            handshakes: Semaphore::new(MAX_HANDSHAKES),
            protocols: Mutex::new(protocols),
        })
    }

    /// Changes how new connections are accepted and served. Open connections stay as they are.
    pub(crate) fn set(&self, bounds: ConnectionBounds, protocols: Protocols) {
        self.limits.set(bounds);
        *self.protocols.lock().unwrap_or_else(PoisonError::into_inner) = protocols;
    }

    /// How new connections are served.
    pub(crate) fn protocols(&self) -> Protocols {
        self.protocols.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
