//! Replays exchanges one after the other through one environment, so that the charge of each exchange is the
//! difference between two readings of the totals.

use crate::case::Case;
use crate::exchange::Exchange;
use crate::rules::random_cuts;
use crate::support::{Answer, Caller, Framing, Reply, Upstream, framed};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

/// If an answer is sent in single bytes, this many bytes at its start and at its end are sent in separate writes.
/// The bytes between them are sent without pauses.
const HEAD: usize = 256;
const TAIL: usize = 768;

/// The result of an exchange.
pub(crate) struct Outcome {
    pub(crate) replays: usize,
    pub(crate) wrong_bytes: usize,
    pub(crate) wrong_charges: usize,
}

pub(crate) struct Worker {
    pub(crate) environment: String,
    pub(crate) gateway: SocketAddr,
    pub(crate) admin: SocketAddr,
    pub(crate) upstream: Scripted,
}

/// An upstream that sends the answer that was set last.
pub(crate) struct Scripted {
    pub(crate) upstream: Upstream,
    next: Arc<Mutex<Answer>>,
}

impl Scripted {
    pub(crate) async fn start() -> Self {
        let next = Arc::new(Mutex::new(Answer::default()));
        let script = next.clone();
        let upstream = Upstream::answering(move |_| script.lock().unwrap().clone()).await;
        Self { upstream, next }
    }
}

impl Worker {
    /// Replays all cases of an exchange. Prints faults to standard error.
    pub(crate) async fn replay(&self, exchange: &Exchange) -> Outcome {
        let mut outcome = Outcome { replays: 0, wrong_bytes: 0, wrong_charges: 0 };
        for case in Case::all(exchange) {
            let mut first = None;
            for (way, framing, cuts) in ways(exchange, case.answer.len()) {
                let headers = head(&case);
                *self.upstream.next.lock().unwrap() =
                    framed(case.status, &headers, &case.answer, framing, cuts);
                let before = self.charged().await;
                let reply = self.send(&case).await;
                let after = self.charged().await;
                let charged: [u64; 4] = std::array::from_fn(|at| after[at] - before[at]);
                outcome.replays += 1;
                if let Some(difference) = difference(&case, &reply) {
                    outcome.wrong_bytes += 1;
                    print_fault(&case, way, &difference);
                }
                let estimated = reply.header("x-tollgate-estimated-prompt-tokens");
                let estimated = estimated.map_or(0, |tokens| tokens.parse().unwrap());
                let is_expected = case.expected_charge.matches(charged, estimated);
                if !is_expected || *first.get_or_insert(charged) != charged {
                    outcome.wrong_charges += 1;
                    let expected = case.expected_charge.describe();
                    print_fault(
                        &case,
                        way,
                        &format!(
                            "charged {charged:?} instead of {expected}; estimate {estimated}, charge of the first replay {first:?}"
                        ),
                    );
                }
            }
        }
        outcome
    }

    async fn send(&self, case: &Case<'_>) -> Reply {
        let mut caller = Caller::connect(self.gateway).await;
        let target = format!("/{}{}", self.environment, case.target);
        caller.request(case.method, &target, "content-type: application/json\r\n", &case.request).await;
        caller.reply().await
    }

    /// Requests, prompt, completion and total tokens charged so far.
    async fn charged(&self) -> [u64; 4] {
        let target = format!("/api/environments/{}", self.environment);
        let environment = crate::support::gateway::admin_get_at(self.admin, &target).await.json();
        ["requests", "prompt_tokens", "completion_tokens", "total_tokens"]
            .map(|name| environment["totals"][name].as_u64().unwrap())
    }
}

/// The ways to send an answer: whole, in single bytes, and cut at random.
fn ways(exchange: &Exchange, length: usize) -> [(&'static str, Framing, Vec<usize>); 3] {
    let seed = exchange.id.bytes().fold(0_usize, |seed, byte| seed * 31 % 1_000_003 + usize::from(byte));
    let whole = if exchange.stream { Framing::Chunks } else { Framing::Length };
    let random = if seed.is_multiple_of(2) { Framing::Chunks } else { Framing::UntilClosed };
    let single = (0..length.min(HEAD)).chain(length.saturating_sub(TAIL).max(HEAD)..length);
    [
        ("whole", whole, Vec::new()),
        ("in single bytes", Framing::Chunks, single.collect()),
        ("at random cuts", random, random_cuts(length, seed)),
    ]
}

fn head(case: &Case<'_>) -> String {
    let encoding = if case.is_compressed { "content-encoding: gzip\r\n" } else { "" };
    format!("content-type: {}\r\n{encoding}", case.exchange.content_type())
}

/// Describes the first difference between the reply and the expected answer.
fn difference(case: &Case<'_>, reply: &Reply) -> Option<String> {
    if let Some(error) = reply.header("x-tollgate-error") {
        return Some(format!("the gateway sent its own error: {error}"));
    }
    if reply.status != case.status || reply.is_incomplete {
        return Some(format!(
            "status {} instead of {}, incomplete: {}",
            reply.status, case.status, reply.is_incomplete
        ));
    }
    let same = reply.body.iter().zip(&case.expected_body).take_while(|(got, wanted)| got == wanted).count();
    let is_same = same == reply.body.len() && same == case.expected_body.len();
    (!is_same).then(|| {
        format!(
            "first difference at byte {same}; {} bytes instead of {}",
            reply.body.len(),
            case.expected_body.len()
        )
    })
}

fn print_fault(case: &Case<'_>, way: &str, what: &str) {
    let Exchange { id, provider, api, .. } = case.exchange;
    eprintln!("{id} {provider} {api} {} {way}: {what}", case.target);
}
