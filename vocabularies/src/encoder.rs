//! Byte-pair encoding of a piece.

use crate::format::{Merges as _, can_follow};
use crate::tables::Tables;

/// Pieces up to this size (bytes) are encoded without heap memory.
const SHORT: usize = 63;

pub(crate) fn count(tables: &Tables, piece: &[u8]) -> usize {
    let Some(first) = tables.longest_token(piece) else { return 0 };
    if tables.record(first).length() == piece.len() {
        return 1;
    }
    let words = piece.len() / 64 + 1;
    if piece.len() <= SHORT {
        Encoder { tables, piece, open: &mut [u64::MAX], tokens: &mut [0; SHORT] }.count(first)
    } else {
        let (mut open, mut tokens) = (vec![u64::MAX; words], vec![0; piece.len()]);
        Encoder { tables, piece, open: &mut open, tokens: &mut tokens }.count(first)
    }
}

struct Encoder<'a> {
    tables: &'a Tables,
    piece: &'a [u8],
    /// A bit per position: whether an encoding of the bytes before it may end there.
    open: &'a mut [u64],
    /// Room for the tokens so far.
    tokens: &'a mut [u32],
}

impl Encoder<'_> {
    fn count(&mut self, first: u32) -> usize {
        let (mut count, mut position, mut next) = (0, 0, Some(first));
        while let Some(mut token) = next {
            let last = if count == 0 { None } else { Some(self.tokens[count - 1]) };
            next = loop {
                let record = self.tables.record(token);
                let end = position + record.length();
                if self.is_open(end) && last.is_none_or(|last| can_follow(self.tables, last, token)) {
                    self.tokens[count] = token;
                    count += 1;
                    position = end;
                    break self.tables.longest_token(&self.piece[end..]);
                }
                if let Some(shorter) = record.prefix() {
                    token = shorter;
                    continue;
                }
                // No token can follow here: the last token has to be a shorter one.
                self.close(position);
                let Some(last) = last else { break None };
                count -= 1;
                position -= self.tables.record(last).length();
                break Some(last);
            };
        }
        count
    }

    fn is_open(&self, position: usize) -> bool {
        self.open[position / 64] & (1 << (position % 64)) != 0
    }

    fn close(&mut self, position: usize) {
        self.open[position / 64] &= !(1 << (position % 64));
    }
}
