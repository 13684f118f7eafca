//! Reads an answer from bytes in memory, for the fuzz target.

use super::connection::Http1Connection;
use super::{IdlePool, exchange};
use crate::clock::Stopwatch;
use crate::upstream::request::Request;
use bytes::Bytes;
use http::Method;
use std::future::poll_fn;
use std::time::Duration;
use tokio::io::{AsyncWriteExt as _, duplex};
use tokio::runtime::Builder;

/// An answer as the client has read it.
#[derive(Debug)]
pub struct ReadAnswer {
    /// Its status.
    pub status: u16,
    /// The number of its headers.
    pub headers: usize,
    /// The body, up to a fault.
    pub body: Vec<u8>,
    /// Whether the whole body has arrived.
    pub is_complete: bool,
}

/// Reads the answer in `wire`, which arrives in pieces of `step` bytes. `None`: there is no valid head.
pub fn read_answer(wire: &[u8], step: usize) -> Option<ReadAnswer> {
    let runtime = Builder::new_current_thread().enable_time().build().ok()?;
    runtime.block_on(async {
        // The request fits into the buffer, so the upstream need not read it.
        let (ours, mut theirs) = duplex(step.clamp(256, 64 * 1024));
        let request =
            Request { method: Method::POST, target: "/".into(), headers: Vec::new(), body: Bytes::new() };
        let pool = IdlePool::new(Duration::from_mins(1));
        let connection = Http1Connection::new(Box::new(ours));
        let due = Stopwatch::start().deadline(Duration::from_mins(1));
        let read = async {
            let (parts, mut body) = exchange(connection, "u", &request, due, &pool).await.ok()?;
            let (mut all, mut is_complete) = (Vec::new(), false);
            loop {
                match poll_fn(|cx| body.poll_data(cx)).await {
                    Some(Ok(data)) => all.extend_from_slice(&data),
                    Some(Err(_)) => break,
                    None => {
                        is_complete = true;
                        break;
                    }
                }
            }
            let (status, headers) = (parts.status.as_u16(), parts.headers.len());
            Some(ReadAnswer { status, headers, body: all, is_complete })
        };
        let write = async {
            for piece in wire.chunks(step.min(wire.len().max(1))) {
                if theirs.write_all(piece).await.is_err() {
                    break;
                }
                tokio::task::yield_now().await;
            }
            drop(theirs);
        };
        tokio::join!(read, write).0
    })
}
