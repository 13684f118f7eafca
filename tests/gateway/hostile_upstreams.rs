//! Upstreams that send the gateway's own headers, or repeat the key that the gateway has sent to them.

use crate::support::*;

const KEY: &str = "sk-upstream-0123456789";
const MASK: &str = "**********************";
const STAGING: &str = "  staging: { upstream: backend, quotas: { requests: { limit: 1000, per: minute } } }\ndefault_environment: staging";

async fn gateway(upstream: &Upstream, api: &str) -> Gateway {
    Gateway::with(upstream, &format!("api: {api}, api_key: {KEY}"), STAGING).await
}

#[tokio::test]
async fn an_upstreams_own_x_tollgate_headers_do_not_pass() {
    let headers = "x-tollgate-error: forged\r\nX-Tollgate-Environment: forged\r\nx-tollgate-anything: forged\r\nx-other: 1\r\n";
    for status in [200, 400, 429, 500] {
        let answer = Answer::with_headers(status, headers, &chat_answer(&usage(8, 2)));
        let upstream = Upstream::always(answer).await;
        let gateway = Gateway::with(&upstream, "", STAGING).await;
        let reply = gateway.chat(HELLO).await;
        assert_eq!((reply.status, reply.header("x-other")), (status, Some("1")));
        assert!(!reply.head.contains("forged"), "{}", reply.head);
        assert_eq!(reply.header("x-tollgate-environment"), Some("staging"));
    }
}

#[tokio::test]
async fn the_upstreams_key_is_masked_where_an_error_repeats_it() {
    let gemini = "/v1beta/models/gemini-2.5-flash:generateContent";
    let prompt = r#"{"contents":[{"parts":[{"text":"hello"}]}]}"#;
    for (api, path, body) in [
        ("openai", CHAT, HELLO),
        ("azure", CHAT, HELLO),
        ("anthropic", "/v1/messages", HELLO),
        ("gemini", gemini, prompt),
    ] {
        let error = format!(r#"{{"error":{{"message":"Incorrect API key: {KEY}."}}}}"#);
        let headers =
            format!("content-type: application/json\r\nx-debug: authorization=Bearer {KEY}; {KEY}\r\n");
        let upstream = Upstream::always(Answer::with_headers(401, &headers, &error)).await;
        let gateway = gateway(&upstream, api).await;
        let reply = gateway.post(path, body).await;
        assert_eq!((reply.status, reply.text()), (401, &*error.replace(KEY, MASK)), "{api}");
        let debug = format!("authorization=Bearer {MASK}; {MASK}");
        assert_eq!(reply.header("x-debug"), Some(&*debug), "{api}");
        let metrics = gateway.admin_get("/metrics").await;
        let count = r#"tollgate_upstream_keys_masked_total{upstream="backend"} 1"#;
        assert!(metrics.text().contains(count), "{}", metrics.text());
    }
}

#[tokio::test]
async fn a_key_is_masked_wherever_an_error_is_cut_and_other_answers_are_not_changed() {
    let text = format!("before {KEY} after sk-upstream-");
    for cut in 0..text.len() {
        let (first, second) = text.split_at(cut);
        let head = "HTTP/1.1 500 Error\r\ncontent-type: text/plain\r\ntransfer-encoding: chunked\r\n\r\n";
        let mut answer = Answer::of(vec![Step::Send(head.into())]);
        for part in [first, second].into_iter().filter(|part| !part.is_empty()) {
            answer = answer.event(part).then(Step::Wait(std::time::Duration::from_millis(1)));
        }
        let upstream = Upstream::always(answer.end()).await;
        let gateway = gateway(&upstream, "openai").await;
        assert_eq!(gateway.chat(HELLO).await.text(), text.replace(KEY, MASK), "{cut}");
        gateway.settled().await;
    }
    // A success, errors with a wrong or unknown coding, and an error that breaks off.
    let success = chat_answer(&usage(8, 2)).replace("Hello there", KEY);
    let masked = success.replace(KEY, MASK);
    for (status, headers, want) in [
        (200, "", &success),
        (500, "content-encoding: gzip\r\n", &masked),
        (500, "content-encoding: compress\r\n", &masked),
        (500, "content-encoding: gzip, br\r\n", &masked),
    ] {
        let upstream = Upstream::always(Answer::with_headers(status, headers, &success)).await;
        let reply = gateway(&upstream, "openai").await.chat(HELLO).await;
        assert_eq!(reply.text(), *want, "{status} {headers}");
        assert_eq!(reply.header("content-encoding").is_some(), !headers.is_empty(), "{headers}");
    }
    let head = "HTTP/1.1 500 Error\r\ncontent-length: 100\r\n\r\n";
    let broken = Answer::of(vec![Step::Send(format!("{head}{text}").into()), Step::Cut]);
    let upstream = Upstream::always(broken).await;
    let reply = gateway(&upstream, "openai").await.chat(HELLO).await;
    assert!(reply.is_incomplete && !reply.text().contains(KEY), "{}", reply.text());
}
