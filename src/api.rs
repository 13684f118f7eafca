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

impl Api {
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
