use super::*;
use crate::config::parse;
use std::io::BufReader;
use std::path::PathBuf;

fn environment(settings: &str) -> Environment {
    let text = format!(
        "upstreams: {{ u: {{ base_url: http://u/v1 }} }}\nenvironments: {{ e: {{ upstream: u, {settings} }} }}\nstore: {{ memory: true }}\n"
    );
    let loaded = parse(&text, "test.yaml", &|_| None, &[]).unwrap_or_else(|faults| panic!("{faults}"));
    (*loaded.config.environments[0]).clone()
}

fn call(second: u64, prompt: u64, completion: u64) -> Call {
    Call {
        at: Timestamp(1_700_000_000_000).plus_ms(second * 1_000),
        prompt,
        completion,
        environment: None,
        max_tokens: None,
        model: String::new(),
    }
}

const TIGHT: &str = "quotas: { total_tokens: { limit: 1000, per: minute } }";

#[test]
fn a_trace_that_fits_is_admitted_whole() {
    let environment = environment(TIGHT);
    let calls: Vec<Call> = (0..60).map(|s| call(s, 5, 5)).collect();
    let outcome = replay(&environment, &calls, Pace::default(), Mode::Oracle);
    assert_eq!((outcome.admitted, outcome.rejected, outcome.exhausted_ms), (60, 0, 0));
    assert_eq!((outcome.spent.total, outcome.overshoot()), (600, 0.0));
    assert!((outcome.utilisation() - 600.0 / (1_000.0 + 1_000.0 * 59.0 / 60.0)).abs() < 1e-9);
    assert_eq!(outcome.offered_by_time, outcome.admitted_by_time);
}

#[test]
fn charging_afterwards_overshoots_and_reserving_does_not() {
    let environment = environment(TIGHT);
    // A burst: a hundred calls of 100 tokens within a second.
    let calls: Vec<Call> = (0..100).map(|_| call(0, 50, 50)).collect();
    let afterwards = replay(&environment, &calls, Pace::default(), Mode::Afterwards);
    assert_eq!(afterwards.admitted, 100);
    assert!(afterwards.overshoot() > 8.0, "{}", afterwards.overshoot());
    for mode in [Mode::MaxTokens, Mode::Oracle, Mode::Adaptive(0.9)] {
        let outcome = replay(&environment, &calls, Pace::default(), mode);
        assert!(outcome.overshoot() == 0.0 && outcome.rejected > 0, "{mode:?}: {outcome:?}");
    }
    let oracle = replay(&environment, &calls, Pace::default(), Mode::Oracle);
    assert_eq!((oracle.admitted, oracle.quotas[0].denials), (10, 90));
}

#[test]
fn absurd_input_ends_in_a_moment() {
    let quotas = "quotas: { total_tokens: [{ limit: 1000G, per: minute, burst: 1000000G }, { limit: 1000000G, per: month }] }";
    let environment = environment(quotas);
    let most = crate::quota::MAX_AMOUNT;
    let calls: Vec<Call> = (0..100).map(|second| call(second, most, most)).collect();
    for tokens_per_second in [0.1, 1e-9, f64::MIN_POSITIVE, 1e18, f64::MAX] {
        for first_token in [Duration::ZERO, Duration::from_secs(1 << 40), Duration::MAX] {
            let pace = Pace { first_token, tokens_per_second };
            for mode in [Mode::Configured, Mode::Oracle, Mode::Afterwards] {
                let outcome = replay(&environment, &calls, pace, mode);
                assert_eq!(outcome.admitted + outcome.rejected, 100);
                assert!(outcome.admitted > 0 && outcome.spent.completion == outcome.admitted * most);
            }
        }
    }
}

#[test]
fn exhausted_is_the_time_from_a_denial_to_the_next_admission() {
    let environment = environment("quotas: { requests: { limit: 1, per: minute } }");
    let calls: Vec<Call> = [0, 10, 20, 61].map(|s| call(s, 1, 1)).into();
    let outcome = replay(&environment, &calls, Pace::default(), Mode::Configured);
    assert_eq!((outcome.admitted, outcome.rejected, outcome.exhausted_ms), (2, 2, 51_000));
    assert_eq!((outcome.quotas[0].denials, outcome.quotas[0].exhausted_ms), (2, 51_000));
}

#[test]
fn a_clamped_answer_is_as_short_as_it_was_bounded() {
    let environment =
        environment(&format!("{TIGHT}, reserve: {{ completion: max_tokens, when_short: clamp }}"));
    let outcome = replay(&environment, &[call(0, 100, 4_000)], Pace::default(), Mode::Configured);
    assert_eq!((outcome.admitted, outcome.spent.completion), (1, 900));
}

#[test]
fn a_cut_answer_ends_where_nothing_more_could_be_reserved() {
    let environment = environment(&format!("{TIGHT}, reserve: {{ completion: 10, on_overrun: cut }}"));
    let fast = Pace { tokens_per_second: 500.0, ..Pace::default() };
    let outcome = replay(&environment, &[call(0, 100, 40_000)], fast, Mode::Configured);
    assert_eq!(outcome.admitted, 1);
    assert!(outcome.spent.completion < 2_500, "{}", outcome.spent.completion);
}

#[test]
fn the_report_has_the_contracts_fields() {
    let report = Report::of(&environment(TIGHT), &[call(0, 10, 10), call(1, 2_000, 10)], Pace::default());
    let json = report.as_json();
    for field in ["admitted", "rejected", "utilisation", "overshoot", "exhausted_seconds", "oracle_admitted"]
    {
        assert!(json[field].is_number(), "{field}: {json}");
    }
    assert_eq!((&json["admitted"], &json["rejected"]), (&1.into(), &1.into()));
    let words = report.in_words();
    assert!(words.contains("oracle") && words.contains('█'), "{words}");
}

fn azure() -> Option<Vec<Call>> {
    let data = std::env::var_os("TOLLGATE_DATA").map_or_else(|| PathBuf::from("../shared"), PathBuf::from);
    let path = data.join("traces/azure-llm-2023-conv.csv");
    match std::fs::File::open(&path) {
        Ok(file) => Some(read_trace(BufReader::new(file)).unwrap()),
        Err(error) => {
            eprintln!("*** left out: the trace {} is not there ({error}) ***", path.display());
            None
        }
    }
}

/// The figures that the engine promises on a public trace: an hour of conversations with an Azure
/// service, at 30, 60 and 90 % of the tokens it offers.
#[test]
fn adaptive_comes_close_to_an_oracle_on_real_traffic() {
    let Some(calls) = azure() else { return };
    let offered: u64 = calls.iter().map(|c| c.prompt + c.completion).sum();
    for (percent, least) in [(30, 0.93), (60, 0.97), (90, 0.99)] {
        let limit = offered / 60 * percent / 100;
        let environment =
            environment(&format!("quotas: {{ total_tokens: {{ limit: {limit}, per: minute }} }}"));
        let oracle = replay(&environment, &calls, Pace::default(), Mode::Oracle);
        let adaptive = replay(&environment, &calls, Pace::default(), Mode::Configured);
        #[allow(clippy::cast_precision_loss)]
        let share = adaptive.admitted as f64 / oracle.admitted as f64;
        println!("{percent} %: admits {share:.4} of the oracle's, overshoots by {:.4}", adaptive.overshoot());
        assert!(
            share >= least && adaptive.overshoot() <= 0.005,
            "{percent} %: {share} {}",
            adaptive.overshoot()
        );
        assert!(oracle.overshoot() <= 0.0);
    }
}
