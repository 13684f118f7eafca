//! The command `tollgate simulate`.

use crate::support::*;
use serde_json::Value;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

fn simulate(folder: &Path, trace: &Path, arguments: &[&str]) -> Output {
    simulate_with(folder, trace, "--trace", arguments)
}

/// `option` reads the file: `--trace` or `--log`.
fn simulate_with(folder: &Path, file: &Path, option: &str, arguments: &[&str]) -> Output {
    let config = folder.join("config.yaml");
    let text = "upstreams: { u: { base_url: http://u/v1 } }\nenvironments:\n  production: { upstream: u, quotas: { total_tokens: { limit: 3k, per: minute }, requests: { limit: 1k, per: day } } }\n  sandbox: { upstream: u, quotas: { total_tokens: { limit: 1k, per: minute } } }\nstore: { memory: true }\n";
    fs::write(&config, text).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_tollgate"));
    command.args(["simulate", "--config"]).arg(config).arg(option).arg(file).args(arguments);
    command.output().unwrap()
}

fn fixture() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/trace.csv")
}

#[test]
fn the_report_has_the_outcome_of_each_environment() {
    let folder = tempfile::tempdir().unwrap();
    let output = simulate(folder.path(), &fixture(), &["--json"]);
    assert!(output.status.success(), "{output:?}");
    let all: Value = serde_json::from_slice(&output.stdout).unwrap();
    let mut calls = 0;
    for name in ["production", "sandbox"] {
        let environment = &all["environments"][name];
        for field in
            ["admitted", "rejected", "utilisation", "overshoot", "exhausted_seconds", "oracle_admitted"]
        {
            assert!(environment[field].is_number(), "{name}.{field}: {environment}");
        }
        let number = |field: &str| environment[field].as_u64().unwrap();
        assert!(number("rejected") > 0 && number("admitted") > 0, "{environment}");
        assert!(environment["overshoot"].as_f64().unwrap() <= 0.005, "{environment}");
        let quota = &environment["quotas"][0];
        let smallest = quota["smallest_limit_without_refusals"].as_u64().unwrap();
        assert!(smallest > quota["limit"].as_u64().unwrap(), "{quota}");
        calls += number("admitted") + number("rejected");
    }
    assert_eq!(calls, 60);

    let words = simulate(folder.path(), &fixture(), &["--tokens-per-second", "100", "--first-token", "1s"]);
    let words = String::from_utf8(words.stdout).unwrap();
    for part in [
        "environment production",
        "environment sandbox",
        "oracle",
        "as configured",
        "█",
        "3,000 total_tokens per minute",
    ] {
        assert!(words.contains(part), "{part}:\n{words}");
    }
    assert!(words.lines().last().unwrap().ends_with("would refuse none."), "{words}");
    let widest = |arguments: &[&str]| {
        let output = simulate(folder.path(), &fixture(), arguments);
        let text = String::from_utf8(output.stdout).unwrap();
        text.lines().filter(|line| line.contains('┼')).map(|line| line.chars().count()).max()
    };
    assert_eq!(
        (widest(&[]), widest(&["--width", "200"]), widest(&["--no-chart"])),
        (Some(76), Some(196), None)
    );
}

/// Three environments in a burst have room for 50 calls together, because their upstream has no more.
#[test]
fn environments_share_the_quotas_of_their_upstream() {
    let folder = tempfile::tempdir().unwrap();
    let (config, trace) = (folder.path().join("config.yaml"), folder.path().join("trace.csv"));
    fs::write(&config, "upstreams: { u: { base_url: http://u/v1, quotas: { requests: { limit: 50, per: day } } } }\nenvironments:\n  a: { upstream: u, quotas: { requests: { limit: 40, per: day } } }\n  b: { upstream: u }\n  c: { upstream: u, enforce: false, quotas: { requests: { limit: 1, per: day } } }\nstore: { memory: true }\n").unwrap();
    let mut text = "timestamp,environment,prompt_tokens,completion_tokens\n".to_owned();
    for n in 0..120 {
        writeln!(text, "1700000000,{},10,10", ["a", "b", "c"][n % 3]).unwrap();
    }
    fs::write(&trace, text).unwrap();
    let run = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tollgate"));
        command.args(["simulate", "--config"]).arg(&config).arg("--trace").arg(&trace).args(arguments);
        let output = command.output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let all: Value = serde_json::from_str(&run(&["--json"])).unwrap();
    let mut admitted = Vec::new();
    for name in ["a", "b", "c"] {
        let environment = &all["environments"][name];
        admitted.push(environment["admitted"].as_u64().unwrap());
        assert_eq!(environment["denied_by_upstream"], environment["rejected"], "{name}: {environment}");
        let quota = environment["quotas"].as_array().unwrap().last().unwrap();
        assert_eq!((&quota["scope"], &quota["name"]), (&"upstream".into(), &"u".into()));
        assert_eq!((&quota["calls"], &quota["denials"]), (&120.into(), &70.into()), "{name}: {quota}");
        assert!(quota["smallest_limit_without_refusals"].is_null(), "{quota}");
    }
    assert_eq!(admitted, [17, 17, 16]);
    let words = run(&["--no-chart"]);
    for part in [
        "50 requests per day (upstream u, of all environments)       70",
        "requests (upstream u, of all environments): 50 a day refuses 58 % (70) for 0.7 s.",
        "requests: 40 a day refuses none; 40 would refuse none.",
        "Limits of upstreams refuse 57 % (23) of the calls of this environment, whatever its own limits are.",
    ] {
        assert!(words.contains(part), "{part}:\n{words}");
    }
}

/// The lines that a gateway logs, answered and denied, are replayed as a trace.
#[tokio::test]
async fn the_log_of_a_gateway_is_replayed() {
    let upstream = Upstream::always(Answer::chat(8, 92)).await;
    let sections = format!(
        "upstreams: {{ u: {{ base_url: 'http://{}/v1' }} }}\nenvironments: {{ production: {{ upstream: u, keys: [{{ name: batch, secret: sk-batch-0123456789 }}], quotas: {{ requests: {{ limit: 3, per: hour }} }} }} }}",
        upstream.address
    );
    let process = Process::start(&sections, &[]).await;
    for status in [200, 200, 200, 429, 429] {
        let mut caller = process.caller().await;
        let key = "authorization: Bearer sk-batch-0123456789\r\n";
        caller.request("POST", CHAT, key, HELLO.as_bytes()).await;
        assert_eq!(caller.reply().await.status, status);
    }
    while process.log_text().matches("\"rejected\"").count() < 2 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("gateway.log");
    fs::write(&log, process.log_text() + "not a request\n").unwrap();
    // The config of the simulation allows 3,000 tokens a minute. The two denied requests count as 100 tokens each.
    let output = simulate_with(folder.path(), &log, "--log", &["--json"]);
    assert!(output.status.success(), "{output:?}");
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(stderr.contains("5 requests that a quota decided on, 2 of them denied"), "{stderr}");
    let all: Value = serde_json::from_slice(&output.stdout).unwrap();
    let production = &all["environments"]["production"];
    assert_eq!(
        (&production["admitted"], &production["total_tokens"]),
        (&5.into(), &500.into()),
        "{production}"
    );

    for (form, arguments, hint) in [("--log", fixture(), "--trace"), ("--trace", log, "--log")] {
        let output = simulate_with(folder.path(), &arguments, form, &[]);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(1) && stderr.contains(hint), "{form}: {stderr}");
    }
    let both = simulate(folder.path(), &fixture(), &["--log", "x"]);
    assert_eq!(both.status.code(), Some(2));
}

#[test]
fn an_invalid_trace_is_reported() {
    let folder = tempfile::tempdir().unwrap();
    let trace = folder.path().join("trace.csv");
    for (text, expected) in [
        ("timestamp,prompt_tokens,completion_tokens\n1,2,three\n", "line 2"),
        ("timestamp,prompt_tokens,completion_tokens,environment\n1,2,3,staging\n", "staging"),
        ("timestamp,prompt_tokens,completion_tokens\n1,2,3\n", "default_environment"),
    ] {
        fs::write(&trace, text).unwrap();
        let output = simulate(folder.path(), &trace, &[]);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(1) && stderr.contains(expected), "{expected}: {stderr}");
    }
    let missing = simulate(folder.path(), &folder.path().join("nowhere.csv"), &[]);
    assert_eq!(missing.status.code(), Some(1));
    let usage = simulate(folder.path(), &trace, &["--tokens-per-second", "0"]);
    assert_eq!(usage.status.code(), Some(2));
}

#[test]
fn twenty_thousand_requests_take_less_than_a_second() {
    let folder = tempfile::tempdir().unwrap();
    let trace = folder.path().join("trace.csv");
    let mut text = "timestamp,environment,prompt_tokens,completion_tokens\n".to_owned();
    for n in 0..20_000_u64 {
        writeln!(text, "{}.{:03},production,{},{}", n / 5, n % 5 * 200, n * 37 % 60, n * 61 % 90).unwrap();
    }
    fs::write(&trace, text).unwrap();
    let began = Instant::now();
    assert!(simulate(folder.path(), &trace, &["--json"]).status.success());
    // A debug build is more than six times slower than a release build.
    let max = if cfg!(debug_assertions) { Duration::from_secs(12) } else { Duration::from_secs(1) };
    assert!(began.elapsed() < max, "{:?}", began.elapsed());
}
