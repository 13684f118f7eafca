//! Log lines: JSON, one a line, on standard error.
//!
//! Lines are put into a buffer that a thread of its own writes out, so that a slow terminal or pipe
//! never holds up a request; while it writes, the next lines gather (no timer, no line later than a
//! few milliseconds). A reader that stalls for long loses lines, and is told how many.

use super::Record;
use crate::clock::{self, Timestamp};
use serde::Serialize;
use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::Duration;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

/// More than this is not kept for a reader that does not read.
const MOST_WAITING: usize = 8 * 1024 * 1024;
/// Lines that come within this time leave in one write.
const GATHER: Duration = Duration::from_millis(5);

/// Where this process's log lines go, once that is set up.
static OUTPUT: OnceLock<LogOutput> = OnceLock::new();

/// The line of one request, in the shape of all other lines.
#[derive(Serialize)]
struct RequestLine<'a> {
    timestamp: &'a str,
    level: &'static str,
    target: &'static str,
    request_id: &'a str,
    environment: &'a str,
    caller: Option<&'a str>,
    api: &'a str,
    model: &'a str,
    outcome: &'static str,
    status: u16,
    #[serde(skip_serializing_if = "str::is_empty")]
    error: &'a str,
    stream: bool,
    estimated_prompt_tokens: u64,
    prompt_tokens: u64,
    completion_tokens: u64,
    total_tokens: u64,
    usage_reported: bool,
    /// Durations in microseconds.
    first_byte_us: Option<u64>,
    overhead_us: Option<u64>,
    duration_us: u64,
}

/// Writes the line of one request: what it was, how it ended, what it cost. No body, no key.
///
/// Written directly: through the general formatter this line took a third of all the CPU that the
/// gateway used for a small request (measured: 10 of 35 microseconds).
pub(super) fn request(record: &Record, elapsed: Duration) {
    if !tracing::enabled!(target: "tollgate::request", tracing::Level::INFO) {
        return;
    }
    let Some(output) = OUTPUT.get() else { return };
    let us = |d: Duration| u64::try_from(d.as_micros()).unwrap_or(u64::MAX);
    output.add(|buffer, timestamp| {
        let line = RequestLine {
            timestamp,
            level: "INFO",
            target: "tollgate::request",
            request_id: &record.request_id,
            environment: &record.environment,
            caller: record.caller.as_deref(),
            api: record.api,
            model: &record.model,
            outcome: record.outcome.as_str(),
            status: record.status,
            error: record.error,
            stream: record.streams,
            estimated_prompt_tokens: record.estimated_prompt,
            prompt_tokens: record.charged.prompt,
            completion_tokens: record.charged.completion,
            total_tokens: record.charged.total,
            usage_reported: record.reported,
            first_byte_us: record.first_byte.map(us),
            overhead_us: record.overhead.map(us),
            duration_us: us(elapsed),
        };
        // Neither these values nor a vector can fail to be written.
        drop(serde_json::to_writer(&mut *buffer, &line));
        buffer.push(b'\n');
    });
}

/// Where log lines go until the process ends.
#[derive(Clone)]
pub struct LogOutput(Arc<Shared>);

struct Shared {
    buffer: Mutex<Buffer>,
    filled: Condvar,
    written: Condvar,
}

#[derive(Default)]
struct Buffer {
    bytes: Vec<u8>,
    lost: u64,
    is_writing: bool,
    clock: Clock,
}

/// The time of day as text, written anew once a millisecond at most.
#[derive(Default)]
struct Clock {
    at: Timestamp,
    text: String,
}

impl Clock {
    fn text(&mut self) -> &str {
        let now = clock::now();
        if now != self.at || self.text.is_empty() {
            self.at = now;
            self.text = jiff::Timestamp::from_millisecond(now.0)
                .map_or_else(|_| now.0.to_string(), |t| format!("{t:.3}"));
        }
        &self.text
    }
}

/// Sets up logging for the process. `RUST_LOG` decides what is logged; without it everything from
/// `info` on. Fails silently if it was set up before.
pub fn init_logging() -> LogOutput {
    let output = LogOutput::start();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let lines = tracing_subscriber::fmt::layer()
        .json()
        .flatten_event(true)
        .with_current_span(false)
        .with_span_list(false)
        .with_writer(output.clone());
    if tracing_subscriber::registry().with(filter).with(lines).try_init().is_ok() {
        // The first to set up logging decides where it goes.
        drop(OUTPUT.set(output.clone()));
    }
    output
}

impl LogOutput {
    fn start() -> Self {
        let shared =
            Arc::new(Shared { buffer: Mutex::default(), filled: Condvar::new(), written: Condvar::new() });
        let writer = shared.clone();
        let started = thread::Builder::new().name("log".into()).spawn(move || writer.write_out());
        if let Err(error) = started {
            eprintln!("log lines cannot be written: {error}");
        }
        Self(shared)
    }

    /// Puts a line into the buffer, unless that is full.
    fn add(&self, write: impl FnOnce(&mut Vec<u8>, &str)) {
        let mut guard = self.0.lock();
        let buffer = &mut *guard;
        if buffer.bytes.len() > MOST_WAITING {
            buffer.lost += 1;
            return;
        }
        let wakes = buffer.bytes.is_empty() && !buffer.is_writing;
        write(&mut buffer.bytes, buffer.clock.text());
        drop(guard);
        if wakes {
            self.0.filled.notify_one();
        }
    }

    /// Waits until everything logged so far is written, at most a second.
    pub fn flush(&self) {
        let buffer = self.0.lock();
        let is_busy = |b: &mut Buffer| b.is_writing || !b.bytes.is_empty();
        drop(self.0.written.wait_timeout_while(buffer, Duration::from_secs(1), is_busy));
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Buffer> {
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
            thread::sleep(GATHER);
            let mut buffer = self.lock();
            std::mem::swap(&mut bytes, &mut buffer.bytes);
            let lost = std::mem::take(&mut buffer.lost);
            drop(buffer);
            if lost > 0 {
                bytes.extend_from_slice(
                    format!("{{\"level\":\"WARN\",\"message\":\"{lost} log lines were lost: their reader is too slow\"}}\n").as_bytes(),
                );
            }
            // Nobody is left to be told if standard error is gone.
            drop(io::stderr().write_all(&bytes));
            bytes.clear();
        }
    }
}

impl<'a> MakeWriter<'a> for LogOutput {
    type Writer = Line<'a>;

    fn make_writer(&'a self) -> Line<'a> {
        Line(self)
    }
}

/// One log line: it arrives in one piece.
pub struct Line<'a>(&'a LogOutput);

impl Write for Line<'_> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.add(|buffer, _| buffer.extend_from_slice(line));
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
