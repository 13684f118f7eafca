//! The values of a reservation: the demand of a request, its grant, and its settlement.

use super::Account;
use super::allowance::PartialLength;
use super::local::Backing;
use crate::clock::Timestamp;
use crate::quota::{Amounts, Denied, QuotaLevel, QuotaStatus, Receipt, Required, Shortfall, Subject, Wait};
use smallvec::SmallVec;
use std::sync::Arc;
use std::time::Duration;

/// The end of a request in flight cannot be predicted. A caller that waits for one is advised to try again after this time.
pub const IN_FLIGHT_RETRY_MS: u64 = 1_000;

/// A request that waits tries again after this time if the time of the next refill is not known.
const UNKNOWN_REFILL_RETRY: Duration = Duration::from_secs(1);

/// What a request demands of its quotas.
#[derive(Clone, Copy, Debug)]
pub struct Demand<'a> {
    /// The caller and the model of the request.
    pub subject: Subject<'a>,
    /// Estimated prompt tokens.
    pub prompt: u64,
    /// Whether the model generates tokens for this request.
    pub generates: bool,
    /// The request's own limit on the completion tokens of all its completions together.
    pub cap: Option<u64>,
    /// Number of completions requested; at least 1.
    pub completions: u64,
    /// The upstreams that may serve the request, in the order in which they are tried: the first one with room in its
    /// own quotas. Empty: only the quotas of the environment apply.
    pub backends: &'a [Backend<'a>],
    /// Whether the request may be clamped, if its environment clamps. `false` as long as another upstream may have room for
    /// all of it.
    pub may_clamp: bool,
}

impl Demand<'_> {
    /// The same request, which is not clamped. `None`: it makes no difference.
    pub(super) fn unclamped(&self) -> Option<Self> {
        (self.may_clamp && self.backends.len() > 1).then_some(Self { may_clamp: false, ..*self })
    }
}

/// An upstream that may serve a request.
#[derive(Clone, Copy, Debug)]
pub struct Backend<'a> {
    /// The upstream's account. `None`: it has no limits.
    pub account: Option<&'a Arc<Account>>,
    /// The model, by the name that is sent to the upstream.
    pub model: &'a str,
}

impl Backend<'_> {
    /// Counts a denied request at the upstream, if its limits had no room.
    pub fn count_denial(&self, no_room: &NoRoom) {
        let Some(account) = self.account else { return };
        if account.upstream.as_deref().is_some_and(|name| no_room.concerns_upstream(name)) {
            account.engine.count_denial(Subject { caller: None, model: self.model }, no_room);
        }
    }
}

/// Why a request got no reservation.
#[derive(Clone, Debug, PartialEq)]
pub enum NoRoom {
    /// One or more quotas have no room for it.
    Quota(Denied),
    /// The maximum number of requests is in flight.
    InFlight {
        /// The maximum.
        limit: u64,
        /// The upstream that has its maximum. `None`: the environment has it.
        upstream: Option<Arc<str>>,
    },
    /// The counters are in Redis, and Redis is unavailable.
    Unavailable,
}

impl NoRoom {
    /// The quota that takes longest to have room.
    pub fn worst(&self) -> Option<&Shortfall> {
        match self {
            Self::Quota(denied) => denied.shortfalls().first(),
            Self::InFlight { .. } | Self::Unavailable => None,
        }
    }

    /// Merges the reason of an environment and that of an upstream. Quotas of both are joined. A maximum in flight takes
    /// precedence over quotas.
    pub(super) fn of_both(of_environment: Option<Self>, of_upstream: Option<Self>) -> Option<Self> {
        match (of_environment, of_upstream) {
            (Some(Self::Quota(own)), Some(Self::Quota(other))) => Some(Self::Quota(own.with(other))),
            (Some(Self::Quota(_)), in_flight @ Some(_)) => in_flight,
            (own, other) => own.or(other),
        }
    }

    /// Whether this reason includes limits of the upstream.
    pub(super) fn concerns_upstream(&self, name: &str) -> bool {
        match self {
            Self::Quota(denied) => {
                denied.shortfalls().iter().any(|short| short.quota.scope.upstream() == Some(name))
            }
            Self::InFlight { upstream, .. } => upstream.as_deref() == Some(name),
            Self::Unavailable => false,
        }
    }

    /// Whether this reason includes limits of any upstream.
    pub(crate) fn is_of_upstream(&self) -> bool {
        match self {
            Self::Quota(denied) => {
                denied.shortfalls().iter().any(|short| short.quota.scope.upstream().is_some())
            }
            Self::InFlight { upstream, .. } => upstream.is_some(),
            Self::Unavailable => false,
        }
    }

    /// Whether a request with this reason fits before one with the other reason.
    pub(crate) fn fits_before(&self, other: &Self) -> bool {
        let order = |no_room: &Self| (*no_room == Self::Unavailable, no_room.retry_after());
        order(self) < order(other)
    }

    /// The time after which the caller is advised to try again.
    pub(crate) fn retry_after(&self) -> Wait {
        match self {
            Self::Quota(_) => self.wait().unwrap_or(Wait::Never),
            Self::InFlight { .. } => Wait::Ms(IN_FLIGHT_RETRY_MS),
            Self::Unavailable => Wait::Never,
        }
    }

    /// When the same request would fit. `None`: not before another request has ended.
    pub fn wait(&self) -> Option<Wait> {
        self.worst().map(|worst| worst.wait)
    }

    /// The earliest time at which the request could fit. It assumes that every request in flight ends now and returns
    /// what it holds.
    pub fn soonest(&self) -> Wait {
        match self {
            Self::Quota(denied) => {
                denied.shortfalls().iter().map(Shortfall::min_wait).max().unwrap_or(Wait::Never)
            }
            Self::InFlight { .. } => Wait::Ms(0),
            Self::Unavailable => Wait::Never,
        }
    }
}

/// Why no upstream of a request has room, and how long waiting may take.
#[derive(Debug)]
pub(super) struct Shortage {
    /// The refusal of the upstream at which the request fits first.
    pub(super) no_room: NoRoom,
    /// The earliest time at which the request could fit at any of the upstreams.
    soonest: Wait,
    /// Until then no refill makes room at any of them, only the end of another request. `None`: at one of them no refill
    /// makes room.
    refill: Option<Wait>,
}

impl Shortage {
    /// The refusal of the only upstream, or of the first one.
    pub(super) fn of(no_room: NoRoom) -> Self {
        let (soonest, refill) = (no_room.soonest(), no_room.wait());
        Self { no_room, soonest, refill }
    }

    /// Adds the refusal of another upstream. Returns whether the request fits there first.
    pub(super) fn add(&mut self, no_room: NoRoom) -> bool {
        self.soonest = self.soonest.min(no_room.soonest());
        self.refill = self.refill.zip(no_room.wait()).map(|(before, other)| before.min(other));
        let is_first = no_room.fits_before(&self.no_room);
        if is_first {
            self.no_room = no_room;
        }
        is_first
    }

    /// Whether the request could fit within this time.
    pub(super) fn may_clear_within(&self, left: Duration) -> bool {
        match self.soonest {
            Wait::Never => false,
            Wait::Ms(ms) => Duration::from_millis(ms) <= left,
        }
    }

    /// The time after which a request that may wait for the rest of `left` tries again. `None`: it cannot fit in time.
    pub(super) fn retry_after(&self, left: Duration) -> Option<Duration> {
        let after_refill = match self.refill {
            Some(Wait::Ms(ms)) => Duration::from_millis(ms.max(1)),
            Some(Wait::Never) | None => UNKNOWN_REFILL_RETRY,
        };
        self.may_clear_within(left).then_some(after_refill)
    }
}

/// What would happen to a request.
#[derive(Clone, Debug)]
pub struct Forecast {
    /// The time on the clock of the counters.
    pub at: Timestamp,
    /// The amounts that it would reserve.
    pub required: Amounts,
    /// Why it would not fit now. `None`: it fits.
    pub obstacle: Option<NoRoom>,
    /// The upstream that would serve it: its index in the backends of the demand.
    pub backend: usize,
    /// The quotas that apply to it, in the order of the config; those of the upstream last.
    pub quotas: Vec<QuotaLevel>,
}

/// What a request holds until it is settled.
#[derive(Debug)]
#[must_use = "a grant that is not settled holds its room for ever"]
pub struct Grant {
    /// The initial reservation and its extensions.
    pub(super) receipts: SmallVec<[Receipt; 1]>,
    /// The reservation's number in this node's Redis session, or in the process that has taken the counters over. `None`: the
    /// counters are in this process.
    pub(super) id: Option<u64>,
    /// Sum of all receipts.
    pub(super) reserved: Amounts,
    /// Completion tokens that one extension adds, if there is room.
    pub(super) extension: u64,
    pub(super) completions: u64,
    /// Maximum completion tokens of all completions: the request's own limit, or the clamped one.
    pub(super) cap: u64,
    pub(super) was_clamped: bool,
    pub(super) progress_threshold: u64,
    /// The length of the unfinished answer that is already part of the learned lengths.
    pub(super) partial_length: Option<PartialLength>,
    /// The generation of the model's learned lengths that counts this request as in flight.
    pub(super) in_flight_generation: Option<u64>,
}

impl Grant {
    /// Everything reserved so far.
    pub fn reserved(&self) -> Amounts {
        self.reserved
    }

    /// The maximum number of completion tokens that the request allows its answer.
    pub fn cap(&self) -> u64 {
        self.cap
    }

    /// When the answer has more completion tokens than this, `progress` must be called at once. With fewer tokens,
    /// occasional calls suffice.
    pub fn progress_threshold(&self) -> u64 {
        self.progress_threshold
    }

    /// Passes each receipt to `mark`, with the part of `spent` that the receipts before it do not cover.
    pub(super) fn mark_receipts(&mut self, spent: Amounts, mut mark: impl FnMut(&mut Receipt, Amounts)) {
        let mut left = spent;
        for receipt in &mut self.receipts {
            mark(receipt, left);
            left = left.saturating_sub(receipt.reserved());
        }
    }

    /// Splits `spent` over the receipts and passes each receipt with its part to `settle`. A receipt pays at most
    /// what it holds. The last receipt also pays the rest.
    pub(super) fn settle_receipts(&mut self, spent: Amounts, mut settle: impl FnMut(Receipt, Amounts)) {
        let last = self.receipts.len().saturating_sub(1);
        let mut left = spent;
        for (index, receipt) in self.receipts.drain(..).enumerate() {
            let part = if index == last { left } else { left.min(receipt.reserved()) };
            left = left.saturating_sub(part);
            settle(receipt, part);
        }
    }
}

/// An admitted request.
#[derive(Debug)]
pub struct Admission {
    /// What it holds.
    pub grant: Box<Grant>,
    /// What it holds in the quotas of its upstream. `None`: the upstream has no limits.
    pub upstream: Option<Box<Grant>>,
    /// The lowered limit of completion tokens per completion, if the request was clamped.
    pub clamped_to: Option<u64>,
    /// Why the request would have been denied if its quotas were enforced.
    pub would_deny: Option<Box<NoRoom>>,
    /// The quotas of each kind right after the reservation, in the order of `Kind::ALL`.
    pub standing: [Option<QuotaStatus>; 4],
    /// This node's store must persist the reservation before the request is forwarded.
    pub is_durable: bool,
}

impl Admission {
    /// Takes the amounts of the request in the quotas of its upstream, which have room for them.
    pub(super) fn back(&mut self, now: Timestamp, upstream: &mut Backing<'_>, required: &Required) {
        self.upstream = Some(upstream.take(now, required));
        self.standing = QuotaStatus::tightest(self.standing, upstream.standing(now));
        self.is_durable |= upstream.needs_durability();
    }
}

/// How a request ended.
#[derive(Clone, Copy, Debug, Default)]
pub struct Settlement {
    /// What the request is charged.
    pub spent: Amounts,
    /// The answer is complete, so its length can be learned.
    pub is_complete: bool,
}

/// Whether a stream still fits in its reservation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// It fits, possibly after an extension.
    Within,
    /// It used more than is reserved, and the quotas have no room for an extension. Further tokens become debt.
    Overrun,
    /// The same, but no quota without room is enforced: the environment is in shadow mode.
    OverrunInShadow,
}
