//! What happens to requests that do not fit, and to streams that outgrow what was reserved for them.

use crate::support::*;
use serde_json::Value;
use std::time::{Duration, Instant};

/// An open environment with these quotas and this `reserve`, and more settings if there are any.
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

/// Reads so many events of a stream, however they were put together.
async fn read_events(caller: &mut Caller, events: usize) {
    let mut text = String::new();
    while text.matches("\n\n").count() < events {
        text += std::str::from_utf8(&caller.chunk().await.unwrap()).unwrap();
    }
}

/// Answers chats with usage once the gate opens.
async fn slow(prompt: u64, completion: u64) -> Upstream {
    let answer = Answer::chat(prompt, completion);
    Upstream::always(Answer::of([vec![Step::Gate], answer.steps()].concat())).await
}

#[tokio::test]
async fn quotas_that_are_not_enforced_only_watch() {
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
    let series = r#"tollgate_rejections_total{code="rate_limit_exceeded",environment="staging",kind="total_tokens",per="hour""#;
    assert!(metrics.contains(&format!(r#"{series},shadow="true"}} 2"#)), "{metrics}");
    assert!(metrics.contains(&format!("{series}}} 0")), "{metrics}");
}

#[tokio::test]
async fn a_request_that_is_short_of_room_is_clamped_and_otherwise_forwarded_as_it_came() {
    let upstream = Upstream::always(Answer::chat(8, 1)).await;
    for (fields, model, forwarded, told) in [
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
        // The same prompt is one token shorter to a model that reasons.
        (r#""user":"u""#, "o3-mini", r#""max_completion_tokens":93,"user":"u""#, "93"),
        (r#""n":2,"max_tokens":500"#, "gpt-4o", r#""n":2,"max_tokens":46"#, "46"),
    ] {
        let quotas = "{ total_tokens: { limit: 100, per: hour } }";
        let reserve = "{ completion: max_tokens, when_short: clamp }";
        let gateway = gateway(&upstream, quotas, reserve, "").await;
        let reply = gateway.chat(&hello(fields).replace("gpt-4o", model)).await;
        assert_eq!(
            (reply.status, reply.header("x-tollgate-clamped-max-tokens")),
            (200, Some(told)),
            "{fields}"
        );
        let seen = upstream.seen().pop().unwrap();
        assert_eq!(seen.text(), hello(forwarded).replace("gpt-4o", model));
    }
}

#[tokio::test]
async fn a_request_that_fits_is_not_clamped_and_one_for_which_nothing_is_left_is_refused() {
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
const WAITS: &str = "{ completion: max_tokens, max_wait: 5s }";

#[tokio::test]
async fn who_waits_in_line_is_served_in_the_order_of_coming() {
    let upstream = slow(8, 1).await;
    let gateway = gateway(&upstream, ROOM_FOR_ONE, WAITS, "").await;
    let mut callers = Vec::new();
    for n in 0..4 {
        let mut caller = gateway.caller().await;
        let body = hello(&format!(r#""user":"{n}","max_tokens":100"#));
        caller.request("POST", CHAT, "", body.as_bytes()).await;
        callers.push(caller);
        // Whoever has come is in line before the next one comes: if Redis is asked, when it has answered.
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(upstream.seen().len(), 1, "the others wait");
    for caller in &mut callers {
        upstream.open_gate();
        assert_eq!(caller.reply().await.status, 200);
    }
    let order: Vec<String> = upstream.seen().iter().map(|seen| seen.text()[9..10].to_owned()).collect();
    assert_eq!(order, ["0", "1", "2", "3"]);
    assert_eq!(gateway.settled().await["totals"]["rejected"], 0);
}

#[tokio::test]
async fn a_caller_that_hangs_up_leaves_the_line() {
    let upstream = slow(8, 1).await;
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
    assert_eq!(upstream.seen().len(), 2, "the one that has gone was never forwarded");
    gateway.settled().await;
}

#[tokio::test]
async fn who_waits_in_vain_is_refused_after_max_wait_and_not_sooner() {
    let upstream = slow(8, 1).await;
    let gateway = gateway(&upstream, ROOM_FOR_ONE, "{ completion: max_tokens, max_wait: 300ms }", "").await;
    let body = hello(r#""max_tokens":100"#);
    let mut first = gateway.caller().await;
    first.request("POST", CHAT, "", body.as_bytes()).await;
    upstream.has_seen(1).await;
    let began = Instant::now();
    assert_eq!(gateway.chat(&body).await.refusal().0, 429);
    let waited = began.elapsed();
    assert!(waited >= Duration::from_millis(300) && waited < Duration::from_secs(2), "{waited:?}");
    upstream.open_gate();
    assert_eq!(first.reply().await.status, 200);
    assert_eq!(gateway.settled().await["totals"]["rejected"], 1);
}

#[tokio::test]
async fn nobody_waits_for_what_cannot_come_in_time() {
    let upstream = Upstream::always(Answer::chat(8, 142)).await;
    let gateway = gateway(&upstream, ROOM_FOR_ONE, WAITS, "").await;
    let began = Instant::now();
    let never = gateway.chat(&hello(r#""max_tokens":1000"#)).await;
    assert_eq!(never.refusal(), (400, "request_exceeds_quota".into()));
    assert_eq!(gateway.chat(&hello(r#""max_tokens":142"#)).await.status, 200);
    // All of it is spent, and the day ends later than that.
    assert_eq!(gateway.chat(&hello(r#""max_tokens":100"#)).await.refusal().0, 429);
    assert!(began.elapsed() < Duration::from_secs(3));
}

#[tokio::test]
async fn what_answers_use_is_learned() {
    let upstream = Upstream::always(Answer::chat(8, 20)).await;
    let quotas = "{ total_tokens: { limit: 1M, per: hour } }";
    let gateway = gateway(&upstream, quotas, "{ completion: adaptive }", "").await;
    let remaining =
        |reply: &Reply| reply.header("x-ratelimit-remaining-tokens").unwrap().parse::<i64>().unwrap();
    let first = gateway.chat(HELLO).await;
    assert_eq!(remaining(&first), 1_000_000 - 8 - 512, "the prior");
    for _ in 0..24 {
        gateway.chat(HELLO).await;
    }
    let (level, _) = level_and_held(&gateway).await;
    let held = level - remaining(&gateway.chat(HELLO).await);
    assert!((8 + 15..8 + 30).contains(&held), "{held}");
}

const LONG: &str = "{ total_tokens: { limit: 10000, per: day, window: calendar } }";

#[tokio::test]
async fn what_a_long_stream_has_used_is_held_no_longer() {
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
    assert_eq!((&quota["used"], &quota["held"]), (&8.into(), &100.into()), "the model has read the prompt");
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

/// A stream of so many tokens, one for each event, which waits before its end.
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
    assert_eq!((prompt, completion), (8, 41), "40 times 'word ', as the tokenizer counts it");
}

#[tokio::test]
async fn a_stream_that_finds_no_more_room_goes_on_and_leaves_a_debt() {
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
async fn an_overrun_is_seen_before_the_stream_ends_and_nobody_else_is_let_in() {
    let upstream = stream_of(290).await;
    let quotas = "{ total_tokens: { limit: 60, per: day } }";
    let gateway = gateway(&upstream, quotas, "{ completion: 5 }", "").await;
    let mut caller = gateway.caller().await;
    caller.request("POST", CHAT, "", hello(r#""stream":true"#).as_bytes()).await;
    caller.head().await;
    read_events(&mut caller, 290).await;
    let (level, _) = level_and_held(&gateway).await;
    assert!(level <= 60 - 8 - 290 + 64, "{level}: no more than a step behind");
    assert_eq!(gateway.chat(&hello(r#""max_tokens":1"#)).await.status, 429);
    upstream.open_gate();
    while !caller.chunk().await.unwrap().is_empty() {}
    gateway.settled().await;
    assert_eq!(level_and_held(&gateway).await, (60 - 8 - 291, 0), "and it is charged once");
}

/// A stream that is exactly as long as it may be, as OpenAI sends it.
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
async fn a_stream_within_its_own_bound_comes_through_whole() {
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
async fn quotas_that_only_watch_neither_clamp_nor_cut() {
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
async fn what_can_never_fit_is_refused_at_once_behind_others_too() {
    let upstream = slow(8, 1).await;
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
async fn or_it_is_ended_as_if_it_had_reached_its_bound() {
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
    upstream.was_hung_up_on().await;
    let received = events.len() as u64 - 2;
    let [_, prompt, completion, _] = gateway.settled_charges().await;
    assert_eq!(prompt, 8);
    assert!(
        (5..=41).contains(&completion) && completion.abs_diff(received) <= 1,
        "{completion} of {received}"
    );
}

#[tokio::test]
async fn an_answer_is_read_to_its_end_for_a_caller_that_has_gone_if_that_is_asked_for() {
    let stream =
        Answer::stream().event(&delta("Hi")).then(Step::Gate).event(&usage_event(9, 77)).event(DONE).end();
    let json = Answer::of([vec![Step::Gate], Answer::chat(9, 77).steps()].concat());
    for (answer, body) in [(stream, hello(r#""stream":true"#)), (json, HELLO.to_owned())] {
        let streams = body != HELLO;
        let upstream = Upstream::always(answer).await;
        let gateway = gateway(&upstream, LONG, "{ completion: max_tokens }", ", on_disconnect: drain").await;
        let mut caller = gateway.caller().await;
        caller.request("POST", CHAT, "", body.as_bytes()).await;
        upstream.has_seen(1).await;
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
async fn a_flood_from_one_address_is_held_back_before_anything_is_read() {
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
        let held_back = gateway.post(path, body).await;
        assert_eq!(held_back.refusal(), (429, "flood_guard".into()), "{path} {body}");
        assert_eq!(held_back.json()["error"]["type"], "requests");
        let seconds: u64 = held_back.header("retry-after").unwrap().parse().unwrap();
        assert!((1..=12).contains(&seconds), "{seconds}");
    }
    assert_eq!(upstream.seen().len(), 5);
    assert_eq!(gateway.settled().await["totals"]["rejected"], 0, "it is no matter of quotas");
}

#[tokio::test]
async fn by_default_this_machine_is_not_held_back() {
    let upstream = Upstream::always(Answer::chat(8, 1)).await;
    let gateway = Gateway::before(&upstream, "{ requests: { limit: 1M, per: minute } }").await;
    let mut caller = gateway.caller().await;
    for _ in 0..1_200 {
        caller.request("POST", CHAT, "", HELLO.as_bytes()).await;
        assert_eq!(caller.reply().await.status, 200);
    }
}
