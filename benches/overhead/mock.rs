//! The mock upstream. It uses as little CPU as possible and writes each event of a stream separately.

use crate::bodies::{STREAM_HEAD, answer, events};
use memchr::memmem;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

struct Answers {
    whole: String,
    events: Vec<String>,
}

pub(crate) fn run(address: SocketAddr) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let listener = TcpListener::bind(address).await.unwrap();
        let answers = Arc::new(Answers { whole: answer(), events: events() });
        loop {
            let (socket, _) = listener.accept().await.unwrap();
            let answers = answers.clone();
            tokio::spawn(async move { serve(socket, &answers).await });
        }
    });
}

/// Serves one connection until it ends.
async fn serve(mut socket: TcpStream, answers: &Answers) -> Option<()> {
    socket.set_nodelay(true).ok()?;
    let mut buffer = Vec::with_capacity(64 * 1024);
    loop {
        let body_start = loop {
            if let Some(at) = memmem::find(&buffer, b"\r\n\r\n") {
                break at + 4;
            }
            read(&mut socket, &mut buffer).await?;
        };
        let end = body_start + length(&buffer[..body_start]);
        while buffer.len() < end {
            read(&mut socket, &mut buffer).await?;
        }
        let body = &buffer[body_start..end];
        let is_stream = memmem::find(body, b"\"stream\":true").is_some();
        let is_paced = memmem::find(body, b"\"paced\"").is_some();
        buffer.drain(..end);
        if !is_stream {
            socket.write_all(answers.whole.as_bytes()).await.ok()?;
            continue;
        }
        socket.write_all(STREAM_HEAD.as_bytes()).await.ok()?;
        for event in &answers.events {
            if is_paced {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            socket.write_all(event.as_bytes()).await.ok()?;
        }
    }
}

/// Reads more bytes. `None`: the connection has ended.
async fn read(socket: &mut TcpStream, buffer: &mut Vec<u8>) -> Option<()> {
    (socket.read_buf(buffer).await.ok()? > 0).then_some(())
}

/// The `content-length` of a request.
fn length(head: &[u8]) -> usize {
    let mut fields = [httparse::EMPTY_HEADER; 64];
    let mut request = httparse::Request::new(&mut fields);
    request.parse(head).unwrap();
    let length = request.headers.iter().find(|h| h.name.eq_ignore_ascii_case("content-length"));
    length.map_or(0, |h| std::str::from_utf8(h.value).unwrap().parse().unwrap())
}
