//! Writes the effective config as YAML.

use super::Node;
use std::fmt::Write as _;

/// Mappings below this level are written on one line if they are short.
const BLOCK_LEVELS: usize = 2;
/// Maximum length of such a line in bytes, without its indentation.
const MAX_FLOW_BYTES: usize = 100;

pub(super) fn document(root: &Node) -> String {
    let mut text = String::new();
    block(root, 0, &mut text);
    text
}

/// Writes the entries of a mapping or list, each on lines of its own.
fn block(node: &Node, level: usize, text: &mut String) {
    let indent = "  ".repeat(level);
    match node {
        Node::Map(entries) => {
            for (name, node) in entries {
                let _ = write!(text, "{indent}{}:", quoted(name));
                after_key(node, level, text);
            }
        }
        Node::List(items) => {
            for item in items {
                let mut lines = String::new();
                match one_line(item) {
                    Some(line) => lines = format!("{indent}  {line}\n"),
                    None => block(item, level + 1, &mut lines),
                }
                // The dash replaces the last two spaces of the first line's indentation.
                let _ = write!(text, "{indent}- {}", lines.get(indent.len() + 2..).unwrap_or_default());
            }
        }
        scalar => {
            let _ = writeln!(text, "{indent}{}", one_line(scalar).unwrap_or_default());
        }
    }
}

fn after_key(node: &Node, level: usize, text: &mut String) {
    let is_inline = match node {
        Node::Map(entries) => level >= BLOCK_LEVELS || entries.is_empty(),
        _ => true,
    };
    if let Some(line) = one_line(node).filter(|_| is_inline) {
        let _ = writeln!(text, " {line}");
    } else {
        text.push('\n');
        block(node, level + 1, text);
    }
}

/// The node on one line, if it is short and contains no nested mapping in a list.
fn one_line(node: &Node) -> Option<String> {
    let line = match node {
        Node::Text(text) => return Some(quoted(text)),
        Node::Number(text) => return Some(text.clone()),
        Node::Boolean(boolean) => return Some(boolean.to_string()),
        Node::List(items) => {
            if items.iter().any(|item| matches!(item, Node::Map(_))) {
                return None;
            }
            let items: Option<Vec<String>> = items.iter().map(one_line).collect();
            format!("[{}]", items?.join(", "))
        }
        Node::Map(entries) => {
            let entry =
                |(name, node): &(String, Node)| Some(format!("{}: {}", quoted(name), one_line(node)?));
            let entries: Option<Vec<String>> = entries.iter().map(entry).collect();
            let entries = entries?;
            if entries.is_empty() { "{}".to_owned() } else { format!("{{ {} }}", entries.join(", ")) }
        }
    };
    (line.len() <= MAX_FLOW_BYTES).then_some(line)
}

/// The text as a plain word if every YAML reader takes that as text, else in double quotes.
fn quoted(text: &str) -> String {
    if is_plain(text) {
        return text.to_owned();
    }
    let mut quoted = String::from('"');
    for c in text.chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            '\n' => quoted.push_str("\\n"),
            '\t' => quoted.push_str("\\t"),
            c if u32::from(c) < 0x20 || (0x7f..0xa0).contains(&u32::from(c)) => {
                let _ = write!(quoted, "\\x{:02x}", u32::from(c));
            }
            '\u{2028}' | '\u{2029}' | '\u{feff}' => {
                let _ = write!(quoted, "\\u{:04x}", u32::from(c));
            }
            c => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}

fn is_plain(text: &str) -> bool {
    const WORDS_OF_OTHER_TYPES: [&str; 9] = ["null", "true", "false", "yes", "no", "on", "off", "y", "n"];
    let is_word = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.' | b'/');
    let begins_as_text = |b: &u8| b.is_ascii_alphabetic() || *b == b'/';
    let is_text = text.as_bytes().first().is_some_and(begins_as_text)
        && text.replace("://", "/").bytes().all(is_word)
        && !WORDS_OF_OTHER_TYPES.contains(&text.to_ascii_lowercase().as_str());
    is_text || is_with_unit(text)
}

/// A duration or a size, such as `30s`.
fn is_with_unit(text: &str) -> bool {
    let unit = text.trim_start_matches(|c: char| c.is_ascii_digit() || c == '.');
    text.starts_with(|c: char| c.is_ascii_digit())
        && ["ms", "s", "m", "h", "d", "B", "KiB", "MiB", "GiB", "kB", "KB", "MB", "GB"].contains(&unit)
}
