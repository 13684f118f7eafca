//! Callers that send a fixed number of requests a second, on new and on kept connections, for JSON and for streams.

use super::http::{Connection, Message};
use serde_json::Value;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

pub const JSON: &str = r#"{"max_tokens":50,"model":"gpt-4o","messages":[{"role":"user","content":"hello"}]}"#;
pub const STREAM: &str = r#"{"stream":true,"stream_options":{"include_usage":true},"max_tokens":50,"model":"gpt-4o","messages":[{"role":"user","content":"hello"}]}"#;
/// Each caller sends a request in this interval, so 20 callers send 100 a second.
const INTERVAL: Duration = Duration::from_millis(200);

#[derive(Default)]
pub struct Sums {
    pub sent: AtomicU64,
    /// Complete answers with status 200.
    pub answered: AtomicU64,
    /// Answers with status 429.
    pub refused: AtomicU64,
    /// Total tokens of the complete answers.
    pub tokens: AtomicU64,
    /// Descriptions of the failures.
    pub faults: Mutex<Vec<String>>,
    /// The longest time between a request and the head of its answer, in milliseconds.
    pub slowest_ms: AtomicU64,
    is_over: AtomicBool,
}

pub struct Load {
    pub sums: Arc<Sums>,
    callers: Vec<JoinHandle<()>>,
}

impl Load {
    /// Starts 20 callers.
    pub fn start(port: u16) -> Self {
        let sums = Arc::new(Sums::default());
        let caller = |number: u64| {
            let sums = sums.clone();
            thread::spawn(move || {
                thread::sleep(INTERVAL / 20 * u32::try_from(number).unwrap());
                let body = if number.is_multiple_of(2) { JSON } else { STREAM };
                sums.run(port, body, number % 4 < 2);
            })
        };
        let callers = (0..20).map(caller).collect();
        Self { sums, callers }
    }

    /// Ends the load and waits for the last answers.
    pub fn stop(self) -> Arc<Sums> {
        self.sums.is_over.store(true, Ordering::SeqCst);
        self.callers.into_iter().for_each(|caller| caller.join().unwrap());
        self.sums
    }
}

impl Sums {
    fn run(&self, port: u16, body: &str, keeps_connection: bool) {
        let mut kept = None;
        let mut next = Instant::now();
        while !self.is_over.load(Ordering::SeqCst) {
            self.sent.fetch_add(1, Ordering::SeqCst);
            let connection = kept.take().map_or_else(|| Connection::open(port), Ok);
            match connection.and_then(|connection| self.call(connection, body)) {
                Ok((connection, answer)) => {
                    let is_closed = answer.header("connection").is_some_and(|value| value == "close");
                    kept = (keeps_connection && !is_closed).then_some(connection);
                    self.record(&answer);
                }
                Err(error) => self.fault(format!("keeps: {keeps_connection}, {body}: {error}")),
            }
            next += INTERVAL;
            thread::sleep(next.saturating_duration_since(Instant::now()));
        }
    }

    fn call(&self, mut connection: Connection, body: &str) -> io::Result<(Connection, Message)> {
        let began = Instant::now();
        let answer = connection.call(body)?;
        self.slowest_ms.fetch_max(u64::try_from(began.elapsed().as_millis()).unwrap(), Ordering::SeqCst);
        Ok((connection, answer))
    }

    fn record(&self, answer: &Message) {
        match answer.status() {
            200 => match tokens(&answer.text()) {
                Some(tokens) => {
                    self.answered.fetch_add(1, Ordering::SeqCst);
                    self.tokens.fetch_add(tokens, Ordering::SeqCst);
                }
                None => self.fault(format!("no usage in {}", answer.text())),
            },
            429 => drop(self.refused.fetch_add(1, Ordering::SeqCst)),
            _ => self.fault(format!("{}{}", answer.head, answer.text())),
        }
    }

    fn fault(&self, fault: String) {
        self.faults.lock().unwrap().push(fault);
    }

    pub fn assert_faultless(&self) {
        let faults = self.faults.lock().unwrap();
        assert!(
            faults.is_empty(),
            "{} of {} requests failed: {:#?}",
            faults.len(),
            self.sent.load(Ordering::SeqCst),
            &faults[..faults.len().min(5)]
        );
    }
}

/// The reported total of an answer.
pub fn tokens(text: &str) -> Option<u64> {
    let documents = text.lines().map(|line| line.strip_prefix("data: ").unwrap_or(line));
    documents
        .filter_map(|document| serde_json::from_str::<Value>(document).ok())
        .find_map(|document| document["usage"]["total_tokens"].as_u64())
}
