//! Sentinels: a replica replaces the master.

use super::access::{RIGHTS, write_certificate};
use super::client::{Client, MAX_RECOVERY_TIME};
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
    Server::with_folder(&format!("@/sentinel.conf --sentinel --port {port}"), |folder| {
        std::fs::write(folder.join("sentinel.conf"), config).unwrap();
    })
}

/// Waits until the condition holds. `what` names it in the failure.
pub async fn wait_for(what: &str, condition: impl Fn() -> bool) {
    let clock = Stopwatch::start();
    while !condition() {
        assert!(clock.elapsed() < Duration::from_secs(20), "{what} takes too long");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn a_replica_that_becomes_the_master_is_used() {
    let (first, second, sentinel_port) = (free_port(), free_port(), free_port());
    let mut master = Server::with(&format!("--port {first} --repl-diskless-sync-delay 0"));
    let replica = Server::with(&format!("--port {second} --replicaof 127.0.0.1 {first}"));
    let info = |server: &Server| server.query::<String>("INFO replication");
    wait_for("replication", || info(&replica).contains("master_link_status:up")).await;
    let sentinel = sentinel(sentinel_port, first);
    wait_for("the sentinel", || sentinel.query::<String>("INFO sentinel").contains("slaves=1")).await;

    // No sentinel listens at the first address.
    let url = format!("redis+sentinel://127.0.0.1:{},127.0.0.1:{sentinel_port}/quotas/0", free_port());
    let mut client = Client::connect(&url).await;
    master.kill();
    client.expect_unavailable(Duration::from_millis(300)).await;
    wait_for("the failover", || info(&replica).contains("role:master")).await;
    let recovery = client.wait_until_available().await;
    assert!(recovery <= MAX_RECOVERY_TIME, "{recovery:?}");
    assert_eq!(client.connection.unavailable_reason(), None);

    // The old master restarts. The connection does not change.
    let current = client.connection.watch_generation();
    let generation = *current.borrow();
    master.restart();
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(client.reserve().await, Ok(Verdict::Admitted));
    assert_eq!(*current.borrow(), generation);
}

#[tokio::test]
async fn sentinels_may_require_tls_and_a_password() {
    let (first, sentinel_port) = (free_port(), free_port());
    let files = "--tls-cert-file @/cert.pem --tls-key-file @/key.pem --tls-ca-cert-file @/cert.pem \
                 --tls-auth-clients no --tls-replication yes --port 0";
    let master = Server::with_folder(&format!("{files} --tls-port {first}"), write_certificate);
    master.admin(&format!("ACL SETUSER gate on >a-secret {RIGHTS}"));
    let config = format!(
        "sentinel monitor quotas 127.0.0.1 {first} 1\nuser gate on >a-secret +sentinel|get-master-addr-by-name\n\
         user default off\n"
    );
    let _sentinel = Server::with_folder(
        &format!("@/sentinel.conf --sentinel {files} --tls-port {sentinel_port}"),
        |folder| {
            std::fs::write(folder.join("sentinel.conf"), config).unwrap();
            for file in ["cert.pem", "key.pem"] {
                std::fs::copy(master.folder().join(file), folder.join(file)).unwrap();
            }
        },
    );
    let folder = master.folder().display();
    let location = format!("127.0.0.1:{sentinel_port}/quotas?ca_file={folder}/cert.pem");
    let mut client = Client::connect(&format!("rediss+sentinel://gate:a-secret@{location}")).await;
    assert_eq!(client.reserve().await, Ok(Verdict::Admitted));

    let client = Client::start(&format!("rediss+sentinel://gate:no-secret@{location}"), "staging");
    let is_reported =
        || client.connection.unavailable_reason().is_some_and(|reason| reason.contains("WRONGPASS"));
    wait_for("the report", is_reported).await;
    assert!(!client.connection.unavailable_reason().unwrap().contains("no-secret"));
}

#[tokio::test]
async fn a_master_name_unknown_to_the_sentinels_is_reported() {
    let (first, sentinel_port) = (free_port(), free_port());
    let _master = Server::with(&format!("--port {first}"));
    let _sentinel = sentinel(sentinel_port, first);
    let client = Client::start(&format!("redis+sentinel://127.0.0.1:{sentinel_port}/other"), "staging");
    let is_reported = || {
        let reason = client.connection.unavailable_reason();
        reason.is_some_and(|reason| reason.contains("has no master named other"))
    };
    wait_for("the report", is_reported).await;
}
