//! Checks the bytes of HTTP/1.1 requests before hyper parses them.
//!
//! Hyper accepts heads that other servers read differently, such as one with two lengths. A proxy in front of the
//! gateway could then take one request for two. This check follows the framing of a connection byte by byte, and
//! refuses each head and each chunk that RFC 9112 does not allow. It passes on only bytes that are certain: a head when it is
//! complete, a body as it arrives. Whatever hyper checks itself (names, values, the method) is left to hyper.

mod chunks;
mod head;

use chunks::ChunkCheck;
use head::Framing;
pub(super) use head::{AMBIGUOUS_NAME, NOT_A_TARGET, SEVERAL_FRAMINGS, is_ambiguous_name, is_host};

/// The position of a connection between and within its requests.
#[derive(Debug)]
pub(crate) struct RequestCheck {
    position: Position,
    rules: HeadRules,
}

/// The rules of a connection.
#[derive(Clone, Copy, Debug)]
struct HeadRules {
    /// The scheme of targets in absolute form: `http` or `https`.
    scheme: &'static str,
    /// Whether a request must name a host, as RFC 9112 demands. Those of some health checks do not.
    requires_host: bool,
}

#[derive(Debug)]
enum Position {
    /// Before or within a head.
    Head(LineSearch),
    /// In a body, with this many bytes to come.
    Length(u64),
    Chunked(ChunkCheck),
    /// In a head that is too large, which hyper refuses.
    TooLarge,
    Refused(Refused),
}

/// Why a connection ends here. The bytes after this point are not parsed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    /// A head is ambiguous. The text follows "The request head is not accepted: ".
    Head(&'static str),
    /// The chunks of a body are not valid.
    Body,
}

/// The search for the end of a head, over several pieces.
#[derive(Debug, Default)]
struct LineSearch {
    /// Bytes that were searched.
    searched: usize,
    /// Where the current line starts.
    line: usize,
}

impl RequestCheck {
    /// `scheme`: that of the connection's URLs.
    pub(crate) fn new(scheme: &'static str, requires_host: bool) -> Self {
        Self { position: Position::Head(LineSearch::default()), rules: HeadRules { scheme, requires_host } }
    }

    /// Checks the next bytes and returns how many of them hyper may receive. The others belong to a head that is not
    /// complete: they must be in front of the bytes of the next call. After a refusal they are discarded.
    pub(crate) fn advance(&mut self, bytes: &[u8]) -> usize {
        let mut passed = 0;
        while passed < bytes.len() {
            let rest = &bytes[passed..];
            let (taken, next) = match &mut self.position {
                Position::Head(search) => {
                    let known = search.searched;
                    match search.end_of_head(rest) {
                        None if rest.len() >= super::MAX_HEAD_BYTES => (rest.len(), Some(Position::TooLarge)),
                        // A caller that does not speak HTTP gets its answer at once: it may never send an empty line.
                        None => match head::check_bytes(&rest[known..]) {
                            Ok(()) => return passed,
                            Err(reason) => (0, Some(Position::Refused(Refused::Head(reason)))),
                        },
                        Some(end) => (end, Some(after_head(&rest[..end], self.rules))),
                    }
                }
                Position::Length(left) => {
                    let taken = usize::try_from(*left).unwrap_or(usize::MAX).min(rest.len());
                    *left -= taken as u64;
                    (taken, (*left == 0).then(Position::next_head))
                }
                Position::Chunked(check) => match check.advance(rest) {
                    Ok((taken, true)) => (taken, Some(Position::next_head())),
                    Ok((taken, false)) => (taken, None),
                    Err(()) => (0, Some(Position::Refused(Refused::Body))),
                },
                Position::TooLarge => (rest.len(), None),
                Position::Refused(_) => return passed,
            };
            if let Some(next) = next {
                self.position = next;
            }
            if self.refused().is_none() {
                passed += taken;
            }
        }
        passed
    }

    /// Why the connection ends here, if it does.
    pub(crate) fn refused(&self) -> Option<Refused> {
        if let Position::Refused(refused) = self.position { Some(refused) } else { None }
    }
}

impl Position {
    fn next_head() -> Self {
        Self::Head(LineSearch::default())
    }
}

/// The position after a complete head. Empty lines in front of a head are passed on alone.
fn after_head(head: &[u8], rules: HeadRules) -> Position {
    if head == b"\r\n" {
        return Position::next_head();
    }
    match head::check(head, rules) {
        Ok(Framing::None) => Position::next_head(),
        Ok(Framing::Length(length)) => Position::Length(length),
        Ok(Framing::Chunked) => Position::Chunked(ChunkCheck::default()),
        Err(reason) => Position::Refused(Refused::Head(reason)),
    }
}

impl LineSearch {
    /// The length of the head, with the empty line at its end. An empty line counts however it ends, because hyper ends
    /// a head there. An empty line at the beginning is a head of its own.
    fn end_of_head(&mut self, bytes: &[u8]) -> Option<usize> {
        let from = self.searched;
        for end in memchr::memchr_iter(b'\n', &bytes[from..]).map(|at| from + at) {
            let is_empty = matches!(bytes[self.line..end], [] | [b'\r']);
            (self.searched, self.line) = (end + 1, end + 1);
            if is_empty {
                return Some(end + 1);
            }
        }
        self.searched = bytes.len();
        None
    }
}

#[cfg(test)]
mod tests;
