//! Receives the bytes that a stream reader passes on to the caller.

use bytes::Bytes;

/// Takes the pieces of a stream that the caller is to receive, in order.
pub trait Sink {
    /// Takes the next piece.
    fn push(&mut self, piece: Bytes);
}

impl Sink for Vec<Bytes> {
    fn push(&mut self, piece: Bytes) {
        Vec::push(self, piece);
    }
}

impl Sink for std::collections::VecDeque<Bytes> {
    fn push(&mut self, piece: Bytes) {
        self.push_back(piece);
    }
}

/// A sink that drops its pieces.
#[derive(Clone, Copy, Debug)]
pub struct Discard;

impl Sink for Discard {
    fn push(&mut self, _: Bytes) {}
}
