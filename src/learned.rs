//! What answers have taught about prompt tokens, and the estimates that follow from it.
//!
//! An answer reports the prompt tokens of its request. Three memories learn from that:
//!
//! 1. **Conversations.** The next request of a conversation repeats the messages of the last one. Its estimate is the
//!    reported number of the last request, and the count of the new messages.
//! 2. **Set-ups.** Requests with the same tools, settings and system prompt have similar errors.
//! 3. **Calibrations.** Requests of the same model and kind have similar errors.
//!
//! The first two are in memory only. They hold keyed hashes and numbers, and nothing of a prompt. Each entry belongs to
//! one principal: no caller sees the effect of another caller's requests.

mod answers;
mod table;
mod urls;

use crate::api::Api;
use crate::calibrations::Calibrations;
use crate::estimate::{
    AnswerReference, EstimateSource, KeyedHash, Prompt, PromptEstimate, PromptPrefix, ReferenceKind,
    RequestKind, bounded,
};
use crate::usage::{AnswerIds, Reported};
use answers::ResolvedReferences;
use std::collections::hash_map::{DefaultHasher, RandomState};
use std::hash::BuildHasher as _;
use std::sync::Arc;
use table::{BoundedTable, Numbers};
use urls::ImageUrls;

/// Entries of conversations and set-ups in memory: 8 MiB. An answered request takes one entry, and each set-up one.
/// This suffices for the last requests of 100,000 conversations at the same time.
const MAX_ENTRIES: usize = 1 << 18;
/// Smallest answer (tokens) whose reported size replaces the count of its text.
const MIN_ECHO: u64 = 64;
/// A text is taken for the last answer if its count differs from the reported size by at most this part of it.
const MAX_ECHO_ERROR: u64 = 4;
/// Some models report reasoning in steps of this number of tokens.
const REASONING_STEP: u32 = 64;
/// Two offsets of a set-up agree if they differ by at most this share of the prompt.
const AGREEMENT_PERCENT: u64 = 5;

/// What answers have taught. All workers share it.
#[derive(Debug)]
pub struct Learned {
    calibrations: Arc<Calibrations>,
    table: BoundedTable,
    /// The key of the hashes of principals. It lasts as long as the process.
    hash_key: RandomState,
}

/// Whose answers an estimate may use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EstimateScope {
    /// Index of the upstream.
    pub upstream: usize,
    /// Identifies who sent the request.
    pub principal: u64,
}

impl EstimateScope {
    /// The keyed hash of the scope and a name.
    fn hash(self, name: &str) -> KeyedHash {
        KeyedHash::of_text(name.as_bytes()).with(self.principal).with(self.upstream as u64)
    }
}

/// The memories that apply to a prompt, looked up before it is counted.
#[derive(Debug)]
pub struct Recall {
    scope: EstimateScope,
    api: Api,
    /// The longest prefix whose prompt tokens were reported.
    known: Option<KnownPrefix>,
    setup: Option<SetupOffset>,
    /// The key of all messages; `None`: the prompt has no messages.
    whole_key: Option<u64>,
    /// `None`: the prompt has no tools, settings or system prompt.
    setup_key: Option<u64>,
    resolved: ResolvedReferences,
    urls: ImageUrls,
}

impl Recall {
    /// Whether these are the memories for the upstream with this index.
    pub(crate) fn is_for(&self, upstream: usize) -> bool {
        self.scope.upstream == upstream
    }
}

/// A prefix of a prompt, as an earlier answer reported it.
#[derive(Debug)]
struct KnownPrefix {
    reported: ReportedPrefix,
    /// References in the messages after the prefix.
    new_references: u64,
}

/// A corrected estimate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CorrectedPrompt {
    /// The estimated prompt tokens.
    pub tokens: u64,
    /// What they come from.
    pub source: EstimateSource,
    /// References to content outside the request whose tokens `tokens` does not include.
    pub unseen: u64,
}

impl CorrectedPrompt {
    /// The estimate as it was counted.
    pub(crate) fn uncorrected(estimate: &PromptEstimate) -> Self {
        Self { tokens: estimate.tokens(), source: EstimateSource::Rules, unseen: estimate.unseen }
    }
}

/// Teaches the memories once the answer has reported its prompt tokens.
#[derive(Debug)]
pub struct EstimateUpdate {
    learned: Arc<Learned>,
    recall: Recall,
    model: String,
    estimate: PromptEstimate,
    /// Whether the answer consists of one completion, which the next request can repeat.
    has_one_completion: bool,
}

/// The prompt tokens of an earlier request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct ReportedPrefix {
    reported: u32,
    /// The estimate before any correction.
    estimated: u32,
    /// Tokens of the texts of its messages.
    message_texts: u32,
    /// Tokens of the answer without its reasoning; 0: not reported.
    completion: u32,
    /// Tokens of the answer's reasoning.
    reasoning: u32,
}

/// The offsets of the last two requests with one set-up: reported minus estimated tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct SetupOffset {
    last: i32,
    before: i32,
    /// Number of answers so far.
    answers: u32,
    /// Reported tokens of the last request.
    reported: u32,
}

impl Learned {
    /// Nothing is learned yet, except for these calibrations.
    pub fn new(calibrations: Calibrations) -> Self {
        Self {
            calibrations: Arc::new(calibrations),
            table: BoundedTable::new(MAX_ENTRIES),
            hash_key: RandomState::new(),
        }
    }

    /// The calibrations of all upstreams.
    pub fn calibrations(&self) -> &Arc<Calibrations> {
        &self.calibrations
    }

    /// A hasher for principals.
    pub(crate) fn hasher(&self) -> DefaultHasher {
        self.hash_key.build_hasher()
    }

    /// Looks up the memories that apply to a prompt. The texts of a known prefix are not counted again.
    pub fn recall(&self, scope: EstimateScope, api: Api, model: &str, prompt: &mut Prompt<'_>) -> Recall {
        let of_scope = scope.hash(model).with(api as u64);
        let key = |kind: EntryKind, settings: u64, messages: u64| {
            of_scope.with(kind.number()).with(settings).with(messages).value()
        };
        let settings = prompt.settings();
        let prefix_key = |prefix: &PromptPrefix| key(EntryKind::Prefix, settings, prefix.hash);
        let whole = prompt.prefixes().next();
        let known = prompt.prefixes().find_map(|prefix| {
            let reported = ReportedPrefix::from(self.table.get(prefix_key(&prefix))?);
            let new_references = whole.map_or(0, |whole| whole.unseen.saturating_sub(prefix.unseen));
            Some((prefix, KnownPrefix { reported, new_references }))
        });
        // Completions and embeddings have no messages, so everything they have would be their set-up.
        let has_setup = whole.is_some() && (settings != 0 || prompt.system() != 0);
        let setup_key = has_setup.then(|| key(EntryKind::Setup(prompt.kind()), settings, prompt.system()));
        let setup = setup_key.filter(|_| known.is_none()).and_then(|key| self.table.get(key));
        if let Some((prefix, known)) = &known {
            prompt.set_known(prefix, u64::from(known.reported.message_texts));
        }
        // The reported tokens of a known prefix include its references, and those of the settings.
        let first = known.as_ref().map_or(0, |(prefix, _)| prefix.messages);
        let is_new = |reference: &&AnswerReference<'_>| {
            known.is_none() || reference.message >= first && reference.kind != ReferenceKind::Response
        };
        let resolved = self.resolve(scope, prompt, prompt.references().filter(is_new));
        let new_images = prompt.image_urls().iter().filter(|image| known.is_none() || image.message >= first);
        let urls = self.image_urls(scope, api, model, new_images.copied());
        Recall {
            scope,
            api,
            resolved,
            urls,
            known: known.map(|(_, known)| known),
            setup: setup.map(SetupOffset::from),
            whole_key: whole.map(|whole| prefix_key(&whole)),
            setup_key,
        }
    }

    /// Corrects the estimate of a prompt by the most specific memory.
    pub fn correct(&self, recall: &Recall, model: &str, estimate: &PromptEstimate) -> CorrectedPrompt {
        let mut corrected = self.correct_content(recall, model, estimate);
        let resolved = &recall.resolved;
        let earlier = if estimate.reads_references { resolved.earlier_reasoning } else { 0 };
        corrected.tokens = corrected.tokens.saturating_add(resolved.tokens).saturating_add(earlier);
        corrected.unseen = corrected.unseen.saturating_sub(resolved.references);
        if resolved.has_any || earlier > 0 {
            corrected.source = EstimateSource::Conversation;
        }
        corrected
    }

    /// Corrects the estimate of the content that the request itself has.
    fn correct_content(&self, recall: &Recall, model: &str, estimate: &PromptEstimate) -> CorrectedPrompt {
        if let Some(known) = &recall.known {
            let tokens = known.reported.continued(estimate, recall, estimate.unseen > known.new_references);
            return CorrectedPrompt {
                tokens: recall.urls.apply(tokens),
                source: EstimateSource::Conversation,
                unseen: known.new_references,
            };
        }
        let counted = recall.urls.apply(estimate.tokens());
        let correction = self.calibrations.correction(recall.scope.upstream, model, estimate.kind);
        let calibrated = correction.apply(counted);
        let (tokens, source) = match recall.setup.and_then(|setup| setup.apply(counted, calibrated)) {
            Some(tokens) => (tokens, EstimateSource::Setup),
            None if correction.is_default() => (counted, EstimateSource::Rules),
            None => (calibrated, EstimateSource::Calibration),
        };
        CorrectedPrompt { tokens, source, unseen: estimate.unseen }
    }

    /// Prepares to learn from the answer to a request.
    pub(crate) fn update(
        self: &Arc<Self>,
        recall: Recall,
        model: String,
        estimate: PromptEstimate,
        completions: u64,
    ) -> EstimateUpdate {
        EstimateUpdate {
            learned: self.clone(),
            recall,
            model,
            estimate,
            has_one_completion: completions == 1,
        }
    }

    /// Learns the reported tokens of a request.
    pub fn learn(&self, recall: &Recall, model: &str, estimate: &PromptEstimate, answer: ReportedAnswer) {
        let counted = estimate.tokens();
        if estimate.is_rough || counted == 0 {
            return;
        }
        let predicted = self.correct_content(recall, model, estimate).tokens;
        if !estimate.is_partial && !recall.resolved.has_any {
            self.learn_image_urls(&recall.urls, predicted, answer.prompt);
        }
        if let Some(key) = recall.whole_key
            && let Some(prefix) = ReportedPrefix::new(estimate, answer)
        {
            self.table.update(key, |_| prefix.into());
        }
        // The next prompt with the same set-up can refer to other content.
        if estimate.is_partial {
            return;
        }
        let counted = recall.urls.apply(counted);
        if let Some(key) = recall.setup_key {
            self.table.update(key, |before| {
                SetupOffset::after(before.map(SetupOffset::from), counted, answer.prompt).into()
            });
        }
        self.calibrations.learn(recall.scope.upstream, model, estimate.kind, counted, answer.prompt);
    }
}

/// The reported tokens of a complete answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReportedAnswer {
    /// Tokens that the model read.
    pub prompt: u64,
    /// Tokens of the completion without its reasoning; 0: not reported.
    pub completion: u64,
    /// Tokens of the answer's reasoning.
    pub reasoning: u64,
}

impl EstimateUpdate {
    /// Learns the reported tokens of a complete answer.
    pub(crate) fn apply(self, prompt: u64, reported: &Reported, ids: impl FnOnce() -> Option<AnswerIds>) {
        let completion = reported.visible_completion().filter(|_| self.has_one_completion).unwrap_or(0);
        let reasoning = if completion > 0 { reported.reasoning() } else { 0 };
        if self.recall.api == Api::Responses
            && let Some(ids) = ids()
        {
            self.learned.learn_ids(self.recall.scope, &self.estimate, reported, &ids);
        }
        let answer = ReportedAnswer { prompt, completion, reasoning };
        self.learned.learn(&self.recall, &self.model, &self.estimate, answer);
    }
}

/// What an entry of the table holds.
#[derive(Clone, Copy, Debug)]
enum EntryKind {
    /// A `ReportedPrefix`.
    Prefix,
    /// A `SetupOffset`.
    Setup(RequestKind),
}

impl EntryKind {
    fn number(self) -> u64 {
        match self {
            Self::Prefix => 0,
            Self::Setup(kind) => 1 + kind as u64,
        }
    }
}

impl ReportedPrefix {
    /// `None`: a number is too large.
    fn new(estimate: &PromptEstimate, answer: ReportedAnswer) -> Option<Self> {
        let number = |n: u64| u32::try_from(n).ok();
        Some(Self {
            reported: number(answer.prompt)?,
            estimated: number(estimate.tokens())?,
            message_texts: number(estimate.message_texts)?,
            completion: number(answer.completion)?,
            reasoning: number(answer.reasoning)?,
        })
    }

    /// The tokens of a prompt that begins with this prefix: the reported number, and the difference of the estimates.
    ///
    /// If the known part refers to content outside the request (`has_references`), the estimate says nothing about its
    /// size, and the result has no upper bound.
    fn continued(&self, estimate: &PromptEstimate, recall: &Recall, has_references: bool) -> u64 {
        let counted = estimate.tokens();
        let base = i128::from(self.reported) - i128::from(self.estimated);
        // Reasoning that was found by its id is counted there.
        let reasoning = if recall.resolved.has_reasoning { 0 } else { self.reasoning_correction(estimate) };
        let corrections = [self.echo_correction(estimate.echo), reasoning];
        let tokens = i128::from(counted) + base + corrections.map(i128::from).iter().sum::<i128>();
        let tokens = u64::try_from(tokens.max(0)).unwrap_or(u64::MAX);
        if has_references { tokens.max(counted) } else { bounded(tokens, counted) }
    }

    /// The error in the count of the answer's reasoning, if the model reads it again. Another answer to the same
    /// request has reasoning of another size.
    fn reasoning_correction(&self, estimate: &PromptEstimate) -> i64 {
        let counted = estimate.echo_thinking;
        let error = i64::from(self.reasoning) - i64::try_from(counted).unwrap_or(i64::MAX);
        let is_exact = !self.reasoning.is_multiple_of(REASONING_STEP);
        let is_answer = counted > 0 && is_exact && error.unsigned_abs() * 2 <= u64::from(self.reasoning);
        if is_answer || estimate.recalls_reasoning { error } else { 0 }
    }

    /// The error in the count of the answer's text, which the new request repeats. The answer is recognised by its
    /// size. The reported completion of a short answer is mostly format.
    fn echo_correction(&self, counted: u64) -> i64 {
        let completion = u64::from(self.completion);
        let error = i64::from(self.completion) - i64::try_from(counted).unwrap_or(i64::MAX);
        let is_answer = completion >= MIN_ECHO && error.unsigned_abs() * MAX_ECHO_ERROR <= completion;
        if is_answer { error } else { 0 }
    }
}

impl From<Numbers> for ReportedPrefix {
    fn from([reported, estimated, message_texts, completion, reasoning]: Numbers) -> Self {
        Self { reported, estimated, message_texts, completion, reasoning }
    }
}

impl From<ReportedPrefix> for Numbers {
    fn from(prefix: ReportedPrefix) -> Self {
        [prefix.reported, prefix.estimated, prefix.message_texts, prefix.completion, prefix.reasoning]
    }
}

impl SetupOffset {
    fn after(earlier: Option<Self>, counted: u64, reported: u64) -> Self {
        let offset = i128::from(reported) - i128::from(counted);
        let offset = i32::try_from(offset).unwrap_or(if offset < 0 { i32::MIN } else { i32::MAX });
        Self {
            last: offset,
            before: earlier.map_or(offset, |earlier| earlier.last),
            answers: earlier.map_or(0, |earlier| earlier.answers).saturating_add(1),
            reported: u32::try_from(reported).unwrap_or(u32::MAX),
        }
    }

    /// The estimate with the offset: in full if two answers agree, and half of it after one answer.
    ///
    /// `None`: the offset is not an effect of the set-up, because it changes between answers, or because it was learned
    /// from a far larger prompt.
    fn apply(self, counted: u64, calibrated: u64) -> Option<u64> {
        let reported = u64::from(self.reported);
        let difference = u64::from(self.last.abs_diff(self.before));
        let agree = difference * 100 <= reported.min(counted) * AGREEMENT_PERCENT;
        if !agree || counted.saturating_mul(2) < reported {
            return None;
        }
        let offset = counted.saturating_add_signed(i64::from(self.last));
        let tokens = if self.answers > 1 { offset } else { u64::midpoint(offset, calibrated) };
        Some(bounded(tokens, counted))
    }
}

#[allow(clippy::cast_sign_loss, clippy::cast_possible_wrap)] // the bits of a number
impl From<Numbers> for SetupOffset {
    fn from([last, before, answers, reported, _]: Numbers) -> Self {
        Self { last: last as i32, before: before as i32, answers, reported }
    }
}

#[allow(clippy::cast_sign_loss)] // the bits of a number
impl From<SetupOffset> for Numbers {
    fn from(setup: SetupOffset) -> Self {
        [setup.last as u32, setup.before as u32, setup.answers, setup.reported, 0]
    }
}

#[cfg(test)]
mod tests;
