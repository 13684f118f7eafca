//! What can be told of images, sounds and documents from the bytes that a request carries, without decoding
//! more of them than that takes. Nothing is ever fetched.

use base64::Engine as _;
use base64::alphabet;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use std::borrow::Cow;

const LENIENT: GeneralPurposeConfig = GeneralPurposeConfig::new()
    .with_decode_padding_mode(DecodePaddingMode::Indifferent)
    .with_decode_allow_trailing_bits(true);
const STANDARD: GeneralPurpose = GeneralPurpose::new(&alphabet::STANDARD, LENIENT);
const URL_SAFE: GeneralPurpose = GeneralPurpose::new(&alphabet::URL_SAFE, LENIENT);

/// How much of an image is decoded, at first and at most: a JPEG has its size behind its EXIF data.
const FIRST_BYTES: usize = 4 * 1024;
const MOST_BYTES: usize = 256 * 1024;
/// A document is decoded in steps of so many characters.
const STEP: usize = 64 * 1024;
/// The size of an average page, for documents whose pages cannot be counted.
const BYTES_OF_A_PAGE: u64 = 50_000;
/// Sound whose length cannot be told: compressed to 128 kbit/s.
const BYTES_OF_A_SECOND: u64 = 16_000;

/// The kind and the base64 of a `data:` URL, if it is one.
pub(crate) fn data_url(url: &str) -> Option<(&str, &str)> {
    let rest = url.get(..5).filter(|scheme| scheme.eq_ignore_ascii_case("data:")).map(|_| &url[5..])?;
    let (head, data) = rest.split_at(memchr::memchr(b',', rest.as_bytes())?);
    Some((head.split(';').next().unwrap_or_default(), &data[1..]))
}

/// Width and height in pixels of an image in base64, as its header has them.
pub(crate) fn image_size(base64: &str) -> Option<(u32, u32)> {
    [FIRST_BYTES, MOST_BYTES].into_iter().find_map(|most| {
        let size = imagesize::blob_size(&decoded(base64, most)).ok()?;
        Some((u32::try_from(size.width).ok()?, u32::try_from(size.height).ok()?))
    })
}

/// Tenths of a second of a sound in base64; `None`: there are no bytes to tell from.
pub(crate) fn tenths_of_sound(base64: &str) -> Option<u64> {
    let bytes = base64.len() as u64 * 3 / 4;
    let header = decoded(base64, 64);
    // In a WAV file bytes 28 to 31 are how many bytes there are to a second.
    let rate = match header.get(28..32).map(<[u8; 4]>::try_from) {
        Some(Ok(rate)) if header.starts_with(b"RIFF") => u64::from(u32::from_le_bytes(rate)),
        _ => BYTES_OF_A_SECOND,
    };
    (bytes > 0).then(|| (bytes * 10).div_ceil(rate.max(1_000)))
}

/// The pages of a PDF in base64: as often as it says that something is one.
pub(crate) fn pages(base64: &str) -> u64 {
    let (mut pages, mut kept) = (0, Vec::new());
    let base64 = unwrapped(base64);
    for step in base64.as_bytes().chunks(STEP) {
        kept.extend_from_slice(&decoded(std::str::from_utf8(step).unwrap_or_default(), STEP));
        pages += pages_in(&kept);
        // What stands across two steps is found with the next.
        let from = kept.len().saturating_sub(LONGEST_MARK);
        kept.drain(..from);
        pages -= pages_in(&kept);
    }
    if pages > 0 { pages } else { (base64.len() as u64 * 3 / 4 / BYTES_OF_A_PAGE).max(1) }
}

/// `/Type`, some space, `/Page`, and what follows.
const LONGEST_MARK: usize = 16;

fn pages_in(pdf: &[u8]) -> u64 {
    let is_page = |at: usize| {
        let is_whole = !pdf.get(at + 5).is_none_or(u8::is_ascii_alphanumeric);
        is_whole && pdf[at.saturating_sub(LONGEST_MARK - 6)..at].trim_ascii_end().ends_with(b"/Type")
    };
    memchr::memmem::find_iter(pdf, b"/Page").filter(|&at| is_page(at)).count() as u64
}

/// A text in base64, as far as it is UTF-8.
pub(crate) fn text(base64: &str) -> String {
    String::from_utf8_lossy(&decoded(base64, base64.len())).into_owned()
}

/// The first bytes of what is in base64, up to the first fault in it.
fn decoded(base64: &str, most: usize) -> Vec<u8> {
    let wanted = base64.len().min(most.div_ceil(3) * 4);
    let start = unwrapped(base64.get(..wanted).unwrap_or_default());
    let engine = if start.contains(['-', '_']) { URL_SAFE } else { STANDARD };
    engine.decode(&*start).unwrap_or_else(|_| {
        let good = start.bytes().position(|b| !b.is_ascii_alphanumeric() && !b"+/-_".contains(&b));
        let good = good.unwrap_or(start.len()) / 4 * 4;
        engine.decode(start.get(..good).unwrap_or_default()).unwrap_or_default()
    })
}

/// Base64 without line ends.
fn unwrapped(base64: &str) -> Cow<'_, str> {
    if base64.bytes().any(|b| b.is_ascii_whitespace()) {
        Cow::Owned(base64.split_ascii_whitespace().collect())
    } else {
        Cow::Borrowed(base64)
    }
}
