//! `models`: the tokenizers of models that Tollgate does not have in its own table.

use super::setting::{Section, Setting};
use super::{ModelRule, TokenizerChoice};
use crate::glob::Glob;
use std::path::PathBuf;

/// Reads the rules in the order of the file.
pub(super) fn read(top: &Section<'_>) -> Vec<ModelRule> {
    let rules = top.get("models").and_then(|setting| setting.list()).unwrap_or_default();
    rules.iter().filter_map(rule).collect()
}

fn rule(setting: &Setting<'_>) -> Option<ModelRule> {
    let section = setting.section(&["match", "encoding", "tokenizer", "model"])?;
    let pattern = section.require("match", "\"llama-3*\"").and_then(|s| s.text().map(Glob::new));
    let encodings = [
        ("o200k_base", TokenizerChoice::O200k),
        ("o200k_harmony", TokenizerChoice::O200k),
        ("cl100k_base", TokenizerChoice::Cl100k),
    ];
    let tokenizer = match (section.get("encoding"), section.get("tokenizer"), section.get("model")) {
        (Some(encoding), None, None) => encoding.choice(&encodings),
        (None, Some(file), None) => tokenizer_file(&file).map(TokenizerChoice::File),
        (None, None, Some(model)) => model.text().map(|name| TokenizerChoice::SameAs(name.to_owned())),
        _ => {
            setting.fault(
                "set exactly one of encoding (such as o200k_base), tokenizer (the path of a tokenizer.json) and model \
                 (the name of the model behind an alias)",
            );
            None
        }
    };
    Some(ModelRule { pattern: pattern?, tokenizer: tokenizer? })
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
