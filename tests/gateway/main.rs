//! End-to-end tests: a gateway between a caller and a mock upstream. There is one module per topic of the documentation.

#![allow(clippy::disallowed_methods)] // tests measure wall-clock time
#![allow(missing_docs, unreachable_pub, clippy::panic, clippy::unwrap_used, clippy::missing_panics_doc)]

mod admin_api;
mod admission;
mod ambiguous_requests;
mod apis;
mod bad_input;
mod body_formats;
mod bounds;
mod caller_tls;
mod check_online;
mod cluster;
mod command_line;
mod compressed;
mod connections;
mod conversations;
mod count;
mod count_tokens;
mod credibility;
mod estimate;
mod fixtures;
mod hostile_callers;
mod hostile_configs;
mod hostile_upstreams;
mod http2;
mod keys;
mod limits;
mod logs;
mod lost_connections;
mod man_pages;
mod metrics;
mod operations;
mod overrides;
mod passthrough;
mod provider_limits;
mod quotas;
mod refusals;
mod reload;
mod replicas;
mod routes;
mod routing;
mod settling;
mod shutdown;
mod simulate;
mod slow_callers;
mod streams;
mod support;
mod tls;
mod traces;
mod unserved;
mod unusual_json;
mod upstream_quotas;
mod upstreams;
mod whole_answers;
mod withholding;
