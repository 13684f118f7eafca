//! The date on which a certificate expires.
//!
//! rustls checks certificates, but does not show their dates. The crates that parse X.509 bring ten others, for one date.

use crate::clock::Timestamp;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;

const INTEGER: u8 = 0x02;
const SEQUENCE: u8 = 0x30;
const UTC_TIME: u8 = 0x17;
const GENERALIZED_TIME: u8 = 0x18;
/// The tag of the version, which is optional.
const VERSION: u8 = 0xa0;

/// The date of a certificate in DER. `None`: the bytes have another form.
pub(super) fn of(certificate: &[u8]) -> Option<Timestamp> {
    let (signed, _) = value(certificate, SEQUENCE)?;
    let (mut content, _) = value(signed, SEQUENCE)?;
    if content.first() == Some(&VERSION) {
        content = value(content, VERSION)?.1;
    }
    // Serial number, signature algorithm, issuer.
    for tag in [INTEGER, SEQUENCE, SEQUENCE] {
        content = value(content, tag)?.1;
    }
    let (validity, _) = value(content, SEQUENCE)?;
    let (_, not_after) = date(validity)?;
    date(not_after)?.0
}

/// The date at the beginning of some bytes, and the bytes after it.
fn date(bytes: &[u8]) -> Option<(Option<Timestamp>, &[u8])> {
    let tag = *bytes.first()?;
    let (text, rest) = value(bytes, tag)?;
    let text = std::str::from_utf8(text).ok()?.strip_suffix('Z')?;
    let text = match tag {
        // Years from 50 on are of the last century (RFC 5280).
        UTC_TIME if text >= "50" => format!("19{text}"),
        UTC_TIME => format!("20{text}"),
        GENERALIZED_TIME => text.to_owned(),
        _ => return None,
    };
    let moment = DateTime::strptime("%Y%m%d%H%M%S", text).and_then(|date| TimeZone::UTC.to_timestamp(date));
    Some((moment.ok().map(|moment| Timestamp(moment.as_millisecond())), rest))
}

/// The content of the value at the beginning of some bytes, and the bytes after it. `None`: it has another tag, or its
/// length is wrong.
fn value(bytes: &[u8], tag: u8) -> Option<(&[u8], &[u8])> {
    let [first, length, rest @ ..] = bytes else { return None };
    if *first != tag {
        return None;
    }
    let (length, rest) = match length {
        ..=0x7f => (usize::from(*length), rest),
        0x81..=0x84 => {
            let (digits, rest) = rest.split_at_checked(usize::from(length - 0x80))?;
            (digits.iter().fold(0, |number, &digit| number << 8 | usize::from(digit)), rest)
        }
        _ => return None,
    };
    rest.split_at_checked(length)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_date_of_a_certificate_is_read() {
        for (year, month, day) in [(2027, 3, 1), (2049, 12, 31), (2050, 1, 1), (4096, 1, 1)] {
            let mut params = rcgen::CertificateParams::new(["localhost".to_owned()]).unwrap();
            params.not_after = rcgen::date_time_ymd(year, month, day);
            let key = rcgen::KeyPair::generate().unwrap();
            let der = params.self_signed(&key).unwrap().der().to_vec();
            let expires = of(&der).unwrap().to_rfc3339();
            assert_eq!(expires, format!("{year}-{month:02}-{day:02}T00:00:00Z"));
            // Cut or changed bytes do not panic.
            for end in 0..der.len() {
                let _ = of(&der[..end]);
            }
            for at in 0..der.len().min(200) {
                let mut other = der.clone();
                other[at] ^= 0xff;
                let _ = of(&other);
            }
        }
    }
}
