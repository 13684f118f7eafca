//! Crashes: the gateway is killed (`kill -9`) at random moments under load. No settled charge is lost, and requests in
//! flight are charged in full.
//!
//! A run has 25 kills. `TOLLGATE_CRASH_ROUNDS` sets another number, for example 1,000 for a long run:
//! `TOLLGATE_CRASH_ROUNDS=1000 cargo test --release --test crash -- --nocapture`

#![allow(missing_docs, clippy::unwrap_used, clippy::panic, clippy::disallowed_methods)]

#[path = "common/port.rs"]
mod port;

use port::free_port;
use serde_json::Value;
use std::fmt::Write as _;
use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

const CLIENTS: u64 = 8;
const MAX_TOKENS: u64 = 50;
/// Prompt tokens of [`BODY`], by the count of both the gateway and the upstream.
const PROMPT_TOKENS: u64 = 8;
const BODY: &str = r#"{"max_tokens":50,"model":"gpt-4o","messages":[{"role":"user","content":"hello"}]}"#;
/// How a test starts the gateway.
#[derive(Clone, Copy)]
struct Launch {
    /// The shell command that starts the program.
    shell: &'static str,
    /// Settings of the environment in the config.
    environment: &'static str,
}
/// The program replaces the shell that starts it.
const PLAIN: Launch = Launch {
    shell: r#"exec "$0" "$@""#,
    environment: "reserve: { completion: max_tokens }, quotas: {
        total_tokens: [{ limit: 1G, per: day }, { limit: 1G, per: hour, window: calendar }],
        requests: { limit: 1G, per: day } }",
};
/// Maximum time that a test waits for an event.
const MAX_WAIT: Duration = Duration::from_secs(10);

/// A random number below `n`. It differs between runs, so that the moments of the kills differ.
fn random(n: u64) -> u64 {
    use std::hash::{BuildHasher as _, RandomState};
    RandomState::new().hash_one(Instant::now()) % n
}

/// Tokens and answers as both sides of the gateway saw them.
#[derive(Default)]
struct Sums {
    /// Tokens that the upstream reported.
    reported: AtomicU64,
    /// Tokens of the answers that callers received completely.
    received: AtomicU64,
    /// Number of these answers.
    answers: AtomicU64,
}

/// An upstream that answers within 3 ms and adds up the tokens that it reports.
fn upstream(sums: &Arc<Sums>) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let sums = sums.clone();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let sums = sums.clone();
            thread::spawn(move || serve(stream, &sums));
        }
    });
    port
}

/// Answers requests until the connection breaks, which happens when the gateway is killed.
fn serve(stream: TcpStream, sums: &Sums) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut stream = stream;
    loop {
        read_message(&mut reader)?;
        thread::sleep(Duration::from_micros(random(3_000)));
        let completion = 1 + random(40);
        let total = PROMPT_TOKENS + completion;
        let body = format!(
            r#"{{"choices":[],"usage":{{"prompt_tokens":{PROMPT_TOKENS},"completion_tokens":{completion},"total_tokens":{total}}}}}"#
        );
        sums.reported.fetch_add(total, Ordering::SeqCst);
        write!(
            stream,
            "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        )?;
    }
}

/// Reads a head and its complete body.
fn read_message(reader: &mut impl BufRead) -> io::Result<(String, Vec<u8>)> {
    let mut head = String::new();
    loop {
        let before = head.len();
        if reader.read_line(&mut head)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if head[before..].trim().is_empty() {
            break;
        }
    }
    let length = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse::<usize>().unwrap())
    });
    let mut body = vec![0; length.unwrap_or(0)];
    reader.read_exact(&mut body)?;
    Ok((head, body))
}

struct Gateway {
    process: Child,
    port: u16,
    admin: u16,
}

impl Drop for Gateway {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Starts the program with a store in this folder. It does not wait until the gateway serves.
fn spawn(folder: &Path, name: &str, upstream: u16, launch: Launch) -> Gateway {
    let (port, admin) = (free_port(), free_port());
    let store = folder.join("store/tollgate.db");
    let mut config = format!("server: {{ listen: 127.0.0.1:{port}, flood_guard: 0 }}\n");
    writeln!(config, "admin: {{ listen: 127.0.0.1:{admin} }}").unwrap();
    writeln!(config, "upstreams: {{ u: {{ base_url: http://127.0.0.1:{upstream}/v1 }} }}").unwrap();
    writeln!(
        config,
        "environments: {{ e: {{ upstream: u, {} }} }}\ndefault_environment: e",
        launch.environment
    )
    .unwrap();
    writeln!(config, "store: {{ path: {} }}", store.display()).unwrap();
    let path = folder.join(name);
    fs::write(&path, config).unwrap();
    let log = fs::File::create(folder.join(format!("{name}.log"))).unwrap();
    let program = std::env::var_os("TOLLGATE_BIN").unwrap_or_else(|| env!("CARGO_BIN_EXE_tollgate").into());
    let process = Command::new("sh")
        .args(["-c", launch.shell])
        .arg(PathBuf::from(program))
        .args(["serve", "--config"])
        .arg(path)
        .env("RUST_LOG", "warn")
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .unwrap();
    Gateway { process, port, admin }
}

impl Gateway {
    /// Starts a gateway and waits until it serves. If another process has taken its port in the meantime, this function
    /// tries another one.
    fn start(folder: &Path, upstream: u16) -> Self {
        Self::start_with(folder, upstream, PLAIN)
    }

    fn start_with(folder: &Path, upstream: u16, launch: Launch) -> Self {
        let began = Instant::now();
        let mut gateway = spawn(folder, "gateway.yaml", upstream, launch);
        loop {
            if gateway.get("/readyz").is_ok_and(|body| body == b"ready\n") {
                return gateway;
            }
            if gateway.process.try_wait().unwrap().is_some() {
                gateway = spawn(folder, "gateway.yaml", upstream, launch);
            }
            let log = || fs::read_to_string(folder.join("gateway.yaml.log")).unwrap();
            assert!(began.elapsed() < MAX_WAIT, "the gateway does not start: {}", log());
            thread::sleep(Duration::from_millis(2));
        }
    }

    fn get(&self, path: &str) -> io::Result<Vec<u8>> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.admin))?;
        stream.set_read_timeout(Some(MAX_WAIT))?;
        write!(stream, "GET {path} HTTP/1.1\r\nhost: 127.0.0.1:{}\r\n\r\n", self.admin)?;
        Ok(read_message(&mut BufReader::new(stream))?.1)
    }

    fn environment(&self) -> Value {
        let all: Value = serde_json::from_slice(&self.get("/api/environments").unwrap()).unwrap();
        all["environments"][0].clone()
    }
}

/// Sends chat requests until the connection breaks or the test ends.
fn call(port: u16, sums: &Sums, is_over: &AtomicBool) -> io::Result<()> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(MAX_WAIT))?;
    let mut reader = BufReader::new(stream.try_clone()?);
    while !is_over.load(Ordering::Relaxed) {
        write!(
            stream,
            "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{BODY}",
            BODY.len()
        )?;
        let (head, body) = read_message(&mut reader)?;
        assert!(head.starts_with("HTTP/1.1 200"), "{head}{}", String::from_utf8_lossy(&body));
        let answer: Value = serde_json::from_slice(&body).unwrap();
        sums.received.fetch_add(answer["usage"]["total_tokens"].as_u64().unwrap(), Ordering::SeqCst);
        sums.answers.fetch_add(1, Ordering::SeqCst);
    }
    Ok(())
}

/// Hours since the epoch. A test ignores quotas whose period has changed since it began.
fn hour() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() / 3_600
}

/// Compares the restored counters with what both sides of the gateway saw.
fn check(environment: &Value, sums: &Sums, kills: u64, began: u64) {
    let (received, answers) = (sums.received.load(Ordering::SeqCst), sums.answers.load(Ordering::SeqCst));
    let in_flight = kills * CLIENTS;
    let max = sums.reported.load(Ordering::SeqCst) + in_flight * (PROMPT_TOKENS + MAX_TOKENS);
    let assert_within = |what: &str, n: &Value, min: u64, max: u64| {
        let n = n.as_u64().unwrap();
        assert!(n >= min, "lost: {what} is {n}, but callers received {min} ({kills} kills)");
        assert!(
            n <= max,
            "{what} is {n}: more than {max}, the sum of all reported usage and all requests in flight ({kills} kills)"
        );
    };
    assert_within("totals.total_tokens", &environment["totals"]["total_tokens"], received, max);
    assert_within("totals.requests", &environment["totals"]["requests"], answers, answers + in_flight);
    for quota in environment["quotas"].as_array().unwrap() {
        assert_eq!(quota["held"], 0, "no request is in flight after a restart: {quota}");
        let is_whole = if quota["per"] == "hour" { hour() == began } else { hour() / 24 == began / 24 };
        if !is_whole {
            continue;
        }
        match quota["kind"].as_str() {
            Some("requests") => {
                assert_within("requests per day", &quota["used"], answers, answers + in_flight);
            }
            Some("total_tokens") => assert_within("tokens used", &quota["used"], received, max),
            // An unlimited quota: it counts the clock's minute.
            _ => assert_eq!(quota["unlimited"], true, "{quota}"),
        }
    }
}

#[test]
fn a_kill_at_any_moment_loses_no_settled_charge() {
    let kills: u64 = std::env::var("TOLLGATE_CRASH_ROUNDS").map_or(25, |n| n.parse().unwrap());
    let folder = tempfile::tempdir().unwrap();
    let sums = Arc::new(Sums::default());
    let upstream = upstream(&sums);
    let (began, mut starting) = (hour(), Duration::ZERO);
    for kill in 0..=kills {
        let clock = Instant::now();
        let mut gateway = Gateway::start(folder.path(), upstream);
        starting += clock.elapsed();
        check(&gateway.environment(), &sums, kill, began);
        if kill % 25 == 0 || kill == kills {
            println!(
                "{kill} kills: {} answers, {} tokens received, {} used, {} reported; start-up {} ms on average",
                sums.answers.load(Ordering::SeqCst),
                sums.received.load(Ordering::SeqCst),
                gateway.environment()["totals"]["total_tokens"],
                sums.reported.load(Ordering::SeqCst),
                starting.as_millis() / u128::from(kill + 1)
            );
        }
        if kill == kills {
            break;
        }
        let is_over = AtomicBool::new(false);
        thread::scope(|scope| {
            for _ in 0..CLIENTS {
                scope.spawn(|| call(gateway.port, &sums, &is_over));
            }
            thread::sleep(Duration::from_micros(5_000 + random(55_000)));
            gateway.process.kill().unwrap();
            gateway.process.wait().unwrap();
            is_over.store(true, Ordering::Relaxed);
        });
    }
    let answers = sums.answers.load(Ordering::SeqCst);
    assert!(answers > kills * 5, "the load was too low: {answers} answers");
}

/// An upstream that streams 400 tokens and reports no usage.
fn streaming_upstream() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let stream = |stream: TcpStream| -> io::Result<()> {
        stream.set_nodelay(true)?;
        let mut reader = BufReader::new(stream.try_clone()?);
        let mut stream = stream;
        read_message(&mut reader)?;
        let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
        stream.write_all(head.as_bytes())?;
        let event = format!("data: {}\n\n", r#"{"choices":[{"index":0,"delta":{"content":" word"}}]}"#);
        for _ in 0..400 {
            write!(stream, "{:x}\r\n{event}\r\n", event.len())?;
            thread::sleep(Duration::from_micros(500));
        }
        stream.write_all(b"0\r\n\r\n")
    };
    thread::spawn(move || {
        for socket in listener.incoming().flatten() {
            thread::spawn(move || stream(socket));
        }
    });
    port
}

/// Counts the tokens of one stream until the connection breaks.
fn count_delivered(port: u16, delivered: &AtomicU64) -> io::Result<()> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(MAX_WAIT))?;
    let body = BODY.replacen(r#""max_tokens":50"#, r#""stream":true"#, 1);
    let length = body.len();
    write!(
        stream,
        "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {length}\r\n\r\n{body}"
    )?;
    for line in BufReader::new(stream).lines() {
        delivered.fetch_add(line?.matches(" word").count() as u64, Ordering::SeqCst);
    }
    Ok(())
}

#[test]
fn a_kill_in_the_middle_of_streams_charges_what_was_delivered() {
    let kills = std::env::var("TOLLGATE_CRASH_ROUNDS").map_or(6, |n| n.parse::<u64>().unwrap().min(100));
    let upstream = streaming_upstream();
    // All streams exceed their reservation. The first environment has room to extend it, the second one soon has none.
    let extended = "reserve: { completion: 5 }, quotas: { total_tokens: { limit: 1G, per: day } }";
    let overrun = "reserve: { completion: 5 }, quotas: { total_tokens: { limit: 60, per: day } }";
    for (environment, streams) in [(extended, 4), (overrun, 1)] {
        let folder = tempfile::tempdir().unwrap();
        let launch = Launch { environment, ..PLAIN };
        for kill in 0..kills {
            fs::remove_dir_all(folder.path().join("store")).ok();
            let mut gateway = Gateway::start_with(folder.path(), upstream, launch);
            let delivered: Vec<AtomicU64> = (0..streams).map(|_| AtomicU64::new(0)).collect();
            thread::scope(|scope| {
                for tokens in &delivered {
                    scope.spawn(|| count_delivered(gateway.port, tokens));
                }
                thread::sleep(Duration::from_millis(80 + random(150)));
                gateway.process.kill().unwrap();
                gateway.process.wait().unwrap();
            });
            drop(gateway);
            let environment = Gateway::start_with(folder.path(), upstream, launch).environment();
            let used = environment["quotas"][0]["used"].as_u64().unwrap();
            assert_eq!(environment["totals"]["total_tokens"], used);
            let delivered: Vec<u64> = delivered.iter().map(|n| n.load(Ordering::SeqCst)).collect();
            println!("kill {kill}: delivered {delivered:?}, charged {used}");
            // A debt grows in steps of 64 tokens, and some tokens pass during a commit.
            let min: u64 = delivered.iter().map(|n| (PROMPT_TOKENS + n).saturating_sub(64 + 128)).sum();
            let max: u64 = delivered.iter().map(|n| PROMPT_TOKENS + n + 64 + 200).sum();
            assert!((min..=max).contains(&used), "charged {used}, delivered {delivered:?}");
        }
    }
}

#[test]
fn the_gateway_continues_to_serve_when_the_disk_is_full() {
    let folder = tempfile::tempdir().unwrap();
    let sums = Arc::new(Sums::default());
    let upstream = upstream(&sums);
    drop(Gateway::start(folder.path(), upstream));
    // The shell limits the size of files to 256 blocks. For the store, that is a full disk.
    let shell = "trap '' XFSZ; ulimit -f 256; exec \"$0\" \"$@\"";
    let gateway = Gateway::start_with(folder.path(), upstream, Launch { shell, ..PLAIN });
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| call(gateway.port, &sums, &is_over).unwrap());
        let began = Instant::now();
        while !gateway.get("/readyz").unwrap().starts_with(b"ready, but the store cannot be written") {
            assert!(began.elapsed() < MAX_WAIT, "the gateway does not report the full disk");
            thread::sleep(Duration::from_millis(20));
        }
        let before = sums.answers.load(Ordering::SeqCst);
        while sums.answers.load(Ordering::SeqCst) < before + 50 {
            assert!(began.elapsed() < MAX_WAIT, "the gateway serves no requests");
            thread::sleep(Duration::from_millis(5));
        }
        is_over.store(true, Ordering::Relaxed);
    });
    let metrics = String::from_utf8(gateway.get("/metrics").unwrap()).unwrap();
    assert!(metrics.contains("tollgate_store_up 0"), "{metrics}");
    let received = sums.received.load(Ordering::SeqCst);
    assert_eq!(gateway.environment()["totals"]["total_tokens"], received, "counters continue in memory");
    drop(gateway);
    // After a restart without the limit, the counters continue from the last successful commit.
    let used =
        Gateway::start(folder.path(), upstream).environment()["totals"]["total_tokens"].as_u64().unwrap();
    assert!(used > 0 && used <= received + PROMPT_TOKENS + MAX_TOKENS, "{used} after {received}");
}

#[test]
fn a_second_process_on_one_store_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let upstream = upstream(&Arc::new(Sums::default()));
    let first = Gateway::start(folder.path(), upstream);
    let mut second = spawn(folder.path(), "second.yaml", upstream, PLAIN);
    let began = Instant::now();
    let status = loop {
        match second.process.try_wait().unwrap() {
            Some(status) => break status,
            None => assert!(began.elapsed() < MAX_WAIT, "the second process does not end"),
        }
        thread::sleep(Duration::from_millis(5));
    };
    let log = fs::read_to_string(folder.path().join("second.yaml.log")).unwrap();
    assert_eq!(status.code(), Some(1), "{log}");
    assert!(log.contains("store/tollgate.db") && log.contains("another process"), "{log}");
    assert_eq!(first.get("/readyz").unwrap(), b"ready\n");
}
