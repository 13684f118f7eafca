//! Finds the pages of a PDF, the streams with their contents, and the fonts' maps to Unicode.

use super::lexer::{Lexer, PdfToken};
use crate::estimate::media::inflate::{Budget, Compression, Inflater};
use foldhash::{HashMap, HashSet};
use memchr::memmem;

/// Bound of the pages, streams, references and fonts that are recorded of a document.
const MAX_RECORDS: usize = 1 << 15;
/// Different sizes of pages that are recorded.
const MAX_SIZES: usize = 8;
/// Bound of the objects in one object stream. Writers put at most a few hundred into one.
const MAX_OBJECTS_IN_STREAM: usize = 1 << 14;

/// How the bytes of a stream are encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StreamFilter {
    None,
    Flate,
    Ascii85,
    Ascii85Flate,
    /// An encoding that is not decoded here.
    Other,
}

/// A stream that can have text.
#[derive(Clone, Copy, Debug)]
pub(super) struct StreamRecord {
    /// Number of the object.
    pub(super) number: u32,
    start: u32,
    end: u32,
    pub(super) filter: StreamFilter,
    /// Whether it is a part of pages that has its own resources.
    pub(super) is_form: bool,
}

impl StreamRecord {
    pub(super) fn bytes<'a>(&self, file: &'a [u8]) -> &'a [u8] {
        file.get(self.start as usize..self.end as usize).unwrap_or_default()
    }
}

/// The properties of a font that decide what its codes mean.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct FontRecord {
    /// Number of the stream that maps codes to Unicode.
    pub(super) to_unicode: Option<u32>,
    /// Whether a code has two bytes.
    pub(super) is_wide: bool,
}

/// Width and height of a page in points.
pub(super) type PageSize = (u32, u32);

/// The first 16 bytes of a name.
pub(super) fn name_key(name: &[u8]) -> u128 {
    let mut key = [0; 16];
    let length = name.len().min(16);
    key[..length].copy_from_slice(&name[..length]);
    u128::from_le_bytes(key)
}

/// The parts of a document that matter for its tokens.
#[derive(Default)]
pub(super) struct Objects {
    pages: HashSet<u32>,
    /// The sizes of pages, with the number of pages. `None`: as in the page tree.
    sizes: Vec<(Option<PageSize>, u64)>,
    /// The size in the page tree.
    tree_size: Option<PageSize>,
    /// The number of pages that the document declares.
    declared_pages: u64,
    /// Streams, or lists of streams, that are the contents of pages, with the number of these pages.
    pub(super) contents: HashMap<u32, u32>,
    /// The references in objects that are lists: number of the list, and of the target.
    lists: Vec<(u32, u32)>,
    pub(super) streams: Vec<StreamRecord>,
    /// Objects by the names that dictionaries give them. Fonts are among them.
    names: HashMap<u128, u32>,
    fonts: HashMap<u32, FontRecord>,
    pub(super) is_encrypted: bool,
    /// Whether objects were left out.
    is_incomplete: bool,
}

impl Objects {
    /// Reads all objects of a file.
    pub(super) fn read(file: &[u8], inflater: &mut Inflater, budget: &mut Budget<'_>) -> Self {
        let mut objects = Self::default();
        let mut packed = Vec::new();
        let mut reader = ObjectReader::of(&mut objects);
        let mut lexer = Lexer::new(file);
        while let Some(token) = lexer.next() {
            match token {
                PdfToken::Keyword(b"stream") => {
                    let start = lexer.at + line_break(lexer.rest());
                    let (end, after) = stream_end(file, start, reader.length);
                    lexer.at = after;
                    packed.extend(reader.end_stream(start, end));
                }
                // The table of references, which has no objects.
                PdfToken::Keyword(b"xref") => lexer.at += memmem::find(lexer.rest(), b"trailer").unwrap_or(0),
                token => reader.token(token),
            }
        }
        reader.end_object();
        for stream in packed {
            objects.read_packed(file, &stream, inflater, budget);
        }
        objects.lists.sort_by_key(|(list, _)| *list);
        objects.streams.sort_by_key(|stream| stream.number);
        objects
    }

    /// The number of pages; 0 if it is unknown.
    pub(super) fn page_count(&self) -> u64 {
        let found = self.pages.len() as u64;
        if found == 0 || self.is_incomplete { found.max(self.declared_pages) } else { found }
    }

    /// The sizes of pages, with the number of pages. Letter, if no size is known.
    pub(super) fn page_sizes(&self) -> impl Iterator<Item = (PageSize, u64)> {
        let default = self.tree_size.unwrap_or(super::LETTER);
        self.sizes.iter().map(move |(size, pages)| (size.unwrap_or(default), *pages))
    }

    fn add_page(&mut self, size: Option<PageSize>) {
        let is_full = self.sizes.len() >= MAX_SIZES;
        match self.sizes.iter_mut().find(|(known, _)| is_full || *known == size) {
            Some((_, pages)) => *pages += 1,
            None => self.sizes.push((size, 1)),
        }
    }

    /// The last version of a stream.
    pub(super) fn stream(&self, number: u32) -> Option<&StreamRecord> {
        let after = self.streams.partition_point(|stream| stream.number <= number);
        self.streams[..after].last().filter(|stream| stream.number == number)
    }

    /// The streams of a page's contents: of the stream itself, or of the list.
    pub(super) fn content_streams(&self, number: u32) -> impl Iterator<Item = &StreamRecord> {
        let first = self.lists.partition_point(|(list, _)| *list < number);
        let listed = self.lists[first..].iter().take_while(move |(list, _)| *list == number);
        self.stream(number).into_iter().chain(listed.filter_map(|(_, target)| self.stream(*target)))
    }

    /// The fonts that dictionaries name, by the keys of their names.
    pub(super) fn named_fonts(&self) -> impl Iterator<Item = (u128, FontRecord)> + '_ {
        self.names.iter().filter_map(|(key, number)| self.fonts.get(number).map(|font| (*key, *font)))
    }

    /// Reads the objects in an object stream.
    fn read_packed(
        &mut self,
        file: &[u8],
        stream: &PackedStream,
        inflater: &mut Inflater,
        budget: &mut Budget<'_>,
    ) {
        let bytes = stream.record.bytes(file);
        match stream.record.filter {
            StreamFilter::Flate => _ = inflater.inflate(Compression::Zlib, bytes, budget),
            StreamFilter::None => inflater.copy(bytes, budget),
            _ => inflater.output.clear(),
        }
        self.is_incomplete |= inflater.output.is_empty() || budget.is_empty();
        let Some((head, body)) = inflater.output.split_at_checked(stream.first) else { return };
        let mut numbers = Lexer::new(head).filter_map(|token| match token {
            PdfToken::Integer(n) => usize::try_from(n).ok(),
            _ => None,
        });
        let mut next = numbers.next().zip(numbers.next());
        // The positions ascend. Others would make it possible to read the same bytes many times.
        let mut read_to = 0;
        for _ in 0..MAX_OBJECTS_IN_STREAM {
            let Some((number, start)) = next else { return };
            next = numbers.next().zip(numbers.next());
            let end = next.map_or(body.len(), |(_, end)| end).min(body.len());
            if start < read_to || start >= end {
                continue;
            }
            read_to = end;
            let mut reader = ObjectReader::of(self);
            reader.number = u32::try_from(number).unwrap_or(0);
            Lexer::new(&body[start..end]).for_each(|token| reader.token(token));
            reader.end_object();
        }
    }
}

/// An object stream: a compressed list of objects.
struct PackedStream {
    record: StreamRecord,
    /// Position of the first object. The numbers and positions of all objects precede it.
    first: usize,
}

/// The key of the value that follows in a dictionary.
#[derive(Clone, Copy, PartialEq)]
enum DictionaryKey {
    None,
    Type,
    Subtype,
    Filter,
    Encoding,
    Length,
    First,
    PageCount,
    Linearized,
    LinearizedPages,
    Contents,
    ToUnicode,
    Descendants,
    Encrypt,
    MediaBox,
    Other(u128),
}

impl DictionaryKey {
    fn of(name: &[u8]) -> Self {
        match name {
            b"" => Self::None,
            b"Type" => Self::Type,
            b"Subtype" | b"S" => Self::Subtype,
            b"Filter" => Self::Filter,
            b"Encoding" => Self::Encoding,
            b"Length" => Self::Length,
            b"First" => Self::First,
            b"Count" => Self::PageCount,
            b"Linearized" => Self::Linearized,
            b"N" => Self::LinearizedPages,
            b"Contents" => Self::Contents,
            b"ToUnicode" => Self::ToUnicode,
            b"DescendantFonts" => Self::Descendants,
            b"Encrypt" => Self::Encrypt,
            b"MediaBox" => Self::MediaBox,
            name => Self::Other(name_key(name)),
        }
    }
}

/// Types and subtypes of streams without text operators.
const BINARY_KINDS: &[&[u8]] =
    &[b"XRef", b"Metadata", b"EmbeddedFile", b"Image", b"Type1C", b"CIDFontType0C", b"OpenType"];

/// What an object is.
#[derive(Clone, Copy, PartialEq)]
enum ObjectKind {
    Unknown,
    Page,
    PageTree,
    ObjectStream,
    Form,
    /// A stream without text operators: an image, a font, a file.
    Binary,
}

/// Collects the properties of one object after the other.
struct ObjectReader<'o> {
    objects: &'o mut Objects,
    number: u32,
    kind: ObjectKind,
    key: DictionaryKey,
    /// The last four numbers.
    numbers: [i64; 4],
    media_box: Option<PageSize>,
    /// The value of `Length`, unless it is a reference.
    length: Option<usize>,
    first: usize,
    page_count: u64,
    linearized_pages: u64,
    is_linearized: bool,
    filter: StreamFilter,
    font: FontRecord,
    contents: Vec<u32>,
    /// Whether the object is a list.
    is_list: bool,
    /// Whether any token of the object was read.
    has_begun: bool,
}

impl<'o> ObjectReader<'o> {
    fn of(objects: &'o mut Objects) -> Self {
        Self {
            objects,
            number: 0,
            kind: ObjectKind::Unknown,
            key: DictionaryKey::None,
            numbers: [0; 4],
            media_box: None,
            length: None,
            first: 0,
            page_count: 0,
            linearized_pages: 0,
            is_linearized: false,
            filter: StreamFilter::None,
            font: FontRecord::default(),
            contents: Vec::new(),
            is_list: false,
            has_begun: false,
        }
    }

    fn token(&mut self, token: PdfToken<'_>) {
        match token {
            PdfToken::Keyword(b"obj") => {
                self.end_object();
                self.number = u32::try_from(self.numbers[2]).unwrap_or(0);
                return;
            }
            PdfToken::Keyword(b"endobj") => return self.end_object(),
            PdfToken::Keyword(b"R") => self.reference(u32::try_from(self.numbers[2]).unwrap_or(0)),
            PdfToken::Integer(n) | PdfToken::Real(n) => self.number(n),
            PdfToken::Name(name) => self.name(name),
            PdfToken::ArrayStart if !self.has_begun => self.is_list = true,
            PdfToken::ArrayEnd if self.key == DictionaryKey::MediaBox => {
                let [left, bottom, right, top] = self.numbers;
                let side = |length: i64| u32::try_from(length.unsigned_abs()).ok().filter(|side| *side > 0);
                let size = (side(right.saturating_sub(left)), side(top.saturating_sub(bottom)));
                self.media_box = size.0.zip(size.1);
            }
            PdfToken::DictionaryEnd => self.key = DictionaryKey::None,
            _ => {}
        }
        self.has_begun = true;
    }

    fn number(&mut self, n: i64) {
        let [_, second, third, fourth] = self.numbers;
        self.numbers = [second, third, fourth, n];
        let n = usize::try_from(n).unwrap_or(0);
        match self.key {
            DictionaryKey::Length => self.length = Some(n),
            DictionaryKey::First => self.first = n,
            DictionaryKey::PageCount => self.page_count = n as u64,
            DictionaryKey::Linearized => self.is_linearized = true,
            DictionaryKey::LinearizedPages => self.linearized_pages = n as u64,
            _ => {}
        }
    }

    fn name(&mut self, name: &[u8]) {
        match (self.key, name) {
            (DictionaryKey::Type, b"Page") => self.set_kind(ObjectKind::Page),
            (DictionaryKey::Type, b"Pages") => self.set_kind(ObjectKind::PageTree),
            (DictionaryKey::Type, b"ObjStm") => self.set_kind(ObjectKind::ObjectStream),
            (DictionaryKey::Subtype, b"Form") => self.set_kind(ObjectKind::Form),
            (DictionaryKey::Subtype, b"Type0") => self.font.is_wide = true,
            (DictionaryKey::Type | DictionaryKey::Subtype, name) if BINARY_KINDS.contains(&name) => {
                self.set_kind(ObjectKind::Binary);
            }
            (DictionaryKey::Encoding, name) if name.ends_with(b"-H") || name.ends_with(b"-V") => {
                self.font.is_wide = true;
            }
            (DictionaryKey::Type | DictionaryKey::Subtype, _) => {}
            (DictionaryKey::Filter, name) if self.add_filter(name) => return,
            _ => {
                self.key = DictionaryKey::of(name);
                return;
            }
        }
        self.key = DictionaryKey::None;
    }

    /// The first kind that is found counts: nested dictionaries have kinds too.
    fn set_kind(&mut self, kind: ObjectKind) {
        if self.kind == ObjectKind::Unknown {
            self.kind = kind;
        }
    }

    /// Adds a filter of the stream. `false` if the name is none.
    fn add_filter(&mut self, name: &[u8]) -> bool {
        self.filter = match (self.filter, name) {
            (StreamFilter::None, b"FlateDecode" | b"Fl") => StreamFilter::Flate,
            (StreamFilter::None, b"ASCII85Decode" | b"A85") => StreamFilter::Ascii85,
            (StreamFilter::Ascii85, b"FlateDecode" | b"Fl") => StreamFilter::Ascii85Flate,
            (_, name) if name.ends_with(b"Decode") || name == b"Crypt" => StreamFilter::Other,
            _ => return false,
        };
        true
    }

    fn reference(&mut self, target: u32) {
        let objects = &mut *self.objects;
        match self.key {
            DictionaryKey::Contents if self.contents.len() < MAX_RECORDS => self.contents.push(target),
            DictionaryKey::ToUnicode => self.font.to_unicode = Some(target),
            DictionaryKey::Descendants => self.font.is_wide = true,
            DictionaryKey::Encrypt => objects.is_encrypted = true,
            DictionaryKey::Length => self.length = None,
            DictionaryKey::Other(name) if objects.names.len() < MAX_RECORDS => {
                objects.names.entry(name).or_insert(target);
            }
            DictionaryKey::None if self.is_list && objects.lists.len() < MAX_RECORDS => {
                objects.lists.push((self.number, target));
            }
            _ => {}
        }
    }

    fn end_object(&mut self) {
        let objects = &mut *self.objects;
        if self.kind == ObjectKind::Page
            && objects.pages.len() < MAX_RECORDS
            && objects.pages.insert(self.number)
        {
            objects.add_page(self.media_box);
            for &stream in &self.contents {
                if objects.contents.len() < MAX_RECORDS || objects.contents.contains_key(&stream) {
                    *objects.contents.entry(stream).or_default() += 1;
                }
            }
        }
        if self.kind == ObjectKind::PageTree {
            objects.declared_pages = objects.declared_pages.max(self.page_count);
            objects.tree_size = objects.tree_size.or(self.media_box);
        }
        if self.is_linearized {
            objects.declared_pages = objects.declared_pages.max(self.linearized_pages);
        }
        if self.font != FontRecord::default() && objects.fonts.len() < MAX_RECORDS {
            objects.fonts.insert(self.number, self.font);
        }
        self.contents.clear();
        self.number = 0;
        self.kind = ObjectKind::Unknown;
        self.key = DictionaryKey::None;
        self.length = None;
        self.media_box = None;
        self.first = 0;
        self.page_count = 0;
        self.is_linearized = false;
        self.filter = StreamFilter::None;
        self.font = FontRecord::default();
        self.is_list = false;
        self.has_begun = false;
    }

    /// Records the stream whose dictionary was read. Returns it if it is an object stream.
    fn end_stream(&mut self, start: usize, end: usize) -> Option<PackedStream> {
        let position = |at: usize| u32::try_from(at).unwrap_or(u32::MAX);
        let record = StreamRecord {
            number: self.number,
            start: position(start),
            end: position(end),
            filter: self.filter,
            is_form: self.kind == ObjectKind::Form,
        };
        let (kind, first) = (self.kind, self.first);
        self.end_object();
        match kind {
            ObjectKind::ObjectStream => return Some(PackedStream { record, first }),
            ObjectKind::Unknown | ObjectKind::Form if self.objects.streams.len() < MAX_RECORDS => {
                self.objects.streams.push(record);
            }
            _ => {}
        }
        None
    }
}

/// The length of the line break after `stream`.
fn line_break(rest: &[u8]) -> usize {
    match rest {
        [b'\r', b'\n', ..] => 2,
        [b'\r' | b'\n', ..] => 1,
        _ => 0,
    }
}

/// The end of a stream, and the position after it. The declared length counts if `endstream` follows it.
fn stream_end(file: &[u8], start: usize, length: Option<usize>) -> (usize, usize) {
    let declared = length.and_then(|length| start.checked_add(length)).filter(|&end| {
        let after = file.get(end..).unwrap_or_default();
        after[..after.len().min(16)].trim_ascii_start().starts_with(b"endstream")
    });
    if let Some(end) = declared {
        return (end, end);
    }
    let found = file.get(start..).and_then(|rest| memmem::find(rest, b"endstream"));
    found.map_or((file.len(), file.len()), |length| (start + length, start + length))
}
