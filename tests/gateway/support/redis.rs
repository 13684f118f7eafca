//! Redis servers for tests. The suite runs on shared counters too: with `TOLLGATE_TEST_STORE=redis` every gateway keeps
//! its counters in one of them, under a prefix of its own.

use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

/// What gateways of the tests have for a store.
const OWN: &str = "store: { memory: true }";

/// A server at a port of its own, which keeps nothing on disk.
pub struct Redis {
    pub port: u16,
    folder: tempfile::TempDir,
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
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let mut server = Self { port, folder: tempfile::tempdir().unwrap(), child: None };
        server.start_again();
        server
    }

    /// Starts it at the same port, empty.
    pub fn start_again(&mut self) {
        let script = "redis-server --bind 127.0.0.1 --port $2 --save '' --dir \"$1\" >/dev/null & read -r _; kill -9 $!; wait";
        let mut server = Command::new("sh");
        server.args(["-c", script, "sh"]).arg(self.folder.path()).arg(self.port.to_string());
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

    /// A node's `store`; `n` names its own file.
    pub fn store(&self, n: u32, more: &str) -> String {
        let (port, folder) = (self.port, self.folder.path().display());
        format!("store: {{ path: '{folder}/{n}.db', redis: {{ url: 'redis://127.0.0.1:{port}', {more} }} }}")
    }

    /// Runs a command of an administrator's, its words apart by spaces.
    pub fn admin(&self, words: &str) -> redis::Value {
        let mut words = words.split(' ');
        let mut command = redis::cmd(words.next().unwrap());
        words.for_each(|word| {
            command.arg(word);
        });
        let client = redis::Client::open(("127.0.0.1", self.port)).unwrap();
        command.query(&mut client.get_connection().unwrap()).unwrap()
    }

    /// How often this command was called.
    pub fn calls(&self, command: &str) -> u64 {
        let redis::Value::BulkString(info) = self.admin("INFO commandstats") else { panic!("no INFO") };
        let info = String::from_utf8(info).unwrap();
        let line = format!("cmdstat_{command}:calls=");
        let calls = info.lines().find_map(|l| l.strip_prefix(&line)?.split(',').next()?.parse().ok());
        calls.unwrap_or(0)
    }

    /// Its number among the system's processes.
    pub fn process(&self) -> String {
        let redis::Value::BulkString(info) = self.admin("INFO server") else { panic!("no INFO") };
        let info = String::from_utf8(info).unwrap();
        info.lines().find_map(|line| line.strip_prefix("process_id:")).unwrap().trim().to_owned()
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
