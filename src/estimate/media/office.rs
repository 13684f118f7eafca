//! Reads the text of Office documents: ZIP archives with XML files.

use super::document_text::DocumentText;
use super::inflate::{Budget, Compression, Inflater, alike};
use memchr::memmem;

/// Entries of an archive that are looked at.
const MAX_ENTRIES: usize = 4_096;
/// Bytes of the record at an archive's end, and the longest comment after it.
const END_RECORD: usize = 22;
const MAX_COMMENT: usize = 65_535;

/// Bytes of an entity between `&` and `;`.
const MAX_ENTITY: usize = 10;

/// The kind of an XML file in an archive.
#[derive(Clone, Copy, PartialEq, Eq)]
enum XmlKind {
    /// The text of a document or slide, in elements `t`.
    Text,
    /// Texts that cells of all sheets refer to.
    SharedStrings,
    /// A sheet: references to shared texts, numbers in elements `v`, and texts in elements `t`.
    Sheet,
}

impl XmlKind {
    /// `None` for a file without text of the document.
    fn of(name: &[u8]) -> Option<Self> {
        let is_in = |folder: &[u8], file: &[u8]| {
            let rest = name.strip_prefix(folder).and_then(|rest| rest.strip_prefix(file));
            rest.is_some_and(|rest| rest.ends_with(b".xml") && !rest.contains(&b'/'))
        };
        match name {
            b"xl/sharedStrings.xml" => Some(Self::SharedStrings),
            _ if is_in(b"xl/worksheets/", b"sheet") => Some(Self::Sheet),
            _ if is_in(b"word/", b"document")
                || is_in(b"word/", b"footnotes")
                || is_in(b"word/", b"endnotes") =>
            {
                Some(Self::Text)
            }
            _ if is_in(b"ppt/slides/", b"slide") || is_in(b"ppt/notesSlides/", b"notesSlide") => {
                Some(Self::Text)
            }
            _ => None,
        }
    }
}

/// The text of a document, spreadsheet or presentation. `None` if the file is not an archive with such a
/// document.
pub(super) fn text(file: &[u8], inflated: &mut usize) -> Option<DocumentText> {
    let (mut inflater, mut budget) = (Inflater::default(), Budget::of(file.len(), inflated));
    let mut text = DocumentText::default();
    let mut cells = SharedCells::default();
    let (mut read, mut unread, mut is_document) = (0, 0, false);
    for entry in entries(file)?.take(MAX_ENTRIES) {
        let Some(kind) = XmlKind::of(entry.name) else { continue };
        is_document = true;
        let Some(data) = entry.data(file) else { continue };
        if budget.is_empty() {
            unread += data.len() as u64;
            continue;
        }
        let consumed = match entry.method {
            STORED => {
                inflater.copy(data, &mut budget);
                inflater.output.len()
            }
            DEFLATED => inflater.inflate(Compression::Deflate, data, &mut budget),
            _ => continue,
        };
        let before = text.characters();
        xml(&inflater.output, kind, &mut text, &mut cells);
        if kind == XmlKind::SharedStrings {
            cells.characters = text.characters() - before;
        }
        read += consumed as u64;
        if budget.is_empty() {
            unread += (data.len() - consumed) as u64;
        }
    }
    let unread = unread.min(file.len() as u64);
    let more = cells.repeated().saturating_add(alike(text.characters(), read, unread));
    text.more_characters = text.more_characters.saturating_add(more);
    text.text.truncate(text.text.trim_end().len());
    is_document.then_some(text)
}

/// Cells that refer to shared texts. Each shared text is in the file once.
#[derive(Default)]
struct SharedCells {
    references: u64,
    texts: u64,
    characters: u64,
}

impl SharedCells {
    /// Characters of texts that several cells refer to, beyond the first cell.
    fn repeated(&self) -> u64 {
        let all = self.characters.saturating_mul(self.references) / self.texts.max(1);
        all.saturating_sub(self.characters)
    }
}

const STORED: u16 = 0;
const DEFLATED: u16 = 8;

/// An entry in the directory of an archive.
struct ArchiveEntry<'a> {
    name: &'a [u8],
    method: u16,
    size: usize,
    /// Position of the entry's own header.
    header: usize,
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..at + 2)?.try_into().ok().map(u16::from_le_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<usize> {
    let value = bytes.get(at..at + 4)?.try_into().ok().map(u32::from_le_bytes)?;
    usize::try_from(value).ok()
}

/// The entries in the directory at the end of an archive.
fn entries(file: &[u8]) -> Option<impl Iterator<Item = ArchiveEntry<'_>>> {
    let tail = file.len().saturating_sub(END_RECORD + MAX_COMMENT);
    let end = tail + memmem::rfind(&file[tail..], b"PK\x05\x06")?;
    let mut at = u32_at(file, end + 16)?;
    Some(std::iter::from_fn(move || {
        let record = file.get(at..)?;
        if !record.starts_with(b"PK\x01\x02") {
            return None;
        }
        let [name, extra, comment] = [28, 30, 32].map(|field| u16_at(record, field).map(usize::from));
        let name = name?;
        at += 46 + name + extra? + comment?;
        Some(ArchiveEntry {
            name: record.get(46..46 + name)?,
            method: u16_at(record, 10)?,
            size: u32_at(record, 20)?,
            header: u32_at(record, 42)?,
        })
    }))
}

impl ArchiveEntry<'_> {
    /// The compressed bytes.
    fn data<'a>(&self, file: &'a [u8]) -> Option<&'a [u8]> {
        let header = file.get(self.header..).filter(|header| header.starts_with(b"PK\x03\x04"))?;
        let start = 30 + usize::from(u16_at(header, 26)?) + usize::from(u16_at(header, 28)?);
        let data = header.get(start..)?;
        Some(&data[..self.size.min(data.len())])
    }
}

/// Appends the text of an XML file.
fn xml(bytes: &[u8], kind: XmlKind, out: &mut DocumentText, cells: &mut SharedCells) {
    let (mut at, mut is_text, mut is_reference) = (0, false, false);
    while let Some(rest) = bytes.get(at..).filter(|rest| !rest.is_empty()) {
        let until = memchr::memchr(b'<', rest).unwrap_or(rest.len());
        if is_text {
            characters(&rest[..until], out);
        }
        at += until + 1;
        let Some(tag) = bytes.get(at..) else { return };
        let tag = &tag[..memchr::memchr(b'>', tag).unwrap_or(tag.len())];
        at += tag.len() + 1;
        let (name, is_end) = match tag {
            [b'/', name @ ..] => (name, true),
            name => (name, false),
        };
        let name = &name[..name
            .iter()
            .position(|b| matches!(b, b' ' | b'/' | b'\n' | b'\r' | b'\t'))
            .unwrap_or(name.len())];
        let local = name.rsplit(|b| *b == b':').next().unwrap_or(name);
        let is_open = !is_end && !tag.ends_with(b"/");
        is_text = is_open && (local == b"t" || (local == b"v" && kind == XmlKind::Sheet && !is_reference));
        match (kind, local) {
            (XmlKind::Text, b"p" | b"br") if is_end || !is_open => out.separate('\n'),
            (XmlKind::Text, b"tab" | b"tc") if is_end || !is_open => out.separate(' '),
            (XmlKind::SharedStrings, b"si") if is_end => {
                out.separate('\n');
                cells.texts += 1;
            }
            (XmlKind::Sheet, b"c") if is_end => out.separate(' '),
            (XmlKind::Sheet, b"c") => {
                is_reference = memmem::find(tag, b" t=\"s\"").is_some();
                cells.references += u64::from(is_reference);
            }
            (XmlKind::Sheet, b"row") if is_end => out.separate('\n'),
            _ => {}
        }
    }
}

/// Appends text between tags, with its entities decoded. Beyond the text that is collected, an entity counts by its
/// letters: to decode it would take time and change little.
fn characters(text: &[u8], out: &mut DocumentText) {
    let text = String::from_utf8_lossy(text);
    let mut rest = &*text;
    while let Some(at) = memchr::memchr(b'&', rest.as_bytes()).filter(|_| !out.is_full()) {
        out.push_str(&rest[..at]);
        let after = &rest[at + 1..];
        let name = &after.as_bytes()[..after.len().min(MAX_ENTITY)];
        let name = memchr::memchr(b';', name).and_then(|end| after.get(..end));
        let (decoded, length) = match name.and_then(entity) {
            Some(c) => (c, name.map_or(0, |name| name.len() + 1)),
            None => ('&', 0),
        };
        out.push(decoded);
        rest = &after[length..];
    }
    out.push_str(rest);
}

fn entity(name: &str) -> Option<char> {
    Some(match name {
        "amp" => '&',
        "lt" => '<',
        "gt" => '>',
        "quot" => '"',
        "apos" => '\'',
        _ => {
            let number = name.strip_prefix('#')?;
            let code = match number.strip_prefix(['x', 'X']) {
                Some(digits) => u32::from_str_radix(digits, 16),
                None => number.parse(),
            };
            char::from_u32(code.ok()?)?
        }
    })
}
