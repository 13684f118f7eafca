//! From a file, its variables and overrides to a checked [`Config`].

use super::fault::{Fault, Faults, Findings};
use super::item::{Item, Section};
use super::node::Value;
use super::{
    Admin, Config, FloodGuard, ModelRule, OnStoreFailure, Redis, Secret, Server, Store, TlsFiles,
    TokenizerChoice,
};
use super::{check, environments, overrides, units, upstreams, variables, yaml};
use crate::glob::Glob;
use crate::redis;
use http::HeaderValue;
use std::io::Read as _;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Larger files are refused.
const LARGEST_FILE: usize = 4 << 20;

/// Where a config comes from.
#[derive(Clone, Debug)]
pub struct Source {
    /// The YAML file.
    pub path: PathBuf,
}

/// A config that can be used, and what is worth knowing about it.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// The settings.
    pub config: Config,
    /// Things that are allowed, but are probably not meant.
    pub warnings: Vec<Fault>,
}

/// Reads a file, with variables and overrides from the process's environment.
///
/// # Errors
/// Everything that is wrong with it.
pub fn load(source: &Source) -> Result<Loaded, Faults> {
    let name = source.path.display().to_string();
    let text = read_text(&source.path).map_err(|message| Faults::of_file(&name, message))?;
    let unicode = |(name, value): (std::ffi::OsString, std::ffi::OsString)| {
        Some((name.into_string().ok()?, value.to_string_lossy().into_owned()))
    };
    let variables = std::env::vars_os().filter_map(unicode);
    let overrides: Vec<_> = variables.filter(|(name, _)| name.starts_with(overrides::PREFIX)).collect();
    let mut loaded = parse(&text, &name, &|variable| std::env::var(variable).ok(), &overrides)?;
    loaded.config.written = written(&source.path);
    Ok(loaded)
}

fn written(path: &Path) -> u64 {
    let modified = std::fs::metadata(path).and_then(|file| file.modified()).ok();
    let since = modified.and_then(|at| at.duration_since(std::time::UNIX_EPOCH).ok()).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

fn read_text(path: &Path) -> Result<String, String> {
    let mut bytes = Vec::new();
    let most = LARGEST_FILE as u64 + 1;
    let read = std::fs::File::open(path).and_then(|file| file.take(most).read_to_end(&mut bytes));
    read.map_err(|error| format!("the file cannot be read: {error}"))?;
    String::from_utf8(bytes).map_err(|error| {
        let read = String::from_utf8_lossy(&error.as_bytes()[..error.utf8_error().valid_up_to()]);
        format!("the file is not UTF-8 (line {}); save it as UTF-8", 1 + read.matches('\n').count())
    })
}

/// Reads a config's text. `environment` gives the variables that it mentions; each override is the
/// name of a variable that begins with `TOLLGATE__`, and its value.
///
/// # Errors
/// Everything that is wrong with it.
pub fn parse(
    text: &str,
    name: &str,
    environment: &dyn Fn(&str) -> Option<String>,
    overrides: &[(String, String)],
) -> Result<Loaded, Faults> {
    if text.len() > LARGEST_FILE {
        return Err(Faults::of_file(name, format!("the config is larger than {} MiB", LARGEST_FILE >> 20)));
    }
    let findings = Findings::of(name);
    let config = yaml::parse(text, &findings).and_then(|mut root| {
        // A variable that is overridden need not be set.
        let mut overrides: Vec<_> = overrides.iter().collect();
        overrides.sort();
        for (variable, value) in overrides {
            overrides::apply(&mut root, variable, value, &findings);
        }
        variables::fill_in(&mut root, environment, &findings);
        read(&Item { node: &root, path: String::new(), findings: &findings })
    });
    let warnings = findings.end()?;
    // Whatever stops the reading is a fault, so that there is a config here.
    let config = config.ok_or_else(|| Faults::of_file(name, "the config cannot be read".to_owned()))?;
    Ok(Loaded { config, warnings })
}

fn read(root: &Item<'_>) -> Option<Config> {
    let top = root.section(&[
        "server",
        "admin",
        "upstreams",
        "environments",
        "default_environment",
        "models",
        "store",
    ])?;
    let server = server(&top);
    let admin = admin(&top);
    check_listeners(&top, &server, &admin);
    let upstreams = upstreams::read(&top);
    let environments = environments::read(&top, &upstreams);
    let default_environment = top.get("default_environment").and_then(|item| {
        let declared =
            top.get("environments").and_then(|i| i.map("a mapping")).map_or(Vec::new(), |s| s.names());
        let name = declared[item.name_among("environment", &declared)?];
        environments.iter().position(|e| e.name == name)
    });
    let models = top.get("models").and_then(|m| m.list()).unwrap_or_default();
    let models = models.iter().filter_map(model).collect();
    let store = store(&top);
    check::not_in_force(&top);
    let written = 0;
    Some(Config { server, admin, upstreams, environments, default_environment, models, store, written })
}

fn check_listeners(top: &Section<'_>, server: &Server, admin: &Admin) {
    let listen = |name: &str| match top.get(name)?.node.value {
        Value::Map(_) => top.get(name)?.map("a mapping")?.get("listen"),
        _ => None,
    };
    if server.listen == admin.listen
        && server.listen.port() != 0
        && let Some(item) = listen("admin").or_else(|| listen("server"))
    {
        item.fault("server.listen and admin.listen are the same address: give them different ports");
    }
    if !admin.listen.ip().is_loopback()
        && admin.token.is_none()
        && let Some(item) = listen("admin")
    {
        item.fault(
            "others can reach this address, so admin.token must be set, for example to \
             ${TOLLGATE_ADMIN_TOKEN}; or listen on 127.0.0.1",
        );
    }
}

fn address(item: Option<Item<'_>>, port: u16) -> SocketAddr {
    let expected = "an address and port, such as 127.0.0.1:8080 or [::]:8080";
    let address = item.and_then(|item| item.parsed(|text| text.parse().ok(), expected));
    address.unwrap_or_else(|| SocketAddr::from((Ipv4Addr::LOCALHOST, port)))
}

fn server(top: &Section<'_>) -> Server {
    let section =
        top.section("server", &["listen", "max_request_body", "flood_guard", "drain_timeout", "tls"]);
    Server {
        listen: address(section.get("listen"), 8080),
        max_request_body: section.get("max_request_body").and_then(|i| body_size(&i)).unwrap_or(32 << 20),
        flood_guard: match section.get("flood_guard") {
            None => Some(FloodGuard { requests: 1_000, per: Duration::from_secs(1), guards_loopback: false }),
            Some(item) => flood_guard(&item),
        },
        drain_timeout: section
            .get("drain_timeout")
            .and_then(|i| i.duration())
            .unwrap_or(Duration::from_secs(30)),
        tls: section.get("tls").and_then(|i| tls_files(&i)),
    }
}

fn body_size(item: &Item<'_>) -> Option<usize> {
    let size = item.size()?;
    if size == 0 {
        item.fault("0 would refuse every request that has a body");
    }
    Some(size)
}

/// `0`, or `{ requests, per }`.
fn flood_guard(item: &Item<'_>) -> Option<FloodGuard> {
    if let Value::Scalar(_) = item.node.value {
        item.parsed(|text| (text == "0").then_some(()), "0 (off), nor { requests: 1000, per: second }")?;
        return None;
    }
    let section = item.section(&["requests", "per"])?;
    let whole = |text: &str| units::amount(text).and_then(|n| u32::try_from(n).ok());
    let requests =
        section.get("requests").map_or(Some(1_000), |i| i.parsed(whole, "a number of requests"))?;
    let per = section.get("per").map_or(Some(Duration::from_secs(1)), |i| i.duration())?;
    if per.is_zero() {
        section.fault("\"per\" must not be 0; flood_guard: 0 turns the guard off");
    }
    (requests > 0).then_some(FloodGuard { requests, per, guards_loopback: true })
}

fn tls_files(item: &Item<'_>) -> Option<TlsFiles> {
    let section = item.section(&["cert", "key"])?;
    let file = |name, example| section.require(name, example).and_then(|i| path(&i));
    let (cert, key) = (file("cert", "cert.pem"), file("key", "key.pem"));
    Some(TlsFiles { cert: cert?, key: key? })
}

fn path(item: &Item<'_>) -> Option<PathBuf> {
    item.parsed(|text| (!text.is_empty()).then(|| text.into()), "a path")
}

fn admin(top: &Section<'_>) -> Admin {
    let section = top.section("admin", &["listen", "token"]);
    Admin {
        listen: address(section.get("listen"), 9090),
        token: section.get("token").and_then(|i| secret(&i)),
    }
}

/// A secret that goes into a header; an empty one is none.
pub(super) fn secret(item: &Item<'_>) -> Option<Secret> {
    let text = item.text()?;
    if text.trim() != text || HeaderValue::from_str(text).is_err() {
        item.fault("this key has spaces around it, or characters that no header can carry");
    }
    (!text.is_empty()).then(|| Secret::new(text))
}

fn model(item: &Item<'_>) -> Option<ModelRule> {
    let section = item.section(&["match", "encoding", "tokenizer", "model"])?;
    let pattern = section.require("match", "\"llama-3*\"").and_then(|i| i.text().map(Glob::new));
    let encodings = [
        ("o200k_base", TokenizerChoice::O200k),
        ("o200k_harmony", TokenizerChoice::O200k),
        ("cl100k_base", TokenizerChoice::Cl100k),
    ];
    let tokenizer = match (section.get("encoding"), section.get("tokenizer"), section.get("model")) {
        (Some(encoding), None, None) => encoding.choice(&encodings),
        (None, Some(file), None) => tokenizer_file(&file).map(TokenizerChoice::File),
        (None, None, Some(model)) => model.text().map(|name| TokenizerChoice::Like(name.to_owned())),
        _ => {
            item.fault(
                "give just one of these: an encoding, such as o200k_base; the path of a tokenizer.json as tokenizer; \
                 the name of the model behind an alias as model",
            );
            None
        }
    };
    Some(ModelRule { pattern: pattern?, tokenizer: tokenizer? })
}

/// A file that is there and looks like a tokenizer.json; loading it is left to those who need it.
fn tokenizer_file(item: &Item<'_>) -> Option<PathBuf> {
    #[derive(serde::Deserialize)]
    struct Shape {
        #[serde(rename = "model")]
        _model: serde::de::IgnoredAny,
    }
    let path = path(item)?;
    let read = std::fs::File::open(&path).map_err(|error| format!("this file cannot be read: {error}"));
    let is_one = read.and_then(|file| {
        serde_json::from_reader(std::io::BufReader::new(file))
            .map(|_: Shape| ())
            .map_err(|error| format!("this file is no tokenizer.json: {error}"))
    });
    is_one.map_err(|message| item.fault(message)).ok()?;
    Some(path)
}

fn store(top: &Section<'_>) -> Store {
    let section = top.section("store", &["path", "history", "redis", "memory"]);
    let memory = section.get("memory");
    let redis = section.get("redis");
    let keeps_nothing = memory.as_ref().and_then(Item::boolean).unwrap_or(false);
    if let Some(memory) = memory.filter(|_| keeps_nothing && redis.is_some()) {
        memory.fault("counters are kept in memory or in redis, not both: remove one of the two keys");
    }
    Store {
        path: section.get("path").and_then(|i| path(&i)).unwrap_or_else(|| "data/tollgate.db".into()),
        history: section.get("history").and_then(|i| i.duration()).unwrap_or(Duration::from_hours(35 * 24)),
        memory: keeps_nothing,
        redis: redis.and_then(|i| self::redis(&i)),
    }
}

fn redis(item: &Item<'_>) -> Option<Redis> {
    let section = item.section(&["url", "prefix", "on_failure", "lease"])?;
    let policies = [
        ("local", OnStoreFailure::Local),
        ("closed", OnStoreFailure::Closed),
        ("open", OnStoreFailure::Open),
    ];
    let url = section.require("url", "redis://127.0.0.1:6379/0");
    Some(Redis {
        prefix: section.get("prefix").and_then(|i| i.text()).unwrap_or("tollgate").to_owned(),
        on_failure: section
            .get("on_failure")
            .and_then(|i| i.choice(&policies))
            .unwrap_or(OnStoreFailure::Local),
        lease: section.get("lease").and_then(|i| i.boolean()).unwrap_or(false),
        url: Secret::new(url.and_then(|i| redis_url(&i))?),
    })
}

/// Not repeated in a message: it may hold a password.
fn redis_url<'n>(item: &Item<'n>) -> Option<&'n str> {
    let url = item.text()?;
    if let Err(what) = redis::check_url(url) {
        item.fault(what);
    }
    Some(url)
}
