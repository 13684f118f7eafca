//! The simulated backend and callers of `tollgate demo`. The backend answers like a model server, without a model or a
//! network.

mod traffic;

use crate::api::Api;
use crate::body::{Body as RequestBody, BodyText};
use crate::estimate::Models;
use anyhow::Context as _;
use axum::body::{Body, Bytes};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use futures_util::StreamExt as _;
use http::{StatusCode, header};
use serde_json::{Value, json};
use std::convert::Infallible;
use std::net::SocketAddr;
use std::thread;
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::time::sleep;

const ANSWER: &str = "Sunlight is made of all colours, and air scatters the short blue waves far more than the \
    long red ones. So blue light reaches your eyes from every part of the sky, while the sun itself looks a \
    little yellow. At sunset the light has to cross so much air that most of the blue is gone, and what is \
    left is red.";
/// Delay between two words: about thirty words per second, like a hosted model.
const WORD_DELAY: Duration = Duration::from_millis(30);

/// A running simulated backend. It ends with the process.
pub(crate) struct Backend {
    address: SocketAddr,
    runtime: Handle,
}

impl Backend {
    /// Starts a backend on a free port of this machine.
    ///
    /// # Errors
    /// There is no free port, or the thread cannot be started.
    pub(crate) fn start() -> anyhow::Result<Self> {
        let listener = std::net::TcpListener::bind("127.0.0.1:0")
            .context("there is no free port for the simulated backend")?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        let router = Router::new()
            .route("/v1/models", get(models))
            .route("/v1/chat/completions", post(chat))
            .route("/v1/embeddings", post(embeddings));
        thread::Builder::new().name("backend".into()).spawn(move || {
            runtime.block_on(async {
                let listener = tokio::net::TcpListener::from_std(listener)?;
                axum::serve(listener, router).await
            })
        })?;
        Ok(Self { address, runtime: handle })
    }

    /// Starts the simulated callers, who send their requests to the gateway at this address.
    pub(crate) fn start_callers(&self, gateway: SocketAddr) {
        self.runtime.spawn(async move { traffic::run(gateway) });
    }

    /// The address of its listener.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }
}

async fn models() -> Json<Value> {
    let model = |id: &str| json!({"id": id, "object": "model", "created": 1_700_000_000, "owned_by": "demo"});
    Json(json!({"object": "list", "data": [model("gpt-4o-mini"), model("text-embedding-3-small")]}))
}

/// The answer to one request, with its usage.
struct Reply {
    model: String,
    words: Vec<&'static str>,
    is_streaming: bool,
    wants_usage: bool,
    finish: &'static str,
    usage: Value,
}

impl Reply {
    fn to(api: Api, body: &[u8]) -> Result<Self, Box<Response>> {
        let text = BodyText::of(body);
        let request = text.as_ref().map_err(Clone::clone).and_then(|text| RequestBody::read(api, text));
        let request = request.map_err(|fault| {
            let error = json!({"error": {"message": fault.to_string(), "type": "invalid_request_error", "param": null, "code": null}});
            Box::new((StatusCode::BAD_REQUEST, Json(error)).into_response())
        })?;
        let model = request.model.as_deref().unwrap_or("gpt-4o-mini").to_owned();
        let known = Models::default().named(&model);
        let prompt = request.prompt.estimate(&known).tokens();
        let cap = request.completion_cap().and_then(|n| usize::try_from(n).ok()).unwrap_or(usize::MAX);
        let mut words: Vec<&str> = ANSWER.split_inclusive(' ').collect();
        let finish = if words.len() > cap { "length" } else { "stop" };
        words.truncate(cap);
        let completion =
            if api.generates() { known.tokenizer.count_all([words.concat().as_str()]) } else { 0 };
        Ok(Self {
            is_streaming: request.streams,
            wants_usage: request.wants_usage(),
            usage: json!({"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}),
            model,
            words,
            finish,
        })
    }

    fn chunk(&self, choices: &Value, usage: &Value) -> Bytes {
        let chunk = json!({"id": "chatcmpl-demo", "object": "chat.completion.chunk", "created": 1_700_000_000,
            "model": self.model, "choices": choices, "usage": usage});
        format!("data: {chunk}\n\n").into()
    }
}

async fn chat(body: Bytes) -> Response {
    let reply = match Reply::to(Api::Chat, &body) {
        Ok(reply) => reply,
        Err(refusal) => return *refusal,
    };
    if reply.is_streaming {
        return stream(&reply);
    }
    sleep(WORD_DELAY).await;
    let message = json!({"role": "assistant", "content": reply.words.concat(), "refusal": null});
    Json(json!({"id": "chatcmpl-demo", "object": "chat.completion", "created": 1_700_000_000, "model": reply.model,
        "choices": [{"index": 0, "message": message, "finish_reason": reply.finish}], "usage": reply.usage}))
    .into_response()
}

fn stream(reply: &Reply) -> Response {
    let choice = |delta: Value, finish: Value| json!([{"index": 0, "delta": delta, "finish_reason": finish}]);
    let mut chunks =
        vec![reply.chunk(&choice(json!({"role": "assistant", "content": ""}), Value::Null), &Value::Null)];
    chunks.extend(
        reply.words.iter().map(|w| reply.chunk(&choice(json!({"content": w}), Value::Null), &Value::Null)),
    );
    chunks.push(reply.chunk(&choice(json!({}), json!(reply.finish)), &Value::Null));
    if reply.wants_usage {
        chunks.push(reply.chunk(&json!([]), &reply.usage));
    }
    chunks.push(Bytes::from_static(b"data: [DONE]\n\n"));
    let body = futures_util::stream::iter(chunks).then(async |chunk| {
        sleep(WORD_DELAY).await;
        Ok::<_, Infallible>(chunk)
    });
    ([(header::CONTENT_TYPE, "text/event-stream")], Body::from_stream(body)).into_response()
}

async fn embeddings(body: Bytes) -> Response {
    match Reply::to(Api::Embeddings, &body) {
        Ok(reply) => {
            let embedding = json!([{"object": "embedding", "index": 0, "embedding": [0.25, -0.5, 0.125]}]);
            let usage = json!({"prompt_tokens": reply.usage["prompt_tokens"], "total_tokens": reply.usage["prompt_tokens"]});
            Json(json!({"object": "list", "data": embedding, "model": reply.model, "usage": usage}))
                .into_response()
        }
        Err(refusal) => *refusal,
    }
}
