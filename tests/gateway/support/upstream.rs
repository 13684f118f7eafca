//! A mock upstream on a bare socket, which can violate the protocol and disconnect anywhere.

use super::soon;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};

/// One step of the upstream's reaction to a request.
#[derive(Clone, Debug)]
pub enum Step {
    Send(Vec<u8>),
    /// Waits until the test opens the gate once.
    Gate,
    /// Sends nothing more, and waits for the gateway to disconnect.
    Stall,
    /// Pauses for this time.
    Wait(Duration),
    /// Sends nothing more and reads nothing, so that a disconnect goes unnoticed.
    Hold,
    /// Closes the connection.
    Cut,
    /// Resets the connection.
    Reset,
}

/// The upstream's reaction to one request. After the last step it reads the next request.
#[derive(Clone, Debug, Default)]
pub struct Answer {
    steps: Vec<Step>,
}

impl Answer {
    pub fn of(steps: Vec<Step>) -> Self {
        Self { steps }
    }

    pub fn steps(self) -> Vec<Step> {
        self.steps
    }

    /// No answer.
    pub fn silence() -> Self {
        Self::of(vec![Step::Stall])
    }

    pub fn json(status: u16, body: &str) -> Self {
        Self::with_headers(status, "content-type: application/json\r\n", body)
    }

    pub fn with_headers(status: u16, headers: &str, body: &str) -> Self {
        let head = format!("HTTP/1.1 {status} Some\r\n{headers}content-length: {}\r\n\r\n", body.len());
        Self::of(vec![Step::Send([head.as_bytes(), body.as_bytes()].concat())])
    }

    /// A chat answer that reports this usage.
    pub fn chat(prompt: u64, completion: u64) -> Self {
        Self::json(200, &super::chat_answer(&super::usage(prompt, completion)))
    }

    /// The head of an event stream; events follow.
    pub fn stream() -> Self {
        let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
        Self::of(vec![Step::Send(head.into())])
    }

    /// One chunk of a chunked body.
    pub fn event(mut self, event: &str) -> Self {
        self.steps.push(Step::Send(format!("{:x}\r\n{event}\r\n", event.len()).into()));
        self
    }

    pub fn events(self, events: &[String]) -> Self {
        events.iter().fold(self, |answer, event| answer.event(event))
    }

    /// The end of a chunked body.
    pub fn end(self) -> Self {
        self.then(Step::Send(b"0\r\n\r\n".into()))
    }

    pub fn then(mut self, step: Step) -> Self {
        self.steps.push(step);
        self
    }
}

/// A request as the upstream received it.
#[derive(Clone, Debug)]
pub struct SeenRequest {
    pub head: String,
    pub body: Vec<u8>,
}

impl SeenRequest {
    pub fn target(&self) -> &str {
        self.head.split(' ').nth(1).unwrap()
    }

    /// All values of a header.
    pub fn all(&self, name: &str) -> Vec<&str> {
        let fields = self.head.lines().skip(1).filter_map(|l| l.split_once(": "));
        fields.filter(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, v)| v).collect()
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.all(name).first().copied()
    }

    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }
}

type Script = Arc<dyn Fn(&SeenRequest) -> Answer + Send + Sync>;

pub struct Upstream {
    pub address: SocketAddr,
    seen: Arc<Mutex<Vec<SeenRequest>>>,
    gate: Arc<Semaphore>,
    accepted: Arc<AtomicUsize>,
    /// Connections that the gateway has closed in the middle of an answer.
    closed: watch::Receiver<usize>,
}

impl Upstream {
    /// An upstream that answers each request with what `script` returns for it.
    pub async fn answering(script: impl Fn(&SeenRequest) -> Answer + Send + Sync + 'static) -> Self {
        Self::reading(true, script).await
    }

    /// An upstream that answers each request when it has received its head.
    pub async fn not_reading_bodies(answer: Answer) -> Self {
        Self::reading(false, move |_| answer.clone()).await
    }

    async fn reading(
        reads_bodies: bool,
        script: impl Fn(&SeenRequest) -> Answer + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (seen, gate) = (Arc::<Mutex<Vec<SeenRequest>>>::default(), Arc::new(Semaphore::new(0)));
        let (closing, closed) = watch::channel(0);
        let script: Script = Arc::new(script);
        let accepted = Arc::new(AtomicUsize::new(0));
        let (all, opening, count) = (seen.clone(), gate.clone(), accepted.clone());
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                count.fetch_add(1, Ordering::Relaxed);
                let connection = serve(
                    socket,
                    reads_bodies,
                    script.clone(),
                    all.clone(),
                    opening.clone(),
                    closing.clone(),
                );
                tokio::spawn(connection);
            }
        });
        Self { address, seen, gate, accepted, closed }
    }

    /// An upstream that answers every request with `answer`.
    pub async fn always(answer: Answer) -> Self {
        Self::answering(move |_| answer.clone()).await
    }

    /// Lets one `Step::Gate` pass.
    pub fn open_gate(&self) {
        self.gate.add_permits(1);
    }

    /// The number of connections accepted so far.
    pub fn connections(&self) -> usize {
        self.accepted.load(Ordering::Relaxed)
    }

    /// All requests received so far.
    pub fn seen(&self) -> Vec<SeenRequest> {
        self.seen.lock().unwrap().clone()
    }

    /// The only request received. Panics if the number of requests is not one.
    pub fn only(&self) -> SeenRequest {
        let seen = self.seen();
        assert_eq!(seen.len(), 1, "one request");
        seen.into_iter().next().unwrap()
    }

    /// Waits until this many requests have been received.
    pub async fn wait_until_seen(&self, requests: usize) {
        soon("requests at the upstream", async {
            while self.seen.lock().unwrap().len() < requests {
                tokio::task::yield_now().await;
            }
        })
        .await;
    }

    /// The number of connections that the gateway has closed in the middle of an answer.
    pub fn cut(&self) -> usize {
        *self.closed.borrow()
    }

    /// Waits until the gateway has closed this many connections in the middle of an answer.
    pub async fn wait_until_cut(&self, connections: usize) {
        let mut closed = self.closed.clone();
        let wait = async { closed.wait_for(|n| *n >= connections).await.map(|_| ()) };
        soon("the gateway to disconnect", wait).await.unwrap();
    }

    /// Waits until the gateway has closed a connection in the middle of an answer.
    pub async fn wait_until_disconnected(&self) {
        let mut closed = self.closed.clone();
        soon("the gateway to disconnect", async { closed.wait_for(|n| *n > 0).await.map(|_| ()) })
            .await
            .unwrap();
    }
}

async fn serve(
    mut socket: TcpStream,
    reads_bodies: bool,
    script: Script,
    seen: Arc<Mutex<Vec<SeenRequest>>>,
    gate: Arc<Semaphore>,
    closed: watch::Sender<usize>,
) {
    socket.set_nodelay(true).unwrap();
    while let Some(request) = read_request(&mut socket, reads_bodies).await {
        let answer = script(&request);
        seen.lock().unwrap().push(request);
        for step in answer.steps {
            match step {
                Step::Send(bytes) => {
                    if socket.write_all(&bytes).await.is_err() {
                        closed.send_modify(|n| *n += 1);
                        return;
                    }
                }
                Step::Gate => {
                    let mut byte = [0];
                    tokio::select! {
                        permit = gate.acquire() => permit.unwrap().forget(),
                        _ = socket.read(&mut byte) => {
                            closed.send_modify(|n| *n += 1);
                            return;
                        }
                    }
                }
                Step::Stall => {
                    let mut byte = [0];
                    let _ = socket.read(&mut byte).await;
                    closed.send_modify(|n| *n += 1);
                    return;
                }
                Step::Wait(time) => tokio::time::sleep(time).await,
                Step::Hold => std::future::pending().await,
                Step::Cut => return,
                Step::Reset => return socket.set_zero_linger().unwrap(),
            }
        }
    }
}

async fn read_request(socket: &mut TcpStream, reads_bodies: bool) -> Option<SeenRequest> {
    let mut bytes = Vec::new();
    let head_end = loop {
        if let Some(at) = bytes.windows(4).position(|w| w == b"\r\n\r\n") {
            break at;
        }
        if socket.read_buf(&mut bytes).await.ok()? == 0 {
            return None;
        }
    };
    let head = String::from_utf8(bytes[..head_end].to_vec()).unwrap();
    let mut seen = SeenRequest { head, body: bytes.split_off(head_end + 4) };
    let length: usize = seen.header("content-length").map_or(0, |l| l.parse().unwrap());
    while reads_bodies && seen.body.len() < length {
        if socket.read_buf(&mut seen.body).await.ok()? == 0 {
            return None;
        }
    }
    Some(seen)
}
