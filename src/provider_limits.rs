//! What an upstream's provider states about its own rate limits, and whether requests follow it.
//!
//! A provider limits the tokens and requests of a key and a model. Its answers state what is left. [`ProviderLimits`] has
//! one gate for each model of one upstream: all workers share it.

mod gate;
mod handover;
mod statement;

use crate::clock::{self, Stopwatch};
use crate::config::ProviderLimitsMode;
use crate::quota::Amounts;
use crate::wait_queue::WaitQueue;
use gate::{Gate, Hold, Verdict};
use http::{HeaderMap, StatusCode};
use statement::Statement;
use std::collections::HashMap;
use std::future::ready;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::timeout;

pub(crate) use gate::KindView;
pub(crate) use handover::LeftLimits;

/// Maximum number of models with a gate of their own. Requests of further models pass without one.
const MAX_MODELS: usize = 1_000;
/// The time of the gates when their upstream is new (ms). Gates that a new process takes over have statements from before
/// that; older ones count as this old.
const MAX_AGE_MS: u64 = 24 * 60 * 60 * 1_000;
/// The time that a request is advised to wait if the queue of its gate is full.
const FULL_QUEUE_WAIT: Duration = Duration::from_secs(1);

/// The gates of one upstream.
#[derive(Debug)]
pub(crate) struct ProviderLimits {
    mode: ProviderLimitsMode,
    /// Measures the time of the gates.
    epoch: Stopwatch,
    models: Mutex<HashMap<Box<str>, Arc<ModelGate>>>,
    /// Stated values that cannot be true.
    ignored: AtomicU64,
}

/// The gate of one model.
#[derive(Debug, Default)]
struct ModelGate {
    gate: Mutex<Gate>,
    queue: WaitQueue,
    /// Wakes the requests that wait for the slow start.
    answered: Notify,
    refusals: AtomicU64,
}

/// A request that may be sent. Dropping it without an answer forgets the request.
#[derive(Debug)]
pub(crate) struct Pass {
    gate: Arc<ModelGate>,
    number: u64,
}

/// The state of one gate.
#[derive(Clone, Debug)]
pub(crate) struct ModelView {
    pub(crate) model: String,
    pub(crate) kinds: Vec<KindView>,
    /// Milliseconds for which requests are not sent. `None`: they are.
    pub(crate) closed_ms: Option<u64>,
    /// Answers with status 429, 503 or 529.
    pub(crate) refusals: u64,
    /// Kinds of limits that are ignored, because answers contradict them.
    pub(crate) ignored_kinds: usize,
}

impl ProviderLimits {
    pub(crate) fn new(mode: ProviderLimitsMode) -> Self {
        Self { mode, epoch: Stopwatch::start(), models: Mutex::default(), ignored: AtomicU64::new(0) }
    }

    /// Whether requests follow the limits.
    pub(crate) fn are_followed(&self) -> bool {
        self.mode == ProviderLimitsMode::Follow
    }

    /// Waits until a request for this model may be sent: as long as the slow start lasts, which is at most a second, and
    /// for at most `max_wait` in all if that is longer. `waited` grows by the time of the wait. `Ok(None)`: the gateway does
    /// not follow the provider's limits.
    ///
    /// # Errors
    /// The provider would refuse the request. The time after which it may be sent.
    pub(crate) async fn pass(
        &self,
        model: &str,
        amounts: Amounts,
        max_wait: Duration,
        waited: &mut Option<Duration>,
    ) -> Result<Option<Pass>, Duration> {
        if !self.are_followed() {
            return Ok(None);
        }
        let Some(gate) = self.gate(model) else { return Ok(None) };
        // Requests that wait go first.
        let is_free = max_wait.is_zero() || gate.queue.is_empty();
        let passed = if is_free { gate.lock().pass(self.now(), amounts) } else { Err(Hold::Wait(0)) };
        let number = match passed {
            Ok(number) => number,
            Err(Hold::Wait(ms)) if max_wait < Duration::from_millis(ms) || max_wait.is_zero() => {
                return Err(Duration::from_millis(ms));
            }
            Err(hold) => {
                let clock = Stopwatch::start();
                let number = Box::pin(self.wait_at(&gate, amounts, max_wait, hold)).await;
                *waited = Some(waited.unwrap_or_default() + clock.elapsed());
                number?
            }
        };
        Ok(Some(Pass { gate, number }))
    }

    /// The time for which a request for this model would be held now. `None`: it would be sent.
    pub(crate) fn hold_of(&self, model: &str, amounts: Amounts) -> Option<Duration> {
        if !self.are_followed() {
            return None;
        }
        let gate = self.models.lock().unwrap_or_else(PoisonError::into_inner).get(model)?.clone();
        let hold = gate.lock().hold_of(self.now(), amounts);
        hold.map(Duration::from_millis)
    }

    /// Waits first for the slow start, together with all other requests, and then in the queue.
    async fn wait_at(
        &self,
        gate: &ModelGate,
        amounts: Amounts,
        max_wait: Duration,
        mut hold: Hold,
    ) -> Result<u64, Duration> {
        let clock = Stopwatch::start();
        while let Hold::SlowStart(ms) = hold {
            let answered = gate.answered.notified();
            tokio::pin!(answered);
            answered.as_mut().enable();
            // An answer may have come before this request began to listen.
            match gate.lock().pass(self.now(), amounts) {
                Ok(number) => return Ok(number),
                Err(again) => hold = again,
            }
            if let Hold::SlowStart(_) = hold {
                drop(timeout(Duration::from_millis(ms), answered).await);
            }
        }
        let pass = || gate.lock().pass(self.now(), amounts).map_err(Hold::time);
        let attempt = |left: Duration| ready(pass().map_err(|wait| (wait <= left).then_some(wait)));
        let left = max_wait.saturating_sub(clock.elapsed());
        match gate.queue.wait_in_turn(left, attempt).await {
            Some(number) => Ok(number),
            // It must not overtake the requests in the queue.
            None => {
                Err(gate.lock().hold_of(self.now(), amounts).map_or(FULL_QUEUE_WAIT, Duration::from_millis))
            }
        }
    }

    /// Reads the head of an answer. `pass`: what [`pass`](Self::pass) has returned for its request.
    pub(crate) fn answered(&self, pass: Option<&Pass>, model: &str, status: StatusCode, headers: &HeaderMap) {
        if self.mode == ProviderLimitsMode::Ignore {
            return;
        }
        let verdict = match status.as_u16() {
            429 | 503 | 529 => Verdict::Refused,
            200..=299 => Verdict::Accepted,
            _ => Verdict::Other,
        };
        let statement = Statement::read(headers, clock::now);
        self.ignored.fetch_add(statement.ignored, Ordering::Relaxed);
        if pass.is_none() && statement.is_empty() && verdict != Verdict::Refused {
            return;
        }
        let Some(gate) = pass.map(|pass| pass.gate.clone()).or_else(|| self.gate(model)) else {
            return;
        };
        if verdict == Verdict::Refused {
            gate.refusals.fetch_add(1, Ordering::Relaxed);
        }
        let mut state = gate.lock();
        let number = pass.map_or_else(|| state.send(self.now(), Amounts::default()), |pass| pass.number);
        state.answered(self.now(), number, &statement, verdict);
    }

    /// The gate of a model. `None`: there are too many models.
    fn gate(&self, model: &str) -> Option<Arc<ModelGate>> {
        let mut models = self.models.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = models.get(model) {
            return Some(known.clone());
        }
        if models.len() >= MAX_MODELS {
            // Invented names get no statement of the provider.
            models.retain(|_, known| known.lock().is_informed());
        }
        if models.len() >= MAX_MODELS {
            return None;
        }
        let new = Arc::new(ModelGate::default());
        models.insert(model.into(), new.clone());
        Some(new)
    }

    fn now(&self) -> u64 {
        MAX_AGE_MS.saturating_add(u64::try_from(self.epoch.elapsed().as_millis()).unwrap_or(u64::MAX))
    }

    /// Stated values that cannot be true, since the process started.
    pub(crate) fn ignored(&self) -> u64 {
        self.ignored.load(Ordering::Relaxed)
    }

    /// The gates of all models about which the provider has stated something, by name.
    pub(crate) fn view(&self) -> Vec<ModelView> {
        let models: Vec<(Box<str>, Arc<ModelGate>)> = {
            let models = self.models.lock().unwrap_or_else(PoisonError::into_inner);
            models.iter().map(|(name, gate)| (name.clone(), gate.clone())).collect()
        };
        let now = self.now();
        let view = |(model, of_model): (Box<str>, Arc<ModelGate>)| {
            let gate = of_model.lock();
            ModelView {
                model: model.into(),
                kinds: gate.view(now),
                closed_ms: gate.closed_ms(now),
                refusals: of_model.refusals.load(Ordering::Relaxed),
                ignored_kinds: gate.ignored_kinds(),
            }
        };
        let mut views: Vec<ModelView> = models.into_iter().map(view).collect();
        views.retain(|view| !view.kinds.is_empty() || view.refusals > 0);
        views.sort_by(|a, b| a.model.cmp(&b.model));
        views
    }
}

impl ModelGate {
    fn lock(&self) -> MutexGuard<'_, Gate> {
        self.gate.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        // Does nothing if the answer has been applied.
        self.gate.lock().abandoned(self.number);
        self.gate.answered.notify_waiters();
        self.gate.queue.notify_released();
    }
}
