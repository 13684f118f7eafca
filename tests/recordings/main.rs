//! The prompt estimate against what providers reported.
mod exchange;

use tollgate::body::Body;
use tollgate::estimate::{Model, Part};

fn main() {
    for file in exchange::files(&exchange::folder()) {
        for e in exchange::read(&file) {
            let (Some(api), Some(text), Some(reported)) = (e.api(), e.exact_request(), e.reported()) else { continue };
            let body = match Body::read(api, text.as_bytes()) {
                Ok(b) => b,
                Err(x) => { eprintln!("{} {} {x}", e.id, e.api); continue }
            };
            let name = body.model.clone().map(|m| m.into_owned()).or(e.model.clone()).unwrap_or_default();
            let model = Model::named(&[], &name);
            let est = body.prompt.estimate(&model);
            println!("{}", serde_json::json!({"id": e.id, "api": e.api, "provider": e.provider, "model": name, "est": est.tokens(),
               "rep": reported, "f": e.features, "parts": Part::ALL.map(|p| est.of(p)), "unseen": est.unseen, "kind": format!("{:?}", est.kind)}));
        }
    }
}
