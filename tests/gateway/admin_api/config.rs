//! `GET /api/config`: the effective config without secrets.

use super::{TOKEN, bearer, error, gateway, request};
use crate::support::*;

#[tokio::test]
async fn the_effective_config_has_defaults_and_no_secret() {
    let (upstream, folder) = (Upstream::always(Answer::chat(8, 2)).await, tempfile::tempdir().unwrap());
    let gateway = gateway(&upstream, &folder).await;
    let get = async |target: &str, headers: &str| request(&gateway, "GET", target, headers, "").await;
    let json = get("/api/config", &bearer(TOKEN)).await;
    assert_eq!(json.status, 200);
    let config = json.json();
    assert_eq!(config["server"]["drain_timeout"], "30s");
    assert_eq!(config["environments"]["production"]["quotas"]["requests"]["window"], "calendar");
    assert_eq!(config["environments"]["production"]["keys"][0]["secret"], "***");
    let yaml = get("/api/config?format=yaml", &bearer(TOKEN)).await;
    assert_eq!(yaml.header("content-type"), Some("application/yaml"));
    assert!(yaml.text().contains("  drain_timeout: 30s\n"), "{}", yaml.text());
    for shown in [json.text(), yaml.text()] {
        assert!([TOKEN, "sk-u", "sk-some-key"].iter().all(|secret| !shown.contains(secret)), "{shown}");
    }
    assert_eq!(
        error(&get("/api/config?format=xml", &bearer(TOKEN)).await),
        (400, "invalid_value".to_owned())
    );
    assert_eq!(get("/api/config", "").await.status, 401);
}
