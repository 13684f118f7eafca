//! Log lines: one JSON object per line, on standard error.
//!
//! Requests add lines to a buffer, and a separate thread writes the buffer to standard error. So a slow terminal or pipe
//! never delays a request. A line is written a few milliseconds later at most. If the reader of standard error stalls for
//! long, lines are dropped, and a later line reports their number.

use super::Record;
use crate::clock::{self, Timestamp};
use crate::quota::{Shortfall, Wait};
use serde::Serialize;
use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::Duration;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

/// Maximum size of the buffer in bytes. Further lines are dropped.
const MAX_BUFFER_BYTES: usize = 8 * 1024 * 1024;
/// Lines that arrive within this time are written together.
const BATCH_TIME: Duration = Duration::from_millis(5);

/// The output of this process, once logging is initialised.
static OUTPUT: OnceLock<LogOutput> = OnceLock::new();

/// Writes a log line: an object of JSON whose keys need no escapes. A derived `Serialize` would escape the keys again for
/// every line, which takes a third of the instructions of a line.
struct LineWriter<'b>(&'b mut Vec<u8>);

impl<'b> LineWriter<'b> {
    fn begin(buffer: &'b mut Vec<u8>) -> Self {
        buffer.push(b'{');
        Self(buffer)
    }

    fn add(&mut self, key: &'static str, value: impl Serialize) {
        let before = if self.0.ends_with(b"{") { "\"" } else { ",\"" };
        for part in [before, key, "\":"] {
            self.0.extend_from_slice(part.as_bytes());
        }
        // Writing these values to a vector cannot fail.
        drop(serde_json::to_writer(&mut *self.0, &value));
    }

    fn add_if_any(&mut self, key: &'static str, value: Option<impl Serialize>) {
        if let Some(value) = value {
            self.add(key, value);
        }
    }

    fn end(self) {
        self.0.extend_from_slice(b"}\n");
    }
}

/// Writes the log line of one request. It contains no body and no key.
///
/// This function writes the line directly. Through the formatter of `tracing` the line took 10 of the 35 microseconds of
/// CPU that the gateway used for a small request (measured).
pub(super) fn request(record: &Record, elapsed: Duration) {
    if !tracing::enabled!(target: "tollgate::request", tracing::Level::INFO) {
        return;
    }
    let Some(output) = OUTPUT.get() else { return };
    let us = |d: Duration| u64::try_from(d.as_micros()).unwrap_or(u64::MAX);
    output.add(|buffer, timestamp| {
        // The form is that of the lines of `tracing`.
        let mut line = LineWriter::begin(buffer);
        line.add("timestamp", timestamp);
        line.add("level", "INFO");
        line.add("target", "tollgate::request");
        line.add("request_id", &*record.request_id);
        line.add_if_any("address", record.address);
        line.add("environment", &*record.environment);
        line.add("caller", record.caller.as_deref());
        line.add("api", record.api);
        line.add("model", &*record.model);
        line.add("outcome", record.outcome.as_str());
        line.add("status", record.status);
        line.add_if_any("error", Some(record.error).filter(|error| !error.is_empty()));
        if let Some(denied_by) = record.denied_by.as_deref() {
            let quota = &denied_by.quota;
            line.add("scope", quota.scope.as_str());
            line.add_if_any("name", Some(quota.scope.name()).filter(|name| !name.is_empty()));
            line.add("kind", quota.kind.as_str());
            line.add("per", quota.per.text.as_str());
            line.add("limit", quota.limit);
            line.add("requested", denied_by.requested);
            line.add("remaining", denied_by.remaining);
            line.add_if_any("retry_after_ms", retry_after_ms(denied_by));
        }
        line.add("stream", record.is_stream);
        line.add("estimated_prompt_tokens", record.estimated_prompt);
        line.add("estimate_source", record.estimate_source.as_str());
        line.add("prompt_tokens", record.charged.prompt);
        line.add("completion_tokens", record.charged.completion);
        line.add("total_tokens", record.charged.total);
        line.add("usage_reported", record.is_usage_reported);
        // Durations in microseconds.
        line.add("first_byte_us", record.first_byte.map(us));
        line.add("overhead_us", record.overhead.map(us));
        line.add("duration_us", us(elapsed));
        line.end();
    });
}

/// The wait in milliseconds. `None`: the request can never fit.
fn retry_after_ms(denied_by: &Shortfall) -> Option<u64> {
    match denied_by.wait {
        Wait::Ms(ms) => Some(ms.max(1)),
        Wait::Never => None,
    }
}

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

/// The current time as text, formatted at most once per millisecond.
#[derive(Default)]
struct TimeText {
    at: Timestamp,
    text: String,
}

impl TimeText {
    fn current(&mut self) -> &str {
        let now = clock::now();
        if now != self.at || self.text.is_empty() {
            self.at = now;
            self.text = jiff::Timestamp::from_millisecond(now.0)
                .map_or_else(|_| now.0.to_string(), |t| format!("{t:.3}"));
        }
        &self.text
    }
}

/// Initialises logging for the process. `RUST_LOG` selects the levels and modules that are logged. Default: everything from level `info` on. It
/// has no effect if logging was initialised before.
pub(crate) fn init_logging() -> LogOutput {
    init_logging_with("info")
}

/// Like [`init_logging`], with this filter unless `RUST_LOG` has another one.
pub(crate) fn init_logging_with(filter: &str) -> LogOutput {
    let output = LogOutput::start();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(filter));
    let lines = tracing_subscriber::fmt::layer()
        .json()
        .flatten_event(true)
        .with_current_span(false)
        .with_span_list(false)
        .with_writer(output.clone());
    if tracing_subscriber::registry().with(filter).with(lines).try_init().is_ok() {
        // The first initialisation decides where log lines go.
        drop(OUTPUT.set(output.clone()));
    }
    output
}

impl LogOutput {
    fn start() -> Self {
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
    fn add(&self, write: impl FnOnce(&mut Vec<u8>, &str)) {
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
        let mut bytes = Vec::new();
        loop {
            let mut buffer = self.lock();
            buffer.is_writing = false;
            self.written.notify_all();
            while buffer.bytes.is_empty() {
                buffer = self.filled.wait(buffer).unwrap_or_else(PoisonError::into_inner);
            }
            buffer.is_writing = true;
            drop(buffer);
            thread::sleep(BATCH_TIME);
            let mut buffer = self.lock();
            std::mem::swap(&mut bytes, &mut buffer.bytes);
            let dropped = std::mem::take(&mut buffer.dropped);
            drop(buffer);
            if dropped > 0 {
                bytes.extend_from_slice(
                    format!("{{\"level\":\"WARN\",\"message\":\"{dropped} log lines were dropped, because the reader of standard error is too slow\"}}\n").as_bytes(),
                );
            }
            // There is no other place for this error than standard error.
            drop(io::stderr().write_all(&bytes));
            bytes.clear();
        }
    }
}

impl<'a> MakeWriter<'a> for LogOutput {
    type Writer = LogLine<'a>;

    fn make_writer(&'a self) -> LogLine<'a> {
        LogLine(self)
    }
}

/// Writes one log line. `tracing` passes each line in one call.
pub(crate) struct LogLine<'a>(&'a LogOutput);

impl Write for LogLine<'_> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.add(|buffer, _| buffer.extend_from_slice(line));
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
