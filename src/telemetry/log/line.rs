//! The text of one line, in either form.

use crate::config::LogForm;
use crate::telemetry::AttemptOutcome;
use serde::Serialize;
use std::fmt::Write as _;
use std::io::Write as _;
use std::net::IpAddr;
use std::time::Duration;
use tracing::Level;

/// The key of a field, as each form has it. `key!` makes one.
#[derive(Clone, Copy)]
pub(super) struct Key {
    pub(super) json: &'static str,
    pub(super) for_people: &'static str,
}

/// The [`Key`] with this name, which needs no escapes. The compiler puts the parts together: a line has some twenty keys.
macro_rules! key {
    ($name:literal) => {
        $crate::telemetry::log::line::Key {
            json: concat!(",\"", $name, "\":"),
            for_people: concat!(" ", $name, "="),
        }
    };
}
pub(super) use key;

/// A line under construction. As JSON it is an object; for people it is `TIME LEVEL message  key=value key=value`.
pub(crate) struct Line<'b> {
    buffer: &'b mut Vec<u8>,
    form: LogForm,
}

impl<'b> Line<'b> {
    /// Begins a line. An empty message is left out of JSON, and people read `request` instead.
    pub(super) fn begin(
        buffer: &'b mut Vec<u8>,
        form: LogForm,
        timestamp: &str,
        level: Level,
        target: &str,
        message: &str,
    ) -> Self {
        let level = level.as_str();
        match form {
            LogForm::Json => {
                // None of these needs an escape.
                for part in
                    ["{\"timestamp\":\"", timestamp, "\",\"level\":\"", level, "\",\"target\":\"", target]
                {
                    buffer.extend_from_slice(part.as_bytes());
                }
                buffer.push(b'"');
                let mut line = Self { buffer, form };
                if !message.is_empty() {
                    line.add("message", message);
                }
                line
            }
            LogForm::Human => {
                let message = if message.is_empty() { "request" } else { message };
                // Writing to a vector cannot fail.
                let _ = write!(buffer, "{timestamp} {level:<5} ");
                let begin = buffer.len();
                buffer.extend_from_slice(message.as_bytes());
                escape_controls(buffer, begin);
                buffer.push(b' ');
                Self { buffer, form }
            }
        }
    }

    /// A line without its beginning.
    pub(super) fn fields(buffer: &'b mut Vec<u8>, form: LogForm) -> Self {
        Self { buffer, form }
    }

    /// Adds a field. Its name needs no escapes.
    // A derived `Serialize` would escape the keys again for every line, which takes a third of its instructions.
    pub(crate) fn add(&mut self, name: &str, value: impl Serialize) {
        let (begin, end) = if self.form == LogForm::Json { (",\"", "\":") } else { (" ", "=") };
        for part in [begin, name, end] {
            self.buffer.extend_from_slice(part.as_bytes());
        }
        self.value(value);
    }

    /// Adds a value.
    fn value(&mut self, value: impl Serialize) {
        let begin = self.buffer.len();
        // Writing these values to a vector cannot fail.
        drop(serde_json::to_writer(&mut *self.buffer, &value));
        if self.form == LogForm::Human {
            for_people(self.buffer, begin);
        }
    }

    // Not inlined, as some others here: a line has some twenty fields, and the code of one would be there twenty times.
    /// Adds a number.
    #[inline(never)]
    pub(super) fn add_number(&mut self, key: Key, number: u64) {
        self.key(key);
        self.buffer.extend_from_slice(itoa::Buffer::new().format(number).as_bytes());
    }

    /// Adds a truth value.
    #[inline(never)]
    pub(super) fn add_flag(&mut self, key: Key, flag: bool) {
        self.key(key);
        self.buffer.extend_from_slice(if flag { &b"true"[..] } else { b"false" });
    }

    /// Adds a word that needs no escapes.
    #[inline(never)]
    pub(super) fn add_word(&mut self, key: Key, word: &str) {
        self.add_unescaped(key, |buffer| buffer.extend_from_slice(word.as_bytes()));
    }

    /// Adds the text that `write` appends, which needs no escapes.
    #[inline]
    fn add_unescaped(&mut self, key: Key, write: impl FnOnce(&mut Vec<u8>)) {
        self.key(key);
        if self.form == LogForm::Json {
            self.buffer.push(b'"');
        }
        write(self.buffer);
        if self.form == LogForm::Json {
            self.buffer.push(b'"');
        }
    }

    /// Adds an address.
    pub(super) fn add_address(&mut self, key: Key, address: IpAddr) {
        // The standard library's formatter takes three times as many instructions.
        let IpAddr::V4(address) = address else {
            self.key(key);
            return self.value(address);
        };
        self.add_unescaped(key, |buffer| {
            for (at, octet) in address.octets().into_iter().enumerate() {
                if at > 0 {
                    buffer.push(b'.');
                }
                buffer.extend_from_slice(itoa::Buffer::new().format(octet).as_bytes());
            }
        });
    }

    /// Adds a field, unless there is no value.
    pub(crate) fn add_if_any(&mut self, key: &str, value: Option<impl Serialize>) {
        if let Some(value) = value {
            self.add(key, value);
        }
    }

    /// Adds a text, unless it is empty.
    #[inline(never)]
    pub(super) fn add_text(&mut self, key: Key, text: &str) {
        if text.is_empty() {
        } else if are_plain(text.as_bytes()) {
            self.add_word(key, text);
        } else {
            self.key(key);
            self.value(text);
        }
    }

    /// Adds the upstreams that a request has tried: as JSON a list, for people `NAME OUTCOME, NAME OUTCOME`.
    pub(super) fn add_attempts(&mut self, attempts: &[(&str, AttemptOutcome)]) {
        if attempts.is_empty() {
            return;
        }
        match self.form {
            LogForm::Json => {
                let view = |&(upstream, outcome): &(&str, AttemptOutcome)| serde_json::json!({"upstream": upstream, "outcome": outcome.as_str()});
                self.add("attempts", attempts.iter().map(view).collect::<Vec<_>>());
            }
            LogForm::Human => {
                let words =
                    attempts.iter().map(|(upstream, outcome)| format!("{upstream} {}", outcome.as_str()));
                self.add("attempts", words.collect::<Vec<_>>().join(", "));
            }
        }
    }

    /// Adds a duration: as JSON in microseconds, with the second key; for people with its unit, and with the first key.
    pub(super) fn add_duration(&mut self, key: [Key; 2], duration: Option<Duration>) {
        let Some(duration) = duration else { return };
        let us = u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        let [for_people, with_unit] = key;
        match self.form {
            LogForm::Json => self.add_number(with_unit, us),
            LogForm::Human => {
                self.key(for_people);
                let text = match us {
                    0..1_000 => format!("{us}us"),
                    1_000..1_000_000 => format!("{}.{:03}ms", us / 1_000, us % 1_000),
                    _ => format!("{}.{:03}s", us / 1_000_000, us / 1_000 % 1_000),
                };
                self.buffer.extend_from_slice(text.as_bytes());
            }
        }
    }

    fn key(&mut self, key: Key) {
        let text = if self.form == LogForm::Json { key.json } else { key.for_people };
        self.buffer.extend_from_slice(text.as_bytes());
    }

    /// Adds fields that another line has written without its beginning, and ends the line.
    pub(super) fn append(self, fields: &[u8]) {
        self.buffer.extend_from_slice(fields);
        self.end();
    }

    /// Ends the line.
    pub(super) fn end(self) {
        if self.form == LogForm::Json {
            self.buffer.push(b'}');
        } else if self.buffer.last() == Some(&b' ') {
            self.buffer.pop();
        }
        self.buffer.push(b'\n');
    }
}

/// Whether bytes need neither an escape as JSON nor quotes for people.
fn are_plain(bytes: &[u8]) -> bool {
    // Without an early exit the compiler checks many bytes at once.
    #[allow(clippy::needless_bitwise_bool)]
    let is_plain = |b: u8| (b > b' ') & (b < 0x7f) & (b != b'"') & (b != b'\\') & (b != b'=');
    bytes.iter().fold(true, |all, &byte| all & is_plain(byte))
}

/// Removes the quotes of a JSON string that needs none, and escapes what a terminal would obey.
fn for_people(buffer: &mut Vec<u8>, begin: usize) {
    let Some([b'"', text @ .., b'"']) = buffer.get(begin..) else { return };
    if !text.is_empty() && are_plain(text) {
        buffer.pop();
        buffer.remove(begin);
    } else {
        escape_controls(buffer, begin);
    }
}

/// Escapes the characters by which a text could move the cursor or change the order of what follows.
fn escape_controls(buffer: &mut Vec<u8>, begin: usize) {
    let Some(Ok(text)) = buffer.get(begin..).map(std::str::from_utf8) else { return };
    let is_control = |c: char| {
        c.is_control()
            || matches!(c, '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{200e}' | '\u{200f}')
    };
    if !text.contains(is_control) {
        return;
    }
    let mut escaped = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if is_control(c) {
            let _ = write!(escaped, "\\u{:04x}", u32::from(c));
        } else {
            escaped.push(c);
        }
    }
    buffer.truncate(begin);
    buffer.extend_from_slice(escaped.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(form: LogForm, add: impl FnOnce(&mut Line<'_>)) -> String {
        let mut buffer = Vec::new();
        let mut line =
            Line::begin(&mut buffer, form, "2026-11-28T10:00:00.250Z", Level::INFO, "tollgate::x", "a b");
        add(&mut line);
        line.end();
        String::from_utf8(buffer).unwrap()
    }

    #[test]
    fn both_forms_have_the_same_fields() {
        let add = |line: &mut Line<'_>| {
            line.add("status", 200);
            line.add("model", "gpt-4o");
            line.add("name", "two words");
            line.add_if_any("absent", None::<u64>);
            line.add_text(key!("empty"), "");
            line.add_address(key!("from"), [192, 0, 2, 10].into());
            line.add_address(key!("v6"), "2001:db8::1".parse().unwrap());
            line.add_duration([key!("took"), key!("took_us")], Some(Duration::from_micros(2_500_400)));
            line.add_duration([key!("wait"), key!("wait_us")], Some(Duration::from_micros(1_020)));
        };
        let json: serde_json::Value = serde_json::from_str(&line(LogForm::Json, add)).unwrap();
        let expected = serde_json::json!({
            "timestamp": "2026-11-28T10:00:00.250Z", "level": "INFO", "target": "tollgate::x", "message": "a b",
            "status": 200, "model": "gpt-4o", "name": "two words", "from": "192.0.2.10", "v6": "2001:db8::1", "took_us": 2_500_400, "wait_us": 1_020,
        });
        assert_eq!(json, expected);
        assert_eq!(
            line(LogForm::Human, add),
            "2026-11-28T10:00:00.250Z INFO  a b  status=200 model=gpt-4o name=\"two words\" from=192.0.2.10 v6=2001:db8::1 took=2.500s wait=1.020ms\n"
        );
    }

    #[test]
    fn a_value_cannot_begin_a_line_or_control_a_terminal() {
        for text in ["a\nb", "a\u{1b}[31mb", "a\u{9b}31mb", "a\u{202e}b", "a\u{7f}", "\"", "a=b", "\\", "ä"]
        {
            let written = line(LogForm::Human, |line| line.add("model", text));
            assert_eq!(written.lines().count(), 1, "{written}");
            assert!(!written.trim_end().contains(|c: char| c.is_control() || c == '\u{202e}'), "{written:?}");
            let (_, value) = written.trim_end().split_once("model=").unwrap();
            assert_eq!(serde_json::from_str::<String>(value).unwrap(), text, "{value}");
        }
    }
}
