//! Valid configs and their values. The submodules test faults, hostile files and warnings.

mod effective;
mod faults;
mod generator;
mod hostile;
mod reference;
mod schema;
mod validator;
mod warnings;

use super::*;
use crate::quota::{ClockUnit, Kind, Scope, Window};
use std::path::Path;

const MINIMAL: &str = "\
upstreams:
  up: { base_url: 'http://u/v1' }
environments:
  prod:
    upstream: up
    quotas: { requests: { limit: 5, per: minute } }
";

fn variables(name: &str) -> Option<String> {
    match name {
        "KEY" => Some("a-key-from-outside-1".into()),
        "LIMIT" => Some("2k".into()),
        "EMPTY" => Some(String::new()),
        "EVIL" => Some("x, upstream: other }\n# ".into()),
        _ => None,
    }
}

/// Reads a config and compares the schema's verdict.
fn read(text: &str) -> Result<Loaded, Faults> {
    let read = parse(text, "t.yaml", &variables, &[]);
    schema::check_agreement(text, &read);
    read
}

fn overridden(text: &str, variable: &str, value: &str) -> Result<Loaded, Faults> {
    parse(text, "t.yaml", &variables, &[(variable.to_owned(), value.to_owned())])
}

fn config(text: &str) -> Config {
    read(text).unwrap_or_else(|faults| panic!("{faults}\n--- config\n{text}")).config
}

/// The faults of a config, one per line.
fn faults(text: &str) -> String {
    read(text).map_or_else(|faults| faults.to_string(), |_| panic!("no fault in config\n{text}"))
}

/// `MINIMAL` with this line in its environment.
fn with(line: &str) -> String {
    format!("{MINIMAL}    {line}\n")
}

/// `MINIMAL` with this quota for requests.
fn with_quota(quota: &str) -> String {
    MINIMAL.replace("{ limit: 5, per: minute }", quota)
}

/// `MINIMAL` with these settings in its upstream.
fn with_upstream(settings: &str) -> String {
    MINIMAL.replace("base_url: 'http://u/v1'", settings)
}

fn quota(quota: &str) -> Quota {
    config(&with_quota(quota)).environments[0].quotas[0].clone()
}

#[test]
fn every_example_config_is_valid_and_needs_no_variable() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("config");
    let files = std::fs::read_dir(folder).unwrap().map(|f| f.unwrap().path());
    let files: Vec<_> = files.filter(|path| path.extension().is_some_and(|e| e == "yaml")).collect();
    assert!(files.len() >= 2, "{files:?}");
    for path in files {
        let text = std::fs::read_to_string(&path).unwrap();
        let loaded = parse(&text, "example", &|_| None, &[]);
        let loaded = loaded.unwrap_or_else(|f| panic!("{}: {f}", path.display()));
        // Without variables the upstreams have no key, which gives a warning if the callers have keys.
        let others: Vec<_> =
            loaded.warnings.iter().filter(|w| !w.to_string().contains("has no api_key")).collect();
        assert!(others.is_empty(), "{}: {others:?}", path.display());
        let with_keys =
            parse(&text, "example", &|name| name.ends_with("API_KEY").then(|| "sk-1".into()), &[]);
        assert_eq!(with_keys.unwrap().warnings, [], "{}", path.display());
    }
}

#[test]
fn absent_settings_have_their_defaults() {
    let config = config(MINIMAL);
    assert_eq!(config.server.listen.to_string(), "127.0.0.1:8080");
    assert_eq!(config.admin.listen.to_string(), "127.0.0.1:9090");
    assert_eq!(config.server.max_request_body, 32 << 20);
    assert_eq!(
        config.server.flood_guard,
        Some(FloodGuard { requests: 1_000, per: Duration::from_secs(1), guards_loopback: false })
    );
    assert_eq!(config.server.drain_timeout.as_secs(), 30);
    assert_eq!(config.store.path, Path::new("data/tollgate.db"));
    assert_eq!(config.store.history.as_secs(), 35 * 86_400);
    assert_eq!(config.default_environment, None);
    let environment = &config.environments[0];
    assert!(environment.callers.is_empty() && environment.models.is_empty());
    assert!(environment.enforce && environment.calibrate && environment.count_cached_prompt_tokens);
    assert!(!environment.forward_other_paths && environment.on_disconnect == OnDisconnect::Cancel);
    assert_eq!((environment.unseen_prompt_tokens, environment.retry_patience.as_secs()), (2_000, 30));
    let reserve = ReserveSettings {
        prompt: true,
        completion: CompletionReserve::Adaptive,
        quantile: 0.9,
        default_max_tokens: 4_096,
        when_short: WhenShort::Reject,
        on_overrun: OnOverrun::Finish,
        max_wait: Duration::ZERO,
    };
    assert_eq!(environment.reserve, reserve);
    let upstream = &environment.upstream;
    assert!(upstream.api == ApiKind::OpenAi && upstream.api_key.is_none() && upstream.requests_stream_usage);
    let Timeouts { connect, first_byte, idle, total } = upstream.timeouts;
    assert_eq!([connect, first_byte, idle, total].map(|t| t.as_secs()), [5, 120, 60, 900]);
}

#[test]
fn empty_sections_have_their_defaults() {
    let config = config(&format!("{MINIMAL}server:\nadmin: ~\nstore: null\nmodels:\n"));
    assert_eq!(config.server.listen.port(), 8080);
}

#[test]
fn windows_are_rolling_below_a_day_and_calendar_from_a_day_on() {
    let rolling = |burst| Window::Rolling { burst };
    let calendar = |unit| Window::Calendar { unit, zone: jiff::tz::TimeZone::UTC };
    for (text, ms, window) in [
        ("{ limit: 7, per: second }", 1_000, rolling(7)),
        ("{ limit: 7, per: minute, burst: 9 }", 60_000, rolling(9)),
        ("{ limit: 7, per: 1h }", 3_600_000, rolling(7)),
        ("{ limit: 7, per: 90s }", 90_000, rolling(7)),
        ("{ limit: 7, per: 12h }", 43_200_000, rolling(7)),
        ("{ limit: 7, per: day }", 86_400_000, calendar(ClockUnit::Day)),
        ("{ limit: 7, per: 24h }", 86_400_000, calendar(ClockUnit::Day)),
        ("{ limit: 7, per: week }", 604_800_000, calendar(ClockUnit::Week)),
        ("{ limit: 7, per: month }", 2_592_000_000, calendar(ClockUnit::Month)),
        ("{ limit: 7, per: month, window: rolling }", 2_592_000_000, rolling(7)),
        ("{ limit: 7, per: 2d, window: rolling }", 172_800_000, rolling(7)),
        ("{ limit: 7, per: 1m, window: calendar }", 60_000, calendar(ClockUnit::Minute)),
        ("{ limit: 7, per: second, window: calendar }", 1_000, calendar(ClockUnit::Second)),
    ] {
        let quota = quota(text);
        assert_eq!((quota.kind, quota.limit), (Kind::Requests, 7), "{text}");
        assert_eq!((quota.per.ms, quota.window), (ms, window), "{text}");
    }
    assert_eq!(quota("{ limit: 1, per: 90s }").per.text, "90s");
    let Window::Calendar { zone, .. } = quota("{ limit: 1, per: 1d, timezone: Europe/Berlin }").window else {
        panic!("a quota per day has a calendar window");
    };
    assert_eq!(zone.iana_name(), Some("Europe/Berlin"));
}

#[test]
fn the_maximum_limit_is_two_to_the_fiftieth() {
    assert_eq!(quota("{ limit: 1_125_899_906_842_624, per: hour }").limit, crate::quota::MAX_LIMIT);
}

#[test]
fn quotas_of_callers_and_models_have_their_own_scopes() {
    let text = with(
        "keys: [{ name: a, secret: sixteen-letters-1, quotas: { requests: { limit: 1, per: day } } }]\n    \
         model_quotas: { 'gpt-*': { total_tokens: [{ limit: 1, per: day }, { limit: 1, per: hour }] } }",
    );
    let config = config(&text);
    let scopes: Vec<_> = config.environments[0].quotas.iter().map(|q| q.scope.clone()).collect();
    let model = Scope::Model(Glob::new("gpt-*"));
    assert_eq!(scopes, [Scope::Environment, Scope::Caller("a".into()), model.clone(), model]);
}

#[test]
fn a_key_and_its_digest_identify_the_same_caller() {
    let sha256 = "6ca13d52ca70c883e0f0bb101e425a89e8624de51db2d2392593af6a84118090";
    let digest = config(&with(&format!("keys: [{{ name: a, sha256: {sha256} }}]")));
    let secret = config(&with("keys: [{ name: a, secret: abc123 }]"));
    assert_eq!(digest.environments[0].callers, secret.environments[0].callers);
    assert_eq!(digest.callers_by_digest().into_values().collect::<Vec<_>>(), [(0, 0)]);
}

#[test]
fn a_caller_may_have_several_keys() {
    let sha256 = "0f1e2d3c4b5a69788796a5b4c3d2e1f00f1e2d3c4b5a69788796a5b4c3d2e1f0";
    let digests = format!(
        "{{ name: a, sha256: [6ca13d52ca70c883e0f0bb101e425a89e8624de51db2d2392593af6a84118090, {sha256}] }}"
    );
    let secrets = "{ name: b, secret: [one-key-of-caller-b, another-key-of-caller-b] }";
    let config = config(&with(&format!("keys: [{digests}, {secrets}]")));
    assert_eq!(config.environments[0].callers.iter().map(|c| c.sha256.len()).collect::<Vec<_>>(), [2, 2]);
    let mut owners: Vec<_> = config.callers_by_digest().into_values().collect();
    owners.sort_unstable();
    assert_eq!(owners, [(0, 0), (0, 0), (0, 1), (0, 1)]);
}

#[test]
fn debug_output_contains_no_secret() {
    let text = with_upstream("base_url: 'http://u', api_key: secret-one, headers: { x-key: secret-two }")
        + "    keys: [{ name: a, secret: secret-three-is-long }]\n"
        + "store: { redis: { url: 'redis://:secret-four@r' } }\nadmin: { token: secret-five }\n";
    let printed = format!("{:?}", read(&text).unwrap());
    assert!(!printed.contains("secret-"), "{printed}");
}

#[test]
fn a_trailing_slash_of_a_base_url_is_removed() {
    for (written, want) in [
        ("https://api.openai.com/v1/", "https://api.openai.com/v1"),
        ("HTTPS://API.openai.com/v1", "https://API.openai.com/v1"),
        ("http://[::1]:8000", "http://[::1]:8000/"),
        ("http://localhost/", "http://localhost/"),
    ] {
        let config = config(&with_upstream(&format!("base_url: '{written}'")));
        assert_eq!(config.upstreams[0].base_url.to_string(), want);
    }
}

#[test]
fn model_rules_keep_the_order_of_the_file() {
    let text = "models: [{ match: 'a*', encoding: cl100k_base }, { match: '*', encoding: o200k_harmony }, { match: b, tokenizer: fixtures/tokenizer.json }, { match: c, model: gpt-5, overhead: 1k, tool_factor: 0.6 }, { match: d, tool_factor: 12 }]";
    let config = config(&format!("{MINIMAL}{text}\n"));
    let figures: Vec<_> = config.models.iter().map(|m| (m.overhead, m.tool_factor)).collect();
    assert_eq!(figures[2..], [(None, None), (Some(1_000), Some(600)), (None, Some(12_000))]);
    let tokenizers: Vec<_> = config.models.into_iter().map(|m| m.tokenizer).collect();
    let file = TokenizerChoice::File("fixtures/tokenizer.json".into());
    let same_as = TokenizerChoice::SameAs("gpt-5".to_owned());
    let chosen = [TokenizerChoice::Cl100k, TokenizerChoice::O200k, file, same_as].map(Some);
    assert_eq!(tokenizers[..4], chosen);
    assert_eq!(tokenizers[4], None);
}

#[test]
fn references_resolve_variables_defaults_and_files() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("key");
    std::fs::write(&file, "\n from-a-file-12345\n").unwrap();
    let text = format!(
        "upstreams:\n  \
           up: {{ base_url: 'http://u', api_key: ${{file:{}}} }}\n  \
           other: {{ base_url: \"http://${{HOST:-default.host}}:${{PORT:-80}}\", api_key: ${{EMPTY}}, headers: {{ x-price: $5, x-pid: $$, x-q: '${{KEY}}$' }} }}\n\
         environments:\n  \
           prod:\n    \
             upstream: up\n    \
             keys: [{{ name: a, secret: ${{KEY}} }}]\n    \
             quotas: {{ requests: {{ limit: ${{LIMIT}}, per: minute }} }}\n",
        file.display()
    );
    let config = config(&text);
    assert_eq!(config.upstreams[0].api_key.as_ref().map(Secret::expose), Some("from-a-file-12345"));
    let other = &config.upstreams[1];
    assert_eq!(other.base_url.authority().unwrap(), "default.host:80");
    assert!(other.api_key.is_none());
    assert_eq!(other.headers["x-price"], "$5");
    assert_eq!(other.headers["x-pid"], "$$");
    assert_eq!(other.headers["x-q"], "a-key-from-outside-1$");
    assert_eq!(config.environments[0].quotas[0].limit, 2_000);
}

#[test]
fn text_from_a_variable_never_changes_the_structure() {
    let config = config(&with("models: [a, ${EVIL}, '${EVIL}', ${UNSET:-b, [c: #d]}-e]"));
    let models: Vec<_> = config.environments[0].models.iter().map(Glob::as_str).collect();
    assert_eq!(models, ["a", "x, upstream: other }\n# ", "x, upstream: other }\n# ", "b, [c: #d]-e"]);
}

#[test]
fn a_variable_can_override_any_setting() {
    let port =
        |variable: &str| overridden(MINIMAL, variable, "127.0.0.1:1").unwrap().config.server.listen.port();
    assert_eq!(port("TOLLGATE__SERVER__LISTEN"), 1);
    assert_eq!(port("TOLLGATE__server__Listen"), 1);
    let limit = |text: &str, variable: &str, value: &str| {
        let loaded = overridden(text, variable, value).unwrap_or_else(|f| panic!("{f}"));
        loaded.config.environments[0].quotas.last().map(|quota| quota.limit)
    };
    let prod = "TOLLGATE__ENVIRONMENTS__PROD__QUOTAS__REQUESTS__LIMIT";
    assert_eq!(limit(MINIMAL, prod, "7k"), Some(7_000));
    assert_eq!(limit(&MINIMAL.replace("prod", "a-b"), &prod.replace("PROD", "A_B"), "7"), Some(7));
    let list = with_quota("[{ limit: 1, per: hour }, { limit: 1, per: day }]");
    assert_eq!(limit(&list, &prod.replace("LIMIT", "1__LIMIT"), "7"), Some(7));
    assert_eq!(limit(&with_quota("{ limit: ${UNSET}, per: day }"), prod, "7"), Some(7));
}

#[test]
fn merges_and_aliases_keep_every_limit() {
    let text = "\
upstreams: { up: { base_url: 'http://u' } }
environments:
  a: &a
    upstream: up
    quotas: &q { requests: { limit: 5, per: minute } }
  b: { <<: *a, models: [m] }
  c: { upstream: up, quotas: *q }
  d: &d
    quotas: { requests: { limit: 6, per: minute } }
    <<: *a
  e: { <<: [*d, *a] }
";
    let environments = config(text).environments;
    let limits: Vec<_> = environments.iter().map(|e| e.quotas[0].limit).collect();
    assert_eq!(limits, [5, 5, 5, 6, 6]);
}
