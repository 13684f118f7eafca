//! Compares the usage that the readers find in recorded answers, cut in several ways, with the usage that the
//! recordings list. The readers must take the last report of completion tokens for the final one.

use crate::exchange::Exchange;
use crate::rules::{charged, random_cuts};
use bytes::Bytes;
use tollgate::usage::{JsonReader, OwnFigures, Reported, SseReader};

/// The results of the comparisons so far.
#[derive(Default)]
pub(crate) struct Charges {
    answers: usize,
    with_usage: usize,
    wrong: usize,
}

impl Charges {
    pub(crate) fn check(&mut self, exchange: &Exchange) {
        let Some(answer) = exchange.answer() else { return };
        let want = charged(exchange);
        self.answers += 1;
        self.with_usage += usize::from(want.is_some());
        let mut ways = vec![vec![], random_cuts(answer.len(), self.answers)];
        if self.answers.is_multiple_of(10) {
            ways.push((0..answer.len()).collect());
        }
        for cuts in ways {
            let (reported, is_final, passed) =
                if exchange.stream { follow(&answer, &cuts) } else { read(&answer, &cuts) };
            let amounts = reported.amounts(&OwnFigures::default());
            let got = reported.has_any().then_some((amounts.prompt, amounts.completion, amounts.total));
            // A chat stream without a finish reason has no final report unless it has a usage chunk.
            let ends =
                exchange.api != "chat" || memchr::memmem::find(&answer, b"finish_reason\":\"").is_some();
            let misses_final = ends && !is_final && reported.completion().is_some_and(|tokens| tokens > 0);
            if got != want || passed != answer || misses_final {
                self.wrong += 1;
                eprintln!(
                    "{} {} {}: {got:?} for {want:?} of {}, final: {is_final}",
                    exchange.id, exchange.provider, exchange.api, exchange.usage
                );
                break;
            }
        }
    }

    /// Prints the number of comparisons. Returns whether all usage was read correctly.
    pub(crate) fn are_correct(&self) -> bool {
        let Self { answers, with_usage, wrong } = self;
        println!(
            "usage of {answers} recorded answers, each cut in several ways: {with_usage} report usage, {wrong} read wrongly"
        );
        *wrong == 0 && *with_usage > 3_000
    }
}

fn follow(answer: &Bytes, cuts: &[usize]) -> (Reported, bool, Bytes) {
    let (mut reader, mut passed) = (SseReader::new(false), Vec::new());
    pieces(answer, cuts).for_each(|piece| reader.feed(&piece, &mut passed));
    reader.finish(&mut passed);
    (reader.reported(), reader.has_final_report(), passed.concat().into())
}

fn read(answer: &Bytes, cuts: &[usize]) -> (Reported, bool, Bytes) {
    let mut reader = JsonReader::default();
    pieces(answer, cuts).for_each(|piece| reader.feed(&piece));
    (reader.reported(), reader.has_final_report(1), answer.clone())
}

fn pieces<'a>(answer: &'a Bytes, cuts: &'a [usize]) -> impl Iterator<Item = Bytes> + 'a {
    let ends = cuts.iter().copied().chain([answer.len()]);
    ends.scan(0, |from, to| {
        let piece = answer.slice(*from..to.max(*from));
        *from = to.max(*from);
        Some(piece)
    })
}
