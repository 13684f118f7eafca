//! The prompt estimate, against the published tokenizer and counts that an API has reported.

use crate::support::*;
use serde_json::{Value, json};
use std::path::PathBuf;

#[tokio::test]
async fn plain_chats_are_counted_as_the_published_tokenizer_counts_them() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let gateway = Gateway::before(&upstream, "{ requests: { limit: 999, per: minute } }").await;
    for (model, oracle) in
        [("gpt-4o", tiktoken_rs::o200k_base_singleton()), ("gpt-4", tiktoken_rs::cl100k_base_singleton())]
    {
        for texts in [
            &["hello"][..],
            &["You are kind.", "Wie geht's? 日本語 👍", "<|endoftext|> don't"],
            &["", "a\n\n  b\t{}"],
        ] {
            let messages: Vec<Value> = texts.iter().map(|t| json!({"role": "user", "content": t})).collect();
            let of_texts: usize = texts.iter().map(|t| 4 + oracle.encode_ordinary(t).len()).sum();
            let reply = gateway.chat(&json!({"model": model, "messages": messages}).to_string()).await;
            let want = (3 + of_texts).to_string();
            assert_eq!(
                reply.header("x-tollgate-estimated-prompt-tokens"),
                Some(want.as_str()),
                "{model} {texts:?}"
            );
        }
    }
}

#[tokio::test]
async fn completions_and_embeddings_take_texts_and_tokens() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let gateway = Gateway::before(&upstream, "{ requests: { limit: 999, per: minute } }").await;
    for (path, body, want) in [
        ("/v1/completions", r#"{"model":"gpt-4o","prompt":"hello world"}"#, "2"),
        ("/v1/completions", r#"{"model":"gpt-4o"}"#, "1"),
        ("/v1/completions", r#"{"model":"gpt-4o","prompt":[1,2,3]}"#, "3"),
        ("/v1/embeddings", r#"{"model":"text-embedding-3-small","input":["hello","world"]}"#, "2"),
        ("/v1/embeddings", r#"{"model":"text-embedding-3-small","input":[[1,2],[3]]}"#, "3"),
    ] {
        let reply = gateway.post(path, body).await;
        assert_eq!(reply.header("x-tollgate-estimated-prompt-tokens"), Some(want), "{body}");
    }
}

/// Counts measured at the API, for the plain messages among them; the data stay outside the project.
#[tokio::test]
async fn plain_golden_vectors_are_met_exactly() {
    let folder = std::env::var_os("TOLLGATE_DATA")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../shared"), PathBuf::from);
    let Ok(vectors) = std::fs::read_to_string(folder.join("golden-vectors.jsonl")) else {
        eprintln!(
            "\n*** NOT TESTED: there is no golden-vectors.jsonl in {} (set TOLLGATE_DATA) ***\n",
            folder.display()
        );
        return;
    };
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let gateway = Gateway::before(&upstream, "{ requests: { limit: 999, per: minute } }").await;
    let mut tested = 0;
    for vector in vectors.lines().map(|l| serde_json::from_str::<Value>(l).unwrap()) {
        let body = &vector["body"];
        let is_plain =
            body["messages"].as_array().is_some_and(|all| all.iter().all(|m| m["content"].is_string()));
        let (Some(want), true) = (vector["prompt_tokens"].as_u64(), is_plain && body.get("tools").is_none())
        else {
            continue;
        };
        // What the rules are known to miss, and gpt-5's one token less, are the next chapter's.
        if vector.get("rule_gives").is_some()
            || body["model"].as_str().is_some_and(|m| m.starts_with("gpt-5"))
        {
            continue;
        }
        let reply = gateway.chat(&body.to_string()).await;
        assert_eq!(
            reply.header("x-tollgate-estimated-prompt-tokens"),
            Some(want.to_string().as_str()),
            "{vector}"
        );
        tested += 1;
    }
    assert!(tested >= 10, "only {tested} vectors were understood");
    eprintln!("{tested} golden vectors met");
}
