//! Files of one megabyte that are expensive to read, and requests that contain them.

use base64::Engine as _;
use flate2::Compression;
use flate2::write::{DeflateEncoder, ZlibEncoder};
use std::io::Write as _;

pub(crate) const MEGABYTE: usize = 1 << 20;

/// A file with its name, its media type and its bytes.
pub(crate) struct Document {
    pub(crate) name: &'static str,
    kind: &'static str,
    bytes: Vec<u8>,
}

impl Document {
    /// A chat with the file.
    pub(crate) fn request(&self) -> String {
        let data = base64::engine::general_purpose::STANDARD.encode(&self.bytes);
        format!(
            r#"{{"model":"gpt-4o","messages":[{{"role":"user","content":[{{"type":"file","file":{{"filename":"f","file_data":"data:{};base64,{data}"}}}}]}}]}}"#,
            self.kind
        )
    }
}

fn zlib(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = ZlibEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn deflate(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = DeflateEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// Empty blocks of deflate with fixed codes. Each has ten bits.
fn empty_blocks() -> Vec<u8> {
    [0x02, 0x08, 0x20, 0x80, 0x00].repeat(200_000)
}

/// Empty blocks of deflate, each with tables of its own.
fn blocks_with_tables() -> Vec<u8> {
    // The lengths 1 and 18 (a run of zeros) have codes of one bit.
    let mut lengths = [(0u8, 3u8); 18];
    (lengths[2], lengths[17]) = ((1, 3), (1, 3));
    let head = [(0, 1), (2, 2), (0, 8), (0, 2), (14, 4)];
    // 256 zeros in two runs, a code for the end of the block, a code for a distance, and the end.
    let rest = [(1, 1), (127, 7), (1, 1), (107, 7), (0, 3)];
    let numbers = head.iter().chain(&lengths).chain(&rest);
    let block: Vec<u8> =
        numbers.flat_map(|(number, bits)| (0..*bits).map(move |bit| number >> bit & 1)).collect();
    let bits = block.repeat(8);
    let bytes = bits.chunks(8).map(|bits| bits.iter().rev().fold(0, |byte, bit| byte << 1 | bit));
    bytes.collect::<Vec<u8>>().repeat(11_000)
}

fn stream(number: usize, dictionary: &str, data: &[u8]) -> Vec<u8> {
    let head = format!("{number} 0 obj<</Length {}{dictionary}>>stream\n", data.len());
    [head.as_bytes(), data, b"\nendstream endobj\n"].concat()
}

/// `make` is called with ascending numbers until there is a megabyte.
fn filled(start: &[u8], make: impl Fn(usize) -> Vec<u8>) -> Vec<u8> {
    let mut bytes = start.to_vec();
    for number in 10.. {
        bytes.extend(make(number));
        if bytes.len() >= MEGABYTE {
            break;
        }
    }
    bytes.truncate(MEGABYTE);
    bytes
}

fn words(bytes: usize) -> String {
    let mut state = 7u32;
    let mut text = String::from("BT /F1 12 Tf ");
    while text.len() < bytes {
        text.push('(');
        for _ in 0..9 {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let length = 2 + (state >> 28) as usize;
            text.extend((0..length).map(|at| char::from(b'a' + (state >> at & 15) as u8)));
            text.push(' ');
        }
        text.push_str(") Tj 0 -14 Td\n");
    }
    text
}

/// An archive with these files, whose directory names the first one `copies` times.
fn archive(name: &str, data: &[u8], copies: usize) -> Vec<u8> {
    let length = u16::try_from(name.len()).unwrap().to_le_bytes();
    let common = [
        &[20, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0][..],
        &u32::try_from(data.len()).unwrap().to_le_bytes(),
        &[0; 4],
        &length,
        &[0; 2],
    ]
    .concat();
    let mut archive = [b"PK\x03\x04", &*common, name.as_bytes(), data].concat();
    let directory = u32::try_from(archive.len()).unwrap().to_le_bytes();
    for _ in 0..copies {
        archive.extend([b"PK\x01\x02\x14\0", &*common, &[0; 14], name.as_bytes()].concat());
    }
    archive.extend([b"PK\x05\x06", &[0; 12][..], &directory, &[0; 2]].concat());
    archive
}

const PAGE: &[u8] = b"%PDF-1.5\n3 0 obj<</Type/Page/Contents 4 0 R>>endobj\n";
const PDF: &str = "application/pdf";
const FLATE: &str = "/Filter/FlateDecode";

fn pdfs() -> Vec<(&'static str, Vec<u8>)> {
    let bomb = zlib(&vec![b' '; 64 << 20]);
    let page = |number: usize, more: &[u8]| {
        [format!("{} 0 obj<</Type/Page/Contents {number} 0 R>>endobj\n", number + 500_000).as_bytes(), more]
            .concat()
    };
    let tiny = zlib(b"BT (a) Tj ET");
    let text = zlib(words(600_000).as_bytes());
    let ranges = "<0000> <ffff> <0000> ".repeat(9_000);
    let map = zlib(format!("2 beginbfrange {ranges} endbfrange").as_bytes());
    let positions: String = (0..60_000)
        .flat_map(|at| [at.to_string(), " ".to_owned(), (at % 2 * 100_000).to_string(), " ".to_owned()])
        .collect();
    let packed = zlib(format!("{positions}{}", "<</Type/Page>>".repeat(10_000)).as_bytes());
    let font = |number: usize| {
        format!(
            "{} 0 obj<</F{number} {} 0 R/ToUnicode {number} 0 R>>endobj\n",
            number + 90_000,
            number + 90_000
        )
    };
    let repeated = |unit: &[u8]| filled(PAGE, |_| unit.to_vec());
    let deflated = |data: &[u8]| [PAGE, &stream(4, FLATE, &[&[0x78, 0x01], data].concat())].concat();
    let content = |unit: &[u8]| [PAGE, &stream(4, "", &filled(b"BT ", |_| unit.to_vec()))].concat();
    vec![
        ("a long text", filled(PAGE, |number| page(number, &stream(number, FLATE, &text)))),
        ("flate bombs", filled(PAGE, |number| page(number, &stream(number, FLATE, &bomb)))),
        ("empty blocks", deflated(&empty_blocks())),
        ("blocks with tables", deflated(&blocks_with_tables())),
        ("tiny streams", filled(PAGE, |number| page(number, &stream(number, FLATE, &tiny)))),
        ("pages", filled(PAGE, |number| page(number, b""))),
        ("names", filled(PAGE, |number| format!("/N{number} {number} 0 R ").into_bytes())),
        (
            "object streams",
            filled(PAGE, |n| {
                stream(n, &format!("/Type/ObjStm/N 60000/First {}{FLATE}", positions.len()), &packed)
            }),
        ),
        ("maps of fonts", filled(PAGE, |n| [font(n).as_bytes(), &stream(n, FLATE, &map)].concat())),
        ("brackets", repeated(b"(")),
        ("angle brackets", repeated(b"< ")),
        ("slashes", repeated(b"/")),
        ("numbers", repeated(b"1 ")),
        ("streams without an end", repeated(b"1 0 obj<<>>stream\n")),
        ("references", repeated(b"/Contents[1 0 R]")),
        ("lists", repeated(b"1 0 obj[1 0 R]endobj ")),
        ("shown letters", content(b"(a)Tj ")),
        ("a list of strings", content(b"[(a)-999")),
        ("inline images", content(b"ID EI")),
        ("strings that are not shown", content(b"(a) ")),
    ]
}

fn others() -> Vec<(&'static str, &'static str, Vec<u8>)> {
    let office = "application/vnd.openxmlformats-officedocument.wordprocessingml.document";
    let tags = deflate(&b"<w:t>a</w:t>".repeat(2 << 20));
    let entities = deflate(&[b"<w:t>", &b"&".repeat(4 << 20)[..]].concat());
    let sheet = deflate(&b"<c t=\"s\"><v>1</v></c>".repeat(1 << 20));
    let padded = |mut file: Vec<u8>| {
        file.resize(MEGABYTE, 0);
        file
    };
    vec![
        ("an archive of tags", office, archive("word/document.xml", &tags, 9_000)),
        ("an archive of entities", office, archive("word/document.xml", &entities, 9_000)),
        ("an archive of cells", office, archive("xl/worksheets/sheet1.xml", &sheet, 9_000)),
        ("an archive of empty blocks", office, archive("word/document.xml", &empty_blocks(), 1)),
        ("other entries", office, archive("a", &tags, 20_000)),
        ("MP3 marks", "audio/mpeg", vec![0xff; MEGABYTE]),
        ("MP3 frames", "audio/mpeg", [0xff, 0xe3, 0x14, 0x00].repeat(MEGABYTE / 4)),
        ("AAC frames", "audio/aac", [0xff, 0xf1, 0x50, 0x80, 0x01, 0x00, 0, 0].repeat(MEGABYTE / 8)),
        (
            "MP4 boxes",
            "video/mp4",
            [b"\0\0\0\x08ftyp".as_slice(), &b"\0\0\0\x08free".repeat(MEGABYTE / 8)].concat(),
        ),
        ("an MP4 header", "video/mp4", padded(b"\0\0\0\x08ftyp\0\x10\0\0moovmvhd".to_vec())),
        ("WebM", "video/webm", padded(b"\x1a\x45\xdf\xa3\x15\x49\xa9\x66\x44\x89\xff".to_vec())),
        ("Ogg", "audio/ogg", b"OggS".repeat(MEGABYTE / 4)),
        ("text", "text/plain", words(MEGABYTE).into_bytes()),
        ("no text", "text/plain", vec![0xff; MEGABYTE]),
    ]
}

/// Files that are as slow to read, or need as much memory, as possible.
pub(crate) fn hostile() -> Vec<Document> {
    let pdfs = pdfs().into_iter().map(|(name, bytes)| Document { name, kind: PDF, bytes });
    let others = others().into_iter().map(|(name, kind, bytes)| Document { name, kind, bytes });
    pdfs.chain(others).collect()
}
