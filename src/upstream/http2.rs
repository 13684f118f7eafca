//! HTTP/2 to one upstream: one shared connection, its keep-alive and its idle timeout.

use super::connections::ConnectionCounts;
use super::request::{ExchangeError, Request};
use crate::clock::Stopwatch;
use bytes::Bytes;
use http::uri::Scheme;
use http::{Uri, response};
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use std::convert::Infallible;
use std::error::Error as _;
use std::io;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::sleep;

/// Maximum size of an answer's headers, as HTTP/2 counts it.
const MAX_HEADER_LIST_BYTES: u32 = 64 * 1024;

/// The times after which a connection is checked and closed.
#[derive(Clone, Copy)]
pub(super) struct Http2Timeouts {
    /// If nothing arrives on a connection for this time, the gateway sends a ping, even while the connection is idle.
    pub(super) ping_interval: Duration,
    /// A connection whose ping is not answered within this time is closed.
    pub(super) ping_timeout: Duration,
    /// A connection without streams is closed after this time.
    pub(super) idle: Duration,
}

/// The shared connection to an upstream, if there is one.
pub(super) struct Http2Client {
    current: SharedConnection,
    timeouts: Http2Timeouts,
    connections: Arc<ConnectionCounts>,
}

/// The connection that new requests use. `None`: there is none yet, or the last one was idle for too long.
type SharedConnection = Arc<Mutex<Option<Http2Connection>>>;

/// A connection, which can carry any number of streams.
#[derive(Clone)]
pub(super) struct Http2Connection {
    sender: http2::SendRequest<WholeBody>,
    activity: Arc<Activity>,
}

/// The usage of a connection.
struct Activity {
    connections: Arc<ConnectionCounts>,
    opened: Stopwatch,
    /// Streams in flight.
    streams: AtomicUsize,
    /// The time at which the last stream ended, in milliseconds since `opened`.
    idle_since_ms: AtomicU64,
}

/// One stream in flight. Dropping it ends the stream.
struct StreamGuard(Arc<Activity>);

/// The body of an answer.
pub(super) struct Http2Body {
    body: Incoming,
    _stream: StreamGuard,
}

/// The body of a request. It is sent in one frame, and is empty afterwards.
struct WholeBody(Bytes);

/// A connection and the right to one exchange on it.
pub(super) struct Http2Stream {
    sender: http2::SendRequest<WholeBody>,
    guard: StreamGuard,
    /// Where other requests find a new connection, once the request that opened it is sent.
    publishes_to: Option<SharedConnection>,
}

impl Body for WholeBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let body = std::mem::take(&mut self.0);
        Poll::Ready((!body.is_empty()).then(|| Ok(Frame::data(body))))
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.0.len() as u64)
    }
}

impl Http2Client {
    pub(super) fn new(timeouts: Http2Timeouts, connections: Arc<ConnectionCounts>) -> Self {
        Self { current: Arc::default(), timeouts, connections }
    }

    /// A stream on the current connection; `None` if there is no open connection.
    pub(super) fn reuse(&self) -> Option<Http2Stream> {
        lock(&self.current)
            .as_ref()
            .filter(|connection| !connection.sender.is_closed())
            .map(Http2Connection::stream)
    }

    /// Opens a connection over `stream`. It becomes the current one when the request of the returned stream is sent: if
    /// that request is a retry, no other request gets the first stream. The previous connection is closed when its last
    /// stream ends.
    pub(super) async fn open(
        &self,
        stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    ) -> hyper::Result<Http2Stream> {
        let Http2Timeouts { ping_interval, ping_timeout, idle } = self.timeouts;
        let (sender, driver) = http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .keep_alive_interval(ping_interval)
            .keep_alive_timeout(ping_timeout)
            .keep_alive_while_idle(true)
            .adaptive_window(true)
            .max_header_list_size(MAX_HEADER_LIST_BYTES)
            .handshake(TokioIo::new(stream))
            .await?;
        let activity = Arc::new(Activity::new(self.connections.clone()));
        let open = self.connections.open();
        let connection = Http2Connection { sender, activity: activity.clone() };
        let current = self.current.clone();
        let stream = Http2Stream { publishes_to: Some(current.clone()), ..connection.stream() };
        tokio::spawn(async move {
            let _open = open;
            let mut driver = pin!(driver);
            let ended = tokio::select! {
                ended = driver.as_mut() => ended,
                // Without a sender the connection is closed when its last stream ends.
                () = remove_when_idle(&current, &activity, idle) => driver.await,
            };
            if let Err(error) = ended {
                tracing::debug!(%error, "an HTTP/2 connection to an upstream failed");
            }
        });
        Ok(stream)
    }
}

/// Waits until the connection has had no streams for `idle_timeout`, and removes it from `current`.
async fn remove_when_idle(
    current: &Mutex<Option<Http2Connection>>,
    activity: &Arc<Activity>,
    idle_timeout: Duration,
) {
    loop {
        sleep(idle_timeout.saturating_sub(activity.idle_for())).await;
        // Streams begin under this lock.
        let mut current = lock(current);
        if activity.idle_for() >= idle_timeout {
            if current.as_ref().is_some_and(|connection| Arc::ptr_eq(&connection.activity, activity)) {
                *current = None;
            }
            return;
        }
    }
}

fn lock(current: &Mutex<Option<Http2Connection>>) -> MutexGuard<'_, Option<Http2Connection>> {
    current.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Http2Connection {
    fn stream(&self) -> Http2Stream {
        if self.activity.streams.fetch_add(1, Ordering::Relaxed) == 0 {
            self.activity.connections.add_active();
        }
        let guard = StreamGuard(self.activity.clone());
        Http2Stream { sender: self.sender.clone(), guard, publishes_to: None }
    }
}

impl Activity {
    fn new(connections: Arc<ConnectionCounts>) -> Self {
        let (streams, idle_since_ms) = (AtomicUsize::new(0), AtomicU64::new(0));
        Self { connections, opened: Stopwatch::start(), streams, idle_since_ms }
    }

    fn elapsed_ms(&self) -> u64 {
        u64::try_from(self.opened.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// How long the connection has had no streams; zero while it has one.
    fn idle_for(&self) -> Duration {
        if self.streams.load(Ordering::Relaxed) > 0 {
            return Duration::ZERO;
        }
        let idle_since = self.idle_since_ms.load(Ordering::Relaxed);
        Duration::from_millis(self.elapsed_ms().saturating_sub(idle_since))
    }
}

impl Drop for StreamGuard {
    fn drop(&mut self) {
        self.0.idle_since_ms.store(self.0.elapsed_ms(), Ordering::Relaxed);
        if self.0.streams.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.0.connections.remove_active();
        }
    }
}

impl Http2Stream {
    /// Sends a request and waits for the head of its answer.
    pub(super) async fn exchange(
        mut self,
        authority: &str,
        request: &Request,
    ) -> Result<(response::Parts, Http2Body), ExchangeError> {
        let uri = Uri::builder()
            .scheme(Scheme::HTTPS)
            .authority(authority)
            .path_and_query(request.target.as_str())
            .build()
            .map_err(ExchangeError::not_processed)?;
        let mut message = http::Request::new(WholeBody(request.body.clone()));
        *message.method_mut() = request.method.clone();
        *message.uri_mut() = uri;
        let headers = request.headers.iter().cloned().map(|(name, value)| (Some(name), value));
        message.headers_mut().extend(headers);
        self.sender.ready().await.map_err(ExchangeError::not_processed)?;
        let answer = self.sender.send_request(message);
        if let Some(current) = self.publishes_to.take() {
            let activity = self.guard.0.clone();
            *lock(&current) = Some(Http2Connection { sender: self.sender.clone(), activity });
        }
        let answer = answer.await.map_err(failure)?;
        let (parts, body) = answer.into_parts();
        Ok((parts, Http2Body { body, _stream: self.guard }))
    }
}

/// Classifies a failure by whether the upstream may have processed the request.
fn failure(error: hyper::Error) -> ExchangeError {
    let source = error.source();
    let is_refused = source.and_then(|source| source.downcast_ref::<h2::Error>()).is_some_and(|error| {
        // RFC 9113, section 8.7. Of a remote GOAWAY, h2 reports only the streams beyond its last one.
        error.is_remote() && (error.is_go_away() || error.reason() == Some(h2::Reason::REFUSED_STREAM))
    });
    if error.is_canceled() || is_refused {
        return ExchangeError::not_processed(error);
    }
    // A ping was not answered, or the connection was closed or reset.
    let is_lost =
        error.is_timeout() || source.and_then(|source| source.downcast_ref::<io::Error>()).is_some();
    let error = io::Error::other(error);
    if is_lost { ExchangeError::unanswered(error) } else { ExchangeError::unknown(error) }
}

impl Http2Body {
    /// The next bytes; `None` at the end of the body. Trailers are dropped, because they contain nothing that is
    /// counted.
    pub(super) fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Option<io::Result<Bytes>>> {
        loop {
            match ready!(Pin::new(&mut self.body).poll_frame(cx)) {
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        return Poll::Ready(Some(Ok(data)));
                    }
                }
                Some(Err(error)) => return Poll::Ready(Some(Err(io::Error::other(error)))),
                None => return Poll::Ready(None),
            }
        }
    }

    /// Whether the end of the body is known to have been reached.
    pub(super) fn is_end(&self) -> bool {
        self.body.is_end_stream()
    }
}

#[cfg(test)]
mod tests;
