//! `GET /v1/models` of an environment with routes.

use super::*;
use std::time::{Duration, Instant};

fn list(models: &[&str]) -> Answer {
    let models: Vec<String> =
        models.iter().map(|id| format!(r#"{{"id":"{id}","object":"model"}}"#)).collect();
    Answer::json(200, &format!(r#"{{"object":"list","data":[{}]}}"#, models.join(",")))
}

fn ids(reply: &Reply) -> Vec<String> {
    assert_eq!(reply.status, 200, "{}", reply.text());
    reply.json()["data"].as_array().unwrap().iter().map(|m| m["id"].as_str().unwrap().to_owned()).collect()
}

#[tokio::test]
async fn the_list_is_the_union_of_what_the_upstreams_list() {
    let a = Upstream::always(list(&["gpt-4o", "gpt-4.1", "o3"])).await;
    let b = Upstream::always(list(&["gpt-4o", "llama-3", "secret-1"])).await;
    let unused = Upstream::always(list(&["unused"])).await;
    let routes = "{ models: ['llama-*'], upstream: b }, { models: ['gpt-4o'], upstream: [b, a] }";
    let all = [("a", &a), ("b", &b), ("unused", &unused)];
    let gateway = Arc::new(gateway(&all, routes, "models: ['gpt-*', 'llama-*']").await);
    let callers = (0..20).map(|_| {
        let gateway = gateway.clone();
        tokio::spawn(
            async move { gateway.send("GET", "/v1/models", "authorization: Bearer mine\r\n", "").await },
        )
    });
    for caller in callers.collect::<Vec<_>>() {
        let reply = caller.await.unwrap();
        assert_eq!(ids(&reply), ["gpt-4o", "llama-3", "gpt-4.1"]);
        assert_eq!(reply.header("content-type"), Some("application/json"));
        assert_eq!(reply.header("x-tollgate-environment"), Some("staging"));
    }
    // Each upstream is asked once a minute, with its own key.
    assert_eq!(seen(&[&a, &b, &unused]), [1, 1, 0]);
    assert_eq!(a.only().all("authorization"), ["Bearer key-of-a"]);
    assert_eq!(gateway.settled_charges().await, [0; 4]);
    // The form is that of the SDK.
    let anthropic = gateway.send("GET", "/v1/models", "anthropic-version: 2023-06-01\r\n", "").await;
    assert_eq!((ids(&anthropic).len(), &anthropic.json()["last_id"]), (3, &"gpt-4.1".into()));
    let google = gateway.send("GET", "/v1beta/models", "", "").await.json();
    assert_eq!(google["models"][1]["name"], "models/llama-3");
    assert_eq!(seen(&[&a, &b]), [1, 1]);
}

#[tokio::test]
async fn an_upstream_that_fails_is_left_out() {
    let a = Upstream::always(list(&["gpt-4o"])).await;
    let failing = Upstream::always(Answer::json(500, "{}")).await;
    let strange = Upstream::always(Answer::json(200, "[1,2")).await;
    let silent = Upstream::always(Answer::silence()).await;
    let routes = "{ models: ['b'], upstream: [failing, strange, silent, gone] }";
    let mut text = upstreams(&[("a", &a), ("failing", &failing), ("strange", &strange), ("silent", &silent)]);
    text += &format!("  gone: {{ base_url: 'http://{}' }}\n", refusing_address());
    let gateway = gateway_with(&text, "a", routes, "").await;
    let began = Instant::now();
    assert_eq!(ids(&gateway.send("GET", "/v1/models", "", "").await), ["gpt-4o"]);
    // They are asked at the same time, and a silent one for 5 s.
    assert!(began.elapsed() < Duration::from_secs(8), "{:?}", began.elapsed());
    let began = Instant::now();
    assert_eq!(ids(&gateway.send("GET", "/v1/models", "", "").await), ["gpt-4o"]);
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    assert_eq!(seen(&[&a, &failing, &strange, &silent]), [1, 1, 1, 1]);
}

#[tokio::test]
async fn the_log_has_the_reason_in_words() {
    let address = refusing_address();
    let sections = format!(
        "upstreams: {{ gone: {{ base_url: 'http://{address}' }}, nameless: {{ base_url: 'http://no-such-host.invalid' }} }}\n\
         environments: {{ e: {{ upstream: gone, routes: [{{ models: ['a'], upstream: nameless }}] }} }}\ndefault_environment: e"
    );
    let gateway = Process::start(&sections, &[]).await;
    let mut caller = gateway.caller().await;
    caller.request("GET", "/v1/models", "", b"").await;
    assert_eq!(caller.reply().await.status, 502);
    for reason in
        ["no connection to its address: Connection refused", "its host name could not be resolved (DNS): "]
    {
        let line = soon("the log", gateway.line_with(reason)).await;
        assert!(line.contains("did not list them") && !line.contains("kind:"), "{line}");
    }
    // The answer to a caller names the step that failed.
    let reply = gateway.chat(&HELLO.replace("gpt-4o", "a")).await;
    assert_eq!(reply.refusal(), (502, "upstream_unreachable".into()));
    let message = "cannot reach the upstream 'nameless': its host name could not be resolved (DNS).";
    assert!(reply.text().contains(message), "{}", reply.text());
}

#[tokio::test]
async fn without_any_list_there_is_an_error() {
    let a = Upstream::always(Answer::json(401, "{}")).await;
    let gateway = gateway(&[("a", &a)], "{ models: ['*'], upstream: a }", "").await;
    let reply = gateway.send("GET", "/v1/models", "", "").await;
    assert_eq!(reply.refusal(), (502, "upstream_unreachable".into()));
    assert!(reply.text().contains("no upstream has listed its models"), "{}", reply.text());
}

#[tokio::test]
async fn the_description_of_a_model_comes_from_where_its_requests_go() {
    let (a, b) = (Upstream::always(named("a")).await, Upstream::always(named("b")).await);
    let routes = "{ models: ['gpt-4o', 'text-embedding-*'], apis: [embeddings], upstream: b }, { models: ['gpt-*'], upstream: a }, \
                  { models: ['claude-*'], apis: [messages], upstream: b }";
    let gateway = gateway(&[("a", &a), ("b", &b)], routes, "").await;
    for (model, want) in
        [("gpt-4o", "a"), ("text-embedding-3-small", "b"), ("claude-opus-4", "b"), ("o3", "a")]
    {
        let reply = gateway.send("GET", &format!("/v1/models/{model}"), "", "").await;
        assert_eq!(reply.header("x-tollgate-upstream"), Some(want), "{model}");
    }
}

#[tokio::test]
async fn without_routes_the_list_passes_as_before() {
    let a = Upstream::always(list(&["gpt-4o"])).await;
    let gateway = Gateway::in_front_of(&a, "{ requests: { limit: 1000, per: minute } }").await;
    for _ in 0..3 {
        let reply = gateway.send("GET", "/v1/models", "authorization: Bearer mine\r\n", "").await;
        assert_eq!(reply.text(), r#"{"object":"list","data":[{"id":"gpt-4o","object":"model"}]}"#);
    }
    assert_eq!((seen(&[&a]), a.seen()[0].all("authorization")), (vec![3], vec!["Bearer mine"]));
}

#[tokio::test]
async fn the_list_has_the_names_of_the_upstreams_and_no_aliases_of_routes() {
    let a = Upstream::always(list(&["gpt-4o"])).await;
    let b = Upstream::always(list(&["meta/llama-3", "meta/other"])).await;
    let routes = "{ models: [llama-3], upstream: b, model: meta/llama-3 }";
    let all = [("a", &a), ("b", &b)];
    let gateway = gateway(&all, routes, "").await;
    assert_eq!(
        ids(&gateway.send("GET", "/v1/models", "", "").await),
        ["meta/llama-3", "meta/other", "gpt-4o"]
    );
    // The allow-list applies to the names in the list. An alias may be requested all the same.
    let gateway = self::gateway(&all, routes, "models: [llama-3, 'gpt-*']").await;
    assert_eq!(ids(&gateway.send("GET", "/v1/models", "", "").await), ["gpt-4o"]);
    let reply = gateway.send("GET", "/v1/models/llama-3", "", "").await;
    assert_eq!((reply.status, reply.header("x-tollgate-upstream")), (200, Some("b")));
    assert_eq!(b.seen().last().unwrap().target(), "/v1/models/meta/llama-3");
    let reply = gateway.send("GET", "/v1/models/meta/llama-3", "", "").await;
    assert_eq!(reply.refusal(), (404, "model_not_found".into()));
}
