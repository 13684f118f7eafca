//! Kills of either process in a hand-over.

use super::gateway::Place;
use super::http::Connection;
use super::load::{JSON, Load, STREAM};
use super::upstream::{PROMPT_TOKENS, Upstream};
use std::sync::atomic::Ordering::SeqCst;
use std::thread;
use std::time::{Duration, Instant};

const FILE: &str = "path: '@/t.db'";
const QUOTAS: &str = "reserve: { completion: max_tokens }, quotas: {
    total_tokens: { limit: 1G, per: month, window: calendar } }";

#[test]
fn a_kill_of_the_old_process_charges_its_requests_in_flight_in_full() {
    let (_, port) = Upstream::start();
    let place = Place::new(port, "drain_timeout: 20s", QUOTAS, FILE);
    place.limit_upstream();
    let mut old = place.start();
    let mut streams: Vec<_> = (0..3).map(|_| Connection::open(place.port).unwrap()).collect();
    for stream in &mut streams {
        stream.post(&STREAM.replace("\"stream\":true", "\"stream\":true,\"user\":\"held\"")).unwrap();
        stream.head().unwrap();
    }
    let _new = place.start();
    // One more request, which the old process reports to the new one by a message.
    let mut late = Connection::open(place.port).unwrap();
    late.send("POST /v1/chat/completions HTTP/1.1\r\n").unwrap();
    assert_eq!(place.environment()["in_flight"], 3);
    old.kill();
    let environment = place.settled();
    let full = 3 * (PROMPT_TOKENS + 50);
    assert_eq!(environment["totals"]["total_tokens"], full, "{environment:#}");
    assert_eq!(environment["quotas"][0]["used"], full, "{environment:#}");
    place.wait_for_upstream_usage(full);
    let answer = Connection::open(place.port).unwrap().call(JSON).unwrap();
    assert_eq!(answer.status(), 200);
}

#[test]
fn a_kill_of_the_new_process_at_any_step_loses_no_charge() {
    let (upstream, port) = Upstream::start();
    let place = Place::new(port, "drain_timeout: 20s", QUOTAS, FILE);
    let mut old = place.start();
    let (mut received, mut kills, mut kept) = (0, 0_u64, 0);
    // The time of a start determines the moments of the kills.
    let clock = Instant::now();
    let mut new = place.start();
    let start = clock.elapsed();
    old.exit_code(Duration::from_secs(20));
    std::mem::swap(&mut old, &mut new);
    for round in 0..24_u32 {
        let load = Load::start(place.port);
        thread::sleep(Duration::from_millis(250));
        let mut new = place.spawn("t.yaml");
        // From a quarter of a start to a little more than a whole one.
        thread::sleep(start / 4 + start / 27 * round);
        new.kill();
        thread::sleep(Duration::from_millis(300));
        let was_replaced = old.log().contains("another process has replaced this one");
        let sums = load.stop();
        received += sums.tokens.load(SeqCst);
        if was_replaced {
            kills += 1;
            old.kill();
            old = place.start();
        } else {
            // The old process continues to serve: nothing was lost.
            sums.assert_faultless();
            kept += 1;
        }
        let total = place.settled()["totals"]["total_tokens"].as_u64().unwrap();
        let max = upstream.reported.load(SeqCst) + kills * 20 * (PROMPT_TOKENS + 50);
        assert!(total >= received && total <= max, "{received} <= {total} <= {max} after {kills} kills");
        if kills == 0 {
            assert_eq!(total, received);
        }
    }
    println!("{kept} kills before the hand-over, {kills} after it");
    assert!(kept > 0, "no kill happened before the hand-over");
}

#[test]
fn a_kill_of_the_old_process_during_a_hand_over_loses_no_charge() {
    let (upstream, port) = Upstream::start();
    let place = Place::new(port, "drain_timeout: 20s", QUOTAS, FILE);
    let clock = Instant::now();
    let mut old = place.start();
    let start = clock.elapsed();
    let (mut received, mut went_on) = (0, 0);
    for round in 0..12_u32 {
        let load = Load::start(place.port);
        thread::sleep(Duration::from_millis(250));
        let mut new = place.spawn("t.yaml");
        thread::sleep(start * 3 / 4 + start / 40 * round);
        old.kill();
        thread::sleep(Duration::from_millis(700));
        received += load.stop().tokens.load(SeqCst);
        // The new process serves, or it has ended with an error and a supervisor starts it again.
        let began = Instant::now();
        old = loop {
            if new.log().contains("\"serving\"") {
                went_on += 1;
                break new;
            }
            if new.child.try_wait().unwrap().is_some() {
                break place.start();
            }
            assert!(began.elapsed() < Duration::from_secs(20), "{}", new.log());
            thread::sleep(Duration::from_millis(5));
        };
        let total = place.settled()["totals"]["total_tokens"].as_u64().unwrap();
        let max = upstream.reported.load(SeqCst) + u64::from(round + 1) * 20 * (PROMPT_TOKENS + 50);
        assert!(total >= received && total <= max, "{received} <= {total} <= {max} in round {round}");
    }
    println!("{went_on} of 12 new processes continued");
}
