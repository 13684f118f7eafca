//! Fuzzes the readers of files in requests: PDF, images, sound, video, Office documents.

use crate::bodies;
use base64::Engine as _;
use tollgate::api::Api;

/// Names and media types, which select a reader.
const KINDS: [(&str, &str); 8] = [
    ("a.pdf", "application/pdf"),
    ("a.png", "image/png"),
    ("a.jpg", "image/jpeg"),
    ("a.webp", "image/webp"),
    ("a.wav", "audio/wav"),
    ("a.mp4", "video/mp4"),
    ("a.docx", "application/vnd.openxmlformats-officedocument.wordprocessingml.document"),
    ("a.bin", "application/octet-stream"),
];

pub(crate) fn check(variant: u8, file: &[u8]) {
    let (name, kind) = KINDS[usize::from(variant) % KINDS.len()];
    let data = base64::engine::general_purpose::STANDARD.encode(file);
    let part = format!(
        r#"{{"type":"file","file":{{"filename":"{name}","file_data":"data:{kind};base64,{data}"}}}}"#
    );
    let image = format!(r#"{{"type":"image_url","image_url":{{"url":"data:{kind};base64,{data}"}}}}"#);
    let part = if kind.starts_with("image/") { image } else { part };
    let body = format!(r#"{{"model":"gpt-4o","messages":[{{"role":"user","content":[{part}]}}]}}"#);
    bodies::check(Api::Chat, variant / 8, body.as_bytes());
}
