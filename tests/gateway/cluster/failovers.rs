//! The master dies, and a replica that lacks its last writes becomes the master.

use super::Nodes;
use super::outages::{THOUSAND_TOKENS, count_admitted, hundred_tokens, wait_until_shared};
use crate::support::proxy::{Mode, Proxy};
use crate::support::redis::Redis;
use crate::support::*;
use std::time::Duration;

async fn wait_for(what: &str, condition: impl Fn() -> bool) {
    soon(what, async {
        while !tokio::task::block_in_place(&condition) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
}

/// A master, and its replica behind a proxy that can drop the replication.
struct Pair {
    master: Redis,
    replica: Redis,
    replication: Proxy,
    /// The proxy between the nodes and the master.
    clients: Proxy,
}

impl Pair {
    async fn start() -> Self {
        let mut master = Redis::start();
        let replication = Proxy::start(&master.socket()).await;
        let port = replication.port();
        let replica = Redis::with(|_| format!("--replicaof 127.0.0.1 {port}"));
        master.admin("CONFIG SET repl-diskless-sync-delay 0");
        wait_for("replication", || replica.info("replication", "master_link_status").unwrap() == "up").await;
        let clients = Proxy::start(&master.socket()).await;
        master.url = clients.url();
        Self { master, replica, replication, clients }
    }

    /// Waits until the replica has everything. From then on it receives nothing.
    async fn stop_replication(&self) {
        let offset =
            |server: &Redis, name| -> u64 { server.info("replication", name).unwrap().parse().unwrap() };
        let sent = offset(&self.master, "master_repl_offset");
        wait_for("the replica", || offset(&self.replica, "slave_repl_offset") >= sent).await;
        self.replication.set(Mode::Silent);
    }

    fn fail_over(&mut self) {
        self.replica.admin("REPLICAOF NO ONE");
        self.clients.redirect(&self.replica.socket());
        self.master.kill();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_charge_again_what_a_lagging_replica_lacks() {
    for policy in ["local", "closed"] {
        let mut pair = Pair::start().await;
        // The request whose prompt is "wait" is answered after the failover.
        let upstream = Upstream::answering(|request| {
            let steps = Answer::chat(8, 92).steps();
            let gate = request.text().contains("wait").then_some(Step::Gate);
            Answer::of(gate.into_iter().chain(steps).collect())
        })
        .await;
        let more = format!("on_failure: {policy}");
        let nodes = Nodes::start(&pair.master, &upstream, 2, THOUSAND_TOKENS, &more).await;
        wait_until_shared(&nodes, true).await;
        assert_eq!(count_admitted(&nodes[0], 1, "").await + count_admitted(&nodes[1], 1, "").await, 2);
        assert_eq!(nodes.levels().await, [800, 800]);
        pair.stop_replication().await;
        assert_eq!(count_admitted(&nodes[0], 3, "").await + count_admitted(&nodes[1], 1, "").await, 4);
        let mut open = nodes[1].caller().await;
        open.request("POST", CHAT, "", hundred_tokens().replace("hello", "wait").as_bytes()).await;
        upstream.wait_until_seen(7).await;
        assert_eq!(nodes.levels().await, [300, 300], "{policy}");
        tokio::task::block_in_place(|| pair.fail_over());
        // Each node finds the new master and repeats what it has reported.
        soon("the failover", async {
            while nodes.losses().await.contains(&0) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
        wait_until_shared(&nodes, true).await;
        assert_eq!(nodes.levels().await, [300, 300], "{policy}");
        assert_eq!(count_admitted(&nodes[0], 5, "insufficient_quota").await, 3, "{policy}");
        upstream.open_gate();
        assert_eq!(open.reply().await.status, 200);
        for node in nodes.iter() {
            assert_eq!(node.settled().await["quotas"][0]["level"], 0, "{policy}");
        }
    }
}
