mod upstreams;

use super::replay::{admits_all, replay};
use super::report::replay_group;
use super::traffic::Traffic;
use super::words::{readable, readable_index};
use super::*;
use crate::clock::Timestamp;
use crate::config::parse;
use std::io::BufReader;
use std::path::PathBuf;

pub(super) fn environment(settings: &str) -> Environment {
    let text = format!(
        "upstreams: {{ u: {{ base_url: http://u/v1 }} }}\nenvironments: {{ e: {{ upstream: u, {settings} }} }}\nstore: {{ memory: true }}\n"
    );
    let loaded = parse(&text, "test.yaml", &|_| None, &[]).unwrap_or_else(|faults| panic!("{faults}"));
    (*loaded.config.environments[0]).clone()
}

pub(super) fn call(second: u64, prompt: u64, completion: u64) -> TraceCall {
    TraceCall {
        at: Timestamp(1_700_000_000_000).plus_ms(second * 1_000),
        prompt,
        completion,
        environment: None,
        max_tokens: None,
        api: Some("chat"),
        model: String::new(),
        caller: None,
        generates: true,
        pace: None,
    }
}

const TIGHT: &str = "quotas: { total_tokens: { limit: 1000, per: minute } }";

#[test]
fn a_trace_within_the_quota_is_admitted_completely() {
    let environment = environment(TIGHT);
    let calls: Vec<TraceCall> = (0..60).map(|s| call(s, 5, 5)).collect();
    let outcome = replay(&Traffic::alone(&environment, &calls), 0, Pace::default(), Mode::Oracle);
    assert_eq!((outcome.admitted, outcome.rejected, outcome.exhausted_ms), (60, 0, 0));
    assert_eq!((outcome.spent.total, outcome.overshoot()), (600, 0.0));
    assert!((outcome.utilisation() - 600.0 / (1_000.0 + 1_000.0 * 59.0 / 60.0)).abs() < 1e-9);
}

#[test]
fn only_the_mode_without_reservations_overshoots() {
    let environment = environment(TIGHT);
    // A burst: a hundred calls of 100 tokens within a second.
    let calls: Vec<TraceCall> = (0..100).map(|_| call(0, 50, 50)).collect();
    let afterwards = replay(&Traffic::alone(&environment, &calls), 0, Pace::default(), Mode::Afterwards);
    assert_eq!(afterwards.admitted, 100);
    assert!(afterwards.overshoot() > 8.0, "{}", afterwards.overshoot());
    for mode in [Mode::MaxTokens, Mode::Oracle, Mode::Adaptive(0.9)] {
        let outcome = replay(&Traffic::alone(&environment, &calls), 0, Pace::default(), mode);
        assert!(outcome.overshoot() == 0.0 && outcome.rejected > 0, "{mode:?}: {outcome:?}");
    }
    let oracle = replay(&Traffic::alone(&environment, &calls), 0, Pace::default(), Mode::Oracle);
    assert_eq!((oracle.admitted, oracle.quotas[0].denials), (10, 90));
}

#[test]
fn extreme_input_terminates() {
    let quotas = "quotas: { total_tokens: [{ limit: 1000G, per: minute, burst: 1000000G }, { limit: 1000000G, per: month }] }";
    let environment = environment(quotas);
    let most = crate::quota::MAX_AMOUNT;
    let calls: Vec<TraceCall> = (0..100).map(|second| call(second, most, most)).collect();
    for tokens_per_second in [0.1, 1e-9, f64::MIN_POSITIVE, 1e18, f64::MAX] {
        for first_token in [Duration::ZERO, Duration::from_secs(1 << 40), Duration::MAX] {
            let pace = Pace { first_token, tokens_per_second };
            for mode in [Mode::Configured, Mode::Oracle, Mode::Afterwards] {
                let outcome = replay(&Traffic::alone(&environment, &calls), 0, pace, mode);
                assert_eq!(outcome.admitted + outcome.rejected, 100);
                assert!(outcome.admitted > 0 && outcome.spent.completion == outcome.admitted * most);
            }
        }
    }
}

#[test]
fn exhausted_time_lasts_from_a_denial_to_the_next_admission() {
    let environment = environment("quotas: { requests: { limit: 1, per: minute } }");
    let calls: Vec<TraceCall> = [0, 10, 20, 61].map(|s| call(s, 1, 1)).into();
    let outcome = replay(&Traffic::alone(&environment, &calls), 0, Pace::default(), Mode::Configured);
    assert_eq!((outcome.admitted, outcome.rejected, outcome.exhausted_ms), (2, 2, 51_000));
    assert_eq!((outcome.quotas[0].denials, outcome.quotas[0].exhausted_ms), (2, 51_000));
}

#[test]
fn a_clamped_answer_ends_at_its_clamped_cap() {
    let environment =
        environment(&format!("{TIGHT}, reserve: {{ completion: max_tokens, when_short: clamp }}"));
    let outcome =
        replay(&Traffic::alone(&environment, &[call(0, 100, 4_000)]), 0, Pace::default(), Mode::Configured);
    assert_eq!((outcome.admitted, outcome.spent.completion), (1, 900));
}

#[test]
fn a_cut_answer_ends_when_its_reservation_cannot_be_extended() {
    let environment = environment(&format!("{TIGHT}, reserve: {{ completion: 10, on_overrun: cut }}"));
    let fast = Pace { tokens_per_second: 500.0, ..Pace::default() };
    let outcome = replay(&Traffic::alone(&environment, &[call(0, 100, 40_000)]), 0, fast, Mode::Configured);
    assert_eq!(outcome.admitted, 1);
    assert!(outcome.spent.completion < 2_500, "{}", outcome.spent.completion);
}

#[test]
fn the_json_report_has_its_documented_fields() {
    let report = report(&environment(TIGHT), &[call(0, 10, 10), call(1, 2_000, 10)]);
    let json = report.as_json();
    for field in ["admitted", "rejected", "utilisation", "overshoot", "exhausted_seconds", "oracle_admitted"]
    {
        assert!(json[field].is_number(), "{field}: {json}");
    }
    assert_eq!((&json["admitted"], &json["rejected"]), (&1.into(), &1.into()));
    let text = report.to_text(Some(80));
    assert!(text.contains("oracle") && text.contains('█'), "{text}");
}

fn report(environment: &Environment, calls: &[TraceCall]) -> SimulationReport {
    let traffic = Traffic::alone(environment, calls);
    let replayed = replay_group(&traffic, Pace::default()).remove(0);
    SimulationReport::of(&traffic.members[0], replayed, Pace::default(), &SearchBudget::new(&|_| {}))
}

/// The last lines of the report.
fn verdicts(settings: &str, calls: &[TraceCall]) -> Vec<String> {
    let text = report(&environment(settings), calls).to_text(None);
    text.lines().filter(|line| line.contains("refuse")).map(str::to_owned).collect()
}

#[test]
fn the_report_ends_in_words() {
    // Ten calls of 100 tokens at once, then one a minute later.
    let mut calls: Vec<TraceCall> = (0..10).map(|_| call(0, 50, 50)).collect();
    calls.push(call(60, 50, 50));
    let settings =
        |quotas: &str, more: &str| format!("quotas: {{ {quotas} }}, reserve: {{ completion: 50 }}{more}");
    for (quotas, more, words) in [
        (
            "total_tokens: { limit: 600, per: minute }",
            "",
            "total_tokens: 600 a minute refuses 36 % (4) for 60 s; 1,000 would refuse none.",
        ),
        (
            "total_tokens: { limit: 20k, per: minute }",
            "",
            "total_tokens: 20k a minute refuses none; 1,000 would refuse none.",
        ),
        (
            "total_tokens: { limit: 600, per: minute }",
            ", enforce: false",
            "total_tokens: 600 a minute would refuse 36 % (4) for 60 s; 1,000 would refuse none.",
        ),
        (
            "requests: { limit: 2, per: hour, burst: 4 }",
            "",
            "requests: 2 an hour refuses 63 % (7) for 60 s; 6 with a burst of 12 would refuse none.",
        ),
        (
            "requests: { limit: 1, per: day }",
            "",
            "requests: 1 a day refuses 90 % (10) for 60 s; 11 would refuse none.",
        ),
    ] {
        assert_eq!(verdicts(&settings(quotas, more), &calls), [words], "{quotas}");
    }
    let unlimited = "total_tokens: { limit: 1125899906842624, per: minute }";
    let words = "total_tokens: unlimited; 1,000 a minute would refuse none.";
    assert_eq!(verdicts(&settings(unlimited, ""), &calls), [words]);
    let in_flight = verdicts(&settings("requests: { limit: 100, per: day }", ", max_in_flight: 8"), &calls);
    assert_eq!(
        in_flight,
        ["requests: 100 a day refuses none; 11 would refuse none.", "max_in_flight refuses 2."]
    );
}

#[test]
fn the_smallest_readable_limit_is_found() {
    let calls = bursts(|_, skewed| 150.0 * skewed);
    let calls = &calls[..2_000];
    for settings in [
        "quotas: { total_tokens: { limit: 30k, per: minute } }",
        "quotas: { total_tokens: { limit: 30M, per: minute } }",
        "quotas: { completion_tokens: { limit: 10k, per: 10s, burst: 20k } }",
        "quotas: { requests: { limit: 100, per: day } }",
        "quotas: { total_tokens: { limit: 30k, per: minute } }, reserve: { completion: max_tokens, default_max_tokens: 4096 }",
    ] {
        let mut environment = environment(settings);
        let limit =
            report(&environment, calls).as_json()["quotas"][0]["smallest_limit_without_refusals"].as_u64();
        let (limit, quota) = (limit.unwrap(), environment.quotas[0].clone());
        let mut admits = |limit: u64| {
            environment.quotas = vec![quota.with_limit(limit, quota.capacity() * limit / quota.limit)];
            admits_all(&environment, calls, Pace::default())
        };
        let below = readable(readable_index(limit) - 1).unwrap();
        assert!(admits(limit) && !admits(below), "{settings}: {limit}, {below}");
        assert_eq!(readable(readable_index(limit)), Some(limit));
    }
}

#[test]
fn quotas_of_callers_and_models_apply_to_their_calls_only() {
    let environment = environment(
        "keys: [{ name: web, secret: k-web-1234567890, quotas: { requests: { limit: 1, per: day } } }, { name: batch, secret: k-batch-1234567890 }], model_quotas: { 'gpt-4*': { requests: { limit: 2, per: day } } }",
    );
    let of = |second, caller: &str, model: &str| TraceCall {
        caller: Some(caller.into()),
        model: model.into(),
        ..call(second, 1, 1)
    };
    let calls = [
        of(0, "web", "o3"),
        of(1, "web", "o3"),
        of(2, "batch", "o3"),
        of(3, "batch", "gpt-4o"),
        of(4, "batch", "gpt-4o"),
        of(5, "batch", "gpt-4.1"),
    ];
    let outcome = replay(&Traffic::alone(&environment, &calls), 0, Pace::default(), Mode::Configured);
    let own = outcome.quotas.iter().filter(|q| !q.quota.scope.name().is_empty());
    let mut quotas: Vec<_> = own.map(|q| (q.quota.scope.name(), q.calls, q.denials)).collect();
    quotas.sort_unstable();
    assert_eq!((outcome.rejected, quotas), (2, vec![("gpt-4*", 3, 1), ("web", 2, 1)]));
}

#[test]
fn a_calendar_quota_is_used_by_at_most_all_of_each_period() {
    let environment = environment("quotas: { requests: { limit: 10, per: day } }");
    // 2023-11-14T22:13:20Z, so midnight is within the trace of two hours.
    let calls: Vec<TraceCall> = (0..120).map(|minute| call(minute * 60, 1, 1)).collect();
    let outcome = replay(&Traffic::alone(&environment, &calls), 0, Pace::default(), Mode::Configured);
    assert_eq!((outcome.admitted, outcome.quotas[0].spent), (20, 20));
    assert!((outcome.quotas[0].utilisation - 1.0).abs() < 1e-9, "{}", outcome.quotas[0].utilisation);
}

#[test]
fn levels_over_time_do_not_change_the_result() {
    let environment =
        environment("quotas: { total_tokens: [{ limit: 30k, per: minute }, { limit: 1M, per: day }] }");
    let calls = bursts(|_, skewed| 150.0 * skewed);
    let drawn = replay(&Traffic::alone(&environment, &calls), 0, Pace::default(), Mode::Configured);
    let adaptive = replay(&Traffic::alone(&environment, &calls), 0, Pace::default(), Mode::Adaptive(0.9));
    assert_eq!(
        (drawn.admitted, drawn.rejected, drawn.spent),
        (adaptive.admitted, adaptive.rejected, adaptive.spent)
    );
    let columns = drawn.quotas[0].timeline.columns(60);
    assert!(columns.iter().all(|part| part.used + part.held <= 30_000), "{columns:?}");
    assert_eq!(columns.iter().map(|part| part.denials).sum::<u64>(), drawn.quotas[0].denials);
    assert!(columns.iter().any(|part| part.used > 20_000) && columns.iter().any(|part| part.held > 0));
}

fn azure() -> Option<Vec<TraceCall>> {
    let data = std::env::var_os("TOLLGATE_DATA").map_or_else(|| PathBuf::from("../shared"), PathBuf::from);
    let path = data.join("traces/azure-llm-2023-conv.csv");
    match std::fs::File::open(&path) {
        Ok(file) => Some(read_trace(BufReader::new(file)).unwrap()),
        Err(error) => {
            eprintln!("*** skipped: the trace {} cannot be opened ({error}) ***", path.display());
            None
        }
    }
}

const SLOW: Pace = Pace { first_token: Duration::from_millis(400), tokens_per_second: 3.0 };

/// Checks the adaptive mode with quotas of 30, 60 and 90 % of the offered tokens. It must admit at least the
/// fraction `least` of the calls that an oracle admits, and overshoot by at most 0.5 %.
fn assert_close_to_oracle(what: &str, calls: &[TraceCall], least: [f64; 3]) {
    let offered: u64 = calls.iter().map(|c| c.prompt + c.completion).sum();
    for (percent, least) in [30, 60, 90].into_iter().zip(least) {
        let limit = offered / 60 * percent / 100;
        let environment =
            environment(&format!("quotas: {{ total_tokens: {{ limit: {limit}, per: minute }} }}"));
        for pace in [Pace::default(), SLOW] {
            let oracle = replay(&Traffic::alone(&environment, calls), 0, pace, Mode::Oracle);
            let adaptive = replay(&Traffic::alone(&environment, calls), 0, pace, Mode::Configured);
            #[allow(clippy::cast_precision_loss)]
            let share = adaptive.admitted as f64 / oracle.admitted as f64;
            let (overshoot, rate) = (adaptive.overshoot(), pace.tokens_per_second);
            println!(
                "{what}, {percent} %, {rate} tokens/s: admits {share:.4} of the oracle's calls, overshoots by {overshoot:.4}"
            );
            assert!(share >= least && overshoot <= 0.005, "{what}, {percent} %, {rate}: {share} {overshoot}");
            assert!(oracle.overshoot() <= 0.0);
        }
    }
}

/// The documented figures for a public trace: an hour of conversations with an Azure service.
#[test]
fn adaptive_comes_close_to_an_oracle_on_real_traffic() {
    if let Some(calls) = azure() {
        assert_close_to_oracle("azure", &calls, [0.93, 0.97, 0.99]);
    }
}

/// An hour of bursts: 60 calls within four seconds, every 15 seconds. Lengths are distributed like real ones.
fn bursts(completion: impl Fn(u64, f64) -> f64) -> Vec<TraceCall> {
    let mut state = 7_u64;
    let mut dice = move || {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        (state >> 33) % 1_000_000
    };
    #[allow(clippy::cast_precision_loss)]
    let mut skewed = move || ((dice() + dice() + dice() + dice()) as f64 / 1e6 - 2.0) * 1.5;
    let mut calls = Vec::new();
    for burst in 0..240_u64 {
        for n in 0..60 {
            let second = burst * 15 + n / 15;
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
            let (prompt, completion) =
                ((900.0 * skewed().exp()) as u64 + 1, completion(second, skewed().exp()) as u64 + 1);
            calls.push(call(second, prompt, completion));
        }
    }
    calls
}

#[test]
fn adaptive_comes_close_to_an_oracle_in_bursts() {
    assert_close_to_oracle("bursts", &bursts(|_, skewed| 150.0 * skewed), [0.95, 0.97, 0.98]);
}

#[test]
fn adaptive_comes_close_to_an_oracle_if_answer_lengths_alternate() {
    let alternating = |second, skewed| if second / 300 % 2 == 0 { 15.0 * skewed } else { 600.0 * skewed };
    assert_close_to_oracle("alternating", &bursts(alternating), [0.85, 0.93, 0.96]);
}
