//! The `models` section of the config: it selects a model or a vocabulary by the name of a model.

use super::file::FileVocabulary;
use super::models::Model;
use super::vocabulary::Encoding;
use crate::config::{ModelRule, TokenizerChoice};
use crate::glob::Glob;
use std::sync::Arc;

/// Finds models by name: in the rules of the config, then in the built-in tables. The default has no rules.
#[derive(Clone, Debug, Default)]
pub struct Models(Arc<[LoadedRule]>);

#[derive(Debug)]
struct LoadedRule {
    pattern: Glob,
    costs: ModelCosts,
    overhead: Option<u32>,
    tool_factor: Option<u32>,
}

/// How the models that match a rule are counted.
#[derive(Debug)]
enum ModelCosts {
    /// With this vocabulary.
    By(Encoding),
    /// Like the model of this name in the built-in tables.
    Like(String),
    /// Like the requested model.
    BuiltIn,
}

impl Models {
    /// Loads the rules of a config and the files that they name. A large file takes a second.
    ///
    /// # Errors
    /// A file cannot be used. The text names the file and the setting.
    pub fn load(rules: &[ModelRule]) -> Result<Self, String> {
        let load = |(at, rule): (usize, &ModelRule)| {
            let costs = match &rule.tokenizer {
                None => ModelCosts::BuiltIn,
                Some(TokenizerChoice::O200k) => ModelCosts::By(Encoding::O200k),
                Some(TokenizerChoice::Cl100k) => ModelCosts::By(Encoding::Cl100k),
                Some(TokenizerChoice::SameAs(model)) => ModelCosts::Like(model.clone()),
                Some(TokenizerChoice::File(path)) => {
                    let refused = |why| format!("models[{at}].tokenizer: {}: {why}", path.display());
                    ModelCosts::By(Encoding::File(FileVocabulary::load(path).map_err(refused)?))
                }
            };
            let &ModelRule { overhead, tool_factor, .. } = rule;
            Ok(LoadedRule { pattern: rule.pattern.clone(), costs, overhead, tool_factor })
        };
        rules.iter().enumerate().map(load).collect::<Result<_, String>>().map(Self)
    }

    /// The model of this name: from the first rule that matches, else from the built-in tables. The costs of an
    /// unknown model are guesses, rather too high than too low.
    pub fn named(&self, name: &str) -> Model {
        let Some(rule) = self.0.iter().find(|rule| rule.pattern.matches(name)) else {
            return Model::built_in(name);
        };
        let model = match &rule.costs {
            ModelCosts::By(encoding) => Model::built_in(name).with_encoding(*encoding),
            ModelCosts::Like(other) => Model::built_in(other),
            ModelCosts::BuiltIn => Model::built_in(name),
        };
        model.with_figures(rule.overhead, rule.tool_factor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    fn rules(rules: &[(&str, TokenizerChoice)]) -> Result<Models, String> {
        let rule = |(pattern, tokenizer): &(&str, TokenizerChoice)| ModelRule {
            pattern: Glob::new(*pattern),
            tokenizer: Some(tokenizer.clone()),
            overhead: None,
            tool_factor: None,
        };
        Models::load(&rules.iter().map(rule).collect::<Vec<_>>())
    }

    #[test]
    fn the_first_matching_rule_precedes_the_built_in_tables() {
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
        // An unknown name with a vocabulary of OpenAI's is taken as a model of OpenAI's.
        assert_eq!(models.named("who-knows"), Model::built_in("gpt-4o"));
        assert!(!Models::default().named("who-knows").is_known);
    }

    #[test]
    fn an_unusable_file_is_named_with_its_setting() {
        for path in ["no/such/file.json", "Cargo.toml", "."] {
            let refused =
                rules(&[("a", TokenizerChoice::O200k), ("b", TokenizerChoice::File(PathBuf::from(path)))]);
            let refused = refused.unwrap_err();
            assert!(refused.starts_with(&format!("models[1].tokenizer: {path}: ")), "{refused}");
        }
    }
}
