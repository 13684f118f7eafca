//! Decompresses the streams of documents within a budget.

mod deflate;

/// Bytes that a request may decompress, whatever its size.
const MAX_REQUEST: usize = 8 << 20;
/// Bytes that a document may decompress, whatever its size.
const MAX_DOCUMENT: usize = 1 << 20;
/// Bytes that a small document may decompress in addition to `GROWTH` times its size.
const BASE: usize = 128 << 10;
/// Text decompresses to some four times its compressed size.
const GROWTH: usize = 4;
/// Every stream costs at least this much of the budget, because beginning one takes time.
const STREAM_COST: usize = 1_024;

/// Bytes that a document may still decompress.
#[derive(Debug)]
pub(super) struct Budget<'r> {
    left: usize,
    /// Bytes that the request has decompressed so far.
    used: &'r mut usize,
}

impl<'r> Budget<'r> {
    /// For a document of this size.
    pub(super) fn of(size: usize, used: &'r mut usize) -> Self {
        let document = size.saturating_mul(GROWTH).saturating_add(BASE).min(MAX_DOCUMENT);
        Self { left: document.min(MAX_REQUEST.saturating_sub(*used)), used }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.left == 0
    }

    /// Takes the cost of a stream that has this size. Returns how many of its bytes may be read.
    pub(super) fn take(&mut self, size: usize) -> usize {
        let cost = size.max(STREAM_COST).min(self.left);
        self.left -= cost;
        *self.used += cost;
        size.min(cost)
    }
}

/// Characters that streams of `unread` bytes have if they are like streams of `read` bytes with this many characters.
pub(super) fn alike(characters: u64, read: u64, unread: u64) -> u64 {
    /// Text is rarely compressed further.
    const MAX_CHARACTERS_PER_BYTE: u64 = 16;
    let proportional = characters.saturating_mul(unread) / read.max(1);
    proportional.min(unread.saturating_mul(MAX_CHARACTERS_PER_BYTE))
}

/// The compression of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Compression {
    /// Deflate with a header, in PDF.
    Zlib,
    /// Deflate without a header, in ZIP archives.
    Deflate,
}

/// Decompresses streams, one after the other, into the memory of one.
#[derive(Default)]
pub(super) struct Inflater {
    pub(super) output: Vec<u8>,
}

impl Inflater {
    /// Decompresses a stream into `output`, within the budget. Returns how many bytes of the stream were read.
    /// If it is damaged or truncated, the part before the error counts.
    pub(super) fn inflate(
        &mut self,
        compression: Compression,
        stream: &[u8],
        budget: &mut Budget<'_>,
    ) -> usize {
        self.output.clear();
        let header = match compression {
            Compression::Zlib if has_zlib_header(stream) => ZLIB_HEADER,
            Compression::Zlib => stream.len(),
            Compression::Deflate => 0,
        };
        let decoded = deflate::decode(&stream[header..], &mut self.output, budget.left);
        budget.take(decoded.cost);
        header + decoded.read
    }

    /// Copies an uncompressed stream into `output`, within the budget.
    pub(super) fn copy(&mut self, stream: &[u8], budget: &mut Budget<'_>) {
        self.output.clear();
        let size = budget.take(stream.len());
        self.output.extend_from_slice(&stream[..size]);
    }
}

/// Bytes before the deflate in a zlib stream.
const ZLIB_HEADER: usize = 2;

/// Whether a stream begins with a header of zlib that names no dictionary.
fn has_zlib_header(stream: &[u8]) -> bool {
    let Some(&[method, flags]) = stream.first_chunk() else { return false };
    method & 15 == 8 && flags & 32 == 0 && u16::from_be_bytes([method, flags]) % 31 == 0
}
