//! Tokens of earlier answers by their ids, to which later requests refer (Responses API).

use super::table::{BoundedTable, Numbers};
use super::{EstimateScope, Learned};
use crate::estimate::{AnswerReference, Prompt, PromptEstimate, PromptPart, ReferenceKind};
use crate::usage::{AnswerIds, Reported};

/// Tokens of the reply's start, which the next prompt has only once.
const REPLY_TOKENS: u64 = 3;
/// Tokens that surround an answer in the next prompt.
const ANSWER_TOKENS: u64 = 4;

/// Distinguishes the keys of answers from those of prompts, which have the number of an API here.
const ANSWER_KEY: u64 = u64::MAX;

/// What the referenced answers add to a prompt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct ResolvedReferences {
    pub(super) tokens: u64,
    /// How many of the prompt's references to content outside the request they are.
    pub(super) references: u64,
    /// Tokens of reasoning before the last message of the user. Few models read it.
    pub(super) earlier_reasoning: u64,
    /// Whether any reference was resolved.
    pub(super) has_any: bool,
    /// Whether any reference to reasoning was resolved.
    pub(super) has_reasoning: bool,
}

/// The tokens of a response, or of one of its items.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct AnswerTokens {
    /// Without reasoning. Of a response: with the conversation before it.
    visible: u32,
    reasoning: u32,
}

impl From<Numbers> for AnswerTokens {
    fn from([visible, reasoning, ..]: Numbers) -> Self {
        Self { visible, reasoning }
    }
}

impl Learned {
    /// Ids belong to one principal at one upstream, whatever the model.
    fn id_key(scope: EstimateScope, id: &str) -> u64 {
        scope.hash(id).with(ANSWER_KEY).value()
    }

    /// Looks up these references.
    pub(super) fn resolve<'r, 'a: 'r>(
        &self,
        scope: EstimateScope,
        prompt: &Prompt<'a>,
        references: impl Iterator<Item = &'r AnswerReference<'a>>,
    ) -> ResolvedReferences {
        let mut all = ResolvedReferences::default();
        for reference in references {
            let Some(known) = self.table.get(Self::id_key(scope, &reference.id)) else { continue };
            let AnswerTokens { visible, reasoning } = known.into();
            // After a new message of the user, most models do not read earlier reasoning again.
            let is_earlier = match reference.kind {
                ReferenceKind::Response => prompt.has_user_message(),
                ReferenceKind::Reasoning => prompt.is_earlier(reference),
                ReferenceKind::Item => false,
            };
            let (tokens, earlier) = if is_earlier { (0, reasoning) } else { (reasoning, 0) };
            all.tokens += u64::from(visible) + u64::from(tokens);
            all.earlier_reasoning += u64::from(earlier);
            all.references += u64::from(reference.kind != ReferenceKind::Reasoning);
            all.has_reasoning |= reference.kind == ReferenceKind::Reasoning;
            all.has_any |= reference.kind != ReferenceKind::Reasoning || !is_earlier;
        }
        all
    }

    /// Remembers the tokens of a complete response and of its items.
    pub(super) fn learn_ids(
        &self,
        scope: EstimateScope,
        estimate: &PromptEstimate,
        reported: &Reported,
        ids: &AnswerIds,
    ) {
        let (Some(prompt), Some(completion)) = (reported.prompt(), reported.visible_completion()) else {
            return;
        };
        let reasoning = reported.reasoning();
        // Instructions, tools and schemas are not carried over to the next response.
        let left_behind =
            [estimate.of(PromptPart::Tools), estimate.of(PromptPart::Schema), estimate.settings_texts];
        let left_behind = left_behind.into_iter().fold(REPLY_TOKENS, u64::saturating_add);
        let conversation = prompt.saturating_sub(left_behind) + completion + ANSWER_TOKENS;
        remember(&self.table, Self::id_key(scope, &ids.response), conversation, reasoning);
        let thoughts = ids.items.iter().filter(|item| item.is_reasoning).count() as u64;
        let bytes: u64 = ids.items.iter().filter(|item| !item.is_reasoning).map(|item| item.bytes).sum();
        for item in &ids.items {
            let key = Self::id_key(scope, &item.id);
            if item.is_reasoning {
                remember(&self.table, key, 0, reasoning / thoughts.max(1));
            } else {
                // The completion is not reported by item.
                let share = completion.saturating_mul(item.bytes) / bytes.max(1);
                remember(&self.table, key, share + ANSWER_TOKENS, 0);
            }
        }
    }
}

/// Does nothing if a number is too large.
fn remember(table: &BoundedTable, key: u64, visible: u64, reasoning: u64) {
    if let (Ok(visible), Ok(reasoning)) = (u32::try_from(visible), u32::try_from(reasoning)) {
        table.update(key, |_| [visible, reasoning, 0, 0, 0]);
    }
}
