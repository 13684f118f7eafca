//! Requests that wait (`reserve.max_wait`) for one of several upstreams.

use super::*;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

const IN_ORDER: &str = "{ models: ['gpt-4o'], upstream: [a, b] }";

/// An upstream whose answers wait for its gate.
async fn gated(name: &str) -> Upstream {
    Upstream::always(Answer::of([vec![Step::Gate], named(name).steps()].concat())).await
}

async fn gateway(a: (&Upstream, &str), b: (&Upstream, &str), max_wait: &str) -> Gateway {
    let upstreams = upstream_line("a", a.0, a.1) + &upstream_line("b", b.0, b.1);
    let reserve = format!("completion: max_tokens, max_wait: {max_wait}");
    gateway_reserving(&upstreams, "a", IN_ORDER, "", &reserve).await
}

/// Sends a request and does not wait for its answer.
async fn send(gateway: &Gateway) -> Caller {
    let mut caller = gateway.caller().await;
    caller.request("POST", CHAT, "", HELLO.as_bytes()).await;
    caller
}

/// A provider that refuses the first request for 30 s.
async fn limited_provider() -> Upstream {
    let count = AtomicUsize::new(0);
    Upstream::answering(move |_| match count.fetch_add(1, Ordering::Relaxed) {
        0 => Answer::with_headers(429, "retry-after: 30\r\n", "{}"),
        _ => named("a"),
    })
    .await
}

#[tokio::test]
async fn a_request_waits_for_the_upstream_whose_requests_end_though_the_other_one_names_a_time() {
    let (a, b) = (Upstream::always(named("a")).await, gated("b").await);
    // The quota of a refills after hours, later than max_wait. Only a request in flight makes room at b.
    let a_day = "quotas: { requests: { limit: 1, per: day, window: rolling } }";
    let gateway = gateway((&a, a_day), (&b, "max_in_flight: 1"), "10s").await;
    assert_eq!(gateway.chat(HELLO).await.header("x-tollgate-upstream"), Some("a"));
    let mut first = send(&gateway).await;
    b.wait_until_seen(1).await;
    let mut second = send(&gateway).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(seen(&[&a, &b]), [1, 1], "it waits");
    b.open_gate();
    assert_eq!(first.reply().await.status, 200);
    b.open_gate();
    let reply = second.reply().await;
    assert_eq!((reply.status, reply.header("x-tollgate-upstream")), (200, Some("b")));
    assert_eq!(gateway.settled().await["totals"]["rejected"], 0);
}

#[tokio::test]
async fn a_request_waits_for_the_upstream_that_is_refilled_first() {
    let (a, b) = (Upstream::always(named("a")).await, Upstream::always(named("b")).await);
    let of = |per: &str| format!("quotas: {{ requests: {{ limit: 1, per: {per}, window: rolling }} }}");
    let gateway = gateway((&a, &of("3s")), (&b, &of("1s")), "2s").await;
    let began = Instant::now();
    for want in ["a", "b", "b"] {
        assert_eq!(gateway.chat(HELLO).await.header("x-tollgate-upstream"), Some(want));
    }
    assert!(began.elapsed() >= Duration::from_millis(900), "{:?}", began.elapsed());
}

#[tokio::test]
async fn a_request_that_no_upstream_can_serve_in_time_is_refused_at_once() {
    let (a, b) = (Upstream::always(named("a")).await, Upstream::always(named("b")).await);
    let of = |per: &str| format!("quotas: {{ requests: {{ limit: 1, per: {per}, window: rolling }} }}");
    let gateway = gateway((&a, &of("day")), (&b, &of("hour")), "30s").await;
    for want in ["a", "b"] {
        assert_eq!(gateway.chat(HELLO).await.header("x-tollgate-upstream"), Some(want));
    }
    let began = Instant::now();
    let refused = gateway.chat(HELLO).await;
    assert!(refused.text().contains("upstream 'b'"), "{}", refused.text());
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
}

#[tokio::test]
async fn a_request_waits_for_the_end_of_another_one_while_the_provider_of_the_other_upstream_is_closed() {
    let (a, b) = (limited_provider().await, gated("b").await);
    let gateway = gateway((&a, "provider_limits: follow"), (&b, "max_in_flight: 1"), "2s").await;
    let mut first = send(&gateway).await;
    b.wait_until_seen(1).await;
    let mut second = send(&gateway).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    b.open_gate();
    assert_eq!(first.reply().await.status, 200);
    b.open_gate();
    let reply = second.reply().await;
    assert_eq!((reply.status, reply.header("x-tollgate-upstream")), (200, Some("b")), "{}", reply.text());
    // Without such an end it is refused after max_wait.
    let mut holds = send(&gateway).await;
    b.wait_until_seen(3).await;
    let began = Instant::now();
    let refused = gateway.chat(HELLO).await;
    assert_eq!(refused.refusal(), (429, "too_many_in_flight".into()));
    assert!((1_900..4_000).contains(&began.elapsed().as_millis()), "{:?}", began.elapsed());
    b.open_gate();
    assert_eq!(holds.reply().await.status, 200);
    assert_eq!(gateway.settled().await["totals"]["rejected"], 1);
}

#[tokio::test]
async fn a_request_that_may_wait_for_a_provider_takes_an_upstream_that_has_room_before() {
    let (a, b) = (limited_provider().await, gated("b").await);
    // The 30 s of the provider are within max_wait.
    let gateway = gateway((&a, "provider_limits: follow"), (&b, "max_in_flight: 1"), "60s").await;
    let mut first = send(&gateway).await;
    b.wait_until_seen(1).await;
    let mut second = send(&gateway).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let began = Instant::now();
    b.open_gate();
    assert_eq!(first.reply().await.status, 200);
    b.open_gate();
    let reply = second.reply().await;
    assert_eq!((reply.status, reply.header("x-tollgate-upstream")), (200, Some("b")), "{}", reply.text());
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
    // The wait is counted, and is not the gateway's own work.
    let metrics = gateway.admin_get("/metrics").await;
    let value = |name: &str| -> f64 {
        let line = metrics.text().lines().find_map(|line| line.strip_prefix(name).map(str::to_owned));
        line.unwrap_or_else(|| panic!("{name}")).trim().parse().unwrap()
    };
    assert!(value("tollgate_queue_wait_seconds_sum{environment=\"staging\"}") >= 0.9);
    assert!(
        value("tollgate_overhead_seconds_sum")
            < value("tollgate_queue_wait_seconds_sum{environment=\"staging\"}")
    );
}

#[tokio::test]
async fn a_request_waits_for_its_turn_at_a_provider_if_no_upstream_takes_it_before() {
    let refusing = |ms: u64| async move {
        let count = AtomicUsize::new(0);
        Upstream::answering(move |_| match count.fetch_add(1, Ordering::Relaxed) {
            0 => Answer::with_headers(429, &format!("retry-after-ms: {ms}\r\n"), "{}"),
            _ => named("x"),
        })
        .await
    };
    let (a, b) = (refusing(30_000).await, refusing(1_000).await);
    let gateway = gateway((&a, "provider_limits: follow"), (&b, "provider_limits: follow"), "20s").await;
    assert_eq!(gateway.chat(HELLO).await.status, 429);
    let began = Instant::now();
    let mut all = Vec::new();
    for _ in 0..5 {
        all.push(send(&gateway).await);
    }
    for caller in &mut all {
        let reply = caller.reply().await;
        assert_eq!((reply.status, reply.header("x-tollgate-upstream")), (200, Some("b")), "{}", reply.text());
    }
    assert!((800..15_000).contains(&began.elapsed().as_millis()), "{:?}", began.elapsed());
    assert_eq!(seen(&[&a, &b]), [1, 6]);
    assert_eq!(gateway.settled().await["in_flight"], 0);
}
