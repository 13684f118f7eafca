//! `environments.*.routes`: which upstreams receive the requests for a model.

use super::UpstreamSettings;
use super::description::{DefaultSpec, KeySpec, NONE, PATTERN, SectionSpec, ValueSpec, Word, text};
use super::environments::DeclaredUpstreams;
use super::setting::{Section, Setting};
use crate::glob::Glob;
use std::sync::Arc;

/// `environments.*.routes[]`: where the requests for certain models go.
#[derive(Clone, Debug, PartialEq)]
pub struct RouteSettings {
    /// Patterns of the models that callers request.
    pub models: Vec<Glob>,
    /// The names of the APIs. Empty: all.
    pub apis: Vec<&'static str>,
    /// The upstreams in the order in which they are tried. There is at least one.
    pub upstreams: Vec<Arc<UpstreamSettings>>,
    /// The model name that goes upstream. `None`: the caller's.
    pub model: Option<Arc<str>>,
}

impl RouteSettings {
    /// Whether the route takes requests of this API.
    pub(crate) fn takes_api(&self, api: &str) -> bool {
        self.apis.is_empty() || self.apis.contains(&api)
    }

    /// Whether the route takes requests for this model.
    pub(crate) fn takes_model(&self, model: &str) -> bool {
        self.models.iter().any(|pattern| pattern.matches(model))
    }
}

/// Longer names are refused. Forms with a longer name are refused too.
const MAX_MODEL_BYTES: usize = 256;
/// With more patterns, no route is compared with the earlier ones: that takes time in proportion to the square.
const MAX_COMPARED_PATTERNS: usize = 500;

/// The APIs that a route can select.
pub(super) const APIS: &[Word] = &[
    Word("chat", ""),
    Word("completions", ""),
    Word("responses", ""),
    Word("embeddings", ""),
    Word("messages", ""),
    Word("gemini", ""),
    Word("rerank", ""),
    Word("moderations", ""),
    Word("audio", ""),
    Word("images", ""),
];

/// The name of an API, if routes can select it.
pub(crate) fn api_of_routes(name: &str) -> Option<&'static str> {
    APIS.iter().map(|Word(api, _)| *api).find(|api| *api == name)
}

/// `environments.*.routes[]`.
pub(super) const ROUTE: SectionSpec = SectionSpec {
    name: "route",
    keys: &[
        KeySpec::new(
            "models",
            ValueSpec::List(&PATTERN),
            DefaultSpec::Required("[\"claude-*\"]"),
            "the models that callers request. `[\"*\"]`: all, also requests that name none",
        ),
        KeySpec::restriction(
            "apis",
            ValueSpec::List(&ValueSpec::Words(APIS)),
            DefaultSpec::Absent("all"),
            "the APIs of the requests. A request that counts tokens belongs to the API of its prompt",
        )
        .example("[chat, messages]"),
        KeySpec::new(
            "upstream",
            ValueSpec::OneOrMore(&ValueSpec::Text(text("name of an upstream"))),
            DefaultSpec::Required("openai"),
            "the upstream that receives the requests. A list is an order: the next upstream is tried where the one before cannot serve the request ([routes.md](routes.md#several-upstreams))",
        ),
        KeySpec::new(
            "model",
            ValueSpec::Text(text("name")),
            NONE,
            "the name that is sent to the upstream instead of the one that the caller requests",
        )
        .example("gpt-4o-mini"),
    ],
};

/// Reads the routes of an environment and records their faults. `models`: the models that the environment allows.
pub(super) fn read(
    environment: &Section<'_>,
    models: &[Glob],
    upstreams: &DeclaredUpstreams<'_>,
) -> Vec<RouteSettings> {
    let Some(setting) = environment.get("routes") else { return Vec::new() };
    let Some(list) = setting.list() else { return Vec::new() };
    if list.is_empty() {
        setting.fault("an empty list has no effect; leave the key out to send all requests to upstream");
    }
    let routes: Vec<_> =
        list.iter().filter_map(|setting| Some((setting, route(setting, upstreams)?))).collect();
    warn_of_forbidden(&routes, models);
    warn_of_unreachable(&routes);
    // A route with a fault in its upstreams has fewer of them, and the config is refused.
    routes.into_iter().map(|(_, route)| route).collect()
}

fn route(setting: &Setting<'_>, upstreams: &DeclaredUpstreams<'_>) -> Option<RouteSettings> {
    let section = setting.section(&ROUTE)?;
    let models = section.require("models").and_then(|setting| setting.list().map(|list| (setting, list)));
    if let Some((setting, _)) = models.as_ref().filter(|(_, list)| list.is_empty()) {
        setting.fault("an empty list would match no model; write [\"*\"] for all models");
    }
    let models = models.map(|(_, list)| list).unwrap_or_default();
    let upstream = section.require_as("upstream", upstreams.names.first().unwrap_or(&"openai"));
    Some(RouteSettings {
        models: models.iter().filter_map(|model| model.text().map(Glob::new)).collect(),
        apis: section.get("apis").map(|setting| apis(&setting)).unwrap_or_default(),
        upstreams: upstream.map(|setting| order(&setting, upstreams)).unwrap_or_default(),
        model: section.get("model").and_then(|setting| sent_model(&setting)).map(Into::into),
    })
}

fn apis(setting: &Setting<'_>) -> Vec<&'static str> {
    let list = setting.list();
    if list.as_ref().is_some_and(Vec::is_empty) {
        setting.fault("an empty list would match no request; leave the key out for all APIs");
    }
    let mut apis = Vec::new();
    for setting in list.unwrap_or_default() {
        let Some(api) = setting.word(APIS) else { continue };
        if apis.contains(&api) {
            setting.fault("this API is listed twice; remove one of them");
        }
        apis.push(api);
    }
    apis
}

/// The upstreams of a route in the order in which they are tried.
fn order(setting: &Setting<'_>, upstreams: &DeclaredUpstreams<'_>) -> Vec<Arc<UpstreamSettings>> {
    let names = setting.one_or_more();
    if names.is_empty() {
        setting.fault("an empty list names no upstream; write at least one name");
    }
    let (mut seen, mut order) = (Vec::new(), Vec::new());
    for name in names {
        let Some(at) = name.index_of_name("upstream", &upstreams.names) else { continue };
        if seen.contains(&at) {
            name.fault("this upstream is listed twice, and a request tries each once; remove one of them");
        }
        seen.push(at);
        order.extend(upstreams.valid.iter().find(|u| u.name == upstreams.names[at]).cloned());
    }
    order
}

/// The model name that goes upstream. It is sent in JSON, in forms and in paths.
fn sent_model<'n>(setting: &Setting<'n>) -> Option<&'n str> {
    let name = setting.text()?;
    if name.is_empty() {
        setting.fault("an empty name cannot be sent; write the name of a model or remove the key");
    } else if name.contains(['*', '?']) {
        setting
            .fault(format!("{} is a pattern, and only a name can be sent; write one name", setting.quoted()));
    } else if name.len() > MAX_MODEL_BYTES {
        setting.fault(format!("this name is longer than {MAX_MODEL_BYTES} bytes; write a shorter one"));
    } else if name.trim() != name || name.contains(char::is_control) {
        setting.fault("this name has a space at its beginning or end, or a control character; remove it");
    }
    Some(name)
}

fn warn_of_forbidden(routes: &[(&Setting<'_>, RouteSettings)], allowed: &[Glob]) {
    if allowed.is_empty() || has_too_many(routes) {
        return;
    }
    let is_allowed = |pattern: &Glob| allowed.iter().any(|allowed| allowed.overlaps(pattern));
    for (setting, route) in routes {
        if !route.models.is_empty() && !route.models.iter().any(is_allowed) {
            setting.warn("this route never matches, because the environment's models allow no model with such a name; add the model there, or remove the route");
        }
    }
}

fn warn_of_unreachable(routes: &[(&Setting<'_>, RouteSettings)]) {
    if has_too_many(routes) {
        return;
    }
    for (at, (setting, route)) in routes.iter().enumerate() {
        let every: Vec<&str> = APIS.iter().map(|word| word.0).collect();
        let apis = if route.apis.is_empty() { &every } else { &route.apis };
        let is_taken = |api: &str, pattern: &Glob| {
            let earlier = routes[..at].iter().filter(|(_, earlier)| earlier.takes_api(api));
            earlier.flat_map(|(_, earlier)| &earlier.models).any(|taken| taken.covers(pattern))
        };
        let all_taken = route.models.iter().all(|pattern| apis.iter().all(|api| is_taken(api, pattern)));
        if !route.models.is_empty() && all_taken {
            setting.warn("this route never matches, because earlier routes take all its models; move it before them, or remove it");
        }
    }
}

fn has_too_many(routes: &[(&Setting<'_>, RouteSettings)]) -> bool {
    routes.iter().map(|(_, route)| route.models.len()).sum::<usize>() > MAX_COMPARED_PATTERNS
}
