use super::*;
use ::base64::Engine as _;
use ::base64::engine::general_purpose::STANDARD;
use flate2::Compression;
use flate2::write::{DeflateEncoder, ZlibEncoder};
use std::io::Write as _;

fn encode(bytes: &[u8]) -> String {
    STANDARD.encode(bytes)
}

fn zlib(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = ZlibEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn stream(number: u32, dictionary: &str, data: &[u8]) -> Vec<u8> {
    let head = format!("{number} 0 obj\n<< /Length {} {dictionary} >>\nstream\n", data.len());
    [head.as_bytes(), data, b"\nendstream\nendobj\n"].concat()
}

fn pdf(parts: &[&[u8]]) -> Pdf {
    let file = [b"%PDF-1.5\n", parts.concat().as_slice(), b"trailer << /Root 1 0 R >>\n%%EOF"].concat();
    match Media::read("application/pdf", "", &encode(&file), &mut 0) {
        Media::Pdf(pdf) => pdf,
        other => panic!("{other:?}"),
    }
}

fn page_count(pdf: &Pdf) -> u64 {
    pdf.pages.iter().map(|(_, count)| count).sum()
}

const PAGE: &[u8] = b"3 0 obj <</Type/Page /MediaBox [0 0 595.28 841.89] /Contents 4 0 R>> endobj\n";

fn shown(content: &[u8]) -> String {
    let read = pdf(&[PAGE, &stream(4, "", content)]);
    assert_eq!(read.pages, [((595, 841), 1)]);
    read.text.text
}

#[test]
fn text_is_read_from_the_operators_that_show_it() {
    for (content, text) in [
        ("BT /F1 12 Tf (Hello) Tj ET", "Hello"),
        ("BT [(W) 20 (orld) -300 (!)] TJ ET", "World !"),
        ("BT <48656c6c6f> Tj ET", "Hello"),
        ("BT (a\\)\\050) ' ET", "a)("),
        (
            "BT 1 0 0 1 72 700 Tm (One line.) Tj 0 -14 Td (Next.) Tj T* (Third.) Tj ET",
            "One line. Next. Third.",
        ),
        ("BT (S) Tj 5 0 Td (p) Tj 5 0 Td (lit) Tj ET", "Split"),
        ("(not shown) Tj BT /Span << /ActualText (neither) >> BDC (shown) Tj EMC ET (again) Tj", "shown"),
        ("BI /W 1 /H 1 ID \\(BT (no) Tj ET EI BT (yes) Tj ET", "yes"),
        ("BT (unfinished", ""),
        ("", ""),
    ] {
        assert_eq!(shown(content.as_bytes()), text, "{content}");
    }
}

#[test]
fn text_is_read_from_contents_and_forms_only() {
    let text = |word: &str| format!("BT ({word}) Tj ET").into_bytes();
    let flate = "/Filter /FlateDecode";
    let read = pdf(&[
        PAGE,
        b"5 0 obj <</Type /Page/Contents[6 0 R 7 0 R]>> endobj 8 0 obj <</Type /Page /Contents 9 0 R>> endobj\n",
        b"9 0 obj [7 0 R]\nendobj 10 0 obj <</Type /Annot /Contents (BT \\(note\\) Tj ET)>> endobj\n",
        b"2 0 obj <</Type /Pages /Count 3 /MediaBox [0 0 612 792]>> endobj\n",
        &stream(4, flate, &zlib(&text("one"))),
        &stream(6, "/Filter [/FlateDecode]", &zlib(&text("two"))),
        &stream(7, "", &text("three")),
        &stream(11, "/Type /XObject /Subtype /Form", &text("form")),
        &stream(12, "/Subtype /Image /Width 9 /Filter /FlateDecode", &zlib(&text("image"))),
        &stream(13, "/Length1 99", &text("font")),
        &stream(14, "/N 3", &text("profile")),
        &stream(15, "/Type /Metadata", &text("metadata")),
        &stream(16, "/Type /EmbeddedFile", &text("file")),
    ]);
    assert_eq!(read.pages, [((595, 841), 1), ((612, 792), 2)]);
    assert_eq!(read.text.text, "one two three three form");
}

#[test]
fn pages_are_found_in_object_streams_and_counted_once() {
    let objects = ["<</Type/Page /Contents 4 0 R>>", "<</Type /Page>>", "<</Type/Pages/Count 2>>"];
    let head = format!("20 0 21 {} 22 {} ", objects[0].len(), objects[0].len() + objects[1].len());
    let packed = stream(
        30,
        &format!("/Type /ObjStm /N 3 /First {} /Filter /FlateDecode", head.len()),
        &zlib(format!("{head}{}", objects.concat()).as_bytes()),
    );
    let content = stream(4, "/Filter /FlateDecode", &zlib(b"BT (packed) Tj ET"));
    let read = pdf(&[&packed, &content]);
    assert_eq!((page_count(&read), &*read.text.text), (2, "packed"));
    // An updated page is in the file twice.
    let read = pdf(&[PAGE, &stream(4, "", b"BT (old) Tj ET"), PAGE]);
    assert_eq!((page_count(&read), &*read.text.text), (1, "old"));
}

#[test]
fn a_shared_content_counts_for_each_page() {
    let pages = b"3 0 obj <</Type/Page/Contents 5 0 R>> endobj 4 0 obj <</Type/Page/Contents 5 0 R>> endobj ";
    let read = pdf(&[pages, &stream(5, "", b"BT (abcd) Tj ET")]);
    assert_eq!((page_count(&read), read.text.characters()), (2, 9));
}

#[test]
fn codes_of_fonts_are_mapped_to_unicode() {
    let map = b"1 begincodespacerange <0000> <ffff> endcodespacerange 2 beginbfchar <0003> <0020> <0010> <65e5> endbfchar \
                2 beginbfrange <0024> <003d> <0041> <0044> <0045> [<0061> <0062>] endbfrange";
    let fonts = b"2 0 obj <</Font <</F1 8 0 R /F2 9 0 R>>>> endobj 8 0 obj <</Type /Font /Subtype /Type0 /Encoding \
                  /Identity-H /ToUnicode 10 0 R>> endobj 9 0 obj <</Type /Font /Encoding /WinAnsiEncoding>> endobj\n";
    let content = b"BT /F1 1 Tf <0024002500030010> Tj <00440045> Tj /F2 1 Tf ( caf\\351) Tj ET";
    let read = pdf(&[PAGE, fonts, &stream(10, "/Filter /FlateDecode", &zlib(map)), &stream(4, "", content)]);
    assert_eq!(read.text, DocumentText { text: "AB 日ab café".to_owned(), more_characters: 0 });
    let unknown = pdf(&[PAGE, &stream(4, "", b"BT <00240025000300100011> Tj ET")]);
    assert_eq!(unknown.text.characters(), 5);
}

#[test]
fn reportlab_encodes_contents_as_text() {
    // "BT (ascii) Tj ET" in ASCII85.
    let mut text = Vec::new();
    for group in zlib(b"BT (eighty-five) Tj ET").chunks(4) {
        let mut bytes = [0; 4];
        bytes[..group.len()].copy_from_slice(group);
        let mut n = u32::from_be_bytes(bytes);
        let mut digits = [0; 5];
        for digit in digits.iter_mut().rev() {
            *digit = b'!' + u8::try_from(n % 85).unwrap();
            n /= 85;
        }
        text.extend_from_slice(&digits[..=group.len()]);
    }
    text.extend(b"~>");
    let content = stream(4, "/Filter [ /ASCII85Decode /FlateDecode ]", &text);
    assert_eq!(pdf(&[PAGE, &content]).text.text, "eighty-five");
}

#[test]
fn an_unreadable_document_is_guessed_within_bounds() {
    let encrypted =
        [PAGE, &stream(4, "/Filter /FlateDecode", &[0xaa; 9_000]), b"trailer <</Encrypt 7 0 R>>"].concat();
    let read = pdf(&[&encrypted]);
    assert_eq!((page_count(&read), read.text.characters()), (1, 2_000));
    assert_eq!(page_count(&pdf(&[b"no objects"])), 1);
    assert_eq!(page_count(&pdf(&[b"1 0 obj <</Linearized 1 /N 3>> endobj ", &[b' '; 100]])), 3);
    assert_eq!(page_count(&pdf(&[b"1 0 obj <</Type /Pages /Count 999999999>> endobj"])), 9);
    assert!(pdf(&[&vec![0xff; 200_000]]).text.characters() <= 10_000);
}

/// A scanned page: one image, whose bytes look like text here and there.
#[test]
fn the_images_of_a_scan_have_no_text() {
    let mut image = Vec::new();
    while image.len() < 300_000 {
        image.extend(b"\xff\x00BT (pixels pixels pixels) Tj ET stream endobj\x01");
    }
    let read = pdf(&[
        PAGE,
        &stream(5, "/Subtype /Image /Filter /DCTDecode", &image),
        &stream(6, "/Filter /FlateDecode /Subtype /Image", &zlib(&image)),
        &stream(4, "", b"q 595 0 0 842 0 0 cm /Im0 Do Q"),
    ]);
    assert_eq!((page_count(&read), read.text.characters()), (1, 0));
}

fn archive(files: &[(&str, &str)]) -> Vec<u8> {
    let (mut archive, mut directory) = (Vec::new(), Vec::new());
    for (at, (name, text)) in files.iter().enumerate() {
        let is_stored = at % 2 == 1;
        let data = if is_stored {
            text.as_bytes().to_vec()
        } else {
            let mut encoder = DeflateEncoder::new(Vec::new(), Compression::default());
            encoder.write_all(text.as_bytes()).unwrap();
            encoder.finish().unwrap()
        };
        let u16s = |values: &[u16]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
        let size = |bytes: &[u8]| u32::try_from(bytes.len()).unwrap().to_le_bytes();
        let method = if is_stored { 0 } else { 8 };
        let common = [
            u16s(&[20, 0, method, 0, 0, 0, 0]),
            size(&data).to_vec(),
            size(text.as_bytes()).to_vec(),
            u16s(&[u16::try_from(name.len()).unwrap(), 0]),
        ]
        .concat();
        directory
            .extend([b"PK\x01\x02\x14\0", &*common, &[0; 10], &size(&archive), name.as_bytes()].concat());
        archive.extend([b"PK\x03\x04", &*common, name.as_bytes(), &data].concat());
    }
    let start = u32::try_from(archive.len()).unwrap().to_le_bytes();
    archive.extend(directory);
    archive.extend([b"PK\x05\x06", &[0; 12][..], &start, &[0; 2]].concat());
    archive
}

fn office(files: &[(&str, &str)]) -> Media {
    Media::read("", "", &encode(&archive(files)), &mut 0)
}

#[test]
fn the_text_of_office_documents_is_read() {
    let document = "<w:document><w:p><w:r><w:t xml:space=\"preserve\">Tom &amp; </w:t></w:r><w:r><w:t>Jerry&#33;&bad;</w:t>\
                    </w:r></w:p><w:p><w:r><w:instrText>PAGE</w:instrText><w:t>Two</w:t><w:tab/><w:t>x</w:t></w:r></w:p></w:document>";
    let read = office(&[("[Content_Types].xml", "<Types>no</Types>"), ("word/document.xml", document)]);
    let text = |text: &str| Media::Text(DocumentText { text: text.to_owned(), more_characters: 0 });
    assert_eq!(read, text("Tom & Jerry!&bad;\nTwo x"));
    let slide = "<p:sld><a:p><a:r><a:t>Title</a:t></a:r></a:p></p:sld>";
    assert_eq!(
        office(&[("ppt/slides/slide1.xml", slide), ("ppt/slides/_rels/slide1.xml", slide)]),
        text("Title")
    );
    let sheet = "<worksheet><row><c r=\"A1\" t=\"s\"><v>0</v></c><c r=\"B1\"><v>1.5</v></c></row>\
                 <row><c r=\"A2\" t=\"s\"><v>0</v></c><c r=\"B2\" t=\"inlineStr\"><is><t>inline</t></is></c></row></worksheet>";
    let strings = "<sst count=\"2\" uniqueCount=\"1\"><si><t>shared</t></si></sst>";
    let Media::Text(read) = office(&[("xl/worksheets/sheet1.xml", sheet), ("xl/sharedStrings.xml", strings)])
    else {
        panic!("no text")
    };
    // The shared text counts for both cells.
    assert_eq!(read, DocumentText { text: "1.5 inline shared".to_owned(), more_characters: 7 });
    assert!(matches!(office(&[("a.txt", "other archive")]), Media::Unknown(_)));
    assert!(matches!(Media::read("", "a.docx", &encode(b"PK\x03\x04 truncated"), &mut 0), Media::Unknown(_)));
}

#[test]
fn the_kind_of_a_file_is_recognised_by_type_name_or_first_bytes() {
    let kind = |kind: &str, name: &str, bytes: &[u8]| match Media::read(kind, name, &encode(bytes), &mut 0) {
        Media::Image(_) => "image",
        Media::Recording(recording) if recording.is_video => "video",
        Media::Recording(_) => "sound",
        Media::Pdf(_) => "pdf",
        Media::Text(_) => "text",
        Media::Unknown(_) => "unknown",
    };
    assert_eq!(kind("text/plain", "a.txt", b"%PDF-1.4"), "pdf");
    assert_eq!(kind("", "REPORT.PDF", b"?"), "pdf");
    assert_eq!(kind("text/csv", "", b"a,b"), "text");
    assert_eq!(kind("application/octet-stream", "a.md", b"\xff"), "text");
    assert_eq!(kind("application/octet-stream", "", b"readable"), "text");
    assert_eq!(kind("application/octet-stream", "", b"\xff\x00\x01"), "unknown");
    assert_eq!(kind("", "", b"\x89PNG"), "image");
    assert_eq!(kind("audio/wav", "", b"?"), "sound");
    assert_eq!(kind("video/mp4", "", b"?"), "video");
    assert_eq!(kind("", "", b"OggS"), "sound");
    assert_eq!(text(b"\xff\xfeh\0i\0".to_vec()).text, "hi");
}

fn milliseconds(bytes: &[u8]) -> u64 {
    sound(&encode(bytes)).unwrap().milliseconds
}

/// The length that is read from the start of a file.
fn declared(start: &[u8], end: &[u8]) -> u64 {
    milliseconds(&[start, &[0; 1_000], end].concat())
}

fn boxed(kind: &[u8], parts: &[&[u8]]) -> Vec<u8> {
    let size = u32::try_from(8 + parts.concat().len()).unwrap().to_be_bytes();
    [&size, kind, &parts.concat()].concat()
}

#[test]
fn the_length_of_sound_is_read_from_its_header() {
    // Two seconds each.
    let wav = [
        b"RIFF\0\0\0\0WAVEfmt \x10\0\0\0\x01\0\x01\0",
        &8_000u32.to_le_bytes()[..],
        &16_000u32.to_le_bytes(),
        b"\x02\0\x10\0data",
        &32_000u32.to_le_bytes(),
        &vec![0; 32_000],
    ]
    .concat();
    assert_eq!(milliseconds(&wav), 2_000);
    let flac =
        [b"fLaC\0\0\0\x22".as_slice(), &[0; 10], &[0x0a, 0xc4, 0x42, 0xf0, 0, 1, 0x58, 0x88], &[0; 30]]
            .concat();
    assert_eq!(declared(&flac, b""), 2_000);
    let ogg = [b"OggS\0\x02".as_slice(), &[0; 20], b"OpusHead"].concat();
    assert_eq!(declared(&ogg, &[&b"OggS\0\x04"[..], &96_000u64.to_le_bytes(), &[0; 20]].concat()), 2_000);
    // 44,100 Hz as a number of 80 bits.
    let rate = [0x40, 0x0e, 0xac, 0x44, 0, 0, 0, 0, 0, 0];
    let aiff =
        [b"FORM\0\0\0\0AIFFCOMM\0\0\0\x12\0\x01".as_slice(), &88_200u32.to_be_bytes(), &[0, 16], &rate]
            .concat();
    assert_eq!(declared(&aiff, b""), 2_000);
    // Frames of 417 bytes at 128 kbit/s and 44.1 kHz, after a tag with a picture of 100,000 bytes.
    let mut mp3 = [b"ID3\x04\0\0\0\x06\x0d\x20".as_slice(), &vec![0xff; 100_000]].concat();
    for _ in 0..77 {
        mp3.extend([&[0xff, 0xfb, 0x90, 0x00][..], &[0; 413]].concat());
    }
    assert!((1_990..2_020).contains(&milliseconds(&mp3)), "{}", milliseconds(&mp3));
    let mut with_count =
        [&[0xff, 0xfb, 0x90, 0x00][..], &[0; 32], b"Xing\0\0\0\x01", &77u32.to_be_bytes()].concat();
    with_count.resize(417, 0);
    assert_eq!(declared(&[with_count, vec![0xff, 0xfb, 0x90, 0, 0, 0, 0]].concat(), b""), 2_011);
    // ADTS frames of 100 bytes at 44.1 kHz.
    let aac: Vec<u8> =
        (0..86).flat_map(|_| [&[0xff, 0xf1, 0x50, 0x80, 0x0c, 0x9f, 0xfc][..], &[0; 93]].concat()).collect();
    assert!((1_990..2_000).contains(&milliseconds(&aac)), "{}", milliseconds(&aac));
    assert_eq!(milliseconds(&vec![1; 32_000]), 2_000, "128 kbit/s in an unknown format");
    assert!(sound("").is_none());
}

#[test]
fn the_length_of_video_is_read_from_its_header_wherever_it_is() {
    let header = [&[0; 12][..], &600u32.to_be_bytes(), &1_500u32.to_be_bytes(), &[0; 80]].concat();
    let track = [&[0; 76][..], &(1_280u32 << 16).to_be_bytes(), &(720u32 << 16).to_be_bytes()].concat();
    let movie = boxed(b"moov", &[&boxed(b"mvhd", &[&header]), &boxed(b"tkhd", &[&track]), b"hdlr soun"]);
    let start = boxed(b"ftyp", &[b"isom"]);
    let data = boxed(b"mdat", &[&[0; 5_000]]);
    let want = Recording { milliseconds: 2_500, is_video: true, has_sound: true, size: Some((1_280, 720)) };
    for file in [[&*start, &movie, &data].concat(), [&*start, &data, &movie].concat()] {
        assert_eq!(Media::read("video/mp4", "", &encode(&file), &mut 0), Media::Recording(want));
    }
    let webm = [
        &[0x1a, 0x45, 0xdf, 0xa3, 0x80, 0x15, 0x49, 0xa9, 0x66, 0x8e][..],
        &[0x2a, 0xd7, 0xb1, 0x83, 0x0f, 0x42, 0x40, 0x44, 0x89, 0x88],
        &2_500f64.to_be_bytes(),
        b"V_VP9",
        &[0; 900],
    ];
    let want = Recording { milliseconds: 2_500, is_video: true, has_sound: false, size: None };
    assert_eq!(Media::read("video/webm", "", &encode(&webm.concat()), &mut 0), Media::Recording(want));
    let Media::Recording(unknown) = Media::read("video/x-flv", "", &encode(&vec![1; 250_000]), &mut 0) else {
        panic!()
    };
    assert_eq!(unknown.milliseconds, 2_000, "1 Mbit/s in an unknown format");
}

#[test]
fn a_header_cannot_declare_more_than_the_file_can_hold() {
    let header = [&[0; 12][..], &1u32.to_be_bytes(), &u32::MAX.to_be_bytes(), &[0; 80]].concat();
    let file = [boxed(b"ftyp", &[b"isom"]), boxed(b"moov", &[&boxed(b"mvhd", &[&header])])].concat();
    assert!(milliseconds(&file) <= 4 * file.len() as u64 + 1_000);
}

mod properties {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn no_file_causes_a_panic(
            start in prop::sample::select(vec![
                "%PDF-1.4\n3 0 obj <</Type/Page/Contents 4 0 R>> 4 0 obj <</Length 5>> stream\n",
                "PK\u{3}\u{4}", "RIFF\0\0\0\0WAVEfmt ", "ID3\u{4}\0\0", "OggS\0\u{2}", "fLaC", "FORM\0\0\0\0AIFFCOMM", "\0\0\0\u{8}ftyp", "",
            ]),
            rest in prop::collection::vec(any::<u8>(), 0..400),
            text in "(BT|ET|Tj|TJ|Tf|ID|EI|obj|R|stream|endstream|<<|>>|[(]|[)]|\\[|\\]|<|>|/Font|/Type|/Page|[0-9]| |\\\\){0,60}",
        ) {
            let file = [start.as_bytes(), text.as_bytes(), &rest].concat();
            for kind in ["application/pdf", "", "audio/mpeg", "video/mp4", "application/vnd.openxmlformats-officedocument"] {
                Media::read(kind, "", &encode(&file), &mut 0);
            }
        }
    }
}
