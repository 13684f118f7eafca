//! `${NAME}`, `${NAME:-default}` and `${file:/path}` in values.
//!
//! They are resolved after the YAML is parsed, so that the text of a variable cannot change the structure of the file.

use super::fault::Findings;
use super::tree::{YamlNode, YamlValue, join};
use std::fs::File;
use std::io::Read as _;
use std::path::Path;

/// Returns the value of an environment variable.
pub(super) type Lookup<'a> = &'a dyn Fn(&str) -> Option<String>;

/// The first code point of a private use plane. Each ASCII character of a `${...}` is replaced by a character of this
/// plane before the YAML parser runs. So a `${...}` may appear wherever a plain word may, also within `{ }`.
const MASK_BASE: u32 = 0xF_0000;
/// Maximum size in bytes of a file that a `${file:...}` names. Such a file contains a key.
const MAX_FILE_BYTES: u64 = 64 * 1024;
/// Maximum size in bytes of all inserted text.
const MAX_INSERTED_BYTES: usize = 4 << 20;

/// Whether this module uses the character to replace another one.
pub(super) fn is_masked(c: char) -> bool {
    (MASK_BASE..MASK_BASE + 128).contains(&u32::from(c))
}

/// Masks every `${...}` from the YAML parser, character by character, so that columns do not change.
pub(super) fn mask(text: &str) -> String {
    let mask = |c: char| if c.is_ascii() { char::from_u32(MASK_BASE + u32::from(c)).unwrap_or(c) } else { c };
    let mut masked = String::with_capacity(text.len());
    for mut line in text.split_inclusive('\n') {
        while let Some(start) = line.find("${")
            && let Some(length) = line[start..].find('}')
        {
            let end = start + length + 1;
            masked.push_str(&line[..start]);
            masked.extend(line[start..end].chars().map(mask));
            line = &line[end..];
        }
        masked.push_str(line);
    }
    masked
}

/// Restores the characters that [`mask`] replaced.
pub(super) fn unmask(text: &str) -> String {
    let unmask =
        |c: char| if is_masked(c) { char::from_u32(u32::from(c) - MASK_BASE).unwrap_or(c) } else { c };
    text.chars().map(unmask).collect()
}

/// Replaces every `${...}` in the values of a tree, and records those that cannot be resolved and the files that values name.
pub(super) fn fill_in(root: &mut YamlNode, lookup: Lookup<'_>, findings: &Findings) {
    Resolver { lookup, findings, inserted: 0 }.fill(root, "");
}

struct Resolver<'a> {
    lookup: Lookup<'a>,
    findings: &'a Findings,
    /// Bytes of text inserted so far.
    inserted: usize,
}

impl Resolver<'_> {
    fn fill(&mut self, node: &mut YamlNode, path: &str) {
        match &mut node.value {
            YamlValue::List(items) => {
                for (index, item) in items.iter_mut().enumerate() {
                    self.fill(item, &format!("{path}[{index}]"));
                }
            }
            YamlValue::Map(entries) => {
                for (key, value) in entries {
                    self.fill(value, &join(path, &key.name));
                }
            }
            YamlValue::Scalar(scalar) if !scalar.is_external => {
                let text = unmask(&scalar.text);
                if !text.contains("${") {
                    return;
                }
                scalar.is_external = true;
                match self.resolve(&text) {
                    Ok(resolved) => scalar.text = resolved,
                    Err(message) => {
                        self.findings.fault(&node.location, path, message);
                        node.value = YamlValue::Unknown;
                    }
                }
            }
            YamlValue::Scalar(_) | YamlValue::Unknown => {}
        }
    }

    fn resolve(&mut self, text: &str) -> Result<String, String> {
        let mut resolved = String::new();
        let mut rest = text;
        while let Some((before, reference)) = rest.split_once("${") {
            let (reference, after) = reference.split_once('}').ok_or("\"${\" has no closing \"}\"")?;
            let value = self.look_up(reference)?;
            self.inserted += value.len();
            if self.inserted > MAX_INSERTED_BYTES {
                return Err(format!(
                    "the variables and files of this config are larger than {} MiB together",
                    MAX_INSERTED_BYTES >> 20
                ));
            }
            resolved.push_str(before);
            resolved.push_str(&value);
            rest = after;
        }
        resolved.push_str(rest);
        Ok(resolved)
    }

    fn look_up(&mut self, reference: &str) -> Result<String, String> {
        if let Some(path) = reference.strip_prefix("file:") {
            self.findings.add_named_file(Path::new(path));
            return read(path).map_err(|e| format!("the file {path} cannot be read: {e}"));
        }
        let (name, default) = match reference.split_once(":-") {
            Some((name, default)) => (name, Some(default)),
            None => (reference, None),
        };
        // The message does not contain the name, which may be a key by mistake.
        if name.is_empty() || !name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_') {
            return Err(
                "this is not a valid reference; write ${NAME}, ${NAME:-default} or ${file:/path}".to_owned()
            );
        }
        if default.is_some_and(|default| default.contains("${")) {
            return Err("a default must not contain another ${...}".to_owned());
        }
        // As in a shell, the default also replaces an empty variable.
        let value = (self.lookup)(name).filter(|value| default.is_none() || !value.is_empty());
        value.or_else(|| default.map(str::to_owned)).ok_or_else(|| {
            format!("the variable {name} is not set; set it or write a default: ${{{name}:-value}}")
        })
    }
}

fn read(path: &str) -> std::io::Result<String> {
    let mut content = String::new();
    File::open(path)?.take(MAX_FILE_BYTES + 1).read_to_string(&mut content)?;
    if content.len() as u64 > MAX_FILE_BYTES {
        return Err(std::io::Error::other(format!("it is larger than {} KiB", MAX_FILE_BYTES / 1024)));
    }
    Ok(content.trim().to_owned())
}
