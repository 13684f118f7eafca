//! Answers whose label does not name their format. The first bytes of the body decide.

use crate::support::*;
use flate2::{Compression, write::GzEncoder};
use std::io::Write as _;

const QUOTAS: &str = "{ requests: { limit: 1000, per: minute }, total_tokens: { limit: 1M, per: minute } }";
/// Header lines with a label, or without one.
const LABELS: [&str; 5] = [
    "",
    "content-type: text/plain; charset=utf-8\r\n",
    "content-type: application/json\r\n",
    "content-type: application/octet-stream\r\n",
    "content-type: text/event-stream\r\n",
];

const RESPONSES: &str = r#"{"model":"gpt-4o","input":"hello","stream":true}"#;

fn responses_stream() -> String {
    [
        r#"{"type":"response.output_text.delta","sequence_number":0,"delta":"Hi"}"#,
        r#"{"type":"response.completed","sequence_number":1,"response":{"usage":{"input_tokens":11,"output_tokens":5}}}"#,
    ]
    .map(|data| format!("event: x\ndata: {data}\n\n"))
    .concat()
}

#[tokio::test]
async fn the_usage_of_a_stream_is_read_and_withheld_under_any_label() {
    let events = [delta("Hi"), usage_event(11, 5), DONE.to_owned()];
    for label in LABELS {
        for start in ["", "\u{feff}", "\n\r\n", ": ping\n\n", "id: 1\n", "retry: 5\n", "event: x\n"] {
            let all = format!("{start}{}", events.concat());
            let withheld = format!("{start}{}{DONE}", events[0]);
            for framing in [Framing::Chunks, Framing::UntilClosed, Framing::Length] {
                for cuts in [vec![], (0..24).collect()] {
                    let answer = framed(200, label, all.as_bytes(), framing, cuts);
                    let upstream = Upstream::always(answer).await;
                    let gateway = Gateway::in_front_of(&upstream, QUOTAS).await;
                    let reply = gateway.chat(&hello(r#""stream":true"#)).await;
                    assert_eq!(reply.text(), withheld, "{label:?} {start:?} {framing:?}");
                    assert!(!reply.is_incomplete);
                    let asked = hello(r#""stream":true,"stream_options":{"include_usage":true}"#);
                    assert_eq!(gateway.chat(&asked).await.text(), all, "{label:?} {start:?} {framing:?}");
                    assert_eq!(gateway.settled_charges().await, [2, 22, 10, 32], "{label:?} {start:?}");
                }
            }
        }
    }
}

#[tokio::test]
async fn usage_of_other_streams_and_of_documents_is_read_under_any_label() {
    let document = format!(" \n{}", chat_answer(&usage(11, 5)));
    let compress = |text: &str| {
        let mut gzip = GzEncoder::new(Vec::new(), Compression::default());
        gzip.write_all(text.as_bytes()).unwrap();
        gzip.finish().unwrap()
    };
    for label in LABELS {
        for (path, body, text) in [
            ("/v1/responses", RESPONSES, responses_stream()),
            (CHAT, HELLO, document.clone()),
            (CHAT, &hello(r#""stream":true"#), document.clone()),
            (CHAT, HELLO, delta("Hi") + &usage_event(11, 5) + DONE),
        ] {
            let plain = framed(200, label, text.as_bytes(), Framing::Length, (0..24).collect());
            let code = compress(&text);
            let headers = format!("{label}content-encoding: gzip\r\n");
            let coded = framed(200, &headers, &code, Framing::Length, (0..60).collect());
            for (answer, bytes) in [(plain, text.as_bytes()), (coded, &code)] {
                let upstream = Upstream::always(answer).await;
                let gateway = Gateway::in_front_of(&upstream, QUOTAS).await;
                let reply = gateway.post(path, body).await;
                assert_eq!(reply.body, bytes, "{label:?} {path}");
                assert_eq!(gateway.settled_charges().await, [1, 11, 5, 16], "{label:?} {path}");
            }
        }
    }
}

#[tokio::test]
async fn bytes_before_the_format_is_known_pass_at_once() {
    for (label, fields) in
        [("", ""), ("content-type: text/plain\r\n", r#","stream_options":{"include_usage":true}"#)]
    {
        let head = format!("HTTP/1.1 200 OK\r\n{label}transfer-encoding: chunked\r\n\r\n");
        let pieces = ["\n", " \r\n"];
        let answer = Answer::of(vec![Step::Send(head.into())]);
        let answer = pieces.iter().fold(answer, |answer, piece| answer.event(piece).then(Step::Gate));
        let upstream = Upstream::always(answer.event(&delta("Hi")).event(DONE).end()).await;
        let gateway = Gateway::in_front_of(&upstream, QUOTAS).await;
        let mut caller = gateway.caller().await;
        caller.request("POST", CHAT, "", hello(&format!(r#""stream":true{fields}"#)).as_bytes()).await;
        caller.head().await;
        for piece in pieces {
            assert_eq!(caller.chunk().await.unwrap(), piece.as_bytes());
            upstream.open_gate();
        }
        let mut rest = Vec::new();
        while let Some(chunk) = caller.chunk().await.filter(|chunk| !chunk.is_empty()) {
            rest.extend(chunk);
        }
        assert_eq!(rest, (delta("Hi") + DONE).as_bytes());
    }
}

#[tokio::test]
async fn an_unlabelled_stream_that_breaks_ends_with_an_error_event() {
    let head = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n";
    let answer = Answer::of(vec![Step::Send(head.into())]).event(&delta("Hi")).then(Step::Cut);
    let upstream = Upstream::always(answer).await;
    let gateway = Gateway::in_front_of(&upstream, QUOTAS).await;
    let reply = gateway.chat(&hello(r#""stream":true"#)).await;
    assert!(reply.text().contains("upstream_disconnected") && !reply.is_incomplete, "{}", reply.text());
    // A stream of a declared length gets no event, and its caller sees that it is incomplete.
    let text = responses_stream();
    let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{}", text.len(), &text[..90]);
    let upstream = Upstream::always(Answer::of(vec![Step::Send(head.into()), Step::Cut])).await;
    let gateway = Gateway::in_front_of(&upstream, QUOTAS).await;
    let reply = gateway.post("/v1/responses", RESPONSES).await;
    assert_eq!((reply.text(), reply.is_incomplete), (&text[..90], true));
}

#[tokio::test]
async fn a_stored_file_is_not_read_as_an_answer() {
    let file = format!("{}\n", chat_answer(&usage(11, 5)));
    let upstream =
        Upstream::always(Answer::with_headers(200, &of_type("application/octet-stream"), &file)).await;
    let environments = "  staging: { upstream: backend, other_paths: forward, quotas: { requests: { limit: 9, per: minute } } }\ndefault_environment: staging";
    let gateway = Gateway::with(&upstream, "", environments).await;
    assert_eq!(gateway.send("GET", "/v1/files/f/content", "", "").await.text(), file);
    assert_eq!(gateway.settled_charges().await, [1, 0, 0, 0]);
}

#[tokio::test]
async fn a_prompt_is_used_as_soon_as_an_unlabelled_stream_begins() {
    let head = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n";
    let answer = Answer::of(vec![Step::Send(head.into())]).event(&delta("Hi")).then(Step::Gate).end();
    let upstream = Upstream::always(answer).await;
    let quotas = "{ total_tokens: { limit: 10000, per: day, window: calendar } }";
    let gateway = Gateway::in_front_of(&upstream, quotas).await;
    let mut caller = gateway.caller().await;
    caller.request("POST", CHAT, "", hello(r#""stream":true"#).as_bytes()).await;
    caller.head().await;
    caller.chunk().await.unwrap();
    let used = gateway.environment().await["quotas"][0]["used"].as_u64().unwrap();
    assert!(used >= HELLO_TOKENS, "{used}");
    upstream.open_gate();
    while !caller.chunk().await.unwrap().is_empty() {}
}
