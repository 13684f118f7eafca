//! An HTTP/1.1 client whose answers are read by whoever polls them.
//!
//! Libraries run each connection in a task of its own and hand the body over piece by piece: two
//! wake-ups and one write for every streamed event (measured: see "What it costs" in the README).
//! Here the task that serves the caller polls the socket itself, and all chunks that lie in the
//! buffer leave as one piece. Heads and chunk sizes are parsed by `httparse`.

use super::{Request, Socket};
use bytes::{Buf, Bytes, BytesMut};
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Method, StatusCode, response};
use smallvec::SmallVec;
use std::collections::VecDeque;
use std::future::poll_fn;
use std::io::{self, ErrorKind, IoSlice};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;
use tokio::io::AsyncWrite as _;
use tokio::runtime::Handle;
use tokio::time::sleep_until;
use tokio_util::io::poll_read_buf;

use crate::clock::Stopwatch;

const READ: usize = 16 * 1024;
const LONGEST_HEAD: usize = 64 * 1024;
const MOST_HEADERS: usize = 128;
/// So many headers are added to an answer on its way to the caller: room for them from the start.
const ROOM_FOR_MORE: usize = 15;
/// More interim answers (103 and the like) than this before the real one are a fault.
const MOST_INTERIM: usize = 16;
/// A chunk's size with its extensions, and all trailers, are no longer than this.
const LONGEST_CHUNK_HEAD: usize = 8 * 1024;
/// A large body is written in pieces of this size.
const WRITE_AT_ONCE: usize = 128 * 1024;
const MOST_IDLE: usize = 256;
/// Shorter than the keep-alive times usual with servers (60 - 75 s).
const IDLE_FOR: Duration = Duration::from_secs(50);

/// Connections that wait for their next request.
#[derive(Clone)]
pub(super) struct Pool {
    idle: Arc<Mutex<Idle>>,
    /// So long they are kept.
    idle_for: Duration,
}

#[derive(Default)]
struct Idle {
    /// The most recently used last.
    connections: VecDeque<(Connection, Stopwatch)>,
    /// A task closes those that have waited too long.
    is_pruned: bool,
}

/// One connection, between requests.
pub(super) struct Connection {
    socket: Box<dyn Socket>,
    buffer: BytesMut,
}

/// An answer's body, read from the socket as it is polled.
pub(super) struct Incoming {
    /// Taken at the end of the body.
    connection: Option<Connection>,
    framing: Framing,
    keeps_alive: bool,
    pool: Pool,
}

#[derive(Debug, PartialEq)]
enum Framing {
    /// Bytes still to come.
    Length(u64),
    Chunked(Chunk),
    /// Until the upstream closes.
    Close,
}

/// Where in a chunked body the next byte stands.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Chunk {
    Size,
    Data(u64),
    /// The line end after the data, of which so many bytes are to come.
    DataEnd(u8),
    Trailers,
}

/// An answer's head: with how its body is framed, and whether the connection can be used again after it.
struct Head {
    parts: response::Parts,
    framing: Framing,
    keeps_alive: bool,
}

/// A request on its way out.
struct Outgoing<'r> {
    head: Vec<u8>,
    body: &'r [u8],
    /// Bytes of both.
    written: usize,
    /// Why no more can be written.
    failed: Option<io::Error>,
    /// It came before all was written.
    answer: Option<Head>,
    /// Interim answers that have come.
    interim: usize,
}

impl<'r> Outgoing<'r> {
    fn new(authority: &str, request: &'r Request) -> Self {
        let head = head_of(authority, request);
        Self { head, body: &request.body, written: 0, failed: None, answer: None, interim: 0 }
    }

    fn is_written(&self) -> bool {
        self.written >= self.head.len() + self.body.len()
    }

    fn slices(&self) -> [IoSlice<'_>; 2] {
        let head = self.head.get(self.written..).unwrap_or_default();
        let body = self.body.get(self.written.saturating_sub(self.head.len())..).unwrap_or_default();
        [IoSlice::new(head), IoSlice::new(&body[..body.len().min(WRITE_AT_ONCE)])]
    }

    fn fail(&mut self, error: io::Error) {
        self.failed = Some(if self.written == 0 { io::Error::other(NeverRead(error)) } else { error });
    }
}

impl Default for Pool {
    fn default() -> Self {
        Self { idle: Arc::default(), idle_for: IDLE_FOR }
    }
}

impl Pool {
    /// A kept connection that is still open and silent.
    pub(super) fn take(&self) -> Option<Connection> {
        loop {
            let (mut connection, since) = self.lock().connections.pop_back()?;
            if since.elapsed() < self.idle_for && connection.is_quiet() {
                return Some(connection);
            }
        }
    }

    fn keep(&self, connection: Connection) {
        let mut idle = self.lock();
        if idle.connections.len() >= MOST_IDLE {
            idle.connections.pop_front();
        }
        idle.connections.push_back((connection, Stopwatch::start()));
        if !idle.is_pruned
            && let Ok(runtime) = Handle::try_current()
        {
            idle.is_pruned = true;
            runtime.spawn(self.clone().prune());
        }
    }

    /// Closes connections when they have waited too long; ends with the last of them. One task and one
    /// timer for all.
    async fn prune(self) {
        while let Some(due) = self.next_due() {
            sleep_until(due).await;
        }
    }

    /// Drops what has waited too long, and tells when the next one will have.
    fn next_due(&self) -> Option<tokio::time::Instant> {
        let mut idle = self.lock();
        while idle.connections.front().is_some_and(|(_, since)| since.elapsed() >= self.idle_for) {
            idle.connections.pop_front();
        }
        let due = idle.connections.front().map(|(_, since)| since.deadline(self.idle_for));
        idle.is_pruned = due.is_some();
        due
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Idle> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Marks an error that came before the upstream can have read anything of the request.
#[derive(Debug)]
struct NeverRead(io::Error);

impl std::fmt::Display for NeverRead {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "closed before the request was written: {}", self.0)
    }
}

impl std::error::Error for NeverRead {}

/// An error of a connection that had ended before the request was written.
pub(super) fn never_read(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::other(NeverRead(io::Error::other(error)))
}

/// Whether the request can be sent again without being served twice.
pub(super) fn was_never_read(error: &io::Error) -> bool {
    matches!(error.get_ref(), Some(inner) if inner.is::<NeverRead>())
}

impl Connection {
    pub(super) fn new(socket: Box<dyn Socket>) -> Self {
        Self { socket, buffer: BytesMut::with_capacity(READ) }
    }

    /// Nothing has come and it is not closed: anything else disqualifies a kept connection.
    fn is_quiet(&mut self) -> bool {
        let mut cx = Context::from_waker(Waker::noop());
        self.poll_fill(&mut cx).is_pending()
    }

    /// Sends a request and reads the answer's head.
    pub(super) async fn exchange(
        mut self,
        authority: &str,
        request: &Request,
        pool: &Pool,
    ) -> io::Result<(response::Parts, Incoming)> {
        let mut outgoing = Outgoing::new(authority, request);
        let Head { parts, framing, keeps_alive } =
            poll_fn(|cx| self.poll_exchange(cx, &mut outgoing, &request.method)).await?;
        let keeps_alive = keeps_alive && outgoing.is_written() && outgoing.failed.is_none();
        let mut body = Incoming { connection: Some(self), framing, keeps_alive, pool: pool.clone() };
        if body.framing == Framing::Length(0) {
            body.finish();
        }
        Ok((parts, body))
    }

    /// Writes and reads at once: an upstream may answer before it has read everything, and read no more.
    /// Its word counts, and such a connection is not used again.
    fn poll_exchange(
        &mut self,
        cx: &mut Context<'_>,
        outgoing: &mut Outgoing<'_>,
        method: &Method,
    ) -> Poll<io::Result<Head>> {
        let writing = self.poll_write(cx, outgoing);
        if outgoing.answer.is_none() {
            match ready!(self.poll_head(cx, method, &mut outgoing.interim)) {
                Ok(head) => outgoing.answer = Some(head),
                Err(not_read) => return Poll::Ready(Err(outgoing.failed.take().unwrap_or(not_read))),
            }
        }
        // A refusal is the last word. Any other answer may depend on the rest of the request.
        let is_refusal = |head: &mut Head| head.parts.status.as_u16() >= 400;
        match outgoing.answer.take_if(|head| writing.is_ready() || is_refusal(head)) {
            Some(head) => Poll::Ready(Ok(head)),
            None => Poll::Pending,
        }
    }

    /// Writes head and body, in one system call where the socket takes it. Ready when all is written, or
    /// nothing more can be; that is noted.
    fn poll_write(&mut self, cx: &mut Context<'_>, outgoing: &mut Outgoing<'_>) -> Poll<()> {
        let mut at_once = 0;
        while outgoing.failed.is_none() && !outgoing.is_written() {
            let slices = outgoing.slices();
            match ready!(Pin::new(&mut self.socket).poll_write_vectored(cx, &slices)) {
                Ok(0) => outgoing.fail(ErrorKind::WriteZero.into()),
                Ok(written) => {
                    outgoing.written += written;
                    at_once += written;
                }
                Err(error) => outgoing.fail(error),
            }
            if at_once >= WRITE_AT_ONCE && !outgoing.is_written() {
                // Copying megabytes into a socket would hold up everybody else on this thread.
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
        }
        if outgoing.failed.is_none()
            && let Err(error) = ready!(Pin::new(&mut self.socket).poll_flush(cx))
        {
            outgoing.fail(error);
        }
        Poll::Ready(())
    }

    fn poll_head(
        &mut self,
        cx: &mut Context<'_>,
        method: &Method,
        interim: &mut usize,
    ) -> Poll<io::Result<Head>> {
        loop {
            if let Some(head) = parse_head(&mut self.buffer, method)? {
                if !head.parts.status.is_informational() {
                    return Poll::Ready(Ok(head));
                }
                *interim += 1;
                if *interim > MOST_INTERIM || head.parts.status == StatusCode::SWITCHING_PROTOCOLS {
                    return Poll::Ready(Err(bad("an interim answer that was not asked for")));
                }
                continue;
            }
            if self.buffer.len() > LONGEST_HEAD {
                return Poll::Ready(Err(bad("the answer's head is too long")));
            }
            ready!(self.poll_fill(cx))?;
        }
    }

    /// Reads more bytes; the end of the stream is an error.
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.buffer.capacity() - self.buffer.len() < READ / 4 {
            self.buffer.reserve(READ);
        }
        match ready!(poll_read_buf(Pin::new(&mut self.socket), cx, &mut self.buffer))? {
            0 => Poll::Ready(Err(ErrorKind::UnexpectedEof.into())),
            _ => Poll::Ready(Ok(())),
        }
    }
}

fn bad(what: &'static str) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, what)
}

fn head_of(authority: &str, request: &Request) -> Vec<u8> {
    let mut head = Vec::with_capacity(1_024);
    let mut put = |parts: [&[u8]; 4]| parts.iter().for_each(|part| head.extend_from_slice(part));
    put([request.method.as_str().as_bytes(), b" ", request.target.as_bytes(), b" HTTP/1.1\r\n"]);
    put([b"host: ", authority.as_bytes(), b"\r\n", b""]);
    for (name, value) in &request.headers {
        put([name.as_str().as_bytes(), b": ", value.as_bytes(), b"\r\n"]);
    }
    if request.method != Method::GET || !request.body.is_empty() {
        put([b"content-length: ", request.body.len().to_string().as_bytes(), b"\r\n", b""]);
    }
    head.extend_from_slice(b"\r\n");
    head
}

/// Takes a head out of the buffer if it is whole.
fn parse_head(buffer: &mut BytesMut, method: &Method) -> io::Result<Option<Head>> {
    if buffer.is_empty() {
        return Ok(None);
    }
    let mut fields = [httparse::EMPTY_HEADER; MOST_HEADERS];
    let mut head = httparse::Response::new(&mut fields);
    let httparse::Status::Complete(length) =
        head.parse(buffer).map_err(|e| io::Error::new(ErrorKind::InvalidData, e))?
    else {
        return Ok(None);
    };
    let status = StatusCode::from_u16(head.code.unwrap_or(0)).map_err(|_| bad("no status"))?;
    let is_http11 = head.version == Some(1);
    // Places first: the values then share the head's bytes instead of copying them.
    let base = buffer.as_ptr() as usize;
    let spans: SmallVec<[(HeaderName, usize, usize); 16]> = head
        .headers
        .iter()
        .map(|h| {
            let name = HeaderName::from_bytes(h.name.as_bytes()).map_err(|_| bad("a header's name"))?;
            Ok((name, h.value.as_ptr() as usize - base, h.value.len()))
        })
        .collect::<io::Result<_>>()?;
    let bytes = buffer.split_to(length).freeze();
    let mut headers = HeaderMap::with_capacity(spans.len() + ROOM_FOR_MORE);
    for (name, at, length) in spans {
        let value = HeaderValue::from_maybe_shared(bytes.slice(at..at + length))
            .map_err(|_| bad("a header's value"))?;
        headers.append(name, value);
    }
    let framing = framing(&headers, status, method)?;
    let keeps_alive = is_http11 && framing != Framing::Close && !says_close(&headers);
    let (mut parts, ()) = http::Response::new(()).into_parts();
    parts.status = status;
    parts.headers = headers;
    Ok(Some(Head { parts, framing, keeps_alive }))
}

fn says_close(headers: &HeaderMap) -> bool {
    let tokens = headers.get_all(header::CONNECTION).iter().flat_map(|v| v.as_bytes().split(|&b| b == b','));
    tokens.into_iter().any(|token| token.trim_ascii().eq_ignore_ascii_case(b"close"))
}

/// By RFC 9112, section 6.3. Two lengths, or a length beside chunks, are no answer but an attack.
fn framing(headers: &HeaderMap, status: StatusCode, method: &Method) -> io::Result<Framing> {
    let mut codings = headers.get_all(header::TRANSFER_ENCODING).iter();
    let mut lengths = headers.get_all(header::CONTENT_LENGTH).iter();
    let (coding, length) = (codings.next(), lengths.next());
    if codings.next().is_some()
        || lengths.any(|l| Some(l) != length)
        || (coding.is_some() && length.is_some())
    {
        return Err(bad("the answer's length is ambiguous"));
    }
    if method == Method::HEAD
        || status.is_informational()
        || status == StatusCode::NO_CONTENT
        || status == StatusCode::NOT_MODIFIED
    {
        return Ok(Framing::Length(0));
    }
    if let Some(coding) = coding {
        return if coding.as_bytes().trim_ascii().eq_ignore_ascii_case(b"chunked") {
            Ok(Framing::Chunked(Chunk::Size))
        } else {
            Err(bad("a transfer coding that was not asked for"))
        };
    }
    let Some(length) = length else { return Ok(Framing::Close) };
    let digits = length.to_str().ok().filter(|l| !l.is_empty() && l.bytes().all(|b| b.is_ascii_digit()));
    let length =
        digits.and_then(|l| l.parse().ok()).ok_or_else(|| bad("the answer's length is no number"))?;
    Ok(Framing::Length(length))
}

impl Incoming {
    pub(super) fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Option<io::Result<Bytes>>> {
        loop {
            let Some(connection) = &mut self.connection else { return Poll::Ready(None) };
            let buffer = &mut connection.buffer;
            let (data, ended) = match &mut self.framing {
                Framing::Length(left) => {
                    let n = usize::try_from(*left).unwrap_or(usize::MAX).min(buffer.len());
                    *left -= n as u64;
                    (buffer.split_to(n).freeze(), *left == 0)
                }
                Framing::Chunked(chunk) => match take_chunks(buffer, chunk) {
                    Ok(taken) => taken,
                    Err(e) => return self.broken(e),
                },
                Framing::Close => (buffer.split().freeze(), false),
            };
            if ended {
                self.finish();
            }
            if !data.is_empty() {
                return Poll::Ready(Some(Ok(data)));
            }
            let Some(connection) = &mut self.connection else { continue };
            match ready!(connection.poll_fill(cx)) {
                Ok(()) => {}
                Err(e) if e.kind() == ErrorKind::UnexpectedEof && self.framing == Framing::Close => {
                    self.connection = None;
                }
                Err(e) => return self.broken(e),
            }
        }
    }

    pub(super) fn is_end(&self) -> bool {
        self.connection.is_none()
    }

    fn broken(&mut self, error: io::Error) -> Poll<Option<io::Result<Bytes>>> {
        self.connection = None;
        Poll::Ready(Some(Err(error)))
    }

    /// The body is complete: the connection can serve the next request. Bytes beyond its end would be
    /// taken for the next answer, so such a connection is not used again.
    fn finish(&mut self) {
        if let Some(connection) = self.connection.take()
            && self.keeps_alive
            && connection.buffer.is_empty()
        {
            self.pool.keep(connection);
        }
    }
}

/// Takes the data of all chunks that lie in the buffer; tells whether the body has ended. One chunk's
/// data is split off without a copy, several are put together.
fn take_chunks(buffer: &mut BytesMut, at: &mut Chunk) -> io::Result<(Bytes, bool)> {
    let mut taken = Taken::default();
    loop {
        match *at {
            Chunk::Size => match httparse::parse_chunk_size(buffer).map_err(|_| bad("a chunk's size"))? {
                httparse::Status::Partial if buffer.len() > LONGEST_CHUNK_HEAD => {
                    return Err(bad("a chunk's size is too long"));
                }
                httparse::Status::Partial => break,
                httparse::Status::Complete((line, size)) => {
                    buffer.advance(line);
                    *at = if size == 0 { Chunk::Trailers } else { Chunk::Data(size) };
                }
            },
            Chunk::Data(left) => {
                let n = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
                if n == 0 {
                    break;
                }
                taken.push(buffer.split_to(n), buffer.len());
                let left = left - n as u64;
                *at = if left == 0 { Chunk::DataEnd(2) } else { Chunk::Data(left) };
            }
            Chunk::DataEnd(0) => *at = Chunk::Size,
            Chunk::DataEnd(left) => match buffer.first() {
                None => break,
                Some(b'\r') if left == 2 => {
                    buffer.advance(1);
                    *at = Chunk::DataEnd(1);
                }
                Some(b'\n') if left == 1 => {
                    buffer.advance(1);
                    *at = Chunk::DataEnd(0);
                }
                Some(_) => return Err(bad("no line end after a chunk")),
            },
            Chunk::Trailers => match memchr::memchr(b'\n', buffer) {
                None if buffer.len() > LONGEST_CHUNK_HEAD => return Err(bad("trailers are too long")),
                None => break,
                Some(end) => {
                    let line = buffer.split_to(end + 1);
                    if line.trim_ascii().is_empty() {
                        return Ok((taken.finish(), true));
                    }
                }
            },
        }
    }
    Ok((taken.finish(), false))
}

/// Pieces of a body that leave as one.
#[derive(Default)]
struct Taken {
    first: Option<BytesMut>,
    joined: BytesMut,
}

impl Taken {
    fn push(&mut self, piece: BytesMut, to_come: usize) {
        if self.joined.is_empty() {
            match self.first.take() {
                None => {
                    self.first = Some(piece);
                    return;
                }
                Some(first) => {
                    self.joined.reserve(first.len() + piece.len() + to_come);
                    self.joined.extend_from_slice(&first);
                }
            }
        }
        self.joined.extend_from_slice(&piece);
    }

    fn finish(self) -> Bytes {
        self.first.unwrap_or(self.joined).freeze()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tokio::io::AsyncReadExt as _;

    fn parse(head: &str) -> io::Result<Option<(response::Parts, Framing, bool)>> {
        let head = parse_head(&mut BytesMut::from(head), &Method::POST)?;
        Ok(head.map(|Head { parts, framing, keeps_alive }| (parts, framing, keeps_alive)))
    }

    #[test]
    fn a_head_says_how_its_body_is_framed() {
        for (fields, framing, keeps_alive) in [
            ("content-length: 12\r\n", Framing::Length(12), true),
            ("Transfer-Encoding: Chunked\r\n", Framing::Chunked(Chunk::Size), true),
            ("connection: keep-alive, Close\r\ncontent-length: 1\r\n", Framing::Length(1), false),
            ("content-length: 7\r\ncontent-length: 7\r\n", Framing::Length(7), true),
            ("", Framing::Close, false),
        ] {
            let (_, f, k) = parse(&format!("HTTP/1.1 200 OK\r\n{fields}\r\n")).unwrap().unwrap();
            assert_eq!((f, k), (framing, keeps_alive), "{fields}");
        }
        assert_eq!(parse("HTTP/1.1 204 No Content\r\n\r\n").unwrap().unwrap().1, Framing::Length(0));
        assert!(!parse("HTTP/1.0 200 OK\r\ncontent-length: 1\r\n\r\n").unwrap().unwrap().2);
        assert!(parse("HTTP/1.1 200 OK\r\ncontent-le").unwrap().is_none());
    }

    #[test]
    fn an_ambiguous_length_is_refused() {
        for fields in [
            "content-length: 1\r\ncontent-length: 2\r\n",
            "content-length: 1\r\ntransfer-encoding: chunked\r\n",
            "transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n",
            "transfer-encoding: gzip, chunked\r\n",
            "content-length: +1\r\n",
            "content-length: -1\r\n",
            "content-length: 1, 1\r\n",
            "content-length: 99999999999999999999\r\n",
        ] {
            assert!(parse(&format!("HTTP/1.1 200 OK\r\n{fields}\r\n")).is_err(), "{fields}");
        }
    }

    #[tokio::test]
    async fn a_connection_that_nobody_needs_is_closed() {
        let pool = Pool { idle_for: Duration::from_millis(100), ..Pool::default() };
        let mut peers = Vec::new();
        for _ in 0..=MOST_IDLE {
            let (ours, theirs) = tokio::io::duplex(64);
            pool.keep(Connection::new(Box::new(ours)));
            peers.push(theirs);
        }
        // One too many: the oldest makes room at once, the others when they have waited long enough.
        assert_eq!(peers[0].read(&mut [0]).await.unwrap(), 0);
        assert!(pool.take().is_some());
        for peer in &mut peers[1..MOST_IDLE] {
            assert_eq!(peer.read(&mut [0]).await.unwrap(), 0);
        }
        assert!(pool.take().is_none() && !pool.lock().is_pruned);
    }

    fn dechunk(wire: &[u8], cuts: &[usize]) -> io::Result<(Vec<u8>, bool, usize)> {
        let (mut buffer, mut at, mut out, mut ended) = (BytesMut::new(), Chunk::Size, Vec::new(), false);
        let mut from = 0;
        for cut in cuts.iter().copied().chain([wire.len()]) {
            let cut = cut.clamp(from, wire.len());
            buffer.extend_from_slice(&wire[from..cut]);
            from = cut;
            if !ended {
                let (data, end) = take_chunks(&mut buffer, &mut at)?;
                out.extend_from_slice(&data);
                ended = end;
            }
        }
        Ok((out, ended, buffer.len()))
    }

    #[test]
    fn chunks_are_put_together_however_they_arrive() {
        let wire = b"5\r\nhello\r\n1;x=y\r\n \r\n6\r\nworld!\r\n0\r\nx-trailer: 1\r\n\r\nnext";
        for step in 1..=wire.len() {
            let cuts: Vec<usize> = (0..wire.len()).step_by(step).collect();
            assert_eq!(dechunk(wire, &cuts).unwrap(), (b"hello world!".to_vec(), true, 4), "{step}");
        }
    }

    #[test]
    fn broken_chunks_are_an_error() {
        for wire in ["5\r\nhelloX\r\n", "zz\r\n", "-1\r\n", "5\r\nhello\rX", "ffffffffffffffffff\r\n"] {
            assert!(dechunk(wire.as_bytes(), &[]).is_err(), "{wire}");
        }
        assert!(dechunk(&[b'1'; 20], &[]).is_err());
        assert!(dechunk(format!("1;{}", "x".repeat(9_000)).as_bytes(), &[]).is_err());
    }

    proptest! {
        #[test]
        fn no_answer_makes_it_panic(wire in prop::collection::vec(any::<u8>(), 0..200), cuts in prop::collection::vec(0usize..200, 0..8)) {
            let mut cuts = cuts;
            cuts.sort_unstable();
            let _ = dechunk(&wire, &cuts);
            let _ = parse_head(&mut BytesMut::from(&wire[..]), &Method::POST);
        }

        #[test]
        fn data_survives_any_chunking(data in prop::collection::vec(any::<u8>(), 0..300), sizes in prop::collection::vec(1usize..40, 0..30), cuts in prop::collection::vec(0usize..900, 0..12)) {
            let mut wire = Vec::new();
            let mut rest = &data[..];
            for size in sizes.into_iter().chain([usize::MAX]) {
                let (chunk, after) = rest.split_at(size.min(rest.len()));
                if !chunk.is_empty() {
                    wire.extend_from_slice(format!("{:x}\r\n", chunk.len()).as_bytes());
                    wire.extend_from_slice(chunk);
                    wire.extend_from_slice(b"\r\n");
                }
                rest = after;
            }
            wire.extend_from_slice(b"0\r\n\r\n");
            let mut cuts = cuts;
            cuts.sort_unstable();
            prop_assert_eq!(dechunk(&wire, &cuts).unwrap(), (data, true, 0));
        }
    }
}
