//! Which endpoint of which environment a path names. Paths are matched as they were sent: nothing is
//! decoded, folded or tidied up, so there is one way to write each.

use crate::api::Api;
use crate::config::Config;
use http::Method;

/// What is served at a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Endpoint {
    /// A request with a prompt: counted before and after.
    Counted(Api),
    /// The list of models, or one of them: passed on, not charged.
    Models,
    /// `HEAD /`: clients ask whether anybody is there.
    Root,
    /// A path that is not known, of an environment that forwards those: one request.
    Other,
}

impl Endpoint {
    /// Whether the model generates tokens.
    pub(super) fn generates(self) -> bool {
        matches!(self, Self::Counted(api) if api.generates())
    }

    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Counted(api) => api.as_str(),
            Self::Models => "models",
            Self::Root => "root",
            Self::Other => "other",
        }
    }
}

/// A path taken apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Route<'a> {
    /// The environment that its first segment names, by index.
    pub(super) environment: Option<usize>,
    /// The path without that segment.
    pub(super) path: &'a str,
    pub(super) endpoint: Endpoint,
    /// The deployment that an Azure path names in place of the body's model.
    pub(super) deployment: Option<&'a str>,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum NoRoute {
    Unknown,
    Method(&'static str),
}

/// Methods that are forwarded to paths that are not known: none that opens a tunnel or gives a trace.
const OTHER_METHODS: [&str; 7] = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"];
const ALLOW_OTHER: &str = "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS";

/// Finds what a path names.
pub(super) fn find<'a>(config: &Config, method: &Method, path: &'a str) -> Result<Route<'a>, NoRoute> {
    let (environment, path) = split_environment(config, path);
    let (endpoint, allow, deployment) = match endpoint(path) {
        Some(found) => found,
        None if environment.is_none() && path == "/" => (Endpoint::Root, "HEAD", None),
        None if forwards_others(config, environment) && is_plain(path) => {
            if !OTHER_METHODS.contains(&method.as_str()) {
                return Err(NoRoute::Method(ALLOW_OTHER));
            }
            return Ok(Route { environment, path, endpoint: Endpoint::Other, deployment: None });
        }
        None => return Err(NoRoute::Unknown),
    };
    if method.as_str() != allow {
        return Err(NoRoute::Method(allow));
    }
    Ok(Route { environment, path, endpoint, deployment })
}

/// Whether somebody may forward this path: the environment it names, or, as long as the caller's key
/// is not known, any.
fn forwards_others(config: &Config, environment: Option<usize>) -> bool {
    match environment {
        Some(index) => config.environments[index].forward_other_paths,
        None => config.environments.iter().any(|e| e.forward_other_paths),
    }
}

/// The base path of an SDK that would be right for whoever asked for `path`. It names no environment
/// that the path does not.
pub(super) fn base_path(config: &Config, path: &str) -> String {
    let needs_none = config.default_environment.is_some()
        || config.environments.iter().any(|environment| !environment.callers.is_empty());
    match split_environment(config, path).0 {
        Some(index) => format!("/{}/v1", config.environments[index].name),
        None if needs_none => "/v1".to_owned(),
        None => "/<environment>/v1".to_owned(),
    }
}

fn split_environment<'a>(config: &Config, path: &'a str) -> (Option<usize>, &'a str) {
    let Some(rest) = path.strip_prefix('/') else { return (None, path) };
    let end = rest.find('/').unwrap_or(rest.len());
    match config.environment(&rest[..end]) {
        Some((index, _)) => (Some(index), &rest[end..]),
        None => (None, path),
    }
}

/// The endpoint of a path without its environment, the method it takes, and the Azure deployment.
fn endpoint(path: &str) -> Option<(Endpoint, &'static str, Option<&str>)> {
    if let Some(rest) = path.strip_prefix("/openai/deployments/") {
        let (deployment, operation) = rest.split_at(rest.find('/')?);
        // Decoded it would be the name of another model, with other quotas.
        if !is_segment(deployment) || deployment.contains('%') {
            return None;
        }
        return Some((Endpoint::Counted(counted(operation)?), "POST", Some(deployment)));
    }
    let path = path.strip_prefix("/openai/v1").or_else(|| path.strip_prefix("/v1")).unwrap_or(path);
    if let Some(api) = counted(path) {
        return Some((Endpoint::Counted(api), "POST", None));
    }
    match path.strip_prefix("/models")? {
        "" => Some((Endpoint::Models, "GET", None)),
        model => {
            let model = model.strip_prefix('/')?;
            model.split('/').all(is_segment).then_some((Endpoint::Models, "GET", None))
        }
    }
}

fn counted(path: &str) -> Option<Api> {
    match path {
        "/chat/completions" => Some(Api::Chat),
        "/completions" => Some(Api::Completions),
        "/embeddings" => Some(Api::Embeddings),
        _ => None,
    }
}

/// A name as one segment of a path: nothing in it that anybody could take for a path of its own.
fn is_segment(segment: &str) -> bool {
    let lower = segment.to_ascii_lowercase();
    let is_tricky = ["%2e", "%2f", "%5c", "\\", ";"].iter().any(|trick| lower.contains(trick));
    !is_tricky && !matches!(segment, "" | "." | "..")
}

fn is_plain(path: &str) -> bool {
    path.strip_prefix('/').is_some_and(|rest| !rest.is_empty() && rest.split('/').all(is_segment))
}

/// The path at the upstream: its own base path, and the caller's without what the base ends in.
pub(super) fn upstream_path(base: &str, path: &str, query: Option<&str>) -> String {
    let base = base.trim_end_matches('/');
    let repeated = ["/openai/v1", "/openai", "/v1beta", "/v1"].into_iter().find(|segments| {
        base.ends_with(segments) && path.strip_prefix(segments).is_some_and(|r| r.starts_with('/'))
    });
    let rest = &path[repeated.map_or(0, str::len)..];
    match query {
        Some(query) => format!("{base}{rest}?{query}"),
        None => format!("{base}{rest}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_matched_as_sent() {
        let at = |path| endpoint(path).map(|(e, ..)| e);
        for path in ["/v1/chat/completions", "/chat/completions", "/openai/v1/chat/completions"] {
            assert_eq!(at(path), Some(Endpoint::Counted(Api::Chat)), "{path}");
        }
        assert_eq!(
            endpoint("/openai/deployments/my-gpt/embeddings"),
            Some((Endpoint::Counted(Api::Embeddings), "POST", Some("my-gpt")))
        );
        assert_eq!(at("/v1/models/ft:gpt-4o:org::id"), Some(Endpoint::Models));
        for path in [
            "",
            "/",
            "/v1",
            "/v1/",
            "/v1/chat/completions/",
            "/v1//chat/completions",
            "//v1/chat/completions",
            "/V1/chat/completions",
            "/v1/Chat/completions",
            "/v1/chat%2fcompletions",
            "/v1/%63hat/completions",
            "/v1/chat/./completions",
            "/v1/chat/completions;x=1",
            "/v1/models/",
            "/v1/models/..",
            "/v1/models/%2e%2E",
            "/v1/modelsx",
            "/openai/deployments//chat/completions",
            "/openai/deployments/../chat/completions",
            "/openai/deployments/a/b/chat/completions",
            "/openai/deployments/a/models",
            "/openai/deployments/%67pt-4.1/chat/completions",
            "/openai/deployments/gpt%/chat/completions",
            "/v1/openai/v1/chat/completions",
        ] {
            assert_eq!(at(path), None, "{path}");
        }
    }

    #[test]
    fn the_base_path_is_not_repeated() {
        for (base, path, want) in [
            ("/v1", "/v1/chat/completions", "/v1/chat/completions"),
            ("/v1", "/chat/completions", "/v1/chat/completions"),
            ("", "/v1/chat/completions", "/v1/chat/completions"),
            ("/", "/v1/models", "/v1/models"),
            ("/openai", "/openai/deployments/d/embeddings", "/openai/deployments/d/embeddings"),
            ("/openai/v1", "/openai/v1/embeddings", "/openai/v1/embeddings"),
            ("/openai/v1", "/v1/embeddings", "/openai/v1/embeddings"),
            ("/x/openai/v1", "/embeddings", "/x/openai/v1/embeddings"),
            ("/api", "/v1/embeddings", "/api/v1/embeddings"),
        ] {
            assert_eq!(upstream_path(base, path, None), want, "{base} {path}");
        }
        assert_eq!(upstream_path("/v1", "/models", Some("a=b?c")), "/v1/models?a=b?c");
    }
}
