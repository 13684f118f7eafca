//! The body of an upstream's answer. It passes the bytes on as they arrive, reads usage from them, and holds the
//! reservation until the answer's cost is known.

use super::charge::Charge;
use super::reader::{AnswerFacts, AnswerReader};
use super::route::Endpoint;
use super::settlement::{AnswerSettlement, SettlementFacts, Unreported, WhenDurable};
use crate::api::Dialect;
use crate::clock::Stopwatch;
use crate::config::{Environment, OnDisconnect, OnOverrun, Timeouts, UpstreamSettings};
use crate::error::ProxyError;
use crate::estimate::Tokenizer;
use crate::learned::EstimateUpdate;
use crate::ledger::Progress;
use crate::server::Peer;
use crate::telemetry::RequestOutcome;
use crate::timer::ReusedTimer;
use crate::upstream::Incoming;
use crate::usage::{OwnFigures, Reported};
use bytes::Bytes;
use http::StatusCode;
use http::header::{self, HeaderMap};
use hyper::body::{Body, Frame, SizeHint};
use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::task::{JoinHandle, spawn_blocking};

/// How often the tokens that a stream has delivered move from held to used.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);

/// Facts about the request and its answer that metering depends on.
#[derive(Debug)]
pub(super) struct MeterContext {
    /// Charged for the prompt if the upstream does not report it.
    pub(super) estimated_prompt: u64,
    /// Whether the prompt has content, so that a report of 0 prompt tokens is not credible.
    pub(super) has_prompt: bool,
    /// The number of completions requested.
    pub(super) completions: u64,
    pub(super) tokenizer: Option<Tokenizer>,
    /// The gateway requested usage where the caller did not, so the usage chunk is withheld.
    pub(super) withholds_usage: bool,
    /// Whether the body is known to begin as an event stream, whatever its label.
    pub(super) begins_as_stream: bool,
    /// Learns from the reported usage.
    pub(super) estimate_update: Option<EstimateUpdate>,
    pub(super) status: StatusCode,
    pub(super) endpoint: Endpoint,
    /// Runs since the request was sent. `timeouts.total` counts from then.
    pub(super) started: Stopwatch,
    pub(super) environment: Arc<Environment>,
    /// The upstream that answers.
    pub(super) upstream: Arc<UpstreamSettings>,
    pub(super) peer: Arc<Peer>,
}

/// The body of an upstream's answer on its way to the caller.
pub(super) struct Metered {
    incoming: Incoming,
    reader: AnswerReader,
    /// Pieces that have been read and not yet passed on.
    ready: VecDeque<Bytes>,
    /// Bytes still to pass on, if the length of the answer is known.
    bytes_to_send: Option<u64>,
    /// Bytes still to receive, if the length of the answer is known.
    bytes_to_receive: Option<u64>,
    context: MeterContext,
    phase: MeterPhase,
    /// The count of a portion of a long stream, which runs on the blocking pool while the stream continues.
    portion_count: Option<JoinHandle<u64>>,
    last_data: Stopwatch,
    timeout: ReusedTimer,
    last_progress: Stopwatch,
    /// Whether the first token of the stream has arrived.
    has_first_token: bool,
    /// Whether progress was reported to the ledger at the beginning of the stream.
    has_begun: bool,
    /// The most completion tokens that the request allows.
    completion_cap: u64,
    /// Beyond this number of completion tokens, progress is reported to the ledger at once.
    progress_threshold: u64,
    /// The caller has disconnected, and the answer is drained for its usage.
    is_draining: bool,
}

// Nearly always `Passing`, and the enclosing struct is boxed.
#[allow(clippy::large_enum_variant)]
enum MeterPhase {
    /// Bytes are arriving. The charge is not settled.
    Passing(Charge),
    /// The answer has ended, and is counted and settled on the blocking pool.
    Counting(JoinHandle<Option<WhenDurable>>, Ending),
    /// Settled for more than was reserved. The last bytes wait until the charge is durable.
    AwaitingDurability(WhenDurable, Ending),
    /// Settled. The pieces in `ready` are not passed on yet.
    Settled(Ending),
}

/// How the caller's body ends after the last bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ending {
    Complete,
    /// The server writes the last bytes to the socket, then aborts the connection.
    FlushAndAbort,
    Abort,
}

/// Why an answer is incomplete.
enum Interruption {
    Disconnected,
    /// The setting below `timeouts`, and its value.
    Timeout(&'static str, Duration),
    ShuttingDown,
}

impl Metered {
    /// `headers` are those of the upstream's answer.
    pub(super) fn new(
        incoming: Incoming,
        headers: &HeaderMap,
        context: MeterContext,
        charge: Charge,
    ) -> Box<Self> {
        let is_success = context.status.is_success();
        let facts = AnswerFacts {
            withholds: context.withholds_usage,
            choices: context.completions,
            is_success,
            begins_as_stream: context.begins_as_stream,
            is_of_model: matches!(context.endpoint, Endpoint::Counted(_) | Endpoint::Uncounted(_)),
        };
        let reader = AnswerReader::new(headers, facts);
        let length = headers.get(header::CONTENT_LENGTH).and_then(|l| l.to_str().ok()?.parse().ok());
        let length = length.filter(|_| reader.has_fixed_length());
        let now = Stopwatch::start();
        let limits = charge.reservation.as_ref().map(|held| (held.cap(), held.progress_threshold()));
        let (completion_cap, progress_threshold) = limits.unwrap_or((u64::MAX, u64::MAX));
        // Boxed here, so that it is not copied from function to function.
        let mut metered = Box::new(Self {
            incoming,
            bytes_to_send: length,
            bytes_to_receive: length,
            reader,
            ready: VecDeque::new(),
            context,
            phase: MeterPhase::Passing(charge),
            portion_count: None,
            last_data: now,
            timeout: ReusedTimer::default(),
            last_progress: now,
            has_first_token: false,
            has_begun: false,
            completion_cap,
            progress_threshold,
            is_draining: false,
        });
        if is_success && metered.reader.is_labelled_as_stream() && metered.context.endpoint.generates() {
            // The model has begun, so the prompt is spent.
            metered.progress();
        }
        metered
    }

    /// Whether the caller is promised the length of the body that the upstream declares. Otherwise the gateway may
    /// withhold or add events.
    pub(super) fn has_fixed_length(&self) -> bool {
        self.reader.has_fixed_length()
    }

    /// Whether the body of the answer is empty. The server never polls an empty body.
    pub(super) fn is_empty(&self) -> bool {
        self.is_whole()
    }

    /// Whether the whole body has arrived, as far as is known without polling.
    fn is_whole(&self) -> bool {
        self.incoming.is_end() || self.bytes_to_receive == Some(0)
    }

    /// Settles an answer with an empty body. The answer must not be passed on before the returned future resolves.
    pub(super) fn settle_empty(&mut self) -> Option<WhenDurable> {
        self.complete();
        match std::mem::replace(&mut self.phase, MeterPhase::Settled(Ending::Complete)) {
            MeterPhase::AwaitingDurability(when_durable, _) => Some(when_durable),
            MeterPhase::Passing(_) | MeterPhase::Counting(..) | MeterPhase::Settled(_) => None,
        }
    }

    fn poll_passing(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.context.peer.is_cut_off() {
            self.interrupt(&Interruption::ShuttingDown);
            return Poll::Ready(());
        }
        ready!(self.poll_portion_count(cx));
        match self.incoming.poll_data(cx) {
            Poll::Ready(Some(Ok(data))) => {
                self.last_data = Stopwatch::start();
                self.bytes_to_receive =
                    self.bytes_to_receive.map(|bytes| bytes.saturating_sub(data.len() as u64));
                self.reader.feed(data, &mut self.ready);
                if !self.has_first_token {
                    self.record_first_token();
                }
                let total = self.context.upstream.timeouts.total;
                if self.is_whole() {
                    self.complete();
                } else if self.last_data.since(self.context.started) >= total {
                    // The timer is not polled while bytes arrive without a pause.
                    self.interrupt(&Interruption::Timeout("total", total));
                } else if self.progress_is_due() && self.progress() == Progress::Overrun {
                    self.overrun();
                }
            }
            Poll::Ready(None) => self.complete(),
            Poll::Ready(Some(Err(error))) => {
                tracing::debug!(%error, upstream = self.context.upstream.name, "the upstream broke off its answer");
                self.interrupt(&Interruption::Disconnected);
            }
            Poll::Pending => {
                let interruption = ready!(self.poll_timeout(cx));
                self.interrupt(&interruption);
            }
        }
        Poll::Ready(())
    }

    /// Counts a long stream in portions on the blocking pool, so that little of its text is buffered. It counts one
    /// portion at a time. While a portion is being counted and the next one is complete, this returns `Pending`, and
    /// the caller of this function reads no more from the upstream.
    fn poll_portion_count(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(reader) = self.reader.events_mut() else { return Poll::Ready(()) };
        loop {
            if let Some(count) = &mut self.portion_count {
                match Pin::new(count).poll(cx) {
                    Poll::Ready(counted) => reader.portion_counted(counted.ok()),
                    Poll::Pending if reader.has_portion() => return Poll::Pending,
                    Poll::Pending => return Poll::Ready(()),
                }
                self.portion_count = None;
            }
            let Some(texts) = reader.take_portion() else { return Poll::Ready(()) };
            let counts = self.context.status.is_success() && self.context.endpoint.generates();
            match self.context.tokenizer.filter(|_| counts) {
                Some(tokenizer) => {
                    let count = move || tokenizer.count_all(texts.iter().map(String::as_str));
                    self.portion_count = Some(spawn_blocking(count));
                }
                // Errors and endpoints that generate nothing are not charged for completion tokens.
                None => reader.portion_counted(Some(0)),
            }
        }
    }

    /// Records when the first token of a stream has arrived.
    fn record_first_token(&mut self) {
        let Some(events) = self.reader.events() else { return };
        let MeterPhase::Passing(charge) = &mut self.phase else { return };
        if events.tokens_so_far(self.completion_cap) > 0 {
            self.has_first_token = true;
            charge.record.first_token = Some(self.last_data.since(charge.record.started()));
        }
    }

    fn progress_is_due(&self) -> bool {
        let Some(reader) = self.reader.events() else { return false };
        self.context.endpoint.generates()
            && (!self.has_begun
                || reader.tokens_so_far(self.completion_cap) > self.progress_threshold
                || self.last_data.since(self.last_progress) >= PROGRESS_INTERVAL)
    }

    /// Moves delivered tokens from held to used, and extends the reservation of a stream that outgrows it.
    fn progress(&mut self) -> Progress {
        self.last_progress = self.last_data;
        self.has_begun = true;
        let MeterPhase::Passing(charge) = &mut self.phase else { return Progress::Within };
        let tokens = self.reader.events().map_or(0, |events| events.tokens_so_far(self.completion_cap));
        let spent = self.reader.reported().amounts_so_far(self.context.estimated_prompt, tokens);
        let Some(reservation) = &mut charge.reservation else { return Progress::Within };
        let progress = reservation.progress(spent);
        self.progress_threshold = reservation.progress_threshold();
        progress
    }

    /// Applies `on_overrun`: the stream continues and its excess becomes debt, or it ends here with
    /// `finish_reason: "length"`. A compressed stream is aborted, because no event can be added to it.
    fn overrun(&mut self) {
        let on_overrun = self.context.environment.reserve.on_overrun;
        if on_overrun == OnOverrun::Finish || self.reader.is_whole() {
            return;
        }
        let Some(reader) = self.reader.as_stream() else {
            self.close(RequestOutcome::QuotaCut, true, Ending::FlushAndAbort);
            return;
        };
        let separator = if reader.break_off() { "\n\n" } else { "" };
        let ending = reader.length_ending(self.context.completions);
        self.ready.push_back(format!("{separator}{ending}").into());
        self.close(RequestOutcome::QuotaCut, true, Ending::Complete);
    }

    /// Ready when `timeouts.idle` or `timeouts.total` has run out.
    fn poll_timeout(&mut self, cx: &mut Context<'_>) -> Poll<Interruption> {
        loop {
            let Timeouts { idle, total, .. } = self.context.upstream.timeouts;
            let (idle_end, total_end) = (self.last_data.deadline(idle), self.context.started.deadline(total));
            ready!(self.timeout.poll(cx, idle_end.min(total_end)));
            if self.context.started.elapsed() >= total {
                return Poll::Ready(Interruption::Timeout("total", total));
            }
            if self.last_data.elapsed() >= idle {
                return Poll::Ready(Interruption::Timeout("idle", idle));
            }
        }
    }

    /// Ends an answer that has arrived as a whole.
    fn complete(&mut self) {
        self.reader.finish(&mut self.ready);
        self.close(self.outcome_of_whole(), false, Ending::Complete);
    }

    /// The outcome of a whole answer.
    fn outcome_of_whole(&self) -> RequestOutcome {
        if self.context.status.as_u16() < 400 {
            RequestOutcome::Answered
        } else {
            RequestOutcome::UpstreamError
        }
    }

    /// Ends an incomplete answer. A stream ends with an error event. Any other answer is aborted, so that the caller
    /// does not take it for complete.
    fn interrupt(&mut self, interruption: &Interruption) {
        if self.reader.as_stream().is_some_and(|events| events.has_last_event()) {
            return self.complete();
        }
        let dialect = self.context.endpoint.dialect();
        let error = interruption.error(&self.context.upstream.name);
        let list_separator = self.reader.list_separator();
        let event = if let Some(reader) = self.reader.as_stream() {
            let number = reader.next_sequence_number();
            let separator = if reader.break_off() { "\n\n" } else { "" };
            Some(format!("{separator}{}", error.event(dialect, number)))
        } else {
            // Gemini can send a stream as a JSON list.
            let separator = list_separator.filter(|_| dialect == Dialect::Google);
            separator.map(|separator| format!("{separator}{}]", error.body(dialect)))
        };
        let ending = match event {
            Some(event) => {
                self.ready.push_back(event.into());
                if self.context.peer.ends_answers_by_close() {
                    Ending::FlushAndAbort
                } else {
                    Ending::Complete
                }
            }
            None => Ending::FlushAndAbort,
        };
        self.close(interruption.outcome(), true, ending);
    }

    /// Settles the charge, at once or after counting on the blocking pool. `was_cut`: the answer is incomplete.
    fn close(&mut self, outcome: RequestOutcome, was_cut: bool, ending: Ending) {
        let MeterPhase::Passing(mut charge) = std::mem::replace(&mut self.phase, MeterPhase::Settled(ending))
        else {
            return;
        };
        charge.record.outcome = if self.is_draining { RequestOutcome::CallerGone } else { outcome };
        charge.record.is_drained = self.is_draining;
        charge.record.answered_by(|| self.reader.answer_model());
        if outcome == RequestOutcome::Answered || self.reader.is_whole() {
            self.learn(&mut charge);
        }
        let mut settlement = self.settlement(charge, was_cut);
        self.phase = if settlement.is_quick() {
            MeterPhase::settled(settlement.settle(), ending)
        } else {
            MeterPhase::Counting(spawn_blocking(move || settlement.settle()), ending)
        };
    }

    /// Marks the answer as whole, so that its length and the error of the prompt estimate are learned.
    fn learn(&mut self, charge: &mut Charge) {
        if self.context.status.as_u16() >= 400 {
            return;
        }
        if let Some(reservation) = &mut charge.reservation {
            reservation.mark_complete();
        }
        let reported = self.reader.reported();
        let prompt = self.reported_prompt(&reported).filter(|&tokens| tokens > 0);
        if let (Some(update), Some(prompt)) = (self.context.estimate_update.take(), prompt) {
            let ids = || self.reader.answer_ids();
            update.apply(prompt, &reported, ids);
        }
    }

    /// The reported prompt tokens. The total of a generated answer, without its parts, does not report them.
    fn reported_prompt(&self, reported: &Reported) -> Option<u64> {
        let is_with_completion = reported.is_total_only() && self.context.endpoint.generates();
        reported.prompt().filter(|_| !is_with_completion)
    }

    /// Prepares the settlement. Delivered text is counted if the upstream has not reported its final usage and the
    /// endpoint generates tokens.
    fn settlement(&mut self, mut charge: Charge, was_cut: bool) -> AnswerSettlement {
        // An answer that counts tokens used none, whatever it reports.
        let is_count = matches!(self.context.endpoint, Endpoint::CountTokens(_));
        let reported = if is_count { Reported::default() } else { self.reader.reported() };
        charge.record.is_usage_reported = reported.has_any();
        charge.record.reported_prompt = self.reported_prompt(&reported).unwrap_or(0);
        let MeterContext { status, endpoint, estimated_prompt, has_prompt, tokenizer, .. } = self.context;
        let (is_success, is_counted) = (status.is_success(), matches!(endpoint, Endpoint::Counted(_)));
        let is_final = self.reader.has_final_report(self.context.completions);
        let is_unreadable = self.reader.is_unreadable();
        // A report in the middle of an interrupted stream does not cover the text that followed it.
        let may_be_partial = was_cut && self.reader.events().is_some();
        let is_known = match reported.completion() {
            None => false,
            // Credible only if nothing was delivered, or if the request allows no completion.
            Some(0) => self.completion_cap == 0,
            Some(_) => is_final && !may_be_partial,
        };
        let unreported = if is_known || !is_success || !endpoint.generates() {
            Unreported::Nothing
        } else {
            Unreported::Raw { reader: Box::new(std::mem::take(&mut self.reader)), was_cut }
        };
        // The upstream reports at the end of a stream, for which the caller has not waited.
        let is_left = was_cut && charge.record.outcome == RequestOutcome::CallerGone;
        let own = OwnFigures {
            prompt: if is_success { estimated_prompt } else { 0 },
            has_prompt: is_success && has_prompt,
            completion: 0,
            is_final,
        };
        let skips_cached = !self.context.environment.count_cached_prompt_tokens;
        let facts = SettlementFacts {
            environment: self.context.environment.clone(),
            reported: if skips_cached { reported.without_cached() } else { reported },
            own,
            is_success,
            expects_usage: is_success && is_counted && !is_left,
            is_unreadable,
            tokenizer,
        };
        AnswerSettlement::new(charge, facts, unreported)
    }
}

impl Interruption {
    fn error(&self, upstream: &str) -> ProxyError {
        let upstream = upstream.to_owned();
        match *self {
            Self::Disconnected => ProxyError::UpstreamDisconnected { upstream },
            Self::Timeout(setting, after) => {
                ProxyError::UpstreamTimeout { upstream, timeout: (setting, after) }
            }
            Self::ShuttingDown => ProxyError::ShuttingDown,
        }
    }

    fn outcome(&self) -> RequestOutcome {
        match self {
            Self::Disconnected | Self::Timeout(..) => RequestOutcome::UpstreamCut,
            Self::ShuttingDown => RequestOutcome::ShutdownCut,
        }
    }
}

impl MeterPhase {
    fn settled(when_durable: Option<WhenDurable>, ending: Ending) -> Self {
        when_durable.map_or(Self::Settled(ending), |future| Self::AwaitingDurability(future, ending))
    }
}

/// Settles if the caller has disconnected or the gateway stops. Delivered text is counted and charged as usual. A count
/// that already runs on the blocking pool continues and settles there.
impl Drop for Metered {
    fn drop(&mut self) {
        let phase = std::mem::replace(&mut self.phase, MeterPhase::Settled(Ending::Complete));
        let MeterPhase::Passing(mut charge) = phase else { return };
        charge.record.outcome = RequestOutcome::CallerGone;
        charge.record.is_drained = self.is_draining;
        if self.reader.is_whole() {
            charge.record.outcome = self.outcome_of_whole();
            self.learn(&mut charge);
        }
        let mut settlement = self.settlement(charge, true);
        match Handle::try_current() {
            Ok(runtime) if !settlement.is_quick() => {
                drop(runtime.spawn_blocking(move || settlement.settle()));
            }
            _ => drop(settlement),
        }
    }
}

impl Body for Metered {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        let me = &mut *self;
        loop {
            match &mut me.phase {
                // The last bytes wait for the count, so that a caller that has the whole answer finds it settled.
                MeterPhase::Counting(count, ending) => {
                    let ending = *ending;
                    let when_durable = ready!(Pin::new(count).poll(cx)).ok().flatten();
                    me.phase = MeterPhase::settled(when_durable, ending);
                }
                MeterPhase::AwaitingDurability(when_durable, ending) => {
                    let ending = *ending;
                    ready!(when_durable.as_mut().poll(cx));
                    me.phase = MeterPhase::Settled(ending);
                }
                MeterPhase::Passing(_) | MeterPhase::Settled(_) if !me.ready.is_empty() => {
                    let data = me.ready.pop_front().unwrap_or_default();
                    if let Some(bytes) = &mut me.bytes_to_send {
                        *bytes = bytes.saturating_sub(data.len() as u64);
                    }
                    return Poll::Ready(Some(Ok(Frame::data(data))));
                }
                MeterPhase::Passing(_) => ready!(me.poll_passing(cx)),
                MeterPhase::Settled(Ending::Complete) => return Poll::Ready(None),
                MeterPhase::Settled(ending @ Ending::FlushAndAbort) => {
                    // The server writes its buffer to the socket when the body is pending.
                    *ending = Ending::Abort;
                    cx.waker().wake_by_ref();
                    return Poll::Pending;
                }
                MeterPhase::Settled(ending @ Ending::Abort) => {
                    *ending = Ending::Complete;
                    return Poll::Ready(Some(Err(io::ErrorKind::ConnectionAborted.into())));
                }
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self.phase, MeterPhase::Settled(Ending::Complete)) && self.ready.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        self.bytes_to_send.map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}

impl Metered {
    /// Whether the answer is incomplete and `on_disconnect` is `drain`.
    pub(super) fn wants_drain(&self) -> bool {
        matches!(self.phase, MeterPhase::Passing(_))
            && !self.reader.is_whole()
            && self.context.environment.on_disconnect == OnDisconnect::Drain
    }

    /// Reads the rest of the answer and discards it. Ready when the answer has ended.
    pub(super) fn poll_drained(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.is_draining = true;
        loop {
            self.ready.clear();
            match &self.phase {
                MeterPhase::Passing(_) => ready!(self.poll_passing(cx)),
                // Without a caller no bytes have to wait for the settlement.
                MeterPhase::Counting(..) | MeterPhase::Settled(_) | MeterPhase::AwaitingDurability(..) => {
                    return Poll::Ready(());
                }
            }
        }
    }
}
