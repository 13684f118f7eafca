//! Counters and the audit log across restarts and takeovers by processes with other quotas.

use super::gateway::{Place, Process};
use super::http::{Connection, MAX_WAIT, Message};
use super::upstream::Upstream;
use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

const FILE: &str = "path: '@/t.db'";
/// A request whose stream waits before its last events.
const HELD: &str = r#"{"model":"m","stream":true,"user":"held","messages":[{"role":"user","content":"hi"}],"max_tokens":50}"#;
const CHAT: &str = r#"{"model":"m","messages":[{"role":"user","content":"hi"}],"max_tokens":5}"#;

/// The next process at the same address.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Next {
    Restart,
    Takeover,
}

fn requests(limit: u64, per: &str) -> String {
    format!("quotas: {{ requests: {{ limit: {limit}, per: {per} }} }}")
}

impl Next {
    fn start(self, place: &Place, mut old: Process) -> Process {
        if self == Self::Restart {
            old.terminate();
            assert_eq!(old.exit_code(MAX_WAIT), Some(0), "{}", old.log());
            return place.start();
        }
        let new = place.start();
        assert_eq!(old.exit_code(MAX_WAIT), Some(0), "{}", old.log());
        new
    }
}

/// Writes the config with other settings of the environment.
fn write(place: &Place, upstream: u16, environment: &str) {
    place.write(
        "t.yaml",
        &place.config(place.port, place.admin, upstream, ("drain_timeout: 20s", environment, FILE)),
    );
}

/// Sends this many requests. Returns how many were served.
fn served(place: &Place, count: usize) -> usize {
    let mut caller = Connection::open(place.port).unwrap();
    let statuses = (0..count).map(|_| caller.call(CHAT).unwrap().status());
    statuses.filter(|status| *status == 200).count()
}

fn admin(place: &Place, method: &str, path: &str, body: &str) -> std::io::Result<Message> {
    let mut administrator = Connection::open(place.admin)?;
    let (host, length) = (place.admin, body.len());
    administrator.send(&format!(
        "{method} {path} HTTP/1.1\r\nhost: 127.0.0.1:{host}\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n{body}"
    ))?;
    administrator.message()
}

fn reload(place: &Place) {
    let reloaded = admin(place, "POST", "/api/config/reload", "").unwrap();
    assert_eq!(reloaded.status(), 200, "{}", reloaded.text());
}

#[test]
fn a_period_that_changes_by_a_reload_and_back_at_the_next_start_serves_one_limit() {
    for next in [Next::Restart, Next::Takeover] {
        for last in ["day", "hour"] {
            let (_upstream, port) = Upstream::start();
            let place = Place::new(port, "drain_timeout: 20s", &requests(10, "day"), FILE);
            let process = place.start();
            write(&place, port, &requests(10, "week"));
            reload(&place);
            assert_eq!(served(&place, 12), 10);
            write(&place, port, &requests(10, last));
            let _process = next.start(&place, process);
            assert_eq!(served(&place, 1), 0, "{next:?}, {last}: {}", place.environment());
        }
    }
}

#[test]
fn the_usage_above_a_lowered_limit_counts_again_after_the_next_start() {
    for next in [Next::Restart, Next::Takeover] {
        let (_upstream, port) = Upstream::start();
        let place = Place::new(port, "drain_timeout: 20s", &requests(10, "day"), FILE);
        let process = place.start();
        assert_eq!(served(&place, 10), 10);
        let limit = "/api/environments/e/quotas/requests/day";
        assert_eq!(admin(&place, "PUT", limit, r#"{"limit":1}"#).unwrap().status(), 200);
        let _process = next.start(&place, process);
        assert_eq!(admin(&place, "DELETE", limit, "").unwrap().status(), 200);
        assert_eq!(served(&place, 1), 0, "{next:?}: {}", place.environment());
    }
}

#[test]
fn what_requests_hold_in_a_quota_that_the_next_process_lacks_is_spent_in_the_one_after_it() {
    let (upstream, port) = Upstream::start();
    let place = Place::new(port, "drain_timeout: 20s", &requests(3, "hour"), FILE);
    let mut first = place.start();
    let mut callers: Vec<_> = (0..3).map(|_| Connection::open(place.port).unwrap()).collect();
    callers.iter_mut().for_each(|caller| caller.post(HELD).unwrap());
    let began = Instant::now();
    while place.environment()["in_flight"] != 3 {
        assert!(began.elapsed() < MAX_WAIT, "{}", place.environment());
        thread::sleep(Duration::from_millis(10));
    }
    write(&place, port, "quotas: { total_tokens: { limit: 1M, per: day } }");
    let second = place.start();
    upstream.is_released.store(true, SeqCst);
    for caller in &mut callers {
        assert_eq!(caller.message().unwrap().status(), 200);
    }
    drop(callers);
    assert_eq!(first.exit_code(MAX_WAIT), Some(0), "{}", first.log());
    write(&place, port, &requests(3, "hour"));
    let _third = Next::Takeover.start(&place, second);
    let quota = place.settled()["quotas"][0].clone();
    assert_eq!((&quota["held"], &quota["used"]), (&json!(0), &json!(3)), "{quota}");
}

#[test]
fn every_acknowledged_action_is_in_the_audit_log_after_takeovers() {
    let place = Arc::new(Place::new(1, "drain_timeout: 20s", &requests(10, "day"), FILE));
    let mut process = place.start();
    let (is_over, acknowledged) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let workers: Vec<_> = (0..3)
        .map(|_| {
            let (place, is_over, acknowledged) = (place.clone(), is_over.clone(), acknowledged.clone());
            thread::spawn(move || {
                while !is_over.load(SeqCst) {
                    thread::sleep(Duration::from_millis(8));
                    let path = "/api/environments/e/quotas/requests/day";
                    // A connection that the old process closes has no answer.
                    let Ok(answer) = admin(&place, "PUT", path, r#"{"limit":20}"#) else { continue };
                    match answer.status() {
                        200 => drop(acknowledged.fetch_add(1, SeqCst)),
                        503 => assert!(answer.text().contains("shutting_down"), "{}", answer.text()),
                        _ => panic!("{}", answer.text()),
                    }
                }
            })
        })
        .collect();
    for _ in 0..4 {
        thread::sleep(Duration::from_millis(150));
        process = Next::Takeover.start(&place, process);
    }
    is_over.store(true, SeqCst);
    workers.into_iter().for_each(|worker| worker.join().unwrap());
    let acknowledged = acknowledged.load(SeqCst);
    let entries = || {
        let audit: Value =
            serde_json::from_slice(&admin(&place, "GET", "/api/audit?limit=1000", "").unwrap().body).unwrap();
        audit["entries"].as_array().unwrap().len()
    };
    assert!(acknowledged < 1_000, "the report has 1,000 entries: {acknowledged}");
    let began = Instant::now();
    while entries() < acknowledged {
        assert!(began.elapsed() < MAX_WAIT, "{} of {acknowledged}", entries());
        thread::sleep(Duration::from_millis(20));
    }
    drop(process);
}
