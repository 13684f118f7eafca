//! Requests and answers pass through unchanged and without delay.

use crate::support::*;
use proptest::prelude::*;
use std::time::{Duration, Instant};

const LARGE_QUOTAS: &str = "{ requests: { limit: 1000000, per: minute } }";

#[tokio::test]
async fn the_request_body_is_forwarded_byte_for_byte() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let gateway = Gateway::in_front_of(&upstream, LARGE_QUOTAS).await;
    let body = "{ \"zz\" : [1.50, 1e2, \"\\u00e9é\"],\n\t\"messages\":[{\"content\":\"hello\",\"x\":null,\"role\":\"user\"}], \"model\":\"gpt-4o\" ,\"seed\":7}";
    gateway.chat(body).await;
    assert_eq!(upstream.only().text(), body);
    assert_eq!(upstream.only().target(), CHAT);
}

#[tokio::test]
async fn only_stream_options_are_added_to_a_streaming_request() {
    for (body, forwarded) in [
        (hello(r#""stream":true"#), hello(r#""stream_options":{"include_usage":true},"stream":true"#)),
        (
            hello(r#""stream":true,"stream_options":{"include_usage":false}"#),
            hello(r#""stream":true,"stream_options":{"include_usage":true}"#),
        ),
        (
            hello(r#""stream":true,"stream_options":{"include_usage":true}"#),
            hello(r#""stream":true,"stream_options":{"include_usage":true}"#),
        ),
        (hello(r#""stream":false"#), hello(r#""stream":false"#)),
    ] {
        let upstream = Upstream::always(Answer::chat(8, 2)).await;
        let gateway = Gateway::in_front_of(&upstream, LARGE_QUOTAS).await;
        gateway.chat(&body).await;
        assert_eq!(upstream.only().text(), forwarded);
    }
}

#[tokio::test]
async fn stream_usage_never_adds_no_stream_options() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let environments = "  staging: { upstream: backend, quotas: { requests: { limit: 9, per: minute } } }\ndefault_environment: staging";
    let gateway = Gateway::with(&upstream, "stream_usage: never", environments).await;
    gateway.chat(&hello(r#""stream":true"#)).await;
    assert_eq!(upstream.only().text(), hello(r#""stream":true"#));
}

#[tokio::test]
async fn only_the_usage_chunk_is_withheld() {
    let finish = "data: {\"choices\":[{\"index\":0,\"delta\":{},\"finish_reason\":\"stop\"}],\"usage\":{\"prompt_tokens\":1,\"completion_tokens\":1}}\n\n";
    let events =
        [": ping\n\n".to_owned(), delta("Hi"), finish.to_owned(), usage_event(8, 2), DONE.to_owned()];
    let without = [&events[..3], &events[4..]].concat().concat();
    let whole = Answer::stream().events(&events).end();
    let at_once = Answer::stream().event(&events.concat()).end();
    let bytes = events
        .concat()
        .bytes()
        .fold(Answer::stream(), |a, b| a.event(std::str::from_utf8(&[b]).unwrap()))
        .end();
    for answer in [whole, at_once, bytes] {
        let upstream = Upstream::always(answer).await;
        let gateway = Gateway::in_front_of(&upstream, LARGE_QUOTAS).await;
        let reply = gateway.chat(&hello(r#""stream":true"#)).await;
        assert_eq!(reply.text(), without);
        let reply = gateway.chat(&hello(r#""stream":true,"stream_options":{"include_usage":true}"#)).await;
        assert_eq!(reply.text(), events.concat());
        assert_eq!(gateway.settled_charges().await, [2, 16, 4, 20]);
    }
}

#[tokio::test]
async fn the_first_event_is_passed_on_within_five_milliseconds() {
    let upstream =
        Upstream::always(Answer::stream().then(Step::Gate).event(&delta("Hi")).then(Step::Gate).end()).await;
    let gateway = Gateway::in_front_of(&upstream, LARGE_QUOTAS).await;
    let mut took = Vec::new();
    for _ in 0..11 {
        let mut caller = gateway.caller().await;
        caller.request("POST", CHAT, "", hello(r#""stream":true"#).as_bytes()).await;
        // The head must arrive before any event, and the event while the upstream holds back the rest.
        caller.head().await;
        let started = Instant::now();
        upstream.open_gate();
        assert_eq!(caller.chunk().await.unwrap(), delta("Hi").into_bytes());
        took.push(started.elapsed());
        upstream.open_gate();
        assert_eq!(caller.chunk().await, Some(vec![]));
    }
    took.sort();
    assert!(took[5] < Duration::from_millis(5), "{took:?}");
}

#[tokio::test]
async fn hop_by_hop_headers_keys_cookies_and_forwarding_headers_are_not_forwarded() {
    let answer = Answer::with_headers(
        200,
        "content-type: application/json\r\nconnection: keep-alive, x-hop\r\nx-hop: 1\r\nkeep-alive: timeout=5\r\nx-own: kept\r\nset-cookie: a=1\r\nset-cookie: b=2\r\n",
        &chat_answer(&usage(8, 2)),
    );
    let upstream = Upstream::always(answer).await;
    let environments = "  staging: { upstream: backend, quotas: { requests: { limit: 9, per: minute } } }\ndefault_environment: staging";
    let settings = "api_key: sk-of-the-upstream, headers: { x-team: platform, x-both: ours }";
    let gateway = Gateway::with(&upstream, settings, environments).await;
    let headers = "authorization: Bearer callers-own\r\napi-key: callers-own\r\nx-api-key: callers-own\r\nx-goog-api-key: callers-own\r\n\
        connection: x-named, authorization\r\nx-named: 1\r\ncookie: c=1\r\nforwarded: for=1\r\nx-forwarded-for: 1.2.3.4\r\nx-forwarded-host: evil\r\n\
        te: trailers\r\nupgrade: h2c\r\naccept-encoding: gzip\r\nx-both: callers\r\nx-kept: a\r\nx-kept: b\r\nuser-agent: sdk\r\n";
    let reply = gateway.send("POST", CHAT, headers, HELLO).await;
    let seen = upstream.only();
    for dropped in [
        "api-key",
        "x-api-key",
        "x-goog-api-key",
        "x-named",
        "cookie",
        "forwarded",
        "x-forwarded-for",
        "x-forwarded-host",
        "te",
        "upgrade",
        "connection",
    ] {
        assert_eq!(seen.header(dropped), None, "{dropped}");
    }
    for (name, values) in [
        ("authorization", vec!["Bearer sk-of-the-upstream"]),
        ("x-team", vec!["platform"]),
        ("x-both", vec!["ours"]),
        ("x-kept", vec!["a", "b"]),
        ("user-agent", vec!["sdk"]),
        ("accept-encoding", vec!["identity"]),
        ("host", vec![&*upstream.address.to_string()]),
        ("content-length", vec![&*HELLO.len().to_string()]),
    ] {
        assert_eq!(seen.all(name), values, "{name}");
    }
    for dropped in ["x-hop", "keep-alive", "connection"] {
        assert_eq!(reply.header(dropped), None, "{dropped}");
    }
    assert_eq!(reply.header("x-own"), Some("kept"));
    assert_eq!(reply.head.matches("set-cookie").count(), 2);
}

#[tokio::test]
async fn an_azure_upstream_receives_its_key_in_the_api_key_header() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let gateway = Gateway::from_config(&format!(
        "server: {{ listen: '127.0.0.1:0' }}\nadmin: {{ listen: '127.0.0.1:0' }}\nupstreams: {{ azure: {{ base_url: 'http://{}/openai', api: azure, api_key: azure-key }} }}\n\
         environments: {{ staging: {{ upstream: azure, models: ['my-gpt*'] }} }}\ndefault_environment: staging\nstore: {{ memory: true }}",
        upstream.address
    ))
    .await;
    let reply =
        gateway.post("/openai/deployments/my-gpt4/chat/completions?api-version=2024-10-21", HELLO).await;
    assert_eq!(reply.status, 200);
    let seen = upstream.only();
    assert_eq!(seen.target(), "/openai/deployments/my-gpt4/chat/completions?api-version=2024-10-21");
    assert_eq!((seen.header("api-key"), seen.header("authorization")), (Some("azure-key"), None));
    // The deployment in the path is the model, not the model in the body.
    let other =
        gateway.post("/openai/deployments/other/chat/completions", &HELLO.replace("gpt-4o", "my-gpt")).await;
    assert_eq!(other.refusal(), (404, "model_not_found".into()));
}

#[tokio::test]
async fn a_redirect_is_passed_on_and_not_followed() {
    let trap = Upstream::always(Answer::chat(1, 1)).await;
    let answer = Answer::with_headers(307, &format!("location: http://{}/v1\r\n", trap.address), "");
    let upstream = Upstream::always(answer).await;
    let gateway = Gateway::in_front_of(&upstream, LARGE_QUOTAS).await;
    let body = hello(&format!(r#""api_base":"http://{0}","base_url":"http://{0}""#, trap.address));
    let reply = gateway.send("POST", CHAT, &format!("x-upstream-host: {}\r\n", trap.address), &body).await;
    assert_eq!(reply.status, 307);
    assert!(trap.seen().is_empty());
}

#[tokio::test]
async fn a_kept_alive_connection_serves_json_and_streams_in_turn() {
    let upstream = Upstream::answering(|seen| {
        let answer = Answer::stream().events(&[delta("a"), usage_event(1, 1), DONE.to_owned()]).end();
        if seen.text().contains("stream") { answer } else { Answer::chat(8, 2) }
    })
    .await;
    let gateway = Gateway::in_front_of(&upstream, LARGE_QUOTAS).await;
    let mut caller = gateway.caller().await;
    for n in 0..20 {
        let body = if n % 2 == 0 { HELLO.to_owned() } else { hello(r#""stream":true"#) };
        caller.request("POST", CHAT, "", body.as_bytes()).await;
        let reply = caller.reply().await;
        assert!(reply.status == 200 && !reply.is_incomplete);
    }
    assert_eq!(gateway.settled_charges().await[0], 20);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]
    #[test]
    fn the_answer_passes_byte_for_byte_in_every_framing_and_split(
        body in prop_oneof![
            prop::collection::vec(any::<u8>(), 0..2000),
            "(data: [ -~]{0,40}\n{1,2}|: c\n\n|event: e\r\n|data: \\{\"choices\":\\[\\],\"usage\":\\{\"prompt_tokens\":1\\}\\}\n\n|\r){0,30}".prop_map(String::into_bytes),
        ],
        kind in prop_oneof![Just("application/json"), Just("text/event-stream"), Just("application/octet-stream")],
        framing in prop_oneof![Just(Framing::Length), Just(Framing::Chunks), Just(Framing::UntilClosed)],
        cuts in prop::collection::vec(0usize..3000, 0..20),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let got = runtime.block_on(async {
            let upstream = Upstream::always(framed(200, &of_type(kind), &body, framing, cuts)).await;
            let gateway = shared_gateway(&upstream).await;
            let reply = gateway.chat(&hello(r#""stream":true,"stream_options":{"include_usage":true}"#)).await;
            gateway.settled().await;
            (reply.body, reply.is_incomplete)
        });
        prop_assert_eq!(got, (body, false));
    }
}

async fn shared_gateway(upstream: &Upstream) -> Gateway {
    Gateway::in_front_of(upstream, LARGE_QUOTAS).await
}
