//! Checks whether the replicas of an upstream are healthy (`upstreams.*.health`).

use super::replica::Replica;
use super::replica_status::{ReplicaStatus, Replicas};
use super::{Incoming, Request};
use crate::clock::Stopwatch;
use crate::config::{HealthCheckSettings, UpstreamSettings};
use crate::random;
use bytes::Bytes;
use futures_util::future::join_all;
use http::header::{ACCEPT_ENCODING, USER_AGENT};
use http::{HeaderValue, Method, StatusCode};
use std::future::poll_fn;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{sleep, timeout};
use tokio_rustls::rustls::ClientConfig;

/// Maximum size of a check's answer in bytes. The connection of a longer one is closed.
const MAX_ANSWER_BYTES: usize = 64 * 1024;
/// The first check of a replica comes within this time.
const MAX_FIRST_WAIT: Duration = Duration::from_secs(1);

/// Checks the replicas of an upstream regularly, if its settings require that. Ends only if they do not.
pub(crate) async fn check_replicas(
    settings: Arc<UpstreamSettings>,
    replicas: Replicas,
    tls: Arc<ClientConfig>,
) {
    let Some(health) = &settings.health else {
        return replicas.iter().for_each(|replica| replica.forget_health());
    };
    // The connections of checks are not those of requests, and are not counted with them.
    let replica = |status: &Arc<ReplicaStatus>| Replica::new(status.clone(), &tls, Arc::default());
    let checked: Vec<Replica> = replicas.iter().filter_map(|status| replica(status).ok()).collect();
    join_all(checked.iter().map(|replica| check_regularly(replica, &settings, health))).await;
}

async fn check_regularly(replica: &Replica, settings: &UpstreamSettings, health: &HealthCheckSettings) {
    let request = request(settings, health);
    // Replicas are not checked all at once.
    sleep(health.every.min(MAX_FIRST_WAIT).mul_f64(random_fraction())).await;
    loop {
        let limit = settings.timeouts.connect;
        let result = timeout(limit, check(replica, &request)).await;
        let result = result.unwrap_or_else(|_| Err(format!("no answer within {limit:.1?}")));
        let has_changed = replica.status.set_healthy(result.is_ok());
        if has_changed {
            let (upstream, replica) = (&settings.name, replica.status.address());
            match result {
                Ok(()) => tracing::info!(upstream, replica, "a replica passes its health check again"),
                Err(error) => {
                    tracing::warn!(
                        upstream,
                        replica,
                        error,
                        "a replica fails its health check and gets no requests until it passes one"
                    );
                }
            }
        }
        sleep(health.every.mul_f64(0.9 + 0.2 * random_fraction())).await;
    }
}

/// A number from 0 to 1.
fn random_fraction() -> f64 {
    let bits = u32::try_from(random::number() >> 32).unwrap_or(0);
    f64::from(bits) / f64::from(u32::MAX)
}

fn request(settings: &UpstreamSettings, health: &HealthCheckSettings) -> Request {
    let agent = HeaderValue::from_static(concat!("tollgate/", env!("CARGO_PKG_VERSION")));
    let own = [(ACCEPT_ENCODING, HeaderValue::from_static("identity")), (USER_AGENT, agent)];
    let own = own.into_iter().filter(|(name, _)| !settings.headers.contains_key(name));
    let configured = settings.headers.iter().map(|(name, value)| (name.clone(), value.clone()));
    Request {
        method: Method::GET,
        target: health.path.clone(),
        headers: own.chain(configured).collect(),
        body: Bytes::new(),
    }
}

/// One check, on an open connection if there is one.
async fn check(replica: &Replica, request: &Request) -> Result<(), String> {
    // The caller bounds the time.
    let due = Stopwatch::start().deadline(Duration::MAX);
    if let Some(reused) = replica.reuse(Stopwatch::start()) {
        match replica.exchange(reused, request, due).await {
            Ok((head, body)) => return judge(head.status, body).await,
            Err(error) if error.is_retriable() => {}
            Err(error) => return Err(error.to_string()),
        }
    }
    let connected = replica.connect().await.map_err(|error| error.to_string())?;
    let (head, body) = replica.exchange(connected, request, due).await.map_err(|error| error.to_string())?;
    judge(head.status, body).await
}

/// Reads the answer, so that its connection can be reused.
async fn judge(status: StatusCode, mut body: Incoming) -> Result<(), String> {
    if !status.is_success() {
        return Err(format!("status {status}"));
    }
    let mut length = 0;
    while let Some(Ok(data)) = poll_fn(|cx| body.poll_data(cx)).await {
        length += data.len();
        if length > MAX_ANSWER_BYTES {
            break;
        }
    }
    Ok(())
}
