//! The body of an upstream's answer, over either protocol.

use super::http1::Http1Body;
use super::http2::Http2Body;
use super::replica_status::InFlight;
use bytes::Bytes;
use std::io;
use std::task::{Context, Poll, ready};

/// The body of an answer, as it arrives.
pub struct Incoming {
    source: Source,
    /// Bytes that were read ahead, which `poll_data` returns first.
    read_ahead: Option<Box<ReadAhead>>,
    /// Changes the bytes of the body. Only error answers have one.
    filter: Option<Box<Filtering>>,
    /// Counts the request as in flight at its replica until the body is dropped.
    _in_flight: Option<InFlight>,
}

/// Changes the bytes of a body as they are read.
pub trait BodyFilter: Send {
    /// The next piece, changed. Bytes may be held back. After an error the body has ended.
    ///
    /// # Errors
    /// The piece cannot be changed as it must be.
    fn feed(&mut self, piece: Bytes) -> io::Result<Bytes>;

    /// The bytes that are held back at the end of the body, and the error that follows them, if any.
    fn finish(&mut self) -> (Bytes, Option<io::Error>);

    /// Whether `finish` returns bytes or an error.
    fn is_unfinished(&self) -> bool;
}

struct Filtering {
    filter: Box<dyn BodyFilter>,
    /// The end of the body or its error, which follows the bytes that the filter held back.
    ending: Option<Option<io::Error>>,
}

struct ReadAhead {
    data: Bytes,
    /// The error that followed these bytes.
    error: Option<io::Error>,
}

enum Source {
    Http1(Http1Body),
    Http2(Http2Body),
}

impl From<Http1Body> for Incoming {
    fn from(body: Http1Body) -> Self {
        Self { source: Source::Http1(body), read_ahead: None, filter: None, _in_flight: None }
    }
}

impl From<Http2Body> for Incoming {
    fn from(body: Http2Body) -> Self {
        Self { source: Source::Http2(body), read_ahead: None, filter: None, _in_flight: None }
    }
}

impl Incoming {
    /// The same body, which counts as in flight at its replica until it is dropped.
    pub(super) fn counted(self, in_flight: InFlight) -> Self {
        Self { _in_flight: Some(in_flight), ..self }
    }

    /// Puts bytes that were read ahead back in front of the body, with the error that followed them, if any.
    #[must_use]
    pub fn with_read(mut self, data: Bytes, error: Option<io::Error>) -> Self {
        // An earlier caller may have read further, up to an error.
        let unread = self.read_ahead.take().and_then(|ahead| ahead.error);
        self.read_ahead = Some(Box::new(ReadAhead { data, error: error.or(unread) }));
        self
    }

    /// Passes the rest of the body through a filter.
    #[must_use]
    pub fn filtered(self, filter: impl BodyFilter + 'static) -> Self {
        let filtering = Filtering { filter: Box::new(filter), ending: None };
        Self { filter: Some(Box::new(filtering)), ..self }
    }

    /// The next bytes of the body; `None` at its end. An error means that the body is incomplete.
    pub fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Option<io::Result<Bytes>>> {
        loop {
            if let Some(filtering) = &mut self.filter
                && let Some(ending) = filtering.ending.take()
            {
                self.filter = None;
                return Poll::Ready(ending.map(Err));
            }
            let data = ready!(self.poll_unfiltered(cx));
            let Some(Filtering { filter, ending }) = self.filter.as_deref_mut() else {
                return Poll::Ready(data);
            };
            let data = match data {
                Some(Ok(data)) => filter.feed(data)?,
                end => {
                    let (held, error) = filter.finish();
                    *ending = Some(end.and_then(Result::err).or(error));
                    held
                }
            };
            if !data.is_empty() {
                return Poll::Ready(Some(Ok(data)));
            }
        }
    }

    fn poll_unfiltered(&mut self, cx: &mut Context<'_>) -> Poll<Option<io::Result<Bytes>>> {
        if let Some(ahead) = &mut self.read_ahead {
            if !ahead.data.is_empty() {
                return Poll::Ready(Some(Ok(std::mem::take(&mut ahead.data))));
            }
            if let Some(error) = ahead.error.take() {
                return Poll::Ready(Some(Err(error)));
            }
            self.read_ahead = None;
        }
        match &mut self.source {
            Source::Http1(body) => body.poll_data(cx),
            Source::Http2(body) => body.poll_data(cx),
        }
    }

    /// Whether the body is known to be complete without reading more.
    pub fn is_end(&self) -> bool {
        if self.read_ahead.as_ref().is_some_and(|ahead| !ahead.data.is_empty() || ahead.error.is_some()) {
            return false;
        }
        if self.filter.as_ref().is_some_and(|filtering| filtering.filter.is_unfinished()) {
            return false;
        }
        match &self.source {
            Source::Http1(body) => body.is_end(),
            Source::Http2(body) => body.is_end(),
        }
    }
}
