//! Writes a request to a connection, piece by piece.

use super::connection::ByteStream;
use super::head;
use crate::upstream::request::Request;
use bytes::Bytes;
use std::io::{self, ErrorKind, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tokio::io::AsyncWrite as _;

/// A large body is written in pieces of this size. Other tasks of the thread run between them.
const MAX_WRITE_BYTES: usize = 128 * 1024;

/// Writes one request to a connection.
pub(super) struct RequestWriter {
    head: Vec<u8>,
    body: Bytes,
    /// Bytes written so far, of head and body together.
    written: usize,
    state: WriteState,
}

enum WriteState {
    Writing,
    /// Everything has been written and flushed.
    Sent,
    /// Nothing more can be written.
    Failed(io::Error),
}

impl RequestWriter {
    pub(super) fn new(authority: &str, request: &Request) -> Self {
        let head = head::encode(authority, request);
        Self { head, body: request.body.clone(), written: 0, state: WriteState::Writing }
    }

    /// Whether everything has been written.
    pub(super) fn is_sent(&self) -> bool {
        matches!(self.state, WriteState::Sent)
    }

    /// Whether there is more to write and the connection still accepts bytes.
    pub(super) fn is_writing(&self) -> bool {
        matches!(self.state, WriteState::Writing)
    }

    /// Whether not even the first byte was written.
    pub(super) fn is_unwritten(&self) -> bool {
        self.written == 0
    }

    /// The error that stopped the writing, else `other`.
    pub(super) fn write_error_or(self, other: io::Error) -> io::Error {
        if let WriteState::Failed(error) = self.state { error } else { other }
    }

    /// Writes head and body, in one system call if the socket takes them. Ready when everything is written, or when
    /// no more can be written.
    pub(super) fn poll_write(&mut self, cx: &mut Context<'_>, stream: &mut dyn ByteStream) -> Poll<()> {
        if self.is_writing() {
            self.state = match ready!(self.poll_write_all(cx, stream)) {
                Ok(()) => WriteState::Sent,
                Err(error) => WriteState::Failed(error),
            };
        }
        Poll::Ready(())
    }

    fn poll_write_all(
        &mut self,
        cx: &mut Context<'_>,
        mut stream: &mut dyn ByteStream,
    ) -> Poll<io::Result<()>> {
        let total = self.head.len() + self.body.len();
        let mut written_now = 0;
        while self.written < total {
            if written_now >= MAX_WRITE_BYTES {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            let written = ready!(Pin::new(&mut stream).poll_write_vectored(cx, &self.slices()))?;
            if written == 0 {
                return Poll::Ready(Err(ErrorKind::WriteZero.into()));
            }
            self.written += written;
            written_now += written;
        }
        Pin::new(&mut stream).poll_flush(cx)
    }

    /// The unwritten rest of the head, and the next piece of the body.
    fn slices(&self) -> [IoSlice<'_>; 2] {
        let head = self.head.get(self.written..).unwrap_or_default();
        let body = self.body.get(self.written.saturating_sub(self.head.len())..).unwrap_or_default();
        [IoSlice::new(head), IoSlice::new(&body[..body.len().min(MAX_WRITE_BYTES)])]
    }
}
