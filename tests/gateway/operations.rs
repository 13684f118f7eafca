//! Operations: the admin listener, health checks, metrics, logs, shutdown, and the command line.

use crate::support::*;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command};

const LARGE_QUOTAS: &str =
    "{ total_tokens: { limit: 1000, per: minute, burst: 1500 }, requests: { limit: 60, per: day } }";

#[tokio::test]
async fn the_admin_listener_shows_every_quota() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let gateway = Gateway::in_front_of(&upstream, LARGE_QUOTAS).await;
    gateway.chat(&hello(r#""max_tokens":100"#)).await;
    let environment = gateway.settled().await;
    assert_eq!(environment["name"], "staging");
    assert_eq!(environment["upstream"], "backend");
    let total = &environment["quotas"][0];
    for (field, value) in [
        ("scope", "environment"),
        ("kind", "total_tokens"),
        ("per", "minute"),
        ("window", "rolling"),
        ("source", "file"),
    ] {
        assert_eq!(total[field], value);
    }
    assert_eq!(
        (total["limit"].as_u64(), total["burst"].as_u64(), total["held"].as_u64()),
        (Some(1_000), Some(1_500), Some(0))
    );
    let (level, used) = (total["level"].as_i64().unwrap(), total["used"].as_i64().unwrap());
    assert!((1_490..=1_500).contains(&level) && level + used >= 1_500 && used <= 10, "{total}");
    let day = &environment["quotas"][1];
    assert_eq!(
        (day["window"].as_str(), day["used"].as_u64(), day["level"].as_u64()),
        (Some("calendar"), Some(1), Some(59))
    );
    assert_eq!(gateway.admin_get("/api/environments/staging").await.json()["totals"]["total_tokens"], 10);
    assert_eq!(gateway.admin_get("/api/environments/nowhere").await.status, 404);
    assert!(gateway.admin_get("/").await.text().contains("<title>Tollgate</title>"));
}

#[tokio::test]
async fn health_checks_and_metrics_answer_from_the_start() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let gateway = Gateway::in_front_of(&upstream, LARGE_QUOTAS).await;
    assert_eq!(gateway.admin_get("/livez").await.status, 200);
    assert_eq!(gateway.admin_get("/readyz").await.status, 200);
    gateway.chat(&hello(r#""max_tokens":100"#)).await;
    gateway.chat(&hello(r#""max_tokens":100000"#)).await;
    gateway.settled().await;
    let metrics = gateway.admin_get("/metrics").await;
    assert!(metrics.header("content-type").unwrap().starts_with("text/plain"));
    for line in [
        r#"tollgate_requests_total{api="chat",code="2xx",environment="staging",outcome="answered"} 1"#,
        r#"tollgate_rejections_total{code="request_exceeds_quota",environment="staging",kind="total_tokens",per="minute",scope="environment"} 1"#,
        r#"tollgate_tokens_total{environment="staging",kind="completion_tokens",model="gpt-4o"} 2"#,
        r#"tollgate_quota_limit{environment="staging",kind="total_tokens",name="",per="minute",scope="environment"} 1000"#,
        r#"tollgate_quota_level{environment="staging",kind="requests",name="",per="day",scope="environment"} 59"#,
        r#"tollgate_quota_held{environment="staging",kind="requests",name="",per="day",scope="environment"} 0"#,
        r#"tollgate_in_flight{environment="staging"} 0"#,
        "tollgate_overhead_seconds_count 1",
        r#"tollgate_upstream_first_byte_seconds_count{environment="staging",model="gpt-4o",upstream="backend"} 1"#,
        r#"tollgate_estimate_ratio_count{model="gpt-4o",source="rules"} 1"#,
        r#"tollgate_usage_missing_total{environment="staging",reason="not_reported"} 0"#,
        "tollgate_store_up 1",
        "tollgate_config_reload_failures_total 0",
    ] {
        assert!(metrics.text().contains(line), "{line}\n{}", metrics.text());
    }
}

#[tokio::test]
async fn without_a_token_requests_from_other_sites_are_refused() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let gateway = Gateway::in_front_of(&upstream, LARGE_QUOTAS).await;
    for (headers, status) in [
        (format!("host: {}\r\n", gateway.admin), 200),
        (format!("host: localhost:{}\r\n", gateway.admin.port()), 200),
        (format!("host: {0}\r\norigin: http://{0}\r\n", gateway.admin), 200),
        ("host: evil.example\r\n".to_owned(), 403),
        (format!("host: {}\r\norigin: https://evil.example\r\n", gateway.admin), 403),
        (format!("host: {}\r\norigin: null\r\n", gateway.admin), 403),
    ] {
        let mut caller = Caller::connect(gateway.admin).await;
        caller.send(format!("GET /api/environments HTTP/1.1\r\n{headers}\r\n").as_bytes()).await;
        assert_eq!(caller.reply().await.status, status, "{headers}");
    }
}

#[tokio::test]
async fn with_a_token_only_health_checks_answer_without_it() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let gateway = Gateway::from_config(&format!(
        "server: {{ listen: '127.0.0.1:0' }}\nadmin: {{ listen: '127.0.0.1:0', token: let-me-in }}\nupstreams: {{ u: {{ base_url: 'http://{}' }} }}\nenvironments: {{ e: {{ upstream: u }} }}\nstore: {{ memory: true }}",
        upstream.address
    ))
    .await;
    for (path, token, status) in [
        ("/livez", "", 200),
        ("/readyz", "", 200),
        ("/metrics", "", 401),
        ("/api/environments", "authorization: Bearer wrong\r\n", 401),
        ("/api/environments", "authorization: Bearer let-me-in\r\n", 200),
    ] {
        let mut caller = Caller::connect(gateway.admin).await;
        caller.send(format!("GET {path} HTTP/1.1\r\nhost: any\r\n{token}\r\n").as_bytes()).await;
        assert_eq!(caller.reply().await.status, status, "{path} {token}");
    }
}

#[tokio::test]
async fn health_checks_answer_any_host_and_origin() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    for token in ["", ", token: let-me-in"] {
        let gateway = Gateway::from_config(&format!(
            "server: {{ listen: '127.0.0.1:0' }}\nadmin: {{ listen: '127.0.0.1:0'{token} }}\nupstreams: {{ u: {{ base_url: 'http://{}' }} }}\nenvironments: {{ e: {{ upstream: u }} }}\nstore: {{ memory: true }}",
            upstream.address
        ))
        .await;
        for rest in [
            "HTTP/1.1\r\nhost: 10.1.2.3:9090\r\n",
            "HTTP/1.1\r\nhost: evil.example\r\norigin: https://evil.example\r\n",
            "HTTP/1.1\r\nhost:\r\norigin: null\r\n",
            "HTTP/1.1\r\n",
            "HTTP/1.0\r\n",
        ] {
            for (path, is_open) in [
                ("/livez", true),
                ("/readyz", true),
                ("/readyz?verbose", true),
                ("/metrics", false),
                // With a token, the page requests it.
                ("/", !token.is_empty()),
                ("/livez/", false),
            ] {
                let mut caller = Caller::connect(gateway.admin).await;
                caller.send(format!("GET {path} {rest}\r\n").as_bytes()).await;
                let status = caller.reply().await.status;
                let refused = if token.is_empty() { 403 } else { 401 };
                assert_eq!(status, if is_open { 200 } else { refused }, "{path} {rest}");
            }
        }
    }
}

#[tokio::test]
async fn a_shutdown_drains_streams_and_accepts_no_connection() {
    let events = [delta("Hi"), DONE.to_owned()];
    let upstream =
        Upstream::always(Answer::stream().event(&events[0]).then(Step::Gate).event(&events[1]).end()).await;
    let mut gateway = Gateway::in_front_of(&upstream, LARGE_QUOTAS).await;
    let mut caller = gateway.caller().await;
    caller.request("POST", CHAT, "", hello(r#""stream":true,"max_tokens":100"#).as_bytes()).await;
    caller.head().await;
    assert_eq!(caller.chunk().await.unwrap(), events[0].as_bytes());
    let address = gateway.address;
    let app = gateway.take();
    let shutdown = tokio::task::spawn_blocking(move || app.shutdown());
    soon("the listener to close", async { while tokio::net::TcpStream::connect(address).await.is_ok() {} })
        .await;
    assert_eq!(gateway.admin_get("/readyz").await.status, 503);
    upstream.open_gate();
    assert_eq!(caller.chunk().await.unwrap(), events[1].as_bytes());
    assert_eq!(caller.chunk().await, Some(vec![]));
    assert!(caller.is_closed().await);
    let report = shutdown.await.unwrap();
    assert_eq!((report.in_flight, report.cut_off), (1, 0));
}

#[tokio::test]
async fn a_shutdown_cuts_off_streams_after_the_drain_timeout() {
    let upstream = Upstream::always(Answer::stream().event(&delta("Hi")).then(Step::Stall)).await;
    let gateway = Gateway::from_config(&format!(
        "server: {{ listen: '127.0.0.1:0', drain_timeout: 50ms }}\nadmin: {{ listen: '127.0.0.1:0' }}\nupstreams: {{ u: {{ base_url: 'http://{}' }} }}\nenvironments: {{ e: {{ upstream: u }} }}\ndefault_environment: e\nstore: {{ memory: true }}",
        upstream.address
    ))
    .await;
    let mut caller = gateway.caller().await;
    caller.request("POST", CHAT, "", hello(r#""stream":true"#).as_bytes()).await;
    caller.head().await;
    caller.chunk().await;
    let report = gateway.shutdown().await;
    assert_eq!((report.in_flight, report.cut_off), (1, 1));
    let event = caller.chunk().await.unwrap();
    assert!(String::from_utf8(event).unwrap().contains("shutting_down"));
    assert_eq!(caller.chunk().await, Some(vec![]));
}

#[tokio::test]
async fn a_second_gateway_on_the_same_address_fails_to_start() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let gateway = Gateway::in_front_of(&upstream, LARGE_QUOTAS).await;
    let text = format!(
        "server: {{ listen: '{}' }}\nadmin: {{ listen: '127.0.0.1:0' }}\nupstreams: {{ u: {{ base_url: 'http://127.0.0.1:9' }} }}\nenvironments: {{ e: {{ upstream: u }} }}\nstore: {{ memory: true }}",
        gateway.address
    );
    let config = tollgate::config::parse(&text, "second.yaml", &|_| None, &[]).unwrap().config;
    let error =
        tokio::task::spawn_blocking(|| tollgate::app::App::start(config).err().unwrap()).await.unwrap();
    assert!(error.to_string().contains("server.listen"), "{error}");
}

/// Kills the process when a test ends.
struct ChildGuard(Child);

impl Drop for ChildGuard {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test]
async fn each_request_has_one_log_line_without_key_and_body() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("t.yaml");
    let text = format!(
        "server: {{ listen: '127.0.0.1:0' }}\nadmin: {{ listen: '127.0.0.1:0' }}\nupstreams: {{ u: {{ base_url: 'http://{}', api_key: CANARY-upstream-key }} }}\n\
         environments: {{ prod: {{ upstream: u, keys: [{{ name: web, secret: CANARY-callers-key }}] }} }}\nstore: {{ memory: true }}",
        upstream.address
    );
    std::fs::write(&file, text).unwrap();
    let mut child = tollgate(&["serve", "--config", file.to_str().unwrap()]).spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let mut running = ChildGuard(child);
    let started = lines.by_ref().map(Result::unwrap).find(|l| l.contains("\"serving\"")).unwrap();
    let started: serde_json::Value = serde_json::from_str(&started).unwrap();
    let mut caller = Caller::connect(started["address"].as_str().unwrap().parse().unwrap()).await;
    let body = HELLO.replace("hello", "CANARY-body");
    for key in ["CANARY-callers-key", "CANARY-wrong-key"] {
        caller.request("POST", CHAT, &format!("authorization: Bearer {key}\r\n"), body.as_bytes()).await;
        caller.reply().await;
    }
    let status = Command::new("kill").arg(running.0.id().to_string()).status().unwrap();
    assert!(status.success());
    let remaining: Vec<String> = lines.map(Result::unwrap).collect();
    assert_eq!(running.0.wait().unwrap().code(), Some(0));
    let requests: Vec<serde_json::Value> = remaining
        .iter()
        .filter(|l| l.contains("tollgate::request"))
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    assert_eq!(requests.len(), 2, "{remaining:#?}");
    for (field, value) in [
        ("environment", "prod"),
        ("caller", "web"),
        ("api", "chat"),
        ("model", "gpt-4o"),
        ("outcome", "answered"),
    ] {
        assert_eq!(requests[0][field], value, "{field}");
    }
    assert_eq!(
        (requests[0]["charged_tokens"].as_u64(), requests[0]["status"].as_u64()),
        (Some(10), Some(200))
    );
    assert_eq!(
        (requests[1]["error"].as_str(), requests[1]["status"].as_u64()),
        (Some("invalid_api_key"), Some(401))
    );
    assert!(!remaining.concat().contains("CANARY"), "{remaining:#?}");
}

#[test]
fn check_reports_all_faults_at_once_with_their_locations() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("bad.yaml");
    std::fs::write(&file, "upstreams:\n  a: { base_url: nonsense }\nenvironments:\n  e:\n    upstream: b\n    quotas: { total_tokens: { limit: 0, per: fortnight } }\nsevrer: {}\n").unwrap();
    let (code, _, errors) = run(&["check", "--config", file.to_str().unwrap()], "");
    assert_eq!(code, 2);
    for location in [
        "bad.yaml:2:18: upstreams.a.base_url",
        "bad.yaml:5:15: environments.e.upstream",
        "bad.yaml:6:38: ",
        "bad.yaml:6:46: ",
        "bad.yaml:7:1: unknown key \"sevrer\"; did you mean \"server\"?",
        "There are 5 faults.",
    ] {
        assert!(errors.contains(location), "{location}\n{errors}");
    }
    assert_eq!(run(&["serve", "--config", file.to_str().unwrap()], "").0, 2);
    assert_eq!(run(&["check", "--config", "/no/such/file"], "").0, 2);
    assert_eq!(run(&["check", "--config", "config/tollgate.yaml"], "").0, 0);
    assert_eq!(run(&["chekc"], "").0, 2);
}

#[test]
fn hash_key_prints_the_digest_of_a_key() {
    let want = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
    assert_eq!(run(&["hash-key"], "abc\n"), (0, format!("{want}\n"), String::new()));
    assert_eq!(run(&["hash-key"], "\n").0, 1);
}

#[test]
fn help_version_and_completions_are_printed() {
    for arguments in [&["--help"][..], &["--version"], &["completions", "bash"], &["count", "--help"]] {
        let (code, output, _) = run(arguments, "");
        assert!(code == 0 && output.contains("tollgate"), "{arguments:?}");
    }
}
