//! The bytes of a connection on their way to hyper, which receives only what `RequestCheck` has accepted.

use super::request_check::{Refused, RequestCheck};
use bytes::{Buf as _, BytesMut};
use std::io;
use std::mem::MaybeUninit;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, ReadBuf};

/// Hyper receives this in place of a head that is refused. No request begins with it, so hyper answers with a 400 and closes
/// the connection. It ends with an empty line: hyper parses a head that began before only when that line has arrived.
const INVALID_HEAD: &[u8] = b"\0\r\n\r\n";

/// Hyper receives this when a head has begun and is not complete, so that it does not take the connection for idle. It skips
/// empty lines in front of a head.
const BEGUN_HEAD: &[u8] = b"\r\n";

/// Bytes that were read and that hyper has not received.
pub(super) struct CheckedBytes {
    bytes: BytesMut,
    /// The first bytes that hyper may receive.
    checked: usize,
    check: RequestCheck,
    /// Whether hyper has received `BEGUN_HEAD` for the current head.
    has_begun: bool,
}

impl CheckedBytes {
    /// `bytes`: those that were read already.
    pub(super) fn new(check: RequestCheck, bytes: BytesMut) -> Self {
        Self { bytes, checked: 0, check, has_begun: false }
    }

    /// The number of bytes.
    pub(super) fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Reads more bytes. 0: the caller has closed the connection.
    pub(super) fn poll_read(
        &mut self,
        stream: &mut (impl AsyncRead + Unpin),
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<usize>> {
        // On the stack, because mostly nothing has arrived: a connection that waits needs no buffer.
        let mut piece = [MaybeUninit::uninit(); 2 * 1024];
        let mut piece = ReadBuf::uninit(&mut piece);
        ready!(Pin::new(stream).poll_read(cx, &mut piece))?;
        self.bytes.extend_from_slice(piece.filled());
        Poll::Ready(Ok(piece.filled().len()))
    }

    /// Fills `buffer` with checked bytes, and reads more if there are none. After a refusal the connection seems to end.
    pub(super) fn poll_checked(
        &mut self,
        stream: &mut (impl AsyncRead + Unpin),
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            self.check_rest();
            if self.checked > 0 {
                let n = self.checked.min(buffer.remaining());
                buffer.put_slice(&self.bytes[..n]);
                self.bytes.advance(n);
                self.checked -= n;
                self.has_begun = false;
                if self.bytes.is_empty() {
                    // An idle connection needs no buffer.
                    self.bytes = BytesMut::new();
                }
                return Poll::Ready(Ok(()));
            }
            if self.check.refused().is_some() {
                return Poll::Ready(Ok(()));
            }
            if self.bytes.is_empty() {
                // Most heads arrive in one piece, which is checked where hyper needs it.
                let before = buffer.filled().len();
                ready!(Pin::new(&mut *stream).poll_read(cx, buffer))?;
                let read = &buffer.filled()[before..];
                let passed = self.check.advance(read);
                if passed == read.len() {
                    return Poll::Ready(Ok(()));
                }
                self.bytes.extend_from_slice(&read[passed..]);
                buffer.set_filled(before + passed);
                self.end_if_refused();
                if passed > 0 {
                    return Poll::Ready(Ok(()));
                }
            } else if !self.has_begun && buffer.remaining() >= BEGUN_HEAD.len() {
                self.has_begun = true;
                buffer.put_slice(BEGUN_HEAD);
                return Poll::Ready(Ok(()));
            } else if ready!(self.poll_read(stream, cx))? == 0 {
                return Poll::Ready(Ok(()));
            }
        }
    }

    /// The reason, if a head was refused.
    pub(super) fn refused_head(&self) -> Option<&'static str> {
        if let Some(Refused::Head(reason)) = self.check.refused() { Some(reason) } else { None }
    }

    /// Checks the bytes that are not checked yet.
    fn check_rest(&mut self) {
        if self.checked < self.bytes.len() && self.check.refused().is_none() {
            self.checked += self.check.advance(&self.bytes[self.checked..]);
            self.end_if_refused();
        }
    }

    /// After a refusal, discards the bytes that were not checked.
    fn end_if_refused(&mut self) {
        if let Some(refused) = self.check.refused() {
            self.bytes.truncate(self.checked);
            if let Refused::Head(_) = refused {
                self.bytes.extend_from_slice(INVALID_HEAD);
                self.checked = self.bytes.len();
            }
        }
    }
}
