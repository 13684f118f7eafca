//! Each answer in `fixtures/`, sent whole and in single bytes, passes unchanged and is charged as listed.

use crate::support::*;
use serde_json::Value;
use std::path::{Path, PathBuf};

fn answers() -> Vec<(PathBuf, String, [u64; 3])> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures");
    let files = std::fs::read_dir(folder).unwrap().map(|f| f.unwrap().path());
    let is_answer = |p: &PathBuf| {
        p.file_name().is_some_and(|n| n != "README.md") && p.with_extension("usage.json").exists()
    };
    files
        .filter(is_answer)
        .map(|path| {
            let usage = std::fs::read_to_string(path.with_extension("usage.json")).unwrap();
            let usage: Value = serde_json::from_str(&usage).unwrap();
            let text = std::fs::read_to_string(&path).unwrap();
            (path, text, ["prompt", "completion", "total"].map(|kind| usage[kind].as_u64().unwrap()))
        })
        .collect()
}

#[tokio::test]
async fn every_fixture_passes_unchanged_and_is_charged_its_usage() {
    let answers = answers();
    assert!(answers.len() >= 10);
    for (path, text, [prompt, completion, total]) in answers {
        let kind = if path.extension().unwrap() == "sse" { "text/event-stream" } else { "application/json" };
        let head = format!("HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\n\r\n");
        let in_bytes = text.bytes().map(|b| Step::Send(vec![b]));
        let whole = vec![Step::Send(head.clone().into()), Step::Send(text.clone().into()), Step::Cut];
        let cut = [Step::Send(head.into())].into_iter().chain(in_bytes).chain([Step::Cut]).collect();
        for steps in [whole, cut] {
            let upstream = Upstream::always(Answer::of(steps)).await;
            let gateway = Gateway::in_front_of(&upstream, "{ requests: { limit: 99, per: minute } }").await;
            let reply =
                gateway.chat(&hello(r#""stream":true,"stream_options":{"include_usage":true}"#)).await;
            assert_eq!(reply.text(), text, "{}", path.display());
            assert_eq!(gateway.settled_charges().await, [1, prompt, completion, total], "{}", path.display());
        }
    }
}
