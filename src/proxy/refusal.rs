//! Whether an upstream refuses what the gateway has added to a request: `stream_options`.

use crate::upstream::Incoming;
use bytes::BytesMut;
use http::StatusCode;
use memchr::memmem;
use std::future::poll_fn;
use std::time::Duration;
use tokio::time::timeout;

/// No more of an error is read before it is passed on.
const MOST_READ: usize = 64 * 1024;
/// And it is not waited for any longer.
const LONGEST_WAIT: Duration = Duration::from_secs(5);

/// Whether an answer with this status may say so.
pub(super) fn is_possible(status: StatusCode) -> bool {
    matches!(status, StatusCode::BAD_REQUEST | StatusCode::UNPROCESSABLE_ENTITY)
}

/// Reads an error and tells whether it names `stream_options`. The answer is given back as it was.
pub(super) async fn names_stream_options(mut incoming: Incoming) -> (bool, Incoming) {
    let mut read = BytesMut::new();
    let reading = async {
        while read.len() < MOST_READ {
            match poll_fn(|cx| incoming.poll_data(cx)).await {
                Some(Ok(data)) => read.extend_from_slice(&data),
                Some(Err(error)) => return Some(error),
                None => return None,
            }
        }
        None
    };
    let broke_off = timeout(LONGEST_WAIT, reading).await.ok().flatten();
    let names = memmem::find(&read, b"stream_options").is_some();
    (names, incoming.with_read(read.freeze(), broke_off))
}
