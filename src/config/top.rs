//! The sections of the whole config.

use super::description::{DefaultSpec, KeySpec, NONE, SectionSpec, TextSpec, ValueSpec, text};
use super::{environments, listeners, models, store, telemetry, upstreams};

/// The whole config.
pub(super) const TOP: SectionSpec = SectionSpec {
    name: "config",
    keys: &[
        KeySpec::new(
            "server",
            ValueSpec::Section(&listeners::SERVER),
            DefaultSpec::Section,
            "the listener for callers",
        )
        .example("{ listen: 0.0.0.0:8080 }"),
        KeySpec::new(
            "admin",
            ValueSpec::Section(&listeners::ADMIN),
            DefaultSpec::Section,
            "the listener for health, metrics and the admin API",
        )
        .example("{ token: ${TOLLGATE_ADMIN_TOKEN} }"),
        KeySpec::new(
            "upstreams",
            ValueSpec::Names(text("names"), &ValueSpec::Section(&upstreams::UPSTREAM)),
            DefaultSpec::Required(upstreams::EXAMPLE),
            "the backends",
        ),
        KeySpec::new(
            "environments",
            ValueSpec::Names(
                TextSpec { label: "names", pattern: environments::NAME_PATTERN },
                &ValueSpec::Section(&environments::ENVIRONMENT),
            ),
            DefaultSpec::Required(environments::EXAMPLE),
            "limits, callers and routing",
        ),
        KeySpec::new(
            "default_environment",
            ValueSpec::Text(text("name of an environment")),
            NONE,
            "environment of requests that name none by path or key. Without it these requests get a 401",
        )
        .example("production"),
        KeySpec::new(
            "models",
            ValueSpec::List(&ValueSpec::Section(&models::MODEL)),
            NONE,
            "how to count models that are not in the built-in table, or that it has with other figures",
        )
        .example("[{ match: \"llama-3*\", model: gpt-4o }]"),
        KeySpec::new(
            "store",
            ValueSpec::Section(&store::STORE),
            DefaultSpec::Section,
            "where counters and usage are stored",
        ),
        KeySpec::new(
            "telemetry",
            ValueSpec::Section(&telemetry::TELEMETRY),
            DefaultSpec::Section,
            "the log, traces and metrics",
        ),
    ],
};
