//! One HTTP/1.1 connection and its read buffer.

use bytes::BytesMut;
use std::io;
use std::pin::pin;
use std::task::{Context, Poll, Waker};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite};

const READ_BYTES: usize = 16 * 1024;

/// A TCP or TLS stream.
pub(in crate::upstream) trait ByteStream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> ByteStream for T {}

/// One connection to an upstream.
pub(in crate::upstream) struct Http1Connection {
    pub(super) stream: Box<dyn ByteStream>,
    /// Bytes that were read and not yet parsed.
    pub(super) buffer: BytesMut,
}

impl Http1Connection {
    pub(in crate::upstream) fn new(stream: Box<dyn ByteStream>) -> Self {
        Self { stream, buffer: BytesMut::with_capacity(READ_BYTES) }
    }

    /// Whether an idle connection can be reused: the upstream has neither closed it nor sent anything.
    pub(super) fn is_quiet(&mut self) -> bool {
        self.poll_read(&mut Context::from_waker(Waker::noop())).is_pending()
    }

    /// Reads more bytes into the buffer. 0: the upstream has ended the stream, over TLS with a
    /// `close_notify`. A TLS stream that ends without one is an error.
    pub(super) fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        if self.buffer.capacity() - self.buffer.len() < READ_BYTES / 4 {
            self.buffer.reserve(READ_BYTES);
        }
        // This future is dropped after one poll. It is cancel safe, so no bytes are lost.
        pin!(self.stream.read_buf(&mut self.buffer)).poll(cx)
    }
}
