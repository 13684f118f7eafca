//! Counts the pages of a PDF and reads the text on them, without rendering it.
//!
//! Text is read from the streams that pages have as contents, and from forms. Images, fonts and other files in the
//! document are not read. Time and memory are bounded: at most some bytes are decompressed, and the rest of
//! the text is assumed to be like the part that was read.

mod content;
mod fonts;
mod lexer;
mod objects;

use super::document_text::DocumentText;
use super::inflate::{Budget, Compression, Inflater, alike};
use fonts::Fonts;
use objects::{Objects, StreamFilter, StreamRecord};

/// The size of a page whose size is unknown, in points.
const LETTER: (u32, u32) = (612, 792);
/// Average size of a page in bytes, for documents whose pages cannot be counted.
const BYTES_PER_PAGE: u64 = 50_000;
/// Characters that are assumed on a page whose text cannot be read.
const CHARACTERS_PER_PAGE: u64 = 2_000;
/// Characters that are assumed for each byte of a stream that cannot be read.
const CHARACTERS_PER_BYTE: u64 = 2;

/// The contents of a PDF.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Pdf {
    /// Width and height of pages in points, with the number of these pages.
    pub(crate) pages: Vec<((u32, u32), u64)>,
    pub(crate) text: DocumentText,
}

impl Pdf {
    pub(super) fn read(file: &[u8], inflated: &mut usize) -> Self {
        let (mut inflater, mut budget) = (Inflater::default(), Budget::of(file.len(), inflated));
        let objects = Objects::read(file, &mut inflater, &mut budget);
        let count = match objects.page_count() {
            0 => (file.len() as u64 / BYTES_PER_PAGE).max(1),
            // A page has at least some ten bytes, also if it is compressed.
            count => count.min(file.len() as u64 / 10 + 1),
        };
        let mut pages: Vec<_> = objects.page_sizes().collect();
        let missing = count.saturating_sub(pages.iter().map(|(_, count)| count).sum());
        if missing > 0 {
            pages.push((pages.first().map_or(LETTER, |(size, _)| *size), missing));
        }
        let mut text = DocumentText::default();
        if objects.is_encrypted || objects.page_count() == 0 {
            text.more_characters = (file.len() as u64 * CHARACTERS_PER_BYTE).min(count * CHARACTERS_PER_PAGE);
            return Self { pages, text };
        }
        let fonts = Fonts::read(file, &objects, &mut inflater, &mut budget);
        let mut reader =
            TextReader { file, fonts, inflater, budget, text, read: 0, unread: 0, unreadable: 0 };
        let mut contents: Vec<(u32, u32)> = objects.contents.iter().map(|(n, pages)| (*n, *pages)).collect();
        contents.sort_unstable();
        for (number, pages) in contents {
            let before = reader.text.characters();
            objects.content_streams(number).for_each(|stream| reader.stream(stream));
            let one = reader.text.characters() - before;
            let others = one.saturating_mul(u64::from(pages) - 1);
            reader.text.more_characters = reader.text.more_characters.saturating_add(others);
        }
        let forms = objects.streams.iter().filter(|stream| stream.is_form);
        forms.for_each(|stream| reader.stream(stream));
        Self { pages, text: reader.finish(count) }
    }
}

/// Reads text from the streams of a document.
struct TextReader<'f, 'r> {
    file: &'f [u8],
    fonts: Fonts,
    inflater: Inflater,
    budget: Budget<'r>,
    text: DocumentText,
    /// Bytes of streams that were read.
    read: u64,
    /// Bytes of streams that were not read because the budget was used up.
    unread: u64,
    /// Bytes of streams in an encoding that is not decoded here.
    unreadable: u64,
}

impl TextReader<'_, '_> {
    fn stream(&mut self, stream: &StreamRecord) {
        let bytes = stream.bytes(self.file);
        if self.budget.is_empty() {
            self.unread += bytes.len() as u64;
            return;
        }
        let read = match stream.filter {
            StreamFilter::None => {
                let size = self.budget.take(bytes.len());
                content::read(&bytes[..size], &self.fonts, &mut self.text);
                size
            }
            StreamFilter::Flate => {
                let read = self.inflater.inflate(Compression::Zlib, bytes, &mut self.budget);
                content::read(&self.inflater.output, &self.fonts, &mut self.text);
                read
            }
            StreamFilter::Ascii85 => {
                let size = self.budget.take(bytes.len());
                content::read(&ascii85(&bytes[..size]), &self.fonts, &mut self.text);
                size
            }
            StreamFilter::Ascii85Flate => {
                self.inflater.inflate(Compression::Zlib, &ascii85(bytes), &mut self.budget);
                content::read(&self.inflater.output, &self.fonts, &mut self.text);
                bytes.len()
            }
            StreamFilter::Other => {
                self.unreadable += bytes.len() as u64;
                return;
            }
        };
        self.read += read as u64;
        if self.budget.is_empty() {
            self.unread += (bytes.len() - read) as u64;
        }
    }

    /// Adds guesses for the parts that were not read.
    fn finish(self, pages: u64) -> DocumentText {
        let Self { mut text, read, unread, unreadable, .. } = self;
        let alike = alike(text.characters(), read, unread);
        let unreadable = unreadable.saturating_mul(CHARACTERS_PER_BYTE).min(pages * CHARACTERS_PER_PAGE);
        text.more_characters = text.more_characters.saturating_add(alike).saturating_add(unreadable);
        text.text.truncate(text.text.trim_end().len());
        text
    }
}

/// Decodes ASCII85: five characters for four bytes, `z` for four zeros, `~>` at the end.
fn ascii85(text: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(text.len() / 5 * 4 + 4);
    let (mut group, mut count) = (0u32, 0);
    for &b in text {
        match b {
            b'!'..=b'u' => {
                group = group.wrapping_mul(85).wrapping_add(u32::from(b - b'!'));
                count += 1;
                if count == 5 {
                    bytes.extend(group.to_be_bytes());
                    (group, count) = (0, 0);
                }
            }
            b'z' if count == 0 => bytes.extend([0; 4]),
            b'~' => break,
            _ => {}
        }
    }
    if count > 1 {
        // The missing characters count as the largest one.
        let filled = (count..5).fold(group, |group, _| group.wrapping_mul(85).wrapping_add(84));
        bytes.extend(&filled.to_be_bytes()[..count - 1]);
    }
    bytes
}
