//! `tollgate check --online`: its reports about upstreams and Redis.

use crate::support::port::free_port;
use crate::support::redis::Redis;
use crate::support::*;
use crate::tls::server::{Certificate, Server};
use std::time::{Duration, Instant};

const KEY: &str = "sk-of-the-upstream-canary";

/// Exit code and output of the check of a config with these upstreams.
async fn check(upstreams: &str, rest: &str, variables: &[(&str, &str)]) -> (i32, String) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("t.yaml");
    let name = upstreams.split(':').next().unwrap().trim();
    let text = format!(
        "upstreams:\n  {upstreams}\nenvironments: {{ production: {{ upstream: {name}, quotas: {{ requests: {{ limit: 5, per: minute }} }} }} }}\n{rest}\n"
    );
    std::fs::write(&file, text).unwrap();
    let mut command = tollgate(&["check", "--online", "--config", file.to_str().unwrap()]);
    command.envs(variables.iter().copied());
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    let text = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
    assert!(!text.contains("canary"), "{text}");
    (output.status.code().unwrap(), text)
}

fn upstream(url: &str, more: &str) -> String {
    format!("up: {{ base_url: '{url}', api_key: {KEY}{more} }}")
}

fn contains_all(text: &str, words: &[&str]) {
    assert!(words.iter().all(|word| text.contains(word)), "{words:?}\n{text}");
}

#[tokio::test]
async fn a_good_upstream_passes_every_step_with_its_own_header() {
    for (api, target, header) in [
        ("openai", "/v1/models", "authorization"),
        ("azure", "/openai/models?api-version=2024-10-21", "api-key"),
        ("anthropic", "/v1/models", "x-api-key"),
        ("gemini", "/v1beta/models", "x-goog-api-key"),
    ] {
        let server = Upstream::always(Answer::json(200, r#"{"data":[]}"#)).await;
        let base = target.split("/models").next().unwrap();
        let url = format!("http://{}{base}", server.address);
        let (code, text) = check(&upstream(&url, &format!(", api: {api}")), "", &[]).await;
        assert_eq!(code, 0, "{text}");
        let request = format!("GET {base}/models");
        contains_all(&text, &["DNS", "TCP", " ms ", &request, "200 OK", "All servers can be used."]);
        let seen = server.only();
        assert_eq!(seen.target(), target);
        assert!(seen.header(header).unwrap().ends_with(KEY));
    }
}

#[tokio::test]
async fn each_fault_names_the_setting_that_decides_it() {
    let closed = free_port();
    for (url, words) in [
        (format!("http://127.0.0.1:{closed}/v1"), ["TCP", "no connection", "upstreams.up.base_url"]),
        ("http://no-such-host.invalid/v1".to_owned(), ["DNS", "has no address", "upstreams.up.base_url"]),
    ] {
        let (code, text) = check(&upstream(&url, ""), "", &[]).await;
        assert_eq!(code, 2, "{text}");
        contains_all(&text, &words);
        contains_all(&text, &["FAULT", "There is 1 fault."]);
    }
    for (status, words) in [
        (401, ["401 Unauthorized: the upstream refused the key", "upstreams.up.api_key"]),
        (404, ["404 Not Found: the upstream has no list of models", "upstreams.up.base_url"]),
        (301, ["does not follow redirects", "upstreams.up.base_url"]),
        (500, ["500 Internal Server Error", "answered with an error"]),
    ] {
        let server = Upstream::always(Answer::json(status, &format!(r#"{{"error":"{KEY}"}}"#))).await;
        let (code, text) = check(&upstream(&format!("http://{}/v1", server.address), ""), "", &[]).await;
        assert_eq!(code, 2, "{text}");
        contains_all(&text, &words);
    }
}

#[tokio::test]
async fn a_refusal_without_a_key_is_no_fault() {
    let server = Upstream::always(Answer::json(401, "{}")).await;
    let (code, text) = check(&format!("up: {{ base_url: 'http://{}' }}", server.address), "", &[]).await;
    assert_eq!(code, 0, "{text}");
    contains_all(&text, &["refused without a key, as expected"]);
}

#[tokio::test]
async fn tls_is_checked_with_the_trusted_authorities() {
    for protocol in [&b"h2"[..], b"http/1.1"] {
        let server = Server::start(protocol).await;
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(&file, &server.certificate.pem).unwrap();
        let url = format!("https://localhost:{}/v1", server.port);
        let declared = format!("up: {{ base_url: '{url}', api_key: sk-upstream }}");
        let (code, text) = check(&declared, "", &[("SSL_CERT_FILE", file.path().to_str().unwrap())]).await;
        assert_eq!(code, 0, "{text}");
        contains_all(&text, &["TLS 1.3, HTTP/", "200 OK"]);
        let (code, text) = check(&declared, "", &[]).await;
        assert_eq!(code, 2, "{text}");
        contains_all(
            &text,
            &["an authority that this machine does not trust", "SSL_CERT_FILE", "upstreams.up.base_url"],
        );
    }
    // Trusted certificates that cannot serve.
    let parameters = rcgen::CertificateParams::new(["localhost".to_owned()]).unwrap();
    for (parameters, words) in [
        (authority(parameters.clone()), ["marked as an authority", "issue one with CA:FALSE"]),
        (expired(parameters), ["has expired at 2020-01-01T00:00:00Z", "renew the certificate"]),
    ] {
        let server = Server::with(b"h2", Certificate::of(&parameters)).await;
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(&file, &server.certificate.pem).unwrap();
        let variables = [("SSL_CERT_FILE", file.path().to_str().unwrap())];
        let declared = format!("up: {{ base_url: 'https://localhost:{}/v1', api_key: k }}", server.port);
        let (code, text) = check(&declared, "", &variables).await;
        assert_eq!(code, 2, "{text}");
        contains_all(&text, &words);
        contains_all(&text, &["TLS", "FAULT: the certificate", "; check upstreams.up.base_url, or "]);
        // The log of the gateway has the same text.
        let sections = format!(
            "upstreams: {{ {declared} }}\nenvironments: {{ e: {{ upstream: up }} }}\ndefault_environment: e"
        );
        let gateway = Process::start(&sections, &variables).await;
        assert_eq!(gateway.chat(HELLO).await.refusal(), (502, "upstream_unreachable".into()));
        let line = soon("the log", gateway.line_with("the gateway cannot reach an upstream")).await;
        contains_all(&line, &words);
    }
    // A server without TLS.
    let server = Upstream::always(Answer::json(200, "{}")).await;
    let url = format!("https://localhost:{}/v1", server.address.port());
    let (code, text) = check(&upstream(&url, ""), "", &[]).await;
    assert_eq!(code, 2, "{text}");
    contains_all(&text, &["FAULT", "upstreams.up.base_url"]);
}

fn authority(mut parameters: rcgen::CertificateParams) -> rcgen::CertificateParams {
    parameters.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    parameters
}

fn expired(mut parameters: rcgen::CertificateParams) -> rcgen::CertificateParams {
    parameters.not_before = rcgen::date_time_ymd(2019, 1, 1);
    parameters.not_after = rcgen::date_time_ymd(2020, 1, 1);
    parameters
}

#[tokio::test]
async fn slow_upstreams_are_reported_in_bounded_time() {
    let server = Upstream::always(Answer::silence()).await;
    let url = format!("http://{}/v1", server.address);
    let (code, text) = check(&upstream(&url, ", timeouts: { first_byte: 300ms }"), "", &[]).await;
    assert_eq!(code, 2, "{text}");
    contains_all(&text, &["no result within 300", "upstreams.up.timeouts"]);
    // All upstreams are tried at once.
    let three: Vec<String> = (0..3).map(|n| format!("u{n}: {{ base_url: '{url}' }}")).collect();
    let started = Instant::now();
    let (code, text) = check(&three.join("\n  "), "", &[]).await;
    assert!(started.elapsed() < Duration::from_secs(15), "{:?}", started.elapsed());
    assert_eq!(code, 2, "{text}");
    contains_all(&text, &["no result within the 10 s of this check", "There are 3 faults."]);
}

#[tokio::test]
async fn redis_is_tested_with_the_needs_of_the_script() {
    let server = Upstream::always(Answer::json(200, "{}")).await;
    let declared = upstream(&format!("http://{}", server.address), "");
    let store = |url: &str| format!("store: {{ redis: {{ url: '{url}' }} }}");
    let redis = Redis::start();
    let (code, text) = check(&declared, &store(&redis.url), &[]).await;
    assert_eq!(code, 0, "{text}");
    contains_all(&text, &["Redis of store.redis", "permits the commands of the script and accepts writes"]);
    redis.admin("CONFIG SET maxmemory-policy allkeys-lru");
    let (code, text) = check(&declared, &store(&redis.url), &[]).await;
    assert_eq!(code, 2, "{text}");
    contains_all(&text, &["set it to noeviction"]);
    redis.admin("ACL SETUSER weak on >canary-of-redis ~* +@all -hset");
    let url = redis.url.replace("redis://", "redis://weak:canary-of-redis@");
    let (code, text) = check(&declared, &store(&url), &[]).await;
    assert_eq!(code, 2, "{text}");
    contains_all(&text, &["refuses HSET", "the user needs"]);
    let (code, text) = check(&declared, &store(&format!("redis://127.0.0.1:{}", free_port())), &[]).await;
    assert_eq!(code, 2, "{text}");
    contains_all(&text, &["FAULT", "check store.redis.url"]);
}
