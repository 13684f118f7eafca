//! Finds the server that has a slot, and connects to it.
//!
//! The discovery of the `redis` crate (1.8) cannot replace this module. Its cluster client keeps the map of slots
//! private and connects to every server of the cluster. Its sentinel client queries the sentinels in the configured
//! order. A silent first sentinel thus costs a fixed timeout of one second, which is the whole time limit here. It
//! also needs more rights (`SENTINEL MASTERS`, `ROLE`) and the TLS features of the crate.

use super::tls;
use super::url::{Address, RedisUrl, Topology};
use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, ErrorKind, RedisConnectionInfo, RedisError, RedisResult, Role, Value};
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::ServerName;

/// Minimum time limit for connecting to one server, and for each command sent before the connection is handed over.
const MIN_CONNECT_TIMEOUT: Duration = Duration::from_millis(500);
/// Time limit for one command after that. The limits of calls are shorter.
const MAX_COMMAND_TIME: Duration = Duration::from_secs(20);
/// Delay between the starts of two lookups. The next lookup starts if those before have not led to a connection.
const MAX_STAGGER: Duration = Duration::from_millis(100);
/// Maximum servers of a cluster that are remembered in addition to those of the URL.
const MAX_REMEMBERED_NODES: usize = 16;

/// Looks for the master of one slot.
#[derive(Debug)]
pub(super) struct Discovery {
    url: RedisUrl,
    tls: Option<RedisTls>,
    slot: u16,
    /// Time limit for connecting to one server. The whole discovery gets twice this time.
    connect_timeout: Duration,
    /// Counts discoveries. Each discovery starts with another node. Otherwise a first node that is cut off from the
    /// cluster would report the wrong master every time.
    attempts: AtomicUsize,
    /// Servers that the cluster listed. The servers of the URL may be decommissioned some day.
    remembered_nodes: Mutex<Vec<Address>>,
}

struct RedisTls(TlsConnector);

impl std::fmt::Debug for RedisTls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("RedisTls")
    }
}

/// A connection to one server. It is closed when its last clone is dropped, even with calls in flight.
#[derive(Clone, Debug)]
pub(super) struct ServerConnection {
    pub(super) redis: MultiplexedConnection,
    pub(super) address: Arc<Address>,
    _driver: Arc<AbortOnDrop>,
}

#[derive(Debug)]
struct AbortOnDrop(JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Discovery {
    /// Prepares the discovery of the master of this key's slot. `timeout`: that of calls.
    ///
    /// # Errors
    /// A TLS file of the URL cannot be used.
    pub(super) fn new(url: RedisUrl, key: &str, timeout: Duration) -> anyhow::Result<Self> {
        let tls = url.tls.as_ref().map(tls::connector).transpose()?.map(RedisTls);
        let (attempts, remembered_nodes) = (AtomicUsize::new(0), Mutex::default());
        let connect_timeout = timeout.max(MIN_CONNECT_TIMEOUT);
        Ok(Self { url, tls, slot: slot(key), connect_timeout, attempts, remembered_nodes })
    }

    /// Connects to the master of the slot.
    ///
    /// # Errors
    /// The error of each server that was queried, without the password.
    pub(super) async fn connect(&self) -> Result<ServerConnection, String> {
        let limit = 2 * self.connect_timeout;
        match timeout(limit, self.discover()).await {
            Ok(found) => found.map_err(|reason| self.url.without_password(reason)),
            Err(_) => Err(format!("no server was found within {} ms", limit.as_millis())),
        }
    }

    /// Describes an error with its remedy, without the password. The text follows the server's address.
    pub(super) fn describe(&self, error: &RedisError) -> String {
        let text = match error.code() {
            Some(code) => format!("answers: {code} {}", error.detail().unwrap_or_default()),
            None if error.kind() == ErrorKind::AuthenticationFailed => {
                "refuses the user or password".to_owned()
            }
            None => format!("fails: {error}"),
        };
        self.with_hint(self.url.without_password(text), error.code().unwrap_or_default())
    }

    /// Appends the remedy for an error of this code, if there is one.
    pub(super) fn with_hint(&self, text: String, code: &str) -> String {
        match self.hint(code) {
            Some(hint) => format!("{}: {hint}", text.trim_end_matches(['.', ' '])),
            None => text,
        }
    }

    fn hint(&self, code: &str) -> Option<&'static str> {
        let is_single = matches!(self.url.topology, Topology::Single(_));
        Some(match code {
            "MOVED" | "ASK" | "CROSSSLOT" if is_single => {
                "it is one server of a cluster: the URL must begin with redis+cluster:// or rediss+cluster://"
            }
            "READONLY" if is_single => {
                "the URL must point to the master, or to the sentinels: redis+sentinel://"
            }
            "NOAUTH" => "it requires a password: redis://:password@host or redis://user:password@host",
            _ => return None,
        })
    }

    pub(super) fn is_cluster(&self) -> bool {
        matches!(self.url.topology, Topology::Cluster(_))
    }

    async fn discover(&self) -> Result<ServerConnection, String> {
        match &self.url.topology {
            Topology::Single(address) => self.open(address, &self.url.login).await,
            Topology::Sentinels { nodes, master } => {
                let nodes = self.rotate(nodes.clone());
                first_success(&nodes, self.connect_timeout, |node| {
                    self.connect_through_sentinel(node, master)
                })
                .await
            }
            Topology::Cluster(nodes) => {
                let mut nodes = nodes.clone();
                let remembered = self.remembered_nodes.lock().unwrap_or_else(PoisonError::into_inner).clone();
                nodes.extend(remembered.into_iter().filter(|node| !nodes.contains(node)).collect::<Vec<_>>());
                let nodes = self.rotate(nodes);
                first_success(&nodes, self.connect_timeout, |node| self.connect_through_cluster_node(node))
                    .await
            }
        }
    }

    fn rotate(&self, mut nodes: Vec<Address>) -> Vec<Address> {
        let attempt = self.attempts.fetch_add(1, Ordering::Relaxed);
        let start = attempt % nodes.len().max(1);
        nodes.rotate_left(start);
        nodes
    }

    async fn connect_through_sentinel(&self, node: &Address, name: &str) -> Result<ServerConnection, String> {
        let (host, port) = self.master_address(node, name).await?;
        let mut server = self.open(&Address::Tcp(host, port), &self.url.login).await?;
        match redis::cmd("ROLE").query_async::<Role>(&mut server.redis).await {
            Ok(Role::Primary { .. }) => Ok(server),
            Ok(_) => Err(format!(
                "{} is not a master, although sentinel {node} reports it as the master",
                server.address
            )),
            // The user may not run ROLE. The probe finds out whether the server accepts writes.
            Err(error) if error.code() == Some("NOPERM") => Ok(server),
            Err(error) => Err(format!("{} {}", server.address, self.describe(&error))),
        }
    }

    /// Queries a sentinel for the address of the master with this name.
    async fn master_address(&self, node: &Address, name: &str) -> Result<(String, u16), String> {
        // The password is sent only to a sentinel that requires it. Most sentinels have none.
        let login = RedisConnectionInfo::default().set_skip_set_lib_name();
        let mut sentinel = self.open(node, &login).await?;
        let mut query = redis::cmd("SENTINEL");
        query.arg("GET-MASTER-ADDR-BY-NAME").arg(name);
        let mut address = query.query_async::<Option<(String, u16)>>(&mut sentinel.redis).await;
        if let (Err(error), Some(password)) = (&address, self.url.login.password())
            && error.code() == Some("NOAUTH")
        {
            let mut auth = redis::cmd("AUTH");
            auth.arg(self.url.login.username()).arg(password);
            address = match auth.query_async::<()>(&mut sentinel.redis).await {
                Ok(()) => query.query_async(&mut sentinel.redis).await,
                Err(error) => Err(error),
            };
        }
        let address = address.map_err(|error| format!("sentinel {node} {}", self.describe(&error)))?;
        address.ok_or_else(|| format!("sentinel {node} has no master named {name}"))
    }

    async fn connect_through_cluster_node(&self, node: &Address) -> Result<ServerConnection, String> {
        let mut server = self.open(node, &self.url.login).await?;
        let ranges =
            redis::cmd("CLUSTER").arg("SLOTS").query_async::<Vec<Vec<Value>>>(&mut server.redis).await;
        let ranges = ranges.map_err(|error| format!("{node} {}", self.describe(&error)))?;
        let master = master_of_slot(&ranges, self.slot, node);
        let master = master.ok_or_else(|| format!("{node}: no server has slot {}", self.slot))?;
        let mut all: Vec<_> = ranges.iter().flat_map(|range| servers_of_range(range, node)).collect();
        all.dedup();
        all.truncate(MAX_REMEMBERED_NODES);
        *self.remembered_nodes.lock().unwrap_or_else(PoisonError::into_inner) = all;
        if master == *node { Ok(server) } else { self.open(&master, &self.url.login).await }
    }

    async fn open(&self, address: &Address, login: &RedisConnectionInfo) -> Result<ServerConnection, String> {
        match timeout(self.connect_timeout, self.open_untimed(address, login)).await {
            Ok(opened) => opened.map_err(|error| format!("{address} {}", self.describe(&error))),
            Err(_) => {
                Err(format!("{address} does not answer within {} ms", self.connect_timeout.as_millis()))
            }
        }
    }

    async fn open_untimed(
        &self,
        address: &Address,
        login: &RedisConnectionInfo,
    ) -> RedisResult<ServerConnection> {
        let (host, port) = match address {
            Address::Unix(path) => {
                return self.log_in(UnixStream::connect(path).await?, login, address).await;
            }
            Address::Tcp(host, port) => (host, *port),
        };
        let tcp = TcpStream::connect((host.as_str(), port)).await?;
        tcp.set_nodelay(true)?;
        let Some(RedisTls(connector)) = &self.tls else { return self.log_in(tcp, login, address).await };
        let name = ServerName::try_from(host.clone()).map_err(io::Error::other)?;
        self.log_in(connector.connect(name, tcp).await?, login, address).await
    }

    /// Authenticates on a new stream.
    async fn log_in<S>(
        &self,
        stream: S,
        login: &RedisConnectionInfo,
        address: &Address,
    ) -> RedisResult<ServerConnection>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let config = AsyncConnectionConfig::new().set_response_timeout(Some(self.connect_timeout));
        let (redis, driver) = MultiplexedConnection::new_with_config(login, stream, config).await?;
        let driver = Arc::new(AbortOnDrop(tokio::spawn(driver)));
        Ok(ServerConnection { redis, address: Arc::new(address.clone()), _driver: driver })
    }
}

impl ServerConnection {
    /// Removes the time limit of single commands, because calls have shorter limits of their own.
    pub(super) fn hand_over(mut self) -> Self {
        self.redis.set_response_timeout(MAX_COMMAND_TIME);
        self
    }
}

/// Runs `connect` for all nodes, with a short delay between the starts, and returns the first connection. A silent
/// node delays the others only by that time.
async fn first_success<'a, F>(
    nodes: &'a [Address],
    connect_timeout: Duration,
    connect: impl Fn(&'a Address) -> F,
) -> Result<ServerConnection, String>
where
    F: Future<Output = Result<ServerConnection, String>>,
{
    let stagger = MAX_STAGGER.min(connect_timeout / u32::try_from(nodes.len().max(1)).unwrap_or(1));
    let attempts = (0..).zip(nodes).map(|(position, node)| {
        let attempt = connect(node);
        async move {
            sleep(stagger * position).await;
            attempt.await
        }
    });
    let mut attempts: FuturesUnordered<_> = attempts.collect();
    let mut reasons: Vec<String> = Vec::new();
    while let Some(result) = attempts.next().await {
        match result {
            Ok(connection) => return Ok(connection),
            Err(reason) if reasons.contains(&reason) => {}
            Err(reason) => reasons.push(reason),
        }
    }
    reasons.sort_unstable();
    Err(reasons.join("; "))
}

/// The master of a slot according to the reply to `CLUSTER SLOTS`: ranges of slots, each with its master and replicas.
fn master_of_slot(ranges: &[Vec<Value>], slot: u16, asked: &Address) -> Option<Address> {
    let range = ranges.iter().find(|range| {
        let bound = |index: usize| match range.get(index) {
            Some(Value::Int(bound)) => *bound,
            _ => -1,
        };
        (bound(0)..=bound(1)).contains(&i64::from(slot))
    })?;
    servers_of_range(range, asked).next()
}

fn servers_of_range<'a>(range: &'a [Value], asked: &'a Address) -> impl Iterator<Item = Address> + 'a {
    range.iter().skip(2).filter_map(move |server| {
        let Value::Array(server) = server else { return None };
        let Some(Value::Int(port)) = server.get(1) else { return None };
        let port = u16::try_from(*port).ok().filter(|&port| port > 0)?;
        let host = match (server.first(), asked) {
            (Some(Value::BulkString(host)), _) if !host.is_empty() && host != b"?" => {
                String::from_utf8(host.clone()).ok()?
            }
            // A server that reports no host has the host of the current connection.
            (_, Address::Tcp(host, _)) => host.clone(),
            (_, Address::Unix(_)) => return None,
        };
        Some(Address::Tcp(host, port))
    })
}

/// The part of a key that decides its slot.
pub(super) fn hash_tag(key: &str) -> &str {
    let tag = key.split_once('{').and_then(|(_, rest)| rest.split_once('}')).map(|(tag, _)| tag);
    tag.filter(|tag| !tag.is_empty()).unwrap_or(key)
}

/// The slot of a key, out of 16384: CRC-16/XMODEM of the hash tag.
fn slot(key: &str) -> u16 {
    let crc = hash_tag(key).bytes().fold(0_u16, |crc, byte| {
        (0..8)
            .fold(crc ^ u16::from(byte) << 8, |crc, _| crc << 1 ^ if crc & 0x8000 == 0 { 0 } else { 0x1021 })
    });
    crc % 16_384
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_has_the_slot_that_the_server_computes() {
        // From CLUSTER KEYSLOT.
        for (key, expected) in [
            ("123456789", 0x31c3),
            ("foo", 12182),
            ("bar", 5061),
            ("p:{foo}:q", 12182),
            ("p:{foo}{bar}:q", 12182),
            ("{}foo", 9500),
            ("", 0),
            ("a}{b}c", 3300),
        ] {
            assert_eq!(slot(key), expected, "{key}");
        }
        assert_eq!(hash_tag("p:{}:q"), "p:{}:q");
        assert_eq!(hash_tag("p:{a"), "p:{a");
    }

    #[test]
    fn the_master_of_a_slot_is_found() {
        let server = |host: &str, port: i64| {
            Value::Array(vec![
                Value::BulkString(host.into()),
                Value::Int(port),
                Value::BulkString("id".into()),
            ])
        };
        let ranges = vec![
            vec![Value::Int(0), Value::Int(100), server("a", 1), server("b", 2)],
            vec![Value::Int(101), Value::Int(16_383), Value::Array(vec![Value::Nil, Value::Int(3)])],
        ];
        let asked = Address::Tcp("asked".to_owned(), 9);
        let master = |slot: u16| master_of_slot(&ranges, slot, &asked);
        assert_eq!(master(100), Some(Address::Tcp("a".to_owned(), 1)));
        assert_eq!(master(101), Some(Address::Tcp("asked".to_owned(), 3)));
        assert_eq!(master_of_slot(&ranges[..1], 101, &asked), None);
        assert_eq!(master_of_slot(&[vec![Value::Nil]], 0, &asked), None);
    }
}
