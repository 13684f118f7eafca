//! Limits of upstreams, which the calls of all environments use.

use super::super::replay::{ReplayOutcome, replay_configured};
use super::*;
use std::sync::Arc;

type All = Vec<(Arc<Environment>, Vec<TraceCall>)>;

/// `environments`: the lines of this section, with the calls of each environment in their order.
fn all<const N: usize>(upstreams: &str, environments: &str, calls: [Vec<TraceCall>; N]) -> All {
    let text = format!("upstreams:\n{upstreams}\nenvironments:\n{environments}\nstore: {{ memory: true }}\n");
    let loaded = parse(&text, "test.yaml", &|_| None, &[]).unwrap_or_else(|faults| panic!("{faults}"));
    let of_config = loaded.config.environments.iter().cloned();
    of_config.zip(calls).collect()
}

/// The group of an environment, and its index there.
fn group(all: &All, focus: usize) -> (Traffic<'_>, usize) {
    let groups = Traffic::groups(all).into_iter();
    let found = groups.filter_map(|group| {
        let at = group.members.iter().position(|member| member.place == focus)?;
        Some((group, at))
    });
    found.collect::<Vec<_>>().pop().unwrap()
}

fn outcome(all: &All, focus: usize, mode: Mode) -> ReplayOutcome {
    let (traffic, at) = group(all, focus);
    replay(&traffic, at, Pace::default(), mode)
}

fn report_of(all: &All, focus: usize) -> SimulationReport {
    reports(all, Pace::default(), &SearchBudget::new(&|_| {})).remove(focus)
}

fn burst(count: usize) -> Vec<TraceCall> {
    vec![call(0, 5, 5); count]
}

fn of_model(model: &str) -> TraceCall {
    TraceCall { model: model.into(), ..call(0, 5, 5) }
}

/// Scope, calls and denials of each quota of an upstream.
fn shared(outcome: &ReplayOutcome) -> Vec<(&str, u64, u64)> {
    let of_upstreams = outcome.quotas.iter().filter(|q| q.quota.scope.upstream().is_some());
    of_upstreams.map(|q| (q.quota.scope.name(), q.calls, q.denials)).collect()
}

const FIFTY: &str = "  u: { base_url: 'http://u/v1', quotas: { requests: { limit: 50, per: day } } }";

#[test]
fn a_burst_of_three_environments_has_the_room_of_their_upstream() {
    let environments = "  a: { upstream: u, quotas: { requests: { limit: 100, per: day } } }\n  b: { upstream: u }\n  shadow: { upstream: u, enforce: false, quotas: { requests: { limit: 5, per: day } } }";
    let all = all(FIFTY, environments, [burst(40), burst(40), burst(40)]);
    let outcomes: Vec<ReplayOutcome> = (0..3).map(|focus| outcome(&all, focus, Mode::Configured)).collect();
    assert_eq!(outcomes.iter().map(|o| o.admitted).collect::<Vec<_>>(), [17, 17, 16]);
    assert_eq!(outcomes.iter().map(|o| o.denied_by_upstream).collect::<Vec<_>>(), [23, 23, 24]);
    for outcome in &outcomes {
        assert_eq!(shared(outcome), [("u", 120, 70)]);
        let quota = outcome.quotas.last().unwrap();
        assert_eq!((quota.spent, quota.overshoot), (50, 0.0));
        assert!((quota.utilisation - 1.0).abs() < 1e-9, "{}", quota.utilisation);
        let denials: u64 = quota.timeline.columns(10).iter().map(|part| part.denials).sum();
        assert_eq!(denials, 70);
    }
    let [of_own, of_upstream] = [&outcomes[0], &outcomes[1]].map(|o| (o.utilisation() * 100.0).round());
    assert_eq!((of_own, of_upstream), (17.0, 100.0), "b has no quota of its own");
    let own = &outcomes[2].quotas[0];
    assert_eq!((own.quota.limit, own.calls, own.denials), (5, 40, 11), "in shadow mode");
}

#[test]
fn another_mode_applies_to_the_environment_in_focus_only() {
    let upstreams = "  u: { base_url: 'http://u/v1', quotas: { total_tokens: { limit: 1000, per: day } } }";
    let environments = "  a: { upstream: u, reserve: { completion: 95 } }\n  b: { upstream: u, reserve: { completion: 95 } }";
    let all = all(upstreams, environments, [burst(10), burst(10)]);
    let configured = outcome(&all, 0, Mode::Configured);
    assert_eq!((configured.admitted, shared(&configured)), (5, vec![("u", 20, 10)]));
    // Ten calls of 10 tokens, and nine of 100.
    let oracle = outcome(&all, 0, Mode::Oracle);
    assert_eq!((oracle.admitted, shared(&oracle)), (10, vec![("u", 20, 1)]));
}

#[test]
fn quotas_of_models_go_by_the_name_that_is_sent() {
    let upstreams =
        "  u: { base_url: 'http://u/v1', model_quotas: { 'gpt-4*': { requests: { limit: 2, per: day } } } }";
    let environments = "  a: { upstream: u, routes: [{ models: [fast], upstream: u, model: gpt-4.1-mini }, { models: [gpt-4-old], upstream: u, model: o3 }] }\n  b: { upstream: u }";
    let calls = ["fast", "gpt-4-old", "gpt-4-old", "gpt-4-old", "fast", "o3"].map(of_model);
    let all = all(upstreams, environments, [calls.into(), vec![of_model("gpt-4o")]]);
    let outcome = outcome(&all, 0, Mode::Configured);
    assert_eq!((outcome.rejected, shared(&outcome)), (1, vec![("u/gpt-4*", 3, 1)]));
}

#[test]
fn calls_of_other_upstreams_are_not_counted() {
    let upstreams = format!("{FIFTY}\n  v: {{ base_url: 'http://v/v1' }}");
    let environments = "  a: { upstream: u, routes: [{ models: ['claude*'], upstream: v }, { models: ['*'], apis: [messages], upstream: v }] }\n  b: { upstream: v }";
    let with_api = |api| TraceCall { api, ..of_model("m") };
    let calls = vec![
        of_model("claude-5"),
        with_api(Some("messages")),
        with_api(Some("chat")),
        // No route takes an unknown path.
        TraceCall { model: "claude-5".into(), ..with_api(None) },
    ];
    let all = all(&upstreams, environments, [calls, burst(100)]);
    let (traffic, _) = group(&all, 0);
    assert_eq!((traffic.members.len(), traffic.len()), (1, 4), "b uses no upstream with limits");
    assert_eq!(shared(&outcome(&all, 0, Mode::Configured)), [("u", 2, 0)]);
    assert_eq!(group(&all, 1).0.upstreams.len(), 0);
}

#[test]
fn the_first_upstream_with_room_serves_a_call() {
    let limited = |name: &str, limit: u64| {
        format!(
            "  {name}: {{ base_url: 'http://{name}/v1', quotas: {{ requests: {{ limit: {limit}, per: day }} }} }}"
        )
    };
    let upstreams = format!("{}\n{}", limited("u", 3), limited("v", 4));
    let environments = "  a: { upstream: u, routes: [{ models: ['*'], upstream: [u, v] }] }\n  b: { upstream: v }\n  c: { upstream: u }";
    let all = all(&upstreams, environments, [burst(5), burst(5), Vec::new()]);
    // In turn: a at u, b at v; after three calls each, u is full and v has room for one.
    let outcomes: Vec<ReplayOutcome> = (0..3).map(|focus| outcome(&all, focus, Mode::Configured)).collect();
    assert_eq!((outcomes[0].admitted, outcomes[1].admitted), (4, 3));
    assert_eq!(shared(&outcomes[0])[1].1, 6, "{:?}", shared(&outcomes[0]));
    // By way of a, the calls of b concern c. Only the upstream that c uses is measured.
    let (traffic, _) = group(&all, 2);
    assert_eq!((traffic.members.len(), traffic.upstreams.len()), (3, 2));
    assert_eq!(shared(&outcomes[2]).iter().map(|quota| quota.0).collect::<Vec<_>>(), ["u"]);
}

#[test]
fn the_maximum_in_flight_of_an_upstream_counts_all_environments() {
    let upstreams = "  u: { base_url: 'http://u/v1', max_in_flight: 6 }";
    let environments = "  a: { upstream: u }\n  b: { upstream: u, enforce: false }";
    let mut calls = burst(5);
    calls.push(call(60, 5, 5));
    let all = all(upstreams, environments, [calls, burst(5)]);
    let outcome = outcome(&all, 0, Mode::Configured);
    assert_eq!((outcome.admitted, outcome.denied_in_flight, outcome.denied_by_upstream), (4, 2, 2));
    let text = report_of(&all, 1).to_text(None);
    for line in ["max_in_flight refuses 2.", "Limits of upstreams refuse 40 % (2)"] {
        assert!(text.contains(line), "{line}\n{text}");
    }
}

#[test]
fn the_search_varies_the_quotas_of_the_environment_only() {
    let environments = "  a: { upstream: u, quotas: { requests: { limit: 10, per: day } }, reserve: { completion: 5 } }\n  b: { upstream: u }";
    let all = all(FIFTY, environments, [burst(60), burst(60)]);
    let report = report_of(&all, 0);
    let json = report.as_json();
    let smallest = |at: usize| json["quotas"][at]["smallest_limit_without_refusals"].as_u64();
    assert_eq!((smallest(0), smallest(1)), (Some(60), None), "{json}");
    let text = report.to_text(Some(80));
    // 10 calls of a and 40 of b have room at the upstream. Then it refuses the last 20 of each.
    for part in [
        "requests: 10 a day refuses 83 % (50) for 0.5 s; 60 would refuse none.",
        "50 requests per day (upstream u, of all environments): █ used",
        "requests (upstream u, of all environments): 50 a day refuses 33 % (40) for 0.5 s.",
        "Limits of upstreams refuse 33 % (20) of the calls of this environment",
    ] {
        assert!(text.contains(part), "{part}\n{text}");
    }
}

#[test]
fn without_limits_of_upstreams_other_environments_change_nothing() {
    let upstreams = "  u: { base_url: 'http://u/v1' }\n  v: { base_url: 'http://v/v1', max_in_flight: 1 }";
    let environments = "  a: { upstream: u, quotas: { requests: { limit: 10, per: day } } }\n  b: { upstream: u }\n  c: { upstream: v }";
    let all = all(upstreams, environments, [burst(20), burst(20), burst(20)]);
    let (environment, calls) = &all[0];
    let (around, alone) = (report_of(&all, 0), report(environment, calls));
    assert_eq!((around.as_json(), around.to_text(Some(80))), (alone.as_json(), alone.to_text(Some(80))));
    assert!(around.as_json().get("denied_by_upstream").is_none());
}

#[test]
fn one_replay_of_a_group_has_the_outcome_of_each_environment() {
    let upstreams = "  u: { base_url: 'http://u/v1', quotas: { total_tokens: { limit: 3000, per: minute } }, model_quotas: { 'm1*': { requests: { limit: 9, per: minute } } } }
  v: { base_url: 'http://v/v1', max_in_flight: 3, quotas: { requests: { limit: 40, per: hour, window: calendar } } }
  w: { base_url: 'http://w/v1' }";
    let environments = "  a: { upstream: u, quotas: { total_tokens: { limit: 1500, per: minute }, requests: { limit: 90, per: day } } }
  alone: { upstream: w, quotas: { total_tokens: { limit: 900, per: minute } } }
  b: { upstream: w, routes: [{ models: ['m*'], upstream: [v, u] }], reserve: { completion: 60, on_overrun: cut }, model_quotas: { 'm1*': { total_tokens: { limit: 800, per: minute } } } }
  c: { upstream: v, enforce: false, max_in_flight: 4, quotas: { total_tokens: { limit: 700, per: minute } } }
  d: { upstream: u, reserve: { completion: max_tokens, when_short: clamp }, quotas: { completion_tokens: { limit: 600, per: minute } } }";
    let calls = |seed: u64| -> Vec<TraceCall> {
        let number = |n: u64| (n * 7_919 + seed * 104_729) % 1_009;
        let of = |n: u64| TraceCall {
            model: format!("m{}", number(n) % 4),
            max_tokens: n.is_multiple_of(3).then_some(number(n + 1) % 200 + 1),
            ..call(n * 2 + number(n) % 2, number(n) % 60, number(n + 2) % 150)
        };
        (0..120).map(of).collect()
    };
    let all = all(upstreams, environments, [calls(1), calls(2), calls(3), calls(4), calls(5)]);
    let groups = Traffic::groups(&all);
    let places: Vec<Vec<usize>> =
        groups.iter().map(|group| group.members.iter().map(|member| member.place).collect()).collect();
    assert_eq!(places, [vec![0, 2, 3, 4], vec![1]]);
    let mut denied = 0;
    for group in &groups {
        let together = replay_configured(group, Pace::default());
        for (at, outcome) in together.iter().enumerate() {
            let own = replay(group, at, Pace::default(), Mode::Configured);
            assert_eq!(format!("{outcome:?}"), format!("{own:?}"), "{}", group.members[at].environment.name);
            denied += outcome.denied_by_upstream;
        }
    }
    assert!(denied > 20, "{denied}");
    let reports = reports(&all, Pace::default(), &SearchBudget::new(&|_| {}));
    let names: Vec<&str> = reports.iter().map(|report| report.environment.as_str()).collect();
    assert_eq!(names, ["a", "alone", "b", "c", "d"]);
}

#[test]
fn a_mode_that_is_configured_is_not_replayed_again() {
    let is_configured = |settings: &str, mode: Mode| mode.is_configured(&environment(settings));
    assert!(is_configured("reserve: { completion: adaptive, quantile: 0.9 }", Mode::Adaptive(0.9)));
    assert!(is_configured("reserve: { completion: max_tokens }", Mode::MaxTokens));
    let calls: Vec<TraceCall> = (0..40).map(|n| call(n / 4, 20, 30)).collect();
    let quotas = "quotas: { total_tokens: { limit: 900, per: minute } }";
    for (settings, mode) in [
        ("reserve: { completion: max_tokens }", Mode::MaxTokens),
        ("reserve: { quantile: 0.5 }", Mode::Adaptive(0.5)),
        ("reserve: { completion: none }", Mode::PromptOnly),
    ] {
        let own = environment(&format!("{quotas}, {settings}"));
        let traffic = Traffic::alone(&own, &calls);
        let replayed = replay_group(&traffic, Pace::default()).remove(0);
        let (_, in_mode) = replayed.others.iter().find(|(other, _)| *other == mode).unwrap();
        let expected = replay(&traffic, 0, Pace::default(), mode);
        let figures =
            |of: &ReplayOutcome| (of.admitted, of.rejected, of.exhausted_ms, of.spent, of.utilisation());
        assert_eq!(figures(in_mode), figures(&expected), "{settings}");
    }
    for (settings, mode) in [
        ("reserve: { completion: adaptive, quantile: 0.9 }", Mode::Adaptive(0.99)),
        ("reserve: { completion: max_tokens }", Mode::Oracle),
        ("reserve: { completion: max_tokens }, enforce: false", Mode::MaxTokens),
        ("reserve: { completion: max_tokens, when_short: clamp }", Mode::MaxTokens),
        ("reserve: { completion: none }", Mode::Afterwards),
    ] {
        assert!(!is_configured(settings, mode), "{settings}");
        let own = environment(&format!("{quotas}, {settings}"));
        let traffic = Traffic::alone(&own, &calls);
        let replayed = replay_group(&traffic, Pace::default()).remove(0);
        let (_, in_mode) = replayed.others.iter().find(|(other, _)| *other == mode).unwrap();
        let expected = replay(&traffic, 0, Pace::default(), mode);
        assert_eq!(format!("{in_mode:?}"), format!("{expected:?}"), "{settings}");
    }
}
