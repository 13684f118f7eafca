//! What makes the gateway reload: a changed file, SIGHUP.

use super::*;

const LARGE: &str = "{ total_tokens: { limit: 2000, per: day } }";

/// Waits until the first quota has this limit.
async fn until_limit(live: &Live, limit: i64) {
    let reached = async {
        while live.amounts().await[0] != limit {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    soon("the new limit", reached).await;
}

#[tokio::test]
async fn a_file_that_is_replaced_or_written_is_loaded() {
    let upstream = Upstream::always(Answer::chat(8, 92)).await;
    let live = Live::start(upstream, &staging(DAY)).await;
    replace(&live.file(), &text(&live.upstream, &staging(LARGE)));
    until_limit(&live, 2_000).await;
    // Written in two steps: the half file is refused or not seen, and the whole one is loaded.
    let whole = text(&live.upstream, &staging(DAY));
    let (first, _) = whole.split_at(whole.find("quotas").unwrap() + 12);
    fs::write(live.file(), first).unwrap();
    let refused = async {
        while live.metric("tollgate_config_reload_failures_total").await == 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    soon("the refusal of the half file", refused).await;
    assert_eq!(live.amounts().await[0], 2_000);
    fs::write(live.file(), &whole).unwrap();
    until_limit(&live, 1_000).await;
    // Deleted and created again.
    fs::remove_file(live.file()).unwrap();
    fs::write(live.file(), text(&live.upstream, &staging(LARGE))).unwrap();
    until_limit(&live, 2_000).await;
}

/// Kubernetes writes a ConfigMap into a new folder and swaps a symbolic link.
#[tokio::test]
async fn a_swapped_symbolic_link_of_a_config_map_is_noticed() {
    let upstream = Upstream::always(Answer::chat(8, 92)).await;
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    for (version, quotas) in [("..1", DAY), ("..2", LARGE)] {
        fs::create_dir(at(version)).unwrap();
        fs::write(at(version).join("t.yaml"), text(&upstream, &staging(quotas))).unwrap();
    }
    symlink("..1", at("..data")).unwrap();
    symlink("..data/t.yaml", at("t.yaml")).unwrap();
    let gateway = Gateway::from_file(&at("t.yaml")).await;
    let live = Live { folder, upstream, gateway };
    for (version, limit) in [("..2", 2_000), ("..1", 1_000)] {
        symlink(version, live.folder.path().join("..next")).unwrap();
        fs::rename(live.folder.path().join("..next"), live.folder.path().join("..data")).unwrap();
        until_limit(&live, limit).await;
    }
}

#[tokio::test]
async fn a_file_with_a_key_is_watched_too() {
    let upstream = Upstream::always(Answer::chat(8, 92)).await;
    let folder = tempfile::tempdir().unwrap();
    let (key, file) = (folder.path().join("key"), folder.path().join("t.yaml"));
    fs::write(&key, "key-of-the-caller-one").unwrap();
    let environments = format!(
        "  e: {{ upstream: backend, keys: [{{ name: a, secret: '${{file:{}}}' }}], quotas: {DAY} }}",
        key.display()
    );
    fs::write(&file, text(&upstream, &environments)).unwrap();
    let gateway = Gateway::from_file(&file).await;
    let live = Live { folder, upstream, gateway };
    assert_eq!(live.chat_with_key("key-of-the-caller-one").await, 200);
    replace(&key, "key-of-the-caller-two");
    let rotated = async {
        while live.chat_with_key("key-of-the-caller-two").await != 200 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    soon("the new key", rotated).await;
    assert_eq!(live.chat_with_key("key-of-the-caller-one").await, 401);
}

/// Files that a config names can be written after it.
#[tokio::test]
async fn the_files_of_a_refused_config_are_watched() {
    let upstream = Upstream::always(Answer::chat(8, 92)).await;
    let live = Live::start(upstream, &staging(DAY)).await;
    let at = |name: &str| live.folder.path().join(name);
    let environments = format!(
        "  e: {{ upstream: backend, keys: [{{ name: a, secret: '${{file:{}}}' }}], quotas: {LARGE} }}",
        at("key").display()
    );
    let models = format!("models: [{{ match: 'own-*', tokenizer: '{}' }}]", at("tokenizer.json").display());
    replace(&live.file(), &format!("{}\n{models}\n", text(&live.upstream, &environments)));
    let refused = async |fault: &str| {
        let is_refused = async {
            while !live.gateway.admin_get("/readyz").await.text().contains(fault) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        soon(fault, is_refused).await;
    };
    refused("/key").await;
    fs::write(at("key"), "key-of-the-caller-one").unwrap();
    refused("models[0].tokenizer").await;
    fs::copy("fixtures/tokenizer.json", at("tokenizer.json")).unwrap();
    let served = async {
        while live.chat_with_key("key-of-the-caller-one").await != 200 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    soon("the corrected config", served).await;
}

#[tokio::test]
async fn sighup_reloads_and_the_process_lives_on() {
    let upstream = Upstream::always(Answer::chat(8, 92)).await;
    let process = Process::of_config(&text(&upstream, &staging(DAY))).await;
    process.write_config(&text(&upstream, &staging(LARGE)));
    send_signal(&process.id(), "HUP");
    soon("the reload", process.log_line("message", "the config was reloaded")).await;
    let change =
        "environment 'staging': total_tokens per day changed from limit 1000 (UTC) to limit 2000 (UTC)";
    soon("the change in the log", process.log_line("change", change)).await;
    assert_eq!(process.chat(&hello(r#""max_tokens":92"#)).await.status, 200);
    let audit = process.admin_get("/api/audit").await.json();
    let by_signal =
        |entry: &&serde_json::Value| entry["by"] == "signal" && entry["action"] == "config_reload";
    assert!(audit["entries"].as_array().unwrap().iter().any(|entry| by_signal(&entry)), "{audit}");
    process.write_config("nonsense");
    send_signal(&process.id(), "HUP");
    soon(
        "the refusal",
        process.log_line("message", "the new config was refused: the old one stays in force"),
    )
    .await;
    assert_eq!(process.chat(&hello(r#""max_tokens":92"#)).await.status, 200);
}
