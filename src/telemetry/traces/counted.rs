//! Counts spans: those that the collector has taken, that it has not taken, and that found the queue full.

use opentelemetry::Context;
use opentelemetry_otlp::SpanExporter;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{BatchSpanProcessor, Span, SpanData, SpanProcessor};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

/// The number of spans of this process, by outcome.
#[derive(Debug, Default)]
pub(in crate::telemetry) struct SpanCounts {
    sent: AtomicU64,
    failed: AtomicU64,
    dropped: AtomicU64,
}

impl SpanCounts {
    /// Each outcome with its number of spans.
    pub(in crate::telemetry) fn by_outcome(&self) -> [(&'static str, u64); 3] {
        let counts = [("sent", &self.sent), ("failed", &self.failed), ("dropped", &self.dropped)];
        counts.map(|(outcome, count)| (outcome, count.load(Ordering::Relaxed)))
    }
}

/// Sends spans, and counts them.
#[derive(Debug)]
pub(super) struct CountedExporter {
    exporter: SpanExporter,
    counts: Arc<SpanCounts>,
    /// Spans in the queue.
    waiting: Arc<AtomicUsize>,
    /// Whether the collector has not taken the last spans.
    is_failing: AtomicBool,
}

impl CountedExporter {
    pub(super) fn new(exporter: SpanExporter, counts: Arc<SpanCounts>, waiting: Arc<AtomicUsize>) -> Self {
        Self { exporter, counts, waiting, is_failing: AtomicBool::new(false) }
    }

    /// Logs the first failure, and the first success after it.
    fn report(&self, result: &OTelSdkResult) {
        let was_failing = self.is_failing.swap(result.is_err(), Ordering::Relaxed);
        match result {
            Err(error) if !was_failing => {
                tracing::warn!(%error, "the collector does not take traces, so they are lost; check telemetry.otlp.endpoint, or OTEL_EXPORTER_OTLP_ENDPOINT");
            }
            Ok(()) if was_failing => tracing::info!("the collector takes traces again"),
            _ => {}
        }
    }
}

impl opentelemetry_sdk::trace::SpanExporter for CountedExporter {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let spans = batch.len();
        self.waiting.fetch_sub(spans, Ordering::Relaxed);
        let result = opentelemetry_sdk::trace::SpanExporter::export(&self.exporter, batch).await;
        let count = if result.is_ok() { &self.counts.sent } else { &self.counts.failed };
        count.fetch_add(spans as u64, Ordering::Relaxed);
        self.report(&result);
        result
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        opentelemetry_sdk::trace::SpanExporter::shutdown_with_timeout(&self.exporter, timeout)
    }

    fn force_flush(&self) -> OTelSdkResult {
        opentelemetry_sdk::trace::SpanExporter::force_flush(&self.exporter)
    }

    fn set_resource(&mut self, resource: &Resource) {
        opentelemetry_sdk::trace::SpanExporter::set_resource(&mut self.exporter, resource);
    }
}

/// Puts spans into the queue, and counts those for which it has no room. The SDK's own queue is as long and drops nothing.
#[derive(Debug)]
pub(super) struct CountedProcessor {
    batches: BatchSpanProcessor,
    counts: Arc<SpanCounts>,
    waiting: Arc<AtomicUsize>,
    max_waiting: usize,
}

impl CountedProcessor {
    pub(super) fn new(
        batches: BatchSpanProcessor,
        counts: Arc<SpanCounts>,
        waiting: Arc<AtomicUsize>,
        max_waiting: usize,
    ) -> Self {
        Self { batches, counts, waiting, max_waiting }
    }
}

impl SpanProcessor for CountedProcessor {
    fn on_start(&self, span: &mut Span, context: &Context) {
        self.batches.on_start(span, context);
    }

    fn on_end(&self, span: SpanData) {
        // The SDK ignores such spans too, and they would never leave the count of those that wait.
        if !span.span_context.is_sampled() {
            return;
        }
        if self.waiting.fetch_add(1, Ordering::Relaxed) < self.max_waiting {
            self.batches.on_end(span);
        } else {
            self.waiting.fetch_sub(1, Ordering::Relaxed);
            self.counts.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.batches.force_flush()
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.batches.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.batches.set_resource(resource);
    }
}
