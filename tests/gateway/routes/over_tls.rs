//! Routes and replicas whose upstreams are reached over TLS, by HTTP/1.1 and by HTTP/2: every failure lets the next one
//! serve, and a request is charged once.

use super::*;
use crate::tls::server::Certificate;
use crate::tls::upstream::{Act, TlsUpstream};
use std::collections::BTreeMap;
use std::time::Duration;

const PROTOCOLS: [&[u8]; 2] = [b"http/1.1", b"h2"];

fn answered() -> Act {
    Act::answer(200, &chat_answer(&usage(8, 5)))
}

/// A gateway that trusts this certificate, with these lines of `upstreams`. Requests for `gpt-4o` go to `a`, then to `b`,
/// if there are both.
async fn gateway(certificate: &Certificate, upstreams: &str) -> Process {
    let routes =
        if upstreams.contains("  b:") { "routes: [{ models: ['gpt-4o'], upstream: [a, b] }]" } else { "" };
    let sections = format!(
        "upstreams:\n{upstreams}environments:\n  e:\n    upstream: a\n    {routes}\n    reserve: {{ completion: max_tokens }}\n    \
         quotas: {{ total_tokens: {{ limit: 10M, per: day }} }}\ndefault_environment: e"
    );
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(&file, &certificate.pem).unwrap();
    Process::start(&sections, &[("SSL_CERT_FILE", file.path().to_str().unwrap())]).await
}

fn line(name: &str, urls: &str, settings: &str) -> String {
    format!("  {name}: {{ {urls}, api_key: key-of-{name}, {settings} }}\n")
}

fn url_of(upstream: &TlsUpstream) -> String {
    format!("base_url: '{}'", upstream.url())
}

/// The lines of `a` with these settings, and of `b` without.
fn both(a: &TlsUpstream, settings: &str, b: &TlsUpstream) -> String {
    line("a", &url_of(a), settings) + &line("b", &url_of(b), "")
}

/// Attempts at an upstream by outcome, without those that did not occur.
async fn attempts_at(gateway: &Process, upstream: &str) -> BTreeMap<String, u64> {
    let metrics = gateway.admin_get("/metrics").await;
    let prefix = format!(r#"tollgate_upstream_attempts_total{{upstream="{upstream}",outcome=""#);
    let counts = metrics.text().lines().filter_map(|line| line.strip_prefix(&prefix)?.split_once("\"} "));
    let counts = counts.map(|(outcome, count)| (outcome.to_owned(), count.parse().unwrap()));
    counts.filter(|(_, count)| *count > 0).collect()
}

async fn assert_attempts(gateway: &Process, upstream: &str, outcome: &str) {
    let expected = BTreeMap::from([(outcome.to_owned(), 1)]);
    assert_eq!(attempts_at(gateway, upstream).await, expected, "{upstream}");
}

#[tokio::test]
async fn the_next_upstream_serves_what_the_first_one_fails() {
    let certificate = Certificate::new();
    let failure = |status| Act::answer(status, r#"{"error":{"message":"of the first upstream"}}"#);
    for protocol in PROTOCOLS {
        for (act, outcome, sent) in [
            (failure(429), "rate_limited", 1),
            (failure(502), "unavailable", 1),
            (failure(503), "unavailable", 1),
            (Act::Break, "unreachable", 1),
            // A stream that was not processed is sent once more, on a new connection.
            (Act::Refuse, "unreachable", if protocol == b"h2" { 2 } else { 1 }),
            (Act::Silence, "timed_out", 1),
            (Act::Die, "unreachable", 1),
        ] {
            let case = format!("{act:?} over {}", String::from_utf8_lossy(protocol));
            let a = TlsUpstream::start(&certificate, protocol, move |_| act.clone()).await;
            let b = TlsUpstream::start(&certificate, protocol, |_| answered()).await;
            let gateway = gateway(&certificate, &both(&a, "timeouts: { first_byte: 500ms }", &b)).await;
            let reply = gateway.chat(HELLO).await;
            assert_eq!((reply.status, reply.header("x-tollgate-upstream")), (200, Some("b")), "{case}");
            assert!(!reply.text().contains("first upstream"), "{case}");
            assert_eq!(gateway.settled_charges().await, [1, 8, 5, 13], "{case}");
            assert_eq!((a.seen().len(), b.seen().len()), (sent, 1), "{case}");
            let version = if protocol == b"h2" { http::Version::HTTP_2 } else { http::Version::HTTP_11 };
            assert_eq!(b.seen()[0].version, version);
            assert_eq!(b.seen()[0].authority, format!("localhost:{}", b.port));
            assert_attempts(&gateway, "a", outcome).await;
            assert_attempts(&gateway, "b", "answered").await;
        }
    }
}

#[tokio::test]
async fn an_upstream_without_room_or_without_a_valid_certificate_is_left_out() {
    let (certificate, unknown) = (Certificate::new(), Certificate::new());
    for protocol in PROTOCOLS {
        let b = TlsUpstream::start(&certificate, protocol, |_| answered()).await;
        let full = TlsUpstream::start(&certificate, protocol, |_| answered()).await;
        let limited = both(&full, "quotas: { requests: { limit: 1, per: day } }", &b);
        let gateway = gateway(&certificate, &limited).await;
        for want in ["a", "b", "b"] {
            let reply = gateway.chat(HELLO).await;
            assert_eq!((reply.status, reply.header("x-tollgate-upstream")), (200, Some(want)));
        }
        assert_eq!(gateway.settled_charges().await, [3, 24, 15, 39]);
        let untrusted = TlsUpstream::start(&unknown, protocol, |_| answered()).await;
        let closed = format!("base_url: 'https://{}/v1'", refusing_address());
        for broken in [url_of(&untrusted), closed] {
            let upstreams = line("a", &broken, "") + &line("b", &url_of(&b), "");
            let gateway = self::gateway(&certificate, &upstreams).await;
            let reply = gateway.chat(HELLO).await;
            assert_eq!((reply.status, reply.header("x-tollgate-upstream")), (200, Some("b")), "{broken}");
            assert_attempts(&gateway, "a", "unreachable").await;
            assert_eq!(gateway.settled_charges().await, [1, 8, 5, 13]);
        }
        assert!(untrusted.seen().is_empty());
    }
}

/// Sends a burst and returns its length. Every request has a number of its own, and all are answered with 200.
async fn burst(gateway: &Arc<Process>) -> u64 {
    const CLIENTS: u64 = 20;
    const EACH: u64 = 20;
    let clients = (0..CLIENTS).map(|client| {
        let gateway = gateway.clone();
        tokio::spawn(async move {
            let mut caller = gateway.caller().await;
            for n in 0..EACH {
                let headers = format!("x-number: {client}-{n}\r\n");
                caller.request("POST", CHAT, &headers, HELLO.as_bytes()).await;
                let reply = soon("an answer", caller.reply()).await;
                assert_eq!(reply.status, 200, "{client}-{n}: {}", reply.text());
            }
        })
    });
    for client in clients.collect::<Vec<_>>() {
        client.await.unwrap();
    }
    CLIENTS * EACH
}

/// How often an upstream received the request that it received most often.
fn most_often(upstream: &TlsUpstream) -> usize {
    let mut counts = BTreeMap::<String, usize>::new();
    upstream.seen().into_iter().for_each(|seen| *counts.entry(seen.number).or_default() += 1);
    counts.into_values().max().unwrap_or(0)
}

/// Answers this many requests, each after a short time, and fails with the next one.
fn dying(requests: usize) -> impl Fn(usize) -> Act + Send + Sync + 'static {
    move |n| if n < requests { answered().after(Duration::from_millis(2)) } else { Act::Die }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upstream_that_fails_in_mid_burst_loses_no_request() {
    let certificate = Certificate::new();
    for protocol in PROTOCOLS {
        for served in [0, 10, 100] {
            let a = TlsUpstream::start(&certificate, protocol, dying(served)).await;
            let b = TlsUpstream::start(&certificate, protocol, |_| answered()).await;
            let gateway = Arc::new(gateway(&certificate, &both(&a, "", &b)).await);
            let requests = burst(&gateway).await;
            let charges = [requests, 8 * requests, 5 * requests, 13 * requests];
            assert_eq!(gateway.settled_charges().await, charges, "{protocol:?} {served}");
            let (at_a, at_b) = (attempts_at(&gateway, "a").await, attempts_at(&gateway, "b").await);
            let answered = |at: &BTreeMap<String, u64>| at.get("answered").copied().unwrap_or(0);
            assert_eq!(answered(&at_a) + answered(&at_b), requests, "{at_a:?} {at_b:?}");
            assert_eq!((b.seen().len() as u64, most_often(&b)), (answered(&at_b), 1), "{at_b:?}");
            assert!(most_often(&a) <= 2);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_fails_in_mid_burst_loses_no_request() {
    let certificate = Certificate::new();
    for protocol in PROTOCOLS {
        for served in [0, 10, 100] {
            let one = TlsUpstream::start(&certificate, protocol, dying(served)).await;
            let two = TlsUpstream::start(&certificate, protocol, |_| answered()).await;
            let urls = format!("base_urls: ['{}', '{}']", one.url(), two.url());
            let gateway = Arc::new(gateway(&certificate, &line("a", &urls, "")).await);
            let requests = burst(&gateway).await;
            let charges = [requests, 8 * requests, 5 * requests, 13 * requests];
            assert_eq!(gateway.settled_charges().await, charges, "{protocol:?} {served}");
            assert_eq!(most_often(&two), 1, "{protocol:?} {served}");
            assert!(two.seen().len() as u64 + served as u64 >= requests);
            let authority = format!("localhost:{}", two.port);
            assert!(two.seen().iter().all(|seen| seen.authority == authority));
        }
    }
}

#[tokio::test]
async fn a_replica_that_refuses_or_breaks_a_first_stream_is_replaced_by_another() {
    let certificate = Certificate::new();
    for protocol in PROTOCOLS {
        for act in [Act::Refuse, Act::Die] {
            let one = TlsUpstream::start(&certificate, protocol, move |_| act.clone()).await;
            let two = TlsUpstream::start(&certificate, protocol, |_| answered()).await;
            let urls = format!("base_urls: ['{}', '{}']", one.url(), two.url());
            let gateway = gateway(&certificate, &line("a", &urls, "")).await;
            for n in 1..=6 {
                assert_eq!(gateway.chat(HELLO).await.status, 200);
                assert_eq!(two.seen().len(), n);
            }
            assert_eq!(gateway.settled_charges().await, [6, 48, 30, 78]);
        }
    }
}
