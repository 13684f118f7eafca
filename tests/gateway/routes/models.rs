//! `model` of a route: the name that is sent to the upstream, in the body or in the path. Every other byte stays.

use super::*;

const SENT: &str = "meta-llama/Llama \"3\"";
/// `SENT` as JSON.
const JSON: &str = r#""meta-llama/Llama \"3\"""#;

async fn renaming(upstream: &Upstream) -> Gateway {
    let routes = format!("{{ models: ['gpt-4o', ''], upstream: a, model: '{SENT}' }}");
    gateway(&[("a", upstream)], &routes, "").await
}

#[tokio::test]
async fn the_value_of_the_model_is_replaced_in_the_body_of_every_api() {
    let upstream = Upstream::always(named("a")).await;
    let gateway = renaming(&upstream).await;
    let mut sent = Vec::new();
    for (path, body) in [
        (
            CHAT,
            r#" { "model" : MODEL , "messages":[{"role":"user","content":"gpt-4o"}],"x":{"model":"gpt-4o"},"y":1e2 } "#,
        ),
        (CHAT, r#"{"messages":[],"x":"é\ud83d","model":MODEL}"#),
        ("/v1/completions", r#"{"prompt":"gpt-4o","model":MODEL}"#),
        ("/v1/responses", r#"{"model":MODEL,"input":"gpt-4o"}"#),
        ("/openai/v1/responses", r#"{"model":MODEL,"input":"gpt-4o"}"#),
        ("/v1/embeddings", r#"{"input":["gpt-4o"],"model":MODEL}"#),
        ("/v1/messages", r#"{"max_tokens":9,"model":MODEL,"messages":[]}"#),
        ("/v1/messages/count_tokens", r#"{"messages":[],"model":MODEL}"#),
        ("/v1/responses/input_tokens", r#"{"model":MODEL,"input":"x"}"#),
        ("/v1/rerank", r#"{"documents":["gpt-4o"],"model":MODEL,"query":"q"}"#),
        ("/v1/moderations", r#"{"input":"gpt-4o","model" :MODEL}"#),
        ("/v1/images/generations", r#"{"model":MODEL}"#),
    ] {
        for spelling in [r#""gpt-4o""#, r#""gpt\u002d4o""#] {
            let reply = gateway.post(path, &body.replace("MODEL", spelling)).await;
            assert_eq!(reply.status, 200, "{path}: {}", reply.text());
            sent.push((path, body.replace("MODEL", JSON)));
        }
    }
    for (request, (path, body)) in upstream.seen().iter().zip(&sent) {
        assert_eq!(request.text(), body, "{path}");
        assert_eq!(request.header("content-length"), Some(&*body.len().to_string()));
    }
    assert_eq!(upstream.seen().len(), sent.len());
}

#[tokio::test]
async fn a_null_is_replaced_and_an_absent_model_stays_absent() {
    let upstream = Upstream::always(named("a")).await;
    let gateway = renaming(&upstream).await;
    for (path, body) in [
        (CHAT, r#"{"messages":[],"model":null}"#),
        (CHAT, r#"{"messages":[]}"#),
        ("/v1/moderations", r#"{"model":null,"input":"x"}"#),
        ("/v1/moderations", r#"{"input":"x"}"#),
    ] {
        assert_eq!(gateway.post(path, body).await.status, 200);
        let seen = upstream.seen();
        assert_eq!(seen.last().unwrap().text(), body.replace("null", JSON), "{path}");
    }
}

#[tokio::test]
async fn the_model_is_replaced_in_the_path() {
    const SEGMENT: &str = "meta-llama%2FLlama%20%223%22";
    let upstream = Upstream::always(named("a")).await;
    let gateway = renaming(&upstream).await;
    for (path, want) in [
        ("/v1beta/models/gpt-4o:generateContent?alt=sse", "/v1/v1beta/models/MODEL:generateContent?alt=sse"),
        ("/v1beta/models/gpt-4o:countTokens", "/v1/v1beta/models/MODEL:countTokens"),
        ("/v1/models/gpt-4o:streamGenerateContent", "/v1/models/MODEL:streamGenerateContent"),
        (
            "/openai/deployments/gpt-4o/chat/completions?api-version=1",
            "/v1/openai/deployments/MODEL/chat/completions?api-version=1",
        ),
        ("/staging/openai/deployments/gpt-4o/embeddings", "/v1/openai/deployments/MODEL/embeddings"),
    ] {
        // The model in the body is not the one that is served, and stays.
        let reply = gateway.post(path, HELLO).await;
        assert_eq!(reply.status, 200, "{path}: {}", reply.text());
        let request = upstream.seen().last().unwrap().clone();
        assert_eq!((request.target(), request.text()), (&*want.replace("MODEL", SEGMENT), HELLO));
    }
    // A lookup goes where a request with the model would go, and a name may have slashes there.
    let reply = gateway.send("GET", "/v1/models/gpt-4o", "", "").await;
    assert_eq!(reply.status, 200);
    assert_eq!(upstream.seen().last().unwrap().target(), "/v1/models/meta-llama/Llama%20%223%22");
}

#[tokio::test]
async fn the_model_is_replaced_in_a_form() {
    let upstream = Upstream::always(named("a")).await;
    let gateway = renaming(&upstream).await;
    let form = |model: &str| {
        format!(
            "--b\r\nContent-Disposition: form-data; name=\"file\"; filename=\"a.wav\"\r\n\r\nRIFF\0gpt-4o\r\n\
             --b\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\n{model}\r\n--b\r\n\
             Content-Disposition: form-data; name=\"prompt\"\r\n\r\ngpt-4o\r\n--b--\r\n"
        )
    };
    let headers = "content-type: multipart/form-data; boundary=b\r\n";
    for path in ["/v1/audio/transcriptions", "/v1/images/edits"] {
        let reply = gateway.send("POST", path, headers, &form("gpt-4o")).await;
        assert_eq!(reply.status, 200, "{}", reply.text());
        assert_eq!(upstream.seen().last().unwrap().text(), form(SENT));
        let reply = gateway.send("POST", path, headers, &form("whisper-1")).await;
        assert_eq!(reply.status, 200);
        assert_eq!(upstream.seen().last().unwrap().text(), form("whisper-1"));
    }
}

#[tokio::test]
async fn other_edits_of_the_body_go_with_it() {
    let upstream = Upstream::answering(|_| {
        Answer::stream().events(&[delta("Hi"), usage_event(8, 1), DONE.to_owned()]).end()
    })
    .await;
    let gateway = gateway(&[("a", &upstream)], "{ models: ['*'], upstream: a, model: x }", "").await;
    let reply = gateway.chat(&hello(r#""stream":true"#)).await;
    assert_eq!(reply.text(), [delta("Hi"), DONE.to_owned()].concat());
    let expected = HELLO
        .replacen('{', r#"{"stream_options":{"include_usage":true},"stream":true,"#, 1)
        .replace("gpt-4o", "x");
    assert_eq!(upstream.only().text(), expected);
}

#[tokio::test]
async fn the_estimate_is_that_of_the_model_which_is_sent() {
    let upstream = Upstream::always(named("a")).await;
    let text = "Grüße aus Zürich, 東京で会いましょう! ".repeat(20);
    let body = HELLO.replace("hello", &text);
    let estimate = async |gateway: &Gateway, model: &str| {
        let reply = gateway.chat(&body.replace("gpt-4o", model)).await;
        reply.header("x-tollgate-estimated-prompt-tokens").unwrap().parse::<u64>().unwrap()
    };
    let direct = gateway(&[("a", &upstream)], "{ models: [none], upstream: a }", "calibrate: false").await;
    let (new, old) = (estimate(&direct, "gpt-4o").await, estimate(&direct, "gpt-4").await);
    assert_ne!(new, old);
    let renamed = "{ models: [alias], upstream: a, model: gpt-4 }";
    let renamed = gateway(&[("a", &upstream)], renamed, "calibrate: false").await;
    assert_eq!((estimate(&renamed, "alias").await, estimate(&renamed, "gpt-4o").await), (old, new));
}
