//! The HTTP client for the collector: the gateway's own one, on the SDK's thread.

use crate::clock::Stopwatch;
use crate::config::{Timeouts, UpstreamSettings};
use crate::upstream::{self, Incoming, Upstream};
use bytes::{Bytes, BytesMut};
use http::{HeaderMap, Request, Response, Uri};
use opentelemetry_http::{HttpClient, HttpError};
use std::fmt;
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::runtime::{Builder, Runtime};

/// Maximum size of an answer in bytes. The collector reports here which spans it has refused.
const MAX_ANSWER_BYTES: usize = 64 * 1024;

type Answer<'a> = Pin<Box<dyn Future<Output = Result<Response<Bytes>, HttpError>> + Send + 'a>>;

/// Sends requests to the collector. It is used by one thread, which may wait.
pub(super) struct Collector {
    /// Added to each request, instead of headers of the same names.
    headers: HeaderMap,
    timeout: Duration,
    /// Made with the first request, on the SDK's thread: a runtime must not end on an event loop.
    connection: Mutex<Option<Connection>>,
}

struct Connection {
    upstream: Upstream,
    runtime: Runtime,
}

impl fmt::Debug for Collector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Collector").field("timeout", &self.timeout).finish_non_exhaustive()
    }
}

impl Collector {
    pub(super) fn new(headers: HeaderMap, timeout: Duration) -> Self {
        Self { headers, timeout, connection: Mutex::new(None) }
    }

    fn send(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let (head, body) = request.into_parts();
        let target = head.uri.path_and_query().map_or("/", |target| target.as_str()).to_owned();
        let mut headers = head.headers;
        for (name, value) in &self.headers {
            headers.insert(name, value.clone());
        }
        let named = headers.iter().map(|(name, value)| (name.clone(), value.clone())).collect();
        let request = upstream::Request { method: head.method, target, headers: named, body };
        let mut guard = self.connection.lock().unwrap_or_else(PoisonError::into_inner);
        let connection = match &mut *guard {
            Some(connection) => connection,
            none => none.insert(Connection::new(&head.uri, self.timeout)?),
        };
        let Connection { upstream, runtime } = connection;
        runtime.block_on(async {
            let answer = async {
                let sent = upstream.send(&request, Stopwatch::start(), &mut |_| {}).await;
                let (parts, body) = sent.map_err(|error| format!("{error:?}"))?;
                Ok::<_, HttpError>(Response::from_parts(parts, read(body).await?))
            };
            tokio::time::timeout(self.timeout, answer).await.map_err(HttpError::from)?
        })
    }
}

impl Connection {
    fn new(uri: &Uri, timeout: Duration) -> anyhow::Result<Self> {
        let base = Uri::builder()
            .scheme(uri.scheme_str().unwrap_or("http"))
            .authority(uri.authority().map_or("", |authority| authority.as_str()))
            .path_and_query("/")
            .build()?;
        let timeouts = Timeouts { connect: timeout, first_byte: timeout, idle: timeout, total: timeout };
        let settings = UpstreamSettings::of_server("collector of traces", base, timeouts);
        let upstream = Upstream::alone(Arc::new(settings), &upstream::client_config()?)?;
        Ok(Self { upstream, runtime: Builder::new_current_thread().enable_all().build()? })
    }
}

/// Reads an answer, up to its maximum size.
async fn read(mut body: Incoming) -> Result<Bytes, HttpError> {
    let mut whole = BytesMut::new();
    while let Some(data) = poll_fn(|cx| body.poll_data(cx)).await {
        whole.extend_from_slice(&data?);
        if whole.len() > MAX_ANSWER_BYTES {
            return Err("the answer of the collector is too large".into());
        }
    }
    Ok(whole.freeze())
}

impl HttpClient for Collector {
    fn send_bytes<'life, 'future>(&'life self, request: Request<Bytes>) -> Answer<'future>
    where
        'life: 'future,
        Self: 'future,
    {
        Box::pin(async move {
            self.send(request).inspect_err(|error| {
                tracing::debug!(error = %error, "a request to the collector of traces failed");
            })
        })
    }
}
