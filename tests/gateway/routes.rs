//! Routes: which upstream a request goes to, by which name of the model, and what happens where an upstream cannot serve it.

mod fall_back;
mod model_lists;
mod models;
mod over_tls;
mod quotas;
mod soonest;
mod waiting;

use crate::support::*;
use std::sync::Arc;

/// An answer that names the upstream in its text.
pub fn named(name: &str) -> Answer {
    Answer::chat(8, 5).then(Step::Send(Vec::new())).renamed(name)
}

trait Renamed {
    fn renamed(self, name: &str) -> Self;
}

impl Renamed for Answer {
    /// Puts the name in place of the text of `chat_answer`, with the same length.
    fn renamed(self, name: &str) -> Self {
        let text = format!("{name:<11.11}");
        let replace = |step| match step {
            Step::Send(bytes) => {
                Step::Send(String::from_utf8(bytes).unwrap().replace("Hello there", &text).into_bytes())
            }
            step => step,
        };
        Self::of(self.steps().into_iter().map(replace).collect())
    }
}

/// The line of an upstream, with a key of its own. `settings`: more of its settings.
pub fn upstream_line(name: &str, upstream: &Upstream, settings: &str) -> String {
    format!(
        "  {name}: {{ base_url: 'http://{}/v1', api_key: key-of-{name}, {settings} }}\n",
        upstream.address
    )
}

/// The lines of `upstreams`, each with a key of its own: `a` and `b`.
pub fn upstreams(all: &[(&str, &Upstream)]) -> String {
    all.iter().map(|(name, upstream)| upstream_line(name, upstream, "")).collect()
}

/// A gateway with one environment `staging`, whose requests without a route go to the first upstream. `settings`: more
/// settings of the environment.
pub async fn gateway(all: &[(&str, &Upstream)], routes: &str, settings: &str) -> Gateway {
    gateway_with(&upstreams(all), all[0].0, routes, settings).await
}

pub async fn gateway_with(upstreams: &str, rest: &str, routes: &str, settings: &str) -> Gateway {
    gateway_reserving(upstreams, rest, routes, settings, "completion: max_tokens").await
}

/// `reserve`: how the environment reserves.
pub async fn gateway_reserving(
    upstreams: &str,
    rest: &str,
    routes: &str,
    settings: &str,
    reserve: &str,
) -> Gateway {
    Gateway::from_config(&format!(
        "server: {{ listen: '127.0.0.1:0', max_request_body: 1MiB, drain_timeout: 5s }}\nadmin: {{ listen: '127.0.0.1:0' }}\n\
         upstreams:\n{upstreams}environments:\n  staging:\n    upstream: {rest}\n    routes: [{routes}]\n    {settings}\n    \
         reserve: {{ {reserve} }}\n    quotas: {{ total_tokens: {{ limit: 1000000, per: day }} }}\n\
         default_environment: staging\nstore: {{ memory: true }}\n"
    ))
    .await
}

/// Requests that the upstreams have received.
pub fn seen(all: &[&Upstream]) -> Vec<usize> {
    all.iter().map(|upstream| upstream.seen().len()).collect()
}

/// The value of `tollgate_upstream_attempts_total`.
pub async fn attempts(gateway: &Gateway, upstream: &str, outcome: &str) -> u64 {
    let metrics = gateway.admin_get("/metrics").await;
    let line = format!(r#"tollgate_upstream_attempts_total{{upstream="{upstream}",outcome="{outcome}"}} "#);
    let count = metrics.text().lines().find_map(|l| l.strip_prefix(&line)).map(|n| n.parse().unwrap());
    count.unwrap_or(0)
}

/// An address that refuses connections.
pub fn refusing_address() -> String {
    format!("127.0.0.1:{}", port::free_port())
}

#[tokio::test]
async fn the_first_route_that_matches_model_and_api_decides() {
    let (a, b, c) = (
        Upstream::always(named("a")).await,
        Upstream::always(named("b")).await,
        Upstream::always(named("c")).await,
    );
    let routes = "{ models: ['gpt-4o-mini'], upstream: c }, { models: ['gpt-*', 'o?'], apis: [chat, responses], upstream: b }, \
                  { models: ['gpt-4o'], upstream: c }";
    let gateway = gateway(&[("a", &a), ("b", &b), ("c", &c)], routes, "").await;
    for (path, model, want) in [
        (CHAT, "gpt-4o", "b"),
        (CHAT, "gpt-4o-mini", "c"),
        (CHAT, "o3", "b"),
        (CHAT, "o3-mini", "a"),
        (CHAT, "claude-opus-4", "a"),
        ("/v1/embeddings", "gpt-4o", "c"),
        ("/v1/embeddings", "gpt-4.1", "a"),
        ("/v1/responses/input_tokens", "gpt-4.1", "b"),
        ("/v1/moderations", "gpt-4o", "c"),
        ("/v1/moderations", "gpt-4.1", "a"),
        ("/openai/deployments/gpt-4o/embeddings", "x", "c"),
        ("/v1beta/models/gpt-4o:generateContent", "x", "c"),
    ] {
        let reply = gateway.post(path, &HELLO.replace("gpt-4o", model)).await;
        assert_eq!(reply.status, 200, "{path} {model}: {}", reply.text());
        assert_eq!(reply.header("x-tollgate-upstream"), Some(want), "{path} {model}");
        assert!(reply.text().contains(&format!("\"{want:<11}\"")), "{path} {model}: {}", reply.text());
    }
    // Each upstream receives its own key, and no other.
    for (upstream, key) in [(&a, "key-of-a"), (&b, "key-of-b"), (&c, "key-of-c")] {
        for request in upstream.seen() {
            assert_eq!(request.all("authorization"), [&format!("Bearer {key}")]);
        }
    }
    let charged = gateway.settled_charges().await;
    assert_eq!(charged[0], 12);
    assert_eq!(attempts(&gateway, "c", "answered").await, 5);
}

#[tokio::test]
async fn the_models_of_the_environment_still_decide_what_may_be_requested() {
    let (a, b) = (Upstream::always(named("a")).await, Upstream::always(named("b")).await);
    let routes = "{ models: ['*'], upstream: b, model: other-model }";
    let gateway = gateway(&[("a", &a), ("b", &b)], routes, "models: ['gpt-*']").await;
    assert_eq!(gateway.chat(HELLO).await.header("x-tollgate-upstream"), Some("b"));
    let refused = gateway.chat(&HELLO.replace("gpt-4o", "other-model")).await;
    assert_eq!(refused.refusal(), (404, "model_not_found".into()));
    assert_eq!((seen(&[&a, &b]), b.only().text().contains("other-model")), (vec![0, 1], true));
    // Metrics know the caller's name.
    gateway.settled().await;
    let metrics = gateway.admin_get("/metrics").await;
    let line =
        r#"tollgate_tokens_total{caller="",environment="staging",kind="prompt_tokens",model="gpt-4o"} 8"#;
    let line = line.replace("caller=\"\",", "");
    assert!(metrics.text().lines().any(|found| found == line), "{line}\n{}", metrics.text());
}

#[tokio::test]
async fn each_upstream_has_series_of_its_own() {
    let (a, b) = (Upstream::always(named("a")).await, Upstream::always(named("b")).await);
    let gateway = gateway(&[("a", &a), ("b", &b)], "{ models: ['gpt-4o'], upstream: b }", "").await;
    gateway.chat(HELLO).await;
    gateway.chat(&HELLO.replace("gpt-4o", "gpt-4.1")).await;
    gateway.settled().await;
    let metrics = gateway.admin_get("/metrics").await;
    for (model, upstream) in [("gpt-4o", "b"), ("gpt-4.1", "a")] {
        let line = format!(
            r#"tollgate_request_duration_seconds_count{{environment="staging",model="{model}",upstream="{upstream}"}} 1"#
        );
        assert!(metrics.text().contains(&line), "{line}");
    }
    let system = gateway.admin_get("/api/system").await.json();
    assert_eq!(
        (&system["upstreams"][0]["requests"], &system["upstreams"][1]["requests"]),
        (&1.into(), &1.into())
    );
}

#[tokio::test]
async fn a_reload_changes_the_routes_of_requests_that_begin_afterwards() {
    let (a, b) = (Upstream::always(named("a")).await, Upstream::always(named("b")).await);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("tollgate.yaml");
    let config = |routes: &str| {
        format!(
            "server: {{ listen: '127.0.0.1:0' }}\nadmin: {{ listen: '127.0.0.1:0' }}\nupstreams:\n{}environments:\n  \
             staging: {{ upstream: a{routes}, quotas: {{ requests: {{ limit: 1000, per: minute }} }} }}\n\
             default_environment: staging\nstore: {{ memory: true }}\n",
            upstreams(&[("a", &a), ("b", &b)])
        )
    };
    std::fs::write(&path, config("")).unwrap();
    let gateway = Gateway::from_file(&path).await;
    assert_eq!(gateway.chat(HELLO).await.header("x-tollgate-upstream"), Some("a"));
    std::fs::write(&path, config(", routes: [{ models: ['gpt-*'], upstream: b }]")).unwrap();
    let mut admin = Caller::connect(gateway.admin).await;
    let host = gateway.admin;
    let head = format!("POST /api/config/reload HTTP/1.1\r\nhost: {host}\r\ncontent-length: 0\r\n\r\n");
    admin.send(head.as_bytes()).await;
    let reload = admin.reply().await;
    assert_eq!(reload.status, 200, "{}", reload.text());
    assert!(reload.text().contains("environment staging: routes changed"), "{}", reload.text());
    assert_eq!(gateway.chat(HELLO).await.header("x-tollgate-upstream"), Some("b"));
    let shown = gateway.admin_get("/api/config").await.json();
    assert_eq!(shown["environments"]["staging"]["routes"][0]["upstream"], "b", "{shown}");
}

#[tokio::test]
async fn explain_shows_the_route() {
    let (a, b) = (Upstream::always(named("a")).await, Upstream::always(named("b")).await);
    let routes =
        "{ models: ['x'], upstream: b }, { models: ['gpt-4o'], upstream: [b, a], model: gpt-4o-2024-11-20 }";
    let gateway = gateway(&[("a", &a), ("b", &b)], routes, "").await;
    let explain = async |body: &str| {
        let mut caller = Caller::connect(gateway.admin).await;
        let host = format!("host: {}\r\n", gateway.admin);
        let head = format!(
            "POST /api/explain?environment=staging HTTP/1.1\r\n{host}content-length: {}\r\n\r\n{body}",
            body.len()
        );
        caller.send(head.as_bytes()).await;
        caller.reply().await.json()["route"].clone()
    };
    assert_eq!(
        explain(HELLO).await,
        serde_json::json!({"number": 2, "upstreams": ["b", "a"], "model": "gpt-4o-2024-11-20"})
    );
    assert_eq!(
        explain(&HELLO.replace("gpt-4o", "o3")).await,
        serde_json::json!({"number": null, "upstreams": ["a"], "model": "o3"})
    );
    assert_eq!(seen(&[&a, &b]), [0, 0]);
}

#[tokio::test]
async fn a_route_to_nothing_is_the_error_of_its_only_upstream() {
    let a = Upstream::always(named("a")).await;
    let upstreams =
        format!("{}  gone: {{ base_url: 'http://{}' }}\n", upstreams(&[("a", &a)]), refusing_address());
    let routes = "{ models: ['gpt-4o'], upstream: gone }";
    let gateway = Arc::new(gateway_with(&upstreams, "a", routes, "").await);
    // One upstream is never passed over.
    for _ in 0..7 {
        let reply = gateway.chat(HELLO).await;
        assert_eq!(reply.refusal(), (502, "upstream_unreachable".into()));
        assert!(reply.text().contains("gone") && reply.header("x-tollgate-upstream").is_none());
    }
    assert_eq!(gateway.settled_charges().await[3], 0);
    assert_eq!(attempts(&gateway, "gone", "unreachable").await, 7);
    assert_eq!(seen(&[&a]), [0]);
}
