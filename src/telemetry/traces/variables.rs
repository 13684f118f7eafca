//! The variables of OpenTelemetry that its SDK does not read itself.

use std::env;
use std::time::Duration;

/// The default of `OTEL_EXPORTER_OTLP_TIMEOUT`.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(10);
/// The default of `OTEL_BSP_MAX_QUEUE_SIZE`.
const DEFAULT_QUEUE: usize = 2_048;
/// A longer queue would take too much memory while the collector is unreachable.
const MAX_QUEUE: usize = 1 << 20;

/// The value of a variable that is set and not empty.
fn variable(name: &str) -> Option<String> {
    env::var(name).ok().map(|value| value.trim().to_owned()).filter(|value| !value.is_empty())
}

/// Whether traces are sent. `is_configured`: the config has `telemetry.otlp`.
pub(super) fn ask_for_traces(is_configured: bool) -> bool {
    if variable("OTEL_SDK_DISABLED").is_some_and(|value| value.eq_ignore_ascii_case("true")) {
        return false;
    }
    let names_collector = || {
        let names = ["OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"];
        names.into_iter().any(|name| variable(name).is_some())
    };
    is_configured
        || match variable("OTEL_TRACES_EXPORTER").as_deref() {
            Some("none") => false,
            Some("otlp") => true,
            _ => names_collector(),
        }
}

/// How long one request to the collector may take.
pub(super) fn timeout() -> Duration {
    let names = ["OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "OTEL_EXPORTER_OTLP_TIMEOUT"];
    let ms = names.into_iter().find_map(variable).and_then(|text| text.parse::<u64>().ok());
    ms.filter(|ms| *ms > 0).map_or(DEFAULT_TIMEOUT, Duration::from_millis)
}

/// The number of spans that may wait.
pub(super) fn queue_size() -> usize {
    let size = variable("OTEL_BSP_MAX_QUEUE_SIZE").and_then(|text| text.parse().ok());
    size.filter(|size| (1..=MAX_QUEUE).contains(size)).unwrap_or(DEFAULT_QUEUE)
}

/// Warns of a protocol that the gateway does not have.
pub(super) fn warn_of_unsupported() {
    let names = ["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"];
    let protocol = names.into_iter().find_map(variable);
    if let Some(protocol) = protocol.filter(|protocol| protocol != "http/protobuf") {
        tracing::warn!(
            protocol,
            "the gateway sends traces by http/protobuf only: set OTEL_EXPORTER_OTLP_PROTOCOL to http/protobuf, and the endpoint to the collector's port for it, usually 4318"
        );
    }
}
