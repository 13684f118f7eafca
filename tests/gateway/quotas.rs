//! Which requests the quotas admit, and the headers and errors that callers receive.

use crate::support::*;

#[tokio::test]
async fn each_kind_of_quota_denies_with_a_429_in_openais_shape() {
    let upstream = Upstream::always(Answer::chat(8, 10)).await;
    for (kind, error_type, requested) in [
        ("total_tokens", "tokens", 108),
        ("prompt_tokens", "tokens", 8),
        ("completion_tokens", "tokens", 100),
        ("requests", "requests", 1),
    ] {
        let limit = requested + requested / 2;
        let gateway =
            Gateway::in_front_of(&upstream, &format!("{{ {kind}: {{ limit: {limit}, per: hour }} }}")).await;
        // The reported usage leaves too little room for another request.
        let first = gateway.chat(&hello(r#""max_tokens":100"#)).await;
        assert_eq!(first.status, 200, "{kind}");
        let mut denied = gateway.chat(&hello(r#""max_tokens":100"#)).await;
        for _ in 0..9 {
            if denied.status != 200 {
                break;
            }
            denied = gateway.chat(&hello(r#""max_tokens":100"#)).await;
        }
        assert_eq!(denied.refusal(), (429, "rate_limit_exceeded".into()), "{kind}");
        let error = &denied.json()["error"];
        assert_eq!(error["type"], error_type);
        let quota = &error["quotas"][0];
        assert_eq!((quota["kind"].as_str(), quota["per"].as_str()), (Some(kind), Some("hour")));
        assert_eq!((quota["limit"].as_u64(), quota["requested"].as_u64()), (Some(limit), Some(requested)));
        let ms: u64 = denied.header("retry-after-ms").unwrap().parse().unwrap();
        let seconds: u64 = denied.header("retry-after").unwrap().parse().unwrap();
        assert_eq!((quota["retry_after_ms"].as_u64(), seconds), (Some(ms), ms.div_ceil(1_000)), "{kind}");
        assert!(seconds >= 1);
        // An hourly quota refills more slowly than `retry_patience` allows.
        assert_eq!(denied.header("x-should-retry"), Some("false"));
        assert_eq!(denied.header("x-tollgate-environment"), Some("staging"));
        for word in ["staging", kind, "hour", "used", "held"] {
            assert!(error["message"].as_str().unwrap().contains(word), "{word}: {error}");
        }
        let environment = gateway.settled().await;
        assert!(environment["totals"]["rejected"].as_u64() >= Some(1));
    }
}

#[tokio::test]
async fn a_retry_after_the_given_time_is_admitted() {
    let upstream = Upstream::always(Answer::chat(8, 100)).await;
    let gateway = Gateway::in_front_of(&upstream, "{ total_tokens: { limit: 200, per: second } }").await;
    let request = hello(r#""max_tokens":100"#);
    assert_eq!(gateway.chat(&request).await.status, 200);
    let denied = gateway.chat(&request).await;
    assert_eq!(denied.status, 429);
    assert_eq!(denied.header("x-should-retry"), None);
    let wait: u64 = denied.header("retry-after-ms").unwrap().parse().unwrap();
    assert!((1..=1_000).contains(&wait), "{wait}");
    tokio::time::sleep(std::time::Duration::from_millis(wait)).await;
    assert_eq!(gateway.chat(&request).await.status, 200);
}

#[tokio::test]
async fn a_spent_daily_quota_is_reported_as_insufficient_quota() {
    let upstream = Upstream::always(Answer::chat(8, 10)).await;
    let gateway =
        Gateway::in_front_of(&upstream, "{ requests: [{ limit: 1, per: day }, { limit: 1, per: second }] }")
            .await;
    assert_eq!(gateway.chat(HELLO).await.status, 200);
    let denied = gateway.chat(HELLO).await;
    assert_eq!(denied.refusal(), (429, "insufficient_quota".into()));
    assert_eq!(denied.json()["error"]["type"], "insufficient_quota");
    assert_eq!(denied.header("x-should-retry"), Some("false"));
    let seconds: u64 = denied.header("retry-after").unwrap().parse().unwrap();
    assert!((2..=86_400).contains(&seconds) || seconds == 1, "{seconds}");
}

#[tokio::test]
async fn a_request_larger_than_the_quota_is_a_400_and_is_not_forwarded() {
    let upstream = Upstream::always(Answer::chat(8, 10)).await;
    let gateway = Gateway::in_front_of(&upstream, "{ total_tokens: { limit: 100, per: minute } }").await;
    let refused = gateway.chat(&hello(r#""max_tokens":101"#)).await;
    assert_eq!(refused.refusal(), (400, "request_exceeds_quota".into()));
    assert_eq!(refused.header("retry-after"), None);
    assert!(refused.json()["error"]["message"].as_str().unwrap().contains("100"));
    assert!(upstream.seen().is_empty());
    assert_eq!(gateway.settled_charges().await, [0, 0, 0, 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_256_parallel_requests_exactly_those_that_fit_are_served() {
    // Every request reserves and uses 8 + 92 tokens, so there is room for 50. The upstream answers only after all
    // requests are admitted or denied, so that no settlement makes room.
    let served = Answer::of(vec![Step::Gate]).then(Step::Send(
        format!(
            "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{}",
            chat_answer(&usage(8, 92)).len(),
            chat_answer(&usage(8, 92))
        )
        .into(),
    ));
    let upstream = Upstream::always(served).await;
    let gateway = std::sync::Arc::new(
        Gateway::in_front_of(&upstream, "{ total_tokens: { limit: 5000, per: day } }").await,
    );
    let mut calls = tokio::task::JoinSet::new();
    for _ in 0..256 {
        let gateway = gateway.clone();
        calls.spawn(async move { gateway.chat(&hello(r#""max_tokens":92"#)).await.status });
    }
    let (mut ok, mut denied) = (0, 0);
    while denied < 206 {
        match soon("a denial", calls.join_next()).await.unwrap().unwrap() {
            429 => denied += 1,
            status => panic!("{status} before the gate was opened"),
        }
    }
    (0..50).for_each(|_| upstream.open_gate());
    while let Some(status) = soon("an answer", calls.join_next()).await {
        assert_eq!(status.unwrap(), 200);
        ok += 1;
    }
    assert_eq!((ok, denied, upstream.seen().len()), (50, 206, 50));
    let environment = gateway.settled().await;
    assert_eq!(environment["totals"]["total_tokens"], 5_000);
    assert_eq!(environment["quotas"][0]["level"], 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn parallel_requests_cannot_overspend_a_quota() {
    let upstream = Upstream::always(Answer::chat(8, 22)).await;
    let gateway = std::sync::Arc::new(
        Gateway::in_front_of(&upstream, "{ total_tokens: { limit: 100, per: day } }").await,
    );
    let mut calls = tokio::task::JoinSet::new();
    for _ in 0..5 {
        let gateway = gateway.clone();
        calls.spawn(async move { gateway.chat(&hello(r#""max_tokens":22"#)).await.status });
    }
    while calls.join_next().await.is_some() {}
    let total = gateway.settled_charges().await[3];
    assert!(total <= 100, "{total}");
}

#[tokio::test]
async fn the_prior_allowance_fits_into_a_small_quota() {
    let upstream = Upstream::always(Answer::chat(8, 5)).await;
    let gateway =
        Gateway::reserving(&upstream, "{ total_tokens: { limit: 50, per: minute } }", "adaptive").await;
    assert_eq!(gateway.chat(HELLO).await.status, 200);
}

#[tokio::test]
async fn without_a_reservation_requests_are_admitted_while_the_level_is_positive() {
    let upstream = Upstream::always(Answer::chat(8, 30)).await;
    let environments = "  staging:\n    upstream: backend\n    reserve: { prompt: none, completion: none }\n    quotas: { total_tokens: { limit: 50, per: day } }\ndefault_environment: staging";
    let gateway = Gateway::with(&upstream, "", environments).await;
    assert_eq!(gateway.chat(HELLO).await.status, 200);
    assert_eq!(gateway.chat(HELLO).await.status, 200);
    let environment = gateway.settled().await;
    assert_eq!(environment["quotas"][0]["level"], 50 - 76);
    assert_eq!(gateway.chat(HELLO).await.status, 429);
}

#[tokio::test]
async fn the_unused_part_of_a_fixed_allowance_is_refunded() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let gateway =
        Gateway::reserving(&upstream, "{ completion_tokens: { limit: 1000, per: day } }", "700").await;
    for _ in 0..3 {
        let reply = gateway.chat(HELLO).await;
        assert_eq!(reply.status, 200);
        assert!(
            reply.header("x-ratelimit-remaining-completion-tokens").unwrap().parse::<u64>().unwrap() <= 300
        );
    }
    let environment = gateway.settled().await;
    assert_eq!(environment["quotas"][0]["level"], 994);
}

#[tokio::test]
async fn rate_limit_headers_report_the_tightest_quota() {
    let limited = Answer::with_headers(
        200,
        "content-type: application/json\r\nx-ratelimit-remaining-requests: 9999\r\nx-ratelimit-remaining-tokens: 7777\r\nx-tollgate-lines: \r\nx-request-id: up-1\r\n",
        &chat_answer(&usage(8, 2)),
    );
    let upstream = Upstream::always(limited).await;
    let quotas = "{ total_tokens: [{ limit: 1000, per: minute }, { limit: 600, per: day }] }";
    let gateway = Gateway::in_front_of(&upstream, quotas).await;
    let reply = gateway.chat(&hello(r#""max_tokens":92"#)).await;
    for (name, value) in [
        ("x-ratelimit-limit-tokens", "600"),
        ("x-ratelimit-remaining-tokens", "500"),
        // The environment has no quota of requests, so the upstream's header stays.
        ("x-ratelimit-remaining-requests", "9999"),
        ("x-tollgate-environment", "staging"),
        ("x-tollgate-estimated-prompt-tokens", "8"),
        ("x-request-id", "up-1"),
    ] {
        assert_eq!(reply.headers_named(name), [value], "{name}");
    }
    assert!(reply.header("x-ratelimit-reset-tokens").unwrap().ends_with('s'));
    assert_eq!(
        reply.header("x-tollgate-lines"),
        None,
        "the gateway's own mark does not pass, from wherever it comes"
    );
    assert_eq!(reply.header("x-ratelimit-limit-prompt-tokens"), None);
}

#[tokio::test]
async fn a_request_must_fit_the_quotas_of_environment_caller_and_model() {
    let upstream = Upstream::always(Answer::chat(8, 10)).await;
    let environments = "  production:\n    upstream: backend\n    reserve: { completion: 10 }\n    keys:\n      - { name: web, secret: key-of-the-web-app-1, quotas: { requests: { limit: 1, per: day } } }\n      - { name: batch, secret: key-of-the-batch-job }\n    quotas: { requests: { limit: 3, per: day } }\n    model_quotas: { 'gpt-4o*': { completion_tokens: { limit: 15, per: day } } }";
    let gateway = Gateway::with(&upstream, "", environments).await;
    let as_caller = async |key: &str, model: &str| {
        let headers = format!("authorization: Bearer {key}\r\n");
        gateway.send("POST", CHAT, &headers, &HELLO.replace("gpt-4o", model)).await.status
    };
    assert_eq!(as_caller("key-of-the-web-app-1", "gpt-4o").await, 200);
    assert_eq!(as_caller("key-of-the-web-app-1", "o3").await, 429, "the caller's quota is spent");
    assert_eq!(as_caller("key-of-the-batch-job", "gpt-4o-mini").await, 429, "the model's quota is spent");
    assert_eq!(as_caller("key-of-the-batch-job", "o3").await, 200);
    assert_eq!(as_caller("key-of-the-batch-job", "o3").await, 200);
    assert_eq!(as_caller("key-of-the-batch-job", "o3").await, 429, "the environment's quota is spent");
    let environment = gateway.settled().await;
    assert_eq!(environment["totals"]["requests"], 3);
    let scopes: Vec<_> =
        environment["quotas"].as_array().unwrap().iter().map(|q| q["scope"].as_str().unwrap()).collect();
    assert_eq!(scopes[..3], ["environment", "caller", "model"]);
    assert!(scopes[3..].iter().all(|scope| *scope == "environment"), "the unlimited ones");
}

#[tokio::test]
async fn max_in_flight_is_enforced() {
    let upstream = Upstream::always(Answer::of(vec![Step::Gate])).await;
    let environments = "  staging: { upstream: backend, max_in_flight: 1, quotas: { requests: { limit: 100, per: minute } } }\ndefault_environment: staging";
    let gateway = Gateway::with(&upstream, "", environments).await;
    let mut first = gateway.caller().await;
    first.request("POST", CHAT, "", HELLO.as_bytes()).await;
    upstream.wait_until_seen(1).await;
    assert_eq!(gateway.chat(HELLO).await.refusal(), (429, "too_many_in_flight".into()));
    drop(first);
    gateway.settled().await;
}

#[tokio::test]
async fn embeddings_need_no_completion_tokens_and_pass_a_spent_completion_quota() {
    let upstream = Upstream::answering(|seen| {
        if seen.target().contains("embeddings") {
            Answer::json(200, r#"{"data":[],"usage":{"prompt_tokens":5,"total_tokens":5}}"#)
        } else {
            Answer::chat(8, 10)
        }
    })
    .await;
    let gateway = Gateway::reserving(&upstream, "{ completion_tokens: { limit: 10, per: day } }", "10").await;
    assert_eq!(gateway.chat(HELLO).await.status, 200);
    assert_eq!(gateway.chat(HELLO).await.status, 429);
    let embeddings =
        gateway.post("/v1/embeddings", r#"{"model":"text-embedding-3-small","input":["one","two"]}"#).await;
    assert_eq!(embeddings.status, 200);
    assert_eq!(gateway.settled_charges().await, [2, 13, 10, 23]);
}
