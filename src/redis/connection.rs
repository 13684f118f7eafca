//! The connection to Redis. A call either gets its reply within the timeout or fails at once because the circuit is open.
//!
//! Libraries that reconnect by themselves let calls wait during the reconnect, far beyond the calls' timeouts. Here
//! one task connects, and calls use only a working connection. The first call that fails opens the circuit for
//! all calls, including those in flight. The task reconnects as soon as the server accepts writes in time.
//!
//! All keys of an environment are in one slot. In a cluster one connection is therefore enough: to the master of that
//! slot. When the slot moves or another server becomes master, a call fails and the task looks for the new master.

mod call_timer;
mod circuit;
mod discovery;
mod requirements;
mod tls;
mod url;

use super::{SCRIPT, ScriptCommand, ScriptReply};
use crate::clock::Stopwatch;
use circuit::{CallFailure, Circuit, CircuitPass, RETRY_INTERVAL, ReconnectPause};
use discovery::{Discovery, ServerConnection};
use redis::aio::MultiplexedConnection;
use redis::{ErrorKind, RedisError, RedisResult, ServerErrorKind};
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use url::RedisUrl;

pub use call_timer::catch_up_time;
pub use circuit::CallRefusal;
pub(crate) use requirements::note;

/// Added to the timeout for each argument. A node that joins with a thousand open reservations sends some twenty
/// thousand arguments, which take the server 25 ms. For one reservation the addition is negligible.
const TIME_PER_ARGUMENT: Duration = Duration::from_micros(4);
/// Interval between two writes that test an idle connection.
const PROBE_INTERVAL: Duration = Duration::from_millis(500);
/// Interval after which an unchanged reason is logged again.
const LOG_REPEAT_INTERVAL: Duration = Duration::from_mins(1);

/// Redis cannot be used now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unavailable;

/// The connection to the Redis server that has the keys of one environment. Clones share it.
#[derive(Clone, Debug)]
pub struct FailFastConnection {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    discovery: Discovery,
    /// For the log: the hash tag of the keys, which is the environment's name.
    environment: String,
    prefix: String,
    /// The key that is written to test whether the server accepts writes.
    probe_key: String,
    script_sha: String,
    state: Mutex<ConnectionState>,
    circuit: Circuit,
}

#[derive(Debug, Default)]
struct ConnectionState {
    server: Option<ServerConnection>,
    /// The number of the newest connection. The first one has number 1.
    generation: u64,
    unavailable_reason: Option<String>,
    /// The reason that was logged last, and the time since then.
    logged_reason: Option<(String, Stopwatch)>,
    is_logged_unavailable: bool,
}

/// Permission for one call on the current connection.
#[derive(Debug)]
pub struct CallPermit<'a> {
    connection: &'a FailFastConnection,
    server: ServerConnection,
    generation: u64,
    pass: CircuitPass,
}

impl CallPermit<'_> {
    /// Runs a command of the script. Fails after the timeout, or at once when the circuit opens.
    ///
    /// # Errors
    /// Redis is unavailable. It may have run the command, or may still run it.
    pub async fn call(self, keys: &[String], command: &ScriptCommand) -> Result<ScriptReply, Unavailable> {
        let Self { connection, server, generation, pass } = self;
        let Shared { circuit, discovery, script_sha, .. } = &*connection.shared;
        let address = server.address.clone();
        let count = u32::try_from(command.arguments.len()).unwrap_or(u32::MAX);
        let extra = TIME_PER_ARGUMENT.saturating_mul(count);
        let evaluate = |name: &str, script: &str| {
            let (mut call, mut redis) = (redis::cmd(name), server.redis.clone());
            call.arg(script).arg(keys.len()).arg(keys).arg(&command.arguments);
            async move { call.query_async::<Vec<i64>>(&mut redis).await }
        };
        let outcome = match circuit.run(pass, extra, evaluate("EVALSHA", script_sha)).await {
            // The server was restarted or failed over, or its scripts were flushed.
            Ok((Err(error), pass)) if is_unknown_script(&error) => {
                circuit.run(pass, extra, evaluate("EVAL", SCRIPT)).await
            }
            outcome => outcome,
        };
        let reason = match outcome {
            Ok((Ok(numbers), _)) => match command.parse_reply(&numbers) {
                Some(reply) => return Ok(reply),
                None => "sent a reply that the script cannot have sent".to_owned(),
            },
            Ok((Err(error), _)) => discovery.describe(&error),
            Err(CallFailure::NoReply) => no_reply_within(circuit.timer.timeout() + extra),
            Err(CallFailure::CircuitOpened) => return Err(Unavailable),
        };
        connection.disconnect(generation, &format!("{address} {reason}"));
        Err(Unavailable)
    }
}

/// Checks the syntax of a Redis URL. Files that it names are not read.
///
/// # Errors
/// The fault and the accepted forms, without the password.
pub fn check_url(url: &str) -> Result<(), String> {
    RedisUrl::parse(url).map(|_| ())
}

/// Identifies the server of a URL. The login and the files for TLS make no difference.
pub fn server_identity(url: &str) -> String {
    RedisUrl::parse(url).map(|url| format!("{:?} {}", url.topology, url.login.db())).unwrap_or_default()
}

impl FailFastConnection {
    /// Prepares a connection to the server at `url` that has the slot of `slot_key`, a key of the environment. All keys
    /// begin with `prefix`. A server that is silent for longer than `timeout` is unavailable. [`run`](Self::run)
    /// connects.
    ///
    /// # Errors
    /// The URL is malformed, or a TLS file that it names cannot be used. The error does not contain the password.
    pub fn new(url: &str, prefix: &str, slot_key: &str, timeout: Duration) -> anyhow::Result<Self> {
        let url = RedisUrl::parse(url).map_err(anyhow::Error::msg)?;
        let environment = discovery::hash_tag(slot_key).to_owned();
        let unavailable_reason = Some("the first connection is not yet established".to_owned());
        let shared = Shared {
            discovery: Discovery::new(url, slot_key, timeout)?,
            probe_key: format!("{prefix}:{{{environment}}}:probe"),
            environment,
            prefix: prefix.to_owned(),
            script_sha: redis::Script::new(SCRIPT).get_hash().to_owned(),
            state: Mutex::new(ConnectionState { unavailable_reason, ..ConnectionState::default() }),
            circuit: Circuit::new(timeout),
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Waits in the queue until fewer than the maximum of calls are in flight on the connection with this number. Queue and
    /// wait are bounded.
    ///
    /// # Errors
    /// The connection is lost, or was lost while this call was in the queue; or too many calls are in the queue.
    pub async fn permit(&self, generation: u64) -> Result<CallPermit<'_>, CallRefusal> {
        self.permit_with(generation, true).await
    }

    /// As [`permit`](Self::permit), but without a bound of the queue.
    ///
    /// # Errors
    /// The connection is lost, or was lost while this call was in the queue.
    pub async fn permit_of_any(&self, generation: u64) -> Result<CallPermit<'_>, Unavailable> {
        self.permit_with(generation, false).await.map_err(|_| Unavailable)
    }

    async fn permit_with(&self, generation: u64, has_limit: bool) -> Result<CallPermit<'_>, CallRefusal> {
        let (current, server) = self.current_server().ok_or(CallRefusal::CircuitOpen)?;
        if current != generation {
            return Err(CallRefusal::CircuitOpen);
        }
        let pass = self.shared.circuit.enter(generation, has_limit).await?;
        Ok(CallPermit { connection: self, server, generation, pass })
    }

    /// Waits for a permit, however long the queue is, and runs a command of the script.
    ///
    /// # Errors
    /// The connection with this number is lost. Redis may have run the command, or may still run it.
    pub async fn call_on(
        &self,
        generation: u64,
        keys: &[String],
        command: &ScriptCommand,
    ) -> Result<ScriptReply, Unavailable> {
        self.permit_of_any(generation).await?.call(keys, command).await
    }

    /// Runs a command of the script on the working connection.
    ///
    /// # Errors
    /// Redis is unavailable. It may have run the command, or may still run it.
    pub async fn call(&self, keys: &[String], command: &ScriptCommand) -> Result<ScriptReply, Unavailable> {
        let generation = *self.watch_generation().borrow();
        self.call_on(generation, keys, command).await
    }

    /// Why Redis is unavailable; `None` while it is available.
    pub fn unavailable_reason(&self) -> Option<String> {
        let state = self.lock();
        state.unavailable_reason.clone()
    }

    /// The number of the working connection, 0 while there is none. Each new connection has a higher number, so every
    /// loss is visible.
    pub fn watch_generation(&self) -> watch::Receiver<u64> {
        self.shared.circuit.watch_generation()
    }

    /// Connects, and reconnects after each loss. Runs until it is dropped, in the runtime that reads the replies.
    pub async fn run(self) {
        tokio::join!(self.shared.circuit.timer.serve_rechecks(), self.stay_connected());
    }

    async fn stay_connected(&self) {
        let mut pause = ReconnectPause::default();
        loop {
            match self.connect().await {
                Ok(server) => {
                    let connected = Stopwatch::start();
                    let generation = self.set_connected(server.clone());
                    self.probe_until_lost(generation, server).await;
                    sleep(pause.after(connected.elapsed())).await;
                }
                Err(reason) => {
                    self.set_unavailable(&reason);
                    sleep(RETRY_INTERVAL).await;
                }
            }
        }
    }

    /// Connects to a server that permits all commands of the script and accepts writes in time.
    async fn connect(&self) -> Result<ServerConnection, String> {
        let mut server = self.shared.discovery.connect().await?;
        let fault = match self.test_commands(&mut server.redis).await {
            Ok(failures) => {
                let code = failures.get(1).and_then(|error| error.split(' ').next()).unwrap_or_default();
                let fault = requirements::command_fault(&failures, &self.shared.prefix);
                fault.map(|fault| self.shared.discovery.with_hint(fault, code))
            }
            Err(error) => Some(self.describe_refusal(&error)),
        };
        match fault {
            Some(fault) => Err(format!("{} {fault}", server.address)),
            None => self.probe(&mut server).await.map(|()| server.hand_over()),
        }
    }

    /// Runs every command of the script on a test key. Returns the names of those that failed, each followed by its
    /// error.
    async fn test_commands(&self, redis: &mut MultiplexedConnection) -> RedisResult<Vec<String>> {
        let key = format!("{}:trial", self.shared.probe_key);
        let mut test = redis::cmd("EVAL");
        test.arg(requirements::TEST_SCRIPT).arg(1).arg(&key).arg(&requirements::TESTED_COMMANDS[..]);
        let failures = test.query_async(redis).await?;
        // The server has now cached the script. This call tests the right to use EVALSHA.
        let mut again = redis::cmd("EVALSHA");
        again.arg(redis::Script::new(requirements::TEST_SCRIPT).get_hash()).arg(1).arg(&key);
        match again.query_async::<Vec<String>>(redis).await {
            Err(error) if !is_unknown_script(&error) => Err(error),
            _ => Ok(failures),
        }
    }

    /// Tests whether the server accepts a write within the timeout. A server without free memory does not, nor does
    /// a replica.
    async fn probe(&self, server: &mut ServerConnection) -> Result<(), String> {
        let mut write = redis::cmd("SET");
        write.arg(&self.shared.probe_key).arg(1).arg("PX").arg(10_000);
        let timer = &self.shared.circuit.timer;
        let fault = match timer.run(Duration::ZERO, pin!(write.query_async(&mut server.redis))).await {
            Some(Ok(())) => return Ok(()),
            Some(Err(error)) => self.describe_refusal(&error),
            None => no_reply_within(timer.timeout()),
        };
        Err(format!("{} {fault}", server.address))
    }

    fn describe_refusal(&self, error: &RedisError) -> String {
        let text = self.shared.discovery.describe(error);
        if error.code() == Some("NOPERM") {
            return format!("{text}; {}", requirements::required_rights(&self.shared.prefix));
        }
        text
    }

    /// Returns when the connection with this number is lost. A call or a probe detects the loss.
    async fn probe_until_lost(&self, generation: u64, mut server: ServerConnection) {
        let mut current = self.watch_generation();
        while timeout(PROBE_INTERVAL, current.wait_for(|&current| current != generation)).await.is_err() {
            if let Err(reason) = self.probe(&mut server).await {
                self.disconnect(generation, &reason);
            }
        }
    }

    /// Connects once, and tests the rights, the writes and the settings that shared quotas need. Returns the server's
    /// address, and the settings that are wrong.
    ///
    /// # Errors
    /// Why Redis cannot be used, without the password.
    pub(crate) async fn check(&self) -> Result<(String, Vec<String>), String> {
        let server = self.connect().await?;
        let address = server.address.to_string();
        self.set_connected(server);
        let faults = self.setting_faults().await;
        let lost = || self.unavailable_reason().unwrap_or_else(|| "the connection was lost".to_owned());
        faults.map(|faults| (address, faults)).map_err(|Unavailable| lost())
    }

    fn current_server(&self) -> Option<(u64, ServerConnection)> {
        let state = self.lock();
        state.server.clone().map(|server| (state.generation, server))
    }

    fn set_connected(&self, server: ServerConnection) -> u64 {
        let address = server.address.clone();
        let mut state = self.lock();
        let is_news = state.is_logged_unavailable || state.generation == 0;
        state.is_logged_unavailable = false;
        state.server = Some(server);
        state.generation += 1;
        state.unavailable_reason = None;
        let generation = state.generation;
        drop(state);
        self.shared.circuit.close(generation);
        if is_news {
            let environment = &self.shared.environment;
            tracing::info!(environment, server = %address, "connected to Redis");
        }
        generation
    }

    /// Closes the connection with this number, unless it is closed already.
    fn disconnect(&self, generation: u64, reason: &str) {
        let mut state = self.lock();
        if state.generation != generation || state.server.take().is_none() {
            return;
        }
        drop(state);
        self.shared.circuit.open();
        self.set_unavailable(reason);
    }

    /// Records the reason, and logs it if it is new or was logged long ago.
    fn set_unavailable(&self, reason: &str) {
        let mut state = self.lock();
        let logged = state.logged_reason.as_ref();
        let is_logged =
            logged.is_some_and(|(old, since)| *old == reason && since.elapsed() < LOG_REPEAT_INTERVAL);
        if !is_logged {
            state.logged_reason = Some((reason.to_owned(), Stopwatch::start()));
            state.is_logged_unavailable = true;
        }
        state.unavailable_reason = Some(reason.to_owned());
        drop(state);
        if !is_logged {
            tracing::warn!(environment = self.shared.environment, reason, "Redis is unavailable");
        }
    }

    fn lock(&self) -> MutexGuard<'_, ConnectionState> {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The settings of the server that are wrong for shared quotas, each with its remedy.
    ///
    /// # Errors
    /// Redis is unavailable.
    pub async fn setting_faults(&self) -> Result<Vec<String>, Unavailable> {
        let (generation, mut server) = self.current_server().ok_or(Unavailable)?;
        let (discovery, timer) = (&self.shared.discovery, &self.shared.circuit.timer);
        let silent = || {
            let reason = no_reply_within(timer.timeout());
            self.disconnect(generation, &format!("{} {reason}", server.address));
            Unavailable
        };
        // Each query has the whole timeout for its reply.
        let info = redis::cmd("INFO");
        let info = timer.run(Duration::ZERO, pin!(info.query_async::<String>(&mut server.redis))).await;
        match info.ok_or_else(silent)? {
            Ok(info) => {
                let mut save = redis::cmd("CONFIG");
                let save = pin!(save.arg("GET").arg("save").query_async::<Vec<String>>(&mut server.redis));
                let save = timer.run(Duration::ZERO, save).await.ok_or_else(silent)?;
                // There is no note about this setting if the user has no right to read it.
                let save = save.ok().and_then(|pair| pair.into_iter().nth(1));
                Ok(requirements::setting_faults(&info, save.as_deref(), discovery.is_cluster()))
            }
            Err(error) if matches!(error.kind(), ErrorKind::Server(_) | ErrorKind::Extension) => {
                let refusal = discovery.describe(&error);
                Ok(vec![format!(
                    "note: its settings cannot be checked, because INFO {refusal}: maxmemory-policy must be noeviction"
                )])
            }
            Err(error) => {
                let reason = discovery.describe(&error);
                self.disconnect(generation, &format!("{} {reason}", server.address));
                Err(Unavailable)
            }
        }
    }
}

fn is_unknown_script(error: &RedisError) -> bool {
    error.kind() == ErrorKind::Server(ServerErrorKind::NoScript)
}

fn no_reply_within(time: Duration) -> String {
    format!("does not answer within {} ms", time.as_millis())
}
