//! Streams: what they have used so far, and reservations that they outgrow.

use super::{Local, MIN_EXTENSION};
use crate::clock::Timestamp;
use crate::ledger::demand::{Grant, Progress};
use crate::quota::{Amounts, Receipt};

impl Local {
    /// Moves amounts that a request has certainly used from held to spent.
    ///
    /// A stream that outgrows its reservation gets an extension while there is room. Beyond that, its tokens become debt now
    /// and not only when it ends: other requests see the debt, and it survives a crash.
    pub fn progress(&mut self, now: Timestamp, model: &str, grant: &mut Grant, spent: Amounts) -> Progress {
        self.progress_at(now, model, grant, spent, None)
    }

    /// Like `progress`, in the quotas of the environment and of the upstream together.
    pub fn progress_at(
        &mut self,
        now: Timestamp,
        model: &str,
        grant: &mut Grant,
        spent: Amounts,
        mut upstream: Option<(&mut Self, &mut Grant)>,
    ) -> Progress {
        let of_upstream = upstream.as_mut().map(|(counters, grant)| (&mut **counters, &mut **grant));
        let outcome = self.extend_if_outgrown(now, model, grant, spent, of_upstream);
        self.mark_spent(now, grant, spent);
        if let Some((counters, grant)) = upstream {
            counters.mark_spent(now, grant, spent);
        }
        outcome
    }

    /// The part of `progress_at` that extends the reservation of a stream that has outgrown it.
    pub(in crate::ledger) fn extend_if_outgrown(
        &mut self,
        now: Timestamp,
        model: &str,
        grant: &mut Grant,
        spent: Amounts,
        upstream: Option<(&mut Self, &mut Grant)>,
    ) -> Progress {
        let mut outcome = Progress::Within;
        if spent.completion > grant.reserved.completion && self.is_reserving() {
            self.learn_partial(model, grant, spent.completion);
            let missing = spent.completion - grant.reserved.completion;
            outcome = self.extend(now, grant, missing, upstream);
            // Debt grows in steps too, and so does an answer that is longer than its request allows. Otherwise every event
            // of a stream would call this function.
            let is_beyond_cap = grant.reserved.completion > grant.cap;
            let step = if outcome != Progress::Within || is_beyond_cap { MIN_EXTENSION } else { 0 };
            grant.progress_threshold = grant.reserved.completion.saturating_add(step);
        }
        outcome
    }

    /// Moves amounts of a grant from held to spent.
    pub(in crate::ledger) fn mark_spent(&mut self, now: Timestamp, grant: &mut Grant, spent: Amounts) {
        grant.mark_receipts(spent, |receipt, left| self.quotas.progress(now, receipt, left));
    }

    /// Reserves a full extension, or only the missing tokens, or takes the missing tokens as debt: in all quotas of the
    /// environment and of the upstream, or in none.
    fn extend(
        &mut self,
        now: Timestamp,
        grant: &mut Grant,
        missing: u64,
        mut upstream: Option<(&mut Self, &mut Grant)>,
    ) -> Progress {
        let Some(first) = grant.receipts.first() else { return Progress::Within };
        let more = |tokens| Amounts { completion: tokens, total: tokens, ..Amounts::default() };
        // An answer does not become longer than its request allows.
        let full = grant.extension.min(grant.cap.saturating_sub(grant.reserved.completion)).max(missing);
        let steps = if full > missing { &[full, missing][..] } else { &[missing][..] };
        let fitting = steps.iter().find_map(|&tokens| {
            let may_extend = match &mut upstream {
                Some((counters, grant)) => counters.can_extend(now, grant, more(tokens)),
                None => true,
            };
            let extended = if may_extend { self.quotas.extend(now, first, more(tokens)) } else { None };
            Some((tokens, extended?))
        });
        let outcome = if fitting.is_some() {
            Progress::Within
        } else {
            // The quotas of the upstream hold in shadow mode too.
            let is_upstream_short = match &mut upstream {
                Some((counters, grant)) => !counters.can_extend(now, grant, more(missing)),
                None => false,
            };
            if self.rules.enforce || is_upstream_short {
                Progress::Overrun
            } else {
                Progress::OverrunInShadow
            }
        };
        let (tokens, receipt) =
            fitting.unwrap_or_else(|| (missing, self.quotas.extend_unchecked(now, first, more(missing))));
        if let Some((counters, grant)) = upstream
            && let Some(first) = grant.receipts.first()
        {
            let receipt = counters.quotas.extend_unchecked(now, first, more(tokens));
            counters.add_extension(grant, receipt, more(tokens));
        }
        self.add_extension(grant, receipt, more(tokens));
        outcome
    }

    fn add_extension(&mut self, grant: &mut Grant, receipt: Receipt, more: Amounts) {
        grant.reserved = grant.reserved.saturating_add(more);
        self.held = self.held.saturating_add(more);
        let separate = match grant.receipts.last_mut() {
            Some(last) => last.merge(receipt),
            None => Some(receipt),
        };
        grant.receipts.extend(separate);
    }

    fn learn_partial(&mut self, model: &str, grant: &mut Grant, tokens: u64) {
        if let Some(before) = grant.partial_length.take() {
            self.lengths.forget_partial(model, before);
        }
        grant.partial_length = self.lengths.learn_partial(model, tokens.div_ceil(grant.completions));
    }
}
