//! A caller's socket, with what HTTP machinery does not look after: a caller that takes nothing of its
//! answer, one that hangs up while nobody reads, and one that still sends when it has been refused.

use super::{Peer, malformed};
use crate::clock::Stopwatch;
use bytes::{Buf as _, BytesMut};
use std::io::{self, ErrorKind, IoSlice};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep, sleep_until};
use tokio_util::io::poll_read_buf;

/// So much is read ahead of who asks for it, to see whether a hang-up follows. Behind more than this it
/// is seen when the next piece of the answer is written.
const MOST_AHEAD: usize = 64 * 1024;
/// So much of a request that was refused is read and thrown away: twice the largest body there is by
/// default, since its sender is the one who has to learn why it is refused.
const MOST_LINGERING: usize = 64 * 1024 * 1024;
/// Bytes thrown away before others on this thread have their turn.
const LINGER_AT_ONCE: usize = 64 * 1024;

/// One connection. The machinery reads and writes through [`Handle`]s, the loop around it looks for hang-ups.
pub(super) struct Socket {
    peer: Arc<Peer>,
    inner: Mutex<Inner>,
}

struct Inner {
    stream: TcpStream,
    /// Read before anybody asked for it.
    ahead: BytesMut,
    /// Somebody has asked for bytes and is woken when they come, or a hang-up.
    is_read: bool,
    /// Since when nothing could be written.
    stuck: Option<Stopwatch>,
    alarm: Option<Pin<Box<Sleep>>>,
    /// What is written in place of what the machinery writes, and how much of it has been.
    instead: Option<(Vec<u8>, usize)>,
    lingering: Option<Lingering>,
}

/// Nothing more is written, and what still comes is thrown away.
struct Lingering {
    until: Instant,
    left: usize,
}

/// What reads and writes.
pub(super) struct Handle<'s>(pub(super) &'s Socket);

impl Socket {
    pub(super) fn new(stream: TcpStream, peer: Arc<Peer>) -> Self {
        let (ahead, is_read) = (BytesMut::new(), true);
        let inner =
            Inner { stream, ahead, is_read, stuck: None, alarm: None, instead: None, lingering: None };
        Self { peer, inner: Mutex::new(inner) }
    }

    /// Ready when the caller has hung up and nobody else would notice, because bytes lie before the end
    /// that have not been asked for, and are not asked for before the answer is whole.
    pub(super) fn poll_hung_up(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut inner = self.lock();
        let Inner { stream, ahead, is_read, .. } = &mut *inner;
        while !*is_read && ahead.len() < MOST_AHEAD {
            if ahead.capacity() - ahead.len() < 1024 {
                ahead.reserve(4 * 1024);
            }
            match ready!(poll_read_buf(Pin::new(&mut *stream), cx, ahead)) {
                Ok(0) | Err(_) => return Poll::Ready(()),
                Ok(_) => {}
            }
        }
        Poll::Pending
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes `first` and what follows it by `write`, or what has to be written in place of `first`.
    fn poll_write(
        &self,
        cx: &mut Context<'_>,
        first: &[u8],
        write: impl FnOnce(Pin<&mut TcpStream>, &mut Context<'_>) -> Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        let mut inner = self.lock();
        if inner.instead.is_none()
            && let Some(instead) = malformed::instead_of(first)
        {
            self.peer.linger();
            inner.instead = Some((instead, 0));
        }
        let written = match &mut inner.instead {
            None => write(Pin::new(&mut inner.stream), cx),
            Some(_) => inner.poll_instead(cx, first.len()),
        };
        if let Poll::Ready(written) = written {
            inner.stuck = None;
            return Poll::Ready(written);
        }
        let stuck = *inner.stuck.get_or_insert_with(Stopwatch::start);
        ready!(inner.poll_alarm(cx, self.peer.give_up_at(stuck)));
        tracing::debug!(peer = %self.peer.address, "a caller does not take its answer");
        Poll::Ready(Err(ErrorKind::TimedOut.into()))
    }
}

impl Inner {
    /// One timer, made when a write is stuck for the first time, and moved only when it is looked at.
    fn poll_alarm(&mut self, cx: &mut Context<'_>, due: Instant) -> Poll<()> {
        let alarm = self.alarm.get_or_insert_with(|| Box::pin(sleep_until(due)));
        if alarm.deadline() != due {
            alarm.as_mut().reset(due);
        }
        alarm.as_mut().poll(cx)
    }

    /// `length`: of what it is written in place of.
    fn poll_instead(&mut self, cx: &mut Context<'_>, length: usize) -> Poll<io::Result<usize>> {
        let Self { stream, instead: Some((bytes, at)), .. } = self else { return Poll::Pending };
        while *at < bytes.len() {
            *at += ready!(Pin::new(&mut *stream).poll_write(cx, &bytes[*at..]))?;
        }
        self.instead = None;
        Poll::Ready(Ok(length))
    }

    fn poll_linger(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(Lingering { until, left }) = self.lingering else { return Poll::Ready(()) };
        if self.poll_alarm(cx, until).is_ready() {
            return Poll::Ready(());
        }
        let mut scratch = [0; 8 * 1024];
        let mut read = 0;
        while read < left {
            if read >= LINGER_AT_ONCE {
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
        self.lingering = Some(Lingering { until, left: left.saturating_sub(read) });
        if read < left { Poll::Pending } else { Poll::Ready(()) }
    }
}

impl AsyncRead for Handle<'_> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let mut inner = self.0.lock();
        inner.is_read = false;
        if !inner.ahead.is_empty() {
            let n = inner.ahead.len().min(buffer.remaining());
            buffer.put_slice(&inner.ahead[..n]);
            inner.ahead.advance(n);
            return Poll::Ready(Ok(()));
        }
        let read = Pin::new(&mut inner.stream).poll_read(cx, buffer);
        inner.is_read = read.is_pending();
        read
    }
}

impl AsyncWrite for Handle<'_> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.0.poll_write(cx, bytes, |stream, cx| stream.poll_write(cx, bytes))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let first = slices.first().map_or(&[][..], |slice| slice);
        self.0.poll_write(cx, first, |stream, cx| stream.poll_write_vectored(cx, slices))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    /// A TCP socket has nothing of its own to flush.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut inner = self.0.lock();
        if inner.lingering.is_none() {
            ready!(Pin::new(&mut inner.stream).poll_shutdown(cx))?;
            if !self.0.peer.lingers() {
                return Poll::Ready(Ok(()));
            }
            let until = Stopwatch::start().deadline(self.0.peer.patience.linger);
            inner.lingering = Some(Lingering { until, left: MOST_LINGERING });
            inner.is_read = true;
        }
        inner.poll_linger(cx).map(Ok)
    }
}
