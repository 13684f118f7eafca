//! Traces: a span for each request, with children for its wait and its call of the upstream, sent to a collector by OTLP.
//!
//! OpenTelemetry's SDK samples, batches and encodes. It has a queue of bounded length and a thread of its own: a slow or
//! unreachable collector costs spans, and never delays a request. Without `telemetry.otlp`, and without variables that name a
//! collector, none of this exists.

mod collector;
mod context;
mod counted;
mod span;
mod variables;

use super::Metrics;
use crate::config::Config;
use collector::Collector;
use counted::{CountedExporter, CountedProcessor};
use opentelemetry::trace::TracerProvider as _;
use opentelemetry::{InstrumentationScope, Key, KeyValue};
use opentelemetry_otlp::{Protocol, SpanExporter, WithExportConfig as _, WithHttpConfig as _};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{
    BatchConfigBuilder, BatchSpanProcessor, Sampler, SdkTracer, SdkTracerProvider,
};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

pub(super) use context::parent_of;
pub(super) use counted::SpanCounts;
pub(crate) use span::RequestTrace;

/// How long the last spans may take to reach the collector when the gateway stops, or when a reload replaces the settings.
const MAX_FLUSH_TIME: Duration = Duration::from_secs(3);

/// Sends the spans of requests to one collector.
#[derive(Debug)]
pub(crate) struct Tracing {
    provider: SdkTracerProvider,
    tracer: SdkTracer,
}

impl Tracing {
    /// Begins to send traces. `None`: neither the config nor a variable enables it.
    ///
    /// # Errors
    /// A variable is not valid.
    pub(crate) fn start(config: &Config, metrics: &Metrics) -> anyhow::Result<Option<Arc<Self>>> {
        let settings = config.telemetry.otlp.as_ref();
        if !variables::ask_for_traces(settings.is_some()) {
            return Ok(None);
        }
        let counts = metrics.span_counts();
        let headers = settings.map(|settings| settings.headers.clone()).unwrap_or_default();
        let client = Collector::new(headers, variables::timeout());
        let exporter = SpanExporter::builder().with_http().with_http_client(client);
        let exporter = exporter.with_protocol(Protocol::HttpBinary);
        let exporter = match settings.and_then(|settings| settings.endpoint.as_ref()) {
            Some(endpoint) => exporter.with_endpoint(endpoint.to_string()),
            None => exporter,
        };
        let (waiting, queue) = (Arc::default(), variables::queue_size());
        let exporter = CountedExporter::new(exporter.build()?, counts.clone(), Arc::clone(&waiting));
        let batches = BatchConfigBuilder::default().with_max_queue_size(queue).build();
        let batches = BatchSpanProcessor::builder(exporter).with_batch_config(batches).build();
        let mut provider = SdkTracerProvider::builder()
            .with_resource(resource())
            .with_span_processor(CountedProcessor::new(batches, counts.clone(), waiting, queue));
        if let Some(share) = settings.and_then(|settings| settings.sample) {
            let by_trace = Sampler::TraceIdRatioBased(share);
            provider = provider.with_sampler(Sampler::ParentBased(Box::new(by_trace)));
        }
        let provider = provider.build();
        let scope = InstrumentationScope::builder("tollgate").with_version(env!("CARGO_PKG_VERSION")).build();
        let tracer = provider.tracer_with_scope(scope);
        variables::warn_of_unsupported();
        Ok(Some(Arc::new(Self { provider, tracer })))
    }

    /// Sends the spans that wait, for a few seconds at most. Later spans are dropped.
    pub(crate) fn shut_down(&self) {
        if let Err(error) = self.provider.shutdown_with_timeout(MAX_FLUSH_TIME) {
            tracing::warn!(%error, "the last traces may not have reached the collector");
        }
    }
}

/// The last request of a config that is not in force any more ends on an event loop, which must not wait for a collector.
impl Drop for Tracing {
    fn drop(&mut self) {
        let provider = self.provider.clone();
        // Without another thread, the last spans are lost.
        drop(thread::Builder::new().name("traces".into()).spawn(move || {
            // It has been shut down already if the gateway stops.
            drop(provider.shutdown_with_timeout(MAX_FLUSH_TIME));
        }));
    }
}

/// The attributes of this process: those of `OTEL_SERVICE_NAME` and `OTEL_RESOURCE_ATTRIBUTES`, and its version.
fn resource() -> Resource {
    const SERVICE: Key = Key::from_static_str("service.name");
    let version = KeyValue::new("service.version", env!("CARGO_PKG_VERSION"));
    let resource = Resource::builder().with_attribute(version.clone()).build();
    let is_named = resource
        .get(&SERVICE)
        .is_some_and(|name| !name.as_str().is_empty() && !name.as_str().starts_with("unknown_service"));
    if is_named {
        return resource;
    }
    Resource::builder().with_service_name("tollgate").with_attribute(version).build()
}
