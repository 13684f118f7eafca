//! The messages between an account that has moved and the new process that has its counters.

use super::allowance::LeftLengths;
use super::audit::AuditEntry;
use super::demand::{Backend, NoRoom};
use super::owner::UPSTREAM_PREFIX;
use crate::clock::Timestamp;
use crate::quota::{
    Amounts, Denied, LeftCell, LeftReceipt, Quota, QuotaIdentity, QuotaStatus, Shortfall, Wait,
};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// Amounts that the requests of an account hold when the account leaves.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeftAccount {
    pub(super) in_flight: u64,
    pub(super) held: Amounts,
    pub(super) cells: Vec<LeftCell>,
    /// The learned lengths of answers.
    pub(super) lengths: Vec<LeftLengths>,
}

/// The grant of a request of the old process.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LeftGrant {
    pub(super) receipts: Vec<LeftReceipt>,
    pub(super) reserved: Amounts,
    pub(super) extension: u64,
    pub(super) completions: u64,
    pub(super) cap: u64,
    pub(super) was_clamped: bool,
    pub(super) progress_threshold: u64,
}

/// Usage of one caller and model in one minute, which the old process has recorded.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LeftUsage {
    /// Minutes since the Unix epoch.
    pub minute: i64,
    /// The model's name in the history.
    pub model: String,
    /// The caller's name; `None` in an open environment.
    pub caller: Option<String>,
    /// Requests denied.
    pub rejections: u64,
    /// The charged amounts.
    pub spent: Amounts,
}

/// A message of the old process. `id` names a reservation or a call of the old process.
#[derive(Debug, Serialize, Deserialize)]
#[allow(missing_docs)]
pub enum ToSuccessor {
    /// Reserves room. Answered with `Reserved` or `Denied`.
    Reserve {
        id: u64,
        environment: String,
        caller: Option<String>,
        model: String,
        prompt: u64,
        generates: bool,
        cap: Option<u64>,
        completions: u64,
        max_wait_ms: u64,
        #[serde(default)]
        backends: Vec<LeftBackend>,
    },
    /// The request of a `Reserve` ended before its reply arrived.
    Cancel { id: u64 },
    /// A request that was in flight when the account moved.
    Adopt { id: u64, environment: String, model: String, grant: LeftGrant },
    /// Moves a reservation to another upstream, whose index in its route is `index`. Answered with `Moved` or `Denied`. `id`
    /// names the call.
    Move {
        id: u64,
        reservation: u64,
        caller: Option<String>,
        generates: bool,
        index: usize,
        backend: LeftBackend,
    },
    /// Amounts that a stream has used so far. Answered with `Progressed`.
    Progress { id: u64, spent: Amounts },
    /// The end of a request.
    Settle { id: u64, caller: Option<String>, spent: Amounts, is_complete: bool },
    /// Answered with `Committed` when everything before this message is durable.
    Commit { id: u64, environment: String },
    /// Usage of an account that does not move, for the usage history.
    Usage { environment: String, rows: Vec<LeftUsage> },
    /// Actions of administrators that the old process has taken since it left the store.
    Audit { entries: Vec<AuditEntry> },
}

/// An upstream that may serve a request of the old process.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LeftBackend {
    /// The name of its account. `None`: it has no limits.
    pub account: Option<String>,
    /// The model, by the name that is sent to the upstream.
    pub model: String,
}

impl LeftBackend {
    pub(super) fn of(backend: &Backend<'_>) -> Self {
        let upstream = backend.account.and_then(|account| account.upstream());
        let account = upstream.map(|name| format!("{UPSTREAM_PREFIX}{name}"));
        Self { account, model: backend.model.to_owned() }
    }
}

/// An answer of the new process.
#[derive(Debug, Serialize, Deserialize)]
#[allow(missing_docs)]
pub enum FromSuccessor {
    Reserved {
        id: u64,
        reserved: Amounts,
        cap: u64,
        progress_threshold: u64,
        clamped_to: Option<u64>,
        would_deny: Option<LeftNoRoom>,
        standing: [Option<QuotaStatus>; 4],
        #[serde(default)]
        backend: usize,
    },
    Denied {
        id: u64,
        no_room: LeftNoRoom,
    },
    Moved {
        id: u64,
        standing: [Option<QuotaStatus>; 4],
    },
    Progressed {
        id: u64,
        is_overrun: bool,
        reserved: Amounts,
        progress_threshold: u64,
    },
    Committed {
        id: u64,
    },
}

/// A [`NoRoom`] on its way to the old process.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[allow(missing_docs)]
pub enum LeftNoRoom {
    Quota {
        at_ms: i64,
        requested: Amounts,
        shortfalls: Vec<LeftShortfall>,
    },
    InFlight {
        limit: u64,
        #[serde(default)]
        upstream: Option<String>,
    },
    Unavailable,
}

/// A [`Shortfall`] on its way to the old process.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LeftShortfall {
    quota: QuotaIdentity,
    limit: u64,
    burst: u64,
    remaining: u64,
    used: u64,
    held: u64,
    requested: u64,
    wait: Wait,
}

impl LeftAccount {
    /// Whether the old process counts in this quota. An account of counters in Redis has left none.
    pub(super) fn has(&self, quota: &Quota) -> bool {
        self.cells.iter().any(|cell| cell.is_of(quota))
    }
}

impl LeftNoRoom {
    pub(crate) fn of(no_room: &NoRoom) -> Self {
        let left = |shortfall: &Shortfall| LeftShortfall {
            quota: QuotaIdentity::of(&shortfall.quota),
            limit: shortfall.quota.limit,
            burst: shortfall.quota.capacity(),
            remaining: shortfall.remaining,
            used: shortfall.used,
            held: shortfall.held,
            requested: shortfall.requested,
            wait: shortfall.wait,
        };
        match no_room {
            NoRoom::Quota(denied) => Self::Quota {
                at_ms: denied.at().0,
                requested: denied.requested(),
                shortfalls: denied.shortfalls().iter().map(left).collect(),
            },
            NoRoom::InFlight { limit, upstream } => {
                Self::InFlight { limit: *limit, upstream: upstream.as_deref().map(str::to_owned) }
            }
            NoRoom::Unavailable => Self::Unavailable,
        }
    }

    /// `quotas`: the quotas of this process. A quota that only the new process has is left out.
    pub(super) fn into_no_room(self, quotas: &[Quota]) -> NoRoom {
        let (at_ms, requested, shortfalls) = match self {
            Self::Quota { at_ms, requested, shortfalls } => (at_ms, requested, shortfalls),
            Self::InFlight { limit, upstream } => {
                return NoRoom::InFlight { limit, upstream: upstream.map(Arc::from) };
            }
            Self::Unavailable => return NoRoom::Unavailable,
        };
        let known = |left: LeftShortfall| {
            let quota = quotas.iter().find(|quota| left.quota.is_of(quota))?;
            Some(Shortfall {
                quota: quota.with_limit(left.limit, left.burst),
                remaining: left.remaining,
                used: left.used,
                held: left.held,
                requested: left.requested,
                wait: left.wait,
            })
        };
        let known = shortfalls.into_iter().filter_map(known).collect();
        Denied::of_shortfalls(Timestamp(at_ms), requested, known).map_or(NoRoom::Unavailable, NoRoom::Quota)
    }
}
