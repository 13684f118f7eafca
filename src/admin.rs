//! The admin listener: health checks, metrics, the state of every quota, and overrides of limits.

mod access;
mod answers;
mod audit;
mod config;
mod environments;
mod events;
mod explain;
mod guesses;
mod health;
mod json_body;
mod log_level;
mod openapi;
mod origins;
mod overrides;
mod page;
mod rejections;
mod reload;
mod sessions;
mod system;
mod upstreams;
mod usage;

use crate::proxy;
use crate::reload::ReloadHandle;
use crate::server::Peer;
use access::Access;
use answers::refusal;
use axum::Router;
use axum::extract::{DefaultBodyLimit, Extension};
use axum::handler::Handler;
use axum::middleware;
use axum::routing::{MethodFilter, on};
use events::EventHub;
use http::{Method, StatusCode};
use hyper::body::Incoming;
use hyper_util::service::TowerToHyperService;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use system::Process;

/// Maximum size of a request body in bytes.
const MAX_BODY_BYTES: usize = 64 * 1024;
/// The path whose bodies are requests of callers.
const EXPLAIN: &str = "/api/explain";
/// Maximum size of a body for `POST /api/explain` in bytes.
const MAX_EXPLAINED_BYTES: usize = 32 * 1024 * 1024;

#[derive(Clone)]
struct Admin {
    state: Arc<proxy::State>,
    reload: ReloadHandle,
    access: Arc<Access>,
    events: Arc<EventHub>,
    process: Process,
}

/// The client that sent a request.
#[derive(Clone, Copy, Debug)]
struct Client {
    address: SocketAddr,
    /// The time within which the whole body must arrive.
    body_timeout: Duration,
}

/// The HTTP service of the admin listener, for the connections of each client. `address`: the address of the admin listener;
/// `callers`: that of the listener for callers.
pub(crate) fn service(
    state: Arc<proxy::State>,
    reload: ReloadHandle,
    address: SocketAddr,
    callers: SocketAddr,
) -> impl Fn(Arc<Peer>) -> TowerToHyperService<axum::routing::RouterIntoService<Incoming>> {
    let admin = Admin {
        state,
        reload,
        access: Arc::new(Access::new(address)),
        events: Arc::default(),
        process: Process::new(callers),
    };
    let router = routes()
        .router
        // `access::authorize` has received the body, within other bounds.
        .layer(DefaultBodyLimit::disable())
        .fallback(|| async {
            let message = "There is no such path on the admin listener. GET /api/openapi.json lists all paths. Applications use the listener for callers (server.listen).";
            refusal(StatusCode::NOT_FOUND, "unknown_path", message)
        })
        .method_not_allowed_fallback(|| async {
            let message = "This path does not support the method. The header allow lists its methods.";
            refusal(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message)
        })
        .layer(middleware::from_fn_with_state(admin.clone(), access::authorize))
        .with_state(admin);
    move |peer| {
        let router = router
            .clone()
            .layer(Extension(Client { address: peer.address, body_timeout: peer.timeouts.body }));
        TowerToHyperService::new(router.into_service())
    }
}

/// The routes of the listener, with a list of them for the test of the OpenAPI description.
struct Routes {
    router: Router<Admin>,
    #[cfg(test)]
    all: Vec<(Method, &'static str)>,
}

impl Routes {
    #[cfg_attr(not(test), allow(clippy::needless_pass_by_value))] // tests keep the method
    fn add<H, T>(mut self, method: Method, path: &'static str, handler: H) -> Self
    where
        H: Handler<T, Admin>,
        T: 'static,
    {
        let filter = MethodFilter::try_from(method.clone()).unwrap_or(MethodFilter::GET);
        self.router = self.router.route(path, on(filter, handler));
        #[cfg(test)]
        self.all.push((method, path));
        self
    }
}

fn routes() -> Routes {
    const ENVIRONMENT: &str = "/api/environments/{environment}";
    const QUOTA: &str = "/api/environments/{environment}/quotas/{kind}/{per}";
    const UPSTREAM_QUOTA: &str = "/api/upstreams/{upstream}/quotas/{kind}/{per}";
    const LOG_LEVEL: &str = "/api/log-level";
    let empty = Routes {
        router: Router::new(),
        #[cfg(test)]
        all: Vec::new(),
    };
    empty
        .add(Method::GET, "/", page::index)
        .add(Method::GET, "/page/{name}", page::file)
        .add(Method::GET, "/livez", health::livez)
        .add(Method::GET, "/readyz", health::readyz)
        .add(Method::GET, "/metrics", health::metrics)
        .add(Method::GET, "/api/environments", environments::environments)
        .add(Method::GET, ENVIRONMENT, environments::environment)
        .add(Method::PATCH, ENVIRONMENT, overrides::patch)
        .add(Method::POST, "/api/environments/{environment}/reset", overrides::reset)
        .add(Method::PUT, QUOTA, overrides::set_limit)
        .add(Method::DELETE, QUOTA, overrides::unset_limit)
        .add(Method::POST, "/api/environments/{environment}/quotas/{kind}/{per}/reset", overrides::reset_one)
        .add(Method::GET, "/api/upstreams", upstreams::upstreams)
        .add(Method::GET, "/api/upstreams/{upstream}", upstreams::upstream)
        .add(Method::PUT, UPSTREAM_QUOTA, overrides::upstreams::set_upstream_limit)
        .add(Method::DELETE, UPSTREAM_QUOTA, overrides::upstreams::unset_upstream_limit)
        .add(
            Method::POST,
            "/api/upstreams/{upstream}/quotas/{kind}/{per}/reset",
            overrides::upstreams::reset_upstream_quota,
        )
        .add(Method::GET, "/api/overrides", overrides::report::list)
        .add(Method::GET, "/api/audit", audit::audit)
        .add(Method::GET, "/api/config", config::config)
        .add(Method::POST, "/api/config/reload", reload::reload)
        .add(Method::GET, "/api/events", events::events)
        .add(Method::GET, LOG_LEVEL, log_level::level)
        .add(Method::PUT, LOG_LEVEL, log_level::set_level)
        .add(Method::GET, "/api/openapi.json", openapi::description)
        .add(Method::GET, "/api/rejections", rejections::rejections)
        .add(Method::POST, "/api/session", access::sign_in)
        .add(Method::DELETE, "/api/session", access::sign_out)
        .add(Method::GET, "/api/system", system::system)
        .add(Method::GET, "/api/usage", usage::report)
        .add(Method::POST, EXPLAIN, explain::explain)
}
