//! The body of an upstream's answer, over either protocol.

use super::http1::Http1Body;
use super::http2::Http2Body;
use super::key_mask::KeyMask;
use super::replica_status::InFlight;
use bytes::Bytes;
use std::io;
use std::task::{Context, Poll, ready};

/// The body of an answer, as it arrives.
pub struct Incoming {
    source: Source,
    /// Bytes that were read ahead, which `poll_data` returns first.
    read_ahead: Option<Box<ReadAhead>>,
    /// Masks the gateway's keys. It is a part of errors only.
    mask: Option<Box<Masking>>,
    /// Counts the request as in flight at its replica until the body is dropped.
    _in_flight: Option<InFlight>,
}

struct Masking {
    mask: KeyMask,
    /// What follows the bytes that the mask held back.
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
        Self { source: Source::Http1(body), read_ahead: None, mask: None, _in_flight: None }
    }
}

impl From<Http2Body> for Incoming {
    fn from(body: Http2Body) -> Self {
        Self { source: Source::Http2(body), read_ahead: None, mask: None, _in_flight: None }
    }
}

impl Incoming {
    /// The same body, which counts as in flight at its replica until it is dropped.
    pub(super) fn counted(self, in_flight: InFlight) -> Self {
        Self { _in_flight: Some(in_flight), ..self }
    }

    /// Puts bytes that were read ahead back in front of the body, with the error that followed them, if any.
    #[must_use]
    pub fn with_read(self, data: Bytes, error: Option<io::Error>) -> Self {
        Self { read_ahead: Some(Box::new(ReadAhead { data, error })), ..self }
    }

    /// Masks keys in what is read from here on.
    #[must_use]
    pub fn masked(self, mask: KeyMask) -> Self {
        Self { mask: Some(Box::new(Masking { mask, ending: None })), ..self }
    }

    /// The next bytes of the body; `None` at its end. An error means that the body is incomplete.
    pub fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Option<io::Result<Bytes>>> {
        loop {
            if let Some(masking) = &mut self.mask
                && let Some(ending) = masking.ending.take()
            {
                self.mask = None;
                return Poll::Ready(ending.map(Err));
            }
            let data = ready!(self.poll_unmasked(cx));
            let Some(masking) = &mut self.mask else { return Poll::Ready(data) };
            let data = match data {
                Some(Ok(data)) => masking.mask.feed(data),
                ending => {
                    masking.ending = Some(ending.and_then(Result::err));
                    masking.mask.finish()
                }
            };
            if !data.is_empty() {
                return Poll::Ready(Some(Ok(data)));
            }
        }
    }

    fn poll_unmasked(&mut self, cx: &mut Context<'_>) -> Poll<Option<io::Result<Bytes>>> {
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
        if self.mask.as_ref().is_some_and(|masking| masking.mask.holds_bytes()) {
            return false;
        }
        match &self.source {
            Source::Http1(body) => body.is_end(),
            Source::Http2(body) => body.is_end(),
        }
    }
}
