//! A gateway that runs in the test's process, in front of an upstream.

use super::redis::with_store;
use super::{Caller, Reply, Upstream, soon};
use serde_json::Value;
use std::net::SocketAddr;
use std::path::Path;
use tollgate::app::{App, CallerTimeouts, Workers};
use tollgate::config::parse;

pub struct Gateway {
    app: Option<App>,
    pub address: SocketAddr,
    pub admin: SocketAddr,
}

/// The YAML of an open environment `staging` with these quotas and this value of `reserve.completion`.
fn staging(quotas: &str, completion: &str) -> String {
    format!(
        "  staging:\n    upstream: backend\n    reserve: {{ completion: {completion} }}\n    quotas: {quotas}\ndefault_environment: staging"
    )
}

impl Gateway {
    /// A gateway with one open environment `staging`, these quotas, and `reserve.completion: max_tokens`.
    pub async fn in_front_of(upstream: &Upstream, quotas: &str) -> Self {
        Self::reserving(upstream, quotas, "max_tokens").await
    }

    /// Like `in_front_of`, with this value of `reserve.completion`.
    pub async fn reserving(upstream: &Upstream, quotas: &str, completion: &str) -> Self {
        Self::with(upstream, "", &staging(quotas, completion)).await
    }

    /// A gateway with more settings of the upstream `backend`, and this content of `environments`.
    pub async fn with(upstream: &Upstream, settings: &str, environments: &str) -> Self {
        Self::with_timeouts(upstream, settings, environments, CallerTimeouts::default()).await
    }

    /// Like `with`, with these timeouts for callers.
    pub async fn with_timeouts(
        upstream: &Upstream,
        settings: &str,
        environments: &str,
        timeouts: CallerTimeouts,
    ) -> Self {
        let text = format!(
            "server: {{ listen: '127.0.0.1:0', max_request_body: 1MiB, drain_timeout: 5s }}\nadmin: {{ listen: '127.0.0.1:0' }}\n\
             upstreams:\n  backend: {{ base_url: 'http://{}/v1', {settings} }}\nenvironments:\n{environments}\nstore: {{ memory: true }}\n",
            upstream.address
        );
        Self::start(&text, timeouts).await
    }

    /// A gateway with this config.
    pub async fn from_config(text: &str) -> Self {
        Self::start(text, CallerTimeouts::default()).await
    }

    /// A gateway with this config and these timeouts for callers.
    pub async fn from_config_with(text: &str, timeouts: CallerTimeouts) -> Self {
        Self::start(text, timeouts).await
    }

    /// A gateway with the config in this file, which it watches.
    pub async fn from_file(path: &Path) -> Self {
        let text = std::fs::read_to_string(path).unwrap();
        Self::start_from(&text, Some(path), CallerTimeouts::default()).await
    }

    async fn start(text: &str, timeouts: CallerTimeouts) -> Self {
        Self::start_from(&with_store(text), None, timeouts).await
    }

    async fn start_from(text: &str, path: Option<&Path>, timeouts: CallerTimeouts) -> Self {
        let mut loaded =
            parse(text, "test.yaml", &|_| None, &[]).unwrap_or_else(|faults| panic!("{faults}\n{text}"));
        if let Some(path) = path {
            let modified = path.metadata().unwrap().modified().unwrap();
            let since = modified.duration_since(std::time::UNIX_EPOCH).unwrap();
            loaded.config.file = Some(path.to_owned());
            loaded.config.file_modified_ms = u64::try_from(since.as_millis()).unwrap();
        }
        let start = move || App::start_with(loaded.config, Workers::default(), timeouts).unwrap();
        let app = tokio::task::spawn_blocking(start).await.unwrap();
        Self { address: app.address(), admin: app.admin_address(), app: Some(app) }
    }

    pub async fn caller(&self) -> Caller {
        Caller::connect(self.address).await
    }

    /// Sends a request on a new connection and reads the complete answer.
    pub async fn send(&self, method: &str, target: &str, headers: &str, body: &str) -> Reply {
        let mut caller = self.caller().await;
        caller.request(method, target, headers, body.as_bytes()).await;
        caller.reply().await
    }

    pub async fn post(&self, target: &str, body: &str) -> Reply {
        self.send("POST", target, "", body).await
    }

    pub async fn chat(&self, body: &str) -> Reply {
        self.post(super::CHAT, body).await
    }

    pub async fn admin_get(&self, target: &str) -> Reply {
        admin_get_at(self.admin, target).await
    }

    pub async fn environment(&self) -> Value {
        environment_at(self.admin).await
    }

    /// Requests, prompt, completion and total tokens charged so far.
    pub async fn charged(&self) -> [u64; 4] {
        charged_at(self.admin).await
    }

    /// The metric that counts answers whose usage is missing or not credible.
    pub async fn usage_missing(&self, reason: &str) -> u64 {
        let metrics = self.admin_get("/metrics").await;
        let line = format!(r#"tollgate_usage_missing_total{{environment="staging",reason="{reason}"}} "#);
        let count = metrics.text().lines().find_map(|l| l.strip_prefix(&line)).map(|n| n.parse().unwrap());
        count.unwrap_or(0)
    }

    /// Waits until no request is in flight, checks that nothing is held, and returns the environment.
    pub async fn settled(&self) -> Value {
        settled_at(self.admin).await
    }

    /// Waits until no request is in flight and returns the charged amounts, as `charged` does.
    pub async fn settled_charges(&self) -> [u64; 4] {
        self.settled().await;
        self.charged().await
    }

    pub async fn shutdown(mut self) -> tollgate::app::ShutdownReport {
        let app = self.app.take().unwrap();
        tokio::task::spawn_blocking(move || app.shutdown()).await.unwrap()
    }

    /// Takes the application out, so that the test controls its shutdown.
    pub fn take(&mut self) -> App {
        self.app.take().unwrap()
    }
}

/// Sends a request with a body to the admin listener of a gateway.
pub async fn admin(gateway: &Gateway, method: &str, target: &str, body: &str) -> Reply {
    let mut caller = Caller::connect(gateway.admin).await;
    let (host, length) = (gateway.admin, body.len());
    let head =
        format!("{method} {target} HTTP/1.1\r\nhost: {host}\r\ncontent-length: {length}\r\n\r\n{body}");
    caller.send(head.as_bytes()).await;
    caller.reply().await
}

/// Sends a change to the admin API, which must succeed.
pub async fn change(gateway: &Gateway, method: &str, target: &str, body: &str) {
    let reply = admin(gateway, method, target, body).await;
    assert_eq!(reply.status, 200, "{}", reply.text());
}

/// Sends a GET request to an admin listener.
pub async fn admin_get_at(admin: SocketAddr, target: &str) -> Reply {
    let mut caller = Caller::connect(admin).await;
    caller.send(format!("GET {target} HTTP/1.1\r\nhost: {admin}\r\n\r\n").as_bytes()).await;
    caller.reply().await
}

async fn environment_at(admin: SocketAddr) -> Value {
    admin_get_at(admin, "/api/environments").await.json()["environments"][0].clone()
}

/// Requests, prompt, completion and total tokens charged by the gateway with this admin listener.
pub async fn charged_at(admin: SocketAddr) -> [u64; 4] {
    let environment = environment_at(admin).await;
    ["requests", "prompt_tokens", "completion_tokens", "total_tokens"]
        .map(|name| environment["totals"][name].as_u64().unwrap())
}

/// Waits until no request is in flight at the gateway with this admin listener, and checks that nothing is held.
pub async fn settled_at(admin: SocketAddr) -> Value {
    soon("everything to settle", async {
        loop {
            let environment = environment_at(admin).await;
            if environment["in_flight"] == 0 {
                for quota in environment["quotas"].as_array().unwrap() {
                    assert_eq!(quota["held"], 0, "{environment}");
                }
                return environment;
            }
        }
    })
    .await
}

impl Drop for Gateway {
    fn drop(&mut self) {
        // The shutdown joins threads, which must not block the test's runtime.
        if let Some(app) = self.app.take() {
            std::thread::spawn(move || drop(app));
        }
    }
}
