//! The figures of an earlier run, in a text file next to this one: profile, scenario, instructions, allocations, bytes.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;

/// Builds with overflow checks execute more instructions.
const PROFILE: &str = if cfg!(debug_assertions) { "checked" } else { "release" };

/// The costs of one unit of a scenario.
#[derive(Clone, Copy)]
pub(crate) struct Costs {
    /// `None`: they were not counted.
    pub(crate) instructions: Option<f64>,
    /// Calls of the allocator.
    pub(crate) allocations: f64,
    /// Bytes that these calls requested.
    pub(crate) bytes: f64,
}

/// The figures of all profiles, by profile and scenario.
pub(crate) struct Baseline(BTreeMap<(String, String), Costs>);

impl Baseline {
    pub(crate) fn load() -> Self {
        let text = fs::read_to_string(path()).unwrap_or_default();
        Self(text.lines().filter(|line| !line.starts_with('#')).filter_map(parse).collect())
    }

    /// The figures of this build's profile.
    pub(crate) fn of(&self, scenario: &str) -> Option<Costs> {
        self.0.get(&(PROFILE.to_owned(), scenario.to_owned())).copied()
    }
}

/// Replaces the figures of this build's profile.
pub(crate) fn record<'a>(figures: impl Iterator<Item = (&'a str, Costs)>) {
    let Baseline(mut all) = Baseline::load();
    for (scenario, costs) in figures {
        all.insert((PROFILE.to_owned(), scenario.to_owned()), costs);
    }
    let mut text = "# profile scenario instructions allocations bytes; written by `cargo bench --bench costs -- --record`\n".to_owned();
    for ((profile, scenario), costs) in all {
        let instructions = costs.instructions.map_or("-".to_owned(), |n| format!("{n:.0}"));
        writeln!(text, "{profile} {scenario} {instructions} {:.1} {:.0}", costs.allocations, costs.bytes)
            .unwrap();
    }
    fs::write(path(), text).unwrap();
}

fn path() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/benches/costs/baseline.txt"))
}

fn parse(line: &str) -> Option<((String, String), Costs)> {
    let mut fields = line.split_whitespace();
    let key = (fields.next()?.to_owned(), fields.next()?.to_owned());
    let instructions = fields.next()?.parse().ok();
    let (allocations, bytes) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
    Some((key, Costs { instructions, allocations, bytes }))
}
