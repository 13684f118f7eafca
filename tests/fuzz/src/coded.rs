//! Compressed answers: whatever comes decodes without a panic, and cut in pieces to the same as far as it goes.

use tollgate::usage::{Coding, Decoder};

const CODINGS: [Coding; 4] = [Coding::Gzip, Coding::Deflate, Coding::Brotli, Coding::Zstd];

pub(crate) fn check(how: u8, code: &[u8]) {
    let coding = CODINGS[usize::from(how % 4)];
    let whole = decoded(coding, code, usize::MAX);
    let cut = decoded(coding, code, 1 + usize::from(how / 4));
    let same = whole.inner().len().min(cut.inner().len());
    assert!(whole.inner()[..same] == cut.inner()[..same]);
    if !whole.gave_up() && !cut.gave_up() {
        assert_eq!(whole.inner().len(), cut.inner().len());
    }
}

fn decoded(coding: Coding, code: &[u8], piece: usize) -> Decoder<Vec<u8>> {
    let mut decoder = Decoder::new(coding, Vec::new()).unwrap();
    code.chunks(piece.min(code.len().max(1))).for_each(|piece| decoder.feed(piece));
    decoder
}
