use super::*;
use proptest::prelude::*;
use std::thread;

fn after(failures: u32) -> Arc<Availability> {
    Availability::new(NonZeroU32::new(failures).unwrap())
}

#[test]
fn one_failure_in_a_row_fewer_than_the_threshold_leaves_nothing_out() {
    let server = after(5);
    for _ in 0..3 {
        for _ in 0..4 {
            server.attempt(0).unwrap().failed(0);
        }
        server.attempt(0).unwrap().succeeded();
    }
    assert_eq!((server.standing(0), server.failures()), (Standing::Available, 12));
    for _ in 0..5 {
        server.attempt(10).unwrap().failed(10);
    }
    assert_eq!(server.standing(10), Standing::LeftOut { due_ms: 5_010 });
    assert_eq!(server.attempt(5_009).unwrap_err(), 5_010);
}

#[test]
fn the_time_doubles_with_each_probe_that_fails_up_to_a_minute_and_a_success_ends_it() {
    let server = after(1);
    assert_eq!(server.attempt(0).unwrap().failed(0), Some(5_000));
    assert_eq!(server.attempt_anyway().failed(0), None);
    let mut now = 0;
    for pause in [5_000, 10_000, 20_000, 40_000, 60_000, 60_000] {
        assert_eq!(server.attempt(now + pause - 1).unwrap_err(), now + pause);
        now += pause;
        assert_eq!(server.standing(now), Standing::ProbeIsDue);
        let probe = server.attempt(now).unwrap();
        assert!(probe.is_probe());
        probe.failed(now);
    }
    server.attempt(now + 60_000).unwrap().succeeded();
    assert_eq!(server.standing(now + 60_000), Standing::Available);
    server.attempt(now + 60_000).unwrap().failed(now + 60_000);
    assert_eq!(server.standing(now + 60_000), Standing::LeftOut { due_ms: now + 65_000 }, "again 5 s");
}

#[test]
fn only_one_request_is_the_probe_and_one_that_gets_lost_is_replaced() {
    let server = after(1);
    server.attempt(0).unwrap().failed(0);
    let probe = server.attempt(6_000).unwrap();
    assert_eq!(server.standing(6_000), Standing::LeftOut { due_ms: 5_000 });
    assert_eq!(server.attempt(6_000).unwrap_err(), 5_000);
    drop(probe);
    let next = server.attempt(6_001).unwrap();
    assert!(server.attempt(6_001).is_err());
    next.succeeded();
    assert!(!server.attempt(6_002).unwrap().is_probe());
}

#[test]
fn failures_of_requests_that_were_sent_before_extend_nothing() {
    let server = after(1);
    let early: Vec<Attempt> = (0..10).map(|_| server.attempt(0).unwrap()).collect();
    for attempt in early {
        attempt.failed(100);
    }
    server.attempt_anyway().failed(4_000);
    assert_eq!(server.standing(4_000), Standing::LeftOut { due_ms: 5_100 });
    assert_eq!(server.failures(), 11);
    server.attempt_anyway().succeeded();
    assert_eq!(server.standing(4_000), Standing::Available);
}

#[test]
fn a_late_probe_does_not_decide_about_a_later_failure() {
    let server = after(1);
    server.attempt(0).unwrap().failed(0);
    let late = server.attempt(5_000).unwrap();
    server.attempt_anyway().succeeded();
    server.attempt(5_001).unwrap().failed(5_001);
    late.failed(5_002);
    assert_eq!(server.standing(5_002), Standing::LeftOut { due_ms: 10_001 }, "not doubled");
}

#[test]
fn of_many_threads_one_gets_the_probe() {
    let server = after(1);
    for round in 1..200 {
        let now = round * 100_000;
        server.attempt(now).unwrap().failed(now);
        let claim = || server.attempt(now + FIRST_PAUSE_MS).ok();
        let probes: Vec<Attempt> = thread::scope(|scope| {
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(claim)).collect();
            threads.into_iter().filter_map(|thread| thread.join().unwrap()).collect()
        });
        assert_eq!(probes.len(), 1);
        assert!(probes.into_iter().all(Attempt::succeeded));
        assert_eq!(server.standing(now + FIRST_PAUSE_MS), Standing::Available);
    }
}

/// What a request does at a time.
#[derive(Clone, Debug)]
enum Step {
    Wait(u64),
    Begin,
    BeginAnyway,
    Succeed(prop::sample::Index),
    Fail(prop::sample::Index),
    Lose(prop::sample::Index),
}

fn step() -> impl Strategy<Value = Step> {
    let index = any::<prop::sample::Index>;
    prop_oneof![
        3 => (0..20_000u64).prop_map(Step::Wait),
        4 => Just(Step::Begin),
        1 => Just(Step::BeginAnyway),
        1 => index().prop_map(Step::Succeed),
        3 => index().prop_map(Step::Fail),
        1 => index().prop_map(Step::Lose),
    ]
}

proptest! {
    /// In every order of outcomes: at most one probe is in flight, a server that is left out is tried within a minute
    /// after the last failure, not earlier than 5 s after it was left out, and a success ends everything.
    #[test]
    fn any_order_of_outcomes(threshold in 1..6u32, steps in prop::collection::vec(step(), 0..200)) {
        let server = after(threshold);
        let (mut now, mut last_failure, mut left_out_at) = (0, 0, None);
        let mut attempts: Vec<Attempt> = Vec::new();
        let (mut in_a_row, mut failures) = (0, 0);
        for step in steps {
            match step {
                Step::Wait(ms) => now += ms,
                Step::BeginAnyway => attempts.push(server.attempt_anyway()),
                Step::Begin => match server.attempt(now) {
                    Ok(attempt) => {
                        prop_assert_eq!(attempt.is_probe(), left_out_at.is_some());
                        prop_assert!(left_out_at.is_none_or(|at| now >= at + FIRST_PAUSE_MS));
                        attempts.push(attempt);
                    }
                    Err(due) => {
                        prop_assert!(left_out_at.is_some() && in_a_row >= threshold);
                        prop_assert!(due <= last_failure + MAX_PAUSE_MS);
                    }
                },
                Step::Succeed(_) | Step::Fail(_) | Step::Lose(_) if attempts.is_empty() => {}
                Step::Succeed(at) => {
                    attempts.swap_remove(at.index(attempts.len())).succeeded();
                    (in_a_row, left_out_at) = (0, None);
                    prop_assert_eq!(server.standing(now), Standing::Available);
                }
                Step::Fail(at) => {
                    attempts.swap_remove(at.index(attempts.len())).failed(now);
                    (in_a_row, failures, last_failure) = (in_a_row + 1, failures + 1, now);
                    if in_a_row >= threshold {
                        left_out_at.get_or_insert(now);
                    }
                }
                Step::Lose(at) => drop(attempts.swap_remove(at.index(attempts.len()))),
            }
            // A probe of an earlier time, which a success has ended, may still be in flight.
            if server.standing(now) == Standing::ProbeIsDue {
                prop_assert!(left_out_at.is_some());
            }
            prop_assert_eq!(server.failures(), failures);
        }
        attempts.clear();
        prop_assert!(server.attempt(now + MAX_PAUSE_MS).is_ok(), "a probe is due at the latest after a minute");
    }
}
