//! TLS toward upstreams, and HTTP/2 where it is offered.

use crate::support::*;
use std::process::Command;

/// Starts the test server below in this very binary's process, with a certificate of its own, and a
/// gateway in a process that trusts it.
#[tokio::test]
async fn answers_come_over_tls_with_http1_and_http2() {
    for protocol in [&b"http/1.1"[..], b"h2"] {
        let server = server::start(protocol).await;
        let folder = tempfile::tempdir().unwrap();
        let (config, trusted) = (folder.path().join("t.yaml"), folder.path().join("ca.pem"));
        std::fs::write(&trusted, &server.certificate).unwrap();
        let text = format!(
            "server: {{ listen: '127.0.0.1:0' }}\nadmin: {{ listen: '127.0.0.1:0' }}\nupstreams: {{ u: {{ base_url: 'https://localhost:{}/v1', api_key: sk-upstream }} }}\n\
             environments: {{ e: {{ upstream: u }} }}\ndefault_environment: e\nstore: {{ memory: true }}",
            server.port
        );
        std::fs::write(&config, text).unwrap();
        for (trusts, status) in [(true, 200), (false, 502)] {
            let mut command = Command::new(env!("CARGO_BIN_EXE_tollgate"));
            command
                .args(["serve", "--config", config.to_str().unwrap()])
                .stderr(std::process::Stdio::piped());
            if trusts {
                command.env("SSL_CERT_FILE", &trusted);
            }
            let mut child = command.spawn().unwrap();
            let stderr = child.stderr.take().unwrap();
            let address = tokio::task::spawn_blocking(move || {
                use std::io::BufRead;
                let lines = std::io::BufReader::new(stderr).lines();
                let line = lines.map(Result::unwrap).find(|l| l.contains("\"serving\"")).unwrap();
                serde_json::from_str::<serde_json::Value>(&line).unwrap()["address"]
                    .as_str()
                    .unwrap()
                    .to_owned()
            })
            .await
            .unwrap();
            for _ in 0..3 {
                let mut caller = Caller::connect(address.parse().unwrap()).await;
                caller.request("POST", CHAT, "", hello(r#""stream":true"#).as_bytes()).await;
                let reply = caller.reply().await;
                assert_eq!(reply.status, status, "{protocol:?} {}", reply.text());
                if trusts {
                    let body = format!("{}{}", delta("Hi"), DONE);
                    assert_eq!(reply.text(), body);
                    assert_eq!(
                        reply.header("x-protocol"),
                        Some(if protocol == b"h2" { "HTTP/2.0" } else { "HTTP/1.1" })
                    );
                }
            }
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }
}

mod server {
    use crate::support::{DONE, delta, usage_event};
    use bytes::Bytes;
    use http_body_util::{BodyExt, Full};
    use hyper_util::rt::{TokioExecutor, TokioIo};
    use std::convert::Infallible;
    use std::sync::Arc;
    use tokio_rustls::TlsAcceptor;
    use tokio_rustls::rustls::ServerConfig;
    use tokio_rustls::rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};

    pub struct Server {
        pub port: u16,
        pub certificate: String,
    }

    pub async fn start(protocol: &[u8]) -> Server {
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(made.signing_key.serialize_der()));
        let provider = Arc::new(tokio_rustls::rustls::crypto::ring::default_provider());
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![made.cert.der().clone()], key)
            .unwrap();
        config.alpn_protocols = vec![protocol.to_vec()];
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let is_http2 = protocol == b"h2";
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let acceptor = acceptor.clone();
                tokio::spawn(async move {
                    let Ok(stream) = acceptor.accept(socket).await else { return };
                    let service = hyper::service::service_fn(answer);
                    if is_http2 {
                        let http2 = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
                        let _ = http2.serve_connection(TokioIo::new(stream), service).await;
                    } else {
                        let http1 = hyper::server::conn::http1::Builder::new();
                        let _ = http1.serve_connection(TokioIo::new(stream), service).await;
                    }
                });
            }
        });
        Server { port, certificate: made.cert.pem() }
    }

    async fn answer(
        request: http::Request<hyper::body::Incoming>,
    ) -> Result<http::Response<Full<Bytes>>, Infallible> {
        let version = format!("{:?}", request.version());
        assert_eq!(request.headers()["authorization"], "Bearer sk-upstream");
        let body = request.into_body().collect().await.unwrap().to_bytes();
        assert!(body.windows(13).any(|w| w == b"include_usage"));
        let events = format!("{}{}{}", delta("Hi"), usage_event(8, 1), DONE);
        let response = http::Response::builder()
            .header("content-type", "text/event-stream")
            .header("x-protocol", version);
        Ok(response.body(Full::new(events.into())).unwrap())
    }
}
