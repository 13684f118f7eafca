//! The dashboard. Its files are part of the binary: `GET /` answers with `index.html`, `GET /page/NAME` with the others.

use super::answers::{ErrorBody, refusal};
use axum::extract::Path;
use axum::response::{IntoResponse as _, Response};
use compression_codecs::EncodeV2 as _;
use compression_codecs::GzipEncoder;
use compression_codecs::core::Level;
use compression_codecs::core::util::{PartialBuffer, WriteBuffer};
use http::header::{self, HeaderMap, HeaderValue};
use http::{HeaderName, StatusCode};
use sha2::{Digest as _, Sha256};
use std::fmt::Write as _;
use std::io;
use std::sync::OnceLock;

/// The page loads nothing from other origins, and runs no script or style that is written in its HTML.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; form-action 'self'";
const HTML: &str = "text/html; charset=utf-8";
const CSS: &str = "text/css; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";
const SVG: &str = "image/svg+xml";

/// One file of the page.
struct PageFile {
    name: &'static str,
    content_type: &'static str,
    content: &'static [u8],
    /// Made at the first request.
    encoded: OnceLock<Encoded>,
}

/// A file in the form in which it is sent.
struct Encoded {
    /// Digest of the content.
    tag: String,
    /// `None`: compression failed, and the content is sent as it is.
    gzip: Option<Vec<u8>>,
}

macro_rules! files {
    ($($name:literal: $content_type:expr),* $(,)?) => {
        [$(PageFile {
            name: $name,
            content_type: $content_type,
            content: include_bytes!(concat!("page/", $name)),
            encoded: OnceLock::new(),
        }),*]
    };
}

static FILES: [PageFile; 18] = files![
    "index.html": HTML,
    "style.css": CSS,
    "icon.svg": SVG,
    "main.js": SCRIPT,
    "api.js": SCRIPT,
    "chart.js": SCRIPT,
    "dom.js": SCRIPT,
    "first_request.js": SCRIPT,
    "format.js": SCRIPT,
    "limits.js": SCRIPT,
    "live.js": SCRIPT,
    "overview.js": SCRIPT,
    "quota_form.js": SCRIPT,
    "quota_rows.js": SCRIPT,
    "refusals.js": SCRIPT,
    "sign_in.js": SCRIPT,
    "system.js": SCRIPT,
    "usage.js": SCRIPT,
];

/// The dashboard.
#[utoipa::path(get, path = "/", tag = "page", security(()), responses(
    (status = 200, description = "The page.", body = str, content_type = "text/html"),
))]
pub(super) async fn index(headers: HeaderMap) -> Response {
    answer("index.html", &headers)
}

/// A file of the dashboard.
#[utoipa::path(
    get,
    path = "/page/{name}",
    tag = "page",
    security(()),
    params(("name" = String, Path, description = "The name of the file.")),
    responses((status = 200, description = "The file."), (status = 404, description = "There is no such file.", body = ErrorBody))
)]
pub(super) async fn file(Path(name): Path<String>, headers: HeaderMap) -> Response {
    answer(&name, &headers)
}

fn answer(name: &str, request: &HeaderMap) -> Response {
    let Some(file) = FILES.iter().find(|file| file.name == name) else {
        let message = "The page has no such file. GET / answers with the page.";
        return refusal(StatusCode::NOT_FOUND, "unknown_path", message);
    };
    let encoded = file.encoded.get_or_init(|| Encoded::new(file.content));
    let gzip = encoded.gzip.as_deref().filter(|_| accepts_gzip(request));
    let tag = format!("\"{}{}\"", encoded.tag, if gzip.is_some() { "-gzip" } else { "" });
    let mut response = if has_tag(request, &tag) {
        StatusCode::NOT_MODIFIED.into_response()
    } else {
        gzip.unwrap_or(file.content).into_response()
    };
    let headers = response.headers_mut();
    let mut set = |name: HeaderName, value: &'static str| {
        headers.insert(name, HeaderValue::from_static(value));
    };
    set(header::CONTENT_TYPE, file.content_type);
    set(header::CACHE_CONTROL, "no-cache");
    set(header::VARY, "accept-encoding");
    set(header::CONTENT_SECURITY_POLICY, POLICY);
    set(header::X_CONTENT_TYPE_OPTIONS, "nosniff");
    set(header::REFERRER_POLICY, "no-referrer");
    if gzip.is_some() {
        set(header::CONTENT_ENCODING, "gzip");
    }
    if let Ok(tag) = HeaderValue::from_str(&tag) {
        headers.insert(header::ETAG, tag);
    }
    response
}

impl Encoded {
    fn new(content: &[u8]) -> Self {
        let mut tag = String::new();
        for byte in &Sha256::digest(content)[..12] {
            let _ = write!(tag, "{byte:02x}");
        }
        Self { tag, gzip: gzip(content).ok() }
    }
}

fn gzip(content: &[u8]) -> io::Result<Vec<u8>> {
    let mut encoder = GzipEncoder::new(Level::Best.into());
    // Larger than any result: deflate adds at most a few bytes to a block, and gzip 18 bytes.
    let mut buffer = vec![0; content.len() + content.len() / 8 + 128];
    let mut output = WriteBuffer::new_initialized(&mut buffer);
    encoder.encode(&mut PartialBuffer::new(content), &mut output)?;
    if !encoder.finish(&mut output)? {
        return Err(io::ErrorKind::WriteZero.into());
    }
    let length = output.written_len();
    buffer.truncate(length);
    Ok(buffer)
}

/// The elements of all headers of this name, which are lists separated by commas.
fn elements<'h>(headers: &'h HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'h str> {
    let lines = headers.get_all(name).into_iter().filter_map(|line| line.to_str().ok());
    lines.flat_map(|line| line.split(',')).map(str::trim)
}

fn accepts_gzip(headers: &HeaderMap) -> bool {
    elements(headers, &header::ACCEPT_ENCODING).any(|element| {
        let (coding, parameters) = element.split_once(';').unwrap_or((element, ""));
        let weight = parameters.trim().strip_prefix("q=").and_then(|weight| weight.parse::<f32>().ok());
        coding.trim().eq_ignore_ascii_case("gzip") && weight.is_none_or(|weight| weight > 0.0)
    })
}

/// Whether the client has the content with this tag.
fn has_tag(headers: &HeaderMap, tag: &str) -> bool {
    elements(headers, &header::IF_NONE_MATCH)
        .any(|known| known == "*" || known.strip_prefix("W/").unwrap_or(known) == tag)
}

#[cfg(test)]
mod tests {
    use super::*;
    use compression_codecs::{DecodeV2 as _, GzipDecoder};

    fn headers(name: HeaderName, value: &str) -> HeaderMap {
        HeaderMap::from_iter([(name, HeaderValue::from_str(value).unwrap())])
    }

    #[test]
    fn the_page_is_below_150_kb_and_unpacks_to_its_files() {
        assert!(FILES.iter().map(|file| file.content.len()).sum::<usize>() < 150_000);
        for file in &FILES {
            let packed = gzip(file.content).unwrap();
            assert!(packed.len() < file.content.len(), "{}", file.name);
            let mut buffer = vec![0; file.content.len() + 1];
            let mut output = WriteBuffer::new_initialized(&mut buffer);
            GzipDecoder::new().decode(&mut PartialBuffer::new(packed.as_slice()), &mut output).unwrap();
            let length = output.written_len();
            assert_eq!(&buffer[..length], file.content, "{}", file.name);
        }
    }

    #[test]
    fn all_files_of_the_folder_are_served() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/src/admin/page");
        let mut names: Vec<_> =
            std::fs::read_dir(folder).unwrap().map(|file| file.unwrap().file_name()).collect();
        let mut served: Vec<_> = FILES.iter().map(|file| std::ffi::OsString::from(file.name)).collect();
        names.sort();
        served.sort();
        assert_eq!(names, served);
    }

    #[test]
    fn gzip_is_sent_to_clients_that_accept_it() {
        for (value, accepts) in [
            ("gzip, deflate, br", true),
            ("br;q=1.0, GZIP;q=0.5", true),
            ("gzip;q=0", false),
            ("identity", false),
            ("", false),
        ] {
            assert_eq!(accepts_gzip(&headers(header::ACCEPT_ENCODING, value)), accepts, "{value}");
            let response = answer("main.js", &headers(header::ACCEPT_ENCODING, value));
            assert_eq!(response.headers().contains_key(header::CONTENT_ENCODING), accepts, "{value}");
        }
    }

    #[test]
    fn a_client_that_has_the_file_gets_no_second_copy() {
        let first = answer("main.js", &HeaderMap::new());
        let tag = first.headers()[header::ETAG].to_str().unwrap();
        assert_eq!(first.headers()[header::CACHE_CONTROL], "no-cache");
        for (known, status) in [
            (tag.to_owned(), StatusCode::NOT_MODIFIED),
            (format!("\"other\", W/{tag}"), StatusCode::NOT_MODIFIED),
            ("*".to_owned(), StatusCode::NOT_MODIFIED),
            ("\"other\"".to_owned(), StatusCode::OK),
        ] {
            let response = answer("main.js", &headers(header::IF_NONE_MATCH, &known));
            assert_eq!(response.status(), status, "{known}");
        }
    }

    #[test]
    fn every_file_has_the_policy_and_an_unknown_one_is_a_404() {
        for file in &FILES {
            let response = answer(file.name, &HeaderMap::new());
            assert_eq!(response.headers()[header::CONTENT_SECURITY_POLICY], POLICY);
            assert_eq!(response.headers()[header::CONTENT_TYPE], file.content_type);
        }
        assert_eq!(answer("../page.rs", &HeaderMap::new()).status(), StatusCode::NOT_FOUND);
    }
}
