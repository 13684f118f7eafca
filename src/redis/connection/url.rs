//! Parses `store.redis.url`: where the server is and how to log in. Pure: reads no files and opens no connections.

use redis::{ProtocolVersion, RedisConnectionInfo};
use std::fmt;
use std::path::PathBuf;

/// The accepted forms of a URL, for error messages.
const FORMS: &str = "redis://[[user]:password@]host[:port][/db], \
    redis+sentinel://[[user]:password@]host[:port][,host[:port]...]/master-name[/db], \
    redis+cluster://[[user]:password@]host[:port][,host[:port]...], redis+unix:///path[?db=0]; \
    rediss instead of redis: with TLS, which permits ?ca_file=...&cert_file=...&key_file=...";
const DEFAULT_PORT: u16 = 6379;
const DEFAULT_SENTINEL_PORT: u16 = 26379;

/// A parsed URL.
#[derive(Clone, Debug)]
pub(super) struct RedisUrl {
    pub(super) topology: Topology,
    /// Its `Debug` omits the password.
    pub(super) login: RedisConnectionInfo,
    /// `None`: no TLS.
    pub(super) tls: Option<RedisTlsFiles>,
}

/// How to find the server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Topology {
    /// The server itself.
    Single(Address),
    /// Sentinels that report the address of the master of this name.
    Sentinels { nodes: Vec<Address>, master: String },
    /// Servers of a cluster that report the master of each slot.
    Cluster(Vec<Address>),
}

/// The address of a socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Address {
    Tcp(String, u16),
    Unix(PathBuf),
}

/// Files for TLS, in PEM.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct RedisTlsFiles {
    /// Authorities that may sign the server's certificate. `None`: the machine's roots.
    pub(super) ca: Option<PathBuf>,
    /// The client's certificate and its key, for a server that requires one.
    pub(super) client: Option<(PathBuf, PathBuf)>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    Single,
    Unix,
    Sentinel,
    Cluster,
}

impl RedisUrl {
    /// # Errors
    /// The fault, without the password or any text that could be part of it.
    pub(super) fn parse(url: &str) -> Result<Self, String> {
        parse(url).map_err(|fault| format!("{fault}; the forms are: {FORMS}"))
    }

    /// Removes the password from a text of the server, which may repeat it.
    pub(super) fn without_password(&self, text: String) -> String {
        match self.login.password() {
            Some(password) if !password.is_empty() && text.contains(password) => {
                text.replace(password, "<the password>")
            }
            _ => text,
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(host, port) if host.contains(':') => write!(f, "[{host}]:{port}"),
            Self::Tcp(host, port) => write!(f, "{host}:{port}"),
            Self::Unix(path) => write!(f, "{}", path.display()),
        }
    }
}

// No error below repeats a part of the URL: after a stray character, any part could belong to the password.

fn parse(url: &str) -> Result<RedisUrl, String> {
    let (scheme, rest) = url.split_once("://").ok_or("this is not a Redis URL")?;
    let (form, has_tls) = parse_scheme(scheme).ok_or("the URL does not begin with a Redis scheme")?;
    let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
    let options = Options::parse(query, form, has_tls)?;
    // A path contains no @, so a password may contain an unescaped one.
    let (login, rest) = match rest.rsplit_once('@') {
        Some((login, rest)) if !login.starts_with('/') => (login, rest),
        _ => ("", rest),
    };
    let login = parse_login(login)?;
    let (hosts, path) = match form {
        Form::Unix => ("", rest),
        _ => rest.split_once('/').unwrap_or((rest, "")),
    };
    let (topology, db) = parse_topology(form, hosts, path)?;
    let login = login.set_db(options.db.or(db).unwrap_or(0));
    Ok(RedisUrl { topology, login, tls: has_tls.then_some(options.files) })
}

fn parse_scheme(scheme: &str) -> Option<(Form, bool)> {
    Some(match scheme {
        "redis" => (Form::Single, false),
        "rediss" => (Form::Single, true),
        "unix" | "redis+unix" => (Form::Unix, false),
        "redis+sentinel" => (Form::Sentinel, false),
        "rediss+sentinel" => (Form::Sentinel, true),
        "redis+cluster" => (Form::Cluster, false),
        "rediss+cluster" => (Form::Cluster, true),
        _ => return None,
    })
}

fn parse_login(text: &str) -> Result<RedisConnectionInfo, String> {
    // The library would send its name with CLIENT SETINFO, which a user may not be permitted to run.
    let login = RedisConnectionInfo::default().set_protocol(ProtocolVersion::RESP2).set_skip_set_lib_name();
    if text.is_empty() {
        return Ok(login);
    }
    let (user, password) = text
        .split_once(':')
        .ok_or("a user needs a password: user:password@, or :password@ for the default user")?;
    let login = login.set_password(percent_decode(password)?);
    Ok(if user.is_empty() { login } else { login.set_username(percent_decode(user)?) })
}

fn parse_topology(form: Form, hosts: &str, path: &str) -> Result<(Topology, Option<i64>), String> {
    match form {
        Form::Unix if path.starts_with('/') => {
            Ok((Topology::Single(Address::Unix(percent_decode(path)?.into())), None))
        }
        Form::Unix => Err("the path of a socket must begin with /: redis+unix:///path".to_owned()),
        Form::Single => match &parse_addresses(hosts, DEFAULT_PORT)?[..] {
            [address] => Ok((Topology::Single(address.clone()), parse_db(path)?)),
            _ => {
                Err("several hosts are permitted only for redis+sentinel:// and redis+cluster://".to_owned())
            }
        },
        Form::Sentinel => {
            let (master, db) = path.split_once('/').unwrap_or((path, ""));
            if master.is_empty() {
                return Err("the name of the master is missing after the hosts: /mymaster".to_owned());
            }
            let nodes = parse_addresses(hosts, DEFAULT_SENTINEL_PORT)?;
            Ok((Topology::Sentinels { nodes, master: percent_decode(master)? }, parse_db(db)?))
        }
        Form::Cluster => match parse_db(path)? {
            None | Some(0) => Ok((Topology::Cluster(parse_addresses(hosts, DEFAULT_PORT)?), None)),
            Some(_) => Err("a cluster has only database 0".to_owned()),
        },
    }
}

fn parse_addresses(hosts: &str, default_port: u16) -> Result<Vec<Address>, String> {
    hosts.split(',').map(|host| parse_address(host, default_port)).collect()
}

fn parse_address(text: &str, default_port: u16) -> Result<Address, String> {
    let (host, port) = match text.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((host, "")) => (host, None),
        Some((host, port)) => (host, Some(port.strip_prefix(':').ok_or("a host is malformed")?)),
        None => text.split_once(':').map_or((text, None), |(host, port)| (host, Some(port))),
    };
    if host.is_empty() {
        return Err("a host is missing".to_owned());
    }
    let is_bracketed = text.starts_with('[');
    let is_host_char = |c: char| c.is_alphanumeric() || "-._".contains(c) || is_bracketed && ":%".contains(c);
    if !host.chars().all(is_host_char) {
        return Err(
            "a host is malformed, or the password contains / ? # % instead of %2F %3F %23 %25".to_owned()
        );
    }
    let port = port.map_or(Ok(default_port), str::parse);
    let port = port.ok().filter(|&port| port > 0).ok_or("a port must be a number from 1 to 65535")?;
    Ok(Address::Tcp(host.to_owned(), port))
}

fn parse_db(text: &str) -> Result<Option<i64>, String> {
    if text.is_empty() {
        return Ok(None);
    }
    let db = text.parse::<u16>().map_err(|_| "the database must be a number, such as 0")?;
    Ok(Some(i64::from(db)))
}

/// The options after the `?`.
#[derive(Default)]
struct Options {
    db: Option<i64>,
    files: RedisTlsFiles,
}

impl Options {
    fn parse(query: &str, form: Form, has_tls: bool) -> Result<Self, String> {
        let mut options = Self::default();
        let (mut certificate, mut key) = (None, None);
        for option in query.split('&').filter(|option| !option.is_empty()) {
            let (name, value) = option.split_once('=').unwrap_or((option, ""));
            let value = percent_decode(value)?;
            match name {
                "db" if form == Form::Unix => options.db = parse_db(&value)?,
                "ca_file" if has_tls => options.files.ca = Some(value.into()),
                "cert_file" if has_tls => certificate = Some(value.into()),
                "key_file" if has_tls => key = Some(value.into()),
                "ca_file" | "cert_file" | "key_file" => {
                    return Err(format!("{name} requires TLS: write rediss instead of redis"));
                }
                _ => return Err("an option after the ? is unknown".to_owned()),
            }
        }
        options.files.client = match (certificate, key) {
            (Some(certificate), Some(key)) => Some((certificate, key)),
            (None, None) => None,
            _ => return Err("cert_file and key_file must be set together".to_owned()),
        };
        Ok(options)
    }
}

/// Replaces each `%41` by `A`. A `+` stays a `+`.
fn percent_decode(text: &str) -> Result<String, String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, others)) = rest.split_first() {
        rest = others;
        if first != b'%' {
            bytes.push(first);
            continue;
        }
        let digit = |index: usize| char::from(*others.get(index)?).to_digit(16);
        let pair = digit(0).zip(digit(1)).and_then(|(high, low)| u8::try_from(high * 16 + low).ok());
        bytes.push(pair.ok_or("a literal % must be written as %25")?);
        rest = &others[2..];
    }
    String::from_utf8(bytes).map_err(|_| "the bytes written with % are not UTF-8".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp(host: &str, port: u16) -> Address {
        Address::Tcp(host.to_owned(), port)
    }

    #[test]
    fn all_forms_are_parsed() {
        let hosts = vec![tcp("a", 1), tcp("b.c-d", 26379)];
        let cluster = vec![tcp("a", 6379), tcp("::1", 7)];
        for (url, topology, user, password, db, has_tls) in [
            ("redis://h", Topology::Single(tcp("h", 6379)), None, None, 0, false),
            ("redis://:p%40@1.2.3.4:5/6", Topology::Single(tcp("1.2.3.4", 5)), None, Some("p@"), 6, false),
            ("rediss://u:p@:/w@[::1]:5/", Topology::Single(tcp("::1", 5)), Some("u"), Some("p@:/w"), 0, true),
            ("unix:///a@b/s?db=3", Topology::Single(Address::Unix("/a@b/s".into())), None, None, 3, false),
            ("redis+unix://:p@/s", Topology::Single(Address::Unix("/s".into())), None, Some("p"), 0, false),
            (
                "redis+sentinel://a:1,b.c-d/m/2",
                Topology::Sentinels { nodes: hosts.clone(), master: "m".into() },
                None,
                None,
                2,
                false,
            ),
            (
                "rediss+sentinel://u:p@a:1,b.c-d/m",
                Topology::Sentinels { nodes: hosts, master: "m".into() },
                Some("u"),
                Some("p"),
                0,
                true,
            ),
            (
                "redis+cluster://u:p@a,[::1]:7",
                Topology::Cluster(cluster.clone()),
                Some("u"),
                Some("p"),
                0,
                false,
            ),
            ("rediss+cluster://a,[::1]:7/0?", Topology::Cluster(cluster), None, None, 0, true),
        ] {
            let parsed = RedisUrl::parse(url).unwrap();
            assert_eq!(parsed.topology, topology, "{url}");
            assert_eq!((parsed.login.username(), parsed.login.password()), (user, password), "{url}");
            assert_eq!((parsed.login.db(), parsed.tls.is_some()), (db, has_tls), "{url}");
        }
    }

    #[test]
    fn tls_files_are_parsed() {
        let tls = |url: &str| RedisUrl::parse(url).unwrap().tls.unwrap();
        let client = Some(("/c".into(), "/k k".into()));
        assert_eq!(
            tls("rediss://h?ca_file=/a+b&cert_file=/c&key_file=/k%20k"),
            RedisTlsFiles { ca: Some("/a+b".into()), client }
        );
        assert_eq!(tls("rediss+cluster://h"), RedisTlsFiles::default());
    }

    #[test]
    fn errors_describe_the_fault_without_the_password() {
        for (url, words) in [
            ("", "not a Redis URL"),
            ("localhost:6379", "not a Redis URL"),
            ("http://:secret@h", "a Redis scheme"),
            ("redis://", "host is missing"),
            ("redis://:secret@", "host is missing"),
            ("redis://secret@h", "needs a password"),
            ("redis://:secret@h,b", "several hosts"),
            ("redis://:secret@h:0", "a port"),
            ("redis://:secret@h:70000", "a port"),
            ("redis://:sec#ret@h:secret", "a port"),
            ("redis://:sec%ret@h", "%25"),
            ("redis://:sec%ff@h", "UTF-8"),
            ("redis://u:secret#@h i", "malformed"),
            ("redis://:sec?ret@h", "is unknown"),
            ("redis://:secret@h/x", "the database"),
            ("redis://:secret@h?ca_file=/x", "rediss"),
            ("rediss://:secret@h?cert_file=/x", "set together"),
            ("redis+sentinel://:secret@h", "name of the master"),
            ("redis+cluster://:secret@h/1", "only database 0"),
            ("redis+unix://relative", "must begin with /"),
            ("redis://[::1", "malformed"),
            ("redis://[::1]6379", "malformed"),
        ] {
            let error = RedisUrl::parse(url).unwrap_err();
            assert!(error.contains(words) && error.contains("redis+cluster://"), "{url}: {error}");
            assert!(!error.contains("secret"), "{url}: {error}");
        }
    }

    #[test]
    fn neither_debug_nor_error_texts_contain_the_password() {
        let url = RedisUrl::parse("redis://user:a-secret@h").unwrap();
        assert!(!format!("{url:?}").contains("a-secret"));
        let text = url.without_password("unknown command 'AUTH' with 'a-secret'".to_owned());
        assert_eq!(text, "unknown command 'AUTH' with '<the password>'");
    }
}
