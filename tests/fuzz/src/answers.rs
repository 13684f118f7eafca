//! Fuzzes the gateway's own HTTP/1.1 client: an answer is the same wherever its bytes are cut, and takes no more than
//! its bytes.

use tollgate::fuzzed::read_answer;

pub(crate) fn check(variant: u8, wire: &[u8]) {
    let whole = read_answer(wire, usize::MAX);
    let cut = read_answer(wire, 1 + usize::from(variant));
    match (whole, cut) {
        (None, None) => {}
        (Some(whole), Some(cut)) => {
            assert_eq!((whole.status, whole.headers), (cut.status, cut.headers));
            assert_eq!(whole.is_complete, cut.is_complete, "{}", wire.escape_ascii());
            // Before a fault, less may have passed when more arrived at once.
            let same = whole.body.len().min(cut.body.len());
            assert_eq!(whole.body[..same], cut.body[..same]);
            assert!(!whole.is_complete || whole.body.len() == cut.body.len());
            assert!(whole.body.len() <= wire.len());
        }
        _ => panic!("only one of two cuts is an answer: {}", wire.escape_ascii()),
    }
}
