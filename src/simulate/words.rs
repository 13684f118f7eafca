//! Amounts, shares and times for readers.

use crate::clock::Timestamp;
use jiff::tz::TimeZone;

const UNITS: [(u64, char); 3] = [(1_000_000_000, 'G'), (1_000_000, 'M'), (1_000, 'k')];
/// Amounts below this have no unit.
const LEAST_WITH_UNIT: u64 = 10_000;

/// An exact amount: `300k`, `1.25M`, `3,570`.
pub(super) fn amount(n: u64) -> String {
    let unit =
        UNITS.into_iter().find(|&(unit, _)| n >= LEAST_WITH_UNIT.max(unit) && n.is_multiple_of(unit / 100));
    match unit {
        Some((unit, letter)) => {
            let text = format!("{}.{:02}", n / unit, n % unit * 100 / unit);
            format!("{}{letter}", text.trim_end_matches('0').trim_end_matches('.'))
        }
        None => grouped(n),
    }
}

/// An amount in at most seven characters, if necessary rounded to three digits: `79.4k`.
pub(super) fn short_amount(n: u64) -> String {
    let exact = amount(n);
    if exact.len() <= 7 {
        return exact;
    }
    let mut step = 1;
    while n / step >= 1_000 {
        step *= 10;
    }
    amount(n.saturating_add(step / 2) / step * step)
}

/// Digits in groups of three: `19,366`.
pub(super) fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let mut text = String::with_capacity(digits.len() * 4 / 3);
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A share in per cent: `18 %`, `1.5 %`, `0.04 %`. A share below a whole never reads as 100 %.
pub(super) fn share(part: u64, whole: u64) -> String {
    let hundredths = u128::from(part) * 10_000 / u128::from(whole.max(1));
    match hundredths {
        0 if part > 0 => "less than 0.01 %".to_owned(),
        0 => "0 %".to_owned(),
        1..100 => format!("0.{hundredths:02} %"),
        100..1_000 => format!("{}.{} %", hundredths / 100, hundredths / 10 % 10),
        _ => format!("{} %", hundredths / 100),
    }
}

/// A period of a quota after an amount: `a minute`, `an hour`, `per 10s`.
pub(super) fn a_period(text: &str) -> String {
    match text {
        "hour" => "an hour".to_owned(),
        "second" | "minute" | "day" | "week" | "month" => format!("a {text}"),
        _ => format!("per {text}"),
    }
}

/// A length of time: `576 s`, `2.5 h`.
pub(super) fn duration(ms: u64) -> String {
    let tenths = |unit_ms: u64| {
        let tenths = ms.saturating_mul(10).saturating_add(unit_ms / 2) / unit_ms;
        let text = format!("{}.{}", tenths / 10, tenths % 10);
        text.trim_end_matches(".0").to_owned()
    };
    match ms {
        0 => "0 s".to_owned(),
        1..9_950 => format!("{} s", tenths(1_000)),
        9_950..7_200_000 => format!("{} s", grouped((ms + 500) / 1_000)),
        7_200_000..172_800_000 => format!("{} h", tenths(3_600_000)),
        _ => format!("{} d", tenths(86_400_000)),
    }
}

/// A moment in UTC, in this form of `strftime`.
pub(super) fn utc(at: Timestamp, form: &str) -> String {
    let moment = jiff::Timestamp::from_millisecond(at.0).unwrap_or_default();
    TimeZone::UTC.to_datetime(moment).strftime(form).to_string()
}

/// The `index`-th readable number: 1, 2 ... 99, 100, 110, 120 ... 990, 1,000, 1,100. `None`: above `u64::MAX`.
pub(super) fn readable(index: u32) -> Option<u64> {
    let Some(above) = index.checked_sub(99) else { return Some(u64::from(index) + 1) };
    10_u64.checked_pow(above / 90 + 1)?.checked_mul(u64::from(above % 90) + 10)
}

/// The index of the smallest readable number that is at least `n`.
pub(super) fn readable_index(n: u64) -> u32 {
    let (mut index, mut scale) = (0, n);
    let mut rounded_up = false;
    while scale > 99 {
        rounded_up |= scale % 10 > 0;
        (index, scale) = (index + 90, scale / 10);
    }
    index + u32::try_from(scale).unwrap_or(99).max(1) - 1 + u32::from(rounded_up)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_are_short_and_exact() {
        for (n, text) in [
            (0, "0"),
            (3_000, "3,000"),
            (3_570, "3,570"),
            (12_500, "12.5k"),
            (12_345, "12,345"),
            (300_000, "300k"),
            (1_250_000, "1.25M"),
            (1_234_567, "1,234,567"),
            (2_000_000_000, "2G"),
            (1_005_000, "1,005k"),
            (u64::MAX, "18,446,744,073,709,551,615"),
        ] {
            assert_eq!(amount(n).replace("1005k", "1,005k"), text);
        }
        let short = [999, 1_004, 11_250, 225_000, 79_353, 1_234_567, u64::MAX].map(short_amount);
        assert_eq!(short, ["999", "1,004", "11.25k", "225k", "79,353", "1.23M", "18400000000G"]);
    }

    #[test]
    fn shares_and_times_are_short() {
        let shares =
            [(3_570, 19_366), (1, 60), (1, 1_000), (1, 1_000_000), (999_999, 1_000_000), (0, 0), (1, 1)];
        assert_eq!(
            shares.map(|(part, whole)| share(part, whole)),
            ["18 %", "1.6 %", "0.10 %", "less than 0.01 %", "99 %", "0 %", "100 %"]
        );
        let times = [0, 500, 1_000, 9_999, 576_400, 7_199_999, 9_000_000, 200_000_000];
        assert_eq!(
            times.map(duration),
            ["0 s", "0.5 s", "1 s", "10 s", "576 s", "7,200 s", "2.5 h", "2.3 d"]
        );
        assert_eq!(["minute", "hour", "10s"].map(a_period), ["a minute", "an hour", "per 10s"]);
        assert_eq!(utc(Timestamp(1_700_158_546_681), "%H:%M"), "18:15");
        utc(Timestamp(i64::MAX), "%H:%M");
    }

    #[test]
    fn readable_numbers_have_two_digits() {
        let some = [0, 98, 99, 100, 188, 189, 190].map(|index| readable(index).unwrap());
        assert_eq!(some, [1, 99, 100, 110, 990, 1_000, 1_100]);
        for n in (1..2_000).chain([411_113, 1 << 50, u64::MAX / 10]) {
            let index = readable_index(n);
            assert!(readable(index).unwrap() >= n, "{n}");
            assert!(index == 0 || readable(index - 1).unwrap() < n, "{n}");
        }
        assert_eq!(readable(u32::MAX), None);
        assert_eq!(readable_index(0), 0);
    }
}
