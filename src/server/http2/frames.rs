//! Bounds the frames that a caller can send without requesting anything.
//!
//! HTTP/2 lets a caller make a server work with frames that cost the caller little: pings, settings, priorities, empty
//! pieces and resets. The h2 library bounds what they occupy in memory, but not their number.

use crate::clock::Stopwatch;

/// The bytes with which a caller's connection begins.
pub(in crate::server) const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;
/// The flag of a last piece of data.
const END_STREAM: u8 = 1;

/// Frames that request nothing: pings, settings, priorities, empty pieces and unknown types.
const MAX_IDLE_FRAMES: f64 = 1_000.0;
const IDLE_FRAMES_PER_SECOND: f64 = 100.0;
/// Requests that the caller resets.
const MAX_RESETS: f64 = 500.0;
const RESETS_PER_SECOND: f64 = 50.0;

/// Reads the heads of frames in the bytes of a caller.
#[derive(Debug)]
pub(super) struct FrameGuard {
    /// Bytes to skip: the rest of the preface or of a frame's content.
    to_skip: usize,
    head: [u8; 9],
    head_length: usize,
    idle: Budget,
    resets: Budget,
}

/// The caller has sent too many frames of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Flood(pub(super) &'static str);

/// A number of frames that refills.
#[derive(Debug)]
struct Budget {
    left: f64,
    max: f64,
    per_second: f64,
    at: Stopwatch,
}

impl FrameGuard {
    /// At the beginning of a connection.
    pub(super) fn new() -> Self {
        Self {
            to_skip: PREFACE.len(),
            head: [0; 9],
            head_length: 0,
            idle: Budget::new(MAX_IDLE_FRAMES, IDLE_FRAMES_PER_SECOND),
            resets: Budget::new(MAX_RESETS, RESETS_PER_SECOND),
        }
    }

    /// Counts the frames in the next bytes.
    ///
    /// # Errors
    /// The caller has sent too many.
    pub(super) fn feed(&mut self, mut bytes: &[u8]) -> Result<(), Flood> {
        while !bytes.is_empty() {
            let skipped = self.to_skip.min(bytes.len());
            self.to_skip -= skipped;
            bytes = &bytes[skipped..];
            let taken = bytes.len().min(self.head.len() - self.head_length);
            self.head[self.head_length..self.head_length + taken].copy_from_slice(&bytes[..taken]);
            self.head_length += taken;
            bytes = &bytes[taken..];
            if self.head_length == self.head.len() {
                self.head_length = 0;
                self.count()?;
            }
        }
        Ok(())
    }

    fn count(&mut self) -> Result<(), Flood> {
        let [a, b, c, kind, flags, ..] = self.head;
        let length = usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c);
        self.to_skip = length;
        match kind {
            // The h2 library bounds the number and the size of continuations.
            HEADERS | WINDOW_UPDATE | CONTINUATION => Ok(()),
            DATA if length > 0 || flags & END_STREAM != 0 => Ok(()),
            RST_STREAM => self.resets.take().ok_or(Flood("resets of requests")),
            _ => self.idle.take().ok_or(Flood("frames that request nothing, such as pings")),
        }
    }
}

impl Budget {
    fn new(max: f64, per_second: f64) -> Self {
        Self { left: max, max, per_second, at: Stopwatch::start() }
    }

    /// `None`: nothing is left.
    fn take(&mut self) -> Option<()> {
        if self.left < 1.0 {
            let now = Stopwatch::start();
            self.left = (self.left + now.since(self.at).as_secs_f64() * self.per_second).min(self.max);
            self.at = now;
        }
        self.left -= 1.0;
        (self.left >= 0.0).then_some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, flags: u8, length: u8) -> Vec<u8> {
        let mut frame = vec![0, 0, length, kind, flags, 0, 0, 0, 1];
        frame.extend(vec![kind; length.into()]);
        frame
    }

    #[test]
    fn idle_frames_and_resets_are_bounded_and_requests_are_not() {
        for (kind, flags, length, flood) in [
            (6, 0, 8, Some("frames that request nothing, such as pings")),
            (4, 0, 6, Some("frames that request nothing, such as pings")),
            (2, 0, 5, Some("frames that request nothing, such as pings")),
            (DATA, 0, 0, Some("frames that request nothing, such as pings")),
            (0xbe, 0, 3, Some("frames that request nothing, such as pings")),
            (RST_STREAM, 0, 4, Some("resets of requests")),
            (HEADERS, 5, 20, None),
            (DATA, 0, 9, None),
            (DATA, END_STREAM, 0, None),
            (WINDOW_UPDATE, 0, 4, None),
        ] {
            let mut bytes = PREFACE.to_vec();
            (0..3_000).for_each(|_| bytes.extend(frame(kind, flags, length)));
            // Any sizes of pieces give the same result.
            for piece in [1, 7, 9, 4_096, bytes.len()] {
                let mut guard = FrameGuard::new();
                let flooded = bytes.chunks(piece).find_map(|piece| guard.feed(piece).err());
                assert_eq!(flooded.map(|Flood(what)| what), flood, "{kind} {length} {piece}");
            }
        }
    }

    #[test]
    fn a_caller_with_some_pings_and_resets_is_not_disturbed() {
        let mut guard = FrameGuard::new();
        guard.feed(PREFACE).unwrap();
        for _ in 0..400 {
            guard.feed(&frame(6, 0, 8)).unwrap();
            guard.feed(&frame(RST_STREAM, 0, 4)).unwrap();
            guard.feed(&frame(4, 1, 0)).unwrap();
        }
    }
}
