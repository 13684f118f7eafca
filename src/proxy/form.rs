//! Reads the model from a multipart form, as APIs for audio and images take it. Other fields are ignored.
//!
//! Parsers of forms differ. A form that one of them could read with another model is refused.

mod disposition;
mod parts;

use crate::body::BodyFault;
use crate::error::ProxyError;
use bytes::Bytes;
use disposition::field_name;
use http::HeaderValue;
use http::header::{CONTENT_DISPOSITION, CONTENT_TYPE, HeaderMap, HeaderName};
use multer::{Constraints, Field, Multipart, SizeLimit};
use std::io::Cursor;
use std::ops::Range;
use tokio::runtime::Handle;
use tokio::task::spawn_blocking;

/// A form with a longer model name is refused.
const MAX_MODEL_NAME_BYTES: u64 = 1024;

/// The `content-type` of a request.
///
/// # Errors
/// There is more than one: parsers use the first or the last one.
pub(super) fn content_type(headers: &HeaderMap) -> Result<Option<&HeaderValue>, ProxyError> {
    let mut all = headers.get_all(CONTENT_TYPE).iter();
    match (all.next(), all.next()) {
        (first, None) => Ok(first),
        _ => Err(ProxyError::InvalidBody(ambiguous("has more than one content-type"))),
    }
}

/// The boundary between the parts of a form. `None`: the body is not a form, or its `content-type` has more than one
/// boundary.
pub(super) fn boundary(content_type: Option<&HeaderValue>) -> Option<String> {
    let content_type = content_type?.to_str().ok()?;
    let boundaries = content_type.to_ascii_lowercase().matches("boundary").count();
    multer::parse_boundary(content_type)
        .ok()
        .filter(|boundary| boundaries == 1 + boundary.to_ascii_lowercase().matches("boundary").count())
}

/// Reads the field `model` of a form, on the blocking pool because it scans the whole form. Returns an empty string
/// if there is no such field, and the range of the field's value if it can be replaced.
pub(super) async fn model(
    body: Bytes,
    boundary: String,
) -> Result<(String, Option<Range<usize>>), ProxyError> {
    let runtime = Handle::current();
    let find = move || {
        let model = runtime.block_on(find_model(body.clone(), boundary.clone()))?;
        let at = locate(&body, &boundary, &model);
        Ok((model, at))
    };
    spawn_blocking(find).await.map_err(|_| ProxyError::Internal)?.map_err(ProxyError::InvalidBody)
}

/// Reads the field `model` of a form, whose bytes are all there.
#[cfg(feature = "fuzz")]
pub(crate) fn read_form_model(body: Bytes, boundary: String) -> Result<String, BodyFault> {
    use futures_util::FutureExt as _;
    find_model(body, boundary).now_or_never().unwrap_or(Ok(String::new()))
}

async fn find_model(body: Bytes, boundary: String) -> Result<String, BodyFault> {
    let broken = |e: multer::Error| BodyFault::Invalid(format!("is not a valid form: {e}"));
    let limits = SizeLimit::new().for_field("model", MAX_MODEL_NAME_BYTES);
    let constraints = Constraints::new().size_limit(limits);
    parts::check(&body, &boundary)?;
    let mut form = Multipart::with_reader_with_constraints(Cursor::new(body), boundary, constraints);
    let mut model = None;
    while let Some(field) = form.next_field().await.map_err(broken)? {
        if !is_model(&field)? {
            continue;
        }
        // The upstream may parse an ambiguous field differently and serve another model than the one charged.
        if field.file_name().is_some() || model.is_some() {
            return Err(ambiguous("has a field 'model' twice or as a file"));
        }
        model = Some(field.text().await.map_err(broken)?);
    }
    Ok(model.unwrap_or_default())
}

/// The range of the value of the field `model`, which `find_model` has read. `None`: the form is written in an unusual way.
fn locate(body: &[u8], boundary: &str, model: &str) -> Option<Range<usize>> {
    let delimiter = format!("--{boundary}\r\n");
    let begins_line = |at: &usize| *at == 0 || body[..*at].ends_with(b"\r\n");
    for at in memchr::memmem::find_iter(body, delimiter.as_bytes()).filter(begins_line) {
        let part = &body[at + delimiter.len()..];
        let head = &part[..memchr::memmem::find(part, b"\r\n\r\n")?];
        if !names_model(head) {
            continue;
        }
        let start = at + delimiter.len() + head.len() + 4;
        let end = start + memchr::memmem::find(&body[start..], format!("\r\n--{boundary}").as_bytes())?;
        return Some(start..end).filter(|at| body[at.clone()] == *model.as_bytes());
    }
    None
}

/// Whether the head of a part has the name `model`.
fn names_model(head: &[u8]) -> bool {
    let mut headers = HeaderMap::new();
    for line in head.split(|&b| b == b'\n') {
        let Some(colon) = memchr::memchr(b':', line) else { continue };
        let value = HeaderValue::from_bytes(line[colon + 1..].trim_ascii());
        if line[..colon].eq_ignore_ascii_case(b"content-disposition")
            && let Ok(value) = value
        {
            headers.append(CONTENT_DISPOSITION, value);
        }
    }
    field_name(&headers).is_ok_and(|name| name == "model")
}

fn ambiguous(how: &str) -> BodyFault {
    BodyFault::Invalid(how.to_owned())
}

/// Whether a part is the field `model`, for every parser.
fn is_model(field: &Field<'_>) -> Result<bool, BodyFault> {
    let headers = field.headers();
    let name = field_name(headers)?;
    if field.name() != Some(&*name) {
        return Err(ambiguous("has a part whose name parsers read differently"));
    }
    if name == "model" {
        check_encoding(headers)?;
        return Ok(true);
    }
    if disposition::resembles(&name, "model") {
        return Err(ambiguous("has a field 'model' in another spelling"));
    }
    Ok(false)
}

/// Refuses a text that some parsers decode and others do not.
fn check_encoding(headers: &HeaderMap) -> Result<(), BodyFault> {
    const TRANSFER_ENCODING: HeaderName = HeaderName::from_static("content-transfer-encoding");
    let text = |value: &HeaderValue| value.to_str().unwrap_or("?").trim().to_ascii_lowercase();
    let is_decoded = headers
        .get_all(TRANSFER_ENCODING)
        .iter()
        .map(text)
        .any(|v| !matches!(&*v, "7bit" | "8bit" | "binary"));
    let has_charset = headers.get_all(CONTENT_TYPE).iter().map(text).any(|v| {
        v.contains("charset")
            && !["utf-8", "\"utf-8\"", "us-ascii"].iter().any(|c| v.ends_with(&format!("charset={c}")))
    });
    if is_decoded || has_charset {
        return Err(ambiguous("has a field 'model' in an encoding"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const AUDIO: &str = "Content-Disposition: form-data; name=\"file\"; filename=\"a.wav\"\r\n\r\nRIFF";
    const MODEL: &str = "Content-Disposition: form-data; name=\"model\"\r\n\r\nwhisper-1";

    async fn named(parts: &[&str]) -> Result<String, BodyFault> {
        let body = format!("--x\r\n{}\r\n--x--\r\n", parts.join("\r\n--x\r\n"));
        find_model(Bytes::from(body), "x".to_owned()).await
    }

    #[tokio::test]
    async fn a_form_that_names_its_model_ambiguously_is_refused() {
        assert_eq!(named(&[AUDIO, MODEL]).await.unwrap(), "whisper-1");
        assert_eq!(named(&[MODEL, AUDIO]).await.unwrap(), "whisper-1");
        assert_eq!(named(&[AUDIO]).await.unwrap(), "");
        for usual in [
            MODEL.replace("\"model\"", "model"),
            MODEL.replace("Content-Disposition", "content-disposition").replace("form-data; ", "Form-Data;"),
            MODEL.replace(
                "\r\n\r\n",
                "\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Transfer-Encoding: 8bit\r\n\r\n",
            ),
        ] {
            assert_eq!(named(&[&usual]).await.unwrap(), "whisper-1", "{usual}");
        }
        let file = AUDIO.replace("\"a.wav\"", "\"a \\\"b\\\"; c.wav\"; filename*=utf-8''%C3%A9.wav");
        assert_eq!(named(&[&file, MODEL]).await.unwrap(), "whisper-1");
        let long = format!("{MODEL}{}", "x".repeat(2_000));
        for parts in [
            &[MODEL, MODEL][..],
            &[&MODEL.replace("model", "Model")],
            &[&MODEL.replace("\"model\"", "\"model\"; filename=\"m\"")],
            &[&long],
            &["no part"],
            &[&MODEL.replace("name=", "NAME=")],
            &[&MODEL.replace("name=", "Name=")],
            &[&MODEL.replace("name=\"model\"", "name=\"x\"; name=\"model\"")],
            &[&MODEL.replace("name=\"model\"", "name=\"model\"; name=\"x\"")],
            &[&MODEL.replace("name=\"model\"", "name=\"model\"; NAME=\"x\"")],
            &[&MODEL.replace("name=\"model\"", "name=\"x\"; name*=utf-8''model")],
            &[&MODEL.replace("name=\"model\"", "name*=utf-8''model")],
            &[&MODEL.replace("name=\"model\"", "xname=\"model\"; name=\"file\"")],
            &[&MODEL.replace("name=\"model\"", "name=\"file\"; File-Name=\"model\"")],
            &[&MODEL.replace("name=\"model\"", "name*0=\"mo\"; name*1=\"del\"")],
            &[&MODEL.replace("\"model\"", "\"mo\\del\"")],
            &[&MODEL.replace("\"model\"", "\"mod%65l\"")],
            &[&MODEL.replace("\"model\"", "\" model\"")],
            &[&MODEL.replace("\"model\"", "\"model[]\"")],
            &[&MODEL.replace("\"model\"", "'model'")],
            &[&MODEL.replace("\"model\"", "\"model")],
            &[&MODEL.replace("\"model\"", "model x")],
            &[&MODEL.replace("form-data; ", "form-data, ")],
            &[&MODEL.replace("form-data", "attachment")],
            &[&MODEL
                .replace("form-data; name=\"model\"", "form-data; filename=\"; name=model\"; name=\"x\"")],
            &[&MODEL.replace("\r\n\r\n", "\r\nContent-Disposition: form-data; name=\"x\"\r\n\r\n")],
            &[&MODEL.replace("\r\n\r\n", "\r\nContent-Transfer-Encoding: base64\r\n\r\n")],
            &[&MODEL.replace("\r\n\r\n", "\r\nContent-Type: text/plain; charset=utf-16\r\n\r\n")],
            &[&format!("{MODEL}\r\n--x--"), MODEL],
            &["Content-Type: text/plain\r\n\r\nwhisper-1"],
        ] {
            assert!(named(parts).await.is_err(), "{parts:?}");
        }
        assert!(find_model(Bytes::from_static(b"--x\r\n"), "x".to_owned()).await.is_err());
    }

    #[tokio::test]
    async fn a_form_in_which_parsers_find_different_parts_is_refused() {
        let form = format!("--x\r\n{AUDIO}\r\n--x\r\n{MODEL}\r\n--x--\r\n");
        let read = async |form: String| find_model(Bytes::from(form), "x".to_owned()).await;
        for usual in [
            form.clone(),
            format!("\r\n{form}"),
            format!("A preamble.\r\n{form}An epilogue."),
            form.trim_end().to_owned(),
            form.replace("RIFF", "RI--x\r\nFF"),
            form.replace("RIFF", "RIFF\n"),
            form.replace("RIFF", ""),
        ] {
            assert_eq!(read(usual.clone()).await.unwrap(), "whisper-1", "{usual}");
        }
        let hidden = "Content-Disposition: form-data; name=\"model\"";
        for unusual in [
            // Line ends that only some parsers take for one.
            form.replace("RIFF", &format!("RIFF\n--x\n{hidden}\n\nother")),
            form.replace("RIFF", &format!("RIFF\n--x\r\n{hidden}\r\n\r\nother")),
            form.replace("RIFF", &format!("RIFF\r--x\r{hidden}\r\rother")),
            form.replace("\r\n\r\nRIFF", &format!("\r\nX-A: b\n\nRIFF\n--x\n{hidden}\r\n\r\nother")),
            form.replace("\r\n\r\nRIFF", "\nX-A: b\r\n\r\nRIFF"),
            form.replace("\r\n\r\nRIFF", "\rX-A: b\r\n\r\nRIFF"),
            // White space behind a delimiter.
            form.replace("RIFF\r\n--x\r\n", "RIFF\r\n--x \r\n"),
            form.replace("RIFF\r\n--x\r\n", "RIFF\r\n--x\t\r\n"),
            form.replace("RIFF", &format!("RIFF\r\n--x\n{hidden}\r\n\r\nother")),
            // A delimiter directly behind a head, or within one.
            form.replace("RIFF", &format!("--x\r\n{hidden}\r\n\r\nother\r\n")),
            form.replace("\r\n\r\nRIFF", &format!("\r\n--x\r\n{hidden}\r\n\r\nother")),
            // A first delimiter that does not begin a line.
            format!("preamble{form}"),
            format!("preamble\n{form}"),
        ] {
            assert!(read(unusual.clone()).await.is_err(), "{unusual}");
        }
    }

    #[tokio::test]
    async fn reading_a_form_takes_linear_time() {
        let part = format!("--x\r\n{AUDIO}\r\n");
        for (form, is_read) in [
            ("--x\r\n".repeat(400_000), false),
            ("--x--\r\n".repeat(400_000), false),
            (format!("{}--x--", part.repeat(9_000)), true),
            (format!("{}--x--", part.repeat(11_000)), false),
            (format!("{part}{}--x--", "RI--x\r\n".repeat(300_000)), true),
            (format!("--x\r\nA: {}", "b".repeat(2_000_000)), false),
        ] {
            let began = crate::clock::Stopwatch::start();
            let read = find_model(Bytes::from(form), "x".to_owned()).await;
            // Quadratic time would be minutes.
            assert!(began.elapsed().as_secs() < 20);
            assert_eq!(read.is_ok(), is_read, "{read:?}");
        }
    }

    #[test]
    fn the_value_of_the_model_is_found_in_a_form() {
        let form = |parts: &[&str]| format!("--x\r\n{}\r\n--x--\r\n", parts.join("\r\n--x\r\n"));
        let unusual = MODEL.replace(
            "Content-Disposition: form-data; name=\"model\"",
            "X-A: b\r\ncontent-disposition:form-data;name=model",
        );
        let decoy = AUDIO.replace("RIFF", "--x\n name=\"model\"\r\n\r\nwhisper-1");
        for parts in [&[AUDIO, MODEL][..], &[MODEL, AUDIO], &[&unusual], &[&decoy, MODEL]] {
            let body = form(parts);
            let at = locate(body.as_bytes(), "x", "whisper-1").unwrap();
            assert_eq!(&body[at.clone()], "whisper-1");
            let edited = format!("{}tiny{}", &body[..at.start], &body[at.end..]);
            assert_eq!(edited.replace("\r\n\r\ntiny\r\n", "\r\n\r\nwhisper-1\r\n"), body);
        }
        assert_eq!(locate(form(&[AUDIO]).as_bytes(), "x", ""), None);
        assert_eq!(locate(form(&[MODEL]).as_bytes(), "x", "other"), None);
    }

    #[test]
    fn forms_are_recognised_by_content_type() {
        let of = |value: &'static str| boundary(Some(&HeaderValue::from_static(value)));
        assert_eq!(of("multipart/form-data; boundary=x").as_deref(), Some("x"));
        assert_eq!(of("Multipart/Form-Data; charset=utf-8; boundary=\"x y\"").as_deref(), Some("x y"));
        assert_eq!(of("multipart/form-data; boundary=a; boundary=b"), None);
        assert_eq!(
            of("multipart/form-data; boundary=----FormBoundaryX").as_deref(),
            Some("----FormBoundaryX")
        );
        assert_eq!((of("application/json"), of("multipart/form-data"), boundary(None)), (None, None, None));
        let mut headers = HeaderMap::new();
        assert_eq!(content_type(&headers).unwrap(), None);
        headers.append(CONTENT_TYPE, HeaderValue::from_static("multipart/form-data; boundary=x"));
        assert!(content_type(&headers).unwrap().is_some());
        headers.append(CONTENT_TYPE, HeaderValue::from_static("multipart/form-data; boundary=y"));
        assert!(content_type(&headers).is_err());
    }
}
