//! One complete request head.

use super::HeadRules;
use memchr::{Memchr, memchr, memchr_iter};

/// Why a target is refused that names neither a path nor a URL.
pub(crate) const NOT_A_TARGET: &str = "its target is neither a path nor a URL";
/// Some servers read an underscore as a dash.
pub(crate) const AMBIGUOUS_NAME: &str =
    "a header has an underscore in the name Content-Length or Transfer-Encoding";
/// Why a head is refused that frames its body twice.
pub(crate) const SEVERAL_FRAMINGS: &str = "it has more than one Content-Length or Transfer-Encoding header";

/// How the body after a head is framed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Framing {
    None,
    Length(u64),
    Chunked,
}

/// The headers that decide where a request goes and where it ends.
#[derive(Default)]
struct Governing<'h> {
    host: Option<&'h [u8]>,
    length: Option<&'h [u8]>,
    coding: Option<&'h [u8]>,
}

/// Checks a head with the empty line at its end.
///
/// # Errors
/// The reason why it is refused.
pub(super) fn check(head: &[u8], rules: HeadRules) -> Result<Framing, &'static str> {
    check_bytes(head)?;
    let mut lines = Lines::of(head);
    let request = RequestLine::parse(lines.next()?)?;
    let mut governing = Governing::default();
    loop {
        let line = lines.next()?;
        if line.is_empty() {
            break;
        }
        governing.read(line)?;
    }
    let host = request.check_host(governing.host, rules.requires_host)?;
    request.check_target(host, rules.scheme)?;
    let framing = governing.framing(request.is_http_10)?;
    if request.method == b"TRACE" && !matches!(framing, Framing::None | Framing::Length(0)) {
        return Err("a TRACE request has no body");
    }
    Ok(framing)
}

/// Refuses control characters. Carriage returns and line feeds are left to `next_line`.
pub(super) fn check_bytes(head: &[u8]) -> Result<(), &'static str> {
    // Without an early exit the compiler checks many bytes at once.
    #[allow(clippy::needless_bitwise_bool)]
    let is_control = |b: u8| (b < b' ') & (b != b'\r') & (b != b'\n') & (b != b'\t') | (b == 0x7f);
    if head.iter().fold(false, |found, &b| found | is_control(b)) {
        return Err("it contains a control character");
    }
    Ok(())
}

/// The lines of a head.
struct Lines<'h> {
    head: &'h [u8],
    ends: Memchr<'h>,
    /// Where the next line begins.
    begin: usize,
    /// Whether there are as many CRs as LFs. If each line ends with both, no line contains another CR.
    has_equal_ends: bool,
}

impl<'h> Lines<'h> {
    fn of(head: &'h [u8]) -> Self {
        let has_equal_ends = memchr_iter(b'\r', head).count() == memchr_iter(b'\n', head).count();
        Self { head, ends: memchr_iter(b'\n', head), begin: 0, has_equal_ends }
    }

    /// The next line, without its end. After the last one, lines are not complete.
    fn next(&mut self) -> Result<&'h [u8], &'static str> {
        let end = self.ends.next().unwrap_or(self.head.len());
        let line = self.head.get(self.begin..end).unwrap_or_default();
        let line = line.strip_suffix(b"\r").ok_or("a line does not end with CR and LF")?;
        if !self.has_equal_ends && memchr(b'\r', line).is_some() {
            return Err("it contains a CR that no LF follows");
        }
        self.begin = end + 1;
        Ok(line)
    }
}

struct RequestLine<'h> {
    method: &'h [u8],
    target: &'h [u8],
    is_http_10: bool,
}

impl<'h> RequestLine<'h> {
    fn parse(line: &'h [u8]) -> Result<Self, &'static str> {
        let mut words = line.split(|&b| b == b' ');
        let (Some(method), Some(target), Some(version), None) =
            (words.next(), words.next(), words.next(), words.next())
        else {
            return Err("its first line is not a method, a target and a version with one space between them");
        };
        let is_http_10 = match version {
            b"HTTP/1.1" => false,
            b"HTTP/1.0" => true,
            _ => return Err("its version is neither HTTP/1.1 nor HTTP/1.0"),
        };
        if target.iter().any(|&b| b == b'\t' || b == b'#') {
            return Err("its target contains a tab or a fragment");
        }
        Ok(Self { method, target, is_http_10 })
    }

    /// The host that the request names. HTTP/1.0 allows a request to name none.
    fn check_host(
        &self,
        host: Option<&'h [u8]>,
        is_required: bool,
    ) -> Result<Option<&'h [u8]>, &'static str> {
        match host {
            None if self.is_http_10 || !is_required => Ok(None),
            Some(b"") if !is_required => Ok(None),
            None => Err("it has no Host header"),
            Some(host) if is_host(host) => Ok(Some(host)),
            Some(_) => Err("its Host header is not a host name or address with an optional port"),
        }
    }

    /// A target is a path, or a whole URL of the host that `Host` names too.
    fn check_target(&self, host: Option<&[u8]>, scheme: &str) -> Result<(), &'static str> {
        if self.target.starts_with(b"/") || self.target == b"*" && self.method == b"OPTIONS" {
            return Ok(());
        }
        let Some(at) = memchr::memmem::find(self.target, b"://") else {
            return Err(NOT_A_TARGET);
        };
        if !self.target[..at].eq_ignore_ascii_case(scheme.as_bytes()) {
            return Err("its target has a scheme that the gateway does not serve");
        }
        let authority = &self.target[at + 3..];
        let end = authority.iter().position(|&b| b == b'/' || b == b'?').unwrap_or(authority.len());
        let authority = &authority[..end];
        if !is_host(authority) || host.is_some_and(|host| !authority.eq_ignore_ascii_case(host)) {
            return Err("the host in its target differs from its Host header");
        }
        Ok(())
    }
}

impl<'h> Governing<'h> {
    /// Reads one header line.
    fn read(&mut self, line: &'h [u8]) -> Result<(), &'static str> {
        if matches!(line[0], b' ' | b'\t') {
            return Err("a line begins with white space");
        }
        // Names are short: a search by vectors begins more slowly.
        let Some(colon) = line.iter().position(|&b| b == b':') else { return Err("a header has no colon") };
        let (name, value) = (&line[..colon], &line[colon + 1..]);
        let slot = match name.len() {
            4 if name.eq_ignore_ascii_case(b"host") => &mut self.host,
            14 if is_spelling_of(name, b"content-length") => &mut self.length,
            17 if is_spelling_of(name, b"transfer-encoding") => &mut self.coding,
            _ => return Ok(()),
        };
        if memchr(b'_', name).is_some() {
            return Err(AMBIGUOUS_NAME);
        }
        if slot.replace(value.trim_ascii()).is_some() {
            return Err(match name.len() {
                4 => "it has more than one Host header",
                _ => SEVERAL_FRAMINGS,
            });
        }
        Ok(())
    }

    fn framing(&self, is_http_10: bool) -> Result<Framing, &'static str> {
        match (self.length, self.coding) {
            (None, None) => Ok(Framing::None),
            (Some(_), Some(_)) => Err("it has both Content-Length and Transfer-Encoding"),
            (None, Some(_)) if is_http_10 => Err("HTTP/1.0 has no Transfer-Encoding"),
            (None, Some(coding)) if coding.eq_ignore_ascii_case(b"chunked") => Ok(Framing::Chunked),
            (None, Some(_)) => Err("its Transfer-Encoding is not 'chunked' alone"),
            (Some(length), None) => {
                decimal(length).map(Framing::Length).ok_or("its Content-Length is not a number")
            }
        }
    }
}

/// Whether this is the name of a header that frames a body, with an underscore.
pub(crate) fn is_ambiguous_name(name: &[u8]) -> bool {
    let names = [&b"content-length"[..], b"transfer-encoding"];
    name.contains(&b'_') && names.iter().any(|of| of.len() == name.len() && is_spelling_of(name, of))
}

/// `expected` is as long as `name`.
fn is_spelling_of(name: &[u8], expected: &[u8]) -> bool {
    let is_same = |(&a, &b): (&u8, &u8)| a.eq_ignore_ascii_case(&b) || a == b'_' && b == b'-';
    name.iter().zip(expected).all(is_same)
}

fn decimal(digits: &[u8]) -> Option<u64> {
    if digits.is_empty() {
        return None;
    }
    digits.iter().try_fold(0_u64, |number, &digit| {
        let digit = digit.is_ascii_digit().then(|| digit - b'0')?;
        number.checked_mul(10)?.checked_add(u64::from(digit))
    })
}

/// Whether this is a host name or an address with an optional port. Names with characters that no DNS name has are
/// refused, although RFC 3986 allows some of them.
pub(crate) fn is_host(host: &[u8]) -> bool {
    let (name, port) = if let Some(rest) = host.strip_prefix(b"[") {
        let Some(end) = memchr(b']', rest) else { return false };
        let is_address =
            std::str::from_utf8(&rest[..end]).is_ok_and(|a| a.parse::<std::net::Ipv6Addr>().is_ok());
        if !is_address {
            return false;
        }
        (None, &rest[end + 1..])
    } else {
        let end = memchr(b':', host).unwrap_or(host.len());
        (Some(&host[..end]), &host[end..])
    };
    let is_name = |name: &[u8]| {
        !name.is_empty()
            && name.iter().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_' | b'~'))
    };
    let is_port = match port.strip_prefix(b":") {
        None => port.is_empty(),
        Some(digits) => digits.is_empty() || decimal(digits).is_some_and(|port| u16::try_from(port).is_ok()),
    };
    is_port && name.is_none_or(is_name)
}
