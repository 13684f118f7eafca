//! The command `tollgate simulate`.

use serde_json::Value;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

fn simulate(folder: &Path, trace: &Path, arguments: &[&str]) -> Output {
    let config = folder.join("config.yaml");
    let text = "upstreams: { u: { base_url: http://u/v1 } }\nenvironments:\n  production: { upstream: u, quotas: { total_tokens: { limit: 3k, per: minute }, requests: { limit: 1k, per: day } } }\n  sandbox: { upstream: u, quotas: { total_tokens: { limit: 1k, per: minute } } }\nstore: { memory: true }\n";
    fs::write(&config, text).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_tollgate"));
    command.args(["simulate", "--config"]).arg(config).arg("--trace").arg(trace).args(arguments);
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
        "3000 total_tokens per minute",
    ] {
        assert!(words.contains(part), "{part}:\n{words}");
    }
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
    // A debug build is about six times slower than a release build.
    let max = if cfg!(debug_assertions) { Duration::from_secs(6) } else { Duration::from_secs(1) };
    assert!(began.elapsed() < max, "{:?}", began.elapsed());
}
