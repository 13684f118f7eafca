//! The replicas of upstreams, as `/metrics` shows them.

use super::catalogue::{REPLICA_FAILURES, REPLICA_IN_FLIGHT, REPLICA_UP, UPSTREAM_CONNECTIONS};
use super::exposition::{Family, labels};
use crate::config::Config;
use crate::upstream::{ReplicaView, Replicas};

/// Appends the state of all replicas to the text.
pub(super) fn append(text: &mut String, config: &Config, replicas: &[Replicas]) {
    let mut in_flight = Family::new(&REPLICA_IN_FLIGHT);
    let mut up = Family::new(&REPLICA_UP);
    let mut failures = Family::new(&REPLICA_FAILURES);
    let mut connections = Family::new(&UPSTREAM_CONNECTIONS);
    for (upstream, replicas) in config.upstreams.iter().zip(replicas) {
        for view in replicas.iter().map(|replica| replica.view()) {
            let is_up = view.is_up();
            let ReplicaView { address, failures: unreachable, failed_checks, .. } = view;
            let names = labels(REPLICA_UP.labels, &[&upstream.name, address]);
            in_flight.add(&names, view.in_flight);
            up.add(&names, u64::from(is_up));
            let checks = upstream.health.is_some().then_some(("health_check", failed_checks));
            for (reason, count) in [("unreachable", unreachable)].into_iter().chain(checks) {
                failures.add(&labels(REPLICA_FAILURES.labels, &[&upstream.name, address, reason]), count);
            }
            for (state, count) in [("active", view.active_connections), ("idle", view.idle_connections)] {
                connections
                    .add(&labels(UPSTREAM_CONNECTIONS.labels, &[&upstream.name, address, state]), count);
            }
        }
    }
    for family in [in_flight, up, failures, connections] {
        family.append_to(text);
    }
}
