//! `GET /api/events`: server-sent events with the state of all quotas, as it changes.
//!
//! One task reads the state once a second while there are streams, and sends the changes to all of them. So all
//! streams share the cost of one reading.

mod hub;

use super::Admin;
use super::access::Credential;
use super::answers::{AccessErrors, ErrorBody, NoParameters, ParameterErrors, refusal};
use super::audit::Actor;
use super::environments::{EnvironmentChange, EnvironmentView};
use crate::clock;
use crate::telemetry::RejectionView;
use axum::body::Body;
use axum::extract::{Extension, State};
use axum::response::{IntoResponse as _, Response};
use bytes::Bytes;
use futures_util::stream;
use http::{HeaderMap, StatusCode, header};
use serde::Serialize;
use std::convert::Infallible;
use std::time::Duration;
use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::broadcast::{self, error::RecvError};
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep_until};
use utoipa::ToSchema;

pub(super) use hub::EventHub;

/// Time between two heartbeats.
const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(15);
/// How often a stream checks whether it is still authorized and whether the gateway shuts down.
const CHECK_INTERVAL: Duration = Duration::from_millis(250);

/// The data of the event `snapshot`: the whole state.
#[derive(Serialize, ToSchema)]
pub(super) struct SnapshotEvent {
    /// RFC 3339.
    at: String,
    /// In the order of the config.
    environments: Vec<EnvironmentView>,
    /// The last rejections, newest first.
    rejections: Vec<RejectionView>,
    config: ConfigState,
}

/// The data of the event `update`: the changes since the previous event.
#[derive(Serialize, ToSchema)]
pub(super) struct UpdateEvent {
    /// RFC 3339.
    at: String,
    /// The environments that have changed or are new.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    environments: Vec<EnvironmentChange>,
    /// The names of environments that the config no longer has.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    removed: Vec<String>,
    /// The order of all environments, if environments were added or removed.
    #[serde(skip_serializing_if = "Option::is_none")]
    order: Option<Vec<String>>,
    /// New rejections, newest first.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    rejections: Vec<RejectionView>,
    #[serde(skip_serializing_if = "Option::is_none")]
    config: Option<ConfigState>,
}

/// The config in force.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub(super) struct ConfigState {
    /// When the config in force was loaded (RFC 3339).
    loaded_at: String,
    /// The faults of the config that was refused last. Empty: the last reload succeeded.
    faults: Vec<String>,
}

impl ConfigState {
    /// The present state.
    pub(super) fn of(admin: &Admin) -> Self {
        let loaded_at = admin.state.metrics.loaded_at().to_rfc3339();
        Self { loaded_at, faults: admin.reload.faults() }
    }
}

/// A stream of server-sent events with the state of all quotas, as it changes: first `snapshot` (SnapshotEvent), then `update`
/// (UpdateEvent) at most once a second, and `heartbeat` each 15 s.
#[utoipa::path(get, path = "/api/events", tag = "quotas", responses(
    (status = 200, description = "The stream.", body = str, content_type = "text/event-stream"),
    ParameterErrors,
    (status = 503, description = "`too_many_streams`: 100 streams are open.", body = ErrorBody),
    AccessErrors,
))]
pub(super) async fn events(
    State(admin): State<Admin>,
    Extension(actor): Extension<Actor>,
    headers: HeaderMap,
    _: NoParameters,
) -> Response {
    let Some(permit) = admin.events.permit() else {
        let message = "There are too many streams of events. Close some of the pages that show this gateway.";
        let mut response = refusal(StatusCode::SERVICE_UNAVAILABLE, "too_many_streams", message);
        response.headers_mut().insert(header::RETRY_AFTER, header::HeaderValue::from_static("5"));
        return response;
    };
    let stream = EventStream {
        receiver: EventHub::subscribe(&admin),
        credential: Credential::of(actor, &headers),
        admin,
        position: None,
        next_heartbeat: Instant::now() + HEARTBEAT_INTERVAL,
        _permit: permit,
    };
    let headers = [(header::CONTENT_TYPE, "text/event-stream"), (header::CACHE_CONTROL, "no-store")];
    let body = Body::from_stream(stream::unfold(stream, |mut stream| async move {
        let bytes = stream.next().await?;
        Some((Ok::<_, Infallible>(bytes), stream))
    }));
    (headers, body).into_response()
}

/// An event that the task sends to all streams.
#[derive(Clone, Debug)]
struct Update {
    /// The number of the state that this update leads to.
    number: u64,
    frame: Bytes,
}

/// The stream of one client. A client that reads slowly misses updates and gets a new snapshot instead.
struct EventStream {
    admin: Admin,
    credential: Credential,
    receiver: broadcast::Receiver<Update>,
    /// The number of the state that the client has. `None`: it needs a snapshot.
    position: Option<u64>,
    next_heartbeat: Instant,
    _permit: OwnedSemaphorePermit,
}

impl EventStream {
    /// The next bytes for the client. `None`: the stream ends.
    async fn next(&mut self) -> Option<Bytes> {
        let mut checks = interval_at(Instant::now() + CHECK_INTERVAL, CHECK_INTERVAL);
        checks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            if self.admin.state.is_closing() || !self.credential.is_valid(&self.admin) {
                return None;
            }
            if self.position.is_none()
                && let Some((number, frame)) = self.admin.events.snapshot(&self.admin)
            {
                self.position = Some(number);
                return Some(frame);
            }
            tokio::select! {
                received = self.receiver.recv() => match received {
                    Ok(update) if self.position.is_some_and(|position| update.number > position) => {
                        self.position = Some(update.number);
                        return Some(update.frame);
                    }
                    // The client has this state already, or gets a snapshot of it.
                    Ok(_) => {}
                    Err(RecvError::Lagged(_)) => self.position = None,
                    Err(RecvError::Closed) => return None,
                },
                () = sleep_until(self.next_heartbeat) => {
                    self.next_heartbeat = Instant::now() + HEARTBEAT_INTERVAL;
                    return Some(heartbeat());
                }
                _ = checks.tick() => {}
            }
        }
    }
}

fn heartbeat() -> Bytes {
    let at = clock::now().to_rfc3339();
    Bytes::from(format!(": heartbeat\nevent: heartbeat\ndata: {{\"at\":\"{at}\"}}\n\n"))
}
