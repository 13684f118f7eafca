//! Many streams at once through a gateway in a process of its own. Mock and callers are in this one, so that
//! they have one clock: each event says when it was written.

use crate::bodies::{KEY, STREAM_HEAD, request};
use crate::is_within;
use crate::peers::{self, Peer, free_port};
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
/// What is sent to callers that do not read: MiB, and tokens in each event.
const FLOODS: [(usize, usize); 3] = [(4, 1), (16, 1), (16, 150)];
/// Figures to reach; lateness is bounded by how late events come without the gateway, too.
const MOST_KIB: f64 = 64.0;
const MOST_KIB_UNREAD: f64 = 256.0;
const MOST_LATE_MS: f64 = 5.0;

static CLOCK: LazyLock<Instant> = LazyLock::new(Instant::now);

pub(crate) fn measure_paced(is_quick: bool) -> bool {
    let runtime = runtime();
    let folder = tempfile::tempdir().unwrap();
    let upstream = runtime.block_on(mock(paced));
    let (gateway, address) = start(upstream, folder.path());
    let seconds = if is_quick { 3 } else { 15 };
    paced_streams(&runtime, upstream, &gateway, address, Duration::from_secs(seconds))
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
        is_within("KiB a stream that is not read", kib, MOST_KIB_UNREAD) && is_fine
    })
}

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// A gateway before this upstream.
fn start(upstream: SocketAddr, folder: &Path) -> (Peer, SocketAddr) {
    let port = free_port();
    let peer = peers::start("tollgate", port, upstream, folder).and_then(|peer| peer.ready(port));
    (peer.unwrap(), port)
}

fn paced_streams(
    runtime: &Runtime,
    upstream: SocketAddr,
    gateway: &Peer,
    address: SocketAddr,
    time: Duration,
) -> bool {
    println!("### {STREAMS} streams, an event each {} ms, {} s\n", EVENT_EVERY.as_millis(), time.as_secs());
    println!("| by way of | events | p50 late | p99 | p99.9 | latest | KiB a stream | CPU us an event |");
    println!("| --- | --- | --- | --- | --- | --- | --- | --- |");
    let straight = runtime.block_on(follow(upstream, time, || ()));
    let latest_straight = print("nobody", &straight.0, "-", "-");
    // The first requests fill what every process needs once.
    runtime.block_on(follow_some(address, 20, Duration::from_millis(500)));
    let (idle, before) = (gateway.resident(), gateway.cpu());
    let (late, resident) = runtime.block_on(follow(address, time, || gateway.resident()));
    let cpu = gateway.cpu().saturating_sub(before).as_secs_f64() * 1e6 / late.len() as f64;
    let kib = resident.saturating_sub(idle) as f64 / 1024.0 / STREAMS as f64;
    let latest = print("the gateway", &late, &format!("{kib:.1}"), &format!("{cpu:.1}"));
    println!();
    // What is late without the gateway is the machine's doing.
    is_within("KiB a stream", kib, MOST_KIB)
        & is_within("ms late", latest, MOST_LATE_MS + 3.0 * latest_straight)
}

/// A line of the table; the latest in milliseconds.
fn print(name: &str, late: &[u64], kib: &str, cpu: &str) -> f64 {
    let at = |share: f64| late[((late.len() - 1) as f64 * share) as usize] as f64 / 1e6;
    println!(
        "| {name} | {} | {:.2} ms | {:.2} ms | {:.2} ms | {:.2} ms | {kib} | {cpu} |",
        late.len(),
        at(0.5),
        at(0.99),
        at(0.999),
        at(1.0)
    );
    at(1.0)
}

/// How late each event came, in order, and what `look` saw when all streams were under way.
async fn follow<T>(address: SocketAddr, time: Duration, look: impl FnOnce() -> T) -> (Vec<u64>, T) {
    let (all, seen) = tokio::join!(follow_some(address, STREAMS, time), async {
        tokio::time::sleep(time.mul_f64(0.8)).await;
        look()
    });
    (all, seen)
}

async fn follow_some(address: SocketAddr, streams: usize, time: Duration) -> Vec<u64> {
    let mut callers = JoinSet::new();
    let until = Instant::now() + time;
    for n in 0..streams {
        callers.spawn(async move {
            // Spread over the time between two events.
            tokio::time::sleep(EVENT_EVERY.mul_f64(n as f64 / streams as f64)).await;
            caller(address, until).await
        });
    }
    let mut all = callers.join_all().await.concat();
    all.sort_unstable();
    all
}

/// How late each event of one stream came.
async fn caller(address: SocketAddr, until: Instant) -> Vec<u64> {
    const MARK: &[u8] = b"\"written\":";
    let mut socket = TcpStream::connect(address).await.unwrap();
    ask(&mut socket).await;
    let (mut buffer, mut late) = (Vec::with_capacity(4 * 1024), Vec::new());
    while Instant::now() < until {
        assert!(socket.read_buf(&mut buffer).await.unwrap() > 0, "the stream has ended");
        let now = CLOCK.elapsed().as_nanos() as u64;
        let mut read = 0;
        for at in memchr::memmem::find_iter(&buffer, MARK) {
            let digits = &buffer[at + MARK.len()..];
            let Some(end) = digits.iter().position(|b| !b.is_ascii_digit()) else { break };
            let written: u64 = std::str::from_utf8(&digits[..end]).unwrap().parse().unwrap();
            late.push(now.saturating_sub(written));
            read = at + MARK.len() + end;
        }
        buffer.drain(..read);
    }
    late
}

async fn ask(socket: &mut TcpStream) {
    let body = request("stream");
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: bench\r\nauthorization: Bearer {KEY}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    socket.write_all((head + &body).as_bytes()).await.unwrap();
}

/// KiB for each of many callers that take nothing: the gateway keeps no more of their answers than it has to.
fn unread_streams(runtime: &Runtime, gateway: &Peer, address: SocketAddr) -> f64 {
    // Its vocabularies, which it loads as it starts, are no stream's.
    std::thread::sleep(Duration::from_secs(1));
    let idle = gateway.resident();
    let resident = runtime.block_on(async {
        let mut sockets = Vec::new();
        for _ in 0..SLOW_READERS {
            let socket = TcpSocket::new_v4().unwrap();
            socket.set_recv_buffer_size(16 * 1024).unwrap();
            let mut socket = socket.connect(address).await.unwrap();
            ask(&mut socket).await;
            sockets.push(socket);
        }
        tokio::time::sleep(Duration::from_secs(4)).await;
        gateway.resident()
    });
    resident.saturating_sub(idle) as f64 / 1024.0 / SLOW_READERS as f64
}

/// An upstream that answers each connection's request in one way.
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
    // The request is small, and comes in one piece or two.
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

/// An event now and then, until the connection breaks.
async fn paced(mut socket: TcpStream) -> Option<()> {
    begin(&mut socket).await?;
    let mut ticks = tokio::time::interval(EVENT_EVERY);
    loop {
        ticks.tick().await;
        let event = chunk(" token", &format!("\"written\":{}", CLOCK.elapsed().as_nanos()));
        socket.write_all(&event).await.ok()?;
    }
}

/// As much as is taken.
async fn flood(mut socket: TcpStream, bytes: usize, tokens: usize) -> Option<()> {
    begin(&mut socket).await?;
    let events = chunk(&" token".repeat(tokens), "\"usage\":null").repeat(100);
    for _ in 0..bytes / events.len() {
        socket.write_all(&events).await.ok()?;
    }
    std::future::pending().await
}
