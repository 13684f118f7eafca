//! Writes the lines of the log.
//!
//! Requests add lines to a buffer, and a separate thread writes the buffer to standard error. So a slow terminal or pipe
//! never delays a request. A line is written some milliseconds later at most. If the reader of standard error stalls for
//! long, lines are dropped, and a later line reports their number.

use super::Log;
use super::line::Line;
use super::time::TimeText;
use crate::config::LogForm;
use std::io::{self, Write as _};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;
use tracing::Level;

/// Maximum size of the buffer in bytes. Further lines are dropped.
const MAX_BUFFER_BYTES: usize = 8 * 1024 * 1024;
/// Lines that arrive within this time are written together.
const BATCH_TIME: Duration = Duration::from_millis(5);
/// The same after a batch of at least `BUSY_BYTES`: fewer batches take fewer system calls and fewer wake-ups of the thread.
const BUSY_BATCH_TIME: Duration = Duration::from_millis(20);
/// About eight lines of requests.
const BUSY_BYTES: usize = 4 * 1024;

/// The buffer and the thread that writes it.
#[derive(Clone)]
pub(crate) struct LogOutput(Arc<LogState>);

struct LogState {
    buffer: Mutex<LogBuffer>,
    /// Wakes the writing thread.
    filled: Condvar,
    /// Wakes threads that wait in [`LogOutput::flush`].
    written: Condvar,
}

#[derive(Default)]
struct LogBuffer {
    bytes: Vec<u8>,
    /// Number of lines dropped because the buffer was full.
    dropped: u64,
    is_writing: bool,
    time: TimeText,
}

impl LogOutput {
    pub(super) fn start() -> Self {
        let shared =
            Arc::new(LogState { buffer: Mutex::default(), filled: Condvar::new(), written: Condvar::new() });
        let writer = shared.clone();
        let started = thread::Builder::new().name("log".into()).spawn(move || writer.write_out());
        if let Err(error) = started {
            eprintln!("tollgate: the thread that writes log lines cannot be started: {error}");
        }
        Self(shared)
    }

    /// Adds a line to the buffer, or drops it if the buffer is full.
    pub(super) fn add(&self, write: impl FnOnce(&mut Vec<u8>, &str)) {
        let mut guard = self.0.lock();
        let buffer = &mut *guard;
        if buffer.bytes.len() > MAX_BUFFER_BYTES {
            buffer.dropped += 1;
            return;
        }
        let wakes = buffer.bytes.is_empty() && !buffer.is_writing;
        write(&mut buffer.bytes, buffer.time.current());
        drop(guard);
        if wakes {
            self.0.filled.notify_one();
        }
    }

    /// Waits until all lines so far are written, at most a second.
    pub(crate) fn flush(&self) {
        let buffer = self.0.lock();
        let is_busy = |b: &mut LogBuffer| b.is_writing || !b.bytes.is_empty();
        drop(self.0.written.wait_timeout_while(buffer, Duration::from_secs(1), is_busy));
    }
}

impl LogState {
    fn lock(&self) -> MutexGuard<'_, LogBuffer> {
        self.buffer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_out(&self) {
        let (mut bytes, mut batch_time) = (Vec::new(), BATCH_TIME);
        loop {
            let mut buffer = self.lock();
            buffer.is_writing = false;
            self.written.notify_all();
            while buffer.bytes.is_empty() {
                buffer = self.filled.wait(buffer).unwrap_or_else(PoisonError::into_inner);
            }
            buffer.is_writing = true;
            drop(buffer);
            thread::sleep(batch_time);
            let mut guard = self.lock();
            let buffer = &mut *guard;
            std::mem::swap(&mut bytes, &mut buffer.bytes);
            let dropped = std::mem::take(&mut buffer.dropped);
            if dropped > 0 {
                report_dropped(&mut bytes, buffer.time.current(), dropped);
            }
            drop(guard);
            // There is no other place for this error than standard error.
            drop(io::stderr().write_all(&bytes));
            batch_time = if bytes.len() < BUSY_BYTES { BATCH_TIME } else { BUSY_BATCH_TIME };
            bytes.clear();
        }
    }
}

/// Adds a line with the number of lines that were dropped.
fn report_dropped(bytes: &mut Vec<u8>, timestamp: &str, dropped: u64) {
    let form = Log::get().map_or(LogForm::Json, Log::form);
    let message = "log lines were dropped, because the reader of standard error is too slow";
    let mut line = Line::begin(bytes, form, timestamp, Level::WARN, "tollgate::telemetry", message);
    line.add("lines", dropped);
    line.end();
}
