//! The APIs that the gateway can parse.

/// An API whose prompts are counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Api {
    /// OpenAI's `/chat/completions`
    #[default]
    Chat,
    /// OpenAI's `/completions`
    Completions,
    /// OpenAI's `/responses`
    Responses,
    /// OpenAI's `/embeddings`
    Embeddings,
    /// Anthropic's `/messages`
    Messages,
    /// Gemini's `:generateContent` and `:streamGenerateContent`
    Gemini,
}

/// The family of SDKs that a caller uses. It decides the shape of the gateway's errors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Dialect {
    /// OpenAI, and compatible APIs.
    #[default]
    OpenAi,
    /// OpenAI's Responses API: errors as `OpenAi`, but the events of its streams have a name and a type.
    Responses,
    /// Anthropic.
    Anthropic,
    /// Google.
    Google,
}

impl Api {
    /// The SDKs that use this API.
    pub fn dialect(self) -> Dialect {
        match self {
            Self::Chat | Self::Completions | Self::Embeddings => Dialect::OpenAi,
            Self::Responses => Dialect::Responses,
            Self::Messages => Dialect::Anthropic,
            Self::Gemini => Dialect::Google,
        }
    }

    /// The name in metrics, log lines and `count --api`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Chat => "chat",
            Self::Completions => "completions",
            Self::Responses => "responses",
            Self::Embeddings => "embeddings",
            Self::Messages => "messages",
            Self::Gemini => "gemini",
        }
    }

    /// Whether the API's streams report usage only if the request sets `stream_options.include_usage`.
    pub fn reports_stream_usage_on_request(self) -> bool {
        matches!(self, Self::Chat | Self::Completions)
    }

    /// Whether the model generates tokens.
    pub fn generates(self) -> bool {
        self != Self::Embeddings
    }
}
