//! A caller on a raw socket, so that tests see the bytes on the wire.

use super::soon;
use std::net::SocketAddr;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// A connection to the gateway.
pub struct Caller {
    socket: TcpStream,
    buffer: Vec<u8>,
}

/// A complete answer.
#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    pub head: String,
    pub body: Vec<u8>,
    /// The connection ended before the end of the body.
    pub is_incomplete: bool,
}

impl Reply {
    pub fn header(&self, name: &str) -> Option<&str> {
        header(&self.head, name)
    }

    /// All values of a header.
    pub fn headers_named(&self, name: &str) -> Vec<&str> {
        let fields = self.head.lines().skip(1).filter_map(|l| l.split_once(": "));
        fields.filter(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, value)| value).collect()
    }

    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }

    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.text()))
    }

    pub fn code(&self) -> String {
        self.json()["error"]["code"].as_str().unwrap_or_default().to_owned()
    }

    /// The status and the error code of an error that the gateway made.
    pub fn refusal(&self) -> (u16, String) {
        assert_eq!(self.header("x-tollgate-error"), Some(self.code().as_str()), "{}", self.head);
        (self.status, self.code())
    }
}

pub fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    let fields = head.lines().skip(1).filter_map(|l| l.split_once(": "));
    let mut named = fields.filter(|(n, _)| n.eq_ignore_ascii_case(name));
    named.next().map(|(_, v)| v)
}

impl Caller {
    pub async fn connect(address: SocketAddr) -> Self {
        let socket = TcpStream::connect(address).await.unwrap();
        socket.set_nodelay(true).unwrap();
        Self { socket, buffer: Vec::new() }
    }

    pub async fn send(&mut self, bytes: &[u8]) {
        // The gateway may close the connection after a refusal, before it has read the whole request.
        let _ = self.socket.write_all(bytes).await;
    }

    /// Sends bytes and returns whether the connection was still open.
    pub async fn try_send(&mut self, bytes: &[u8]) -> bool {
        self.socket.write_all(bytes).await.is_ok()
    }

    /// Sends a request; `headers` are lines that end in CRLF.
    pub async fn request(&mut self, method: &str, target: &str, headers: &str, body: &[u8]) {
        let head = format!(
            "{method} {target} HTTP/1.1\r\nhost: gateway\r\n{headers}content-length: {}\r\n\r\n",
            body.len()
        );
        self.send(&[head.as_bytes(), body].concat()).await;
    }

    /// Reads more bytes into the buffer. `false`: the connection has ended.
    async fn read_more(&mut self) -> bool {
        let read = soon("bytes from the gateway", self.socket.read_buf(&mut self.buffer)).await;
        read.is_ok_and(|n| n > 0)
    }

    /// Reads the head of an answer.
    pub async fn head(&mut self) -> String {
        loop {
            if let Some(at) = self.buffer.windows(4).position(|w| w == b"\r\n\r\n") {
                let rest = self.buffer.split_off(at + 4);
                let head = std::mem::replace(&mut self.buffer, rest);
                return String::from_utf8(head).unwrap().trim_end().to_owned();
            }
            assert!(self.read_more().await, "the connection ended before the head of an answer");
        }
    }

    /// Reads a complete answer.
    pub async fn reply(&mut self) -> Reply {
        let head = self.head().await;
        let status = head[9..12].parse().unwrap();
        let (mut body, mut is_incomplete) = (Vec::new(), false);
        if header(&head, "transfer-encoding").is_some() {
            loop {
                match self.chunk().await {
                    Some(chunk) if chunk.is_empty() => break,
                    Some(chunk) => body.extend(chunk),
                    None => {
                        is_incomplete = true;
                        break;
                    }
                }
            }
        } else {
            let length: usize = header(&head, "content-length").map_or(0, |l| l.parse().unwrap());
            while self.buffer.len() < length && !is_incomplete {
                is_incomplete = !self.read_more().await;
            }
            let rest = self.buffer.split_off(length.min(self.buffer.len()));
            body = std::mem::replace(&mut self.buffer, rest);
        }
        Reply { status, head, body, is_incomplete }
    }

    /// Reads the next chunk of a chunked answer. The last chunk is empty. `None`: the connection broke.
    pub async fn chunk(&mut self) -> Option<Vec<u8>> {
        loop {
            if let Some(line) = self.buffer.windows(2).position(|w| w == b"\r\n") {
                let size = std::str::from_utf8(&self.buffer[..line]).unwrap();
                let size = usize::from_str_radix(size, 16).unwrap();
                if self.buffer.len() >= line + 4 + size {
                    let data = self.buffer[line + 2..line + 2 + size].to_vec();
                    self.buffer.drain(..line + 4 + size);
                    return Some(data);
                }
            }
            if !self.read_more().await {
                return None;
            }
        }
    }

    /// Waits for more bytes or the end of the connection. Returns whether the gateway closed it.
    pub async fn is_closed(&mut self) -> bool {
        !self.read_more().await
    }
}
