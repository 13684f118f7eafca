//! What a config may say, and what it is told when it says something else.

use super::*;
use crate::quota::{Kind, Scope, Window};
use proptest::prelude::*;

const MINIMAL: &str = "upstreams:\n  up: { base_url: 'http://u/v1' }\nenvironments:\n  prod:\n    upstream: up\n    quotas: { requests: { limit: 5, per: minute } }\n";

fn variables(name: &str) -> Option<String> {
    match name {
        "KEY" => Some("a-key-from-outside-1".into()),
        "LIMIT" => Some("2k".into()),
        "EMPTY" => Some(String::new()),
        "EVIL" => Some("x, upstream: other }\n# ".into()),
        _ => None,
    }
}

fn read(text: &str) -> Result<Loaded, Faults> {
    parse(text, "t.yaml", &variables, &[])
}

fn overridden(text: &str, variable: &str, value: &str) -> Result<Loaded, Faults> {
    parse(text, "t.yaml", &variables, &[(variable.to_owned(), value.to_owned())])
}

fn faults(text: &str) -> String {
    read(text)
        .map(|l| panic!("no fault in {text}: {:?}", l.config))
        .unwrap_or_else(|faults| faults.to_string())
}

/// `MINIMAL` with these lines within its environment.
fn with(lines: &str) -> String {
    format!("{MINIMAL}    {lines}\n")
}

fn quotas_of(quotas: &str) -> Vec<crate::quota::Quota> {
    let text = MINIMAL.replace("{ requests: { limit: 5, per: minute } }", quotas);
    read(&text).unwrap_or_else(|f| panic!("{f}")).config.environments[0].quotas.clone()
}

#[test]
fn every_example_config_is_valid() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("config");
    let files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|f| f.unwrap().path()).collect();
    assert!(files.len() >= 2, "{files:?}");
    for path in files {
        let text = std::fs::read_to_string(&path).unwrap();
        let loaded =
            parse(&text, "example", &|_| None, &[]).unwrap_or_else(|f| panic!("{}: {f}", path.display()));
        let told: Vec<String> = loaded.warnings.iter().map(ToString::to_string).collect();
        assert!(told.is_empty(), "{told:?}");
    }
}

#[test]
fn what_is_left_out_has_its_default() {
    let config = read(MINIMAL).unwrap().config;
    assert_eq!(config.server.listen.to_string(), "127.0.0.1:8080");
    assert_eq!(config.admin.listen.to_string(), "127.0.0.1:9090");
    assert_eq!(config.server.max_request_body, 32 << 20);
    let environment = &config.environments[0];
    assert_eq!(environment.reserve.completion, CompletionReserve::Adaptive);
    assert_eq!(environment.retry_patience.as_secs(), 30);
    assert!(environment.enforce && !environment.forward_other_paths && environment.callers.is_empty());
    assert_eq!(environment.upstream.timeouts.total.as_secs(), 900);
    assert_eq!(config.default_environment, None);
}

#[test]
fn quotas_roll_up_to_an_hour_and_follow_the_calendar_from_a_day_on() {
    let all = quotas_of(
        "{ total_tokens: [{ limit: 200k, per: minute, burst: 300k }, { limit: 1.5M, per: 1d, timezone: Europe/Berlin }, { limit: 7, per: 90s }], requests: { limit: 9, per: month, window: rolling } }",
    );
    assert_eq!((all[0].kind, all[0].limit, all[0].per.ms), (Kind::TotalTokens, 200_000, 60_000));
    assert_eq!(all[0].window, Window::Rolling { burst: 300_000 });
    assert!(
        matches!(&all[1].window, Window::Calendar { zone, .. } if zone.iana_name() == Some("Europe/Berlin"))
    );
    assert_eq!((all[2].per.written.as_str(), all[2].per.ms), ("90s", 90_000));
    assert_eq!(all[3].window, Window::Rolling { burst: 9 });
}

#[test]
fn callers_and_models_have_quotas_in_scopes_of_their_own() {
    let text = with(
        "keys: [{ name: a, secret: sixteen-letters-1, quotas: { requests: { limit: 1, per: day } } }]\n    model_quotas: { 'gpt-*': { total_tokens: { limit: 1, per: day } } }",
    );
    let config = read(&text).unwrap().config;
    let scopes: Vec<_> = config.environments[0].quotas.iter().map(|q| q.scope.clone()).collect();
    assert_eq!(
        scopes,
        [Scope::Environment, Scope::Caller(0, "a".into()), Scope::Model(crate::glob::Glob::new("gpt-*"))]
    );
}

#[test]
fn faulty_settings_are_told_with_their_place_and_what_would_mend_them() {
    let quota = |q: &str| MINIMAL.replace("{ limit: 5, per: minute }", q);
    for (text, told) in [
        (
            quota("{ limit: 0, per: minute }"),
            "t.yaml:6:34: environments.prod.quotas.requests.limit: a limit of 0",
        ),
        (quota("{ limit: 2000000G, per: minute }"), "2^50"),
        (quota("{ limit: 5, burst: 0, per: minute }"), "a burst of 0"),
        (quota("{ limit: 5 }"), "\"per\" is missing"),
        (quota("{ per: minute }"), "\"limit\" is missing"),
        (quota("{ limit: 5, per: 30 }"), "is not a duration"),
        (quota("{ limit: 5, per: day, burst: 9 }"), "a calendar window has no burst"),
        (quota("{ limit: 5, per: minute, timezone: UTC }"), "a rolling window has no time zone"),
        (quota("{ limit: 5, per: day, timezone: Europe/Brelin }"), "did you mean \"Europe/Berlin\"?"),
        (quota("{ limit: 5, per: 2d }"), "window: rolling"),
        (quota("[{ limit: 5, per: minute }, { limit: 6, per: 60s }]"), "already"),
        (quota("{ limit: 5, per: minute, windw: rolling }"), "did you mean \"window\"?"),
        (with("reserve: { completion: sometimes }"), "adaptive, max_tokens, none or a number"),
        (with("reserve: { quantile: 1.5 }"), "between 0 and 1"),
        (with("enforce: yes"), "has to be one of true, false"),
        (with("keys: [{ name: a, secret: '' }]"), "the key is empty"),
        (with("keys: [{ name: a, secret: ${EMPTY} }]"), "the key is empty"),
        (with("keys: [{ name: a, secret: ${UNSET} }]"), "the variable UNSET is not set"),
        (with("keys: [{ name: a, sha256: abc }]"), "64 hexadecimal digits"),
        (with("keys: [{ name: a }]"), "give the key as secret"),
        (with("keys: [{ name: a b, secret: sixteen-letters-1 }]"), "a caller's name"),
        (
            with("keys: [{ name: a, secret: sixteen-letters-1 }, { name: a, secret: sixteen-letters-2 }]"),
            "stands here twice",
        ),
        (
            with("keys: [{ name: a, secret: sixteen-letters-1 }, { name: b, secret: sixteen-letters-1 }]"),
            "this key stands at environments.prod.keys[0] too",
        ),
        (MINIMAL.replace("prod:", "v1:"), "cannot be an environment's name"),
        (MINIMAL.replace("prod:", "Prod:"), "cannot be an environment's name"),
        (
            MINIMAL.replace("upstream: up", "upstream: pu"),
            "there is no upstream \"pu\"; did you mean \"up\"?",
        ),
        (MINIMAL.replace("http://u/v1", "ftp://u"), "http or https"),
        (MINIMAL.replace("http://u/v1", "http://me:secret@u"), "user name or password"),
        (MINIMAL.replace("http://u/v1", "http://u?x=1"), "query"),
        (MINIMAL.replace("'http://u/v1'", "'http://u', headers: { host: x }"), "sets itself"),
        (MINIMAL.replace("'http://u/v1'", "'http://u', timeouts: { idle: 0s }"), "would fail every request"),
        (format!("{MINIMAL}default_environment: prd\n"), "did you mean \"prod\"?"),
        (format!("{MINIMAL}admin: {{ listen: '0.0.0.0:9090' }}\n"), "admin.token: must be set"),
        (format!("{MINIMAL}admin: {{ listen: '127.0.0.1:8080' }}\n"), "the same address"),
        (format!("{MINIMAL}store: {{ memory: true, redis: {{ url: 'redis://r' }} }}\n"), "not both"),
        (format!("{MINIMAL}server: {{ listen: here }}\n"), "an address and port"),
        (format!("{MINIMAL}upstreams: {{}}\n"), "stands here twice"),
        (String::new(), "\"upstreams\" is missing"),
        ("- a\n- b\n".into(), "this has to be a mapping, not a list"),
        ("a: b\n---\na: c\n".into(), "one YAML document"),
        ("a: [1, 2\nb: c".into(), "this is not YAML"),
        ("\tx: 1".into(), "t.yaml:1"),
    ] {
        let all = faults(&text);
        assert!(all.contains(told), "{told}\n--- in\n{all}\n--- of\n{text}");
    }
}

#[test]
fn all_faults_are_told_at_once_in_the_files_order() {
    let text = "environments:\n  a: { upstream: x, modles: [] }\n  b: { upstream: y, enforce: 1 }\nserver: { listen: 5 }\n";
    let lines: Vec<String> = faults(text).lines().map(str::to_owned).collect();
    assert_eq!(lines.len(), 6, "{lines:#?}");
    assert!(lines.is_sorted_by_key(|l| l.split(':').nth(1).and_then(|n| n.parse::<u32>().ok())));
}

#[test]
fn references_take_variables_defaults_and_files_and_never_become_structure() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("key");
    std::fs::write(&file, "from-a-file-12345\n").unwrap();
    let text = format!(
        "upstreams:\n  up: {{ base_url: 'http://u', api_key: ${{file:{}}} }}\n  other: {{ base_url: \"http://${{HOST:-default.host}}:80\", api_key: ${{EMPTY}} }}\n\
         environments:\n  prod:\n    upstream: up\n    keys: [{{ name: a, secret: ${{KEY}} }}]\n    quotas: {{ requests: {{ limit: ${{LIMIT}}, per: minute }} }}\n",
        file.display()
    );
    let config = read(&text).unwrap_or_else(|f| panic!("{f}")).config;
    assert_eq!(config.upstreams[0].api_key.as_ref().map(Secret::expose), Some("from-a-file-12345"));
    assert_eq!(config.upstreams[1].base_url.host(), Some("default.host"));
    assert!(config.upstreams[1].api_key.is_none());
    assert_eq!(config.environments[0].quotas[0].limit, 2_000);
    // What comes from outside is a value, whatever it looks like; and no message repeats it.
    let all = faults(&MINIMAL.replace("upstream: up", "upstream: ${EVIL}"));
    assert!(all.contains("there is no upstream this value") && !all.contains("other"), "{all}");
    let all = faults(&MINIMAL.replace("limit: 5", "limit: ${KEY}"));
    assert!(all.contains("this value is not an amount") && !all.contains("a-key-from-outside"), "{all}");
}

#[test]
fn a_variable_can_override_any_setting() {
    let config = overridden(MINIMAL, "TOLLGATE__SERVER__LISTEN", "127.0.0.1:1").unwrap().config;
    assert_eq!(config.server.listen.port(), 1);
    let config =
        overridden(MINIMAL, "TOLLGATE__ENVIRONMENTS__PROD__QUOTAS__REQUESTS__LIMIT", "7k").unwrap().config;
    assert_eq!(config.environments[0].quotas[0].limit, 7_000);
    for (variable, value, told) in [
        ("TOLLGATE__SERVR__LISTEN", "x", "unknown key \"servr\"; did you mean \"server\"?"),
        ("TOLLGATE__SERVER__LISTEN", "secret", "$TOLLGATE__SERVER__LISTEN: server.listen: this value is not"),
        ("TOLLGATE__", "x", "an override is named"),
        ("TOLLGATE__UPSTREAMS__UP__BASE_URL__X", "x", "no setting at the step"),
    ] {
        let all = overridden(MINIMAL, variable, value).unwrap_err().to_string();
        assert!(all.contains(told) && !all.contains("secret"), "{all}");
    }
}

#[test]
fn merges_and_aliases_never_lose_a_limit() {
    let text = "upstreams: { up: { base_url: 'http://u' } }\nenvironments:\n  a: &a\n    upstream: up\n    quotas: &q { requests: { limit: 5, per: minute } }\n  b: { <<: *a, models: [m] }\n  c: { upstream: up, quotas: *q }\n  d:\n    <<: *a\n    quotas: { requests: { limit: 6, per: minute } }\n";
    let config = read(text).unwrap_or_else(|f| panic!("{f}")).config;
    let limits: Vec<_> = config.environments.iter().map(|e| e.quotas[0].limit).collect();
    assert_eq!(limits, [5, 5, 5, 6]);
}

#[test]
fn what_is_probably_not_meant_is_a_warning() {
    let told = |text: &str| {
        let loaded = read(text).unwrap_or_else(|f| panic!("{f}"));
        loaded.warnings.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
    };
    assert!(
        told(&MINIMAL.replace("'http://u/v1'", "'http://u/v1', api_key: k"))
            .contains("this environment is open")
    );
    assert!(told(&MINIMAL.replace("{ requests: { limit: 5, per: minute } }", "{}")).contains("no quota"));
    assert!(told(&with("keys: [{ name: a, secret: short }]")).contains("can be guessed"));
    assert!(told(MINIMAL).contains("lost at a restart"));
    for (lines, setting) in [
        ("enforce: false", "environments.prod.enforce"),
        ("on_disconnect: drain", "environments.prod.on_disconnect"),
        ("reserve: { when_short: clamp, max_wait: 3s }", "environments.prod.reserve.max_wait"),
    ] {
        assert!(told(&with(lines)).contains(&format!("{setting}: this is not in force")), "{lines}");
    }
    assert!(!told(&with("enforce: true\n    on_disconnect: cancel")).contains("not in force"));
}

#[test]
fn hostile_files_are_refused_in_bounded_time() {
    let laughs: String =
        (1..9).map(|n| format!("a{n}: &a{n} [{}]\n", vec![format!("*a{}", n - 1); 9].join(","))).collect();
    for text in [
        "[".repeat(1 << 20),
        "{a: ".repeat(100_000),
        format!("a0: &a0 x\n{laughs}"),
        "a: &a [*a]".to_owned(),
        "\0\0\0".to_owned(),
        "\u{feff}".to_owned(),
        "${".repeat(100_000),
        "${a}".repeat(100_000),
        format!("{MINIMAL}x: \u{f0041}\n"),
    ] {
        assert!(read(&text).is_err(), "{:.40}", text);
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("c.yaml");
    std::fs::write(&path, b"a: \xff\xfe").unwrap();
    assert!(load(&Source { path: path.clone() }).unwrap_err().to_string().contains("not UTF-8"));
    std::fs::write(&path, vec![b' '; 5 << 20]).unwrap();
    assert!(load(&Source { path }).unwrap_err().to_string().contains("4 MiB"));
}

proptest! {
    #[test]
    fn no_text_makes_it_panic(text in "[ -~\n\t]{0,200}") {
        let _ = read(&text);
    }

    #[test]
    fn no_slip_of_the_pen_makes_it_panic(at in 0usize..200, cut in 0usize..12, put in "[ -~\n${}&*<>é]{0,6}") {
        let mut text = with("keys: [{ name: a, secret: ${KEY} }]");
        let at = at.min(text.len());
        text.replace_range(at..(at + cut).min(text.len()), &put);
        let _ = read(&text);
    }
}
