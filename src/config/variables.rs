//! `${NAME}`, `${NAME:-default}` and `${file:/path}` in values.
//!
//! They are filled in after the YAML is parsed, so that no variable's text can become structure.

use super::fault::Findings;
use super::node::{Node, Value, join};
use std::fs::File;
use std::io::Read as _;

/// Where variables come from.
pub(super) type Lookup<'a> = &'a dyn Fn(&str) -> Option<String>;

/// `${...}` is hidden from the YAML parser behind characters of a private use plane, so that it may
/// stand anywhere a plain word may, also within `{ }`.
const HIDDEN: u32 = 0xF_0000;
/// Of a file that a `${file:...}` names: it holds a key.
const LARGEST_FILE: u64 = 64 * 1024;
/// Of everything that is filled in.
const MOST_TEXT: usize = 4 << 20;

/// Whether the character is one that this module hides others behind.
pub(super) fn is_hidden(c: char) -> bool {
    (HIDDEN..HIDDEN + 128).contains(&u32::from(c))
}

/// Puts every `${...}` out of the YAML parser's sight, character by character: places stay right.
pub(super) fn hide(text: &str) -> String {
    let hide = |c: char| if c.is_ascii() { char::from_u32(HIDDEN + u32::from(c)).unwrap_or(c) } else { c };
    let mut hidden = String::with_capacity(text.len());
    for mut line in text.split_inclusive('\n') {
        while let Some(start) = line.find("${")
            && let Some(length) = line[start..].find('}')
        {
            let end = start + length + 1;
            hidden.push_str(&line[..start]);
            hidden.extend(line[start..end].chars().map(hide));
            line = &line[end..];
        }
        hidden.push_str(line);
    }
    hidden
}

/// What the characters stood for before they were hidden.
pub(super) fn reveal(text: &str) -> String {
    let show = |c: char| if is_hidden(c) { char::from_u32(u32::from(c) - HIDDEN).unwrap_or(c) } else { c };
    text.chars().map(show).collect()
}

/// Replaces every `${...}` in the values of a tree.
pub(super) fn fill_in(root: &mut Node, lookup: Lookup<'_>, findings: &Findings) {
    Filling { lookup, findings, filled: 0 }.fill(root, "");
}

struct Filling<'a> {
    lookup: Lookup<'a>,
    findings: &'a Findings,
    /// How much text was filled in.
    filled: usize,
}

impl Filling<'_> {
    fn fill(&mut self, node: &mut Node, path: &str) {
        match &mut node.value {
            Value::List(items) => {
                for (index, item) in items.iter_mut().enumerate() {
                    self.fill(item, &format!("{path}[{index}]"));
                }
            }
            Value::Map(entries) => {
                for (key, value) in entries {
                    self.fill(value, &join(path, &key.name));
                }
            }
            Value::Scalar(scalar) if !scalar.is_foreign => {
                let text = reveal(&scalar.text);
                if !text.contains("${") {
                    return;
                }
                scalar.is_foreign = true;
                match self.resolve(&text) {
                    Ok(resolved) => scalar.text = resolved,
                    Err(message) => {
                        self.findings.fault(&node.place, path, message);
                        node.value = Value::Unknown;
                    }
                }
            }
            Value::Scalar(_) | Value::Unknown => {}
        }
    }

    fn resolve(&mut self, text: &str) -> Result<String, String> {
        let mut resolved = String::new();
        let mut rest = text;
        while let Some((before, reference)) = rest.split_once("${") {
            let (reference, after) = reference.split_once('}').ok_or("\"${\" is not closed by a \"}\"")?;
            let value = self.look_up(reference)?;
            self.filled += value.len();
            if self.filled > MOST_TEXT {
                return Err(format!(
                    "the variables and files of this config hold more than {} MiB",
                    MOST_TEXT >> 20
                ));
            }
            resolved.push_str(before);
            resolved.push_str(&value);
            rest = after;
        }
        resolved.push_str(rest);
        Ok(resolved)
    }

    fn look_up(&self, reference: &str) -> Result<String, String> {
        if let Some(path) = reference.strip_prefix("file:") {
            return read(path).map_err(|e| format!("the file {path} cannot be read: {e}"));
        }
        let (name, default) = match reference.split_once(":-") {
            Some((name, default)) => (name, Some(default)),
            None => (reference, None),
        };
        // What stands here may be a key by mistake: it is not repeated.
        if name.is_empty() || !name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_') {
            return Err("this names no variable: write ${NAME}, ${NAME:-default} or ${file:/path}".to_owned());
        }
        if default.is_some_and(|default| default.contains("${")) {
            return Err("a default cannot hold another ${...}".to_owned());
        }
        // As in a shell, an empty variable takes the default too.
        let value = (self.lookup)(name).filter(|value| default.is_none() || !value.is_empty());
        value.or_else(|| default.map(str::to_owned)).ok_or_else(|| {
            format!("the variable {name} is not set; set it, or give a default: ${{{name}:-value}}")
        })
    }
}

fn read(path: &str) -> std::io::Result<String> {
    let mut content = String::new();
    File::open(path)?.take(LARGEST_FILE + 1).read_to_string(&mut content)?;
    if content.len() as u64 > LARGEST_FILE {
        return Err(std::io::Error::other(format!("it is larger than {} KiB", LARGEST_FILE / 1024)));
    }
    Ok(content.trim().to_owned())
}
