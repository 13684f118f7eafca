//! Reported usage that is not credible, not final, or in an unusual place, and the charge in each case.

use crate::support::*;
use flate2::{Compression, write::GzEncoder};
use std::io::Write as _;

const QUOTAS: &str = "{ requests: { limit: 1000, per: minute }, total_tokens: { limit: 1M, per: minute } }";

/// A gateway with one environment `staging`. The base URL of its upstream has no path.
async fn gateway_at_root(upstream: &Upstream) -> Gateway {
    Gateway::from_config(&format!(
        "server: {{ listen: '127.0.0.1:0' }}\nadmin: {{ listen: '127.0.0.1:0' }}\n\
         upstreams: {{ backend: {{ base_url: 'http://{}', stream_usage: never }} }}\n\
         environments: {{ staging: {{ upstream: backend, calibrate: false, quotas: {QUOTAS} }} }}\n\
         default_environment: staging\nstore: {{ memory: true }}",
        upstream.address
    ))
    .await
}

/// An answer that is JSON or an event stream, by its first byte.
fn answer(body: &str) -> Answer {
    let kind = if body.starts_with(['{', '[']) { "application/json" } else { "text/event-stream" };
    Answer::with_headers(200, &of_type(kind), body)
}

fn compressed(body: &str) -> Answer {
    let kind = if body.starts_with(['{', '[']) { "application/json" } else { "text/event-stream" };
    let mut gzip = GzEncoder::new(Vec::new(), Compression::default());
    gzip.write_all(body.as_bytes()).unwrap();
    let code = gzip.finish().unwrap();
    let headers = format!("{}content-encoding: gzip\r\n", of_type(kind));
    framed(200, &headers, &code, Framing::Length, vec![])
}

fn events(data: &[&str]) -> String {
    data.iter().flat_map(|data| ["data: ", data, "\n\n"]).collect()
}

const COMPLETIONS: &str = r#"{"model":"gpt-3.5-turbo-instruct","prompt":"hello","stream":true}"#;
const RESPONSES: &str = r#"{"model":"gpt-4o","input":"hello"}"#;
const MESSAGES: &str =
    r#"{"model":"claude-sonnet-4-5","max_tokens":64,"messages":[{"role":"user","content":"hello"}]}"#;
const CONTENTS: &str = r#"{"contents":[{"role":"user","parts":[{"text":"hello"}]}]}"#;
const GEMINI: &str = "/v1beta/models/gemini-2.5-flash:generateContent";
const GEMINI_STREAM: &str = "/v1beta/models/gemini-2.5-flash:streamGenerateContent";
const AZURE: &str = "/openai/deployments/gpt-4o/chat/completions?api-version=2024-10-21";

/// For each API a request, an answer that delivers "Hello there" and reports only zeros, as a document and as a stream.
fn zeros() -> Vec<(&'static str, &'static str, String)> {
    const ZERO: &str = r#""usage":{"prompt_tokens":0,"completion_tokens":0,"total_tokens":0}"#;
    const ZERO_IO: &str = r#""usage":{"input_tokens":0,"output_tokens":0,"total_tokens":0}"#;
    const ZERO_GEMINI: &str =
        r#""usageMetadata":{"promptTokenCount":0,"candidatesTokenCount":0,"totalTokenCount":0}"#;
    let chat = format!(r#"{{"choices":[{{"index":0,"message":{{"content":"Hello there"}}}}],{ZERO}}}"#);
    let chat_stream = events(&[
        r#"{"choices":[{"index":0,"delta":{"content":"Hello there"}}],"usage":null}"#,
        r#"{"choices":[{"index":0,"delta":{},"finish_reason":"stop"}],"usage":null}"#,
        &format!(r#"{{"choices":[],{ZERO}}}"#),
        "[DONE]",
    ]);
    // The usage is in every event.
    let running = events(&[
        &format!(r#"{{"choices":[{{"index":0,"delta":{{"content":"Hello"}}}}],{ZERO}}}"#),
        &format!(
            r#"{{"choices":[{{"index":0,"delta":{{"content":" there"}},"finish_reason":"stop"}}],{ZERO}}}"#
        ),
    ]);
    let text = format!(r#"{{"choices":[{{"index":0,"text":"Hello there"}}],{ZERO}}}"#);
    let output = r#""output":[{"type":"message","content":[{"type":"output_text","text":"Hello there"}]}]"#;
    let responses = format!("{{{output},{ZERO_IO}}}");
    let responses_stream = events(&[
        r#"{"type":"response.output_text.delta","output_index":0,"content_index":0,"delta":"Hello there"}"#,
        &format!(r#"{{"type":"response.incomplete","response":{{{output},{ZERO_IO}}}}}"#),
    ]);
    let messages = format!(r#"{{"content":[{{"type":"text","text":"Hello there"}}],{ZERO_IO}}}"#);
    let messages_stream = events(&[
        &format!(r#"{{"type":"message_start","message":{{{ZERO_IO}}}}}"#),
        r#"{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"Hello there"}}"#,
        &format!(r#"{{"type":"message_delta","delta":{{"stop_reason":"end_turn"}},{ZERO_IO}}}"#),
        r#"{"type":"message_stop"}"#,
    ]);
    let candidate = |text: &str, end: &str| {
        format!(r#""candidates":[{{"content":{{"parts":[{{"text":"{text}"}}]}}{end}}}]"#)
    };
    let gemini = format!("{{{},{ZERO_GEMINI}}}", candidate("Hello there", ""));
    let end = r#","finishReason":"STOP""#;
    let first = format!("{{{},{ZERO_GEMINI}}}", candidate("Hello", ""));
    let last = format!("{{{},{ZERO_GEMINI}}}", candidate(" there", end));
    vec![
        (CHAT, HELLO, chat.clone()),
        (CHAT, HELLO, chat_stream.clone()),
        (CHAT, HELLO, running),
        (AZURE, HELLO, chat),
        (AZURE, HELLO, chat_stream),
        ("/v1/completions", COMPLETIONS, text.clone()),
        ("/v1/completions", COMPLETIONS, events(&[&text, "[DONE]"])),
        ("/v1/responses", RESPONSES, responses),
        ("/v1/responses", RESPONSES, responses_stream),
        ("/v1/messages", MESSAGES, messages),
        ("/v1/messages", MESSAGES, messages_stream),
        (GEMINI, CONTENTS, gemini),
        (GEMINI_STREAM, CONTENTS, format!("[{first},\n{last}]")),
        ("/v1beta/models/gemini-2.5-flash:streamGenerateContent?alt=sse", CONTENTS, events(&[&first, &last])),
    ]
}

#[tokio::test]
async fn zeros_for_what_was_not_empty_are_replaced_by_the_estimate_and_the_count() {
    for (path, body, text) in zeros() {
        for whole in [answer(&text), compressed(&text)] {
            let upstream = Upstream::always(whole).await;
            let gateway = gateway_at_root(&upstream).await;
            let reply = gateway.post(path, body).await;
            assert_eq!(reply.status, 200, "{path}");
            let estimate: u64 = reply.header("x-tollgate-estimated-prompt-tokens").unwrap().parse().unwrap();
            let [requests, prompt, completion, total] = gateway.settled_charges().await;
            assert_eq!((requests, prompt), (1, estimate), "{path} {text}");
            // Families with another vocabulary than OpenAI's count a little more.
            assert!((2..=4).contains(&completion), "{path}: {completion} {text}");
            assert_eq!(total, prompt + completion);
            assert_eq!(gateway.usage_missing("not_credible").await, 1, "{path} {text}");
            assert_eq!(gateway.usage_missing("not_reported").await, 0, "{path} {text}");
        }
    }
}

#[tokio::test]
async fn a_zero_in_one_field_leaves_the_others_as_reported() {
    let tools = r#"{"choices":[{"message":{"tool_calls":[{"function":{"name":"weather","arguments":"{}"}}]}}],"usage":{"prompt_tokens":9,"completion_tokens":0,"total_tokens":9}}"#;
    for (text, charged, is_credible) in [
        (chat_answer(&usage(0, 5)), [1, HELLO_TOKENS, 5, HELLO_TOKENS + 5], false),
        (chat_answer(&usage(9, 0)), [1, 9, 2, 11], false),
        // The name, the arguments, and 4 tokens.
        (tools.to_owned(), [1, 9, 6, 15], false),
        (chat_answer(r#"{"prompt_tokens":9,"completion_tokens":5,"total_tokens":0}"#), [1, 9, 5, 14], true),
        (chat_answer(r#"{"prompt_tokens":0,"completion_tokens":0,"total_tokens":50}"#), [1, 8, 2, 50], false),
        // An empty answer stays as reported.
        (chat_answer(&usage(9, 0)).replace("Hello there", ""), [1, 9, 0, 9], true),
        (
            events(&[
                r#"{"choices":[{"index":0,"delta":{"content":""},"finish_reason":"stop"}],"usage":{"prompt_tokens":9,"completion_tokens":0}}"#,
                "[DONE]",
            ]),
            [1, 9, 0, 9],
            true,
        ),
    ] {
        let upstream = Upstream::always(answer(&text)).await;
        let gateway = gateway_at_root(&upstream).await;
        gateway.chat(HELLO).await;
        assert_eq!(gateway.settled_charges().await, charged, "{text}");
        assert_eq!(gateway.usage_missing("not_credible").await, u64::from(!is_credible), "{text}");
    }
}

#[tokio::test]
async fn zeros_of_requests_that_generate_nothing_or_have_no_text_are_credible() {
    let embeddings = r#"{"data":[{"embedding":[0.1]}],"usage":{"prompt_tokens":0,"total_tokens":0}}"#;
    let counted = r#"{"data":[{"embedding":[0.1]}],"usage":{"prompt_tokens":3,"completion_tokens":0,"total_tokens":3}}"#;
    let hello = r#"{"model":"text-embedding-3-small","input":"hello"}"#;
    let echo = r#"{"model":"gpt-3.5-turbo-instruct","prompt":"hello","echo":true,"max_tokens":0}"#;
    let echoed = r#"{"choices":[{"text":"hello"}],"usage":{"prompt_tokens":1,"total_tokens":1}}"#;
    let no_text = r#"{"model":"gpt-4o","messages":[]}"#;
    for (path, body, text, charged, missing) in [
        ("/v1/embeddings", hello, embeddings, [1, 1, 0, 1], 1),
        ("/v1/embeddings", hello, counted, [1, 3, 0, 3], 0),
        ("/v1/embeddings", r#"{"model":"text-embedding-3-small","input":""}"#, embeddings, [1, 0, 0, 0], 0),
        ("/v1/completions", echo, echoed, [1, 1, 0, 1], 0),
        (CHAT, no_text, &chat_answer(&usage(0, 5)), [1, 0, 5, 5], 0),
        ("/v1/rerank", r#"{"query":"q"}"#, r#"{"usage":{"total_tokens":0}}"#, [1, 0, 0, 0], 0),
    ] {
        let upstream = Upstream::always(answer(text)).await;
        let gateway = gateway_at_root(&upstream).await;
        assert_eq!(gateway.post(path, body).await.text(), text);
        assert_eq!(gateway.settled_charges().await, charged, "{path} {body}");
        assert_eq!(gateway.usage_missing("not_credible").await, missing, "{path} {body}");
    }
}

const START: &str = r#"{"type":"message_start","message":{"usage":{"input_tokens":9,"output_tokens":1}}}"#;

fn block(text: &str) -> String {
    format!(r#"{{"type":"content_block_delta","index":0,"delta":{{"type":"text_delta","text":"{text}"}}}}"#)
}

#[tokio::test]
async fn before_the_final_report_a_completion_is_not_charged_below_the_count() {
    // Long enough that the text is counted in portions.
    let words = " word".repeat(9_000);
    let text = block(&words);
    let running = |completion: u64, text: &str| {
        format!(
            r#"{{"choices":[{{"index":0,"delta":{{"content":"{text}"}}}}],"usage":{{"prompt_tokens":9,"completion_tokens":{completion}}}}}"#
        )
    };
    let chunk = |text: &str, total: u64| {
        format!(
            r#"{{"candidates":[{{"content":{{"parts":[{{"text":"{text}"}}]}}}}],"usageMetadata":{{"promptTokenCount":9,"candidatesTokenCount":1,"totalTokenCount":{total}}}}}"#
        )
    };
    let progress =
        r#"{"type":"response.in_progress","response":{"usage":{"input_tokens":9,"output_tokens":1}}}"#;
    let delta = format!(r#"{{"type":"response.output_text.delta","output_index":0,"delta":"{words}"}}"#);
    let choice = |index: u64, completion: u64, text: &str| {
        running(completion, text).replace(r#""index":0"#, &format!(r#""index":{index}"#))
    };
    let error =
        format!("event: error\ndata: {}\n\n", r#"{"type":"error","error":{"type":"overloaded_error"}}"#);
    let two = hello(r#""n":2"#);
    for (path, body, text, completion) in [
        ("/v1/messages", MESSAGES, events(&[START, &text]), 9_000),
        ("/v1/messages", MESSAGES, events(&[START, &text]) + &error, 9_000),
        ("/v1/messages", MESSAGES, events(&[START, &text, r#"{"type":"message_stop"}"#]), 9_000),
        ("/v1/responses", RESPONSES, events(&[progress, &delta]), 9_000),
        (CHAT, HELLO, events(&[&running(1, " a"), &running(1, &words)]), 9_001),
        // A sum of usage that the upstream reports with every event (Databricks, Perplexity).
        (CHAT, HELLO, events(&[&running(0, " a"), &running(500, " b"), &running(600, " c")]), 600),
        (GEMINI_STREAM, CONTENTS, events(&[&chunk(" a", 10), &chunk(&words, 10)]), 9_001),
        // Each of two choices has its own running usage (vLLM).
        (CHAT, &two, events(&[&choice(0, 3, " a b c"), &choice(1, 2, " d e")]), 5),
    ] {
        for is_cut in [false, true] {
            let stream = Answer::stream().event(&text);
            let upstream = Upstream::always(if is_cut { stream.then(Step::Cut) } else { stream.end() }).await;
            let gateway = gateway_at_root(&upstream).await;
            gateway.post(path, body).await;
            let [_, prompt, charged, _] = gateway.settled_charges().await;
            // Anthropic's and Gemini's vocabularies are estimated from OpenAI's.
            let is_outgrown = completion != 600;
            assert_eq!(gateway.usage_missing("not_reported").await, u64::from(is_outgrown), "{path}");
            let max = if completion > 600 { completion * 3 / 2 } else { completion };
            assert!(
                prompt == 9 && (completion..=max).contains(&charged),
                "{prompt} {charged}: {completion} {path}"
            );
        }
    }
}

#[tokio::test]
async fn a_final_report_counts_even_if_it_is_below_the_count() {
    let delta = r#"{"choices":[{"index":0,"delta":{"content":" a b c d e f"}}]}"#;
    let usage = r#""usage":{"prompt_tokens":9,"completion_tokens":2}"#;
    let finish = r#"{"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}"#;
    let candidate = r#"{"candidates":[{"content":{"parts":[{"text":" a b c d e f"}]},"finishReason":"STOP"}],"usageMetadata":{"promptTokenCount":9,"candidatesTokenCount":2}}"#;
    for (path, body, text) in [
        (CHAT, HELLO, events(&[delta, &format!(r#"{{"choices":[],{usage}}}"#)])),
        (CHAT, HELLO, events(&[delta, &finish.replace("]}", &format!("],{usage}}}"))])),
        (CHAT, HELLO, events(&[delta, &finish.replace("]}", &format!(r#"],"x_groq":{{{usage}}}}}"#))])),
        // After the finish reason, in a chunk with a choice (OpenRouter).
        (
            CHAT,
            HELLO,
            events(&[delta, finish, &format!(r#"{{"choices":[{{"index":0,"delta":{{}}}}],{usage}}}"#)]),
        ),
        (
            "/v1/messages",
            MESSAGES,
            events(&[
                START,
                &block(" a b c d e f"),
                r#"{"type":"message_delta","usage":{"input_tokens":9,"output_tokens":2}}"#,
            ]),
        ),
        (
            "/v1/responses",
            RESPONSES,
            events(&[
                r#"{"type":"response.output_text.delta","delta":" a b c d e f"}"#,
                r#"{"type":"response.failed","response":{"usage":{"input_tokens":9,"output_tokens":2}}}"#,
            ]),
        ),
        (GEMINI_STREAM, CONTENTS, events(&[candidate])),
        (GEMINI_STREAM, CONTENTS, format!("[{candidate}]")),
    ] {
        let upstream = Upstream::always(answer(&text)).await;
        let gateway = gateway_at_root(&upstream).await;
        gateway.post(path, body).await;
        assert_eq!(gateway.settled_charges().await, [1, 9, 2, 11], "{text}");
        assert_eq!(gateway.usage_missing("not_reported").await, 0, "{text}");
    }
}

#[tokio::test]
async fn a_caller_that_disconnects_is_charged_the_usage_so_far_or_the_count() {
    let event = |text: &str, completion: u64| {
        let usage = format!(r#""usage":{{"prompt_tokens":9,"completion_tokens":{completion}}}"#);
        events(&[&format!(r#"{{"choices":[{{"index":0,"delta":{{"content":"{text}"}}}}],{usage}}}"#)])
    };
    for (first, second, charged) in [
        (event(" a", 1), event(" b c d", 1), 4),
        (event(" a", 30), event(" b c d", 40), 40),
        (event(" a", 40), event(" b c d", 0), 40),
    ] {
        let upstream = Upstream::always(Answer::stream().event(&first).event(&second).then(Step::Gate)).await;
        let gateway = gateway_at_root(&upstream).await;
        let mut caller = gateway.caller().await;
        caller.request("POST", CHAT, "", hello(r#""stream":true"#).as_bytes()).await;
        caller.head().await;
        let mut received = 0;
        while received < first.len() + second.len() {
            received += caller.chunk().await.unwrap().len();
        }
        drop(caller);
        assert_eq!(gateway.settled_charges().await, [1, 9, charged, 9 + charged]);
    }
}

#[tokio::test]
async fn a_list_of_chunks_that_is_cut_off_costs_at_least_its_complete_chunks() {
    let chunk = |text: &str, completion: u64| {
        format!(
            r#"{{"candidates":[{{"content":{{"parts":[{{"text":"{text}"}}]}}}}],"usageMetadata":{{"promptTokenCount":9,"candidatesTokenCount":{completion}}}}}"#
        )
    };
    for (completion, charged) in [(1, 6..=12), (50, 50..=50)] {
        let text = format!("[{},\n{}\n,{{\"candi", chunk(" a b c", 1), chunk(" d e f", completion));
        let upstream = Upstream::always(framed(
            200,
            &of_type("application/json"),
            text.as_bytes(),
            Framing::Chunks,
            vec![],
        ))
        .await;
        let gateway = gateway_at_root(&upstream).await;
        gateway.post(GEMINI_STREAM, CONTENTS).await;
        let [_, prompt, whole, _] = gateway.settled_charges().await;
        // The body ended well, although its JSON did not.
        assert_eq!((prompt, whole >= completion), (9, true));
        let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 9999\r\n\r\n";
        let cut = Answer::of(vec![Step::Send((head.to_owned() + &text).into()), Step::Cut]);
        let upstream = Upstream::always(cut).await;
        let gateway = gateway_at_root(&upstream).await;
        assert!(gateway.post(GEMINI_STREAM, CONTENTS).await.is_incomplete);
        let [_, prompt, completion, _] = gateway.settled_charges().await;
        assert!(prompt == 9 && charged.contains(&completion), "{completion}");
    }
}

#[tokio::test]
async fn usage_within_choices_of_several_is_never_below_the_count() {
    let usage = |n: u64| format!(r#""usage":{{"prompt_tokens":9,"completion_tokens":{n}}}"#);
    let choice = |index: u64, text: &str, n: u64| {
        format!(r#"{{"index":{index},"message":{{"content":"{text}"}},"finish_reason":"stop",{}}}"#, usage(n))
    };
    let (first, second) = (choice(0, " a b c", 3), choice(1, " d e", 2));
    let as_event = |choice: &str| format!(r#"{{"choices":[{choice}]}}"#).replace("message", "delta");
    let document = format!(r#"{{"choices":[{first},{second}]}}"#);
    for (text, completion) in [
        (document.clone(), 5),
        (document.replace("}]}", &format!("}}],{}}}", usage(7))), 7),
        (events(&[&as_event(&first), &as_event(&second), "[DONE]"]), 5),
        (events(&[&as_event(&first), &as_event(&second), &format!(r#"{{"choices":[],{}}}"#, usage(4))]), 4),
    ] {
        let upstream = Upstream::always(answer(&text)).await;
        let gateway = gateway_at_root(&upstream).await;
        gateway.chat(&hello(r#""n":2"#)).await;
        assert_eq!(gateway.settled_charges().await, [1, 9, completion, 9 + completion], "{text}");
    }
}
