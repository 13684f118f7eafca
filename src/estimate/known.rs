//! Which names of models are known. Callers can invent any name, and bounded tables keep the known ones.

use super::models::Model;
use crate::glob::Glob;

/// Public model names, which may appear in metrics.
pub(crate) const PUBLIC_MODELS: &[&str] = &[
    "gpt-3.5-turbo",
    "gpt-4",
    "gpt-4-turbo",
    "gpt-4.1",
    "gpt-4.1-mini",
    "gpt-4.1-nano",
    "gpt-4o",
    "gpt-4o-mini",
    "gpt-5",
    "gpt-5-mini",
    "gpt-5-nano",
    "gpt-5.1",
    "o1",
    "o3",
    "o3-mini",
    "o4-mini",
    "text-embedding-3-large",
    "text-embedding-3-small",
    "text-embedding-ada-002",
];

/// How well a name is known. In a full table, a name replaces one of a lower rank.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum ModelRank {
    /// Neither the built-in table nor the config knows the name.
    #[default]
    Invented,
    /// The name belongs to a family of the built-in table, or matches a pattern of the config.
    Matching,
    /// The name is public, or the config has it without wildcards.
    Named,
}

/// The model names that an environment knows: those of the built-in table and of its config.
#[derive(Clone, Debug, Default)]
pub(crate) struct KnownModels(Vec<Glob>);

impl KnownModels {
    /// The built-in names and these patterns of the config.
    pub(crate) fn with(patterns: impl IntoIterator<Item = Glob>) -> Self {
        // A pattern that matches every name knows none.
        let is_selective = |pattern: &Glob| !pattern.as_str().bytes().all(|byte| byte == b'*');
        Self(patterns.into_iter().filter(is_selective).collect())
    }

    /// How well a name is known.
    pub(crate) fn rank(&self, name: &str) -> ModelRank {
        if PUBLIC_MODELS.contains(&name) || self.0.iter().any(|pattern| pattern.as_str() == name) {
            ModelRank::Named
        } else if self.0.iter().any(|pattern| pattern.matches(name)) || Model::built_in(name).is_known {
            ModelRank::Matching
        } else {
            ModelRank::Invented
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_ranked_by_the_built_in_table_and_the_config() {
        let known = KnownModels::with(["*", "team-*", "my-model"].map(Glob::new));
        for (name, rank) in [
            ("gpt-4o", ModelRank::Named),
            ("my-model", ModelRank::Named),
            ("gpt-4o-2024-08-06", ModelRank::Matching),
            ("claude-sonnet-4-5", ModelRank::Matching),
            ("team-a", ModelRank::Matching),
            ("*", ModelRank::Invented),
            ("my-model-2", ModelRank::Invented),
            ("", ModelRank::Invented),
        ] {
            assert_eq!(known.rank(name), rank, "{name}");
        }
    }
}
