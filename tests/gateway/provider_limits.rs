//! The limits that a provider states in its answers: shown, and with `provider_limits: follow` obeyed.

use crate::support::*;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// What the gateway reserves for a request of these tests, in tokens.
const COST: u64 = 100;
/// A provider's limit in tokens, and the time in which an empty bucket is full again.
const LIMIT: u64 = 4_000;
const PERIOD: Duration = Duration::from_secs(1);
const CLIENTS: usize = 50;

const REQUEST: &str = r#"{"model":"gpt-4o","max_tokens":92,"messages":[{"role":"user","content":"hello"}]}"#;

/// Which provider's headers are sent.
#[derive(Clone, Copy, Debug)]
enum Headers {
    OpenAi,
    Azure,
    Anthropic,
}

/// A provider that enforces a token bucket of its own.
#[derive(Debug)]
struct Provider {
    headers: Headers,
    /// The level in thousandths of a token, and when it was computed.
    bucket: Mutex<(u64, Instant)>,
    served: AtomicUsize,
    refused: AtomicUsize,
}

impl Provider {
    fn new(headers: Headers) -> Arc<Self> {
        Arc::new(Self {
            headers,
            bucket: Mutex::new((LIMIT * 1_000, Instant::now())),
            served: AtomicUsize::new(0),
            refused: AtomicUsize::new(0),
        })
    }

    fn answer(&self) -> Answer {
        let (left, is_served) = {
            let mut bucket = self.bucket.lock().unwrap();
            let elapsed = u64::try_from(bucket.1.elapsed().as_micros()).unwrap();
            let refilled = elapsed * LIMIT * 1_000 / u64::try_from(PERIOD.as_micros()).unwrap();
            *bucket = ((bucket.0 + refilled).min(LIMIT * 1_000), Instant::now());
            let is_served = bucket.0 >= COST * 1_000;
            if is_served {
                bucket.0 -= COST * 1_000;
            }
            (bucket.0, is_served)
        };
        let ms_of = |tokens: u64| tokens * 1_000 / LIMIT + 1;
        let (reset_ms, wait_ms) = (ms_of(LIMIT - left / 1_000), ms_of(COST.saturating_sub(left / 1_000)));
        let wait = if is_served { String::new() } else { format!("retry-after-ms: {wait_ms}\r\n") };
        let headers = match self.headers {
            Headers::OpenAi => format!(
                "x-ratelimit-limit-tokens: {LIMIT}\r\nx-ratelimit-remaining-tokens: {}\r\nx-ratelimit-reset-tokens: {reset_ms}ms\r\n{wait}",
                left / 1_000
            ),
            Headers::Azure => format!(
                "x-ratelimit-remaining-tokens: {}\r\nx-ratelimit-limit-tokens: {LIMIT}\r\nx-ratelimit-reset-tokens: {}.{:03}\r\n{wait}",
                left / 1_000,
                reset_ms / 1_000,
                reset_ms % 1_000
            ),
            Headers::Anthropic => {
                let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
                let at = i64::try_from(now.as_millis()).unwrap() + i64::try_from(reset_ms).unwrap();
                let at = jiff::Timestamp::from_millisecond(at).unwrap();
                format!(
                    "anthropic-ratelimit-tokens-limit: {LIMIT}\r\nanthropic-ratelimit-tokens-remaining: {}\r\nanthropic-ratelimit-tokens-reset: {at}\r\n{wait}",
                    left / 1_000
                )
            }
        };
        let json = "content-type: application/json\r\n";
        if is_served {
            self.served.fetch_add(1, Ordering::Relaxed);
            Answer::with_headers(200, &format!("{json}{headers}"), &chat_answer(&usage(HELLO_TOKENS, 92)))
        } else {
            self.refused.fetch_add(1, Ordering::Relaxed);
            Answer::with_headers(429, &format!("{json}{headers}"), r#"{"error":{"message":"slow down"}}"#)
        }
    }
}

async fn gateway_before(upstream: &Upstream, mode: &str, environment: &str) -> Gateway {
    Gateway::with(
        upstream,
        &format!("api_key: provider-key-1, provider_limits: {mode}"),
        &format!(
            "  staging: {{ upstream: backend, reserve: {{ completion: max_tokens{environment} }}, quotas: {{ requests: {{ limit: 1000000, per: minute }} }} }}\ndefault_environment: staging"
        ),
    )
    .await
}

/// Fifty clients that send one request after the other and obey `retry-after-ms`. Returns what the provider refused
/// and the percentage of its capacity that was used.
async fn load(headers: Headers, mode: &str) -> (usize, usize) {
    let provider = Provider::new(headers);
    let script = provider.clone();
    let upstream = Upstream::answering(move |_| script.answer()).await;
    let gateway = Arc::new(gateway_before(&upstream, mode, "").await);
    let started = Instant::now();
    let duration = PERIOD * 5;
    let clients = (0..CLIENTS).map(|_| {
        let gateway = gateway.clone();
        tokio::spawn(async move {
            let mut caller = gateway.caller().await;
            while started.elapsed() < duration {
                caller.request("POST", CHAT, "", REQUEST.as_bytes()).await;
                let reply = caller.reply().await;
                let wait = reply.header("retry-after-ms").map_or(0, |ms| ms.parse().unwrap());
                tokio::time::sleep(Duration::from_millis(wait)).await;
            }
        })
    });
    for client in clients.collect::<Vec<_>>() {
        client.await.unwrap();
    }
    let tokens = provider.served.load(Ordering::Relaxed) * usize::try_from(COST).unwrap();
    let limit = usize::try_from(LIMIT).unwrap();
    let elapsed = usize::try_from(duration.as_millis().max(1)).unwrap();
    let capacity = limit + limit * elapsed / usize::try_from(PERIOD.as_millis()).unwrap();
    (provider.refused.load(Ordering::Relaxed), tokens * 100 / capacity)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn followed_limits_are_used_up_and_hardly_ever_refuse() {
    for headers in [Headers::OpenAi, Headers::Azure, Headers::Anthropic] {
        let mut best = (usize::MAX, 0);
        // A busy machine delays clients, which leaves capacity unused.
        for _ in 0..3 {
            let (refused, used) = load(headers, "follow").await;
            println!("{headers:?}: {refused} refused, {used} % of the capacity used");
            best = (best.0.min(refused), best.1.max(used));
            if best.0 <= 5 && best.1 >= 97 {
                break;
            }
        }
        assert!(best.0 <= 5, "{headers:?}: at most one refusal a window, {} in five", best.0);
        assert!(best.1 >= 97, "{headers:?}: {} % of the capacity used", best.1);
    }
    let (refused, used) = load(Headers::OpenAi, "observe").await;
    println!("observe: {refused} refused, {used} % of the capacity used");
    assert!(refused > 5, "without following, the provider refuses");
}

#[tokio::test]
async fn a_request_that_the_provider_would_refuse_is_not_sent_and_costs_nothing() {
    let refusal = Answer::with_headers(429, "retry-after: 7\r\n", "{}");
    let upstream = Upstream::always(refusal).await;
    let gateway = gateway_before(&upstream, "follow", "").await;
    assert_eq!(gateway.chat(HELLO).await.status, 429);
    let reply = gateway.chat(HELLO).await;
    assert_eq!(reply.refusal(), (429, "upstream_rate_limited".into()));
    assert_eq!(reply.header("retry-after"), Some("7"));
    let ms: u64 = reply.header("retry-after-ms").unwrap().parse().unwrap();
    assert!((5_000..=7_000).contains(&ms), "{ms}");
    assert!(reply.text().contains("upstream 'backend'"), "{}", reply.text());
    assert_eq!(upstream.seen().len(), 1);
    // Another model has limits of its own.
    assert_eq!(gateway.chat(&HELLO.replace("gpt-4o", "gpt-4o-mini")).await.header("retry-after"), Some("7"));
    assert_eq!(upstream.seen().len(), 2);
    let environment = gateway.settled().await;
    assert_eq!(environment["totals"]["rejected"], 1);
    assert_eq!(environment["totals"]["requests"], 2);
    let system = gateway.admin_get("/api/system").await.json();
    let models = &system["upstreams"][0]["provider_limits"]["models"];
    assert_eq!((&models[0]["model"], &models[0]["refusals"]), (&"gpt-4o".into(), &1.into()));
    assert!(models[0]["closed_ms"].as_u64().unwrap() > 1_000, "{system}");
    let rejection = gateway.admin_get("/api/rejections").await.json()["rejections"][0].clone();
    assert_eq!(
        (&rejection["scope"], &rejection["name"]),
        (&"upstream".into(), &"backend".into()),
        "{rejection}"
    );
    assert_eq!(rejection["retry_after_ms"], ms, "{rejection}");
    let metrics = gateway.admin_get("/metrics").await;
    let want = r#"tollgate_rejections_total{code="upstream_rate_limited",environment="staging",kind="",per="",scope="upstream"} 1"#;
    assert!(metrics.text().contains(want), "{}", metrics.text());
}

#[tokio::test]
async fn a_request_that_may_wait_is_sent_when_the_time_is_over() {
    let count = AtomicUsize::new(0);
    let upstream = Upstream::answering(move |_| match count.fetch_add(1, Ordering::Relaxed) {
        0 => Answer::with_headers(429, "retry-after-ms: 300\r\n", "{}"),
        _ => Answer::chat(8, 1),
    })
    .await;
    let gateway = gateway_before(&upstream, "follow", ", max_wait: 5s").await;
    let gateway = Arc::new(gateway);
    assert_eq!(gateway.chat(HELLO).await.status, 429);
    let started = Instant::now();
    let waiting: Vec<_> = (0..5)
        .map(|_| {
            let gateway = gateway.clone();
            tokio::spawn(async move { gateway.chat(HELLO).await.status })
        })
        .collect();
    for request in waiting {
        assert_eq!(request.await.unwrap(), 200);
    }
    assert!(started.elapsed() >= Duration::from_millis(250), "{:?}", started.elapsed());
    assert_eq!(upstream.seen().len(), 6);
}

#[tokio::test]
async fn stated_limits_are_shown_and_lies_are_counted() {
    let headers = "x-ratelimit-limit-tokens: 30000\r\nx-ratelimit-remaining-tokens: 29000\r\nx-ratelimit-reset-tokens: 2s\r\n\
                   x-ratelimit-remaining-requests: -3\r\nx-ratelimit-limit-requests: 99999999999999999999\r\n";
    let upstream = Upstream::always(Answer::with_headers(200, headers, &chat_answer(&usage(8, 1)))).await;
    let gateway = gateway_before(&upstream, "observe", "").await;
    for _ in 0..20 {
        assert_eq!(gateway.chat(HELLO).await.status, 200);
    }
    let system = gateway.admin_get("/api/system").await.json();
    let limits = &system["upstreams"][0]["provider_limits"];
    assert_eq!((&limits["mode"], &limits["ignored_values"]), (&"observe".into(), &40.into()));
    let tokens = &limits["models"][0]["limits"][0];
    assert_eq!(
        (&tokens["kind"], &tokens["limit"], &tokens["remaining"]),
        (&"total_tokens".into(), &30_000.into(), &29_000.into())
    );
    let metrics = gateway.admin_get("/metrics").await;
    for line in [
        r#"tollgate_provider_limit{kind="total_tokens",model="gpt-4o",upstream="backend"} 30000"#,
        r#"tollgate_provider_remaining{kind="total_tokens",model="gpt-4o",upstream="backend"} 29000"#,
        r#"tollgate_provider_refusals_total{upstream="backend",model="gpt-4o"} 0"#,
        r#"tollgate_provider_ignored_values_total{upstream="backend"} 40"#,
    ] {
        assert!(metrics.text().lines().any(|found| found == line), "{line}\n{}", metrics.text());
    }
    // Without a key of the upstream's own, the limits are those of each caller's key.
    let settings = "provider_limits: follow";
    let environment = "  staging: { upstream: backend, quotas: { requests: { limit: 1000, per: minute } } }\ndefault_environment: staging";
    let gateway = Gateway::with(&upstream, settings, environment).await;
    assert_eq!(gateway.chat(HELLO).await.status, 200);
    let system = gateway.admin_get("/api/system").await.json();
    assert_eq!(system["upstreams"][0]["provider_limits"]["mode"], "ignore");
    assert_eq!(system["upstreams"][0]["provider_limits"]["models"], serde_json::json!([]));
}
