//! One upstream: its replicas, their connections, and the exchange of one request.
//!
//! HTTP/2 is used where the upstream offers it by ALPN, otherwise HTTP/1.1. Redirects are not followed, nothing
//! is decompressed, and no proxy is taken from the environment variables.

mod answer;
pub(crate) mod availability;
mod balancer;
mod connect;
mod connections;
mod diagnosis;
mod health_checks;
mod http1;
mod http2;
mod key_mask;
mod replica;
mod replica_status;
mod request;
mod tls;
mod tls_fault;

use crate::clock::{self, Stopwatch};
use crate::{config, random};
use balancer::Choice;
use http::response;
use http2::Http2Timeouts;
use replica::{Connected, Replica};
use replica_status::InFlight;
use std::io::{self, ErrorKind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::time::timeout_at;
use tokio_rustls::rustls::ClientConfig;

pub use answer::{BodyFilter, Incoming};
pub(crate) use diagnosis::{DiagnosisStep, StepFault};
pub(crate) use health_checks::check_replicas;
#[cfg(feature = "fuzz")]
pub use http1::{ReadAnswer, read_answer};
pub use key_mask::KeyMask;
pub(crate) use key_mask::MAX_SEARCHED_BYTES;
pub use replica_status::ReplicaStatus;
pub(crate) use replica_status::{ReplicaView, Replicas};
pub use request::{ExchangeError, Request, SendError};
pub use tls::client_config;
pub(crate) use tls_fault::CertificateFault;

/// Shorter than the usual keep-alive times of servers, which are 60 to 75 s.
const IDLE_TIMEOUT: Duration = Duration::from_secs(50);
/// A request that is sent on an HTTP/2 connection whose peer no longer answers waits at most 15 s before it is retried.
const HTTP2_TIMEOUTS: Http2Timeouts = Http2Timeouts {
    ping_interval: Duration::from_secs(10),
    ping_timeout: Duration::from_secs(5),
    idle: IDLE_TIMEOUT,
};

/// One upstream, as one worker uses it. Each worker has its own connections, so cores share no lock.
pub struct Upstream {
    settings: Arc<config::UpstreamSettings>,
    /// In the order of `statuses`.
    replicas: Box<[Arc<Replica>]>,
    statuses: Replicas,
    /// The state of the random numbers that choose replicas.
    random: AtomicU64,
}

/// A request at the replica that was chosen for it.
struct Placed {
    choice: Choice,
    in_flight: InFlight,
}

impl Upstream {
    /// Connects only with the first request. `statuses`: what all workers know of its replicas. `known`: the upstream that
    /// this one replaces. Replicas that both have keep their connections.
    ///
    /// # Errors
    /// A host cannot be a TLS server's name.
    pub(crate) fn new(
        settings: Arc<config::UpstreamSettings>,
        tls: &Arc<ClientConfig>,
        statuses: &Replicas,
        known: Option<&Self>,
    ) -> anyhow::Result<Self> {
        let replica = |status: &Arc<ReplicaStatus>| {
            let same = known.and_then(|known| known.replicas.iter().find(|r| Arc::ptr_eq(&r.status, status)));
            let new = || Replica::new(status.clone(), tls, status.connections.clone()).map(Arc::new);
            same.map_or_else(new, |same| Ok(same.clone()))
        };
        let replicas = statuses.iter().map(replica).collect::<anyhow::Result<_>>()?;
        let random = AtomicU64::new(random::number());
        Ok(Self { settings, replicas, statuses: statuses.clone(), random })
    }

    /// An upstream that shares nothing with others.
    ///
    /// # Errors
    /// A host cannot be a TLS server's name.
    pub fn alone(settings: Arc<config::UpstreamSettings>, tls: &Arc<ClientConfig>) -> anyhow::Result<Self> {
        let statuses = ReplicaStatus::of(&settings, None);
        Self::new(settings, tls, &statuses, None)
    }

    /// The settings that it was created with.
    pub fn settings(&self) -> &config::UpstreamSettings {
        &self.settings
    }

    /// Sends a request to one of the replicas and waits for the head of its answer.
    ///
    /// If a replica cannot be reached, nothing was sent, and the request goes to another one. A request is retried once,
    /// on a new connection, if it is lost on a reused connection, if another replica can get it, or if the upstream has
    /// certainly not processed it. It is never retried after a byte of its answer has arrived.
    ///
    /// `observe_sent` is called with the index of the replica before the first byte is written, and with `None` if the
    /// request turns out not to have been processed, or is about to be retried.
    ///
    /// # Errors
    /// See [`SendError`].
    pub async fn send(
        &self,
        request: &Request,
        started: Stopwatch,
        observe_sent: &mut (dyn FnMut(Option<usize>) + Send),
    ) -> Result<(response::Parts, Incoming), SendError> {
        let mut may_retry = true;
        let now = Stopwatch::start();
        let Some(mut placed) = self.place_at(&[], now) else { return Err(no_replica()) };
        if let Some(reused) = self.reuse(&placed, now) {
            observe_sent(Some(placed.choice.index));
            match self.exchange_at(placed.choice.index, reused, request, (started, now)).await {
                Err(SendError::Broken(error)) if error.is_retriable() => self.log_retry(&error),
                Ok(answer) => {
                    self.note_success(placed.choice);
                    return Ok(with_guard(answer, placed.in_flight));
                }
                Err(error) => return Err(error),
            }
            observe_sent(None);
            may_retry = false;
            // A lost connection can mean that its replica is down.
            placed = self.place_elsewhere(placed.choice.index).unwrap_or(placed);
        }
        let mut tried = Vec::new();
        loop {
            // Boxed because connecting is rare and its state is large: every request's future would have room for it.
            let (connected, in_flight, index) = Box::pin(self.connect(placed, started, &mut tried)).await?;
            observe_sent(Some(index));
            let times = (started, Stopwatch::start());
            let result = Box::pin(self.exchange_at(index, connected, request, times)).await;
            let Err(SendError::Broken(error)) = &result else {
                return result.map(|answer| with_guard(answer, in_flight));
            };
            let next = if may_retry { self.place_after(index, error) } else { None };
            if next.is_some() || error.is_not_processed() {
                observe_sent(None);
            }
            let Some(next) = next else { return result.map(|answer| with_guard(answer, in_flight)) };
            self.log_retry(error);
            if !error.is_not_processed() {
                tried.push(index);
            }
            may_retry = false;
            placed = next;
        }
    }

    /// Chooses the replica for a retry after an exchange with this one has failed on a new connection. `None`: the request
    /// is not retried. The same replica gets it again only if it has certainly not processed it.
    fn place_after(&self, index: usize, error: &ExchangeError) -> Option<Placed> {
        if error.is_not_processed() {
            return self.place_elsewhere(index).or_else(|| self.place(&[]));
        }
        if error.is_retriable() { self.place_elsewhere(index) } else { None }
    }

    /// Chooses another replica than this one. `None`: there is none that is not left out.
    fn place_elsewhere(&self, index: usize) -> Option<Placed> {
        self.place(&[index]).filter(|placed| !placed.choice.is_last_resort)
    }

    fn log_retry(&self, error: &ExchangeError) {
        tracing::debug!(%error, upstream = self.settings.name, "a request is retried on a new connection");
    }

    /// Chooses a replica that the request has not tried. `None`: it has tried all.
    fn place(&self, tried: &[usize]) -> Option<Placed> {
        self.place_at(tried, Stopwatch::start())
    }

    fn place_at(&self, tried: &[usize], now: Stopwatch) -> Option<Placed> {
        // SplitMix64: the values need not be secret, and workers need no common state.
        let mut random = self.random.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
        random = (random ^ (random >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        random = (random ^ (random >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        random ^= random >> 31;
        let choice = balancer::choose(&self.statuses, tried, random, now.uptime_ms())?;
        let in_flight = self.statuses.get(choice.index)?.begin_request();
        Some(Placed { choice, in_flight })
    }

    /// A connection that is open already. A probe needs a new one: that an old one still works does not show that the
    /// replica can be reached.
    fn reuse(&self, placed: &Placed, now: Stopwatch) -> Option<Connected> {
        let replica = self.replicas.get(placed.choice.index)?;
        if placed.choice.attempt.is_probe() { None } else { replica.reuse(now) }
    }

    /// One attempt on one connection, which begins `now`. Its time is bounded by `timeouts.first_byte` and `timeouts.total`.
    async fn exchange_at(
        &self,
        index: usize,
        connected: Connected,
        request: &Request,
        (started, now): (Stopwatch, Stopwatch),
    ) -> Result<(response::Parts, Incoming), SendError> {
        let first_byte = self.settings.timeouts.first_byte;
        let (limit, out_of_time) =
            self.bound((started, now), first_byte, SendError::Timeout("first_byte", first_byte));
        let Some(replica) = self.replicas.get(index) else { return Err(no_replica()) };
        let answer = replica.exchange(connected, request, now.deadline(limit)).await;
        answer.map_err(|error| if error.is_out_of_time() { out_of_time } else { SendError::Broken(error) })
    }

    /// The time limit of a step that begins `now`, shortened to the rest of `timeouts.total`, and the error when it
    /// elapses.
    fn bound(
        &self,
        (started, now): (Stopwatch, Stopwatch),
        step: Duration,
        error: SendError,
    ) -> (Duration, SendError) {
        let total = self.settings.timeouts.total;
        let left = total.saturating_sub(now.since(started));
        if left < step { (left, SendError::Timeout("total", total)) } else { (step, error) }
    }

    /// Opens a connection to the chosen replica. If that cannot be reached, opens one to another that is not in `tried`, each
    /// once. Replicas that are left out anyway share one `timeouts.connect`.
    async fn connect(
        &self,
        mut placed: Placed,
        started: Stopwatch,
        tried: &mut Vec<usize>,
    ) -> Result<(Connected, InFlight, usize), SendError> {
        let connect = self.settings.timeouts.connect;
        let mut last_resort: Option<Stopwatch> = None;
        loop {
            let (now, index) = (Stopwatch::start(), placed.choice.index);
            let step = if placed.choice.is_last_resort {
                connect.saturating_sub(now.since(*last_resort.get_or_insert(now)))
            } else {
                connect
            };
            let (limit, out_of_time) = self.bound((started, now), step, SendError::ConnectTimeout);
            let result = timeout_at(now.deadline(limit), self.connect_to(index)).await;
            match result.unwrap_or(Err(out_of_time)) {
                Ok(connected) => {
                    self.note_success(placed.choice);
                    return Ok((connected, placed.in_flight, index));
                }
                // The replica need not be the cause.
                Err(error @ SendError::Timeout(..)) => return Err(error),
                Err(error) => {
                    self.note_failure(placed.choice, &error);
                    tried.push(index);
                    let is_over = last_resort.is_some_and(|since| since.elapsed() >= connect);
                    placed = match self.place(tried) {
                        Some(next) if !(is_over && next.choice.is_last_resort) => next,
                        _ => return Err(error),
                    };
                }
            }
        }
    }

    /// Opens a connection. An only replica is tried once more if it refuses the connection, or closes it during the
    /// handshake.
    async fn connect_to(&self, index: usize) -> Result<Connected, SendError> {
        let Some(replica) = self.replicas.get(index) else { return Err(no_replica()) };
        match replica.connect().await {
            Err(SendError::Unreachable(_, error)) if is_disconnect(&error) && self.replicas.len() == 1 => {
                replica.connect().await
            }
            done => done,
        }
    }

    fn note_success(&self, choice: Choice) {
        let (index, was_left_out) = (choice.index, choice.attempt.succeeded());
        if was_left_out && let Some(replica) = self.statuses.get(index) {
            let (upstream, replica) = (&self.settings.name, replica.address());
            tracing::info!(upstream, replica, "the upstream can be reached again");
        }
    }

    fn note_failure(&self, choice: Choice, error: &SendError) {
        let (index, pause_ms) = (choice.index, choice.attempt.failed(clock::uptime_ms()));
        // Other errors of an only replica are logged with their requests.
        if let Some(pause_ms) = pause_ms
            && let [_, _, ..] = &*self.statuses
            && let Some(replica) = self.statuses.get(index)
        {
            let (upstream, replica, seconds) = (&self.settings.name, replica.address(), pause_ms / 1_000);
            tracing::warn!(upstream, replica, seconds, %error, "a replica cannot be reached and is left out");
        }
    }
}

/// The answer, which counts as in flight at its replica until its body is dropped.
fn with_guard(
    (parts, incoming): (response::Parts, Incoming),
    in_flight: InFlight,
) -> (response::Parts, Incoming) {
    (parts, incoming.counted(in_flight))
}

/// An upstream without replicas, which the config makes impossible.
fn no_replica() -> SendError {
    SendError::Unreachable("it has no replica", ErrorKind::NotFound.into())
}

/// Whether a connection was refused, closed or reset.
fn is_disconnect(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::ConnectionRefused
            | ErrorKind::ConnectionReset
            | ErrorKind::ConnectionAborted
            | ErrorKind::BrokenPipe
            | ErrorKind::UnexpectedEof
    )
}
