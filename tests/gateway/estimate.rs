//! The prompt estimate: exact counts, corrections from reported usage, and the models of the config.

use crate::support::*;
use serde_json::{Value, json};
use std::path::Path;

#[tokio::test]
async fn plain_chats_are_counted_like_the_published_tokenizer() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let gateway = Gateway::in_front_of(&upstream, "{ requests: { limit: 999, per: minute } }").await;
    for (model, oracle) in
        [("gpt-4o", tiktoken_rs::o200k_base_singleton()), ("gpt-4", tiktoken_rs::cl100k_base_singleton())]
    {
        for texts in [
            &["hello"][..],
            &["You are kind.", "Wie geht's? 日本語 👍", "<|endoftext|> don't"],
            &["", "a\n\n  b\t{}"],
        ] {
            let messages: Vec<Value> = texts.iter().map(|t| json!({"role": "user", "content": t})).collect();
            let text_tokens: usize = texts.iter().map(|t| 4 + oracle.encode_ordinary(t).len()).sum();
            let reply = gateway.chat(&json!({"model": model, "messages": messages}).to_string()).await;
            let expected = (3 + text_tokens).to_string();
            assert_eq!(
                reply.header("x-tollgate-estimated-prompt-tokens"),
                Some(expected.as_str()),
                "{model} {texts:?}"
            );
        }
    }
}

#[tokio::test]
async fn completions_and_embeddings_are_counted_from_texts_and_token_ids() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let gateway = Gateway::in_front_of(&upstream, "{ requests: { limit: 999, per: minute } }").await;
    for (path, body, expected) in [
        ("/v1/completions", r#"{"model":"gpt-4o","prompt":"hello world"}"#, "2"),
        ("/v1/completions", r#"{"model":"gpt-4o"}"#, "1"),
        ("/v1/completions", r#"{"model":"gpt-4o","prompt":[1,2,3]}"#, "3"),
        ("/v1/embeddings", r#"{"model":"text-embedding-3-small","input":["hello","world"]}"#, "2"),
        ("/v1/embeddings", r#"{"model":"text-embedding-3-small","input":[[1,2],[3]]}"#, "3"),
    ] {
        let reply = gateway.post(path, body).await;
        assert_eq!(reply.header("x-tollgate-estimated-prompt-tokens"), Some(expected), "{body}");
    }
}

const RAW: &str = "x-tollgate-raw-estimated-prompt-tokens";
const ESTIMATED: &str = "x-tollgate-estimated-prompt-tokens";

/// A gateway with a store in this folder and one environment `staging`, which has no keys. `settings` are more
/// lines of YAML for the environment.
async fn gateway_with_store(upstream: &Upstream, folder: &Path, settings: &str) -> Gateway {
    let text = format!(
        "server: {{ listen: '127.0.0.1:0' }}\nadmin: {{ listen: '127.0.0.1:0' }}\nupstreams: {{ backend: {{ base_url: 'http://{}/v1' }} }}\n\
         environments:\n  staging:\n    upstream: backend\n    quotas: {{ prompt_tokens: {{ limit: 1M, per: minute }} }}\n{settings}\
         default_environment: staging\nstore: {{ path: '{}' }}\n",
        upstream.address,
        folder.join("tollgate.db").display()
    );
    Gateway::from_config(&text).await
}

#[tokio::test]
async fn estimates_are_corrected_by_reported_usage_and_corrections_survive_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let upstream = Upstream::always(Answer::chat(HELLO_TOKENS + 50, 2)).await;
    let gateway = gateway_with_store(&upstream, folder.path(), "").await;
    // Each word is one token. A repeated request would be estimated as reported.
    for word in ["hello", "world", "house"] {
        let reply = gateway.chat(&HELLO.replace("hello", word)).await;
        assert_eq!((reply.header(ESTIMATED), reply.header(RAW)), (Some("8"), None));
    }
    let reply = gateway.chat(&HELLO.replace("hello", "water")).await;
    assert_eq!((reply.header(ESTIMATED), reply.header(RAW)), (Some("58"), Some("8")));
    // Requests with tools have a separate calibration.
    let with_tools = HELLO.replacen('{', r#"{"tools":[{"type":"function","function":{"name":"f"}}],"#, 1);
    assert_eq!(gateway.chat(&with_tools).await.header(RAW), None);
    let metrics = gateway.admin_get("/metrics").await;
    let lines = metrics.text();
    for line in [
        "tollgate_estimate_ratio_count{model=\"gpt-4o\",source=\"rules\"} 4",
        "tollgate_estimate_ratio_count{model=\"gpt-4o\",source=\"calibration\"} 1",
        "tollgate_raw_estimate_ratio_count 5",
        "tollgate_raw_estimate_ratio_bucket{le=\"0.5\"} 4",
        "tollgate_estimate_ratio_bucket{model=\"gpt-4o\",source=\"rules\",le=\"0.5\"} 3",
        "tollgate_estimates_total{estimate=\"whole\",tokenizer=\"o200k_base\"} 5",
    ] {
        assert!(lines.contains(line), "{line}\n{lines}");
    }
    gateway.shutdown().await;

    let gateway = gateway_with_store(&upstream, folder.path(), "").await;
    assert_eq!(gateway.chat(HELLO).await.header(ESTIMATED), Some("58"));
    gateway.shutdown().await;
    let gateway = gateway_with_store(&upstream, folder.path(), "    calibrate: false\n").await;
    assert_eq!(gateway.chat(HELLO).await.header(ESTIMATED), Some("8"), "calibration is turned off");
}

#[tokio::test]
async fn false_usage_changes_estimates_within_bounds_and_answers_without_usage_change_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let upstream = Upstream::always(Answer::chat(1 << 40, 2)).await;
    let gateway = gateway_with_store(&upstream, folder.path(), "    enforce: false\n").await;
    for _ in 0..6 {
        gateway.chat(HELLO).await;
    }
    let estimated: u64 = gateway.chat(HELLO).await.header(ESTIMATED).unwrap().parse().unwrap();
    assert!(estimated <= 4 * HELLO_TOKENS + 2_048, "{estimated}");

    let upstream = Upstream::always(Answer::json(500, r#"{"error":{}}"#)).await;
    let folder = tempfile::tempdir().unwrap();
    let gateway = gateway_with_store(&upstream, folder.path(), "").await;
    for _ in 0..6 {
        assert_eq!(gateway.chat(HELLO).await.header(RAW), None);
    }
}

#[tokio::test]
async fn the_config_sets_the_reservation_for_a_referenced_file_and_reported_usage_settles_it() {
    let folder = tempfile::tempdir().unwrap();
    let upstream = Upstream::always(Answer::chat(900, 2)).await;
    let gateway = gateway_with_store(&upstream, folder.path(), "    unseen_prompt_tokens: 700\n").await;
    let with_file_id = |id: u32| {
        format!(
            r#"{{"model":"gpt-4o","messages":[{{"role":"user","content":[{{"type":"text","text":"hello"}},{{"type":"file","file":{{"file_id":"f-{id}"}}}}]}}]}}"#
        )
    };
    for id in 0..5 {
        let reply = gateway.chat(&with_file_id(id)).await;
        // This estimate is not corrected and its answer calibrates nothing, because the next file may have another size.
        assert_eq!((reply.header(ESTIMATED), reply.header(RAW)), (Some("708"), Some("8")));
    }
    assert_eq!(gateway.settled_charges().await, [5, 4_500, 10, 4_510]);
    assert_eq!(gateway.chat(HELLO).await.header(ESTIMATED), Some("8"));
    let metrics = gateway.admin_get("/metrics").await;
    assert!(
        metrics.text().contains("tollgate_estimates_total{estimate=\"partial\",tokenizer=\"o200k_base\"} 5")
    );

    let gateway = gateway_with_store(&upstream, folder.path().join("other").as_path(), "").await;
    assert_eq!(
        gateway.chat(&with_file_id(0)).await.header(ESTIMATED),
        Some("2008"),
        "the default is 2,000 tokens for each reference"
    );
}

#[tokio::test]
async fn the_config_can_set_the_encoding_model_or_tokenizer_file_of_a_model() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let environments = "  staging:\n    upstream: backend\n    calibrate: false\n    quotas: { requests: { limit: 999, per: minute } }\ndefault_environment: staging\nmodels:\n\
         - { match: 'old-*', encoding: cl100k_base }\n- { match: prod, model: gpt-5 }\n- { match: '*', tokenizer: fixtures/tokenizer.json }";
    let gateway = Gateway::with(&upstream, "", environments).await;
    let estimate = async |model: &str, text: &str| {
        let body = json!({"model": model, "messages": [{"role": "user", "content": text}]}).to_string();
        gateway.chat(&body).await.header(ESTIMATED).unwrap().parse::<u64>().unwrap()
    };
    // The text has 3 tokens in o200k_base and 6 in cl100k_base. The frame of a chat takes 7 tokens; with gpt-5, 6
    // tokens.
    assert_eq!(estimate("old-gpt", "你好，世界").await, 7 + 6);
    assert_eq!(estimate("prod", "你好，世界").await, 6 + 3);
    // The count uses the vocabulary of the file, and ignores its settings for truncation, padding and special tokens.
    let frame = estimate("llama", "").await;
    assert_eq!(estimate("llama", "hello world hello, world!").await, frame + 6);
    assert_eq!(estimate("llama", "<|im_end|>").await, frame + 3);
    let long = "hello world ".repeat(20_000);
    assert_eq!(estimate("llama", &long).await, frame + 40_000);
}
