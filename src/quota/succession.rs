//! Which earlier quota a quota of a changed config continues.
//!
//! A used amount belongs to the environment, to the caller or the pattern of models, and to the kind of quota. So a
//! quota whose period or window has changed continues with the amount that was used, and does not start full.

use super::{PersistedCounter, Quota};

/// The earlier quotas that a quota continues, by their indices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Predecessors {
    /// The same quota.
    pub own: Option<usize>,
    /// Another one, which it has replaced.
    pub replaced: Option<usize>,
}

/// For each quota, the earlier quotas whose used amounts it continues.
///
/// A quota continues the earlier one with the same period and window, if the last config had it. The others of a scope
/// and kind replace those of the last config that are absent now, the longest period the longest. If fewer quotas are
/// absent, the last of them has several successors. If none is, a new quota replaces one that an earlier config had.
pub fn predecessors(earlier: &[(Quota, PersistedCounter)], quotas: &[Quota]) -> Vec<Predecessors> {
    let same = |quota: &Quota| earlier.iter().position(|(before, _)| before.is_same_as(quota));
    let mut found: Vec<_> =
        quotas.iter().map(|quota| Predecessors { own: same(quota), replaced: None }).collect();
    let is_removed = |at: usize| earlier[at].1.is_removed;
    // An unlimited quota counts the amounts settled in its own period.
    let replaces = |at: &usize| found[*at].own.is_none_or(is_removed) && !quotas[*at].is_unlimited();
    let mut replacing: Vec<usize> = (0..quotas.len()).filter(replaces).collect();
    let is_absent =
        |at: &usize| found.iter().all(|found| found.own != Some(*at)) && !earlier[*at].0.is_unlimited();
    let mut absent: Vec<usize> = (0..earlier.len()).filter(is_absent).collect();
    replacing.sort_by_key(|&at| std::cmp::Reverse(quotas[at].per.ms));
    absent.sort_by_key(|&at| std::cmp::Reverse(earlier[at].0.per.ms));
    for (position, &at) in replacing.iter().enumerate() {
        let quota = &quotas[at];
        let is_sibling = |other: &Quota| other.scope == quota.scope && other.kind == quota.kind;
        let rank = replacing[..position].iter().filter(|&&longer| is_sibling(&quotas[longer])).count();
        let siblings = || absent.iter().copied().filter(|&before| is_sibling(&earlier[before].0));
        let of_last_config: Vec<usize> = siblings().filter(|&before| !is_removed(before)).collect();
        let is_new = found[at].own.is_none();
        let candidates =
            if of_last_config.is_empty() && is_new { siblings().collect() } else { of_last_config };
        found[at].replaced = candidates.get(rank).or(candidates.last()).copied();
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

    /// `removed`: the indices of earlier quotas that the last config did not have.
    fn all_found(earlier: &[Quota], removed: &[usize], quotas: &[Quota]) -> Vec<Predecessors> {
        let counter =
            |at| PersistedCounter { is_removed: removed.contains(&at), ..PersistedCounter::default() };
        let persisted: Vec<_> =
            earlier.iter().enumerate().map(|(at, quota)| (quota.clone(), counter(at))).collect();
        predecessors(&persisted, quotas)
    }

    /// The only predecessor of each quota.
    fn found(earlier: &[Quota], quotas: &[Quota]) -> Vec<Option<usize>> {
        let all = all_found(earlier, &[], quotas).into_iter();
        all.map(|Predecessors { own, replaced }| {
            assert!(own.is_none() || replaced.is_none());
            own.or(replaced)
        })
        .collect()
    }

    #[test]
    fn a_quota_that_comes_back_also_continues_the_one_that_it_replaces() {
        // In the order of `day`, `week`: the last config had the week only.
        for (earlier, removed, quotas, expected) in [
            (&[1, 7][..], &[0][..], &[1][..], (Some(0), Some(1))),
            (&[1, 7], &[0], &[7], (Some(1), None)),
            (&[1, 7], &[0], &[30], (None, Some(1))),
            (&[1, 7], &[0, 1], &[7], (Some(1), None)),
            (&[1, 7], &[0, 1], &[30], (None, Some(1))),
        ] {
            let found = all_found(&of_environment(earlier), removed, &of_environment(quotas))[0];
            assert_eq!((found.own, found.replaced), expected, "{earlier:?} {removed:?} {quotas:?}");
        }
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
