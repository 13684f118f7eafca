//! `tollgate check --online`: tries the upstreams and Redis.

use crate::clock::Stopwatch;
use crate::config::{Config, RedisSettings, UpstreamSettings};
use crate::proxy::models_request;
use crate::redis::{self, FailFastConnection};
use crate::upstream::{CertificateFault, DiagnosisStep, StepFault, Upstream, client_config};
use anyhow::Context as _;
use futures_util::future::join_all;
use http::{StatusCode, Uri};
use std::fmt::Write as _;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::timeout;
use tokio_rustls::rustls::ClientConfig;

/// Time limit for each upstream, and for Redis. All are tried in parallel.
const MAX_TIME: Duration = Duration::from_secs(10);

/// The outcome of all checks.
pub(super) struct OnlineReport {
    pub(super) text: String,
    pub(super) faults: usize,
}

/// Tries all upstreams, and Redis if there is one.
///
/// # Errors
/// No runtime can be started.
pub(super) fn check(config: &Config) -> anyhow::Result<OnlineReport> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let tls = client_config()?;
    let (upstreams, redis) = runtime.block_on(async {
        let upstreams = join_all(config.upstreams.iter().map(|settings| upstream(settings, &tls)));
        tokio::join!(upstreams, redis(config))
    });
    // A lookup that is still running must not delay the end.
    runtime.shutdown_background();
    let mut report = OnlineReport { text: String::new(), faults: 0 };
    upstreams.into_iter().flatten().chain(redis).for_each(|part| report.add(&part));
    Ok(report)
}

/// The lines about one server. The name of each step has its time, or a fault.
struct Part {
    title: String,
    lines: Vec<(String, Duration, Result<String, String>)>,
}

impl OnlineReport {
    fn add(&mut self, part: &Part) {
        let _ = writeln!(self.text, "  {}", part.title);
        for (name, took, result) in &part.lines {
            let ms = took.as_millis();
            let line = match result {
                Ok(text) => format!("{name:<20} {ms:>6} ms   {text}"),
                Err(fault) => {
                    self.faults += 1;
                    format!("{name:<20} {ms:>6} ms   FAULT: {fault}")
                }
            };
            let _ = writeln!(self.text, "    {}", line.trim_end());
        }
    }
}

/// The steps at each replica of an upstream.
async fn upstream(settings: &Arc<UpstreamSettings>, tls: &Arc<ClientConfig>) -> Vec<Part> {
    let title = |url: &Uri| format!("upstream {} at {url}", settings.name);
    let replicas = match Upstream::alone(settings.clone(), tls) {
        Ok(upstream) => upstream.diagnose(&models_request(settings), MAX_TIME).await,
        Err(error) => {
            let line = ("TLS".to_owned(), Duration::ZERO, Err(format!("{error:#}")));
            return vec![Part { title: title(&settings.base_url), lines: vec![line] }];
        }
    };
    let part = |(url, steps): (&Uri, Vec<DiagnosisStep>)| {
        let line = |DiagnosisStep { name, took, result }| (name, took, explain(result, settings, url));
        Part { title: title(url), lines: steps.into_iter().map(line).collect() }
    };
    settings.base_urls.iter().zip(replicas).map(part).collect()
}

/// The result of a step. A fault names the settings to check.
fn explain(
    result: Result<String, StepFault>,
    settings: &UpstreamSettings,
    url: &Uri,
) -> Result<String, String> {
    let fault = match result {
        Ok(text) => return Ok(text),
        Err(fault) => fault,
    };
    let setting = |key: &str| format!("upstreams.{}.{key}", settings.name);
    let base_url = setting(if settings.base_urls.len() == 1 { "base_url" } else { "base_urls" });
    let host = url.host().unwrap_or_default();
    Err(match fault {
        StepFault::NotResolved(error) => {
            format!("the name {host} has no address ({error}); check {base_url}, or the DNS of this machine")
        }
        StepFault::NotConnected(error) => {
            format!("no connection ({error}); check host and port of {base_url}, and the firewall")
        }
        StepFault::NoTls(error) => tls_fault(&error, &base_url),
        StepFault::NoAnswer(error) => {
            format!("no valid HTTP answer ({error}); check scheme and port of {base_url}")
        }
        StepFault::TimedOut(limit) if limit >= MAX_TIME / 2 => format!(
            "no result within the {} s of this check; check {}, and the load of the upstream",
            MAX_TIME.as_secs(),
            base_url
        ),
        StepFault::TimedOut(limit) => {
            format!("no result within {limit:.1?}; check {} and {}", base_url, setting("timeouts"))
        }
        StepFault::Refused(StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN)
            if settings.api_key.is_none() =>
        {
            return Ok(
                "refused without a key, as expected: the upstream has no api_key, and callers send their own"
                    .to_owned(),
            );
        }
        StepFault::Refused(status @ (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN)) => {
            format!(
                "{status}: the upstream refused the key; check {} and {}",
                setting("api_key"),
                setting("api")
            )
        }
        StepFault::Refused(status @ (StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED)) => format!(
            "{status}: the upstream has no list of models at this path; check the path of {base_url}, or ignore this if the upstream serves no such list"
        ),
        StepFault::Refused(status) if status.is_redirection() => format!(
            "{status}: the upstream redirects, and the gateway does not follow redirects; correct {base_url}"
        ),
        StepFault::Refused(status) => format!("{status}: the upstream answered with an error"),
    })
}

fn tls_fault(error: &io::Error, base_url: &str) -> String {
    match CertificateFault::in_error(error) {
        Some(CertificateFault { reason, remedy }) => format!("{reason}; check {base_url}, or {remedy}"),
        None => format!("the TLS handshake failed ({error}); check scheme, host and port of {base_url}"),
    }
}

async fn redis(config: &Config) -> Option<Part> {
    let settings = config.store.redis.as_ref()?;
    let environment = config.environments.first()?;
    let watch = Stopwatch::start();
    let checked = timeout(MAX_TIME, check_redis(settings, &environment.name)).await;
    let checked = checked.unwrap_or_else(|_| Err(format!("no result within {} s", MAX_TIME.as_secs())));
    let lines = match checked {
        Ok((address, faults)) => {
            let connected = format!("{address} permits the commands of the script and accepts writes");
            let mut lines = vec![("connection".to_owned(), watch.elapsed(), Ok(connected))];
            for fault in faults {
                let result = if redis::note(&fault).is_some() { Ok(fault) } else { Err(fault) };
                lines.push(("settings".to_owned(), watch.elapsed(), result));
            }
            lines
        }
        Err(fault) => {
            vec![("connection".to_owned(), watch.elapsed(), Err(format!("{fault}; check store.redis.url")))]
        }
    };
    Some(Part { title: "Redis of store.redis".to_owned(), lines })
}

async fn check_redis(settings: &RedisSettings, environment: &str) -> Result<(String, Vec<String>), String> {
    // All keys of an environment have its name as hash tag.
    let key = format!("{}:{{{environment}}}:check", settings.prefix);
    let connection = FailFastConnection::new(settings.url.expose(), &settings.prefix, &key, settings.timeout)
        .context("the URL cannot be used")
        .map_err(|error| format!("{error:#}"))?;
    connection.check().await
}
