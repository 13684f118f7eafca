//! Maps a path to an endpoint and an environment. Paths are matched as sent, without decoding, case folding or
//! normalization, so each endpoint has one spelling.

use super::{query, unserved};
use crate::api::{Api, Dialect};
use crate::config::Config;
use crate::error::{PathMistake, ProxyError};
use crate::similar::most_similar;
use http::Method;
use std::fmt::Write as _;

/// The kind of service at a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Endpoint {
    /// A request with a prompt. Its tokens are estimated before the call and settled after it.
    Counted(Api),
    /// Charged as one request, and the usage that the answer reports. The prompt is not estimated. The value is the
    /// name in metrics.
    Uncounted(&'static str),
    /// Counts the tokens of a prompt and generates nothing. Charged as one request without tokens.
    CountTokens(Api),
    /// The list of models, or one model. Forwarded and not charged.
    Models,
    /// `HEAD /`, which clients send to check that the gateway is reachable.
    Root,
    /// An unknown path of an environment with `other_paths: forward`. Charged as one request.
    Other,
}

impl Endpoint {
    /// Whether the model generates tokens.
    pub(super) fn generates(self) -> bool {
        matches!(self, Self::Counted(api) if api.generates())
    }

    /// The SDKs that use this endpoint.
    pub(super) fn dialect(self) -> Dialect {
        match self {
            Self::Counted(api) | Self::CountTokens(api) => api.dialect(),
            Self::Uncounted(_) | Self::Models | Self::Root | Self::Other => Dialect::OpenAi,
        }
    }

    /// The API that routes of the config select; empty: none.
    pub(super) fn api(self) -> &'static str {
        match self {
            Self::Counted(api) | Self::CountTokens(api) => api.as_str(),
            Self::Uncounted(name) => name,
            Self::Models | Self::Root | Self::Other => "",
        }
    }

    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Counted(api) => api.as_str(),
            Self::Uncounted(name) => name,
            Self::CountTokens(_) => "count_tokens",
            Self::Models => "models",
            Self::Root => "root",
            Self::Other => "other",
        }
    }
}

/// A parsed path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Route<'a> {
    /// Index of the environment that the first segment names.
    pub(super) environment: Option<usize>,
    /// The path without that segment.
    pub(super) path: &'a str,
    pub(super) endpoint: Endpoint,
    /// The model that the path names instead of the body: an Azure deployment or a Gemini model.
    pub(super) model: Option<&'a str>,
    /// The path requests a stream (Gemini).
    pub(super) streams: bool,
    /// The path requests the list of models.
    pub(super) lists_models: bool,
}

impl Route<'_> {
    fn new(endpoint: Endpoint) -> Self {
        Self { environment: None, path: "", endpoint, model: None, streams: false, lists_models: false }
    }
}

/// Methods that are forwarded to unknown paths. CONNECT would open a tunnel and TRACE would reveal headers.
const OTHER_METHODS: [&str; 7] = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"];
/// The `allow` header for these.
const ALLOW_OTHER: &str = "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS";

/// Endpoints that people append to a `base_url` by mistake.
const ENDPOINTS: [&str; 5] = ["/chat/completions", "/completions", "/embeddings", "/responses", "/messages"];
/// The first segments of the paths of the admin listener.
const ADMIN_PATHS: [&str; 4] = ["/metrics", "/livez", "/readyz", "/api/"];

/// An error repeats at most this many characters of the path.
const MAX_SHOWN_PATH: usize = 200;

/// Finds the endpoint and the environment of a path.
///
/// # Errors
/// The path is unknown, or the endpoint does not accept the method.
pub(super) fn find<'a>(config: &Config, method: &Method, path: &'a str) -> Result<Route<'a>, ProxyError> {
    let full_path = path;
    let (environment, path) = split_environment(config, full_path);
    let (route, allow) = match route(path) {
        Some(found) => found,
        None if environment.is_none() && path == "/" => (Route::new(Endpoint::Root), "HEAD"),
        None if forwards_others(config, environment) && is_plain(path) && !resembles_served(path) => {
            if !OTHER_METHODS.contains(&method.as_str()) {
                return Err(ProxyError::MethodNotAllowed { allow: ALLOW_OTHER });
            }
            return Ok(Route { environment, path, ..Route::new(Endpoint::Other) });
        }
        None => return Err(unknown_path(config, full_path)),
    };
    if method.as_str() != allow {
        return Err(ProxyError::MethodNotAllowed { allow });
    }
    Ok(Route { environment, path, ..route })
}

/// The error for a path that is not served. Unless the path exists at a provider, it suggests a `base_url` path that
/// would be right.
pub(super) fn unknown_path(config: &Config, path: &str) -> ProxyError {
    let dialect = dialect(path);
    let base_path = base_path(config, path, dialect);
    let (environment, rest) = split_environment(config, path);
    // Below an unknown first segment, no path can be served.
    let is_known = is_plain(rest)
        && unserved::is_known(rest)
        && (environment.is_some() || serves_without_prefix(config));
    let mistake = match mistake(config, environment, rest) {
        PathMistake::BaseUrl | PathMistake::Misspelt(_) | PathMistake::UnknownEnvironment { .. }
            if is_known =>
        {
            PathMistake::NotServed
        }
        mistake => mistake,
    };
    let base_path = match &mistake {
        PathMistake::Environment { nearest, .. } => with_version(format!("/{nearest}"), dialect),
        _ => base_path,
    };
    ProxyError::UnknownPath { path: path.chars().take(MAX_SHOWN_PATH).collect(), base_path, dialect, mistake }
}

/// The probable mistake in a path. `rest`: the path without its environment.
fn mistake(config: &Config, environment: Option<usize>, rest: &str) -> PathMistake {
    if environment.is_none() && ADMIN_PATHS.iter().any(|path| rest.starts_with(path)) {
        return PathMistake::AdminPath;
    }
    let is_twice = |endpoint: &&&'static str| rest.matches(**endpoint).count() > 1;
    if let Some(endpoint) = ENDPOINTS.iter().find(is_twice) {
        return PathMistake::EndpointTwice(endpoint);
    }
    let is_complete = environment.is_some() || serves_without_prefix(config);
    if is_complete && rest.ends_with('/') && route(rest.trim_end_matches('/')).is_some() {
        return PathMistake::TrailingSlash;
    }
    let is_usual =
        |below: &&str| is_complete && is_plain(rest) && !below.starts_with("/v1/") && !below.contains('%');
    let below_version = rest.strip_prefix("/v1").filter(is_usual);
    if let Some(nearest) = below_version.and_then(|below| most_similar(below, &ENDPOINTS)) {
        return PathMistake::Misspelt(nearest);
    }
    mistyped_environment(config, environment, rest).unwrap_or(PathMistake::BaseUrl)
}

/// The first segment is not an environment, and the rest of the path exists. If the name of an environment is similar,
/// the segment probably means that one.
fn mistyped_environment(config: &Config, environment: Option<usize>, rest: &str) -> Option<PathMistake> {
    let segment = rest.strip_prefix('/').filter(|_| environment.is_none())?;
    let (given, below) = segment.split_at(segment.find('/')?);
    let below = below.trim_end_matches('/');
    let is_served = route(below).is_some();
    let names: Vec<&str> = config.environments.iter().map(|e| e.name.as_str()).collect();
    if let Some(nearest) = most_similar(given, &names).filter(|_| is_served) {
        return Some(PathMistake::Environment { given: given.to_owned(), nearest: nearest.to_owned() });
    }
    let exists = is_served || unserved::is_known(below);
    let is_name = is_segment(given) && !begins_with_version(given) && given != "openai";
    let given = given.chars().take(MAX_SHOWN_PATH).collect();
    (exists && is_name).then_some(PathMistake::UnknownEnvironment { given })
}

/// Whether a segment is probably the version of an API, such as `V1` or `v2beta`, and not meant as an environment.
fn begins_with_version(segment: &str) -> bool {
    matches!(segment.as_bytes(), [b'v' | b'V', digit, ..] if digit.is_ascii_digit())
}

/// The kind of SDK that requests a path. It is defined for paths that are not served, too.
pub(super) fn dialect(path: &str) -> Dialect {
    // The most frequent path needs none of the searches below.
    if path == "/v1/chat/completions" {
        return Dialect::OpenAi;
    }
    // Skips the environment and the version, if the path has them.
    let from_models = &path[path.rfind("/models/").unwrap_or(0)..];
    if is_below_messages(path) {
        Dialect::Anthropic
    } else if path.contains("/v1beta/") || model_operation(from_models).is_some() {
        Dialect::Google
    } else if path.ends_with("/responses") || path.ends_with("/responses/input_tokens") {
        Dialect::Responses
    } else {
        Dialect::OpenAi
    }
}

/// Whether this is Anthropic's `/messages` or a path below it, after at most an environment and a version.
fn is_below_messages(path: &str) -> bool {
    path.match_indices("/messages").any(|(at, segment)| {
        let (before, after) = (&path[..at], &path[at + segment.len()..]);
        let is_segment = after.is_empty() || after.starts_with('/');
        is_segment && (before.ends_with("/v1") || before.rfind('/').is_none_or(|at| at == 0))
    })
}

/// The header in which the SDK of a path sends its key. The path has no environment.
pub(super) fn key_header(path: &str) -> &'static str {
    match dialect(path) {
        Dialect::Anthropic => "x-api-key: <key>",
        Dialect::Google => "x-goog-api-key: <key>",
        Dialect::OpenAi | Dialect::Responses if path.starts_with("/openai/") => "api-key: <key>",
        Dialect::OpenAi | Dialect::Responses => "Authorization: Bearer <key>",
    }
}

/// Whether the environment that the path names forwards unknown paths. If the path names none, whether any
/// environment does: the caller's key, which is looked up later, then decides.
fn forwards_others(config: &Config, environment: Option<usize>) -> bool {
    match environment {
        Some(index) => config.environments[index].forward_other_paths,
        None => config.environments.iter().any(|e| e.forward_other_paths),
    }
}

/// The path of the `base_url` that would be right for an SDK of this dialect that requested `path`. It reveals no
/// environment that `path` does not name.
fn base_path(config: &Config, path: &str, dialect: Dialect) -> String {
    let needs_none = serves_without_prefix(config);
    let environment = match split_environment(config, path).0 {
        Some(index) => format!("/{}", config.environments[index].name),
        None if needs_none => String::new(),
        None => "/<environment>".to_owned(),
    };
    with_version(environment, dialect)
}

/// The path of a `base_url` below the path of an environment.
fn with_version(environment: String, dialect: Dialect) -> String {
    match dialect {
        Dialect::OpenAi | Dialect::Responses => environment + "/v1",
        // These SDKs add the version to each path themselves.
        Dialect::Anthropic | Dialect::Google if environment.is_empty() => "/".to_owned(),
        Dialect::Anthropic | Dialect::Google => environment,
    }
}

/// Whether a path without an environment can be served.
fn serves_without_prefix(config: &Config) -> bool {
    config.default_environment.is_some()
        || config.environments.iter().any(|environment| !environment.callers.is_empty())
}

fn split_environment<'a>(config: &Config, path: &'a str) -> (Option<usize>, &'a str) {
    let Some(rest) = path.strip_prefix('/') else { return (None, path) };
    let end = rest.find('/').unwrap_or(rest.len());
    match config.environment(&rest[..end]) {
        Some((index, _)) => (Some(index), &rest[end..]),
        None => (None, path),
    }
}

/// The route of a path without its environment, and the method that it accepts.
fn route(path: &str) -> Option<(Route<'_>, &'static str)> {
    if let Some(rest) = path.strip_prefix("/openai/deployments/") {
        let (deployment, operation) = rest.split_at(rest.find('/')?);
        let endpoint = openai_endpoint(operation).filter(|e| e.dialect() != Dialect::Responses)?;
        // The upstream would decode `%` and serve another model than the one whose quotas are charged.
        let model = Some(deployment).filter(|name| is_segment(name) && !name.contains('%'));
        return Some((Route { model: Some(model?), ..Route::new(endpoint) }, "POST"));
    }
    if let Some((model, endpoint, streams)) = model_operation(path) {
        return Some((Route { model: Some(model), streams, ..Route::new(endpoint) }, "POST"));
    }
    let azure_rest = path.strip_prefix("/openai/v1");
    let rest = azure_rest.or_else(|| path.strip_prefix("/v1")).unwrap_or(path);
    let anthropic = match rest {
        "/messages" => Some(Endpoint::Counted(Api::Messages)),
        "/messages/count_tokens" => Some(Endpoint::CountTokens(Api::Messages)),
        _ => None,
    };
    if let Some(endpoint) = anthropic.filter(|_| azure_rest.is_none()) {
        return Some((Route::new(endpoint), "POST"));
    }
    // Azure serves `/openai/responses` besides its deployments.
    let rest = rest.strip_prefix("/openai").filter(|r| *r == "/responses" && rest == path).unwrap_or(rest);
    if let Some(endpoint) = openai_endpoint(rest) {
        return Some((Route::new(endpoint), "POST"));
    }
    let named = named_model(path).filter(|_| !unserved::is_operation(path))?;
    Some((Route { model: named, lists_models: named.is_none(), ..Route::new(Endpoint::Models) }, "GET"))
}

/// The endpoint of an OpenAI path without its version.
fn openai_endpoint(path: &str) -> Option<Endpoint> {
    Some(match path {
        "/chat/completions" => Endpoint::Counted(Api::Chat),
        "/completions" => Endpoint::Counted(Api::Completions),
        "/embeddings" => Endpoint::Counted(Api::Embeddings),
        "/responses" => Endpoint::Counted(Api::Responses),
        "/responses/input_tokens" => Endpoint::CountTokens(Api::Responses),
        "/rerank" => Endpoint::Uncounted("rerank"),
        "/moderations" => Endpoint::Uncounted("moderations"),
        _ => {
            let (family, operation) = path.strip_prefix('/')?.split_once('/')?;
            let name = ["audio", "images"].into_iter().find(|name| *name == family)?;
            Endpoint::Uncounted(Some(name).filter(|_| !operation.contains('/') && is_segment(operation))?)
        }
    })
}

/// The model and the endpoint of a Gemini path with an operation that is served, and whether the path requests a
/// stream.
fn model_operation(path: &str) -> Option<(&str, Endpoint, bool)> {
    let rest = path.strip_prefix("/v1beta").or_else(|| path.strip_prefix("/v1")).unwrap_or(path);
    let (model, operation) = rest.strip_prefix("/models/")?.rsplit_once(':')?;
    let (endpoint, streams) = match operation {
        "generateContent" => (Endpoint::Counted(Api::Gemini), false),
        "streamGenerateContent" => (Endpoint::Counted(Api::Gemini), true),
        "countTokens" => (Endpoint::CountTokens(Api::Gemini), false),
        _ => return None,
    };
    let is_name = is_segment(model) && !model.contains(['/', '%', ':']);
    is_name.then_some((model, endpoint, streams))
}

/// The model of a path of one model; `Some(None)` for the list of models, `None` for any other path.
fn named_model(path: &str) -> Option<Option<&str>> {
    let google_rest = path.strip_prefix("/v1beta");
    let rest =
        google_rest.or_else(|| path.strip_prefix("/openai/v1")).or_else(|| path.strip_prefix("/openai"));
    let rest = rest.or_else(|| path.strip_prefix("/v1")).unwrap_or(path);
    match rest.strip_prefix("/models")? {
        "" => Some(None),
        model => {
            // In Google's paths an operation follows a colon.
            let name =
                model.strip_prefix('/').filter(|model| google_rest.is_none() || !model.contains(':'))?;
            name.split('/').all(is_segment).then_some(Some(name))
        }
    }
}

/// Whether this is one segment of a path: an upstream can read no part of it as a separator or as `..`.
fn is_segment(segment: &str) -> bool {
    let lower = segment.to_ascii_lowercase();
    let is_ambiguous = ["%2e", "%2f", "%5c", "\\", ";"].iter().any(|part| lower.contains(part));
    !is_ambiguous && !matches!(segment, "" | "." | "..")
}

/// Whether every segment of a path is unambiguous.
fn is_plain(path: &str) -> bool {
    path.strip_prefix('/').is_some_and(|rest| !rest.is_empty() && rest.split('/').all(is_segment))
}

/// Whether an upstream could read this path as one that the gateway serves and charges: in another case, percent-encoded, or
/// with white space or control characters at its end.
fn resembles_served(path: &str) -> bool {
    let decoded = query::decoded(path).to_ascii_lowercase();
    let folded = decoded.trim_end_matches(|c: char| c.is_whitespace() || c.is_control());
    let is_operation = folded.rsplit_once(':').is_some_and(|(model, operation)| {
        let operations = ["generatecontent", "streamgeneratecontent", "counttokens"];
        model.contains("/models/") && operations.contains(&operation)
    });
    let is_charged = |(route, _): (Route<'_>, _)| {
        !matches!(route.endpoint, Endpoint::Models | Endpoint::Root | Endpoint::Other)
    };
    is_operation || route(folded).is_some_and(is_charged)
}

/// The path with another model than the one that it names, which is a slice of the path. The name is one segment, except in
/// the path of a description of a model, where it may be several.
pub(super) fn with_model(route: &Route<'_>, name: &str) -> String {
    let model = route.model.unwrap_or_default();
    let start = model.as_ptr().addr().saturating_sub(route.path.as_ptr().addr());
    let (before, rest) = route.path.split_at_checked(start).unwrap_or((route.path, ""));
    let mut path = before.to_owned();
    for &byte in name.as_bytes() {
        let is_plain = byte.is_ascii_alphanumeric()
            || b"-._~@".contains(&byte)
            || byte == b'/' && route.endpoint == Endpoint::Models;
        if is_plain {
            path.push(char::from(byte));
        } else {
            // Writing to a string cannot fail.
            let _ = write!(path, "%{byte:02X}");
        }
    }
    path + rest.get(model.len()..).unwrap_or_default()
}

/// The path and query at the upstream: the path of `base_url`, then the caller's path without the segments that
/// `base_url` already ends in.
pub(super) fn upstream_path(base: &str, path: &str, query: Option<&str>) -> String {
    let base = base.trim_end_matches('/');
    let repeated = ["/openai/v1", "/openai", "/v1beta", "/v1"].into_iter().find(|segments| {
        base.ends_with(segments) && path.strip_prefix(segments).is_some_and(|r| r.starts_with('/'))
    });
    let rest = &path[repeated.map_or(0, str::len)..];
    match query {
        Some(query) => [base, rest, "?", query].concat(),
        None => [base, rest].concat(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_matched_as_sent() {
        // A table: it is longer than a screen because it has one path a line.
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
            ("/v1/messages/count_tokens", Endpoint::CountTokens(Api::Messages)),
            ("/messages/count_tokens", Endpoint::CountTokens(Api::Messages)),
            ("/v1/responses/input_tokens", Endpoint::CountTokens(Api::Responses)),
            ("/responses/input_tokens", Endpoint::CountTokens(Api::Responses)),
            ("/openai/v1/responses/input_tokens", Endpoint::CountTokens(Api::Responses)),
            ("/v1beta/models/gemini-2.5-pro:countTokens", Endpoint::CountTokens(Api::Gemini)),
            ("/models/gemini-2.5-pro:countTokens", Endpoint::CountTokens(Api::Gemini)),
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
            "/openai/v1/messages/count_tokens",
            "/openai/deployments/d/responses/input_tokens",
            "/v1/messages/count_tokens/",
            "/v1/messages/batches",
            "/v1/responses/resp_1",
            "/v1/audio",
            "/v1/audio/",
            "/v1/audio/speech/x",
            "/v1/audio/%2e%2e",
            "/v1/Audio/speech",
            "/v1/realtime",
            "/v1beta/models/gemini:counttokens",
            "/v1beta/models/a:b:countTokens",
            "/v1/models/gemini:batchGenerateContent",
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
    fn the_dialect_follows_from_the_path() {
        for (path, expected) in [
            ("/v1/messages", Dialect::Anthropic),
            ("/messages", Dialect::Anthropic),
            ("/sandbox/messages", Dialect::Anthropic),
            ("/sandbox/v1/messages", Dialect::Anthropic),
            ("/v1/messages/batches", Dialect::Anthropic),
            ("/messages/count_tokens", Dialect::Anthropic),
            ("/sandbox/messages/count_tokens", Dialect::Anthropic),
            ("/messages/batches/b/results", Dialect::Anthropic),
            ("/messagesx", Dialect::OpenAi),
            ("/v1/responses/input_tokens", Dialect::Responses),
            ("/v1/models/g:countTokens", Dialect::Google),
            ("/v1/threads/t/messages", Dialect::OpenAi),
            ("/v1/threads/t/messages/m", Dialect::OpenAi),
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
            assert_eq!(dialect(path), expected, "{path}");
        }
    }

    #[test]
    fn each_sdk_has_its_own_key_header() {
        for (path, header) in [
            ("/v1/chat/completions", "Authorization: Bearer <key>"),
            ("/v1/responses", "Authorization: Bearer <key>"),
            ("/v1/models", "Authorization: Bearer <key>"),
            ("/v1/messages", "x-api-key: <key>"),
            ("/messages/count_tokens", "x-api-key: <key>"),
            ("/v1beta/models/g:generateContent", "x-goog-api-key: <key>"),
            ("/v1beta/models", "x-goog-api-key: <key>"),
            ("/openai/deployments/d/chat/completions", "api-key: <key>"),
            ("/openai/v1/responses", "api-key: <key>"),
        ] {
            assert_eq!(key_header(path), header, "{path}");
        }
    }

    #[test]
    fn segments_that_the_base_url_ends_in_are_not_repeated() {
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
