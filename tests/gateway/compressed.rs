//! Compressed answers, which the gateway did not request. The gateway passes them on unchanged and reads a decoded
//! copy.

use crate::support::*;
use compression_codecs::brotli::params::EncoderParams;
use compression_codecs::core::util::{PartialBuffer, WriteBuffer};
use compression_codecs::{BrotliEncoder, EncodeV2, ZstdEncoder};
use std::io::Write as _;

const LARGE_QUOTAS: &str =
    "{ requests: { limit: 1000, per: minute }, total_tokens: { limit: 1M, per: minute } }";
const CODINGS: [&str; 4] = ["gzip", "deflate", "br", "zstd"];

fn encoded(coding: &str, plain: &str) -> Vec<u8> {
    use flate2::{Compression, write};
    let (level, plain) = (Compression::default(), plain.as_bytes());
    match coding {
        "gzip" => {
            let mut encoder = write::GzEncoder::new(Vec::new(), level);
            encoder.write_all(plain).unwrap();
            encoder.finish().unwrap()
        }
        "deflate" => {
            let mut encoder = write::ZlibEncoder::new(Vec::new(), level);
            encoder.write_all(plain).unwrap();
            encoder.finish().unwrap()
        }
        "br" => encoded_by(&mut BrotliEncoder::new(EncoderParams::default()), plain),
        _ => encoded_by(&mut ZstdEncoder::new(3), plain),
    }
}

fn encoded_by(encoder: &mut impl EncodeV2, plain: &[u8]) -> Vec<u8> {
    let mut code = vec![0; plain.len() + 1024];
    let mut output = WriteBuffer::new_initialized(&mut code);
    encoder.encode(&mut PartialBuffer::new(plain), &mut output).unwrap();
    assert!(encoder.finish(&mut output).unwrap());
    output.written().to_vec()
}

/// An answer whose body is sent in pieces of one byte.
fn answer(status: u16, coding: &str, kind: &str, code: &[u8]) -> Answer {
    let head = format!(
        "HTTP/1.1 {status} Some\r\ncontent-type: {kind}\r\ncontent-encoding: {coding}\r\ncontent-length: {}\r\n\r\n",
        code.len()
    );
    let bytes = code.iter().map(|byte| Step::Send(vec![*byte]));
    Answer::of([Step::Send(head.into())].into_iter().chain(bytes).collect())
}

#[tokio::test]
async fn a_compressed_answer_passes_unchanged_and_is_charged_by_its_reported_usage() {
    let stream = delta("Hello") + &delta(" there") + &usage_event(20, 5) + DONE;
    for coding in CODINGS {
        for (kind, plain) in
            [("application/json", chat_answer(&usage(20, 5))), ("text/event-stream", stream.clone())]
        {
            let code = encoded(coding, &plain);
            let upstream = Upstream::always(answer(200, coding, kind, &code)).await;
            let gateway = Gateway::in_front_of(&upstream, LARGE_QUOTAS).await;
            let reply = gateway.chat(&hello(r#""stream":true"#)).await;
            assert!(reply.body == code, "{coding} {kind}: the bytes have changed");
            assert_eq!(reply.header("content-encoding"), Some(coding));
            assert_eq!(reply.header("content-length"), Some(code.len().to_string().as_str()));
            assert_eq!(gateway.settled_charges().await, [1, 20, 5, 25], "{coding} {kind}");
            assert_eq!(upstream.only().all("accept-encoding"), ["identity"]);
        }
    }
}

#[tokio::test]
async fn a_compressed_answer_without_usage_is_charged_by_its_counted_text() {
    for coding in CODINGS {
        let code = encoded(coding, &(delta("Hello") + &delta(" there") + DONE));
        let upstream = Upstream::always(answer(200, coding, "text/event-stream", &code)).await;
        let gateway = Gateway::in_front_of(&upstream, LARGE_QUOTAS).await;
        gateway.chat(&hello(r#""stream":true"#)).await;
        assert_eq!(gateway.settled_charges().await, [1, HELLO_TOKENS, 2, HELLO_TOKENS + 2], "{coding}");
        assert_eq!(gateway.usage_missing("not_reported").await, 1);
        // An error is charged as one request.
        let code = encoded(coding, r#"{"error":{"message":"no"}}"#);
        let upstream = Upstream::always(answer(500, coding, "application/json", &code)).await;
        let gateway = Gateway::in_front_of(&upstream, LARGE_QUOTAS).await;
        assert_eq!(gateway.chat(HELLO).await.status, 500);
        assert_eq!(gateway.settled_charges().await, [1, 0, 0, 0], "{coding}");
    }
}

#[tokio::test]
async fn a_compressed_stream_that_breaks_ends_without_an_error_event() {
    for coding in CODINGS {
        let events: String = (0..2_000).map(|n| delta(&(n * n).to_string())).collect();
        let mut code = encoded(coding, &events);
        let cut = code.len() * 9 / 10;
        let whole = answer(200, coding, "text/event-stream", &code);
        code.truncate(cut);
        let steps = whole.steps().into_iter().take(1 + cut).chain([Step::Cut]).collect();
        let upstream = Upstream::always(Answer::of(steps)).await;
        let gateway = Gateway::in_front_of(&upstream, LARGE_QUOTAS).await;
        let reply = gateway.chat(&hello(r#""stream":true"#)).await;
        assert!(reply.is_incomplete && reply.body == code, "{coding}");
        let [_, _, completion, _] = gateway.settled_charges().await;
        assert!((1_000..=6_000).contains(&completion), "{coding}: {completion}");
    }
}

#[tokio::test]
async fn identity_and_empty_members_of_the_list_of_codings_do_not_count() {
    let plain = chat_answer(&usage(20, 5));
    for (coding, code) in [
        ("identity, gzip", encoded("gzip", &plain)),
        ("gzip,", encoded("gzip", &plain)),
        ("", plain.clone().into()),
        ("identity, identity", plain.into()),
    ] {
        let upstream = Upstream::always(answer(200, coding, "application/json", &code)).await;
        let gateway = Gateway::in_front_of(&upstream, LARGE_QUOTAS).await;
        let reply = gateway.chat(HELLO).await;
        assert!(reply.body == code, "{coding}");
        assert_eq!(gateway.settled_charges().await, [1, 20, 5, 25], "{coding}");
    }
}

#[tokio::test]
async fn an_answer_that_cannot_be_decoded_passes_unchanged_and_is_charged_by_its_length() {
    let plain = chat_answer(&usage(20, 5));
    for (coding, code) in [
        ("gzip", b"not gzip, although its head names it".to_vec()),
        ("gzip, br", encoded("gzip", &plain)),
        ("compress", encoded("gzip", &plain)),
        ("identity\r\ncontent-encoding: compress", encoded("gzip", &plain)),
    ] {
        let upstream = Upstream::always(answer(200, coding, "application/json", &code)).await;
        let gateway = Gateway::in_front_of(&upstream, LARGE_QUOTAS).await;
        let reply = gateway.chat(HELLO).await;
        assert!(reply.body == code, "{coding}");
        let counted = code.len().div_ceil(4) as u64;
        assert_eq!(gateway.settled_charges().await[..3], [1, HELLO_TOKENS, counted], "{coding}");
        assert_eq!(gateway.usage_missing("not_readable").await, 1, "{coding}");
    }
}

#[tokio::test]
async fn a_decompression_bomb_passes_unchanged_and_quickly() {
    let bomb = encoded("zstd", &" ".repeat(256 << 20));
    let upstream = Upstream::always(Answer::of(vec![Step::Send(
        [
            format!(
                "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-encoding: zstd\r\ncontent-length: {}\r\n\r\n",
                bomb.len()
            )
            .as_bytes(),
            &bomb,
        ]
        .concat(),
    )]))
    .await;
    let gateway = Gateway::in_front_of(&upstream, LARGE_QUOTAS).await;
    let started = std::time::Instant::now();
    let reply = gateway.chat(HELLO).await;
    assert!(reply.body == bomb && started.elapsed().as_millis() < 1_000, "{:?}", started.elapsed());
    assert_eq!(gateway.usage_missing("not_readable").await, 1);
}

#[tokio::test]
async fn a_compressed_stream_that_exceeds_its_quota_is_cut_off() {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(delta("Hello").repeat(400).as_bytes()).unwrap();
    encoder.flush().unwrap();
    let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-encoding: gzip\r\ntransfer-encoding: chunked\r\n\r\n";
    let code = encoder.get_ref();
    let chunk = [format!("{:x}\r\n", code.len()).as_bytes(), code, b"\r\n"].concat();
    let upstream =
        Upstream::always(Answer::of(vec![Step::Send(head.into()), Step::Send(chunk), Step::Stall])).await;
    let environments = "  staging: { upstream: backend, reserve: { completion: 10, on_overrun: cut }, quotas: { completion_tokens: { limit: 20, per: hour } } }\ndefault_environment: staging";
    let gateway = Gateway::with(&upstream, "", environments).await;
    let reply = gateway.chat(&hello(r#""stream":true"#)).await;
    assert!(reply.is_incomplete);
    upstream.wait_until_disconnected().await;
    assert_eq!(gateway.settled_charges().await[2], 400);
}

const KEY: &str = "sk-upstream-0123456789";
const MASK: &str = "**********************";
const STAGING: &str = "  staging: { upstream: backend, quotas: { requests: { limit: 1000, per: minute } } }\ndefault_environment: staging";

async fn gateway_with_key(upstream: &Upstream) -> Gateway {
    Gateway::with(upstream, &format!("api_key: {KEY}"), STAGING).await
}

async fn masked_keys(gateway: &Gateway) -> bool {
    let count = r#"tollgate_upstream_keys_masked_total{upstream="backend"} 1"#;
    gateway.admin_get("/metrics").await.text().contains(count)
}

/// An error of this many bytes with a key at its beginning. It can hardly be compressed.
fn long_error(key: &str, bytes: u32) -> String {
    let noise = (0..bytes / 8).map(|n| format!("{:08x}", n.wrapping_mul(2_654_435_761).rotate_left(n % 32)));
    format!("Incorrect API key: {key}. {}", noise.collect::<String>())
}

#[tokio::test]
async fn a_compressed_error_that_repeats_the_upstreams_key_is_decoded_and_masked() {
    for coding in CODINGS {
        for plain in
            [format!(r#"{{"error":{{"message":"Incorrect API key: {KEY}."}}}}"#), long_error(KEY, 500_000)]
        {
            let code = encoded(coding, &plain);
            let short = answer(401, coding, "application/json", &code);
            let head = format!(
                "HTTP/1.1 401 No\r\ncontent-encoding: {coding}\r\ncontent-length: {}\r\n\r\n",
                code.len()
            );
            let in_one_piece = Answer::of(vec![Step::Send([head.as_bytes(), &code].concat())]);
            let answers = if code.len() < 1_000 { vec![short, in_one_piece] } else { vec![in_one_piece] };
            for answer in answers {
                let upstream = Upstream::always(answer).await;
                let gateway = gateway_with_key(&upstream).await;
                let reply = gateway.chat(HELLO).await;
                assert!(reply.status == 401 && !reply.is_incomplete, "{coding} {}", reply.head);
                assert!(reply.text() == plain.replace(KEY, MASK), "{coding} {:.100}", reply.text());
                assert_eq!(reply.header("content-encoding"), None, "{coding}");
                assert!(masked_keys(&gateway).await, "{coding}");
                assert_eq!(gateway.settled_charges().await[0], 1, "{coding}");
            }
        }
    }
}

#[tokio::test]
async fn a_compressed_answer_without_the_key_or_with_a_success_is_not_changed() {
    for coding in CODINGS {
        let late = " ".repeat(300_000) + KEY;
        for (status, plain) in [
            (500, r#"{"error":{"message":"no"}}"#.to_owned()),
            (500, long_error("none", 500_000)),
            (500, late),
            (200, chat_answer(&usage(20, 5)).replace("Hello there", KEY)),
        ] {
            let code = encoded(coding, &plain);
            let head = format!(
                "HTTP/1.1 {status} Some\r\ncontent-encoding: {coding}\r\ncontent-length: {}\r\n\r\n",
                code.len()
            );
            let upstream =
                Upstream::always(Answer::of(vec![Step::Send([head.as_bytes(), &code].concat())])).await;
            let gateway = gateway_with_key(&upstream).await;
            let reply = gateway.chat(HELLO).await;
            assert!(reply.status == status && reply.body == code, "{coding} {status}");
            assert_eq!(reply.header("content-encoding"), Some(coding));
            assert_eq!(reply.header("content-length"), Some(code.len().to_string().as_str()));
            assert!(!masked_keys(&gateway).await, "{coding}");
        }
    }
}

#[tokio::test]
async fn a_compressed_error_with_the_key_that_is_cut_or_expands_too_much_is_incomplete() {
    for coding in CODINGS {
        let bomb = format!("Incorrect API key: {KEY}.{}", " ".repeat(8 << 20));
        let mut cut = encoded(coding, &long_error(KEY, 500_000));
        cut.truncate(cut.len() - 100);
        for code in [cut, encoded(coding, &bomb)] {
            let head = format!(
                "HTTP/1.1 500 Some\r\ncontent-encoding: {coding}\r\ncontent-length: {}\r\n\r\n",
                code.len()
            );
            let upstream =
                Upstream::always(Answer::of(vec![Step::Send([head.as_bytes(), &code].concat())])).await;
            let gateway = gateway_with_key(&upstream).await;
            let started = std::time::Instant::now();
            let reply = gateway.chat(HELLO).await;
            assert!(
                reply.is_incomplete && started.elapsed().as_secs() < 5,
                "{coding} {:?}",
                started.elapsed()
            );
            assert!(
                reply.text().contains(MASK) && !reply.text().contains(KEY),
                "{coding} {:.100}",
                reply.text()
            );
            assert_eq!(gateway.settled_charges().await[0], 1, "{coding}");
        }
    }
}

#[tokio::test]
async fn a_compressed_error_that_arrives_slowly_is_decoded_and_masked() {
    let code = encoded("gzip", &format!("Incorrect API key: {KEY}."));
    let (first, second) = code.split_at(20);
    let head =
        format!("HTTP/1.1 500 Some\r\ncontent-encoding: gzip\r\ncontent-length: {}\r\n\r\n", code.len());
    let upstream = Upstream::always(Answer::of(vec![
        Step::Send([head.as_bytes(), first].concat()),
        Step::Wait(std::time::Duration::from_millis(5_500)),
        Step::Send(second.to_vec()),
    ]))
    .await;
    let gateway = gateway_with_key(&upstream).await;
    let reply = gateway.chat(HELLO).await;
    assert_eq!(
        (reply.text(), reply.header("content-encoding")),
        (&*format!("Incorrect API key: {MASK}."), None)
    );
    assert!(!reply.is_incomplete && masked_keys(&gateway).await);
}
