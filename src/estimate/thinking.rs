//! Reasoning of earlier answers that a request sends back. Each family of models reads another part of it again.

use super::count_cache::HashedText;
use super::provider::Provider;

/// Number of thoughts that are stored separately.
const MAX_THOUGHTS: usize = 1 << 17;

/// The reasoning of earlier answers in a request.
#[derive(Debug, Default)]
pub(super) struct EarlierThinking<'a> {
    thoughts: Vec<EarlierThought<'a>>,
    /// Index of the message that the thoughts after the last message of the user follow.
    last_user_message: Option<u64>,
}

#[derive(Debug)]
struct EarlierThought<'a> {
    /// Index of the message that has the thought, or that would follow it.
    message: u64,
    content: ThoughtContent<'a>,
}

#[derive(Debug)]
pub(super) enum ThoughtContent<'a> {
    /// Visible reasoning, or a summary of it.
    Text(HashedText<'a>),
    /// This number of characters that only the provider can decrypt.
    Encrypted(u64),
}

impl<'a> EarlierThinking<'a> {
    /// Adds a thought after this number of complete messages. `false`: there are too many thoughts.
    pub(super) fn add(&mut self, message: u64, content: ThoughtContent<'a>) -> bool {
        let has_room = self.thoughts.len() < MAX_THOUGHTS;
        if has_room {
            self.thoughts.push(EarlierThought { message, content });
        }
        has_room
    }

    /// The message with this index is the user's.
    pub(super) fn end_user_message(&mut self, message: u64) {
        self.last_user_message = Some(message);
    }

    /// The thoughts that a model with these habits reads.
    pub(super) fn read_by(&self, habits: ThinkingHabits) -> impl Iterator<Item = &ThoughtContent<'a>> {
        let is_read = move |thought: &&EarlierThought<'_>| {
            let is_before = self.last_user_message.is_some_and(|last| thought.message < last);
            if is_before { habits.before } else { habits.after }
        };
        self.thoughts.iter().filter(is_read).map(|thought| &thought.content)
    }

    /// Bytes of visible reasoning.
    pub(super) fn text_bytes(&self) -> usize {
        let bytes = |thought: &EarlierThought<'_>| match &thought.content {
            ThoughtContent::Text(text) => text.text.len(),
            ThoughtContent::Encrypted(_) => 0,
        };
        self.thoughts.iter().map(bytes).sum()
    }
}

/// Which reasoning of earlier answers a model reads.
///
/// The result of a tool is not a message of the user: reasoning after the last message of the user belongs to the
/// answer that is still being given. Most chat templates keep it, and drop what stands before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ThinkingHabits {
    /// Reasoning before the last message of the user.
    pub(super) before: bool,
    /// Reasoning after it.
    pub(super) after: bool,
    /// Whether the model reads visible reasoning. If not, it reads encrypted reasoning only.
    pub(super) reads_text: bool,
    pub(super) encrypted: EncryptedCost,
    /// Providers that drop all of it.
    dropped_at: &'static [Provider],
}

/// The cost of encrypted reasoning by its number of characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct EncryptedCost {
    /// Characters that hold no reasoning.
    pub(super) header: u64,
    /// Tokens per 1,000 further characters.
    pub(super) per_mille: u64,
}

impl EncryptedCost {
    /// OpenAI's `encrypted_content`. Fitted to 35 exchanges.
    pub(super) const OPENAI: Self = Self { header: 900, per_mille: 155 };

    pub(super) fn tokens(self, characters: u64) -> u64 {
        characters.saturating_sub(self.header).saturating_mul(self.per_mille) / 1_000
    }
}

/// Anthropic's signature of a thought whose text is not shown, and `data` of a redacted one. A signature grows by four
/// characters per three of the thought. Its header was read from 8 thoughts that are shown.
const ANTHROPIC: EncryptedCost = EncryptedCost { header: 235, per_mille: 188 };
/// Gemini's thought signatures. Fitted to 23 exchanges.
const GEMINI: EncryptedCost = EncryptedCost { header: 0, per_mille: 167 };

const NONE: ThinkingHabits = ThinkingHabits {
    before: false,
    after: false,
    reads_text: true,
    encrypted: EncryptedCost::OPENAI,
    dropped_at: &[],
};
const AFTER: ThinkingHabits = ThinkingHabits { after: true, ..NONE };
const ALL: ThinkingHabits = ThinkingHabits { before: true, ..AFTER };
/// OpenAI's models read encrypted reasoning only; a summary is not in the prompt.
const HIDDEN_AFTER: ThinkingHabits = ThinkingHabits { reads_text: false, ..AFTER };
const CLAUDE: ThinkingHabits = ThinkingHabits { encrypted: ANTHROPIC, ..AFTER };
/// Gemini 3. Fitted to 7 exchanges.
const GEMINI_3: EncryptedCost = EncryptedCost { header: 147, per_mille: 204 };
const GEMINI_ALL: ThinkingHabits = ThinkingHabits { encrypted: GEMINI, ..ALL };

/// Habits by the prefix of the model's name; the first match counts. A model that is not listed keeps reasoning
/// after the last message of the user.
const FAMILIES: &[(&str, ThinkingHabits)] = &[
    ("gpt-oss", ThinkingHabits { dropped_at: &[Provider::Groq, Provider::Ollama], ..AFTER }),
    ("gpt-5.6", ThinkingHabits { before: true, ..HIDDEN_AFTER }),
    ("gpt-5", HIDDEN_AFTER),
    ("gpt-4", NONE),
    ("gpt-3", NONE),
    // Later models are assumed to be like gpt-5.6.
    ("gpt-", ThinkingHabits { before: true, ..HIDDEN_AFTER }),
    ("o1", HIDDEN_AFTER),
    ("o3", HIDDEN_AFTER),
    ("o4", HIDDEN_AFTER),
    ("codex-", HIDDEN_AFTER),
    ("claude-2", CLAUDE),
    ("claude-3", CLAUDE),
    ("claude-sonnet-4-6", ThinkingHabits { before: true, ..CLAUDE }),
    ("claude-opus-4-6", ThinkingHabits { before: true, ..CLAUDE }),
    ("claude-opus-4-7", ThinkingHabits { before: true, ..CLAUDE }),
    ("claude-opus-4-8", ThinkingHabits { before: true, ..CLAUDE }),
    ("claude-sonnet-4", CLAUDE),
    ("claude-opus-4", CLAUDE),
    ("claude-haiku-4", CLAUDE),
    ("claude", ThinkingHabits { before: true, ..CLAUDE }),
    ("gemini-1", NONE),
    ("gemini-2", NONE),
    ("gemini-3.", GEMINI_ALL),
    (
        "gemini-3",
        ThinkingHabits { encrypted: GEMINI_3, dropped_at: &[Provider::Vertex, Provider::Router], ..AFTER },
    ),
    ("gemini", GEMINI_ALL),
    ("mistral", ALL),
    ("ministral", ALL),
    ("magistral", ALL),
    // DeepSeek keeps reasoning of turns that called tools. R1's template drops all of it.
    ("deepseek-v4", ALL),
    ("deepseek-r1", NONE),
    ("deepseek-reasoner", NONE),
    ("glm", NONE),
    ("grok-code", AFTER),
    ("grok", NONE),
];

impl ThinkingHabits {
    /// The habits of the model with this name in lower case.
    pub(super) fn of_model(name: &str) -> Self {
        FAMILIES.iter().find(|(prefix, _)| name.starts_with(prefix)).map_or(AFTER, |&(_, habits)| habits)
    }

    /// The habits of the same model at a provider.
    pub(super) fn at(self, provider: Provider) -> Self {
        let is_dropped = self.dropped_at.contains(&provider);
        if is_dropped { Self { before: false, after: false, ..self } } else { self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasoning_is_read_by_its_place_before_or_after_the_last_message_of_the_user() {
        let mut thinking = EarlierThinking::default();
        thinking.end_user_message(0);
        assert!(thinking.add(1, ThoughtContent::Encrypted(1)));
        thinking.end_user_message(2);
        assert!(thinking.add(3, ThoughtContent::Encrypted(2)));
        assert!(thinking.add(4, ThoughtContent::Encrypted(4)));
        let read = |habits| -> u64 {
            let characters = |thought: &ThoughtContent<'_>| match thought {
                ThoughtContent::Encrypted(characters) => *characters,
                ThoughtContent::Text(_) => 0,
            };
            thinking.read_by(habits).map(characters).sum()
        };
        assert_eq!([NONE, AFTER, ALL].map(read), [0, 6, 7]);
    }

    #[test]
    fn encrypted_reasoning_costs_by_its_length_without_a_header() {
        assert_eq!(
            [0, 900, 1_900, u64::MAX].map(|n| EncryptedCost::OPENAI.tokens(n)),
            [0, 0, 155, u64::MAX / 1_000]
        );
    }
}
