//! Reads what images, sound, video and documents in a request cost: sizes, lengths, pages and text. Decodes no more
//! bytes than necessary, and never fetches a URL.

mod base64;
mod document_text;
mod inflate;
mod office;
mod pdf;
mod recording;

pub(crate) use document_text::DocumentText;
pub(crate) use pdf::Pdf;
pub(crate) use recording::Recording;

use base64::Base64;

/// Bytes of an image that are decoded at first.
const FIRST_IMAGE_BYTES: usize = 4 * 1024;
/// Maximum number of bytes of an image that are decoded: the size of a JPEG follows its EXIF data.
const MAX_IMAGE_BYTES: usize = 256 * 1024;

/// Splits a `data:` URL into its media type and its base64. `None` for any other URL.
pub(crate) fn data_url(url: &str) -> Option<(&str, &str)> {
    let rest = url.get(..5).filter(|scheme| scheme.eq_ignore_ascii_case("data:")).map(|_| &url[5..])?;
    let (head, data) = rest.split_at(memchr::memchr(b',', rest.as_bytes())?);
    Some((head.split(';').next().unwrap_or_default(), &data[1..]))
}

/// Width and height of an image in base64, in pixels, from its header.
pub(crate) fn image_size(base64: &str) -> Option<(u32, u32)> {
    let image = Base64::of(base64);
    [FIRST_IMAGE_BYTES, MAX_IMAGE_BYTES].into_iter().find_map(|max_bytes| {
        let size = imagesize::blob_size(&image.start(max_bytes)).ok()?;
        Some((u32::try_from(size.width).ok()?, u32::try_from(size.height).ok()?))
    })
}

/// Sound in base64; `None` if it is empty.
pub(crate) fn sound(base64: &str) -> Option<Recording> {
    let file = Base64::of(base64);
    (file.len() > 0).then(|| Recording::sound(&file))
}

/// A file in a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Media {
    /// Width and height in pixels, if known.
    Image(Option<(u32, u32)>),
    Recording(Recording),
    Pdf(Pdf),
    /// A text file, or the text of an Office document.
    Text(DocumentText),
    /// The number of bytes of any other file.
    Unknown(u64),
}

/// The kind of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum FileKind {
    Image,
    Sound,
    Video,
    Pdf,
    Office,
    Text,
    Unknown,
}

/// The first bytes of files, after the number of bytes that precede them.
const MAGIC: &[(usize, &[u8], FileKind)] = &[
    (0, b"%PDF", FileKind::Pdf),
    (0, b"PK\x03\x04", FileKind::Office),
    (0, b"\x89PNG", FileKind::Image),
    (0, b"\xff\xd8\xff", FileKind::Image),
    (0, b"GIF8", FileKind::Image),
    (8, b"WEBP", FileKind::Image),
    (8, b"WAVE", FileKind::Sound),
    (0, b"ID3", FileKind::Sound),
    (0, b"OggS", FileKind::Sound),
    (0, b"fLaC", FileKind::Sound),
    (8, b"M4A", FileKind::Sound),
    (4, b"ftyp", FileKind::Video),
    (0, b"\x1a\x45\xdf\xa3", FileKind::Video),
];

/// Ends of the names of text files.
const TEXT_EXTENSIONS: &[&str] = &[
    ".txt", ".md", ".csv", ".tsv", ".json", ".jsonl", ".html", ".htm", ".xml", ".yaml", ".yml", ".toml",
    ".py", ".js", ".ts", ".css", ".sql", ".sh", ".rs", ".go", ".java", ".c", ".h", ".cpp", ".rb", ".php",
    ".tex", ".log", ".rtf",
];

impl FileKind {
    /// By the media type, else by the end of the name, else by the first bytes.
    fn of(kind: &str, name: &str, start: &[u8]) -> Self {
        let magic =
            MAGIC.iter().find(|(at, mark, _)| start.get(*at..).is_some_and(|rest| rest.starts_with(mark)));
        let magic = magic.map(|(.., kind)| *kind);
        let name = name.to_ascii_lowercase();
        let has_extension = |endings: &[&str]| endings.iter().any(|ending| name.ends_with(ending));
        let office = ["officedocument", "opendocument"];
        // A wrong media type does not make text of a PDF.
        match kind {
            _ if magic == Some(Self::Pdf) || kind == "application/pdf" || has_extension(&[".pdf"]) => {
                Self::Pdf
            }
            _ if kind.starts_with("image/") => Self::Image,
            _ if kind.starts_with("audio/") => Self::Sound,
            _ if kind.starts_with("video/") => Self::Video,
            _ if magic.is_some() => magic.unwrap_or(Self::Unknown),
            _ if office.iter().any(|office| kind.contains(office)) => Self::Office,
            _ if kind.starts_with("text/")
                || ["json", "xml", "yaml", "javascript", "csv"].iter().any(|end| kind.ends_with(end))
                || has_extension(TEXT_EXTENSIONS) =>
            {
                Self::Text
            }
            _ => Self::Unknown,
        }
    }
}

impl Media {
    /// Reads a file in base64. `inflated` is the number of bytes that were decompressed for this request so far;
    /// it is bounded.
    pub(crate) fn read(kind: &str, name: &str, base64: &str, inflated: &mut usize) -> Self {
        let file = Base64::of(base64);
        let unknown = Self::Unknown(file.len() as u64);
        match FileKind::of(kind, name, &file.start(16)) {
            FileKind::Image => Self::Image(image_size(base64)),
            FileKind::Sound => Self::Recording(Recording::sound(&file)),
            FileKind::Video => Self::Recording(Recording::video(&file)),
            FileKind::Pdf => Self::Pdf(Pdf::read(&file.bytes(), inflated)),
            FileKind::Office => office::text(&file.bytes(), inflated).map_or(unknown, Self::Text),
            FileKind::Text => Self::Text(text(file.bytes())),
            FileKind::Unknown => match String::from_utf8(file.bytes()) {
                Ok(text) if !text.contains('\0') => Self::Text(DocumentText { text, more_characters: 0 }),
                _ => unknown,
            },
        }
    }
}

/// Invalid UTF-8 becomes replacement characters.
fn text(bytes: Vec<u8>) -> DocumentText {
    let text = match bytes.as_slice() {
        [0xff, 0xfe, rest @ ..] => utf16(rest, u16::from_le_bytes),
        [0xfe, 0xff, rest @ ..] => utf16(rest, u16::from_be_bytes),
        _ => String::from_utf8(bytes)
            .unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned()),
    };
    DocumentText { text, more_characters: 0 }
}

fn utf16(bytes: &[u8], unit: fn([u8; 2]) -> u16) -> String {
    let units = bytes.as_chunks::<2>().0.iter().map(|pair| unit(*pair));
    char::decode_utf16(units).map(|c| c.unwrap_or(char::REPLACEMENT_CHARACTER)).collect()
}

#[cfg(test)]
mod tests;
