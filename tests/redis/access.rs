//! Access to the server: TLS, users and their rights, and passwords, which appear in no output.

use super::client::{Client, MAX_RECOVERY_TIME, TIMEOUT};
use super::server::{Server, free_port};
use std::path::Path;
use std::time::Duration;
use tollgate::clock::Stopwatch;
use tollgate::redis::{FailFastConnection, Unavailable, Verdict};

/// The rights that a user needs.
pub const RIGHTS: &str = "~test:* +eval +evalsha +set +time +hset +hincrby +hget +hmget +hgetall +hkeys +hlen +hexists +hscan +hdel +pexpire +pttl";

/// Writes a certificate and its key into the folder. Server and client both present it and trust it.
pub fn write_certificate(folder: &Path) {
    let made = rcgen::generate_simple_self_signed(["localhost", "127.0.0.1"].map(str::to_owned)).unwrap();
    std::fs::write(folder.join("cert.pem"), made.cert.pem()).unwrap();
    std::fs::write(folder.join("key.pem"), made.signing_key.serialize_pem()).unwrap();
}

fn start_with_tls(port: u16, auth_clients: &str) -> Server {
    let files = "--tls-cert-file @/cert.pem --tls-key-file @/key.pem --tls-ca-cert-file @/cert.pem";
    Server::with_folder(
        &format!("--port 0 --tls-port {port} {files} --tls-auth-clients {auth_clients}"),
        write_certificate,
    )
}

/// Waits until an attempt to connect has failed. Returns the reason.
async fn wait_for_failure(connection: &FailFastConnection) -> String {
    let clock = Stopwatch::start();
    loop {
        let reason = connection.unavailable_reason().unwrap_or_default();
        if !reason.is_empty() && !reason.contains("not yet established") {
            return reason;
        }
        assert!(clock.elapsed() < Duration::from_secs(5), "no attempt to connect has failed");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_user_connects_with_tls_and_a_password() {
    let port = free_port();
    let mut server = start_with_tls(port, "no");
    server.admin(&format!("ACL SETUSER gate on >a-s@cret/% {RIGHTS}"));
    let folder = server.folder().display().to_string();
    let url = format!("rediss://gate:a-s%40cret%2F%25@localhost:{port}/0?ca_file={folder}/cert.pem");
    let mut client = Client::connect(&url).await;
    assert_eq!(client.reserve().await, Ok(Verdict::Admitted));
    let debug = format!("{:?}", client.connection);
    assert!(!debug.contains("a-s@cret") && !debug.contains("a-s%40cret"), "{debug}");
    let faults = client.connection.setting_faults().await.unwrap();
    assert!(faults.len() == 1 && faults[0].starts_with("note: ") && faults[0].contains("info"), "{faults:?}");

    server.kill();
    client.expect_unavailable(Duration::from_millis(500)).await;
    server.restart();
    server.admin(&format!("ACL SETUSER gate on >a-s@cret/% {RIGHTS}"));
    let recovery = client.wait_until_available().await;
    assert!(recovery <= MAX_RECOVERY_TIME, "{recovery:?}");
}

#[tokio::test]
async fn both_sides_must_trust_the_certificate() {
    let port = free_port();
    let server = start_with_tls(port, "yes");
    let folder = server.folder().display().to_string();
    let ca = format!("rediss://localhost:{port}?ca_file={folder}/cert.pem");
    let with_client = format!("{ca}&cert_file={folder}/cert.pem&key_file={folder}/key.pem");
    assert_eq!(Client::connect(&with_client).await.reserve().await, Ok(Verdict::Admitted));
    for (url, words) in [
        (ca, "ertificate"),
        (format!("rediss://localhost:{port}"), "UnknownIssuer"),
        (with_client.replace("localhost", "[::1]"), "not valid for name"),
    ] {
        let client = Client::start(&url, "staging");
        let reason = wait_for_failure(&client.connection).await;
        assert!(reason.contains(words), "{url}: {reason}");
    }
    let no_file =
        FailFastConnection::new(&with_client.replace("key.pem", "none.pem"), "test", "{a}", TIMEOUT)
            .unwrap_err();
    assert!(format!("{no_file:#}").contains("none.pem"), "{no_file:#}");
    let no_key = FailFastConnection::new(&with_client.replace("key.pem", "cert.pem"), "test", "{a}", TIMEOUT)
        .unwrap_err();
    assert!(format!("{no_key:#}").contains("key_file"), "{no_key:#}");
}

#[tokio::test]
async fn missing_rights_are_reported() {
    let port = free_port();
    let server = Server::with(&format!("--port {port}"));
    for (rights, words) in [
        (RIGHTS.replace(" +eval ", " "), "'eval'"),
        (RIGHTS.replace(" +evalsha", ""), "'evalsha'"),
        (RIGHTS.replace(" +hscan", "").replace(" +hdel", ""), "refuses HSCAN, HDEL"),
        (RIGHTS.replace(" +set", ""), "set"),
        (RIGHTS.replace("~test:*", "~other:*"), "keys"),
    ] {
        server.admin(&format!("ACL SETUSER gate reset on >a-secret {rights}"));
        let mut client = Client::start(&format!("redis://gate:a-secret@127.0.0.1:{port}"), "staging");
        let reason = wait_for_failure(&client.connection).await;
        assert!(reason.contains(words) && reason.contains("needs ~test:* +eval +evalsha"), "{reason}");
        assert_eq!(client.reserve().await, Err(Unavailable));
        server.admin(&format!("ACL SETUSER gate {RIGHTS}"));
        let recovery = client.wait_until_available().await;
        assert!(recovery <= MAX_RECOVERY_TIME, "{recovery:?}");
    }
}

#[tokio::test]
async fn errors_and_debug_output_do_not_contain_the_password() {
    let port = free_port();
    let server = Server::with(&format!("--port {port} --rename-command AUTH LOGIN"));
    // This server repeats the command that it received in its error.
    let other = free_port();
    let locked = Server::with(&format!("--port {other}"));
    locked.admin("ACL SETUSER gate on >another");
    for port in [port, other] {
        let url = format!("redis://gate:a-secret@127.0.0.1:{port}");
        let client = Client::start(&url, "staging");
        let reason = wait_for_failure(&client.connection).await;
        assert!(reason.contains("refuses the user") && !reason.contains("a-secret"), "{reason}");
        let debug = format!("{:?}", client.connection);
        assert!(!debug.contains("a-secret"), "{debug}");
    }
    drop(server);
    let error =
        FailFastConnection::new("redis://gate:a-secret@host:port", "test", "{a}", TIMEOUT).unwrap_err();
    assert!(!format!("{error:?} {error:#}").contains("a-secret"));
}
