//! A Redis server for one test, at a socket in a folder of its own.

pub(crate) use super::port::free_port;
use redis::ConnectionLike as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use tollgate::clock::Stopwatch;
use tollgate::clock::Timestamp;
use tollgate::quota::{CalendarPeriod, CounterState, Quota, Quotas, Window};
use tollgate::redis::{Cells, CommandBuilder, SCRIPT, ScriptReply, Verdict};

pub struct Server {
    child: Option<Child>,
    folder: tempfile::TempDir,
    arguments: Vec<String>,
}

impl Server {
    pub fn start() -> Self {
        Self::with("--port 0")
    }

    /// With these arguments, apart by spaces, beside those of a socket. `@` is its own folder.
    pub fn with(arguments: &str) -> Self {
        Self::prepared(arguments, |_| ())
    }

    /// As `with`, when something was put into its folder.
    pub fn prepared(arguments: &str, prepare: impl FnOnce(&Path)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        prepare(folder.path());
        let own = folder.path().display().to_string();
        let arguments = format!("{arguments} --save '' --dir @ --unixsocket @/s").replace('@', &own);
        let arguments = arguments.split(' ').map(|word| word.trim_matches('\'').to_owned()).collect();
        let mut server = Self { child: None, folder, arguments };
        server.start_again();
        server
    }

    /// Starts it at the same place, empty.
    pub fn start_again(&mut self) {
        // It ends when its standard input does: also if the test is killed.
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

    /// Kills it.
    pub fn kill(&mut self) {
        let Some(mut child) = self.child.take() else { return };
        drop(child.stdin.take());
        child.wait().unwrap();
    }

    pub fn url(&self) -> String {
        format!("redis+unix://{}/s", self.folder.path().display())
    }

    /// Runs a command of an administrator's, its words apart by spaces.
    pub fn admin(&self, words: &str) -> redis::Value {
        self.ask(words)
    }

    /// Runs a command of an administrator's, and reads the answer.
    pub fn ask<T: redis::FromRedisValue>(&self, words: &str) -> T {
        let mut parts = words.split(' ');
        let mut command = redis::cmd(parts.next().unwrap());
        parts.for_each(|word| {
            command.arg(word);
        });
        // A sentinel that makes a replica of a server cuts all its connections off.
        let tell = |error: &redis::RedisError| println!("{words}: {error}");
        let again = |_| self.try_connect()?.req_command(&command).inspect_err(tell).ok();
        let answer = (0..3).find_map(again).unwrap_or_else(|| panic!("no answer to {words:?}"));
        redis::from_redis_value(answer).unwrap()
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Its number among the system's processes.
    pub fn process(&self) -> String {
        let info: String = self.ask("INFO server");
        info.lines().find_map(|line| line.strip_prefix("process_id:")).unwrap().trim().to_owned()
    }

    fn try_connect(&self) -> Option<redis::Connection> {
        redis::Client::open(self.url()).ok()?.get_connection().ok()
    }

    /// A node that takes part in the quotas of one environment.
    pub fn node(&self, session: &str, quotas: &[Quota], now: Timestamp) -> Node {
        let commands = CommandBuilder::new(Cells::new(quotas, now), session, now);
        let keys = commands.keys("test", "staging");
        let mut connection = self.try_connect().unwrap();
        let sha = redis::cmd("SCRIPT").arg("LOAD").arg(SCRIPT).query(&mut connection).unwrap();
        Node { connection, commands, keys, sha, quotas: quotas.to_vec() }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

pub struct Node {
    connection: redis::Connection,
    pub commands: CommandBuilder,
    keys: [String; 3],
    sha: String,
    pub quotas: Vec<Quota>,
}

impl Node {
    pub fn call(&mut self, command: &tollgate::redis::ScriptCommand) -> ScriptReply {
        let mut call = redis::cmd("EVALSHA");
        call.arg(&self.sha).arg(3).arg(&self.keys[..]).arg(&command.arguments);
        let numbers: Vec<i64> = call.query(&mut self.connection).unwrap();
        command.parse_reply(&numbers).unwrap_or_else(|| panic!("{command:?}: {numbers:?}"))
    }

    /// Takes part with full quotas where there are none yet.
    pub fn join(&mut self, now: Timestamp) {
        let command = self.commands.join(1, false, &full(&self.quotas, now));
        assert_eq!(self.call(&command).verdict, Verdict::Done);
    }

    pub fn beat(&mut self) -> ScriptReply {
        let command = self.commands.heartbeat();
        let answer = self.call(&command);
        assert_eq!(answer.verdict, Verdict::Done);
        answer
    }

    /// Loses everything, as a server that is started anew without its data.
    pub fn flush(&mut self) {
        let (): () = redis::cmd("FLUSHALL").query(&mut self.connection).unwrap();
    }

    /// Every quota as the server has it, in an engine of the node's own.
    pub fn mirror(&mut self, now: Timestamp) -> Quotas {
        let answer = self.beat();
        let mut mirror = Quotas::new(&self.quotas, now);
        let all: Vec<u32> = (0..).take(self.quotas.len()).collect();
        tollgate::redis::load_states(&mut mirror, &all, &answer);
        mirror
    }
}

pub fn full(quotas: &[Quota], now: Timestamp) -> Vec<(CounterState, bool)> {
    let full = |quota: &Quota| match quota.window {
        Window::Rolling { burst } => CounterState::Rolling {
            limit: quota.limit,
            burst,
            level: (burst.cast_signed(), 0),
            held: 0,
            at: now,
        },
        Window::Calendar { unit, ref zone } => {
            CalendarPeriod::new(quota.limit, unit, zone.clone(), now).state()
        }
    };
    quotas.iter().map(|quota| (full(quota), false)).collect()
}
