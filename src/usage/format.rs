//! Determines whether an answer is JSON or an event stream by its first bytes.

/// The format of an answer's body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BodyFormat {
    /// One JSON document.
    Json,
    /// Server-sent events.
    Sse,
}

/// What the bytes so far show.
#[derive(Debug, PartialEq, Eq)]
pub enum Detection {
    /// More bytes are needed. The first bytes of the piece, this many, are white space or a byte order mark.
    Pending(usize),
    /// The body begins after this many bytes of the piece. `None`: it is neither JSON nor an event stream.
    Found(usize, Option<BodyFormat>),
}

const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";
/// The beginnings of the lines of an event stream.
const LINE_STARTS: [&[u8]; 5] = [b":", b"data:", b"event:", b"id:", b"retry:"];

/// Examines the first bytes of a body. After a `Pending`, the next piece must begin with the bytes that were left.
#[derive(Debug)]
pub struct FormatDetector {
    /// Whether no byte was skipped, so that a byte order mark may follow.
    is_at_start: bool,
    is_at_line_start: bool,
}

impl Default for FormatDetector {
    fn default() -> Self {
        Self { is_at_start: true, is_at_line_start: true }
    }
}

impl FormatDetector {
    /// Reads the next piece.
    pub fn feed(&mut self, piece: &[u8]) -> Detection {
        let mut at = 0;
        if std::mem::take(&mut self.is_at_start) {
            if piece.len() < BYTE_ORDER_MARK.len() && BYTE_ORDER_MARK.starts_with(piece) {
                self.is_at_start = true;
                return Detection::Pending(0);
            }
            at = if piece.starts_with(BYTE_ORDER_MARK) { BYTE_ORDER_MARK.len() } else { 0 };
        }
        let is_space = |byte: &u8| matches!(byte, b' ' | b'\t' | b'\r' | b'\n');
        for byte in piece[at..].iter().take_while(|byte| is_space(byte)) {
            self.is_at_line_start = matches!(byte, b'\r' | b'\n');
            at += 1;
        }
        let rest = &piece[at..];
        let may_become = |start: &&[u8]| start.starts_with(rest);
        match rest.first() {
            None => Detection::Pending(at),
            Some(b'{' | b'[') => Detection::Found(at, Some(BodyFormat::Json)),
            Some(_) if self.is_at_line_start && LINE_STARTS.iter().any(|start| rest.starts_with(start)) => {
                Detection::Found(at, Some(BodyFormat::Sse))
            }
            Some(_) if self.is_at_line_start && LINE_STARTS.iter().any(may_become) => Detection::Pending(at),
            Some(_) => Detection::Found(at, None),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The offset and the format of a body that arrives in these pieces.
    fn detect(pieces: impl Iterator<Item = Vec<u8>>) -> Option<(usize, Option<BodyFormat>)> {
        let (mut detector, mut left, mut passed) = (FormatDetector::default(), Vec::new(), 0);
        for piece in pieces {
            left.extend(piece);
            match detector.feed(&left) {
                Detection::Pending(skipped) => {
                    passed += skipped;
                    left.drain(..skipped);
                    assert!(left.len() <= 5, "{left:?}");
                }
                Detection::Found(skipped, format) => return Some((passed + skipped, format)),
            }
        }
        None
    }

    #[test]
    fn the_format_is_found_however_the_first_bytes_arrive() {
        let (json, sse) = (Some(BodyFormat::Json), Some(BodyFormat::Sse));
        for (body, want) in [
            ("{\"a\":1}", Some((0, json))),
            (" \r\n\t[1]", Some((4, json))),
            ("\u{feff}{", Some((3, json))),
            ("data: 1", Some((0, sse))),
            ("\u{feff}data:1", Some((3, sse))),
            ("\n\r\n event: x", Some((4, None))),
            ("\n \nid:7", Some((3, sse))),
            ("retry: 9", Some((0, sse))),
            (": ping", Some((0, sse))),
            ("event:a", Some((0, sse))),
            (" data: 1", Some((1, None))),
            ("datum", Some((0, None))),
            ("evening", Some((0, None))),
            ("\"text\"", Some((0, None))),
            ("<html>", Some((0, None))),
            ("ID3", Some((0, None))),
            ("\u{feff}\u{feff}{", Some((3, None))),
            ("", None),
            (" \n", None),
            ("dat", None),
            ("\u{feff}", None),
        ] {
            assert_eq!(detect(std::iter::once(body.as_bytes().to_vec())), want, "{body:?}");
            assert_eq!(detect(body.bytes().map(|byte| vec![byte])), want, "{body:?} in single bytes");
        }
    }
}
