//! HTTP/2 to one upstream: its connections, which requests share, their keep-alive and their idle timeout.

use super::connections::{ConnectionCounts, OpenConnection};
use super::request::{ExchangeError, Request};
use crate::clock::Stopwatch;
use bytes::Bytes;
use http::uri::Scheme;
use http::{Uri, response};
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::client::conn::http2::{self, Connection};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use std::convert::Infallible;
use std::error::Error as _;
use std::future::poll_fn;
use std::io;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::sleep;

/// Bytes of one answer that may wait in the gateway until its caller takes them.
const STREAM_WINDOW: u32 = 128 * 1024;
/// The same for all streams of a connection. It is the sum of hundreds of streams: callers that do not read must not stop the
/// others. From it the h2 library also derives how many small pieces may wait before it ends the connection.
const CONNECTION_WINDOW: u32 = 64 * 1024 * 1024;
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

/// The shared connections to an upstream. Usually there is one. More are opened while all have as many streams as the upstream
/// allows.
pub(super) struct Http2Client {
    shared: SharedConnections,
    timeouts: Http2Timeouts,
    connections: Arc<ConnectionCounts>,
}

/// The connections that new requests use. Requests prefer the first ones, so the last ones become idle.
type SharedConnections = Arc<Mutex<Vec<Http2Connection>>>;

/// A connection, which can carry as many streams as the upstream allows.
pub(super) struct Http2Connection {
    sender: http2::SendRequest<WholeBody>,
    activity: Arc<Activity>,
}

/// The usage of a connection.
struct Activity {
    connections: Arc<ConnectionCounts>,
    /// Counts the connection as open.
    _open: OpenConnection,
    opened: Stopwatch,
    /// Streams in flight.
    streams: AtomicUsize,
    /// Returns the number of streams that the upstream allows now.
    max_streams: Box<dyn Fn() -> usize + Send + Sync>,
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
    shared: SharedConnections,
    /// Whether the connection is new, so that other requests do not use it before this one is sent.
    is_unshared: bool,
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
        Self { shared: Arc::default(), timeouts, connections }
    }

    /// A stream on an open connection; `None` if there is no connection, or all have as many streams as the upstream allows.
    pub(super) fn reuse(&self) -> Option<Http2Stream> {
        let mut shared = lock(&self.shared);
        shared.retain(|connection| !connection.sender.is_closed());
        shared
            .iter()
            .find(|connection| connection.has_room())
            .map(|connection| connection.stream(&self.shared, false))
    }

    /// Opens a connection over `stream`. Other requests use it when the request of the returned stream is sent: if
    /// that request is a retry, no other request gets the first stream.
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
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_header_list_size(MAX_HEADER_LIST_BYTES)
            .handshake(TokioIo::new(stream))
            .await?;
        // Its settings can change at any time, and hyper tells them only here.
        let driver = Arc::new(Mutex::new(Some(driver)));
        let open_driver = driver.clone();
        let max_streams = move || lock(&open_driver).as_ref().map_or(0, Connection::current_max_send_streams);
        let activity = Arc::new(Activity::new(self.connections.clone(), Box::new(max_streams)));
        let connection = Http2Connection { sender, activity: activity.clone() };
        let shared = self.shared.clone();
        let stream = connection.stream(&shared, true);
        tokio::spawn(async move {
            let mut driver = pin!(poll_fn(|cx| {
                let mut open = lock(&driver);
                let ended = ready!(open.as_mut().map_or(Poll::Ready(Ok(())), |open| Pin::new(open).poll(cx)));
                // Only without it the senders know that the connection is closed.
                let closed = open.take();
                drop(open);
                drop(closed);
                Poll::Ready(ended)
            }));
            let ended = tokio::select! {
                ended = driver.as_mut() => ended,
                // Without a sender the connection is closed when its last stream ends.
                () = remove_when_idle(&shared, &activity, idle) => driver.await,
            };
            if let Err(error) = ended {
                tracing::debug!(%error, "an HTTP/2 connection to an upstream failed");
            }
        });
        Ok(stream)
    }
}

/// Waits until the connection has had no streams for `idle_timeout`, and removes it from `shared`.
async fn remove_when_idle(
    shared: &Mutex<Vec<Http2Connection>>,
    activity: &Arc<Activity>,
    idle_timeout: Duration,
) {
    loop {
        sleep(idle_timeout.saturating_sub(activity.idle_for())).await;
        // Streams begin under this lock.
        let mut shared = lock(shared);
        if activity.idle_for() >= idle_timeout {
            remove(&mut shared, activity);
            return;
        }
    }
}

/// Removes the connection of this activity. It is closed when its last stream ends.
fn remove(shared: &mut Vec<Http2Connection>, activity: &Arc<Activity>) {
    shared.retain(|connection| !Arc::ptr_eq(&connection.activity, activity));
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Http2Connection {
    /// Whether the upstream allows a further stream.
    fn has_room(&self) -> bool {
        self.activity.streams.load(Ordering::Relaxed) < (self.activity.max_streams)()
    }

    fn stream(&self, shared: &SharedConnections, is_unshared: bool) -> Http2Stream {
        if self.activity.streams.fetch_add(1, Ordering::Relaxed) == 0 {
            self.activity.connections.add_active();
        }
        let guard = StreamGuard(self.activity.clone());
        Http2Stream { sender: self.sender.clone(), guard, shared: shared.clone(), is_unshared }
    }
}

impl Activity {
    fn new(connections: Arc<ConnectionCounts>, max_streams: Box<dyn Fn() -> usize + Send + Sync>) -> Self {
        Self {
            _open: connections.open(),
            connections,
            opened: Stopwatch::start(),
            streams: AtomicUsize::new(0),
            max_streams,
            idle_since_ms: AtomicU64::new(0),
        }
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
        let activity = &self.guard.0;
        if activity.streams.load(Ordering::Relaxed) > (activity.max_streams)() {
            // The h2 library would queue the request until another stream ends. After a timeout the gateway could not tell
            // whether it was sent.
            return Err(ExchangeError::not_processed(
                "the upstream allows no further stream on the connection",
            ));
        }
        let answer = self.sender.send_request(message);
        if self.is_unshared {
            let activity = self.guard.0.clone();
            let mut shared = lock(&self.shared);
            // Requests that came at once have each opened a connection: one is enough for the next ones.
            if !shared.iter().any(Http2Connection::has_room) {
                shared.push(Http2Connection { sender: self.sender.clone(), activity });
            }
        }
        let answer = answer.await.map_err(|error| {
            let error = failure(error);
            if error.is_retriable() {
                // Further requests use another connection.
                remove(&mut lock(&self.shared), &self.guard.0);
            }
            error
        })?;
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
                // hyper also ends the body if the upstream resets the stream without an error code.
                None if !self.body.is_end_stream() => {
                    let reason = "the upstream ended the stream before its answer was complete";
                    return Poll::Ready(Some(Err(io::Error::other(reason))));
                }
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
