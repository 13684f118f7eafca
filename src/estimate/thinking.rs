//! Reasoning of earlier answers that a request sends back. Each family of models reads another part of it again.

use super::count_cache::HashedText;
use super::provider::Provider;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

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
    /// Reasoning that only the provider can decrypt.
    Encrypted(EncryptedThought),
}

/// Reasoning that only the provider can decrypt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct EncryptedThought {
    /// Characters of base64.
    pub(super) characters: u64,
    /// Whether the bytes are more than one record of Protocol Buffers.
    has_more_records: bool,
}

impl EncryptedThought {
    pub(super) fn of(base64: &str) -> Self {
        // 10, the length of the record in one or two groups of seven bits, and the record.
        let mut first = [0; 3];
        let start = base64.as_bytes().get(..4).unwrap_or_default();
        let record = match STANDARD.decode_slice(start, &mut first).map(|_| first) {
            Ok([10, length @ 0..0x80, _]) => Some(2 + usize::from(length)),
            Ok([10, low, high @ 0..0x80]) => Some(3 + usize::from(low & 0x7f) + (usize::from(high) << 7)),
            _ => None,
        };
        let bytes = base64.trim_end_matches('=').len() * 3 / 4;
        Self {
            characters: base64.len() as u64,
            has_more_records: record.is_some_and(|record| record < bytes),
        }
    }
}

impl<'a> EarlierThinking<'a> {
    /// Number of thoughts.
    pub(super) fn count(&self) -> usize {
        self.thoughts.len()
    }

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

    /// The thoughts that a model with these habits reads, with their indices.
    pub(super) fn read_by(
        &self,
        habits: ThinkingHabits,
    ) -> impl Iterator<Item = (usize, &ThoughtContent<'a>)> {
        let is_read = move |(_, thought): &(usize, &EarlierThought<'_>)| {
            let is_before = self.last_user_message.is_some_and(|last| thought.message < last);
            if is_before { habits.before } else { habits.after }
        };
        self.thoughts.iter().enumerate().filter(is_read).map(|(at, thought)| (at, &thought.content))
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
    /// Whether the provider keeps the reasoning that led to calls, so that the model reads it with their results.
    pub(super) is_recalled: bool,
    /// Whether the model reads reasoning to which a request refers by its id also before the last message of the user.
    pub(super) reads_references: bool,
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
    /// Whether a single record costs nothing.
    pub(super) needs_records: bool,
    /// The tokens around a thought, which its provider does not report as reasoning.
    pub(super) format: u64,
}

impl EncryptedCost {
    /// OpenAI's `encrypted_content`. Fitted to 35 exchanges.
    pub(super) const OPENAI: Self = Self { header: 900, per_mille: 155, needs_records: false, format: 2 };

    pub(super) fn tokens(self, characters: u64) -> u64 {
        characters.saturating_sub(self.header).saturating_mul(self.per_mille) / 1_000
    }

    /// The encrypted reasoning of OpenAI's models has a shorter header behind routers.
    const OPENAI_ROUTED: Self = Self { header: 820, ..Self::OPENAI };

    fn at(self, provider: Provider) -> Self {
        match provider {
            Provider::Router if self == Self::OPENAI => Self::OPENAI_ROUTED,
            // Signatures of one record are read too.
            Provider::Vertex => Self { needs_records: false, ..self },
            _ => self,
        }
    }

    /// The cost of a thought.
    pub(super) fn of(self, thought: EncryptedThought) -> u64 {
        let is_read = thought.has_more_records || !self.needs_records;
        if is_read { self.tokens(thought.characters) } else { 0 }
    }
}

/// Anthropic's signature of a thought whose text is not shown, and `data` of a redacted one. A signature grows by four
/// characters per three of the thought. Its header was read from 8 thoughts that are shown.
const ANTHROPIC: EncryptedCost =
    EncryptedCost { header: 235, per_mille: 188, needs_records: false, format: 0 };
/// Gemini's thought signatures. Fitted to 23 exchanges.
const GEMINI: EncryptedCost = EncryptedCost { header: 0, per_mille: 167, needs_records: false, format: 0 };

const NONE: ThinkingHabits = ThinkingHabits {
    before: false,
    after: false,
    reads_text: true,
    encrypted: EncryptedCost::OPENAI,
    is_recalled: false,
    reads_references: false,
    dropped_at: &[],
};
const AFTER: ThinkingHabits = ThinkingHabits { after: true, ..NONE };
const ALL: ThinkingHabits = ThinkingHabits { before: true, ..AFTER };
/// OpenAI's models read encrypted reasoning only; a summary is not in the prompt.
const HIDDEN_AFTER: ThinkingHabits = ThinkingHabits { reads_text: false, ..AFTER };
const CLAUDE: ThinkingHabits = ThinkingHabits { encrypted: ANTHROPIC, ..AFTER };
/// xAI's models.
const GROK: ThinkingHabits =
    ThinkingHabits { reads_references: true, dropped_at: &[Provider::Router], ..NONE };
/// Gemini 3. Fitted to 7 exchanges.
const GEMINI_3: EncryptedCost =
    EncryptedCost { header: 147, per_mille: 204, needs_records: false, format: 0 };
/// Gemini 2.5 reads the reasoning of a streamed answer again, whose signature has several records. The signature of a
/// whole answer is one record. Fitted to 8 exchanges.
const GEMINI_2: EncryptedCost = EncryptedCost { header: 0, per_mille: 128, needs_records: true, format: 0 };
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
    ("gemini-2", ThinkingHabits { encrypted: GEMINI_2, reads_text: false, ..AFTER }),
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
    ("glm-4", AFTER),
    ("glm", NONE),
    (
        "grok-code",
        ThinkingHabits {
            is_recalled: true,
            reads_references: true,
            dropped_at: &[Provider::Router],
            ..AFTER
        },
    ),
    ("grok-4", ThinkingHabits { is_recalled: true, ..GROK }),
    ("grok", GROK),
];

impl ThinkingHabits {
    /// The habits of the model with this name in lower case.
    pub(super) fn of_model(name: &str) -> Self {
        FAMILIES.iter().find(|(prefix, _)| name.starts_with(prefix)).map_or(AFTER, |&(_, habits)| habits)
    }

    /// The habits of the same model at a provider.
    pub(super) fn at(self, provider: Provider) -> Self {
        let is_read = !self.dropped_at.contains(&provider);
        Self {
            before: self.before && is_read,
            after: self.after && is_read,
            is_recalled: self.is_recalled && is_read,
            reads_references: self.reads_references && is_read,
            encrypted: self.encrypted.at(provider),
            ..self
        }
    }
}

/// Tokens of earlier reasoning.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct ThinkingTokens {
    pub(super) all: u64,
    /// Those of the answer after the known prefix.
    pub(super) of_echo: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasoning_is_read_by_its_place_before_or_after_the_last_message_of_the_user() {
        let mut thinking = EarlierThinking::default();
        thinking.end_user_message(0);
        let encrypted =
            |characters: usize| ThoughtContent::Encrypted(EncryptedThought::of(&"A".repeat(characters)));
        assert!(thinking.add(1, encrypted(1)));
        thinking.end_user_message(2);
        assert!(thinking.add(3, encrypted(2)));
        assert!(thinking.add(4, encrypted(4)));
        let read = |habits| -> u64 {
            let characters = |(_, thought): (usize, &ThoughtContent<'_>)| match thought {
                ThoughtContent::Encrypted(thought) => thought.characters,
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

    #[test]
    fn a_signature_of_one_record_costs_nothing_if_the_provider_does_not_read_it() {
        let record = |bytes: usize| {
            let mut record = vec![10];
            if bytes < 0x80 {
                record.push(u8::try_from(bytes).unwrap());
            } else {
                record
                    .extend([u8::try_from(bytes & 0x7f).unwrap() | 0x80, u8::try_from(bytes >> 7).unwrap()]);
            }
            record.extend(vec![7; bytes]);
            record
        };
        let habits = ThinkingHabits::of_model("gemini-2.5-flash");
        let cost = |lengths: &[usize], provider| {
            let bytes: Vec<u8> = lengths.iter().flat_map(|&length| record(length)).collect();
            habits.at(provider).encrypted.of(EncryptedThought::of(&STANDARD.encode(bytes)))
        };
        for (one, more) in [(100, 100), (127, 1), (128, 1), (300, 40), (16_000, 100)] {
            assert_eq!(cost(&[one], Provider::AiStudio), 0, "{one}");
            assert!(cost(&[one], Provider::Vertex) > 0, "{one}");
            assert!(cost(&[one, more], Provider::AiStudio) > 0, "{one} {more}");
        }
        for malformed in ["", "C", "CiQ", "CiQB", "####", "é€é€", "AAAAAAAA"] {
            assert!(!EncryptedThought::of(malformed).has_more_records, "{malformed}");
        }
    }
}
