//! Paths that the providers have and the gateway does not serve.

use crate::support::*;

#[tokio::test]
async fn a_404_for_a_providers_path_names_the_setting_that_forwards_it() {
    let upstream = Upstream::always(Answer::json(200, "{}")).await;
    let gateway = Gateway::in_front_of(&upstream, "{ requests: { limit: 99, per: minute } }").await;
    for path in [
        "/v1/files",
        "/v1/batches",
        "/v1/assistants",
        "/v1/realtime",
        "/v1/threads/t/runs",
        "/v1/uploads",
        "/v1/fine_tuning/jobs",
        "/staging/v1/vector_stores",
        "/v1/responses/resp_1",
        "/openai/files",
        "/v1/messages/batches",
        "/messages/batches",
        "/v1beta/files",
        "/v1beta/cachedContents",
        "/v1beta/models/gemini-2.5-pro:batchGenerateContent",
    ] {
        for method in ["POST", "GET"] {
            let reply = gateway.send(method, path, "", "{}").await;
            assert_eq!(
                (reply.status, reply.header("x-tollgate-error")),
                (404, Some("unknown_path")),
                "{path}"
            );
            let message = reply.json()["error"]["message"].as_str().unwrap().to_owned();
            assert!(message.contains("other_paths: forward") && message.contains(path), "{message}");
            assert!(!message.contains("base_url"), "{message}");
        }
    }
    assert!(upstream.seen().is_empty());
}
