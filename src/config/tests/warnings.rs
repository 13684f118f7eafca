//! Warnings: settings that are allowed but probably not intended, or that have no effect yet.

use super::*;

/// The warnings, one per line.
fn warnings(text: &str) -> String {
    let loaded = read(text).unwrap_or_else(|faults| panic!("{faults}\n--- config\n{text}"));
    loaded.warnings.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
}

#[test]
fn a_key_that_looks_like_the_name_of_a_variable_or_a_file_gives_a_warning() {
    for (key, is_warned) in [
        ("$OPENAI_KEY", true),
        ("file:/etc/key", true),
        ("env:KEY", true),
        ("sk-$a", false),
        ("sk-file:", false),
    ] {
        let warned = warnings(&with_upstream(&format!("base_url: 'http://u', api_key: '{key}'")));
        assert_eq!(warned.contains("this text itself is the key"), is_warned, "{key}: {warned}");
        assert!(!warned.contains(key), "{warned}");
        let warned = warnings(&with(&format!("keys: [{{ name: a, secret: '{key}' }}]")));
        assert_eq!(warned.contains("this text itself is the key"), is_warned, "{key}: {warned}");
    }
}

#[test]
fn a_setting_that_is_probably_not_intended_gives_a_warning() {
    let key = with_upstream("base_url: 'http://u', api_key: k");
    assert!(warnings(&key).contains("environments.prod: this environment is open"));
    assert!(!warnings(&(key + "    keys: [{ name: a, secret: sixteen-letters-1 }]\n")).contains("open"));
    let keyless = warnings(&with("keys: [{ name: a, secret: sixteen-letters-1 }]"));
    assert!(keyless.contains("environments.prod: the keys of this environment are never sent upstream, and upstream \"up\" has no api_key"), "{keyless}");
    assert!(
        warnings(&MINIMAL.replace("{ requests: { limit: 5, per: minute } }", "{}")).contains("has no quota")
    );
    assert!(
        warnings(&MINIMAL.replace("quotas: { requests: { limit: 5, per: minute } }", ""))
            .contains("has no quota")
    );
    let short = warnings(&with("keys: [{ name: a, secret: not-so-long-a-1 }]"));
    assert!(short.contains("t.yaml:7:31: environments.prod.keys[0].secret: this key is shorter"), "{short}");
    assert!(!short.contains("not-so"));
}

#[test]
fn settings_that_have_no_effect_together_give_a_warning() {
    let models = warnings(&with(
        "models: ['gpt-4o*', 'o?']\n    model_quotas: { 'gpt-4.1*': { requests: { limit: 1, per: day } }, 'o*': { requests: { limit: 1, per: day } } }",
    ));
    assert!(models.contains("environments.prod.model_quotas.gpt-4.1*: this quota never applies"), "{models}");
    assert!(!models.contains("model_quotas.o*"), "{models}");
    let caller = |limit: &str, per: &str| {
        warnings(&with(&format!(
            "keys: [{{ name: a, secret: sixteen-letters-1, quotas: {{ requests: [{{ limit: {limit}, per: {per} }}] }} }}]"
        )))
    };
    let above = caller("6", "60s");
    assert!(
        above.contains(
            "environments.prod.keys[0].quotas.requests[0]: this limit of 6 is above the limit of 5"
        ),
        "{above}"
    );
    assert!(![caller("5", "minute"), caller("6", "hour")].concat().contains("above the limit"));
}

#[test]
fn limits_that_the_upstream_makes_unreachable_give_a_warning() {
    let at = |limits: &str| with_upstream(&format!("base_url: 'http://u', {limits}"));
    let quota =
        |limit: u64, per: &str| at(&format!("quotas: {{ requests: {{ limit: {limit}, per: {per} }} }}"));
    let lower = warnings(&quota(4, "60s"));
    let want = "environments.prod.quotas.requests: this limit of 5 is above the limit of 4 that upstream \"up\" has for all environments together";
    assert!(lower.contains(want), "{lower}");
    let others = [quota(5, "minute"), quota(4, "hour")].map(|text| warnings(&text)).concat();
    assert!(!others.contains("above"), "{others}");
    let routed = quota(4, "minute") + "    routes: [{ models: [a], upstream: up }]\n";
    assert!(!warnings(&routed).contains("above"), "requests may go to other upstreams");
    let text = at("max_in_flight: 3");
    let maximum = warnings(&(text.clone() + "    max_in_flight: 4\n"));
    assert!(maximum.contains("environments.prod.max_in_flight: this maximum of 4 is above"), "{maximum}");
    assert!(!warnings(&(text + "    max_in_flight: 3\n")).contains("above"));
    let without = quota(4, "minute").replace("quotas: { requests: { limit: 5, per: minute } }", "");
    assert!(!warnings(&without).contains("has no quota"), "the upstream has one");
}

#[test]
fn a_reservation_that_can_never_fit_gives_a_warning() {
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
        ("{ completion: max_tokens }", "reserve.completion: a request without max_tokens reserves 4096"),
        (
            "{ completion: max_tokens, default_max_tokens: 601 }",
            "reserve.default_max_tokens: a request without",
        ),
    ] {
        let warnings = warnings(&with(reserve));
        assert!(
            warnings.contains(path) && warnings.contains("total_tokens per minute holds at most 600"),
            "{warnings}"
        );
    }
    for fine in [
        "{ completion: 600 }",
        "{ completion: max_tokens, default_max_tokens: 600 }",
        "{ completion: 700, when_short: clamp }",
        "{ completion: adaptive, default_max_tokens: 4096 }",
        "{ completion: none }",
    ] {
        assert_eq!(warnings(&with(fine)), "", "{fine}");
    }
}

#[test]
fn a_supported_setting_gives_no_warning() {
    let text = with(
        "enforce: false\n    on_disconnect: drain\n    cached_prompt_tokens: skip\n    calibrate: true\n    unseen_prompt_tokens: 9\n    \
         reserve: { when_short: clamp, on_overrun: cut, max_wait: 2s, quantile: 0.8 }",
    ) + "server: { flood_guard: { requests: 9, per: second } }\nstore: { path: p, history: 1d, redis: { url: 'redis://r', timeout: 1s, on_failure: open, lease: true } }\n";
    assert_eq!(warnings(&text), "");
}

#[test]
fn a_route_that_never_matches_gives_a_warning() {
    let of = |models: &str, routes: &str| warnings(&with(&format!("{models}routes: [{routes}]")));
    let route = |models: &str, rest: &str| format!("{{ models: {models}, upstream: up{rest} }}");
    for (first, second) in [
        (route("['gpt-*']", ""), route("['gpt-4o', 'gpt-4.1*']", "")),
        (route("['*']", ""), route("['gpt-4o']", ", apis: [chat]")),
        (route("['a', 'b']", ", apis: [chat]"), route("['b']", ", apis: [chat]")),
    ] {
        let text = of("", &format!("{first}, {second}"));
        assert!(
            text.contains(
                "environments.prod.routes[1]: this route never matches, because earlier routes take"
            ),
            "{text}"
        );
        assert!(!of("", &format!("{second}, {first}")).contains("never matches") || first.contains("'b'"));
    }
    for (first, second) in [
        (route("['gpt-*']", ", apis: [chat]"), route("['gpt-4o']", "")),
        (route("['gpt-4o']", ""), route("['gpt-*']", "")),
        (route("['gpt-?']", ""), route("['gpt-*']", "")),
    ] {
        assert!(!of("", &format!("{first}, {second}")).contains("never matches"), "{first} {second}");
    }
    let forbidden = of("models: ['gpt-*']\n    ", &route("['claude-*']", ""));
    assert!(forbidden.contains("because the environment's models allow no model"), "{forbidden}");
    let many: Vec<String> = (0..600).map(|n| route(&format!("['a{n}']"), "")).collect();
    assert!(!of("", &many.join(", ")).contains("never matches"));
}

#[test]
fn the_upstreams_of_routes_are_checked_for_exposure() {
    let text =
        MINIMAL.replace("environments:", "  paid: { base_url: 'http://p', api_key: k }\nenvironments:");
    let open = warnings(&format!("{text}    routes: [{{ models: [a], upstream: [up, paid] }}]\n"));
    assert!(open.contains("can spend on the api_key of upstream \"paid\""), "{open}");
    assert_eq!(open.lines().count(), 1, "{open}");
}
