//! Redis Cluster: environments have their slots on different servers, and slots move.

use super::access::write_certificate;
use super::client::{Client, MAX_RECOVERY_TIME};
use super::sentinel::wait_for;
use super::server::{Server, free_port};
use std::path::Path;
use std::time::Duration;
use tollgate::clock::Stopwatch;
use tollgate::redis::{Unavailable, Verdict};

const SLOTS: [&str; 3] = ["0 5460", "5461 10922", "10923 16383"];
/// Environments with their slots on the first, second and third server.
const ENVIRONMENTS: [&str; 3] = ["bar", "test", "foo"];

pub(super) struct Cluster {
    servers: Vec<Server>,
    ports: Vec<u16>,
}

/// Starts a server. Returns it with its port and the port of the cluster bus. `files`: a folder with a certificate, which
/// turns on TLS for callers, the bus and replication.
fn node(files: Option<&Path>) -> (Server, u16, u16) {
    let (port, bus) = (free_port(), free_port());
    let options = "--cluster-enabled yes --cluster-node-timeout 1000 --repl-diskless-sync-delay 0";
    let listen = match files {
        None => format!("--port {port}"),
        Some(files) => {
            let files = files.display();
            format!(
                "--port 0 --tls-port {port} --tls-cert-file {files}/cert.pem --tls-key-file {files}/key.pem \
                 --tls-ca-cert-file {files}/cert.pem --tls-auth-clients no --tls-cluster yes --tls-replication yes"
            )
        }
    };
    (Server::with(&format!("{listen} --cluster-port {bus} {options}")), port, bus)
}

impl Cluster {
    pub(super) async fn start() -> Self {
        Self::with(None).await
    }

    async fn with(files: Option<&Path>) -> Self {
        let (mut servers, mut ports) = (Vec::new(), Vec::new());
        for (place, slots) in (1..).zip(SLOTS) {
            let (server, port, bus) = node(files);
            server.admin(&format!("CLUSTER SET-CONFIG-EPOCH {place}"));
            server.admin(&format!("CLUSTER ADDSLOTSRANGE {slots}"));
            for other in &servers {
                Server::admin(other, &format!("CLUSTER MEET 127.0.0.1 {port} {bus}"));
            }
            servers.push(server);
            ports.push(port);
        }
        let cluster = Self { servers, ports };
        cluster.wait_until_ready().await;
        cluster
    }

    /// Waits until every server reports that all slots are covered. A restarted server takes some seconds.
    async fn wait_until_ready(&self) {
        let is_ready = |server: &Server| {
            let info = server.query::<String>("CLUSTER INFO");
            info.contains("cluster_state:ok") && info.contains("cluster_slots_ok:16384")
        };
        wait_for("the cluster", || self.servers.iter().all(is_ready)).await;
    }

    /// The keys on each server that match a pattern.
    pub(super) fn keys(&self, pattern: &str) -> Vec<Vec<String>> {
        self.servers.iter().map(|server| server.query(&format!("KEYS {pattern}"))).collect()
    }

    pub(super) fn url(&self) -> String {
        let hosts: Vec<_> = self.ports.iter().map(|port| format!("127.0.0.1:{port}")).collect();
        format!("redis+cluster://{}", hosts.join(","))
    }

    fn id(&self, server: usize) -> String {
        self.servers[server].query("CLUSTER MYID")
    }

    /// Moves the slot of an environment with all its keys.
    fn move_slot(&self, environment: &str, from: usize, to: usize) {
        let slot: u16 = self.servers[0].query(&format!("CLUSTER KEYSLOT {environment}"));
        self.servers[to].admin(&format!("CLUSTER SETSLOT {slot} IMPORTING {}", self.id(from)));
        self.servers[from].admin(&format!("CLUSTER SETSLOT {slot} MIGRATING {}", self.id(to)));
        let keys: Vec<String> = self.servers[from].query(&format!("CLUSTER GETKEYSINSLOT {slot} 100"));
        let port = self.ports[to];
        self.servers[from].admin(&format!("MIGRATE 127.0.0.1 {port}  0 5000 KEYS {}", keys.join(" ")));
        for server in [to, from, 3 - to - from] {
            self.servers[server].admin(&format!("CLUSTER SETSLOT {slot} NODE {}", self.id(to)));
        }
    }
}

#[tokio::test]
async fn each_environment_uses_the_master_of_its_slot() {
    let mut cluster = Cluster::start().await;
    let url = cluster.url();
    let mut clients = Vec::new();
    for environment in ENVIRONMENTS {
        let mut client = Client::connect_to(&url, environment).await;
        assert_eq!(client.reserve().await, Ok(Verdict::Admitted));
        assert_eq!(
            client.connection.setting_faults().await.unwrap().len(),
            1,
            "only the note that nothing is stored on disk"
        );
        clients.push(client);
    }
    for server in &cluster.servers {
        let keys: Vec<String> = server.query("KEYS test:*:q");
        assert_eq!(keys.len(), 1, "{keys:?}");
    }

    // One server dies. Its environment continues after the failover. The others continue without interruption.
    let (replica, port, bus) = node(None);
    cluster.servers[0].admin(&format!("CLUSTER MEET 127.0.0.1 {port} {bus}"));
    let id = cluster.id(1);
    wait_for("the meeting", || replica.query::<String>("CLUSTER NODES").contains(&id)).await;
    replica.admin(&format!("CLUSTER REPLICATE {id}"));
    // Every server must list the replica before the failover, because the servers vote.
    let nodes = |server: &Server| server.query::<String>("CLUSTER NODES");
    let is_known = |server: &Server| nodes(server).contains(&format!("slave {id}"));
    wait_for("every server to list the replica", || {
        cluster.servers.iter().all(is_known) && nodes(&replica).contains("5461-10922")
    })
    .await;
    let info = || replica.query::<String>("INFO replication");
    wait_for("replication", || info().contains("master_link_status:up")).await;
    cluster.servers[1].kill();
    clients[1].expect_unavailable(Duration::from_millis(300)).await;
    for other in [0, 2] {
        assert_eq!(clients[other].reserve().await, Ok(Verdict::Admitted));
    }
    wait_for("the failover", || info().contains("role:master")).await;
    let recovery = clients[1].wait_until_available().await;
    assert!(recovery <= MAX_RECOVERY_TIME, "{recovery:?}");
}

#[tokio::test]
async fn the_connection_follows_a_slot_that_moves() {
    let cluster = Cluster::start().await;
    // The URL does not contain the first two masters of the slot.
    let url = format!("redis+cluster://127.0.0.1:{},127.0.0.1:{}", free_port(), cluster.ports[1]);
    let mut client = Client::connect_to(&url, "bar").await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    for (from, to) in [(0, 2), (2, 1)] {
        cluster.move_slot("bar", from, to);
        let clock = Stopwatch::start();
        assert_eq!(client.reserve().await, Err(Unavailable));
        assert!(clock.elapsed() < Duration::from_millis(50), "{:?}", clock.elapsed());
        client.wait_until_connected().await;
        assert_eq!(client.reserve().await, Ok(Verdict::Admitted), "the quotas have moved with the slot");
        assert!(clock.elapsed() < MAX_RECOVERY_TIME, "{:?}", clock.elapsed());
    }
}

#[tokio::test]
async fn a_url_for_one_server_of_a_cluster_is_reported() {
    let cluster = Cluster::start().await;
    let url = format!("redis://127.0.0.1:{}", cluster.ports[0]);
    let elsewhere = Client::start(&url, "foo");
    let here = Client::connect_to(&url, "bar").await;
    let reason = elsewhere.connection.unavailable_reason().unwrap();
    assert!(reason.contains("MOVED") && reason.contains("redis+cluster://"), "{reason}");
    let faults = here.connection.setting_faults().await.unwrap();
    assert!(faults.iter().any(|fault| fault.contains("redis+cluster://")), "{faults:?}");
}

#[tokio::test]
async fn a_cluster_may_require_tls() {
    let folder = tempfile::tempdir().unwrap();
    write_certificate(folder.path());
    let mut cluster = Cluster::with(Some(folder.path())).await;
    let ca = folder.path().join("cert.pem");
    // The URL contains a host name, while the servers report addresses.
    let url = format!("rediss+cluster://localhost:{}?ca_file={}", cluster.ports[0], ca.display());
    let mut clients = Vec::new();
    for environment in ENVIRONMENTS {
        let mut client = Client::connect_to(&url, environment).await;
        assert_eq!(client.reserve().await, Ok(Verdict::Admitted));
        clients.push(client);
    }
    for server in &cluster.servers {
        assert_eq!(server.query::<Vec<String>>("KEYS test:*:q").len(), 1);
    }

    cluster.servers[2].kill();
    clients[2].expect_unavailable(Duration::from_millis(300)).await;
    assert_eq!(clients[1].reserve().await, Ok(Verdict::Admitted));
    cluster.servers[2].restart();
    cluster.wait_until_ready().await;
    let recovery = clients[2].wait_until_available().await;
    assert!(recovery <= MAX_RECOVERY_TIME, "{recovery:?}");
}

/// A server that has never met another server does not report its own host.
#[tokio::test]
async fn a_cluster_of_one_server_is_used_at_the_address_of_the_url() {
    let folder = tempfile::tempdir().unwrap();
    write_certificate(folder.path());
    let (server, port, _bus) = node(Some(folder.path()));
    server.admin("CLUSTER ADDSLOTSRANGE 0 16383");
    let ca = folder.path().join("cert.pem");
    let mut client =
        Client::connect(&format!("rediss+cluster://localhost:{port}?ca_file={}", ca.display())).await;
    assert_eq!(client.reserve().await, Ok(Verdict::Admitted));
}
