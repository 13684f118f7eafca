//! Reads traces: CSV with a header line.

use super::Pace;
use crate::clock::Timestamp;
use crate::quota::{MAX_AMOUNT, Subject};
use crate::similar::most_similar;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use std::fmt;
use std::io::Read;
use std::sync::Arc;

/// One call of a trace.
#[derive(Clone, Debug, PartialEq)]
pub struct TraceCall {
    /// Arrival time.
    pub at: Timestamp,
    /// Prompt tokens.
    pub prompt: u64,
    /// Completion tokens.
    pub completion: u64,
    /// The environment, if the trace has the column.
    pub environment: Option<String>,
    /// The cap of the request on its completion, if the trace has the column.
    pub max_tokens: Option<u64>,
    /// The API, by the name that routes use. `None`: a path that no route takes.
    pub api: Option<&'static str>,
    /// The model; empty if the trace does not have the column.
    pub model: String,
    /// The caller's name, if the trace has the column.
    pub caller: Option<Arc<str>>,
    /// Whether the model generates tokens for the call.
    pub generates: bool,
    /// The speed of this answer, if it is known.
    pub pace: Option<Pace>,
}

impl TraceCall {
    pub(super) fn subject(&self) -> Subject<'_> {
        Subject { caller: self.caller.as_ref(), model: &self.model }
    }
}

/// An error in a trace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TraceFault {
    /// Line number, from 1.
    pub line: u64,
    /// Description of the error.
    pub message: String,
}

impl fmt::Display for TraceFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}: {}", self.line, self.message)
    }
}

impl std::error::Error for TraceFault {}

/// Names of the columns. The second one is used in the traces that Azure published in 2023.
const TIMESTAMP: &[&str] = &["timestamp"];
const PROMPT: &[&str] = &["prompt_tokens", "contexttokens"];
const COMPLETION: &[&str] = &["completion_tokens", "generatedtokens"];
/// The columns that a trace need not have.
const OPTIONAL: [&str; 4] = ["environment", "caller", "model", "max_tokens"];

struct TraceColumns {
    timestamp: usize,
    prompt: usize,
    completion: usize,
    environment: Option<usize>,
    max_tokens: Option<usize>,
    model: Option<usize>,
    caller: Option<usize>,
}

/// Reads a trace. Returns its calls sorted by time.
///
/// # Errors
/// A column is missing or misspelt, or a value cannot be read. Reports the first unreadable value.
pub fn read_trace(input: impl Read) -> Result<Vec<TraceCall>, TraceFault> {
    let mut reader = csv::ReaderBuilder::new().trim(csv::Trim::All).from_reader(input);
    let fault = |e: &csv::Error| TraceFault {
        line: e.position().map_or(1, csv::Position::line),
        message: e.to_string(),
    };
    let columns = TraceColumns::of(reader.headers().map_err(|e| fault(&e))?)?;
    let mut calls = Vec::new();
    let mut record = csv::StringRecord::new();
    while reader.read_record(&mut record).map_err(|e| fault(&e))? {
        let line = record.position().map_or(0, csv::Position::line);
        calls.push(columns.call(&record).map_err(|message| TraceFault { line, message })?);
    }
    calls.sort_by_key(|call| call.at);
    Ok(calls)
}

/// Whether a trace has a column with this name.
fn is_known(column: &str) -> bool {
    let column = column.trim_start_matches('\u{feff}');
    let mut known = [TIMESTAMP, PROMPT, COMPLETION, &OPTIONAL].into_iter().flatten();
    known.any(|name| column.eq_ignore_ascii_case(name))
}

impl TraceColumns {
    fn of(header: &csv::StringRecord) -> Result<Self, TraceFault> {
        let find = |names: &[&str]| {
            header.iter().position(|column| {
                let column = column.trim_start_matches('\u{feff}');
                names.iter().any(|name| column.eq_ignore_ascii_case(name))
            })
        };
        let need = |names: &[&str]| {
            find(names).ok_or_else(|| TraceFault {
                line: 1,
                message: format!(
                    "there is no column '{}'; a trace has timestamp, prompt_tokens, completion_tokens, and may have environment, caller, model, max_tokens; a log of the gateway is read with --log",
                    names.join("' or '")
                ),
            })
        };
        // Other columns are ignored, as published traces have some. A misspelt one would change the result.
        let is_absent = |name: &&str| find(&[*name]).is_none();
        let absent: Vec<&str> = OPTIONAL.into_iter().filter(is_absent).collect();
        for column in header {
            let intended = most_similar(column, &absent)
                .or_else(|| absent.iter().find(|name| column.len() > 2 && name.starts_with(column)).copied());
            if let Some(intended) = intended.filter(|_| !is_known(column)) {
                let message = format!(
                    "the column '{column}' is not known; did you mean '{intended}'? If not, rename or remove it"
                );
                return Err(TraceFault { line: 1, message });
            }
        }
        Ok(Self {
            timestamp: need(TIMESTAMP)?,
            prompt: need(PROMPT)?,
            completion: need(COMPLETION)?,
            environment: find(&["environment"]),
            max_tokens: find(&["max_tokens"]),
            model: find(&["model"]),
            caller: find(&["caller"]),
        })
    }

    fn call(&self, record: &csv::StringRecord) -> Result<TraceCall, String> {
        let text = |column: usize| record.get(column).unwrap_or_default();
        let some = |column: Option<usize>| column.map(text).filter(|value| !value.is_empty());
        let amount = |name: &str, value: &str| {
            let whole = value.parse::<u64>().ok().filter(|n| *n <= MAX_AMOUNT);
            whole.ok_or_else(|| format!("{name} is \"{value}\", which is not a whole number up to 2^40"))
        };
        let at = text(self.timestamp);
        Ok(TraceCall {
            at: timestamp(at).ok_or_else(|| {
                format!("timestamp is \"{at}\", which is neither an ISO date and time nor seconds")
            })?,
            prompt: amount("prompt_tokens", text(self.prompt))?,
            completion: amount("completion_tokens", text(self.completion))?,
            environment: some(self.environment).map(str::to_owned),
            max_tokens: some(self.max_tokens).map(|value| amount("max_tokens", value)).transpose()?,
            // A trace does not state it.
            api: Some("chat"),
            model: some(self.model).unwrap_or_default().to_owned(),
            caller: some(self.caller).map(Arc::from),
            generates: true,
            pace: None,
        })
    }
}

/// Parses `2023-11-16 18:15:46.68`, with a time zone or in UTC, or seconds since the Unix epoch.
fn timestamp(text: &str) -> Option<Timestamp> {
    if let Ok(zoned) = text.parse::<jiff::Timestamp>() {
        return Some(Timestamp(zoned.as_millisecond()));
    }
    if let Ok(civil) = text.parse::<DateTime>() {
        return Some(Timestamp(TimeZone::UTC.to_timestamp(civil).ok()?.as_millisecond()));
    }
    let seconds: f64 = text.parse().ok()?;
    // Larger values are not exact to the millisecond.
    if !(seconds.is_finite() && (0.0..1e12).contains(&seconds)) {
        return None;
    }
    #[allow(clippy::cast_possible_truncation)]
    Some(Timestamp((seconds * 1_000.0).round() as i64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_column_names_and_both_timestamp_formats_are_read() {
        let azure = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n";
        let ours = "timestamp,environment,prompt_tokens,completion_tokens,max_tokens,model\n1700158546.681,sandbox,374,44,,\n 3 ,,1,2,9,m\n";
        let calls = read_trace(azure.as_bytes()).unwrap();
        assert_eq!((calls[0].at.0, calls[0].prompt, calls[0].completion), (1_700_158_546_680, 374, 44));
        let calls = read_trace(ours.as_bytes()).unwrap();
        assert_eq!(calls.iter().map(|c| c.at.0).collect::<Vec<_>>(), [3_000, 1_700_158_546_681]);
        assert_eq!(
            (calls[0].max_tokens, calls[0].model.as_str(), &calls[0].environment),
            (Some(9), "m", &None)
        );
        assert_eq!((calls[1].max_tokens, calls[1].environment.as_deref()), (None, Some("sandbox")));
    }

    #[test]
    fn columns_of_other_traces_are_ignored() {
        for header in ["latency_ms", "model,model_version", "environment,env", "id"] {
            let width = header.split(',').count();
            let text =
                format!("timestamp,prompt_tokens,completion_tokens,{header}\n1,2,3{}\n", ",x".repeat(width));
            assert!(read_trace(text.as_bytes()).is_ok(), "{header}");
        }
    }

    #[test]
    fn an_unreadable_value_is_reported_with_its_line() {
        for (text, line, what) in [
            ("timestamp,prompt_tokens\n", 1, "completion_tokens"),
            ("", 1, "timestamp"),
            ("timestamp,prompt_tokens,completion_tokens\n1,2,3\nyesterday,2,3\n", 3, "yesterday"),
            ("timestamp,prompt_tokens,completion_tokens\n1,-2,3\n", 2, "-2"),
            ("timestamp,prompt_tokens,completion_tokens\n1,2,3.5\n", 2, "3.5"),
            ("timestamp,prompt_tokens,completion_tokens\n1,99999999999999,3\n", 2, "2^40"),
            ("timestamp,prompt_tokens,completion_tokens\n1,2\n", 2, "record"),
            ("timestamp,prompt_tokens,completion_tokens\nNaN,2,3\n", 2, "NaN"),
            ("timestamp,prompt_tokens,completion_tokens,env\n1,2,3,a\n", 1, "did you mean 'environment'"),
            (
                "timestamp,prompt_tokens,completion_tokens,max_token\n1,2,3,4\n",
                1,
                "did you mean 'max_tokens'",
            ),
        ] {
            let fault = read_trace(text.as_bytes()).unwrap_err();
            assert!(fault.line == line && fault.message.contains(what), "{text}: {fault}");
        }
    }
}
