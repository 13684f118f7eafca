//! The simulated callers of `tollgate demo`. They keep the dashboard moving: bursts, a quota that runs out, refusals.

use serde_json::json;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

const QUESTIONS: [&str; 4] = [
    "Why is the sky blue?",
    "Summarize this ticket in one sentence: the customer cannot sign in after the password was changed.",
    "Translate into German: the train leaves at nine, and the platform is announced ten minutes before.",
    "List three risks of the plan and rate each of them from one to five, with one reason.",
];
/// No answer of the simulated backend takes longer.
const MAX_DURATION: Duration = Duration::from_secs(30);

/// The requests of one caller.
#[derive(Clone, Copy)]
struct Load {
    path: &'static str,
    key: &'static str,
    model: &'static str,
    /// Requests of one round, which begin together.
    at_once: usize,
    round: Duration,
    /// The caller is active for so many rounds and then rests.
    active: usize,
    resting: usize,
}

/// Production has room for the requests that the introduction shows, and the sandbox has no other traffic.
const LOADS: [Load; 5] = [
    load("/production", "any", "gpt-4o-mini", 2, 3, (8, 2)),
    load("/support", "sk-demo-web", "gpt-4o-mini", 5, 4, (14, 6)),
    load("/support", "sk-demo-mail", "gpt-4.1-mini", 2, 7, (1, 0)),
    load("/research", "sk-demo-evals", "gpt-4.1-mini", 6, 4, (30, 10)),
    load("/research", "sk-demo-notebooks", "gpt-4o-mini", 1, 5, (1, 0)),
];

const fn load(
    path: &'static str,
    key: &'static str,
    model: &'static str,
    at_once: usize,
    seconds: u64,
    (active, resting): (usize, usize),
) -> Load {
    Load { path, key, model, at_once, round: Duration::from_secs(seconds), active, resting }
}

/// Sends requests to the gateway at this address until the process ends.
pub(super) fn run(gateway: SocketAddr) {
    for load in LOADS {
        tokio::spawn(load.run(gateway));
    }
}

impl Load {
    async fn run(self, gateway: SocketAddr) {
        for round in 0_usize.. {
            if round % (self.active + self.resting) < self.active {
                for n in 0..self.at_once {
                    let request = self.request(gateway, round + n);
                    // A refused or broken request is part of the demo.
                    tokio::spawn(timeout(MAX_DURATION, send(gateway, request)));
                }
            }
            sleep(self.round).await;
        }
    }

    /// Request number `n`: questions, lengths and streams vary.
    fn request(self, gateway: SocketAddr, n: usize) -> String {
        let Self { path, key, model, .. } = self;
        let question = QUESTIONS.get(n % QUESTIONS.len()).copied().unwrap_or_default();
        let body = json!({
            "model": model,
            "messages": [{"role": "user", "content": question}],
            "max_tokens": 40 + n * 37 % 90,
            "stream": n.is_multiple_of(3),
        })
        .to_string();
        format!(
            "POST {path}/v1/chat/completions HTTP/1.1\r\nhost: {gateway}\r\nauthorization: Bearer {key}\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
            body.len()
        )
    }
}

/// Sends a request and reads the answer to its end.
async fn send(gateway: SocketAddr, request: String) -> io::Result<()> {
    let mut connection = TcpStream::connect(gateway).await?;
    connection.write_all(request.as_bytes()).await?;
    let mut buffer = [0; 4_096];
    while connection.read(&mut buffer).await? > 0 {}
    Ok(())
}
