//! Fuzzes compressed answers: no input causes a panic, and the output does not depend on where an answer is cut.

use tollgate::usage::{ContentCoding, Decoder};

const CODINGS: [ContentCoding; 4] =
    [ContentCoding::Gzip, ContentCoding::Deflate, ContentCoding::Brotli, ContentCoding::Zstd];

pub(crate) fn check(variant: u8, code: &[u8]) {
    let coding = CODINGS[usize::from(variant % 4)];
    let whole = decoded(coding, code, usize::MAX);
    let cut = decoded(coding, code, 1 + usize::from(variant / 4));
    let same = whole.inner().len().min(cut.inner().len());
    assert!(whole.inner()[..same] == cut.inner()[..same]);
    if !whole.has_failed() && !cut.has_failed() {
        assert_eq!(whole.inner().len(), cut.inner().len());
    }
}

fn decoded(coding: ContentCoding, code: &[u8], piece: usize) -> Decoder<Vec<u8>> {
    let mut decoder = Decoder::new(coding, Vec::new());
    code.chunks(piece.min(code.len().max(1))).for_each(|piece| decoder.feed(piece));
    decoder
}
