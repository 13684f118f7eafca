//! A caller with HTTP/2, and one that sends raw frames.

use super::{Reply, soon};
use bytes::Bytes;
use h2::RecvStream;
use h2::client::{ResponseFuture, SendRequest};
use http::{HeaderMap, Request, Response};
use std::net::SocketAddr;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

/// A connection with HTTP/2 to the gateway.
pub struct Http2Caller {
    /// The `:authority` of its requests.
    pub authority: String,
    pub send: SendRequest<Bytes>,
    /// Ends with the connection.
    pub connection: JoinHandle<Result<(), h2::Error>>,
}

impl Http2Caller {
    /// Connects without TLS, by prior knowledge.
    pub async fn connect(address: SocketAddr) -> Self {
        let socket = TcpStream::connect(address).await.unwrap();
        socket.set_nodelay(true).unwrap();
        Self::over(socket, 65_535).await
    }

    /// A caller that opens a window of this many bytes for each answer.
    pub async fn over(io: impl AsyncRead + AsyncWrite + Unpin + Send + 'static, window: u32) -> Self {
        let mut builder = h2::client::Builder::new();
        builder.initial_window_size(window).initial_max_send_streams(1_000);
        let (send, connection) = soon("the handshake", builder.handshake(io)).await.unwrap();
        Self { authority: "gateway".to_owned(), send, connection: tokio::spawn(connection) }
    }

    /// Sends a request; `headers` are lines as in HTTP/1.1.
    pub async fn begin(&mut self, method: &str, target: &str, headers: &str, body: &[u8]) -> ResponseFuture {
        let mut request = Request::builder().method(method).uri(format!("http://{}{target}", self.authority));
        for (name, value) in headers.lines().filter_map(|line| line.split_once(": ")) {
            request = request.header(name, value);
        }
        let ready = self.send.clone().ready().await.unwrap();
        self.send = ready;
        let ends = body.is_empty();
        let (answer, mut stream) = self.send.send_request(request.body(()).unwrap(), ends).unwrap();
        if !ends {
            // The h2 library waits for the window.
            stream.send_data(Bytes::copy_from_slice(body), true).unwrap();
        }
        answer
    }

    /// Sends a request and reads the complete answer.
    pub async fn request(&mut self, method: &str, target: &str, headers: &str, body: &[u8]) -> Reply {
        let answer = self.begin(method, target, headers, body).await;
        whole(soon("an answer", answer).await.unwrap()).await
    }

    pub async fn chat(&mut self, body: &str) -> Reply {
        self.request("POST", super::CHAT, "", body.as_bytes()).await
    }
}

/// Reads the rest of an answer.
pub async fn whole(answer: Response<RecvStream>) -> Reply {
    let (parts, mut stream) = answer.into_parts();
    let (mut body, mut is_incomplete) = (Vec::new(), false);
    loop {
        match soon("more of an answer", stream.data()).await {
            Some(Ok(data)) => {
                stream.flow_control().release_capacity(data.len()).unwrap();
                body.extend_from_slice(&data);
            }
            Some(Err(_)) => {
                is_incomplete = true;
                break;
            }
            None => break,
        }
    }
    Reply { status: parts.status.as_u16(), head: head(&parts.headers), body, is_incomplete }
}

/// Headers as lines of HTTP/1.1, behind an empty first line.
fn head(headers: &HeaderMap) -> String {
    headers.iter().fold(String::new(), |head, (name, value)| {
        format!("{head}\r\n{name}: {}", value.to_str().unwrap_or_default())
    })
}

/// A connection that sends raw frames.
pub struct RawHttp2 {
    socket: TcpStream,
    received: Vec<u8>,
}

/// A frame that the gateway has sent.
#[derive(Debug, PartialEq, Eq)]
pub struct ReceivedFrame {
    pub kind: u8,
    pub flags: u8,
    pub stream: u32,
    pub content: Vec<u8>,
}

pub const HEADERS: u8 = 1;
pub const RST_STREAM: u8 = 3;
pub const GOAWAY: u8 = 7;
/// END_STREAM and END_HEADERS.
pub const WHOLE: u8 = 5;

impl RawHttp2 {
    /// Connects, and sends the preface and these settings: pairs of identifier and value.
    pub async fn connect(address: SocketAddr, settings: &[(u16, u32)]) -> Self {
        let mut raw = Self { socket: TcpStream::connect(address).await.unwrap(), received: Vec::new() };
        raw.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await;
        let settings: Vec<u8> = settings
            .iter()
            .flat_map(|(id, value)| [&id.to_be_bytes()[..], &value.to_be_bytes()].concat())
            .collect();
        raw.send(&frame(4, 0, 0, &settings)).await;
        raw
    }

    /// Sends bytes. `false`: the gateway has closed the connection.
    pub async fn send(&mut self, bytes: &[u8]) -> bool {
        // The gateway may wait for the caller to read.
        let mut rest = bytes;
        let (mut reading, mut writing) = self.socket.split();
        while !rest.is_empty() {
            let mut piece = [0; 1024];
            tokio::select! {
                written = writing.write(rest) => match written {
                    Ok(n @ 1..) => rest = &rest[n..],
                    _ => return false,
                },
                read = reading.read(&mut piece) => match read {
                    Ok(n @ 1..) => self.received.extend_from_slice(&piece[..n]),
                    _ => return false,
                },
            }
        }
        true
    }

    /// The next frame. `None`: the connection has ended.
    pub async fn frame(&mut self) -> Option<ReceivedFrame> {
        loop {
            if self.received.len() >= 9 {
                let head = self.received[..9].to_vec();
                let length = usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2]);
                if self.received.len() >= 9 + length {
                    let content = self.received[9..9 + length].to_vec();
                    self.received.drain(..9 + length);
                    let stream = u32::from_be_bytes(head[5..9].try_into().unwrap());
                    return Some(ReceivedFrame { kind: head[3], flags: head[4], stream, content });
                }
            }
            let read = soon("a frame", self.socket.read_buf(&mut self.received)).await;
            if !read.is_ok_and(|n| n > 0) {
                return None;
            }
        }
    }

    /// The next frame of one of these types; others are skipped. `None`: the connection has ended.
    pub async fn frame_of(&mut self, kinds: &[u8]) -> Option<ReceivedFrame> {
        loop {
            let frame = self.frame().await?;
            if kinds.contains(&frame.kind) {
                return Some(frame);
            }
        }
    }

    /// Waits until the gateway has closed the connection. Returns the error codes of its `GOAWAY` frames.
    pub async fn end(&mut self) -> Vec<u32> {
        let mut codes = Vec::new();
        while let Some(frame) = self.frame_of(&[GOAWAY]).await {
            codes.push(u32::from_be_bytes(frame.content[4..8].try_into().unwrap()));
        }
        codes
    }
}

pub fn frame(kind: u8, flags: u8, stream: u32, content: &[u8]) -> Vec<u8> {
    let length = u32::try_from(content.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), content].concat()
}

/// A header block without compression.
pub fn header_block(fields: &[(&str, &str)]) -> Vec<u8> {
    let text = |text: &str| {
        // A length of 7 bits, and further bytes for longer texts.
        let mut bytes = Vec::new();
        if text.len() < 127 {
            bytes.push(u8::try_from(text.len()).unwrap());
        } else {
            bytes.push(127);
            let mut rest = text.len() - 127;
            while rest >= 128 {
                bytes.push(u8::try_from(rest % 128).unwrap() | 128);
                rest /= 128;
            }
            bytes.push(u8::try_from(rest).unwrap());
        }
        bytes.extend_from_slice(text.as_bytes());
        bytes
    };
    fields.iter().flat_map(|(name, value)| [vec![0], text(name), text(value)].concat()).collect()
}

/// The fields of a POST request to the chat endpoint.
pub fn chat_fields() -> Vec<(&'static str, &'static str)> {
    vec![(":method", "POST"), (":scheme", "http"), (":authority", "gateway"), (":path", super::CHAT)]
}
