//! The open streams of one connection with HTTP/2: each is one request.

use crate::clock::Stopwatch;
use crate::server::peer::Peer;
use futures_util::future::FutureExt as _;
use futures_util::task::AtomicWaker;
use hyper::body::{Body, Frame, SizeHint};
use hyper::rt::Executor;
use std::collections::HashMap;
use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::{Sleep, sleep_until, timeout};

/// The open streams of one connection.
#[derive(Debug, Default)]
pub(super) struct Streams {
    open: Mutex<HashMap<u64, Arc<Stream>>>,
    /// The stream whose request the service has received and whose task has not started. hyper does both in one call.
    announced: Mutex<Option<Arc<Stream>>>,
    started: AtomicU64,
    /// A stream has begun or ended.
    changed: Notify,
}

/// One stream.
#[derive(Debug)]
pub(super) struct Stream {
    peer: Arc<Peer>,
    /// Pieces of the answer that hyper has taken.
    pieces: AtomicU32,
    /// hyper has taken a piece, and has not requested the next one.
    has_piece: AtomicBool,
    /// The task of the stream.
    task: AtomicWaker,
}

impl Stream {
    /// Whether the body of the request is still arriving.
    pub(super) fn is_receiving(&self) -> bool {
        self.peer.is_receiving()
    }

    /// Whether the request must end.
    pub(super) fn is_cut_off(&self) -> bool {
        self.peer.is_cut_off()
    }

    /// Makes the request end: without an answer it is refused, and an answer is interrupted.
    pub(super) fn end_request(&self) {
        self.peer.end_request();
        // The waker of the peer may belong to a task that outlives the caller. The body is polled by this one.
        self.task.wake();
    }
}

impl Streams {
    /// Records the request of a new stream.
    pub(super) fn announce(&self, peer: &Arc<Peer>) -> Arc<Stream> {
        let stream = Arc::new(Stream {
            peer: peer.clone(),
            pieces: AtomicU32::new(0),
            has_piece: AtomicBool::new(false),
            task: AtomicWaker::new(),
        });
        *self.announced.lock().unwrap_or_else(PoisonError::into_inner) = Some(stream.clone());
        stream
    }

    /// The number of streams so far.
    pub(super) fn started(&self) -> u64 {
        self.started.load(Ordering::Relaxed)
    }

    /// All open streams.
    pub(super) fn open(&self) -> Vec<Arc<Stream>> {
        self.lock().values().cloned().collect()
    }

    /// Returns when no stream has been open for this time.
    pub(super) async fn idle_for(&self, time: Duration) {
        loop {
            let mut changed = pin!(self.changed.notified());
            changed.as_mut().enable();
            if !self.lock().is_empty() {
                changed.await;
            } else if timeout(time, changed).await.is_err() {
                return;
            }
        }
    }

    /// Returns when a stream has begun.
    pub(super) async fn first(&self) {
        loop {
            let mut changed = pin!(self.changed.notified());
            changed.as_mut().enable();
            if self.started() > 0 {
                return;
            }
            changed.await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Arc<Stream>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin(self: &Arc<Self>, stream: &Arc<Stream>) -> OpenStream {
        let id = self.started.fetch_add(1, Ordering::Relaxed);
        self.lock().insert(id, stream.clone());
        self.changed.notify_waiters();
        OpenStream { streams: self.clone(), id }
    }
}

/// Dropping it ends the stream.
struct OpenStream {
    streams: Arc<Streams>,
    id: u64,
}

impl Drop for OpenStream {
    fn drop(&mut self) {
        self.streams.lock().remove(&self.id);
        self.streams.changed.notify_waiters();
    }
}

/// Runs the streams of one connection.
#[derive(Clone, Debug)]
pub(super) struct StreamExecutor(pub(super) Arc<Streams>);

impl<F> Executor<F> for StreamExecutor
where
    F: Future<Output = ()> + Send + 'static,
{
    fn execute(&self, task: F) {
        let announced = self.0.announced.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(stream) = announced else {
            tokio::spawn(task);
            return;
        };
        let open = self.0.begin(&stream);
        tokio::spawn(supervise(task, stream).map(move |()| drop(open)));
    }
}

/// Runs a stream to its end. A caller that opens no room for its answer within the write timeout, or within the time limit
/// of the exchange, is cut off. hyper would wait for ever, and not poll the answer meanwhile.
async fn supervise(task: impl Future<Output = ()>, stream: Arc<Stream>) {
    let mut task = pin!(task);
    let mut timer: Option<Pin<Box<Sleep>>> = None;
    let mut stall: Option<(u32, Stopwatch)> = None;
    poll_fn(|cx| {
        stream.task.register(cx.waker());
        if task.as_mut().poll(cx).is_ready() {
            return Poll::Ready(());
        }
        if !stream.has_piece.load(Ordering::Relaxed) {
            stall = None;
            return Poll::Pending;
        }
        let piece = stream.pieces.load(Ordering::Relaxed);
        let (_, since) = *stall
            .filter(|(stalled, _)| *stalled == piece)
            .get_or_insert_with(|| (piece, Stopwatch::start()));
        stall = Some((piece, since));
        let due = stream.peer.write_deadline(since);
        let timer = timer.get_or_insert_with(|| Box::pin(sleep_until(due)));
        if timer.deadline() != due {
            timer.as_mut().reset(due);
        }
        timer.as_mut().poll(cx)
    })
    .await;
}

/// The body of an answer. It records whether hyper has taken all pieces.
pub(super) struct StreamBody<B> {
    pub(super) inner: B,
    pub(super) stream: Arc<Stream>,
    /// The request is a HEAD, whose answer has no body. hyper removes the body only in HTTP/1.1.
    pub(super) is_for_head: bool,
}

impl<B: Body + Unpin> Body for StreamBody<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        let frame = Pin::new(&mut self.inner).poll_frame(cx);
        let is_piece = matches!(frame, Poll::Ready(Some(Ok(_))));
        if is_piece {
            self.stream.pieces.fetch_add(1, Ordering::Relaxed);
        }
        self.stream.has_piece.store(is_piece, Ordering::Relaxed);
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.is_for_head || self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}
