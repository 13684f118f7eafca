//! Decodes deflate (RFC 1951) from a slice, with bounded work.
//!
//! General decoders prepare some kilobytes of tables for each block, also for an empty one of ten bits. A megabyte of
//! empty blocks takes them seconds. This decoder has the fixed tables once, and each block costs a part of the budget.

#![allow(clippy::cast_possible_truncation)] // numbers of bits are small

use std::sync::LazyLock;

/// Every block costs at least this many bytes of output, because its tables take time.
const BLOCK_COST: usize = 1_024;
/// Codes up to this length (bits) are found by one lookup.
const QUICK_BITS: usize = 10;
/// Maximum length of a code in bits.
const MAX_BITS: usize = 15;
const MAX_SYMBOLS: usize = 288;
/// The symbol that ends a block.
const END: usize = 256;
/// The order in which a block lists the lengths of the codes for code lengths.
const LENGTH_ORDER: [usize; 19] = [16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15];

/// The part of a stream that was decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Decoded {
    /// Bytes of the stream.
    pub(super) read: usize,
    /// The work in bytes of output.
    pub(super) cost: usize,
}

/// Appends the content of a stream to `output`, which is empty. Stops at `limit` bytes of output or at that cost. If the
/// stream is damaged or truncated, the part before the error counts.
pub(super) fn decode(stream: &[u8], output: &mut Vec<u8>, limit: usize) -> Decoded {
    let mut bits = Bits { stream, at: 0, buffer: 0, count: 0 };
    let mut tables = None;
    let mut blocks = 0;
    while blocks * BLOCK_COST < limit && output.len() < limit {
        blocks += 1;
        if block(&mut bits, &mut tables, output, limit) != Some(BlockEnd::MoreFollow) {
            break;
        }
    }
    Decoded { read: bits.position(), cost: output.len().max(blocks * BLOCK_COST) }
}

/// How a block ended that has no error.
#[derive(PartialEq)]
enum BlockEnd {
    MoreFollow,
    IsLast,
}

/// Decodes a block. `None`: it is damaged.
fn block(
    bits: &mut Bits<'_>,
    tables: &mut Option<Box<[CodeTable; 2]>>,
    output: &mut Vec<u8>,
    limit: usize,
) -> Option<BlockEnd> {
    bits.refill();
    let is_last = bits.take(1)? == 1;
    match bits.take(2)? {
        0 => stored(bits, output, limit)?,
        1 => codes(bits, &FIXED, output, limit)?,
        2 => {
            let tables = tables.get_or_insert_with(|| Box::new([CodeTable::EMPTY; 2]));
            read_tables(bits, tables)?;
            codes(bits, tables, output, limit)?;
        }
        _ => return None,
    }
    Some(if is_last { BlockEnd::IsLast } else { BlockEnd::MoreFollow })
}

fn stored(bits: &mut Bits<'_>, output: &mut Vec<u8>, limit: usize) -> Option<()> {
    bits.take(bits.count % 8)?;
    bits.refill();
    let (size, complement) = (bits.take(16)?, bits.take(16)?);
    if size ^ complement != 0xffff {
        return None;
    }
    let from = bits.position();
    let rest = bits.stream.get(from..)?;
    let bytes = &rest[..size.min(rest.len())];
    output.extend_from_slice(&bytes[..bytes.len().min(limit - output.len())]);
    *bits = Bits { stream: bits.stream, at: from + bytes.len(), buffer: 0, count: 0 };
    (bytes.len() == size).then_some(())
}

/// Decodes the literals and matches of a block up to its end.
fn codes(bits: &mut Bits<'_>, tables: &[CodeTable; 2], output: &mut Vec<u8>, limit: usize) -> Option<()> {
    let [symbols, distances] = tables;
    while output.len() < limit {
        // The longest match has 48 bits.
        bits.refill();
        let symbol = symbols.next(bits)?;
        if let Ok(literal) = u8::try_from(symbol) {
            output.push(literal);
            continue;
        }
        if symbol == END {
            return Some(());
        }
        let length = match_length(bits, symbol - END - 1)?;
        let symbol = distances.next(bits)?;
        let distance = match_distance(bits, symbol)?;
        let from = output.len().checked_sub(distance)?;
        let mut left = length.min(limit - output.len());
        // A match can overlap with its own output, which repeats then.
        while left > 0 {
            let size = left.min(output.len() - from);
            output.extend_from_within(from..from + size);
            left -= size;
        }
    }
    Some(())
}

/// The length of a match whose symbol has this index.
fn match_length(bits: &mut Bits<'_>, index: usize) -> Option<usize> {
    match index {
        0..8 => Some(3 + index),
        8..28 => with_more(bits, 4 + index % 4, index / 4 - 1).map(|value| 3 + value),
        28 => Some(258),
        _ => None,
    }
}

fn match_distance(bits: &mut Bits<'_>, symbol: usize) -> Option<usize> {
    match symbol {
        0..2 => Some(1 + symbol),
        2..30 => with_more(bits, 2 + symbol % 2, symbol / 2 - 1).map(|value| 1 + value),
        _ => None,
    }
}

/// A number that consists of these high bits and of `count` more bits of the stream.
fn with_more(bits: &mut Bits<'_>, high: usize, count: usize) -> Option<usize> {
    Some(high << count | bits.take(count as u32)?)
}

/// Reads the tables at the start of a block.
fn read_tables(bits: &mut Bits<'_>, [symbols, distances]: &mut [CodeTable; 2]) -> Option<()> {
    let symbol_count = 257 + bits.take(5)?;
    let count = symbol_count + 1 + bits.take(5)?;
    let mut lengths = [0u8; LENGTH_ORDER.len()];
    for at in &LENGTH_ORDER[..4 + bits.take(4)?] {
        bits.refill();
        lengths[*at] = u8::try_from(bits.take(3)?).ok()?;
    }
    // The table for the lengths of the codes is needed only until they are read.
    symbols.fill(&lengths)?;
    let mut lengths = [0u8; MAX_SYMBOLS + 32];
    let mut at = 0;
    while at < count {
        bits.refill();
        let (value, times) = match symbols.next(bits)? {
            16 => (*lengths.get(at.checked_sub(1)?)?, 3 + bits.take(2)?),
            17 => (0, 3 + bits.take(3)?),
            18 => (0, 11 + bits.take(7)?),
            length => (u8::try_from(length).ok()?, 1),
        };
        lengths.get_mut(at..at + times)?.fill(value);
        at += times;
    }
    symbols.fill(&lengths[..symbol_count])?;
    distances.fill(&lengths[symbol_count..count])
}

/// The bits of a stream, from the lowest bit of each byte on.
struct Bits<'a> {
    stream: &'a [u8],
    /// Position of the next byte that is not in `buffer`.
    at: usize,
    buffer: u64,
    /// Number of bits in `buffer`. Higher bits of it may be set; they are those that follow.
    count: u32,
}

impl Bits<'_> {
    /// Fills the buffer with at least 56 bits, or with all that are left.
    fn refill(&mut self) {
        let rest = self.stream.get(self.at..).unwrap_or_default();
        if let Some(next) = rest.first_chunk() {
            self.buffer |= u64::from_le_bytes(*next) << self.count;
            self.at += ((63 - self.count) / 8) as usize;
            self.count |= 0b11_1000;
        } else {
            for byte in rest {
                if self.count > 55 {
                    break;
                }
                self.buffer |= u64::from(*byte) << self.count;
                self.at += 1;
                self.count += 8;
            }
        }
    }

    /// The lowest bits of the buffer.
    fn peek(&self, count: u32) -> usize {
        (self.buffer & ((1 << count) - 1)) as usize
    }

    /// At most 16 bits as a number. `None` at the end of the stream.
    fn take(&mut self, count: u32) -> Option<usize> {
        let bits = self.peek(count);
        self.count = self.count.checked_sub(count)?;
        self.buffer >>= count;
        Some(bits)
    }

    /// Position of the first byte of which no bit was taken.
    fn position(&self) -> usize {
        self.at - (self.count / 8) as usize
    }
}

/// The codes of an alphabet.
struct CodeTable {
    /// For the next bits: the symbol times 16, and the length of its code. 0: the code is longer.
    quick: [u16; 1 << QUICK_BITS],
    /// By length: the first code, and the first code after those of this length, both with 15 bits.
    ranges: [(u16, u16); MAX_BITS + 1],
    /// By length: index of the first symbol in `symbols`.
    offsets: [u16; MAX_BITS + 1],
    /// The symbols in the order of their codes.
    symbols: [u16; MAX_SYMBOLS],
}

/// The tables of blocks without tables of their own.
static FIXED: LazyLock<[CodeTable; 2]> = LazyLock::new(|| {
    let mut tables = [CodeTable::EMPTY; 2];
    let mut lengths = [8; MAX_SYMBOLS];
    lengths[144..256].fill(9);
    lengths[256..280].fill(7);
    // Both are complete, so they cannot fail.
    let _ = tables[0].fill(&lengths);
    let _ = tables[1].fill(&[5; 32]);
    tables
});

impl CodeTable {
    const EMPTY: Self = Self {
        quick: [0; 1 << QUICK_BITS],
        ranges: [(0, 0); MAX_BITS + 1],
        offsets: [0; MAX_BITS + 1],
        symbols: [0; MAX_SYMBOLS],
    };

    /// Assigns codes of these lengths to the symbols. `None`: there are not so many codes.
    fn fill(&mut self, lengths: &[u8]) -> Option<()> {
        let mut counts = [0u16; MAX_BITS + 1];
        for length in lengths {
            *counts.get_mut(usize::from(*length))? += 1;
        }
        counts[0] = 0;
        let (mut code, mut offset) = (0u16, 0);
        for (length, count) in counts.iter().enumerate().skip(1) {
            let end = u32::from(code) + (u32::from(*count) << (MAX_BITS - length));
            if end > 1 << MAX_BITS {
                return None;
            }
            let end = u16::try_from(end).ok()?;
            self.ranges[length] = (code, end);
            self.offsets[length] = offset;
            code = end;
            offset += count;
        }
        self.quick.fill(0);
        let mut next = self.offsets;
        for (symbol, length) in (0u16..).zip(lengths) {
            let length = usize::from(*length);
            if length > 0 {
                let at = next[length];
                next[length] += 1;
                *self.symbols.get_mut(usize::from(at))? = symbol;
                self.fill_quick(symbol, length, at - self.offsets[length]);
            }
        }
        Some(())
    }

    /// `at`: index of the symbol among those of this length.
    fn fill_quick(&mut self, symbol: u16, length: usize, at: u16) {
        if length <= QUICK_BITS {
            let code = self.ranges[length].0 + (at << (MAX_BITS - length));
            let entry = symbol << 4 | (length & 15) as u16;
            let mut at = usize::from(code.reverse_bits() >> 1);
            while let Some(quick) = self.quick.get_mut(at) {
                *quick = entry;
                at += 1 << length;
            }
        }
    }

    /// The next symbol. `None`: the code has none, or the stream ends.
    fn next(&self, bits: &mut Bits<'_>) -> Option<usize> {
        let quick = self.quick[bits.peek(QUICK_BITS as u32)];
        if quick > 0 {
            bits.take(u32::from(quick & 15))?;
            return Some(usize::from(quick >> 4));
        }
        let code = u16::try_from(bits.peek(MAX_BITS as u32)).ok()?.reverse_bits() >> 1;
        let length = (QUICK_BITS + 1..=MAX_BITS).find(|length| code < self.ranges[*length].1)?;
        let at = (code - self.ranges[length].0) >> (MAX_BITS - length);
        bits.take(length as u32)?;
        self.symbols.get(usize::from(self.offsets[length] + at)).map(|symbol| usize::from(*symbol))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use flate2::Compression;
    use flate2::write::DeflateEncoder;
    use proptest::prelude::*;
    use std::io::Write as _;

    fn encoded(bytes: &[u8], level: u32) -> Vec<u8> {
        let mut encoder = DeflateEncoder::new(Vec::new(), Compression::new(level));
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn decoded(stream: &[u8], limit: usize) -> (Vec<u8>, Decoded) {
        let mut output = Vec::new();
        let end = decode(stream, &mut output, limit);
        (output, end)
    }

    /// Bytes whose frequencies differ so much that some have codes of 15 bits.
    fn skewed(length: usize) -> Vec<u8> {
        let mut state = 1u32;
        let mut byte = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8).leading_zeros().to_le_bytes()[0].wrapping_mul(7) ^ (state >> 30).to_le_bytes()[0]
        };
        (0..length).map(|_| byte()).collect()
    }

    #[test]
    fn streams_of_all_kinds_of_blocks_are_decoded() {
        let text = include_bytes!("deflate.rs").as_slice();
        for bytes in [b"".as_slice(), b"a", text, &skewed(300_000), &vec![7; 100_000], &b"abc".repeat(50_000)]
        {
            for level in 0..=9 {
                let stream = encoded(bytes, level);
                let (output, end) = decoded(&stream, 1 << 20);
                assert!(output == bytes, "{} bytes, level {level}", bytes.len());
                assert_eq!(end.read, stream.len());
            }
        }
    }

    #[test]
    fn every_block_costs_a_part_of_the_budget() {
        // Four empty blocks with fixed codes in five bytes.
        let empty = [0x02, 0x08, 0x20, 0x80, 0x00].repeat(10_000);
        assert_eq!(decoded(&empty, 1 << 20), (vec![], Decoded { read: 1_280, cost: 1 << 20 }));
        let one = encoded(b"text", 6);
        assert_eq!(decoded(&one, 1 << 20), (b"text".to_vec(), Decoded { read: one.len(), cost: BLOCK_COST }));
    }

    #[test]
    fn damaged_streams_end_at_the_damage() {
        let mut output = encoded(b"a text", 0);
        output[3] ^= 1;
        assert_eq!(decoded(&output, 100).0, b"", "the size and its complement differ");
        assert_eq!(decoded(&[0x07], 100).0, b"", "a block of an unknown type");
        assert_eq!(decoded(&[0x4b, 0x04, 0x42], 100).0, b"a", "a match before the start");
        assert_eq!(decoded(&[], 100), (vec![], Decoded { read: 0, cost: BLOCK_COST }));
    }

    proptest! {
        #[test]
        fn any_text_is_decoded_and_a_part_of_a_stream_gives_its_start(
            bytes in prop::collection::vec(prop_oneof![0u8..4, any::<u8>()], 0..3_000),
            times in 1usize..20,
            level in 0u32..10,
            part in 0usize..1_000,
            limit in 1usize..10_000,
        ) {
            let bytes = bytes.repeat(times);
            let stream = encoded(&bytes, level);
            prop_assert_eq!(&decoded(&stream, 1 << 20).0, &bytes);
            let (start, _) = decoded(&stream[..stream.len() * part / 1_000], 1 << 20);
            prop_assert!(bytes.starts_with(&start));
            let (start, end) = decoded(&stream, limit);
            prop_assert!(bytes.starts_with(&start) && start.len() <= limit);
            prop_assert!(end.read <= stream.len() && end.cost <= limit + BLOCK_COST);
        }

        #[test]
        fn any_bytes_can_be_decoded(
            mut stream in prop::collection::vec(any::<u8>(), 0..300),
            kind in 0u8..8,
            limit in 1usize..5_000,
        ) {
            if let Some(first) = stream.first_mut() {
                *first = *first & !7 | kind;
            }
            let (output, end) = decoded(&stream, limit);
            prop_assert!(output.len() <= limit && end.read <= stream.len());
        }

        #[test]
        fn a_damaged_stream_is_decoded_as_flate2_does_it(
            bytes in prop::collection::vec(0u8..20, 1..2_000),
            at in any::<prop::sample::Index>(),
            bit in 0u8..8,
        ) {
            let mut stream = encoded(&bytes, 6);
            let at = at.index(stream.len());
            stream[at] ^= 1 << bit;
            let (output, _) = decoded(&stream, 1 << 20);
            let mut reference = vec![0; 1 << 20];
            let mut decoder = flate2::Decompress::new(false);
            if decoder.decompress(&stream, &mut reference, flate2::FlushDecompress::None)
                .is_ok_and(|status| status == flate2::Status::StreamEnd)
            {
                reference.truncate(usize::try_from(decoder.total_out()).unwrap());
                // flate2 continues after a match that begins before the start of the output.
                prop_assert!(reference.starts_with(&output));
            }
        }
    }
}
