//! `models`: how to count for models that Tollgate does not have in its own table, or has with other figures.

use super::setting::{Section, Setting};
use super::{ModelRule, TokenizerChoice, units};
use crate::glob::Glob;
use std::path::PathBuf;

const MAX_OVERHEAD: u32 = 1_000_000;
/// In thousandths.
const MAX_TOOL_FACTOR: u32 = 100_000;

/// Reads the rules in the order of the file.
pub(super) fn read(top: &Section<'_>) -> Vec<ModelRule> {
    let rules = top.get("models").and_then(|setting| setting.list()).unwrap_or_default();
    rules.iter().filter_map(rule).collect()
}

fn rule(setting: &Setting<'_>) -> Option<ModelRule> {
    let section = setting.section(&["match", "encoding", "tokenizer", "model", "overhead", "tool_factor"])?;
    let pattern = section.require("match", "\"llama-3*\"").and_then(|s| s.text().map(Glob::new));
    let encodings = [
        ("o200k_base", TokenizerChoice::O200k),
        ("o200k_harmony", TokenizerChoice::O200k),
        ("cl100k_base", TokenizerChoice::Cl100k),
    ];
    let overhead = section.get("overhead");
    let tool_factor = section.get("tool_factor");
    let tokenizer = match (section.get("encoding"), section.get("tokenizer"), section.get("model")) {
        (Some(encoding), None, None) => Some(encoding.choice(&encodings)?),
        (None, Some(file), None) => Some(TokenizerChoice::File(tokenizer_file(&file)?)),
        (None, None, Some(model)) => Some(TokenizerChoice::SameAs(model.text()?.to_owned())),
        (None, None, None) if overhead.is_some() || tool_factor.is_some() => None,
        _ => {
            setting.fault(
                "set exactly one of encoding (such as o200k_base), tokenizer (the path of a tokenizer.json) and model \
                 (the name of the model behind an alias); only a rule with overhead or tool_factor needs none of them",
            );
            None
        }
    };
    Some(ModelRule {
        pattern: pattern?,
        tokenizer,
        overhead: overhead.and_then(|setting| setting.parsed(tokens, "a number of tokens from 0 to 1000000")),
        tool_factor: tool_factor
            .and_then(|setting| setting.parsed(thousandths, "a number from 0 to 100, such as 1.5")),
    })
}

fn tokens(text: &str) -> Option<u32> {
    u32::try_from(units::amount(text)?).ok().filter(|&tokens| tokens <= MAX_OVERHEAD)
}

/// A decimal number with at most three decimals.
fn thousandths(text: &str) -> Option<u32> {
    let (whole, decimals) = text.split_once('.').unwrap_or((text, "0"));
    let is_number = |digits: &str| !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
    if !is_number(whole) || !is_number(decimals) || decimals.len() > 3 {
        return None;
    }
    let decimals: u32 = format!("{decimals:0<3}").parse().ok()?;
    let thousandths = whole.parse::<u32>().ok()?.checked_mul(1_000)?.checked_add(decimals)?;
    (thousandths <= MAX_TOOL_FACTOR).then_some(thousandths)
}

/// The path of an existing file that looks like a tokenizer.json. This function does not load the tokenizer.
fn tokenizer_file(setting: &Setting<'_>) -> Option<PathBuf> {
    #[derive(serde::Deserialize)]
    struct TokenizerJson {
        #[serde(rename = "model")]
        _model: serde::de::IgnoredAny,
    }
    let path = setting.path()?;
    let file = std::fs::File::open(&path).map_err(|error| format!("this file cannot be read: {error}"));
    let checked = file.and_then(|file| {
        serde_json::from_reader(std::io::BufReader::new(file))
            .map(|_: TokenizerJson| ())
            .map_err(|error| format!("this file is not a tokenizer.json: {error}"))
    });
    checked.map_err(|message| setting.fault(message)).ok()?;
    Some(path)
}
