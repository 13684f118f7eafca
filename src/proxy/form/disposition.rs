//! The name of a part of a form, by its `content-disposition` (RFC 7578, section 4.2).

use crate::body::BodyFault;
use http::header::{CONTENT_DISPOSITION, HeaderMap};
use memchr::memmem;
use std::borrow::Cow;

/// The name of a part.
///
/// # Errors
/// The part has no name, or parsers could read different ones.
pub(super) fn field_name(headers: &HeaderMap) -> Result<Cow<'_, str>, BodyFault> {
    let mut lines = headers.get_all(CONTENT_DISPOSITION).iter();
    let (Some(line), None) = (lines.next(), lines.next()) else {
        return Err(fault("has a part without a content-disposition, or with two"));
    };
    let line = line.as_bytes().trim_ascii();
    let end = memchr::memchr(b';', line).unwrap_or(line.len());
    if !line[..end].trim_ascii_end().eq_ignore_ascii_case(b"form-data") {
        return Err(fault("has a part that is not form-data"));
    }
    let (mut name, mut rest) = (None, &line[end..]);
    while let Some(parameter) = next_parameter(&mut rest)? {
        let is_file_name =
            [&b"filename"[..], b"filename*"].iter().any(|known| parameter.name.eq_ignore_ascii_case(known));
        let has_name = memmem::find(&parameter.name.to_ascii_lowercase(), b"name").is_some();
        if is_file_name || !has_name {
            continue;
        }
        // `name*` is decoded by some parsers and ignored by others. Some search for `name=` anywhere, and find it in `xname=`.
        if parameter.name != b"name" || parameter.has_escapes || name.replace(parameter.value).is_some() {
            return Err(fault("has a part whose name is given twice or in an unusual spelling"));
        }
    }
    let name = name.and_then(|name| std::str::from_utf8(name).ok());
    name.map(Cow::Borrowed).ok_or_else(|| fault("has a part without a name"))
}

fn fault(what: &str) -> BodyFault {
    BodyFault::Invalid(what.to_owned())
}

/// One parameter of a header. The value has no quotes around it.
struct Parameter<'h> {
    name: &'h [u8],
    value: &'h [u8],
    /// Whether there is a backslash in the value.
    has_escapes: bool,
}

/// Removes the next parameter, and the semicolon in front of it. `None`: there is none.
fn next_parameter<'h>(line: &mut &'h [u8]) -> Result<Option<Parameter<'h>>, BodyFault> {
    let invalid = || fault("has a part whose content-disposition is not valid");
    let Some(rest) = line.strip_prefix(b";") else {
        return if line.is_empty() { Ok(None) } else { Err(invalid()) };
    };
    let rest = rest.trim_ascii_start();
    let equals = memchr::memchr(b'=', rest).ok_or_else(invalid)?;
    let (name, rest) = (rest[..equals].trim_ascii(), rest[equals + 1..].trim_ascii_start());
    if name.is_empty() || name.iter().any(|b| !b.is_ascii_graphic() || b"\"();,/:<>@[]?{}\\".contains(b)) {
        return Err(invalid());
    }
    let (value, rest, has_escapes) = if let Some(quoted) = rest.strip_prefix(b"\"") {
        let mut at = 0;
        while quoted.get(at).is_some_and(|&b| b != b'"') {
            at += 1 + usize::from(quoted[at] == b'\\');
        }
        let after = quoted.get(at + 1..).ok_or_else(invalid)?;
        (&quoted[..at], after, quoted[..at].contains(&b'\\'))
    } else {
        let end = memchr::memchr(b';', rest).unwrap_or(rest.len());
        let value = rest[..end].trim_ascii_end();
        if value.iter().any(|b| b.is_ascii_whitespace() || matches!(b, b'"' | b'\\')) {
            return Err(invalid());
        }
        (value, &rest[end..], false)
    };
    *line = rest.trim_ascii_start();
    Ok(Some(Parameter { name, value, has_escapes }))
}

/// Whether some parser could read `name` as `expected`, which is in lower case: in another case, percent-encoded, with
/// quotes or white space around it, or as a list.
pub(super) fn resembles(name: &str, expected: &str) -> bool {
    let decoded = crate::proxy::query::decoded(name);
    let folded: String =
        decoded.chars().filter(|c| c.is_alphanumeric()).flat_map(char::to_lowercase).collect();
    folded == expected
}
