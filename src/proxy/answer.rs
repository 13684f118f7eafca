//! The bodies of all answers to callers, and what becomes of those whose callers hang up.

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

/// So many answers are read to their end at once though their callers are gone.
const MOST_DRAINED: usize = 100;
/// And for so long after the caller has gone.
const LONGEST_DRAIN: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 30 });

static DRAINS: Semaphore = Semaphore::const_new(MOST_DRAINED);

/// The body of every answer to a caller.
pub struct AnswerBody(Kind);

enum Kind {
    /// Made here.
    Whole(Option<Bytes>),
    /// The upstream's. Taken when the caller hangs up.
    Metered(Option<Box<Metered>>),
}

/// Runs an exchange so that it goes on without its caller: an answer that comes then is read to its end.
pub(super) async fn outlive_caller(
    dialect: Dialect,
    exchange: impl Future<Output = Response<AnswerBody>> + Send + 'static,
) -> Response<AnswerBody> {
    let mut exchange = Detached(Some(tokio::spawn(exchange)));
    let Some(handle) = &mut exchange.0 else { unreachable!("it was put there in the line before") };
    let answer = handle.await;
    exchange.0 = None;
    match answer {
        Ok(answer) => answer,
        // A panic in there has settled and logged; the runtime's end leaves nobody to be answered.
        Err(_) => {
            ProxyError::Internal.into_response(dialect).map(|body| AnswerBody::whole(Some(body.into())))
        }
    }
}

/// A task that is given up when its caller is gone, unless there is room to let it run to its end.
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

/// One of the answers that are read to their end without a caller. Waiting for it and reading it take one
/// place and one time together.
struct Drain {
    _place: SemaphorePermit<'static>,
    until: Instant,
}

impl Drain {
    fn begin() -> Option<Self> {
        let until = Stopwatch::start().deadline(LONGEST_DRAIN);
        DRAINS.try_acquire().ok().map(|place| Self { _place: place, until })
    }

    async fn exchange(self, handle: JoinHandle<Response<AnswerBody>>) {
        let abort = handle.abort_handle();
        match timeout_at(self.until, handle).await {
            Ok(Ok(mut answer)) => {
                if let Some(metered) = answer.body_mut().take_unread() {
                    self.answer(metered).await;
                }
            }
            Ok(Err(_)) => {}
            Err(_) => abort.abort(),
        }
    }

    async fn answer(self, mut metered: Box<Metered>) {
        let drained = poll_fn(|cx| metered.poll_drained(cx));
        // What has come by then is counted when it is dropped.
        drop(timeout_at(self.until, drained).await);
    }
}

impl AnswerBody {
    /// Made here.
    pub(super) fn whole(bytes: Option<Bytes>) -> Self {
        Self(Kind::Whole(bytes))
    }

    /// The upstream's.
    pub(super) fn metered(metered: Metered) -> Self {
        Self(Kind::Metered(Some(Box::new(metered))))
    }

    /// What is to be read to its end though its caller has gone.
    fn take_unread(&mut self) -> Option<Box<Metered>> {
        match &mut self.0 {
            Kind::Metered(metered) => metered.take_if(|m| m.wants_to_drain()),
            Kind::Whole(_) => None,
        }
    }
}

/// The caller has hung up, or has all of it.
impl Drop for AnswerBody {
    fn drop(&mut self) {
        let Some(metered) = self.take_unread() else { return };
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
            Kind::Whole(bytes) => Poll::Ready(bytes.take().map(|b| Ok(Frame::data(b)))),
            Kind::Metered(Some(metered)) => Pin::new(metered.as_mut()).poll_frame(cx),
            Kind::Metered(None) => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.0 {
            Kind::Whole(bytes) => bytes.is_none(),
            Kind::Metered(metered) => metered.as_ref().is_none_or(Body::is_end_stream),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.0 {
            Kind::Whole(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, |b| b.len() as u64)),
            Kind::Metered(metered) => metered.as_ref().map_or_else(SizeHint::default, Body::size_hint),
        }
    }
}

#[cfg(test)]
mod tests;
