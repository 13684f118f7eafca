//! The caller and the upstream, on both sides of the gateway. The upstream sends each event only after the caller has
//! received the previous one, so that the gateway always reads one event at a time.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::{Prompt, Scenario};

pub(crate) const KEY: &str = "sk-bench-0123456789abcdef0123456789abcdef";
/// A key of the environment with a route.
pub(crate) const ROUTED_KEY: &str = "sk-routed-0123456789abcdef0123456789abcde";

const WORDS: [&str; 24] = [
    "the", "gateway", "counts", "every", "token", "of", "a", "request", "before", "it", "goes", "on", "and",
    "settles", "what", "was", "reserved", "when", "answer", "ends", "so", "that", "nothing", "is lost",
];
const EVENT: &str = "data: {\"id\":\"chatcmpl-bench\",\"object\":\"chat.completion.chunk\",\"created\":1700000000,\"model\":\"gpt-4o-mini\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\" token\"},\"logprobs\":null,\"finish_reason\":null}],\"usage\":null}\n\n";

/// The upstream, listening.
pub(crate) struct Exchange {
    address: SocketAddr,
    /// One message for each event that the caller has received.
    received: SyncSender<()>,
}

impl Exchange {
    pub(crate) fn listen() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (received, receipts) = sync_channel(1);
        let receipts = Arc::new(Mutex::new(receipts));
        std::thread::spawn(move || {
            for socket in listener.incoming().flatten() {
                let receipts = receipts.clone();
                std::thread::spawn(move || serve(socket, &receipts));
            }
        });
        Self { address, received }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(crate) fn caller(&self, gateway: SocketAddr, scenario: Scenario) -> Caller {
        let Scenario { prompt, key, .. } = scenario;
        let socket = TcpStream::connect(gateway).unwrap();
        socket.set_nodelay(true).unwrap();
        socket.set_read_timeout(Some(Duration::from_mins(1))).unwrap();
        Caller { socket, buffer: Vec::new(), received: self.received.clone(), prompt, key, seed: 1 }
    }
}

/// A caller with one connection.
pub(crate) struct Caller {
    socket: TcpStream,
    buffer: Vec<u8>,
    received: SyncSender<()>,
    prompt: Prompt,
    key: &'static str,
    seed: u32,
}

impl Caller {
    /// Sends this many requests and reads their answers. `events`: the number of events in each streamed answer.
    pub(crate) fn send(&mut self, requests: usize, events: Option<usize>) {
        for _ in 0..requests {
            let (key, body) = (self.key, self.body(events));
            let head = format!(
                "POST /v1/chat/completions HTTP/1.1\r\nhost: gateway\r\nauthorization: Bearer {key}\r\ncontent-type: application/json\r\naccept: application/json\r\nuser-agent: bench/1\r\ncontent-length: {}\r\n\r\n",
                body.len()
            );
            self.socket.write_all(&[head.as_bytes(), body.as_bytes()].concat()).unwrap();
            match events {
                Some(events) => self.read_stream(events),
                None => self.read_answer(),
            }
        }
    }

    fn body(&mut self, events: Option<usize>) -> String {
        let text = match self.prompt {
            Prompt::Small => "Explain in two sentences why the sky looks blue at noon and red in the evening, for a child of ten years.".to_owned(),
            Prompt::LargeRepeated => words(&mut 1, 32 * 1024),
            Prompt::LargeNew => words(&mut self.seed, 32 * 1024),
        };
        // The upstream takes the number of events from the user's name.
        let stream = events.map_or(String::new(), |events| {
            format!(
                ",\"stream\":true,\"stream_options\":{{\"include_usage\":true}},\"user\":\"events {events}\""
            )
        });
        let messages = text
            .as_bytes()
            .chunks(1024)
            .map(|part| format!("{{\"role\":\"user\",\"content\":\"{}\"}}", String::from_utf8_lossy(part)));
        let messages: Vec<String> = messages.collect();
        format!(
            "{{\"model\":\"gpt-4o-mini\",\"messages\":[{}],\"max_tokens\":100{stream}}}",
            messages.join(",")
        )
    }

    fn read_answer(&mut self) {
        let head = loop {
            if let Some(end) = find(&self.buffer, b"\r\n\r\n") {
                break end + 4;
            }
            self.read();
        };
        let end = head + content_length(&self.buffer[..head]);
        while self.buffer.len() < end {
            self.read();
        }
        assert!(self.buffer.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&self.buffer[..end]));
        self.buffer.drain(..end);
    }

    /// Acknowledges each event as it arrives; the last two are usage and the end.
    fn read_stream(&mut self, events: usize) {
        let mut acknowledged = 0;
        loop {
            self.read();
            let received = self.buffer.windows(6).filter(|window| window == b"data: ").count();
            while acknowledged < received.min(events) {
                self.received.send(()).unwrap();
                acknowledged += 1;
            }
            if self.buffer.ends_with(b"0\r\n\r\n") {
                assert!(find(&self.buffer, b"[DONE]").is_some(), "{}", String::from_utf8_lossy(&self.buffer));
                self.buffer.clear();
                return;
            }
        }
    }

    fn read(&mut self) {
        let mut piece = [0; 16 * 1024];
        let length = self.socket.read(&mut piece).unwrap();
        assert_ne!(length, 0, "the gateway closed the connection: {}", String::from_utf8_lossy(&self.buffer));
        self.buffer.extend_from_slice(&piece[..length]);
    }
}

/// Serves one connection until it is closed.
fn serve(mut socket: TcpStream, receipts: &Mutex<Receiver<()>>) -> Option<()> {
    socket.set_nodelay(true).unwrap();
    let mut buffer = Vec::new();
    loop {
        let head = loop {
            if let Some(end) = find(&buffer, b"\r\n\r\n") {
                break end + 4;
            }
            read(&mut socket, &mut buffer)?;
        };
        let end = head + content_length(&buffer[..head]);
        while buffer.len() < end {
            read(&mut socket, &mut buffer)?;
        }
        let events = events(&buffer[head..end]);
        buffer.drain(..end);
        match events {
            Some(events) => stream(&mut socket, events, receipts),
            None => socket.write_all(answer().as_bytes()).ok()?,
        }
    }
}

fn stream(socket: &mut TcpStream, events: usize, receipts: &Mutex<Receiver<()>>) {
    let receipts = receipts.lock().unwrap();
    let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
    let chunk = |event: &str| format!("{:x}\r\n{event}\r\n", event.len());
    socket.write_all(head.as_bytes()).unwrap();
    let event = chunk(EVENT);
    for _ in 0..events {
        socket.write_all(event.as_bytes()).unwrap();
        receipts.recv().unwrap();
    }
    let usage = "data: {\"id\":\"chatcmpl-bench\",\"object\":\"chat.completion.chunk\",\"created\":1700000000,\"model\":\"gpt-4o-mini\",\"choices\":[],\"usage\":{\"prompt_tokens\":30,\"completion_tokens\":100,\"total_tokens\":130}}\n\n";
    let last = [chunk(usage), chunk("data: [DONE]\n\n"), "0\r\n\r\n".to_owned()].concat();
    socket.write_all(last.as_bytes()).unwrap();
}

fn answer() -> String {
    let body = r#"{"id":"chatcmpl-bench","object":"chat.completion","created":1700000000,"model":"gpt-4o-mini","choices":[{"index":0,"message":{"role":"assistant","content":"Air scatters blue light more than red. In the evening the light crosses more air, and the blue is gone.","refusal":null},"logprobs":null,"finish_reason":"stop"}],"usage":{"prompt_tokens":30,"completion_tokens":24,"total_tokens":54}}"#;
    format!(
        "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
}

fn read(socket: &mut TcpStream, buffer: &mut Vec<u8>) -> Option<()> {
    let mut piece = [0; 16 * 1024];
    let length = socket.read(&mut piece).ok().filter(|length| *length > 0)?;
    buffer.extend_from_slice(&piece[..length]);
    Some(())
}

/// The number of events that a request selects. `None`: its answer is JSON.
fn events(body: &[u8]) -> Option<usize> {
    let at = find(body, b"\"events ")? + 8;
    let end = at + body[at..].iter().position(|b| *b == b'"')?;
    std::str::from_utf8(&body[at..end]).ok()?.parse().ok()
}

fn content_length(head: &[u8]) -> usize {
    let head = String::from_utf8_lossy(head).to_ascii_lowercase();
    let line = head.lines().find_map(|line| line.strip_prefix("content-length:"));
    line.map_or(0, |value| value.trim().parse().unwrap())
}

fn find(bytes: &[u8], what: &[u8]) -> Option<usize> {
    bytes.windows(what.len()).position(|window| window == what)
}

/// This many bytes of words, in an order that depends on the seed.
fn words(seed: &mut u32, bytes: usize) -> String {
    let mut text = String::new();
    while text.len() < bytes {
        *seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        text.push_str(WORDS[(*seed >> 16) as usize % WORDS.len()]);
        text.push(' ');
    }
    text
}
