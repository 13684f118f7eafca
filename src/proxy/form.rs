//! The model that a form names. Forms carry sound and images; nothing else in them is looked at.

use crate::body::BodyFault;
use crate::error::ProxyError;
use bytes::Bytes;
use futures_util::stream;
use http::HeaderValue;
use multer::{Constraints, Multipart, SizeLimit};
use std::convert::Infallible;
use tokio::runtime::Handle;
use tokio::task::spawn_blocking;

/// No model's name is longer.
const LONGEST_NAME: u64 = 1024;

/// The boundary of a form's parts; `None`: it is no form.
pub(super) fn boundary(content_type: Option<&HeaderValue>) -> Option<String> {
    multer::parse_boundary(content_type?.to_str().ok()?).ok()
}

/// Reads the field `model` of a form, on a thread for such work: all of it has to be searched. Empty, if
/// there is none.
pub(super) async fn model(body: Bytes, boundary: String) -> Result<String, ProxyError> {
    let runtime = Handle::current();
    let find = move || runtime.block_on(find_model(body, boundary));
    spawn_blocking(find).await.map_err(|_| ProxyError::Internal)?.map_err(ProxyError::Body)
}

async fn find_model(body: Bytes, boundary: String) -> Result<String, BodyFault> {
    let broken = |e: multer::Error| BodyFault::Invalid(format!("is not a valid form: {e}"));
    let limits = SizeLimit::new().for_field("model", LONGEST_NAME);
    let whole = stream::iter([Ok::<_, Infallible>(body)]);
    let constraints = Constraints::new().size_limit(limits);
    let mut form = Multipart::with_constraints(whole, boundary, constraints);
    let mut model = None;
    while let Some(field) = form.next_field().await.map_err(broken)? {
        let Some(name) = field.name().filter(|name| name.eq_ignore_ascii_case("model")) else { continue };
        // What one reader takes for a name another may take for a file.
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

    const SOUND: &str = "Content-Disposition: form-data; name=\"file\"; filename=\"a.wav\"\r\n\r\nRIFF";
    const MODEL: &str = "Content-Disposition: form-data; name=\"model\"\r\n\r\nwhisper-1";

    async fn named(parts: &[&str]) -> Result<String, BodyFault> {
        let body = format!("--x\r\n{}\r\n--x--\r\n", parts.join("\r\n--x\r\n"));
        find_model(Bytes::from(body), "x".to_owned()).await
    }

    #[tokio::test]
    async fn a_form_names_its_model_once() {
        assert_eq!(named(&[SOUND, MODEL]).await.unwrap(), "whisper-1");
        assert_eq!(named(&[MODEL, SOUND]).await.unwrap(), "whisper-1");
        assert_eq!(named(&[SOUND]).await.unwrap(), "");
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
    fn a_content_type_tells_a_form() {
        let of = |value: &'static str| boundary(Some(&HeaderValue::from_static(value)));
        assert_eq!(of("multipart/form-data; boundary=x").as_deref(), Some("x"));
        assert_eq!(of("Multipart/Form-Data; charset=utf-8; boundary=\"x y\"").as_deref(), Some("x y"));
        assert_eq!((of("application/json"), of("multipart/form-data"), boundary(None)), (None, None, None));
    }
}
