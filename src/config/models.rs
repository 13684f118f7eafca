//! `models`: how to count for models that Tollgate does not have in its own table, or has with other figures.

use super::description::{
    DefaultSpec, KeySpec, NONE, PATH, PATTERN, SectionSpec, TextSpec, ValueSpec, Word, text,
};
use super::setting::{Section, Setting};
use super::{ModelRule, TokenizerChoice, units};
use crate::glob::Glob;
use std::path::PathBuf;

const MAX_OVERHEAD: u32 = 1_000_000;
/// In thousandths.
const MAX_TOOL_FACTOR: u32 = 100_000;

/// `models[]`.
pub(super) const MODEL: SectionSpec = SectionSpec {
    name: "model",
    keys: &[
        KeySpec::new(
            "match",
            PATTERN,
            DefaultSpec::Required("\"llama-3*\""),
            "the model names that the rule is for",
        ),
        KeySpec::new(
            "model",
            ValueSpec::Text(text("name")),
            NONE,
            "counts like this model, including images and tools. Prefer it if you know the model",
        )
        .example("gpt-4o"),
        KeySpec::new(
            "encoding",
            ValueSpec::Words(ENCODINGS),
            NONE,
            "counts text with one of OpenAI's vocabularies",
        ),
        KeySpec::new(
            "tokenizer",
            PATH,
            NONE,
            "counts text with a `tokenizer.json` in Hugging Face's format, relative to the working directory of the gateway. The file must exist when the config is read",
        )
        .example("tokenizers/llama-3.json"),
        KeySpec::new(
            "overhead",
            ValueSpec::Amount { min: 0, max: MAX_OVERHEAD as u64 },
            DefaultSpec::Absent("the built-in table's"),
            "tokens per request besides the messages. Replaces the figure of the built-in table",
        )
        .example("12"),
        KeySpec::new(
            "tool_factor",
            ValueSpec::Decimal(TextSpec {
                label: "decimal number from 0 to 100",
                pattern: r"^[0-9]+(\.[0-9]{1,3})?$",
            }),
            DefaultSpec::Absent("the built-in table's"),
            "multiplies the tokens of tools, for example `0.6` or `1.5`",
        )
        .example("0.6"),
    ],
};

const ENCODINGS: &[Word] = &[Word("o200k_base", ""), Word("o200k_harmony", ""), Word("cl100k_base", "")];

/// Reads the rules in the order of the file.
pub(super) fn read(top: &Section<'_>) -> Vec<ModelRule> {
    let rules = top.get("models").and_then(|setting| setting.list()).unwrap_or_default();
    rules.iter().filter_map(rule).collect()
}

fn rule(setting: &Setting<'_>) -> Option<ModelRule> {
    let section = setting.section(&MODEL)?;
    let pattern = section.require("match").and_then(|s| s.text().map(Glob::new));
    let overhead = section.get("overhead");
    let tool_factor = section.get("tool_factor");
    let tokenizer = match (section.get("encoding"), section.get("tokenizer"), section.get("model")) {
        (Some(encoding), None, None) => Some(match encoding.word(ENCODINGS)? {
            "cl100k_base" => TokenizerChoice::Cl100k,
            _ => TokenizerChoice::O200k,
        }),
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
    let path = setting.file()?;
    let file = std::fs::File::open(&path).map_err(|error| format!("this file cannot be read: {error}"));
    let checked = file.and_then(|file| {
        serde_json::from_reader(std::io::BufReader::new(file))
            .map(|_: TokenizerJson| ())
            .map_err(|error| format!("this file is not a tokenizer.json: {error}"))
    });
    checked.map_err(|message| setting.fault(message)).ok()?;
    Some(path)
}
