//! Settles the charge for an answer that has ended. Delivered text that the upstream did not report is counted first.

use super::charge::Charge;
use super::reader::AnswerReader;
use crate::config::Environment;
use crate::estimate::{Encoding, Tokenizer};
use crate::ledger::Reservation;
use crate::quota::Amounts;
use crate::usage::{OwnFigures, Reported, TextToCount};
use std::pin::Pin;
use std::sync::Arc;

/// Text is extracted from up to this many bytes on the event loop, in some 20 microseconds.
const MAX_INLINE_BYTES: usize = 8 * 1024;
/// More text than this is counted on the blocking pool.
const MAX_INLINE_TEXT: usize = 2 * 1024;
/// The same for vocabularies from files, which are slower.
const MAX_INLINE_TEXT_FROM_FILE: usize = 128;
/// Text with a longer run without white space is counted on the blocking pool, because such text is slow to count.
const MAX_INLINE_RUN: usize = 256;

/// Resolves when a settled charge is durable.
pub(super) type WhenDurable = Pin<Box<dyn Future<Output = ()> + Send>>;

/// The pending settlement of an answer that has ended.
///
/// Dropping it counts and settles on the current thread. It is normally moved to the blocking pool if counting takes
/// long. When the gateway stops and the pool refuses the work, the drop still settles, so every delivered token is
/// charged.
pub(super) struct AnswerSettlement {
    charge: Option<Charge>,
    facts: SettlementFacts,
    unreported: Unreported,
}

/// The facts about an answer before its text is counted.
pub(super) struct SettlementFacts {
    pub(super) environment: Arc<Environment>,
    pub(super) reported: Reported,
    /// The gateway's own figures. The count is added later.
    pub(super) own: OwnFigures,
    pub(super) is_success: bool,
    /// Whether an upstream should report usage in this answer.
    pub(super) expects_usage: bool,
    /// Whether the answer is compressed and could not be decompressed.
    pub(super) is_unreadable: bool,
    pub(super) tokenizer: Option<Tokenizer>,
}

/// Delivered content whose tokens the upstream did not report.
pub(super) enum Unreported {
    Nothing,
    /// The content as it was buffered.
    Raw {
        /// Boxed, because most upstreams report.
        reader: Box<AnswerReader>,
        was_cut: bool,
    },
    Texts(TextToCount),
}

impl AnswerSettlement {
    pub(super) fn new(charge: Charge, facts: SettlementFacts, unreported: Unreported) -> Self {
        Self { charge: Some(charge), facts, unreported }
    }

    /// Whether settling is quick enough for an event loop. Extracts the text if there is little of it.
    pub(super) fn is_quick(&mut self) -> bool {
        let Some(tokenizer) = self.facts.tokenizer else { return self.unreported.extract_if_small() };
        let max_text = match tokenizer.encoding {
            Encoding::File(_) => MAX_INLINE_TEXT_FROM_FILE,
            Encoding::O200k | Encoding::Cl100k => MAX_INLINE_TEXT,
        };
        self.unreported.extract_if_small() && self.unreported.is_short(max_text)
    }

    /// Counts and settles. The last bytes of the answer must not be passed on before the returned future resolves.
    pub(super) fn settle(mut self) -> Option<WhenDurable> {
        self.finish()
    }

    fn finish(&mut self) -> Option<WhenDurable> {
        // Settled already.
        self.charge.as_ref()?;
        // Taken out first: if counting panics, the drop that follows charges the reported and estimated tokens.
        let texts = std::mem::replace(&mut self.unreported, Unreported::Nothing).into_texts();
        self.facts.own.completion = count(self.facts.tokenizer, &texts);
        let mut charge = self.charge.take()?;
        let SettlementFacts { reported, own, is_success, .. } = &self.facts;
        charge.observe(if *is_success || reported.has_any() {
            reported.amounts(own)
        } else {
            Amounts { requests: 1, ..Amounts::default() }
        });
        self.facts.record_missing_usage(&charge);
        let when_durable = charge.reservation.take().and_then(Reservation::settle)?;
        Some(Box::pin(when_durable))
    }
}

impl SettlementFacts {
    /// Counts in metrics an answer whose usage is missing or not credible.
    fn record_missing_usage(&self, charge: &Charge) {
        let Self { environment, reported, own, expects_usage, is_unreadable, .. } = self;
        if charge.reservation.is_none() {
            return;
        }
        let metrics = charge.record.metrics();
        if reported.has_incredible() || reported.has_false_zero(own) {
            metrics.usage_missing(&environment.name, "not_credible");
            tracing::warn!(
                upstream = charge.record.upstream.as_ref().map(|upstream| upstream.name.as_str()),
                "the upstream reported usage that is not credible; the gateway charges its own count for those fields"
            );
        } else if *expects_usage && (reported.completion().is_none() || reported.is_outgrown(own)) {
            let reason = if *is_unreadable { "not_readable" } else { "not_reported" };
            metrics.usage_missing(&environment.name, reason);
        }
    }
}

impl Drop for AnswerSettlement {
    fn drop(&mut self) {
        drop(self.finish());
    }
}

impl Unreported {
    /// Extracts the texts if they are in few bytes. Returns whether they are extracted.
    fn extract_if_small(&mut self) -> bool {
        if let Self::Raw { reader, .. } = self {
            if reader.buffered_bytes() > MAX_INLINE_BYTES {
                return false;
            }
            *self = Self::Texts(std::mem::replace(self, Self::Nothing).into_texts());
        }
        true
    }

    fn is_short(&self, max_text: usize) -> bool {
        let Self::Texts(texts) = self else { return true };
        let runs = |text: &String| text.split_ascii_whitespace().all(|run| run.len() <= MAX_INLINE_RUN);
        texts.bytes() <= max_text && texts.texts.iter().all(runs)
    }

    fn into_texts(self) -> TextToCount {
        match self {
            Self::Nothing => TextToCount::default(),
            Self::Raw { mut reader, was_cut } => reader.take_text(was_cut),
            Self::Texts(texts) => texts,
        }
    }
}

fn count(tokenizer: Option<Tokenizer>, texts: &TextToCount) -> u64 {
    let counted: u64 = tokenizer.map_or(0, |t| t.count_all(texts.texts.iter().map(String::as_str)));
    counted + texts.known_tokens
}

#[cfg(test)]
mod tests {
    use super::super::reader::AnswerFacts;
    use super::*;
    use bytes::Bytes;
    use http::header::{CONTENT_TYPE, HeaderMap, HeaderValue};
    use std::collections::VecDeque;

    /// An answer with this text, as JSON or as a stream, without reported usage.
    fn answer(text: &str, streams: bool) -> Unreported {
        let kind = if streams { "text/event-stream" } else { "application/json" };
        let headers = HeaderMap::from_iter([(CONTENT_TYPE, HeaderValue::from_static(kind))]);
        let facts = AnswerFacts { choices: 1, is_success: true, is_of_model: true, ..AnswerFacts::default() };
        let mut reader = AnswerReader::new(&headers, facts);
        let json = format!(r#"{{"choices":[{{"delta":{{"content":"{text}"}}}}]}}"#);
        let body = if streams { format!("data: {json}\n\n") } else { json };
        reader.feed(Bytes::from(body), &mut VecDeque::new());
        Unreported::Raw { reader: Box::new(reader), was_cut: false }
    }

    #[test]
    fn only_short_ordinary_text_is_counted_on_the_event_loop() {
        for streams in [false, true] {
            for (text, is_quick) in [
                (String::new(), true),
                ("word ".repeat(400), true),
                ("word ".repeat(500), false),
                ("word ".repeat(200_000), false),
                ("-".repeat(MAX_INLINE_RUN), true),
                ("-".repeat(MAX_INLINE_RUN + 1), false),
            ] {
                let mut unreported = answer(&text, streams);
                let quick = unreported.extract_if_small() && unreported.is_short(MAX_INLINE_TEXT);
                assert_eq!(quick, is_quick, "{} bytes, streams: {streams}", text.len());
                // Larger content is not even parsed on the event loop.
                assert_eq!(matches!(unreported, Unreported::Raw { .. }), text.len() > MAX_INLINE_BYTES);
                assert_eq!(unreported.into_texts().texts.concat(), text);
            }
        }
    }
}
