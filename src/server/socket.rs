//! A caller's socket. It adds what hyper does not do: a timeout for a caller that does not read its answer,
//! detection of a disconnect behind unread bytes, and a lingering close for a caller that still sends. It also has the
//! timeout for the next head: hyper would allocate a timer for each request.

use super::checked::CheckedBytes;
use super::malformed;
use super::peer::Peer;
use super::request_check::RequestCheck;
use super::transport::Transport;
use crate::clock::Stopwatch;
use crate::timer::ReusedTimer;
use bytes::BytesMut;
use std::io::{self, ErrorKind, IoSlice};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Instant;

/// Maximum bytes that are read before hyper requests them, to detect a disconnect. A disconnect behind more unread
/// bytes is detected when the next piece of the answer is written.
const MAX_READ_AHEAD_BYTES: usize = 64 * 1024;
/// Maximum bytes of a refused request that are discarded. This is twice the default of `max_request_body`, so that
/// the sender of a too large body receives the refusal.
const MAX_LINGER_BYTES: usize = 64 * 1024 * 1024;
/// Bytes discarded before other tasks of the thread run.
const LINGER_BATCH_BYTES: usize = 64 * 1024;

/// One caller's connection. hyper reads and writes through a [`SocketHandle`]; the connection's task calls
/// `poll_abandoned`.
pub(super) struct CallerSocket<T> {
    peer: Arc<Peer>,
    state: Mutex<SocketState<T>>,
}

struct SocketState<T> {
    stream: T,
    /// Bytes that were read and not passed to hyper: a head that is not complete, and bytes that hyper did not request.
    read_ahead: CheckedBytes,
    /// Whether hyper waits for bytes. If so, a disconnect wakes it too.
    is_read_pending: bool,
    /// Whether hyper has received bytes.
    is_used: bool,
    /// Since when a write has been blocked.
    blocked_since: Option<Stopwatch>,
    timer: ReusedTimer,
    /// Since when the connection waits for a head. `None`: it has a request.
    waits_for_head_since: Option<HeadWait>,
    /// The bytes to write in place of hyper's answer, and how many of them are written.
    replacement: Option<(Vec<u8>, usize)>,
    lingering: Option<Lingering>,
}

/// The wait for the next head.
#[derive(Clone, Copy)]
struct HeadWait {
    since: Stopwatch,
    /// How many requests the connection had before. A request can begin and end within one poll of hyper.
    requests: u64,
}

/// A lingering close: the write half is shut down, and arriving bytes are discarded.
#[derive(Clone, Copy)]
struct Lingering {
    until: Instant,
    bytes_left: usize,
}

/// hyper's access to the socket.
pub(super) struct SocketHandle<'s, T>(pub(super) &'s CallerSocket<T>);

impl<T: Transport> CallerSocket<T> {
    /// `read_ahead`: bytes that were read already.
    pub(super) fn new(stream: T, read_ahead: BytesMut, peer: Arc<Peer>) -> Self {
        let state = SocketState {
            stream,
            read_ahead: CheckedBytes::new(RequestCheck::new(T::SCHEME, peer.requires_host), read_ahead),
            is_read_pending: true,
            is_used: false,
            blocked_since: None,
            timer: ReusedTimer::default(),
            waits_for_head_since: None,
            replacement: None,
            lingering: None,
        };
        Self { peer, state: Mutex::new(state) }
    }

    /// Ready when the caller has disconnected, or has not sent its next head in time. Hyper reads nothing between a request
    /// and the end of its answer.
    pub(super) fn poll_abandoned(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut state = self.lock();
        if self.poll_head_timeout(&mut state, cx).is_ready() {
            tracing::debug!(peer = %self.peer.address, "the head of a request did not arrive in time");
            return Poll::Ready(());
        }
        let SocketState { stream, read_ahead, is_read_pending, .. } = &mut *state;
        while !*is_read_pending && read_ahead.len() < MAX_READ_AHEAD_BYTES {
            match ready!(read_ahead.poll_read(stream, cx)) {
                Ok(0) | Err(_) => return Poll::Ready(()),
                Ok(_) => {}
            }
        }
        Poll::Pending
    }

    /// Whether hyper has received bytes.
    pub(super) fn is_used(&self) -> bool {
        self.lock().is_used
    }

    /// Ready when the connection has waited for a head for too long.
    fn poll_head_timeout(&self, state: &mut SocketState<T>, cx: &mut Context<'_>) -> Poll<()> {
        if !self.peer.is_between_requests() {
            state.waits_for_head_since = None;
            return Poll::Pending;
        }
        let requests = self.peer.requests();
        let wait = state.waits_for_head_since.filter(|wait| wait.requests == requests);
        let wait = wait.unwrap_or_else(|| HeadWait { since: Stopwatch::start(), requests });
        state.waits_for_head_since = Some(wait);
        // A blocked write and a lingering close have times of their own.
        if state.blocked_since.is_some() || state.lingering.is_some() {
            return Poll::Pending;
        }
        state.timer.poll(cx, wait.since.deadline(self.peer.timeouts.head))
    }

    /// Closes the connection with a reset if its caller would take a normal end for the end of a complete answer.
    pub(super) fn close(self) {
        if self.peer.must_reset() {
            let state = self.state.into_inner().unwrap_or_else(PoisonError::into_inner);
            if let Err(error) = state.stream.tcp().set_zero_linger() {
                tracing::debug!(%error, "a connection cannot be reset");
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, SocketState<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes these slices, with the header lines that go past hyper. If the first one is an answer that hyper made, writes
    /// its replacement.
    fn poll_write(&self, cx: &mut Context<'_>, slices: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let mut state = self.lock();
        let first = slices.first().map_or(&[][..], |slice| slice);
        if state.replacement.is_none()
            && self.peer.is_between_requests()
            && let Some(error) = malformed::replacement_for(first, self.peer.refused_head())
        {
            malformed::log(&error, self.peer.address.ip());
            self.peer.linger();
            state.replacement = Some((malformed::encode(&error), 0));
        }
        let written = match &mut state.replacement {
            None => match &self.peer.head_lines {
                Some(head_lines) => head_lines.poll_write(Pin::new(&mut state.stream), cx, slices),
                None => Pin::new(&mut state.stream).poll_write_vectored(cx, slices),
            },
            Some(_) => state.poll_write_replacement(cx, first.len()),
        };
        self.poll_blocked(&mut state, cx, written)
    }

    /// Passes the result of a write on, or fails if it has been blocked for too long.
    fn poll_blocked<R>(
        &self,
        state: &mut SocketState<T>,
        cx: &mut Context<'_>,
        written: Poll<io::Result<R>>,
    ) -> Poll<io::Result<R>> {
        if let Poll::Ready(written) = written {
            state.blocked_since = None;
            return Poll::Ready(written);
        }
        let blocked_since = *state.blocked_since.get_or_insert_with(Stopwatch::start);
        ready!(state.timer.poll(cx, self.peer.write_deadline(blocked_since)));
        tracing::debug!(peer = %self.peer.address, "a caller does not read its answer");
        self.peer.cut_answer();
        Poll::Ready(Err(ErrorKind::TimedOut.into()))
    }
}

impl<T: Transport> SocketState<T> {
    /// Returns `replaced`, the number of bytes that were replaced, when the replacement is written.
    fn poll_write_replacement(&mut self, cx: &mut Context<'_>, replaced: usize) -> Poll<io::Result<usize>> {
        let Self { stream, replacement: Some((bytes, written)), .. } = self else { return Poll::Pending };
        while *written < bytes.len() {
            *written += ready!(Pin::new(&mut *stream).poll_write(cx, &bytes[*written..]))?;
        }
        self.replacement = None;
        Poll::Ready(Ok(replaced))
    }

    /// Discards arriving bytes until the caller closes the connection, the linger timeout elapses, or
    /// `MAX_LINGER_BYTES` have been discarded.
    fn poll_linger(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(Lingering { until, bytes_left }) = self.lingering else { return Poll::Ready(()) };
        if self.timer.poll(cx, until).is_ready() {
            return Poll::Ready(());
        }
        let mut scratch = [0; 8 * 1024];
        let mut read = 0;
        while read < bytes_left {
            if read >= LINGER_BATCH_BYTES {
                cx.waker().wake_by_ref();
                break;
            }
            let mut buffer = ReadBuf::new(&mut scratch);
            match Pin::new(&mut self.stream).poll_read(cx, &mut buffer) {
                Poll::Ready(Ok(())) if !buffer.filled().is_empty() => read += buffer.filled().len(),
                Poll::Ready(_) => return Poll::Ready(()),
                Poll::Pending => break,
            }
        }
        self.lingering = Some(Lingering { until, bytes_left: bytes_left.saturating_sub(read) });
        if read < bytes_left { Poll::Pending } else { Poll::Ready(()) }
    }
}

impl<T: Transport> AsyncRead for SocketHandle<'_, T> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let mut state = self.0.lock();
        let SocketState { stream, read_ahead, is_read_pending, is_used, .. } = &mut *state;
        let read = read_ahead.poll_checked(stream, cx, buffer);
        *is_read_pending = read.is_pending();
        *is_used |= !buffer.filled().is_empty();
        if let Some(reason) = read_ahead.refused_head() {
            self.0.peer.refuse_head(reason);
        }
        read
    }
}

impl<T: Transport> AsyncWrite for SocketHandle<'_, T> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.0.poll_write(cx, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.0.poll_write(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    /// Records that hyper's buffer is empty: hyper flushes only then. TLS may still have bytes, a TCP socket has none.
    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if T::BUFFERS {
            let mut state = self.0.lock();
            let flushed = Pin::new(&mut state.stream).poll_flush(cx);
            ready!(self.0.poll_blocked(&mut state, cx, flushed))?;
        }
        self.0.peer.on_flush();
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut state = self.0.lock();
        if state.lingering.is_none() {
            ready!(Pin::new(&mut state.stream).poll_shutdown(cx))?;
            let Some(linger_time) = self.0.peer.linger_time() else { return Poll::Ready(Ok(())) };
            let until = Stopwatch::start().deadline(linger_time);
            state.lingering = Some(Lingering { until, bytes_left: MAX_LINGER_BYTES });
            state.is_read_pending = true;
        }
        state.poll_linger(cx).map(Ok)
    }
}
