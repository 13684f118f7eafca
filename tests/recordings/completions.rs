//! Compares the count of delivered text in recorded answers with the completion tokens that the providers reported.
//!
//! The bounds apply to plain text of OpenAI models that cannot reason. Reasoning models are charged for hidden text,
//! even where they report no reasoning. Answers that cost more than their text are left out too: tool calls, which
//! have their own syntax, audio, and answers that follow a schema.

use crate::exchange::Exchange;
use crate::measured::quantile;
use bytes::Bytes;
use std::collections::BTreeMap;
use tollgate::estimate::Models;
use tollgate::usage::{Delivered, SseReader, TextToCount};

/// With fewer streams, the figures are not significant.
const MIN_STREAMS: usize = 50;
const MIN_RESPONSES: usize = 30;
/// Maximum of the median error, and of the error of the sum of all counts.
const MAX_ERROR: f64 = 0.02;

/// Features of answers that hold more than text.
const MORE_THAN_TEXT: &[&str] =
    &["tools", "functions", "tool_calls_out", "audio", "json_schema", "prediction", "stream_error"];

/// Whether an OpenAI model can reason.
fn can_reason(model: &str) -> bool {
    let name = model.rsplit('/').next().unwrap_or_default();
    ["gpt-5", "o1", "o3", "o4", "codex"].iter().any(|family| name.starts_with(family))
}

/// Whether an answer contains the items of tool calls. Some recordings list tool calls only there, not in their
/// features.
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

/// All counted answers.
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
        let counted = tokenizer.count_all(texts.texts.iter().map(String::as_str)) + texts.known_tokens;
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
            "\nAnswers of models that do not reason, counted without their reported usage; errors in per cent.\n"
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

    /// Prints the figures. Returns whether they are within bounds.
    pub(crate) fn are_within_bounds(&self) -> bool {
        let plain = |is_responses: bool| -> Vec<&Counted> {
            let is_of = |c: &&Counted| c.is_plain_openai_stream && (c.api == "responses") == is_responses;
            self.0.iter().filter(is_of).collect()
        };
        are_within_bounds("chat", MIN_STREAMS, &plain(false))
            & are_within_bounds("Responses", MIN_RESPONSES, &plain(true))
    }
}

fn are_within_bounds(what: &str, min_count: usize, all: &[&Counted]) -> bool {
    let Errors { median, p90, sum } = Errors::of(all);
    let is_fine = all.len() >= min_count && median <= MAX_ERROR && sum.abs() <= MAX_ERROR;
    println!(
        "{}  OpenAI's and Azure's {what} streams of plain text, counted: {} answers, median error {:.1} %, p90 {:.1} %, error of the sum {:+.2} % (wanted: median and error of the sum within {:.0} %)",
        if is_fine { "ok    " } else { "MISSED" },
        all.len(),
        100.0 * median,
        100.0 * p90,
        100.0 * sum,
        100.0 * MAX_ERROR
    );
    is_fine
}

struct Errors {
    median: f64,
    p90: f64,
    /// The relative error of the sum of all counts. It can be negative.
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

fn of_stream(answer: &Bytes) -> TextToCount {
    let mut reader = SseReader::new(false);
    reader.feed(&without_usage(answer), &mut Vec::<Bytes>::new());
    reader.finish(&mut Vec::<Bytes>::new());
    reader.take_text()
}

/// The same stream without usage: its usage fields are renamed, because text whose usage was reported is not counted.
fn without_usage(answer: &[u8]) -> Bytes {
    let mut answer = answer.to_vec();
    for name in [&b"\"usage\""[..], b"\"usageMetadata\""] {
        let places: Vec<usize> = memchr::memmem::find_iter(&answer, name).collect();
        places.iter().for_each(|at| answer[at + 1] = b'x');
    }
    answer.into()
}

fn of_document(answer: &Bytes) -> TextToCount {
    let mut received = Delivered::default();
    received.push_piece(answer);
    received.finish_document()
}
