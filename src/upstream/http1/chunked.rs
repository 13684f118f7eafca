//! The decoder of `transfer-encoding: chunked`.

use super::head::invalid;
use bytes::{Buf as _, Bytes, BytesMut};
use std::io;

/// The longest line with a chunk's size and extensions, in bytes.
const MAX_SIZE_LINE_BYTES: usize = 8 * 1024;
/// The longest trailer section, over all its lines, in bytes.
const MAX_TRAILER_BYTES: usize = 8 * 1024;

/// The decoder's position in a chunked body.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum ChunkedDecoder {
    /// At a line with a chunk's size.
    #[default]
    Size,
    /// In a chunk's data, with this many bytes to come.
    Data(u64),
    /// In the line end after a chunk's data, with this many bytes to come.
    DataEnd(u8),
    /// In the trailer section, of which this many bytes are already removed.
    Trailers(usize),
}

impl ChunkedDecoder {
    /// Removes the data of all chunks in the buffer, and returns it with whether the body has ended. One
    /// chunk's data is split off without a copy; several chunks are copied together.
    pub(super) fn take(&mut self, buffer: &mut BytesMut) -> io::Result<(Bytes, bool)> {
        let mut pieces = JoinedPieces::default();
        loop {
            match *self {
                Self::Size => match take_size(buffer)? {
                    None => break,
                    Some(0) => *self = Self::Trailers(0),
                    Some(size) => *self = Self::Data(size),
                },
                Self::Data(left) => {
                    let n = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
                    if n == 0 {
                        break;
                    }
                    pieces.push(buffer.split_to(n), buffer.len());
                    let left = left - n as u64;
                    *self = if left == 0 { Self::DataEnd(2) } else { Self::Data(left) };
                }
                Self::DataEnd(left) => {
                    let expected = if left == 2 { b'\r' } else { b'\n' };
                    match buffer.first() {
                        None => break,
                        Some(&byte) if byte == expected => buffer.advance(1),
                        Some(_) => return Err(invalid("there is no line end after a chunk")),
                    }
                    *self = if left == 2 { Self::DataEnd(1) } else { Self::Size };
                }
                Self::Trailers(read) => match take_trailer_line(buffer, read)? {
                    None => break,
                    Some((_, true)) => return Ok((pieces.finish(), true)),
                    Some((length, false)) => *self = Self::Trailers(read + length),
                },
            }
        }
        Ok((pieces.finish(), false))
    }
}

/// Removes a chunk's size line; `None` if it is not complete.
fn take_size(buffer: &mut BytesMut) -> io::Result<Option<u64>> {
    let parsed = httparse::parse_chunk_size(buffer).map_err(|_| invalid("a chunk's size is not valid"))?;
    let (line, size) = match parsed {
        httparse::Status::Partial => (buffer.len(), None),
        httparse::Status::Complete((line, size)) => (line, Some(size)),
    };
    if line > MAX_SIZE_LINE_BYTES {
        return Err(invalid("the line with a chunk's size is too long"));
    }
    if size.is_some() {
        buffer.advance(line);
    }
    Ok(size)
}

/// Removes a line of the trailer section. `read`: the number of bytes of the section before this line. `None`: the
/// line is not complete. Returns its length and whether it is the empty line that ends the section.
fn take_trailer_line(buffer: &mut BytesMut, read: usize) -> io::Result<Option<(usize, bool)>> {
    let end = memchr::memchr(b'\n', buffer);
    if read + end.unwrap_or(buffer.len()) > MAX_TRAILER_BYTES {
        return Err(invalid("the trailers are too long"));
    }
    let Some(end) = end else { return Ok(None) };
    let line = buffer.split_to(end + 1);
    Ok(Some((line.len(), line.trim_ascii().is_empty())))
}

/// Pieces of a body that are passed on as one.
#[derive(Default)]
struct JoinedPieces {
    first: Option<BytesMut>,
    joined: BytesMut,
}

impl JoinedPieces {
    /// `to_come` is the number of bytes that follow in the buffer.
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

    /// Decodes `wire`, cut at these positions. Returns the data, whether the body ended, and the number of
    /// bytes left in the buffer.
    fn decode(wire: &[u8], cuts: &[usize]) -> io::Result<(Vec<u8>, bool, usize)> {
        let (mut buffer, mut decoder) = (BytesMut::new(), ChunkedDecoder::default());
        let (mut out, mut has_ended, mut from) = (Vec::new(), false, 0);
        for cut in cuts.iter().copied().chain([wire.len()]) {
            let cut = cut.clamp(from, wire.len());
            buffer.extend_from_slice(&wire[from..cut]);
            from = cut;
            if !has_ended {
                let (data, end) = decoder.take(&mut buffer)?;
                out.extend_from_slice(&data);
                has_ended = end;
            }
        }
        Ok((out, has_ended, buffer.len()))
    }

    #[test]
    fn the_data_does_not_depend_on_where_the_bytes_are_cut() {
        let wire = b"5\r\nhello\r\n1;x=y\r\n \r\n6\r\nworld!\r\n0\r\nx-trailer: 1\r\n\r\nnext";
        for step in 1..=wire.len() {
            let cuts: Vec<usize> = (0..wire.len()).step_by(step).collect();
            assert_eq!(decode(wire, &cuts).unwrap(), (b"hello world!".to_vec(), true, 4), "{step}");
        }
    }

    #[test]
    fn invalid_chunks_are_an_error() {
        for wire in ["5\r\nhelloX\r\n", "zz\r\n", "-1\r\n", "5\r\nhello\rX", "ffffffffffffffffff\r\n"] {
            assert!(decode(wire.as_bytes(), &[]).is_err(), "{wire}");
        }
        assert!(decode(&[b'1'; 20], &[]).is_err());
        for end in ["", "\r\n \r\n0\r\n\r\n"] {
            assert!(decode(format!("1;{}{end}", "x".repeat(9_000)).as_bytes(), &[]).is_err());
        }
    }

    #[test]
    fn trailers_are_bounded_over_all_their_lines() {
        let lines = |count: usize| format!("0\r\n{}\r\n", "x: 1\r\n".repeat(count));
        assert!(decode(lines(1_000).as_bytes(), &[]).unwrap().1);
        for wire in [lines(2_000), format!("0\r\nx: {}", "1".repeat(9_000)), lines(1_000_000)] {
            let cuts: Vec<usize> = (0..wire.len()).step_by(4_096).collect();
            assert!(decode(wire.as_bytes(), &cuts).is_err());
        }
    }

    proptest! {
        #[test]
        fn no_body_makes_the_decoder_panic(
            wire in prop::collection::vec(any::<u8>(), 0..200),
            mut cuts in prop::collection::vec(0usize..200, 0..8),
        ) {
            cuts.sort_unstable();
            let _ = decode(&wire, &cuts);
        }

        #[test]
        fn data_does_not_depend_on_the_chunking(
            data in prop::collection::vec(any::<u8>(), 0..300),
            sizes in prop::collection::vec(1usize..40, 0..30),
            mut cuts in prop::collection::vec(0usize..900, 0..12),
        ) {
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
            cuts.sort_unstable();
            prop_assert_eq!(decode(&wire, &cuts).unwrap(), (data, true, 0));
        }
    }
}
