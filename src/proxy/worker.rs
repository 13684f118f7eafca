//! The proxy of one worker, which a reload of the config replaces.

use super::{Proxy, Snapshot, State};
use std::sync::{Arc, Mutex, PoisonError};
use tokio_rustls::rustls::ClientConfig;

/// The proxy of one worker, which a reload of the config replaces. Each request takes it once, at its start.
pub struct WorkerProxy(Mutex<Arc<Proxy>>);

impl WorkerProxy {
    /// Creates the proxy of one worker. It connects to no upstream yet.
    ///
    /// # Errors
    /// An upstream's host is not a valid TLS server name.
    pub fn new(state: Arc<State>, tls: &Arc<ClientConfig>) -> anyhow::Result<Self> {
        Ok(Self(Mutex::new(Arc::new(Proxy::new(state, tls)?))))
    }

    /// The proxy for a request that begins now.
    pub fn current(&self) -> Arc<Proxy> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Creates the proxy for another snapshot, which `replace` puts in force.
    ///
    /// # Errors
    /// An upstream's host is not a valid TLS server name.
    pub fn prepare(&self, snapshot: Arc<Snapshot>, tls: &Arc<ClientConfig>) -> anyhow::Result<Arc<Proxy>> {
        self.current().next(snapshot, tls).map(Arc::new)
    }

    /// Serves requests by this proxy from now on. Requests in flight end by the old one.
    pub fn replace(&self, next: Arc<Proxy>) {
        let old = std::mem::replace(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner), next);
        drop(old);
    }
}
