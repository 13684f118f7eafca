//! From a file, its variables and overrides to a checked [`Config`].

use super::fault::{Fault, Faults, Findings, Place};
use super::item::{Item, Section};
use super::{
    Admin, ApiKind, Config, FloodGuard, ModelRule, OnStoreFailure, Redis, Secret, Server, Store, Timeouts,
    TlsFiles, TokenizerChoice, Upstream, check, environments, node,
};
use crate::glob::Glob;
use http::{HeaderMap, HeaderName, HeaderValue, Uri};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// Larger files are refused.
const LARGEST_FILE: u64 = 4 * 1024 * 1024;
const OVERRIDE: &str = "TOLLGATE__";

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
    let unreadable = |message: String| Err(Faults::of_file(&name, message));
    let size = std::fs::metadata(&source.path).map(|m| m.len());
    if size.as_ref().is_ok_and(|&size| size > LARGEST_FILE) {
        return unreadable("the file is larger than 4 MiB".to_owned());
    }
    let text = match std::fs::read(&source.path).map(String::from_utf8) {
        Ok(Ok(text)) => text,
        Ok(Err(error)) => {
            return unreadable(format!("the file is not UTF-8 (byte {})", error.utf8_error().valid_up_to()));
        }
        Err(error) => return unreadable(format!("the file cannot be read: {error}")),
    };
    let overrides: Vec<(String, String)> =
        std::env::vars().filter(|(name, _)| name.starts_with(OVERRIDE)).collect();
    parse(&text, &name, &|variable| std::env::var(variable).ok(), &overrides)
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
    let findings = Findings::of(name);
    let config = node::parse(text, environment, &findings).and_then(|mut root| {
        for (variable, value) in overrides {
            node::override_with(&mut root, variable, value, &findings);
        }
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
    let server = server(top.get("server").as_ref());
    let admin = admin(top.get("admin").as_ref());
    check_listeners(&top, &server, &admin);
    let upstreams = upstreams(&top);
    let environments = environments::read(&top, &upstreams);
    let default_environment = top.get("default_environment").and_then(|item| {
        let name = item.text()?;
        let index = environments.iter().position(|e| e.name == name);
        if index.is_none() {
            let hint = super::fault::nearest(name, environments.iter().map(|e| e.name.as_str()));
            let hint = hint.map(|near| format!("; did you mean \"{near}\"?")).unwrap_or_default();
            item.fault(format!("there is no environment {}{hint}", item.shown()));
        }
        index
    });
    let models =
        top.get("models").and_then(|m| m.list()).unwrap_or_default().iter().filter_map(model).collect();
    let store = store(top.get("store").as_ref());
    check::not_in_force(&top);
    Some(Config { server, admin, upstreams, environments, default_environment, models, store })
}

fn check_listeners(top: &Section<'_>, server: &Server, admin: &Admin) {
    let place = |name: &str| top.get(name).map_or_else(|| top.place.clone(), |item| item.node.place.clone());
    if server.listen == admin.listen && server.listen.port() != 0 {
        let message = "is the same address as server.listen: give them different ports";
        top.findings.fault(&place("admin"), "admin.listen", message);
    }
    if !admin.listen.ip().is_loopback() && admin.token.is_none() {
        let message = "must be set because admin.listen is not a loopback address; for example: ${TOLLGATE_ADMIN_TOKEN}";
        top.findings.fault(&place("admin"), "admin.token", message);
    }
}

fn address(item: Option<Item<'_>>, default: [u8; 4], port: u16) -> SocketAddr {
    item.and_then(|item| {
        item.parsed(|t| t.parse().ok(), "an address and port, such as 127.0.0.1:8080 or [::]:8080")
    })
    .unwrap_or_else(|| SocketAddr::from((default, port)))
}

fn server(item: Option<&Item<'_>>) -> Server {
    let known = ["listen", "max_request_body", "flood_guard", "drain_timeout", "tls"];
    let section = item.and_then(|i| i.section(&known));
    let get = |name: &str| section.as_ref().and_then(|s| s.get(name));
    Server {
        listen: address(get("listen"), [127, 0, 0, 1], 8080),
        max_request_body: get("max_request_body").and_then(|i| i.size()).unwrap_or(32 << 20),
        flood_guard: match get("flood_guard") {
            None => Some(FloodGuard { requests: 1_000, per: Duration::from_secs(1) }),
            Some(item) => flood_guard(&item),
        },
        drain_timeout: get("drain_timeout").and_then(|i| i.duration()).unwrap_or(Duration::from_secs(30)),
        tls: get("tls").and_then(|item| {
            let section = item.section(&["cert", "key"])?;
            let file = |name| section.require(name, "cert.pem").and_then(|i| i.text().map(PathBuf::from));
            Some(TlsFiles { cert: file("cert")?, key: file("key")? })
        }),
    }
}

/// `0`, or `{ requests, per }`.
fn flood_guard(item: &Item<'_>) -> Option<FloodGuard> {
    if let super::node::Value::Scalar(_) = item.node.value {
        item.parsed(|t| (t == "0").then_some(()), "0 (off), or { requests: 1000, per: second }");
        return None;
    }
    let section = item.section(&["requests", "per"])?;
    let whole = |text: &str| super::units::amount(text).and_then(|n| u32::try_from(n).ok());
    let requests =
        section.get("requests").map_or(Some(1_000), |i| i.parsed(whole, "a number of requests"))?;
    let per = section.get("per").map_or(Some(Duration::from_secs(1)), |i| i.duration())?;
    (requests > 0 && !per.is_zero()).then_some(FloodGuard { requests, per })
}

fn admin(item: Option<&Item<'_>>) -> Admin {
    let section = item.and_then(|i| i.section(&["listen", "token"]));
    let get = |name: &str| section.as_ref().and_then(|s| s.get(name));
    Admin {
        listen: address(get("listen"), [127, 0, 0, 1], 9090),
        token: get("token").and_then(|i| secret(&i)),
    }
}

/// A secret that goes into a header; an empty one is none.
fn secret(item: &Item<'_>) -> Option<Secret> {
    let text = item.text()?;
    if !text.is_empty() && HeaderValue::from_str(text).is_err() {
        item.fault("this has characters that no header can carry");
        return None;
    }
    (!text.is_empty()).then(|| Secret::new(text))
}

fn upstreams(top: &Section<'_>) -> Vec<Arc<Upstream>> {
    let example = "upstreams: { openai: { base_url: https://api.openai.com/v1 } }";
    let Some(section) =
        top.require("upstreams", example).and_then(|i| i.map("a mapping of names to upstreams"))
    else {
        return Vec::new();
    };
    let all: Vec<_> =
        section.items().filter_map(|(key, item)| upstream(&key.name, &item)).map(Arc::new).collect();
    if section.items().next().is_none() {
        section.findings.fault(
            section.place,
            "upstreams",
            format!("there has to be one; for example: {example}"),
        );
    }
    all
}

fn upstream(name: &str, item: &Item<'_>) -> Option<Upstream> {
    let known = ["base_url", "api", "api_key", "timeouts", "headers", "stream_usage"];
    let section = item.section(&known)?;
    let base_url = section.require("base_url", "https://api.openai.com/v1").and_then(|i| base_url(&i));
    let apis = [
        ("openai", ApiKind::OpenAi),
        ("azure", ApiKind::Azure),
        ("anthropic", ApiKind::Anthropic),
        ("gemini", ApiKind::Gemini),
    ];
    Some(Upstream {
        name: name.to_owned(),
        api: section.get("api").and_then(|i| i.choice(&apis)).unwrap_or(ApiKind::OpenAi),
        api_key: section.get("api_key").and_then(|i| secret(&i)),
        timeouts: timeouts(section.get("timeouts").as_ref()),
        headers: section.get("headers").map(|i| headers(&i)).unwrap_or_default(),
        ask_stream_usage: section
            .get("stream_usage")
            .and_then(|i| i.choice(&[("ask", true), ("never", false)]))
            .unwrap_or(true),
        // A missing or wrong one was noted: the config is refused, whatever stands here.
        base_url: base_url.unwrap_or_else(|| Uri::from_static("http://invalid/")),
    })
}

/// Not repeated in messages: it may hold a password.
fn base_url(item: &Item<'_>) -> Option<Uri> {
    const EXPECTED: &str = "has to be an http or https URL such as https://api.openai.com/v1";
    let text = item.text()?;
    let Ok(uri) = text.trim_end_matches('/').parse::<Uri>() else {
        item.fault(format!("this {EXPECTED}"));
        return None;
    };
    let authority = uri.authority().map(http::uri::Authority::as_str).unwrap_or_default();
    if !matches!(uri.scheme_str(), Some("http" | "https")) || uri.host().is_none_or(str::is_empty) {
        item.fault(format!("this {EXPECTED}"));
    } else if authority.contains('@') {
        item.fault("this must not hold a user name or password; keys go into api_key");
    } else if uri.query().is_some() || text.contains('#') {
        item.fault("this must not have a query or a fragment; the caller's own query is passed on");
    } else {
        return Some(uri);
    }
    None
}

fn timeouts(item: Option<&Item<'_>>) -> Timeouts {
    let section = item.and_then(|i| i.section(&["connect", "first_byte", "idle", "total"]));
    let get = |name: &str, default: u64| {
        let item = section.as_ref().and_then(|s| s.get(name));
        let duration = item.as_ref().and_then(Item::duration);
        if let (Some(item), Some(Duration::ZERO)) = (&item, duration) {
            item.fault("a timeout of 0 would fail every request");
        }
        duration.unwrap_or(Duration::from_secs(default))
    };
    Timeouts {
        connect: get("connect", 5),
        first_byte: get("first_byte", 120),
        idle: get("idle", 60),
        total: get("total", 900),
    }
}

fn headers(item: &Item<'_>) -> HeaderMap {
    const RESERVED: [&str; 10] = [
        "host",
        "content-length",
        "transfer-encoding",
        "connection",
        "keep-alive",
        "te",
        "trailer",
        "upgrade",
        "proxy-authorization",
        "accept-encoding",
    ];
    let mut headers = HeaderMap::new();
    let Some(section) = item.map("a mapping of names to values") else { return headers };
    for (key, item) in section.items() {
        let name = key.name.parse::<HeaderName>().ok().filter(|n| !RESERVED.contains(&n.as_str()));
        let Some(name) = name else {
            item.fault("this is no header name, or one that the gateway sets itself");
            continue;
        };
        match item.text().map(HeaderValue::from_str) {
            Some(Ok(value)) => drop(headers.insert(name, value)),
            Some(Err(_)) => item.fault("this value has characters that no header can carry"),
            None => {}
        }
    }
    headers
}

fn model(item: &Item<'_>) -> Option<ModelRule> {
    let section = item.section(&["match", "encoding", "tokenizer"])?;
    let pattern = section.require("match", "\"llama-3*\"").and_then(|i| i.text().map(Glob::new));
    let encodings = [
        ("o200k_base", TokenizerName::O200k),
        ("o200k_harmony", TokenizerName::O200k),
        ("cl100k_base", TokenizerName::Cl100k),
    ];
    let tokenizer = match (section.get("encoding"), section.get("tokenizer")) {
        (Some(encoding), None) => match encoding.choice(&encodings)? {
            TokenizerName::O200k => TokenizerChoice::O200k,
            TokenizerName::Cl100k => TokenizerChoice::Cl100k,
        },
        (None, Some(file)) => TokenizerChoice::File(file.text()?.into()),
        _ => {
            item.fault("give either an encoding or a tokenizer file");
            return None;
        }
    };
    Some(ModelRule { pattern: pattern?, tokenizer })
}

#[derive(Clone, Copy)]
enum TokenizerName {
    O200k,
    Cl100k,
}

fn store(item: Option<&Item<'_>>) -> Store {
    let section = item.and_then(|i| i.section(&["path", "history", "redis", "memory"]));
    let get = |name: &str| section.as_ref().and_then(|s| s.get(name));
    let memory = get("memory").and_then(|i| i.boolean()).unwrap_or(false);
    let redis = get("redis").and_then(|i| redis(&i));
    if memory && redis.is_some() {
        let place = get("memory").map_or(Place::File(1, 1), |i| i.node.place.clone());
        if let Some(section) = &section {
            section.findings.fault(
                &place,
                "store.memory",
                "counters are kept in memory or in Redis, not both",
            );
        }
    }
    Store {
        path: get("path").and_then(|i| i.text()).unwrap_or("data/tollgate.db").into(),
        history: get("history").and_then(|i| i.duration()).unwrap_or(Duration::from_hours(840)),
        memory,
        redis,
    }
}

fn redis(item: &Item<'_>) -> Option<Redis> {
    let section = item.section(&["url", "prefix", "on_failure", "lease"])?;
    let url = section.require("url", "redis://127.0.0.1:6379/0")?.text()?;
    let policies = [
        ("local", OnStoreFailure::Local),
        ("closed", OnStoreFailure::Closed),
        ("open", OnStoreFailure::Open),
    ];
    Some(Redis {
        url: Secret::new(url),
        prefix: section.get("prefix").and_then(|i| i.text()).unwrap_or("tollgate").to_owned(),
        on_failure: section
            .get("on_failure")
            .and_then(|i| i.choice(&policies))
            .unwrap_or(OnStoreFailure::Local),
        lease: section.get("lease").and_then(|i| i.boolean()).unwrap_or(false),
    })
}
