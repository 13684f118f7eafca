//! The admin API: signing in, the usage history, and the last rejections.

mod audit;
mod bounds;
mod config;
mod environments;
mod events;
mod openapi;
mod system;
mod upstreams;

use crate::support::*;
use serde_json::{Value, json};
use std::time::Duration;

const TOKEN: &str = "the-admin-token-of-this-test";

/// A gateway with a token and a store, and room for two requests a day.
async fn gateway(upstream: &Upstream, folder: &tempfile::TempDir) -> Gateway {
    Gateway::from_config(&format!(
        "server: {{ listen: '127.0.0.1:0' }}\nadmin: {{ listen: '127.0.0.1:0', token: {TOKEN} }}\n\
         upstreams: {{ u: {{ base_url: 'http://{}/v1', api_key: sk-u, quotas: {{ requests: {{ limit: 1000, per: minute }} }} }} }}\nenvironments:\n  production:\n    upstream: u\n    \
         keys: [{{ name: web, secret: sk-some-key-of-web-app }}]\n    quotas: {{ requests: {{ limit: 2, per: day }} }}\n\
         store: {{ path: {} }}\n",
        upstream.address,
        folder.path().join("t.db").display()
    ))
    .await
}

async fn request(gateway: &Gateway, method: &str, target: &str, headers: &str, body: &str) -> Reply {
    let mut admin = Caller::connect(gateway.admin).await;
    let (host, length) = (gateway.admin, body.len());
    let head =
        format!("{method} {target} HTTP/1.1\r\nhost: {host}\r\n{headers}content-length: {length}\r\n\r\n");
    admin.send((head + body).as_bytes()).await;
    admin.reply().await
}

/// Status and code of an error.
fn error(reply: &Reply) -> (u16, String) {
    (reply.status, reply.json()["error"]["code"].as_str().unwrap_or_default().to_owned())
}

fn bearer(token: &str) -> String {
    format!("authorization: Bearer {token}\r\n")
}

/// Signs in and returns the session cookie and the value to repeat.
async fn sign_in(gateway: &Gateway) -> (String, String) {
    let reply = request(gateway, "POST", "/api/session", "", &json!({ "token": TOKEN }).to_string()).await;
    assert_eq!(reply.status, 204);
    let cookies = reply.headers_named("set-cookie");
    let value = |name: &str| {
        let line = cookies.iter().find(|line| line.starts_with(name)).unwrap();
        line[name.len() + 1..line.find(';').unwrap()].to_owned()
    };
    assert!(cookies[0].contains("HttpOnly") && cookies.iter().all(|line| line.contains("SameSite=Strict")));
    assert!(!cookies.concat().contains(TOKEN));
    (value("tollgate_session"), value("tollgate_csrf"))
}

#[tokio::test]
async fn a_session_needs_the_token_once_and_repeats_a_value_to_change_something() {
    let (upstream, folder) = (Upstream::always(Answer::chat(8, 2)).await, tempfile::tempdir().unwrap());
    let gateway = gateway(&upstream, &folder).await;
    let get = |headers: String| {
        let gateway = &gateway;
        async move { request(gateway, "GET", "/api/environments", &headers, "").await.status }
    };
    assert_eq!(
        (get(String::new()).await, get(bearer(TOKEN)).await, get(bearer("wrong")).await),
        (401, 200, 401)
    );
    assert_eq!(request(&gateway, "GET", "/", "", "").await.status, 200);
    let (session, csrf) = sign_in(&gateway).await;
    let cookie = format!("cookie: other=1; tollgate_session={session}\r\n");
    assert_eq!(get(cookie.clone()).await, 200);
    let reset = |headers: String| {
        let gateway = &gateway;
        async move { error(&request(gateway, "POST", "/api/environments/production/reset", &headers, "").await) }
    };
    assert_eq!(reset(cookie.clone()).await, (403, "csrf".into()));
    let repeated = format!("{cookie}x-tollgate-csrf: {csrf}\r\n");
    assert_eq!(
        request(&gateway, "POST", "/api/environments/production/reset", &repeated, "").await.status,
        200
    );
    assert_eq!(request(&gateway, "DELETE", "/api/session", &cookie, "").await.status, 403);
    assert_eq!(request(&gateway, "DELETE", "/api/session", &repeated, "").await.status, 204);
    assert_eq!(get(cookie).await, 401);
}

#[tokio::test]
async fn an_address_that_guesses_tokens_has_to_wait() {
    let (upstream, folder) = (Upstream::always(Answer::chat(8, 2)).await, tempfile::tempdir().unwrap());
    let gateway = gateway(&upstream, &folder).await;
    let (session, _) = sign_in(&gateway).await;
    for attempt in 0..5 {
        let body = json!({ "token": format!("guess-{attempt}") }).to_string();
        let in_header = bearer(&format!("guess-{attempt}"));
        let reply = if attempt % 2 == 0 {
            request(&gateway, "POST", "/api/session", "", &body).await
        } else {
            request(&gateway, "GET", "/api/environments", &in_header, "").await
        };
        assert_eq!(error(&reply), (401, "invalid_token".into()));
    }
    let blocked = request(&gateway, "GET", "/api/environments", &bearer(TOKEN), "").await;
    assert_eq!(error(&blocked), (429, "too_many_wrong_tokens".into()));
    assert_eq!(blocked.header("retry-after"), Some("1"));
    // Sessions continue, and health checks answer.
    let cookie = format!("cookie: tollgate_session={session}\r\n");
    assert_eq!(request(&gateway, "GET", "/api/environments", &cookie, "").await.status, 200);
    assert_eq!(request(&gateway, "GET", "/readyz", "", "").await.status, 200);
    tokio::time::sleep(Duration::from_millis(1_050)).await;
    assert_eq!(request(&gateway, "GET", "/api/environments", &bearer(TOKEN), "").await.status, 200);
}

#[tokio::test]
async fn bad_bodies_of_a_sign_in_are_refused() {
    let (upstream, folder) = (Upstream::always(Answer::chat(8, 2)).await, tempfile::tempdir().unwrap());
    let gateway = gateway(&upstream, &folder).await;
    for (body, status) in [
        (String::new(), 400),
        ("[".repeat(60_000), 400),
        (json!({ "token": 7 }).to_string(), 400),
        (json!({ "token": TOKEN, "more": 1 }).to_string(), 400),
        (json!({ "token": "x".repeat(1_000_000) }).to_string(), 413),
    ] {
        assert_eq!(request(&gateway, "POST", "/api/session", "", &body).await.status, status);
    }
}

#[tokio::test]
async fn usage_and_rejections_show_what_was_spent_and_refused() {
    let (upstream, folder) = (Upstream::always(Answer::chat(8, 2)).await, tempfile::tempdir().unwrap());
    let gateway = gateway(&upstream, &folder).await;
    let key = "authorization: Bearer sk-some-key-of-web-app\r\n";
    let mut last = None;
    for _ in 0..3 {
        last = Some(gateway.send("POST", CHAT, key, HELLO).await);
    }
    let denied = last.unwrap();
    assert_eq!(denied.status, 429);
    let get = |target: String| {
        let gateway = &gateway;
        async move { request(gateway, "GET", &target, &bearer(TOKEN), "").await }
    };
    let rejections = get("/api/rejections?environment=production&caller=web&limit=5".into()).await.json();
    let rejection = &rejections["rejections"][0];
    assert_eq!(rejections["rejections"].as_array().unwrap().len(), 1);
    assert_eq!(rejection["request_id"].as_str(), denied.header("x-request-id"));
    assert_eq!(
        (&rejection["code"], &rejection["message"]),
        (&json!("insufficient_quota"), &denied.json()["error"]["message"])
    );
    assert_eq!((&rejection["model"], &rejection["api"]), (&json!("gpt-4o"), &json!("chat")));
    assert_eq!(rejection["quotas"], denied.json()["error"]["quotas"]);
    assert!(
        get("/api/rejections?caller=other".into()).await.json()["rejections"].as_array().unwrap().is_empty()
    );

    // The store's writer commits a moment after the settlement.
    let target = "/api/usage?group_by=environment,model,caller&from=1h&step=day";
    let row = loop {
        let report = get(target.into()).await.json();
        match &report["rows"][0] {
            row if row["rejected"] == 1 && row["requests"] == 2 => break row.clone(),
            _ => tokio::time::sleep(Duration::from_millis(5)).await,
        }
    };
    let of = |name: &str| &row[name];
    assert_eq!(
        (of("environment"), of("model"), of("caller")),
        (&json!("production"), &json!("gpt-4o"), &json!("web"))
    );
    assert_eq!(
        (of("prompt_tokens"), of("completion_tokens"), of("total_tokens")),
        (&json!(16), &json!(4), &json!(20))
    );
    let csv = get(format!("{target}&format=csv&environment=production")).await;
    let (header, line) = csv.text().split_once('\n').unwrap();
    assert_eq!(
        header,
        "from,environment,model,caller,requests,rejected,prompt_tokens,completion_tokens,total_tokens"
    );
    assert_eq!(
        line.trim_end(),
        format!("{},production,gpt-4o,web,2,1,16,4,20", of("from").as_str().unwrap())
    );
    assert_eq!(
        get("/api/usage?environment=nowhere".into()).await.json(),
        json!({ "rows": Value::Array(vec![]) })
    );
    for wrong in ["from=yesterday", "step=30s", "group_by=colour", "format=xml", "colour=red"] {
        assert_eq!(
            error(&get(format!("/api/usage?{wrong}")).await),
            (400, "invalid_value".into()),
            "{wrong}"
        );
    }
}

#[tokio::test]
async fn explain_predicts_the_answer_to_a_request_and_charges_nothing() {
    let (upstream, folder) = (Upstream::always(Answer::chat(8, 2)).await, tempfile::tempdir().unwrap());
    let gateway = gateway(&upstream, &folder).await;
    let explain = |query: &str, body: &str| {
        let (gateway, target, body) = (&gateway, format!("/api/explain{query}"), body.to_owned());
        async move { request(gateway, "POST", &target, &bearer(TOKEN), &body).await }
    };
    let web = "?environment=production&caller=web";
    let before = explain(web, &hello(r#""max_tokens":100"#)).await.json();
    let (estimate, quota) = (&before["estimate"], &before["quotas"][0]);
    assert_eq!((&before["admitted"], &before["retry_after_ms"]), (&json!(true), &Value::Null));
    assert_eq!((&estimate["prompt_tokens"], &estimate["completion_tokens"]), (&json!(8), &json!(100)));
    assert_eq!((&estimate["source"], &estimate["encoding"]), (&json!("rules"), &json!("o200k_base")));
    assert_eq!(
        (&quota["kind"], &quota["requested"], &quota["fits"]),
        (&json!("requests"), &json!(1), &json!(true))
    );
    let key = "authorization: Bearer sk-some-key-of-web-app\r\n";
    for _ in 0..2 {
        let answer = gateway.send("POST", CHAT, key, HELLO).await;
        assert_eq!((answer.status, answer.header("x-tollgate-estimated-prompt-tokens")), (200, Some("8")));
    }
    let after = explain(web, HELLO).await.json();
    let denied = gateway.send("POST", CHAT, key, HELLO).await;
    assert_eq!(denied.status, 429);
    assert_eq!((&after["admitted"], &after["code"]), (&json!(false), &denied.json()["error"]["code"]));
    let wait: u64 = denied.header("retry-after-ms").unwrap().parse().unwrap();
    assert!(after["retry_after_ms"].as_u64().unwrap().abs_diff(wait) < 10_000, "{after}");
    assert_eq!((&after["quotas"][0]["fits"], &after["quotas"][0]["level"]), (&json!(false), &json!(0)));
    for (query, body, want) in [
        ("?environment=nowhere", HELLO, (404, "unknown_environment")),
        ("?environment=production", HELLO, (404, "unknown_caller")),
        ("?environment=production&caller=other", HELLO, (404, "unknown_caller")),
        ("", HELLO, (400, "invalid_value")),
        (web, "{", (400, "invalid_json")),
        (web, r#"{"model":"gpt-4o","messages":[],"n":0}"#, (400, "invalid_value")),
    ] {
        assert_eq!(error(&explain(query, body).await), (want.0, want.1.to_owned()), "{query} {body}");
    }
    let totals = request(&gateway, "GET", "/api/environments/production", &bearer(TOKEN), "").await.json();
    assert_eq!((&totals["totals"]["requests"], &totals["totals"]["rejected"]), (&json!(2), &json!(1)));
}
