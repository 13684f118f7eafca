//! TLS towards callers and on the admin listener, and certificates that are replaced while the gateway runs.

use crate::support::http2::Http2Caller;
use crate::support::*;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::pki_types::CertificateDer;
use tokio_rustls::rustls::{ClientConfig, HandshakeKind, RootCertStore};
use tollgate::app::CallerTimeouts;

/// A self-signed certificate of `localhost`, with its key, in PEM.
struct Pair {
    cert: String,
    key: String,
    der: CertificateDer<'static>,
}

fn pair_until(year: i32) -> Pair {
    let mut params = rcgen::CertificateParams::new(["localhost".to_owned()]).unwrap();
    params.not_after = rcgen::date_time_ymd(year, 1, 1);
    let key = rcgen::KeyPair::generate().unwrap();
    let cert = params.self_signed(&key).unwrap();
    Pair { cert: cert.pem(), key: key.serialize_pem(), der: cert.der().clone() }
}

fn pair() -> Pair {
    pair_until(2060)
}

impl Pair {
    fn write(&self, folder: &Path) {
        std::fs::write(folder.join("cert.pem"), &self.cert).unwrap();
        std::fs::write(folder.join("key.pem"), &self.key).unwrap();
    }
}

/// A config whose `server` and `admin` have the certificate in this folder.
fn config(upstream: &Upstream, folder: &Path, settings: &str) -> String {
    let tls = format!("{{ cert: '{0}/cert.pem', key: '{0}/key.pem' }}", folder.display());
    format!(
        "server: {{ listen: '127.0.0.1:0', drain_timeout: 1s, tls: {tls} }}\nadmin: {{ listen: '127.0.0.1:0', {settings} }}\n\
         upstreams: {{ u: {{ base_url: 'http://{}/v1' }} }}\nenvironments: {{ e: {{ upstream: u }} }}\ndefault_environment: e\nstore: {{ memory: true }}\n",
        upstream.address
    )
}

/// The settings of a caller that trusts these certificates. It remembers sessions.
fn client(trusted: &[&Pair], alpn: &[&[u8]]) -> Arc<ClientConfig> {
    let mut roots = RootCertStore::empty();
    trusted.iter().for_each(|pair| roots.add(pair.der.clone()).unwrap());
    let provider = Arc::new(tokio_rustls::rustls::crypto::ring::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    Arc::new(config)
}

/// Connects and trusts these certificates.
async fn connect(
    address: std::net::SocketAddr,
    trusted: &[&Pair],
    alpn: &[&[u8]],
) -> std::io::Result<TlsStream<TcpStream>> {
    connect_as(client(trusted, alpn), address).await
}

async fn connect_as(
    client: Arc<ClientConfig>,
    address: std::net::SocketAddr,
) -> std::io::Result<TlsStream<TcpStream>> {
    let socket = TcpStream::connect(address).await?;
    soon("the handshake", TlsConnector::from(client).connect("localhost".try_into().unwrap(), socket)).await
}

/// Sends a request over HTTP/1.1 and returns the whole answer.
async fn exchange(mut stream: TlsStream<TcpStream>, request: &str) -> String {
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    soon("the answer", stream.read_to_end(&mut answer)).await.unwrap();
    String::from_utf8(answer).unwrap()
}

fn chat(body: &str) -> String {
    format!(
        "POST {CHAT} HTTP/1.1\r\nhost: g\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
}

#[tokio::test]
async fn callers_are_served_over_tls_with_http1_and_http2() {
    let upstream = Upstream::answering(|seen| {
        if seen.text().contains("\"stream\":true") {
            let long = delta(&"x".repeat(200_000));
            Answer::stream().event(&long).event(&usage_event(8, 2)).event(DONE).end()
        } else {
            Answer::chat(8, 2)
        }
    })
    .await;
    let (folder, pair) = (tempfile::tempdir().unwrap(), pair());
    pair.write(folder.path());
    let gateway = Gateway::from_config(&config(&upstream, folder.path(), "")).await;
    for alpn in [&[][..], &[&b"http/1.1"[..]]] {
        for body in [HELLO.to_owned(), hello(r#""stream":true"#)] {
            let stream = connect(gateway.address, &[&pair], alpn).await.unwrap();
            let answer = exchange(stream, &chat(&body)).await;
            assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer:.300}");
            assert!(answer.ends_with("0\r\n\r\n") || answer.ends_with("}}"), "{answer:.300}");
        }
    }
    let stream = connect(gateway.address, &[&pair], &[b"h2", b"http/1.1"]).await.unwrap();
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
    let mut caller = Http2Caller::over(stream, 65_535).await;
    assert_eq!(caller.chat(HELLO).await.status, 200);
    let streamed = caller.chat(&hello(r#""stream":true"#)).await;
    assert!(streamed.text().ends_with(DONE) && streamed.body.len() > 200_000);
    // Malformed requests, and plain HTTP at the TLS port.
    let stream = connect(gateway.address, &[&pair], &[]).await.unwrap();
    let answer = exchange(stream, "nonsense\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 400 ") && answer.contains("bad_request"), "{answer}");
    let mut plain = gateway.caller().await;
    plain.send(chat(HELLO).as_bytes()).await;
    soon("the end", async { while !plain.is_closed().await {} }).await;
    assert_eq!(gateway.settled_charges().await[0], 6);
}

#[tokio::test]
async fn a_caller_that_has_just_connected_over_tls_is_answered_during_a_shutdown() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let (folder, pair) = (tempfile::tempdir().unwrap(), pair());
    pair.write(folder.path());
    for alpn in [&b"http/1.1"[..], b"h2"] {
        let mut complete_rounds = 0;
        for _ in 0..20 {
            let mut gateway = Gateway::from_config(&config(&upstream, folder.path(), "")).await;
            let connected = Instant::now();
            let stream = connect(gateway.address, &[&pair], &[alpn]).await.unwrap();
            let app = gateway.take();
            let shutdown = tokio::task::spawn_blocking(move || app.shutdown());
            // A connection is refused as soon as the gateway drains.
            soon("the gateway to drain", async {
                while TcpStream::connect(gateway.address).await.is_ok() {}
            })
            .await;
            let was_slow = connected.elapsed() > Duration::from_millis(300);
            if !was_slow && alpn == b"h2" {
                let mut caller = Http2Caller::over(stream, 65_535).await;
                assert_eq!(caller.chat(HELLO).await.refusal(), (503, "shutting_down".into()));
            } else if !was_slow {
                let answer = exchange(stream, &chat(HELLO)).await;
                assert!(answer.starts_with("HTTP/1.1 503 ") && answer.contains("shutting_down"), "{answer}");
            }
            shutdown.await.unwrap();
            complete_rounds += usize::from(!was_slow);
            if complete_rounds == 2 {
                break;
            }
        }
        assert_eq!(complete_rounds, 2, "the machine is too slow for this test");
    }
}

#[tokio::test]
async fn a_caller_that_disconnects_or_does_not_read_is_noticed_over_tls() {
    let events = vec![delta(&"x".repeat(64 * 1024)); 600];
    let upstream = Upstream::always(Answer::stream().events(&events).then(Step::Stall)).await;
    let (folder, pair) = (tempfile::tempdir().unwrap(), pair());
    pair.write(folder.path());
    let timeouts = CallerTimeouts { write: Duration::from_millis(300), ..CallerTimeouts::default() };
    let gateway = Gateway::from_config_with(&config(&upstream, folder.path(), ""), timeouts).await;
    for (n, reads) in [true, false].into_iter().enumerate() {
        let mut stream = connect(gateway.address, &[&pair], &[]).await.unwrap();
        stream.write_all(chat(&hello(r#""stream":true"#)).as_bytes()).await.unwrap();
        if reads {
            let mut piece = vec![0; 1_000];
            stream.read_exact(&mut piece).await.unwrap();
            drop(stream);
            upstream.wait_until_cut(n + 1).await;
        } else {
            upstream.wait_until_cut(n + 1).await;
            drop(stream);
        }
    }
    gateway.settled().await;
}

#[tokio::test]
async fn a_handshake_that_does_not_end_is_cut_off() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let (folder, pair) = (tempfile::tempdir().unwrap(), pair());
    pair.write(folder.path());
    let timeouts = CallerTimeouts { head: Duration::from_millis(300), ..CallerTimeouts::default() };
    let gateway = Gateway::from_config_with(&config(&upstream, folder.path(), ""), timeouts).await;
    let mut silent = Vec::new();
    for _ in 0..50 {
        let mut caller = gateway.caller().await;
        // The beginning of a ClientHello.
        caller.send(&[0x16, 0x03, 0x01, 0x02, 0x00, 0x01]).await;
        silent.push(caller);
    }
    let stream = connect(gateway.address, &[&pair], &[]).await.unwrap();
    assert!(exchange(stream, &chat(HELLO)).await.starts_with("HTTP/1.1 200"));
    let began = Instant::now();
    for caller in &mut silent {
        assert!(caller.is_closed().await);
    }
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
}

/// Which of two certificates the gateway serves.
async fn served(gateway: &Gateway, pairs: [&Pair; 2]) -> usize {
    let stream = connect(gateway.address, &pairs, &[]).await.unwrap();
    let certificate = stream.get_ref().1.peer_certificates().unwrap()[0].clone();
    pairs.iter().position(|pair| pair.der == certificate).unwrap()
}

async fn wait_until_served(gateway: &Gateway, pairs: [&Pair; 2], index: usize) {
    soon("the other certificate", async { while served(gateway, pairs).await != index {} }).await;
}

#[tokio::test]
async fn a_pair_is_replaced_once_both_files_match_and_connections_stay_open() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let folder = tempfile::tempdir().unwrap();
    let (a, b) = (pair_until(2061), pair_until(2062));
    let pairs = [&a, &b];
    a.write(folder.path());
    let path = folder.path().join("t.yaml");
    std::fs::write(&path, config(&upstream, folder.path(), "")).unwrap();
    let gateway = Gateway::from_file(&path).await;
    let stream = connect(gateway.address, &pairs, &[b"h2"]).await.unwrap();
    let mut open = Http2Caller::over(stream, 65_535).await;
    assert_eq!(open.chat(HELLO).await.status, 200);
    let expiry = async || {
        let metrics = gateway.admin_get("/metrics").await;
        let name = r#"tollgate_tls_certificate_expiry_timestamp_seconds{listener="callers"} "#;
        let line = metrics.text().lines().find_map(|line| line.strip_prefix(name)).map(str::to_owned);
        line.unwrap().parse::<u64>().unwrap()
    };
    assert_eq!(expiry().await, 2_871_763_200);
    let settle = || tokio::time::sleep(Duration::from_millis(900));
    // One file of two, and an empty file: the old pair serves.
    for content in ["", &*b.cert] {
        std::fs::write(folder.path().join("cert.pem"), content).unwrap();
        settle().await;
        assert_eq!(served(&gateway, pairs).await, 0, "{} bytes", content.len());
        let readyz = gateway.admin_get("/readyz").await;
        assert!(readyz.text().contains("the next start would fail"), "{}", readyz.text());
    }
    std::fs::write(folder.path().join("key.pem"), &b.key).unwrap();
    wait_until_served(&gateway, pairs, 1).await;
    assert_eq!(expiry().await, 2_903_299_200);
    assert_eq!(gateway.admin_get("/readyz").await.text(), "ready\n");
    // The open connection is still served.
    assert_eq!(open.chat(HELLO).await.status, 200);
}

#[tokio::test]
async fn callers_continue_their_sessions_after_a_reload_with_the_same_certificate() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let (folder, pair) = (tempfile::tempdir().unwrap(), pair());
    pair.write(folder.path());
    let path = folder.path().join("t.yaml");
    std::fs::write(&path, config(&upstream, folder.path(), "")).unwrap();
    let gateway = Gateway::from_file(&path).await;
    let client = client(&[&pair], &[]);
    let handshake = async || {
        let stream = connect_as(client.clone(), gateway.address).await.unwrap();
        let kind = stream.get_ref().1.handshake_kind().unwrap();
        // The caller receives the ticket of its session before the answer.
        assert!(exchange(stream, &chat(HELLO)).await.starts_with("HTTP/1.1 200 OK\r\n"));
        kind
    };
    let reload = async || {
        let mut administrator = Caller::connect(gateway.admin).await;
        let host = gateway.admin;
        let head = format!("POST /api/config/reload HTTP/1.1\r\nhost: {host}\r\ncontent-length: 0\r\n\r\n");
        administrator.send(head.as_bytes()).await;
        assert_eq!(administrator.reply().await.status, 200);
    };
    assert_eq!(handshake().await, HandshakeKind::Full);
    assert_eq!(handshake().await, HandshakeKind::Resumed);
    reload().await;
    assert_eq!(handshake().await, HandshakeKind::Resumed);
    pair_until(2061).write(folder.path());
    reload().await;
    let stream = connect_as(client.clone(), gateway.address).await;
    assert!(stream.is_err(), "another certificate is not trusted");
}

#[tokio::test]
async fn a_pair_is_replaced_when_a_symlink_is_swapped() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let (a, b) = (pair(), pair());
    for (name, pair) in [("one", &a), ("two", &b)] {
        std::fs::create_dir(at(name)).unwrap();
        pair.write(&at(name));
    }
    // As Kubernetes mounts a secret.
    symlink("one", at("..data")).unwrap();
    symlink("..data/cert.pem", at("cert.pem")).unwrap();
    symlink("..data/key.pem", at("key.pem")).unwrap();
    let path = at("t.yaml");
    std::fs::write(&path, config(&upstream, folder.path(), "")).unwrap();
    let gateway = Gateway::from_file(&path).await;
    assert_eq!(served(&gateway, [&a, &b]).await, 0);
    symlink("two", at("..next")).unwrap();
    std::fs::rename(at("..next"), at("..data")).unwrap();
    wait_until_served(&gateway, [&a, &b], 1).await;
}

#[tokio::test]
async fn tls_is_turned_on_and_off_by_a_reload_and_a_wrong_path_is_refused() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let (folder, pair) = (tempfile::tempdir().unwrap(), pair());
    pair.write(folder.path());
    let path = folder.path().join("t.yaml");
    let with_tls = config(&upstream, folder.path(), "");
    let start = with_tls.find(", tls: {").unwrap();
    let end = start + with_tls[start..].find('}').unwrap() + 1;
    let without = format!("{}{}", &with_tls[..start], &with_tls[end..]);
    std::fs::write(&path, &without).unwrap();
    let gateway = Gateway::from_file(&path).await;
    assert_eq!(gateway.chat(HELLO).await.status, 200);
    std::fs::write(&path, &with_tls).unwrap();
    soon("TLS", async { while connect(gateway.address, &[&pair], &[]).await.is_err() {} }).await;
    let faulty = with_tls.replace("cert.pem", "none.pem");
    std::fs::write(&path, faulty).unwrap();
    soon("a refused reload", async {
        while !gateway.admin_get("/metrics").await.text().contains("tollgate_config_reload_failures_total 1")
        {
        }
    })
    .await;
    assert!(connect(gateway.address, &[&pair], &[]).await.is_ok());
    // Creating the missing file makes the config valid. The config file itself does not change.
    std::fs::copy(folder.path().join("cert.pem"), folder.path().join("none.pem")).unwrap();
    soon("the corrected config", async {
        while gateway.admin_get("/readyz").await.text().contains("the new config was refused") {}
    })
    .await;
    std::fs::write(&path, &without).unwrap();
    soon("plain HTTP", async {
        loop {
            let mut caller = gateway.caller().await;
            caller.request("POST", CHAT, "", HELLO.as_bytes()).await;
            if !caller.is_closed().await {
                return;
            }
        }
    })
    .await;
}

#[tokio::test]
async fn check_and_start_report_an_unusable_pair_and_one_that_expires() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("t.yaml");
    let text = config(&upstream, folder.path(), "");
    std::fs::write(&path, &text).unwrap();
    let arguments = ["check", "--config", path.to_str().unwrap()];
    // A fault begins with the line and the column of the file's name.
    let place = |key: &str| {
        let column = text.find(key).unwrap() + key.len() + 1;
        format!("{}:1:{column}: server.tls.{key}", path.display())
    };
    let (cert_fault, key_fault) = (place("cert: "), place("key: "));
    let (good, other, expired) = (pair(), pair(), pair_until(2020));
    let write = |cert: &str, key: &str| {
        std::fs::write(folder.path().join("cert.pem"), cert).unwrap();
        std::fs::write(folder.path().join("key.pem"), key).unwrap();
    };
    for (cert, key, fault) in [
        ("", &*good.key, &*cert_fault),
        (&*good.cert, "", &*key_fault),
        (&*good.cert, &*other.key, "it does not belong to the certificate in"),
        ("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", &*good.key, &*cert_fault),
    ] {
        write(cert, key);
        for command in [&arguments[..], &["serve", arguments[1], arguments[2]]] {
            let (code, _, text) = run(command, "");
            assert_eq!(code, 2, "{text}");
            assert!(text.contains(fault), "{text}");
        }
    }
    write(&expired.cert, &expired.key);
    let (code, text, _) = run(&arguments, "");
    assert_eq!(code, 0, "{text}");
    assert!(text.contains("the certificate of server.tls has expired at 2020-01-01T00:00:00Z"), "{text}");
}

#[tokio::test]
async fn the_admin_listener_serves_over_tls_with_secure_cookies() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let (folder, pair) = (tempfile::tempdir().unwrap(), pair());
    pair.write(folder.path());
    let tls = format!("tls: {{ cert: '{0}/cert.pem', key: '{0}/key.pem' }}", folder.path().display());
    for (settings, alpn) in [(format!("{tls}, token: a-token-of-the-admin"), &b"http/1.1"[..]), (tls, b"h2")]
    {
        let gateway = Gateway::from_config(&config(&upstream, folder.path(), &settings)).await;
        if alpn == b"h2" {
            // Without a token only pages of the listener itself may send requests.
            let stream = connect(gateway.admin, &[&pair], &[alpn]).await.unwrap();
            let mut caller = Http2Caller::over(stream, 65_535).await;
            for headers in
                [format!("host: {}\r\n", gateway.admin), "host: gateway\r\nhost: gateway\r\n".to_owned()]
            {
                let reply = caller.request("GET", "/livez", &headers, b"").await;
                assert_eq!(reply.status, 400, "{headers} {}", reply.text());
            }
            caller.authority = gateway.admin.to_string();
            for (origin, status) in [("https", 200), ("http", 403)] {
                let headers = format!("host: {0}\r\norigin: {origin}://{0}\r\n", gateway.admin);
                let reply = caller.request("GET", "/api/environments", &headers, b"").await;
                assert_eq!(reply.status, status, "{origin} {}", reply.text());
            }
            continue;
        }
        let stream = connect(gateway.admin, &[&pair], &[alpn]).await.unwrap();
        let body = r#"{"token":"a-token-of-the-admin"}"#;
        let request = format!(
            "POST /api/session HTTP/1.1\r\nhost: g\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        let answer = exchange(stream, &request).await;
        assert!(answer.starts_with("HTTP/1.1 204"), "{answer}");
        let cookies: Vec<&str> = answer.lines().filter(|line| line.starts_with("set-cookie: ")).collect();
        assert!(cookies.len() == 2 && cookies.iter().all(|line| line.ends_with("; Secure")), "{answer}");
        let stream = connect(gateway.admin, &[&pair], &[alpn]).await.unwrap();
        let answer =
            exchange(stream, "GET /api/environments HTTP/1.1\r\nhost: g\r\nconnection: close\r\n\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 401"), "{answer}");
        assert!(
            answer.contains("content-security-policy: default-src 'none'; frame-ancestors 'none'"),
            "{answer}"
        );
    }
}
