//! Nodes as in the gateway: accounts that share their counters.

use super::is_within;
use super::server::Server;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tollgate::config::parse;
use tollgate::ledger::{Account, Demand};
use tollgate::quota::{Amounts, Subject};

/// A quota that is never exhausted.
const PLENTY: &str = "{ total_tokens: { limit: 1000000000, per: minute } }";
/// A quota for 50 requests of 20 tokens.
const FIFTY: &str = "{ total_tokens: { limit: 10, burst: 1000, per: day, window: rolling } }";

struct Node {
    account: Arc<Account>,
    stop: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
}

impl Node {
    /// Joins. A separate thread synchronises with Redis, as in a gateway.
    fn start(server: &Server, name: &str, quotas: &str, settings: &str) -> Self {
        let text = format!(
            "upstreams: {{ u: {{ base_url: http://u/v1 }} }}\n\
             environments: {{ e: {{ upstream: u, reserve: {{ completion: max_tokens }}, quotas: {quotas} }} }}\n\
             store: {{ redis: {{ url: 'redis://127.0.0.1:{}', {settings} }} }}\n",
            server.port
        );
        let loaded = parse(&text, "bench.yaml", &|_| None, &[]).unwrap_or_else(|faults| panic!("{faults}"));
        let environment = &loaded.config.environments[0];
        let redis = loaded.config.store.redis.as_ref().unwrap();
        let account =
            Arc::new(Account::open(environment).share(environment, redis, name, (None, 1)).unwrap());
        let (stop, stops) = watch::channel(false);
        let synced_account = account.clone();
        let thread = std::thread::spawn(move || {
            runtime().block_on(async {
                let connection = synced_account.redis_connection().unwrap().clone();
                tokio::spawn(connection.run());
                synced_account.run_redis_sync(stops).await;
            });
        });
        let node = Self { account, stop, thread: Some(thread) };
        assert!(node.wait_until_shared(Duration::from_secs(10)).is_some(), "the node does not join");
        node
    }

    /// Waits until the counters are shared, at most for this time. Returns how long that took.
    fn wait_until_shared(&self, max_wait: Duration) -> Option<Duration> {
        let begun = Instant::now();
        while begun.elapsed() < max_wait {
            if self.account.redis_status().is_some_and(|redis| redis.unavailable_reason.is_none()) {
                return Some(begun.elapsed());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        None
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.stop.send_replace(true);
        drop(self.thread.take().map(JoinHandle::join));
    }
}

fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

fn demand() -> Demand<'static> {
    Demand {
        subject: Subject { caller: None, model: "m" },
        prompt: 8,
        generates: true,
        cap: Some(12),
        completions: 1,
        backends: &[],
        may_clamp: true,
    }
}

/// Reserves and settles one request, which spends what it reserved. Returns whether it was admitted, and how long the
/// reservation took.
async fn request(account: &Arc<Account>) -> (bool, Duration) {
    let begun = Instant::now();
    let reserved = account.reserve(&demand(), Duration::ZERO).await;
    let took = begun.elapsed();
    let is_admitted = reserved.is_ok();
    if let Ok(mut reservation) = reserved {
        reservation.observe(Amounts::of_request(8, 12));
    }
    (is_admitted, took)
}

/// Mean, median, 99th percentile and maximum, in microseconds.
fn microseconds(mut took: Vec<Duration>) -> [f64; 4] {
    took.sort_unstable();
    let us = |time: Duration| time.as_secs_f64() * 1e6;
    let at = |part: f64| us(took[((took.len() as f64 * part) as usize).min(took.len() - 1)]);
    [us(took.iter().sum::<Duration>()) / took.len() as f64, at(0.5), at(0.99), at(1.0)]
}

pub fn measure(is_quick: bool) -> bool {
    let calls = if is_quick { 3_000 } else { 30_000 };
    let mut is_ok = reservations(calls);
    is_ok &= bursts();
    is_ok & losses()
}

fn reservations(calls: usize) -> bool {
    println!(
        "\n### one reservation in microseconds; reservations per second with 64 concurrent requests at each node\n"
    );
    println!("| | mean | p50 | p99 | max | 1 node | 4 nodes |");
    println!("| --- | --- | --- | --- | --- | --- | --- |");
    let mut is_ok = true;
    for (name, settings, max_mean) in [("by a call", "", f64::MAX), ("from a lease", "lease: true", 10.0)] {
        let server = Server::start();
        let node = Node::start(&server, "one", PLENTY, settings);
        std::thread::sleep(Duration::from_millis(600));
        let took = runtime().block_on(async {
            let mut all = Vec::with_capacity(calls);
            for n in 0..calls {
                all.push(request(&node.account).await.1);
                if n % 100 == 0 {
                    tokio::time::sleep(Duration::from_millis(2)).await;
                }
            }
            all
        });
        let [mean, p50, p99, max] = microseconds(took);
        drop(node);
        let [one, four] = [1, 4].map(|nodes| rate(&server, nodes, calls, settings));
        println!("| {name} | {mean:.1} | {p50:.1} | {p99:.1} | {max:.0} | {one:.0} | {four:.0} |");
        is_ok &= is_within("microseconds for a reservation from a lease", mean, max_mean);
    }
    is_ok
}

/// Reservations per second.
fn rate(server: &Server, nodes: usize, calls: usize, settings: &str) -> f64 {
    let nodes: Vec<_> =
        (0..nodes).map(|n| Node::start(server, &format!("rate-{n}"), PLENTY, settings)).collect();
    let begun = Instant::now();
    std::thread::scope(|scope| {
        for node in &nodes {
            scope.spawn(|| {
                runtime().block_on(async {
                    let mut tasks = JoinSet::new();
                    for _ in 0..64 {
                        let account = node.account.clone();
                        tasks.spawn(async move {
                            for _ in 0..calls / 64 {
                                assert!(request(&account).await.0, "the quota is never exhausted");
                            }
                        });
                    }
                    tasks.join_all().await;
                });
            });
        }
    });
    (nodes.len() * (calls / 64 * 64)) as f64 / begun.elapsed().as_secs_f64()
}

fn bursts() -> bool {
    println!("\n### 1,000 concurrent requests at a quota for 50\n");
    println!("| nodes | admitted | over | all decided after |\n| --- | --- | --- | --- |");
    let mut is_ok = true;
    for count in [2, 4, 8] {
        for settings in ["on_failure: closed", "on_failure: closed, lease: true"] {
            let server = Server::start();
            let nodes: Vec<_> =
                (0..count).map(|n| Node::start(&server, &format!("n{n}"), FIFTY, settings)).collect();
            let begun = Instant::now();
            let admitted: usize = std::thread::scope(|scope| {
                let threads: Vec<_> =
                    nodes.iter().map(|node| scope.spawn(|| burst(node, 1_000 / count))).collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).sum()
            });
            let took = begun.elapsed().as_millis();
            let over = admitted.saturating_sub(50);
            let suffix = if settings.contains("lease") { ", leases" } else { "" };
            println!("| {count}{suffix} | {admitted} | {over} | {took} ms |");
            is_ok &= is_within("requests over the limit", over as f64, 0.0);
        }
    }
    is_ok
}

fn burst(node: &Node, requests: usize) -> usize {
    runtime().block_on(async {
        let mut tasks = JoinSet::new();
        for _ in 0..requests {
            let account = node.account.clone();
            tasks.spawn(async move { request(&account).await.0 });
        }
        tasks.join_all().await.into_iter().filter(|is_admitted| *is_admitted).count()
    })
}

fn losses() -> bool {
    println!("\n### Redis is killed and restarted empty\n");
    println!("| on_failure | first call, ms | later calls, ms: p50 | p99 | shared again after, ms | over |");
    println!("| --- | --- | --- | --- | --- | --- |");
    let mut is_ok = true;
    for policy in ["closed", "local", "open"] {
        let mut server = Server::start();
        let node = Node::start(&server, "one", FIFTY, &format!("on_failure: {policy}"));
        let runtime = runtime();
        let before = (0..30).filter(|_| runtime.block_on(request(&node.account)).0).count();
        std::thread::sleep(Duration::from_millis(600));
        server.kill();
        let (is_admitted, first) = runtime.block_on(request(&node.account));
        let later: Vec<_> = (0..1_000).map(|_| runtime.block_on(request(&node.account))).collect();
        let during_outage =
            usize::from(is_admitted) + later.iter().filter(|(is_admitted, _)| *is_admitted).count();
        let [_, p50, p99, _] = microseconds(later.into_iter().map(|(_, took)| took).collect());
        server.restart();
        let recovery = node.wait_until_shared(Duration::from_secs(10)).unwrap_or(Duration::MAX);
        let after = (0..50).filter(|_| runtime.block_on(request(&node.account)).0).count();
        let over = (before + during_outage + after).saturating_sub(50);
        let [first, recovery] = [first, recovery].map(|time| time.as_secs_f64() * 1e3);
        println!("| {policy} | {first:.1} | {:.3} | {:.3} | {recovery:.0} | {over} |", p50 / 1e3, p99 / 1e3);
        is_ok &= is_within("ms of the first call", first, 150.0);
        is_ok &= is_within("ms of a later call at p99", p99 / 1e3, 3.0);
        is_ok &= is_within("ms until counters are shared again", recovery, 4_000.0);
        is_ok &= policy == "open" || is_within("requests over the limit", over as f64, 0.0);
    }
    is_ok
}
