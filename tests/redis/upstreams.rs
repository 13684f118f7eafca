//! Environments that share an upstream with quotas, on several nodes.

use super::member::runtime;
use super::server::Server;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tollgate::clock::Stopwatch;
use tollgate::config::parse;
use tollgate::ledger::{
    Account, Backend, Demand, LimitChange, NoRoom, OverrideOrigin, Owner, Progress, QuotaKey, Reservation,
};
use tollgate::quota::{Amounts, Kind, Subject};

/// A node with three environments, `a`, `b` and the shadow-mode `c`, and the upstreams `u` and `v`.
struct TiedNode {
    accounts: Vec<Arc<Account>>,
    stop: watch::Sender<bool>,
    kill: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
}

/// Room for 50 requests of 100 tokens. It hardly refills while a test runs.
const FIFTY: &str = "quotas: { total_tokens: { limit: 10, burst: 5050, per: day, window: rolling } }";

impl TiedNode {
    /// `limits`: of the upstream `u`. `settings`: further settings of `store.redis`.
    fn start(url: &str, name: &str, limits: &str, settings: &str) -> Self {
        let text = format!(
            "upstreams: {{ u: {{ base_url: http://u/v1, {limits} }}, v: {{ base_url: http://v/v1, quotas: {{ requests: {{ limit: 10, per: day }} }} }} }}\n\
             environments:\n  a: {{ upstream: u, reserve: {{ completion: max_tokens }}, quotas: {{ total_tokens: {{ limit: 1M, per: day }} }} }}\n  \
             b: {{ upstream: u, reserve: {{ completion: max_tokens }}, quotas: {{ requests: {{ limit: 1M, per: minute }} }} }}\n  \
             c: {{ upstream: u, enforce: false, reserve: {{ completion: max_tokens }}, quotas: {{ requests: {{ limit: 1, per: day }} }} }}\n\
             store: {{ redis: {{ url: '{url}', {settings} }} }}\n"
        );
        let loaded = parse(&text, "node.yaml", &|_| None, &[]).unwrap_or_else(|faults| panic!("{faults}"));
        let config = &loaded.config;
        let redis = config.store.redis.as_ref().unwrap();
        let slot = url.starts_with("redis+cluster").then_some("environments");
        let owners =
            config.environments.iter().map(Owner::from).chain(config.upstreams.iter().map(Owner::from));
        let open = |owner| Arc::new(Account::open(owner).share(owner, redis, name, (slot, 1)).unwrap());
        let accounts: Vec<Arc<Account>> = owners.map(open).collect();
        let ((stop, stopped), (kill, mut is_killed)) = (watch::channel(false), watch::channel(false));
        let synced = accounts.clone();
        let thread = std::thread::spawn(move || {
            runtime().block_on(async {
                let mut tasks = JoinSet::new();
                for account in synced {
                    tokio::spawn(account.redis_connection().unwrap().clone().run());
                    tasks.spawn(account.run_redis_sync(stopped.clone()));
                }
                tokio::select! {
                    _ = tasks.join_all() => {}
                    _ = is_killed.wait_for(|is_killed| *is_killed) => {}
                }
            });
        });
        let node = Self { accounts, stop, kill, thread: Some(thread) };
        node.wait_until_shared();
        node
    }

    fn wait_until_shared(&self) {
        let begun = Stopwatch::start();
        let reason = || self.accounts.iter().find_map(|one| one.redis_status().unwrap().unavailable_reason);
        while let Some(reason) = reason() {
            assert!(begun.elapsed() < Duration::from_secs(30), "the node does not rejoin: {reason}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn upstream(&self) -> &Arc<Account> {
        &self.accounts[3]
    }

    fn backends(&self) -> [Backend<'_>; 2] {
        [3, 4].map(|at| Backend { account: Some(&self.accounts[at]), model: "m" })
    }

    /// Requests 100 tokens in an environment, at `u`.
    async fn reserve(&self, environment: usize) -> Result<Reservation, NoRoom> {
        self.reserve_at(environment, &self.backends()[..1], Duration::ZERO).await
    }

    async fn reserve_at(
        &self,
        environment: usize,
        backends: &[Backend<'_>],
        max_wait: Duration,
    ) -> Result<Reservation, NoRoom> {
        let subject = Subject { caller: None, model: "m" };
        let demand = Demand {
            subject,
            prompt: 40,
            generates: true,
            cap: Some(60),
            completions: 1,
            backends,
            may_clamp: true,
        };
        self.accounts[environment].reserve(&demand, max_wait).await
    }

    /// Level and held amount of the first quota of `u`, as Redis has them.
    async fn level(&self) -> (i64, u64) {
        self.upstream().refresh().await;
        let level = &self.upstream().snapshot().levels[0];
        (level.level, level.held)
    }

    fn kill(mut self) {
        self.kill.send_replace(true);
        self.thread.take().map(JoinHandle::join).unwrap().unwrap();
    }
}

impl Drop for TiedNode {
    fn drop(&mut self) {
        self.stop.send_replace(true);
        drop(self.thread.take().map(JoinHandle::join));
    }
}

/// A burst of 300 over three environments and these nodes. Returns the reservations.
async fn burst(nodes: &[TiedNode]) -> Vec<Reservation> {
    let requests = (0..300).map(|n| nodes[n % nodes.len()].reserve(n / nodes.len() % 3));
    let all = futures_util::future::join_all(requests).await;
    let denied = all.iter().filter_map(|one| one.as_ref().err());
    for no_room in denied {
        let scope = &no_room.worst().unwrap_or_else(|| panic!("{no_room:?}")).quota.scope;
        assert_eq!((scope.as_str(), scope.name()), ("upstream", "u"));
    }
    all.into_iter().filter_map(Result::ok).collect()
}

#[test]
fn a_burst_over_three_environments_on_two_nodes_is_served_as_far_as_the_upstream_has_room() {
    for settings in ["", "lease: true"] {
        let server = Server::start();
        let nodes = ["one", "two"].map(|name| TiedNode::start(&server.url(), name, FIFTY, settings));
        runtime().block_on(async {
            let held = burst(&nodes).await;
            if settings.is_empty() {
                assert_eq!(held.len(), 50);
            } else {
                // An unused lease of the other node is not available.
                assert!((40..=50).contains(&held.len()), "{}", held.len());
            }
            let total = 100 * i64::try_from(held.len()).unwrap();
            for mut reservation in held {
                reservation.observe(Amounts::of_request(40, 10));
            }
            for node in &nodes {
                node.accounts.iter().for_each(|account| drop(account.snapshot()));
            }
            let (begun, spent) = (Stopwatch::start(), total / 2);
            while nodes[1].level().await.0 < 5_050 - spent - 110
                || nodes[0].level().await.0 < 5_050 - spent - 110
            {
                assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", nodes[1].level().await);
            }
            let (level, held) = nodes[0].level().await;
            assert_eq!(level + i64::try_from(held).unwrap(), 5_050 - spent);
        });
    }
}

#[test]
fn shadow_mode_and_the_maximum_in_flight_hold_on_all_nodes() {
    let server = Server::start();
    let limits = "max_in_flight: 2";
    let nodes = ["one", "two"].map(|name| TiedNode::start(&server.url(), name, limits, ""));
    runtime().block_on(async {
        let first = nodes[0].reserve(0).await.unwrap();
        let second = nodes[1].reserve(2).await.unwrap();
        assert!(second.would_deny().is_none());
        let full = NoRoom::InFlight { limit: 2, upstream: Some("u".into()) };
        for (node, environment) in [(0, 1), (1, 0), (1, 2)] {
            assert_eq!(nodes[node].reserve(environment).await.unwrap_err(), full);
        }
        drop(first);
        nodes[0].upstream().refresh().await;
        let third = nodes[1].reserve(2).await.unwrap();
        assert!(third.would_deny().is_some(), "the environment's own quota has room for one request");
        drop((second, third));
    });
}

#[test]
fn a_request_that_waits_gets_the_room_that_another_environment_releases() {
    let server = Server::start();
    let limits = "quotas: { total_tokens: { limit: 10, burst: 110, per: day, window: rolling } }";
    let node = TiedNode::start(&server.url(), "one", limits, "");
    runtime().block_on(async {
        let held = node.reserve(0).await.unwrap();
        let backends = node.backends();
        let waiting = node.reserve_at(1, &backends[..1], Duration::from_secs(10));
        let release = async {
            tokio::time::sleep(Duration::from_millis(100)).await;
            drop(held);
        };
        let (reservation, ()) = tokio::join!(waiting, release);
        assert_eq!(reservation.unwrap().reserved().total, 100);
    });
}

#[test]
fn streams_grow_in_both_and_reservations_move_to_another_upstream() {
    let server = Server::start();
    let limits = "quotas: { total_tokens: { limit: 10, burst: 400, per: day, window: rolling } }";
    let node = TiedNode::start(&server.url(), "one", limits, "");
    runtime().block_on(async {
        let mut stream = node.reserve(0).await.unwrap();
        assert_eq!(stream.progress(Amounts::of_request(40, 150)), Progress::Within);
        let reserved = stream.reserved().total;
        assert_eq!(node.level().await, (400 - i64::try_from(reserved).unwrap(), reserved - 190));
        assert_eq!(stream.progress(Amounts::of_request(40, 500)), Progress::Overrun);
        stream.observe(Amounts::of_request(40, 500));
        drop(stream);
        assert_eq!(node.level().await, (-140, 0));
        let a = &node.accounts[0];
        a.refresh().await;
        assert_eq!(a.snapshot().levels[0].used, 540);

        let both = node.backends();
        let mut second = node.reserve_at(1, &both, Duration::ZERO).await.unwrap();
        assert_eq!(second.backend(), 1, "u has no room");
        let v = &node.accounts[4];
        v.refresh().await;
        assert_eq!((v.snapshot().in_flight, v.snapshot().levels[0].held), (1, 1));
        assert!(second.move_to(0, &both[0]).await.is_err(), "u has no room");
        assert!(node.upstream().reset(None).await.unwrap());
        second.move_to(0, &both[0]).await.unwrap();
        v.refresh().await;
        assert_eq!((v.snapshot().in_flight, v.snapshot().levels[0].held), (0, 0));
        assert_eq!(node.level().await, (300, 100));
        second.observe(Amounts::of_request(40, 60));
        drop(second);
        assert_eq!(node.level().await, (300, 0));

        let key = QuotaKey { scope: "upstream", name: "u", kind: Kind::TotalTokens, per: "day" };
        let change = LimitChange { limit: 10, burst: 150, origin: OverrideOrigin::default() };
        assert!(node.upstream().set_limit(key, Some(&change)).await.unwrap());
        assert_eq!(node.level().await.0, 50);
        assert!(node.reserve(1).await.is_err());
    });
}

#[test]
fn the_failure_policy_covers_the_upstream() {
    for (policy, expected) in [("local", 25), ("closed", 0), ("open", 50)] {
        let mut server = Server::start();
        let settings = format!("on_failure: {policy}");
        let nodes = ["one", "two"].map(|name| TiedNode::start(&server.url(), name, FIFTY, &settings));
        // Both nodes know of each other after a heartbeat.
        std::thread::sleep(Duration::from_millis(1_200));
        server.kill();
        runtime().block_on(async {
            let mut held = Vec::new();
            for n in 0..60 {
                match nodes[0].reserve(n % 2).await {
                    Ok(reservation) => held.push(reservation),
                    Err(no_room) => {
                        assert_eq!(no_room == NoRoom::Unavailable, policy == "closed", "{no_room:?}");
                    }
                }
            }
            assert_eq!(held.len(), expected, "{policy}");
            for mut reservation in held {
                reservation.observe(Amounts::of_request(40, 60));
            }
            server.restart();
            nodes.iter().for_each(TiedNode::wait_until_shared);
            let used = 100 * i64::try_from(expected).unwrap();
            let (begun, want) = (Stopwatch::start(), (5_050 - used, 0));
            while nodes[1].level().await != want {
                assert!(begun.elapsed() < Duration::from_secs(5), "{policy}: {:?}", nodes[1].level().await);
            }
        });
    }
}

#[test]
fn the_part_of_a_dead_node_is_charged_in_the_upstream() {
    let server = Server::start();
    let [one, two] = ["one", "two"].map(|name| TiedNode::start(&server.url(), name, FIFTY, ""));
    runtime().block_on(async {
        let held = one.reserve(0).await.unwrap();
        one.kill();
        std::mem::forget(held);
        assert_eq!(two.level().await, (4_950, 100));
        let begun = Stopwatch::start();
        while two.level().await != (4_950, 0) {
            assert!(begun.elapsed() < Duration::from_secs(25), "{:?}", two.level().await);
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        assert_eq!(two.upstream().snapshot().in_flight, 0);
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn in_a_cluster_tied_environments_are_in_one_slot() {
    let cluster = super::cluster::Cluster::start().await;
    let url = cluster.url();
    let counts = tokio::task::spawn_blocking(move || {
        let node = TiedNode::start(&url, "one", FIFTY, "");
        runtime().block_on(async { burst(std::slice::from_ref(&node)).await.len() })
    });
    assert_eq!(counts.await.unwrap(), 50);
    let keys = cluster.keys("tollgate:*:q");
    assert_eq!(keys.iter().filter(|keys| !keys.is_empty()).count(), 1, "{keys:?}");
    assert_eq!(keys.concat().len(), 5, "three environments and two upstreams: {keys:?}");
}
