//! Masks the upstream's keys in answers that are not a success: some backends repeat the key that they refuse.
//!
//! The key is masked in place, so that the length stays. A compressed body is passed on unchanged unless a key is in it.
//! Then the caller receives it decoded.

use super::Proxy;
use super::keys::KEY_HEADERS;
use super::reader::BodyCoding;
use crate::config::UpstreamSettings;
use crate::telemetry::EventCount;
use crate::upstream::{BodyFilter, Incoming, KeyMask, MAX_SEARCHED_BYTES};
use crate::usage::{ContentCoding, Decoder};
use bytes::{Bytes, BytesMut};
use http::header::{self, HeaderMap, HeaderValue};
use http::response;
use std::future::poll_fn;
use std::io::{self, Write};
use std::time::Duration;
use tokio::time::timeout;

/// Maximum number of decoded bytes of a compressed body that are searched before its head is passed on. A key that begins
/// within `MAX_SEARCHED_BYTES` may end after them, so this is twice that number.
const MAX_DECODED_BYTES: usize = 2 * MAX_SEARCHED_BYTES;
/// Maximum number of compressed bytes that are read for the search.
const MAX_READ_BYTES: usize = 2 * MAX_SEARCHED_BYTES;
/// Reading for the search stops after this time.
const MAX_READ_TIME: Duration = Duration::from_secs(5);

/// Errors in which a key was masked.
static MASKED: EventCount = EventCount::new();

impl Proxy {
    /// Masks the upstream's keys in an answer that is not a success, and records that they were in it.
    pub(super) async fn mask_keys(
        &self,
        parts: &mut response::Parts,
        incoming: Incoming,
        upstream: &UpstreamSettings,
    ) -> Incoming {
        let (metrics, name) = (self.state.metrics.clone(), upstream.name.clone());
        let on_found = Box::new(move || {
            metrics.upstream_key_masked(&name);
            if let Some(count) = MASKED.add() {
                tracing::warn!(
                    upstream = name,
                    count,
                    "an error of the upstream repeated its key, which was masked"
                );
            }
        });
        let Some(mut mask) = key_mask(upstream, on_found) else { return incoming };
        mask_headers(&mut parts.headers, &mut mask);
        match BodyCoding::of(&parts.headers) {
            BodyCoding::Known(coding) => mask_compressed(incoming, &mut parts.headers, mask, coding).await,
            BodyCoding::Plain | BodyCoding::Unknown => incoming.filtered(mask),
        }
    }
}

/// Masks the keys that the gateway sends to this upstream. `None`: it sends none, or none that is long enough to be
/// found without doubt.
fn key_mask(upstream: &UpstreamSettings, on_found: Box<dyn Fn() + Send + Sync>) -> Option<KeyMask> {
    let key = upstream.api_key.as_ref().map(|key| key.expose().as_bytes());
    let named = |name: &str| KEY_HEADERS.contains(&name) || matches!(name, "proxy-authorization" | "cookie");
    let extra = upstream.headers.iter().filter(|(name, _)| named(name.as_str()));
    // `Bearer` and other schemes are no secret.
    let extra = extra.filter_map(|(_, value)| value.as_bytes().rsplit(|&b| b == b' ').next());
    KeyMask::new(key.into_iter().chain(extra), on_found)
}

fn mask_headers(headers: &mut HeaderMap, mask: &mut KeyMask) {
    for value in headers.values_mut() {
        if let Some(masked) = mask.masked(value.as_bytes()).and_then(|v| HeaderValue::from_bytes(&v).ok()) {
            *value = masked;
        }
    }
}

/// Masks keys in a compressed body. Removes its `content-encoding` if a key is found, or if the body takes too long to be
/// searched first.
async fn mask_compressed(
    mut incoming: Incoming,
    headers: &mut HeaderMap,
    mask: KeyMask,
    coding: ContentCoding,
) -> Incoming {
    let mut read = BytesMut::new();
    let mut decoder = Decoder::new(coding, Beginning::default());
    let reading = async {
        while read.len() < MAX_READ_BYTES && !decoder.has_failed() && !decoder.inner().is_full() {
            match poll_fn(|cx| incoming.poll_data(cx)).await {
                Some(Ok(data)) => {
                    decoder.feed(&data);
                    read.extend_from_slice(&data);
                }
                Some(Err(error)) => return (true, Some(error)),
                None => return (true, None),
            }
        }
        (false, None)
    };
    let (has_ended, error) = timeout(MAX_READ_TIME, reading).await.unwrap_or_default();
    let incoming = incoming.with_read(read.freeze(), error);
    let is_full = decoder.inner().is_full();
    if !mask.finds_key(&decoder.inner().0) {
        if !is_full && (decoder.has_failed() || has_ended && !decoder.is_complete()) {
            // The label is wrong, or the body is damaged. What it contains undecoded is masked.
            return incoming.filtered(mask);
        }
        if has_ended || is_full {
            return incoming;
        }
    }
    headers.remove(header::CONTENT_ENCODING);
    headers.remove(header::CONTENT_LENGTH);
    incoming.filtered(DecodedMask { decoder: Decoder::new(coding, Vec::new()), mask })
}

/// The beginning of a decoded body. Writing fails when it is full.
#[derive(Default)]
struct Beginning(Vec<u8>);

impl Beginning {
    fn is_full(&self) -> bool {
        self.0.len() >= MAX_DECODED_BYTES
    }
}

impl Write for Beginning {
    fn write(&mut self, decoded: &[u8]) -> io::Result<usize> {
        let room = MAX_DECODED_BYTES - self.0.len();
        if room == 0 {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        let taken = decoded.len().min(room);
        self.0.extend_from_slice(&decoded[..taken]);
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Decodes a body and masks keys in it. `Decoder` bounds how far the body may expand.
struct DecodedMask {
    decoder: Decoder<Vec<u8>>,
    mask: KeyMask,
}

impl DecodedMask {
    fn take_decoded(&mut self) -> Bytes {
        std::mem::take(self.decoder.inner_mut()).into()
    }
}

impl BodyFilter for DecodedMask {
    fn feed(&mut self, piece: Bytes) -> io::Result<Bytes> {
        self.decoder.feed(&piece);
        let decoded = self.take_decoded();
        if self.decoder.has_failed() && decoded.is_empty() {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the compressed error cannot be decoded"));
        }
        self.mask.feed(decoded)
    }

    fn finish(&mut self) -> (Bytes, Option<io::Error>) {
        let error = self.decoder.finish().err();
        let last = self.take_decoded();
        match self.mask.feed(last) {
            Ok(mut last) => {
                let (held, _) = self.mask.finish();
                if last.is_empty() {
                    last = held;
                } else if !held.is_empty() {
                    last = [last, held].concat().into();
                }
                (last, error)
            }
            Err(error) => (Bytes::new(), Some(error)),
        }
    }

    fn is_unfinished(&self) -> bool {
        self.mask.is_unfinished() || !self.decoder.is_complete()
    }
}
