//! What becomes of calls while Redis is killed, frozen, paused, flushed, full, slow, silent, or a replica.

use super::client::{Client, SOON};
use super::proxy::{Mode, Proxy};
use super::server::Server;
use std::process::Command;
use std::time::Duration;
use tollgate::clock::Stopwatch;
use tollgate::redis::{CALL_DEADLINE, Unavailable, Verdict};

pub fn signal(name: &str, process: &str) {
    assert!(Command::new("kill").args([name, process]).status().unwrap().success());
}

const AWAY: Duration = Duration::from_millis(700);

#[tokio::test]
async fn a_killed_server_holds_nobody_up_and_is_found_when_it_is_back() {
    let mut server = Server::start();
    let mut client = Client::of(&server.url()).await;
    server.kill();
    client.is_away(AWAY).await;
    server.start_again();
    let mut up = client.connection.watch_generation();
    up.wait_for(|&number| number > 0).await.unwrap();
    assert_eq!(client.reserve().await, Ok(Verdict::UnknownSession), "it is empty, and asks to join anew");
    let back = client.is_back().await;
    assert!(back <= SOON, "{back:?}");
    assert_eq!(client.connection.unavailable_reason(), None);
}

#[tokio::test]
async fn a_frozen_server_holds_nobody_up() {
    let server = Server::start();
    let process = server.process();
    let mut client = Client::of(&server.url()).await;
    signal("-STOP", &process);
    client.is_away(AWAY).await;
    signal("-CONT", &process);
    let back = client.is_back().await;
    assert!(back <= SOON, "{back:?}");
}

#[tokio::test]
async fn a_paused_server_is_away_and_comes_back() {
    let server = Server::start();
    let mut client = Client::of(&server.url()).await;
    server.admin("CLIENT PAUSE 1000 ALL");
    client.is_away(AWAY).await;
    let back = client.is_back().await;
    assert!(back <= SOON, "{back:?}");
}

#[tokio::test]
async fn calls_under_way_are_let_go_when_one_has_failed() {
    let server = Server::start();
    let client = Client::of(&server.url()).await;
    server.admin("CLIENT PAUSE 1000 ALL");
    let calls = (0..100).map(|n| {
        let mut client = client.twin(1_000 * n);
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(n % 20)).await;
            client.reserve().await
        })
    });
    let clock = Stopwatch::start();
    for call in calls.collect::<Vec<_>>() {
        assert_eq!(call.await.unwrap(), Err(Unavailable));
    }
    assert!(clock.elapsed() < CALL_DEADLINE + Duration::from_millis(25), "{:?}", clock.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_burst_is_no_sign_that_the_server_is_away() {
    let server = Server::start();
    let client = Client::of(&server.url()).await;
    let number = *client.connection.watch_generation().borrow();
    let calls = (1..=2_000).map(|n| {
        let mut client = client.twin(1_000 * n);
        tokio::spawn(async move { client.reserve().await })
    });
    for call in calls.collect::<Vec<_>>() {
        let verdict = call.await.unwrap();
        assert_eq!(verdict, Ok(Verdict::Admitted), "{:?}", client.connection.unavailable_reason());
    }
    assert_eq!(*client.connection.watch_generation().borrow(), number);
}

#[tokio::test]
async fn who_has_much_open_is_given_time_to_join() {
    let server = Server::start();
    let mut client = Client::of(&server.url()).await;
    assert_eq!(client.hold(8_000).await, Ok(Verdict::Done));
    assert_eq!(client.reserve().await, Ok(Verdict::Admitted));
}

#[tokio::test]
async fn scripts_that_are_flushed_are_sent_again() {
    let server = Server::start();
    let mut client = Client::of(&server.url()).await;
    for _ in 0..20 {
        server.admin("SCRIPT FLUSH");
        assert_eq!(client.reserve().await, Ok(Verdict::Admitted));
    }
    server.admin("FLUSHALL");
    assert_eq!(client.reserve().await, Ok(Verdict::UnknownSession), "it is there, and asks to join anew");
}

#[tokio::test]
async fn a_server_that_takes_no_writes_is_away() {
    let server = Server::start();
    let mut client = Client::of(&server.url()).await;
    for (begins, ends, says) in [
        ("CONFIG SET maxmemory 1", "CONFIG SET maxmemory 0", "memory"),
        ("REPLICAOF 127.0.0.1 1", "REPLICAOF NO ONE", "read only"),
    ] {
        server.admin(begins);
        client.is_away(AWAY).await;
        let trouble = client.connection.unavailable_reason().unwrap();
        assert!(trouble.contains(says), "{trouble}");
        server.admin(ends);
        let back = client.is_back().await;
        assert!(back <= SOON, "{begins}: {back:?}");
    }
}

#[tokio::test]
async fn a_slow_server_is_away() {
    let server = Server::start();
    let proxy = Proxy::start(&server.folder().join("s")).await;
    let mut client = Client::of(&proxy.url()).await;
    for mode in [Mode::Slow, Mode::Silent] {
        proxy.set(mode);
        client.is_away(AWAY).await;
        let trouble = client.connection.unavailable_reason().unwrap();
        assert!(trouble.contains("does not answer within"), "{trouble}");
        proxy.set(Mode::Through);
        let back = client.is_back().await;
        assert!(back <= SOON, "{mode:?}: {back:?}");
    }
}

#[tokio::test]
async fn a_connection_that_is_half_open_is_replaced() {
    let server = Server::start();
    let proxy = Proxy::start(&server.folder().join("s")).await;
    let mut client = Client::of(&proxy.url()).await;
    proxy.make_half_open();
    assert_eq!(client.reserve().await, Err(Unavailable));
    let back = client.is_back().await;
    assert!(back <= SOON, "{back:?}");
}

#[tokio::test]
async fn a_loss_is_seen_also_while_nobody_calls() {
    let server = Server::start();
    let proxy = Proxy::start(&server.folder().join("s")).await;
    let client = Client::of(&proxy.url()).await;
    let mut up = client.connection.watch_generation();
    proxy.set(Mode::Silent);
    let clock = Stopwatch::start();
    up.wait_for(|&number| number == 0).await.unwrap();
    assert!(clock.elapsed() < Duration::from_secs(1), "{:?}", clock.elapsed());
}

#[tokio::test]
async fn settings_that_lose_counts_are_found() {
    let server = Server::start();
    let client = Client::of(&server.url()).await;
    for (setting, says) in [
        ("CONFIG SET maxmemory-policy allkeys-lru", Some("allkeys-lru")),
        ("CONFIG SET maxmemory-policy noeviction", Some("keeps nothing on disk")),
        ("CONFIG SET appendonly yes", None),
    ] {
        server.admin(setting);
        let faults = client.connection.setting_faults().await.unwrap();
        assert_eq!(faults.iter().any(|fault| says.is_some_and(|says| fault.contains(says))), says.is_some());
        assert!(says.is_some() || faults.is_empty(), "{setting}: {faults:?}");
    }
}
