//! The last requests that a quota or a limit rejected, for the admin API.

use super::Record;
use super::causes::{Causes, LastDay};
use super::denial::Denial;
use super::refusals::{RecentRefusals, RefusalCounts};
use crate::clock::{self, Timestamp};
use crate::error::ProxyError;
use crate::quota::{Shortfall, Wait};
use serde::Serialize;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use utoipa::ToSchema;

/// Number of rejections that are remembered.
const MAX_REJECTIONS: usize = 1_000;

/// The last rejections.
#[derive(Debug, Default)]
pub(crate) struct Rejections(Mutex<LastRejections>);

#[derive(Debug, Default)]
struct LastRejections {
    /// Oldest first.
    all: VecDeque<Rejection>,
    /// Number of rejections since the process started.
    total: u64,
    recent: RecentRefusals,
    causes: Causes,
}

/// One rejected request.
#[derive(Debug)]
pub(crate) struct Rejection {
    at: Timestamp,
    request_id: Box<str>,
    environment: Arc<str>,
    caller: Option<Arc<str>>,
    model: Box<str>,
    api: &'static str,
    error: ProxyError,
}

/// A rejection as the admin API shows it.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(crate) struct RejectionView {
    at: String,
    request_id: Box<str>,
    environment: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    caller: Option<String>,
    model: Box<str>,
    api: &'static str,
    code: &'static str,
    message: String,
    /// The scope of the limit that denied the request; of several quotas, the one with the longest wait.
    #[serde(skip_serializing_if = "Option::is_none")]
    scope: Option<&'static str>,
    /// The name within the scope. Absent: the environment.
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    /// Milliseconds until the request would fit. Absent: it can never fit, or the time is not known.
    #[serde(skip_serializing_if = "Option::is_none")]
    retry_after_ms: Option<u64>,
    quotas: Vec<ShortfallView>,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
struct ShortfallView {
    scope: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    kind: &'static str,
    per: String,
    limit: u64,
    remaining: u64,
    requested: u64,
    /// `None`: the request can never fit.
    retry_after_ms: Option<u64>,
}

impl Rejection {
    /// The rejection of the request that `record` describes.
    pub(crate) fn new(record: &Record, error: ProxyError) -> Self {
        Self {
            at: clock::now(),
            request_id: record.request_id.as_str().into(),
            environment: record.environment.clone(),
            caller: record.caller.clone(),
            model: record.model.as_str().into(),
            api: record.api,
            error,
        }
    }

    fn view(&self) -> RejectionView {
        let Self { at, request_id, environment, caller, model, api, error } = self;
        let denial = Denial::of_error(error);
        RejectionView {
            at: at.to_rfc3339(),
            request_id: request_id.clone(),
            environment: (**environment).to_owned(),
            caller: caller.as_deref().map(str::to_owned),
            model: model.clone(),
            api,
            code: error.code(),
            message: error.to_string(),
            scope: denial.as_ref().map(|denial| denial.scope),
            retry_after_ms: denial.as_ref().and_then(|denial| denial.retry_after_ms),
            name: denial.map(|denial| denial.name).filter(|name| !name.is_empty()),
            quotas: error.shortfalls().iter().map(ShortfallView::new).collect(),
        }
    }
}

impl ShortfallView {
    fn new(shortfall: &Shortfall) -> Self {
        let Shortfall { quota, remaining, requested, wait, .. } = shortfall;
        Self {
            scope: quota.scope.as_str(),
            name: Some(quota.scope.name().to_owned()).filter(|name| !name.is_empty()),
            kind: quota.kind.as_str(),
            per: quota.per.text.clone(),
            limit: quota.limit,
            remaining: *remaining,
            requested: *requested,
            retry_after_ms: match wait {
                Wait::Ms(ms) => Some((*ms).max(1)),
                Wait::Never => None,
            },
        }
    }
}

impl Rejections {
    /// Adds a rejection. The oldest one makes room.
    pub(crate) fn add(&self, rejection: Rejection) {
        let quotas = rejection.error.shortfalls().iter().map(|shortfall| &shortfall.quota);
        let mut last = self.lock();
        last.recent.add(rejection.at, &rejection.environment, quotas);
        let denial = Denial::of_error(&rejection.error);
        last.causes.add(rejection.at, &rejection.environment, rejection.error.code(), denial);
        if last.all.len() >= MAX_REJECTIONS {
            last.all.pop_front();
        }
        last.all.push_back(rejection);
        last.total += 1;
    }

    fn lock(&self) -> MutexGuard<'_, LastRejections> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Number of rejections since the process started.
    pub(crate) fn total(&self) -> u64 {
        self.lock().total
    }

    /// The rejections from number `from` to before number `to`, newest first, at most `limit`.
    pub(crate) fn between(&self, from: u64, to: u64, limit: usize) -> Vec<RejectionView> {
        let last = self.lock();
        let newest_first = (0..last.total).rev().zip(last.all.iter().rev());
        let selected = newest_first.filter(|(number, _)| (from..to).contains(number)).take(limit);
        selected.map(|(_, rejection)| rejection.view()).collect()
    }

    /// The number of refusals in the last minute.
    pub(crate) fn last_minute(&self) -> RefusalCounts {
        self.lock().recent.counts(clock::now())
    }

    /// The rejections of the last 24 hours by cause; of one environment if it is named.
    pub(crate) fn last_day(&self, environment: Option<&str>) -> LastDay {
        self.lock().causes.last_day(clock::now(), environment)
    }

    /// The last rejections, newest first; of one environment and caller if they are named.
    pub(crate) fn last(
        &self,
        limit: usize,
        environment: Option<&str>,
        caller: Option<&str>,
    ) -> Vec<RejectionView> {
        let last = self.lock();
        let matches = |rejection: &&Rejection| {
            environment.is_none_or(|name| *rejection.environment == *name)
                && caller.is_none_or(|name| rejection.caller.as_deref() == Some(name))
        };
        last.all.iter().rev().filter(matches).take(limit).map(Rejection::view).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::Metrics;

    #[test]
    fn the_last_thousand_are_kept_newest_first() {
        let rejections = Rejections::default();
        let mut record = Record::begin(Arc::new(Metrics::new().unwrap()));
        for n in 0..1_100 {
            record.request_id = n.to_string();
            record.environment = if n % 2 == 0 { "even" } else { "odd" }.into();
            record.caller = (n % 4 == 0).then(|| "a".into());
            rejections.add(Rejection::new(&record, ProxyError::ShuttingDown));
        }
        let ids = |views: &[RejectionView]| {
            views.iter().map(|view| view.request_id.to_string()).collect::<Vec<_>>()
        };
        assert_eq!(ids(&rejections.last(2, None, None)), ["1099", "1098"]);
        assert_eq!(ids(&rejections.last(2, Some("even"), None)), ["1098", "1096"]);
        assert_eq!(ids(&rejections.last(1, Some("even"), Some("a"))), ["1096"]);
        assert!(rejections.last(9, Some("odd"), Some("a")).is_empty());
        assert_eq!(ids(&rejections.last(5_000, None, None)).last().unwrap(), "100");
        assert_eq!(rejections.total(), 1_100);
        assert_eq!(ids(&rejections.between(1_097, 1_099, 9)), ["1098", "1097"]);
        assert_eq!(ids(&rejections.between(0, 1_100, 1)), ["1099"]);
        assert!(rejections.between(0, 100, 9).is_empty());
        assert_eq!(rejections.last_minute().of_environment("odd"), 550);
    }
}
