//! Decodes a compressed answer on the side, while its bytes pass to the caller as they are.
//!
//! Bounded in memory (windows of 8 MiB for zstd, 16 MiB for Brotli, 32 KiB for the others) and in work: a
//! piece that decodes to far more than it is ends the reading, so that a bomb costs no more than a piece.

use brotli_decompressor::{BrotliDecoderParameter, DecompressorWriter};
use flate2::Decompress;
use flate2::write::{MultiGzDecoder, ZlibDecoder};
use std::io::{self, Write};
use zstd::stream::write::Decoder as ZstdDecoder;

/// A piece may decode to so many times its size, and so much besides: about a millisecond's reading. Text
/// of models shrinks to a third, the events around it to a thirtieth.
const MOST_GROWTH: usize = 32;
const ALWAYS_FINE: usize = 256 * 1024;
/// And an answer as a whole to so many times its size, and so much besides.
const MOST_GROWTH_IN_ALL: u64 = 100;
const ALWAYS_FINE_IN_ALL: u64 = 8 * 1024 * 1024;
/// 8 MiB, which is what RFC 8878 asks a decoder for.
const ZSTD_WINDOW_LOG: u32 = 23;
/// Brotli writes through a buffer of this size.
const BUFFER: usize = 16 * 1024;

/// How an answer is compressed (RFC 9110, section 8.4.1; RFC 7932; RFC 8878).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Coding {
    /// `gzip`, `x-gzip`
    Gzip,
    /// `deflate`: with zlib's head, or without, as some send it
    Deflate,
    /// `br`
    Brotli,
    /// `zstd`
    Zstd,
}

impl Coding {
    /// By a `content-encoding`; `None`: not one that is known, or several.
    pub fn named(name: &[u8]) -> Option<Self> {
        let name = name.trim_ascii();
        let names: [(&[u8], Self); 5] = [
            (b"gzip", Self::Gzip),
            (b"x-gzip", Self::Gzip),
            (b"deflate", Self::Deflate),
            (b"br", Self::Brotli),
            (b"zstd", Self::Zstd),
        ];
        names.into_iter().find(|(known, _)| name.eq_ignore_ascii_case(known)).map(|(_, coding)| coding)
    }
}

/// Decodes what it is fed, and writes that to `W`.
pub struct Decoder<W: Write + Default> {
    coder: Coder<W>,
    /// Bytes that came, and that were made of them.
    came: u64,
    made: u64,
    /// Bytes that came and gave nothing.
    unread: u64,
    gave_up: bool,
}

enum Coder<W: Write + Default> {
    Gzip(MultiGzDecoder<Bounded<W>>),
    /// Its head is not seen yet, with what has come of that.
    Deflate(Bounded<W>, Vec<u8>),
    /// With zlib's head or without.
    Zlib(ZlibDecoder<Bounded<W>>),
    Brotli(Box<DecompressorWriter<Bounded<W>>>),
    Zstd(ZstdDecoder<'static, Bounded<W>>),
}

/// Takes no more than there is room for.
#[derive(Default)]
struct Bounded<W> {
    inner: W,
    room: usize,
}

impl<W: Write> Write for Bounded<W> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.room = self.room.checked_sub(data.len()).ok_or(io::ErrorKind::FileTooLarge)?;
        self.inner.write_all(data)?;
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<W: Write + Default> Decoder<W> {
    /// Decodes into `inner`.
    ///
    /// # Errors
    /// There is no memory for it.
    pub fn new(coding: Coding, inner: W) -> io::Result<Self> {
        let bounded = Bounded { inner, room: 0 };
        let coder = match coding {
            Coding::Gzip => Coder::Gzip(MultiGzDecoder::new(bounded)),
            Coding::Deflate => Coder::Deflate(bounded, Vec::new()),
            Coding::Brotli => {
                let mut decoder = DecompressorWriter::new(bounded, BUFFER);
                // Windows of up to a gigabyte are no part of RFC 7932.
                decoder.set_parameter(BrotliDecoderParameter::BROTLI_DECODER_PARAM_LARGE_WINDOW, 0);
                Coder::Brotli(Box::new(decoder))
            }
            Coding::Zstd => {
                let mut decoder = ZstdDecoder::new(bounded)?;
                decoder.window_log_max(ZSTD_WINDOW_LOG)?;
                Coder::Zstd(decoder)
            }
        };
        Ok(Self { coder, came: 0, made: 0, unread: 0, gave_up: false })
    }

    /// Decodes the next piece. What is no such code, or decodes to too much, ends the reading.
    pub fn feed(&mut self, piece: &[u8]) {
        self.came += piece.len() as u64;
        self.unread += piece.len() as u64;
        if self.gave_up {
            return;
        }
        let room = piece.len().saturating_mul(MOST_GROWTH).saturating_add(ALWAYS_FINE);
        self.coder.bounded_mut().room = room;
        let is_fine = self.coder.decode(piece).is_ok();
        let made = (room - self.coder.bounded().room) as u64;
        self.made += made;
        let most = self.came.saturating_mul(MOST_GROWTH_IN_ALL).saturating_add(ALWAYS_FINE_IN_ALL);
        self.gave_up = !is_fine || self.made > most;
        if !self.gave_up && made > 0 {
            self.unread = 0;
        }
    }

    /// Whether the reading has ended before the answer.
    pub fn gave_up(&self) -> bool {
        self.gave_up
    }

    /// Bytes that came since the last that gave something.
    pub fn unread(&self) -> u64 {
        self.unread
    }

    /// Where the decoded bytes go.
    pub fn inner(&self) -> &W {
        &self.coder.bounded().inner
    }

    /// The same, to be taken out of.
    pub fn inner_mut(&mut self) -> &mut W {
        &mut self.coder.bounded_mut().inner
    }
}

impl<W: Write + Default> Coder<W> {
    fn decode(&mut self, piece: &[u8]) -> io::Result<()> {
        match self {
            Self::Deflate(inner, head) => {
                head.extend_from_slice(piece);
                let &[first, second, ..] = head.as_slice() else { return Ok(()) };
                // Zlib's head names the method 8, and is a multiple of 31 (RFC 1950, section 2.2).
                let is_zlib = first & 0x0f == 8 && u16::from_be_bytes([first, second]).is_multiple_of(31);
                let (inner, head) = (std::mem::take(inner), std::mem::take(head));
                *self = Self::Zlib(ZlibDecoder::new_with_decompress(inner, Decompress::new(is_zlib)));
                self.decode(&head)
            }
            Self::Gzip(decoder) => push(decoder, piece),
            Self::Zlib(decoder) => push(decoder, piece),
            Self::Brotli(decoder) => {
                push(decoder.as_mut(), piece)?;
                // What its buffer had no room for it keeps until it is called again.
                loop {
                    let room = decoder.get_ref().room;
                    let _none = decoder.write(&[])?;
                    if decoder.get_ref().room == room {
                        return Ok(());
                    }
                }
            }
            Self::Zstd(decoder) => push(decoder, piece),
        }
    }

    fn bounded(&self) -> &Bounded<W> {
        match self {
            Self::Gzip(decoder) => decoder.get_ref(),
            Self::Deflate(inner, _) => inner,
            Self::Zlib(decoder) => decoder.get_ref(),
            Self::Brotli(decoder) => decoder.get_ref(),
            Self::Zstd(decoder) => decoder.get_ref(),
        }
    }

    fn bounded_mut(&mut self) -> &mut Bounded<W> {
        match self {
            Self::Gzip(decoder) => decoder.get_mut(),
            Self::Deflate(inner, _) => inner,
            Self::Zlib(decoder) => decoder.get_mut(),
            Self::Brotli(decoder) => decoder.get_mut(),
            Self::Zstd(decoder) => decoder.get_mut(),
        }
    }
}

/// Decodes a piece and hands on all that it gives.
fn push(decoder: &mut impl Write, piece: &[u8]) -> io::Result<()> {
    decoder.write_all(piece)?;
    decoder.flush()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ALL: [(&str, Coding); 5] = [
        ("gzip", Coding::Gzip),
        ("deflate", Coding::Deflate),
        ("raw deflate", Coding::Deflate),
        ("br", Coding::Brotli),
        ("zstd", Coding::Zstd),
    ];

    fn encoded(how: &str, plain: &[u8]) -> Vec<u8> {
        use flate2::{Compression, write};
        let level = Compression::default();
        match how {
            "gzip" => {
                let mut encoder = write::GzEncoder::new(Vec::new(), level);
                encoder.write_all(plain).unwrap();
                encoder.finish().unwrap()
            }
            "deflate" => {
                let mut encoder = write::ZlibEncoder::new(Vec::new(), level);
                encoder.write_all(plain).unwrap();
                encoder.finish().unwrap()
            }
            "raw deflate" => {
                let mut encoder = write::DeflateEncoder::new(Vec::new(), level);
                encoder.write_all(plain).unwrap();
                encoder.finish().unwrap()
            }
            "br" => {
                let mut out = Vec::new();
                brotli::CompressorWriter::new(&mut out, 4096, 5, 22).write_all(plain).unwrap();
                out
            }
            _ => zstd::encode_all(plain, 3).unwrap(),
        }
    }

    fn decoded(coding: Coding, code: &[u8], cuts: &[usize]) -> Decoder<Vec<u8>> {
        let mut decoder = Decoder::new(coding, Vec::new()).unwrap();
        let mut from = 0;
        for cut in cuts.iter().copied().chain([code.len()]) {
            let cut = cut.clamp(from, code.len());
            decoder.feed(&code[from..cut]);
            from = cut;
        }
        decoder
    }

    #[test]
    fn codings_are_known_by_their_names() {
        for (name, coding) in [
            ("gzip", Coding::Gzip),
            (" X-GZIP", Coding::Gzip),
            ("Br", Coding::Brotli),
            ("zstd", Coding::Zstd),
        ] {
            assert_eq!(Coding::named(name.as_bytes()), Some(coding));
        }
        for name in ["", "identity", "gzip, br", "compress", "brotli"] {
            assert_eq!(Coding::named(name.as_bytes()), None);
        }
    }

    #[test]
    fn several_members_or_frames_are_one_answer() {
        for (how, coding) in [("gzip", Coding::Gzip), ("zstd", Coding::Zstd)] {
            let code = [encoded(how, b"one "), encoded(how, b"two")].concat();
            for cuts in [vec![], (0..code.len()).collect()] {
                let decoder = decoded(coding, &code, &cuts);
                assert_eq!(
                    (decoder.inner().as_slice(), decoder.gave_up()),
                    (&b"one two"[..], false),
                    "{how}"
                );
            }
        }
    }

    #[test]
    fn what_came_before_a_fault_stays_read_and_the_rest_is_counted() {
        let noise = |n: u32| n.wrapping_mul(2_654_435_761).rotate_left(n % 32);
        let letter = |n| b"abcdefghijklmnopq  \n"[noise(n) as usize % 20];
        let plain: Vec<u8> = (0..400_000).map(letter).collect();
        for (how, coding) in ALL {
            let mut code = encoded(how, &plain);
            let half = code.len() / 2;
            let whole = decoded(coding, &code[..half], &[]);
            assert!(!whole.gave_up(), "{how}: cut off is no fault");
            assert!(whole.inner().len() > 5_000, "{how}: {}", whole.inner().len());
            code.splice(half.., (0..300_000).map(|n| noise(n).to_le_bytes()[1]));
            let broken = decoded(coding, &code, &[half]);
            assert!(broken.gave_up(), "{how}");
            assert!((300_000..380_000).contains(&broken.unread()), "{how}: {}", broken.unread());
            assert!(plain.starts_with(&broken.inner()[..5_000]), "{how}");
        }
    }

    #[test]
    fn a_bomb_costs_no_more_than_a_piece() {
        let plain = vec![b' '; 64 << 20];
        for (how, coding) in ALL {
            let code = encoded(how, &plain);
            let pieces = |size| -> Vec<usize> { (0..code.len()).step_by(size).collect() };
            let decoder = decoded(coding, &code, &pieces(16 * 1024));
            assert!(decoder.gave_up(), "{how}");
            assert!(decoder.inner().len() <= 16 * 1024 * MOST_GROWTH + ALWAYS_FINE, "{how}");
            // In small pieces it goes on for longer, but not to its end.
            let decoder = decoded(coding, &code, &pieces(100));
            assert!(decoder.gave_up(), "{how}");
            assert!(decoder.inner().len() < 20 << 20, "{how}: {}", decoder.inner().len());
        }
    }

    #[test]
    fn what_has_come_is_read_without_waiting_for_more() {
        // Flushed, but not ended: all of it can be read.
        let plain = b"data: {\"choices\":[]}\n\n".repeat(5_000);
        let mut encoder = brotli::CompressorWriter::new(Vec::new(), 4096, 5, 22);
        encoder.write_all(&plain).unwrap();
        encoder.flush().unwrap();
        let decoder = decoded(Coding::Brotli, &encoder.get_ref().clone(), &[]);
        assert_eq!((decoder.inner().len(), decoder.gave_up()), (plain.len(), false));
    }

    #[test]
    fn windows_are_bounded() {
        let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 3).unwrap();
        encoder.window_log(26).unwrap();
        encoder.write_all(b"hello").unwrap();
        encoder.flush().unwrap();
        assert!(decoded(Coding::Zstd, &encoder.finish().unwrap(), &[]).gave_up());
        let large = brotli::enc::BrotliEncoderParams { large_window: true, lgwin: 28, ..Default::default() };
        let mut code = Vec::new();
        brotli::BrotliCompress(&mut &b"hello"[..], &mut code, &large).unwrap();
        assert!(decoded(Coding::Brotli, &code, &[]).gave_up());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn nothing_depends_on_where_the_code_is_cut(
            plain in prop::collection::vec(0u8..8, 0..5_000),
            mut cuts in prop::collection::vec(0usize..4_000, 0..12),
        ) {
            cuts.sort_unstable();
            for (how, coding) in ALL {
                let code = encoded(how, &plain);
                for cuts in [vec![], cuts.clone(), (0..code.len()).collect()] {
                    let decoder = decoded(coding, &code, &cuts);
                    prop_assert!(!decoder.gave_up(), "{}", how);
                    prop_assert_eq!(decoder.inner(), &plain, "{}", how);
                }
            }
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..600), at in 0usize..200) {
            for (how, coding) in ALL {
                decoded(coding, &bytes, &[at]);
                // And none within a code that began well.
                let mut code = encoded(how, b"Hello there, hello there, hello there");
                let at = at % code.len();
                code.splice(at.., bytes.iter().copied());
                decoded(coding, &code, &[at]);
            }
        }
    }
}
