//! Test support: a scripted upstream, a gateway in front of it, and a caller that reads raw bytes. The kernel chooses
//! the ports. Tests wait for events, with a time limit, and not for fixed durations.

pub mod caller;
pub mod framing;
pub mod gateway;
pub mod http2;
#[path = "../../common/port.rs"]
pub mod port;
pub mod process;
pub mod program;
#[path = "../../common/proxy.rs"]
pub mod proxy;
pub mod redis;
pub mod upstream;

pub use caller::{Caller, Reply};
pub use framing::{Framing, framed, of_type};
pub use gateway::{Gateway, admin, change};
pub use process::Process;
pub use program::{run, tollgate};
pub use upstream::{Answer, SeenRequest, Step, Upstream};

use std::time::Duration;

/// A test fails if an expected event takes longer than this.
pub const EVENT_TIMEOUT: Duration = Duration::from_secs(10);

/// Waits for an event that must happen, and panics after `EVENT_TIMEOUT`.
pub async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    let waited = tokio::time::timeout(EVENT_TIMEOUT, future).await;
    waited.unwrap_or_else(|elapsed| panic!("timed out waiting for {what}: {elapsed}"))
}

/// A minimal chat request.
pub const HELLO: &str = r#"{"model":"gpt-4o","messages":[{"role":"user","content":"hello"}]}"#;
/// The prompt tokens of `HELLO` by OpenAI's rule: 3 for the reply, 3 for the message, 1 for its role, 1 for its word.
pub const HELLO_TOKENS: u64 = 8;
pub const CHAT: &str = "/v1/chat/completions";

/// `HELLO` with these fields added in front.
pub fn hello(fields: &str) -> String {
    HELLO.replacen('{', &format!("{{{fields},"), 1)
}

/// A complete chat answer that reports this usage.
pub fn chat_answer(usage: &str) -> String {
    format!(
        r#"{{"id":"c1","object":"chat.completion","choices":[{{"index":0,"message":{{"role":"assistant","content":"Hello there"}},"finish_reason":"stop"}}],"usage":{usage}}}"#
    )
}

/// The `usage` object of OpenAI's APIs.
pub fn usage(prompt: u64, completion: u64) -> String {
    format!(
        r#"{{"prompt_tokens":{prompt},"completion_tokens":{completion},"total_tokens":{}}}"#,
        prompt + completion
    )
}

/// A chunk of a chat stream that delivers this text.
pub fn delta(text: &str) -> String {
    format!(
        "data: {{\"id\":\"c1\",\"choices\":[{{\"index\":0,\"delta\":{{\"content\":\"{text}\"}}}}],\"usage\":null}}\n\n"
    )
}

/// The usage chunk of a chat stream.
pub fn usage_event(prompt: u64, completion: u64) -> String {
    format!("data: {{\"id\":\"c1\",\"choices\":[],\"usage\":{}}}\n\n", usage(prompt, completion))
}

pub const DONE: &str = "data: [DONE]\n\n";
