//! The body of an answer, read from the connection as it is polled.

use super::chunked::ChunkedDecoder;
use super::connection::Http1Connection;
use super::head::Framing;
use super::outgoing::RequestWriter;
use super::pool::IdlePool;
use bytes::{Bytes, BytesMut};
use std::io::{self, ErrorKind};
use std::task::{Context, Poll, ready};

/// The body of an answer.
pub(in crate::upstream) struct Http1Body {
    /// `None` after the end of the body.
    connection: Option<Http1Connection>,
    decoder: BodyDecoder,
    /// The rest of the request, if the answer began before it was sent.
    unsent: Option<Box<RequestWriter>>,
    /// The pool that gets the connection after the body. `None`: the connection cannot be reused.
    pool: Option<IdlePool>,
}

enum BodyDecoder {
    /// Bytes still to come.
    Length(u64),
    Chunked(ChunkedDecoder),
    UntilClose,
}

impl Http1Body {
    pub(super) fn new(
        connection: Http1Connection,
        framing: Framing,
        unsent: Option<Box<RequestWriter>>,
        pool: Option<IdlePool>,
    ) -> Self {
        let decoder = match framing {
            Framing::Length(length) => BodyDecoder::Length(length),
            Framing::Chunked => BodyDecoder::Chunked(ChunkedDecoder::default()),
            Framing::UntilClose => BodyDecoder::UntilClose,
        };
        let mut body = Self { connection: Some(connection), decoder, unsent, pool };
        if framing == Framing::Length(0) {
            body.finish();
        }
        body
    }

    /// The next bytes; `None` at the end of the body.
    pub(in crate::upstream) fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Option<io::Result<Bytes>>> {
        self.send_rest(cx);
        loop {
            let Some(connection) = &mut self.connection else { return Poll::Ready(None) };
            let (data, has_ended) = match self.decoder.take(&mut connection.buffer) {
                Ok(taken) => taken,
                Err(error) => return self.fail(error),
            };
            if has_ended {
                self.finish();
            }
            if !data.is_empty() {
                return Poll::Ready(Some(Ok(data)));
            }
            let Some(connection) = &mut self.connection else { continue };
            match ready!(connection.poll_read(cx)) {
                Ok(0) if matches!(self.decoder, BodyDecoder::UntilClose) => self.connection = None,
                Ok(0) => return self.fail(ErrorKind::UnexpectedEof.into()),
                Ok(_) => {}
                Err(error) => return self.fail(error),
            }
        }
    }

    /// Whether the end of the body has been reached.
    pub(in crate::upstream) fn is_end(&self) -> bool {
        self.connection.is_none()
    }

    /// Continues to send the request. If that fails, the answer is still read.
    fn send_rest(&mut self, cx: &mut Context<'_>) {
        let (Some(outgoing), Some(connection)) = (&mut self.unsent, &mut self.connection) else { return };
        if outgoing.poll_write(cx, &mut *connection.stream).is_ready() {
            if !outgoing.is_sent() {
                self.pool = None;
            }
            self.unsent = None;
        }
    }

    fn fail(&mut self, error: io::Error) -> Poll<Option<io::Result<Bytes>>> {
        self.connection = None;
        Poll::Ready(Some(Err(error)))
    }

    /// The body is complete: returns the connection to the pool. A connection is closed instead if the
    /// request was not sent completely, or if bytes follow the body: they would be read as the next answer.
    fn finish(&mut self) {
        if let (Some(connection), Some(pool)) = (self.connection.take(), self.pool.take())
            && self.unsent.is_none()
            && connection.buffer.is_empty()
        {
            pool.put(connection);
        }
    }
}

impl BodyDecoder {
    /// Removes the body's bytes from the buffer, and returns them with whether the body has ended.
    fn take(&mut self, buffer: &mut BytesMut) -> io::Result<(Bytes, bool)> {
        match self {
            Self::Length(left) => {
                let n = usize::try_from(*left).unwrap_or(usize::MAX).min(buffer.len());
                *left -= n as u64;
                Ok((buffer.split_to(n).freeze(), *left == 0))
            }
            Self::Chunked(decoder) => decoder.take(buffer),
            Self::UntilClose => Ok((buffer.split().freeze(), false)),
        }
    }
}
