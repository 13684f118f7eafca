//! One request to an upstream, step by step, for `tollgate check --online`.

use super::http1::Http1Connection;
use super::replica::{Connected, Replica};
use super::{Request, Upstream, connect};
use crate::clock::Stopwatch;
use crate::config::Timeouts;
use futures_util::future::join_all;
use http::StatusCode;
use std::io;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::time::timeout;

/// One step, its time and its result.
#[derive(Debug)]
pub(crate) struct DiagnosisStep {
    /// `DNS`, `TCP`, `TLS` or the request.
    pub(crate) name: String,
    pub(crate) took: Duration,
    pub(crate) result: Result<String, StepFault>,
}

/// Why a step failed. The texts contain no key.
#[derive(Debug)]
pub(crate) enum StepFault {
    /// The host name has no address.
    NotResolved(io::Error),
    /// No address accepted a connection.
    NotConnected(io::Error),
    /// The TLS or HTTP/2 handshake failed.
    NoTls(io::Error),
    /// There was no valid answer.
    NoAnswer(String),
    /// The step took longer than this, which `timeouts.connect` or `timeouts.first_byte` sets.
    TimedOut(Duration),
    /// The upstream answered with this status.
    Refused(StatusCode),
}

impl Upstream {
    /// Sends a request to each replica, on a new connection. Returns the steps up to the first that fails, for each
    /// replica. All steps together take at most `limit`.
    pub(crate) async fn diagnose(&self, request: &Request, limit: Duration) -> Vec<Vec<DiagnosisStep>> {
        let diagnose = async |replica: &Replica| {
            let mut steps = Steps { done: Vec::new(), started: Stopwatch::start(), limit };
            // The error is the last of the steps.
            let _ = replica.try_steps(request, self.settings.timeouts, &mut steps).await;
            steps.done
        };
        join_all(self.replicas.iter().map(|replica| diagnose(replica))).await
    }
}

impl Replica {
    async fn try_steps(&self, request: &Request, timeouts: Timeouts, steps: &mut Steps) -> Result<(), ()> {
        let addresses = async {
            let found = connect::resolve(&self.host, self.port).await.map_err(StepFault::NotResolved)?;
            let text = match found.as_slice() {
                [address] => address.ip().to_string(),
                all => format!("{} addresses", all.len()),
            };
            Ok((found, text))
        };
        let addresses = steps.run("DNS", timeouts.connect, addresses).await?;
        let tcp = async {
            let tcp = connect::connect_to(addresses).await.map_err(StepFault::NotConnected)?;
            let text = tcp.peer_addr().map(|address| address.to_string()).unwrap_or_default();
            Ok((tcp, text))
        };
        let tcp = steps.run("TCP", timeouts.connect, tcp).await?;
        let connected = match &self.tls {
            None => Connected::Http1(Http1Connection::new(Box::new(tcp))),
            Some(_) => steps.run("TLS", timeouts.connect, self.handshake(tcp)).await?,
        };
        let path = request.target.split('?').next().unwrap_or_default();
        let name = format!("{} {path}", request.method);
        let answer = async {
            // `Steps::run` bounds the time.
            let due = Stopwatch::start().deadline(Duration::MAX);
            let answer = self.exchange(connected, request, due).await;
            let status = answer.map_err(|error| StepFault::NoAnswer(error.to_string()))?.0.status;
            if status.is_success() { Ok(((), status.to_string())) } else { Err(StepFault::Refused(status)) }
        };
        steps.run(&name, timeouts.first_byte, Box::pin(answer)).await
    }

    async fn handshake(&self, tcp: TcpStream) -> Result<(Connected, String), StepFault> {
        let Some(tls) = &self.tls else { return Err(StepFault::NoAnswer("there is no TLS".to_owned())) };
        let stream = tls.connect(tcp).await.map_err(StepFault::NoTls)?;
        let session = stream.get_ref().1;
        let version = session.protocol_version().and_then(|version| version.as_str()).unwrap_or_default();
        let version = version.replace("TLSv1_", "TLS 1.");
        if session.alpn_protocol() != Some(b"h2") {
            let text = format!("{version}, HTTP/1.1");
            return Ok((Connected::Http1(Http1Connection::new(Box::new(stream))), text));
        }
        let failed = |error| StepFault::NoTls(io::Error::other(error));
        let stream = self.http2.open(stream).await.map_err(failed)?;
        Ok((Connected::Http2(stream), format!("{version}, HTTP/2")))
    }
}

struct Steps {
    done: Vec<DiagnosisStep>,
    started: Stopwatch,
    limit: Duration,
}

impl Steps {
    /// Runs a step within its own limit and the rest of the limit of all.
    async fn run<T>(
        &mut self,
        name: &str,
        limit: Duration,
        step: impl Future<Output = Result<(T, String), StepFault>>,
    ) -> Result<T, ()> {
        let watch = Stopwatch::start();
        let limit = limit.min(self.limit.saturating_sub(self.started.elapsed()));
        let result = timeout(limit, step).await.unwrap_or(Err(StepFault::TimedOut(limit)));
        let (value, result) = match result {
            Ok((value, text)) => (Ok(value), Ok(text)),
            Err(fault) => (Err(()), Err(fault)),
        };
        self.done.push(DiagnosisStep { name: name.to_owned(), took: watch.elapsed(), result });
        value
    }
}
