//! Limits and quotas that change while requests are on their way to Redis, and callers that disconnect in that time.

use super::config;
use crate::support::redis::Redis;
use crate::support::*;
use serde_json::{Value, json};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

const REQUESTS: &str = "/api/environments/staging/quotas/requests/day";

/// The used amount of the environment's only quota on requests.
async fn used(gateway: &Gateway) -> u64 {
    let environment = gateway.environment().await;
    let quotas = environment["quotas"].as_array().unwrap();
    let quota = quotas.iter().find(|quota| quota["kind"] == "requests").unwrap();
    quota["used"].as_u64().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn callers_that_disconnect_at_once_leave_nothing_held_at_the_upstream() {
    let redis = Redis::start();
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let limits = "max_in_flight: 30, quotas: { total_tokens: { limit: 1M, per: day } } } }";
    let text = config(&redis, &upstream, 0, "{ requests: { limit: 1M, per: day } }", "");
    let text = text.replace("/v1' } }", &format!("/v1', {limits}"));
    let gateway = Arc::new(Gateway::from_config(&text).await);
    let callers = (0..8_u64).map(|n| {
        let gateway = gateway.clone();
        tokio::spawn(async move {
            for round in 0..100 {
                let mut caller = gateway.caller().await;
                caller.request("POST", CHAT, "", HELLO.as_bytes()).await;
                tokio::time::sleep(Duration::from_micros((n * 331 + round * 97) % 2_000)).await;
            }
        })
    });
    for caller in callers.collect::<Vec<_>>() {
        caller.await.unwrap();
    }
    let is_free = |shown: &Value| {
        let shown = &shown["upstreams"][0];
        shown["in_flight"] == 0 && shown["quotas"][0]["held"] == 0
    };
    for _ in 0..100 {
        if is_free(&gateway.admin_get("/api/upstreams").await.json()) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let shown = gateway.admin_get("/api/upstreams").await.json();
    assert!(is_free(&shown), "{shown}");
    assert_eq!(gateway.chat(HELLO).await.status, 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_that_cross_a_change_of_a_limit_or_of_enforce_are_admitted_and_charged_once() {
    let redis = Redis::start();
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let text = config(&redis, &upstream, 0, "{ requests: { limit: unlimited, per: day } }", "");
    let gateway = Arc::new(Gateway::from_config(&text).await);
    let (served, is_over) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
    let callers = (0..8).map(|_| {
        let (gateway, served, is_over) = (gateway.clone(), served.clone(), is_over.clone());
        tokio::spawn(async move {
            while !is_over.load(Ordering::Relaxed) {
                let reply = gateway.chat(HELLO).await;
                assert_eq!(reply.status, 200, "{}", reply.text());
                served.fetch_add(1, Ordering::Relaxed);
            }
        })
    });
    let callers: Vec<_> = callers.collect();
    for _ in 0..20 {
        change(&gateway, "PUT", REQUESTS, r#"{"limit": "1M"}"#).await;
        change(&gateway, "PATCH", "/api/environments/staging", r#"{"enforce": false}"#).await;
        change(&gateway, "DELETE", REQUESTS, "").await;
        change(&gateway, "PATCH", "/api/environments/staging", r#"{"enforce": null}"#).await;
    }
    is_over.store(true, Ordering::Relaxed);
    for caller in callers {
        caller.await.unwrap();
    }
    let served = served.load(Ordering::Relaxed);
    gateway.settled().await;
    // A node reports the counts of unlimited quotas twice a second.
    for _ in 0..50 {
        if used(&gateway).await == served {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(used(&gateway).await, served);
}

/// A gateway with this quota on requests, whose config is in a file.
async fn with_quota(redis: &Redis, upstream: &Upstream, file: &Path, quota: &str) -> Gateway {
    write(redis, upstream, file, quota);
    Gateway::from_file(file).await
}

fn write(redis: &Redis, upstream: &Upstream, file: &Path, quota: &str) {
    let quotas = format!("{{ requests: {{ limit: 40, {quota} }} }}");
    std::fs::write(file, config(redis, upstream, 0, &quotas, "")).unwrap();
}

#[tokio::test]
async fn a_quota_that_is_changed_and_changed_back_keeps_what_was_used_in_between() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("tollgate.yaml");
    for (first, other) in [
        ("per: day, timezone: UTC", "per: day, timezone: Europe/Berlin"),
        ("per: day", "per: week"),
        ("per: day, window: calendar", "per: day, window: rolling"),
    ] {
        for restarts in [false, true] {
            let redis = Redis::start();
            let mut gateway = with_quota(&redis, &upstream, &file, first).await;
            for (amount, quota, expected) in [(10, other, 10), (15, first, 25), (3, other, 28)] {
                for _ in 0..amount {
                    assert_eq!(gateway.chat(HELLO).await.status, 200);
                }
                gateway.settled().await;
                if restarts {
                    gateway.shutdown().await;
                    gateway = with_quota(&redis, &upstream, &file, quota).await;
                } else {
                    write(&redis, &upstream, &file, quota);
                    change(&gateway, "POST", "/api/config/reload", "").await;
                }
                let is_right = async || used(&gateway).await == expected;
                for _ in 0..30 {
                    if is_right().await {
                        break;
                    }
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
                let environment = gateway.environment().await;
                assert!(is_right().await, "{first} -> {other}, {restarts}: {expected} {environment}");
            }
            let level = json!(12);
            let environment = gateway.environment().await;
            assert_eq!(environment["quotas"][0]["level"], level, "{first} -> {other}, {restarts}");
            gateway.shutdown().await;
        }
    }
}
