use super::*;

/// Feeds these bytes in pieces of `step`. Returns the bytes that are passed on, and the refusal, if there is one.
fn passed(wire: &[u8], step: usize) -> (Vec<u8>, Option<Refused>) {
    let (mut check, mut held, mut out) = (RequestCheck::new("http", true), Vec::new(), Vec::new());
    for piece in wire.chunks(step) {
        held.extend_from_slice(piece);
        let passed = check.advance(&held);
        out.extend(held.drain(..passed));
    }
    (out, check.refused())
}

fn assert_passes(wire: &str) {
    for step in 1..=wire.len() {
        let (out, refused) = passed(wire.as_bytes(), step);
        assert_eq!((out.len(), refused), (wire.len(), None), "{wire:?} in pieces of {step}");
    }
}

/// Asserts that these bytes are refused, and that only the first `good` of them are passed on.
fn assert_refused(wire: &str, good: usize, is_head: bool) {
    for step in 1..=wire.len() {
        let (out, refused) = passed(wire.as_bytes(), step);
        assert_eq!(out.len(), good, "{wire:?} in pieces of {step}");
        assert_eq!(matches!(refused, Some(Refused::Head(_))), is_head, "{wire:?} {refused:?}");
        assert!(refused.is_some(), "{wire:?}");
    }
}

const GET: &str = "GET / HTTP/1.1\r\nhost: a\r\n\r\n";

#[test]
fn unambiguous_requests_pass_one_after_the_other() {
    for wire in [
        GET,
        "\r\n\r\nGET / HTTP/1.1\r\nHost: a:80\r\n\r\n",
        "POST /x?y=://z HTTP/1.1\r\nhost: [::1]:8080\r\nContent-Length: 3\r\n\r\nabc",
        "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: Chunked\r\n\r\n3;n=\"v\"\r\nabc\r\n00\r\nx: y\r\n\r\n",
        "GET http://A/x HTTP/1.1\r\nhost: a\r\n\r\n",
        "GET / HTTP/1.0\r\n\r\n",
        "OPTIONS * HTTP/1.1\r\nhost: a\r\n\r\n",
        "GET / HTTP/1.1\r\nhost: \t a_b-c.d~ \r\nx: \u{fc}\t1\r\n\r\n",
    ] {
        assert_passes(wire);
        assert_passes(&format!("{wire}{GET}{wire}"));
    }
}

#[test]
fn ambiguous_heads_are_refused_after_the_requests_before_them() {
    for lines in [
        "GET / HTTP/1.1\nhost: a\r\n",
        "GET / HTTP/1.1\r\nhost: a\n",
        "GET / HTTP/1.1\r\nhost: a\r\n\n",
        "GET / HTTP/1.1\r\n host: a\r\n",
        "GET / HTTP/1.1\r\nhost: a\r\nx: 1\r\n 2\r\n",
        "GET / HTTP/1.1\r\nhost: a\r\nx: 1\r2\r\n",
        "GET / HTTP/1.1\r\nhost: a\r\nx: \0\r\n",
        "GET / HTTP/1.1\r\n",
        "GET / HTTP/1.1\r\nhost:\r\n",
        "GET / HTTP/1.1\r\nhost: a\r\nhost: a\r\n",
        "GET / HTTP/1.1\r\nhost: gate/?x=\r\n",
        "GET / HTTP/1.1\r\nhost: a@b\r\n",
        "GET / HTTP/1.1\r\nhost: a:65536\r\n",
        "GET / HTTP/1.1\r\nhost: [::g]\r\n",
        "GET / HTTP/2.0\r\nhost: a\r\n",
        "GET /\r\n",
        "GET  / HTTP/1.1\r\nhost: a\r\n",
        "GET /a b HTTP/1.1\r\nhost: a\r\n",
        "GET /#a HTTP/1.1\r\nhost: a\r\n",
        "GET https://a/ HTTP/1.1\r\nhost: a\r\n",
        "GET ftp://a/ HTTP/1.1\r\nhost: a\r\n",
        "GET http://b/ HTTP/1.1\r\nhost: a\r\n",
        "CONNECT a:1 HTTP/1.1\r\nhost: a:1\r\n",
        "TRACE / HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\n",
        "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\ncontent-length: 1\r\n",
        "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1, 1\r\n",
        "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: +1\r\n",
        "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 18446744073709551616\r\n",
        "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n",
        "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n",
        "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: gzip, chunked\r\n",
        "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: identity\r\n",
        "POST / HTTP/1.0\r\ntransfer-encoding: chunked\r\n",
        "POST / HTTP/1.1\r\nhost: a\r\ntransfer_encoding: chunked\r\n",
    ] {
        assert_refused(&format!("{lines}\r\n{GET}"), 0, true);
        assert_refused(&format!("{GET}{lines}\r\n{GET}"), GET.len(), true);
    }
}

#[test]
fn invalid_chunks_are_refused() {
    let head = "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n";
    for (good, bad) in [
        ("", "\r\n"),
        ("", "0x3\r\nabc\r\n0\r\n\r\n"),
        ("", "+3\r\nabc\r\n0\r\n\r\n"),
        ("", " 3\r\nabc\r\n0\r\n\r\n"),
        ("3", " \r\nabc\r\n0\r\n\r\n"),
        ("3", "\nabc\r\n0\r\n\r\n"),
        ("3\r", "abc\r\n0\r\n\r\n"),
        ("3\r\nabc", "\n0\r\n\r\n"),
        ("3\r\nabc", "d\r\n0\r\n\r\n"),
        ("3;a", "\nabc\r\n0\r\n\r\n"),
        ("ffffffffffffffff", "f\r\n"),
        ("0\r\n", "\n"),
        ("0\r\nx: y", "\n\r\n"),
        ("0\r\nx: y\r\n", " z\r\n\r\n"),
    ] {
        // Within one piece nothing of the refused part is passed on.
        let (out, refused) = passed(format!("{head}{good}{bad}{GET}").as_bytes(), usize::MAX);
        assert_eq!((refused, out.ends_with(GET.as_bytes())), (Some(Refused::Body), false), "{good}{bad}");
        assert_refused_after(&format!("{head}{good}"), &format!("{bad}{GET}"));
    }
}

fn assert_refused_after(good: &str, bad: &str) {
    let (out, refused) = passed(format!("{good}{bad}").as_bytes(), 1);
    let head = good.find("\r\n\r\n").unwrap() + 4;
    let bytes = out.len().max(head);
    assert!(bytes <= good.len() + 1, "{good:?} {bad:?} {bytes}");
    assert_eq!(refused, Some(Refused::Body), "{good:?} {bad:?}");
}

#[test]
fn a_head_that_is_too_large_is_left_to_hyper() {
    let wire = format!("GET / HTTP/1.1\r\nhost: a\r\nx: {}", "x".repeat(100_000));
    let (out, refused) = passed(wire.as_bytes(), 1_000);
    assert!(refused.is_none() && out.len() >= 64 * 1024, "{}", out.len());
}
