//! What becomes of calls while Redis is killed, frozen, paused, flushed, full, or a replica.

use super::server::{Server, full};
use std::process::Command;
use std::time::Duration;
use tollgate::clock::{self, Stopwatch};
use tollgate::quota::{Amounts, Kind, Per, Quota, Scope, Window};
use tollgate::shared::{Away, Cells, DEADLINE, Link, Otherwise, Reserve, Speaker, Verdict};

/// A node with one quota that nothing exhausts.
struct Client {
    link: Link,
    speaker: Speaker,
    quotas: Vec<Quota>,
    next: u64,
}

impl Client {
    async fn of(server: &Server) -> Self {
        let per = Per { written: "minute".into(), ms: 60_000 };
        let (kind, limit, window) = (Kind::Requests, 1 << 30, Window::Rolling { burst: 1 << 30 });
        let quotas = vec![Quota { scope: Scope::Environment, kind, limit, per, window }];
        let link = Link::new(&server.url(), "test", "test:{staging}:q").unwrap();
        tokio::spawn(link.clone().run());
        let now = clock::now();
        let mut client =
            Self { link, speaker: Speaker::new(Cells::of(&quotas, now), "one", now), quotas, next: 0 };
        client.is_back().await;
        client
    }

    async fn reserve(&mut self) -> Result<Verdict, Away> {
        self.next += 1;
        let id = self.next.to_string();
        let reserve = Reserve {
            id: &id,
            deadline: None,
            max_in_flight: 0,
            otherwise: Otherwise::Reject,
            generates: true,
            amounts: Amounts::of_request(1, 1),
            completions: 1,
        };
        let command = self.speaker.reserve(&reserve, &[0]);
        let keys = self.speaker.keys("test", "staging");
        self.link.call(&keys, &command).await.map(|answer| answer.verdict)
    }

    /// Waits until calls are answered again, joins anew, and tells how long that took.
    async fn is_back(&mut self) -> Duration {
        let clock = Stopwatch::start();
        let mut up = self.link.watch();
        let keys = self.speaker.keys("test", "staging");
        loop {
            let waited = tokio::time::timeout(Duration::from_secs(10), up.wait_for(|&number| number > 0));
            drop(waited.await.expect("Redis is back"));
            let join = self.speaker.join(1, false, &full(&self.quotas, clock::now()), &[]);
            // A server that is thawed may still be busy with what it was sent before.
            if self.link.call(&keys, &join).await.is_ok() && self.reserve().await == Ok(Verdict::Admitted) {
                return clock.elapsed();
            }
        }
    }

    /// The first call fails within 50 ms, the others at once, for this long.
    async fn is_away(&mut self, longest: Duration) {
        let clock = Stopwatch::start();
        assert_eq!(self.reserve().await, Err(Away));
        let first = clock.elapsed();
        assert!(first <= Duration::from_millis(50), "the first failing call took {first:?}");
        let mut took = Vec::new();
        while clock.elapsed() < longest {
            let one = Stopwatch::start();
            assert_eq!(self.reserve().await, Err(Away));
            took.push(one.elapsed());
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        took.sort_unstable();
        let usual = took[took.len() * 9 / 10];
        assert!(usual <= Duration::from_millis(1), "later calls take {usual:?}");
        assert!(self.link.trouble().is_some());
    }
}

fn signal(name: &str, process: &str) {
    assert!(Command::new("kill").args([name, process]).status().unwrap().success());
}

const AWAY: Duration = Duration::from_millis(700);
const SOON: Duration = Duration::from_secs(2);

#[tokio::test]
async fn a_killed_server_holds_nobody_up_and_is_found_when_it_is_back() {
    let mut server = Server::start();
    let mut client = Client::of(&server).await;
    server.kill();
    client.is_away(AWAY).await;
    server.start_again();
    let back = client.is_back().await;
    assert!(back <= SOON, "{back:?}");
    assert_eq!(client.link.trouble(), None);
}

#[tokio::test]
async fn a_frozen_server_holds_nobody_up() {
    let server = Server::start();
    let process = server.process();
    let mut client = Client::of(&server).await;
    signal("-STOP", &process);
    client.is_away(AWAY).await;
    signal("-CONT", &process);
    let back = client.is_back().await;
    assert!(back <= SOON, "{back:?}");
}

#[tokio::test]
async fn a_paused_server_is_away_and_comes_back() {
    let server = Server::start();
    let mut client = Client::of(&server).await;
    server.admin("CLIENT PAUSE 1000 ALL");
    client.is_away(AWAY).await;
    let back = client.is_back().await;
    assert!(back <= SOON, "{back:?}");
}

#[tokio::test]
async fn calls_under_way_are_let_go_when_one_has_failed() {
    let server = Server::start();
    let client = Client::of(&server).await;
    server.admin("CLIENT PAUSE 1000 ALL");
    let calls = (0..100).map(|n| {
        let mut client = Client {
            link: client.link.clone(),
            speaker: client.speaker.clone(),
            quotas: Vec::new(),
            next: 1_000 * n,
        };
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(n % 20)).await;
            client.reserve().await
        })
    });
    let clock = Stopwatch::start();
    for call in calls.collect::<Vec<_>>() {
        assert_eq!(call.await.unwrap(), Err(Away));
    }
    assert!(clock.elapsed() < DEADLINE + Duration::from_millis(25), "{:?}", clock.elapsed());
}

#[tokio::test]
async fn scripts_that_are_flushed_are_sent_again() {
    let server = Server::start();
    let mut client = Client::of(&server).await;
    for _ in 0..20 {
        server.admin("SCRIPT FLUSH");
        assert_eq!(client.reserve().await, Ok(Verdict::Admitted));
    }
    server.admin("FLUSHALL");
    assert_eq!(client.reserve().await, Ok(Verdict::Unknown), "it is there, and asks to join anew");
}

#[tokio::test]
async fn a_server_that_takes_no_writes_is_away() {
    let server = Server::start();
    let mut client = Client::of(&server).await;
    for (begins, ends, says) in [
        ("CONFIG SET maxmemory 1", "CONFIG SET maxmemory 0", "memory"),
        ("REPLICAOF 127.0.0.1 1", "REPLICAOF NO ONE", "read only"),
    ] {
        server.admin(begins);
        client.is_away(AWAY).await;
        let trouble = client.link.trouble().unwrap();
        assert!(trouble.contains(says), "{trouble}");
        server.admin(ends);
        let back = client.is_back().await;
        assert!(back <= SOON, "{begins}: {back:?}");
    }
}

#[tokio::test]
async fn settings_that_lose_counts_are_found() {
    let server = Server::start();
    let client = Client::of(&server).await;
    assert_eq!(client.link.faults().await, Ok(vec![]));
    server.admin("CONFIG SET maxmemory-policy allkeys-lru");
    let faults = client.link.faults().await.unwrap();
    assert!(faults.len() == 1 && faults[0].contains("allkeys-lru"), "{faults:?}");
}
