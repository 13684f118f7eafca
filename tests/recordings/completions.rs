//! What the count of a received answer makes of recorded ones, beside the completion tokens that their providers
//! reported.
//!
//! The figure is of plain text from OpenAI's models that cannot reason: those that can are charged for text that is
//! not shown, also where they report no reasoning. What costs more than its text is left out too: calls of
//! tools, which have a syntax of their own, sound, answers by a schema.

use crate::exchange::Exchange;
use crate::measured::quantile;
use bytes::Bytes;
use std::collections::BTreeMap;
use tollgate::estimate::Models;
use tollgate::usage::{Received, SseReader, Texts};

/// Fewer streams say nothing.
const FEWEST: usize = 50;
const FEWEST_RESPONSES: usize = 30;
/// Median error, and the deviation of the sum of all.
const MOST: f64 = 0.02;

/// Features of answers that are not text alone.
const MORE_THAN_TEXT: &[&str] =
    &["tools", "functions", "tool_calls_out", "audio", "json_schema", "prediction", "stream_error"];

/// OpenAI's models that can.
fn can_reason(model: &str) -> bool {
    let name = model.rsplit('/').next().unwrap_or_default();
    ["gpt-5", "o1", "o3", "o4", "codex"].iter().any(|family| name.starts_with(family))
}

/// Whether a response has items that are calls, which some recordings show only there.
fn calls_a_tool(answer: &[u8]) -> bool {
    answer.windows(6).any(|bytes| bytes == b"_call\"")
}

struct Counted {
    api: String,
    provider: String,
    is_plain_openai_stream: bool,
    tokens: u64,
    reported: u64,
}

/// All answers that were counted.
#[derive(Default)]
pub(crate) struct Completions(Vec<Counted>);

impl Completions {
    pub(crate) fn count(&mut self, exchange: &Exchange) {
        let Some(answer) = exchange.answer() else { return };
        let Some(reported) = exchange.completion_tokens.filter(|&tokens| tokens > 0) else { return };
        let model = exchange.model.as_deref().unwrap_or_default();
        if exchange.is_reasoning() || exchange.api().is_none() {
            return;
        }
        let texts = if exchange.stream { of_stream(&answer) } else { of_document(&answer) };
        let tokenizer = Models::default().named(model).tokenizer;
        let counted = tokenizer.count_all(texts.texts.iter().map(String::as_str)) + texts.tokens;
        let is_plain = !exchange.has(MORE_THAN_TEXT) && !can_reason(model) && !calls_a_tool(&answer);
        let is_openai = matches!(exchange.provider.as_str(), "openai" | "azure");
        self.0.push(Counted {
            api: exchange.api.clone(),
            provider: exchange.provider.clone(),
            is_plain_openai_stream: is_plain && is_openai && exchange.stream,
            tokens: counted,
            reported,
        });
    }

    pub(crate) fn print(&self) {
        println!(
            "\nAnswers counted as if nothing had been reported, without models that reason; in per cent.\n"
        );
        println!("| API | provider | answers | median error | p90 | sum of all |");
        println!("| --- | --- | --- | --- | --- | --- |");
        let mut rows: BTreeMap<(&str, &str), Vec<&Counted>> = BTreeMap::new();
        for counted in &self.0 {
            rows.entry((&counted.api, &counted.provider)).or_default().push(counted);
        }
        for ((api, provider), of) in rows {
            let Errors { median, p90, sum } = Errors::of(&of);
            println!(
                "| {api} | {provider} | {} | {:.1} | {:.1} | {:+.1} |",
                of.len(),
                100.0 * median,
                100.0 * p90,
                100.0 * sum
            );
        }
        println!();
    }

    /// Prints the figures; whether they are reached.
    pub(crate) fn are_near(&self) -> bool {
        let plain = |is_responses: bool| -> Vec<&Counted> {
            let is_of = |c: &&Counted| c.is_plain_openai_stream && (c.api == "responses") == is_responses;
            self.0.iter().filter(is_of).collect()
        };
        are_near("chat", FEWEST, &plain(false)) & are_near("Responses", FEWEST_RESPONSES, &plain(true))
    }
}

fn are_near(what: &str, fewest: usize, all: &[&Counted]) -> bool {
    let Errors { median, p90, sum } = Errors::of(all);
    let is_fine = all.len() >= fewest && median <= MOST && sum.abs() <= MOST;
    println!(
        "{}  OpenAI's and Azure's {what} streams of plain text, counted: {} answers, median error {:.1} %, p90 {:.1} %, all together {:+.2} % (wanted: median and all together within {:.0} %)",
        if is_fine { "ok    " } else { "MISSED" },
        all.len(),
        100.0 * median,
        100.0 * p90,
        100.0 * sum,
        100.0 * MOST
    );
    is_fine
}

struct Errors {
    median: f64,
    p90: f64,
    /// Of all together, with its sign.
    sum: f64,
}

impl Errors {
    fn of(all: &[&Counted]) -> Self {
        let mut errors: Vec<f64> =
            all.iter().map(|c| c.tokens.abs_diff(c.reported) as f64 / c.reported as f64).collect();
        let counted: u64 = all.iter().map(|c| c.tokens).sum();
        let reported: u64 = all.iter().map(|c| c.reported).sum();
        Self {
            median: quantile(&mut errors, 0.5),
            p90: quantile(&mut errors, 0.9),
            sum: counted as f64 / reported.max(1) as f64 - 1.0,
        }
    }
}

fn of_stream(answer: &Bytes) -> Texts {
    let mut reader = SseReader::new(false);
    reader.feed(&without_usage(answer), &mut Vec::<Bytes>::new());
    reader.finish(&mut Vec::<Bytes>::new());
    reader.take_texts()
}

/// The same stream, with fields of another name where usage was reported: what was is not counted any more.
fn without_usage(answer: &[u8]) -> Bytes {
    let mut answer = answer.to_vec();
    for name in [&b"\"usage\""[..], b"\"usageMetadata\""] {
        let places: Vec<usize> = memchr::memmem::find_iter(&answer, name).collect();
        places.iter().for_each(|at| answer[at + 1] = b'x');
    }
    answer.into()
}

fn of_document(answer: &Bytes) -> Texts {
    let mut received = Received::default();
    received.push_piece(answer);
    received.finish_document()
}
