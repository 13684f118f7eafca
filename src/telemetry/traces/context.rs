//! The context that a caller sends: `traceparent` and `tracestate` of the W3C.

use http::{HeaderMap, HeaderName};
use opentelemetry::Context;
use opentelemetry::propagation::{Extractor, TextMapPropagator as _};
use opentelemetry::trace::{SpanContext, TraceContextExt as _};
use opentelemetry_sdk::propagation::TraceContextPropagator;

/// A constant, so that the name is not parsed for every request.
const TRACE_PARENT: HeaderName = HeaderName::from_static("traceparent");
/// The length of the parts of a `traceparent` that every version has.
const PARENT_BYTES: usize = 55;
/// The positions of the hyphens in them.
const HYPHENS: [usize; 3] = [2, 35, 52];

/// The span of the caller that a request belongs to. `None`: there is none, or it is not valid.
pub(in crate::telemetry) fn parent_of(headers: &HeaderMap) -> Option<SpanContext> {
    // The SDK also accepts shorter parts and signs.
    let parent = headers.get(TRACE_PARENT)?.as_bytes().get(..PARENT_BYTES)?;
    let is_valid = |(at, byte): (usize, &u8)| match byte {
        b'-' => HYPHENS.contains(&at),
        byte => matches!(byte, b'0'..=b'9' | b'a'..=b'f') && !HYPHENS.contains(&at),
    };
    if !parent.iter().enumerate().all(is_valid) {
        return None;
    }
    let context = TraceContextPropagator::new().extract_with_context(&Context::new(), &Headers(headers));
    let span = context.span().span_context().clone();
    span.is_valid().then_some(span)
}

struct Headers<'h>(&'h HeaderMap);

impl Extractor for Headers<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key)?.to_str().ok()
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(http::HeaderName::as_str).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    #[test]
    fn only_a_valid_parent_is_taken() {
        let id = "4bf92f3577b34da6a3ce929d0e0e4736";
        for (text, sampled) in [
            (format!("00-{id}-00f067aa0ba902b7-01"), Some(true)),
            (format!("00-{id}-00f067aa0ba902b7-00"), Some(false)),
            (format!("01-{id}-00f067aa0ba902b7-01-later"), Some(true)),
            (format!("00-{id}-00f067aa0ba902b7-01-later"), None),
            (format!("ff-{id}-00f067aa0ba902b7-01"), None),
            (format!("00-{}-00f067aa0ba902b7-01", id.to_uppercase()), None),
            (format!("00-{}-00f067aa0ba902b7-01", "0".repeat(32)), None),
            (format!("00-{id}-{}-01", "0".repeat(16)), None),
            (format!("00-+{}-00f067aa0ba902b7-01", &id[1..]), None),
            (format!("00-{}--00f067aa0ba902b7-01", &id[1..]), None),
            ("00-1-1-01".to_owned(), None),
            (String::new(), None),
            ("ä".repeat(60), None),
        ] {
            let Ok(value) = HeaderValue::from_bytes(text.as_bytes()) else { panic!("{text}") };
            let headers = HeaderMap::from_iter([(http::HeaderName::from_static("traceparent"), value)]);
            let parent = parent_of(&headers);
            assert_eq!(parent.as_ref().map(SpanContext::is_sampled), sampled, "{text}");
            assert!(parent.is_none_or(|parent| parent.trace_id().to_string() == id));
        }
    }
}
