//! Header lines of an answer that go past hyper.
//!
//! The gateway adds some fifteen headers to an answer. In a header map, each is hashed, stored, encoded and dropped, which
//! took a tenth of the instructions of a small chat. Instead, the lines are made as text, and the answer's map has one
//! header as their mark. When hyper writes the head, the caller's socket replaces the mark by the lines.

use super::transport::Transport;
use http::header::{HeaderMap, HeaderName, HeaderValue};
use memchr::memmem::Finder;
use smallvec::SmallVec;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};

/// The name of the mark. It begins like the gateway's own headers, which no upstream can send.
const MARK_NAME: HeaderName = HeaderName::from_static("x-tollgate-lines");
/// The mark as hyper writes it, without its number, and with the end of the line before it: a value of another header cannot
/// contain that.
const MARK: &[u8] = b"\r\nx-tollgate-lines: ";
static MARK_FINDER: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new(MARK));

/// The mark's value is one of these characters. Consecutive answers have different ones.
const NUMBERS: &str = "0123456789abcdefghijklmnopqrstuvwxyz";

/// The lines of the answers of one connection whose heads are not written yet. There is one answer, unless a caller sends
/// requests without waiting for their answers.
#[derive(Debug, Default)]
pub(super) struct HeadLines(Mutex<Unwritten>);

#[derive(Debug, Default)]
struct Unwritten {
    /// In the order of the answers.
    lines: SmallVec<[AnswerLines; 1]>,
    /// Bytes of the first ones that are written.
    written: usize,
    /// The index of the next answer's number.
    next_number: usize,
}

#[derive(Debug)]
struct AnswerLines {
    number: &'static str,
    text: Vec<u8>,
}

impl HeadLines {
    /// Adds lines, each behind the end of the line before it, to the head of the next answer, whose headers these are.
    pub(super) fn add(&self, lines: Vec<u8>, headers: &mut HeaderMap) {
        if lines.is_empty() {
            return;
        }
        let mut unwritten = self.lock();
        let index = unwritten.next_number % NUMBERS.len();
        unwritten.next_number = index + 1;
        let number = &NUMBERS[index..=index];
        headers.insert(MARK_NAME, HeaderValue::from_static(number));
        unwritten.lines.push(AnswerLines { number, text: lines });
    }

    /// Writes bytes of hyper, with the lines in place of their mark. Returns how many of hyper's bytes are written. hyper
    /// writes heads in the first slice, and never parts of bodies, so a body cannot contain a mark that is replaced.
    pub(super) fn poll_write<T: Transport>(
        &self,
        mut stream: Pin<&mut T>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let mut unwritten = self.lock();
        let Unwritten { lines, written, .. } = &mut *unwritten;
        let (false, Some((first, rest))) = (lines.is_empty(), slices.split_first()) else {
            return stream.poll_write_vectored(cx, slices);
        };
        let Some(at) = MARK_FINDER.find(first) else { return stream.poll_write_vectored(cx, slices) };
        let (before, mark) = first.split_at(at);
        let Some((number, mut after)) = mark[MARK.len()..].split_at_checked(1) else {
            return stream.poll_write_vectored(cx, slices);
        };
        // An answer that was dropped has left its lines.
        if let Some(stale @ 1..) = lines.iter().position(|lines| lines.number.as_bytes() == number) {
            lines.drain(..stale);
            *written = 0;
        }
        let (text, mark_length, mut rest) = (&lines[0].text, MARK.len() + number.len(), rest);
        if lines.len() > 1 {
            // The mark of the next answer is written by itself.
            (after, rest) = (&[], &[]);
        }
        let count = loop {
            let mut pieces: SmallVec<[IoSlice; 6]> =
                [before, &text[*written..], after].map(IoSlice::new).into_iter().collect();
            pieces.extend_from_slice(rest);
            let count = ready!(stream.as_mut().poll_write_vectored(cx, &pieces))?;
            if count <= before.len() {
                return Poll::Ready(Ok(count));
            }
            let of_lines = (count - before.len()).min(text.len() - *written);
            *written += of_lines;
            if *written == text.len() {
                break count - of_lines + mark_length;
            }
            if !before.is_empty() {
                return Poll::Ready(Ok(before.len()));
            }
        };
        lines.remove(0);
        *written = 0;
        Poll::Ready(Ok(count))
    }

    fn lock(&self) -> MutexGuard<'_, Unwritten> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::VecDeque;
    use std::task::Waker;
    use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
    use tokio::net::TcpStream;

    /// A stream that takes from each write the next number of bytes. 0: it is blocked once.
    struct Narrow {
        takes: VecDeque<usize>,
        written: Vec<u8>,
    }

    impl AsyncWrite for Narrow {
        fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
            self.poll_write_vectored(cx, &[IoSlice::new(bytes)])
        }

        fn poll_write_vectored(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            slices: &[IoSlice<'_>],
        ) -> Poll<io::Result<usize>> {
            let all: Vec<u8> = slices.iter().flat_map(|slice| slice.iter().copied()).collect();
            let count = self.takes.pop_front().unwrap_or(usize::MAX).min(all.len());
            self.written.extend_from_slice(&all[..count]);
            if count == 0 { Poll::Pending } else { Poll::Ready(Ok(count)) }
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    impl AsyncRead for Narrow {
        fn poll_read(self: Pin<&mut Self>, _: &mut Context<'_>, _: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
            Poll::Pending
        }
    }

    impl Transport for Narrow {
        const BUFFERS: bool = false;
        const SCHEME: &'static str = "http";

        fn tcp(&self) -> &TcpStream {
            unreachable!("it is not a TCP stream")
        }
    }

    /// Writes heads and a body as hyper does, until the stream has taken everything.
    fn write(head_lines: &HeadLines, heads: &[u8], body: &[u8], takes: Vec<usize>) -> Vec<u8> {
        let mut stream = Narrow { takes: takes.into(), written: Vec::new() };
        let (mut heads, mut body) = (heads, body);
        while !heads.is_empty() || !body.is_empty() {
            let slices = [IoSlice::new(heads), IoSlice::new(body)];
            let slices = if heads.is_empty() { &slices[1..] } else { &slices[..] };
            let mut cx = Context::from_waker(Waker::noop());
            if let Poll::Ready(count) = head_lines.poll_write(Pin::new(&mut stream), &mut cx, slices) {
                let of_heads = count.as_ref().unwrap().min(&heads.len()).to_owned();
                heads = &heads[of_heads..];
                body = &body[count.unwrap() - of_heads..];
            }
        }
        stream.written
    }

    proptest! {
        #[test]
        fn the_lines_replace_their_marks_however_the_socket_takes_the_bytes(
            takes in prop::collection::vec(0_usize..60, 0..60),
        ) {
            let head_lines = HeadLines::default();
            let add = |lines: &[u8]| {
                let mut headers = HeaderMap::new();
                head_lines.add(lines.to_vec(), &mut headers);
                let mark = |(name, value): (&HeaderName, &HeaderValue)| {
                    format!("{name}: {}\r\n", value.to_str().unwrap())
                };
                headers.iter().map(mark).collect::<String>()
            };
            // The first two answers are never written.
            let marks = ["\r\nx: 1", "\r\nx: 2", "\r\na: 1\r\nb: 2", "\r\nx: 3", "\r\nc: 3"].map(|lines| add(lines.as_bytes()));
            let [first, second] = [&marks[2], &marks[4]];
            let heads = format!(
                "HTTP/1.1 200 OK\r\ne: {first}{first}date: x\r\n\r\nHTTP/1.1 204 No Content\r\n\r\nHTTP/1.1 200 OK\r\n{second}\r\n"
            );
            let written = write(&head_lines, heads.as_bytes(), first.as_bytes(), takes);
            let expected = format!(
                "HTTP/1.1 200 OK\r\ne: {first}a: 1\r\nb: 2\r\ndate: x\r\n\r\nHTTP/1.1 204 No Content\r\n\r\nHTTP/1.1 200 OK\r\nc: 3\r\n\r\n{first}"
            );
            prop_assert_eq!(String::from_utf8(written).unwrap(), expected);
        }
    }
}
