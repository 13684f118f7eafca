//! How many requests were refused in the last 24 hours, by cause.

use super::denial::Denial;
use super::intervals::Intervals;
use crate::clock::Timestamp;
use serde::Serialize;
use std::collections::HashMap;
use std::sync::Arc;
use utoipa::ToSchema;

/// A day in intervals of half an hour. So the sum covers the last 23.5 to 24 hours.
type Day = Intervals<48, 1_800_000>;

/// Maximum number of causes that are counted apart: half a megabyte. The rest is counted together.
const MAX_CAUSES: usize = 2_000;
/// Maximum number of causes that the admin API shows.
const MAX_SHOWN: usize = 100;

/// Refusals of the last 24 hours.
#[derive(Debug, Default)]
pub(super) struct Causes {
    counts: HashMap<Cause, Day>,
    /// Refusals for causes that are not counted apart.
    others: Day,
}

/// Why a request was refused.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Cause {
    environment: Arc<str>,
    code: &'static str,
    limit: Option<CauseLimit>,
}

/// The limit that denied the request; of several quotas, the one that takes longest to have room.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct CauseLimit {
    scope: &'static str,
    name: String,
    /// Kind and period of a quota.
    quota: Option<(&'static str, String)>,
}

/// The refusals of the last 24 hours.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(crate) struct LastDay {
    /// All of them.
    refusals: u64,
    /// The most frequent causes first, at most 100.
    causes: Vec<CauseView>,
}

/// A cause, and how often it was one.
#[derive(Clone, Debug, Serialize, ToSchema)]
struct CauseView {
    refusals: u64,
    environment: String,
    code: &'static str,
    /// The scope and owner of the limit, and the kind and period of a quota; absent for other causes.
    #[serde(skip_serializing_if = "Option::is_none")]
    scope: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    kind: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    per: Option<String>,
}

impl Causes {
    /// Counts a refused request.
    pub(super) fn add(
        &mut self,
        now: Timestamp,
        environment: &Arc<str>,
        code: &'static str,
        denial: Option<Denial>,
    ) {
        let limit = denial.map(|Denial { scope, name, quota, .. }| CauseLimit {
            scope,
            name,
            quota: quota.map(|quota| (quota.kind, quota.per)),
        });
        let cause = Cause { environment: environment.clone(), code, limit };
        if self.counts.len() >= MAX_CAUSES && !self.counts.contains_key(&cause) {
            self.counts.retain(|_, day| day.sum(now) > 0);
            if self.counts.len() >= MAX_CAUSES {
                return self.others.add(now);
            }
        }
        self.counts.entry(cause).or_default().add(now);
    }

    /// The counts at this time, of one environment if it is named.
    pub(super) fn last_day(&mut self, now: Timestamp, environment: Option<&str>) -> LastDay {
        let is_selected = |cause: &Cause| environment.is_none_or(|name| *cause.environment == *name);
        let selected = self.counts.iter_mut().filter(|(cause, _)| is_selected(cause));
        let mut causes: Vec<CauseView> = selected
            .map(|(cause, day)| CauseView::new(cause, day.sum(now)))
            .filter(|view| view.refusals > 0)
            .collect();
        causes.sort_by(|a, b| b.refusals.cmp(&a.refusals).then_with(|| a.order().cmp(&b.order())));
        let others = if environment.is_none() { self.others.sum(now) } else { 0 };
        let refusals = causes.iter().map(|view| view.refusals).sum::<u64>() + others;
        causes.truncate(MAX_SHOWN);
        LastDay { refusals, causes }
    }
}

impl CauseView {
    fn new(cause: &Cause, refusals: u64) -> Self {
        let Cause { environment, code, limit } = cause;
        let limit = limit.as_ref();
        let quota = limit.and_then(|limit| limit.quota.as_ref());
        Self {
            refusals,
            environment: (**environment).to_owned(),
            code,
            scope: limit.map(|limit| limit.scope),
            name: limit.map(|limit| limit.name.clone()).filter(|name| !name.is_empty()),
            kind: quota.map(|(kind, _)| *kind),
            per: quota.map(|(_, per)| per.clone()),
        }
    }

    /// Gives causes of the same frequency an order.
    fn order(&self) -> impl Ord + '_ {
        (&self.environment, self.code, self.scope, &self.name, self.kind, &self.per)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quota::{Kind, Period, Quota, Scope, Shortfall, Wait, Window};

    fn at(minutes: i64) -> Timestamp {
        Timestamp((30_000_000 + minutes) * 60_000)
    }

    fn denial(caller: &str) -> Denial {
        let per = Period { text: "minute".into(), ms: 60_000 };
        let scope = Scope::Caller(caller.into());
        let quota =
            Quota { scope, kind: Kind::Requests, limit: 1, per, window: Window::Rolling { burst: 1 } };
        let (remaining, used, held, requested, wait) = (0, 1, 0, 1, Wait::Ms(1));
        Denial::of_quota(&Shortfall { quota, remaining, used, held, requested, wait })
    }

    #[test]
    fn a_day_of_refusals_is_counted_by_cause_also_beyond_the_last_thousand() {
        let (x, y): (Arc<str>, Arc<str>) = ("x".into(), "y".into());
        let mut causes = Causes::default();
        for _ in 0..5_000 {
            causes.add(at(0), &x, "rate_limit_exceeded", Some(denial("a")));
        }
        for _ in 0..3 {
            causes.add(at(600), &y, "too_many_in_flight", Some(Denial::of_requests_in_flight(5, Some("u"))));
        }
        causes.add(at(600), &x, "rate_limit_exceeded", Some(denial("b")));
        let last_day = causes.last_day(at(700), None);
        let found: Vec<_> = last_day
            .causes
            .iter()
            .map(|c| (c.refusals, &*c.environment, c.name.as_deref(), c.kind))
            .collect();
        assert_eq!(last_day.refusals, 5_004);
        assert_eq!(
            found,
            [
                (5_000, "x", Some("a"), Some("requests")),
                (3, "y", Some("u"), None),
                (1, "x", Some("b"), Some("requests"))
            ]
        );
        assert_eq!(causes.last_day(at(700), Some("y")).refusals, 3);
        // The first ones are older than a day.
        assert_eq!(causes.last_day(at(24 * 60 + 1), None).refusals, 4);
        assert_eq!(causes.last_day(at(40 * 60), None).refusals, 0);
    }

    #[test]
    fn memory_is_bounded_and_no_refusal_is_lost() {
        let (x, mut causes) = (Arc::<str>::from("x"), Causes::default());
        for n in 0..MAX_CAUSES + 500 {
            causes.add(at(0), &x, "rate_limit_exceeded", Some(denial(&n.to_string())));
        }
        let last_day = causes.last_day(at(1), None);
        assert_eq!((last_day.refusals, last_day.causes.len()), (MAX_CAUSES as u64 + 500, MAX_SHOWN));
        assert_eq!(causes.counts.len(), MAX_CAUSES);
        // Causes of the day before make room.
        causes.add(at(2_000), &x, "rate_limit_exceeded", Some(denial("new")));
        assert_eq!(causes.counts.len(), 1);
    }
}
