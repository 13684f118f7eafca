//! The requests and answers that the benchmark sends.

/// Events of a streamed answer, without the usage chunk and `[DONE]`.
pub(crate) const EVENTS: usize = 100;
pub(crate) const KEY: &str = "sk-bench-0123456789abcdef0123456789abcdef";

const WORDS: [&str; 24] = [
    "the", "gateway", "counts", "every", "token", "of", "a", "request", "before", "it", "goes", "on", "and",
    "settles", "what", "was", "reserved", "when", "answer", "ends", "so", "that", "nothing", "is lost",
];

/// The request body of a scenario.
pub(crate) fn request(scenario: &str) -> String {
    let small = "Explain in two sentences why the sky looks blue at noon and red in the evening, for a child of ten years.";
    let (fields, messages) = match scenario {
        "large" => ("", conversation(32 * 1024)),
        "stream" => (r#","stream":true,"stream_options":{"include_usage":true}"#, message("user", small)),
        "stream-paced" => (
            r#","stream":true,"stream_options":{"include_usage":true},"user":"paced""#,
            message("user", small),
        ),
        _ => ("", message("user", small)),
    };
    format!(r#"{{"model":"gpt-4o-mini","messages":[{messages}],"max_tokens":100{fields}}}"#)
}

fn message(role: &str, content: &str) -> String {
    format!(r#"{{"role":"{role}","content":"{content}"}}"#)
}

/// A conversation of about this many bytes, identical in every run.
fn conversation(bytes: usize) -> String {
    let (mut all, mut seed, mut turn) = (Vec::new(), 1_u32, 0);
    let mut size = 0;
    while size < bytes {
        let mut text = String::new();
        for _ in 0..150 {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            text.push_str(WORDS[(seed >> 16) as usize % WORDS.len()]);
            text.push(' ');
        }
        turn += 1;
        let next = message(if turn % 2 == 1 { "user" } else { "assistant" }, text.trim_end());
        size += next.len();
        all.push(next);
    }
    all.join(",")
}

/// The complete answer to a request that does not stream.
pub(crate) fn answer() -> String {
    let body = r#"{"id":"chatcmpl-bench","object":"chat.completion","created":1700000000,"model":"gpt-4o-mini","choices":[{"index":0,"message":{"role":"assistant","content":"Air scatters blue light more than red. In the evening the light crosses more air, and the blue is gone.","refusal":null},"logprobs":null,"finish_reason":"stop"}],"usage":{"prompt_tokens":30,"completion_tokens":24,"total_tokens":54}}"#;
    format!(
        "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
}

pub(crate) const STREAM_HEAD: &str =
    "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";

/// The events of a stream, each encoded as one HTTP chunk, and the last chunk.
pub(crate) fn events() -> Vec<String> {
    let event = |choices: &str, usage: &str| {
        format!(
            "data: {{\"id\":\"chatcmpl-bench\",\"object\":\"chat.completion.chunk\",\"created\":1700000000,\"model\":\"gpt-4o-mini\",\"choices\":[{choices}],\"usage\":{usage}}}\n\n"
        )
    };
    let delta = r#"{"index":0,"delta":{"content":" token"},"logprobs":null,"finish_reason":null}"#;
    let mut all = vec![event(delta, "null"); EVENTS];
    all.push(event("", r#"{"prompt_tokens":30,"completion_tokens":100,"total_tokens":130}"#));
    all.push("data: [DONE]\n\n".to_owned());
    let mut chunks: Vec<String> = all.into_iter().map(|e| format!("{:x}\r\n{e}\r\n", e.len())).collect();
    chunks.push("0\r\n\r\n".to_owned());
    chunks
}
