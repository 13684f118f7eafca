//! A master that is replaced by its replica, as sentinels tell.

use super::access::{RIGHTS, certify};
use super::client::{Client, SOON};
use super::server::{Server, free_port};
use std::time::Duration;
use tollgate::clock::Stopwatch;
use tollgate::redis::Verdict;

fn sentinel(port: u16, master: u16) -> Server {
    let config = format!(
        "sentinel monitor quotas 127.0.0.1 {master} 1\n\
         sentinel down-after-milliseconds quotas 500\n\
         sentinel failover-timeout quotas 3000\n"
    );
    Server::prepared(&format!("@/sentinel.conf --sentinel --port {port}"), |folder| {
        std::fs::write(folder.join("sentinel.conf"), config).unwrap();
    })
}

/// Waits until something is so.
pub async fn until(what: &str, is_so: impl Fn() -> bool) {
    let clock = Stopwatch::start();
    while !is_so() {
        assert!(clock.elapsed() < Duration::from_secs(20), "{what} takes too long");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn a_replica_takes_over() {
    let (first, second, watching) = (free_port(), free_port(), free_port());
    let mut master = Server::with(&format!("--port {first} --repl-diskless-sync-delay 0"));
    let replica = Server::with(&format!("--port {second} --replicaof 127.0.0.1 {first}"));
    let info = |server: &Server| server.ask::<String>("INFO replication");
    until("replication", || info(&replica).contains("master_link_status:up")).await;
    let sentinel = sentinel(watching, first);
    until("the sentinel", || sentinel.ask::<String>("INFO sentinel").contains("slaves=1")).await;

    // The first of the sentinels is gone for ever.
    let url = format!("redis+sentinel://127.0.0.1:{},127.0.0.1:{watching}/quotas/0", free_port());
    let mut client = Client::of(&url).await;
    master.kill();
    client.is_away(Duration::from_millis(300)).await;
    until("the failover", || info(&replica).contains("role:master")).await;
    let back = client.is_back().await;
    assert!(back <= SOON, "{back:?}");
    assert_eq!(client.connection.unavailable_reason(), None);

    // The old one is back: nobody goes there.
    let up = client.connection.watch_generation();
    let number = *up.borrow();
    master.start_again();
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(client.reserve().await, Ok(Verdict::Admitted));
    assert_eq!(*up.borrow(), number);
}

#[tokio::test]
async fn sentinels_may_want_tls_and_a_password_too() {
    let (first, watching) = (free_port(), free_port());
    let files = "--tls-cert-file @/cert.pem --tls-key-file @/key.pem --tls-ca-cert-file @/cert.pem \
                 --tls-auth-clients no --tls-replication yes --port 0";
    let master = Server::prepared(&format!("{files} --tls-port {first}"), certify);
    master.admin(&format!("ACL SETUSER gate on >a-secret {RIGHTS}"));
    let config = format!(
        "sentinel monitor quotas 127.0.0.1 {first} 1\nuser gate on >a-secret +sentinel|get-master-addr-by-name\n\
         user default off\n"
    );
    let _sentinel =
        Server::prepared(&format!("@/sentinel.conf --sentinel {files} --tls-port {watching}"), |own| {
            std::fs::write(own.join("sentinel.conf"), config).unwrap();
            for file in ["cert.pem", "key.pem"] {
                std::fs::copy(master.folder().join(file), own.join(file)).unwrap();
            }
        });
    let folder = master.folder().display();
    let at = format!("127.0.0.1:{watching}/quotas?ca_file={folder}/cert.pem");
    let mut client = Client::of(&format!("rediss+sentinel://gate:a-secret@{at}")).await;
    assert_eq!(client.reserve().await, Ok(Verdict::Admitted));

    let client = Client::waiting(&format!("rediss+sentinel://gate:no-secret@{at}"), "staging");
    let is_told =
        || client.connection.unavailable_reason().is_some_and(|trouble| trouble.contains("WRONGPASS"));
    until("to be told", is_told).await;
    assert!(!client.connection.unavailable_reason().unwrap().contains("no-secret"));
}

#[tokio::test]
async fn what_sentinels_do_not_know_is_told() {
    let (first, watching) = (free_port(), free_port());
    let _master = Server::with(&format!("--port {first}"));
    let _sentinel = sentinel(watching, first);
    let client = Client::waiting(&format!("redis+sentinel://127.0.0.1:{watching}/other"), "staging");
    let is_told = || {
        client
            .connection
            .unavailable_reason()
            .is_some_and(|trouble| trouble.contains("has no master named other"))
    };
    until("to be told", is_told).await;
}
