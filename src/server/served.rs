//! Marks the time during which the service has a request, up to the last byte of its answer's body.

use super::peer::{Peer, ServedRequest};
use futures_util::FutureExt as _;
use http::header::{CONNECTION, HeaderValue};
use http::{Request, Response};
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::service::{Service, service_fn};
use std::error::Error;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

/// The body of an answer, with the request that it answers.
pub(super) struct ServedBody<B> {
    inner: B,
    request: ServedRequest,
}

/// A service that records in `peer` when `inner` begins a request and when its answer's body ends.
pub(super) fn marking<S, B>(
    inner: S,
    peer: Arc<Peer>,
) -> impl Service<Request<Incoming>, Response = Response<ServedBody<B>>, Error = S::Error, Future: Send + 'static>
where
    S: Service<Request<Incoming>, Response = Response<B>> + 'static,
    S::Future: Send + 'static,
    S::Error: Into<Box<dyn Error + Send + Sync>>,
    B: Body + Unpin + 'static,
{
    service_fn(move |request| {
        let served = peer.begin_request(request.version());
        // Uses `map` because an async block would contain the inner future twice.
        inner.call(request).map(move |answer| answer.map(|answer| finished(answer, served)))
    })
}

/// The answer as it is sent: a server that closes its connections announces that.
fn finished<B>(answer: Response<B>, request: ServedRequest) -> Response<ServedBody<B>> {
    let closes = request.closes_connection();
    let mut answer = answer.map(|inner| ServedBody { inner, request });
    if closes {
        answer.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    }
    answer
}

impl<B: Body + Unpin> Body for ServedBody<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        let frame = Pin::new(&mut self.inner).poll_frame(cx);
        if matches!(frame, Poll::Ready(Some(Err(_)))) {
            self.request.cut_answer();
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}
