//! The answer's body: passes the upstream's bytes on as they come, reads usage on the side, and holds
//! the reservation until it is known what the answer has cost.

use super::Charge;
use super::reader::Reader;
use super::route::Endpoint;
use super::unsettled::{Uncounted, Unsettled};
use crate::calibrations::Lesson;
use crate::clock::Stopwatch;
use crate::config::{Environment, OnDisconnect, OnOverrun, Timeouts};
use crate::error::ProxyError;
use crate::estimate::Tokenizer;
use crate::ledger::Progress;
use crate::telemetry::Outcome;
use crate::upstream::Incoming;
use crate::usage::Reported;
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
use tokio::time::{Sleep, sleep_until};

/// How often what a stream has certainly used is taken out of what it holds.
const PROGRESS: Duration = Duration::from_secs(1);

/// What has to be known to charge for an answer.
#[derive(Clone, Debug)]
pub(super) struct Terms {
    /// What is charged for the prompt if the upstream does not say.
    pub(super) estimated_prompt: u64,
    /// How many completions were asked for.
    pub(super) completions: u64,
    pub(super) tokenizer: Option<Tokenizer>,
    pub(super) status: StatusCode,
    pub(super) endpoint: Endpoint,
    /// Since the request was sent: `timeouts.total` counts from there.
    pub(super) started: Stopwatch,
    pub(super) environment: Arc<Environment>,
}

impl Terms {
    fn upstream(&self) -> &str {
        &self.environment.upstream.name
    }
}

/// The upstream's body on its way to the caller.
pub(super) struct Metered {
    incoming: Incoming,
    reader: Reader,
    /// Read and not yet passed on.
    ready: VecDeque<Bytes>,
    /// What is left to pass on if the answer is of known length.
    length: Option<u64>,
    /// And what is left to come: nobody asks for more than that.
    to_come: Option<u64>,
    terms: Terms,
    lesson: Option<Lesson>,
    state: State,
    /// Text of a long stream, which is being counted while the rest is coming.
    portion: Option<JoinHandle<u64>>,
    last_data: Stopwatch,
    alarm: Option<Pin<Box<Sleep>>>,
    last_progress: Stopwatch,
    /// The most that the request allows its answer.
    cap: u64,
    /// Beyond so many completion tokens progress is told at once.
    tell_beyond: u64,
    /// The caller has hung up, and the answer is read for its usage.
    caller_is_gone: bool,
}

/// Ready when what was charged would outlive the process.
pub(super) type Kept = Pin<Box<dyn Future<Output = ()> + Send>>;

// A whole life is spent in the large one, and the whole is boxed.
#[allow(clippy::large_enum_variant)]
enum State {
    /// Bytes are coming. The reservation lives here.
    Passing(Charge),
    /// All has come, and is counted and settled on a thread for such work.
    Counting(JoinHandle<Option<Kept>>, Ending),
    /// Settled for more than was reserved, which has to be kept before the last bytes are passed on.
    Keeping(Kept, Ending),
    /// Settled; what is ready is still to be passed on.
    Settled(Ending),
}

/// What comes after the last bytes of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ending {
    End,
    /// The connection is to be broken off, but not before what was passed on has been written.
    Flush,
    BreakOff,
}

/// Why an answer ends before its end.
enum Cut {
    Broken,
    Timeout(&'static str, Duration),
}

impl Metered {
    /// `withholds`: the gateway asked for usage in a stream where the caller did not.
    pub(super) fn new(
        incoming: Incoming,
        headers: &HeaderMap,
        withholds: bool,
        charge: Charge,
        terms: Terms,
        lesson: Option<Lesson>,
    ) -> Self {
        let reader = Reader::of(headers, withholds);
        let length = headers.get(header::CONTENT_LENGTH).and_then(|l| l.to_str().ok()?.parse().ok());
        let now = Stopwatch::start();
        let bounds = charge.reservation.as_ref().map(|held| (held.cap(), held.tell_beyond()));
        let (cap, tell_beyond) = bounds.unwrap_or((u64::MAX, u64::MAX));
        let length = length.filter(|_| !reader.is_stream());
        let mut metered = Self {
            incoming,
            length,
            to_come: length,
            reader,
            ready: VecDeque::new(),
            terms,
            lesson,
            state: State::Passing(charge),
            portion: None,
            last_data: now,
            alarm: None,
            last_progress: now,
            cap,
            tell_beyond,
            caller_is_gone: false,
        };
        let has_begun = metered.reader.events().is_some() && metered.terms.status.is_success();
        if has_begun && metered.terms.endpoint.generates() {
            // The model has begun: its prompt is spent.
            metered.progress();
        }
        metered
    }

    /// Whether the answer may become shorter or longer on its way, so that its length is not told.
    pub(super) fn is_stream(&self) -> bool {
        self.reader.is_stream()
    }

    /// Whether there is no body: nobody will ask for its bytes.
    pub(super) fn is_empty(&self) -> bool {
        self.is_whole()
    }

    /// Whether all has come, as far as is known without asking for more.
    fn is_whole(&self) -> bool {
        self.incoming.is_end() || self.to_come == Some(0)
    }

    /// Settles an answer without a body. What is returned has to be waited for before the caller gets it.
    pub(super) fn settle_empty(&mut self) -> Option<Kept> {
        self.end();
        match std::mem::replace(&mut self.state, State::Settled(Ending::End)) {
            State::Keeping(kept, _) => Some(kept),
            State::Passing(_) | State::Counting(..) | State::Settled(_) => None,
        }
    }

    fn poll_passing(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        ready!(self.poll_portion(cx));
        match self.incoming.poll_data(cx) {
            Poll::Ready(Some(Ok(data))) => {
                self.last_data = Stopwatch::start();
                self.to_come = self.to_come.map(|bytes| bytes.saturating_sub(data.len() as u64));
                self.reader.feed(data, &mut self.ready);
                if self.is_whole() {
                    self.end();
                } else if self.progress_is_due() && self.progress() == Progress::Overrun {
                    self.overrun();
                }
            }
            Poll::Ready(None) => self.end(),
            Poll::Ready(Some(Err(error))) => {
                tracing::debug!(%error, upstream = self.terms.upstream(), "an answer broke off");
                self.cut(&Cut::Broken);
            }
            Poll::Pending => {
                let cut = ready!(self.poll_alarm(cx));
                self.cut(&cut);
            }
        }
        Poll::Ready(())
    }

    /// A long stream is counted in portions, so that little of it is kept: one at a time, on a thread for such
    /// work. Ready when more may come, which waits where the next portion is there before.
    fn poll_portion(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(reader) = self.reader.events_mut() else { return Poll::Ready(()) };
        loop {
            if let Some(counting) = &mut self.portion {
                match Pin::new(counting).poll(cx) {
                    Poll::Ready(counted) => reader.portion_counted(counted.ok()),
                    Poll::Pending if reader.has_portion() => return Poll::Pending,
                    Poll::Pending => return Poll::Ready(()),
                }
                self.portion = None;
            }
            let Some(texts) = reader.take_portion() else { return Poll::Ready(()) };
            let counts = self.terms.status.is_success() && self.terms.endpoint.generates();
            match self.terms.tokenizer.filter(|_| counts) {
                Some(tokenizer) => {
                    let count = move || tokenizer.count_all(texts.iter().map(String::as_str));
                    self.portion = Some(spawn_blocking(count));
                }
                // It would not be charged at the end either.
                None => reader.portion_counted(Some(0)),
            }
        }
    }

    fn progress_is_due(&self) -> bool {
        let Some(reader) = self.reader.events() else { return false };
        self.terms.endpoint.generates()
            && (reader.tokens_so_far(self.cap) > self.tell_beyond
                || self.last_data.since(self.last_progress) >= PROGRESS)
    }

    /// What has certainly been used is held no longer, and a stream that outgrows its reservation gets
    /// more of it.
    fn progress(&mut self) -> Progress {
        self.last_progress = self.last_data;
        let (State::Passing(charge), Some(reader)) = (&mut self.state, self.reader.events()) else {
            return Progress::Within;
        };
        let tokens = reader.tokens_so_far(self.cap);
        let spent = reader.reported().amounts_so_far(self.terms.estimated_prompt, tokens);
        let Some(reservation) = &mut charge.reservation else { return Progress::Within };
        let progress = reservation.progress(spent);
        self.tell_beyond = reservation.tell_beyond();
        progress
    }

    /// The stream goes on and becomes debt, or ends here as if it had reached its bound. To a compressed one
    /// no such end can be added: it is broken off.
    fn overrun(&mut self) {
        let Environment { enforce, reserve, .. } = &*self.terms.environment;
        // Quotas that only watch alter nothing.
        if !enforce || reserve.on_overrun == OnOverrun::Finish {
            return;
        }
        let Some(reader) = self.reader.as_stream() else {
            self.close(Outcome::QuotaCut, true, Ending::Flush);
            return;
        };
        let separator = if reader.break_off() { "\n\n" } else { "" };
        let ending = reader.length_ending(self.terms.completions);
        self.ready.push_back(format!("{separator}{ending}").into());
        self.close(Outcome::QuotaCut, true, Ending::End);
    }

    /// Ready when the upstream has been silent, or the whole exchange has lasted, too long. The timer
    /// is set once and looked at when it fires: no timer is moved for every piece.
    fn poll_alarm(&mut self, cx: &mut Context<'_>) -> Poll<Cut> {
        loop {
            let Timeouts { idle, total, .. } = self.terms.environment.upstream.timeouts;
            let (silent, over) = (self.last_data.deadline(idle), self.terms.started.deadline(total));
            let due = silent.min(over);
            let alarm = self.alarm.get_or_insert_with(|| Box::pin(sleep_until(due)));
            ready!(alarm.as_mut().poll(cx));
            if self.terms.started.elapsed() >= total {
                return Poll::Ready(Cut::Timeout("total", total));
            }
            if self.last_data.elapsed() >= idle {
                return Poll::Ready(Cut::Timeout("idle", idle));
            }
            alarm.as_mut().reset(due);
        }
    }

    /// The answer is whole.
    fn end(&mut self) {
        self.reader.finish(&mut self.ready);
        let outcome =
            if self.terms.status.as_u16() < 400 { Outcome::Answered } else { Outcome::UpstreamError };
        self.close(outcome, false, Ending::End);
    }

    /// The answer ends before its end: a stream with an event that says so, anything else by breaking
    /// off the caller's connection too, so that it cannot be taken for whole.
    fn cut(&mut self, cut: &Cut) {
        let ending = match self.reader.as_stream() {
            Some(reader) => {
                let number = reader.next_sequence_number();
                let separator = if reader.break_off() { "\n\n" } else { "" };
                let upstream = self.terms.upstream().to_owned();
                let error = match *cut {
                    Cut::Broken => ProxyError::UpstreamCut { upstream },
                    Cut::Timeout(setting, after) => {
                        ProxyError::UpstreamTimeout { upstream, timeout: (setting, after) }
                    }
                };
                let event = error.event(self.terms.endpoint.dialect(), number);
                self.ready.push_back(format!("{separator}{event}").into());
                Ending::End
            }
            None => Ending::Flush,
        };
        self.close(Outcome::UpstreamCut, true, ending);
    }

    /// Settles, at once or when what came has been counted.
    fn close(&mut self, outcome: Outcome, was_cut: bool, ending: Ending) {
        let State::Passing(mut charge) = std::mem::replace(&mut self.state, State::Settled(ending)) else {
            return;
        };
        charge.record.outcome = if self.caller_is_gone { Outcome::CallerGone } else { outcome };
        if outcome == Outcome::Answered {
            if let Some(reservation) = &mut charge.reservation {
                reservation.is_whole();
            }
            if let (Some(lesson), Some(prompt)) = (self.lesson.take(), self.reader.reported().prompt()) {
                lesson.learn(prompt);
            }
        }
        let mut unsettled = self.unsettled(charge, was_cut);
        self.state = if unsettled.is_quick() {
            State::settled(unsettled.settle(), ending)
        } else {
            State::Counting(spawn_blocking(move || unsettled.settle()), ending)
        };
    }

    /// What is left to do for this answer. What came has to be counted where the upstream did not report
    /// it, or had not yet; where nothing is generated, nothing.
    fn unsettled(&mut self, mut charge: Charge, was_cut: bool) -> Unsettled {
        let reported = self.reader.reported();
        charge.record.reported = reported.is_any();
        charge.record.reported_prompt = reported.prompt().unwrap_or(0);
        self.tell_of_usage(&charge, reported);
        let Terms { status, endpoint, estimated_prompt, tokenizer, .. } = self.terms;
        // A stream that broke off has gone on after what it reported on its way.
        let goes_on = was_cut && self.reader.events().is_some();
        let is_known = !status.is_success() || reported.completion().is_some() && !goes_on;
        let uncounted = if is_known || !endpoint.generates() {
            Uncounted::Nothing
        } else {
            Uncounted::Raw(std::mem::take(&mut self.reader), was_cut)
        };
        let estimated_prompt = status.is_success().then_some(estimated_prompt);
        let skips = !self.terms.environment.count_cached_prompt_tokens;
        let reported = if skips { reported.less_cached() } else { reported };
        Unsettled::new(charge, reported, estimated_prompt, tokenizer, uncounted)
    }

    /// Counts an answer whose usage is missing where there should be one, or cannot be true.
    fn tell_of_usage(&self, charge: &Charge, reported: Reported) {
        let is_charged = charge.reservation.is_some();
        let is_due = self.terms.status.is_success() && matches!(self.terms.endpoint, Endpoint::Counted(_));
        let (metrics, environment) = (charge.record.metrics(), &charge.record.environment);
        if is_charged && reported.was_refused() {
            metrics.usage_missing(environment, "not_credible");
            let upstream = self.terms.upstream();
            tracing::warn!(upstream, "an answer's usage, or part of it, cannot be true: it is not charged");
        } else if is_charged && is_due && reported.completion().is_none() {
            let reason = if self.reader.is_unreadable() { "not_readable" } else { "not_reported" };
            metrics.usage_missing(environment, reason);
        }
    }
}

impl State {
    fn settled(kept: Option<Kept>, ending: Ending) -> Self {
        kept.map_or(Self::Settled(ending), |kept| Self::Keeping(kept, ending))
    }
}

/// The caller has hung up, or the gateway stops: what has come is counted and charged all the same. A
/// count that is under way goes on by itself.
impl Drop for Metered {
    fn drop(&mut self) {
        let state = std::mem::replace(&mut self.state, State::Settled(Ending::End));
        let State::Passing(mut charge) = state else { return };
        charge.record.outcome = Outcome::CallerGone;
        let mut unsettled = self.unsettled(charge, true);
        match Handle::try_current() {
            Ok(runtime) if !unsettled.is_quick() => drop(runtime.spawn_blocking(move || unsettled.settle())),
            _ => drop(unsettled),
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
            match &mut me.state {
                // The last bytes wait for the count: whoever has read them finds it settled.
                State::Counting(counting, ending) => {
                    let ending = *ending;
                    let kept = ready!(Pin::new(counting).poll(cx)).ok().flatten();
                    me.state = State::settled(kept, ending);
                }
                State::Keeping(kept, ending) => {
                    let ending = *ending;
                    ready!(kept.as_mut().poll(cx));
                    me.state = State::Settled(ending);
                }
                State::Passing(_) | State::Settled(_) if !me.ready.is_empty() => {
                    let data = me.ready.pop_front().unwrap_or_default();
                    if let Some(length) = &mut me.length {
                        *length = length.saturating_sub(data.len() as u64);
                    }
                    return Poll::Ready(Some(Ok(Frame::data(data))));
                }
                State::Passing(_) => ready!(me.poll_passing(cx)),
                State::Settled(Ending::End) => return Poll::Ready(None),
                State::Settled(ending @ Ending::Flush) => {
                    // The server writes out what it has when a body has nothing ready.
                    *ending = Ending::BreakOff;
                    cx.waker().wake_by_ref();
                    return Poll::Pending;
                }
                State::Settled(ending @ Ending::BreakOff) => {
                    *ending = Ending::End;
                    return Poll::Ready(Some(Err(io::ErrorKind::ConnectionAborted.into())));
                }
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self.state, State::Settled(Ending::End)) && self.ready.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        self.length.map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}

impl Metered {
    /// The answer is still coming, and is to be read to its end though the caller has gone.
    pub(super) fn wants_to_drain(&self) -> bool {
        matches!(self.state, State::Passing(_)) && self.terms.environment.on_disconnect == OnDisconnect::Drain
    }

    /// Reads on without passing anything on, until it is settled.
    pub(super) fn poll_drained(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.caller_is_gone = true;
        loop {
            self.ready.clear();
            match &self.state {
                State::Passing(_) => ready!(self.poll_passing(cx)),
                // Nobody is there whose last bytes would have to wait.
                State::Counting(..) | State::Settled(_) | State::Keeping(..) => return Poll::Ready(()),
            }
        }
    }
}
