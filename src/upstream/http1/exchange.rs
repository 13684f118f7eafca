//! Sends a request on a connection and reads the head of its answer.

use super::body::Http1Body;
use super::connection::Http1Connection;
use super::head::{AnswerHead, HeadSearch, invalid};
use super::outgoing::RequestWriter;
use super::pool::IdlePool;
use crate::upstream::request::{ExchangeError, Request};
use http::{Method, StatusCode, response};
use std::future::poll_fn;
use std::io::{self, ErrorKind};
use std::task::{Context, Poll, ready};
use tokio::time::Instant;

/// Maximum interim answers (103 and others) before the final one.
const MAX_INTERIM_ANSWERS: usize = 16;

/// Sends a request and reads the head of the final answer.
///
/// Returns when the head is complete, even if the request is not yet sent: an upstream can answer early, and
/// can stop reading until its answer is read. After an early refusal (4xx, 5xx) no more is sent. After any other
/// early answer the rest of the request is sent while the body is polled.
///
/// The connection goes to `pool` at the end of the body if it can be reused. The head must be complete at `due`.
pub(in crate::upstream) async fn exchange(
    mut connection: Http1Connection,
    authority: &str,
    request: &Request,
    due: Instant,
    pool: &IdlePool,
) -> Result<(response::Parts, Http1Body), ExchangeError> {
    let mut outgoing = RequestWriter::new(authority, request);
    let (mut search, mut interim_answers) = (HeadSearch::default(), 0);
    let head = poll_fn(|cx| {
        // Reads even if the write is blocked.
        let _ = outgoing.poll_write(cx, &mut *connection.stream);
        match poll_head(&mut connection, cx, &request.method, (&mut search, &mut interim_answers)) {
            Poll::Ready(head) => Poll::Ready(head.map(Some)),
            Poll::Pending => connection.timer.poll(cx, due).map(|()| Ok(None)),
        }
    });
    let AnswerHead { parts, framing, keeps_alive } = match head.await {
        Ok(Some(head)) => head,
        Ok(None) => return Err(ExchangeError::out_of_time()),
        Err(error) => {
            let has_answer_begun =
                interim_answers > 0 || search.has_skipped() || !connection.buffer.is_empty();
            return Err(failure(error, has_answer_begun, outgoing));
        }
    };
    let is_refusal = parts.status.is_client_error() || parts.status.is_server_error();
    let keeps_alive = keeps_alive && (outgoing.is_sent() || outgoing.is_writing() && !is_refusal);
    let unsent = (outgoing.is_writing() && !is_refusal).then(|| Box::new(outgoing));
    Ok((parts, Http1Body::new(connection, framing, unsent, keeps_alive.then(|| pool.clone()))))
}

/// Reads up to the head of the final answer.
fn poll_head(
    connection: &mut Http1Connection,
    cx: &mut Context<'_>,
    method: &Method,
    (search, interim_answers): (&mut HeadSearch, &mut usize),
) -> Poll<io::Result<AnswerHead>> {
    loop {
        if let Some(head) = search.take(&mut connection.buffer, method)? {
            if !head.parts.status.is_informational() {
                return Poll::Ready(Ok(head));
            }
            *interim_answers += 1;
            if *interim_answers > MAX_INTERIM_ANSWERS {
                return Poll::Ready(Err(invalid("there are too many interim answers")));
            }
            if head.parts.status == StatusCode::SWITCHING_PROTOCOLS {
                return Poll::Ready(Err(invalid(
                    "the upstream switched protocols without a request to do so",
                )));
            }
            continue;
        }
        if ready!(connection.poll_read(cx))? == 0 {
            return Poll::Ready(Err(ErrorKind::UnexpectedEof.into()));
        }
    }
}

/// Classifies a failure by whether the upstream may have processed the request.
fn failure(read_error: io::Error, has_answer_begun: bool, outgoing: RequestWriter) -> ExchangeError {
    let has_answer_begun = has_answer_begun || read_error.kind() == ErrorKind::InvalidData;
    let is_unwritten = outgoing.is_unwritten();
    let error = outgoing.write_error_or(read_error);
    match (has_answer_begun, is_unwritten) {
        (true, _) => ExchangeError::unknown(error),
        (false, true) => ExchangeError::not_processed(error),
        (false, false) => ExchangeError::unanswered(error),
    }
}
