//! An answer that has ended: what came of it is counted where the upstream did not report it, and then
//! the reservation settles.

use super::Charge;
use super::metered::Kept;
use super::reader::Reader;
use crate::estimate::{Encoding, Tokenizer};
use crate::ledger::Reservation;
use crate::quota::Amounts;
use crate::usage::{Reported, Texts};

/// What came is looked into where it arrived if it is no more than this: some 20 microseconds.
const INLINE_BYTES: usize = 8 * 1024;
/// More text than this is counted on a thread for such work.
const INLINE_TEXT: usize = 2 * 1024;
/// Vocabularies from files count more slowly.
const INLINE_TEXT_BY_FILE: usize = 128;
/// So is text with longer stretches without a space.
const LONGEST_INLINE_RUN: usize = 256;

/// What an answer costs, as far as that is known without counting. It is counted and settled where it is
/// dropped: on a thread for such work or, where there is none any more because the gateway stops, on the
/// spot. So nothing that was received is ever left out.
pub(super) struct Unsettled {
    charge: Option<Charge>,
    reported: Reported,
    estimated_prompt: u64,
    is_success: bool,
    tokenizer: Option<Tokenizer>,
    uncounted: Uncounted,
}

/// What came and was not reported.
// It lives for one call: a box would only be made to be taken apart.
#[allow(clippy::large_enum_variant)]
pub(super) enum Uncounted {
    Nothing,
    /// What has been kept of an answer, and whether that was cut off in the middle.
    Raw(Reader, bool),
    Texts(Texts),
}

impl Unsettled {
    /// `estimated_prompt`, if the answer is a success; any other costs no more than it reports.
    pub(super) fn new(
        charge: Charge,
        reported: Reported,
        estimated_prompt: Option<u64>,
        tokenizer: Option<Tokenizer>,
        uncounted: Uncounted,
    ) -> Self {
        let is_success = estimated_prompt.is_some();
        let estimated_prompt = estimated_prompt.unwrap_or(0);
        Self { charge: Some(charge), reported, estimated_prompt, is_success, tokenizer, uncounted }
    }

    /// Whether settling takes no longer than an event loop may be held up.
    pub(super) fn is_quick(&mut self) -> bool {
        let Some(tokenizer) = self.tokenizer else { return self.uncounted.look_into() };
        let most = match tokenizer.encoding {
            Encoding::File(_) => INLINE_TEXT_BY_FILE,
            Encoding::O200k | Encoding::Cl100k => INLINE_TEXT,
        };
        self.uncounted.look_into() && self.uncounted.is_short(most)
    }

    /// Counts and settles. What is returned has to be waited for before the last bytes are passed on.
    pub(super) fn settle(mut self) -> Option<Kept> {
        self.finish()
    }

    fn finish(&mut self) -> Option<Kept> {
        // Taken first: should counting panic, what was reported and estimated is charged. Where all is reported
        // there is nothing left to be counted.
        let texts = std::mem::replace(&mut self.uncounted, Uncounted::Nothing).into_texts();
        let counted = count(self.tokenizer, &texts);
        let mut charge = self.charge.take()?;
        charge.observe(if self.is_success || self.reported.is_any() {
            self.reported.amounts_and_since(self.estimated_prompt, counted)
        } else {
            Amounts { requests: 1, ..Amounts::default() }
        });
        let kept = charge.reservation.take().and_then(Reservation::settle)?;
        Some(Box::pin(kept))
    }
}

impl Drop for Unsettled {
    fn drop(&mut self) {
        drop(self.finish());
    }
}

impl Uncounted {
    /// Takes the texts out of what was kept, if that is little. Whether it was.
    fn look_into(&mut self) -> bool {
        if let Self::Raw(reader, _) = self {
            if reader.kept_bytes() > INLINE_BYTES {
                return false;
            }
            *self = Self::Texts(std::mem::replace(self, Self::Nothing).into_texts());
        }
        true
    }

    fn is_short(&self, most: usize) -> bool {
        let Self::Texts(texts) = self else { return true };
        let runs = |text: &String| text.split_ascii_whitespace().all(|run| run.len() <= LONGEST_INLINE_RUN);
        texts.bytes() <= most && texts.texts.iter().all(runs)
    }

    fn into_texts(self) -> Texts {
        match self {
            Self::Nothing => Texts::default(),
            Self::Raw(mut reader, was_cut) => reader.take_texts(was_cut),
            Self::Texts(texts) => texts,
        }
    }
}

fn count(tokenizer: Option<Tokenizer>, texts: &Texts) -> u64 {
    let counted: u64 = tokenizer.map_or(0, |t| t.count_all(texts.texts.iter().map(String::as_str)));
    counted + texts.tokens
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use http::header::{CONTENT_TYPE, HeaderMap, HeaderValue};
    use std::collections::VecDeque;

    /// An answer with this text, as JSON or as a stream, of which nothing was reported.
    fn answer(text: &str, streams: bool) -> Uncounted {
        let kind = if streams { "text/event-stream" } else { "application/json" };
        let headers = HeaderMap::from_iter([(CONTENT_TYPE, HeaderValue::from_static(kind))]);
        let mut reader = Reader::of(&headers, false);
        let json = format!(r#"{{"choices":[{{"delta":{{"content":"{text}"}}}}]}}"#);
        let body = if streams { format!("data: {json}\n\n") } else { json };
        reader.feed(Bytes::from(body), &mut VecDeque::new());
        Uncounted::Raw(reader, false)
    }

    #[test]
    fn only_little_and_ordinary_text_is_counted_on_an_event_loop() {
        for streams in [false, true] {
            for (text, is_quick) in [
                (String::new(), true),
                ("word ".repeat(400), true),
                ("word ".repeat(500), false),
                ("word ".repeat(200_000), false),
                ("-".repeat(LONGEST_INLINE_RUN), true),
                ("-".repeat(LONGEST_INLINE_RUN + 1), false),
            ] {
                let mut uncounted = answer(&text, streams);
                let quick = uncounted.look_into() && uncounted.is_short(INLINE_TEXT);
                assert_eq!(quick, is_quick, "{} bytes, streams: {streams}", text.len());
                // What is more is not even looked into here.
                assert_eq!(matches!(uncounted, Uncounted::Raw(..)), text.len() > INLINE_BYTES);
                assert_eq!(uncounted.into_texts().texts.concat(), text);
            }
        }
    }
}
