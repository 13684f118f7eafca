//! A Redis server for one test, which listens on a socket in its own folder.

pub(crate) use super::port::free_port;

use super::node::Node;
use redis::ConnectionLike as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use tollgate::clock::{Stopwatch, Timestamp};
use tollgate::quota::Quota;

pub struct Server {
    child: Option<Child>,
    folder: tempfile::TempDir,
    arguments: Vec<String>,
}

impl Server {
    pub fn start() -> Self {
        Self::with("--port 0")
    }

    /// Starts a server with these arguments, separated by spaces, in addition to those for the socket. `@` stands for the
    /// server's folder.
    pub fn with(arguments: &str) -> Self {
        Self::with_folder(arguments, |_| ())
    }

    /// Like `with`, after `prepare` has written files into the folder.
    pub fn with_folder(arguments: &str, prepare: impl FnOnce(&Path)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        prepare(folder.path());
        let path = folder.path().display().to_string();
        let arguments = format!("{arguments} --save '' --dir @ --unixsocket @/s").replace('@', &path);
        let arguments = arguments.split(' ').map(|word| word.trim_matches('\'').to_owned()).collect();
        let mut server = Self { child: None, folder, arguments };
        server.restart();
        server
    }

    /// Starts the server again at the same socket, without data unless it wrote an append-only file.
    pub fn restart(&mut self) {
        // The shell kills the server when its standard input closes, even if the test is killed.
        let script = "redis-server \"$@\" >/dev/null & read -r _; kill -9 $!; wait";
        let child =
            Command::new("sh").args(["-c", script, "sh"]).args(&self.arguments).stdin(Stdio::piped()).spawn();
        self.child = Some(child.unwrap());
        let begun = Stopwatch::start();
        while self.try_connect().is_none() {
            assert!(
                begun.elapsed() < Duration::from_secs(20),
                "redis-server does not start: is the package redis-server installed?"
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    pub fn kill(&mut self) {
        let Some(mut child) = self.child.take() else { return };
        drop(child.stdin.take());
        child.wait().unwrap();
    }

    pub fn url(&self) -> String {
        format!("redis+unix://{}/s", self.folder.path().display())
    }

    /// Runs a command as administrator. `words` are separated by spaces.
    pub fn admin(&self, words: &str) -> redis::Value {
        self.query(words)
    }

    /// Like `admin`, and parses the reply.
    pub fn query<T: redis::FromRedisValue>(&self, words: &str) -> T {
        let mut parts = words.split(' ');
        let mut command = redis::cmd(parts.next().unwrap());
        parts.for_each(|word| {
            command.arg(word);
        });
        // A sentinel that turns a server into a replica closes all connections of the server.
        let log = |error: &redis::RedisError| println!("{words}: {error}");
        let attempt = |_| self.try_connect()?.req_command(&command).inspect_err(log).ok();
        let reply = (0..3).find_map(attempt).unwrap_or_else(|| panic!("no reply to {words:?}"));
        redis::from_redis_value(reply).unwrap()
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub fn process_id(&self) -> String {
        let info: String = self.query("INFO server");
        info.lines().find_map(|line| line.strip_prefix("process_id:")).unwrap().trim().to_owned()
    }

    fn try_connect(&self) -> Option<redis::Connection> {
        redis::Client::open(self.url()).ok()?.get_connection().ok()
    }

    pub fn connect(&self) -> redis::Connection {
        self.try_connect().unwrap()
    }

    /// A node with these quotas in the environment `staging`. It has not joined yet.
    pub fn node(&self, session: &str, quotas: &[Quota], now: Timestamp) -> Node {
        Node::new(self.connect(), session, quotas, now)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}
