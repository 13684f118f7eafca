//! Reads the sizes of images, audio and documents in a request. Decodes no more bytes than necessary, and never
//! fetches a URL.

use base64::Engine as _;
use base64::alphabet;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use compression_codecs::core::util::{PartialBuffer, WriteBuffer};
use compression_codecs::{DecodeV2 as _, ZlibDecoder};
use std::borrow::Cow;

/// Accepts base64 with and without padding, and with unused bits that are not 0.
const LENIENT: GeneralPurposeConfig = GeneralPurposeConfig::new()
    .with_decode_padding_mode(DecodePaddingMode::Indifferent)
    .with_decode_allow_trailing_bits(true);
const STANDARD: GeneralPurpose = GeneralPurpose::new(&alphabet::STANDARD, LENIENT);
const URL_SAFE: GeneralPurpose = GeneralPurpose::new(&alphabet::URL_SAFE, LENIENT);

/// Bytes of an image that are decoded at first.
const FIRST_IMAGE_BYTES: usize = 4 * 1024;
/// Maximum number of bytes of an image that are decoded: the size of a JPEG follows its EXIF data.
const MAX_IMAGE_BYTES: usize = 256 * 1024;
/// Bound of the decompressed bytes of all documents in a request.
const MAX_INFLATED: usize = 8 * 1024 * 1024;
/// Average size of a page in bytes, for documents whose pages cannot be counted.
const BYTES_PER_PAGE: u64 = 50_000;
/// Bytes per second of audio in an unknown format: 128 kbit/s.
const DEFAULT_BYTES_PER_SECOND: u64 = 16_000;

/// Splits a `data:` URL into its media type and its base64. `None` for any other URL.
pub(crate) fn data_url(url: &str) -> Option<(&str, &str)> {
    let rest = url.get(..5).filter(|scheme| scheme.eq_ignore_ascii_case("data:")).map(|_| &url[5..])?;
    let (head, data) = rest.split_at(memchr::memchr(b',', rest.as_bytes())?);
    Some((head.split(';').next().unwrap_or_default(), &data[1..]))
}

/// Width and height of an image in base64, in pixels, from its header.
pub(crate) fn image_size(base64: &str) -> Option<(u32, u32)> {
    [FIRST_IMAGE_BYTES, MAX_IMAGE_BYTES].into_iter().find_map(|max_bytes| {
        let size = imagesize::blob_size(&decoded(base64, max_bytes)).ok()?;
        Some((u32::try_from(size.width).ok()?, u32::try_from(size.height).ok()?))
    })
}

/// The length of audio in base64, in tenths of a second; `None` if it is empty.
pub(crate) fn audio_tenths(base64: &str) -> Option<u64> {
    let bytes = base64.len() as u64 * 3 / 4;
    let rate = bytes_per_second(&decoded(base64, 4 * 1024)).unwrap_or(DEFAULT_BYTES_PER_SECOND);
    (bytes > 0).then(|| (bytes * 10).div_ceil(rate.max(1_000)))
}

/// Reads the rate from the header of a WAV file, or from the first frame of an MP3.
fn bytes_per_second(start: &[u8]) -> Option<u64> {
    /// Bit rates of layer III in kbit/s, by their index in the frame header.
    const MPEG_1_KBITS: [u64; 16] = [0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 0];
    const MPEG_2_KBITS: [u64; 16] = [0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160, 0];
    if start.starts_with(b"RIFF") {
        let rate = start.get(28..32)?.try_into().ok()?;
        return Some(u64::from(u32::from_le_bytes(rate)));
    }
    // A frame begins with eleven set bits, the version and layer III. The high four bits of the third byte are
    // the index of the bit rate.
    let frame = start.windows(3).find(|w| w[0] == 0xff && w[1] & 0xe6 == 0xe2)?;
    let rates = if frame[1] & 0x18 == 0x18 { MPEG_1_KBITS } else { MPEG_2_KBITS };
    Some(rates[usize::from(frame[2] >> 4)] * 1_000 / 8).filter(|rate| *rate > 0)
}

/// The contents of a PDF.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Pdf {
    pub(crate) pages: u64,
    /// Characters of text on its pages.
    pub(crate) characters: u64,
}

/// Counts the pages and characters of a PDF in base64 without rendering it: its page objects, and the strings
/// in its content streams.
///
/// `inflated` is the number of bytes that were decompressed for this request so far. It is bounded.
pub(crate) fn pdf(base64: &str, inflated: &mut usize) -> Pdf {
    /// Characters of a page in a PDF whose page objects are compressed.
    const CHARACTERS_PER_PAGE: u64 = 2_000;
    let bytes = decoded(base64, base64.len());
    let pages = memchr::memmem::find_iter(&bytes, b"/Page").filter(|&at| is_page(&bytes, at)).count() as u64;
    if pages == 0 {
        let pages = (bytes.len() as u64 / BYTES_PER_PAGE).max(1);
        return Pdf { pages, characters: pages * CHARACTERS_PER_PAGE };
    }
    Pdf { pages, characters: characters_in(&bytes, inflated) }
}

/// Whether the `/Page` at this position follows `/Type` and white space, and is not `/Pages`.
fn is_page(pdf: &[u8], at: usize) -> bool {
    /// Bytes before `/Page` that are searched for `/Type`.
    const LOOK_BACK: usize = 10;
    let is_whole = pdf.get(at + 5).is_some_and(|b| !b.is_ascii_alphanumeric());
    is_whole && pdf[at.saturating_sub(LOOK_BACK)..at].trim_ascii_end().ends_with(b"/Type")
}

/// Counts the characters in the streams of a PDF that are uncompressed or deflated.
fn characters_in(pdf: &[u8], total_inflated: &mut usize) -> u64 {
    let (mut characters, mut at) = (0, 0);
    while let Some(found) = memchr::memmem::find(&pdf[at..], b"stream") {
        let start = at + found + b"stream".len();
        let end = memchr::memmem::find(&pdf[start..], b"endstream").map_or(pdf.len(), |end| start + end);
        let stream = pdf[start..end].trim_ascii_start();
        let inflated = inflate(stream, MAX_INFLATED.saturating_sub(*total_inflated));
        let content = if inflated.is_empty() { stream } else { &inflated[..] };
        *total_inflated += content.len();
        characters += characters_of(content);
        at = (end + b"endstream".len()).min(pdf.len());
        if *total_inflated >= MAX_INFLATED {
            break;
        }
    }
    characters
}

/// Decompresses a stream up to a bound: a small file can decompress to an enormous one.
fn inflate(stream: &[u8], max_bytes: usize) -> Vec<u8> {
    let (mut decoder, mut inflated) = (ZlibDecoder::new(), Vec::new());
    let (mut input, mut buffer) = (PartialBuffer::new(stream), [0; 8 * 1024]);
    while inflated.len() < max_bytes {
        let mut output = WriteBuffer::new_initialized(&mut buffer);
        let end = decoder.decode(&mut input, &mut output);
        let decoded = output.written();
        inflated.extend_from_slice(&decoded[..decoded.len().min(max_bytes - inflated.len())]);
        // If a stream is damaged or truncated, the part before the error counts.
        if end.unwrap_or(true) || (input.unwritten().is_empty() && decoded.is_empty()) {
            break;
        }
    }
    inflated
}

/// Counts the characters in text objects: `BT (Hello) Tj [(W) 20 (orld)] TJ <48656c> Tj ET`.
fn characters_of(content: &[u8]) -> u64 {
    let mut characters = 0;
    let mut rest = content;
    while let Some(begin) = memchr::memmem::find(rest, b"BT") {
        let text = &rest[begin + 2..];
        let end = memchr::memmem::find(text, b"ET").unwrap_or(text.len());
        // Skips bytes of an image that look like a text object: they have no operator that shows text.
        if memchr::memmem::find(&text[..end], b"Tj").or(memchr::memmem::find(&text[..end], b"TJ")).is_some() {
            characters += characters_in_strings(&text[..end]) + 1;
        }
        rest = &text[end..];
    }
    characters
}

/// Counts the characters in the strings of a text object.
fn characters_in_strings(text: &[u8]) -> u64 {
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
            // A character in a hexadecimal string mostly has four digits.
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

/// Decodes a text in base64. Invalid UTF-8 becomes replacement characters.
pub(crate) fn text(base64: &str) -> String {
    String::from_utf8_lossy(&decoded(base64, base64.len())).into_owned()
}

/// Decodes at most about `max_bytes` bytes of base64, up to the first invalid character.
fn decoded(base64: &str, max_bytes: usize) -> Vec<u8> {
    let wanted = base64.len().min(max_bytes.div_ceil(3) * 4);
    let start = without_white_space(base64.get(..wanted).unwrap_or_default());
    let engine = if start.contains(['-', '_']) { URL_SAFE } else { STANDARD };
    engine.decode(&*start).unwrap_or_else(|_| {
        let good = start.bytes().position(|b| !b.is_ascii_alphanumeric() && !b"+/-_".contains(&b));
        let good = good.unwrap_or(start.len()) / 4 * 4;
        engine.decode(start.get(..good).unwrap_or_default()).unwrap_or_default()
    })
}

/// Removes white space from base64.
fn without_white_space(base64: &str) -> Cow<'_, str> {
    if base64.bytes().any(|b| b.is_ascii_whitespace()) {
        Cow::Owned(base64.split_ascii_whitespace().collect())
    } else {
        Cow::Borrowed(base64)
    }
}
