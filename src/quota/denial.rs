//! Why a request was denied, and when it would fit.

use super::{Amounts, Quota, Required, Window};
use crate::clock::Timestamp;
use serde::{Deserialize, Serialize};

/// How long a request has to wait until it fits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Wait {
    /// Milliseconds.
    Ms(u64),
    /// The request is larger than the whole quota. It fits only if the limit is raised.
    Never,
}

/// A denied request: all quotas that cannot hold it, longest wait first.
#[derive(Clone, Debug, PartialEq)]
pub struct Denied {
    shortfalls: Vec<Shortfall>,
    requested: Amounts,
    at: Timestamp,
}

impl Denied {
    /// Sorts the shortfalls by their wait; `None` if there is none.
    pub(super) fn new(at: Timestamp, required: &Required, mut shortfalls: Vec<Shortfall>) -> Option<Self> {
        shortfalls.sort_by_key(|shortfall| std::cmp::Reverse(shortfall.wait));
        (!shortfalls.is_empty()).then_some(Self { shortfalls, requested: required.amounts, at })
    }

    /// A denial that another process has decided.
    pub(crate) fn of_shortfalls(
        at: Timestamp,
        requested: Amounts,
        shortfalls: Vec<Shortfall>,
    ) -> Option<Self> {
        Self::new(at, &Required { amounts: requested, generates: true }, shortfalls)
    }

    /// Adds the quotas of another denial of the same request.
    #[must_use]
    pub(crate) fn with(mut self, other: Self) -> Self {
        self.shortfalls.extend(other.shortfalls);
        self.shortfalls.sort_by_key(|shortfall| std::cmp::Reverse(shortfall.wait));
        self
    }

    /// All quotas that could not hold the request, longest wait first; never empty.
    pub fn shortfalls(&self) -> &[Shortfall] {
        &self.shortfalls
    }

    /// The amounts that the request needs, of every kind.
    pub fn requested(&self) -> Amounts {
        self.requested
    }

    /// When the request was denied. Waits count from this moment.
    pub fn at(&self) -> Timestamp {
        self.at
    }
}

/// One quota that could not hold a request. Amounts are tokens or requests.
#[derive(Clone, Debug, PartialEq)]
pub struct Shortfall {
    /// The quota.
    pub quota: Quota,
    /// The available amount, never negative.
    pub remaining: u64,
    /// Spent and not yet refilled.
    pub used: u64,
    /// Held by requests in flight.
    pub held: u64,
    /// The amount that the request needs.
    pub requested: u64,
    /// Time until the request fits, if the requests in flight settle as reserved.
    pub wait: Wait,
}

impl Shortfall {
    /// A lower bound of the wait: the time until the request fits if all held amounts were refunded now.
    pub fn min_wait(&self) -> Wait {
        let Wait::Ms(ms) = self.wait else { return Wait::Never };
        if self.held == 0 {
            return self.wait;
        }
        // `used` is rounded up, so the bucket may lack one token less than `missing`.
        let missing = (self.requested.max(1) + self.used).saturating_sub(self.quota.capacity());
        let min_wait = match self.quota.window {
            Window::Rolling { .. } => {
                u128::from(missing.saturating_sub(1)) * u128::from(self.quota.per.ms)
                    / u128::from(self.quota.limit.max(1))
            }
            Window::Calendar { .. } if missing > 0 => u128::from(ms),
            Window::Calendar { .. } => 0,
        };
        Wait::Ms(u64::try_from(min_wait).unwrap_or(u64::MAX).min(ms))
    }
}
