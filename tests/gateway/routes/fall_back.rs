//! A list of upstreams is an order: the failures after which the next one is tried, the charge, and how often an upstream is
//! tried.

use super::*;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

const IN_ORDER: &str = "{ models: ['gpt-4o'], upstream: [a, b] }";

/// A failure with a body that must not reach the caller.
fn failure(status: u16) -> Answer {
    Answer::json(status, r#"{"error":{"message":"of the first upstream"}}"#)
}

#[tokio::test]
async fn the_next_upstream_is_tried_after_each_status_that_permits_it() {
    for (status, outcome) in [
        (429, "rate_limited"),
        (502, "unavailable"),
        (503, "unavailable"),
        (504, "unavailable"),
        (529, "unavailable"),
    ] {
        let (a, b) = (Upstream::always(failure(status)).await, Upstream::always(named("b")).await);
        let gateway = gateway(&[("a", &a), ("b", &b)], IN_ORDER, "").await;
        let reply = gateway.chat(HELLO).await;
        assert_eq!((reply.status, reply.header("x-tollgate-upstream")), (200, Some("b")), "{status}");
        assert!(!reply.text().contains("first upstream"));
        assert_eq!(seen(&[&a, &b]), [1, 1]);
        assert_eq!((a.only().text(), b.only().text()), (HELLO, HELLO));
        assert_eq!(
            (a.only().all("authorization"), b.only().all("authorization")),
            (vec!["Bearer key-of-a"], vec!["Bearer key-of-b"])
        );
        assert_eq!(gateway.settled_charges().await, [1, 8, 5, 13], "{status}");
        assert_eq!(attempts(&gateway, "a", outcome).await, 1, "{status}");
        assert_eq!(
            (attempts(&gateway, "a", "answered").await, attempts(&gateway, "b", "answered").await),
            (0, 1)
        );
    }
}

#[tokio::test]
async fn any_other_answer_passes_as_it_is() {
    for status in [200, 400, 401, 403, 404, 408, 422, 500, 501] {
        let (a, b) = (Upstream::always(failure(status)).await, Upstream::always(named("b")).await);
        let gateway = gateway(&[("a", &a), ("b", &b)], IN_ORDER, "").await;
        for _ in 0..6 {
            let reply = gateway.chat(HELLO).await;
            assert_eq!((reply.status, reply.header("x-tollgate-upstream")), (status, Some("a")));
            assert!(reply.text().contains("first upstream"));
        }
        assert_eq!(seen(&[&a, &b]), [6, 0], "{status}");
    }
}

#[tokio::test]
async fn the_answer_of_the_last_upstream_passes_as_it_is() {
    let a = Upstream::always(failure(503)).await;
    let last = r#"{"error":{"message":"overloaded, key-of-b"}}"#;
    let b = Upstream::always(Answer::with_headers(529, "retry-after: 7\r\nx-own: 1\r\n", last)).await;
    let gateway = gateway(&[("a", &a), ("b", &b)], IN_ORDER, "").await;
    let reply = gateway.chat(HELLO).await;
    assert_eq!((reply.status, reply.header("x-tollgate-upstream")), (529, Some("b")));
    assert_eq!((reply.header("retry-after"), reply.header("x-own")), (Some("7"), Some("1")));
    // The key of the upstream that answered is masked.
    assert_eq!(reply.text(), last.replace("key-of-b", "********"));
    assert_eq!(seen(&[&a, &b]), [1, 1]);
    assert_eq!(gateway.settled_charges().await, [1, 0, 0, 0]);
}

#[tokio::test]
async fn the_next_upstream_is_tried_if_one_cannot_be_reached_or_breaks_off() {
    let b = Upstream::always(named("b")).await;
    let broken = [
        Answer::of(vec![Step::Cut]),
        Answer::of(vec![Step::Reset]),
        Answer::of(vec![Step::Send(b"nonsense".into()), Step::Cut]),
    ];
    for answer in broken {
        let a = Upstream::always(answer.clone()).await;
        let gateway = gateway(&[("a", &a), ("b", &b)], IN_ORDER, "").await;
        let reply = gateway.chat(HELLO).await;
        assert_eq!((reply.status, reply.header("x-tollgate-upstream")), (200, Some("b")), "{answer:?}");
        assert_eq!(gateway.settled_charges().await, [1, 8, 5, 13], "{answer:?}");
        assert_eq!(seen(&[&a]), [1], "{answer:?}");
    }
    let gone = format!("  a: {{ base_url: 'http://{}' }}\n{}", refusing_address(), upstreams(&[("b", &b)]));
    let gateway = gateway_with(&gone, "a", IN_ORDER, "").await;
    assert_eq!(gateway.chat(HELLO).await.header("x-tollgate-upstream"), Some("b"));
    assert_eq!(gateway.settled_charges().await, [1, 8, 5, 13]);
    assert_eq!(attempts(&gateway, "a", "unreachable").await, 1);
}

#[tokio::test]
async fn the_timeouts_are_those_of_the_upstream_that_is_tried() {
    let (a, b) = (
        Upstream::always(Answer::silence()).await,
        Upstream::always(Answer::of(
            [vec![Step::Wait(Duration::from_millis(600))], named("b").steps()].concat(),
        ))
        .await,
    );
    let text = format!(
        "  a: {{ base_url: 'http://{}', timeouts: {{ first_byte: 200ms, total: 500ms }} }}\n  b: {{ base_url: 'http://{}', timeouts: {{ first_byte: 5s }} }}\n",
        a.address, b.address
    );
    let gateway = gateway_with(&text, "a", IN_ORDER, "").await;
    let reply = gateway.chat(HELLO).await;
    assert_eq!((reply.status, reply.header("x-tollgate-upstream")), (200, Some("b")));
    assert_eq!(attempts(&gateway, "a", "timed_out").await, 1);
    assert_eq!(gateway.settled_charges().await, [1, 8, 5, 13]);
}

#[tokio::test]
async fn each_upstream_gets_its_own_path_headers_and_model_once() {
    let (a, b) = (Upstream::always(failure(503)).await, Upstream::always(named("b")).await);
    let text = format!(
        "  a: {{ base_url: 'http://{}/v1', api_key: key-of-a, headers: {{ x-a: '1' }} }}\n  \
         b: {{ base_url: 'http://{}/proxy/v1', api: azure, api_key: key-of-b, stream_usage: never, headers: {{ x-b: '2' }} }}\n",
        a.address, b.address
    );
    let routes = "{ models: ['gpt-4o'], upstream: [a, b], model: renamed }";
    let gateway = gateway_with(&text, "a", routes, "").await;
    let body = hello(r#""stream":true"#);
    let reply = gateway
        .send("POST", &format!("{CHAT}?q=1"), "x-mine: 3\r\nauthorization: Bearer caller\r\n", &body)
        .await;
    assert_eq!(reply.status, 200);
    let (first, second) = (a.only(), b.only());
    assert_eq!(
        (first.target(), second.target()),
        ("/v1/chat/completions?q=1", "/proxy/v1/chat/completions?q=1")
    );
    assert_eq!(
        (first.header("x-a"), first.header("x-b"), first.header("x-mine")),
        (Some("1"), None, Some("3"))
    );
    assert_eq!(
        (second.header("x-a"), second.header("x-b"), second.header("x-mine")),
        (None, Some("2"), Some("3"))
    );
    assert_eq!((first.header("authorization"), first.header("api-key")), (Some("Bearer key-of-a"), None));
    assert_eq!((second.header("authorization"), second.header("api-key")), (None, Some("key-of-b")));
    assert_eq!(second.header("host"), Some(&*b.address.to_string()));
    assert!(first.text().contains("include_usage") && first.text().contains(r#""model":"renamed""#));
    assert_eq!(second.text(), body.replace("gpt-4o", "renamed"));
}

#[tokio::test]
async fn a_stream_falls_back_until_its_head_and_not_afterwards() {
    let failing = Arc::new(AtomicBool::new(true));
    let is_failing = failing.clone();
    let a = Upstream::answering(move |_| {
        if is_failing.load(Ordering::Relaxed) {
            return failure(503);
        }
        Answer::stream().event(&delta("Hi")).then(Step::Cut)
    })
    .await;
    let b =
        Upstream::always(Answer::stream().events(&[delta("Yes"), usage_event(8, 1), DONE.to_owned()]).end())
            .await;
    let gateway = gateway(&[("a", &a), ("b", &b)], IN_ORDER, "").await;
    let reply = gateway.chat(&hello(r#""stream":true"#)).await;
    assert_eq!(reply.text(), [delta("Yes"), DONE.to_owned()].concat());
    assert_eq!(gateway.settled_charges().await, [1, 8, 1, 9]);
    failing.store(false, Ordering::Relaxed);
    let reply = gateway.chat(&hello(r#""stream":true"#)).await;
    assert!(
        reply.text().starts_with(&delta("Hi")) && reply.text().contains("upstream_disconnected"),
        "{}",
        reply.text()
    );
    assert_eq!((reply.header("x-tollgate-upstream"), seen(&[&a, &b])), (Some("a"), vec![2, 1]));
}

#[tokio::test]
async fn an_upstream_whose_provider_is_waited_for_is_left_out() {
    let count = AtomicUsize::new(0);
    let a = Upstream::answering(move |_| match count.fetch_add(1, Ordering::Relaxed) {
        0 => Answer::with_headers(429, "retry-after: 30\r\n", "{}"),
        _ => named("a"),
    })
    .await;
    let b = Upstream::always(named("b")).await;
    let text = upstreams(&[("a", &a), ("b", &b)]).replacen(
        "api_key: key-of-a",
        "api_key: key-of-a, provider_limits: follow",
        1,
    );
    // Waiting is only for requests that no other upstream can serve.
    let gateway = gateway_with(&text, "a", IN_ORDER, "").await;
    for sent in 1..=4 {
        let reply = gateway.chat(HELLO).await;
        assert_eq!((reply.status, reply.header("x-tollgate-upstream")), (200, Some("b")));
        assert_eq!(seen(&[&a, &b]), [1, sent]);
    }
    assert_eq!(
        (attempts(&gateway, "a", "rate_limited").await, attempts(&gateway, "a", "held").await),
        (1, 3)
    );
    assert_eq!(gateway.settled_charges().await, [4, 32, 20, 52]);
}

#[tokio::test]
async fn if_every_provider_is_waited_for_the_one_with_the_shortest_wait_is_the_answer() {
    let refusing =
        |wait: &str| Upstream::always(Answer::with_headers(429, &format!("retry-after: {wait}\r\n"), "{}"));
    let (a, b) = (refusing("30").await, refusing("9").await);
    let text = upstreams(&[("a", &a), ("b", &b)]).replace("api_key", "provider_limits: follow, api_key");
    let gateway = gateway_with(&text, "a", IN_ORDER, "").await;
    let first = gateway.chat(HELLO).await;
    assert_eq!(
        (first.status, first.header("x-tollgate-upstream"), first.header("x-tollgate-error")),
        (429, Some("b"), None)
    );
    let reply = gateway.chat(HELLO).await;
    assert_eq!(reply.refusal(), (429, "upstream_rate_limited".into()));
    assert_eq!(reply.header("retry-after"), Some("9"));
    assert!(reply.text().contains("upstream 'b'"), "{}", reply.text());
    assert_eq!(seen(&[&a, &b]), [1, 1]);
    assert_eq!(gateway.settled().await["totals"]["rejected"], 1);
}

#[tokio::test]
async fn an_upstream_that_failed_five_times_in_a_row_is_passed_over_until_a_request_tries_it() {
    let failing = Arc::new(AtomicBool::new(true));
    let is_failing = failing.clone();
    let a = Upstream::answering(
        move |_| if is_failing.load(Ordering::Relaxed) { failure(503) } else { named("a") },
    )
    .await;
    let b = Upstream::always(named("b")).await;
    let gateway = Arc::new(gateway(&[("a", &a), ("b", &b)], IN_ORDER, "").await);
    // Answers in between begin the count again.
    for ok in [false, false, false, false, true, false, false, false, false, false] {
        failing.store(!ok, Ordering::Relaxed);
        assert_eq!(gateway.chat(HELLO).await.status, 200);
    }
    let passed_over = Instant::now();
    failing.store(false, Ordering::Relaxed);
    for _ in 0..20 {
        assert_eq!(gateway.chat(HELLO).await.header("x-tollgate-upstream"), Some("b"));
    }
    assert_eq!(seen(&[&a]), [10]);
    assert_eq!(attempts(&gateway, "a", "passed_over").await, 20);
    tokio::time::sleep(Duration::from_millis(5_100).saturating_sub(passed_over.elapsed())).await;
    for _ in 0..3 {
        assert_eq!(gateway.chat(HELLO).await.header("x-tollgate-upstream"), Some("a"));
    }
}

#[tokio::test]
async fn if_all_upstreams_are_passed_over_they_are_tried_all_the_same() {
    let (a, b) = (Upstream::always(failure(503)).await, Upstream::always(failure(502)).await);
    let gateway = gateway(&[("a", &a), ("b", &b)], IN_ORDER, "").await;
    for sent in 1..=8 {
        let reply = gateway.chat(HELLO).await;
        assert_eq!((reply.status, reply.header("x-tollgate-error")), (502, None));
        assert_eq!(seen(&[&a, &b]), [sent, sent]);
    }
}

/// A burst over an upstream that fails in the middle of it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_request_is_lost_when_an_upstream_fails_in_mid_burst() {
    const REQUESTS: usize = 400;
    let served = Arc::new(AtomicUsize::new(0));
    let count = served.clone();
    let a = Upstream::answering(move |_| match count.fetch_add(1, Ordering::Relaxed) {
        0..100 => Answer::of([vec![Step::Wait(Duration::from_millis(2))], named("a").steps()].concat()),
        n if n % 2 == 0 => Answer::of(vec![Step::Reset]),
        _ => Answer::of(vec![Step::Cut]),
    })
    .await;
    let b = Upstream::always(named("b")).await;
    let gateway = Arc::new(gateway(&[("a", &a), ("b", &b)], IN_ORDER, "").await);
    let clients = (0..20).map(|client| {
        let gateway = gateway.clone();
        tokio::spawn(async move {
            let mut caller = gateway.caller().await;
            for n in 0..REQUESTS / 20 {
                let headers = format!("x-number: {client}-{n}\r\n");
                caller.request("POST", CHAT, &headers, HELLO.as_bytes()).await;
                let reply = caller.reply().await;
                assert_eq!(reply.status, 200, "{}", reply.text());
            }
        })
    });
    for client in clients.collect::<Vec<_>>() {
        client.await.unwrap();
    }
    let requests = REQUESTS as u64;
    assert_eq!(gateway.settled_charges().await, [requests, 8 * requests, 5 * requests, 13 * requests]);
    // A request on a connection that was reused is sent once more on a new one; that is the same attempt.
    for upstream in [&a, &b] {
        let mut numbers: Vec<String> =
            upstream.seen().iter().map(|r| r.header("x-number").unwrap().to_owned()).collect();
        numbers.sort();
        for same in numbers.chunk_by(|one, other| one == other) {
            assert!(same.len() <= 2, "{same:?}");
        }
    }
    let failed = attempts(&gateway, "a", "unreachable").await;
    let answered = [attempts(&gateway, "a", "answered").await, attempts(&gateway, "b", "answered").await];
    assert_eq!(answered.iter().sum::<u64>(), requests);
    // Five failures make the gateway pass over the upstream. Each client can have one more request in flight at that time.
    // The last answers can overtake failures, so that up to 20 more are needed. Without passing over there would be 300.
    assert!((5..=45).contains(&failed), "{failed} failed attempts");
    let at_b = b.seen().len();
    assert_eq!(at_b as u64, answered[1], "each request reaches the second upstream once");
}

#[tokio::test]
async fn a_caller_that_disconnects_ends_the_attempts() {
    let (a, b) = (Upstream::always(failure(503)).await, Upstream::always(Answer::silence()).await);
    let gateway = gateway(&[("a", &a), ("b", &b)], IN_ORDER, "").await;
    let mut caller = gateway.caller().await;
    caller.request("POST", CHAT, "", HELLO.as_bytes()).await;
    b.wait_until_seen(1).await;
    drop(caller);
    b.wait_until_disconnected().await;
    // The second upstream may have read the prompt; the first one is not charged.
    assert_eq!(gateway.settled_charges().await, [1, 8, 0, 8]);
    assert_eq!(attempts(&gateway, "b", "cancelled").await, 1);
}

#[tokio::test]
async fn an_error_shows_the_quotas_of_the_upstream_that_was_tried_last() {
    let a = Upstream::always(failure(503)).await;
    let of = |limit: u64| format!("quotas: {{ requests: {{ limit: {limit}, per: minute }} }}");
    let upstreams = format!(
        "  a: {{ base_url: 'http://{}/v1', api_key: key-of-a, {} }}\n  b: {{ base_url: 'http://{}/v1', api_key: key-of-b, {} }}\n",
        a.address,
        of(5),
        refusing_address(),
        of(7)
    );
    let gateway = gateway_with(&upstreams, "a", IN_ORDER, "").await;
    let refused = gateway.chat(HELLO).await;
    assert_eq!(refused.refusal(), (502, "upstream_unreachable".into()));
    let limit_and_rest =
        ["x-ratelimit-limit-requests", "x-ratelimit-remaining-requests"].map(|name| refused.header(name));
    assert_eq!(limit_and_rest, [Some("7"), Some("6")]);
}

#[tokio::test]
async fn a_caller_that_disconnects_between_two_attempts_pays_for_neither() {
    let (a, b) = (Upstream::always(failure(503)).await, Upstream::always(Answer::silence()).await);
    let upstreams = upstream_line("a", &a, "") + &upstream_line("b", &b, "provider_limits: follow");
    // The second request waits for the slow start of b, which lasts a second. A busy machine may need several attempts.
    for _ in 0..5 {
        let gateway = gateway_with(&upstreams, "a", IN_ORDER, "").await;
        let (seen_at_a, seen_at_b) = (a.seen().len(), b.seen().len());
        let mut first = gateway.caller().await;
        first.request("POST", CHAT, "", HELLO.as_bytes()).await;
        b.wait_until_seen(seen_at_b + 1).await;
        let mut second = gateway.caller().await;
        second.request("POST", CHAT, "", HELLO.as_bytes()).await;
        a.wait_until_seen(seen_at_a + 2).await;
        tokio::time::sleep(Duration::from_millis(50)).await;
        drop(second);
        drop(first);
        let charges = gateway.settled_charges().await;
        if b.seen().len() == seen_at_b + 1 {
            assert_eq!(charges, [1, 8, 0, 8], "only the first request has reached b");
            return;
        }
    }
    panic!("no request was dropped while it waited");
}

#[tokio::test]
async fn with_drain_the_attempts_continue_without_the_caller() {
    let a = Upstream::always(Answer::of([vec![Step::Gate], failure(503).steps()].concat())).await;
    let b = Upstream::always(named("b")).await;
    let gateway = gateway(&[("a", &a), ("b", &b)], IN_ORDER, "on_disconnect: drain").await;
    let mut caller = gateway.caller().await;
    caller.request("POST", CHAT, "", HELLO.as_bytes()).await;
    a.wait_until_seen(1).await;
    drop(caller);
    a.open_gate();
    b.wait_until_seen(1).await;
    assert_eq!(gateway.settled_charges().await, [1, 8, 5, 13]);
}
