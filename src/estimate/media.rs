//! What can be told of images, sounds and documents from the bytes that a request carries, without decoding
//! more of them than that takes. Nothing is ever fetched.

use base64::Engine as _;
use base64::alphabet;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use std::borrow::Cow;
use std::io::Read as _;

const LENIENT: GeneralPurposeConfig = GeneralPurposeConfig::new()
    .with_decode_padding_mode(DecodePaddingMode::Indifferent)
    .with_decode_allow_trailing_bits(true);
const STANDARD: GeneralPurpose = GeneralPurpose::new(&alphabet::STANDARD, LENIENT);
const URL_SAFE: GeneralPurpose = GeneralPurpose::new(&alphabet::URL_SAFE, LENIENT);

/// How much of an image is decoded, at first and at most: a JPEG has its size behind its EXIF data.
const FIRST_BYTES: usize = 4 * 1024;
const MOST_BYTES: usize = 256 * 1024;
/// No more than so much of the documents of a request is inflated.
const MOST_INFLATED: usize = 8 * 1024 * 1024;
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
pub(crate) fn audio_tenths(base64: &str) -> Option<u64> {
    let bytes = base64.len() as u64 * 3 / 4;
    let rate = bytes_of_a_second(&decoded(base64, 4 * 1024)).unwrap_or(BYTES_OF_A_SECOND);
    (bytes > 0).then(|| (bytes * 10).div_ceil(rate.max(1_000)))
}

/// By the header of a WAV file, or of the first frame of an MP3.
fn bytes_of_a_second(start: &[u8]) -> Option<u64> {
    const OF_MPEG_1: [u64; 16] = [0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 0];
    const OF_MPEG_2: [u64; 16] = [0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160, 0];
    if start.starts_with(b"RIFF") {
        let rate = start.get(28..32)?.try_into().ok()?;
        return Some(u64::from(u32::from_le_bytes(rate)));
    }
    // Eleven set bits, the version, layer III; the rate is in the four bits after the next one.
    let frame = start.windows(3).find(|w| w[0] == 0xff && w[1] & 0xe6 == 0xe2)?;
    let rates = if frame[1] & 0x18 == 0x18 { OF_MPEG_1 } else { OF_MPEG_2 };
    Some(rates[usize::from(frame[2] >> 4)] * 1_000 / 8).filter(|rate| *rate > 0)
}

/// What is in a PDF.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Pdf {
    pub(crate) pages: u64,
    /// Characters of text that its pages show.
    pub(crate) characters: u64,
}

/// What can be told of a PDF in base64 without drawing it: as many pages as it says that something is
/// one, and the text in what draws them. `inflated`: how much was inflated for this request, which is bounded.
pub(crate) fn pdf(base64: &str, inflated: &mut usize) -> Pdf {
    /// Where pages cannot be counted, because they are compressed.
    const CHARACTERS_OF_A_PAGE: u64 = 2_000;
    let bytes = decoded(base64, base64.len());
    let pages = memchr::memmem::find_iter(&bytes, b"/Page").filter(|&at| is_page(&bytes, at)).count() as u64;
    if pages == 0 {
        let pages = (bytes.len() as u64 / BYTES_OF_A_PAGE).max(1);
        return Pdf { pages, characters: pages * CHARACTERS_OF_A_PAGE };
    }
    Pdf { pages, characters: characters_in(&bytes, inflated) }
}

/// `/Type`, some space, `/Page`, and not `/Pages`.
fn is_page(pdf: &[u8], at: usize) -> bool {
    const LONGEST: usize = 10;
    let is_whole = pdf.get(at + 5).is_some_and(|b| !b.is_ascii_alphanumeric());
    is_whole && pdf[at.saturating_sub(LONGEST)..at].trim_ascii_end().ends_with(b"/Type")
}

/// The characters that the streams of a PDF show, as far as they are plain or deflated.
fn characters_in(pdf: &[u8], all_inflated: &mut usize) -> u64 {
    let (mut characters, mut at) = (0, 0);
    while let Some(found) = memchr::memmem::find(&pdf[at..], b"stream") {
        let start = at + found + b"stream".len();
        let end = memchr::memmem::find(&pdf[start..], b"endstream").map_or(pdf.len(), |end| start + end);
        let stream = pdf[start..end].trim_ascii_start();
        let inflated = inflated(stream, MOST_INFLATED.saturating_sub(*all_inflated));
        let content = if inflated.is_empty() { stream } else { &inflated[..] };
        *all_inflated += content.len();
        characters += shown(content);
        at = (end + b"endstream".len()).min(pdf.len());
        if *all_inflated >= MOST_INFLATED {
            break;
        }
    }
    characters
}

/// What is deflated within a stream, up to a bound: a small file can be made of an enormous one.
fn inflated(stream: &[u8], most: usize) -> Vec<u8> {
    let mut inflated = Vec::new();
    let reader = flate2::read::ZlibDecoder::new(stream);
    // A broken stream shows what comes before the fault.
    drop(reader.take(most as u64).read_to_end(&mut inflated));
    inflated
}

/// The characters in the strings of what draws text: `BT (Hello) Tj [(W) 20 (orld)] TJ <48656c> Tj ET`.
fn shown(content: &[u8]) -> u64 {
    let mut shown = 0;
    let mut rest = content;
    while let Some(begin) = memchr::memmem::find(rest, b"BT") {
        let text = &rest[begin + 2..];
        let end = memchr::memmem::find(text, b"ET").unwrap_or(text.len());
        // Only what is drawn, and not bytes of an image that look like it.
        if memchr::memmem::find(&text[..end], b"Tj").or(memchr::memmem::find(&text[..end], b"TJ")).is_some() {
            shown += strings_in(&text[..end]) + 1;
        }
        rest = &text[end..];
    }
    shown
}

fn strings_in(text: &[u8]) -> u64 {
    let (mut characters, mut depth, mut hex) = (0, 0u32, None);
    let mut bytes = text.iter();
    while let Some(&b) = bytes.next() {
        match (b, depth, hex) {
            (b'\\', 1.., _) => {
                bytes.next();
                characters += 1;
            }
            (b'(', _, None) => depth += 1,
            (b')', 1.., _) => depth -= 1,
            (_, 1.., _) => characters += 1,
            (b'<', 0, _) => hex = Some(0),
            // A character of such a string has four digits, most often.
            (b'>', 0, Some(digits)) => {
                characters += digits / 4;
                hex = None;
            }
            (_, 0, Some(digits)) => hex = Some(digits + 1),
            _ => {}
        }
    }
    characters
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
