//! The connection to Redis. It is this module's own: a call either is answered within its deadline or finds the
//! connection gone at once.
//!
//! Libraries that reconnect by themselves keep calls waiting meanwhile, far past their timeouts. So one task
//! connects, and calls only ever see a connection that works. The first call that fails takes it away from all
//! others, those under way too; the task comes back with a new one as soon as the server takes writes in time.
//!
//! All keys of an environment are in one slot, so one connection is enough for it in a cluster also: to the master of
//! that slot. Where the slot moves, or another server becomes master, the connection is lost and looked for anew.

mod faults;
mod find;
mod target;
mod tls;

use super::{SCRIPT, ScriptCommand, ScriptReply};
use crate::clock::Stopwatch;
use find::{Finder, ServerConnection};
use redis::aio::MultiplexedConnection;
use redis::{ErrorKind, RedisError, RedisResult, ServerErrorKind};
use sha1_smol::Sha1;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use target::Target;
use tokio::sync::{Semaphore, SemaphorePermit, mpsc, oneshot, watch};
use tokio::time::{sleep, timeout};

/// A call that is not answered within this time has failed.
pub const CALL_DEADLINE: Duration = Duration::from_millis(25);
/// And so much more for each argument: a node that joins with a thousand reservations open has some twenty thousand, which
/// take the server 25 ms. For one reservation it is nothing.
const PER_ARGUMENT: Duration = Duration::from_micros(4);
/// Then it gets so much longer: where the machine is too busy, the server may have had no time yet.
const SECOND_LOOK: Duration = Duration::from_millis(10);
/// And at the latest after this time, though others are answered.
const LONGEST: Duration = Duration::from_millis(200);
/// More calls than this are not under way at once on one connection. Redis takes all that it finds of each before it
/// answers any, so that with many nodes none would be answered in time.
const MOST_AT_ONCE: usize = 16;
/// After a failure the server is looked for again so much later.
const RETRY: Duration = Duration::from_millis(200);
/// How often a server that nobody calls is looked at.
const LOOK: Duration = Duration::from_millis(500);
/// A connection that has lasted for so long is replaced at once. One that is lost sooner may be lost again: the pauses
/// before the next ones grow.
const STABLE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(1500);
/// The same trouble is logged again after this time.
const REMIND: Duration = Duration::from_mins(1);

/// Redis cannot be asked now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unavailable;

/// The way to the Redis server that has the keys of one environment, shared by all who call it.
#[derive(Clone, Debug)]
pub struct FailFastConnection {
    inner: Arc<Inner>,
}

/// A place among the calls that are under way on one connection.
#[derive(Debug)]
pub struct CallPermit<'a> {
    link: &'a FailFastConnection,
    number: u64,
    connection: ServerConnection,
    _place: SemaphorePermit<'a>,
}

impl CallPermit<'_> {
    /// Runs a command of the script: within the deadline, and at once if Redis is away.
    ///
    /// # Errors
    /// Redis is away. It may have run the command, or may still run it.
    pub async fn call(self, keys: &[String; 3], command: &ScriptCommand) -> Result<ScriptReply, Unavailable> {
        self.link.call_at((self.number, self.connection), keys, command).await
    }
}

#[derive(Debug)]
struct Inner {
    finder: Finder,
    /// For the log: what decides the slot, which is the environment's name.
    environment: String,
    prefix: String,
    /// What is written to see whether that is possible.
    probe: String,
    sha: String,
    state: Mutex<State>,
    turns: Semaphore,
    /// Counts answers.
    answered: AtomicU64,
    /// Those who read answers are asked by this to look once more.
    readers: mpsc::UnboundedSender<oneshot::Sender<()>>,
    questions: Mutex<Option<mpsc::UnboundedReceiver<oneshot::Sender<()>>>>,
    /// The number of the connection that works; 0: there is none.
    up: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct State {
    connection: Option<ServerConnection>,
    connected: u64,
    trouble: Option<String>,
    /// The last trouble that was logged, and when.
    logged: Option<(String, Stopwatch)>,
    /// Whether the log's last word is that it is away.
    is_away_in_log: bool,
}

/// Whether this can be a URL of Redis. No file that it names is looked at.
///
/// # Errors
/// What is wrong with it, and which forms there are, without the password.
pub fn check_url(url: &str) -> Result<(), String> {
    Target::parse(url).map(|_| ())
}

impl FailFastConnection {
    /// To the server at this URL that has the slot of `slot_key`, a key of the environment. `prefix` begins the name of
    /// every key. Nothing is connected before `run`.
    ///
    /// # Errors
    /// It is no URL of Redis, or a file that it names is no good. The password is not told.
    pub fn new(url: &str, prefix: &str, slot_key: &str) -> anyhow::Result<Self> {
        let target = Target::parse(url).map_err(anyhow::Error::msg)?;
        let environment = find::hash_tag(slot_key).to_owned();
        let state = State { trouble: Some("it was not reached yet".to_owned()), ..State::default() };
        let (readers, questions) = mpsc::unbounded_channel();
        let inner = Inner {
            finder: Finder::new(target, slot_key)?,
            probe: format!("{prefix}:{{{environment}}}:probe"),
            environment,
            prefix: prefix.to_owned(),
            sha: Sha1::from(SCRIPT).digest().to_string(),
            state: Mutex::new(state),
            turns: Semaphore::new(MOST_AT_ONCE),
            answered: AtomicU64::new(0),
            readers,
            questions: Mutex::new(Some(questions)),
            up: watch::channel(0).0,
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Waits for a place among the calls that are under way.
    ///
    /// # Errors
    /// Redis is away, or went away meanwhile.
    pub async fn permit(&self) -> Result<CallPermit<'_>, Unavailable> {
        let mut up = self.inner.up.subscribe();
        let (number, connection) = self.connection().ok_or(Unavailable)?;
        tokio::select! {
            biased;
            place = self.inner.turns.acquire() => {
                let place = place.map_err(|_| Unavailable)?;
                Ok(CallPermit { link: self, number, connection, _place: place })
            }
            _ = up.wait_for(|&now| now != number) => Err(Unavailable),
        }
    }

    /// Waits for its turn, and runs a command of the script.
    ///
    /// # Errors
    /// Redis is away. It may have run the command, or may still run it.
    pub async fn call(
        &self,
        keys: &[String; 3],
        command: &ScriptCommand,
    ) -> Result<ScriptReply, Unavailable> {
        self.permit().await?.call(keys, command).await
    }

    async fn call_at(
        &self,
        (number, connection): (u64, ServerConnection),
        keys: &[String; 3],
        command: &ScriptCommand,
    ) -> Result<ScriptReply, Unavailable> {
        let mut up = self.inner.up.subscribe();
        let address = connection.address.clone();
        let count = u32::try_from(command.arguments.len()).unwrap_or(u32::MAX);
        let deadline = CALL_DEADLINE.saturating_add(PER_ARGUMENT.saturating_mul(count));
        let gone = up.wait_for(|&now| now != number);
        let numbers = tokio::select! {
            biased;
            numbers = self.in_time(deadline, self.evaluate(connection.redis, keys, command)) => numbers,
            _ = gone => return Err(Unavailable),
        };
        let answer = match numbers {
            Some(Ok(numbers)) => command
                .parse_reply(&numbers)
                .ok_or_else(|| "answers in another way than the script".to_owned()),
            Some(Err(error)) => Err(self.inner.finder.told(&error)),
            None => Err(late(deadline)),
        };
        answer.map_err(|trouble| {
            self.lose(number, &format!("{address} {trouble}"));
            Unavailable
        })
    }

    /// Waits as long as the server answers others, who were there before. `None`: it does not, or too slowly.
    async fn in_time<T>(&self, deadline: Duration, call: impl Future<Output = T>) -> Option<T> {
        let answered = || self.inner.answered.load(Ordering::Relaxed);
        let (mut call, begun, mut before) = (pin!(call), Stopwatch::start(), answered());
        let longest = LONGEST.max(2 * deadline);
        loop {
            let in_time = async { timeout(deadline, call.as_mut()).await.ok() };
            let answer = match in_time.await {
                None => {
                    self.recheck_before_timeout(call.as_mut(), longest.saturating_sub(begun.elapsed())).await
                }
                answer => answer,
            };
            if answer.is_some() {
                self.inner.answered.fetch_add(1, Ordering::Relaxed);
                return answer;
            }
            let now = answered();
            if now == before || begun.elapsed() >= longest {
                return None;
            }
            before = now;
        }
    }

    /// On a machine that is too busy the answer may be there, and nobody has come to read it: whoever reads answers is
    /// asked to look once more before the server is blamed.
    async fn recheck_before_timeout<T>(
        &self,
        mut call: Pin<&mut impl Future<Output = T>>,
        longest: Duration,
    ) -> Option<T> {
        let (asks, has_looked) = oneshot::channel();
        // Where nobody reads answers there is no connection either.
        self.inner.readers.send(asks).ok()?;
        tokio::select! {
            biased;
            answer = call.as_mut() => Some(answer),
            _ = timeout(longest, has_looked) => timeout(Duration::ZERO, call).await.ok(),
        }
    }

    async fn evaluate(
        &self,
        mut redis: MultiplexedConnection,
        keys: &[String; 3],
        command: &ScriptCommand,
    ) -> RedisResult<Vec<i64>> {
        let call = |how: &str, script: &str| {
            let mut call = redis::cmd(how);
            call.arg(script).arg(keys.len()).arg(&keys[..]).arg(&command.arguments);
            call
        };
        match call("EVALSHA", &self.inner.sha).query_async(&mut redis).await {
            // Restarted, failed over, or its scripts were flushed.
            Err(error) if is_unknown_script(&error) => call("EVAL", SCRIPT).query_async(&mut redis).await,
            answered => answered,
        }
    }

    /// What keeps Redis away; `None`: nothing.
    pub fn unavailable_reason(&self) -> Option<String> {
        let state = self.lock();
        state.trouble.clone()
    }

    /// Tells the number of the connection that works, 0 while there is none: each loss shows.
    pub fn watch_generation(&self) -> watch::Receiver<u64> {
        self.inner.up.subscribe()
    }

    /// Connects, and connects anew whenever that is lost; runs for ever, in the runtime that reads the answers.
    pub async fn run(self) {
        let questions = self.inner.questions.lock().unwrap_or_else(PoisonError::into_inner).take();
        let look = async {
            let Some(mut questions) = questions else { return };
            while let Some(asks) = questions.recv().await {
                // Sleeping lets the runtime read what has come.
                sleep(SECOND_LOOK).await;
                // Whoever asked may have gone.
                let _ = asks.send(());
            }
        };
        tokio::join!(look, self.keep_connected());
    }

    async fn keep_connected(&self) {
        let mut pause = Duration::ZERO;
        loop {
            match self.connect().await {
                Ok(connection) => {
                    let begun = Stopwatch::start();
                    let number = self.found(connection.clone());
                    self.stay(number, connection).await;
                    if begun.elapsed() >= STABLE {
                        pause = Duration::ZERO;
                    }
                    sleep(pause).await;
                    pause = (pause * 2).clamp(RETRY, LONGEST_PAUSE);
                }
                Err(trouble) => {
                    self.note(&trouble);
                    sleep(RETRY).await;
                }
            }
        }
    }

    /// A connection to a server that lets us do what is needed, and takes writes in time.
    async fn connect(&self) -> Result<ServerConnection, String> {
        let mut connection = self.inner.finder.connect().await?;
        let trouble = match self.attempt(&mut connection.redis).await {
            Ok(failed) => {
                let code = failed.get(1).and_then(|says| says.split(' ').next()).unwrap_or_default();
                let trouble = faults::trial(&failed, &self.inner.prefix);
                trouble.map(|trouble| self.inner.finder.with_hint(trouble, code))
            }
            Err(error) => Some(self.refused(&error)),
        };
        match trouble {
            Some(trouble) => Err(format!("{} {trouble}", connection.address)),
            None => self.look(&mut connection).await.map(|()| connection),
        }
    }

    /// Tries what the script does; returns the commands that failed, each with what was said.
    async fn attempt(&self, redis: &mut MultiplexedConnection) -> RedisResult<Vec<String>> {
        let key = format!("{}:trial", self.inner.probe);
        let mut trial = redis::cmd("EVAL");
        trial.arg(faults::TRIAL).arg(1).arg(&key).arg(&faults::TRIED[..]);
        let failed = trial.query_async(redis).await?;
        // Having been sent, it has a name now.
        let mut again = redis::cmd("EVALSHA");
        again.arg(Sha1::from(faults::TRIAL).digest().to_string()).arg(1).arg(&key);
        match again.query_async::<Vec<String>>(redis).await {
            Err(error) if !is_unknown_script(&error) => Err(error),
            _ => Ok(failed),
        }
    }

    /// Whether the server takes a write within the deadline: not one that is full, or a replica by now.
    async fn look(&self, connection: &mut ServerConnection) -> Result<(), String> {
        let mut write = redis::cmd("SET");
        write.arg(&self.inner.probe).arg(1).arg("PX").arg(10_000);
        let trouble = match self.in_time(CALL_DEADLINE, write.query_async(&mut connection.redis)).await {
            Some(Ok(())) => return Ok(()),
            Some(Err(error)) => self.refused(&error),
            None => late(CALL_DEADLINE),
        };
        Err(format!("{} {trouble}", connection.address))
    }

    fn refused(&self, error: &RedisError) -> String {
        let told = self.inner.finder.told(error);
        if error.code() == Some("NOPERM") {
            return format!("{told}; {}", faults::rights(&self.inner.prefix));
        }
        told
    }

    /// Returns when the connection of this number is lost, by a call or while nobody calls.
    async fn stay(&self, number: u64, mut connection: ServerConnection) {
        let mut up = self.inner.up.subscribe();
        while timeout(LOOK, up.wait_for(|&now| now != number)).await.is_err() {
            if let Err(trouble) = self.look(&mut connection).await {
                self.lose(number, &trouble);
            }
        }
    }

    fn connection(&self) -> Option<(u64, ServerConnection)> {
        let state = self.lock();
        state.connection.clone().map(|connection| (state.connected, connection))
    }

    fn found(&self, connection: ServerConnection) -> u64 {
        let address = connection.address.clone();
        let mut state = self.lock();
        let is_news = state.is_away_in_log || state.connected == 0;
        state.is_away_in_log = false;
        state.connection = Some(connection);
        state.connected += 1;
        state.trouble = None;
        let number = state.connected;
        drop(state);
        self.inner.up.send_replace(number);
        if is_news {
            let environment = &self.inner.environment;
            tracing::info!(environment, server = %address, "Redis is reached: quotas are shared");
        }
        number
    }

    fn lose(&self, number: u64, trouble: &str) {
        let mut state = self.lock();
        if state.connected != number || state.connection.take().is_none() {
            return;
        }
        drop(state);
        self.inner.up.send_replace(0);
        self.note(trouble);
    }

    fn note(&self, trouble: &str) {
        let mut state = self.lock();
        let is_known =
            state.logged.as_ref().is_some_and(|(old, at)| *old == trouble && at.elapsed() < REMIND);
        if !is_known {
            state.logged = Some((trouble.to_owned(), Stopwatch::start()));
            state.is_away_in_log = true;
        }
        state.trouble = Some(trouble.to_owned());
        drop(state);
        if !is_known {
            tracing::warn!(environment = self.inner.environment, trouble, "Redis is away");
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.inner.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is wrong with the server's settings, each with what would mend it.
    ///
    /// # Errors
    /// Redis is away.
    pub async fn setting_faults(&self) -> Result<Vec<String>, Unavailable> {
        let (number, mut connection) = self.connection().ok_or(Unavailable)?;
        let info = redis::cmd("INFO").query_async::<String>(&mut connection.redis).await;
        let mut save = redis::cmd("CONFIG");
        let save = save.arg("GET").arg("save").query_async::<Vec<String>>(&mut connection.redis).await;
        match info {
            Ok(info) => {
                // Who may not read the setting is not told of it.
                let save = save.ok().and_then(|pair| pair.into_iter().nth(1));
                Ok(faults::settings(&info, save.as_deref(), self.inner.finder.is_cluster()))
            }
            Err(error) if matches!(error.kind(), ErrorKind::Server(_) | ErrorKind::Extension) => {
                let told = self.inner.finder.told(&error);
                Ok(vec![format!(
                    "note: its settings are not known, as INFO {told}: maxmemory-policy has to be noeviction"
                )])
            }
            Err(error) => {
                let told = self.inner.finder.told(&error);
                self.lose(number, &format!("{} {told}", connection.address));
                Err(Unavailable)
            }
        }
    }
}

fn is_unknown_script(error: &RedisError) -> bool {
    error.kind() == ErrorKind::Server(ServerErrorKind::NoScript)
}

fn late(deadline: Duration) -> String {
    format!("does not answer within {} ms", deadline.as_millis())
}
