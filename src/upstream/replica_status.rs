//! The state of each replica of an upstream. All workers share it.

use super::availability::{Attempt, Availability, Standing};
use super::connections::ConnectionCounts;
use crate::clock;
use crate::config::UpstreamSettings;
use http::Uri;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// The replicas of one upstream, in the order of the config. There is at least one.
pub(crate) type Replicas = Arc<[Arc<ReplicaStatus>]>;

/// One replica, for all workers.
#[derive(Debug)]
pub struct ReplicaStatus {
    url: Uri,
    /// Host and port.
    address: String,
    pub(super) availability: Arc<Availability>,
    /// Whether it has failed its last health check.
    is_unhealthy: AtomicBool,
    failed_checks: AtomicU64,
    in_flight: AtomicU64,
    pub(super) connections: Arc<ConnectionCounts>,
}

/// A request in flight at a replica, until its answer has ended. Dropping it ends the count.
#[derive(Debug)]
pub(super) struct InFlight(Arc<ReplicaStatus>);

/// The state of a replica at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ReplicaView<'r> {
    /// Host and port.
    pub(crate) address: &'r str,
    pub(crate) in_flight: u64,
    /// Whether it has failed its last health check.
    pub(crate) is_unhealthy: bool,
    /// Milliseconds until a request tries it again, if it could not be reached. `None`: it is not left out for that.
    pub(crate) left_out_ms: Option<u64>,
    /// How often it could not be reached.
    pub(crate) failures: u64,
    pub(crate) failed_checks: u64,
    /// Connections that carry a request.
    pub(crate) active_connections: u64,
    pub(crate) idle_connections: u64,
}

impl ReplicaView<'_> {
    /// Whether requests go to the replica.
    pub(crate) fn is_up(&self) -> bool {
        !self.is_unhealthy && self.left_out_ms.is_none()
    }
}

impl ReplicaStatus {
    fn new(url: Uri) -> Self {
        Self {
            address: UpstreamSettings::address(&url),
            url,
            availability: Availability::new(NonZeroU32::MIN),
            is_unhealthy: AtomicBool::new(false),
            failed_checks: AtomicU64::new(0),
            in_flight: AtomicU64::new(0),
            connections: Arc::default(),
        }
    }

    /// The replicas of an upstream. Those that `previous` contains stay.
    pub(crate) fn of(settings: &UpstreamSettings, previous: Option<&Replicas>) -> Replicas {
        let find = |url: &Uri| previous?.iter().find(|known| known.url == *url).cloned();
        let replica = |url: &Uri| find(url).unwrap_or_else(|| Arc::new(Self::new(url.clone())));
        settings.base_urls.iter().map(replica).collect()
    }

    pub(super) fn url(&self) -> &Uri {
        &self.url
    }

    /// Host and port.
    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    pub(crate) fn in_flight(&self) -> u64 {
        self.in_flight.load(Ordering::Relaxed)
    }

    pub(super) fn begin_request(self: &Arc<Self>) -> InFlight {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        InFlight(self.clone())
    }

    pub(super) fn is_healthy(&self) -> bool {
        !self.is_unhealthy.load(Ordering::Relaxed)
    }

    pub(super) fn standing(&self, now_ms: u64) -> Standing {
        self.availability.standing(now_ms)
    }

    /// Begins an attempt, whether the replica is left out or not.
    pub(super) fn attempt_anyway(&self, now_ms: u64) -> Attempt {
        self.availability.attempt(now_ms).unwrap_or_else(|_| self.availability.attempt_anyway())
    }

    /// Records the result of a health check. Returns whether it differs from that of the check before.
    pub(super) fn set_healthy(&self, is_healthy: bool) -> bool {
        if is_healthy {
            // It can be reached again.
            let _ = self.availability.attempt_anyway().succeeded();
        } else {
            self.failed_checks.fetch_add(1, Ordering::Relaxed);
        }
        self.is_unhealthy.swap(!is_healthy, Ordering::Relaxed) == is_healthy
    }

    /// Forgets the last health check, because the replica is not checked any more.
    pub(super) fn forget_health(&self) {
        self.is_unhealthy.store(false, Ordering::Relaxed);
    }

    pub(crate) fn view(&self) -> ReplicaView<'_> {
        let now_ms = clock::uptime_ms();
        let left_out_ms = match self.standing(now_ms) {
            Standing::Available => None,
            Standing::ProbeIsDue => Some(0),
            Standing::LeftOut { due_ms } => Some(due_ms.saturating_sub(now_ms)),
        };
        ReplicaView {
            address: &self.address,
            in_flight: self.in_flight(),
            is_unhealthy: !self.is_healthy(),
            left_out_ms,
            failures: self.availability.failures(),
            failed_checks: self.failed_checks.load(Ordering::Relaxed),
            active_connections: self.connections.active(),
            idle_connections: self.connections.idle(),
        }
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}
