//! The config's own word on models, before the built-in table.

use super::file::FileVocabulary;
use super::models::Model;
use super::tokenizer::Encoding;
use crate::config::{ModelRule, TokenizerChoice};
use crate::glob::Glob;
use std::sync::Arc;

/// How models are told by their names. By default only the built-in table tells.
#[derive(Clone, Debug, Default)]
pub struct Models(Arc<[Rule]>);

#[derive(Debug)]
struct Rule {
    pattern: Glob,
    counts: Counts,
}

#[derive(Debug)]
enum Counts {
    By(Encoding),
    Like(String),
}

impl Models {
    /// The rules of a config. Loads the files that they name: a second for a large one.
    ///
    /// # Errors
    /// A file cannot be used; the text names it, and the setting.
    pub fn load(rules: &[ModelRule]) -> Result<Self, String> {
        let load = |(at, rule): (usize, &ModelRule)| {
            let counts = match &rule.tokenizer {
                TokenizerChoice::O200k => Counts::By(Encoding::O200k),
                TokenizerChoice::Cl100k => Counts::By(Encoding::Cl100k),
                TokenizerChoice::SameAs(model) => Counts::Like(model.clone()),
                TokenizerChoice::File(path) => {
                    let refused = |why| format!("models[{at}].tokenizer: {}: {why}", path.display());
                    Counts::By(Encoding::File(FileVocabulary::load(path).map_err(refused)?))
                }
            };
            Ok(Rule { pattern: rule.pattern.clone(), counts })
        };
        rules.iter().enumerate().map(load).collect::<Result<_, String>>().map(Self)
    }

    /// The model of this name: by the first rule that matches, else by the built-in table, else a guess on
    /// the safe side.
    pub fn named(&self, name: &str) -> Model {
        match self.0.iter().find(|rule| rule.pattern.matches(name)).map(|rule| &rule.counts) {
            Some(Counts::By(encoding)) => Model::built_in(name).counted_by(*encoding),
            Some(Counts::Like(other)) => Model::built_in(other),
            None => Model::built_in(name),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    fn rules(rules: &[(&str, TokenizerChoice)]) -> Result<Models, String> {
        let rule = |(pattern, tokenizer): &(&str, TokenizerChoice)| ModelRule {
            pattern: Glob::new(*pattern),
            tokenizer: tokenizer.clone(),
        };
        Models::load(&rules.iter().map(rule).collect::<Vec<_>>())
    }

    #[test]
    fn the_first_rule_that_matches_comes_before_the_table() {
        let models = rules(&[
            ("my-*", TokenizerChoice::Cl100k),
            ("prod", TokenizerChoice::SameAs("gpt-5-mini".to_owned())),
            ("*", TokenizerChoice::O200k),
        ])
        .unwrap();
        assert_eq!(models.named("my-gpt-4o").tokenizer.encoding, Encoding::Cl100k);
        assert_eq!(models.named("prod"), Model::built_in("gpt-5-mini"));
        let claude = models.named("claude-3").tokenizer;
        assert_eq!((claude.encoding, claude.percent), (Encoding::O200k, 100));
        // A deployment with OpenAI's encoding is a model of OpenAI's.
        assert_eq!(models.named("who-knows"), Model::built_in("gpt-4o"));
        assert!(!Models::default().named("who-knows").is_known);
    }

    #[test]
    fn a_file_that_cannot_be_used_is_named() {
        for path in ["no/such/file.json", "Cargo.toml", "."] {
            let refused =
                rules(&[("a", TokenizerChoice::O200k), ("b", TokenizerChoice::File(PathBuf::from(path)))]);
            let refused = refused.unwrap_err();
            assert!(refused.starts_with(&format!("models[1].tokenizer: {path}: ")), "{refused}");
        }
    }
}
