//! The length of sound and video, from the headers of their files.

use super::base64::Base64;
use memchr::memmem;

/// Bytes at the start of a file that are decoded.
const START: usize = 64 << 10;
/// Bytes at the end of a file that are decoded, if its length is there.
const END: usize = 64 << 10;
/// Boxes of an MP4 file that are looked at.
const MAX_BOXES: usize = 64;
/// Bytes of a movie header that are decoded.
const MAX_MOVIE: usize = 256 << 10;
/// Bytes per second of sound in an unknown format: 128 kbit/s.
const SOUND_RATE: u64 = 16_000;
/// Bytes per second of video in an unknown format: 1 Mbit/s.
const VIDEO_RATE: u64 = 125_000;

/// No recording has fewer bytes per second: 2 kbit/s.
const LEAST_RATE: u64 = 250;

/// Sound or video.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Recording {
    pub(crate) milliseconds: u64,
    /// Whether it has pictures.
    pub(crate) is_video: bool,
    pub(crate) has_sound: bool,
    /// Width and height of the pictures, if known.
    pub(crate) size: Option<(u32, u32)>,
}

impl Recording {
    pub(super) fn sound(file: &Base64<'_>) -> Self {
        let read = read(file).map(|recording| recording.milliseconds);
        let milliseconds = read.unwrap_or_else(|| file.len() as u64 * 1_000 / SOUND_RATE);
        Self { milliseconds, is_video: false, has_sound: true, size: None }
    }

    pub(super) fn video(file: &Base64<'_>) -> Self {
        let unknown = || Self {
            milliseconds: file.len() as u64 * 1_000 / VIDEO_RATE,
            has_sound: true,
            ..Self::default()
        };
        Self { is_video: true, ..read(file).unwrap_or_else(unknown) }
    }
}

/// `None`: the format is unknown, or the file is damaged.
fn read(file: &Base64<'_>) -> Option<Recording> {
    let recording = declared(file)?;
    let longest = file.len() as u64 * 1_000 / LEAST_RATE + 1_000;
    Some(Recording { milliseconds: recording.milliseconds.min(longest), ..recording })
}

/// What the headers of a file declare.
fn declared(file: &Base64<'_>) -> Option<Recording> {
    let start = file.start(START);
    let milliseconds = match start.get(..12)? {
        [b'R', b'I', b'F', b'F', .., b'W', b'A', b'V', b'E'] => wave(&start, file.len()),
        [b'F', b'O', b'R', b'M', ..] => aiff(&start),
        [b'f', b'L', b'a', b'C', ..] => flac(&start),
        [b'O', b'g', b'g', b'S', ..] => ogg(&start, &file.part(file.len().saturating_sub(END), END)),
        [_, _, _, _, b'f', b't', b'y', b'p', ..] => return movie(file),
        [0x1a, 0x45, 0xdf, 0xa3, ..] => return matroska(&start),
        [b'I', b'D', b'3', _, _, _, size @ .., _, _] => {
            let size = size.iter().fold(0, |n, b| n << 7 | usize::from(b & 0x7f));
            frames(&file.part(10 + size, START), file.len().saturating_sub(10 + size))
        }
        _ => frames(&start, file.len()),
    };
    milliseconds.map(|milliseconds| Recording { milliseconds, has_sound: true, ..Recording::default() })
}

/// The big-endian number in these bytes.
fn number(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |n, b| n << 8 | u64::from(*b))
}

fn little_endian(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |n, b| n << 8 | u64::from(*b))
}

/// `None` if the rate is 0.
fn milliseconds(units: u64, per_second: u64) -> Option<u64> {
    u64::try_from(u128::from(units) * 1_000 / u128::from(per_second).max(1)).ok().filter(|_| per_second > 0)
}

fn wave(start: &[u8], size: usize) -> Option<u64> {
    let format = memmem::find(start, b"fmt ")?;
    let rate = little_endian(start.get(format + 16..format + 20)?);
    let data = memmem::find(start, b"data").map_or(44, |at| at + 8);
    let declared = start.get(data - 4..data).map_or(u64::MAX, little_endian);
    let present = size.saturating_sub(data) as u64;
    // A writer that does not know the size yet declares 0 or the maximum.
    milliseconds(if declared == 0 { present } else { declared.min(present) }, rate)
}

fn aiff(start: &[u8]) -> Option<u64> {
    let common = start.get(memmem::find(start, b"COMM")? + 8..)?;
    let samples = number(common.get(2..6)?);
    // A number of 80 bits: an exponent, and a mantissa with its whole part.
    let exponent = number(common.get(8..10)?);
    let rate =
        number(common.get(10..18)?).checked_shr(u32::try_from(16_446u64.checked_sub(exponent)?).ok()?)?;
    milliseconds(samples, rate)
}

fn flac(start: &[u8]) -> Option<u64> {
    let rate = number(start.get(18..21)?) >> 4;
    let samples = number(start.get(21..26)?) & 0xf_ffff_ffff;
    milliseconds(samples, rate).filter(|_| samples > 0)
}

fn ogg(start: &[u8], end: &[u8]) -> Option<u64> {
    let last = memmem::rfind(end, b"OggS")?;
    let samples = little_endian(end.get(last + 6..last + 14)?);
    let rate = if memmem::find(start, b"OpusHead").is_some() {
        48_000
    } else {
        let header = memmem::find(start, b"\x01vorbis")?;
        little_endian(start.get(header + 12..header + 16)?)
    };
    milliseconds(samples, rate).filter(|_| samples != u64::MAX)
}

/// Sample rates of AAC, by their index in the frame header.
const AAC_RATES: [u64; 13] =
    [96_000, 88_200, 64_000, 48_000, 44_100, 32_000, 24_000, 22_050, 16_000, 12_000, 11_025, 8_000, 7_350];
/// Bit rates of layer III of MPEG 1 and 2 in kbit/s, by their index in the frame header.
const MPEG_1_KBITS: [u64; 16] = [0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 0];
const MPEG_2_KBITS: [u64; 16] = [0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160, 0];

/// A frame of MP3 or AAC.
struct SoundFrame {
    size: usize,
    samples: u64,
    rate: u64,
    /// Where an MP3 has the number of its frames.
    info: usize,
}

impl SoundFrame {
    fn read(bytes: &[u8]) -> Option<Self> {
        let &[0xff, second, third, fourth, fifth, sixth, ..] = bytes else { return None };
        if second & 0xf6 == 0xf0 {
            let size = usize::from(fourth & 3) << 11 | usize::from(fifth) << 3 | usize::from(sixth) >> 5;
            let rate = *AAC_RATES.get(usize::from(third >> 2 & 0xf))?;
            return Some(Self { size, samples: 1_024, rate, info: 0 }).filter(|frame| frame.size > 7);
        }
        // Eleven set bits, the version, and layer III.
        if second & 0xe6 != 0xe2 {
            return None;
        }
        let version = second >> 3 & 3;
        let is_first = version == 3;
        let rate = [44_100, 48_000, 32_000].get(usize::from(third >> 2 & 3))?;
        let rate = match version {
            3 => *rate,
            2 => rate / 2,
            0 => rate / 4,
            _ => return None,
        };
        let kbits = if is_first { MPEG_1_KBITS } else { MPEG_2_KBITS }[usize::from(third >> 4)];
        let samples = if is_first { 1_152 } else { 576 };
        let size = usize::try_from(samples / 8 * kbits * 1_000 / rate).ok()? + usize::from(third >> 1 & 1);
        let is_mono = fourth >> 6 == 3;
        let info = match (is_first, is_mono) {
            (true, false) => 36,
            (true, true) | (false, false) => 21,
            (false, true) => 13,
        };
        Some(Self { size, samples, rate, info }).filter(|frame| frame.size > 4)
    }
}

/// The length of MP3 or AAC: from the number of frames, or from the first frames and the size of the file.
fn frames(start: &[u8], size: usize) -> Option<u64> {
    let mut sync = memchr::memchr_iter(0xff, start);
    // A frame is real if another frame follows it.
    let first = sync.find(|&at| {
        let frame = SoundFrame::read(&start[at..]);
        frame.is_some_and(|frame| {
            start.get(at + frame.size..).is_none_or(|rest| rest.len() < 6 || SoundFrame::read(rest).is_some())
        })
    })?;
    let frame = SoundFrame::read(&start[first..])?;
    let declared = [(frame.info, &b"Xing"[..], 8), (frame.info, b"Info", 8), (36, b"VBRI", 14)];
    let count = declared.into_iter().find_map(|(at, mark, count)| {
        let info = start.get(first + at..)?;
        info.strip_prefix(mark)?;
        Some(number(info.get(count..count + 4)?)).filter(|count| *count > 0)
    });
    if let Some(count) = count {
        return milliseconds(count * frame.samples, frame.rate);
    }
    let (mut at, mut samples) = (first, 0);
    while let Some(frame) = start.get(at..).and_then(SoundFrame::read) {
        at += frame.size;
        samples += frame.samples;
    }
    let read = milliseconds(samples, frame.rate)?;
    Some(read * size.saturating_sub(first) as u64 / (at - first).max(1) as u64)
}

/// Reads the header of an MP4 file, which may be at its end.
fn movie(file: &Base64<'_>) -> Option<Recording> {
    let mut at = 0;
    for _ in 0..MAX_BOXES {
        let head = file.part(at, 16);
        let (size, kind) = (number(head.get(..4)?), head.get(4..8)?);
        let (size, header) = match size {
            0 => (file.len() - at, 8),
            1 => (usize::try_from(number(head.get(8..16)?)).ok()?, 16),
            size => (usize::try_from(size).ok()?, 8),
        };
        if kind == b"moov" {
            return movie_header(&file.part(at + header, size.saturating_sub(header).min(MAX_MOVIE)));
        }
        at = at.checked_add(size.max(8)).filter(|at| *at < file.len())?;
    }
    None
}

fn movie_header(movie: &[u8]) -> Option<Recording> {
    // After the name of a box: its version, and two times of 4 or 8 bytes.
    let fields = |name: &[u8]| {
        let fields = movie.get(memmem::find(movie, name)? + 4..)?;
        let is_long = *fields.first()? == 1;
        Some((fields, if is_long { 8 } else { 4 }))
    };
    let (header, long) = fields(b"mvhd")?;
    let scale = number(header.get(4 + 2 * long..8 + 2 * long)?);
    let mut units = number(header.get(8 + 2 * long..8 + 3 * long)?);
    if units == 0 {
        // A movie in fragments.
        let (extends, long) = fields(b"mehd")?;
        units = number(extends.get(4..4 + long)?);
    }
    // The size of each track is in the last 8 bytes of its header, as numbers with 16 bits of fraction. That of
    // sound is 0.
    let sizes = memmem::find_iter(movie, b"tkhd").take(MAX_BOXES).filter_map(|at| {
        let header = movie.get(at + 4..)?;
        let end = if *header.first()? == 1 { 96 } else { 84 };
        let size = header.get(end - 8..end)?;
        let side = |bytes: &[u8]| u32::try_from(number(bytes) >> 16).ok().filter(|side| *side > 0);
        Some((side(&size[..4])?, side(&size[4..])?))
    });
    Some(Recording {
        milliseconds: milliseconds(units, scale)?,
        is_video: false,
        has_sound: memmem::find(movie, b"soun").is_some(),
        size: sizes.into_iter().next(),
    })
}

/// Reads the header of a WebM or Matroska file.
fn matroska(start: &[u8]) -> Option<Recording> {
    let info = start.get(memmem::find(start, &[0x15, 0x49, 0xa9, 0x66])?..)?;
    let info = &info[..info.len().min(512)];
    let field = |id: &[u8]| {
        let rest = info.get(memmem::find(info, id)? + id.len()..)?;
        let size = usize::from(rest.first()? & 0x7f);
        rest.get(1..1 + size)
    };
    let nanoseconds = field(&[0x2a, 0xd7, 0xb1]).map_or(1_000_000, number);
    let duration = field(&[0x44, 0x89])?;
    let units = match duration.len() {
        4 => f64::from(f32::from_be_bytes(duration.try_into().ok()?)),
        _ => f64::from_be_bytes(duration.try_into().ok()?),
    };
    // A float that is negative, too large or no number becomes the nearest integer.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let units = units as u64;
    let milliseconds = u64::try_from(u128::from(units) * u128::from(nanoseconds) / 1_000_000).ok()?;
    let has_sound = [&b"A_OPUS"[..], b"A_VORBIS", b"A_AAC"].iter().any(|c| memmem::find(start, c).is_some());
    Some(Recording { milliseconds, is_video: false, has_sound, size: None })
}
