//! The upstreams of a route that a request has tried, and why the next one was tried.

use super::{Record, RequestOutcome};
use crate::config::UpstreamSettings;
use std::sync::Arc;

/// How an attempt at an upstream ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AttemptOutcome {
    /// The upstream answered, and its answer was passed on.
    Answered,
    /// It answered 429.
    RateLimited,
    /// It answered 502, 503, 504 or 529.
    Unavailable,
    /// It could not be reached, or broke off the connection before it answered.
    Unreachable,
    /// It did not answer in time.
    TimedOut,
    /// The caller disconnected, or the gateway stopped, before it answered.
    Cancelled,
    /// Its own quotas had no room. It did not receive the request.
    NoRoom,
    /// Its provider would have refused the request. It did not receive it.
    Held,
    /// It had failed several times in a row. It did not receive the request.
    PassedOver,
}

impl AttemptOutcome {
    /// All outcomes, in the order of their discriminants.
    pub(crate) const ALL: [Self; 9] = [
        Self::Answered,
        Self::RateLimited,
        Self::Unavailable,
        Self::Unreachable,
        Self::TimedOut,
        Self::Cancelled,
        Self::NoRoom,
        Self::Held,
        Self::PassedOver,
    ];

    /// The name in logs and the `outcome` label of metrics.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Answered => "answered",
            Self::RateLimited => "rate_limited",
            Self::Unavailable => "unavailable",
            Self::Unreachable => "unreachable",
            Self::TimedOut => "timed_out",
            Self::Cancelled => "cancelled",
            Self::NoRoom => "no_room",
            Self::Held => "held",
            Self::PassedOver => "passed_over",
        }
    }

    /// The outcome of an answer with this status.
    pub(crate) fn of_status(status: u16) -> Self {
        match status {
            429 => Self::RateLimited,
            502..=504 | 529 => Self::Unavailable,
            _ => Self::Answered,
        }
    }

    /// The outcome of the last upstream that a request was sent to. `None`: it was sent to none.
    pub(super) fn of_last(record: &Record) -> Option<Self> {
        record.upstream.as_ref()?;
        Some(match record.outcome {
            RequestOutcome::UpstreamFailed if record.error == "upstream_timeout" => Self::TimedOut,
            RequestOutcome::UpstreamFailed => Self::Unreachable,
            _ if record.first_byte.is_none() => Self::Cancelled,
            _ => Self::of_status(record.status),
        })
    }
}

/// The upstreams that a request tried or left out, apart from a last one that answered.
#[derive(Debug, Default)]
pub(crate) struct Attempts(Option<Box<AttemptList>>);

#[derive(Debug, Default)]
struct AttemptList {
    all: Vec<(Arc<UpstreamSettings>, AttemptOutcome)>,
    /// The index of the attempt whose answer was passed on, because no other upstream had room.
    last: Option<usize>,
}

impl Attempts {
    pub(crate) fn add(&mut self, upstream: &Arc<UpstreamSettings>, outcome: AttemptOutcome) {
        self.0.get_or_insert_default().all.push((upstream.clone(), outcome));
    }

    /// Records that the answer of the last attempt at this upstream is passed on.
    pub(crate) fn end_with(&mut self, upstream: &Arc<UpstreamSettings>) {
        let Some(list) = &mut self.0 else { return };
        list.last = list.all.iter().rposition(|(known, _)| Arc::ptr_eq(known, upstream));
    }

    /// All apart from the one whose answer was passed on.
    pub(super) fn earlier(&self) -> impl Iterator<Item = &(Arc<UpstreamSettings>, AttemptOutcome)> {
        let last = self.0.as_ref().and_then(|list| list.last);
        let all = self.0.iter().flat_map(|list| list.all.iter().enumerate());
        all.filter(move |(at, _)| Some(*at) != last).map(|(_, attempt)| attempt)
    }

    /// All attempts of a request whose route has several upstreams, in their order. Empty: the first upstream answered.
    pub(super) fn with_last(record: &Record) -> Vec<(&str, AttemptOutcome)> {
        let Self(Some(list)) = &record.attempts else { return Vec::new() };
        let mut all: Vec<_> =
            list.all.iter().map(|(upstream, outcome)| (&*upstream.name, *outcome)).collect();
        let last = record.upstream.as_ref().zip(AttemptOutcome::of_last(record));
        all.extend(
            last.filter(|_| list.last.is_none()).map(|(upstream, outcome)| (&*upstream.name, outcome)),
        );
        all
    }
}
