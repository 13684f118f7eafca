use super::*;
use crate::config::{UpstreamSettings, parse};
use crate::upstream::replica_status::InFlight;
use crate::upstream::{ReplicaStatus, Replicas};

fn settings(count: usize) -> Arc<UpstreamSettings> {
    let urls: Vec<String> = (0..count).map(|n| format!("'http://r{n}:80/v1'")).collect();
    let text = format!(
        "upstreams: {{ u: {{ base_urls: [{}] }} }}\nenvironments: {{ e: {{ upstream: u }} }}\nstore: {{ memory: true }}",
        urls.join(", ")
    );
    let loaded = parse(&text, "t.yaml", &|_| None, &[]).unwrap_or_else(|faults| panic!("{faults}"));
    loaded.config.upstreams[0].clone()
}

fn replicas(count: usize) -> Replicas {
    ReplicaStatus::of(&settings(count), None)
}

/// Random numbers that are the same in each run.
fn randoms() -> impl Iterator<Item = u64> {
    let mut state = 0x1234_5678_9abc_def1_u64;
    std::iter::repeat_with(move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    })
}

/// How often each replica is chosen for its first attempt.
fn chosen(replicas: &Replicas, now_ms: u64) -> Vec<usize> {
    let mut counts = vec![0; replicas.len()];
    randoms()
        .take(3_000)
        .for_each(|random| counts[choose(replicas, &[], random, now_ms).unwrap().index] += 1);
    counts
}

fn fail(replicas: &Replicas, index: usize, now_ms: u64) {
    replicas[index].availability.attempt(now_ms).unwrap().failed(now_ms);
}

#[test]
fn idle_replicas_are_chosen_equally_often() {
    for count in [1, 2, 3, 8] {
        let counts = chosen(&replicas(count), 0);
        let even = 3_000 / count;
        assert!(counts.iter().all(|n| n.abs_diff(even) < even / 4), "{counts:?}");
    }
}

#[test]
fn the_replica_with_more_requests_in_flight_loses_every_comparison() {
    let all = replicas(3);
    let _busy: Vec<InFlight> = (0..5).map(|_| all[1].begin_request()).collect();
    let counts = chosen(&all, 0);
    assert!(counts[1] == 0 && counts[0].abs_diff(counts[2]) < 300, "{counts:?}");
}

#[test]
fn requests_that_stay_in_flight_spread_evenly() {
    let all = replicas(10);
    let in_flight: Vec<InFlight> = randoms()
        .take(1_000)
        .map(|random| all[choose(&all, &[], random, 0).unwrap().index].begin_request())
        .collect();
    let counts: Vec<u64> = all.iter().map(|replica| replica.in_flight()).collect();
    assert!(counts.iter().all(|n| (95..=105).contains(n)), "{counts:?}");
    drop(in_flight);
    assert!(all.iter().all(|replica| replica.in_flight() == 0));
}

#[test]
fn a_replica_that_is_left_out_gets_one_probe_when_it_is_due() {
    let all = replicas(2);
    fail(&all, 0, 0);
    assert_eq!(chosen(&all, 4_999), [0, 3_000]);
    let probe = choose(&all, &[], 1, 5_000).unwrap();
    assert!(probe.index == 0 && probe.attempt.is_probe() && !probe.is_last_resort);
    assert_eq!(chosen(&all, 5_000), [0, 3_000], "one probe at a time");
    assert!(probe.attempt.succeeded());
    assert!(chosen(&all, 5_000)[0] > 1_000);
}

#[test]
fn each_replica_is_tried_once_and_those_that_are_left_out_last() {
    let all = replicas(4);
    fail(&all, 2, 0);
    fail(&all, 0, 1_000);
    all[3].set_healthy(false);
    let mut order = Vec::new();
    while let Some(choice) = choose(&all, &order, 7, 2_000) {
        assert_eq!(choice.is_last_resort, !order.is_empty());
        order.push(choice.index);
    }
    // The usable one, the one that is reachable and unhealthy, and then by the time of the probe.
    assert_eq!(order, [1, 3, 2, 0]);
}

#[test]
fn an_unhealthy_replica_gets_nothing_until_it_passes_a_check_unless_all_are_unhealthy() {
    let all = replicas(2);
    fail(&all, 1, 0);
    assert!(all[1].set_healthy(false) && !all[1].set_healthy(false));
    // Not even a probe.
    assert_eq!(chosen(&all, 100_000), [3_000, 0]);
    assert!(all[1].set_healthy(true));
    assert!(chosen(&all, 100_000)[1] > 1_000, "a check that passes ends the pause too");
    assert!(all.iter().all(|replica| replica.set_healthy(false)));
    let counts = chosen(&all, 100_000);
    assert!(counts.iter().all(|n| *n > 1_000), "{counts:?}");
}

#[test]
fn a_reload_keeps_the_state_of_the_replicas_that_both_configs_have() {
    let two = replicas(2);
    fail(&two, 1, 0);
    let three = ReplicaStatus::of(&settings(3), Some(&two));
    assert!(Arc::ptr_eq(&two[0], &three[0]) && Arc::ptr_eq(&two[1], &three[1]));
    assert_eq!(chosen(&three, 0)[1], 0);
    let one = ReplicaStatus::of(&settings(1), Some(&three));
    assert!(one.len() == 1 && Arc::ptr_eq(&two[0], &one[0]));
}
