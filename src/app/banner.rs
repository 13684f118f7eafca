//! What the gateway reports when it begins to serve.

use super::App;
use crate::config::{Config, Environment, StoreSettings, TlsFiles};
use crate::ledger::Account;
use crate::telemetry::{Line, write_event};
use std::fmt::Write as _;
use std::net::SocketAddr;

/// The width of the names in the text for people.
const NAME_WIDTH: usize = 14;

/// The facts about a gateway that begins to serve.
struct Banner<'a> {
    config: &'a Config,
    address: SocketAddr,
    admin: SocketAddr,
    /// Limits and settings that administrators have set, by environment.
    overrides: Vec<(&'a str, usize)>,
}

impl App {
    /// Reports in the log what this gateway serves, and where.
    pub(crate) fn announce(&self) {
        let snapshot = self.state.current();
        let count = |account: &Account| {
            let set = account.overrides();
            set.limits.len() + usize::from(set.enforce.is_some())
        };
        let environments = snapshot.config.environments.iter().zip(&snapshot.accounts);
        let overrides = environments.map(|(e, account)| (e.name.as_str(), count(account))).collect();
        let banner =
            Banner { config: &snapshot.config, address: self.address, admin: self.admin_address, overrides };
        write_event("tollgate::app", "serving", |line| banner.add_to(line), || banner.text());
    }
}

impl Banner<'_> {
    fn add_to(&self, line: &mut Line<'_>) {
        let Self { config, address, admin, .. } = self;
        line.add("version", env!("CARGO_PKG_VERSION"));
        line.add_if_any("config", config.file.as_ref().map(|file| file.display().to_string()));
        line.add("store", store(&config.store));
        line.add("address", address);
        line.add("admin", admin);
        line.add("base_url", self.base_url());
        line.add("environments", config.environments.iter().map(|e| e.name.as_str()).collect::<Vec<_>>());
        line.add("keys", self.keys());
        line.add("upstreams", config.upstreams.iter().map(|u| u.name.as_str()).collect::<Vec<_>>());
        line.add("overrides", self.overrides.iter().map(|(_, count)| count).sum::<usize>());
    }

    /// The number of callers' keys.
    fn keys(&self) -> usize {
        self.config.environments.iter().flat_map(|e| &e.callers).map(|caller| caller.sha256.len()).sum()
    }

    /// What an SDK needs to know.
    fn base_url(&self) -> String {
        let scheme = scheme(self.config.server.tls.as_ref());
        let host = if self.address.ip().is_unspecified() {
            format!("localhost:{}", self.address.port())
        } else {
            self.address.to_string()
        };
        format!("{scheme}://{host}/v1")
    }

    fn text(&self) -> String {
        let config = self.config;
        let mut text = format!("\nTollgate {}\n", env!("CARGO_PKG_VERSION"));
        let mut add = |name: &str, value: &str| {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "  {name:<NAME_WIDTH$}{value}");
        };
        add("base_url", &self.base_url());
        for (index, environment) in config.environments.iter().enumerate() {
            let name = if index == 0 { "environments" } else { "" };
            add(name, &describe(environment, config.default_environment == Some(index)));
        }
        for (index, upstream) in config.upstreams.iter().enumerate() {
            let name = if index == 0 { "upstreams" } else { "" };
            let urls: Vec<String> = upstream.base_urls.iter().map(ToString::to_string).collect();
            add(name, &format!("{}: {}", upstream.name, urls.join(", ")));
        }
        add("store", &store(&config.store));
        if let Some(file) = &config.file {
            add("config", &file.display().to_string());
        }
        add("admin", &format!("{}://{}/", scheme(config.admin.tls.as_ref()), self.admin));
        let in_force: Vec<String> = self
            .overrides
            .iter()
            .filter(|(_, count)| *count > 0)
            .map(|(environment, count)| format!("{count} in {environment}"))
            .collect();
        let in_force = if in_force.is_empty() { "none".to_owned() } else { in_force.join(", ") };
        add("overrides", &in_force);
        text.push('\n');
        text
    }
}

fn scheme(tls: Option<&TlsFiles>) -> &'static str {
    if tls.is_some() { "https" } else { "http" }
}

/// An environment with the number of its keys.
fn describe(environment: &Environment, is_default: bool) -> String {
    let keys: usize = environment.callers.iter().map(|caller| caller.sha256.len()).sum();
    let access = match keys {
        0 => "open".to_owned(),
        1 => "1 key".to_owned(),
        _ => format!("{keys} keys"),
    };
    let routes = match environment.routes.len() {
        0 => String::new(),
        1 => ", 1 route".to_owned(),
        n => format!(", {n} routes"),
    };
    let default = if is_default { ", default" } else { "" };
    let shadow = if environment.enforce { "" } else { ", shadow mode" };
    format!("{} ({access}{routes}{default}{shadow}) to {}", environment.name, environment.upstream.name)
}

fn store(settings: &StoreSettings) -> String {
    let redis = if settings.redis.is_some() { ", counters in Redis" } else { "" };
    let place = if settings.memory { "memory".to_owned() } else { settings.path.display().to_string() };
    place + redis
}
