//! What a node leases of a cluster's quotas: it admits requests out of that without asking, and tells Redis
//! afterwards, a batch at a time. What is leased is held in Redis, so that nothing is admitted twice; all nodes
//! together lease so little that what they could still have admitted when another is denied is not worth
//! mentioning.

use crate::clock::Timestamp;
use crate::quota::{CounterState, Kind, Quota, QuotaLevel, Required};
use crate::redis::ScriptReply;

/// All nodes together lease so much of a quota's capacity at most: 1/50.
const LARGEST_PART: u64 = 50;
/// A lease is given back where less of a quota is left than this part of it: 1/10.
const NEAR_EXHAUSTION: u64 = 10;
/// And is taken again from this on: 1/5.
const PLENTY: u64 = 5;

/// Where it cannot have more, it does not look again for so long (ms): a look is one at all quotas.
const PAUSE_MS: u64 = 10;

/// What one node leases.
#[derive(Debug)]
pub(super) struct Lease {
    /// What is left of each quota's.
    left: Vec<u64>,
    /// When it lapses: at the end of a calendar's period.
    until: Vec<Timestamp>,
    /// Redis has something to take back.
    is_any: bool,
    /// From where on more of each is wanted.
    low: Vec<u64>,
    /// There may be something to do about it, but not before this time.
    is_to_be_looked_at: bool,
    not_before: Timestamp,
}

/// What is to be done about it.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Wants {
    Nothing,
    /// A quota is nearly exhausted: from here on every request asks Redis.
    ToGiveBack,
    /// So much of each quota, with what there is.
    More(Vec<u64>),
}

impl Lease {
    pub(super) fn nothing(quotas: usize) -> Self {
        Self {
            left: vec![0; quotas],
            until: vec![Timestamp(i64::MAX); quotas],
            is_any: false,
            low: vec![0; quotas],
            is_to_be_looked_at: true,
            not_before: Timestamp(0),
        }
    }

    /// Redis has told how all quotas stand.
    pub(super) fn look(&mut self) {
        self.is_to_be_looked_at = true;
        self.not_before = Timestamp(0);
    }

    /// Whether it is to be looked at what it wants.
    pub(super) fn is_due(&self, now: Timestamp) -> bool {
        self.is_to_be_looked_at && now >= self.not_before
    }

    /// Nothing is left; whether there was anything that has to be given back.
    pub(super) fn clear(&mut self) -> bool {
        self.left.fill(0);
        std::mem::take(&mut self.is_any)
    }

    /// Takes what is asked out of all quotas that are touched, or out of none.
    pub(super) fn take(
        &mut self,
        now: Timestamp,
        quotas: &[Quota],
        touched: &[u32],
        required: &Required,
    ) -> Option<()> {
        let amount =
            |index: usize| quotas.get(index).map_or(u64::MAX, |quota| required.amounts.of(quota.kind));
        let fits = |&index: &u32| {
            let index = index as usize;
            let is_asked =
                required.generates || quotas.get(index).is_some_and(|q| q.kind != Kind::CompletionTokens);
            !is_asked || (now < self.until[index] && self.left[index] >= amount(index).max(1))
        };
        if touched.is_empty() || !touched.iter().all(fits) {
            self.is_to_be_looked_at = true;
            return None;
        }
        for index in touched.iter().map(|&index| index as usize) {
            let left = self.left[index].saturating_sub(amount(index));
            self.left[index] = left;
            self.is_to_be_looked_at |= left <= self.low[index];
        }
        Some(())
    }

    /// Looks at how all quotas stand.
    pub(super) fn wants(&mut self, now: Timestamp, levels: &[QuotaLevel], nodes: u64) -> Wants {
        let wants = self.wanted(now, levels, nodes);
        let is_more = matches!(wants, Wants::More(_));
        self.is_to_be_looked_at = false;
        self.not_before = if is_more { now } else { now.plus_ms(PAUSE_MS) };
        wants
    }

    fn wanted(&mut self, now: Timestamp, levels: &[QuotaLevel], nodes: u64) -> Wants {
        let part = |level: &QuotaLevel| level.quota.capacity() / LARGEST_PART / nodes.max(1);
        let is_below =
            |level: &QuotaLevel, part: u64| level.level < (level.quota.capacity() / part).cast_signed();
        let mut wants_more = false;
        let mut is_scarce = false;
        let cells = self.left.iter().zip(&self.until).zip(&mut self.low);
        for (level, ((&left, &until), low)) in levels.iter().zip(cells) {
            *low = part(level) / 2;
            if is_below(level, NEAR_EXHAUSTION) || left > 2 * part(level) {
                return if self.is_any { Wants::ToGiveBack } else { Wants::Nothing };
            }
            is_scarce |= is_below(level, PLENTY);
            let left = if now < until { left } else { 0 };
            wants_more |= part(level) > 0 && left <= *low;
        }
        if wants_more && !is_scarce { Wants::More(levels.iter().map(part).collect()) } else { Wants::Nothing }
    }

    /// Redis may grant more, whether that is heard of or not.
    pub(super) fn is_asked_for(&mut self) {
        self.is_any = true;
    }

    /// Redis has granted so much more of each.
    pub(super) fn grow(&mut self, answer: &ScriptReply) {
        self.is_asked_for();
        let cells = self.left.iter_mut().zip(&mut self.until);
        for ((left, until), (&more, (state, _))) in cells.zip(answer.values.iter().zip(&answer.states)) {
            let (lapses, has_lapsed) = match state {
                CounterState::Calendar { period: (start, end), .. } => (*end, *until <= *start),
                CounterState::Rolling { .. } => (Timestamp(i64::MAX), false),
            };
            let more = u64::try_from(more).unwrap_or(0);
            *left = if has_lapsed { more } else { left.saturating_add(more) };
            *until = lapses;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quota::{Amounts, Period, Quotas, Scope, Window};
    use crate::redis::Verdict;

    fn quota(kind: Kind, limit: u64) -> Quota {
        let per = Period { text: "hour".into(), ms: 3_600_000 };
        Quota { scope: Scope::Environment, kind, limit, per, window: Window::Rolling { burst: limit } }
    }

    fn granted(quotas: &[Quota], more: &[i64]) -> ScriptReply {
        let states = Quotas::new(quotas, Timestamp(0)).states(Timestamp(0));
        let states = states.into_iter().map(|state| (state, false)).collect();
        ScriptReply { verdict: Verdict::Done, now: Timestamp(0), values: more.to_vec(), states }
    }

    fn required(prompt: u64, completion: u64) -> Required {
        Required { amounts: Amounts::of_request(prompt, completion), generates: true }
    }

    #[test]
    fn a_request_takes_from_all_that_it_touches_or_from_none() {
        let quotas = [quota(Kind::TotalTokens, 10_000), quota(Kind::Requests, 100)];
        let mut lease = Lease::nothing(2);
        assert_eq!(lease.take(Timestamp(0), &quotas, &[0, 1], &required(5, 5)), None);
        lease.grow(&granted(&quotas, &[100, 2]));
        assert_eq!(lease.take(Timestamp(0), &quotas, &[0, 1], &required(60, 41)), None);
        assert_eq!(lease.take(Timestamp(0), &quotas, &[0, 1], &required(60, 30)), Some(()));
        assert_eq!((lease.left[0], lease.left[1]), (10, 1));
        assert_eq!(lease.take(Timestamp(0), &quotas, &[0, 1], &required(6, 5)), None, "too large");
        assert_eq!(lease.take(Timestamp(0), &quotas, &[0, 1], &required(5, 5)), Some(()));
        assert_eq!(lease.take(Timestamp(0), &quotas, &[0, 1], &required(0, 0)), None, "nothing is left");
        assert!(lease.clear() && !lease.clear(), "it is given back once");
    }

    #[test]
    fn all_nodes_together_lease_a_fiftieth_and_nothing_where_little_is_left() {
        let quotas = [quota(Kind::TotalTokens, 10_000)];
        let mut lease = Lease::nothing(1);
        let mut levels = Quotas::new(&quotas, Timestamp(0)).levels(Timestamp(0));
        assert_eq!(lease.wants(Timestamp(0), &levels, 1), Wants::More(vec![200]));
        assert_eq!(lease.wants(Timestamp(0), &levels, 4), Wants::More(vec![50]));
        lease.grow(&granted(&quotas, &[50]));
        assert_eq!(lease.wants(Timestamp(0), &levels, 4), Wants::Nothing);
        levels[0].level = 1_999;
        lease.left[0] = 0;
        assert_eq!(lease.wants(Timestamp(0), &levels, 4), Wants::Nothing, "there is not plenty");
        levels[0].level = 999;
        assert_eq!(lease.wants(Timestamp(0), &levels, 4), Wants::ToGiveBack);
        lease.clear();
        assert_eq!(lease.wants(Timestamp(0), &levels, 4), Wants::Nothing);
    }

    #[test]
    fn what_was_leased_of_a_period_lapses_with_it() {
        let zone = jiff::tz::TimeZone::UTC;
        let window = Window::Calendar { unit: crate::quota::ClockUnit::Hour, zone };
        let quotas = [Quota { window, ..quota(Kind::TotalTokens, 10_000) }];
        let mut lease = Lease::nothing(1);
        lease.grow(&granted(&quotas, &[200]));
        let next = Timestamp(3_600_000);
        assert_eq!(lease.take(next, &quotas, &[0], &required(5, 5)), None);
        let levels = Quotas::new(&quotas, next).levels(next);
        assert_eq!(lease.wants(next, &levels, 1), Wants::More(vec![200]));
        assert_eq!(lease.take(Timestamp(3_599_999), &quotas, &[0], &required(5, 5)), Some(()));
    }
}
