//! Which endpoint of which environment a path names. Paths are matched as they were sent: nothing is
//! decoded, folded or tidied up, so there is one way to write each.

use crate::api::{Api, Dialect};
use crate::config::Config;
use http::Method;

/// What is served at a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Endpoint {
    /// A request with a prompt: counted before and after.
    Counted(Api),
    /// One request, whose prompt is not counted; usage where the answer has one. Its name in metrics.
    Uncounted(&'static str),
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

    /// Whose SDKs speak it.
    pub(super) fn dialect(self) -> Dialect {
        match self {
            Self::Counted(api) => api.dialect(),
            Self::Uncounted(_) | Self::Models | Self::Root | Self::Other => Dialect::OpenAi,
        }
    }

    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Counted(api) => api.as_str(),
            Self::Uncounted(name) => name,
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
    /// The model that the path names in place of the body: Azure's deployment, Gemini's model.
    pub(super) model: Option<&'a str>,
    /// The path asks for a stream (Gemini).
    pub(super) streams: bool,
}

impl Route<'_> {
    fn to(endpoint: Endpoint) -> Self {
        Self { environment: None, path: "", endpoint, model: None, streams: false }
    }
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
    let (route, allow) = match route(path) {
        Some(found) => found,
        None if environment.is_none() && path == "/" => (Route::to(Endpoint::Root), "HEAD"),
        None if forwards_others(config, environment) && is_plain(path) => {
            if !OTHER_METHODS.contains(&method.as_str()) {
                return Err(NoRoute::Method(ALLOW_OTHER));
            }
            return Ok(Route { environment, path, ..Route::to(Endpoint::Other) });
        }
        None => return Err(NoRoute::Unknown),
    };
    if method.as_str() != allow {
        return Err(NoRoute::Method(allow));
    }
    Ok(Route { environment, path, ..route })
}

/// Whose SDK asks for a path, be it served or not.
pub(super) fn dialect(path: &str) -> Dialect {
    let is_first =
        |end: &str| path.strip_suffix(end).is_some_and(|before| before.rfind('/').is_none_or(|at| at == 0));
    // Behind an environment and a version, if there are any.
    let from_models = &path[path.rfind("/models/").unwrap_or(0)..];
    if path.ends_with("/v1/messages") || path.contains("/v1/messages/") || is_first("/messages") {
        Dialect::Anthropic
    } else if path.contains("/v1beta/") || generation(from_models).is_some() {
        Dialect::Google
    } else if path.ends_with("/responses") {
        Dialect::Responses
    } else {
        Dialect::OpenAi
    }
}

/// Whether somebody may forward this path: the environment it names, or, as long as the caller's key
/// is not known, any.
fn forwards_others(config: &Config, environment: Option<usize>) -> bool {
    match environment {
        Some(index) => config.environments[index].forward_other_paths,
        None => config.environments.iter().any(|e| e.forward_other_paths),
    }
}

/// The base path of an SDK of this dialect that would be right for whoever asked for `path`. It names no
/// environment that the path does not.
pub(super) fn base_path(config: &Config, path: &str, dialect: Dialect) -> String {
    let needs_none = config.default_environment.is_some()
        || config.environments.iter().any(|environment| !environment.callers.is_empty());
    let environment = match split_environment(config, path).0 {
        Some(index) => format!("/{}", config.environments[index].name),
        None if needs_none => String::new(),
        None => "/<environment>".to_owned(),
    };
    match dialect {
        Dialect::OpenAi | Dialect::Responses => environment + "/v1",
        // These put the version in front of each path themselves.
        Dialect::Anthropic | Dialect::Google if environment.is_empty() => "/".to_owned(),
        Dialect::Anthropic | Dialect::Google => environment,
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

/// What a path without its environment names, and the method it takes.
fn route(path: &str) -> Option<(Route<'_>, &'static str)> {
    if let Some(rest) = path.strip_prefix("/openai/deployments/") {
        let (deployment, operation) = rest.split_at(rest.find('/')?);
        let endpoint = of_openai(operation).filter(|e| *e != Endpoint::Counted(Api::Responses))?;
        // Decoded it would be the name of another model, with other quotas.
        let model = Some(deployment).filter(|name| is_segment(name) && !name.contains('%'));
        return Some((Route { model: Some(model?), ..Route::to(endpoint) }, "POST"));
    }
    if let Some((model, streams)) = generation(path) {
        return Some((
            Route { model: Some(model), streams, ..Route::to(Endpoint::Counted(Api::Gemini)) },
            "POST",
        ));
    }
    let of_azure = path.strip_prefix("/openai/v1");
    let rest = of_azure.or_else(|| path.strip_prefix("/v1")).unwrap_or(path);
    if rest == "/messages" && of_azure.is_none() {
        return Some((Route::to(Endpoint::Counted(Api::Messages)), "POST"));
    }
    // Azure's classic paths have these beside the deployments.
    let rest = rest.strip_prefix("/openai").filter(|r| *r == "/responses" && rest == path).unwrap_or(rest);
    if let Some(endpoint) = of_openai(rest) {
        return Some((Route::to(endpoint), "POST"));
    }
    is_of_models(path).then_some((Route::to(Endpoint::Models), "GET"))
}

/// The endpoint of one of OpenAI's paths without its version.
fn of_openai(path: &str) -> Option<Endpoint> {
    Some(match path {
        "/chat/completions" => Endpoint::Counted(Api::Chat),
        "/completions" => Endpoint::Counted(Api::Completions),
        "/embeddings" => Endpoint::Counted(Api::Embeddings),
        "/responses" => Endpoint::Counted(Api::Responses),
        "/rerank" => Endpoint::Uncounted("rerank"),
        "/moderations" => Endpoint::Uncounted("moderations"),
        _ => {
            let (family, operation) = path.strip_prefix('/')?.split_once('/')?;
            let name = ["audio", "images"].into_iter().find(|name| *name == family)?;
            Endpoint::Uncounted(Some(name).filter(|_| !operation.contains('/') && is_segment(operation))?)
        }
    })
}

/// The model of one of Gemini's paths that generate, and whether it asks for a stream.
fn generation(path: &str) -> Option<(&str, bool)> {
    let rest = path.strip_prefix("/v1beta").or_else(|| path.strip_prefix("/v1")).unwrap_or(path);
    let (model, operation) = rest.strip_prefix("/models/")?.rsplit_once(':')?;
    let streams = match operation {
        "generateContent" => false,
        "streamGenerateContent" => true,
        _ => return None,
    };
    let is_name = is_segment(model) && !model.contains(['/', '%', ':']);
    is_name.then_some((model, streams))
}

/// Whether a path is the list of models or one of them.
fn is_of_models(path: &str) -> bool {
    let of_google = path.strip_prefix("/v1beta");
    let rest = of_google.or_else(|| path.strip_prefix("/openai/v1")).or_else(|| path.strip_prefix("/openai"));
    let rest = rest.or_else(|| path.strip_prefix("/v1")).unwrap_or(path);
    match rest.strip_prefix("/models") {
        Some("") => true,
        // Behind a colon stands what Google is to do with a model.
        Some(model) => {
            let names = model.strip_prefix('/').filter(|model| of_google.is_none() || !model.contains(':'));
            names.is_some_and(|model| model.split('/').all(is_segment))
        }
        None => false,
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
        let at = |path| route(path).map(|(route, _)| route.endpoint);
        for path in ["/v1/chat/completions", "/chat/completions", "/openai/v1/chat/completions"] {
            assert_eq!(at(path), Some(Endpoint::Counted(Api::Chat)), "{path}");
        }
        for (path, endpoint) in [
            ("/v1/responses", Endpoint::Counted(Api::Responses)),
            ("/openai/responses", Endpoint::Counted(Api::Responses)),
            ("/openai/v1/responses", Endpoint::Counted(Api::Responses)),
            ("/v1/messages", Endpoint::Counted(Api::Messages)),
            ("/messages", Endpoint::Counted(Api::Messages)),
            ("/v1/rerank", Endpoint::Uncounted("rerank")),
            ("/v1/moderations", Endpoint::Uncounted("moderations")),
            ("/v1/audio/transcriptions", Endpoint::Uncounted("audio")),
            ("/images/generations", Endpoint::Uncounted("images")),
            ("/openai/deployments/my-dalle/images/generations", Endpoint::Uncounted("images")),
            ("/v1/models/ft:gpt-4o:org::id", Endpoint::Models),
            ("/openai/models", Endpoint::Models),
            ("/v1beta/models", Endpoint::Models),
            ("/v1beta/models/gemini-2.5-pro", Endpoint::Models),
        ] {
            assert_eq!(at(path), Some(endpoint), "{path}");
        }
        let (azure, method) = route("/openai/deployments/my-gpt/embeddings").unwrap();
        assert_eq!(
            (azure.endpoint, azure.model, method),
            (Endpoint::Counted(Api::Embeddings), Some("my-gpt"), "POST")
        );
        for (path, streams) in [
            ("/v1beta/models/gemini-2.5-pro:generateContent", false),
            ("/v1/models/gemini-2.5-pro:streamGenerateContent", true),
            ("/models/gemini-2.5-pro:streamGenerateContent", true),
        ] {
            let (gemini, method) = route(path).unwrap();
            assert_eq!(
                (gemini.endpoint, gemini.model),
                (Endpoint::Counted(Api::Gemini), Some("gemini-2.5-pro"))
            );
            assert_eq!((gemini.streams, method), (streams, "POST"), "{path}");
        }
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
            "/openai/deployments/d/responses",
            "/openai/deployments/d/messages",
            "/openai/v1/messages",
            "/openai/chat/completions",
            "/v1/openai/responses",
            "/v1/messages/count_tokens",
            "/v1/messages/batches",
            "/v1/responses/resp_1",
            "/v1/audio",
            "/v1/audio/",
            "/v1/audio/speech/x",
            "/v1/audio/%2e%2e",
            "/v1/Audio/speech",
            "/v1/realtime",
            "/v1beta/models/gemini:countTokens",
            "/v1beta/models/gemini:GenerateContent",
            "/v1beta/models/:generateContent",
            "/v1beta/models/a/b:generateContent",
            "/v1beta/models/a%2fb:generateContent",
            "/v1beta/models/a:b:generateContent",
            "/v1beta/tunedModels/a:generateContent",
            "/v1beta/chat/completions",
        ] {
            assert_eq!(at(path), None, "{path}");
        }
    }

    #[test]
    fn a_path_tells_whose_sdk_asks() {
        for (path, whose) in [
            ("/v1/messages", Dialect::Anthropic),
            ("/messages", Dialect::Anthropic),
            ("/sandbox/messages", Dialect::Anthropic),
            ("/sandbox/v1/messages", Dialect::Anthropic),
            ("/v1/messages/batches", Dialect::Anthropic),
            ("/v1/threads/t/messages", Dialect::OpenAi),
            ("/v1/v1/messages", Dialect::Anthropic),
            ("/v1beta/models/g:countTokens", Dialect::Google),
            ("/models/g:generateContent", Dialect::Google),
            ("/v1/models/g:generateContent", Dialect::Google),
            ("/sandbox/v1/models/g:streamGenerateContent", Dialect::Google),
            ("/sandbox/models/g:generateContent", Dialect::Google),
            ("/sandbox/v1/models/g", Dialect::OpenAi),
            ("/v1/responses", Dialect::Responses),
            ("/v1/chat/completions", Dialect::OpenAi),
            ("/", Dialect::OpenAi),
        ] {
            assert_eq!(dialect(path), whose, "{path}");
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
            ("/v1beta", "/v1beta/models/g:generateContent", "/v1beta/models/g:generateContent"),
            ("", "/v1beta/models/g:generateContent", "/v1beta/models/g:generateContent"),
            ("/openai", "/openai/responses", "/openai/responses"),
        ] {
            assert_eq!(upstream_path(base, path, None), want, "{base} {path}");
        }
        assert_eq!(upstream_path("/v1", "/models", Some("a=b?c")), "/v1/models?a=b?c");
    }
}
