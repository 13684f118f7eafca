//! The task that reads the state for all streams, and the last state that it has read.

use super::{ConfigState, SnapshotEvent, Update, UpdateEvent};
use crate::admin::Admin;
use crate::admin::environments::EnvironmentState;
use crate::clock::{self, Timestamp};
use bytes::Bytes;
use serde::Serialize;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, broadcast};
use tokio::time::sleep;

/// Maximum number of streams.
const MAX_STREAMS: usize = 100;
/// Updates that a slow stream may be behind before it gets a new snapshot.
const MAX_BEHIND: usize = 4;
/// Minimum time between two updates.
const UPDATE_INTERVAL: Duration = Duration::from_secs(1);
/// Maximum number of rejections in an event.
const MAX_REJECTIONS: usize = 50;

/// The state that all streams share.
pub(in crate::admin) struct EventHub {
    permits: Arc<Semaphore>,
    updates: broadcast::Sender<Update>,
    state: Mutex<HubState>,
}

#[derive(Default)]
struct HubState {
    is_running: bool,
    /// `None`: the task has not read it yet.
    current: Option<Overview>,
    /// The number of `current`.
    number: u64,
    /// The snapshot of `current`, once a stream has needed it.
    snapshot: Option<Bytes>,
}

/// Everything that the events show, at one moment.
struct Overview {
    at: Timestamp,
    environments: Vec<EnvironmentState>,
    /// Number of rejections up to this moment.
    rejections: u64,
    config: ConfigState,
}

impl Default for EventHub {
    fn default() -> Self {
        Self {
            permits: Arc::new(Semaphore::new(MAX_STREAMS)),
            updates: broadcast::channel(MAX_BEHIND).0,
            state: Mutex::default(),
        }
    }
}

impl EventHub {
    fn lock(&self) -> MutexGuard<'_, HubState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A permit for one more stream. `None`: there are too many.
    pub(super) fn permit(&self) -> Option<OwnedSemaphorePermit> {
        self.permits.clone().try_acquire_owned().ok()
    }

    /// The updates from now on. Starts the task if it does not run.
    pub(super) fn subscribe(admin: &Admin) -> broadcast::Receiver<Update> {
        let mut state = admin.events.lock();
        if !std::mem::replace(&mut state.is_running, true) {
            tokio::spawn(run(admin.clone()));
        }
        admin.events.updates.subscribe()
    }

    /// The number and the event of the current state. `None`: it was not read yet.
    pub(super) fn snapshot(&self, admin: &Admin) -> Option<(u64, Bytes)> {
        let state = &mut *self.lock();
        let current = state.current.as_ref()?;
        let frame = state.snapshot.get_or_insert_with(|| current.snapshot(admin, state.number));
        Some((state.number, frame.clone()))
    }

    /// Replaces the current state and sends the changes. Returns `false` if there are no streams; then the task ends.
    fn publish(&self, admin: &Admin, now: Overview) -> bool {
        let mut state = self.lock();
        if self.updates.receiver_count() == 0 {
            *state = HubState { number: state.number, ..HubState::default() };
            return false;
        }
        let update = state.current.as_ref().map(|before| now.update_since(before, admin));
        let is_change = update.as_ref().is_none_or(UpdateEvent::is_change);
        if is_change {
            state.number += 1;
            state.snapshot = None;
        }
        if let Some(update) = update.filter(|_| is_change) {
            let frame = frame("update", state.number, &update);
            // An error means that the last stream has just ended.
            drop(self.updates.send(Update { number: state.number, frame }));
        }
        let is_first = state.current.is_none();
        state.current = Some(now);
        if is_first {
            // Wakes the streams that wait for the first state.
            drop(self.updates.send(Update { number: state.number, frame: Bytes::new() }));
        }
        true
    }
}

/// Reads and publishes the state while there are streams. The interval begins after an update is sent, because reading
/// takes longer at some times than at others.
async fn run(admin: Admin) {
    loop {
        let now = Overview::read(&admin).await;
        if !admin.events.publish(&admin, now) {
            return;
        }
        sleep(UPDATE_INTERVAL).await;
    }
}

impl Overview {
    async fn read(admin: &Admin) -> Self {
        let environments = EnvironmentState::of_all(admin).await;
        let (rejections, config) = (admin.state.rejections.total(), ConfigState::of(admin));
        Self { at: clock::now(), environments, rejections, config }
    }

    fn snapshot(&self, admin: &Admin, number: u64) -> Bytes {
        let snapshot = SnapshotEvent {
            at: self.at.to_rfc3339(),
            environments: self.environments.iter().map(EnvironmentState::view).collect(),
            rejections: admin.state.rejections.between(0, self.rejections, MAX_REJECTIONS),
            config: self.config.clone(),
        };
        frame("snapshot", number, &snapshot)
    }

    fn update_since(&self, before: &Self, admin: &Admin) -> UpdateEvent {
        let earlier: HashMap<&str, &EnvironmentState> =
            before.environments.iter().map(|state| (state.name(), state)).collect();
        let change = |state: &EnvironmentState| match earlier.get(state.name()) {
            Some(before) => state.change_since(before),
            None => Some(state.as_new()),
        };
        let names = |overview: &Self| -> Vec<String> {
            overview.environments.iter().map(|state| state.name().to_owned()).collect()
        };
        let (order, order_before) = (names(self), names(before));
        let is_removed = |name: &&String| order != order_before && !order.contains(name);
        let removed = order_before.iter().filter(is_removed).cloned().collect();
        UpdateEvent {
            at: self.at.to_rfc3339(),
            environments: self.environments.iter().filter_map(change).collect(),
            removed,
            order: (order != order_before).then_some(order),
            rejections: admin.state.rejections.between(before.rejections, self.rejections, MAX_REJECTIONS),
            config: (self.config != before.config).then(|| self.config.clone()),
        }
    }
}

impl UpdateEvent {
    fn is_change(&self) -> bool {
        let Self { at: _, environments, removed, order, rejections, config } = self;
        !environments.is_empty()
            || !removed.is_empty()
            || order.is_some()
            || !rejections.is_empty()
            || config.is_some()
    }
}

/// A server-sent event. JSON contains no line breaks.
fn frame(event: &str, number: u64, data: &impl Serialize) -> Bytes {
    let data = serde_json::to_string(data).unwrap_or_default();
    Bytes::from(format!("event: {event}\nid: {number}\ndata: {data}\n\n"))
}
