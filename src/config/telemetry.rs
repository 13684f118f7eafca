//! `telemetry`: the log, traces and metrics.

use super::description::{DefaultSpec, KeySpec, NONE, SectionSpec, TextSpec, ValueSpec, Word, text};
use super::setting::{Section, Setting};
use super::upstreams::RESERVED_HEADERS;
use super::{LogForm, LogLevel, OtlpSettings, RequestLines, TelemetrySettings};
use http::{HeaderMap, HeaderName, HeaderValue, Uri};

pub(super) const TELEMETRY: SectionSpec = SectionSpec {
    name: "telemetry",
    keys: &[
        KeySpec::new(
            "log",
            ValueSpec::Words(FORMS),
            DefaultSpec::Absent("`human` if standard error is a terminal, else `json`"),
            "the form of the log ([logs.md](logs.md))",
        ),
        KeySpec::new(
            "level",
            ValueSpec::Words(&[
                Word("error", "failures that need an operator"),
                Word("warn", "also what is probably not intended"),
                Word("info", "also requests and changes"),
                Word("debug", "also single steps of the gateway"),
                Word("trace", "also its smallest steps"),
            ]),
            DefaultSpec::Value("info"),
            "the least severe lines that are written. The variable `RUST_LOG` takes precedence at the start; `PUT /api/log-level` changes the level at run time",
        ),
        KeySpec::new(
            "requests",
            ValueSpec::Words(&[
                Word("all", "each request"),
                Word("errors", "requests without a complete, successful answer"),
                Word("none", "no request"),
            ]),
            DefaultSpec::Value("all"),
            "the requests that have a line in the log",
        ),
        KeySpec::new(
            "otlp",
            ValueSpec::Section(&OTLP),
            DefaultSpec::Absent("no traces, unless a variable names a collector ([logs.md](logs.md#traces))"),
            "where the gateway sends traces, by OTLP over HTTP",
        )
        .example("{ endpoint: \"http://collector:4318\" }"),
        KeySpec::new(
            "caller_label",
            ValueSpec::Boolean,
            DefaultSpec::Value("true"),
            "whether metrics name callers: the first 200 callers of the config; all others are `other` ([metrics.md](metrics.md#labels))",
        ),
        KeySpec::new(
            "gen_ai_metrics",
            ValueSpec::Boolean,
            DefaultSpec::Value("false"),
            "whether there are also metrics with the names of OpenTelemetry's conventions for generative AI ([metrics.md](metrics.md#opentelemetry-names))",
        ),
    ],
};

const FORMS: &[Word] = &[Word("json", "one JSON object a line"), Word("human", "text for people")];

const OTLP: SectionSpec = SectionSpec {
    name: "otlp",
    keys: &[
        KeySpec::new(
            "endpoint",
            ValueSpec::Text(TextSpec {
                label: "`http` or `https` URL without user, query or fragment",
                pattern: "^[Hh][Tt][Tt][Pp][Ss]?://[^?#@]+$",
            }),
            DefaultSpec::Absent("`OTEL_EXPORTER_OTLP_ENDPOINT`, else `http://localhost:4318`"),
            "the collector. The gateway appends `/v1/traces`, unless the URL ends in it",
        )
        .example("http://collector:4318"),
        KeySpec::new(
            "headers",
            ValueSpec::Names(text("names and values"), &ValueSpec::Secret(text("value of a header"))),
            NONE,
            "added to every request to the collector, for example its key",
        )
        .example("{ authorization: Bearer ${OTLP_TOKEN} }"),
        KeySpec::new(
            "sample",
            ValueSpec::Decimal(TextSpec {
                label: "decimal number from 0 to 1",
                pattern: r"^(0(\.[0-9]+)?|1(\.0+)?)$",
            }),
            DefaultSpec::Absent("`OTEL_TRACES_SAMPLER`, else 1"),
            "the share of requests that are traced. A caller that has decided already, in `traceparent`, is followed",
        )
        .example("0.1"),
    ],
};

/// Reads the settings of the log, of traces and of metrics.
pub(super) fn read(top: &Section<'_>) -> TelemetrySettings {
    let section = top.section("telemetry");
    TelemetrySettings {
        log: section.get("log").and_then(|setting| setting.word(FORMS)).map(|word| match word {
            "human" => LogForm::Human,
            _ => LogForm::Json,
        }),
        level: LogLevel::of(section.word("level")).unwrap_or(LogLevel::Info),
        requests: match section.word("requests") {
            "errors" => RequestLines::Errors,
            "none" => RequestLines::None,
            _ => RequestLines::All,
        },
        otlp: section.get("otlp").and_then(|setting| otlp(&setting)),
        caller_label: section.boolean("caller_label"),
        gen_ai_metrics: section.boolean("gen_ai_metrics"),
    }
}

fn otlp(setting: &Setting<'_>) -> Option<OtlpSettings> {
    let section = setting.section(&OTLP)?;
    let sample = |text: &str| text.parse::<f64>().ok().filter(|share| (0.0..=1.0).contains(share));
    Some(OtlpSettings {
        endpoint: section.get("endpoint").and_then(|setting| endpoint(&setting)),
        headers: section.get("headers").and_then(|setting| headers(&setting)).unwrap_or_default(),
        sample: section
            .get("sample")
            .and_then(|setting| setting.parsed(sample, "a number from 0 to 1, such as 0.1")),
    })
}

/// The URL of the collector, with the path for traces. It may contain a password, so no message contains it.
fn endpoint(setting: &Setting<'_>) -> Option<Uri> {
    let text = setting.text()?;
    let has_parts = text.contains(['?', '#', '@']);
    let base = text.trim_end_matches('/');
    let suffix = if base.ends_with("/v1/traces") { "" } else { "/v1/traces" };
    let uri = format!("{base}{suffix}").parse::<Uri>().ok().filter(|_| !has_parts);
    let is_url = |uri: &Uri| {
        matches!(uri.scheme_str(), Some("http" | "https")) && uri.host().is_some_and(|host| !host.is_empty())
    };
    let uri = uri.filter(is_url);
    if uri.is_none() {
        setting.fault(
            "this must be an http or https URL without user, query and fragment, such as http://localhost:4318; \
             a key of the collector belongs into headers",
        );
    }
    uri
}

fn headers(setting: &Setting<'_>) -> Option<HeaderMap> {
    let section = setting.map("a mapping of names to values")?;
    let mut headers = HeaderMap::new();
    for (key, setting) in section.entries() {
        let Ok(name) = key.name.parse::<HeaderName>() else {
            setting.fault("this is not a valid header name");
            continue;
        };
        if RESERVED_HEADERS.contains(&name.as_str()) || name == "content-type" {
            setting.fault("the gateway sets this header itself; remove it");
        }
        match setting.text().map(HeaderValue::from_str) {
            Some(Ok(mut value)) => {
                value.set_sensitive(true);
                headers.insert(name, value);
            }
            Some(Err(_)) => {
                setting.fault("this value contains a character that a header must not contain; remove it");
            }
            None => {}
        }
    }
    Some(headers)
}
