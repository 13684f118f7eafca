//! Prints the errors of estimates by API, provider and kind of request.

use crate::figures::EXPERIENCED;
use crate::measured::{Corrected, Measured, quantile};
use std::collections::BTreeMap;

const FEATURES: [(&str, &[&str]); 4] = [
    ("files", &["file", "audio"]),
    ("images", &["image_data", "image_url"]),
    ("tools", &["tools", "functions"]),
    ("schema", &["json_schema"]),
];

pub(crate) fn print(exchanges: &[Measured], orders: &[Vec<Corrected>]) {
    println!(
        "Relative errors in per cent; corrected: after {EXPERIENCED} answers of the kind, in {} orders.\n",
        orders.len()
    );
    println!("| API | provider | requests with | number | exact | median | p90 | corrected: median | p90 |");
    println!("| --- | --- | --- | --- | --- | --- | --- | --- | --- |");
    let mut rows: BTreeMap<(&str, &str, &str), Vec<usize>> = BTreeMap::new();
    for (at, e) in exchanges.iter().enumerate() {
        let feature = FEATURES.iter().find(|(_, features)| e.has(features)).map_or("text", |(name, _)| name);
        let feature = if e.is_partial { "hosted parts" } else { feature };
        rows.entry((e.api.as_str(), &e.provider, feature)).or_default().push(at);
    }
    for ((api, provider, feature), of) in rows {
        let exact = of.iter().filter(|&&at| exchanges[at].estimated == exchanges[at].reported).count();
        let mut raw: Vec<f64> = of.iter().map(|&at| exchanges[at].error(exchanges[at].estimated)).collect();
        let experienced = orders.iter().flat_map(|order| of.iter().map(|&at| (at, order[at])));
        let mut corrected: Vec<f64> = experienced
            .filter(|(_, corrected)| corrected.answers >= EXPERIENCED)
            .map(|(at, corrected)| exchanges[at].error(corrected.tokens))
            .collect();
        let percent = |values: &mut Vec<f64>, share| match values.as_slice() {
            [] => "-".to_owned(),
            _ => format!("{:.1}", 100.0 * quantile(values, share)),
        };
        println!(
            "| {api} | {provider} | {feature} | {} | {:.0} % | {} | {} | {} | {} |",
            of.len(),
            100.0 * exact as f64 / of.len() as f64,
            percent(&mut raw, 0.5),
            percent(&mut raw, 0.9),
            percent(&mut corrected, 0.5),
            percent(&mut corrected, 0.9)
        );
    }
    println!();
}
