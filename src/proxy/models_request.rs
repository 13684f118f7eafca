//! The request for an upstream's list of models, as `tollgate check --online` sends it.

use super::headers::credential;
use super::route::upstream_path;
use crate::config::{ApiKind, UpstreamSettings};
use crate::upstream::Request;
use bytes::Bytes;
use http::header::{HeaderName, HeaderValue};
use http::{Method, header};

/// `GET` for the list of models, with the upstream's key.
pub(crate) fn models_request(upstream: &UpstreamSettings) -> Request {
    let base = upstream.base_url.path();
    let (path, query) = match upstream.api {
        ApiKind::Gemini => ("/v1beta/models", None),
        // Below /v1 Azure serves OpenAI's API, which has no versions by date.
        ApiKind::Azure if base.ends_with("/v1") => ("/v1/models", None),
        ApiKind::Azure => ("/openai/models", Some("api-version=2024-10-21")),
        ApiKind::OpenAi | ApiKind::Anthropic => ("/v1/models", None),
    };
    let mut headers = vec![(header::ACCEPT_ENCODING, HeaderValue::from_static("identity"))];
    if upstream.api == ApiKind::Anthropic {
        let version = HeaderName::from_static("anthropic-version");
        headers.push((version, HeaderValue::from_static("2023-06-01")));
    }
    headers.extend(credential(upstream));
    headers.extend(upstream.headers.iter().map(|(name, value)| (name.clone(), value.clone())));
    let target = upstream_path(base, path, query);
    Request { method: Method::GET, target, headers, body: Bytes::new() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::parse;

    #[test]
    fn each_api_has_its_path_and_its_header() {
        for (url, api, target, key) in [
            ("https://api.openai.com/v1", "openai", "/v1/models", "authorization"),
            ("http://u", "openai", "/v1/models", "authorization"),
            ("https://x.azure.com/openai", "azure", "/openai/models?api-version=2024-10-21", "api-key"),
            ("https://x.azure.com", "azure", "/openai/models?api-version=2024-10-21", "api-key"),
            ("https://x.azure.com/openai/v1", "azure", "/openai/v1/models", "api-key"),
            ("https://api.anthropic.com", "anthropic", "/v1/models", "x-api-key"),
            ("https://g.com/v1beta", "gemini", "/v1beta/models", "x-goog-api-key"),
        ] {
            let text = format!(
                "upstreams: {{ u: {{ base_url: '{url}', api: {api}, api_key: k, headers: {{ x-a: b }} }} }}\nenvironments: {{ e: {{ upstream: u }} }}"
            );
            let config = parse(&text, "t.yaml", &|_| None, &[]).unwrap().config;
            let request = models_request(&config.upstreams[0]);
            assert_eq!(request.target, target, "{url}");
            let names: Vec<_> = request.headers.iter().map(|(name, _)| name.as_str()).collect();
            assert!(names.contains(&key) && names.contains(&"x-a"), "{names:?}");
            assert_eq!(names.contains(&"anthropic-version"), api == "anthropic");
        }
    }
}
