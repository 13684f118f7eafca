//! Reads the first bytes of an answer before its head is passed on, where the head depends on them.
//!
//! An event can be withheld only if the caller is not promised the length of the body. Event streams have no declared
//! length, so this happens only if an upstream declares one for an answer that is not labelled as a stream.

use crate::upstream::Incoming;
use crate::usage::{BodyFormat, Detection, FormatDetector};
use bytes::BytesMut;
use std::future::poll_fn;
use std::time::Duration;
use tokio::time::timeout;

/// The wait for the first bytes ends after this time. Then the answer counts as no stream.
const MAX_READ_TIME: Duration = Duration::from_secs(1);

/// Whether a body begins as an event stream. Also returns the body, which still yields every byte.
pub(super) async fn begins_as_stream(mut incoming: Incoming) -> (bool, Incoming) {
    let (mut read, mut detector, mut seen) = (BytesMut::new(), FormatDetector::default(), 0);
    let reading = async {
        loop {
            match poll_fn(|cx| incoming.poll_data(cx)).await {
                Some(Ok(data)) => read.extend_from_slice(&data),
                Some(Err(error)) => return (None, Some(error)),
                None => return (None, None),
            }
            match detector.feed(&read[seen..]) {
                Detection::Pending(skipped) => seen += skipped,
                Detection::Found(_, format) => return (format, None),
            }
        }
    };
    let (format, read_error) = timeout(MAX_READ_TIME, reading).await.unwrap_or_default();
    (format == Some(BodyFormat::Sse), incoming.with_read(read.freeze(), read_error))
}
