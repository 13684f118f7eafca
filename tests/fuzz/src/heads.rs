//! Fuzzes the check of request heads: the result does not depend on where the bytes are cut, and a head that passes is
//! read in one way only, also by the parser of hyper.

use tollgate::fuzzed::{CheckedRequests, check_requests};

pub(crate) fn check(variant: u8, wire: &[u8]) {
    let whole = check_requests(wire, usize::MAX);
    let cut = check_requests(wire, 1 + usize::from(variant));
    assert_eq!(
        (whole.refused_head, whole.refused_body),
        (cut.refused_head, cut.refused_body),
        "{}",
        shown(wire)
    );
    // Chunks are passed on as they arrive, up to the fault.
    if !whole.refused_body {
        assert_eq!(whole.passed, cut.passed, "{}", shown(wire));
    }
    let mut headers = [httparse::EMPTY_HEADER; 100];
    let mut request = httparse::Request::new(&mut headers);
    let Ok(httparse::Status::Complete(length)) = request.parse(wire) else { return };
    let empty_lines = wire.iter().take_while(|b| matches!(b, b'\r' | b'\n')).count();
    let CheckedRequests { passed, refused_head, .. } = check_requests(&wire[..length], usize::MAX);
    if refused_head {
        return;
    }
    assert_eq!(passed, length, "both end the head at the same byte: {}", shown(wire));
    let before = check_requests(&wire[..length - 1], usize::MAX);
    assert_eq!(before.passed, empty_lines, "nothing of a head passes before its end: {}", shown(wire));
    let named = |name: &str| {
        request
            .headers
            .iter()
            .filter(|h| h.name.eq_ignore_ascii_case(name))
            .map(|h| h.value)
            .collect::<Vec<_>>()
    };
    let (hosts, lengths, codings) = (named("host"), named("content-length"), named("transfer-encoding"));
    assert!(hosts.len() == 1 || hosts.is_empty() && request.version == Some(0), "{}", shown(wire));
    assert!(lengths.len() + codings.len() <= 1, "{}", shown(wire));
    assert!(
        codings.iter().all(|coding| coding.trim_ascii().eq_ignore_ascii_case(b"chunked")),
        "{}",
        shown(wire)
    );
    assert!(lengths.iter().all(|n| n.trim_ascii().iter().all(u8::is_ascii_digit)), "{}", shown(wire));
    assert!(!wire[..length].windows(2).any(|two| two[1] == b'\n' && two[0] != b'\r'), "{}", shown(wire));
}

fn shown(wire: &[u8]) -> String {
    wire.escape_ascii().to_string()
}
