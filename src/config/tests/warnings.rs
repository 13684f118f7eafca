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
fn a_reserve_that_no_request_could_ever_have_is_a_warning() {
    let quotas =
        "quotas: { total_tokens: [{ limit: 500, per: minute, burst: 600 }, { limit: 1M, per: day }] }";
    let with = |reserve: &str| {
        let text = MINIMAL.replace("quotas: { requests: { limit: 5, per: minute } }", quotas);
        format!("{text}    reserve: {reserve}\n")
    };
    for (reserve, path) in [
        (
            "{ completion: 700 }",
            "t.yaml:7:28: environments.prod.reserve.completion: every request reserves 700",
        ),
        (
            "{ completion: max_tokens }",
            "reserve.completion: a request that names no max_tokens reserves 4096",
        ),
        ("{ completion: max_tokens, default_max_tokens: 601 }", "reserve.default_max_tokens: a request that"),
    ] {
        let told = told(&with(reserve));
        assert!(told.contains(path) && told.contains("total_tokens per minute can ever hold, 600"), "{told}");
    }
    for fine in [
        "{ completion: 600 }",
        "{ completion: max_tokens, default_max_tokens: 600 }",
        "{ completion: 700, when_short: clamp }",
        "{ completion: adaptive, default_max_tokens: 4096 }",
        "{ completion: none }",
    ] {
        assert_eq!(told(&with(fine)), "", "{fine}");
    }
}

#[test]
fn what_is_not_in_force_is_told_where_it_is_set() {
    let told = told(&format!("{MINIMAL}server: {{ tls: {{ cert: c, key: k }} }}\n"));
    assert!(told.contains("t.yaml:7:16: server.tls: this is not in force in this version: "), "{told}");
}

#[test]
fn what_is_in_force_is_no_warning() {
    let text = with(
        "enforce: false\n    on_disconnect: drain\n    cached_prompt_tokens: skip\n    calibrate: true\n    unseen_prompt_tokens: 9\n    \
         reserve: { when_short: clamp, on_overrun: cut, max_wait: 2s, quantile: 0.8 }",
    ) + "server: { flood_guard: { requests: 9, per: second } }\nstore: { path: p, history: 1d, redis: { url: 'redis://r', on_failure: open, lease: true } }\n";
    assert_eq!(told(&text), "");
}
