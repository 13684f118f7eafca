//! Gateways that share quotas in Redis, with and without faults of Redis. Each test starts its own Redis server.

mod changes;
mod failovers;
mod failure_policies;
mod load;
mod nodes;
mod outages;
mod routes;
mod stalls;

use crate::support::redis::Redis;
use crate::support::{Gateway, Upstream};

/// Gateways that share one Redis.
pub struct Nodes(Vec<Gateway>);

impl Nodes {
    /// Starts nodes with these quotas in the environment `staging`. `more`: further settings of `store.redis`.
    pub async fn start(redis: &Redis, upstream: &Upstream, nodes: u32, quotas: &str, more: &str) -> Self {
        let mut all = Vec::new();
        for n in 0..nodes {
            all.push(Gateway::from_config(&config(redis, upstream, n, quotas, more)).await);
        }
        Self(all)
    }

    /// The level of the first quota, as each node reports it.
    pub async fn levels(&self) -> Vec<i64> {
        let mut levels = Vec::new();
        for node in &self.0 {
            levels.push(node.environment().await["quotas"][0]["level"].as_i64().unwrap());
        }
        levels
    }

    /// How often each node has lost Redis.
    pub async fn losses(&self) -> Vec<u64> {
        let mut losses = Vec::new();
        for node in &self.0 {
            let metrics = node.admin_get("/metrics").await;
            let name = r#"tollgate_redis_losses_total{environment="staging"} "#;
            let count = metrics.text().lines().find_map(|line| line.strip_prefix(name)?.parse().ok());
            losses.push(count.unwrap());
        }
        losses
    }
}

impl std::ops::Deref for Nodes {
    type Target = [Gateway];

    fn deref(&self) -> &[Gateway] {
        &self.0
    }
}

/// The config of node number `n`.
pub fn config(redis: &Redis, upstream: &Upstream, n: u32, quotas: &str, more: &str) -> String {
    format!(
        "server: {{ listen: '127.0.0.1:0', flood_guard: 0, drain_timeout: 5s }}\nadmin: {{ listen: '127.0.0.1:0' }}\n\
         upstreams: {{ backend: {{ base_url: 'http://{}/v1' }} }}\n\
         environments: {{ staging: {{ upstream: backend, reserve: {{ completion: max_tokens }}, quotas: {quotas} }} }}\n\
         default_environment: staging\n{}\n",
        upstream.address,
        redis.store(n, more)
    )
}
