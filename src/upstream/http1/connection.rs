//! One HTTP/1.1 connection and its read buffer.

use crate::timer::ReusedTimer;
use crate::upstream::connections::{ConnectionCounts, OpenConnection};
use bytes::BytesMut;
use rustix::net::RecvFlags;
use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;

const READ_BYTES: usize = 16 * 1024;

/// A TCP or TLS stream.
pub(in crate::upstream) trait ByteStream: AsyncRead + AsyncWrite + Send + Unpin {
    /// Whether the kernel has received nothing that was not read: no bytes, no end of the stream, and no error. `poll_read`
    /// alone does not answer that, because the runtime may not have looked at its sockets since.
    fn has_received_nothing(&self) -> bool;
}

impl ByteStream for TcpStream {
    fn has_received_nothing(&self) -> bool {
        let peeked = rustix::net::recv(self, &mut [0u8; 1], RecvFlags::PEEK | RecvFlags::DONTWAIT);
        matches!(peeked, Err(rustix::io::Errno::AGAIN))
    }
}

impl ByteStream for TlsStream<TcpStream> {
    fn has_received_nothing(&self) -> bool {
        self.get_ref().0.has_received_nothing()
    }
}

#[cfg(any(test, feature = "fuzz"))]
impl ByteStream for tokio::io::DuplexStream {
    fn has_received_nothing(&self) -> bool {
        true
    }
}

/// One connection to an upstream.
pub(in crate::upstream) struct Http1Connection {
    pub(super) stream: Box<dyn ByteStream>,
    /// Bytes that were read and not yet parsed.
    pub(super) buffer: BytesMut,
    /// For the deadline of each exchange.
    pub(super) timer: ReusedTimer,
    /// `None`: the connection is not counted.
    counted: Option<OpenConnection>,
}

impl Http1Connection {
    pub(in crate::upstream) fn new(stream: Box<dyn ByteStream>) -> Self {
        let buffer = BytesMut::with_capacity(READ_BYTES);
        Self { stream, buffer, timer: ReusedTimer::default(), counted: None }
    }

    /// Counts the connection as open, and as one that carries a request.
    pub(in crate::upstream) fn counted(mut self, counts: &Arc<ConnectionCounts>) -> Self {
        self.counted = Some(counts.open());
        self.set_active(true);
        self
    }

    /// Sets whether the connection carries a request.
    pub(super) fn set_active(&mut self, is_active: bool) {
        if let Some(counted) = &mut self.counted {
            counted.set_active(is_active);
        }
    }

    /// Whether an idle connection can be reused: the upstream has neither closed it nor sent anything.
    pub(super) fn can_be_reused(&mut self) -> bool {
        self.stream.has_received_nothing() && self.is_quiet(&mut Context::from_waker(Waker::noop()))
    }

    /// Whether nothing has arrived on an idle connection. If so, the task of `cx` is woken when something does.
    pub(super) fn is_quiet(&mut self, cx: &mut Context<'_>) -> bool {
        let mut byte = [0];
        Pin::new(&mut self.stream).poll_read(cx, &mut ReadBuf::new(&mut byte)).is_pending()
    }

    /// Reads more bytes into the buffer. 0: the upstream has ended the stream, over TLS with a
    /// `close_notify`. A TLS stream that ends without one is an error.
    pub(super) fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        if self.buffer.is_empty() {
            // If nothing refers to the bytes that were read before, the same memory is used again, which is in a cache.
            let _ = self.buffer.try_reclaim(READ_BYTES);
        }
        if self.buffer.capacity() - self.buffer.len() < READ_BYTES / 4 {
            self.buffer.reserve(READ_BYTES);
        }
        // This future is dropped after one poll. It is cancel safe, so no bytes are lost.
        pin!(self.stream.read_buf(&mut self.buffer)).poll(cx)
    }
}
