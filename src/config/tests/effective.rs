//! The effective config can be read again, and contains no secret.

use super::generator::Generator;
use super::*;
use crate::config::effective::{self, Secrets};
use crate::config::fault::Findings;
use crate::config::{variables, yaml};
use proptest::prelude::*;
use serde_json::Value;

/// The effective config with its secrets.
fn unmasked(text: &str) -> EffectiveConfig {
    let findings = Findings::new("t.yaml");
    let mut root = yaml::parse(text, &findings).unwrap();
    variables::fill_in(&mut root, &super::variables, &findings);
    effective::of(&root, Secrets::Shown)
}

/// The config without the parts that the text of the file decides.
fn settings(text: &str) -> Config {
    settings_of(config(text))
}

/// Asserts that both are equal, except for masked secrets. Returns the number of masks.
fn check_masked(masked: &Value, shown: &Value) -> usize {
    match (masked, shown) {
        (Value::Object(masked), Value::Object(shown)) => {
            assert!(masked.keys().eq(shown.keys()));
            masked.iter().map(|(name, value)| check_masked(value, &shown[name])).sum()
        }
        (Value::Array(masked), Value::Array(shown)) => {
            assert_eq!(masked.len(), shown.len());
            masked.iter().zip(shown).map(|(masked, shown)| check_masked(masked, shown)).sum()
        }
        (Value::String(masked), Value::String(shown)) if masked != shown => {
            assert!(masked == "***" || masked.contains(":***@"), "{masked}");
            1
        }
        _ => {
            assert_eq!(masked, shown);
            0
        }
    }
}

#[test]
fn defaults_are_filled_in_in_the_order_of_the_reference() {
    let printed = config(MINIMAL).effective.to_yaml();
    let expected = "\
server:
  listen: \"127.0.0.1:8080\"
  max_request_body: 32MiB
  drain_delay: 0s
  drain_timeout: 30s
  http2: true
  max_connections: 10000
  body_timeout: 60s
  buffered_bodies: 1GiB
admin:
  listen: \"127.0.0.1:9090\"
upstreams:
  up:
    base_url: http://u/v1
    api: openai
    timeouts: { connect: 5s, first_byte: 120s, idle: 60s, total: 15m }
    stream_usage: ask
    provider_limits: observe
environments:
  prod:
    upstream: up
    quotas: { requests: { limit: 5, per: minute, window: rolling, burst: 5 } }
";
    assert!(printed.starts_with(expected), "{printed}");
    assert!(
        printed.ends_with(
            "store:\n  path: data/tollgate.db\n  history: 35d\n  memory: false\ntelemetry:\n  level: info\n  requests: all\n  caller_label: true\n  gen_ai_metrics: false\n"
        ),
        "{printed}"
    );
}

#[test]
fn json_has_numbers_booleans_and_no_secret() {
    let digest = "6ca13d52ca70c883e0f0bb101e425a89e8624de51db2d2392593af6a84118090";
    let text = with_upstream("base_url: 'http://u', api_key: ${KEY}, headers: { x-key: secret-two }")
        + &format!(
            "    keys: [{{ name: a, secret: secret-three-is-long }}, {{ name: b, sha256: {digest} }}]\n"
        )
        + "store: { redis: { url: 'redis://me:secret-four@r/1' } }\nadmin: { token: secret-five }\n";
    let effective = config(&text).effective;
    let json = serde_json::to_value(&effective).unwrap();
    assert_eq!(json["environments"]["prod"]["quotas"]["requests"]["limit"], 5);
    assert_eq!(json["environments"]["prod"]["enforce"], true);
    assert_eq!(json["store"]["redis"]["url"], "redis://me:***@r/1");
    for shown in [effective.to_yaml(), json.to_string()] {
        for secret in ["secret-", "a-key-from-outside", digest] {
            assert!(!shown.contains(secret), "{shown}");
        }
        assert_eq!(shown.matches("***").count(), 6, "{shown}");
    }
}

#[test]
fn overrides_are_part_of_the_effective_config() {
    let loaded = overridden(MINIMAL, "TOLLGATE__SERVER__DRAIN_TIMEOUT", "7s").unwrap();
    assert!(loaded.config.effective.to_yaml().contains("drain_timeout: 7s"));
}

#[test]
fn the_effective_reference_config_is_the_reference_config() {
    let text = include_str!("../../../config/tollgate.yaml");
    let read = |text: &str| settings_of(parse(text, "example", &|_| None, &[]).unwrap().config);
    let findings = Findings::new("t.yaml");
    let mut root = yaml::parse(text, &findings).unwrap();
    variables::fill_in(&mut root, &|_| None, &findings);
    assert_eq!(read(&effective::of(&root, Secrets::Shown).to_yaml()), read(text));
}

fn settings_of(config: Config) -> Config {
    Config { effective: EffectiveConfig::default(), named_files: Vec::new(), ..config }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]
    #[test]
    fn a_printed_config_is_the_same_config_again(seed: u64) {
        let text = Generator::new(seed).config().to_string();
        let shown = unmasked(&text);
        let again = shown.to_yaml();
        prop_assert_eq!(settings(&again), settings(&text), "{}", again);
        // Printing it again changes nothing.
        prop_assert_eq!(unmasked(&again), shown.clone());
        let masked = config(&text).effective;
        let json = |config: &EffectiveConfig| serde_json::to_value(config).unwrap();
        check_masked(&json(&masked), &json(&shown));
    }
}
