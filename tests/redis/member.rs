//! An account with shared counters, as in a gateway, but without the gateway.

use super::proxy::{Mode, Proxy};
use super::server::Server;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::watch;
use tokio::task::{JoinSet, yield_now};
use tollgate::clock::Stopwatch;
use tollgate::config::parse;
use tollgate::ledger::{Account, Demand, LimitChange, OverrideOrigin, QuotaKey};
use tollgate::quota::{Kind, Subject};

/// A node that synchronises with Redis on a separate thread.
pub struct Member {
    pub account: Arc<Account>,
    stop: watch::Sender<bool>,
    kill: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
}

pub fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

impl Member {
    /// Joins in the environment `e` with these quotas. `settings`: further settings of `store.redis`.
    pub fn start(url: &str, name: &str, quotas: &str, settings: &str) -> Self {
        let text = format!(
            "upstreams: {{ u: {{ base_url: http://u/v1 }} }}\n\
             environments: {{ e: {{ upstream: u, reserve: {{ completion: max_tokens }}, quotas: {quotas} }} }}\n\
             store: {{ redis: {{ url: '{url}', {settings} }} }}\n"
        );
        let loaded = parse(&text, "node.yaml", &|_| None, &[]).unwrap_or_else(|faults| panic!("{faults}"));
        let environment = &loaded.config.environments[0];
        let redis = loaded.config.store.redis.as_ref().unwrap();
        let account =
            Arc::new(Account::open(environment).share(environment, redis, name, (None, 1)).unwrap());
        let ((stop, stopped), (kill, mut is_killed)) = (watch::channel(false), watch::channel(false));
        let synced_account = account.clone();
        let thread = std::thread::spawn(move || {
            runtime().block_on(async {
                tokio::spawn(synced_account.redis_connection().unwrap().clone().run());
                tokio::select! {
                    () = synced_account.run_redis_sync(stopped) => {}
                    _ = is_killed.wait_for(|is_killed| *is_killed) => {}
                }
            });
        });
        let node = Self { account, stop, kill, thread: Some(thread) };
        node.wait_until_shared();
        node
    }

    pub fn losses(&self) -> u64 {
        self.account.redis_status().unwrap().losses
    }

    /// Whether the node has lost the server since `losses` was read, or loses it within 50 ms.
    fn has_lost_since(&self, losses: u64) -> bool {
        std::thread::sleep(Duration::from_millis(50));
        self.losses() > losses
    }

    /// Waits until the counters are shared.
    pub fn wait_until_shared(&self) {
        let begun = Stopwatch::start();
        while let Some(reason) = self.account.redis_status().unwrap().unavailable_reason {
            assert!(begun.elapsed() < Duration::from_secs(30), "the node does not rejoin: {reason}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Stops the node without leaving the session.
    pub fn kill(mut self) {
        self.kill.send_replace(true);
        self.thread.take().map(JoinHandle::join).unwrap().unwrap();
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.stop.send_replace(true);
        drop(self.thread.take().map(JoinHandle::join));
    }
}

#[test]
fn limits_can_be_set_while_calendar_periods_end() {
    let server = Server::start();
    let quotas = "{ total_tokens: { limit: 1000, per: second, window: calendar }, requests: { limit: 9, per: second } }";
    let node = Member::start(&server.url(), "one", quotas, "");
    let key = QuotaKey { scope: "environment", name: "", kind: Kind::TotalTokens, per: "second" };
    let (begun, mut count) = (Stopwatch::start(), 0);
    runtime().block_on(async {
        while begun.elapsed() < Duration::from_secs(5) {
            count += 1;
            let losses = node.losses();
            let is_set = node
                .account
                .set_limit(
                    key,
                    Some(&LimitChange { limit: count, burst: count, origin: OverrideOrigin::default() }),
                )
                .await;
            let is_reset = node.account.reset(None).await;
            // A busy machine may delay Redis past the deadline.
            if (is_set.is_err() || is_reset.is_err()) && node.has_lost_since(losses) {
                node.wait_until_shared();
                continue;
            }
            assert_eq!((is_set, is_reset), (Ok(true), Ok(true)), "at {count}");
        }
    });
    println!("{count} limits in {:?}", begun.elapsed());
}

/// The journal is never empty: requests end while earlier steps are being sent.
#[test]
fn a_node_sends_heartbeats_while_its_journal_is_never_empty() {
    let server = Server::start();
    let background = Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let proxy = background.block_on(Proxy::start(&server.folder().join("s")));
    let node = Member::start(&proxy.url(), "one", "{ requests: { limit: 1000000000, per: day } }", "");
    proxy.set(Mode::Far);
    let account = node.account.clone();
    let work = background.spawn(async move {
        let mut tasks = JoinSet::new();
        for _ in 0..100 {
            let account = account.clone();
            tasks.spawn(async move {
                let subject = Subject { caller: None, model: "m" };
                let demand = Demand {
                    subject,
                    prompt: 1,
                    generates: true,
                    cap: Some(1),
                    completions: 1,
                    backends: &[],
                    may_clamp: true,
                };
                loop {
                    drop(account.reserve(&demand, Duration::ZERO).await);
                    // While offline, `reserve` does not suspend. The proxy on this thread must run, so that the node
                    // can rejoin.
                    yield_now().await;
                }
            });
        }
        tasks.join_all().await;
    });
    let (begun, mut changed, mut before, mut longest) =
        (Stopwatch::start(), Stopwatch::start(), 0, Duration::ZERO);
    while begun.elapsed() < Duration::from_secs(5) {
        std::thread::sleep(Duration::from_millis(50));
        let lease_end: i64 = server.query("HGET tollgate:{e}:s s:one");
        if lease_end != before {
            (before, changed) = (lease_end, Stopwatch::start());
        }
        longest = longest.max(changed.elapsed());
    }
    work.abort();
    println!("{longest:?}, {} losses, {:?}", node.losses(), node.account.snapshot().totals);
    assert!(longest < Duration::from_secs(2), "no heartbeat for {longest:?}");
}
