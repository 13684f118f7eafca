//! Where the requests of an environment go: by the model that the caller names and by the API.

use crate::api::Dialect;
use crate::config::{Config, Environment, UpstreamSettings};
use std::sync::Arc;

/// Where requests go.
#[derive(Debug)]
pub(super) struct Destination {
    /// Indices of the upstreams in the config, in the order in which they are tried. There is at least one.
    pub(super) upstreams: Box<[usize]>,
    /// The model name that is sent. `None`: the caller's.
    pub(super) model: Option<Arc<str>>,
}

/// The destinations of one environment.
#[derive(Debug)]
pub(super) struct Destinations {
    /// In the order of the routes.
    routed: Box<[Destination]>,
    /// Where the requests go that no route takes.
    rest: Destination,
}

/// Selects a destination. It is the index of a route, or the number of routes for the requests that no route takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct DestinationIndex(usize);

impl Destination {
    /// The upstream that is tried first.
    pub(super) fn first(&self) -> usize {
        self.upstreams.first().copied().unwrap_or_default()
    }

    /// Whether there is another upstream to try.
    pub(super) fn has_alternatives(&self) -> bool {
        self.upstreams.len() > 1
    }
}

impl Destinations {
    pub(super) fn new(config: &Config, environment: &Environment) -> Self {
        let index = |upstream: &Arc<UpstreamSettings>| {
            config.upstreams.iter().position(|known| Arc::ptr_eq(known, upstream)).unwrap_or_default()
        };
        let routed = environment.routes.iter().map(|route| Destination {
            upstreams: route.upstreams.iter().map(index).collect(),
            model: route.model.clone(),
        });
        let rest = Destination { upstreams: [index(&environment.upstream)].into(), model: None };
        Self { routed: routed.collect(), rest }
    }

    pub(super) fn get(&self, index: DestinationIndex) -> &Destination {
        self.routed.get(index.0).unwrap_or(&self.rest)
    }

    /// The number of the route, from 1. `None`: no route takes the request.
    pub(super) fn route_number(&self, index: DestinationIndex) -> Option<usize> {
        (index.0 < self.routed.len()).then_some(index.0 + 1)
    }

    /// Selects the destination of requests without a model.
    pub(super) fn rest(&self) -> DestinationIndex {
        DestinationIndex(self.routed.len())
    }
}

/// Selects the destination of a request. `api`: the name of its API. `model`: the name that the caller requests.
pub(super) fn find(environment: &Environment, api: &str, model: &str) -> DestinationIndex {
    DestinationIndex(environment.route_of(api, model).unwrap_or(environment.routes.len()))
}

/// Selects the destination of a request for the description of a model: the one of a request with a prompt in the same
/// dialect, otherwise that of a request of any API.
pub(super) fn find_for_description(
    environment: &Environment,
    dialect: Dialect,
    model: &str,
) -> DestinationIndex {
    let api = match dialect {
        Dialect::OpenAi | Dialect::Responses => "chat",
        Dialect::Anthropic => "messages",
        Dialect::Google => "gemini",
    };
    let routes = &environment.routes;
    let takes = environment.route_of(api, model);
    let takes = takes.or_else(|| routes.iter().position(|route| route.takes_model(model)));
    DestinationIndex(takes.unwrap_or(routes.len()))
}
