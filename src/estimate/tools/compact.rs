//! JSON without white space, and optionally without some members; the number of separators in JSON.

use std::borrow::Cow;

/// The JSON schema that the answer has to match.
#[derive(Debug)]
pub(in super::super) struct AnswerSchema<'a> {
    pub(in super::super) name: Cow<'a, str>,
    pub(in super::super) json: &'a str,
}

impl AnswerSchema<'_> {
    /// The text in the prompt of OpenAI's models: compact JSON without the keywords that only validate.
    pub(in super::super) fn rendered(&self) -> String {
        let mut text = format!("# Response Formats\n\n## {}\n\n", self.name);
        compact(self.json, VALIDATION_KEYWORDS, &mut text);
        text
    }

    /// The schema as compact JSON.
    pub(in super::super) fn whole(&self) -> String {
        let mut text = String::new();
        compact(self.json, &[], &mut text);
        text
    }
}

/// The keywords of JSON Schema that only validate. OpenAI leaves them out of the prompt.
const VALIDATION_KEYWORDS: &[&str] = &[
    "\"additionalProperties\"",
    "\"required\"",
    "\"$schema\"",
    "\"format\"",
    "\"minimum\"",
    "\"maximum\"",
    "\"exclusiveMinimum\"",
    "\"exclusiveMaximum\"",
    "\"multipleOf\"",
    "\"minLength\"",
    "\"maxLength\"",
    "\"minItems\"",
    "\"maxItems\"",
    "\"pattern\"",
];

/// Appends `json` to `out` without white space between its tokens, and without the schema members whose
/// quoted names are in `omit`.
///
/// Works in one pass and without a tree: at the end of an omitted member, it truncates `out` to the
/// member's start.
pub(in super::super) fn compact(json: &str, omit: &[&str], out: &mut String) {
    let mut containers: Vec<OpenContainer> = Vec::new();
    let mut chars = json.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            c if c.is_ascii_whitespace() => {}
            '"' => {
                let end = at + 1 + end_of_string(&json[at + 1..]);
                let text = json.get(at..end).unwrap_or_default();
                if let Some(open) = containers.last_mut().filter(|open| open.expects_key) {
                    open.begin_member(text, omit, out.len());
                }
                out.push_str(text);
                while chars.offset() < end && chars.next().is_some() {}
            }
            '{' | '[' => {
                let has_custom_names = containers.last().is_some_and(|open| open.value_has_custom_names);
                containers.push(OpenContainer {
                    is_object: c == '{',
                    expects_key: c == '{',
                    has_custom_names,
                    ..OpenContainer::default()
                });
                out.push(c);
            }
            '}' | ']' => {
                if let Some(mut open) = containers.pop() {
                    open.end_member(out);
                }
                // The last member was omitted.
                if out.ends_with(',') {
                    out.pop();
                }
                out.push(c);
            }
            ',' => {
                let was_omitted = containers.last_mut().is_some_and(|open| open.end_member(out));
                if let Some(open) = containers.last_mut() {
                    open.expects_key = open.is_object;
                }
                if !was_omitted {
                    out.push(',');
                }
            }
            c => out.push(c),
        }
    }
}

/// The length of a string from after its opening quote up to and including the closing one.
fn end_of_string(rest: &str) -> usize {
    let mut at = 0;
    while let Some(found) = memchr::memchr2(b'"', b'\\', &rest.as_bytes()[at..]) {
        at += found;
        if rest.as_bytes()[at] == b'"' {
            return at + 1;
        }
        at = (at + 2).min(rest.len());
    }
    rest.len()
}

/// An object or array whose end has not been read yet.
#[derive(Default)]
struct OpenContainer {
    is_object: bool,
    expects_key: bool,
    /// Whether the caller chose the names of the members, as in `properties`. These names are not keywords.
    has_custom_names: bool,
    /// Whether the current member is an object with names that the caller chose.
    value_has_custom_names: bool,
    /// Length of the output before the current member, if that member is omitted.
    omit_from: Option<usize>,
}

impl OpenContainer {
    /// `at` is the length of the output.
    fn begin_member(&mut self, key: &str, omit: &[&str], at: usize) {
        self.expects_key = false;
        let is_keyword = !self.has_custom_names;
        self.value_has_custom_names =
            is_keyword && matches!(key, "\"properties\"" | "\"$defs\"" | "\"definitions\"");
        self.omit_from = (is_keyword && omit.contains(&key)).then_some(at);
    }

    /// Returns whether the member was omitted.
    fn end_member(&mut self, out: &mut String) -> bool {
        self.value_has_custom_names = false;
        self.omit_from.take().map(|at| out.truncate(at)).is_some()
    }
}

/// The number of colons and commas between the tokens of JSON; `None` if the text is neither an object nor a list.
pub(in super::super) fn separators(text: &str) -> Option<u64> {
    if !text.starts_with(['{', '[']) || serde_json::from_str::<serde::de::IgnoredAny>(text).is_err() {
        return None;
    }
    let (mut in_string, mut count) = (false, 0);
    let mut bytes = text.bytes().peekable();
    while let Some(byte) = bytes.next() {
        match byte {
            b'"' => in_string = !in_string,
            b'\\' if in_string => drop(bytes.next()),
            // A separator that has a space already costs nothing more.
            b':' | b',' if !in_string => count += u64::from(bytes.peek() != Some(&b' ')),
            _ => {}
        }
    }
    Some(count)
}
