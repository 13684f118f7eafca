//! An upstream that answers chat requests and adds up the tokens that it reports.

use super::http::Connection;
use std::io;
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

/// Tokens of the prompt of a request with the message "hello".
pub const PROMPT_TOKENS: u64 = 8;
const EVENTS: u64 = 8;

#[derive(Default)]
pub struct Upstream {
    /// Tokens reported so far.
    pub reported: AtomicU64,
    /// Answers whose tokens were reported.
    pub answers: AtomicU64,
    /// Streams of requests with the user `held` wait before their last events until this is set.
    pub is_released: AtomicBool,
    serial: AtomicU64,
}

impl Upstream {
    pub fn start() -> (Arc<Self>, u16) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let upstream = Arc::new(Self::default());
        let serving = upstream.clone();
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let upstream = serving.clone();
                thread::spawn(move || upstream.serve(stream));
            }
        });
        (upstream, port)
    }

    /// Answers requests until the connection ends.
    fn serve(&self, stream: TcpStream) -> io::Result<()> {
        let mut connection = Connection::of(stream)?;
        loop {
            let request = connection.message()?.text();
            let serial = self.serial.fetch_add(1, Ordering::SeqCst);
            let completion = 1 + serial * 7 % 40;
            thread::sleep(Duration::from_millis(serial % 20));
            if request.contains(r#""stream":true"#) {
                self.stream(&mut connection, request.contains("held"), completion)?;
            } else {
                let body = format!(
                    r#"{{"id":"a","choices":[{{"index":0,"message":{{"role":"assistant","content":"hi"}},"finish_reason":"stop"}}],{}}}"#,
                    usage(completion)
                );
                self.count(completion);
                connection.send(&format!(
                    "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
                    body.len()
                ))?;
            }
        }
    }

    fn stream(&self, connection: &mut Connection, is_held: bool, completion: u64) -> io::Result<()> {
        connection.send(
            "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n",
        )?;
        let mut event = |data: &str| {
            let event = format!("data: {data}\n\n");
            connection.send(&format!("{:x}\r\n{event}\r\n", event.len()))
        };
        for _ in 0..EVENTS {
            event(r#"{"id":"a","choices":[{"index":0,"delta":{"content":"w"}}]}"#)?;
            thread::sleep(Duration::from_millis(10));
        }
        while is_held && !self.is_released.load(Ordering::SeqCst) {
            thread::sleep(Duration::from_millis(5));
        }
        event(r#"{"id":"a","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}"#)?;
        self.count(completion);
        event(&format!(r#"{{"id":"a","choices":[],{}}}"#, usage(completion)))?;
        event("[DONE]")?;
        connection.send("0\r\n\r\n")
    }

    fn count(&self, completion: u64) {
        self.reported.fetch_add(PROMPT_TOKENS + completion, Ordering::SeqCst);
        self.answers.fetch_add(1, Ordering::SeqCst);
    }
}

fn usage(completion: u64) -> String {
    let total = PROMPT_TOKENS + completion;
    format!(
        r#""usage":{{"prompt_tokens":{PROMPT_TOKENS},"completion_tokens":{completion},"total_tokens":{total}}}"#
    )
}
