//! Where callers send their keys, and how a key of the gateway is kept from upstreams.

use crate::support::*;

const WEB_KEY: &str = "key-of-the-web-app-1";
const BATCH_KEY: &str = "key-of-the-batch-job-1";
const SANDBOX_KEY: &str = "key+of=the&sandbox;1";

async fn gateway(upstream: &Upstream) -> Gateway {
    let environments = format!(
        "  production:\n    upstream: backend\n    keys: [{{ name: web, secret: {WEB_KEY} }}, {{ name: batch, secret: {BATCH_KEY} }}]\n  \
         sandbox:\n    upstream: backend\n    keys: [{{ name: box, secret: '{SANDBOX_KEY}' }}]\n  \
         open: {{ upstream: backend, other_paths: forward }}\ndefault_environment: open"
    );
    Gateway::with(upstream, "", &environments).await
}

fn bearer(key: &str) -> String {
    format!("authorization: Bearer {key}\r\n")
}

#[tokio::test]
async fn two_authorization_headers_are_refused_whatever_they_hold() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let gateway = gateway(&upstream).await;
    for (one, other) in [
        (bearer(WEB_KEY), bearer(WEB_KEY)),
        (bearer(WEB_KEY), bearer("mine")),
        (bearer("mine"), bearer("mine")),
        (bearer(WEB_KEY), "Authorization: \r\n".to_owned()),
        ("authorization: \r\n".to_owned(), "AUTHORIZATION: Basic eDp5\r\n".to_owned()),
    ] {
        for path in ["/production/v1/chat/completions", "/open/v1/chat/completions", CHAT] {
            let reply = gateway.send("POST", path, &format!("{one}x-a: 1\r\n{other}"), HELLO).await;
            assert_eq!(reply.refusal(), (400, "bad_request".into()), "{path} {one}{other}");
        }
    }
    assert!(upstream.seen().is_empty());
}

#[tokio::test]
async fn a_key_without_bearer_gets_an_error_that_says_so() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let gateway = gateway(&upstream).await;
    for value in [WEB_KEY.to_owned(), format!("Token {WEB_KEY}"), format!("Basic {BATCH_KEY}")] {
        let headers = format!("authorization: {value}\r\n");
        let reply = gateway.send("POST", "/production/v1/chat/completions", &headers, HELLO).await;
        assert_eq!(reply.refusal(), (401, "invalid_api_key".into()), "{value}");
        assert!(reply.text().contains("no 'Bearer ' before the key"), "{value}: {}", reply.text());
    }
    // Without an environment in the path, the key would have selected it.
    let reply = gateway.send("POST", CHAT, &format!("authorization: {WEB_KEY}\r\n"), HELLO).await;
    assert_eq!(reply.refusal(), (403, "wrong_environment".into()));
    assert!(reply.text().contains("no 'Bearer ' before the key"), "{}", reply.text());
    for headers in ["", "authorization: Bearer\r\n"] {
        let reply = gateway.send("POST", "/production/v1/chat/completions", headers, HELLO).await;
        assert!(reply.text().contains("The request has no API key"), "{headers}: {}", reply.text());
    }
    assert!(upstream.seen().is_empty());
}

#[tokio::test]
async fn keys_that_gateway_and_upstream_could_read_differently_are_refused() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let gateway = gateway(&upstream).await;
    for headers in [
        format!("x-api-key: {WEB_KEY}\r\nx-api-key: mine\r\n"),
        format!("api-key: mine\r\napi-key: {WEB_KEY}\r\n"),
        format!("x-goog-api-key: {WEB_KEY}\r\nx-goog-api-key: {BATCH_KEY}\r\n"),
        // Two callers of one environment.
        format!("{}x-api-key: {BATCH_KEY}\r\n", bearer(WEB_KEY)),
    ] {
        let reply = gateway.send("POST", "/production/v1/chat/completions", &headers, HELLO).await;
        assert_eq!(reply.refusal(), (400, "bad_request".into()), "{headers}");
    }
    assert!(upstream.seen().is_empty());
    let same = format!("{}x-api-key: {WEB_KEY}\r\nx-api-key: {WEB_KEY}\r\n", bearer(WEB_KEY));
    assert_eq!(gateway.send("POST", CHAT, &same, HELLO).await.status, 200);
}

#[tokio::test]
async fn a_key_of_another_environment_in_the_query_is_refused_under_every_name() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let gateway = gateway(&upstream).await;
    for query in [
        format!("key={WEB_KEY}"),
        format!("Key={WEB_KEY}"),
        format!("%4bey={WEB_KEY}"),
        format!("api_key={WEB_KEY}&alt=sse"),
        format!("x=1;key={WEB_KEY}"),
        format!("key={WEB_KEY}%20"),
        format!("key={WEB_KEY}+"),
        "key=%6bey-of-the-web-app-1".to_owned(),
        WEB_KEY.to_owned(),
        format!("authorization=Bearer%20{WEB_KEY}"),
        "key=key%2Bof%3Dthe%26sandbox%3B1".to_owned(),
        "x=key+of=the%26sandbox;1".to_owned(),
    ] {
        for (path, headers) in [(CHAT, ""), ("/open/v1/chat/completions", ""), ("/open/v1/batches", "")] {
            let reply = gateway.send("POST", &format!("{path}?{query}"), headers, HELLO).await;
            assert_eq!(reply.refusal(), (403, "wrong_environment".into()), "{path} {query}");
        }
        let other = if query.contains("sandbox") { bearer(WEB_KEY) } else { bearer(SANDBOX_KEY) };
        let reply = gateway.send("POST", &format!("{CHAT}?{query}"), &other, HELLO).await;
        assert_eq!(reply.refusal(), (403, "wrong_environment".into()), "{query}");
    }
    assert!(upstream.seen().is_empty());
}

#[tokio::test]
async fn the_callers_own_key_in_the_query_is_removed_and_grants_no_access() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let gateway = gateway(&upstream).await;
    for (query, forwarded) in [
        (format!("key={WEB_KEY}"), String::new()),
        (format!("a=1&Key={WEB_KEY}%20&b=%32"), "?a=1&b=%32".to_owned()),
        (format!("{}api_key={WEB_KEY}", "key=a&".repeat(9)), format!("?{}", ["key=a"; 9].join("&"))),
        (BATCH_KEY.to_owned(), String::new()),
    ] {
        let path = format!("/production{CHAT}?{query}");
        assert_eq!(gateway.send("POST", &path, &bearer(WEB_KEY), HELLO).await.status, 200, "{query}");
        assert_eq!(upstream.seen().pop().unwrap().target(), format!("{CHAT}{forwarded}"), "{query}");
        assert_eq!(gateway.post(&path, HELLO).await.refusal(), (401, "invalid_api_key".into()), "{query}");
    }
}

#[tokio::test]
async fn a_query_that_cannot_be_searched_is_refused() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let gateway = gateway(&upstream).await;
    let query: Vec<_> = (0..400).map(|n| format!("p{n}={n}&")).collect();
    let reply = gateway.post(&format!("/open/v1/batches?{}key={WEB_KEY}", query.concat()), HELLO).await;
    assert_eq!(reply.refusal(), (400, "bad_request".into()));
    assert!(upstream.seen().is_empty());
}

#[tokio::test]
async fn a_401_names_the_header_of_the_paths_sdk() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let gateway = gateway(&upstream).await;
    for (path, header) in [
        ("/v1/chat/completions", "'Authorization: Bearer <key>'"),
        ("/v1/responses", "'Authorization: Bearer <key>'"),
        ("/v1/messages", "'x-api-key: <key>'"),
        ("/messages/count_tokens", "'x-api-key: <key>'"),
        ("/v1beta/models/gemini-2.5-pro:generateContent", "'x-goog-api-key: <key>'"),
        ("/models/gemini-2.5-pro:countTokens", "'x-goog-api-key: <key>'"),
        ("/openai/deployments/d/chat/completions", "'api-key: <key>'"),
    ] {
        for key in ["", "x-api-key: unknown\r\n"] {
            let reply = gateway.send("POST", &format!("/production{path}"), key, HELLO).await;
            assert_eq!(reply.status, 401, "{path}");
            let message = reply.json()["error"]["message"].as_str().unwrap().to_owned();
            assert!(message.contains(header), "{path}: {message}");
        }
    }
}
