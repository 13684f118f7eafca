//! The documents, the dashboard and the rules name the metrics that exist.

use super::catalogue::{ALL, Metric};
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

fn read(path: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// All names in a text that begin like a metric, without the suffixes of histograms.
fn names(text: &str) -> BTreeSet<&str> {
    let is_part = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let words = text.split(|c: char| !is_part(c));
    let is_metric = |word: &&str| {
        ["tollgate_", "gen_ai_client_", "gen_ai_server_", "process_"].iter().any(|p| word.starts_with(p))
    };
    let strip = |word| {
        let suffixes = ["_bucket", "_sum", "_count"];
        suffixes.iter().find_map(|suffix| str::strip_suffix(word, suffix)).unwrap_or(word)
    };
    words.filter(is_metric).map(strip).collect()
}

#[test]
fn every_metric_that_a_document_the_dashboard_or_a_rule_names_exists() {
    let known: BTreeSet<&str> = ALL.iter().map(|metric| metric.name).collect();
    // Cookies, parts of the names of rules, a test's name, and the name of a package.
    let other = [
        "tollgate_session",
        "tollgate_csrf",
        "tollgate_quota_taken",
        "tollgate_quota_exhausted",
        "tollgate_quota_time_to_exhaustion_seconds",
        "tollgate_tokens",
        "tollgate_requests",
        "tollgate_rejections",
        "tollgate_upstream_errors",
        "tollgate_0",
    ];
    let docs = fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs")).unwrap();
    let docs = docs.map(|entry| format!("docs/{}", entry.unwrap().file_name().display()));
    let mut files: Vec<String> =
        docs.filter(|name| Path::new(name).extension().is_some_and(|e| e == "md")).collect();
    files.extend(
        [
            "README.md",
            "config/grafana/tollgate.json",
            "config/prometheus/rules.yaml",
            "config/prometheus/alerts.yaml",
            "config/prometheus/alerts_test.yaml",
        ]
        .map(str::to_owned),
    );
    for file in files {
        let text = read(&file);
        // The version in the name of a package.
        let is_version = |name: &str| name.starts_with("tollgate_0");
        let is_unknown = |name: &&str| !known.contains(name) && !other.contains(name) && !is_version(name);
        let unknown: Vec<&str> = names(&text).into_iter().filter(is_unknown).collect();
        assert!(unknown.is_empty(), "{file} names metrics that do not exist: {unknown:?}");
    }
}

#[test]
fn every_metric_is_documented_with_its_type_and_labels() {
    let text = read("docs/metrics.md");
    for Metric { name, labels, .. } in ALL {
        let row = text.lines().find(|line| line.starts_with(&format!("| `{name}` |")));
        let row = row.unwrap_or_else(|| panic!("docs/metrics.md has no row for {name}"));
        let metric = ALL.iter().find(|metric| metric.name == *name).unwrap();
        let labels: Vec<String> = labels.iter().map(|label| format!("`{label}`")).collect();
        let expected = format!("| {} | {}", metric.type_name(), labels.join(", "));
        assert!(row.contains(&expected), "the row of {name} is not {expected}");
    }
    assert!(ALL.len() > 40);
}

#[test]
fn the_dashboard_and_the_rules_use_every_metric_of_the_gateway_or_a_rule_of_it() {
    let used = read("config/grafana/tollgate.json") + &read("config/prometheus/rules.yaml");
    let used = names(&used);
    // Of these the dashboard shows another form.
    let unused = [
        "tollgate_override_active",
        "tollgate_raw_estimate_ratio",
        "tollgate_upstream_keys_masked_total",
        "tollgate_config_last_reload_success_timestamp_seconds",
        "tollgate_config_last_reload_successful",
        "tollgate_tls_certificate_expiry_timestamp_seconds",
        "tollgate_trace_spans_total",
        "tollgate_redis_faults",
    ];
    for metric in ALL.iter().filter(|metric| metric.name.starts_with("tollgate_")) {
        assert!(
            used.contains(metric.name) != unused.contains(&metric.name),
            "{} is on no panel, or is on one and in the list",
            metric.name
        );
    }
}
