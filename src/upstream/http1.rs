//! An HTTP/1.1 client whose answers are read by the task that polls them.
//!
//! HTTP libraries run each connection in a separate task, which passes the body on piece by piece. That costs two
//! wake-ups and one write for every streamed event (measured: see docs/performance.md). Here the task that serves the
//! caller polls the socket itself, and all chunks in the read buffer are passed on as one piece. `httparse` parses
//! heads and chunk sizes.

mod body;
mod chunked;
mod connection;
mod exchange;
#[cfg(feature = "fuzz")]
mod fuzzed;
mod head;
mod outgoing;
mod pool;

pub(super) use body::Http1Body;
pub(super) use connection::Http1Connection;
pub(super) use exchange::exchange;
#[cfg(feature = "fuzz")]
pub use fuzzed::{ReadAnswer, read_answer};
pub(super) use pool::IdlePool;
