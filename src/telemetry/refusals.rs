//! How many requests were refused in the last minute, by environment and by quota.

use super::intervals::Intervals;
use crate::clock::Timestamp;
use crate::quota::Quota;
use foldhash::fast::FixedState;
use std::collections::HashMap;
use std::hash::{BuildHasher as _, Hash as _, Hasher as _};

/// A minute in intervals of 5 s.
type Minute = Intervals<12, 5_000>;
/// Maximum number of environments and quotas with a count. The config bounds their number; this bounds those that reloads
/// have removed.
const MAX_COUNTS: usize = 50_000;

/// Refusals of the last minute, counted in intervals.
#[derive(Debug, Default)]
pub(super) struct RecentRefusals(HashMap<u64, Minute>);

/// The number of refusals in the last minute.
#[derive(Debug, Default)]
pub(crate) struct RefusalCounts(HashMap<u64, u64>);

impl RefusalCounts {
    /// Refused requests of an environment.
    pub(crate) fn of_environment(&self, environment: &str) -> u64 {
        self.get(key(environment, None))
    }

    /// Requests that quotas of an upstream had no room for.
    pub(crate) fn of_upstream(&self, upstream: &str) -> u64 {
        self.get(upstream_key(upstream))
    }

    /// Requests that this quota of an environment, or of an upstream, had no room for.
    pub(crate) fn of_quota(&self, environment: &str, quota: &Quota) -> u64 {
        // Nearly always nothing was refused, and nothing has to be looked up.
        if self.0.is_empty() { 0 } else { self.get(key(environment, Some(quota))) }
    }

    fn get(&self, key: u64) -> u64 {
        self.0.get(&key).copied().unwrap_or(0)
    }
}

/// Identifies a quota of an environment, or the environment itself. Two of them have the same number with a probability of
/// less than 1 in 10^9.
fn key(environment: &str, quota: Option<&Quota>) -> u64 {
    let mut hasher = FixedState::default().build_hasher();
    // Refusals by a quota of an upstream count for all environments together.
    let is_of_upstream = quota.is_some_and(|quota| quota.scope.upstream().is_some());
    (if is_of_upstream { "" } else { environment }).hash(&mut hasher);
    if let Some(quota) = quota {
        let kind = quota.kind.as_str();
        (quota.scope.as_str(), quota.scope.name(), kind, &quota.per.text).hash(&mut hasher);
    }
    hasher.finish()
}

/// Identifies an upstream. No environment has a name with a colon.
fn upstream_key(upstream: &str) -> u64 {
    key(&format!("upstream:{upstream}"), None)
}

impl RecentRefusals {
    /// Counts a refused request of an environment. `quotas`: those that had no room.
    pub(super) fn add<'q>(
        &mut self,
        now: Timestamp,
        environment: &str,
        quotas: impl Iterator<Item = &'q Quota>,
    ) {
        self.count(now, key(environment, None));
        let mut counted: Option<&str> = None;
        for quota in quotas {
            self.count(now, key(environment, Some(quota)));
            // The quotas of an upstream follow each other.
            if let Some(upstream) = quota.scope.upstream()
                && counted != Some(upstream)
            {
                self.count(now, upstream_key(upstream));
                counted = Some(upstream);
            }
        }
    }

    fn count(&mut self, now: Timestamp, key: u64) {
        if self.0.len() >= MAX_COUNTS && !self.0.contains_key(&key) {
            self.remove_old(now);
            if self.0.len() >= MAX_COUNTS {
                return;
            }
        }
        self.0.entry(key).or_default().add(now);
    }

    fn remove_old(&mut self, now: Timestamp) {
        self.0.retain(|_, intervals| intervals.sum(now) > 0);
    }

    /// The counts at this time.
    pub(super) fn counts(&mut self, now: Timestamp) -> RefusalCounts {
        self.remove_old(now);
        RefusalCounts(self.0.iter_mut().map(|(key, intervals)| (*key, intervals.sum(now))).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quota::{Kind, Period, Scope, Window};

    fn at(seconds: i64) -> Timestamp {
        Timestamp((1_800_000_000 + seconds) * 1_000)
    }

    fn quota(name: &str) -> Quota {
        let per = Period { text: "minute".into(), ms: 60_000 };
        let scope = Scope::Caller(name.into());
        Quota { scope, kind: Kind::Requests, limit: 1, per, window: Window::Rolling { burst: 1 } }
    }

    #[test]
    fn refusals_are_counted_for_a_minute_by_environment_and_quota() {
        let mut refusals = RecentRefusals::default();
        let (a, b) = (quota("a"), quota("b"));
        refusals.add(at(0), "x", [&a, &b].into_iter());
        refusals.add(at(30), "x", std::iter::once(&a));
        refusals.add(at(31), "y", std::iter::empty());
        let counts = refusals.counts(at(54));
        assert_eq!(
            (counts.of_environment("x"), counts.of_environment("y"), counts.of_environment("z")),
            (2, 1, 0)
        );
        assert_eq!((counts.of_quota("x", &a), counts.of_quota("x", &b), counts.of_quota("y", &a)), (2, 1, 0));
        let counts = refusals.counts(at(60));
        assert_eq!((counts.of_environment("x"), counts.of_quota("x", &b)), (1, 0));
        assert_eq!(refusals.counts(at(100)).of_environment("x"), 0);
        assert!(refusals.0.is_empty());
    }

    #[test]
    fn refusals_by_an_upstream_count_for_all_environments_together() {
        let mut refusals = RecentRefusals::default();
        let of_upstream = Quota { scope: Scope::Upstream("u".into()), ..quota("a") };
        let per_day = Quota { per: Period { text: "day".into(), ms: 86_400_000 }, ..of_upstream.clone() };
        refusals.add(at(0), "x", [&of_upstream, &per_day].into_iter());
        refusals.add(at(0), "y", std::iter::once(&of_upstream));
        let counts = refusals.counts(at(1));
        assert_eq!((counts.of_upstream("u"), counts.of_upstream("v")), (2, 0));
        assert_eq!((counts.of_quota("", &of_upstream), counts.of_quota("x", &per_day)), (2, 1));
        assert_eq!(counts.of_environment("x"), 1);
    }

    #[test]
    fn counting_continues_after_the_clock_steps_back() {
        let mut refusals = RecentRefusals::default();
        refusals.add(at(1_000), "x", std::iter::empty());
        refusals.add(at(990), "x", std::iter::empty());
        assert_eq!(refusals.counts(at(1_000)).of_environment("x"), 2);
        refusals.add(at(0), "x", std::iter::empty());
        assert_eq!(refusals.counts(at(1)).of_environment("x"), 1);
        assert_eq!(refusals.counts(at(61)).of_environment("x"), 0);
    }
}
