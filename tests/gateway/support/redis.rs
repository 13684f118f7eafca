//! Redis servers for tests. The suite runs on shared counters too: with `TOLLGATE_TEST_STORE=redis` every gateway keeps
//! its counters in one of them, under a prefix of its own.

use super::port::free_port;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

/// What gateways of the tests have for a store.
const OWN: &str = "store: { memory: true }";

/// A server at a port of its own, which keeps nothing on disk.
pub struct Redis {
    pub port: u16,
    /// Where gateways find it.
    pub url: String,
    folder: tempfile::TempDir,
    arguments: Vec<String>,
    /// It ends when its standard input does: also if this process is killed.
    child: Option<Child>,
}

static SERVER: OnceLock<Redis> = OnceLock::new();
static NEXT: AtomicU32 = AtomicU32::new(0);

/// A config's text with the store that the suite runs on.
pub fn with_store(text: &str) -> String {
    if std::env::var("TOLLGATE_TEST_STORE").as_deref() != Ok("redis") {
        return text.to_owned();
    }
    let server = SERVER.get_or_init(Redis::start);
    let n = NEXT.fetch_add(1, Ordering::Relaxed);
    text.replace(OWN, &server.store(n, &format!("prefix: 't{n}'")))
}

impl Redis {
    pub fn start() -> Self {
        Self::with(|_| String::new())
    }

    /// With these arguments before the others, apart by spaces, when something was put into its folder.
    pub fn with(prepare: impl FnOnce(&Path) -> String) -> Self {
        let (port, folder) = (free_port(), tempfile::tempdir().unwrap());
        let arguments = prepare(folder.path()).split_whitespace().map(str::to_owned).collect();
        let url = format!("redis://127.0.0.1:{port}");
        let mut server = Self { port, url, folder, arguments, child: None };
        server.start_again();
        server
    }

    /// Starts it at the same port, empty.
    pub fn start_again(&mut self) {
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

    /// Kills it.
    pub fn kill(&mut self) {
        let Some(mut child) = self.child.take() else { return };
        drop(child.stdin.take());
        child.wait().unwrap();
    }

    /// The socket at which it is too.
    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("s")
    }

    /// A node's `store`; `n` names its own file.
    pub fn store(&self, n: u32, more: &str) -> String {
        let (url, folder) = (&self.url, self.folder.path().display());
        format!("store: {{ path: '{folder}/{n}.db', redis: {{ url: '{url}', {more} }} }}")
    }

    /// Runs a command of an administrator's, its words apart by spaces.
    pub fn admin(&self, words: &str) -> redis::Value {
        let mut parts = words.split(' ');
        let mut command = redis::cmd(parts.next().unwrap());
        parts.for_each(|part| {
            command.arg(part);
        });
        let client = redis::Client::open(("127.0.0.1", self.port)).unwrap();
        // A server that becomes another's replica, or its master, cuts connections off.
        let ask = || command.query(&mut client.get_connection()?);
        let answer = ask().or_else(|_: redis::RedisError| ask());
        answer.unwrap_or_else(|error| panic!("no answer to {words:?} at {}: {error}", self.port))
    }

    /// What it tells of itself by this name.
    pub fn info(&self, section: &str, name: &str) -> Option<String> {
        let redis::Value::BulkString(info) = self.admin(&format!("INFO {section}")) else {
            panic!("no INFO")
        };
        let info = String::from_utf8(info).unwrap();
        let mut lines = info.lines().filter_map(|line| line.split_once(':'));
        lines.find(|(known, _)| *known == name).map(|(_, value)| value.trim().to_owned())
    }

    /// How often this command was called.
    pub fn calls(&self, command: &str) -> u64 {
        let calls = self.info("commandstats", &format!("cmdstat_{command}"));
        calls.and_then(|calls| calls.strip_prefix("calls=")?.split(',').next()?.parse().ok()).unwrap_or(0)
    }

    /// Its number among the system's processes.
    pub fn process(&self) -> String {
        self.info("server", "process_id").unwrap()
    }
}

/// Sends a process a signal: `STOP`, `CONT`, `KILL`.
pub fn signal(process: &str, signal: &str) {
    let status = Command::new("kill").args([&format!("-{signal}"), process]).status();
    assert!(status.unwrap().success());
}

impl Drop for Redis {
    fn drop(&mut self) {
        self.kill();
    }
}
