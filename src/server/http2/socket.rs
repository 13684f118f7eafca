//! The socket of a connection with HTTP/2. It adds what hyper does not do: a timeout for a caller that does not read, and
//! the bound of [`FrameGuard`].

use super::frames::{Flood, FrameGuard};
use crate::clock::Stopwatch;
use crate::server::transport::Transport;
use crate::telemetry::EventCount;
use bytes::{Buf as _, BytesMut};
use std::io::{self, ErrorKind, IoSlice};
use std::net::IpAddr;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Sleep, sleep_until};

/// Connections that [`FrameGuard`] ended.
static FLOODS: EventCount = EventCount::new();

/// A connection with HTTP/2.
pub(super) struct Http2Socket<T> {
    transport: T,
    /// Bytes that were read to detect the protocol.
    read_ahead: BytesMut,
    guard: FrameGuard,
    caller: IpAddr,
    /// For the caller to read any bytes.
    write_timeout: Duration,
    /// Since when a write has been blocked.
    blocked_since: Option<Stopwatch>,
    timer: Option<Pin<Box<Sleep>>>,
}

impl<T: Transport> Http2Socket<T> {
    pub(super) fn new(transport: T, read_ahead: BytesMut, caller: IpAddr, write_timeout: Duration) -> Self {
        Self {
            transport,
            read_ahead,
            guard: FrameGuard::new(),
            caller,
            write_timeout,
            blocked_since: None,
            timer: None,
        }
    }

    /// Passes the result of a write on, or fails if it has been blocked for too long.
    fn poll_blocked<R>(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<R>>) -> Poll<io::Result<R>> {
        if written.is_ready() {
            self.blocked_since = None;
            return written;
        }
        let since = *self.blocked_since.get_or_insert_with(Stopwatch::start);
        let due = since.deadline(self.write_timeout);
        let timer = self.timer.get_or_insert_with(|| Box::pin(sleep_until(due)));
        if timer.deadline() != due {
            timer.as_mut().reset(due);
        }
        ready!(timer.as_mut().poll(cx));
        Poll::Ready(Err(ErrorKind::TimedOut.into()))
    }
}

impl<T: Transport> AsyncRead for Http2Socket<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let before = buffer.filled().len();
        if this.read_ahead.is_empty() {
            ready!(Pin::new(&mut this.transport).poll_read(cx, buffer))?;
        } else {
            let n = this.read_ahead.len().min(buffer.remaining());
            buffer.put_slice(&this.read_ahead[..n]);
            this.read_ahead.advance(n);
            if this.read_ahead.is_empty() {
                this.read_ahead = BytesMut::new();
            }
        }
        if let Err(Flood(what)) = this.guard.feed(&buffer.filled()[before..]) {
            if let Some(connections) = FLOODS.add() {
                tracing::warn!(connections, address = %this.caller, "connections were closed, because their callers sent too many {what}");
            }
            return Poll::Ready(Err(io::Error::other(format!("the caller sends too many {what}"))));
        }
        Poll::Ready(Ok(()))
    }
}

impl<T: Transport> AsyncWrite for Http2Socket<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.transport).poll_write(cx, bytes);
        self.poll_blocked(cx, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.transport).poll_write_vectored(cx, slices);
        self.poll_blocked(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.transport.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.transport).poll_flush(cx);
        self.poll_blocked(cx, flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let shut = Pin::new(&mut self.transport).poll_shutdown(cx);
        self.poll_blocked(cx, shut)
    }
}
