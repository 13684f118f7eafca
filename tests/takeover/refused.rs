//! New processes that do not replace the old one, which continues to serve.

use super::gateway::{Place, Process};
use super::http::{Connection, MAX_WAIT, get};
use super::load::JSON;
use super::port::free_port;
use super::upstream::Upstream;
use std::net::TcpListener;
use std::time::{Duration, Instant};

const QUOTAS: &str = "quotas: { total_tokens: { limit: 1G, per: day } }";
const FILE: &str = "path: '@/t.db'";

fn assert_serves(place: &Place, process: &mut Process) {
    let answer = Connection::open(place.port).unwrap().call(JSON).unwrap();
    assert_eq!(answer.status(), 200, "{}", answer.text());
    assert_eq!(get(place.admin, "/readyz").unwrap().text(), "ready\n");
    assert_eq!(process.child.try_wait().unwrap(), None);
}

#[test]
fn a_process_that_cannot_start_leaves_the_old_one_in_place() {
    let (_, port) = Upstream::start();
    let place = Place::new(port, "", QUOTAS, FILE);
    let occupied = TcpListener::bind("127.0.0.1:0").unwrap();
    let occupied = occupied.local_addr().unwrap().port();
    place.write("faulty.yaml", "server: { listen: nowhere }");
    let admin = place.config(place.port, occupied, port, ("", QUOTAS, FILE));
    place.write("admin.yaml", &admin);
    place.write(
        "store.yaml",
        &place.config(place.port, place.admin, port, ("", QUOTAS, "path: '@/other.db'")),
    );
    place.write("memory.yaml", &place.config(place.port, place.admin, port, ("", QUOTAS, "memory: true")));
    place.write("port.yaml", &place.config(free_port(), free_port(), port, ("", QUOTAS, FILE)));
    let mut old = place.start();
    for (config, code, message) in [
        ("faulty.yaml", 2, "nowhere"),
        ("admin.yaml", 1, "set admin.listen"),
        ("store.yaml", 1, "the two processes use different stores"),
        ("memory.yaml", 1, "the two processes use different stores"),
        ("port.yaml", 1, "in use by another process"),
    ] {
        let mut new = place.spawn(config);
        assert_eq!(new.exit_code(MAX_WAIT), Some(code), "{config}: {}", new.log());
        assert!(new.log().contains(message), "{config}: {}", new.log());
        assert_serves(&place, &mut old);
    }
    // After all these failures, a process with the right config succeeds.
    let mut new = place.start();
    assert_serves(&place, &mut new);
    assert_eq!(old.exit_code(MAX_WAIT), Some(0));
}

#[test]
fn a_process_that_may_open_too_few_files_leaves_the_old_one_in_place() {
    let (_, port) = Upstream::start();
    let place = Place::new(port, "", QUOTAS, FILE);
    let mut old = place.start();
    for (refused, max) in (20..1_000).step_by(3).enumerate() {
        let mut new = place.spawn_with_max_files(max);
        while new.child.try_wait().unwrap().is_none() && !new.log().contains("\"serving\"") {
            std::thread::sleep(Duration::from_millis(5));
        }
        if new.child.try_wait().unwrap().is_none() {
            assert!(refused > 5 && new.log().contains("replaced a running gateway"), "{}", new.log());
            assert_eq!(old.exit_code(MAX_WAIT), Some(0), "{}", old.log());
            assert_serves(&place, &mut new);
            return;
        }
        assert_serves(&place, &mut old);
    }
    panic!("no process takes over: {}", old.log());
}

#[test]
fn one_of_two_simultaneous_new_processes_serves() {
    let (_, port) = Upstream::start();
    let place = Place::new(port, "", QUOTAS, FILE);
    let mut old = place.start();
    let mut pair = [place.spawn("t.yaml"), place.spawn("t.yaml")];
    assert_eq!(old.exit_code(MAX_WAIT), Some(0), "{}", old.log());
    let began = Instant::now();
    // The other process is refused, or it replaces the first one.
    while !pair.iter_mut().any(|process| process.child.try_wait().unwrap().is_some()) {
        assert!(began.elapsed() < Duration::from_secs(20), "both serve");
        std::thread::sleep(Duration::from_millis(10));
    }
    let mut left: Vec<_> = pair
        .iter_mut()
        .filter_map(|process| process.child.try_wait().unwrap().is_none().then_some(process))
        .collect();
    assert_eq!(left.len(), 1);
    assert_serves(&place, left[0]);
}

#[test]
fn after_sigterm_the_gateway_serves_for_the_drain_delay() {
    let (_, port) = Upstream::start();
    let place = Place::new(port, "drain_delay: 1500ms", QUOTAS, FILE);
    let mut process = place.start();
    let mut kept = Connection::open(place.port).unwrap();
    assert_eq!(kept.call(JSON).unwrap().header("connection"), None);
    process.terminate();
    process.wait_for("shutting down");
    let began = Instant::now();
    let ready = get(place.admin, "/readyz").unwrap();
    assert_eq!(ready.status(), 503, "{}", ready.text());
    for mut connection in [kept, Connection::open(place.port).unwrap()] {
        let answer = connection.call(JSON).unwrap();
        assert_eq!((answer.status(), answer.header("connection")), (200, Some("close")), "{}", answer.text());
    }
    assert!(began.elapsed() < Duration::from_millis(1_400), "the machine is too slow for this test");
    assert_eq!(process.exit_code(MAX_WAIT), Some(0));
    assert!(began.elapsed() > Duration::from_millis(1_300), "{:?}", began.elapsed());
    assert!(Connection::open(place.port).is_err());
}
