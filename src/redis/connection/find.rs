//! Finds the server that has a slot, and connects to it.

use super::target::{Address, Place, Target};
use super::tls;
use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, ErrorKind, RedisConnectionInfo, RedisError, RedisResult, Value};
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

/// How long it may take to connect to one server, and to ask it something then.
pub(super) const CONNECT: Duration = Duration::from_millis(500);
/// How long all of it may take.
const LONGEST: Duration = Duration::from_secs(1);
/// The next of several servers is asked so much later, if those before have led nowhere by then.
const STAGGER: Duration = Duration::from_millis(100);
/// Servers that a cluster has named are remembered up to this number.
const MOST_SEEN: usize = 16;

/// Looks for the server of one slot, and remembers where else it may be asked for.
#[derive(Debug)]
pub(super) struct Finder {
    target: Target,
    tls: Option<Tls>,
    slot: u16,
    /// Who is asked first is another one each time: one that is cut off from the others would name the wrong server for ever.
    turn: AtomicUsize,
    /// Further servers that the cluster has named: those of the URL may be gone one day.
    seen: Mutex<Vec<Address>>,
}

struct Tls(TlsConnector);

impl std::fmt::Debug for Tls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Tls")
    }
}

/// A connection to one server. It is closed when its last clone is gone, whatever is under way.
#[derive(Clone, Debug)]
pub(super) struct ServerConnection {
    pub(super) redis: MultiplexedConnection,
    pub(super) address: Arc<Address>,
    _driver: Arc<Driver>,
}

#[derive(Debug)]
struct Driver(JoinHandle<()>);

impl Drop for Driver {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Finder {
    /// For the slot of this key.
    pub(super) fn new(target: Target, key: &str) -> anyhow::Result<Self> {
        let tls = target.tls.as_ref().map(tls::connector).transpose()?.map(Tls);
        Ok(Self { target, tls, slot: slot(key), turn: AtomicUsize::new(0), seen: Mutex::default() })
    }

    /// Connects to the server that has the slot.
    ///
    /// # Errors
    /// What keeps that from happening, without the password.
    pub(super) async fn connect(&self) -> Result<ServerConnection, String> {
        match timeout(LONGEST, self.find()).await {
            Ok(found) => found.map_err(|trouble| self.target.without_password(trouble)),
            Err(_) => Err(format!("no server was found within {} ms", LONGEST.as_millis())),
        }
    }

    /// What has gone wrong, in words: with what would mend it, without the password.
    pub(super) fn told(&self, error: &RedisError) -> String {
        let text = match error.code() {
            Some(code) => format!("answers: {code} {}", error.detail().unwrap_or_default()),
            None if error.kind() == ErrorKind::AuthenticationFailed => {
                "refuses the user or password".to_owned()
            }
            None => format!("fails: {error}"),
        };
        self.with_hint(self.target.without_password(text), error.code().unwrap_or_default())
    }

    /// Adds what mends an error of this code.
    pub(super) fn with_hint(&self, text: String, code: &str) -> String {
        match self.hint(code) {
            Some(hint) => format!("{}: {hint}", text.trim_end_matches(['.', ' '])),
            None => text,
        }
    }

    fn hint(&self, code: &str) -> Option<&'static str> {
        let is_one = matches!(self.target.place, Place::One(_));
        Some(match code {
            "MOVED" | "ASK" | "CROSSSLOT" if is_one => {
                "it is one server of a cluster, for which the URL begins with redis+cluster:// or rediss+cluster://"
            }
            "READONLY" if is_one => {
                "the URL has to lead to the master, or to the sentinels: redis+sentinel://"
            }
            "NOAUTH" => "it wants a password: redis://:password@host or redis://user:password@host",
            _ => return None,
        })
    }

    pub(super) fn is_cluster(&self) -> bool {
        matches!(self.target.place, Place::Cluster(_))
    }

    async fn find(&self) -> Result<ServerConnection, String> {
        match &self.target.place {
            Place::One(address) => self.open(address, &self.target.login).await,
            Place::Sentinels(nodes, master) => {
                first_of(&self.in_turn(nodes.clone()), |node| self.ask_sentinel(node, master)).await
            }
            Place::Cluster(nodes) => {
                let mut nodes = nodes.clone();
                let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner).clone();
                nodes.extend(seen.into_iter().filter(|node| !nodes.contains(node)).collect::<Vec<_>>());
                first_of(&self.in_turn(nodes), |node| self.ask_cluster(node)).await
            }
        }
    }

    fn in_turn(&self, mut nodes: Vec<Address>) -> Vec<Address> {
        let turn = self.turn.fetch_add(1, Ordering::Relaxed) % nodes.len().max(1);
        nodes.rotate_left(turn);
        nodes
    }

    async fn ask_sentinel(&self, node: &Address, name: &str) -> Result<ServerConnection, String> {
        // A sentinel's password is its own, and most have none.
        let login = RedisConnectionInfo::default().set_skip_set_lib_name();
        let mut sentinel = self.open(node, &login).await?;
        let mut ask = redis::cmd("SENTINEL");
        ask.arg("GET-MASTER-ADDR-BY-NAME").arg(name);
        let mut told = ask.query_async::<Option<(String, u16)>>(&mut sentinel.redis).await;
        if let (Err(error), Some(password)) = (&told, self.target.login.password())
            && error.code() == Some("NOAUTH")
        {
            let auth = auth(self.target.login.username(), password);
            told = match auth.query_async::<()>(&mut sentinel.redis).await {
                Ok(()) => ask.query_async(&mut sentinel.redis).await,
                Err(error) => Err(error),
            };
        }
        let told = told.map_err(|error| format!("sentinel {node} {}", self.told(&error)))?;
        let (host, port) = told.ok_or_else(|| format!("sentinel {node} knows no master {name}"))?;
        let mut server = self.open(&Address::Tcp(host, port), &self.target.login).await?;
        let role = role(&mut server.redis).await;
        let role = role.map_err(|error| format!("{} {}", server.address, self.told(&error)))?;
        match role.as_deref() {
            None | Some("master") => Ok(server),
            Some(role) => Err(format!("{} is a {role}, though sentinel {node} names it", server.address)),
        }
    }

    async fn ask_cluster(&self, node: &Address) -> Result<ServerConnection, String> {
        let mut asked = self.open(node, &self.target.login).await?;
        let slots = redis::cmd("CLUSTER").arg("SLOTS").query_async::<Vec<Vec<Value>>>(&mut asked.redis).await;
        let slots = slots.map_err(|error| format!("{node} {}", self.told(&error)))?;
        let owner = owner(&slots, self.slot, node);
        let owner = owner.ok_or_else(|| format!("{node}: no server has slot {}", self.slot))?;
        let mut all: Vec<_> = slots.iter().flat_map(|range| servers(range, node)).collect();
        all.dedup();
        all.truncate(MOST_SEEN);
        *self.seen.lock().unwrap_or_else(PoisonError::into_inner) = all;
        if owner == *node { Ok(asked) } else { self.open(&owner, &self.target.login).await }
    }

    async fn open(&self, address: &Address, login: &RedisConnectionInfo) -> Result<ServerConnection, String> {
        match timeout(CONNECT, self.open_slowly(address, login)).await {
            Ok(opened) => opened.map_err(|error| format!("{address} {}", self.told(&error))),
            Err(_) => Err(format!("{address} does not answer within {} ms", CONNECT.as_millis())),
        }
    }

    async fn open_slowly(
        &self,
        address: &Address,
        login: &RedisConnectionInfo,
    ) -> RedisResult<ServerConnection> {
        let (host, port) = match address {
            Address::Unix(path) => return greet(UnixStream::connect(path).await?, login, address).await,
            Address::Tcp(host, port) => (host, *port),
        };
        let tcp = TcpStream::connect((host.as_str(), port)).await?;
        tcp.set_nodelay(true)?;
        let Some(Tls(connector)) = &self.tls else { return greet(tcp, login, address).await };
        let name = ServerName::try_from(host.clone()).map_err(io::Error::other)?;
        greet(connector.connect(name, tcp).await?, login, address).await
    }
}

/// Logs in.
async fn greet<S>(stream: S, login: &RedisConnectionInfo, address: &Address) -> RedisResult<ServerConnection>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let config = AsyncConnectionConfig::new().set_response_timeout(Some(CONNECT));
    let (redis, driver) = MultiplexedConnection::new_with_config(login, stream, config).await?;
    let driver = Arc::new(Driver(tokio::spawn(driver)));
    Ok(ServerConnection { redis, address: Arc::new(address.clone()), _driver: driver })
}

fn auth(user: Option<&str>, password: &str) -> redis::Cmd {
    let mut auth = redis::cmd("AUTH");
    user.into_iter().for_each(|user| {
        auth.arg(user);
    });
    auth.arg(password);
    auth
}

/// The first of these that leads somewhere: each is begun a little after the one before, so that one which does not
/// answer holds the others up but little.
async fn first_of<'a, F>(
    nodes: &'a [Address],
    way: impl Fn(&'a Address) -> F,
) -> Result<ServerConnection, String>
where
    F: Future<Output = Result<ServerConnection, String>>,
{
    let ways = (0..).zip(nodes).map(|(place, node)| {
        let way = way(node);
        async move {
            sleep(STAGGER.min(CONNECT / u32::try_from(nodes.len()).unwrap_or(1)) * place).await;
            way.await
        }
    });
    let mut ways: FuturesUnordered<_> = ways.collect();
    let mut troubles: Vec<String> = Vec::new();
    while let Some(found) = ways.next().await {
        match found {
            Ok(connection) => return Ok(connection),
            Err(trouble) if troubles.contains(&trouble) => {}
            Err(trouble) => troubles.push(trouble),
        }
    }
    troubles.sort_unstable();
    Err(troubles.join("; "))
}

/// Whether it is a master; `None`: this user may not ask.
async fn role(redis: &mut MultiplexedConnection) -> RedisResult<Option<String>> {
    match redis::cmd("ROLE").query_async::<Vec<Value>>(redis).await {
        Ok(role) => {
            let role = role.into_iter().next().ok_or((ErrorKind::Parse, "it tells no role"))?;
            Ok(Some(redis::from_redis_value(role)?))
        }
        Err(error) if error.code() == Some("NOPERM") => Ok(None),
        Err(error) => Err(error),
    }
}

/// The master of a slot, as one of the cluster has told: ranges of slots, each with its master and its replicas.
fn owner(slots: &[Vec<Value>], slot: u16, asked: &Address) -> Option<Address> {
    let range = slots.iter().find(|range| {
        let bound = |at: usize| match range.get(at) {
            Some(Value::Int(bound)) => *bound,
            _ => -1,
        };
        (bound(0)..=bound(1)).contains(&i64::from(slot))
    })?;
    servers(range, asked).next()
}

fn servers<'a>(range: &'a [Value], asked: &'a Address) -> impl Iterator<Item = Address> + 'a {
    range.iter().skip(2).filter_map(move |server| {
        let Value::Array(server) = server else { return None };
        let Some(Value::Int(port)) = server.get(1) else { return None };
        let port = u16::try_from(*port).ok().filter(|&port| port > 0)?;
        let host = match (server.first(), asked) {
            (Some(Value::BulkString(host)), _) if !host.is_empty() && host != b"?" => {
                String::from_utf8(host.clone()).ok()?
            }
            // It does not know its own name: that by which it was reached is one.
            (_, Address::Tcp(host, _)) => host.clone(),
            (_, Address::Unix(_)) => return None,
        };
        Some(Address::Tcp(host, port))
    })
}

/// What of a key decides its slot.
pub(super) fn hash_tag(key: &str) -> &str {
    let tag = key.split_once('{').and_then(|(_, rest)| rest.split_once('}')).map(|(tag, _)| tag);
    tag.filter(|tag| !tag.is_empty()).unwrap_or(key)
}

/// The slot of a key, of 16384.
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
    fn a_key_has_the_slot_that_the_server_gives_it() {
        // As CLUSTER KEYSLOT tells.
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
        let slots = vec![
            vec![Value::Int(0), Value::Int(100), server("a", 1), server("b", 2)],
            vec![Value::Int(101), Value::Int(16_383), Value::Array(vec![Value::Nil, Value::Int(3)])],
        ];
        let asked = Address::Tcp("asked".to_owned(), 9);
        let found = |slot: u16| owner(&slots, slot, &asked);
        assert_eq!(found(100), Some(Address::Tcp("a".to_owned(), 1)));
        assert_eq!(found(101), Some(Address::Tcp("asked".to_owned(), 3)));
        assert_eq!(owner(&slots[..1], 101, &asked), None);
        assert_eq!(owner(&[vec![Value::Nil]], 0, &asked), None);
    }
}
