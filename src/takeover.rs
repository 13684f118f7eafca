//! A restart without a gap: a new process takes a running gateway over.
//!
//! Both use the abstract Unix socket that is named after `server.listen`. The old process listens there
//! ([`incumbent`]). A new process that is ready to serve connects to it ([`claim`]) and receives the listening sockets, the lock
//! of the store and the counters. `docs/architecture.md` lists the steps and the effect of a crash at each step.

mod claim;
mod frame;
mod incumbent;
mod line;
mod predecessor;
mod socket;

use crate::config::Config;
use crate::ledger::LeftAccount;
use crate::provider_limits::LeftLimits;
use crate::{redis, store};
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::time::Duration;

pub(crate) use claim::{Claim, Claimed};
pub(crate) use incumbent::{HandoverOutcome, Incumbent};
pub(crate) use line::run as run_line;
pub(crate) use predecessor::serve as serve_predecessor;
pub(crate) use socket::ControlListener;

/// Processes with different numbers cannot replace each other without a gap.
const PROTOCOL: u32 = 1;
/// How long each process waits for a step of the other one while callers' requests continue.
const STEP_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the old process waits for the new one while callers' requests wait. After that the old process continues.
const TAKEOVER_TIMEOUT: Duration = Duration::from_secs(3);

/// A message of the new process, until it has taken over.
#[derive(Debug, Serialize, Deserialize)]
enum ToIncumbent {
    /// The first message. `store` identifies the store.
    Hello { protocol: u32, store: String, admin: SocketAddr },
    /// Requests the counters, the last thing that the new process needs.
    Begin,
    /// The new process is ready to serve.
    Ready,
}

/// A message of the old process, until the new one has taken over.
#[derive(Debug, Serialize, Deserialize)]
enum FromIncumbent {
    /// The old process continues.
    Refused { reason: String },
    /// These files follow: the listeners for callers, the admin listener, the control listener, the lock of the store.
    Welcome {
        listeners: usize,
        has_admin: bool,
        has_lock: bool,
        /// Whether the service manager has passed the sockets for callers. Earlier versions do not report it.
        #[serde(default)]
        is_passed: bool,
    },
    /// The amounts that requests of the old process hold in one environment.
    Account { environment: String, left: LeftAccount },
    /// What the answers of the upstreams have stated about the limits of their providers.
    ProviderLimits(Vec<LeftLimits>),
    /// All accounts were sent, and the last commit of the store is done.
    Accounts,
    /// The new process is the gateway from now on.
    Go,
}

/// Identifies the store of a gateway. Processes with different stores do not replace each other.
fn store_identity(config: &Config) -> String {
    let counters = if config.store.memory {
        "memory".to_owned()
    } else {
        store::identity(&config.store.path)
            .map_or_else(|| "new file".to_owned(), |(device, inode)| format!("file {device}:{inode}"))
    };
    // A new process may have another password.
    let redis = config.store.redis.as_ref();
    let redis = redis.map(|redis| (&redis.prefix, redis::server_identity(redis.url.expose())));
    redis.map_or_else(|| counters.clone(), |(prefix, server)| format!("{counters} {prefix} {server}"))
}

#[cfg(test)]
mod tests;
