//! The prompt estimate against what providers reported.
mod exchange;

use std::collections::HashMap;
use tollgate::body::Body;
use tollgate::estimate::{Calibration, Models, Part};

fn main() {
    let mut learned: HashMap<String, (Calibration, u32)> = HashMap::new();
    for file in exchange::files(&exchange::folder()) {
        for e in exchange::read(&file) {
            let (Some(api), Some(text), Some(reported)) = (e.api(), e.exact_request(), e.reported()) else {
                continue;
            };
            let body = match Body::read(api, text.as_bytes()) {
                Ok(b) => b,
                Err(x) => {
                    eprintln!("{} {} {x}", e.id, e.api);
                    continue;
                }
            };
            let name = body.model.clone().map(|m| m.into_owned()).or(e.model.clone()).unwrap_or_default();
            let model = Models::default().named(&name);
            let est = body.prompt.estimate(&model);
            let key = format!("{}|{}|{:?}", e.provider, name, est.kind);
            let (cal, n) = learned.entry(key).or_default();
            let corrected = cal.correction().apply(est.tokens());
            if !est.is_partial {
                cal.learn(est.tokens(), reported);
                *n += 1;
            }
            println!(
                "{}",
                serde_json::json!({"id": e.id, "api": e.api, "provider": e.provider, "model": name, "est": est.tokens(), "n": n, "cor": corrected,
               "rep": reported, "f": e.features, "parts": Part::ALL.map(|p| est.of(p)), "unseen": u64::from(est.is_partial), "kind": format!("{:?}", est.kind)})
            );
        }
    }
}
