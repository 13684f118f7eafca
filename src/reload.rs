//! Requests to reload the config, and their outcome. The thread that reloads is in `app`.

use serde_json::{Value, json};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::{mpsc, oneshot};

/// Requests that may wait for the thread that reloads.
const MAX_WAITING: usize = 16;

/// The outcome of a reload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ReloadOutcome {
    /// The new config is in force.
    Adopted {
        /// What changed, one line each.
        changes: Vec<String>,
        /// Settings that are allowed but probably not intended.
        warnings: Vec<String>,
    },
    /// The old config stays in force.
    Refused {
        /// The faults of the new one.
        faults: Vec<String>,
    },
}

impl ReloadOutcome {
    /// The outcome for the audit log.
    pub(crate) fn audited(&self) -> Value {
        match self {
            Self::Adopted { changes, .. } => json!({ "changes": changes }),
            Self::Refused { faults } => json!({ "faults": faults }),
        }
    }
}

/// A request to reload the config.
#[derive(Debug)]
pub(crate) struct ReloadRequest {
    /// Takes the outcome.
    pub(crate) outcome: oneshot::Sender<ReloadOutcome>,
    /// The requester, for the audit log. `None`: the requester records the reload itself.
    pub(crate) by: Option<&'static str>,
}

/// Requests reloads of the config.
#[derive(Clone, Debug)]
pub(crate) struct ReloadHandle {
    requests: mpsc::Sender<ReloadRequest>,
    faults: Arc<Mutex<Faults>>,
}

/// The faults of the config and of the files that it names.
#[derive(Debug, Default)]
struct Faults {
    /// Of the config that was refused last. Empty: the last reload succeeded.
    of_config: Vec<String>,
    /// Of certificate files that the config in force names. The certificates in force stay until the files can be used.
    of_certificates: Vec<String>,
}

impl ReloadHandle {
    /// The handle, and the requests that the thread receives.
    pub(crate) fn new() -> (Self, mpsc::Receiver<ReloadRequest>) {
        let (requests, receiver) = mpsc::channel(MAX_WAITING);
        (Self { requests, faults: Arc::default() }, receiver)
    }

    /// Reloads the config. The caller records it in the audit log. `None`: the gateway is shutting down.
    pub(crate) async fn reload(&self) -> Option<ReloadOutcome> {
        self.request(None).await
    }

    /// Reloads the config on a signal, and records it in the audit log. `None`: the gateway is shutting down.
    pub(crate) async fn reload_on_signal(&self) -> Option<ReloadOutcome> {
        self.request(Some("signal")).await
    }

    async fn request(&self, by: Option<&'static str>) -> Option<ReloadOutcome> {
        let (outcome, receiver) = oneshot::channel();
        self.requests.send(ReloadRequest { outcome, by }).await.ok()?;
        receiver.await.ok()
    }

    /// The faults of the config that was refused last. Empty: the last reload succeeded.
    pub(crate) fn faults(&self) -> Vec<String> {
        self.lock().of_config.clone()
    }

    /// The faults of certificate files that the next start would refuse.
    pub(crate) fn certificate_faults(&self) -> Vec<String> {
        self.lock().of_certificates.clone()
    }

    /// Records the faults of the last config.
    pub(crate) fn set_faults(&self, faults: Vec<String>) {
        self.lock().of_config = faults;
    }

    /// Records the faults of the certificate files of the config in force.
    pub(crate) fn set_certificate_faults(&self, faults: Vec<String>) {
        self.lock().of_certificates = faults;
    }

    fn lock(&self) -> MutexGuard<'_, Faults> {
        self.faults.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
