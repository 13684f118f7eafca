//! The command line: a new config, keys of callers, and closed pipes.

use crate::support::*;
use std::io::Read as _;

fn word_with<'t>(text: &'t str, prefix: &str) -> &'t str {
    text.split_whitespace().find(|word| word.starts_with(prefix)).unwrap()
}

#[test]
fn init_writes_a_valid_config_once() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("new/tollgate.yaml");
    let path = file.to_str().unwrap();
    let (code, output, _) = run(&["init", path], "");
    assert_eq!(code, 0);
    assert!(output.contains("tollgate check --config") && output.contains("sk-tollgate-"), "{output}");
    let written = std::fs::read_to_string(&file).unwrap();
    let (code, digest, _) = run(&["hash-key"], word_with(&output, "sk-tollgate-"));
    assert_eq!(code, 0);
    assert!(written.contains(digest.trim()), "{written}");
    assert_eq!(run(&["check", "--config", path], "").0, 0);
    let (code, _, error) = run(&["init", "--config", path], "");
    assert!(code == 1 && error.contains("overwrites no file"), "{error}");
    assert_eq!(std::fs::read_to_string(&file).unwrap(), written);
}

#[test]
fn commands_without_a_config_file_say_what_to_do() {
    for command in ["serve", "check"] {
        let (code, _, error) = run(&[command, "--config", "/nowhere/tollgate.yaml"], "");
        assert_eq!(code, 2);
        assert!(
            ["demo", "init", "--config", "/nowhere/tollgate.yaml"].iter().all(|w| error.contains(w)),
            "{error}"
        );
    }
}

#[test]
fn new_key_refuses_what_cannot_be_a_name() {
    let (code, _, error) = run(&["new-key", "two words"], "");
    assert!(code == 1 && error.contains("not a valid caller name"), "{error}");
}

#[tokio::test]
async fn every_key_of_a_caller_is_the_same_caller_with_one_balance() {
    let (code, output, _) = run(&["new-key", "batch"], "");
    assert_eq!(code, 0);
    let key = word_with(&output, "sk-tollgate-");
    let digest = word_with(&output, "[").trim_matches(['[', ']']);
    let digest = &digest[..64];
    let old = run(&["hash-key"], "the-old-key-of-batch").1;
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let process = Process::start(
        &format!(
            "upstreams: {{ u: {{ base_url: 'http://{}/v1', api_key: sk-u }} }}\nenvironments: {{ production: {{ upstream: u, \
             keys: [{{ name: batch, sha256: [{}, {digest}], quotas: {{ requests: {{ limit: 2, per: hour }} }} }}] }} }}",
            upstream.address,
            old.trim()
        ),
        &[],
    )
    .await;
    let mut statuses = Vec::new();
    for key in ["the-old-key-of-batch", key, key, "the-old-key-of-batch", "another-key-altogether"] {
        let mut caller = process.caller().await;
        caller.request("POST", CHAT, &format!("authorization: Bearer {key}\r\n"), HELLO.as_bytes()).await;
        statuses.push(caller.reply().await.status);
    }
    assert_eq!(statuses, [200, 200, 429, 429, 401]);
}

#[test]
fn a_closed_pipe_ends_a_command_without_a_panic() {
    let body = r#"{"model":"gpt-4o","messages":[{"role":"user","content":"hello"}]}"#;
    let folder = tempfile::tempdir().unwrap();
    let bodies = folder.path().join("bodies.jsonl");
    std::fs::write(&bodies, format!("{body}\n").repeat(20_000)).unwrap();
    for arguments in [
        &["completions", "bash"][..],
        &["check", "--config", "config/minimal.yaml"],
        &["new-key", "a"],
        &["count", "--jsonl", bodies.to_str().unwrap()],
    ] {
        let mut child = tollgate(arguments).spawn().unwrap();
        // Closes the pipe before the command has written all of its output.
        drop(child.stdin.take());
        drop(child.stdout.take());
        let mut errors = String::new();
        child.stderr.take().unwrap().read_to_string(&mut errors).unwrap();
        assert!(child.wait().unwrap().success() && errors.is_empty(), "{arguments:?}: {errors}");
    }
}

#[tokio::test]
async fn check_shows_what_is_valid_and_what_an_administrator_has_overridden() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("t.yaml");
    let text = format!(
        "server: {{ listen: '127.0.0.1:0' }}\nadmin: {{ listen: '127.0.0.1:0' }}\nupstreams: {{ u: {{ base_url: 'http://127.0.0.1:9/v1', quotas: {{ requests: {{ limit: 7, per: day }} }} }} }}\n\
         environments: {{ production: {{ upstream: u, quotas: {{ requests: [{{ limit: 60, per: minute }}, {{ limit: 9k, per: day }}] }} }} }}\n\
         store: {{ path: {} }}\n",
        folder.path().join("t.db").display()
    );
    std::fs::write(&file, &text).unwrap();
    let check = || run(&["check", "--config", file.to_str().unwrap()], "");
    let process = Process::of_config(&text).await;
    for (owner, per, limit) in [
        ("environments/production", "minute", 61),
        ("environments/production", "day", 9_000),
        ("upstreams/u", "day", 8),
    ] {
        let mut admin = Caller::connect(process.admin).await;
        let target = format!("/api/{owner}/quotas/requests/{per}");
        let body = format!(r#"{{"limit":{limit}}}"#);
        let (host, length) = (process.admin, body.len());
        let head = format!("PUT {target} HTTP/1.1\r\nhost: {host}\r\ncontent-length: {length}\r\n\r\n");
        admin.send((head + &body).as_bytes()).await;
        assert_eq!(admin.reply().await.status, 200);
    }
    let (code, output, _) = check();
    assert_eq!(code, 0);
    for line in [
        "warning: an administrator has set the limit of environment 'production', requests per minute, to 61; the file has 60",
        "warning: an administrator has set the limit of upstream 'u', requests per day, to 8; the file has 7, which applies again after DELETE /api/upstreams/u/quotas/requests/day",
        "  upstream               u at http://127.0.0.1:9/v1\n    7            requests per day of upstream u, by the calendar of UTC\n",
        "  environment            production: upstream u, open to all callers\n    60           requests per minute\n    9,000        requests per day, by the calendar of UTC\n",
    ] {
        assert!(output.contains(line), "{line}\n{output}");
    }
    // An override that equals the file contradicts nothing.
    assert!(!output.contains("requests per day, to 9"), "{output}");
    std::fs::write(&file, text.replace("limit: 60, per: minute", "limit: 60, per: second")).unwrap();
    let (_, output, _) = check();
    let line = "warning: an administrator has set the limit of environment 'production', requests per minute, to 61. The file does not have this quota now. If it returns, this limit is in force again; DELETE /api/environments/production/quotas/requests/minute removes it";
    assert!(output.contains(line), "{output}");
}

#[tokio::test]
async fn usage_and_backup_read_the_store_while_the_gateway_runs() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let upstream = Upstream::always(Answer::chat(1_234, 2)).await;
    let config = |store: &str| {
        format!(
            "server: {{ listen: '127.0.0.1:0' }}\nadmin: {{ listen: '127.0.0.1:0' }}\nupstreams: {{ u: {{ base_url: 'http://{}/v1' }} }}\n\
             environments: {{ production: {{ upstream: u, quotas: {{ requests: {{ limit: 9k, per: day }} }} }} }}\n\
             default_environment: production\nstore: {{ path: {store} }}\n",
            upstream.address
        )
    };
    let process = Process::of_config(&config(&path("t.db"))).await;
    assert_eq!(process.chat(HELLO).await.status, 200);
    process.settled_charges().await;
    std::fs::write(path("t.yaml"), config(&path("t.db"))).unwrap();
    std::fs::write(path("copy.yaml"), config(&path("copy.db"))).unwrap();
    let usage = |file: &str, format: &str| {
        let config = path(file);
        run(
            &[
                "usage",
                "--config",
                &config,
                "--group-by",
                "environment,model",
                "--by",
                "month",
                "--format",
                format,
            ],
            "",
        )
    };
    // The store's writer commits a moment after the settlement.
    let rows = loop {
        let (code, output, errors) = usage("t.yaml", "csv");
        assert_eq!(code, 0, "{errors}");
        if output.lines().count() > 1 {
            break output;
        }
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    };
    assert!(rows.contains("-01T00:00:00Z,production,gpt-4o,,1,0,1234,2,1236\n"), "{rows}");
    let (code, output, errors) = run(&["backup", &path("copy.db"), "--config", &path("t.yaml")], "");
    assert!(code == 0 && output.contains("To restore it"), "{errors}");
    let mode =
        std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(path("copy.db")).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);
    assert_eq!(usage("copy.yaml", "csv").1, rows);
    let json: serde_json::Value = serde_json::from_str(&usage("copy.yaml", "json").1).unwrap();
    assert_eq!(
        (&json["rows"][0]["total_tokens"], &json["rows"][0]["caller"]),
        (&1236.into(), &serde_json::Value::Null)
    );
    assert!(usage("copy.yaml", "table").1.contains("1,234"));
    let (code, _, errors) = run(&["usage", "--config", &path("t.yaml"), "--environment", "nope"], "");
    assert!(code == 0 && errors.contains("note: the config has no environment 'nope'"), "{errors}");
    let (code, _, errors) = run(&["backup", &path("copy.db"), "--config", &path("t.yaml")], "");
    assert!(code == 1 && errors.contains("name a new file"), "{errors}");
}
