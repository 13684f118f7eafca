use super::*;
use crate::clock::Timestamp;
use crate::config::{Config, parse};
use crate::ledger::OverrideOrigin;
use crate::quota::UNLIMITED;

const FILE: &str = "upstreams: { u: { base_url: 'http://u/v1' } }
environments:
  \"production\":
    upstream: u
    models: ['gpt-*']
    keys:
      - { name: \"batch\", secret: sk-some-key-of-batch }
    quotas: { total_tokens: [{ limit: 100, per: minute }, { limit: 2k, per: month, timezone: Europe/Berlin }] }
    model_quotas: { 'gpt-4*': { requests: { limit: 5, per: hour } } }
";

fn environment(text: &str) -> Arc<Environment> {
    let config: Config = parse(text, "t.yaml", &|_| None, &[]).unwrap().config;
    config.environments[0].clone()
}

fn set_of(settings: &Environment, limits: &[(usize, u64, u64)]) -> OverrideSet {
    let all = settings.counted_quotas();
    let origin = OverrideOrigin {
        by: "admin".into(),
        since: Timestamp(1_774_440_000_000),
        until: None,
        reason: Some("a test".into()),
    };
    let limit = |&(at, limit, burst): &(usize, u64, u64)| LimitOverride {
        quota: all[at].with_limit(limit, burst),
        origin: origin.clone(),
    };
    let enforce = Some(EnforceOverride { enforce: false, origin: origin.clone() });
    OverrideSet { limits: limits.iter().map(limit).collect(), enforce }
}

#[test]
fn the_patch_is_yaml_that_puts_the_overrides_into_the_file() {
    let settings = environment(FILE);
    // Total tokens per minute, requests of the model, and the implicit quota on requests.
    let all = settings.counted_quotas();
    let requests = all.iter().position(|q| q.is_unlimited() && q.kind == Kind::Requests).unwrap();
    let set = set_of(&settings, &[(0, 300, 450), (2, UNLIMITED, UNLIMITED), (requests, 60, 60)]);
    let patch = to_yaml(&[(settings, set.clone())], &[]);
    assert_eq!(
        patch.lines().skip_while(|line| line.starts_with('#')).collect::<Vec<_>>(),
        [
            "environments:",
            "  \"production\":",
            "    enforce: false",
            "    quotas:",
            "      total_tokens:",
            "        - { limit: 300, per: \"minute\", window: rolling, burst: 450 }",
            "        - { limit: 2000, per: \"month\", window: calendar, timezone: \"Europe/Berlin\" }",
            "      requests:",
            "        - { limit: 60, per: \"minute\", window: rolling }",
            "    model_quotas:",
            "      \"gpt-4*\":",
            "        requests:",
            "          - { limit: unlimited, per: \"hour\", window: rolling }",
        ]
    );
    assert!(
        patch.contains("copy the quotas into the caller with the same name. Do not replace the list"),
        "{patch}"
    );
    // The file with this patch has the limits in force and is valid.
    let merged = format!("upstreams: {{ u: {{ base_url: 'http://u/v1' }} }}\n{patch}    upstream: u\n");
    let environment = environment(&merged);
    assert!(!environment.enforce);
    for LimitOverride { quota, .. } in &set.limits {
        assert!(environment.quotas.contains(quota), "{quota:?}");
    }
}

#[test]
fn without_overrides_the_patch_is_empty_and_valid() {
    let settings = environment(FILE);
    assert!(to_yaml(&[(settings, OverrideSet::default())], &[]).ends_with("environments: {}\n"));
}

#[test]
fn callers_are_named_in_the_patch() {
    let text = FILE.replace(
        "secret: sk-some-key-of-batch",
        "secret: sk-some-key-of-batch, quotas: { requests: { limit: 7, per: minute } }",
    );
    let settings = environment(&text);
    let at = settings.quotas.iter().position(|quota| quota.scope.as_str() == "caller").unwrap();
    let patch = to_yaml(&[(settings.clone(), set_of(&settings, &[(at, 9, 9)]))], &[]);
    let expected = "    keys:
      - name: \"batch\"
        quotas:
          requests:
            - { limit: 9, per: \"minute\", window: rolling }
";
    assert!(patch.ends_with(expected), "{patch}");
}

#[test]
fn the_patch_has_the_limits_of_upstreams() {
    let quotas = "quotas: { requests: [{ limit: 5, per: minute }, { limit: 9, per: day }] }, model_quotas: { 'gpt-4*': { total_tokens: { limit: 7, per: minute } } }";
    let text = FILE.replace("base_url: 'http://u/v1'", &format!("base_url: 'http://u/v1', {quotas}"));
    let config: Config = parse(&text, "t.yaml", &|_| None, &[]).unwrap().config;
    let upstream = config.upstreams[0].clone();
    let set =
        |quota: &Quota| LimitOverride { quota: quota.with_limit(20, 30), origin: OverrideOrigin::default() };
    let of_model = upstream.quotas.iter().position(|quota| quota.scope.as_str() == "upstream_model").unwrap();
    let limits = vec![set(&upstream.quotas[0]), set(&upstream.quotas[of_model])];
    let patch = to_yaml(&[], &[(upstream, OverrideSet { limits: limits.clone(), enforce: None })]);
    assert!(patch.contains("\nenvironments: {}\nupstreams:\n"), "{patch}");
    // The file with this patch has the limits in force and is valid.
    let rest = FILE.split_once('\n').unwrap().1;
    let patch = patch.replace("environments: {}\n", "");
    let merged = format!("{patch}    base_url: http://u/v1\n{rest}");
    let config =
        parse(&merged, "t.yaml", &|_| None, &[]).unwrap_or_else(|faults| panic!("{faults}\n{merged}"));
    let quotas = &config.config.upstreams[0].quotas;
    assert!(limits.iter().all(|set| quotas.contains(&set.quota)) && quotas.len() == 3, "{quotas:?}");
}
