//! The counter of a quota in the forms that other modules use: persisted, copied to Redis, or shown to users.

use super::Quota;
use crate::clock::Timestamp;
use serde::{Deserialize, Serialize};

/// The counter of one quota in the store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PersistedCounter {
    /// Spent and not yet refilled, in whole tokens or requests. Below zero if the burst was lowered under the
    /// amount that requests hold.
    pub used: i64,
    /// For a rolling quota: the fraction of a token in the level, in units of 1/`period_ms` token.
    pub level_fraction: u64,
    /// Held by requests in flight. A restart counts this amount as spent.
    pub held: u64,
    /// For a rolling quota: the time of the last refill. For a calendar quota: the start of its period.
    pub at: Timestamp,
    /// For a calendar quota: the end of its period; 0 if an older version of the gateway wrote it.
    pub until: Timestamp,
    /// For a rolling quota: settled in the period of the clock that began at `clock_at`.
    pub clock_used: u64,
    /// For a rolling quota: the start of the clock's period; 0 if an older version of the gateway wrote it.
    pub clock_at: Timestamp,
    /// The used amount that a lower limit has cut off. It counts again if the limit is raised before `excess_until`.
    pub excess: u64,
    /// See `excess`.
    pub excess_until: Timestamp,
    /// The config no longer had the quota.
    pub is_removed: bool,
}

/// The complete counter of one quota. Nodes exchange it with Redis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CounterState {
    /// A token bucket.
    Rolling {
        /// Tokens per period.
        limit: u64,
        /// Capacity in tokens.
        burst: u64,
        /// The level: whole tokens, and a remainder in units of 1/`period_ms` token.
        level: (i64, u64),
        /// Tokens held by requests in flight.
        held: u64,
        /// The time of the last refill.
        at: Timestamp,
    },
    /// A calendar period, or the clock's period of an unlimited rolling quota.
    Calendar {
        /// Tokens per period, or [`UNLIMITED`](super::UNLIMITED).
        limit: u64,
        /// Tokens settled in the period.
        used: u64,
        /// Tokens held by requests that the period admitted.
        held: u64,
        /// Start and end of the period.
        period: (Timestamp, Timestamp),
        /// Identifies the period; see [`CalendarPeriod`](super::CalendarPeriod).
        period_id: u64,
    },
}

/// A quota with its counter, for the admin API.
#[derive(Clone, Debug)]
pub struct QuotaLevel {
    /// The quota.
    pub quota: Quota,
    /// Whole tokens or requests that are available; below zero: debt; `i64::MAX`: unlimited.
    pub level: i64,
    /// Held by requests in flight.
    pub held: u64,
    /// Spent and not yet refilled. For an unlimited quota: settled in the current period of the clock.
    pub used: u64,
    /// Milliseconds until the spent amount is available again. For an unlimited quota: until the period ends.
    pub reset_ms: u64,
    /// Spent in the last ten minutes.
    pub spent_recently: u64,
    /// The time in which `spent_recently` was spent (ms): less than ten minutes for a young counter.
    pub measured_ms: u64,
    /// For how long nothing was left, or a refused request had no room (ms), since the counter began.
    pub exhausted_ms: u64,
}

/// The tightest quota of one kind that applies to a caller, for the rate limit headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QuotaStatus {
    /// Limit of the quota, in tokens or requests per period.
    pub limit: u64,
    /// Whole tokens or requests that are available, never negative.
    pub remaining: u64,
    /// Milliseconds until the quota is full again.
    pub reset_ms: u64,
}

impl QuotaStatus {
    /// The quota of each kind with more room; `None`: unlimited.
    pub(crate) fn loosest(one: [Option<Self>; 4], other: [Option<Self>; 4]) -> [Option<Self>; 4] {
        std::array::from_fn(|kind| {
            let (a, b) = (one[kind]?, other[kind]?);
            Some(if b.remaining > a.remaining { b } else { a })
        })
    }

    /// The tighter quota of each kind.
    pub(crate) fn tightest(one: [Option<Self>; 4], other: [Option<Self>; 4]) -> [Option<Self>; 4] {
        std::array::from_fn(|kind| match (one[kind], other[kind]) {
            (Some(a), Some(b)) => Some(if b.remaining < a.remaining { b } else { a }),
            (a, b) => a.or(b),
        })
    }
}
