//! What is allowed, but probably not meant, or not in force.

use super::*;

/// The warnings, one a line.
fn told(text: &str) -> String {
    let loaded = read(text).unwrap_or_else(|faults| panic!("{faults}\n--- of\n{text}"));
    loaded.warnings.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
}

#[test]
fn what_is_probably_not_meant_is_a_warning() {
    let key = with_upstream("base_url: 'http://u', api_key: k");
    assert!(told(&key).contains("environments.prod: this environment is open"));
    assert!(!told(&(key + "    keys: [{ name: a, secret: sixteen-letters-1 }]\n")).contains("open"));
    let nobodys = told(&with("keys: [{ name: a, secret: sixteen-letters-1 }]"));
    assert!(nobodys.contains("environments.prod: the keys of this environment are never sent upstream, and upstream \"up\" has no api_key"), "{nobodys}");
    assert!(told(&MINIMAL.replace("{ requests: { limit: 5, per: minute } }", "{}")).contains("has no quota"));
    assert!(
        told(&MINIMAL.replace("quotas: { requests: { limit: 5, per: minute } }", ""))
            .contains("has no quota")
    );
    let short = told(&with("keys: [{ name: a, secret: not-so-long-a-1 }]"));
    assert!(short.contains("t.yaml:7:31: environments.prod.keys[0].secret: this key is shorter"), "{short}");
    assert!(!short.contains("not-so"));
}

#[test]
fn what_is_not_in_force_is_told_where_it_is_set() {
    for (text, path) in [
        (format!("{MINIMAL}server: {{ tls: {{ cert: c, key: k }} }}\n"), "t.yaml:7:16: server.tls"),
        (with_upstream("base_url: 'http://u', api: anthropic"), "upstreams.up.api"),
        (with_upstream("base_url: 'http://u', api: gemini"), "upstreams.up.api"),
        (format!("{MINIMAL}store: {{ redis: {{ url: 'redis://r' }} }}\n"), "store.redis"),
    ] {
        let told = told(&text);
        assert!(
            told.contains(&format!("{path}: this is not in force in this version: ")),
            "{path} in\n{told}"
        );
    }
}

#[test]
fn what_is_in_force_is_no_warning() {
    let text = with(
        "enforce: false\n    on_disconnect: drain\n    cached_prompt_tokens: skip\n    calibrate: true\n    unseen_prompt_tokens: 9\n    \
         reserve: { when_short: clamp, on_overrun: cut, max_wait: 2s, quantile: 0.8 }",
    ) + "server: { flood_guard: { requests: 9, per: second } }\nstore: { path: p, history: 1d }\n";
    assert_eq!(told(&text), "");
}
