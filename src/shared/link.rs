//! The connection to Redis. It is this module's own: a call either is answered within its deadline or finds the
//! connection gone at once.
//!
//! Libraries that reconnect by themselves keep calls waiting meanwhile, far past their timeouts. So one task
//! connects, and calls only ever see a connection that works. The first call that fails takes it away from all
//! others, those under way too; the task comes back with a new one as soon as the server takes writes in time.

use super::{Answer, Command, SCRIPT};
use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Client, ErrorKind, RedisError, ServerErrorKind};
use sha1_smol::Sha1;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

/// A call that is not answered within this time has failed.
pub const DEADLINE: Duration = Duration::from_millis(25);
/// How long it may take to connect.
const CONNECT: Duration = Duration::from_secs(1);
/// After a failure the server is looked at again so much later.
const RETRY: Duration = Duration::from_millis(200);
/// How often a server that nobody calls is looked at.
const LOOK: Duration = Duration::from_millis(500);

/// Redis cannot be asked now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Away;

/// The way to Redis, shared by all who call it.
#[derive(Clone, Debug)]
pub struct Link {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    client: Client,
    /// What is written to see whether that is possible.
    probe: String,
    sha: String,
    state: Mutex<State>,
    /// The number of the connection that works; 0: there is none.
    up: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct State {
    connection: Option<MultiplexedConnection>,
    connected: u64,
    trouble: Option<String>,
}

impl Link {
    /// To the server at this URL that has the slot of `slot_key`; nothing is connected before `run`. `prefix` begins the
    /// name of every key.
    ///
    /// # Errors
    /// It is no URL of a Redis server.
    pub fn new(url: &str, prefix: &str, slot_key: &str) -> redis::RedisResult<Self> {
        let state = State { trouble: Some("it was not reached yet".to_owned()), ..State::default() };
        let inner = Inner {
            client: Client::open(url)?,
            probe: format!("{prefix}:{{{}}}:probe", hash_tag(slot_key)),
            sha: Sha1::from(SCRIPT).digest().to_string(),
            state: Mutex::new(state),
            up: watch::channel(0).0,
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Runs a command of the script: within the deadline, and at once if Redis is away.
    ///
    /// # Errors
    /// Redis is away. It may have run the command, or may still run it.
    pub async fn call(&self, keys: &[String; 3], command: &Command) -> Result<Answer, Away> {
        let mut up = self.inner.up.subscribe();
        let (number, connection) = self.connection().ok_or(Away)?;
        let gone = up.wait_for(|&now| now != number);
        let numbers = tokio::select! {
            biased;
            numbers = timeout(DEADLINE, self.evaluate(connection, keys, command)) => numbers,
            _ = gone => return Err(Away),
        };
        let answer = match numbers {
            Ok(Ok(numbers)) => {
                command.answer(&numbers).ok_or_else(|| "it answers in another way than the script".to_owned())
            }
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err(format!("it does not answer within {} ms", DEADLINE.as_millis())),
        };
        answer.map_err(|trouble| {
            self.lose(number, trouble);
            Away
        })
    }

    async fn evaluate(
        &self,
        mut connection: MultiplexedConnection,
        keys: &[String; 3],
        command: &Command,
    ) -> redis::RedisResult<Vec<i64>> {
        let call = |how: &str, script: &str| {
            let mut call = redis::cmd(how);
            call.arg(script).arg(keys.len()).arg(&keys[..]).arg(&command.arguments);
            call
        };
        match call("EVALSHA", &self.inner.sha).query_async(&mut connection).await {
            // Restarted, failed over, or its scripts were flushed.
            Err(error) if is_unknown_script(&error) => {
                call("EVAL", SCRIPT).query_async(&mut connection).await
            }
            answered => answered,
        }
    }

    /// What keeps Redis away; `None`: nothing.
    pub fn trouble(&self) -> Option<String> {
        let state = self.lock();
        state.trouble.clone()
    }

    /// Tells the number of the connection that works, 0 while there is none: each loss shows.
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.inner.up.subscribe()
    }

    /// Connects, and connects anew whenever that is lost; runs for ever.
    pub async fn run(self) {
        loop {
            match self.connect().await {
                Ok(connection) => {
                    let number = self.found(connection.clone());
                    self.stay(number, connection).await;
                }
                Err(error) => self.note(error.to_string()),
            }
            sleep(RETRY).await;
        }
    }

    /// A connection to a server that takes writes in time.
    async fn connect(&self) -> redis::RedisResult<MultiplexedConnection> {
        let config =
            AsyncConnectionConfig::new().set_connection_timeout(Some(CONNECT)).set_response_timeout(None);
        let connect = self.inner.client.get_multiplexed_async_connection_with_config(&config);
        // Connecting says hello, which a frozen server does not answer.
        let mut connection = timeout(CONNECT, connect).await.map_err(late)??;
        self.look(&mut connection).await?;
        Ok(connection)
    }

    /// Whether the server takes a write within the deadline: not one that is full, or a replica by now.
    async fn look(&self, connection: &mut MultiplexedConnection) -> redis::RedisResult<()> {
        let mut write = redis::cmd("SET");
        write.arg(&self.inner.probe).arg(1).arg("PX").arg(10_000);
        timeout(DEADLINE, write.query_async(connection)).await.map_err(late)?
    }

    /// Returns when the connection of this number is lost, by a call or while nobody calls.
    async fn stay(&self, number: u64, mut connection: MultiplexedConnection) {
        let mut up = self.inner.up.subscribe();
        while timeout(LOOK, up.wait_for(|&now| now != number)).await.is_err() {
            if let Err(error) = self.look(&mut connection).await {
                self.lose(number, error.to_string());
            }
        }
    }

    fn connection(&self) -> Option<(u64, MultiplexedConnection)> {
        let state = self.lock();
        state.connection.clone().map(|connection| (state.connected, connection))
    }

    fn found(&self, connection: MultiplexedConnection) -> u64 {
        let mut state = self.lock();
        state.connection = Some(connection);
        state.connected += 1;
        state.trouble = None;
        let number = state.connected;
        drop(state);
        self.inner.up.send_replace(number);
        tracing::info!("Redis is reached: quotas are shared");
        number
    }

    fn lose(&self, number: u64, trouble: String) {
        let mut state = self.lock();
        if state.connected != number || state.connection.take().is_none() {
            return;
        }
        drop(state);
        self.inner.up.send_replace(0);
        self.note(trouble);
    }

    fn note(&self, trouble: String) {
        let mut state = self.lock();
        let is_news = state.trouble.as_ref() != Some(&trouble);
        state.trouble = Some(trouble.clone());
        drop(state);
        if is_news {
            tracing::warn!(trouble, "Redis is away");
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.inner.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is wrong with the server's settings, each with what would mend it.
    ///
    /// # Errors
    /// Redis is away.
    pub async fn faults(&self) -> Result<Vec<String>, Away> {
        let (number, mut connection) = self.connection().ok_or(Away)?;
        let info = timeout(CONNECT, redis::cmd("INFO").query_async::<String>(&mut connection)).await;
        match info.map_err(late).and_then(|info| info) {
            Ok(info) => Ok(faults(&info)),
            Err(error) => {
                self.lose(number, error.to_string());
                Err(Away)
            }
        }
    }
}

/// What of a key decides its slot.
fn hash_tag(key: &str) -> &str {
    let tag = key.split_once('{').and_then(|(_, rest)| rest.split_once('}')).map(|(tag, _)| tag);
    tag.filter(|tag| !tag.is_empty()).unwrap_or(key)
}

fn is_unknown_script(error: &RedisError) -> bool {
    error.kind() == ErrorKind::Server(ServerErrorKind::NoScript)
}

fn late<E>(_: E) -> RedisError {
    (ErrorKind::Io, "it does not answer in time").into()
}

/// Looks through what `INFO` tells.
fn faults(info: &str) -> Vec<String> {
    let field = |name: &str| {
        info.lines()
            .find_map(|line| line.trim_end().strip_prefix(name)?.strip_prefix(':'))
            .unwrap_or_default()
    };
    let mut faults = Vec::new();
    let version = field("redis_version");
    let mut parts = version.split('.').map(|part| part.parse::<u32>().unwrap_or(0));
    let (major, minor) = (parts.next().unwrap_or(0), parts.next().unwrap_or(0));
    if (major, minor) < (6, 2) {
        faults.push(format!("it is Redis {version}: quotas need 6.2 or newer, or Valkey"));
    }
    let policy = field("maxmemory_policy");
    if policy != "noeviction" {
        faults.push(format!(
            "its maxmemory-policy is {policy}: a quota that is evicted is a fresh one; set it to noeviction"
        ));
    }
    faults
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_that_lose_counts_are_told() {
        let told = |version: &str, policy: &str| {
            faults(&format!("# Server\r\nredis_version:{version}\r\nmaxmemory_policy:{policy}\r\n")).len()
        };
        for (version, policy, count) in [
            ("7.0.15", "noeviction", 0),
            ("6.2.0", "noeviction", 0),
            ("10.1", "noeviction", 0),
            ("6.0.16", "noeviction", 1),
            ("7.2.4", "allkeys-lru", 1),
            ("5.0", "volatile-ttl", 2),
        ] {
            assert_eq!(told(version, policy), count, "{version} {policy}");
        }
    }
}
