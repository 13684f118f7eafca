//! Where no upstream of a route takes a request now: the one that fits first decides the refusal, and with `max_wait` the
//! request waits for that one. It may have no room in its quotas, have its maximum in flight, or have a provider that
//! would refuse the request.

use super::*;
use std::time::{Duration, Instant};

/// A provider that refuses everything for 20 s.
fn refusing() -> Answer {
    Answer::with_headers(429, "retry-after: 20\r\n", "{}")
}

/// Settings of an upstream that has room for one request a second.
const ONE_A_SECOND: &str = "quotas: { requests: { limit: 60, per: minute, burst: 1 } }";
const FOLLOW: &str = "provider_limits: follow";
const ONE_IN_FLIGHT: &str = "max_in_flight: 1";

/// A gateway whose requests go to `a`, or else to `b`, each with these settings. `settings`: more settings of the environment.
async fn gateway_of(a: (&Upstream, &str), b: (&Upstream, &str), settings: &str) -> Gateway {
    Gateway::from_config(&format!(
        "server: {{ listen: '127.0.0.1:0' }}\nadmin: {{ listen: '127.0.0.1:0' }}\nupstreams:\n{}{}environments:\n  staging:\n    \
         upstream: a\n    routes: [{{ models: ['*'], upstream: [a, b] }}]\n    {settings}\n    \
         quotas: {{ total_tokens: {{ limit: 1000000, per: day }} }}\ndefault_environment: staging\nstore: {{ memory: true }}\n",
        upstream_line("a", a.0, a.1),
        upstream_line("b", b.0, b.1),
    ))
    .await
}

const WAITS: &str = "reserve: { max_wait: 5s }";

async fn explain(gateway: &Gateway) -> serde_json::Value {
    let mut admin = Caller::connect(gateway.admin).await;
    let (host, length) = (gateway.admin, HELLO.len());
    let head = "POST /api/explain?environment=staging HTTP/1.1";
    admin.send(format!("{head}\r\nhost: {host}\r\ncontent-length: {length}\r\n\r\n{HELLO}").as_bytes()).await;
    admin.reply().await.json()
}

async fn nothing_is_held(gateway: &Gateway) {
    gateway.settled().await;
    for upstream in gateway.admin_get("/api/upstreams").await.json()["upstreams"].as_array().unwrap() {
        assert_eq!(upstream["in_flight"], 0, "{upstream}");
        for quota in upstream["quotas"].as_array().unwrap() {
            assert_eq!(quota["held"], 0, "{upstream}");
        }
    }
}

#[tokio::test]
async fn a_request_in_flight_ends_before_an_hour_is_over() {
    for swapped in [false, true] {
        let (a, b) = (Upstream::always(Answer::silence()).await, Upstream::always(named("b")).await);
        let hour = "quotas: { requests: { limit: 1, per: hour } }";
        let (of_a, of_b) = ((&a, ONE_IN_FLIGHT), (&b, hour));
        let gateway =
            if swapped { gateway_of(of_b, of_a, "").await } else { gateway_of(of_a, of_b, "").await };
        if swapped {
            assert_eq!(gateway.chat(HELLO).await.status, 200);
        }
        let mut in_flight = gateway.caller().await;
        in_flight.request("POST", CHAT, "", HELLO.as_bytes()).await;
        a.wait_until_seen(1).await;
        if !swapped {
            assert_eq!(gateway.chat(HELLO).await.status, 200);
        }
        let refused = gateway.chat(HELLO).await;
        assert_eq!(refused.refusal(), (429, "too_many_in_flight".into()), "{swapped}");
        assert_eq!(refused.header("retry-after"), Some("1"));
        let explained = explain(&gateway).await;
        assert_eq!((&explained["admitted"], &explained["retry_after_ms"]), (&false.into(), &1_000.into()));
    }
}

#[tokio::test]
async fn the_one_that_fits_first_refuses_whatever_it_lacks() {
    // `a` has no room in its quotas for a second, the provider of `b` refuses for 20 s.
    let (a, b) = (Upstream::always(named("a")).await, Upstream::always(refusing()).await);
    let gateway = gateway_of((&a, ONE_A_SECOND), (&b, FOLLOW), "").await;
    assert_eq!(gateway.chat(HELLO).await.header("x-tollgate-upstream"), Some("a"));
    assert_eq!(gateway.chat(HELLO).await.header("x-tollgate-upstream"), Some("b"));
    let refused = gateway.chat(HELLO).await;
    assert_eq!(refused.refusal(), (429, "rate_limit_exceeded".into()));
    assert_eq!(refused.header("retry-after"), Some("1"));
    assert!(refused.text().contains("upstream 'a'"), "{}", refused.text());
    let explained = explain(&gateway).await;
    assert_eq!(
        (&explained["admitted"], &explained["code"]),
        (&false.into(), &"rate_limit_exceeded".into()),
        "{explained}"
    );
    assert_eq!(seen(&[&a, &b]), [1, 1]);
    let upstream = gateway.admin_get("/api/upstreams/a").await.json();
    assert_eq!((&upstream["totals"]["rejected"], &upstream["refused_last_minute"]), (&1.into(), &1.into()));
    nothing_is_held(&gateway).await;

    // The provider of `a` refuses for 20 s, `b` has its maximum in flight.
    let (a, b) = (Upstream::always(refusing()).await, Upstream::always(Answer::silence()).await);
    let gateway = gateway_of((&a, FOLLOW), (&b, ONE_IN_FLIGHT), "").await;
    let mut in_flight = gateway.caller().await;
    in_flight.request("POST", CHAT, "", HELLO.as_bytes()).await;
    b.wait_until_seen(1).await;
    assert_eq!(gateway.chat(HELLO).await.refusal(), (429, "too_many_in_flight".into()));
}

#[tokio::test]
async fn a_request_waits_for_the_quotas_of_one_while_the_provider_of_the_other_refuses() {
    for is_first_refusing in [true, false] {
        let (refusing, other) = (Upstream::always(refusing()).await, Upstream::always(named("x")).await);
        let gateway = if is_first_refusing {
            gateway_of((&refusing, FOLLOW), (&other, ONE_A_SECOND), WAITS).await
        } else {
            gateway_of((&other, ONE_A_SECOND), (&refusing, FOLLOW), WAITS).await
        };
        let name = if is_first_refusing { "b" } else { "a" };
        assert_eq!(gateway.chat(HELLO).await.header("x-tollgate-upstream"), Some(name));
        if !is_first_refusing {
            assert_eq!(gateway.chat(HELLO).await.status, 429);
        }
        let started = Instant::now();
        let reply = gateway.chat(HELLO).await;
        assert_eq!((reply.status, reply.header("x-tollgate-upstream")), (200, Some(name)));
        let waited = started.elapsed();
        assert!(waited > Duration::from_millis(500) && waited < Duration::from_secs(3), "{waited:?}");
        assert_eq!(seen(&[&refusing, &other]), [1, 2]);
        nothing_is_held(&gateway).await;
    }
}
