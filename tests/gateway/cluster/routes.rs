//! A route with two upstreams with limits, on two nodes: what each upstream answers is charged there, exactly.

use crate::support::redis::Redis;
use crate::support::*;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Requests of 100 tokens for which each upstream has room. They hardly refill while a test runs.
const ROOM: [u64; 2] = [50, 30];

fn config(redis: &Redis, node: u32, upstreams: [&Upstream; 2]) -> String {
    let line = |name: &str, upstream: &Upstream, room: u64| {
        format!(
            "  {name}: {{ base_url: 'http://{}/v1', quotas: {{ total_tokens: {{ limit: 10, burst: {}, per: day, window: rolling }} }} }}\n",
            upstream.address,
            room * 100
        )
    };
    format!(
        "server: {{ listen: '127.0.0.1:0', flood_guard: 0, drain_timeout: 5s }}\nadmin: {{ listen: '127.0.0.1:0' }}\n\
         upstreams:\n{}{}environments:\n  staging:\n    upstream: a\n    routes: [{{ models: ['*'], upstream: [a, b] }}]\n    \
         reserve: {{ completion: max_tokens }}\n    quotas: {{ total_tokens: {{ limit: 1M, per: day }} }}\n\
         default_environment: staging\n{}\n",
        line("a", upstreams[0], ROOM[0]),
        line("b", upstreams[1], ROOM[1]),
        redis.store(node, "on_failure: closed")
    )
}

/// The level of each upstream, as a node reports it.
async fn levels(node: &Gateway) -> [u64; 2] {
    let shown = node.admin_get("/api/upstreams").await.json();
    [0, 1]
        .map(|at| shown["upstreams"][at]["quotas"][0]["level"].as_u64().unwrap_or_else(|| panic!("{shown}")))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_burst_over_two_nodes_is_charged_exactly_at_the_upstreams_that_answered() {
    let redis = Redis::start();
    let count = AtomicUsize::new(0);
    let answer = Answer::chat(8, 92);
    let good = answer.clone();
    let a = Upstream::answering(move |_| match count.fetch_add(1, Ordering::Relaxed) % 3 {
        0 => Answer::json(503, "{}"),
        _ => good.clone(),
    })
    .await;
    let b = Upstream::always(answer).await;
    let mut nodes = Vec::new();
    for n in 0..2 {
        nodes.push(Arc::new(Gateway::from_config(&config(&redis, n, [&a, &b])).await));
    }
    let body = hello(r#""max_tokens":92"#);
    let send = async |node: &Gateway| {
        let reply = node.chat(&body).await;
        let by = match reply.header("x-tollgate-upstream") {
            Some("a") => 0,
            Some("b") => 1,
            _ => 2,
        };
        assert!(matches!(reply.status, 200 | 429 | 503), "{}", reply.text());
        (reply.status == 200).then_some(by)
    };
    let callers = (0..16).map(|n| {
        let (node, body) = (nodes[n % 2].clone(), body.clone());
        tokio::spawn(async move {
            let mut by = [0_u64; 2];
            for _ in 0..6 {
                let reply = node.chat(&body).await;
                assert!(matches!(reply.status, 200 | 429 | 503), "{}", reply.text());
                if reply.status == 200 {
                    by[usize::from(reply.header("x-tollgate-upstream") == Some("b"))] += 1;
                }
            }
            by
        })
    });
    let mut by = [0, 0];
    for caller in callers.collect::<Vec<_>>() {
        let of_caller = caller.await.unwrap();
        by = [by[0] + of_caller[0], by[1] + of_caller[1]];
    }
    assert!(by[0] <= ROOM[0] && by[1] <= ROOM[1], "{by:?}");
    // What requests of the burst held for a time is there again: the rest is served to the last token.
    for n in 0..100 {
        if let Some(upstream) = send(&nodes[n % 2]).await {
            by[upstream] += 1;
        }
    }
    assert_eq!(by, ROOM);
    for node in &nodes {
        node.settled().await;
        soon("the levels", async {
            while levels(node).await != [0, 0] {
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            }
        })
        .await;
    }
    let charged: u64 = {
        let mut sum = 0;
        for node in &nodes {
            sum += node.charged().await[3];
        }
        sum
    };
    assert_eq!(charged, 100 * (ROOM[0] + ROOM[1]));
    assert_eq!(b.seen().len() as u64, ROOM[1]);
}
