//! `tollgate check`: validates the config.

mod online;

use super::usage::grouped;
use super::{BAD_CONFIG, check_certificates, load_or_explain, output};
use crate::clock::{self, Timestamp};
use crate::config::{Config, Environment, RouteSettings};
use crate::glob::Glob;
use crate::ledger::Owner;
use crate::quota::{Quota, UNLIMITED, Window};
use crate::store::{self, StoredEnforce, StoredOverride};
use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(clap::Args)]
pub(super) struct CheckArguments {
    /// Prints the effective config: with variables resolved, defaults filled in and secrets masked
    #[arg(long)]
    print: bool,
    /// Also connects to each upstream, requests its list of models, and tests Redis
    #[arg(long, conflicts_with = "print")]
    online: bool,
}

pub(super) fn run(config: Option<PathBuf>, arguments: &CheckArguments) -> anyhow::Result<ExitCode> {
    let loaded = match load_or_explain(config) {
        Ok(loaded) => loaded,
        Err(code) => return Ok(code),
    };
    let certificates = match check_certificates(&loaded.config) {
        Ok(warnings) => warnings,
        Err(code) => return Ok(code),
    };
    let mut text = String::new();
    let warnings = loaded.warnings.iter().map(ToString::to_string).chain(certificates);
    for warning in warnings.chain(override_warnings(&loaded.config)) {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "warning: {warning}");
    }
    if arguments.print {
        output::report_all(&text);
        output::print(&loaded.config.effective.to_yaml())?;
        return Ok(ExitCode::SUCCESS);
    }
    output::print(&(text + &summary(&loaded.config)))?;
    if arguments.online { check_online(&loaded.config) } else { Ok(ExitCode::SUCCESS) }
}

/// Tries the upstreams and Redis. A fault is a bad config.
fn check_online(config: &Config) -> anyhow::Result<ExitCode> {
    let report = online::check(config)?;
    let end = match report.faults {
        0 => "All servers can be used.".to_owned(),
        1 => "There is 1 fault.".to_owned(),
        count => format!("There are {count} faults."),
    };
    output::print(&format!("\nOnline:\n\n{}\n{end}\n", report.text))?;
    Ok(if report.faults == 0 { ExitCode::SUCCESS } else { ExitCode::from(BAD_CONFIG) })
}

/// A table of what the config declares.
fn summary(config: &Config) -> String {
    let mut text = format!(
        "The config is valid.\n\n  listener for callers   {}\n  admin listener         {}\n",
        config.server.listen, config.admin.listen
    );
    for upstream in &config.upstreams {
        for url in &upstream.base_urls {
            let _ = writeln!(text, "  upstream               {} at {url}", upstream.name);
        }
        for quota in &upstream.quotas {
            let _ = writeln!(text, "    {}", describe_quota(quota));
        }
    }
    for environment in &config.environments {
        let _ = writeln!(text, "  environment            {}", describe(environment));
        for route in &environment.routes {
            let _ = writeln!(text, "    {}", describe_route(route));
        }
        for quota in &environment.quotas {
            let _ = writeln!(text, "    {}", describe_quota(quota));
        }
    }
    text
}

fn describe(environment: &Environment) -> String {
    let callers = match environment.callers.len() {
        0 => "open to all callers".to_owned(),
        1 => "1 caller".to_owned(),
        n => format!("{n} callers"),
    };
    let shadow = if environment.enforce { "" } else { ", quotas are not enforced" };
    format!("{}: upstream {}, {callers}{shadow}", environment.name, environment.upstream.name)
}

fn describe_route(route: &RouteSettings) -> String {
    let models: Vec<&str> = route.models.iter().map(Glob::as_str).collect();
    let upstreams: Vec<&str> = route.upstreams.iter().map(|upstream| upstream.name.as_str()).collect();
    let apis = if route.apis.is_empty() { String::new() } else { format!(" ({})", route.apis.join(", ")) };
    let sent = route.model.as_ref().map_or_else(String::new, |model| format!(", sent as {model}"));
    format!("{}{apis} to upstream {}{sent}", models.join(", "), upstreams.join(", then "))
}

fn describe_quota(quota: &Quota) -> String {
    let owner = match quota.scope.name() {
        "" => String::new(),
        name => format!(" of {} {name}", quota.scope.as_str()),
    };
    let calendar = match &quota.window {
        Window::Calendar { zone, .. } => {
            Some(format!(", by the calendar of {}", zone.iana_name().unwrap_or("UTC")))
        }
        Window::Rolling { .. } => None,
    };
    let limit = if quota.limit == UNLIMITED { quota.limit_text() } else { grouped(quota.limit) };
    format!("{limit:<12} {} per {}{owner}{}", quota.kind, quota.per.text, calendar.unwrap_or_default())
}

/// The limits of the file that an administrator has overridden. The override is in force, not the file.
fn override_warnings(config: &Config) -> Vec<String> {
    if config.store.memory || !config.store.path.exists() {
        return Vec::new();
    }
    let stored = match store::read_overrides(&config.store.path) {
        Ok(stored) => stored,
        Err(error) => return vec![format!("{error:#}")],
    };
    let now = clock::now();
    let is_in_force = |until: Option<Timestamp>| until.is_none_or(|until| until > now);
    let limits = stored.limits.iter().filter(|stored| is_in_force(stored.until));
    let enforce = stored.enforce.iter().filter(|stored| is_in_force(stored.until));
    let limits = limits.filter_map(|stored| override_warning(config, stored));
    limits.chain(enforce.filter_map(|stored| enforce_warning(config, stored))).collect()
}

fn override_warning(config: &Config, stored: &StoredOverride) -> Option<String> {
    let (owner, path) = if let Some((_, environment)) = config.environment(&stored.environment) {
        (Owner::from(environment), format!("environments/{}", environment.name))
    } else {
        let mut upstreams = config.upstreams.iter();
        let upstream = upstreams.find(|upstream| Owner::from(*upstream).key() == stored.environment)?;
        (Owner::from(upstream), format!("upstreams/{}", upstream.name))
    };
    let is_same = |quota: &&Quota| {
        (quota.scope.as_str(), quota.scope.name(), quota.kind.as_str(), quota.per.text.as_str())
            == (stored.scope.as_str(), stored.name.as_str(), stored.kind.as_str(), stored.per.as_str())
    };
    let quotas = owner.counted_quotas();
    let ends = at_end(stored.until);
    let StoredOverride { kind, per, .. } = stored;
    let request = format!("DELETE /api/{path}/quotas/{kind}/{per}{}", query_of(stored));
    let Some(quota) = quotas.iter().find(is_same) else {
        let limit = Some(stored.limit).filter(|limit| *limit != UNLIMITED);
        let limit = limit.map_or("unlimited".to_owned(), |limit| limit.to_string());
        return Some(format!(
            "an administrator has set the limit of {}, {kind} per {per}, to {limit}. The file does not have this quota now. If it returns, this limit is in force again; {request} removes it",
            whose(stored)
        ));
    };
    let set = quota.with_limit(stored.limit, stored.burst);
    let differs = set != *quota;
    differs.then(|| {
        format!(
            "an administrator has set the limit of {}, {kind} per {per}, to {}; the file has {}, which applies again {ends}after {request}",
            quota.scope.describe(&stored.environment),
            set.limit_text(),
            quota.limit_text(),
        )
    })
}

/// What the quota of an override belongs to.
fn whose(StoredOverride { environment, scope, name, .. }: &StoredOverride) -> String {
    match scope.as_str() {
        "environment" => format!("environment '{environment}'"),
        "caller" | "model" => format!("{scope} '{name}' of environment '{environment}'"),
        "upstream" => format!("upstream '{name}'"),
        _ => {
            let (upstream, models) = name.split_once('/').unwrap_or((name, ""));
            format!("model '{models}' of upstream '{upstream}'")
        }
    }
}

/// The query parameters of the admin API that select the quota of an override.
fn query_of(StoredOverride { scope, name, .. }: &StoredOverride) -> String {
    match scope.as_str() {
        "environment" | "upstream" => String::new(),
        "upstream_model" => {
            let models = name.split_once('/').map_or("", |(_, models)| models);
            format!("?model={}", in_query(models))
        }
        _ => format!("?scope={scope}&name={}", in_query(name)),
    }
}

/// A value of a query parameter, with all but usual characters escaped.
fn in_query(text: &str) -> String {
    let escaped = |byte: u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'*' | b'/' => {
            char::from(byte).to_string()
        }
        _ => format!("%{byte:02X}"),
    };
    text.bytes().map(escaped).collect()
}

/// When an override ends by itself, as a part of a sentence.
fn at_end(until: Option<Timestamp>) -> String {
    until.map_or_else(String::new, |until| format!("at {}, or ", until.to_rfc3339()))
}

fn enforce_warning(config: &Config, stored: &StoredEnforce) -> Option<String> {
    let (_, environment) = config.environment(&stored.environment)?;
    (environment.enforce != stored.enforce).then(|| {
        format!(
            "an administrator has set enforce of environment '{name}' to {}; the file has {}, which applies again {}after PATCH /api/environments/{name} with {{\"enforce\": null}}",
            stored.enforce,
            environment.enforce,
            at_end(stored.until),
            name = environment.name,
        )
    })
}
