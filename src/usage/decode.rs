//! Decodes a compressed answer to read its usage, while the compressed bytes pass to the caller unchanged.
//!
//! Bounded in memory: windows of 8 MiB for zstd, 16 MiB for Brotli, 32 KiB for the others. Bounded in work: decoding
//! stops when a piece expands too much, so that a decompression bomb costs no more than one piece.

use compression_codecs::core::util::{PartialBuffer, WriteBuffer};
use compression_codecs::zstd::params::DParameter;
use compression_codecs::{BrotliDecoder, DecodeV2, DeflateDecoder, GzipDecoder, ZlibDecoder, ZstdDecoder};
use std::io::{self, Write};

/// A piece may expand to this many times its size, plus `PIECE_ALLOWANCE`: about a millisecond of decoding.
/// Generated text compresses to a third of its size, and the JSON around it to a thirtieth.
const MAX_PIECE_EXPANSION: usize = 32;
const PIECE_ALLOWANCE: usize = 256 * 1024;
/// The whole answer may expand to this many times its size, plus `ANSWER_ALLOWANCE`.
const MAX_EXPANSION: u64 = 100;
const ANSWER_ALLOWANCE: u64 = 8 * 1024 * 1024;
/// 8 MiB, the window that RFC 8878 recommends decoders to support.
const ZSTD_WINDOW_LOG: u32 = 23;
/// Decoded bytes are passed on in pieces of this size.
const BUFFER_BYTES: usize = 8 * 1024;

/// How an answer is compressed (RFC 9110, section 8.4.1; RFC 7932; RFC 8878).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ContentCoding {
    /// `gzip` or `x-gzip`
    Gzip,
    /// `deflate`: with a zlib header or, as some servers send it, without
    Deflate,
    /// `br`
    Brotli,
    /// `zstd`
    Zstd,
}

impl ContentCoding {
    /// Reads a `content-encoding`; `None`: unknown, or more than one coding.
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

    /// The decoder of a body that begins with these bytes.
    fn decoder(self, first: u8, second: u8) -> io::Result<Box<dyn DecodeV2 + Send>> {
        // The zlib header names method 8 and is a multiple of 31 (RFC 1950, section 2.2).
        let is_zlib = first & 0x0f == 8 && u16::from_be_bytes([first, second]).is_multiple_of(31);
        // Windows of up to 1 GiB (RFC 9841): not part of `br`, but the decoder would accept them.
        let is_large_window = first & 0x7f == 0x11;
        Ok(match self {
            Self::Gzip => Box::new(GzipDecoder::new()),
            Self::Deflate if is_zlib => Box::new(ZlibDecoder::new()),
            Self::Deflate => Box::new(DeflateDecoder::new()),
            Self::Brotli if is_large_window => return Err(io::ErrorKind::Unsupported.into()),
            Self::Brotli => Box::new(BrotliDecoder::new()),
            Self::Zstd => {
                Box::new(ZstdDecoder::new_with_params(&[DParameter::window_log_max(ZSTD_WINDOW_LOG)]))
            }
        })
    }

    /// Whether a body may consist of several members or frames.
    fn has_members(self) -> bool {
        matches!(self, Self::Gzip | Self::Zstd)
    }
}

/// Decodes the pieces it is fed and writes the result to `W`.
pub struct Decoder<W> {
    coding: ContentCoding,
    /// `None` until two bytes have arrived.
    codec: Option<Box<dyn DecodeV2 + Send>>,
    /// The bytes received until `codec` was chosen.
    first_bytes: Vec<u8>,
    is_at_end: bool,
    output: W,
    received_bytes: u64,
    decoded_bytes: u64,
    /// Bytes received since decoding last produced output.
    undecoded_bytes: u64,
    has_failed: bool,
}

impl<W: Write> Decoder<W> {
    /// Decodes into `output`.
    pub fn new(coding: ContentCoding, output: W) -> Self {
        Self {
            coding,
            codec: None,
            first_bytes: Vec::new(),
            is_at_end: false,
            output,
            received_bytes: 0,
            decoded_bytes: 0,
            undecoded_bytes: 0,
            has_failed: false,
        }
    }

    /// Decodes the next piece. Invalid input, or output beyond its bound, stops decoding for the rest of the
    /// answer.
    pub fn feed(&mut self, piece: &[u8]) {
        self.received_bytes += piece.len() as u64;
        self.undecoded_bytes += piece.len() as u64;
        if self.has_failed {
            return;
        }
        let before = self.decoded_bytes;
        let for_piece =
            piece.len().saturating_mul(MAX_PIECE_EXPANSION).saturating_add(PIECE_ALLOWANCE) as u64;
        let for_answer = self.received_bytes.saturating_mul(MAX_EXPANSION).saturating_add(ANSWER_ALLOWANCE);
        let result = self.decode(piece, for_answer.min(before.saturating_add(for_piece)));
        self.has_failed = result.is_err();
        if result.is_ok() && self.decoded_bytes > before {
            self.undecoded_bytes = 0;
        }
    }

    /// Decodes a piece until `decoded_bytes` would exceed `max_decoded`.
    fn decode(&mut self, piece: &[u8], max_decoded: u64) -> io::Result<()> {
        let Self { coding, codec, first_bytes, is_at_end, output, decoded_bytes, .. } = self;
        let mut write = |decoded: &[u8]| {
            let total = *decoded_bytes + decoded.len() as u64;
            if total > max_decoded {
                return Err(io::Error::from(io::ErrorKind::FileTooLarge));
            }
            *decoded_bytes = total;
            output.write_all(decoded)
        };
        let mut buffer = [0; BUFFER_BYTES];
        first_bytes.extend_from_slice(if codec.is_none() { piece } else { &[] });
        let (codec, piece) = match (codec, first_bytes.as_slice()) {
            (Some(codec), _) => (codec, piece),
            (codec, &[first, second, ..]) => {
                (codec.insert(coding.decoder(first, second)?), first_bytes.as_slice())
            }
            _ => return Ok(()),
        };
        let mut input = PartialBuffer::new(piece);
        while !input.unwritten().is_empty() {
            if *is_at_end {
                if !coding.has_members() {
                    return Err(io::ErrorKind::InvalidData.into());
                }
                codec.reinit()?;
            }
            let mut decoded = WriteBuffer::new_initialized(&mut buffer);
            *is_at_end = codec.decode(&mut input, &mut decoded)?;
            write(decoded.written())?;
        }
        // The decoder may hold output that had no room in the buffer.
        let mut is_flushed = *is_at_end;
        while !is_flushed {
            let mut decoded = WriteBuffer::new_initialized(&mut buffer);
            is_flushed = codec.flush(&mut decoded)? && !decoded.has_no_spare_space();
            write(decoded.written())?;
        }
        first_bytes.clear();
        Ok(())
    }

    /// Ends the answer.
    ///
    /// # Errors
    /// The answer is not complete, or decoding stopped before its end.
    pub fn finish(&mut self) -> io::Result<()> {
        let mut buffer = [0; BUFFER_BYTES];
        while !self.is_complete() {
            let codec = self.codec.as_mut().filter(|_| !self.has_failed);
            let mut decoded = WriteBuffer::new_initialized(&mut buffer);
            self.is_at_end = codec.ok_or(io::ErrorKind::UnexpectedEof)?.finish(&mut decoded)?;
            if !self.is_at_end && decoded.written().is_empty() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            self.output.write_all(decoded.written())?;
        }
        Ok(())
    }

    /// Whether the answer may end here.
    pub fn is_complete(&self) -> bool {
        !self.has_failed && (self.is_at_end || self.received_bytes == 0)
    }

    /// Whether decoding stopped before the end of the answer.
    pub fn has_failed(&self) -> bool {
        self.has_failed
    }

    /// Bytes received since decoding last produced output.
    pub fn undecoded_bytes(&self) -> u64 {
        self.undecoded_bytes
    }

    /// The output.
    pub fn inner(&self) -> &W {
        &self.output
    }

    /// The output, for changes.
    pub fn inner_mut(&mut self) -> &mut W {
        &mut self.output
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use compression_codecs::brotli::params::EncoderParams;
    use compression_codecs::zstd::params::CParameter;
    use compression_codecs::{BrotliEncoder, EncodeV2, ZstdEncoder};
    use proptest::prelude::*;

    const ALL: [(&str, ContentCoding); 5] = [
        ("gzip", ContentCoding::Gzip),
        ("deflate", ContentCoding::Deflate),
        ("raw deflate", ContentCoding::Deflate),
        ("br", ContentCoding::Brotli),
        ("zstd", ContentCoding::Zstd),
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
            "br" => encoded_by(&mut BrotliEncoder::new(EncoderParams::default()), plain),
            _ => encoded_by(&mut ZstdEncoder::new(3), plain),
        }
    }

    fn encoded_by(encoder: &mut impl EncodeV2, plain: &[u8]) -> Vec<u8> {
        let mut code = vec![0; plain.len() + 1024];
        let mut output = WriteBuffer::new_initialized(&mut code);
        encoder.encode(&mut PartialBuffer::new(plain), &mut output).unwrap();
        assert!(encoder.finish(&mut output).unwrap());
        output.written().to_vec()
    }

    fn decoded(coding: ContentCoding, code: &[u8], cuts: &[usize]) -> Decoder<Vec<u8>> {
        let mut decoder = Decoder::new(coding, Vec::new());
        let mut from = 0;
        for cut in cuts.iter().copied().chain([code.len()]) {
            let cut = cut.clamp(from, code.len());
            decoder.feed(&code[from..cut]);
            from = cut;
        }
        decoder
    }

    #[test]
    fn content_codings_are_recognised_by_name() {
        for (name, coding) in [
            ("gzip", ContentCoding::Gzip),
            (" X-GZIP", ContentCoding::Gzip),
            ("Br", ContentCoding::Brotli),
            ("zstd", ContentCoding::Zstd),
        ] {
            assert_eq!(ContentCoding::named(name.as_bytes()), Some(coding));
        }
        for name in ["", "identity", "gzip, br", "compress", "brotli"] {
            assert_eq!(ContentCoding::named(name.as_bytes()), None);
        }
    }

    #[test]
    fn an_answer_that_was_cut_is_not_complete() {
        let plain: Vec<u8> = (0..9_000u32).flat_map(|n| (n / 7).to_string().into_bytes()).collect();
        for (how, coding) in ALL {
            let code = encoded(how, &plain);
            for cut in (0..code.len()).step_by(97).chain([1, 2, code.len() - 1]) {
                let mut decoder = decoded(coding, &code[..cut], &[]);
                assert_eq!(decoder.finish().is_ok(), cut == 0, "{how} {cut}");
                assert_eq!(decoder.is_complete(), cut == 0, "{how} {cut}");
            }
            let mut decoder = decoded(coding, &code, &[]);
            assert!(decoder.finish().is_ok() && decoder.is_complete() && *decoder.inner() == plain, "{how}");
            let mut broken = decoded(coding, &[&[0xff; 40], &code[..]].concat(), &[]);
            assert!(broken.finish().is_err() && !broken.is_complete(), "{how}");
        }
    }

    #[test]
    fn several_members_or_frames_are_decoded_in_a_row() {
        for (how, coding) in [("gzip", ContentCoding::Gzip), ("zstd", ContentCoding::Zstd)] {
            let code = [encoded(how, b"one "), encoded(how, b"two")].concat();
            for cuts in [vec![], (0..code.len()).collect()] {
                let decoder = decoded(coding, &code, &cuts);
                assert_eq!(
                    (decoder.inner().as_slice(), decoder.has_failed()),
                    (&b"one two"[..], false),
                    "{how}"
                );
            }
        }
    }

    #[test]
    fn output_before_a_fault_is_kept_and_later_bytes_are_counted() {
        let noise = |n: u32| n.wrapping_mul(2_654_435_761).rotate_left(n % 32);
        let letter = |n| b"abcdefghijklmnopq  \n"[noise(n) as usize % 20];
        let plain: Vec<u8> = (0..400_000).map(letter).collect();
        for (how, coding) in ALL {
            let mut code = encoded(how, &plain);
            let half = code.len() / 2;
            let whole = decoded(coding, &code[..half], &[]);
            assert!(!whole.has_failed(), "{how}: a cut is not a fault");
            assert!(whole.inner().len() > 5_000, "{how}: {}", whole.inner().len());
            code.splice(half.., (0..300_000).map(|n| noise(n).to_le_bytes()[1]));
            let broken = decoded(coding, &code, &[half]);
            assert!(broken.has_failed(), "{how}");
            assert!(
                (300_000..380_000).contains(&broken.undecoded_bytes()),
                "{how}: {}",
                broken.undecoded_bytes()
            );
            assert!(plain.starts_with(&broken.inner()[..5_000]), "{how}");
        }
    }

    #[test]
    fn a_decompression_bomb_is_decoded_only_up_to_the_bound() {
        let plain = vec![b' '; 64 << 20];
        for (how, coding) in ALL {
            let code = encoded(how, &plain);
            let pieces = |size| -> Vec<usize> { (0..code.len()).step_by(size).collect() };
            let decoder = decoded(coding, &code, &pieces(16 * 1024));
            assert!(decoder.has_failed(), "{how}");
            assert!(decoder.inner().len() <= 16 * 1024 * MAX_PIECE_EXPANSION + PIECE_ALLOWANCE, "{how}");
            // In small pieces, the bound for the whole answer stops the decoding.
            let decoder = decoded(coding, &code, &pieces(100));
            assert!(decoder.has_failed(), "{how}");
            assert!(decoder.inner().len() < 20 << 20, "{how}: {}", decoder.inner().len());
        }
    }

    #[test]
    fn flushed_bytes_are_decoded_before_the_end() {
        let plain = b"data: {\"choices\":[]}\n\n".repeat(5_000);
        let mut code = vec![0; plain.len()];
        let mut output = WriteBuffer::new_initialized(&mut code);
        let mut encoder = BrotliEncoder::new(EncoderParams::default());
        let mut input = PartialBuffer::new(plain.as_slice());
        encoder.encode(&mut input, &mut output).unwrap();
        assert!(input.unwritten().is_empty());
        assert!(encoder.flush(&mut output).unwrap());
        let decoder = decoded(ContentCoding::Brotli, output.written(), &[]);
        assert_eq!((decoder.inner().len(), decoder.has_failed()), (plain.len(), false));
    }

    #[test]
    fn windows_are_bounded() {
        let mut encoder = ZstdEncoder::new_with_params(3, &[CParameter::window_log(26)]);
        assert!(decoded(ContentCoding::Zstd, &encoded_by(&mut encoder, &vec![7; 1 << 16]), &[]).has_failed());
        // The header of a large-window stream with a window of 2^28 bytes.
        assert!(decoded(ContentCoding::Brotli, &[0x11, 28, 0, 0], &[]).has_failed());
    }

    #[test]
    fn output_larger_than_the_buffer_does_not_depend_on_cuts() {
        let plain: Vec<u8> = (0..20_000u32).flat_map(|n| (n / 7).to_string().into_bytes()).collect();
        for (how, coding) in ALL {
            let code = encoded(how, &plain);
            for step in [1, 7, 1000, code.len()] {
                let cuts: Vec<usize> = (0..code.len()).step_by(step).collect();
                let decoder = decoded(coding, &code, &cuts);
                assert!(!decoder.has_failed() && *decoder.inner() == plain, "{how} in steps of {step}");
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn output_does_not_depend_on_cuts(
            plain in prop::collection::vec(0u8..8, 0..5_000),
            mut cuts in prop::collection::vec(0usize..4_000, 0..12),
        ) {
            cuts.sort_unstable();
            for (how, coding) in ALL {
                let code = encoded(how, &plain);
                for cuts in [vec![], cuts.clone(), (0..code.len()).collect()] {
                    let decoder = decoded(coding, &code, &cuts);
                    prop_assert!(!decoder.has_failed(), "{}", how);
                    prop_assert_eq!(decoder.inner(), &plain, "{}", how);
                }
            }
        }

        #[test]
        fn no_input_causes_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..600), at in 0usize..200) {
            for (how, coding) in ALL {
                decoded(coding, &bytes, &[at]);
                // The same bytes inside a valid encoding.
                let mut code = encoded(how, b"Hello there, hello there, hello there");
                let at = at % code.len();
                code.splice(at.., bytes.iter().copied());
                decoded(coding, &code, &[at]);
            }
        }
    }
}
