//! Which earlier quota a quota of a changed config continues.
//!
//! A used amount belongs to the environment, to the caller or the pattern of models, and to the kind of quota. So a
//! quota whose period or window has changed continues with the amount that was used, and does not start full.

use super::Quota;

/// For each quota, the index of the earlier quota whose used amount it continues; `None`: it is new.
///
/// A quota continues the earlier one with the same period and window. The others of a scope and kind continue the
/// removed ones of that scope and kind, the longest period the longest. If fewer quotas were removed, the last
/// of them has several successors.
pub fn predecessors(earlier: &[&Quota], quotas: &[Quota]) -> Vec<Option<usize>> {
    let same = |quota: &Quota| earlier.iter().position(|before| before.is_same_as(quota));
    let mut found: Vec<Option<usize>> = quotas.iter().map(same).collect();
    // An unlimited quota counts the amounts settled in its own period.
    let is_new = |at: &usize| found[*at].is_none() && !quotas[*at].is_unlimited();
    let mut new: Vec<usize> = (0..quotas.len()).filter(is_new).collect();
    let is_removed = |at: &usize| !found.contains(&Some(*at)) && !earlier[*at].is_unlimited();
    let mut removed: Vec<usize> = (0..earlier.len()).filter(is_removed).collect();
    new.sort_by_key(|&at| std::cmp::Reverse(quotas[at].per.ms));
    removed.sort_by_key(|&at| std::cmp::Reverse(earlier[at].per.ms));
    for (position, &at) in new.iter().enumerate() {
        let quota = &quotas[at];
        let is_sibling = |other: &Quota| other.scope == quota.scope && other.kind == quota.kind;
        let rank = new[..position].iter().filter(|&&longer| is_sibling(&quotas[longer])).count();
        let mut candidates = removed.iter().copied().filter(|&before| is_sibling(earlier[before]));
        found[at] = candidates.clone().nth(rank).or_else(|| candidates.next_back());
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quota::{ClockUnit, Kind, Period, Scope, Window};
    use jiff::tz::TimeZone;

    fn quota(scope: Scope, kind: Kind, ms: u64, is_calendar: bool) -> Quota {
        let window = if is_calendar {
            Window::Calendar { unit: ClockUnit::Day, zone: TimeZone::UTC }
        } else {
            Window::Rolling { burst: 10 }
        };
        Quota { scope, kind, limit: 10, per: Period { text: format!("{ms}ms"), ms }, window }
    }

    fn of_environment(periods: &[u64]) -> Vec<Quota> {
        periods.iter().map(|&ms| quota(Scope::Environment, Kind::TotalTokens, ms, false)).collect()
    }

    fn found(earlier: &[Quota], quotas: &[Quota]) -> Vec<Option<usize>> {
        predecessors(&earlier.iter().collect::<Vec<_>>(), quotas)
    }

    #[test]
    fn a_quota_continues_the_one_that_it_replaces() {
        for (earlier, quotas, expected) in [
            (&[1, 60][..], &[60, 1][..], &[Some(1), Some(0)][..]),
            (&[1], &[60], &[Some(0)]),
            (&[1, 60], &[60, 300], &[Some(1), Some(0)]),
            (&[1, 60], &[5, 300], &[Some(0), Some(1)]),
            (&[1, 60], &[300], &[Some(1)]),
            (&[60], &[5, 300], &[Some(0), Some(0)]),
            (&[60], &[60, 1], &[Some(0), None]),
            (&[], &[60], &[None]),
            (&[60, 1], &[], &[]),
        ] {
            assert_eq!(
                found(&of_environment(earlier), &of_environment(quotas)),
                expected,
                "{earlier:?} {quotas:?}"
            );
        }
    }

    #[test]
    fn only_quotas_of_the_same_scope_and_kind_are_continued() {
        let caller = |name: &str| Scope::Caller(name.into());
        let earlier = [
            quota(Scope::Environment, Kind::Requests, 1, false),
            quota(caller("a"), Kind::TotalTokens, 1, false),
            quota(caller("b"), Kind::TotalTokens, 1, false),
        ];
        let changed = [
            quota(Scope::Environment, Kind::TotalTokens, 60, false),
            quota(caller("b"), Kind::TotalTokens, 60, false),
            quota(caller("c"), Kind::TotalTokens, 60, false),
            quota(Scope::Environment, Kind::Requests, 1, true),
        ];
        assert_eq!(found(&earlier, &changed), [None, Some(2), None, Some(0)]);
    }
}
