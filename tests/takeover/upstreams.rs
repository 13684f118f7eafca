//! Upstreams with limits, routes, replicas and the limits of providers while a new process takes over.

use super::gateway::Place;
use super::http::{Connection, MAX_WAIT, Message, get};
use super::load::JSON;
use super::port::free_port;
use serde_json::Value;
use std::io;
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

/// An upstream that answers every request alike, once it may.
struct Scripted {
    port: u16,
    requests: AtomicUsize,
    is_released: AtomicBool,
}

impl Scripted {
    /// `head`: the status line and headers.
    fn start(head: &'static str, body: &'static str, is_released: bool) -> Arc<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let upstream =
            Arc::new(Self { port, requests: AtomicUsize::new(0), is_released: AtomicBool::new(is_released) });
        let serving = upstream.clone();
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let upstream = serving.clone();
                thread::spawn(move || -> io::Result<()> {
                    let mut connection = Connection::of(stream)?;
                    loop {
                        connection.message()?;
                        upstream.requests.fetch_add(1, SeqCst);
                        while !upstream.is_released.load(SeqCst) {
                            thread::sleep(Duration::from_millis(5));
                        }
                        connection
                            .send(&format!("HTTP/1.1 {head}content-length: {}\r\n\r\n{body}", body.len()))?;
                    }
                });
            }
        });
        upstream
    }

    fn failing(is_released: bool) -> Arc<Self> {
        Self::start("503 Unavailable\r\n", "{}", is_released)
    }

    fn working() -> Arc<Self> {
        Self::start("200 OK\r\ncontent-type: application/json\r\n", CHAT_ANSWER, true)
    }

    fn requests(&self) -> usize {
        self.requests.load(SeqCst)
    }

    fn wait_for(&self, requests: usize) {
        while self.requests() < requests {
            thread::sleep(Duration::from_millis(5));
        }
    }
}

const CHAT_ANSWER: &str = r#"{"id":"a","choices":[{"index":0,"message":{"role":"assistant","content":"hi"},"finish_reason":"stop"}],"usage":{"prompt_tokens":8,"completion_tokens":5,"total_tokens":13}}"#;

/// A config with these lines of `upstreams`, and these settings of the environment `e`, whose requests go to `a`.
fn place(upstreams: &str, environment: &str) -> Place {
    let place = Place::new(1, "", "", "memory: true");
    let (port, admin, folder) = (place.port, place.admin, place.folder.path().display());
    place.write(
        "t.yaml",
        &format!(
            "server: {{ listen: '127.0.0.1:{port}', flood_guard: 0, drain_timeout: 20s }}\nadmin: {{ listen: '127.0.0.1:{admin}' }}\n\
             upstreams:\n{upstreams}environments: {{ e: {{ upstream: a, {environment} }} }}\ndefault_environment: e\n\
             store: {{ path: '{folder}/t.db' }}\n"
        ),
    );
    place
}

fn line(name: &str, port: u16, settings: &str) -> String {
    format!("  {name}: {{ base_url: 'http://127.0.0.1:{port}/v1', api_key: key-of-{name}, {settings} }}\n")
}

const LIMITS: &str =
    "quotas: { total_tokens: { limit: 1k, per: month }, requests: { limit: 3, per: month } }";
const IN_ORDER: &str = "reserve: { completion: 50 }, quotas: { total_tokens: { limit: 10k, per: month } }, \
                        routes: [{ models: ['*'], upstream: [a, b] }]";

/// Used requests and tokens of an upstream with `LIMITS`, once nothing is held.
fn used(place: &Place, upstream: &str) -> [u64; 2] {
    place.settled();
    let began = Instant::now();
    loop {
        let answer = get(place.admin, &format!("/api/upstreams/{upstream}")).unwrap();
        let shown: Value = serde_json::from_slice(&answer.body).unwrap();
        let quota =
            |kind: &str| shown["quotas"].as_array().unwrap().iter().find(|quota| quota["kind"] == kind);
        let quotas = ["requests", "total_tokens"].map(|kind| quota(kind).unwrap());
        if quotas.iter().all(|quota| quota["held"] == 0) {
            return quotas.map(|quota| quota["used"].as_u64().unwrap());
        }
        assert!(began.elapsed() < MAX_WAIT, "{shown:#}");
        thread::sleep(Duration::from_millis(10));
    }
}

fn served_by(answer: &Message) -> (u16, Option<&str>) {
    (answer.status(), answer.header("x-tollgate-upstream"))
}

#[test]
fn a_request_of_the_old_process_moves_to_an_upstream_with_limits() {
    let (a, b) = (Scripted::failing(false), Scripted::working());
    let place = place(&(line("a", a.port, LIMITS) + &line("b", b.port, LIMITS)), IN_ORDER);
    let mut old = place.start();
    let [mut earlier, mut later] = [(); 2].map(|()| Connection::open(place.port).unwrap());
    // Both connections belong to the old process. One has a request in flight when the new process takes over.
    later.send("POST /v1/chat/completions HTTP/1.1\r\n").unwrap();
    earlier.post(JSON).unwrap();
    a.wait_for(1);
    let _new = place.start();
    later.send(&format!("host: x\r\ncontent-length: {}\r\n\r\n{JSON}", JSON.len())).unwrap();
    a.wait_for(2);
    a.is_released.store(true, SeqCst);
    for connection in [&mut earlier, &mut later] {
        let answer = connection.message().unwrap();
        assert_eq!(served_by(&answer), (200, Some("b")), "{}", answer.text());
        // What is left of `b`.
        assert!(["2", "1"].contains(&answer.header("x-ratelimit-remaining-requests").unwrap()));
    }
    assert_eq!((used(&place, "a"), used(&place, "b")), ([0, 0], [2, 26]));
    assert_eq!(place.settled()["totals"]["total_tokens"], 26);
    assert_eq!((a.requests(), b.requests()), (2, 2));
    assert_eq!(old.exit_code(Duration::from_secs(15)), Some(0), "{}", old.log());
    assert_eq!((used(&place, "a"), used(&place, "b")), ([0, 0], [2, 26]), "nothing is charged at the end");
}

#[test]
fn the_failure_is_the_answer_if_the_next_upstream_has_no_room_in_the_new_process() {
    let (a, b) = (Scripted::failing(false), Scripted::working());
    let routes = IN_ORDER.replace("routes: [", "routes: [{ models: [direct], upstream: b }, ");
    let place = place(&(line("a", a.port, LIMITS) + &line("b", b.port, LIMITS)), &routes);
    let _old = place.start();
    let mut connection = Connection::open(place.port).unwrap();
    connection.post(JSON).unwrap();
    a.wait_for(1);
    let _new = place.start();
    for _ in 0..3 {
        let answer = Connection::open(place.port).unwrap().call(&JSON.replace("gpt-4o", "direct")).unwrap();
        assert_eq!(served_by(&answer), (200, Some("b")));
    }
    a.is_released.store(true, SeqCst);
    let answer = connection.message().unwrap();
    assert_eq!(served_by(&answer), (503, Some("a")), "{}", answer.text());
    assert_eq!((used(&place, "a")[1], used(&place, "b")), (0, [3, 39]));
}

#[test]
fn replicas_and_routes_lose_no_request_while_processes_follow_each_other() {
    let (one, two, fallback) = (Scripted::working(), Scripted::working(), Scripted::working());
    let urls =
        [one.port, two.port, free_port()].map(|port| format!("'http://127.0.0.1:{port}/v1'")).join(", ");
    let health = "health: { path: /, every: 200ms }";
    let upstreams = format!(
        "  a: {{ base_urls: [{urls}], {health}, quotas: {{ requests: {{ limit: 200, per: month }} }} }}\n"
    );
    let settings = IN_ORDER.replace("total_tokens: { limit: 10k", "total_tokens: { limit: 10M");
    let place = place(&(upstreams + &line("b", fallback.port, "")), &settings);
    let mut processes = vec![place.start()];
    let is_over = Arc::new(AtomicBool::new(false));
    let callers: Vec<_> = (0..4)
        .map(|_| {
            let (port, is_over) = (place.port, is_over.clone());
            thread::spawn(move || {
                let mut counts = [0_u64; 2];
                while !is_over.load(SeqCst) {
                    let answer = Connection::open(port).unwrap().call(JSON).unwrap();
                    assert_eq!(answer.status(), 200, "{}", answer.text());
                    counts[usize::from(answer.header("x-tollgate-upstream") == Some("b"))] += 1;
                }
                counts
            })
        })
        .collect();
    for _ in 0..3 {
        thread::sleep(Duration::from_millis(300));
        processes.push(place.start());
    }
    // All room of `a` is taken, exactly, by the processes together.
    while fallback.requests() == 0 {
        thread::sleep(Duration::from_millis(20));
    }
    is_over.store(true, SeqCst);
    let counts: Vec<[u64; 2]> = callers.into_iter().map(|caller| caller.join().unwrap()).collect();
    let by = [0, 1].map(|at| counts.iter().map(|counts| counts[at]).sum::<u64>());
    assert!(by[0] == 200 && by[1] > 0, "{by:?}");
    assert_eq!(place.settled()["totals"]["requests"], by[0] + by[1]);
}

#[test]
fn a_new_process_waits_for_the_provider_as_the_old_one_did() {
    let a = Scripted::start("429 Too Many Requests\r\nretry-after: 30\r\n", "{}", true);
    let place = place(&line("a", a.port, "provider_limits: follow"), "");
    let _old = place.start();
    let call = || Connection::open(place.port).unwrap().call(JSON).unwrap();
    assert_eq!(call().header("x-tollgate-error"), None);
    assert_eq!(call().header("x-tollgate-error"), Some("upstream_rate_limited"));
    let _new = place.start();
    let answer = call();
    assert_eq!(answer.header("x-tollgate-error"), Some("upstream_rate_limited"), "{}", answer.text());
    let wait: u64 = answer.header("retry-after").unwrap().parse().unwrap();
    assert!((10..=30).contains(&wait), "{wait}");
    assert_eq!(a.requests(), 1);
    let metrics = get(place.admin, "/metrics").unwrap().text();
    let refusals = r#"tollgate_provider_refusals_total{upstream="a",model="gpt-4o"} 1"#;
    assert!(metrics.contains(refusals), "{metrics}");
}

#[test]
fn a_new_process_continues_with_the_learned_lengths_of_answers() {
    let a = Scripted::working();
    let environment =
        "reserve: { completion: adaptive }, quotas: { total_tokens: { limit: 10k, per: month } }";
    let place = place(&line("a", a.port, ""), environment);
    let _old = place.start();
    let left = || {
        let answer = Connection::open(place.port).unwrap().call(JSON).unwrap();
        place.settled();
        answer.header("x-ratelimit-remaining-tokens").unwrap().parse::<u64>().unwrap()
    };
    for _ in 0..30 {
        left();
    }
    // A request reserves about what answers need. Without learning it would be 512 more.
    let before = left();
    let _new = place.start();
    let after = left();
    assert!(before - after < 60, "{before} {after}");
}
