//! Values of one upstream that its requests need, prepared once, and what the process has learned of it.

use super::headers::{self, Credential};
use super::model_lists::CachedList;
use crate::calibrations::Calibrations;
use crate::clock;
use crate::config::UpstreamSettings;
use crate::estimate::Provider;
use crate::upstream::availability::Availability;
use http::StatusCode;
use http::header::HeaderValue;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// After this many failures in a row, a route with several upstreams passes over the upstream.
const MAX_FAILURES: NonZeroU32 = NonZeroU32::MIN.saturating_add(4);

/// Refusals of a key are logged at most this often.
const KEY_REFUSAL_LOG_INTERVAL_MS: u64 = 60_000;

/// Values of one upstream. If a reload does not change the backend, its learned values stay.
pub(super) struct UpstreamContext {
    pub(super) settings: Arc<UpstreamSettings>,
    /// Index of its corrections of prompt estimates.
    pub(super) calibrations: usize,
    /// The service behind it.
    pub(super) provider: Provider,
    /// `None`: the upstream receives the caller's key.
    pub(super) credential: Option<Credential>,
    /// The value of `x-tollgate-upstream`. `None`: the name cannot be in a header.
    pub(super) header: Option<HeaderValue>,
    pub(super) learned: Arc<LearnedOfUpstream>,
}

/// What the process has learned of an upstream. All workers share it.
pub(super) struct LearnedOfUpstream {
    refuses_stream_options: AtomicBool,
    /// When a refusal of the key was last logged, in ms of `clock::uptime_ms`. 0: never.
    key_refusal_logged_ms: AtomicU64,
    /// Whether routes with several upstreams pass over it.
    pub(super) availability: Arc<Availability>,
    /// The models that it lists.
    pub(super) models: CachedList,
}

impl UpstreamContext {
    /// `known`: the contexts of the config before.
    pub(super) fn new<'k>(
        settings: &Arc<UpstreamSettings>,
        calibrations: &Calibrations,
        mut known: impl Iterator<Item = &'k Self>,
    ) -> Self {
        let same =
            known.find(|known| known.settings.is_same_backend(settings)).map(|known| known.learned.clone());
        Self {
            settings: settings.clone(),
            calibrations: calibrations.index_of(&settings.name),
            provider: Provider::of_upstream(settings),
            credential: headers::credential(settings),
            header: HeaderValue::from_bytes(settings.name.as_bytes()).ok(),
            learned: same.unwrap_or_else(|| Arc::new(LearnedOfUpstream::new())),
        }
    }

    /// Whether the gateway requests usage in streams of this upstream. It does not if `stream_usage` is `never`, or
    /// if the upstream has refused `stream_options`.
    pub(super) fn requests_stream_usage(&self) -> bool {
        self.settings.requests_stream_usage && !self.learned.refuses_stream_options.load(Ordering::Relaxed)
    }

    /// Records that the upstream refuses `stream_options`. The gateway adds them no more while this process runs, or
    /// until the upstream's settings change.
    pub(super) fn stop_requesting_stream_usage(&self) {
        if !self.learned.refuses_stream_options.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                upstream = self.settings.name,
                "the upstream refuses stream_options: the gateway no longer requests usage in its streams and counts \
                 the delivered text instead; set upstreams.*.stream_usage to never to avoid the refused first attempt"
            );
        }
    }

    /// Logs that the upstream refuses the configured key, at most once a minute. Callers take the 401 for a fault of their
    /// own key.
    pub(super) fn note_status(&self, status: StatusCode) {
        if status != StatusCode::UNAUTHORIZED || self.credential.is_none() {
            return;
        }
        let (logged, now) = (&self.learned.key_refusal_logged_ms, clock::uptime_ms().max(1));
        let before = logged.load(Ordering::Relaxed);
        let is_due = before == 0 || now.saturating_sub(before) >= KEY_REFUSAL_LOG_INTERVAL_MS;
        if is_due && logged.compare_exchange(before, now, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
            tracing::warn!(
                upstream = self.settings.name,
                "the upstream answers with 401: it refuses the key of the config; set api_key to a valid one"
            );
        }
    }
}

impl LearnedOfUpstream {
    fn new() -> Self {
        Self {
            refuses_stream_options: AtomicBool::new(false),
            key_refusal_logged_ms: AtomicU64::new(0),
            availability: Availability::new(MAX_FAILURES),
            models: CachedList::default(),
        }
    }
}
