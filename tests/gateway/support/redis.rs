//! Redis servers for tests. With `TOLLGATE_TEST_STORE=redis` the whole suite runs on shared counters: every gateway
//! uses one common server, with its own key prefix.

use super::port::free_port;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

/// The store in the configs of the tests.
const MEMORY_STORE: &str = "store: { memory: true }";

/// A server on its own port, which stores nothing on disk by default.
pub struct Redis {
    pub port: u16,
    /// The URL for gateways. A test may change it.
    pub url: String,
    folder: tempfile::TempDir,
    arguments: Vec<String>,
    /// A shell that kills the server when its standard input closes, even if this process is killed.
    child: Option<Child>,
}

static SERVER: OnceLock<Redis> = OnceLock::new();
static NEXT: AtomicU32 = AtomicU32::new(0);

/// Whether the suite runs on counters in Redis.
pub fn has_shared_counters() -> bool {
    std::env::var("TOLLGATE_TEST_STORE").as_deref() == Ok("redis")
}

/// Replaces the store in a config by the one that the suite runs on.
pub fn with_store(text: &str) -> String {
    if !has_shared_counters() {
        return text.to_owned();
    }
    let server = SERVER.get_or_init(Redis::start);
    let n = NEXT.fetch_add(1, Ordering::Relaxed);
    // On a busy machine, replies can take longer than the default timeout. The node would then count alone for a moment.
    text.replace(MEMORY_STORE, &server.store(n, &format!("prefix: 't{n}', timeout: 2s")))
}

impl Redis {
    pub fn start() -> Self {
        Self::with(|_| String::new())
    }

    /// Starts a server with the arguments that `prepare` returns, separated by spaces. `prepare` may write files into the
    /// server's folder.
    pub fn with(prepare: impl FnOnce(&Path) -> String) -> Self {
        let (port, folder) = (free_port(), tempfile::tempdir().unwrap());
        let arguments = prepare(folder.path()).split_whitespace().map(str::to_owned).collect();
        let url = format!("redis://127.0.0.1:{port}");
        let mut server = Self { port, url, folder, arguments, child: None };
        server.restart();
        server
    }

    /// Starts the server again on the same port, without data unless it wrote an append-only file.
    pub fn restart(&mut self) {
        let script = "redis-server \"$@\" >/dev/null & read -r _; kill -9 $!; wait";
        let mut server = Command::new("sh");
        server.args(["-c", script, "sh"]).args(&self.arguments).args(["--bind", "127.0.0.1", "--save", ""]);
        server.arg("--port").arg(self.port.to_string()).arg("--dir").arg(self.folder.path());
        server.arg("--unixsocket").arg(self.socket());
        self.child = Some(server.stdin(Stdio::piped()).spawn().unwrap());
        for _ in 0..2_000 {
            if TcpStream::connect(("127.0.0.1", self.port)).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        panic!("redis-server does not start: is the package redis-server installed?");
    }

    pub fn kill(&mut self) {
        let Some(mut child) = self.child.take() else { return };
        drop(child.stdin.take());
        child.wait().unwrap();
    }

    /// The Unix socket of the server.
    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("s")
    }

    /// The `store` of node number `n` in its config.
    pub fn store(&self, n: u32, more: &str) -> String {
        let (url, folder) = (&self.url, self.folder.path().display());
        format!("store: {{ path: '{folder}/{n}.db', redis: {{ url: '{url}', {more} }} }}")
    }

    /// Runs a command as administrator. `words` are separated by spaces.
    pub fn admin(&self, words: &str) -> redis::Value {
        let mut parts = words.split(' ');
        let mut command = redis::cmd(parts.next().unwrap());
        parts.for_each(|part| {
            command.arg(part);
        });
        let client = redis::Client::open(("127.0.0.1", self.port)).unwrap();
        // A server that becomes a replica or a master closes its connections.
        let attempt = || command.query(&mut client.get_connection()?);
        let reply = attempt().or_else(|_: redis::RedisError| attempt());
        reply.unwrap_or_else(|error| panic!("no reply to {words:?} at {}: {error}", self.port))
    }

    /// One field of `INFO`.
    pub fn info(&self, section: &str, name: &str) -> Option<String> {
        let redis::Value::BulkString(info) = self.admin(&format!("INFO {section}")) else {
            panic!("no INFO")
        };
        let info = String::from_utf8(info).unwrap();
        let mut lines = info.lines().filter_map(|line| line.split_once(':'));
        lines.find(|(field, _)| *field == name).map(|(_, value)| value.trim().to_owned())
    }

    /// How often clients called this command.
    pub fn calls(&self, command: &str) -> u64 {
        let calls = self.info("commandstats", &format!("cmdstat_{command}"));
        calls.and_then(|calls| calls.strip_prefix("calls=")?.split(',').next()?.parse().ok()).unwrap_or(0)
    }

    pub fn process_id(&self) -> String {
        self.info("server", "process_id").unwrap()
    }
}

/// Sends a signal to a process: `STOP`, `CONT`, `KILL`.
pub fn send_signal(process: &str, signal: &str) {
    let status = Command::new("kill").args([&format!("-{signal}"), process]).status();
    assert!(status.unwrap().success());
}

impl Drop for Redis {
    fn drop(&mut self) {
        self.kill();
    }
}
