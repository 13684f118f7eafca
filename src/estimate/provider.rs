//! The service behind an upstream. The same model can read the same request differently at two services.

use crate::config::{ApiKind, UpstreamSettings};

/// A service that runs or resells models.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Provider {
    /// Not recognised. Estimates assume the company that made the model.
    #[default]
    Unknown,
    /// OpenAI's own API.
    OpenAi,
    /// Azure's service for OpenAI's models.
    Azure,
    /// Anthropic's own API.
    Anthropic,
    /// Google AI Studio: the Gemini API with an API key.
    AiStudio,
    /// Google Cloud's Vertex AI.
    Vertex,
    /// A service that resells models of several companies.
    Router,
    /// Groq's own API.
    Groq,
    /// Ollama, on any machine.
    Ollama,
}

/// Providers by the end of their host name. A host matches if it equals the name or is a subdomain of it.
const DOMAINS: &[(&str, Provider)] = &[
    ("api.openai.com", Provider::OpenAi),
    ("chatgpt.com", Provider::OpenAi),
    ("openai.azure.com", Provider::Azure),
    ("cognitiveservices.azure.com", Provider::Azure),
    ("services.ai.azure.com", Provider::Azure),
    ("api.anthropic.com", Provider::Anthropic),
    ("generativelanguage.googleapis.com", Provider::AiStudio),
    ("api.groq.com", Provider::Groq),
    ("ollama.com", Provider::Ollama),
    ("openrouter.ai", Provider::Router),
    ("ai-gateway.vercel.sh", Provider::Router),
    ("githubcopilot.com", Provider::Router),
    ("models.github.ai", Provider::Router),
    ("api.venice.ai", Provider::Router),
    ("router.huggingface.co", Provider::Router),
    ("gateway.ai.cloudflare.com", Provider::Router),
    ("azuredatabricks.net", Provider::Router),
    ("cloud.databricks.com", Provider::Router),
    ("amazonaws.com", Provider::Router),
    ("api.together.xyz", Provider::Router),
    ("api.poe.com", Provider::Router),
    ("api.aimlapi.com", Provider::Router),
    ("api.requesty.ai", Provider::Router),
    ("router.requesty.ai", Provider::Router),
    ("llm.chutes.ai", Provider::Router),
    ("api.avian.io", Provider::Router),
];

/// The port on which Ollama listens by default.
const OLLAMA_PORT: &str = ":11434";

impl Provider {
    /// All providers with their names on the command line.
    pub const NAMED: [(&'static str, Self); 9] = [
        ("unknown", Self::Unknown),
        ("openai", Self::OpenAi),
        ("azure", Self::Azure),
        ("anthropic", Self::Anthropic),
        ("ai-studio", Self::AiStudio),
        ("vertex", Self::Vertex),
        ("router", Self::Router),
        ("groq", Self::Groq),
        ("ollama", Self::Ollama),
    ];

    /// The name on the command line.
    pub fn as_str(self) -> &'static str {
        Self::NAMED.iter().find(|(_, provider)| *provider == self).map_or("unknown", |(name, _)| name)
    }

    /// The provider behind an upstream: by its host and path, else by its kind of API.
    pub fn of_upstream(upstream: &UpstreamSettings) -> Self {
        let path = upstream.base_url.path();
        let by_kind = match upstream.api {
            _ if path.contains("/projects/") && path.contains("/locations/") => Self::Vertex,
            ApiKind::OpenAi => Self::Unknown,
            ApiKind::Azure => Self::Azure,
            ApiKind::Anthropic => Self::Anthropic,
            ApiKind::Gemini => Self::AiStudio,
        };
        let host = upstream.base_url.authority().map_or("", |authority| authority.as_str());
        Self::of_host(host.rsplit('@').next().unwrap_or(host)).unwrap_or(by_kind)
    }

    /// The provider with this host name, if it is well known. The name may have a port.
    pub fn of_host(host: &str) -> Option<Self> {
        let name = host.split(':').next().unwrap_or(host).trim_end_matches('.').to_ascii_lowercase();
        // The names of Vertex AI's hosts begin with a region: `us-central1-aiplatform.googleapis.com`.
        if name.ends_with("googleapis.com") && name.contains("aiplatform.") {
            return Some(Self::Vertex);
        }
        let is_in = |domain: &str| {
            name.strip_suffix(domain).is_some_and(|start| start.is_empty() || start.ends_with('.'))
        };
        let by_domain = DOMAINS.iter().find(|(domain, _)| is_in(domain)).map(|&(_, provider)| provider);
        by_domain.or_else(|| host.ends_with(OLLAMA_PORT).then_some(Self::Ollama))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_selects_the_provider() {
        for (host, provider) in [
            ("api.openai.com", Some(Provider::OpenAi)),
            ("eu.api.openai.com:443", Some(Provider::OpenAi)),
            ("API.OpenAI.com.", Some(Provider::OpenAi)),
            ("notapi.openai.com", None),
            ("my-resource.openai.azure.com", Some(Provider::Azure)),
            ("generativelanguage.googleapis.com", Some(Provider::AiStudio)),
            ("us-central1-aiplatform.googleapis.com", Some(Provider::Vertex)),
            ("aiplatform.googleapis.com", Some(Provider::Vertex)),
            ("aiplatform.eu.rep.googleapis.com", Some(Provider::Vertex)),
            ("openrouter.ai", Some(Provider::Router)),
            ("bedrock-runtime.us-east-1.amazonaws.com", Some(Provider::Router)),
            ("api.mistral.ai", None),
            ("127.0.0.1:8080", None),
            ("gpu-7.example:11434", Some(Provider::Ollama)),
            ("api.groq.com", Some(Provider::Groq)),
            ("", None),
        ] {
            assert_eq!(Provider::of_host(host), provider, "{host}");
        }
    }

    #[test]
    fn the_path_or_the_api_selects_the_provider_of_an_unknown_host() {
        for (url, api, provider) in [
            ("http://localhost:8080/v1", "openai", Provider::Unknown),
            ("http://localhost:8080/v1beta", "gemini", Provider::AiStudio),
            ("http://proxy.example/v1", "anthropic", Provider::Anthropic),
            ("http://proxy.example/openai", "azure", Provider::Azure),
            ("http://proxy.example/v1/projects/p/locations/l/publishers/google", "gemini", Provider::Vertex),
            ("https://openrouter.ai/api/v1", "openai", Provider::Router),
            ("http://localhost:11434/v1", "openai", Provider::Ollama),
        ] {
            let text = format!(
                "upstreams: {{ u: {{ base_url: '{url}', api: {api} }} }}\nenvironments: {{ e: {{ upstream: u, quotas: {{ requests: {{ limit: 1, per: day }} }} }} }}\n"
            );
            let config = crate::config::parse(&text, "t.yaml", &|_| None, &[]).unwrap().config;
            assert_eq!(Provider::of_upstream(&config.upstreams[0]), provider, "{url}");
        }
    }
}
