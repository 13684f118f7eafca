//! What is read out of recorded answers, cut in every way, beside what the rules make of the usage that their
//! recorders found.

use crate::exchange::Exchange;
use bytes::Bytes;
use serde_json::Value;
use tollgate::usage::{JsonReader, Reported, SseReader};

/// What was compared so far.
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
            let (reported, passed) =
                if exchange.stream { follow(&answer, &cuts) } else { read(&answer, &cuts) };
            let amounts = reported.amounts(0, 0);
            let got = reported.is_any().then_some((amounts.prompt, amounts.completion, amounts.total));
            if got != want || passed != answer {
                self.wrong += 1;
                eprintln!(
                    "{} {} {}: {got:?} for {want:?} of {}",
                    exchange.id, exchange.provider, exchange.api, exchange.usage
                );
                break;
            }
        }
    }

    /// Prints how many there were; whether all were right.
    pub(crate) fn are_right(&self) -> bool {
        let Self { answers, with_usage, wrong } = self;
        println!(
            "usage of {answers} recorded answers, cut in every way: {with_usage} report it, {wrong} read wrongly"
        );
        *wrong == 0 && *with_usage > 3_000
    }
}

/// Prompt, completion and total by the rules.
fn charged(exchange: &Exchange) -> Option<(u64, u64, u64)> {
    let usage = &exchange.usage;
    let of = |path: &str| usage.pointer(path).and_then(Value::as_u64);
    let sum = |paths: &[&str]| paths.iter().filter_map(|path| of(path)).sum::<u64>();
    if !usage.is_object() {
        return None;
    }
    let (prompt, completion, total) = match exchange.api.as_str() {
        "gemini" => (
            sum(&["/promptTokenCount", "/toolUsePromptTokenCount"]),
            sum(&["/candidatesTokenCount", "/thoughtsTokenCount"]),
            of("/totalTokenCount"),
        ),
        // Anthropic's models elsewhere too.
        api if api == "anthropic_messages"
            || usage.get("cache_read_input_tokens").is_some() && of("/prompt_tokens").is_none() =>
        {
            (
                sum(&["/input_tokens", "/cache_creation_input_tokens", "/cache_read_input_tokens"]),
                sum(&["/output_tokens"]),
                None,
            )
        }
        "responses" => (sum(&["/input_tokens"]), sum(&["/output_tokens"]), of("/total_tokens")),
        _ if usage.get("tokens").is_some() => {
            (sum(&["/tokens/input_tokens"]), sum(&["/tokens/output_tokens"]), None)
        }
        "other" => return None,
        _ => {
            let (prompt, completion) = (sum(&["/prompt_tokens"]), sum(&["/completion_tokens"]));
            let total = of("/total_tokens");
            let more = total.unwrap_or(0).saturating_sub(prompt + completion);
            let is = |path: &str| more > 0 && of(path) == Some(more);
            let reasons = is("/completion_tokens_details/reasoning_tokens");
            let hears = is("/prompt_tokens_details/audio_tokens");
            let is_total_alone = of("/prompt_tokens").is_none();
            let prompt =
                if is_total_alone { total.unwrap_or(0) } else { prompt + if hears { more } else { 0 } };
            (prompt, completion + if reasons { more } else { 0 }, total)
        }
    };
    Some((prompt, completion, total.unwrap_or(0).max(prompt + completion)))
}

fn follow(answer: &Bytes, cuts: &[usize]) -> (Reported, Bytes) {
    let (mut reader, mut passed) = (SseReader::new(false), Vec::new());
    pieces(answer, cuts).for_each(|piece| reader.feed(&piece, &mut passed));
    reader.finish(&mut passed);
    (reader.reported(), passed.concat().into())
}

fn read(answer: &Bytes, cuts: &[usize]) -> (Reported, Bytes) {
    let mut reader = JsonReader::default();
    pieces(answer, cuts).for_each(|piece| reader.feed(&piece));
    (reader.reported(), answer.clone())
}

fn pieces<'a>(answer: &'a Bytes, cuts: &'a [usize]) -> impl Iterator<Item = Bytes> + 'a {
    let ends = cuts.iter().copied().chain([answer.len()]);
    ends.scan(0, |from, to| {
        let piece = answer.slice(*from..to.max(*from));
        *from = to.max(*from);
        Some(piece)
    })
}

fn random_cuts(length: usize, seed: usize) -> Vec<usize> {
    let mut state = seed as u64 + 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(state >> 33).unwrap()
    };
    let mut cuts: Vec<usize> = (0..40).map(|_| next() % (length + 1)).collect();
    cuts.sort_unstable();
    cuts
}
