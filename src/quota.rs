//! The quota arithmetic: it admits or denies requests, and settles their reservations.
//!
//! Exact integers only, and `now` is an argument. Nothing here reads the clock or the network.
//!
//! [`Quotas`] holds the quotas of one environment or of one upstream. Each has a counter: a [`TokenBucket`] for a rolling
//! window, a [`CalendarPeriod`] for a calendar window.

mod bucket;
mod carry_over;
mod clock_count;
mod counter;
mod denial;
mod exhaustion;
mod handover;
mod period;
mod receipt;
mod snapshot;
mod spending;
mod succession;
mod table;

use crate::glob::Glob;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::sync::Arc;

pub use bucket::TokenBucket;
pub use carry_over::{CarriedAmount, Takeover};
pub use denial::{Denied, Shortfall, Wait};
pub use handover::{HeldElsewhere, LeftCell, LeftReceipt, QuotaIdentity};
pub use period::CalendarPeriod;
pub use receipt::Receipt;
pub use snapshot::{CounterState, PersistedCounter, QuotaLevel, QuotaStatus};
pub use succession::{Predecessors, predecessors};
pub use table::{Applicable, Quotas, Restored, Subject};

/// Largest limit or burst, in tokens or requests: 2^50.
pub const MAX_LIMIT: u64 = 1 << 50;
/// The limit and the burst of an unlimited quota. It counts and never refuses a request.
pub const UNLIMITED: u64 = u64::MAX;
/// Largest amount that one request may reserve or be charged, in tokens: 2^40.
pub const MAX_AMOUNT: u64 = 1 << 40;

/// What a quota counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// The total that the provider reports; at least prompt and completion together.
    TotalTokens,
    /// Tokens that the model reads.
    PromptTokens,
    /// Tokens that the model generates.
    CompletionTokens,
    /// Requests forwarded.
    Requests,
}

impl Kind {
    /// All kinds, in display order.
    pub const ALL: [Self; 4] =
        [Self::TotalTokens, Self::PromptTokens, Self::CompletionTokens, Self::Requests];

    /// The name in the config, in metrics and in error answers.
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

/// Which requests a quota applies to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Every request of the environment.
    Environment,
    /// The requests of the caller with this name.
    Caller(Arc<str>),
    /// The requests whose model matches the pattern.
    Model(Glob),
    /// The requests of all environments that go to the upstream with this name.
    Upstream(Arc<str>),
    /// Of these, the requests whose model matches the pattern.
    UpstreamModel(UpstreamModels),
}

/// Models of an upstream, by the names that the gateway sends to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UpstreamModels {
    /// `openai/gpt-4.1*`.
    name: Arc<str>,
    pattern: Glob,
}

impl UpstreamModels {
    /// The models of the upstream that match the pattern.
    pub fn new(upstream: &str, pattern: Glob) -> Self {
        Self { name: format!("{upstream}/{}", pattern.as_str()).into(), pattern }
    }

    /// The name of the upstream.
    pub fn upstream(&self) -> &str {
        &self.name[..self.name.len() - self.pattern.as_str().len() - 1]
    }

    /// The pattern of the models.
    pub fn pattern(&self) -> &Glob {
        &self.pattern
    }
}

impl Scope {
    /// The owner of the quota, as messages name it: `caller 'batch' of environment 'production'`.
    pub fn describe(&self, environment: &str) -> String {
        match self {
            Self::Environment => format!("environment '{environment}'"),
            Self::Caller(name) => format!("caller '{name}' of environment '{environment}'"),
            Self::Model(pattern) => format!("model '{}' in environment '{environment}'", pattern.as_str()),
            Self::Upstream(name) => format!("upstream '{name}'"),
            Self::UpstreamModel(models) => {
                format!("model '{}' of upstream '{}'", models.pattern.as_str(), models.upstream())
            }
        }
    }

    /// The pattern of the models that the quota applies to. `None`: it does not depend on the model.
    pub fn models(&self) -> Option<&Glob> {
        match self {
            Self::Model(pattern) => Some(pattern),
            Self::UpstreamModel(models) => Some(&models.pattern),
            Self::Environment | Self::Caller(_) | Self::Upstream(_) => None,
        }
    }

    /// The name of the upstream that the quota belongs to. `None`: it belongs to an environment.
    pub fn upstream(&self) -> Option<&str> {
        match self {
            Self::Upstream(name) => Some(name),
            Self::UpstreamModel(models) => Some(models.upstream()),
            Self::Environment | Self::Caller(_) | Self::Model(_) => None,
        }
    }

    /// `environment`, `caller`, `model`, `upstream` or `upstream_model`.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Environment => "environment",
            Self::Caller(_) => "caller",
            Self::Model(_) => "model",
            Self::Upstream(_) => "upstream",
            Self::UpstreamModel(_) => "upstream_model",
        }
    }

    /// The caller's name, the model pattern, the upstream's name, or `openai/gpt-4.1*`; empty for the environment.
    pub fn name(&self) -> &str {
        match self {
            Self::Environment => "",
            Self::Caller(name) | Self::Upstream(name) => name,
            Self::Model(pattern) => pattern.as_str(),
            Self::UpstreamModel(models) => &models.name,
        }
    }
}

/// The period over which a quota's limit applies: the config key `per`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Period {
    /// The text in the config: `minute`, `10s`.
    pub text: String,
    /// Length in milliseconds; a month is 30 days here.
    pub ms: u64,
}

/// The period of a calendar quota.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
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

impl ClockUnit {
    /// The unit whose period has this length in milliseconds. A month counts as 30 days.
    pub fn of_length(ms: u64) -> Option<Self> {
        Some(match ms {
            1_000 => Self::Second,
            60_000 => Self::Minute,
            3_600_000 => Self::Hour,
            86_400_000 => Self::Day,
            604_800_000 => Self::Week,
            2_592_000_000 => Self::Month,
            _ => return None,
        })
    }
}

/// How spent amounts become available again.
#[derive(Clone, Debug, PartialEq)]
pub enum Window {
    /// Continuously: a token bucket refills at the limit per period.
    Rolling {
        /// Capacity of the bucket in tokens or requests, in 1 ..= `MAX_LIMIT`, or [`UNLIMITED`].
        burst: u64,
    },
    /// All at once, when the next calendar period begins.
    Calendar {
        /// The calendar period.
        unit: ClockUnit,
        /// The time zone in which the period begins and ends.
        zone: jiff::tz::TimeZone,
    },
}

/// One quota: an amount per period for a set of requests.
#[derive(Clone, Debug, PartialEq)]
pub struct Quota {
    /// Which requests the quota applies to.
    pub scope: Scope,
    /// What the quota counts.
    pub kind: Kind,
    /// Tokens or requests per period, in 1 ..= `MAX_LIMIT`, or [`UNLIMITED`].
    pub limit: u64,
    /// The period.
    pub per: Period,
    /// How spent amounts become available again.
    pub window: Window,
}

impl Quota {
    /// Whether the quota only counts and never refuses a request.
    pub fn is_unlimited(&self) -> bool {
        self.limit == UNLIMITED
    }

    /// The limit as the config writes it: a number, or `unlimited`.
    pub fn limit_text(&self) -> String {
        if self.is_unlimited() { "unlimited".to_owned() } else { self.limit.to_string() }
    }

    /// The unlimited quotas per minute of an environment: one of each kind that none of its own quotas has.
    pub fn implicit(configured: &[Self]) -> Vec<Self> {
        let is_named = |kind: Kind| {
            configured.iter().any(|quota| quota.scope == Scope::Environment && quota.kind == kind)
        };
        let unlimited = |kind| Self {
            scope: Scope::Environment,
            kind,
            limit: UNLIMITED,
            per: Period { text: "minute".to_owned(), ms: 60_000 },
            window: Window::Rolling { burst: UNLIMITED },
        };
        Kind::ALL.into_iter().filter(|kind| !is_named(*kind)).map(unlimited).collect()
    }

    /// The largest amount that the quota can admit at once, in tokens or requests.
    pub fn capacity(&self) -> u64 {
        match self.window {
            Window::Rolling { burst } => burst,
            Window::Calendar { .. } => self.limit,
        }
    }

    /// Whether both are the same quota, apart from the limit, burst and time zone.
    ///
    /// A reload of the config keeps the counter of a quota that stays the same.
    pub fn is_same_as(&self, other: &Self) -> bool {
        let same_window = match (&self.window, &other.window) {
            (Window::Rolling { .. }, Window::Rolling { .. }) => true,
            (Window::Calendar { unit: a, .. }, Window::Calendar { unit: b, .. }) => a == b,
            _ => false,
        };
        same_window && self.scope == other.scope && self.kind == other.kind && self.per.ms == other.per.ms
    }

    /// Returns the quota with another limit and burst; a calendar quota ignores `burst`.
    #[must_use]
    pub fn with_limit(&self, limit: u64, burst: u64) -> Self {
        let mut other = self.clone();
        other.set_limit(limit, burst);
        other
    }

    /// The most that a changed quota takes over from the amount used before the change. More would be debt by the new
    /// limit, although it was within the old one.
    fn max_carried(&self) -> u64 {
        self.capacity()
    }

    fn set_limit(&mut self, limit: u64, burst: u64) {
        self.limit = limit;
        if let Window::Rolling { burst: own } = &mut self.window {
            *own = burst;
        }
    }

    /// Whether the period is an hour or longer. Reservations in this quota must survive a crash.
    pub fn is_durable(&self) -> bool {
        self.per.ms >= 3600 * 1000
    }

    /// Whether the period is a day or longer. A caller cannot wait for this quota to refill.
    pub fn is_long(&self) -> bool {
        self.per.ms >= 24 * 3600 * 1000
    }
}

/// An amount of each kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Amounts {
    /// Requests; 1 for a request that reached the upstream.
    pub requests: u64,
    /// Tokens that the model read.
    pub prompt: u64,
    /// Tokens that the model generated.
    pub completion: u64,
    /// Total tokens that the provider reports; at least `prompt + completion`.
    pub total: u64,
}

impl Amounts {
    /// Returns the amount that a quota of this kind counts.
    pub fn of(&self, kind: Kind) -> u64 {
        match kind {
            Kind::TotalTokens => self.total,
            Kind::PromptTokens => self.prompt,
            Kind::CompletionTokens => self.completion,
            Kind::Requests => self.requests,
        }
    }

    /// Returns the smaller amount of each kind.
    #[must_use]
    pub fn min(self, other: Self) -> Self {
        self.zip(other, u64::min)
    }

    /// Returns the larger amount of each kind.
    #[must_use]
    pub fn max(self, other: Self) -> Self {
        self.zip(other, u64::max)
    }

    /// Subtracts each kind; a negative difference becomes 0.
    #[must_use]
    pub fn saturating_sub(self, other: Self) -> Self {
        self.zip(other, u64::saturating_sub)
    }

    /// Adds each kind; a sum saturates at `u64::MAX`.
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

    /// The amounts of one request, each capped at `MAX_AMOUNT`.
    pub fn of_request(prompt: u64, completion: u64) -> Self {
        let (prompt, completion) = (prompt.min(MAX_AMOUNT), completion.min(MAX_AMOUNT));
        Self { requests: 1, prompt, completion, total: (prompt + completion).min(MAX_AMOUNT) }
    }
}

/// The amounts that a request needs from its quotas.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Required {
    /// Amounts to hold while the request is in flight.
    pub amounts: Amounts,
    /// Whether the model generates tokens for the request. If not, an exhausted quota of completion
    /// tokens does not deny it.
    pub generates: bool,
}
