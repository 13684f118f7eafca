//! Every rule of the config, and the message for a config that breaks it.

use super::*;

/// Asserts that each text has exactly one fault, and that its message contains the given text.
fn check(cases: &[(String, &str)]) {
    for (text, expected) in cases {
        let all = faults(text);
        assert!(all.contains(expected), "expected: {expected}\n--- faults\n{all}\n--- config\n{text}");
        assert_eq!(all.lines().count(), 1, "{all}\n--- config\n{text}");
    }
}

fn top(sections: &str) -> String {
    format!("{MINIMAL}{sections}\n")
}

#[test]
fn an_impossible_quota_is_refused() {
    check(&[
        (
            with_quota("{ limit: 0, per: minute }"),
            "t.yaml:6:34: environments.prod.quotas.requests.limit: a limit of 0",
        ),
        (
            with_quota("{ limit: 1_125_899_906_842_625, per: minute }"),
            "is too large; the maximum is 1125899906842624",
        ),
        (with_quota("{ limit: 1.5, per: minute }"), "\"1.5\" is not an amount"),
        (with_quota("{ limit: [5], per: minute }"), "this must be a single value, not a list"),
        (with_quota("{ limit: 5, burst: 0, per: minute }"), "a burst of 0"),
        (with_quota("{ limit: 5 }"), "\"per\" is missing"),
        (with_quota("{ per: minute }"), "\"limit\" is missing"),
        (with_quota("{ limit: , per: minute }"), "\"limit\" is missing"),
        (with_quota("{ limit: 5, per: 30 }"), "\"30\" has no unit; write 500ms, 30s, 5m, 1h or 1d"),
        (with_quota("{ limit: 5, per: minutes }"), "\"minutes\" is not a duration"),
        (with_quota("{ limit: 5, per: 0 }"), "must be at least 1ms"),
        (with_quota("{ limit: 5, per: 900d }"), "at most a year"),
        (with_quota("{ limit: 5, per: day, burst: 9 }"), "a calendar window has no burst"),
        (with_quota("{ limit: 5, per: minute, timezone: UTC }"), "a rolling window has no time zone"),
        (with_quota("{ limit: 5, per: day, timezone: Europe/Brelin }"), "did you mean \"Europe/Berlin\"?"),
        (with_quota("{ limit: 5, per: day, timezone: '' }"), "there is no time zone \"\""),
        (
            with_quota("{ limit: 5, per: day, timezone: Etc/Unknown }"),
            "there is no time zone \"Etc/Unknown\"",
        ),
        (with_quota("{ limit: 5, per: 2d }"), "window: rolling"),
        (with_quota("{ limit: 5, per: 7d }"), "window: rolling"),
        (with_quota("{ limit: 5, per: 90s, window: calendar }"), "window: rolling"),
        (
            with_quota("{ limit: 5, per: day, window: fixed }"),
            "\"fixed\" is not valid here; write one of rolling, calendar",
        ),
        (
            with_quota("[{ limit: 5, per: minute }, { limit: 6, per: 60s }]"),
            "two quotas with the same period",
        ),
        (
            with_quota("[{ limit: 5, per: day }, { limit: 6, per: 24h, window: rolling }]"),
            "two quotas with the same period",
        ),
        (
            with_quota(
                "[{ limit: 5, per: month, window: rolling }, { limit: 6, per: 30d, window: rolling }]",
            ),
            "two quotas with the same period",
        ),
        (
            with_quota("[{ limit: 5, per: month }, { limit: 6, per: month, window: rolling }]"),
            "two quotas with the same period",
        ),
        (with_quota("{ limit: 5, per: minute, windw: rolling }"), "did you mean \"window\"?"),
        (with_quota("5"), "this must be a mapping such as { limit: 200k, per: minute }, not a single value"),
        (with_quota("[]"), "this list is empty; add a quota or remove the key"),
        (with_quota(""), "environments.prod.quotas.requests: the value is missing"),
    ]);
}

#[test]
fn an_unknown_key_is_reported_with_a_similar_or_all_known_keys() {
    check(&[
        (
            MINIMAL.replace("requests:", "request:"),
            "t.yaml:6:15: environments.prod.quotas: unknown key \"request\"; did you mean \"requests\"?",
        ),
        (top("severs: {}"), "t.yaml:7:1: unknown key \"severs\"; did you mean \"server\"?"),
        (top("store: { colour: 1 }"), "known names: path, history, memory, redis"),
        // The required key is not reported as missing too.
        (MINIMAL.replace("environments:", "enviroments:"), "did you mean \"environments\"?"),
        (with("quota: { windw: 1 }"), "environments.prod: unknown key \"quota\"; did you mean \"quotas\"?"),
        (
            "x: 1".to_owned() + "\n" + MINIMAL,
            "unknown key \"x\"; known names: server, admin, upstreams, environments, default_environment, models, store",
        ),
    ]);
}

#[test]
fn a_merged_key_is_reported_at_its_own_location() {
    let merged = with_upstream("<<: { base_url: 'http://u', apikey: 1 }");
    check(&[(merged, "t.yaml:2:37: upstreams.up: unknown key \"apikey\"; did you mean \"api_key\"?")]);
}

#[test]
fn an_invalid_environment_is_refused() {
    check(&[
        (MINIMAL.replace("prod:", "v1:"), "\"v1\" cannot be the name of an environment"),
        (MINIMAL.replace("prod:", "openai:"), "cannot be the name of an environment"),
        (MINIMAL.replace("prod:", "Prod:"), "cannot be the name of an environment"),
        (MINIMAL.replace("prod:", "_prod:"), "cannot be the name of an environment"),
        (MINIMAL.replace("prod:", "'':"), "cannot be the name of an environment"),
        (
            MINIMAL.replace("upstream: up", "upstream: pu"),
            "there is no upstream \"pu\"; did you mean \"up\"?",
        ),
        (
            MINIMAL.replace("upstream: up", "upstream: elsewhere"),
            "no upstream \"elsewhere\"; known names: up",
        ),
        (MINIMAL.replace("    upstream: up\n", ""), "\"upstream\" is missing; for example: up"),
        (with("reserve: { completion: sometimes }"), "adaptive, max_tokens, none or a number"),
        (with("reserve: { quantile: 1 }"), "between 0 and 1"),
        (with("reserve: { quantile: NaN }"), "between 0 and 1"),
        (with("reserve: { prompt: true }"), "\"true\" is not valid here; write one of estimate, none"),
        (with("reserve: { default_max_tokens: 0 }"), "0 would reserve nothing"),
        (with("unseen_prompt_tokens: 2000G"), "more than a request can reserve"),
        (with("enforce: yes"), "\"yes\" is not valid here; write one of true, false"),
        (with("enforce: True"), "\"True\" is not valid here; write one of true, false"),
        (with("max_in_flight: 0"), "0 would refuse every request"),
        (with("max_in_flight:"), "the value is missing"),
        (with("models: []"), "an empty list would allow no model"),
        (with("models:"), "the value is missing"),
        (with("models: gpt-4o"), "this must be a list, not a single value"),
        (with("retry_patience: 30"), "\"30\" has no unit"),
        (top("default_environment: prd"), "there is no environment \"prd\"; did you mean \"prod\"?"),
        (MINIMAL.split("environments").next().unwrap().to_owned(), "\"environments\" is missing"),
        (
            MINIMAL.split("  prod").next().unwrap().to_owned() + "  {}\n",
            "environments: at least one environment is required",
        ),
        (
            MINIMAL.split("    upstream").next().unwrap().to_owned(),
            "this must be a mapping such as { upstream: openai }, not an empty value",
        ),
    ]);
}

#[test]
fn every_caller_needs_a_unique_name_and_a_unique_key() {
    let key = "secret: sixteen-letters-1";
    let other = "secret: sixteen-letters-2";
    let digest = "sha256: 6ca13d52ca70c883e0f0bb101e425a89e8624de51db2d2392593af6a84118090";
    let keys = |keys: &str| with(&format!("keys: [{keys}]"));
    check(&[
        (keys("{ name: a, secret: '' }"), "environments.prod.keys[0].secret: this key is empty"),
        (keys("{ name: a, secret: ${EMPTY} }"), "this key is empty"),
        (keys("{ name: a, secret: ${UNSET:-} }"), "this key is empty"),
        (
            keys("{ name: a, secret: ${UNSET} }"),
            "environments.prod.keys[0].secret: the variable UNSET is not set",
        ),
        (keys("{ name: a, secret: ~ }"), "set either secret"),
        (keys("{ name: a, secret: two words }"), "this key contains a space"),
        (keys("{ name: a, sha256: abc }"), "64 hexadecimal digits"),
        (keys(&format!("{{ name: a, {digest}0 }}")), "64 hexadecimal digits"),
        (keys("{ name: a, sha256: [] }"), "the list is empty, so the caller would have no key"),
        (keys("{ name: a, secret: [sixteen-letters-1, ''] }"), "keys[0].secret[1]: this key is empty"),
        (keys("{ name: a, secret: [sixteen-letters-1, sixteen-letters-1] }"), "this key is already used"),
        (
            keys(&format!("{{ name: a, secret: [{}] }}", ["x"; 17].join(","))),
            "17 keys are too many for one caller",
        ),
        (keys("{ name: a }"), "environments.prod.keys[0]: set either secret"),
        (keys(&format!("{{ name: a, {key}, {digest} }}")), "set either secret"),
        (keys(&format!("{{ {key} }}")), "\"name\" is missing"),
        (keys(&format!("{{ name: a b, {key} }}")), "\"a b\" is not a valid caller name"),
        (keys(&format!("{{ name: '', {key} }}")), "is not a valid caller name"),
        (keys(&format!("{{ name: {}, {key} }}", "x".repeat(65))), "is not a valid caller name"),
        (
            keys(&format!("{{ name: a, {key} }}, {{ name: a, {other} }}")),
            "another caller of this environment has the name \"a\"",
        ),
        (
            keys(&format!("{{ name: a, {key} }}, {{ name: b, {key} }}")),
            "this key is already used at environments.prod.keys[0]",
        ),
        (
            keys(&format!("{{ name: a, {digest} }}, {{ name: b, secret: abc123 }}")),
            "keys[1]: this key is already used at environments.prod.keys[0]",
        ),
        (
            keys(&format!("{{ name: a, {key} }}"))
                + &format!("  two: {{ upstream: up, keys: [{{ name: a, {key} }}] }}\n"),
            "environments.two.keys[0]: this key is already used at environments.prod.keys[0]",
        ),
        (with("keys:"), "environments.prod.keys: the value is missing"),
        (keys("just-a-key"), "this must be a mapping such as { name: web-app }"),
    ]);
}

#[test]
fn an_invalid_upstream_is_refused() {
    let url = |url: &str| with_upstream(&format!("base_url: '{url}'"));
    let also = |settings: &str| with_upstream(&format!("base_url: 'http://u', {settings}"));
    check(&[
        (url("https://u/v1/chat/completions/"), "upstreams.up.base_url: this URL ends in /chat/completions"),
        (url("https://u/v1/messages"), "this URL ends in /messages"),
        (url("ftp://u"), "upstreams.up.base_url: this must be an http or https URL"),
        (url("https://a..b/v1"), "upstreams.up.base_url: the host is not a valid name of a TLS server"),
        (url("https://-/v1"), "the host is not a valid name of a TLS server"),
        (url("u/v1"), "http or https"),
        (url("http://"), "http or https"),
        (url("http://u:99999"), "http or https"),
        (url("http://u:/v1"), "http or https"),
        (url("http://u v"), "http or https"),
        (url("http://me:pass@u"), "user name or password"),
        (url("http://u?x=1"), "query"),
        (url("http://u/v1#x"), "fragment"),
        (with_upstream("api: openai"), "\"base_url\" is missing"),
        (also("base_urls: ['http://v']"), "upstreams.up.base_urls: base_url is set too"),
        (with_upstream("base_urls: []"), "the list is empty; add the URL of a replica"),
        (with_upstream("base_urls: http://u"), "this must be a list"),
        (
            with_upstream("base_urls: ['http://a/v1', 'ftp://b/v1']"),
            "upstreams.up.base_urls[1]: this must be an http",
        ),
        (
            with_upstream("base_urls: ['http://a/v1', 'HTTP://A:80/v1/']"),
            "base_urls[1]: this replica is in the list twice",
        ),
        (
            with_upstream("base_urls: ['http://a/v1', 'http://b/v2']"),
            "the same scheme and path as the first one",
        ),
        (
            with_upstream("base_urls: ['http://a/v1', 'https://b/v1']"),
            "the same scheme and path as the first one",
        ),
        (
            with_upstream(&format!(
                "base_urls: [{}]",
                (0..65).map(|n| format!("'http://a{n}'")).collect::<Vec<_>>().join(", ")
            )),
            "65 replicas are too many",
        ),
        (also("health: {}"), "\"path\" is missing; for example: /health"),
        (
            also("health: { path: health }"),
            "upstreams.up.health.path: this must be a path that begins with \"/\"",
        ),
        (also("health: { path: '/a b' }"), "this must be a path that begins with \"/\""),
        (also("health: { path: /h, every: 99ms }"), "upstreams.up.health.every: this interval is too short"),
        (also("api: opnai"), "\"opnai\" is not valid here; write one of openai, azure, anthropic, gemini"),
        (also("api_key: ' k'"), "a space at its beginning or end"),
        (also("api_key: \"a\\nb\""), "a header must not contain"),
        (also("timeouts: { idle: 0s }"), "would fail every request"),
        (
            also("timeouts: { idel: 1s }"),
            "upstreams.up.timeouts: unknown key \"idel\"; did you mean \"idle\"?",
        ),
        (also("headers: { Host: x }"), "upstreams.up.headers.Host: the gateway sets this header itself"),
        (also("headers: { Content-Length: 1 }"), "the gateway sets this header itself"),
        (also("headers: { transfer-encoding: x }"), "the gateway sets this header itself"),
        (also("headers: { 'a b': x }"), "\"a b\" is not a valid header name"),
        (also("headers: { a: \"x\\ny\" }"), "a header must not contain"),
        (also("headers: { a: x, A: y }"), "this header is set twice"),
        (also("stream_usage: no"), "\"no\" is not valid here; write one of ask, never"),
    ]);
    let none = faults(&MINIMAL.replace("  up: { base_url: 'http://u/v1' }", "  {}"));
    assert!(none.contains("upstreams: at least one upstream is required"), "{none}");
}

#[test]
fn invalid_listeners_stores_and_models_are_refused() {
    check(&[
        (top("server: { listen: here }"), "\"here\" is not an address and port"),
        (top("server: { max_request_body: 0 }"), "0 would refuse"),
        (top("server: { max_request_body: 5 parsecs }"), "is not a size"),
        (top("server: { flood_guard: 5 }"), "\"5\" is not 0 (off)"),
        (top("server: { flood_guard: { per: 0 } }"), "must not be 0"),
        (top("server: { tls: { cert: a } }"), "server.tls: \"key\" is missing"),
        (top("admin: { listen: '0.0.0.0:9090' }"), "admin.listen: other machines can reach this address"),
        (top("admin: { listen: '[::]:9090', token: '${EMPTY}' }"), "other machines can reach this address"),
        (
            top("admin: { listen: '127.0.0.1:8080' }"),
            "admin.listen: server.listen and admin.listen are the same",
        ),
        (
            top("server: { listen: '127.0.0.1:9090' }"),
            "server.listen: server.listen and admin.listen are the same",
        ),
        (
            top("store: { memory: true, redis: { url: 'redis://r' } }"),
            "store.memory: store.memory and store.redis exclude each other",
        ),
        (top("store: { redis: { url: 'http://r' } }"), "redis+sentinel://"),
        (top("store: { redis: { prefix: p } }"), "\"url\" is missing"),
        (
            top("store: { redis: { url: 'redis://r', timeout: 19ms } }"),
            "t.yaml:7:46: store.redis.timeout: \"19ms\" is not between 20ms and 5s",
        ),
        (top("store: { redis: { url: 'redis://r', timeout: 6s } }"), "\"6s\" is not between 20ms and 5s"),
        (top("store: { redis: { url: 'redis://r', timeout: 250 } }"), "has no unit"),
        (top("store: { path: '' }"), "is not a path"),
        (top("models: [{ match: a }]"), "models[0]: set exactly one of encoding"),
        (top("models: [{ match: a, encoding: o200k_base, model: m }]"), "set exactly one of encoding"),
        (
            top("models: [{ match: a, tokenizer: no/such.json }]"),
            "models[0].tokenizer: this file cannot be read",
        ),
        (
            top("models: [{ match: a, tokenizer: Cargo.toml }]"),
            "models[0].tokenizer: this file is not a tokenizer.json",
        ),
        (
            top("models: [{ match: a, encoding: p50k_base }]"),
            "is not valid here; write one of o200k_base, o200k_harmony, cl100k_base",
        ),
        (top("models: [{ encoding: o200k_base }]"), "\"match\" is missing"),
        (top("models: [{ match: a, overhead: -1 }]"), "\"-1\" is not a number of tokens from 0 to 1000000"),
        (top("models: [{ match: a, overhead: 2M }]"), "is not a number of tokens"),
        (top("models: [{ match: a, tool_factor: x }]"), "is not a number from 0 to 100, such as 1.5"),
        (top("models: [{ match: a, tool_factor: 100.001 }]"), "is not a number from 0 to 100"),
        (top("models: [{ match: a, tool_factor: 1.2345 }]"), "is not a number from 0 to 100"),
        (top("models: [{ match: a, tool_factor: '1.' }]"), "is not a number from 0 to 100"),
        (top("models: [{ match: a, tool_factor: 4294968 }]"), "is not a number from 0 to 100"),
    ]);
    config(&top("server: { listen: '127.0.0.1:0' }\nadmin: { listen: '127.0.0.1:0' }"));
}

#[test]
fn a_config_is_one_yaml_mapping() {
    check(&[
        (top("# \0"), "t.yaml:7:1: this line contains the character \\u{0}"),
        (
            "- a\n- b\n".into(),
            "t.yaml:1:1: this must be a mapping such as { upstreams: { ... }, environments: { ... } }, not a list",
        ),
        ("just words".into(), "environments: { ... } }, not a single value"),
        ("a: b\n---\na: c\n".into(), "t.yaml:2:1: a second YAML document begins here"),
        ("a: [1, 2\nb: c".into(), "this is not YAML"),
        ("server:\n\tlisten: x".into(), "t.yaml:2:1: this line is indented with a tab"),
        ("server:\n  listen: x\n \tx: y".into(), "t.yaml:3:1: this line is indented with a tab"),
        (with("reserve: adaptive"), "such as { prompt: estimate }, not a single value"),
        (top("? [a]\n: b"), "a key must be a single word"),
        (top("server: {}\nserver: {}"), "t.yaml:8:1: the key \"server\" is set twice"),
        (
            with("enforce: true\n    'enforce': false"),
            "t.yaml:8:5: environments.prod: the key \"enforce\" is set twice",
        ),
        (with("<<: {}\n    <<: {}"), "the key \"<<\" is set twice"),
        (with("<<: [5]"), "environments.prod.<<: the value of << must be a mapping"),
        (with("<<: *nothing"), "this is not YAML"),
        (with("enforce: !bool true"), "environments.prod.enforce: tags"),
    ]);
    assert!(faults("").contains("t.yaml:1:1: \"upstreams\" is missing"));
}

#[test]
fn a_reference_must_be_valid_and_in_a_value() {
    let model = |model: &str| with(&format!("models: [{model}]"));
    check(&[
        (model("a, '${UNSET}'"), "t.yaml:7:17: environments.prod.models[1]: the variable UNSET is not set"),
        (model("'${KEY'"), "has no closing"),
        (model("${not a name}"), "this is not a valid reference"),
        (model("${}"), "this is not a valid reference"),
        (model("'${A:-${B}}'"), "a default must not contain another"),
        (model("${file:/nowhere/at/all}"), "the file /nowhere/at/all cannot be read"),
        (model("${file:/dev/zero}"), "cannot be read"),
    ]);
    let all = faults(&with("${KEY}: 1"));
    assert!(all.contains("a key must not contain a variable"), "{all}");
}

#[test]
fn no_message_contains_a_secret_or_a_value_from_outside_the_file() {
    for (text, expected) in [
        (
            MINIMAL.replace("upstream: up", "upstream: ${EVIL}"),
            "there is no upstream this value; known names: up",
        ),
        (with_quota("{ limit: ${KEY}, per: minute }"), "this value is not an amount"),
        (with_quota("{ limit: 1, per: ${KEY} }"), "this value is not a duration"),
        (with_quota("{ limit: 1, per: day, timezone: ${KEY} }"), "there is no time zone this value"),
        (with("enforce: ${KEY}"), "this value is not valid here; write one of true, false"),
        (
            with(
                "keys: [{ name: ${KEY}, secret: abcdefghijklmnopqrst }, { name: ${KEY}, secret: sixteen-letters-1 }]",
            ),
            "has the name this value",
        ),
        (with("keys: [{ name: a, sha256: a-key-from-outside-1 }]"), "this is not a SHA-256"),
        (with("keys: [{ name: a, secret: 'a-key-from-outside-1 ' }]"), "this key contains a space"),
        (with("keys: [{ name: a, secret: '${a-key-from-outside-1}' }]"), "this is not a valid reference"),
        (with_upstream("base_url: 'http://me:a-key-from-outside-1@u'"), "user name or password"),
        (with_upstream("base_url: 'http://u', api_key: '${KEY} '"), "a space at its beginning or end"),
        (with_upstream("base_url: 'http://u', headers: { x: \"${KEY}\\n\" }"), "a header must not contain"),
        (
            top("store: { redis: { url: 'x://:a-key-from-outside-1@r' } }"),
            "does not begin with a Redis scheme",
        ),
        (top("store: { redis: { url: 'redis://:a-key-from-outside-1@r:x' } }"), "a port must be a number"),
    ] {
        let all = faults(&text);
        assert!(all.contains(expected), "expected: {expected}\n--- faults\n{all}");
        assert!(!all.contains("outside") && !all.contains("other }"), "{all}");
    }
}

#[test]
fn an_override_must_name_a_setting() {
    for (variable, value, expected) in [
        (
            "TOLLGATE__SERVR__LISTEN",
            "x",
            "$TOLLGATE__SERVR__LISTEN: unknown key \"servr\"; did you mean \"server\"?",
        ),
        ("TOLLGATE__SERVER__LISTEN", "secret", "$TOLLGATE__SERVER__LISTEN: server.listen: this value is not"),
        ("TOLLGATE__", "x", "this name is not the path of a setting"),
        ("TOLLGATE__SERVER____LISTEN", "x", "this name is not the path of a setting"),
        ("TOLLGATE__UPSTREAMS__UP__BASE_URL__X", "x", "a single value, so it has no setting \"X\""),
        ("TOLLGATE__ENVIRONMENTS__PROD__KEYS", "~", "environments.prod.keys: the value is missing"),
        ("TOLLGATE__ENVIRONMENTS__PROD__MODELS__7", "x", "the list here has no element \"7\""),
        ("TOLLGATE__ENVIRONMENTS__PORD__ENFORCE", "true", "environments.pord: \"upstream\" is missing"),
    ] {
        let all = overridden(&with("models: [a]"), variable, value).unwrap_err().to_string();
        assert!(all.contains(expected) && !all.contains("secret"), "expected: {expected}\n--- faults\n{all}");
    }
}

#[test]
fn all_faults_are_reported_at_once_in_the_order_of_the_file() {
    let text = "\
environments:
  a: { upstream: x, modles: [] }
  b: { upstream: y, enforce: 1 }
server: { listen: 5 }
";
    let reported = faults(text);
    let locations: Vec<_> = reported.lines().map(|l| l.split(": ").next().unwrap()).collect();
    assert_eq!(
        locations,
        ["t.yaml:1:1", "t.yaml:2:18", "t.yaml:2:21", "t.yaml:3:18", "t.yaml:3:30", "t.yaml:4:19"]
    );
}

#[test]
fn a_route_that_cannot_work_is_refused() {
    let route = |route: &str| with(&format!("routes: [{route}]"));
    check(&[
        (with("routes: []"), "environments.prod.routes: an empty list has no effect"),
        (with("routes: { models: [a] }"), "this must be a list, not a mapping"),
        (with("routes:"), "environments.prod.routes: the value is missing"),
        (route("{ upstream: up }"), "\"models\" is missing; for example: [\"claude-*\"]"),
        (route("{ models: [], upstream: up }"), "routes[0].models: an empty list would match no model"),
        (route("{ models: [a] }"), "\"upstream\" is missing; for example: up"),
        (route("{ models: [a], upstream: upp }"), "there is no upstream \"upp\"; did you mean \"up\"?"),
        (route("{ models: [a], upstream: [] }"), "an empty list names no upstream"),
        (
            route("{ models: [a], upstream: [up, up] }"),
            "environments.prod.routes[0].upstream[1]: this upstream is listed twice",
        ),
        (route("{ models: [a], upstream: up, apis: [] }"), "an empty list would match no request"),
        (
            route("{ models: [a], upstream: up, apis: [chats] }"),
            "\"chats\" is not valid here; write one of chat,",
        ),
        (route("{ models: [a], upstream: up, apis: [chat, chat] }"), "this API is listed twice"),
        (route("{ models: [a], upstream: up, model: 'gpt-*' }"), "\"gpt-*\" is a pattern"),
        (route("{ models: [a], upstream: up, model: '' }"), "an empty name cannot be sent"),
        (route("{ models: [a], upstream: up, model: \"a\\nb\" }"), "a control character"),
        (
            route(&format!("{{ models: [a], upstream: up, model: {} }}", "x".repeat(257))),
            "longer than 256 bytes",
        ),
        (route("{ models: [a], upstream: up, modle: b }"), "unknown key \"modle\"; did you mean \"model\"?"),
    ]);
    let all =
        faults(&route("{ models: [], upstream: [x, up, up], apis: [chta], model: 'a?' }, { upstream: y }"));
    assert_eq!(all.lines().count(), 7, "{all}");
}
