//! The law: whether a request fits its quotas, and what it leaves behind when it has ended.
//!
//! Pure arithmetic on integers; `now` is an argument. Nothing here reads the clock or the network.

mod bucket;
mod period;
mod table;

use crate::clock::Timestamp;
use crate::glob::Glob;
use std::fmt;

pub use bucket::TokenBucket;
pub use period::CalendarPeriod;
pub use table::{CounterState, Denied, QuotaLevel, QuotaStatus, Quotas, Receipt, Shortfall, Subject, Wait};

/// Largest limit or burst: 2^50.
pub const MAX_LIMIT: u64 = 1 << 50;
/// Largest amount a single request may reserve or be charged: 2^40.
pub const MAX_AMOUNT: u64 = 1 << 40;

/// What a quota counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// What the provider calls total.
    TotalTokens,
    /// What the model reads.
    PromptTokens,
    /// What the model generates.
    CompletionTokens,
    /// Requests forwarded.
    Requests,
}

impl Kind {
    /// All kinds, in the order in which they are shown.
    pub const ALL: [Self; 4] =
        [Self::TotalTokens, Self::PromptTokens, Self::CompletionTokens, Self::Requests];

    /// Its name in the config, in metrics and in answers.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::TotalTokens => "total_tokens",
            Self::PromptTokens => "prompt_tokens",
            Self::CompletionTokens => "completion_tokens",
            Self::Requests => "requests",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Whom a quota binds within its environment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Every request.
    Environment,
    /// The requests of one caller: its index in the environment's list, and its name.
    Caller(usize, String),
    /// The requests for models that match the pattern.
    Model(Glob),
}

impl Scope {
    /// A caller is known by its name: its place in the list may change.
    fn is_same_as(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Caller(_, a), Self::Caller(_, b)) => a == b,
            _ => self == other,
        }
    }

    /// `environment`, `caller` or `model`.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Environment => "environment",
            Self::Caller(..) => "caller",
            Self::Model(_) => "model",
        }
    }

    /// The caller's name or the models' pattern; empty for the environment.
    pub fn name(&self) -> &str {
        match self {
            Self::Environment => "",
            Self::Caller(_, name) => name,
            Self::Model(pattern) => pattern.as_str(),
        }
    }
}

/// The length of a quota's period.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Period {
    /// As written in the config: `minute`, `10s`.
    pub text: String,
    /// Its length; a month counts as 30 days where it rolls.
    pub ms: u64,
}

/// The clock's own periods.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClockUnit {
    /// Begins at :00.
    Second,
    /// Begins at second 0.
    Minute,
    /// Begins at minute 0.
    Hour,
    /// Begins at midnight.
    Day,
    /// Begins on Monday.
    Week,
    /// Begins on the 1st.
    Month,
}

/// How a quota comes back.
#[derive(Clone, Debug, PartialEq)]
pub enum Window {
    /// Continuously: a token bucket of `burst` capacity.
    Rolling {
        /// Capacity; at least 1.
        burst: u64,
    },
    /// All at once when the clock's period turns.
    Calendar {
        /// Which period.
        unit: ClockUnit,
        /// In which time zone.
        zone: jiff::tz::TimeZone,
    },
}

/// One quota: how much of what, over which period, for whom.
#[derive(Clone, Debug, PartialEq)]
pub struct Quota {
    /// Whom it binds.
    pub scope: Scope,
    /// What it counts.
    pub kind: Kind,
    /// How much, in 1 ..= `MAX_LIMIT`.
    pub limit: u64,
    /// Over how long.
    pub per: Period,
    /// How it comes back.
    pub window: Window,
}

impl Quota {
    /// The most it can ever hold at once.
    pub fn capacity(&self) -> u64 {
        match self.window {
            Window::Rolling { burst } => burst,
            Window::Calendar { .. } => self.limit,
        }
    }

    /// Whether it is the same quota, at most with another limit or time zone: its counters then go on.
    pub fn is_same_as(&self, other: &Self) -> bool {
        let same_window = match (&self.window, &other.window) {
            (Window::Rolling { .. }, Window::Rolling { .. }) => true,
            (Window::Calendar { unit: a, .. }, Window::Calendar { unit: b, .. }) => a == b,
            _ => false,
        };
        same_window
            && self.scope.is_same_as(&other.scope)
            && self.kind == other.kind
            && self.per.ms == other.per.ms
    }

    /// The same quota with another limit; a calendar quota has no burst of its own.
    #[must_use]
    pub fn with_limit(&self, limit: u64, burst: u64) -> Self {
        let mut other = self.clone();
        other.set_limit(limit, burst);
        other
    }

    fn set_limit(&mut self, limit: u64, burst: u64) {
        self.limit = limit;
        if let Window::Rolling { burst: own } = &mut self.window {
            *own = burst;
        }
    }

    /// An hour or longer: what is reserved in it must outlive the process.
    pub fn is_durable(&self) -> bool {
        self.per.ms >= 3600 * 1000
    }

    /// A day or longer: exhausting it is not a matter of seconds.
    pub fn is_long(&self) -> bool {
        self.per.ms >= 24 * 3600 * 1000
    }
}

/// Amounts of each kind, in requests and tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Amounts {
    /// 1 for a request that reached the upstream.
    pub requests: u64,
    /// Tokens the model read.
    pub prompt: u64,
    /// Tokens the model generated.
    pub completion: u64,
    /// What the provider calls total; at least prompt + completion.
    pub total: u64,
}

impl Amounts {
    /// The amount that a quota of this kind counts.
    pub fn of(&self, kind: Kind) -> u64 {
        match kind {
            Kind::TotalTokens => self.total,
            Kind::PromptTokens => self.prompt,
            Kind::CompletionTokens => self.completion,
            Kind::Requests => self.requests,
        }
    }

    /// Of each kind the smaller amount.
    #[must_use]
    pub fn min(self, other: Self) -> Self {
        self.zip(other, u64::min)
    }

    /// Of each kind what is more than in `other`.
    #[must_use]
    pub fn saturating_sub(self, other: Self) -> Self {
        self.zip(other, u64::saturating_sub)
    }

    /// The sums of each kind.
    #[must_use]
    pub fn saturating_add(self, other: Self) -> Self {
        self.zip(other, u64::saturating_add)
    }

    fn zip(self, other: Self, f: impl Fn(u64, u64) -> u64) -> Self {
        Self {
            requests: f(self.requests, other.requests),
            prompt: f(self.prompt, other.prompt),
            completion: f(self.completion, other.completion),
            total: f(self.total, other.total),
        }
    }

    /// Amounts of one request, each cut to `MAX_AMOUNT`.
    pub fn of_request(prompt: u64, completion: u64) -> Self {
        let (prompt, completion) = (prompt.min(MAX_AMOUNT), completion.min(MAX_AMOUNT));
        Self { requests: 1, prompt, completion, total: (prompt + completion).min(MAX_AMOUNT) }
    }
}

/// What is kept of one quota so that it outlives the process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PersistedCounter {
    /// Spent and not yet back, in whole tokens or requests; below zero where the burst was lowered.
    pub used: i64,
    /// Of a rolling quota: how much of a token more than that is left, in 1/`period_ms`.
    pub level_fraction: u64,
    /// Held by requests in flight: spent, should the process die now.
    pub held: u64,
    /// Of a rolling quota: when it was last refilled. Of a calendar quota: the start of its period.
    pub at: Timestamp,
    /// Of a calendar quota: the end of its period; 0 where an older version has kept it.
    pub until: Timestamp,
}

/// What a request asks of its quotas.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Required {
    /// What is to be held while it is in flight.
    pub amounts: Amounts,
    /// Whether the model generates tokens for it. If not, an exhausted quota of completion tokens
    /// does not deny it.
    pub generates: bool,
}
