//! Token counts of OpenAI's API, as published by third parties.

use base64::Engine as _;
use serde_json::{Value, json};
use std::path::Path;
use tollgate::api::Api;
use tollgate::body::{Body, BodyText};
use tollgate::estimate::{Models, PromptEstimate, PromptPart};

pub(crate) fn vectors(data: &Path) -> Option<Vec<Value>> {
    let text = std::fs::read_to_string(data.join("golden-vectors.jsonl")).ok()?;
    Some(text.lines().map(|line| serde_json::from_str(line).unwrap()).collect())
}

/// Whether each estimate is exact, or has the same error as the published rules.
pub(crate) fn are_exact(vectors: &[Value]) -> bool {
    let (mut exact, mut missed) = (0, 0);
    for vector in vectors {
        let (want, got) = if let Some(image) = vector.get("image") {
            (&vector["image_tokens"], of_image(image))
        } else {
            (&vector["prompt_tokens"], estimate(&with_images(&vector["body"])).tokens())
        };
        let want = want.as_u64().unwrap();
        let rule = vector["rule_gives"].as_u64().unwrap_or(want);
        exact += u32::from(got == want);
        if got != want && got != rule {
            missed += 1;
            eprintln!("estimated {got}, the API counted {want}: {vector}");
        }
    }
    println!("golden vectors: {exact} of {} exact, {missed} missed", vectors.len());
    missed == 0 && exact >= 40
}

fn estimate(body: &Value) -> PromptEstimate {
    let text = body.to_string();
    let model = body["model"].as_str().unwrap_or_default();
    let body_text = BodyText::of(text.as_bytes()).unwrap_or_else(|fault| panic!("{fault}: {text}"));
    let body = Body::read(Api::Chat, &body_text).unwrap_or_else(|fault| panic!("{fault}: {text}"));
    body.prompt.estimate(&Models::default().named(model))
}

fn of_image(image: &Value) -> u64 {
    let part =
        json!({"type": "image_url", "image_url": {"size_px": image["size_px"], "detail": image["detail"]}});
    let body = json!({"model": image["model"], "messages": [{"role": "user", "content": [part]}]});
    estimate(&with_images(&body)).of(PromptPart::Images)
}

/// Replaces each image with a PNG header of its size, because the vectors contain only the sizes of images.
fn with_images(body: &Value) -> Value {
    let mut body = body.clone();
    let parts = body["messages"].as_array_mut().into_iter().flatten();
    for part in parts.flat_map(|message| message["content"].as_array_mut().into_iter().flatten()) {
        let size = part.pointer("/image_url/size_px").or_else(|| part.get("size_px")).cloned();
        if let Some([width, height]) = size.as_ref().and_then(Value::as_array).map(Vec::as_slice) {
            part["image_url"]["url"] = Value::String(png(width, height));
        }
    }
    body
}

fn png(width: &Value, height: &Value) -> String {
    let side = |side: &Value| u32::try_from(side.as_u64().unwrap()).unwrap().to_be_bytes();
    let header =
        [b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR".as_slice(), &side(width), &side(height), b"\x08\x02\0\0\0"]
            .concat();
    format!("data:image/png;base64,{}", base64::engine::general_purpose::STANDARD.encode(header))
}
