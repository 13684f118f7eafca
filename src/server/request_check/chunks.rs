//! The framing of `transfer-encoding: chunked`.

/// Maximum bytes of a chunk's extensions, and of all trailers.
const MAX_LINE_BYTES: usize = 16 * 1024;

/// The position in a chunked body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ChunkCheck {
    /// In a chunk's size, with its value so far and its number of digits.
    Size(u64, u8),
    /// In a chunk's extensions, with the size, and the number of bytes so far.
    Extension(u64, usize),
    /// At the line feed after a size.
    SizeEnd(u64),
    /// In a chunk's data, with this many bytes to come.
    Data(u64),
    /// At the carriage return after a chunk's data.
    DataReturn,
    /// At the line feed after a chunk's data.
    DataEnd,
    /// In a trailer line, with the number of its bytes, and of the bytes of all trailers.
    Trailer(usize, usize),
    /// At the line feed after a trailer line. `true`: the line is empty, so the body ends.
    TrailerEnd(bool, usize),
}

impl Default for ChunkCheck {
    fn default() -> Self {
        Self::Size(0, 0)
    }
}

impl ChunkCheck {
    /// Checks the next bytes. Returns how many of them belong to the body, and whether it has ended.
    pub(super) fn advance(&mut self, bytes: &[u8]) -> Result<(usize, bool), ()> {
        let mut at = 0;
        while at < bytes.len() {
            if let Self::Data(left) = self {
                let taken = usize::try_from(*left).unwrap_or(usize::MAX).min(bytes.len() - at);
                *left -= taken as u64;
                if *left == 0 {
                    *self = Self::DataReturn;
                }
                at += taken;
                continue;
            }
            let has_ended = matches!(self, Self::TrailerEnd(true, _));
            *self = self.after(bytes[at]).ok_or(())?;
            at += 1;
            if has_ended {
                return Ok((at, true));
            }
        }
        Ok((at, false))
    }

    /// The position after this byte. `None`: it is not allowed here.
    fn after(self, byte: u8) -> Option<Self> {
        match (self, byte) {
            (Self::Size(size, digits), b'0'..=b'9' | b'a'..=b'f' | b'A'..=b'F') => {
                let digit = char::from(byte).to_digit(16)?;
                Some(Self::Size(size.checked_mul(16)?.checked_add(u64::from(digit))?, digits.checked_add(1)?))
            }
            // A size has a digit. A line that begins with white space would continue the one before it.
            (Self::Size(_, 0), _) | (Self::Trailer(0, _), b' ' | b'\t') => None,
            (Self::Size(size, _) | Self::Extension(size, _), b'\r') => Some(Self::SizeEnd(size)),
            (Self::Size(size, _), b';') => Some(Self::Extension(size, 0)),
            (Self::Extension(size, length), _) if is_text(byte) && length < MAX_LINE_BYTES => {
                Some(Self::Extension(size, length + 1))
            }
            (Self::SizeEnd(0), b'\n') => Some(Self::Trailer(0, 0)),
            (Self::SizeEnd(size), b'\n') => Some(Self::Data(size)),
            (Self::DataReturn, b'\r') => Some(Self::DataEnd),
            (Self::DataEnd, b'\n') => Some(Self::Size(0, 0)),
            (Self::Trailer(line, all), b'\r') => Some(Self::TrailerEnd(line == 0, all)),
            (Self::Trailer(line, all), _) if is_text(byte) && all < MAX_LINE_BYTES => {
                Some(Self::Trailer(line + 1, all + 1))
            }
            (Self::TrailerEnd(_, all), b'\n') => Some(Self::Trailer(0, all)),
            _ => None,
        }
    }
}

fn is_text(byte: u8) -> bool {
    byte == b'\t' || byte >= b' ' && byte != 0x7f
}
