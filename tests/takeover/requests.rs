//! Requests that are in flight in the old process when a new one takes over.

use super::gateway::{Place, Process};
use super::http::{Connection, MAX_WAIT};
use super::load::{JSON, STREAM, tokens};
use super::upstream::Upstream;
use serde_json::Value;
use std::fs;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::thread;
use std::time::Duration;

const FILE: &str = "path: '@/t.db'";

fn held_stream() -> String {
    STREAM.replace("\"stream\":true", "\"stream\":true,\"user\":\"held\"")
}

fn quota(environment: &Value, kind: &str) -> Value {
    let quotas = environment["quotas"].as_array().unwrap();
    quotas.iter().find(|quota| quota["kind"] == kind).unwrap().clone()
}

/// Reads the rest of a stream. Returns the tokens that it reports.
fn reported_by(stream: &mut Connection) -> u64 {
    let mut text = String::new();
    while let Some(chunk) = stream.chunk().unwrap() {
        text += &String::from_utf8(chunk).unwrap();
    }
    tokens(&text).unwrap()
}

#[test]
fn a_stream_of_the_old_process_settles_once_in_the_counters_of_the_new_one() {
    let (upstream, port) = Upstream::start();
    let quotas = "reserve: { completion: max_tokens }, quotas: {
        total_tokens: { limit: 1k, per: month, window: calendar }, completion_tokens: { limit: 1k, per: hour } }";
    let place = Place::new(port, "drain_timeout: 20s", quotas, FILE);
    let mut first = place.start();
    let mut stream = Connection::open(place.port).unwrap();
    stream.post(&held_stream()).unwrap();
    assert!(stream.head().unwrap().starts_with("HTTP/1.1 200"));
    stream.chunk().unwrap().unwrap();
    // Two processes follow each other while the stream runs.
    let mut second = place.start();
    let environment = place.environment();
    assert_eq!(environment["in_flight"], 1, "{environment:#}");
    let (total, completion) = (quota(&environment, "total_tokens"), quota(&environment, "completion_tokens"));
    let sum = |quota: &Value| quota["held"].as_u64().unwrap() + quota["used"].as_u64().unwrap();
    assert_eq!((sum(&total), sum(&completion)), (58, 50), "{environment:#}");
    let _third = place.start();
    assert_eq!(place.environment()["in_flight"], 1);
    upstream.is_released.store(true, SeqCst);
    let tokens = reported_by(&mut stream);
    let environment = place.settled();
    assert_eq!(environment["totals"]["total_tokens"], tokens, "{environment:#}");
    assert_eq!(quota(&environment, "total_tokens")["used"], tokens, "{environment:#}");
    // The next request on the same connection is served too. The connection closes after it.
    let answer = stream.call(JSON).unwrap();
    assert_eq!((answer.status(), answer.header("connection")), (200, Some("close")), "{}", answer.text());
    assert_eq!(place.settled()["totals"]["requests"], 2);
    for process in [&mut first, &mut second] {
        assert_eq!(process.exit_code(Duration::from_secs(5)), Some(0), "{}", process.log());
    }
}

/// A gateway that serves one stream. The answer is smaller than its reservation, which is charged in full if the process is
/// lost.
fn with_stream(server: &str) -> (Arc<Upstream>, Place, Process, Connection) {
    let (upstream, port) = Upstream::start();
    let quotas = "reserve: { completion: max_tokens }, quotas: { total_tokens: { limit: 1k, per: day } }";
    let place = Place::new(port, server, quotas, FILE);
    let process = place.start();
    let mut stream = Connection::open(place.port).unwrap();
    stream.post(&held_stream()).unwrap();
    stream.head().unwrap();
    (upstream, place, process, stream)
}

fn assert_charged(place: &Place, tokens: u64) {
    let environment = place.settled();
    assert_eq!(quota(&environment, "total_tokens")["used"], tokens, "{environment:#}");
}

#[test]
fn a_process_that_is_replaced_in_its_drain_delay_charges_at_the_new_one() {
    let (upstream, place, mut old, mut stream) = with_stream("drain_delay: 2s, drain_timeout: 20s");
    old.terminate();
    thread::sleep(Duration::from_millis(300));
    let _new = place.start();
    // The old process goes on after its delay.
    thread::sleep(Duration::from_millis(2_200));
    assert_eq!(place.environment()["in_flight"], 1, "{}", old.log());
    upstream.is_released.store(true, SeqCst);
    assert_charged(&place, reported_by(&mut stream));
    drop(stream);
    assert_eq!(old.exit_code(MAX_WAIT), Some(0), "{}", old.log());
}

#[test]
fn a_new_process_that_stops_waits_for_the_old_one() {
    let (upstream, place, mut old, mut stream) = with_stream("drain_timeout: 20s");
    let mut new = place.start();
    new.terminate();
    new.wait_for("waiting until the old process has ended");
    thread::sleep(Duration::from_millis(300));
    assert!(new.child.try_wait().unwrap().is_none(), "{}", new.log());
    upstream.is_released.store(true, SeqCst);
    let tokens = reported_by(&mut stream);
    drop(stream);
    for process in [&mut old, &mut new] {
        assert_eq!(process.exit_code(MAX_WAIT), Some(0), "{}", process.log());
    }
    let _next = place.start();
    assert_charged(&place, tokens);
}

#[test]
fn a_process_that_is_replaced_too_waits_for_the_old_one_beyond_its_own_drain_timeout() {
    let (upstream, place, mut first, mut stream) = with_stream("drain_timeout: 20s");
    let config = fs::read_to_string(place.folder.path().join("t.yaml")).unwrap();
    place.write("t.yaml", &config.replace("drain_timeout: 20s", "drain_timeout: 100ms"));
    let mut second = place.start();
    let _third = place.start();
    second.wait_for("waiting until the old process has ended");
    thread::sleep(Duration::from_millis(300));
    assert_eq!(place.environment()["in_flight"], 1, "{}", second.log());
    upstream.is_released.store(true, SeqCst);
    assert_charged(&place, reported_by(&mut stream));
    drop(stream);
    for process in [&mut first, &mut second] {
        assert_eq!(process.exit_code(MAX_WAIT), Some(0), "{}", process.log());
    }
}

#[test]
fn the_old_process_refuses_by_the_counters_of_the_new_one() {
    let (_, port) = Upstream::start();
    let place = Place::new(
        port,
        "drain_timeout: 20s",
        "quotas: { requests: { limit: 2, per: month, window: calendar } }",
        FILE,
    );
    let _old = place.start();
    let [mut kept, mut other] = [(); 2].map(|()| Connection::open(place.port).unwrap());
    assert_eq!(kept.call(JSON).unwrap().status(), 200);
    other.send("POST /v1/chat/completions HTTP/1.1\r\n").unwrap();
    thread::sleep(Duration::from_millis(100));
    let _new = place.start();
    assert_eq!(Connection::open(place.port).unwrap().call(JSON).unwrap().status(), 200);
    let answer = kept.call(JSON).unwrap();
    assert_eq!((answer.status(), answer.header("connection")), (429, Some("close")), "{}", answer.text());
    let message = answer.text();
    assert!(message.contains("environment 'e'") && message.contains("limit 2"), "{message}");
    other.send(&format!("host: x\r\ncontent-length: {}\r\n\r\n{JSON}", JSON.len())).unwrap();
    assert_eq!(other.message().unwrap().status(), 429);
    assert_eq!(place.environment()["totals"]["rejected"], 2);
}

#[test]
fn a_request_that_waits_for_room_at_the_old_process_gets_it_at_the_new_one() {
    let (upstream, port) = Upstream::start();
    let place = Place::new(port, "drain_timeout: 20s", "max_in_flight: 1, reserve: { max_wait: 15s }", FILE);
    let _old = place.start();
    let mut stream = Connection::open(place.port).unwrap();
    stream.post(&held_stream()).unwrap();
    stream.head().unwrap();
    let mut waiting = Connection::open(place.port).unwrap();
    waiting.post(JSON).unwrap();
    let mut leaving = Connection::open(place.port).unwrap();
    leaving.post(JSON).unwrap();
    thread::sleep(Duration::from_millis(200));
    let _new = place.start();
    let mut late = Connection::open(place.port).unwrap();
    late.post(JSON).unwrap();
    thread::sleep(Duration::from_millis(200));
    assert_eq!(place.environment()["in_flight"], 1);
    // A caller that stops waiting leaves no reservation.
    drop(leaving);
    thread::sleep(Duration::from_millis(100));
    upstream.is_released.store(true, SeqCst);
    assert_eq!(waiting.message().unwrap().status(), 200);
    assert_eq!(late.message().unwrap().status(), 200);
    assert_eq!(place.settled()["totals"]["requests"], 3);
}

#[test]
fn the_old_process_refuses_requests_when_the_new_one_was_killed() {
    let (_, port) = Upstream::start();
    let place = Place::new(port, "drain_timeout: 20s", "quotas: { requests: { limit: 9, per: day } }", FILE);
    let mut old = place.start();
    let mut kept = Connection::open(place.port).unwrap();
    assert_eq!(kept.call(JSON).unwrap().status(), 200);
    let mut new = place.start();
    old.wait_for("another process has replaced this one");
    new.kill();
    old.wait_for("the process that replaced this one has ended");
    let answer = kept.call(JSON).unwrap();
    assert_eq!(answer.status(), 503, "{}", answer.text());
    assert!(answer.text().contains("shutting_down"), "{}", answer.text());
    assert_eq!(old.exit_code(Duration::from_secs(20)), Some(0));
    // A supervisor starts the gateway again.
    let _next = place.start();
    assert_eq!(Connection::open(place.port).unwrap().call(JSON).unwrap().status(), 200);
    assert_eq!(place.settled()["totals"]["requests"], 2);
}
