//! The part of the shared quotas that a node leases. The node admits requests from its lease without a call to Redis
//! and reports them afterwards in batches. Redis counts leased amounts as held, so that no node admits them a second
//! time. A node can be denied although other nodes have unused leases. This hardly matters, because all leases
//! together are a small part of a quota.

use crate::clock::Timestamp;
use crate::quota::{CounterState, Kind, Quota, QuotaLevel, Required};
use crate::redis::ScriptReply;

/// All nodes together lease at most 1/50 of a quota's capacity.
const MAX_LEASED_DIVISOR: u64 = 50;
/// The lease is returned if less than 1/10 of a quota is left.
const RETURN_DIVISOR: u64 = 10;
/// A lease is taken only if at least 1/5 of each quota is left.
const TAKE_DIVISOR: u64 = 5;
/// Minimum time between two reviews of the lease, if the first one found nothing to take (ms). A review reads all quotas.
const REVIEW_INTERVAL_MS: u64 = 10;

/// The lease of one node.
#[derive(Debug)]
pub(super) struct Lease {
    /// The unused rest of the lease of each quota.
    left: Vec<u64>,
    /// When the lease of each quota expires: at the end of the quota's calendar period.
    until: Vec<Timestamp>,
    /// Redis may hold amounts for this lease, which must be returned.
    is_open: bool,
    /// For each quota: the node requests a larger lease when the rest of its lease is at or below this amount.
    low: Vec<u64>,
    /// The lease may need a change. The review waits until `not_before`.
    needs_review: bool,
    not_before: Timestamp,
}

/// The result of a review of the lease.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum LeaseAction {
    Keep,
    /// A quota is nearly exhausted: return the lease, so that Redis decides about every request.
    Return,
    /// Raise the lease of each quota to this amount.
    Take(Vec<u64>),
}

impl Lease {
    pub(super) fn new(quotas: usize) -> Self {
        Self {
            left: vec![0; quotas],
            until: vec![Timestamp(i64::MAX); quotas],
            is_open: false,
            low: vec![0; quotas],
            needs_review: true,
            not_before: Timestamp(0),
        }
    }

    /// Adds cells, of which nothing is leased.
    pub(super) fn resize(&mut self, quotas: usize) {
        self.left.resize(quotas, 0);
        self.until.resize(quotas, Timestamp(i64::MAX));
        self.low.resize(quotas, 0);
        self.request_review();
    }

    /// Requests a review of the lease as soon as possible, because the states of all quotas have changed.
    pub(super) fn request_review(&mut self) {
        self.needs_review = true;
        self.not_before = Timestamp(0);
    }

    /// Whether to review the lease now.
    pub(super) fn is_due(&self, now: Timestamp) -> bool {
        self.needs_review && now >= self.not_before
    }

    /// Clears the lease. Returns whether Redis may hold amounts for it.
    pub(super) fn clear(&mut self) -> bool {
        self.left.fill(0);
        std::mem::take(&mut self.is_open)
    }

    /// Whether `take` would take the required amounts.
    pub(super) fn has(
        &mut self,
        now: Timestamp,
        quotas: &[Quota],
        touched: &[u32],
        required: &Required,
    ) -> bool {
        let amount = amount_of(quotas, required);
        let fits = |&index: &u32| {
            let index = index as usize;
            let is_affected =
                required.generates || quotas.get(index).is_some_and(|q| q.kind != Kind::CompletionTokens);
            !is_affected || (now < self.until[index] && self.left[index] >= amount(index).max(1))
        };
        let fits_all = !touched.is_empty() && touched.iter().all(fits);
        self.needs_review |= !fits_all;
        fits_all
    }

    /// Takes the required amounts from all touched quotas, or from none.
    pub(super) fn take(
        &mut self,
        now: Timestamp,
        quotas: &[Quota],
        touched: &[u32],
        required: &Required,
    ) -> Option<()> {
        if !self.has(now, quotas, touched, required) {
            return None;
        }
        let amount = amount_of(quotas, required);
        for index in touched.iter().map(|&index| index as usize) {
            let left = self.left[index].saturating_sub(amount(index));
            self.left[index] = left;
            self.needs_review |= left <= self.low[index];
        }
        Some(())
    }

    /// Compares the lease with the levels of all quotas.
    pub(super) fn review(&mut self, now: Timestamp, levels: &[QuotaLevel], nodes: u64) -> LeaseAction {
        let action = self.next_action(now, levels, nodes);
        let takes = matches!(action, LeaseAction::Take(_));
        self.needs_review = false;
        self.not_before = if takes { now } else { now.plus_ms(REVIEW_INTERVAL_MS) };
        action
    }

    fn next_action(&mut self, now: Timestamp, levels: &[QuotaLevel], nodes: u64) -> LeaseAction {
        let max_lease = |level: &QuotaLevel| level.quota.capacity() / MAX_LEASED_DIVISOR / nodes.max(1);
        let is_below =
            |level: &QuotaLevel, divisor: u64| level.level < (level.quota.capacity() / divisor).cast_signed();
        let mut wants_more = false;
        let mut is_scarce = false;
        let cells = self.left.iter().zip(&self.until).zip(&mut self.low);
        for (level, ((&left, &until), low)) in levels.iter().zip(cells) {
            *low = max_lease(level) / 2;
            if is_below(level, RETURN_DIVISOR) || left > 2 * max_lease(level) {
                return if self.is_open { LeaseAction::Return } else { LeaseAction::Keep };
            }
            is_scarce |= is_below(level, TAKE_DIVISOR);
            let left = if now < until { left } else { 0 };
            wants_more |= max_lease(level) > 0 && left <= *low;
        }
        if wants_more && !is_scarce {
            LeaseAction::Take(levels.iter().map(max_lease).collect())
        } else {
            LeaseAction::Keep
        }
    }

    /// Records that a larger lease was requested. Redis may grant it even if the reply is lost.
    pub(super) fn mark_requested(&mut self) {
        self.is_open = true;
    }

    /// Adds the amounts that Redis granted.
    pub(super) fn grow(&mut self, reply: &ScriptReply) {
        self.mark_requested();
        let cells = self.left.iter_mut().zip(&mut self.until);
        for ((left, until), (&more, (state, _))) in cells.zip(reply.values.iter().zip(&reply.states)) {
            let (expiry, has_expired) = match state {
                CounterState::Calendar { period: (start, end), .. } => (*end, *until <= *start),
                CounterState::Rolling { .. } => (Timestamp(i64::MAX), false),
            };
            let more = u64::try_from(more).unwrap_or(0);
            *left = if has_expired { more } else { left.saturating_add(more) };
            *until = expiry;
        }
    }
}

/// The required amount of the quota at an index.
fn amount_of(quotas: &[Quota], required: &Required) -> impl Fn(usize) -> u64 {
    move |index| quotas.get(index).map_or(u64::MAX, |quota| required.amounts.of(quota.kind))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quota::{Amounts, Period, Quotas, Scope, Window};
    use crate::redis::{OverrideMark, Verdict};

    fn quota(kind: Kind, limit: u64) -> Quota {
        let per = Period { text: "hour".into(), ms: 3_600_000 };
        Quota { scope: Scope::Environment, kind, limit, per, window: Window::Rolling { burst: limit } }
    }

    fn granted(quotas: &[Quota], more: &[i64]) -> ScriptReply {
        let states = Quotas::new(quotas, Timestamp(0)).states(Timestamp(0));
        let states = states.into_iter().map(|state| (state, OverrideMark::None)).collect();
        ScriptReply { verdict: Verdict::Done, now: Timestamp(0), values: more.to_vec(), states }
    }

    fn required(prompt: u64, completion: u64) -> Required {
        Required { amounts: Amounts::of_request(prompt, completion), generates: true }
    }

    #[test]
    fn a_request_takes_from_all_touched_quotas_or_from_none() {
        let quotas = [quota(Kind::TotalTokens, 10_000), quota(Kind::Requests, 100)];
        let mut lease = Lease::new(2);
        assert_eq!(lease.take(Timestamp(0), &quotas, &[0, 1], &required(5, 5)), None);
        lease.grow(&granted(&quotas, &[100, 2]));
        assert_eq!(lease.take(Timestamp(0), &quotas, &[0, 1], &required(60, 41)), None);
        assert_eq!(lease.take(Timestamp(0), &quotas, &[0, 1], &required(60, 30)), Some(()));
        assert_eq!((lease.left[0], lease.left[1]), (10, 1));
        assert_eq!(lease.take(Timestamp(0), &quotas, &[0, 1], &required(6, 5)), None, "too large");
        assert_eq!(lease.take(Timestamp(0), &quotas, &[0, 1], &required(5, 5)), Some(()));
        assert_eq!(lease.take(Timestamp(0), &quotas, &[0, 1], &required(0, 0)), None, "the lease is used up");
        assert!(lease.clear() && !lease.clear(), "the lease is returned once");
    }

    #[test]
    fn nodes_lease_at_most_a_fiftieth_of_a_quota_and_nothing_of_a_nearly_exhausted_one() {
        let quotas = [quota(Kind::TotalTokens, 10_000)];
        let mut lease = Lease::new(1);
        let mut levels = Quotas::new(&quotas, Timestamp(0)).levels(Timestamp(0));
        assert_eq!(lease.review(Timestamp(0), &levels, 1), LeaseAction::Take(vec![200]));
        assert_eq!(lease.review(Timestamp(0), &levels, 4), LeaseAction::Take(vec![50]));
        lease.grow(&granted(&quotas, &[50]));
        assert_eq!(lease.review(Timestamp(0), &levels, 4), LeaseAction::Keep);
        levels[0].level = 1_999;
        lease.left[0] = 0;
        assert_eq!(lease.review(Timestamp(0), &levels, 4), LeaseAction::Keep, "less than a fifth is left");
        levels[0].level = 999;
        assert_eq!(lease.review(Timestamp(0), &levels, 4), LeaseAction::Return);
        lease.clear();
        assert_eq!(lease.review(Timestamp(0), &levels, 4), LeaseAction::Keep);
    }

    #[test]
    fn a_lease_of_a_calendar_quota_expires_with_the_period() {
        let zone = jiff::tz::TimeZone::UTC;
        let window = Window::Calendar { unit: crate::quota::ClockUnit::Hour, zone };
        let quotas = [Quota { window, ..quota(Kind::TotalTokens, 10_000) }];
        let mut lease = Lease::new(1);
        lease.grow(&granted(&quotas, &[200]));
        let next = Timestamp(3_600_000);
        assert_eq!(lease.take(next, &quotas, &[0], &required(5, 5)), None);
        let levels = Quotas::new(&quotas, next).levels(next);
        assert_eq!(lease.review(next, &levels, 1), LeaseAction::Take(vec![200]));
        assert_eq!(lease.take(Timestamp(3_599_999), &quotas, &[0], &required(5, 5)), Some(()));
    }
}
