//! Routes and the quotas of upstreams: which one serves, what each is charged, and which refusal is the answer.

use super::*;

/// `upstreams` with these quotas of `a` and `b`.
fn with_quotas(a: (&Upstream, &str), b: (&Upstream, &str)) -> String {
    let line = |name: &str, (upstream, quotas): (&Upstream, &str)| {
        format!(
            "  {name}: {{ base_url: 'http://{}/v1', api_key: key-of-{name}, {quotas} }}\n",
            upstream.address
        )
    };
    line("a", a) + &line("b", b)
}

const IN_ORDER: &str = "{ models: ['gpt-4o'], upstream: [a, b] }";

#[tokio::test]
async fn an_upstream_without_room_in_its_own_quotas_is_left_out() {
    let (a, b) = (Upstream::always(named("a")).await, Upstream::always(named("b")).await);
    let text = with_quotas((&a, "quotas: { requests: { limit: 3, per: day } }"), (&b, "max_in_flight: 9"));
    let gateway = gateway_with(&text, "a", IN_ORDER, "").await;
    for want in ["a", "a", "a", "b", "b"] {
        let reply = gateway.chat(HELLO).await;
        assert_eq!((reply.status, reply.header("x-tollgate-upstream")), (200, Some(want)));
    }
    assert_eq!((seen(&[&a, &b]), attempts(&gateway, "a", "no_room").await), (vec![3, 2], 2));
    assert_eq!(gateway.settled_charges().await, [5, 40, 25, 65]);
    // Requests for other models have no other upstream.
    let refused = gateway.chat(&HELLO.replace("gpt-4o", "o3")).await;
    assert_eq!(refused.refusal(), (429, "insufficient_quota".into()));
    assert!(refused.text().contains("upstream 'a'"), "{}", refused.text());
}

#[tokio::test]
async fn only_the_upstream_that_answered_is_charged() {
    let (a, b) = (Upstream::always(Answer::json(503, "{}")).await, Upstream::always(named("b")).await);
    let quotas = "quotas: { total_tokens: { limit: 10000, per: day }, requests: { limit: 100, per: day } }";
    let gateway = gateway_with(&with_quotas((&a, quotas), (&b, quotas)), "a", IN_ORDER, "").await;
    let body = hello(r#""max_tokens":92"#);
    let reply = gateway.chat(&body).await;
    assert_eq!((reply.status, reply.header("x-tollgate-upstream")), (200, Some("b")));
    // The headers are those of the reservation at the upstream that answered.
    assert_eq!(reply.header("x-ratelimit-remaining-tokens"), Some("9900"));
    assert_eq!(gateway.settled_charges().await, [1, 8, 5, 13]);
    // A request to one upstream alone shows what is left of its quota.
    let direct = async |model: &str| {
        let reply = gateway.chat(&body.replace("gpt-4o", model)).await;
        (
            reply.header("x-ratelimit-remaining-tokens").unwrap().to_owned(),
            reply.header("x-ratelimit-remaining-requests").unwrap().to_owned(),
        )
    };
    gateway.settled().await;
    assert_eq!(
        direct("gpt-4.1").await,
        ("9900".into(), "99".into()),
        "the first upstream was charged nothing"
    );
    gateway.settled().await;
    let reply = gateway.chat(&body).await;
    assert_eq!(reply.header("x-ratelimit-remaining-tokens"), Some("9887"), "the second one was charged 13");
    assert_eq!(reply.header("x-ratelimit-remaining-requests"), Some("98"));
}

#[tokio::test]
async fn if_none_has_room_the_refusal_of_the_one_that_fits_first_is_the_answer() {
    let (a, b) = (Upstream::always(named("a")).await, Upstream::always(named("b")).await);
    let of = |per: &str| format!("quotas: {{ requests: {{ limit: 1, per: {per} }} }}");
    let text = with_quotas((&a, &of("day")), (&b, &of("minute")));
    let gateway = gateway_with(&text, "a", IN_ORDER, "").await;
    for want in ["a", "b"] {
        assert_eq!(gateway.chat(HELLO).await.header("x-tollgate-upstream"), Some(want));
    }
    let refused = gateway.chat(HELLO).await;
    assert_eq!(refused.refusal(), (429, "rate_limit_exceeded".into()));
    assert!(refused.text().contains("upstream 'b'"), "{}", refused.text());
    assert_eq!((seen(&[&a, &b]), gateway.settled_charges().await[0]), (vec![1, 1], 2));
}

#[tokio::test]
async fn a_failure_is_the_answer_if_the_next_upstream_has_no_room() {
    let failure = Answer::json(503, r#"{"error":{"message":"of a"}}"#);
    let (a, b) = (Upstream::always(failure).await, Upstream::always(named("b")).await);
    let text = with_quotas((&a, "max_in_flight: 9"), (&b, "quotas: { requests: { limit: 1, per: day } }"));
    let gateway = gateway_with(&text, "a", IN_ORDER, "").await;
    assert_eq!(gateway.chat(HELLO).await.header("x-tollgate-upstream"), Some("b"));
    let reply = gateway.chat(HELLO).await;
    assert_eq!((reply.status, reply.header("x-tollgate-upstream")), (503, Some("a")));
    assert!(reply.text().contains("of a"));
    assert_eq!(gateway.settled_charges().await, [2, 8, 5, 13]);
    assert_eq!(
        (attempts(&gateway, "a", "unavailable").await, attempts(&gateway, "b", "no_room").await),
        (2, 1)
    );
}

#[tokio::test]
async fn the_quotas_of_models_of_an_upstream_go_by_the_name_that_is_sent() {
    let a = Upstream::always(named("a")).await;
    let settings = "model_quotas: { 'sent-*': { requests: { limit: 1, per: day } } }";
    let text = format!("  a: {{ base_url: 'http://{}/v1', api_key: key-of-a, {settings} }}\n", a.address);
    let routes = "{ models: [alias], upstream: a, model: sent-1 }";
    let gateway = gateway_with(&text, "a", routes, "").await;
    let send = async |model: &str| gateway.chat(&HELLO.replace("gpt-4o", model)).await.status;
    assert_eq!((send("alias").await, send("alias").await), (200, 429));
    assert_eq!((send("other").await, send("sent-2").await), (200, 429));
}

/// Two environments burst over two upstreams, of which the first one fails now and then.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_burst_is_charged_exactly_at_the_upstreams_that_answered() {
    const REQUESTS: usize = 200;
    let count = std::sync::atomic::AtomicUsize::new(0);
    let a =
        Upstream::answering(move |_| match count.fetch_add(1, std::sync::atomic::Ordering::Relaxed) % 3 {
            0 => Answer::json(503, "{}"),
            _ => named("a"),
        })
        .await;
    let b = Upstream::always(named("b")).await;
    let quotas = "quotas: { total_tokens: { limit: 100000, per: day } }";
    let gateway = Arc::new(gateway_with(&with_quotas((&a, quotas), (&b, quotas)), "a", IN_ORDER, "").await);
    let clients = (0..10).map(|_| {
        let gateway = gateway.clone();
        tokio::spawn(async move {
            let mut by = [0, 0];
            for _ in 0..REQUESTS / 10 {
                let reply = gateway.chat(&hello(r#""max_tokens":92"#)).await;
                assert_eq!(reply.status, 200);
                by[usize::from(reply.header("x-tollgate-upstream") == Some("b"))] += 1;
            }
            by
        })
    });
    let mut by = [0, 0];
    for client in clients.collect::<Vec<_>>() {
        let of_client = client.await.unwrap();
        by = [by[0] + of_client[0], by[1] + of_client[1]];
    }
    assert_eq!(gateway.settled_charges().await, [200, 1_600, 1_000, 2_600]);
    assert!(by[0] > 100 && by[1] > 30, "{by:?}");
    assert_eq!(b.seen().len(), by[1], "each request that failed reached the second upstream once");
    // The next request of each upstream shows what the others have left.
    let left =
        |reply: &Reply| reply.header("x-ratelimit-remaining-tokens").unwrap().parse::<usize>().unwrap();
    let direct = hello(r#""max_tokens":92"#).replace("gpt-4o", "gpt-4.1");
    assert_eq!(left(&gateway.chat(&direct).await), 100_000 - 13 * by[0] - 100);
}
