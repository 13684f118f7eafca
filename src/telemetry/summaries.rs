//! Figures for the admin API that metrics do not have: of each upstream, and of the estimates for each model.

use super::{AttemptOutcome, Record, RequestOutcome};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Number of answers from which the times to the first byte are taken.
const FIRST_BYTES: usize = 512;
/// Maximum number of names. The config bounds their number; this bounds the names that reloads have removed.
const MAX_NAMES: usize = 10_000;

/// All summaries, by name.
#[derive(Debug, Default)]
pub(crate) struct Summaries {
    upstreams: Mutex<BTreeMap<String, Arc<UpstreamSummary>>>,
    models: Mutex<BTreeMap<String, Arc<EstimateSummary>>>,
}

/// Requests to an upstream since the process started.
#[derive(Debug)]
pub(crate) struct UpstreamSummary {
    requests: AtomicU64,
    error_answers: AtomicU64,
    failed: AtomicU64,
    cut: AtomicU64,
    /// By outcome.
    attempts: [AtomicU64; AttemptOutcome::ALL.len()],
    /// The last times to the first byte in milliseconds plus 1, as a ring; 0: none yet.
    first_bytes: Box<[AtomicU32]>,
    next: AtomicUsize,
}

impl Default for UpstreamSummary {
    fn default() -> Self {
        Self {
            requests: AtomicU64::default(),
            error_answers: AtomicU64::default(),
            failed: AtomicU64::default(),
            cut: AtomicU64::default(),
            attempts: Default::default(),
            first_bytes: (0..FIRST_BYTES).map(|_| AtomicU32::default()).collect(),
            next: AtomicUsize::default(),
        }
    }
}

/// The figures of an upstream at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct UpstreamFigures {
    /// Requests sent.
    pub(crate) requests: u64,
    /// Answers with a status of 400 or more.
    pub(crate) error_answers: u64,
    /// Requests without an answer.
    pub(crate) failed: u64,
    /// Answers that ended before they were complete.
    pub(crate) cut: u64,
    /// Number of answers from which the next two are taken.
    pub(crate) timed: usize,
    /// Milliseconds to the first byte: the median and the 95th percentile.
    pub(crate) first_byte_ms: Option<(u32, u32)>,
}

impl UpstreamSummary {
    /// Adds a request that has ended. Ignores requests that were not sent to the upstream.
    pub(super) fn add(&self, record: &Record) {
        let count = match record.outcome {
            RequestOutcome::Refused | RequestOutcome::Rejected => return,
            RequestOutcome::UpstreamError => Some(&self.error_answers),
            RequestOutcome::UpstreamFailed => Some(&self.failed),
            RequestOutcome::UpstreamCut => Some(&self.cut),
            _ => None,
        };
        self.requests.fetch_add(1, Ordering::Relaxed);
        if let Some(count) = count {
            count.fetch_add(1, Ordering::Relaxed);
        }
        if let Some(outcome) = AttemptOutcome::of_last(record) {
            self.attempts[outcome as usize].fetch_add(1, Ordering::Relaxed);
        }
        if let Some(first_byte) = record.first_byte {
            let ms = u32::try_from(first_byte.as_millis()).unwrap_or(u32::MAX);
            let at = self.next.fetch_add(1, Ordering::Relaxed) % FIRST_BYTES;
            if let Some(slot) = self.first_bytes.get(at) {
                slot.store(ms.saturating_add(1), Ordering::Relaxed);
            }
        }
    }

    /// Adds an attempt after which the request went to another upstream.
    pub(super) fn add_attempt(&self, outcome: AttemptOutcome) {
        self.attempts[outcome as usize].fetch_add(1, Ordering::Relaxed);
        let count = match outcome {
            AttemptOutcome::RateLimited | AttemptOutcome::Unavailable => &self.error_answers,
            AttemptOutcome::Unreachable | AttemptOutcome::TimedOut => &self.failed,
            _ => return,
        };
        self.requests.fetch_add(1, Ordering::Relaxed);
        count.fetch_add(1, Ordering::Relaxed);
    }

    /// The number of attempts with each outcome that has occurred, and of answered ones.
    pub(super) fn attempts(&self) -> impl Iterator<Item = (AttemptOutcome, u64)> + '_ {
        let counts = self.attempts.iter().map(|count| count.load(Ordering::Relaxed));
        let is_shown = |outcome: &AttemptOutcome, count| count > 0 || *outcome == AttemptOutcome::Answered;
        AttemptOutcome::ALL.into_iter().zip(counts).filter(move |(outcome, count)| is_shown(outcome, *count))
    }

    pub(crate) fn figures(&self) -> UpstreamFigures {
        let times = self.first_bytes.iter().filter_map(|ms| ms.load(Ordering::Relaxed).checked_sub(1));
        let mut times: Vec<u32> = times.collect();
        times.sort_unstable();
        let percentile = |percent: usize| times.get((times.len().saturating_sub(1)) * percent / 100).copied();
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        UpstreamFigures {
            requests: read(&self.requests),
            error_answers: read(&self.error_answers),
            failed: read(&self.failed),
            cut: read(&self.cut),
            timed: times.len(),
            first_byte_ms: percentile(50).zip(percentile(95)),
        }
    }
}

/// How far estimates of prompts were off for one model, since the process started.
#[derive(Debug, Default)]
pub(crate) struct EstimateSummary {
    answers: AtomicU64,
    estimated: AtomicU64,
    reported: AtomicU64,
    /// The sum of the absolute differences.
    error: AtomicU64,
}

/// The figures of a model at one moment, in prompt tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct EstimateFigures {
    /// Answers that reported their prompt tokens.
    pub(crate) answers: u64,
    pub(crate) estimated: u64,
    pub(crate) reported: u64,
    /// The sum of the absolute differences.
    pub(crate) error: u64,
}

impl EstimateSummary {
    pub(super) fn add(&self, estimated: u64, reported: u64) {
        self.answers.fetch_add(1, Ordering::Relaxed);
        self.estimated.fetch_add(estimated, Ordering::Relaxed);
        self.reported.fetch_add(reported, Ordering::Relaxed);
        self.error.fetch_add(estimated.abs_diff(reported), Ordering::Relaxed);
    }

    pub(crate) fn figures(&self) -> EstimateFigures {
        let read = |sum: &AtomicU64| sum.load(Ordering::Relaxed);
        EstimateFigures {
            answers: read(&self.answers),
            estimated: read(&self.estimated),
            reported: read(&self.reported),
            error: read(&self.error),
        }
    }
}

impl Summaries {
    /// The summary of an upstream.
    pub(crate) fn upstream(&self, name: &str) -> Arc<UpstreamSummary> {
        find(&self.upstreams, name)
    }

    /// The summary of a model, by its label in metrics.
    pub(super) fn model(&self, label: &str) -> Arc<EstimateSummary> {
        find(&self.models, label)
    }

    /// The figures of all models with answers, by name.
    pub(crate) fn models(&self) -> Vec<(String, EstimateFigures)> {
        let all = lock(&self.models);
        let figures = all.iter().map(|(name, summary)| (name.clone(), summary.figures()));
        figures.filter(|(_, figures)| figures.answers > 0).collect()
    }
}

fn lock<T>(all: &Mutex<T>) -> MutexGuard<'_, T> {
    all.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Adds the name if it is new. With too many names, a new one gets a summary that is never shown.
fn find<T: Default>(all: &Mutex<BTreeMap<String, Arc<T>>>, name: &str) -> Arc<T> {
    let mut all = lock(all);
    if let Some(known) = all.get(name) {
        return known.clone();
    }
    let new = Arc::<T>::default();
    if all.len() < MAX_NAMES {
        all.insert(name.to_owned(), new.clone());
    }
    new
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::Metrics;
    use std::time::Duration;

    #[test]
    fn an_upstream_has_percentiles_of_its_last_answers_and_counts_of_its_errors() {
        let summaries = Summaries::default();
        let upstream = summaries.upstream("a");
        assert_eq!(upstream.figures(), UpstreamFigures::default());
        let mut record = Record::begin(Arc::new(Metrics::new().unwrap()));
        record.outcome = RequestOutcome::Answered;
        // Only the last 512 count: 88 to 599.
        for ms in 0..600 {
            record.first_byte = Some(Duration::from_millis(ms));
            upstream.add(&record);
        }
        record.first_byte = None;
        for outcome in [
            RequestOutcome::UpstreamError,
            RequestOutcome::UpstreamFailed,
            RequestOutcome::UpstreamCut,
            RequestOutcome::Rejected,
        ] {
            record.outcome = outcome;
            upstream.add(&record);
        }
        let figures = summaries.upstream("a").figures();
        assert_eq!((figures.requests, figures.error_answers, figures.failed, figures.cut), (603, 1, 1, 1));
        assert_eq!((figures.timed, figures.first_byte_ms), (512, Some((343, 573))));
        assert_eq!(summaries.upstream("b").figures().requests, 0);
    }

    #[test]
    fn a_model_has_the_sums_of_its_estimates() {
        let summaries = Summaries::default();
        summaries.model("m").add(90, 100);
        summaries.model("m").add(110, 100);
        summaries.model("unused");
        let expected = EstimateFigures { answers: 2, estimated: 200, reported: 200, error: 20 };
        assert_eq!(summaries.models(), [("m".to_owned(), expected)]);
    }

    #[test]
    fn the_number_of_names_is_bounded() {
        let summaries = Summaries::default();
        for n in 0..11_000 {
            summaries.model(&n.to_string()).add(1, 1);
        }
        assert_eq!(summaries.models().len(), MAX_NAMES);
    }
}
