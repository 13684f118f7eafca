//! Parsers of amounts, durations and sizes.

use std::time::Duration;

/// Words for periods, with their lengths in milliseconds. A month of a rolling window has 30 days.
pub(super) const PERIOD_WORDS: &[(&str, u64)] = &[
    ("second", 1_000),
    ("minute", 60_000),
    ("hour", 3_600_000),
    ("day", 86_400_000),
    ("week", 604_800_000),
    ("month", 2_592_000_000),
];

/// Parses `1500`, `1_500`, `200k`, `1.5M` or `2G`. The result must be a whole number.
pub(crate) fn amount(text: &str) -> Option<u64> {
    let (digits, factor) = match text.as_bytes().last()? {
        b'k' | b'K' => (&text[..text.len() - 1], 1_000),
        b'M' => (&text[..text.len() - 1], 1_000_000),
        b'G' => (&text[..text.len() - 1], 1_000_000_000),
        _ => (text, 1),
    };
    scaled(digits, factor)
}

/// Parses `500ms`, `30s`, `5m`, `1h`, `1d`, one of [`PERIOD_WORDS`], or `0`.
pub(crate) fn duration(text: &str) -> Option<Duration> {
    if let Some(&(_, ms)) = PERIOD_WORDS.iter().find(|(word, _)| *word == text) {
        return Some(Duration::from_millis(ms));
    }
    if text == "0" {
        return Some(Duration::ZERO);
    }
    let split = text.find(|c: char| c.is_ascii_alphabetic())?;
    let (digits, unit) = text.split_at(split);
    let ms = match unit {
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => return None,
    };
    scaled(digits, ms).filter(|&ms| ms <= MAX_DURATION_MS).map(Duration::from_millis)
}

/// Maximum duration: a thousand years. A longer one is a mistake.
const MAX_DURATION_MS: u64 = 1_000 * 366 * 86_400_000;

/// Parses `512KiB`, `32MiB`, `1GiB`, `10MB` or a number of bytes.
pub(super) fn size(text: &str) -> Option<usize> {
    let split = text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len());
    let (digits, unit) = text.split_at(split);
    let factor = match unit {
        "" | "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        "kB" | "KB" => 1_000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        _ => return None,
    };
    usize::try_from(scaled(digits.trim_end(), factor)?).ok()
}

/// Returns a decimal number times a factor, if the product is a whole number.
fn scaled(digits: &str, factor: u64) -> Option<u64> {
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, "0"));
    let is_number = |s: &str| {
        s.bytes().all(|b| b.is_ascii_digit() || b == b'_')
            && s.as_bytes().first().is_some_and(u8::is_ascii_digit)
            && s.as_bytes().last().is_some_and(u8::is_ascii_digit)
    };
    if !is_number(whole) || !is_number(fraction) {
        return None;
    }
    let whole: u64 = whole.replace('_', "").parse().ok()?;
    // Trailing zeros do not change the value, but many of them would overflow `scale`.
    let fraction = fraction.replace('_', "").trim_end_matches('0').to_owned();
    let scale = 10_u64.checked_pow(u32::try_from(fraction.len()).ok()?)?;
    let part = format!("0{fraction}").parse::<u64>().ok()?.checked_mul(factor)?;
    if part % scale != 0 {
        return None;
    }
    whole.checked_mul(factor)?.checked_add(part / scale)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_are_whole_decimal_numbers() {
        for (text, want) in [
            ("1500", Some(1_500)),
            ("1_500", Some(1_500)),
            ("200k", Some(200_000)),
            ("1.5M", Some(1_500_000)),
            ("2G", Some(2_000_000_000)),
            ("0", Some(0)),
            ("1.5", None),
            ("1.0001k", None),
            ("-1", None),
            ("+1", None),
            ("1e3", None),
            ("", None),
            ("k", None),
            ("1m", None),
            ("1_", None),
            ("1._5M", None),
            (".5M", None),
            ("1.M", None),
            ("007", Some(7)),
            ("1.0", Some(1)),
            ("1.50000000000000000000000000G", Some(1_500_000_000)),
            ("0.0000000000000000001G", None),
            ("18446744073709551616", None),
            ("18446744073709551615k", None),
        ] {
            assert_eq!(amount(text), want, "{text}");
        }
    }

    #[test]
    fn durations_need_a_unit() {
        for (text, want) in [
            ("500ms", Some(500)),
            ("30s", Some(30_000)),
            ("1.5s", Some(1_500)),
            ("5m", Some(300_000)),
            ("1d", Some(86_400_000)),
            ("minute", Some(60_000)),
            ("0", Some(0)),
            ("30", None),
            ("s", None),
            ("1y", None),
            ("-1s", None),
            ("99999999999d", None),
        ] {
            assert_eq!(duration(text).map(|d| d.as_millis()), want, "{text}");
        }
    }

    #[test]
    fn sizes_have_binary_or_decimal_units() {
        for (text, want) in [
            ("512KiB", Some(524_288)),
            ("32MiB", Some(33_554_432)),
            ("1MB", Some(1_000_000)),
            ("100", Some(100)),
            ("1 MiB", Some(1 << 20)),
            ("1Mi", None),
        ] {
            assert_eq!(size(text), want, "{text}");
        }
    }
}
