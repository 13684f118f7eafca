//! Environments whose slots are on different servers of a cluster, and move.

use super::access::certify;
use super::client::{Client, SOON};
use super::sentinel::until;
use super::server::{Server, free_port};
use std::path::Path;
use std::time::Duration;
use tollgate::clock::Stopwatch;
use tollgate::redis::{Unavailable, Verdict};

const SLOTS: [&str; 3] = ["0 5460", "5461 10922", "10923 16383"];
/// Environments that have slots on the first, second and third server.
const ENVIRONMENTS: [&str; 3] = ["bar", "test", "foo"];

struct Cluster {
    servers: Vec<Server>,
    ports: Vec<u16>,
}

/// A server with its port, and that of the cluster's own talk; with TLS for all of it, if there are files for that.
fn node(files: Option<&Path>) -> (Server, u16, u16) {
    let (port, bus) = (free_port(), free_port());
    let how = "--cluster-enabled yes --cluster-node-timeout 1000 --repl-diskless-sync-delay 0";
    let listens = match files {
        None => format!("--port {port}"),
        Some(files) => {
            let files = files.display();
            format!(
                "--port 0 --tls-port {port} --tls-cert-file {files}/cert.pem --tls-key-file {files}/key.pem \
                 --tls-ca-cert-file {files}/cert.pem --tls-auth-clients no --tls-cluster yes --tls-replication yes"
            )
        }
    };
    (Server::with(&format!("{listens} --cluster-port {bus} {how}")), port, bus)
}

impl Cluster {
    async fn start() -> Self {
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
        cluster.comes_together().await;
        cluster
    }

    /// Waits until all servers serve; one that was started takes some seconds.
    async fn comes_together(&self) {
        let is_whole = |server: &Server| {
            let info = server.ask::<String>("CLUSTER INFO");
            info.contains("cluster_state:ok") && info.contains("cluster_slots_ok:16384")
        };
        until("the cluster to come together", || self.servers.iter().all(is_whole)).await;
    }

    fn url(&self) -> String {
        let hosts: Vec<_> = self.ports.iter().map(|port| format!("127.0.0.1:{port}")).collect();
        format!("redis+cluster://{}", hosts.join(","))
    }

    fn id(&self, server: usize) -> String {
        self.servers[server].ask("CLUSTER MYID")
    }

    /// Moves an environment's slot with all that is in it.
    fn move_slot(&self, environment: &str, from: usize, to: usize) {
        let slot: u16 = self.servers[0].ask(&format!("CLUSTER KEYSLOT {environment}"));
        self.servers[to].admin(&format!("CLUSTER SETSLOT {slot} IMPORTING {}", self.id(from)));
        self.servers[from].admin(&format!("CLUSTER SETSLOT {slot} MIGRATING {}", self.id(to)));
        let keys: Vec<String> = self.servers[from].ask(&format!("CLUSTER GETKEYSINSLOT {slot} 100"));
        let port = self.ports[to];
        self.servers[from].admin(&format!("MIGRATE 127.0.0.1 {port}  0 5000 KEYS {}", keys.join(" ")));
        for server in [to, from, 3 - to - from] {
            self.servers[server].admin(&format!("CLUSTER SETSLOT {slot} NODE {}", self.id(to)));
        }
    }
}

#[tokio::test]
async fn each_environment_has_its_server() {
    let mut cluster = Cluster::start().await;
    let url = cluster.url();
    let mut clients = Vec::new();
    for environment in ENVIRONMENTS {
        let mut client = Client::in_environment(&url, environment).await;
        assert_eq!(client.reserve().await, Ok(Verdict::Admitted));
        assert_eq!(
            client.connection.setting_faults().await.unwrap().len(),
            1,
            "that nothing is kept on disk"
        );
        clients.push(client);
    }
    for server in &cluster.servers {
        let keys: Vec<String> = server.ask("KEYS test:*:q");
        assert_eq!(keys.len(), 1, "{keys:?}");
    }

    // A server is gone: the environments of the others go on, and its own when its replica has taken over.
    let (replica, port, bus) = node(None);
    cluster.servers[0].admin(&format!("CLUSTER MEET 127.0.0.1 {port} {bus}"));
    let id = cluster.id(1);
    until("to meet", || replica.ask::<String>("CLUSTER NODES").contains(&id)).await;
    replica.admin(&format!("CLUSTER REPLICATE {id}"));
    // Each has to know of it: they vote.
    let nodes = |server: &Server| server.ask::<String>("CLUSTER NODES");
    let is_known = |server: &Server| nodes(server).contains(&format!("slave {id}"));
    until("to be known", || cluster.servers.iter().all(is_known) && nodes(&replica).contains("5461-10922"))
        .await;
    let info = || replica.ask::<String>("INFO replication");
    until("replication", || info().contains("master_link_status:up")).await;
    cluster.servers[1].kill();
    clients[1].is_away(Duration::from_millis(300)).await;
    for other in [0, 2] {
        assert_eq!(clients[other].reserve().await, Ok(Verdict::Admitted));
    }
    until("the failover", || info().contains("role:master")).await;
    let back = clients[1].is_back().await;
    assert!(back <= SOON, "{back:?}");
}

#[tokio::test]
async fn a_slot_that_moves_is_followed() {
    let cluster = Cluster::start().await;
    // The one who has the slot then is not among those asked first.
    let url = format!("redis+cluster://127.0.0.1:{},127.0.0.1:{}", free_port(), cluster.ports[1]);
    let mut client = Client::in_environment(&url, "bar").await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    for (from, to) in [(0, 2), (2, 1)] {
        cluster.move_slot("bar", from, to);
        let clock = Stopwatch::start();
        assert_eq!(client.reserve().await, Err(Unavailable));
        assert!(clock.elapsed() < Duration::from_millis(50), "{:?}", clock.elapsed());
        let mut up = client.connection.watch_generation();
        up.wait_for(|&number| number > 0).await.unwrap();
        assert_eq!(client.reserve().await, Ok(Verdict::Admitted), "the quotas have moved with the slot");
        assert!(clock.elapsed() < SOON, "{:?}", clock.elapsed());
    }
}

#[tokio::test]
async fn a_url_of_one_server_is_told_from_one_of_a_cluster() {
    let cluster = Cluster::start().await;
    let url = format!("redis://127.0.0.1:{}", cluster.ports[0]);
    let elsewhere = Client::waiting(&url, "foo");
    let here = Client::in_environment(&url, "bar").await;
    let trouble = elsewhere.connection.unavailable_reason().unwrap();
    assert!(trouble.contains("MOVED") && trouble.contains("redis+cluster://"), "{trouble}");
    let faults = here.connection.setting_faults().await.unwrap();
    assert!(faults.iter().any(|fault| fault.contains("redis+cluster://")), "{faults:?}");
}

#[tokio::test]
async fn a_cluster_may_want_tls() {
    let folder = tempfile::tempdir().unwrap();
    certify(folder.path());
    let mut cluster = Cluster::with(Some(folder.path())).await;
    let ca = folder.path().join("cert.pem");
    // By a name, though its servers tell addresses of each other.
    let url = format!("rediss+cluster://localhost:{}?ca_file={}", cluster.ports[0], ca.display());
    let mut clients = Vec::new();
    for environment in ENVIRONMENTS {
        let mut client = Client::in_environment(&url, environment).await;
        assert_eq!(client.reserve().await, Ok(Verdict::Admitted));
        clients.push(client);
    }
    for server in &cluster.servers {
        assert_eq!(server.ask::<Vec<String>>("KEYS test:*:q").len(), 1);
    }

    cluster.servers[2].kill();
    clients[2].is_away(Duration::from_millis(300)).await;
    assert_eq!(clients[1].reserve().await, Ok(Verdict::Admitted));
    cluster.servers[2].start_again();
    cluster.comes_together().await;
    let back = clients[2].is_back().await;
    assert!(back <= SOON, "{back:?}");
}

/// A server alone does not know its own address: it is that by which it was reached.
#[tokio::test]
async fn a_cluster_of_one_has_the_address_by_which_it_was_reached() {
    let folder = tempfile::tempdir().unwrap();
    certify(folder.path());
    let (server, port, _bus) = node(Some(folder.path()));
    server.admin("CLUSTER ADDSLOTSRANGE 0 16383");
    let ca = folder.path().join("cert.pem");
    let mut client = Client::of(&format!("rediss+cluster://localhost:{port}?ca_file={}", ca.display())).await;
    assert_eq!(client.reserve().await, Ok(Verdict::Admitted));
}
