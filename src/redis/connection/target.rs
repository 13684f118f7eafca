//! What `store.redis.url` says: where the server is found, and how one logs in. Pure: nothing is read or connected.

use redis::{ProtocolVersion, RedisConnectionInfo};
use std::fmt;
use std::path::PathBuf;

/// What a URL may look like, for error messages.
const FORMS: &str = "redis://[[user]:password@]host[:port][/db], \
    redis+sentinel://[[user]:password@]host[:port][,host[:port]...]/master-name[/db], \
    redis+cluster://[[user]:password@]host[:port][,host[:port]...], redis+unix:///path[?db=0]; \
    rediss in place of redis: with TLS, then also ?ca_file=...&cert_file=...&key_file=...";
const PORT: u16 = 6379;
const SENTINEL_PORT: u16 = 26379;

/// Where the server is found, and how one logs in.
#[derive(Clone, Debug)]
pub(super) struct Target {
    pub(super) place: Place,
    /// Its `Debug` leaves the password out.
    pub(super) login: RedisConnectionInfo,
    /// `None`: no TLS.
    pub(super) tls: Option<Files>,
}

/// Where the server is found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// It is this one.
    One(Address),
    /// These know which one is the master of this name.
    Sentinels(Vec<Address>, String),
    /// Each of these knows who has which slot.
    Cluster(Vec<Address>),
}

/// What a socket is connected to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Address {
    Tcp(String, u16),
    Unix(PathBuf),
}

/// Files of TLS, in PEM.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Files {
    /// Who is trusted to sign the server's certificate; `None`: the machine's roots.
    pub(super) ca: Option<PathBuf>,
    /// Our certificate and its key, where the server asks for one.
    pub(super) own: Option<(PathBuf, PathBuf)>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    One,
    Unix,
    Sentinel,
    Cluster,
}

impl Target {
    /// Reads a URL.
    ///
    /// # Errors
    /// What is wrong with it, without the password or anything that could be part of it.
    pub(super) fn parse(url: &str) -> Result<Self, String> {
        read(url).map_err(|what| format!("{what}; the forms are: {FORMS}"))
    }

    /// A text of the server's in which the password may have been repeated, without it.
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

// None of these repeats a part of the URL in an error: with a stray character, it could be one of the password.

fn read(url: &str) -> Result<Target, String> {
    let (scheme, rest) = url.split_once("://").ok_or("this is no URL of Redis")?;
    let (form, has_tls) = scheme_of(scheme).ok_or("the URL begins with no scheme of Redis")?;
    let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
    let options = Options::read(query, form, has_tls)?;
    // A path has no @, so a password may have one as it is.
    let (login, rest) = match rest.rsplit_once('@') {
        Some((login, rest)) if !login.starts_with('/') => (login, rest),
        _ => ("", rest),
    };
    let login = login_of(login)?;
    let (hosts, path) = match form {
        Form::Unix => ("", rest),
        _ => rest.split_once('/').unwrap_or((rest, "")),
    };
    let (place, db) = place_of(form, hosts, path)?;
    let login = login.set_db(options.db.or(db).unwrap_or(0));
    Ok(Target { place, login, tls: has_tls.then_some(options.files) })
}

fn scheme_of(scheme: &str) -> Option<(Form, bool)> {
    Some(match scheme {
        "redis" => (Form::One, false),
        "rediss" => (Form::One, true),
        "unix" | "redis+unix" => (Form::Unix, false),
        "redis+sentinel" => (Form::Sentinel, false),
        "rediss+sentinel" => (Form::Sentinel, true),
        "redis+cluster" => (Form::Cluster, false),
        "rediss+cluster" => (Form::Cluster, true),
        _ => return None,
    })
}

fn login_of(text: &str) -> Result<RedisConnectionInfo, String> {
    // The library's name is of no use to anybody, and a user may not be allowed to tell it.
    let login = RedisConnectionInfo::default().set_protocol(ProtocolVersion::RESP2).set_skip_set_lib_name();
    if text.is_empty() {
        return Ok(login);
    }
    let (user, password) = text
        .split_once(':')
        .ok_or("a user needs a password: user:password@, or :password@ for the default user")?;
    let login = login.set_password(decoded(password)?);
    Ok(if user.is_empty() { login } else { login.set_username(decoded(user)?) })
}

fn place_of(form: Form, hosts: &str, path: &str) -> Result<(Place, Option<i64>), String> {
    match form {
        Form::Unix if path.starts_with('/') => Ok((Place::One(Address::Unix(decoded(path)?.into())), None)),
        Form::Unix => Err("the path of a socket begins with /: redis+unix:///path".to_owned()),
        Form::One => match &addresses(hosts, PORT)?[..] {
            [one] => Ok((Place::One(one.clone()), db_of(path)?)),
            _ => Err("several hosts are for redis+sentinel:// or redis+cluster://".to_owned()),
        },
        Form::Sentinel => {
            let (master, db) = path.split_once('/').unwrap_or((path, ""));
            if master.is_empty() {
                return Err("the name of the master is missing after the hosts: /mymaster".to_owned());
            }
            Ok((Place::Sentinels(addresses(hosts, SENTINEL_PORT)?, decoded(master)?), db_of(db)?))
        }
        Form::Cluster => match db_of(path)? {
            None | Some(0) => Ok((Place::Cluster(addresses(hosts, PORT)?), None)),
            Some(_) => Err("a cluster has no database but 0".to_owned()),
        },
    }
}

fn addresses(hosts: &str, port: u16) -> Result<Vec<Address>, String> {
    hosts.split(',').map(|host| address(host, port)).collect()
}

fn address(text: &str, default: u16) -> Result<Address, String> {
    let (host, port) = match text.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((host, "")) => (host, None),
        Some((host, port)) => (host, Some(port.strip_prefix(':').ok_or("a host is malformed")?)),
        None => text.split_once(':').map_or((text, None), |(host, port)| (host, Some(port))),
    };
    if host.is_empty() {
        return Err("a host is missing".to_owned());
    }
    let is_bracketed = text.starts_with('[');
    let is_of_host = |c: char| c.is_alphanumeric() || "-._".contains(c) || is_bracketed && ":%".contains(c);
    if !host.chars().all(is_of_host) {
        return Err(
            "a host is malformed, or in the password a / ? # % is not written as %2F %3F %23 %25".to_owned()
        );
    }
    let port = port.map_or(Ok(default), str::parse);
    let port = port.ok().filter(|&port| port > 0).ok_or("a port is a number from 1 to 65535")?;
    Ok(Address::Tcp(host.to_owned(), port))
}

fn db_of(text: &str) -> Result<Option<i64>, String> {
    if text.is_empty() {
        return Ok(None);
    }
    let db = text.parse::<u16>().map_err(|_| "the database is a number, such as 0")?;
    Ok(Some(i64::from(db)))
}

#[derive(Default)]
struct Options {
    db: Option<i64>,
    files: Files,
}

impl Options {
    fn read(query: &str, form: Form, has_tls: bool) -> Result<Self, String> {
        let mut options = Self::default();
        let (mut certificate, mut key) = (None, None);
        for option in query.split('&').filter(|option| !option.is_empty()) {
            let (name, value) = option.split_once('=').unwrap_or((option, ""));
            let value = decoded(value)?;
            match name {
                "db" if form == Form::Unix => options.db = db_of(&value)?,
                "ca_file" if has_tls => options.files.ca = Some(value.into()),
                "cert_file" if has_tls => certificate = Some(value.into()),
                "key_file" if has_tls => key = Some(value.into()),
                "ca_file" | "cert_file" | "key_file" => {
                    return Err(format!("{name} is for TLS: write rediss in place of redis"));
                }
                _ => return Err("after the ? is an option that is not known here".to_owned()),
            }
        }
        options.files.own = match (certificate, key) {
            (Some(certificate), Some(key)) => Some((certificate, key)),
            (None, None) => None,
            _ => return Err("cert_file and key_file go together".to_owned()),
        };
        Ok(options)
    }
}

/// With `%41` read as `A`.
fn decoded(text: &str) -> Result<String, String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, others)) = rest.split_first() {
        rest = others;
        if first != b'%' {
            bytes.push(first);
            continue;
        }
        let digit = |at: usize| char::from(*others.get(at)?).to_digit(16);
        let pair = digit(0).zip(digit(1)).and_then(|(high, low)| u8::try_from(high * 16 + low).ok());
        bytes.push(pair.ok_or("a % that stands for itself is written as %25")?);
        rest = &others[2..];
    }
    String::from_utf8(bytes).map_err(|_| "what is written with % is no UTF-8".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp(host: &str, port: u16) -> Address {
        Address::Tcp(host.to_owned(), port)
    }

    #[test]
    fn all_forms_are_read() {
        let hosts = vec![tcp("a", 1), tcp("b.c-d", 26379)];
        let cluster = vec![tcp("a", 6379), tcp("::1", 7)];
        for (url, place, user, password, db, has_tls) in [
            ("redis://h", Place::One(tcp("h", 6379)), None, None, 0, false),
            ("redis://:p%40@1.2.3.4:5/6", Place::One(tcp("1.2.3.4", 5)), None, Some("p@"), 6, false),
            ("rediss://u:p@:/w@[::1]:5/", Place::One(tcp("::1", 5)), Some("u"), Some("p@:/w"), 0, true),
            ("unix:///a@b/s?db=3", Place::One(Address::Unix("/a@b/s".into())), None, None, 3, false),
            ("redis+unix://:p@/s", Place::One(Address::Unix("/s".into())), None, Some("p"), 0, false),
            (
                "redis+sentinel://a:1,b.c-d/m/2",
                Place::Sentinels(hosts.clone(), "m".into()),
                None,
                None,
                2,
                false,
            ),
            (
                "rediss+sentinel://u:p@a:1,b.c-d/m",
                Place::Sentinels(hosts, "m".into()),
                Some("u"),
                Some("p"),
                0,
                true,
            ),
            (
                "redis+cluster://u:p@a,[::1]:7",
                Place::Cluster(cluster.clone()),
                Some("u"),
                Some("p"),
                0,
                false,
            ),
            ("rediss+cluster://a,[::1]:7/0?", Place::Cluster(cluster), None, None, 0, true),
        ] {
            let read = Target::parse(url).unwrap();
            assert_eq!(read.place, place, "{url}");
            assert_eq!((read.login.username(), read.login.password()), (user, password), "{url}");
            assert_eq!((read.login.db(), read.tls.is_some()), (db, has_tls), "{url}");
        }
    }

    #[test]
    fn files_of_tls_are_read() {
        let tls = |url: &str| Target::parse(url).unwrap().tls.unwrap();
        let own = Some(("/c".into(), "/k k".into()));
        assert_eq!(
            tls("rediss://h?ca_file=/a+b&cert_file=/c&key_file=/k%20k"),
            Files { ca: Some("/a+b".into()), own }
        );
        assert_eq!(tls("rediss+cluster://h"), Files::default());
    }

    #[test]
    fn mistakes_are_told_and_no_password() {
        for (url, says) in [
            ("", "no URL"),
            ("localhost:6379", "no URL"),
            ("http://:secret@h", "no scheme"),
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
            ("redis://:sec?ret@h", "not known"),
            ("redis://:secret@h/x", "the database"),
            ("redis://:secret@h?ca_file=/x", "rediss"),
            ("rediss://:secret@h?cert_file=/x", "go together"),
            ("redis+sentinel://:secret@h", "name of the master"),
            ("redis+cluster://:secret@h/1", "no database but 0"),
            ("redis+unix://relative", "begins with /"),
            ("redis://[::1", "malformed"),
            ("redis://[::1]6379", "malformed"),
        ] {
            let error = Target::parse(url).unwrap_err();
            assert!(error.contains(says) && error.contains("redis+cluster://"), "{url}: {error}");
            assert!(!error.contains("secret"), "{url}: {error}");
        }
    }

    #[test]
    fn the_password_is_shown_nowhere() {
        let target = Target::parse("redis://user:a-secret@h").unwrap();
        assert!(!format!("{target:?}").contains("a-secret"));
        let told = target.without_password("unknown command 'AUTH' with 'a-secret'".to_owned());
        assert_eq!(told, "unknown command 'AUTH' with '<the password>'");
    }
}
