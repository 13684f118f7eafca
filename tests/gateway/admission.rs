//! Shadow mode, clamping, the wait queue, learned allowances, overruns, draining and the flood guard.

use crate::support::*;
use serde_json::Value;
use std::time::{Duration, Instant};

/// A gateway with one open environment, these quotas, this `reserve`, and more settings of the environment.
async fn gateway(upstream: &Upstream, quotas: &str, reserve: &str, more: &str) -> Gateway {
    let environments = format!(
        "  staging: {{ upstream: backend, quotas: {quotas}, reserve: {reserve} {more} }}\ndefault_environment: staging"
    );
    Gateway::with(upstream, "", &environments).await
}

async fn level_and_held(gateway: &Gateway) -> (i64, u64) {
    let quota = gateway.environment().await["quotas"][0].clone();
    (quota["level"].as_i64().unwrap(), quota["held"].as_u64().unwrap())
}

/// Reads this many events of a stream, in any number of chunks.
async fn read_events(caller: &mut Caller, events: usize) {
    let mut text = String::new();
    while text.matches("\n\n").count() < events {
        text += std::str::from_utf8(&caller.chunk().await.unwrap()).unwrap();
    }
}

/// An upstream that answers each chat when the gate is opened for it.
async fn gated_upstream(prompt: u64, completion: u64) -> Upstream {
    let answer = Answer::chat(prompt, completion);
    Upstream::always(Answer::of([vec![Step::Gate], answer.steps()].concat())).await
}

#[tokio::test]
async fn shadow_mode_admits_and_counts_would_be_denials() {
    let upstream = Upstream::always(Answer::chat(8, 92)).await;
    let quotas = "{ total_tokens: { limit: 150, per: hour } }";
    let gateway = gateway(&upstream, quotas, "{ completion: max_tokens }", ", enforce: false").await;
    for _ in 0..3 {
        assert_eq!(gateway.chat(&hello(r#""max_tokens":100"#)).await.status, 200);
    }
    let environment = gateway.settled().await;
    assert_eq!(
        (&environment["totals"]["rejected"], &environment["totals"]["requests"]),
        (&0.into(), &3.into())
    );
    assert_eq!(level_and_held(&gateway).await, (-150, 0));
    let metrics = gateway.admin_get("/metrics").await.text().to_owned();
    let labels = r#"{code="rate_limit_exceeded",environment="staging",kind="total_tokens",per="hour",scope="environment"}"#;
    assert!(metrics.contains(&format!("tollgate_shadow_rejections_total{labels} 2")), "{metrics}");
    assert!(metrics.contains(&format!("tollgate_rejections_total{labels} 0")), "{metrics}");
}

#[tokio::test]
async fn a_request_that_is_short_of_room_is_clamped_and_otherwise_unchanged() {
    let upstream = Upstream::always(Answer::chat(8, 1)).await;
    for (fields, model, forwarded, clamped_to) in [
        (r#""max_tokens": 500 ,"x":1e2"#, "gpt-4o", r#""max_tokens": 92 ,"x":1e2"#, "92"),
        (
            r#""max_tokens":500,"max_completion_tokens":400"#,
            "gpt-4o",
            r#""max_tokens":92,"max_completion_tokens":92"#,
            "92",
        ),
        (
            r#""max_tokens":500,"max_completion_tokens":20"#,
            "gpt-4o",
            r#""max_tokens":92,"max_completion_tokens":20"#,
            "92",
        ),
        (r#""user":"u""#, "gpt-4o", r#""max_tokens":92,"user":"u""#, "92"),
        // The same prompt is one token shorter for a reasoning model.
        (r#""user":"u""#, "o3-mini", r#""max_completion_tokens":93,"user":"u""#, "93"),
        // Null is the same as absent. A reasoning model accepts no number in `max_tokens`.
        (r#""max_tokens":null"#, "gpt-4o", r#""max_tokens":92"#, "92"),
        (r#""max_tokens":null"#, "o3-mini", r#""max_completion_tokens":93,"max_tokens":null"#, "93"),
        (r#""max_completion_tokens":null"#, "o3-mini", r#""max_completion_tokens":93"#, "93"),
        (
            r#""max_tokens":null,"max_completion_tokens":400"#,
            "o3-mini",
            r#""max_tokens":null,"max_completion_tokens":93"#,
            "93",
        ),
        (r#""n":2,"max_tokens":500"#, "gpt-4o", r#""n":2,"max_tokens":46"#, "46"),
    ] {
        let quotas = "{ total_tokens: { limit: 100, per: hour } }";
        let reserve = "{ completion: max_tokens, when_short: clamp }";
        let gateway = gateway(&upstream, quotas, reserve, "").await;
        let reply = gateway.chat(&hello(fields).replace("gpt-4o", model)).await;
        assert_eq!(
            (reply.status, reply.header("x-tollgate-clamped-max-tokens")),
            (200, Some(clamped_to)),
            "{fields}"
        );
        let seen = upstream.seen().pop().unwrap();
        assert_eq!(seen.text(), hello(forwarded).replace("gpt-4o", model));
    }
}

#[tokio::test]
async fn a_request_that_fits_is_not_clamped_and_one_without_any_room_is_denied() {
    let upstream = Upstream::always(Answer::chat(8, 92)).await;
    let quotas = "{ total_tokens: { limit: 100, per: hour } }";
    let gateway = gateway(&upstream, quotas, "{ completion: max_tokens, when_short: clamp }", "").await;
    let fits = gateway.chat(&hello(r#""max_tokens":92"#)).await;
    assert_eq!((fits.status, fits.header("x-tollgate-clamped-max-tokens")), (200, None));
    let refused = gateway.chat(&hello(r#""max_tokens":92"#)).await;
    assert_eq!(refused.refusal(), (429, "rate_limit_exceeded".into()));
    let long = HELLO.replace("hello", &"hello ".repeat(200));
    assert_eq!(gateway.chat(&long).await.refusal(), (400, "request_exceeds_quota".into()));
    assert_eq!(upstream.seen().len(), 1);
}

const ROOM_FOR_ONE: &str = "{ total_tokens: { limit: 150, per: day, window: calendar } }";
const WAITS: &str = "{ completion: max_tokens, max_wait: 30s }";

#[tokio::test]
async fn the_wait_queue_is_served_in_the_order_of_arrival() {
    let upstream = gated_upstream(8, 1).await;
    let gateway = gateway(&upstream, ROOM_FOR_ONE, WAITS, "").await;
    let mut callers = Vec::new();
    for n in 0..4 {
        let mut caller = gateway.caller().await;
        let body = hello(&format!(r#""user":"{n}","max_tokens":100"#));
        caller.request("POST", CHAT, "", body.as_bytes()).await;
        callers.push(caller);
        // Lets the request enter the wait queue before the next one is sent; with Redis that takes a round trip.
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(upstream.seen().len(), 1, "the others wait in the queue");
    for caller in &mut callers {
        upstream.open_gate();
        assert_eq!(caller.reply().await.status, 200);
    }
    let order: Vec<String> = upstream.seen().iter().map(|seen| seen.text()[9..10].to_owned()).collect();
    assert_eq!(order, ["0", "1", "2", "3"]);
    assert_eq!(gateway.settled().await["totals"]["rejected"], 0);
}

#[tokio::test]
async fn a_caller_that_hangs_up_leaves_the_wait_queue() {
    let upstream = gated_upstream(8, 1).await;
    let gateway = gateway(&upstream, ROOM_FOR_ONE, WAITS, "").await;
    let body = hello(r#""max_tokens":100"#);
    let mut callers = Vec::new();
    for _ in 0..3 {
        let mut caller = gateway.caller().await;
        caller.request("POST", CHAT, "", body.as_bytes()).await;
        callers.push(caller);
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
    drop(callers.remove(1));
    upstream.open_gate();
    assert_eq!(callers[0].reply().await.status, 200);
    upstream.open_gate();
    assert_eq!(callers[1].reply().await.status, 200);
    assert_eq!(upstream.seen().len(), 2, "the request whose caller disconnected was not forwarded");
    gateway.settled().await;
}

#[tokio::test]
async fn a_request_without_room_is_denied_after_max_wait_and_not_sooner() {
    let upstream = gated_upstream(8, 1).await;
    let gateway = gateway(&upstream, ROOM_FOR_ONE, "{ completion: max_tokens, max_wait: 300ms }", "").await;
    let body = hello(r#""max_tokens":100"#);
    let mut first = gateway.caller().await;
    first.request("POST", CHAT, "", body.as_bytes()).await;
    upstream.wait_until_seen(1).await;
    let began = Instant::now();
    assert_eq!(gateway.chat(&body).await.refusal().0, 429);
    let waited = began.elapsed();
    assert!(waited >= Duration::from_millis(300) && waited < Duration::from_secs(2), "{waited:?}");
    upstream.open_gate();
    assert_eq!(first.reply().await.status, 200);
    assert_eq!(gateway.settled().await["totals"]["rejected"], 1);
}

#[tokio::test]
async fn a_request_that_cannot_fit_within_max_wait_is_denied_at_once() {
    let upstream = Upstream::always(Answer::chat(8, 142)).await;
    let gateway = gateway(&upstream, ROOM_FOR_ONE, "{ completion: max_tokens, max_wait: 5s }", "").await;
    let began = Instant::now();
    let never = gateway.chat(&hello(r#""max_tokens":1000"#)).await;
    assert_eq!(never.refusal(), (400, "request_exceeds_quota".into()));
    assert_eq!(gateway.chat(&hello(r#""max_tokens":142"#)).await.status, 200);
    // The quota is spent, and the day ends later than `max_wait`.
    assert_eq!(gateway.chat(&hello(r#""max_tokens":100"#)).await.refusal().0, 429);
    assert!(began.elapsed() < Duration::from_secs(3));
}

#[tokio::test]
async fn the_adaptive_allowance_is_learned_from_answers() {
    let upstream = Upstream::always(Answer::chat(8, 20)).await;
    let quotas = "{ total_tokens: { limit: 1M, per: hour } }";
    let gateway = gateway(&upstream, quotas, "{ completion: adaptive }", "").await;
    let remaining =
        |reply: &Reply| reply.header("x-ratelimit-remaining-tokens").unwrap().parse::<i64>().unwrap();
    let first = gateway.chat(HELLO).await;
    assert_eq!(remaining(&first), 1_000_000 - 8 - 512, "the prior is reserved");
    for _ in 0..24 {
        gateway.chat(HELLO).await;
    }
    let (level, _) = level_and_held(&gateway).await;
    let held = level - remaining(&gateway.chat(HELLO).await);
    assert!((8 + 15..8 + 30).contains(&held), "{held}");
}

const LONG: &str = "{ total_tokens: { limit: 10000, per: day, window: calendar } }";

#[tokio::test]
async fn delivered_tokens_of_a_stream_move_from_held_to_used() {
    let answer = Answer::stream()
        .events(&vec![delta("word "); 10])
        .then(Step::Gate)
        .events(&vec![delta("word "); 10])
        .then(Step::Gate)
        .event(&usage_event(9, 30))
        .event(DONE)
        .end();
    let upstream = Upstream::always(answer).await;
    let gateway = gateway(&upstream, LONG, "{ completion: max_tokens }", "").await;
    let mut caller = gateway.caller().await;
    caller.request("POST", CHAT, "", hello(r#""stream":true,"max_tokens":100"#).as_bytes()).await;
    caller.head().await;
    read_events(&mut caller, 10).await;
    let quota = gateway.environment().await["quotas"][0].clone();
    assert_eq!(
        (&quota["used"], &quota["held"]),
        (&8.into(), &100.into()),
        "the prompt is used as soon as the stream begins"
    );
    tokio::time::sleep(Duration::from_millis(1_100)).await;
    upstream.open_gate();
    read_events(&mut caller, 10).await;
    let quota = gateway.environment().await["quotas"][0].clone();
    let (used, held) = (quota["used"].as_u64().unwrap(), quota["held"].as_u64().unwrap());
    assert!((18..=28).contains(&used) && used + held == 108, "{quota}");
    upstream.open_gate();
    while !caller.chunk().await.unwrap().is_empty() {}
    assert_eq!(gateway.settled_charges().await, [1, 9, 30, 39]);
    assert_eq!(level_and_held(&gateway).await, (10_000 - 39, 0));
}

/// An upstream whose stream has this many events of one token each, and waits for the gate before its end.
async fn stream_of(events: usize) -> Upstream {
    Upstream::always(
        Answer::stream().events(&vec![delta("word "); events]).then(Step::Gate).event(DONE).end(),
    )
    .await
}

#[tokio::test]
async fn a_stream_that_outgrows_its_allowance_is_extended_while_there_is_room() {
    let upstream = stream_of(40).await;
    let gateway = gateway(&upstream, LONG, "{ completion: 5 }", "").await;
    let mut caller = gateway.caller().await;
    caller.request("POST", CHAT, "", hello(r#""stream":true"#).as_bytes()).await;
    caller.head().await;
    read_events(&mut caller, 40).await;
    let quota = gateway.environment().await["quotas"][0].clone();
    let reserved = quota["used"].as_u64().unwrap() + quota["held"].as_u64().unwrap();
    assert!(reserved >= 8 + 40, "{quota}");
    upstream.open_gate();
    while !caller.chunk().await.unwrap().is_empty() {}
    let [_, prompt, completion, _] = gateway.settled_charges().await;
    assert_eq!((prompt, completion), (8, 41), "the tokenizer counts 41 tokens for 40 times 'word '");
}

#[tokio::test]
async fn a_stream_that_outgrows_the_quota_goes_on_and_becomes_debt() {
    let upstream = stream_of(40).await;
    let quotas = "{ total_tokens: { limit: 20, per: day, window: calendar } }";
    let gateway = gateway(&upstream, quotas, "{ completion: 5 }", "").await;
    upstream.open_gate();
    let reply = gateway.chat(&hello(r#""stream":true"#)).await;
    assert!(reply.text().ends_with(DONE) && reply.text().matches("word").count() == 40);
    gateway.settled().await;
    assert_eq!(level_and_held(&gateway).await, (20 - 8 - 41, 0));
}

#[tokio::test]
async fn an_overrun_lowers_the_level_before_the_stream_ends() {
    let upstream = stream_of(290).await;
    let quotas = "{ total_tokens: { limit: 60, per: day } }";
    let gateway = gateway(&upstream, quotas, "{ completion: 5 }", "").await;
    let mut caller = gateway.caller().await;
    caller.request("POST", CHAT, "", hello(r#""stream":true"#).as_bytes()).await;
    caller.head().await;
    read_events(&mut caller, 290).await;
    let (level, _) = level_and_held(&gateway).await;
    assert!(level <= 60 - 8 - 290 + 64, "{level}: the level lags by at most one step of 64 tokens");
    assert_eq!(gateway.chat(&hello(r#""max_tokens":1"#)).await.status, 429);
    upstream.open_gate();
    while !caller.chunk().await.unwrap().is_empty() {}
    gateway.settled().await;
    assert_eq!(level_and_held(&gateway).await, (60 - 8 - 291, 0), "each token is charged once");
}

/// An upstream whose stream, in OpenAI's form, ends at its token limit with `finish_reason: "length"`.
async fn bounded_stream(tokens: u64) -> Upstream {
    let role =
        r#"{"id":"c1","choices":[{"index":0,"delta":{"role":"assistant","content":""}}],"usage":null}"#;
    let last = r#"{"id":"c1","choices":[{"index":0,"delta":{},"finish_reason":"length"}],"usage":null}"#;
    let event = |data: &str| format!("data: {data}\n\n");
    let mut answer = Answer::stream().event(&event(role));
    for _ in 0..tokens {
        answer = answer.event(&delta(" word")).then(Step::Gate);
    }
    Upstream::always(answer.event(&event(last)).event(&usage_event(8, tokens)).event(DONE).end()).await
}

#[tokio::test]
async fn a_stream_within_its_reservation_is_not_cut() {
    let upstream = bounded_stream(20).await;
    (0..20).for_each(|_| upstream.open_gate());
    let quotas = "{ total_tokens: { limit: 28, per: day } }";
    let gateway = gateway(&upstream, quotas, "{ completion: max_tokens, on_overrun: cut }", "").await;
    let body = hello(r#""stream":true,"max_tokens":20,"stream_options":{"include_usage":true}"#);
    let reply = gateway.chat(&body).await;
    let text = reply.text();
    assert_eq!(text.matches(" word").count(), 20, "{text}");
    assert!(text.contains(&usage(8, 20)) && text.ends_with(DONE), "{text}");
    assert_eq!(gateway.settled_charges().await, [1, 8, 20, 28]);
}

#[tokio::test]
async fn shadow_mode_neither_clamps_nor_cuts() {
    let quotas = "{ total_tokens: { limit: 20, per: day } }";
    let reserve = "{ completion: 5, on_overrun: cut, when_short: clamp }";
    let upstream = stream_of(60).await;
    upstream.open_gate();
    let streaming = gateway(&upstream, quotas, reserve, ", enforce: false").await;
    let reply = streaming.chat(&hello(r#""stream":true"#)).await;
    assert!(reply.text().ends_with(DONE) && reply.text().matches("word").count() == 60, "{}", reply.text());

    let upstream = Upstream::always(Answer::chat(8, 1)).await;
    let reserve = "{ completion: max_tokens, when_short: clamp }";
    let gateway =
        gateway(&upstream, "{ total_tokens: { limit: 100, per: day } }", reserve, ", enforce: false").await;
    let body = hello(r#""max_tokens":500"#);
    let reply = gateway.chat(&body).await;
    assert_eq!((reply.status, reply.header("x-tollgate-clamped-max-tokens")), (200, None));
    assert_eq!(upstream.only().text(), body);
}

#[tokio::test]
async fn a_request_that_can_never_fit_is_refused_at_once_even_behind_a_wait_queue() {
    let upstream = gated_upstream(8, 1).await;
    let gateway = gateway(&upstream, ROOM_FOR_ONE, WAITS, "").await;
    let mut callers = Vec::new();
    for _ in 0..2 {
        let mut caller = gateway.caller().await;
        caller.request("POST", CHAT, "", hello(r#""max_tokens":100"#).as_bytes()).await;
        callers.push(caller);
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
    let began = Instant::now();
    let never = gateway.chat(&hello(r#""max_tokens":1000"#)).await;
    assert_eq!(never.refusal(), (400, "request_exceeds_quota".into()));
    assert!(began.elapsed() < Duration::from_secs(2));
    for caller in &mut callers {
        upstream.open_gate();
        assert_eq!(caller.reply().await.status, 200);
    }
}

#[tokio::test]
async fn on_overrun_cut_ends_the_stream_with_finish_reason_length() {
    let upstream = stream_of(40).await;
    let quotas = "{ total_tokens: { limit: 20, per: day, window: calendar } }";
    let gateway = gateway(&upstream, quotas, "{ completion: 5, on_overrun: cut }", "").await;
    let reply = gateway.chat(&hello(r#""stream":true"#)).await;
    let text = reply.text();
    let events: Vec<&str> = text.split("\n\n").filter(|event| !event.is_empty()).collect();
    let [.., last, done] = events.as_slice() else { panic!("{text}") };
    assert_eq!(*done, "data: [DONE]");
    let last: Value = serde_json::from_str(last.strip_prefix("data: ").unwrap()).unwrap();
    assert_eq!((&last["id"], &last["choices"][0]["finish_reason"]), (&"c1".into(), &"length".into()));
    upstream.wait_until_disconnected().await;
    let received = events.len() as u64 - 2;
    let [_, prompt, completion, _] = gateway.settled_charges().await;
    assert_eq!(prompt, 8);
    assert!(
        (5..=41).contains(&completion) && completion.abs_diff(received) <= 1,
        "{completion} of {received}"
    );
}

#[tokio::test]
async fn on_overrun_cut_follows_enforce_of_the_admin_api_and_limits_of_the_upstream() {
    let limit = "{ completion_tokens: { limit: 20, per: day, window: calendar } }";
    for (enforce, set, is_at_upstream, is_cut) in [
        (true, Some(false), false, false),
        (false, Some(true), false, true),
        (false, None, false, false),
        (false, None, true, true),
    ] {
        let events: Vec<String> = (0..40).map(|_| delta("word ")).collect();
        let upstream = Upstream::always(Answer::stream().events(&events).event(DONE).end()).await;
        let (own, of_upstream) = if is_at_upstream {
            ("{ requests: { limit: 9, per: hour } }", format!(", quotas: {limit}"))
        } else {
            (limit, String::new())
        };
        let text = format!(
            "server: {{ listen: '127.0.0.1:0' }}\nadmin: {{ listen: '127.0.0.1:0' }}\n\
             upstreams: {{ backend: {{ base_url: 'http://{}/v1'{of_upstream} }} }}\n\
             environments: {{ staging: {{ upstream: backend, reserve: {{ completion: 5, on_overrun: cut }}, enforce: {enforce}, quotas: {own} }} }}\n\
             default_environment: staging\nstore: {{ memory: true }}\n",
            upstream.address
        );
        let gateway = Gateway::from_config(&text).await;
        if let Some(set) = set {
            let body = format!(r#"{{"enforce":{set}}}"#);
            change(&gateway, "PATCH", "/api/environments/staging", &body).await;
        }
        let reply = gateway.chat(&hello(r#""stream":true"#)).await;
        let was_cut = reply.text().contains(r#""finish_reason":"length""#);
        assert_eq!(was_cut, is_cut, "{enforce} {set:?} {is_at_upstream}: {}", reply.text());
    }
}

#[tokio::test]
async fn a_request_that_waits_goes_on_when_an_override_ends() {
    for (file, set, target) in [
        (
            "quotas: { requests: { limit: 100, per: day } }",
            r#"{"limit": 1, "for": "1s"}"#,
            "/quotas/requests/day",
        ),
        (
            "enforce: false, quotas: { requests: { limit: 1, per: day } }",
            r#"{"enforce": true, "for": "1s"}"#,
            "",
        ),
    ] {
        let upstream = gated_upstream(8, 1).await;
        let text = format!(
            "server: {{ listen: '127.0.0.1:0' }}\nadmin: {{ listen: '127.0.0.1:0' }}\n\
             upstreams: {{ backend: {{ base_url: 'http://{}/v1' }} }}\n\
             environments: {{ staging: {{ upstream: backend, reserve: {{ completion: max_tokens, max_wait: 30s }}, {file} }} }}\n\
             default_environment: staging\nstore: {{ memory: true }}\n",
            upstream.address
        );
        let gateway = Gateway::from_config(&text).await;
        let method = if target.is_empty() { "PATCH" } else { "PUT" };
        change(&gateway, method, &format!("/api/environments/staging{target}"), set).await;
        let mut callers = Vec::new();
        for _ in 0..2 {
            let mut caller = gateway.caller().await;
            caller.request("POST", CHAT, "", HELLO.as_bytes()).await;
            callers.push(caller);
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        assert_eq!(upstream.seen().len(), 1, "{file}: the second request waits");
        // The first one holds its room until its gate is opened.
        let second = tokio::time::timeout(Duration::from_secs(10), upstream.wait_until_seen(2)).await;
        assert!(second.is_ok(), "{file}: the second request waits though the override has ended");
        for caller in &mut callers {
            upstream.open_gate();
            assert_eq!(caller.reply().await.status, 200);
        }
    }
}

#[tokio::test]
async fn on_disconnect_drain_reads_the_answer_to_its_end_after_the_caller_hangs_up() {
    let stream =
        Answer::stream().event(&delta("Hi")).then(Step::Gate).event(&usage_event(9, 77)).event(DONE).end();
    let json = Answer::of([vec![Step::Gate], Answer::chat(9, 77).steps()].concat());
    for (answer, body) in [(stream, hello(r#""stream":true"#)), (json, HELLO.to_owned())] {
        let streams = body != HELLO;
        let upstream = Upstream::always(answer).await;
        let gateway = gateway(&upstream, LONG, "{ completion: max_tokens }", ", on_disconnect: drain").await;
        let mut caller = gateway.caller().await;
        caller.request("POST", CHAT, "", body.as_bytes()).await;
        upstream.wait_until_seen(1).await;
        if streams {
            caller.head().await;
            caller.chunk().await.unwrap();
        }
        drop(caller);
        tokio::time::sleep(Duration::from_millis(100)).await;
        upstream.open_gate();
        assert_eq!(gateway.settled_charges().await, [1, 9, 77, 86], "streams: {streams}");
    }
}

#[tokio::test]
async fn the_flood_guard_refuses_requests_before_they_are_parsed() {
    let upstream = Upstream::always(Answer::chat(8, 1)).await;
    let text = format!(
        "server: {{ listen: '127.0.0.1:0', flood_guard: {{ requests: 5, per: minute }} }}\nadmin: {{ listen: '127.0.0.1:0' }}\n\
         upstreams: {{ backend: {{ base_url: 'http://{}/v1' }} }}\n\
         environments: {{ staging: {{ upstream: backend, quotas: {{ requests: {{ limit: 100, per: minute }} }} }} }}\n\
         default_environment: staging\nstore: {{ memory: true }}\n",
        upstream.address
    );
    let gateway = Gateway::from_config(&text).await;
    for _ in 0..5 {
        assert_eq!(gateway.chat(HELLO).await.status, 200);
    }
    for (path, body) in [(CHAT, HELLO), (CHAT, "not JSON"), ("/nowhere", "")] {
        let refused = gateway.post(path, body).await;
        assert_eq!(refused.refusal(), (429, "flood_guard".into()), "{path} {body}");
        assert_eq!(refused.json()["error"]["type"], "requests");
        let seconds: u64 = refused.header("retry-after").unwrap().parse().unwrap();
        assert!((1..=12).contains(&seconds), "{seconds}");
    }
    assert_eq!(upstream.seen().len(), 5);
    assert_eq!(
        gateway.settled().await["totals"]["rejected"],
        0,
        "a refusal of the flood guard is no denial by quotas"
    );
}

#[tokio::test]
async fn behind_a_trusted_proxy_the_flood_guard_counts_the_callers_address() {
    let upstream = Upstream::always(Answer::chat(8, 1)).await;
    for (trusted, statuses) in [
        ("['127.0.0.0/8', '10.0.0.0/8']", [200, 429, 200, 429, 429]),
        ("['10.0.0.0/8']", [200, 429, 429, 429, 429]),
    ] {
        let text = format!(
            "server: {{ listen: '127.0.0.1:0', flood_guard: {{ requests: 1, per: hour }}, trusted_proxies: {trusted} }}\n\
             admin: {{ listen: '127.0.0.1:0' }}\nupstreams: {{ u: {{ base_url: 'http://{}/v1' }} }}\n\
             environments: {{ e: {{ upstream: u }} }}\ndefault_environment: e\nstore: {{ memory: true }}",
            upstream.address
        );
        let gateway = Gateway::from_config(&text).await;
        let forwarded = [
            "203.0.113.1",
            "203.0.113.1",
            "203.0.113.2",
            // The first entry is the caller's invention.
            "203.0.113.9, 203.0.113.2",
            "203.0.113.2, 10.1.1.1",
        ];
        for (line, status) in forwarded.iter().zip(statuses) {
            let header = format!("x-forwarded-for: {line}\r\n");
            let reply = gateway.send("POST", CHAT, &header, HELLO).await;
            assert_eq!(reply.status, status, "{trusted} {line}");
        }
    }
    // The header is not forwarded.
    assert!(upstream.seen().iter().all(|seen| !format!("{seen:?}").contains("203.0.113")));
}

#[tokio::test]
async fn the_flood_guard_does_not_limit_loopback_by_default() {
    let upstream = Upstream::always(Answer::chat(8, 1)).await;
    let gateway = Gateway::in_front_of(&upstream, "{ requests: { limit: 1M, per: minute } }").await;
    let mut caller = gateway.caller().await;
    for _ in 0..1_200 {
        caller.request("POST", CHAT, "", HELLO.as_bytes()).await;
        assert_eq!(caller.reply().await.status, 200);
    }
}
