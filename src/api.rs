//! The APIs that the gateway understands.

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

/// Whose SDKs speak to the gateway: it decides what its errors look like.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Dialect {
    /// OpenAI's, and of all who follow it.
    #[default]
    OpenAi,
    /// OpenAI's Responses: the same errors, but events of a stream that have a name and a type.
    Responses,
    /// Anthropic's.
    Anthropic,
    /// Google's.
    Google,
}

impl Api {
    /// Whose SDKs speak it.
    pub fn dialect(self) -> Dialect {
        match self {
            Self::Chat | Self::Completions | Self::Embeddings => Dialect::OpenAi,
            Self::Responses => Dialect::Responses,
            Self::Messages => Dialect::Anthropic,
            Self::Gemini => Dialect::Google,
        }
    }

    /// Its name in metrics, log lines and `count --api`.
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

    /// Whether its streams report usage only where they are asked to.
    pub fn reports_if_asked(self) -> bool {
        matches!(self, Self::Chat | Self::Completions)
    }

    /// Whether the model generates tokens.
    pub fn generates(self) -> bool {
        self != Self::Embeddings
    }
}
