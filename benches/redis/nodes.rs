//! Nodes as the gateway has them: accounts that share their counters.

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

/// So much that it is never used up.
const PLENTY: &str = "{ total_tokens: { limit: 1000000000, per: minute } }";
/// 50 requests of 20 tokens.
const FIFTY: &str = "{ total_tokens: { limit: 10, burst: 1000, per: day, window: rolling } }";

struct Node {
    account: Arc<Account>,
    stop: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
}

impl Node {
    /// Takes part, on a thread that speaks to Redis, as in a gateway.
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
        let account = Arc::new(Account::open(environment).share(environment, redis, name, 1).unwrap());
        let (stop, stops) = watch::channel(false);
        let of_thread = account.clone();
        let thread = std::thread::spawn(move || {
            runtime().block_on(async {
                let connection = of_thread.redis_connection().unwrap().clone();
                tokio::spawn(connection.run());
                of_thread.run_redis_sync(stops).await;
            });
        });
        let node = Self { account, stop, thread: Some(thread) };
        assert!(node.shares_within(Duration::from_secs(10)).is_some(), "the node does not take part");
        node
    }

    fn shares_within(&self, longest: Duration) -> Option<Duration> {
        let begun = Instant::now();
        while begun.elapsed() < longest {
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
    }
}

/// One request, which costs what it has reserved. Returns whether it was admitted, and how long that took to know.
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

fn microseconds(mut took: Vec<Duration>) -> [f64; 4] {
    took.sort_unstable();
    let us = |time: Duration| time.as_secs_f64() * 1e6;
    let at = |part: f64| us(took[((took.len() as f64 * part) as usize).min(took.len() - 1)]);
    [us(took.iter().sum::<Duration>()) / took.len() as f64, at(0.5), at(0.99), at(1.0)]
}

pub fn measure(is_quick: bool) -> bool {
    let calls = if is_quick { 3_000 } else { 30_000 };
    let mut is_well = reservations(calls);
    is_well &= bursts();
    is_well & losses()
}

fn reservations(calls: usize) -> bool {
    println!(
        "\n### a reservation of a node, in microseconds; and how many a second with 64 at a time at each node\n"
    );
    println!("| | mean | p50 | p99 | largest | of 1 node | of 4 nodes |");
    println!("| --- | --- | --- | --- | --- | --- | --- |");
    let mut is_well = true;
    for (name, settings, most) in [("asked for", "", f64::MAX), ("out of a lease", "lease: true", 10.0)] {
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
        let [mean, p50, p99, largest] = microseconds(took);
        drop(node);
        let [one, four] = [1, 4].map(|nodes| rate(&server, nodes, calls, settings));
        println!("| {name} | {mean:.1} | {p50:.1} | {p99:.1} | {largest:.0} | {one:.0} | {four:.0} |");
        is_well &= is_within("microseconds a reservation out of a lease", mean, most);
    }
    is_well
}

/// Reservations a second.
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
                                assert!(request(&account).await.0, "there is plenty");
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
    println!("\n### 1,000 requests at once of which 50 fit\n");
    println!("| nodes | admitted | over | all answered after |\n| --- | --- | --- | --- |");
    let mut is_well = true;
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
            let how = if settings.contains("lease") { ", leases" } else { "" };
            println!("| {count}{how} | {admitted} | {over} | {took} ms |");
            is_well &= is_within("requests over the limit", over as f64, 0.0);
        }
    }
    is_well
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
    println!("\n### Redis is killed, and started again empty\n");
    println!("| on_failure | first call, ms | later calls, ms: p50 | p99 | shared again after, ms | over |");
    println!("| --- | --- | --- | --- | --- | --- |");
    let mut is_well = true;
    for policy in ["closed", "local", "open"] {
        let mut server = Server::start();
        let node = Node::start(&server, "one", FIFTY, &format!("on_failure: {policy}"));
        let runtime = runtime();
        let before = (0..30).filter(|_| runtime.block_on(request(&node.account)).0).count();
        std::thread::sleep(Duration::from_millis(600));
        server.kill();
        let (is_admitted, first) = runtime.block_on(request(&node.account));
        let later: Vec<_> = (0..1_000).map(|_| runtime.block_on(request(&node.account))).collect();
        let meanwhile =
            usize::from(is_admitted) + later.iter().filter(|(is_admitted, _)| *is_admitted).count();
        let [_, p50, p99, _] = microseconds(later.into_iter().map(|(_, took)| took).collect());
        server.start_again();
        let back = node.shares_within(Duration::from_secs(10)).unwrap_or(Duration::MAX);
        let after = (0..50).filter(|_| runtime.block_on(request(&node.account)).0).count();
        let over = (before + meanwhile + after).saturating_sub(50);
        let [first, back] = [first, back].map(|time| time.as_secs_f64() * 1e3);
        println!("| {policy} | {first:.1} | {:.3} | {:.3} | {back:.0} | {over} |", p50 / 1e3, p99 / 1e3);
        is_well &= is_within("ms of the first call", first, 150.0);
        is_well &= is_within("ms of a later call at p99", p99 / 1e3, 3.0);
        is_well &= is_within("ms until counters are shared again", back, 4_000.0);
        is_well &= policy == "open" || is_within("requests over the limit", over as f64, 0.0);
    }
    is_well
}
