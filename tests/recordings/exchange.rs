//! Recorded exchanges with providers: the request, the answer and the reported usage. The recordings are not part
//! of the project.

use base64::Engine as _;
use bytes::Bytes;
use flate2::read::GzDecoder;
use serde::Deserialize;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use tollgate::api::Api;
use tollgate::estimate::Provider;
use tollgate::usage::Reported;

/// One exchange as stored in its file.
#[derive(Deserialize)]
pub(crate) struct Exchange {
    pub(crate) id: String,
    pub(crate) provider: String,
    #[serde(default)]
    host: String,
    pub(crate) api: String,
    #[serde(default)]
    pub(crate) model: Option<String>,
    pub(crate) request_body: Option<String>,
    #[serde(default)]
    request_body_encoding: Option<String>,
    request_recorded: bool,
    #[serde(default)]
    request_masked: bool,
    pub(crate) status: Option<u16>,
    #[serde(default)]
    pub(crate) prompt_tokens: Option<u64>,
    #[serde(default)]
    pub(crate) completion_tokens: Option<u64>,
    #[serde(default)]
    reasoning_tokens: Option<u64>,
    #[serde(default)]
    pub(crate) usage: Value,
    #[serde(default)]
    pub(crate) stream: bool,
    response_body: Option<String>,
    #[serde(default)]
    response_body_encoding: Option<String>,
    #[serde(default)]
    response_wire_compressed: bool,
    #[serde(default)]
    response_reserialised: bool,
    #[serde(default)]
    response_reframed: bool,
    #[serde(default)]
    response_headers: BTreeMap<String, Value>,
    #[serde(default)]
    method: Option<String>,
    #[serde(default)]
    path: Option<String>,
    #[serde(default)]
    pub(crate) features: Vec<String>,
}

/// The folder of the recordings: `$TOLLGATE_DATA`, or a folder next to the project.
pub(crate) fn data() -> PathBuf {
    std::env::var_os("TOLLGATE_DATA")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../shared"), PathBuf::from)
}

/// Every file of recordings, by name.
pub(crate) fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|e| e.path());
    let mut files: Vec<_> = entries.filter(|p| p.extension().is_some_and(|e| e == "gz")).collect();
    files.sort();
    files
}

/// The exchanges of one file.
pub(crate) fn read(file: &Path) -> impl Iterator<Item = Exchange> + use<> {
    let lines = BufReader::new(GzDecoder::new(File::open(file).expect("the file was just found"))).lines();
    lines.map(|line| serde_json::from_str(&line.expect("gzip and UTF-8")).expect("one exchange per line"))
}

fn decoded(body: &str, encoding: Option<&str>) -> Option<Bytes> {
    if encoding == Some("base64") {
        return base64::engine::general_purpose::STANDARD.decode(body).ok().map(Bytes::from);
    }
    Some(Bytes::copy_from_slice(body.as_bytes()))
}

impl Exchange {
    /// The API, if its prompts are estimated.
    pub(crate) fn api(&self) -> Option<Api> {
        Some(match self.api.as_str() {
            "chat" => Api::Chat,
            "completions" => Api::Completions,
            "responses" => Api::Responses,
            "embeddings" => Api::Embeddings,
            "anthropic_messages" => Api::Messages,
            "gemini" => Api::Gemini,
            _ => return None,
        })
    }

    /// The service that received the request.
    pub(crate) fn service(&self) -> Provider {
        Provider::of_host(&self.host).unwrap_or_default()
    }

    /// The request, if it was recorded byte for byte and was answered.
    pub(crate) fn exact_request(&self) -> Option<&str> {
        let is_text = self.request_body_encoding.as_deref().is_none_or(|e| e == "text");
        let is_exact = self.request_recorded && !self.request_masked && is_text;
        let is_answered = self.status.is_none_or(|status| status < 400);
        // Some recorders replace encrypted content, which the provider counts.
        let replaced = ["encrypted_content_REDACTED", "ignature_REDACTED", "signature_REDACTED"];
        let is_whole = |body: &&str| !replaced.iter().any(|mark| body.contains(mark));
        self.request_body.as_deref().filter(|_| is_exact && is_answered).filter(is_whole)
    }

    /// Reported tokens of the answer without its reasoning; 0: not reported.
    pub(crate) fn visible_completion(&self) -> u64 {
        Reported::read(&self.usage.to_string()).visible_completion().unwrap_or(0)
    }

    /// Reported tokens of the answer's reasoning.
    pub(crate) fn reasoning(&self) -> u64 {
        Reported::read(&self.usage.to_string()).reasoning()
    }

    /// Whether the exchange has one of these features.
    pub(crate) fn has(&self, features: &[&str]) -> bool {
        self.features.iter().any(|f| features.contains(&f.as_str()))
    }

    /// Whether the model reasoned. Not all models report it.
    pub(crate) fn is_reasoning(&self) -> bool {
        self.reasoning_tokens.is_some_and(|tokens| tokens > 0)
            || self.has(&["reasoning", "reasoning_request", "reasoning_text_out"])
    }

    /// The answer, if it is neither an error nor compressed.
    pub(crate) fn answer(&self) -> Option<Bytes> {
        let is_good = self.status.is_none_or(|status| status < 400) && !self.response_wire_compressed;
        self.body().filter(|_| is_good)
    }

    /// The bytes of the answer.
    pub(crate) fn body(&self) -> Option<Bytes> {
        decoded(self.response_body.as_deref()?, self.response_body_encoding.as_deref())
    }

    /// The bytes of the request, if they were recorded.
    pub(crate) fn request(&self) -> Option<Bytes> {
        decoded(self.request_body.as_deref()?, self.request_body_encoding.as_deref())
    }

    /// Method and path of the request.
    pub(crate) fn method_and_path(&self) -> (&str, &str) {
        (self.method.as_deref().unwrap_or("POST"), self.path.as_deref().unwrap_or("/"))
    }

    /// Whether the answer was recorded byte for byte.
    pub(crate) fn is_exact(&self) -> bool {
        !self.response_reserialised && !self.response_reframed
    }

    /// The answer's `content-type`.
    pub(crate) fn content_type(&self) -> &str {
        let mut fields = self.response_headers.iter();
        let recorded = fields.find(|(name, _)| name.eq_ignore_ascii_case("content-type"));
        let recorded = recorded.and_then(|(_, value)| value.get(0).unwrap_or(value).as_str());
        recorded.unwrap_or(if self.stream { "text/event-stream" } else { "application/json" })
    }

    /// All prompt tokens, as the gateway charges them.
    pub(crate) fn reported(&self) -> Option<u64> {
        let of = |name: &str| self.usage[name].as_u64().unwrap_or(0);
        let apart = match self.api()? {
            Api::Messages => of("cache_creation_input_tokens") + of("cache_read_input_tokens"),
            Api::Gemini => of("toolUsePromptTokenCount"),
            _ => 0,
        };
        self.prompt_tokens.map(|tokens| tokens + apart)
    }
}
