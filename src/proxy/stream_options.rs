//! Detects an upstream that refuses `stream_options`, which the gateway adds to requests for streams.

use crate::upstream::Incoming;
use bytes::BytesMut;
use http::StatusCode;
use memchr::memmem;
use std::future::poll_fn;
use std::time::Duration;
use tokio::time::timeout;

/// At most this much of an error answer is read before it is passed on.
const MAX_READ_BYTES: usize = 64 * 1024;
/// Reading the error answer stops after this time.
const MAX_READ_TIME: Duration = Duration::from_secs(5);

/// Whether an answer with this status can be such a refusal.
pub(super) fn may_be_refusal(status: StatusCode) -> bool {
    matches!(status, StatusCode::BAD_REQUEST | StatusCode::UNPROCESSABLE_ENTITY)
}

/// Whether an error answer mentions `stream_options`. Also returns the answer, which still yields every byte.
pub(super) async fn mentions_stream_options(mut incoming: Incoming) -> (bool, Incoming) {
    let mut read = BytesMut::new();
    let reading = async {
        while read.len() < MAX_READ_BYTES {
            match poll_fn(|cx| incoming.poll_data(cx)).await {
                Some(Ok(data)) => read.extend_from_slice(&data),
                Some(Err(error)) => return Some(error),
                None => return None,
            }
        }
        None
    };
    let read_error = timeout(MAX_READ_TIME, reading).await.ok().flatten();
    let is_mentioned = memmem::find(&read, b"stream_options").is_some();
    (is_mentioned, incoming.with_read(read.freeze(), read_error))
}
