//! Calls while Redis is killed, frozen, paused, flushed, full, slow, silent, or a replica.

use super::client::{Client, MAX_RECOVERY_TIME, TIMEOUT};
use super::proxy::{Mode, Proxy};
use super::server::Server;
use std::process::Command;
use std::time::Duration;
use tollgate::clock::Stopwatch;
use tollgate::redis::{Unavailable, Verdict};

/// Sends a signal to a process: `-STOP`, `-CONT`.
pub fn send_signal(signal: &str, process: &str) {
    assert!(Command::new("kill").args([signal, process]).status().unwrap().success());
}

const OUTAGE: Duration = Duration::from_millis(700);

#[tokio::test]
async fn a_killed_server_delays_no_call_and_is_used_after_its_restart() {
    let mut server = Server::start();
    let mut client = Client::connect(&server.url()).await;
    server.kill();
    client.expect_unavailable(OUTAGE).await;
    server.restart();
    client.wait_until_connected().await;
    assert_eq!(client.reserve().await, Ok(Verdict::UnknownSession), "an empty server has no session");
    let recovery = client.wait_until_available().await;
    assert!(recovery <= MAX_RECOVERY_TIME, "{recovery:?}");
    assert_eq!(client.connection.unavailable_reason(), None);
}

#[tokio::test]
async fn a_frozen_server_delays_no_call() {
    let server = Server::start();
    let process = server.process_id();
    let mut client = Client::connect(&server.url()).await;
    send_signal("-STOP", &process);
    client.expect_unavailable(OUTAGE).await;
    send_signal("-CONT", &process);
    let recovery = client.wait_until_available().await;
    assert!(recovery <= MAX_RECOVERY_TIME, "{recovery:?}");
}

/// A stall that is shorter than the timeout delays all calls, those in line too. A longer one opens the circuit.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_a_stall_longer_than_the_timeout_opens_the_circuit() {
    for (timeout, short) in [(250, 120), (1_000, 600)] {
        let (timeout, short) = (Duration::from_millis(timeout), Duration::from_millis(short));
        let server = Server::start();
        let process = server.process_id();
        let mut client = Client::connect_with(&server.url(), timeout).await;
        let generation = *client.connection.watch_generation().borrow();
        send_signal("-STOP", &process);
        let clock = Stopwatch::start();
        let calls: Vec<_> = (1..=100)
            .map(|n| {
                let mut client = client.with_ids_from(1_000 * n);
                tokio::spawn(async move { client.reserve().await })
            })
            .collect();
        tokio::time::sleep(short).await;
        send_signal("-CONT", &process);
        for call in calls {
            assert_eq!(call.await.unwrap(), Ok(Verdict::Admitted), "{timeout:?}");
        }
        assert!(clock.elapsed() >= short);
        assert_eq!(*client.connection.watch_generation().borrow(), generation);

        send_signal("-STOP", &process);
        let clock = Stopwatch::start();
        client.expect_unavailable(timeout + OUTAGE).await;
        assert!(clock.elapsed() >= timeout, "{timeout:?}");
        send_signal("-CONT", &process);
        let recovery = client.wait_until_available().await;
        assert!(recovery <= MAX_RECOVERY_TIME, "{timeout:?}: {recovery:?}");
    }
}

#[tokio::test]
async fn a_paused_server_is_unavailable_until_the_pause_ends() {
    let server = Server::start();
    let mut client = Client::connect(&server.url()).await;
    server.admin("CLIENT PAUSE 1000 ALL");
    client.expect_unavailable(OUTAGE).await;
    let recovery = client.wait_until_available().await;
    assert!(recovery <= MAX_RECOVERY_TIME, "{recovery:?}");
}

#[tokio::test]
async fn one_failed_call_ends_all_calls_in_flight() {
    let server = Server::start();
    let client = Client::connect(&server.url()).await;
    server.admin("CLIENT PAUSE 1000 ALL");
    let calls = (0..100).map(|n| {
        let mut client = client.with_ids_from(1_000 * n);
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(n % 20)).await;
            client.reserve().await
        })
    });
    let clock = Stopwatch::start();
    for call in calls.collect::<Vec<_>>() {
        assert_eq!(call.await.unwrap(), Err(Unavailable));
    }
    assert!(clock.elapsed() < TIMEOUT + Duration::from_millis(300), "{:?}", clock.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_burst_of_calls_does_not_lose_the_connection() {
    let server = Server::start();
    let client = Client::connect(&server.url()).await;
    let generation = *client.connection.watch_generation().borrow();
    let calls = (1..=2_000).map(|n| {
        let mut client = client.with_ids_from(1_000 * n);
        tokio::spawn(async move { client.reserve().await })
    });
    for call in calls.collect::<Vec<_>>() {
        let verdict = call.await.unwrap();
        assert_eq!(verdict, Ok(Verdict::Admitted), "{:?}", client.connection.unavailable_reason());
    }
    assert_eq!(*client.connection.watch_generation().borrow(), generation);
}

#[tokio::test]
async fn a_long_command_gets_more_time() {
    let timeout = Duration::from_millis(20);
    // On a busy machine a command may take still longer.
    for _ in 0..20 {
        let server = Server::start();
        let mut client = Client::connect_with(&server.url(), timeout).await;
        let clock = Stopwatch::start();
        let held = client.hold(8_000).await;
        let took = clock.elapsed();
        if held == Ok(Verdict::Done) && took > 3 * timeout && client.reserve().await == Ok(Verdict::Admitted)
        {
            return;
        }
        println!("{held:?} after {took:?}");
    }
    panic!("the command never gets enough time");
}

#[tokio::test]
async fn a_flushed_script_is_sent_again() {
    let server = Server::start();
    let mut client = Client::connect(&server.url()).await;
    for _ in 0..20 {
        server.admin("SCRIPT FLUSH");
        assert_eq!(client.reserve().await, Ok(Verdict::Admitted));
    }
    server.admin("FLUSHALL");
    assert_eq!(client.reserve().await, Ok(Verdict::UnknownSession), "a flushed server has no session");
}

#[tokio::test]
async fn a_server_that_rejects_writes_is_unavailable() {
    let server = Server::start();
    let mut client = Client::connect(&server.url()).await;
    for (fault, remedy, words) in [
        ("CONFIG SET maxmemory 1", "CONFIG SET maxmemory 0", "memory"),
        ("REPLICAOF 127.0.0.1 1", "REPLICAOF NO ONE", "read only"),
    ] {
        server.admin(fault);
        client.expect_unavailable(OUTAGE).await;
        let reason = client.connection.unavailable_reason().unwrap();
        assert!(reason.contains(words), "{reason}");
        server.admin(remedy);
        let recovery = client.wait_until_available().await;
        assert!(recovery <= MAX_RECOVERY_TIME, "{fault}: {recovery:?}");
    }
}

#[tokio::test]
async fn a_slow_or_silent_server_is_unavailable() {
    let server = Server::start();
    let proxy = Proxy::start(&server.folder().join("s")).await;
    let mut client = Client::connect(&proxy.url()).await;
    for mode in [Mode::Slow, Mode::Silent] {
        proxy.set(mode);
        client.expect_unavailable(OUTAGE).await;
        let reason = client.connection.unavailable_reason().unwrap();
        assert!(reason.contains("does not answer within"), "{reason}");
        proxy.set(Mode::Through);
        let recovery = client.wait_until_available().await;
        assert!(recovery <= MAX_RECOVERY_TIME, "{mode:?}: {recovery:?}");
    }
}

#[tokio::test]
async fn a_half_open_connection_is_replaced() {
    let server = Server::start();
    let proxy = Proxy::start(&server.folder().join("s")).await;
    let mut client = Client::connect(&proxy.url()).await;
    proxy.make_half_open();
    assert_eq!(client.reserve().await, Err(Unavailable));
    let recovery = client.wait_until_available().await;
    assert!(recovery <= MAX_RECOVERY_TIME, "{recovery:?}");
}

#[tokio::test]
async fn the_loss_of_the_connection_is_detected_without_calls() {
    let server = Server::start();
    let proxy = Proxy::start(&server.folder().join("s")).await;
    let client = Client::connect(&proxy.url()).await;
    let mut generation = client.connection.watch_generation();
    proxy.set(Mode::Silent);
    let clock = Stopwatch::start();
    generation.wait_for(|&number| number == 0).await.unwrap();
    assert!(clock.elapsed() < Duration::from_secs(1), "{:?}", clock.elapsed());
}

#[tokio::test]
async fn settings_that_lose_counts_are_reported() {
    let server = Server::start();
    let client = Client::connect(&server.url()).await;
    for (setting, words) in [
        ("CONFIG SET maxmemory-policy allkeys-lru", Some("allkeys-lru")),
        ("CONFIG SET maxmemory-policy noeviction", Some("stores nothing on disk")),
        ("CONFIG SET appendonly yes", None),
    ] {
        server.admin(setting);
        let faults = client.connection.setting_faults().await.unwrap();
        let is_reported = |words: &str| faults.iter().any(|fault| fault.contains(words));
        assert!(words.map_or(faults.is_empty(), is_reported), "{setting}: {faults:?}");
    }
}
