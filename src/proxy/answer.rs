//! The bodies of all answers to callers, and the draining of answers whose callers have disconnected.

use super::metered::Metered;
use crate::api::Dialect;
use crate::clock::Stopwatch;
use crate::error::ProxyError;
use bytes::Bytes;
use http::Response;
use hyper::body::{Body, Frame, SizeHint};
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout_at};

/// At most this many answers are drained at once.
pub(super) const MAX_DRAINS: usize = 100;
/// An answer is drained for at most this long after its caller has disconnected.
pub(super) const MAX_DRAIN_TIME: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 30 });

pub(super) static DRAINS: Semaphore = Semaphore::const_new(MAX_DRAINS);

/// The body of every answer to a caller.
pub struct AnswerBody(AnswerSource);

enum AnswerSource {
    /// The gateway's own answer. `None`: it has no body, or the body is sent.
    Gateway(Option<Bytes>),
    /// The upstream's answer. `None`: it is being drained without the caller.
    Upstream(Option<Box<Metered>>),
}

/// Runs an exchange in a separate task. If the caller disconnects, the task continues and the answer is drained.
pub(super) async fn outlive_caller(
    dialect: Dialect,
    exchange: impl Future<Output = Response<AnswerBody>> + Send + 'static,
) -> Response<AnswerBody> {
    let mut detached = Detached(None);
    let answer = detached.0.insert(tokio::spawn(exchange)).await;
    // The task has ended: there is nothing to drain.
    detached.0 = None;
    // After a panic in the task, its charge has settled and its record is written.
    answer.unwrap_or_else(|_| {
        ProxyError::Internal.response(dialect).map(|body| AnswerBody::from_gateway(Some(body.into())))
    })
}

/// A task whose caller may disconnect. Dropping this drains the task, or aborts it if `MAX_DRAINS` tasks are draining.
struct Detached(Option<JoinHandle<Response<AnswerBody>>>);

impl Drop for Detached {
    fn drop(&mut self) {
        let Some(handle) = self.0.take() else { return };
        match (Drain::begin(), Handle::try_current()) {
            (Some(drain), Ok(runtime)) => drop(runtime.spawn(drain.exchange(handle))),
            _ => handle.abort(),
        }
    }
}

/// The permit and the deadline for draining one answer. Both cover the wait for its head and the reading of its body.
struct Drain {
    _permit: SemaphorePermit<'static>,
    deadline: Instant,
}

impl Drain {
    /// `None`: `MAX_DRAINS` answers are being drained.
    fn begin() -> Option<Self> {
        let deadline = Stopwatch::start().deadline(MAX_DRAIN_TIME);
        DRAINS.try_acquire().ok().map(|permit| Self { _permit: permit, deadline })
    }

    async fn exchange(self, handle: JoinHandle<Response<AnswerBody>>) {
        let abort = handle.abort_handle();
        match timeout_at(self.deadline, handle).await {
            Ok(Ok(mut answer)) => {
                if let Some(metered) = answer.body_mut().take_to_drain() {
                    self.answer(metered).await;
                }
            }
            Ok(Err(_)) => {}
            Err(_) => abort.abort(),
        }
    }

    async fn answer(self, mut metered: Box<Metered>) {
        let drained = poll_fn(|cx| metered.poll_drained(cx));
        // After the deadline the answer is dropped, which settles it with the text delivered so far.
        drop(timeout_at(self.deadline, drained).await);
    }
}

impl AnswerBody {
    /// The body of the gateway's own answer.
    pub(super) fn from_gateway(bytes: Option<Bytes>) -> Self {
        Self(AnswerSource::Gateway(bytes))
    }

    /// The body of an upstream's answer.
    pub(super) fn from_upstream(metered: Box<Metered>) -> Self {
        Self(AnswerSource::Upstream(Some(metered)))
    }

    /// Takes the upstream's answer if it is to be drained.
    fn take_to_drain(&mut self) -> Option<Box<Metered>> {
        match &mut self.0 {
            AnswerSource::Upstream(metered) => metered.take_if(|m| m.wants_drain()),
            AnswerSource::Gateway(_) => None,
        }
    }
}

/// Drains the answer if the caller has disconnected before its end and `on_disconnect` is `drain`.
impl Drop for AnswerBody {
    fn drop(&mut self) {
        let Some(metered) = self.take_to_drain() else { return };
        if let (Some(drain), Ok(runtime)) = (Drain::begin(), Handle::try_current()) {
            runtime.spawn(drain.answer(metered));
        }
    }
}

impl Body for AnswerBody {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        match &mut self.0 {
            AnswerSource::Gateway(bytes) => Poll::Ready(bytes.take().map(|b| Ok(Frame::data(b)))),
            AnswerSource::Upstream(Some(metered)) => Pin::new(metered.as_mut()).poll_frame(cx),
            AnswerSource::Upstream(None) => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.0 {
            AnswerSource::Gateway(bytes) => bytes.is_none(),
            AnswerSource::Upstream(metered) => metered.as_ref().is_none_or(Body::is_end_stream),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.0 {
            AnswerSource::Gateway(bytes) => {
                SizeHint::with_exact(bytes.as_ref().map_or(0, |b| b.len() as u64))
            }
            AnswerSource::Upstream(metered) => {
                metered.as_ref().map_or_else(SizeHint::default, Body::size_hint)
            }
        }
    }
}
