//! Prometheus's text format, for figures that are read when they are requested.
//!
//! The library's gauges would have to be cleared and looked up again for every request of the metrics: that takes ten
//! times as long for thousands of quotas.

use super::catalogue::Metric;
use std::fmt::{Display, Write as _};

/// The samples of one metric.
pub(super) struct Family {
    metric: &'static Metric,
    samples: String,
}

impl Family {
    pub(super) fn new(metric: &'static Metric) -> Self {
        Self { metric, samples: String::new() }
    }

    /// Adds a sample with these labels, in the form that [`labels`] returns.
    pub(super) fn add(&mut self, labels: &str, value: impl Display) {
        // Writing to a string cannot fail.
        let _ = writeln!(self.samples, "{}{labels} {value}", self.metric.name);
    }

    /// Appends the metric to the text, unless it has no samples.
    pub(super) fn append_to(&self, text: &mut String) {
        if self.samples.is_empty() {
            return;
        }
        let Metric { name, help, .. } = self.metric;
        let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {}", self.metric.type_name());
        text.push_str(&self.samples);
    }
}

/// The labels of a sample: their names and values.
pub(super) fn labels(names: &[&str], values: &[&str]) -> String {
    let mut text = String::with_capacity(128);
    for (index, (name, value)) in names.iter().zip(values).enumerate() {
        text.push_str(if index == 0 { "{" } else { "," });
        text.push_str(name);
        text.push_str("=\"");
        push_escaped(&mut text, value);
        text.push('"');
    }
    text.push('}');
    text
}

fn push_escaped(text: &mut String, value: &str) {
    for character in value.chars() {
        match character {
            '\\' => text.push_str("\\\\"),
            '"' => text.push_str("\\\""),
            '\n' => text.push_str("\\n"),
            other => text.push(other),
        }
    }
}

/// A time in seconds, from milliseconds.
pub(super) fn seconds(ms: i64) -> f64 {
    #[allow(clippy::cast_precision_loss)] // exact for 285,000 years
    let ms = ms as f64;
    ms / 1_000.0
}

#[cfg(test)]
mod tests {
    use super::super::catalogue::QUOTA_LEVEL;
    use super::*;

    #[test]
    fn samples_follow_the_head_of_their_metric_and_values_are_escaped() {
        let mut family = Family::new(&QUOTA_LEVEL);
        let mut text = String::new();
        family.append_to(&mut text);
        assert_eq!(text, "", "no head without samples");
        family.add(&labels(&["a", "b"], &["x\"y\\z\n", ""]), -5);
        family.add("", seconds(1_500));
        family.append_to(&mut text);
        assert_eq!(
            text,
            "# HELP tollgate_quota_level Amount that is left of a quota; below zero it is debt.\n\
             # TYPE tollgate_quota_level gauge\n\
             tollgate_quota_level{a=\"x\\\"y\\\\z\\n\",b=\"\"} -5\ntollgate_quota_level 1.5\n"
        );
    }
}
