//! Upgrades under load.

use super::gateway::{Place, Process};
use super::http::get;
use super::load::Load;
use super::upstream::Upstream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::Ordering::SeqCst;
use std::thread;
use std::time::{Duration, Instant};

const QUOTAS: &str = "reserve: { completion: max_tokens }, quotas: {
    total_tokens: [{ limit: 1G, per: day }, { limit: 1G, per: hour, window: calendar }, { limit: 1G, per: minute }],
    requests: { limit: 1G, per: day } }";
const FILE: &str = "path: '@/store/t.db'";

/// Replaces the gateway this many times, under load. Returns the last process and the load's sums.
fn upgrade(place: &Place, upgrades: usize) -> (Vec<Process>, std::sync::Arc<super::load::Sums>) {
    let mut processes = vec![place.start()];
    let load = Load::start(place.port);
    thread::sleep(Duration::from_millis(500));
    for _ in 0..upgrades {
        processes.push(place.start());
        thread::sleep(Duration::from_millis(500));
    }
    let sums = load.stop();
    let last = processes.len() - 1;
    for process in &mut processes[..last] {
        assert_eq!(process.exit_code(Duration::from_secs(30)), Some(0), "{}", process.log());
    }
    assert_eq!(get(place.admin, "/readyz").unwrap().status(), 200);
    println!(
        "{upgrades} upgrades: pauses of {:?} ms; {} requests, {} answered, {} refused, the slowest after {} ms",
        processes[..last].iter().map(pause_ms).collect::<Vec<_>>(),
        sums.sent.load(SeqCst),
        sums.answered.load(SeqCst),
        sums.refused.load(SeqCst),
        sums.slowest_ms.load(SeqCst)
    );
    sums.assert_faultless();
    (processes, sums)
}

/// How long requests had to wait when this process was replaced.
fn pause_ms(process: &Process) -> u64 {
    let log = process.log();
    let (_, rest) = log.split_once("\"pause_ms\":").unwrap();
    rest.split([',', '}']).next().unwrap().parse().unwrap()
}

#[test]
fn ten_upgrades_lose_no_request_and_charge_each_once() {
    let (upstream, port) = Upstream::start();
    let place = Place::new(port, "drain_timeout: 20s", QUOTAS, FILE);
    place.limit_upstream();
    let (processes, sums) = upgrade(&place, 10);
    for pair in processes.windows(2) {
        let log = pair[1].log();
        let line = log.lines().find(|line| line.contains("replaced a running gateway")).unwrap();
        assert!(line.contains(&format!("\"pid\":{}}}", pair[0].child.id())), "{line}");
    }
    let environment = place.settled();
    let reported = upstream.reported.load(SeqCst);
    assert_eq!(sums.tokens.load(SeqCst), reported);
    assert_eq!(sums.answered.load(SeqCst), sums.sent.load(SeqCst));
    assert_eq!(environment["totals"]["total_tokens"], reported, "{environment:#}");
    assert_eq!(environment["totals"]["requests"], upstream.answers.load(SeqCst), "{environment:#}");
    for quota in environment["quotas"].as_array().unwrap().iter().filter(|quota| quota["per"] == "day") {
        let want = if quota["kind"] == "requests" { upstream.answers.load(SeqCst) } else { reported };
        // A rolling quota refills, by 11,574 tokens a second here.
        assert!(quota["used"].as_u64().unwrap() <= want, "{quota}");
    }
    let hour = &environment["quotas"]
        .as_array()
        .unwrap()
        .iter()
        .find(|quota| quota["per"] == "hour")
        .unwrap()["used"];
    let is_whole = hour.as_u64().unwrap() == reported;
    assert!(is_whole || began_in_another_hour(), "{hour} of {reported}");
    let usage = get(place.admin, "/api/usage?step=day&from=2d&to=2099-01-01").unwrap().text();
    assert!(usage.contains(&format!("\"total_tokens\":{reported}")), "{reported}: {usage}");
    place.wait_for_upstream_usage(reported);
}

/// Whether the hour has changed within the last two minutes.
fn began_in_another_hour() -> bool {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    now.as_secs() % 3_600 < 120
}

#[test]
fn both_processes_together_stay_within_a_limit() {
    let (upstream, port) = Upstream::start();
    let quotas = "quotas: { requests: { limit: 250, per: month, window: calendar } }";
    let place = Place::new(port, "drain_timeout: 20s", quotas, FILE);
    let (_processes, sums) = upgrade(&place, 5);
    assert_eq!((sums.answered.load(SeqCst), upstream.answers.load(SeqCst)), (250, 250));
    assert_eq!(sums.refused.load(SeqCst), sums.sent.load(SeqCst) - 250);
    let environment = place.settled();
    assert_eq!(environment["totals"]["requests"], 250, "{environment:#}");
    assert_eq!(environment["totals"]["rejected"], sums.refused.load(SeqCst), "{environment:#}");
}

#[test]
fn an_upgrade_without_a_store_loses_no_request() {
    let (upstream, port) = Upstream::start();
    let place = Place::new(port, "drain_timeout: 20s", QUOTAS, "memory: true");
    let (_processes, sums) = upgrade(&place, 3);
    assert_eq!(sums.tokens.load(SeqCst), upstream.reported.load(SeqCst));
}

/// A Redis server that ends with the test.
struct Redis(Child);

impl Drop for Redis {
    fn drop(&mut self) {
        // The shell kills the server when its standard input closes.
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

/// Starts a server at the socket `s` in this folder.
fn redis(folder: &Path) -> Redis {
    let socket = folder.join("s");
    let child = Command::new("sh")
        .args(["-c", "redis-server \"$@\" >/dev/null & read -r _; kill -9 $!; wait", "sh"])
        .args(["--port", "0", "--save", "", "--unixsocket"])
        .arg(&socket)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let server = Redis(child);
    let began = Instant::now();
    while !socket.exists() {
        assert!(began.elapsed() < Duration::from_secs(20), "is the package redis-server installed?");
        thread::sleep(Duration::from_millis(10));
    }
    server
}

#[test]
fn an_upgrade_of_a_node_that_shares_its_quotas_loses_no_request() {
    let (upstream, port) = Upstream::start();
    let folder = tempfile::tempdir().unwrap();
    let _redis = redis(folder.path());
    let store = format!("path: '@/t.db', redis: {{ url: 'redis+unix://{}/s' }}", folder.path().display());
    let quotas = "reserve: { completion: max_tokens }, quotas: {
        total_tokens: { limit: 1G, per: month, window: calendar },
        requests: { limit: 200, per: month, window: calendar } }";
    let place = Place::new(port, "drain_timeout: 20s", quotas, &store);
    place.limit_upstream();
    let (_processes, sums) = upgrade(&place, 3);
    let reported = upstream.reported.load(SeqCst);
    assert_eq!((sums.answered.load(SeqCst), sums.tokens.load(SeqCst)), (200, reported));
    let environment = place.settled();
    let quotas = environment["quotas"].as_array().unwrap();
    let used = |kind: &str| quotas.iter().find(|quota| quota["kind"] == kind).unwrap()["used"].clone();
    assert_eq!((used("total_tokens"), used("requests")), (reported.into(), 200.into()), "{environment:#}");
    // The usage history of the node contains the usage that the old processes recorded.
    assert_eq!(environment["totals"]["total_tokens"], reported, "{environment:#}");
    assert_eq!(environment["totals"]["rejected"], sums.refused.load(SeqCst), "{environment:#}");
    place.wait_for_upstream_usage(reported);
}
