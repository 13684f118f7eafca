//! Reads the model from a multipart form, as APIs for audio and images take it. Other fields are ignored.

use crate::body::BodyFault;
use crate::error::ProxyError;
use bytes::Bytes;
use http::HeaderValue;
use multer::{Constraints, Multipart, SizeLimit};
use std::io::Cursor;
use tokio::runtime::Handle;
use tokio::task::spawn_blocking;

/// A form with a longer model name is refused.
const MAX_MODEL_NAME_BYTES: u64 = 1024;

/// The boundary between the parts of a form. `None`: the body is not a form.
pub(super) fn boundary(content_type: Option<&HeaderValue>) -> Option<String> {
    multer::parse_boundary(content_type?.to_str().ok()?).ok()
}

/// Reads the field `model` of a form, on the blocking pool because it scans the whole form. Returns an empty string
/// if there is no such field.
pub(super) async fn model(body: Bytes, boundary: String) -> Result<String, ProxyError> {
    let runtime = Handle::current();
    let find = move || runtime.block_on(find_model(body, boundary));
    spawn_blocking(find).await.map_err(|_| ProxyError::Internal)?.map_err(ProxyError::InvalidBody)
}

async fn find_model(body: Bytes, boundary: String) -> Result<String, BodyFault> {
    let broken = |e: multer::Error| BodyFault::Invalid(format!("is not a valid form: {e}"));
    let limits = SizeLimit::new().for_field("model", MAX_MODEL_NAME_BYTES);
    let constraints = Constraints::new().size_limit(limits);
    let mut form = Multipart::with_reader_with_constraints(Cursor::new(body), boundary, constraints);
    let mut model = None;
    while let Some(field) = form.next_field().await.map_err(broken)? {
        let Some(name) = field.name().filter(|name| name.eq_ignore_ascii_case("model")) else { continue };
        // The upstream may parse an ambiguous field differently and serve another model than the one charged.
        if name != "model" || field.file_name().is_some() || model.is_some() {
            let how = "has a field 'model' twice, in another case or as a file";
            return Err(BodyFault::Invalid(how.to_owned()));
        }
        model = Some(field.text().await.map_err(broken)?);
    }
    Ok(model.unwrap_or_default())
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
        let long = format!("{MODEL}{}", "x".repeat(2_000));
        for parts in [
            &[MODEL, MODEL][..],
            &[&MODEL.replace("model", "Model")],
            &[&MODEL.replace("\"model\"", "\"model\"; filename=\"m\"")],
            &[&long],
            &["no part"],
        ] {
            assert!(named(parts).await.is_err(), "{parts:?}");
        }
        assert!(find_model(Bytes::from_static(b"--x\r\n"), "x".to_owned()).await.is_err());
    }

    #[test]
    fn forms_are_recognised_by_content_type() {
        let of = |value: &'static str| boundary(Some(&HeaderValue::from_static(value)));
        assert_eq!(of("multipart/form-data; boundary=x").as_deref(), Some("x"));
        assert_eq!(of("Multipart/Form-Data; charset=utf-8; boundary=\"x y\"").as_deref(), Some("x y"));
        assert_eq!((of("application/json"), of("multipart/form-data"), boundary(None)), (None, None, None));
    }
}
