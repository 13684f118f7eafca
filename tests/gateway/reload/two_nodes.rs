//! Two nodes that share their quotas in Redis reload at different times.

use super::*;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

fn node_text(redis: &Redis, upstream: &Upstream, node: u32, quotas: &str) -> String {
    text(upstream, &staging(quotas)).replace("store: { memory: true }", &redis.store(node, ""))
}

async fn two_nodes(redis: &Redis, quotas: &str) -> [Live; 2] {
    let mut nodes = Vec::new();
    for node in 0..2 {
        let upstream = Upstream::always(Answer::chat(8, 12)).await;
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("t.yaml");
        fs::write(&file, node_text(redis, &upstream, node, quotas)).unwrap();
        let gateway = Gateway::from_file(&file).await;
        nodes.push(Live { folder, upstream, gateway });
    }
    let Ok(nodes) = nodes.try_into() else { panic!("there are two") };
    nodes
}

async fn change(redis: &Redis, nodes: &[Live; 2], node: usize, quotas: &str) {
    let text = node_text(redis, &nodes[node].upstream, u32::try_from(node).unwrap(), quotas);
    let reply = nodes[node].change_text(&text).await;
    assert_eq!(reply.status, 200, "{}", reply.text());
}

async fn both_have(nodes: &[Live; 2], expected: [i64; 3]) {
    for node in nodes {
        let reached = async {
            while node.amounts().await != expected {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let within = tokio::time::timeout(EVENT_TIMEOUT, reached).await;
        assert!(within.is_ok(), "{:?} instead of {expected:?}", node.amounts().await);
    }
}

#[tokio::test]
async fn the_limits_of_the_newest_file_are_in_force_on_all_nodes_and_balances_carry_over() {
    let redis = Redis::start();
    let nodes = two_nodes(&redis, DAY).await;
    for node in &nodes {
        assert_eq!(node.gateway.chat(&hello(r#""max_tokens":12"#)).await.status, 200);
    }
    both_have(&nodes, [1_000, 40, 960]).await;
    change(&redis, &nodes, 0, "{ total_tokens: { limit: 2000, per: day } }").await;
    both_have(&nodes, [2_000, 40, 1_960]).await;
    tokio::time::sleep(Duration::from_millis(10)).await;
    change(&redis, &nodes, 1, "{ total_tokens: { limit: 500, per: day } }").await;
    both_have(&nodes, [500, 40, 460]).await;
    // Another period is another quota, which starts with the used amount.
    for node in 0..2 {
        change(&redis, &nodes, node, "{ total_tokens: { limit: 300, per: week } }").await;
        assert_eq!(nodes[node].gateway.chat(&hello(r#""max_tokens":12"#)).await.status, 200);
    }
    both_have(&nodes, [300, 80, 220]).await;
    for node in 0..2 {
        change(&redis, &nodes, node, DAY).await;
    }
    both_have(&nodes, [1_000, 80, 920]).await;
}

/// A hundred reloads while both nodes serve requests: no usage is lost, and no more than the limit is admitted.
#[tokio::test]
async fn no_balance_is_lost_in_a_hundred_reloads_under_load() {
    let redis = Redis::start();
    let nodes = two_nodes(&redis, "{ total_tokens: { limit: 1000000, per: day } }").await;
    let (is_over, served) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let mut load = tokio::task::JoinSet::new();
    for n in 0..4 {
        let (address, is_over, served) = (nodes[n % 2].gateway.address, is_over.clone(), served.clone());
        load.spawn(async move {
            let mut caller = Caller::connect(address).await;
            while !is_over.load(Ordering::Relaxed) {
                caller.request("POST", CHAT, "", hello(r#""max_tokens":12"#).as_bytes()).await;
                let reply = caller.reply().await;
                assert_eq!(reply.status, 200, "{}", reply.text());
                served.fetch_add(20, Ordering::Relaxed);
            }
        });
    }
    for n in 0..100 {
        let quotas = match n % 4 {
            0 => "{ total_tokens: { limit: 2000000, per: day }, requests: { limit: 900000, per: minute } }",
            1 => "{ requests: { limit: 800000, per: minute }, total_tokens: { limit: 3000000, per: day } }",
            2 => "{ total_tokens: { limit: 1000000, per: day } }",
            _ => "{ total_tokens: [{ limit: 1500000, per: day }, { limit: 9000000, per: month }] }",
        };
        change(&redis, &nodes, n % 2, quotas).await;
    }
    is_over.store(true, Ordering::Relaxed);
    while let Some(ended) = load.join_next().await {
        ended.unwrap();
    }
    for node in 0..2 {
        change(&redis, &nodes, node, "{ total_tokens: { limit: 4000000, per: day } }").await;
    }
    let served = i64::try_from(served.load(Ordering::Relaxed)).unwrap();
    assert!(served > 0);
    both_have(&nodes, [4_000_000, served, 4_000_000 - served]).await;
}
