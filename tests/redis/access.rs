//! Who may use the server: TLS, users and their rights, and where no password is shown.

use super::client::{Client, SOON};
use super::server::{Server, free_port};
use std::path::Path;
use std::time::Duration;
use tollgate::clock::Stopwatch;
use tollgate::redis::{FailFastConnection, Unavailable, Verdict};

/// What a user needs.
pub const RIGHTS: &str = "~test:* +eval +evalsha +set +time +hset +hincrby +hget +hmget +hgetall +hkeys +hlen +hexists +hscan +hdel +pexpire +pttl";

/// Makes a certificate that both sides show, and that both trust.
pub fn certify(folder: &Path) {
    let made = rcgen::generate_simple_self_signed(["localhost", "127.0.0.1"].map(str::to_owned)).unwrap();
    std::fs::write(folder.join("cert.pem"), made.cert.pem()).unwrap();
    std::fs::write(folder.join("key.pem"), made.signing_key.serialize_pem()).unwrap();
}

fn with_tls(port: u16, clients: &str) -> Server {
    let files = "--tls-cert-file @/cert.pem --tls-key-file @/key.pem --tls-ca-cert-file @/cert.pem";
    Server::prepared(&format!("--port 0 --tls-port {port} {files} --tls-auth-clients {clients}"), certify)
}

/// Waits until something keeps it away, beside that it was not tried yet.
async fn trouble(connection: &FailFastConnection) -> String {
    let clock = Stopwatch::start();
    loop {
        let trouble = connection.unavailable_reason().unwrap_or_default();
        if !trouble.is_empty() && !trouble.contains("not yet established") {
            return trouble;
        }
        assert!(clock.elapsed() < Duration::from_secs(5), "nothing is wrong");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_user_comes_in_by_tls_with_a_password() {
    let port = free_port();
    let mut server = with_tls(port, "no");
    server.admin(&format!("ACL SETUSER gate on >a-s@cret/% {RIGHTS}"));
    let folder = server.folder().display().to_string();
    let url = format!("rediss://gate:a-s%40cret%2F%25@localhost:{port}/0?ca_file={folder}/cert.pem");
    let mut client = Client::of(&url).await;
    assert_eq!(client.reserve().await, Ok(Verdict::Admitted));
    let debug = format!("{:?}", client.connection);
    assert!(!debug.contains("a-s@cret") && !debug.contains("a-s%40cret"), "{debug}");
    let faults = client.connection.setting_faults().await.unwrap();
    assert!(faults.len() == 1 && faults[0].starts_with("note: ") && faults[0].contains("info"), "{faults:?}");

    server.kill();
    client.is_away(Duration::from_millis(500)).await;
    server.start_again();
    server.admin(&format!("ACL SETUSER gate on >a-s@cret/% {RIGHTS}"));
    let back = client.is_back().await;
    assert!(back <= SOON, "{back:?}");
}

#[tokio::test]
async fn a_certificate_has_to_be_trusted_by_both() {
    let port = free_port();
    let server = with_tls(port, "yes");
    let folder = server.folder().display().to_string();
    let ca = format!("rediss://localhost:{port}?ca_file={folder}/cert.pem");
    let own = format!("{ca}&cert_file={folder}/cert.pem&key_file={folder}/key.pem");
    assert_eq!(Client::of(&own).await.reserve().await, Ok(Verdict::Admitted));
    for (url, says) in [
        (ca, "ertificate"),
        (format!("rediss://localhost:{port}"), "UnknownIssuer"),
        (own.replace("localhost", "[::1]"), "not valid for name"),
    ] {
        let client = Client::waiting(&url, "staging");
        let trouble = trouble(&client.connection).await;
        assert!(trouble.contains(says), "{url}: {trouble}");
    }
    let no_file = FailFastConnection::new(&own.replace("key.pem", "none.pem"), "test", "{a}").unwrap_err();
    assert!(format!("{no_file:#}").contains("none.pem"), "{no_file:#}");
    let no_key = FailFastConnection::new(&own.replace("key.pem", "cert.pem"), "test", "{a}").unwrap_err();
    assert!(format!("{no_key:#}").contains("key_file"), "{no_key:#}");
}

#[tokio::test]
async fn missing_rights_are_named() {
    let port = free_port();
    let server = Server::with(&format!("--port {port}"));
    for (rights, says) in [
        (RIGHTS.replace(" +eval ", " "), "'eval'"),
        (RIGHTS.replace(" +evalsha", ""), "'evalsha'"),
        (RIGHTS.replace(" +hscan", "").replace(" +hdel", ""), "refuses HSCAN, HDEL"),
        (RIGHTS.replace(" +set", ""), "set"),
        (RIGHTS.replace("~test:*", "~other:*"), "keys"),
    ] {
        server.admin(&format!("ACL SETUSER gate reset on >a-secret {rights}"));
        let mut client = Client::waiting(&format!("redis://gate:a-secret@127.0.0.1:{port}"), "staging");
        let trouble = trouble(&client.connection).await;
        assert!(trouble.contains(says) && trouble.contains("needs ~test:* +eval +evalsha"), "{trouble}");
        assert_eq!(client.reserve().await, Err(Unavailable));
        server.admin(&format!("ACL SETUSER gate {RIGHTS}"));
        let back = client.is_back().await;
        assert!(back <= SOON, "{back:?}");
    }
}

#[tokio::test]
async fn a_password_is_shown_nowhere() {
    let port = free_port();
    let server = Server::with(&format!("--port {port} --rename-command AUTH LOGIN"));
    // It repeats what it was sent in an error.
    let other = free_port();
    let locked = Server::with(&format!("--port {other}"));
    locked.admin("ACL SETUSER gate on >another");
    for port in [port, other] {
        let url = format!("redis://gate:a-secret@127.0.0.1:{port}");
        let client = Client::waiting(&url, "staging");
        let trouble = trouble(&client.connection).await;
        assert!(trouble.contains("refuses the user") && !trouble.contains("a-secret"), "{trouble}");
        let debug = format!("{:?}", client.connection);
        assert!(!debug.contains("a-secret"), "{debug}");
    }
    drop(server);
    let error = FailFastConnection::new("redis://gate:a-secret@host:port", "test", "{a}").unwrap_err();
    assert!(!format!("{error:?} {error:#}").contains("a-secret"));
}
