//! Many streams at once through a gateway in its own process. The mock upstream and the callers share this process
//! and its clock. Each event carries the time at which it was written.

use crate::bodies::{KEY, STREAM_HEAD, request};
use crate::is_within;
use crate::peers::{self, Peer, free_address};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::LazyLock;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::runtime::Runtime;
use tokio::task::JoinSet;

const STREAMS: usize = 1_000;
const EVENT_EVERY: Duration = Duration::from_millis(200);
const SLOW_READERS: usize = 200;
/// Streams to callers that do not read: size in MiB, and tokens in each event.
const FLOODS: [(usize, usize); 3] = [(4, 1), (16, 1), (16, 150)];
/// Each round measures streams directly from the mock, and streams through the gateway. After the minimum of
/// `measure_paced`, more rounds follow until one is within bounds, because other load on the machine delays events, most
/// of all those that pass through more processes.
const MAX_ROUNDS: usize = 20;
const MAX_KIB_PER_STREAM: f64 = 64.0;
const MAX_KIB_PER_UNREAD_STREAM: f64 = 256.0;
/// Maximum latency that the gateway may add, in addition to the latency of direct streams.
const MAX_ADDED_MS: f64 = 5.0;

static CLOCK: LazyLock<Instant> = LazyLock::new(Instant::now);

pub(crate) fn measure_paced(is_quick: bool) -> bool {
    let runtime = runtime();
    let folder = tempfile::tempdir().unwrap();
    let upstream = runtime.block_on(mock(paced));
    let (gateway, address) = start(upstream, folder.path());
    let (min_rounds, duration) =
        if is_quick { (1, Duration::from_secs(2)) } else { (3, Duration::from_secs(10)) };
    paced_streams(&runtime, upstream, &gateway, address, duration, min_rounds)
}

pub(crate) fn measure_unread() -> bool {
    let runtime = runtime();
    let folder = tempfile::tempdir().unwrap();
    FLOODS.into_iter().fold(true, |is_fine, (mib, tokens)| {
        let upstream = runtime.block_on(mock(move |socket| flood(socket, mib << 20, tokens)));
        let (gateway, address) = start(upstream, folder.path());
        let kib = unread_streams(&runtime, &gateway, address);
        println!(
            "{SLOW_READERS} callers that do not read while {mib} MiB are sent to each, {tokens} tokens an event: {kib:.1} KiB a stream\n"
        );
        is_within("KiB per unread stream", kib, MAX_KIB_PER_UNREAD_STREAM) && is_fine
    })
}

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// Starts a gateway in front of this upstream.
fn start(upstream: SocketAddr, folder: &Path) -> (Peer, SocketAddr) {
    let address = free_address();
    let peer = peers::start("tollgate", address, upstream, folder).and_then(|peer| peer.ready(address));
    (peer.unwrap(), address)
}

fn paced_streams(
    runtime: &Runtime,
    upstream: SocketAddr,
    gateway: &Peer,
    address: SocketAddr,
    duration: Duration,
    min_rounds: usize,
) -> bool {
    println!(
        "### {STREAMS} streams of {} s, an event every {} ms\n",
        duration.as_secs(),
        EVENT_EVERY.as_millis()
    );
    println!("| path | events | p50 latency | p99 | p99.9 | max |");
    println!("| --- | --- | --- | --- | --- | --- |");
    // The gateway loads its vocabularies at start, and the first requests fill its caches.
    std::thread::sleep(Duration::from_secs(1));
    runtime.block_on(follow(address, 20, Duration::from_millis(500), || ()));
    let (idle, before) = (gateway.resident(), gateway.cpu());
    let (mut rounds, mut resident, mut events) = (Vec::new(), 0, 0);
    while rounds.len() < min_rounds || rounds.len() < MAX_ROUNDS && !rounds.iter().any(Round::is_within) {
        let (latencies, ()) = runtime.block_on(follow(upstream, STREAMS, duration, || ()));
        let direct = quantiles("direct", &latencies);
        let (latencies, seen) = runtime.block_on(follow(address, STREAMS, duration, || gateway.resident()));
        rounds.push(Round { direct, through: quantiles("the gateway", &latencies) });
        (resident, events) = (resident.max(seen), events + latencies.len());
    }
    let cpu = gateway.cpu().saturating_sub(before).as_secs_f64() * 1e6 / events as f64;
    let kib = resident.saturating_sub(idle) as f64 / 1024.0 / STREAMS as f64;
    println!("\nthe gateway: {kib:.1} KiB per stream, {cpu:.1} us of CPU per event");
    is_within("KiB per stream", kib, MAX_KIB_PER_STREAM) & check_added_latency(&rounds)
}

/// Latency of events by quantile, in milliseconds: of direct streams, and of streams through the gateway.
struct Round {
    direct: [f64; 4],
    through: [f64; 4],
}

impl Round {
    fn added(&self, at: usize) -> f64 {
        self.through[at] - self.direct[at]
    }

    fn max_added(&self, at: usize) -> f64 {
        MAX_ADDED_MS + self.direct[at]
    }

    fn is_within(&self) -> bool {
        (0..QUANTILES.len()).all(|at| self.added(at) <= self.max_added(at))
    }
}

const QUANTILES: [(&str, f64); 4] = [("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999), ("max", 1.0)];

/// Prints a line of the table. Returns the quantiles of the latencies in milliseconds.
fn quantiles(name: &str, latencies: &[u64]) -> [f64; 4] {
    let at =
        QUANTILES.map(|(_, share)| latencies[((latencies.len() - 1) as f64 * share) as usize] as f64 / 1e6);
    println!("| {name} | {} | {} |", latencies.len(), at.map(|ms| format!("{ms:.2} ms")).join(" | "));
    at
}

/// Prints the latency that the gateway adds in the round with the lowest maximum latency. Returns whether it is
/// within bounds.
fn check_added_latency(rounds: &[Round]) -> bool {
    let latest = QUANTILES.len() - 1;
    let quietest = rounds.iter().min_by(|a, b| a.through[latest].total_cmp(&b.through[latest])).unwrap();
    let added = (0..=latest).map(|at| format!("{:.2} ms at {}", quietest.added(at), QUANTILES[at].0));
    println!(
        "the gateway adds {} in the round with the lowest maximum\n",
        added.collect::<Vec<_>>().join(", ")
    );
    (0..=latest).fold(true, |is_fine, at| {
        is_fine
            & is_within(
                &format!("ms added at {}", QUANTILES[at].0),
                quietest.added(at),
                quietest.max_added(at),
            )
    })
}

/// Returns the sorted latencies of all events, and the result of `sample`, which runs while all streams are in
/// flight. Streams start one after the other, like those of real callers, so that their events are spread over time
/// too.
async fn follow<T>(
    address: SocketAddr,
    streams: usize,
    duration: Duration,
    sample: impl FnOnce() -> T,
) -> (Vec<u64>, T) {
    let starts = duration / 2;
    let mut callers = JoinSet::new();
    for n in 0..streams {
        callers.spawn(async move {
            tokio::time::sleep(starts.mul_f64(n as f64 / streams as f64)).await;
            caller(address, Instant::now() + duration).await
        });
    }
    let sample = async {
        tokio::time::sleep((starts + duration) / 2).await;
        sample()
    };
    let (all, seen) = tokio::join!(callers.join_all(), sample);
    let mut all = all.concat();
    all.sort_unstable();
    (all, seen)
}

/// The latency of each event of one stream.
async fn caller(address: SocketAddr, until: Instant) -> Vec<u64> {
    const MARK: &[u8] = b"\"written\":";
    let mut socket = TcpStream::connect(address).await.unwrap();
    send_request(&mut socket).await;
    let (mut buffer, mut latencies) = (Vec::with_capacity(4 * 1024), Vec::new());
    while Instant::now() < until {
        assert!(socket.read_buf(&mut buffer).await.unwrap() > 0, "the stream ended early");
        let now = CLOCK.elapsed().as_nanos() as u64;
        let mut read = 0;
        for at in memchr::memmem::find_iter(&buffer, MARK) {
            let digits = &buffer[at + MARK.len()..];
            let Some(end) = digits.iter().position(|b| !b.is_ascii_digit()) else { break };
            let written: u64 = std::str::from_utf8(&digits[..end]).unwrap().parse().unwrap();
            latencies.push(now.saturating_sub(written));
            read = at + MARK.len() + end;
        }
        buffer.drain(..read);
    }
    latencies
}

async fn send_request(socket: &mut TcpStream) {
    let body = request("stream");
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: bench\r\nauthorization: Bearer {KEY}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    socket.write_all((head + &body).as_bytes()).await.unwrap();
}

/// KiB of memory for each of many callers that do not read.
fn unread_streams(runtime: &Runtime, gateway: &Peer, address: SocketAddr) -> f64 {
    // The gateway loads its vocabularies at start; they do not count.
    std::thread::sleep(Duration::from_secs(1));
    let idle = gateway.resident();
    let resident = runtime.block_on(async {
        let mut sockets = Vec::new();
        for _ in 0..SLOW_READERS {
            let socket = TcpSocket::new_v4().unwrap();
            socket.set_recv_buffer_size(16 * 1024).unwrap();
            let mut socket = socket.connect(address).await.unwrap();
            send_request(&mut socket).await;
            sockets.push(socket);
        }
        tokio::time::sleep(Duration::from_secs(4)).await;
        gateway.resident()
    });
    resident.saturating_sub(idle) as f64 / 1024.0 / SLOW_READERS as f64
}

/// An upstream that answers every request in the same way.
async fn mock<F: Future<Output = Option<()>> + Send + 'static>(
    answer: impl Fn(TcpStream) -> F + Send + 'static,
) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (socket, _) = listener.accept().await.unwrap();
            socket.set_nodelay(true).unwrap();
            tokio::spawn(answer(socket));
        }
    });
    address
}

async fn begin(socket: &mut TcpStream) -> Option<()> {
    // The request is small and arrives in one or two pieces.
    let mut request = Vec::new();
    while !request.ends_with(b"}") {
        if socket.read_buf(&mut request).await.ok()? == 0 {
            return None;
        }
    }
    socket.write_all(STREAM_HEAD.as_bytes()).await.ok()
}

fn chunk(text: &str, fields: &str) -> Vec<u8> {
    let event = format!(
        "data: {{\"id\":\"chatcmpl-bench\",\"object\":\"chat.completion.chunk\",\"model\":\"gpt-4o-mini\",\"choices\":[{{\"index\":0,\"delta\":{{\"content\":\"{text}\"}}}}],{fields}}}\n\n"
    );
    format!("{:x}\r\n{event}\r\n", event.len()).into()
}

/// Sends an event every `EVENT_EVERY` until the connection breaks.
async fn paced(mut socket: TcpStream) -> Option<()> {
    begin(&mut socket).await?;
    let mut ticks = tokio::time::interval(EVENT_EVERY);
    loop {
        ticks.tick().await;
        let event = chunk(" token", &format!("\"written\":{}", CLOCK.elapsed().as_nanos()));
        socket.write_all(&event).await.ok()?;
    }
}

/// Sends `bytes` as fast as the gateway reads.
async fn flood(mut socket: TcpStream, bytes: usize, tokens: usize) -> Option<()> {
    begin(&mut socket).await?;
    let events = chunk(&" token".repeat(tokens), "\"usage\":null").repeat(100);
    for _ in 0..bytes / events.len() {
        socket.write_all(&events).await.ok()?;
    }
    std::future::pending().await
}
