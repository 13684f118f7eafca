//! `GET /api/audit`: the actions of administrators.

use super::{TOKEN, bearer, gateway, request, sign_in};
use crate::support::*;
use serde_json::Value;

async fn entries(gateway: &Gateway, query: &str) -> Vec<Value> {
    let reply = request(gateway, "GET", &format!("/api/audit{query}"), &bearer(TOKEN), "").await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    assert!(!reply.text().contains(TOKEN) && !reply.text().contains("a-wrong-guess"));
    reply.json()["entries"].as_array().unwrap().clone()
}

/// Identity, action and target of each entry.
fn shown(entries: &[Value]) -> Vec<[String; 3]> {
    let field = |entry: &Value, name: &str| entry[name].as_str().unwrap().to_owned();
    entries.iter().map(|entry| ["by", "action", "target"].map(|name| field(entry, name))).collect()
}

#[tokio::test]
async fn actions_are_recorded_with_their_sender_and_survive_a_restart() {
    let (upstream, folder) = (Upstream::always(Answer::chat(8, 2)).await, tempfile::tempdir().unwrap());
    let first = gateway(&upstream, &folder).await;
    let wrong = request(&first, "GET", "/api/environments", &bearer("a-wrong-guess"), "").await;
    assert_eq!(wrong.status, 401);
    let (session, csrf) = sign_in(&first).await;
    let headers = format!("cookie: tollgate_session={session}\r\nx-tollgate-csrf: {csrf}\r\n");
    assert_eq!(request(&first, "POST", "/api/environments/production/reset", &headers, "").await.status, 200);
    assert_eq!(request(&first, "POST", "/api/config/reload", &bearer(TOKEN), "").await.status, 422);
    assert_eq!(request(&first, "DELETE", "/api/session", &headers, "").await.status, 204);
    // Requests that only read and refused requests are not recorded.
    assert_eq!(request(&first, "GET", "/api/environments", &bearer(TOKEN), "").await.status, 200);
    assert_eq!(
        request(&first, "POST", "/api/environments/other/reset", &bearer(TOKEN), "").await.status,
        404
    );
    let expected = [
        ["session", "sign_out", "admin listener"],
        ["token", "config_reload", "config"],
        ["session", "reset", "environment 'production'"],
        ["token", "sign_in", "admin listener"],
        ["anonymous", "wrong_token", "admin listener"],
    ];
    let all = entries(&first, "").await;
    assert_eq!(shown(&all), expected);
    assert!(all.iter().all(|entry| entry["address"] == "127.0.0.1"), "{all:?}");
    assert!(all[1]["after"]["faults"][0].as_str().unwrap().contains("no config file"), "{}", all[1]);
    let moments: Vec<_> =
        all.iter().map(|e| e["at"].as_str().unwrap().parse::<jiff::Timestamp>().unwrap()).collect();
    assert!(moments.is_sorted_by(|newer, older| newer >= older));
    first.shutdown().await;
    let second = gateway(&upstream, &folder).await;
    assert_eq!(entries(&second, "").await, all);
    assert_eq!(entries(&second, "?limit=2").await, all[..2]);
    assert!(entries(&second, "?limit=0").await.is_empty());
    assert_eq!(request(&second, "GET", "/api/audit?limit=x", &bearer(TOKEN), "").await.status, 400);
}

#[tokio::test]
async fn without_a_store_the_log_is_in_memory() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let gateway = Gateway::in_front_of(&upstream, "{ requests: { limit: 5, per: day } }").await;
    assert_eq!(request(&gateway, "POST", "/api/environments/staging/reset", "", "").await.status, 200);
    let audit = gateway.admin_get("/api/audit").await.json();
    assert_eq!(shown(audit["entries"].as_array().unwrap()), [["local", "reset", "environment 'staging'"]]);
}

#[tokio::test]
async fn a_flood_of_guesses_makes_few_entries() {
    let (upstream, folder) = (Upstream::always(Answer::chat(8, 2)).await, tempfile::tempdir().unwrap());
    let gateway = gateway(&upstream, &folder).await;
    let (session, _) = sign_in(&gateway).await;
    for _ in 0..40 {
        let reply = request(&gateway, "GET", "/api/audit", &bearer("a-wrong-guess"), "").await;
        assert!([401, 429].contains(&reply.status));
    }
    let cookie = format!("cookie: tollgate_session={session}\r\n");
    let audit = request(&gateway, "GET", "/api/audit", &cookie, "").await.json();
    let count = audit["entries"].as_array().unwrap().iter().filter(|e| e["action"] == "wrong_token").count();
    assert!((5..=10).contains(&count), "{audit}");
}

#[tokio::test]
async fn a_store_that_cannot_be_read_is_answered_with_503() {
    let (upstream, folder) = (Upstream::always(Answer::chat(8, 2)).await, tempfile::tempdir().unwrap());
    let gateway = gateway(&upstream, &folder).await;
    std::fs::remove_file(folder.path().join("t.db")).unwrap();
    for (target, code) in [("/api/audit", "audit_unavailable"), ("/api/usage", "history_unavailable")] {
        let reply = request(&gateway, "GET", target, &bearer(TOKEN), "").await;
        assert_eq!((reply.status, reply.json()["error"]["code"].as_str()), (503, Some(code)), "{target}");
        assert_eq!(reply.json()["error"]["type"], "server_error");
        assert!(reply.text().contains("Check that the file is there"), "{}", reply.text());
        let described = request(&gateway, "GET", "/api/openapi.json", &bearer(TOKEN), "").await.json();
        let answer = &described["paths"][target]["get"]["responses"]["503"]["description"];
        assert!(answer.as_str().unwrap().contains(code), "{answer}");
    }
}
