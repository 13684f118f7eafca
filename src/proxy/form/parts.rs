//! Checks where the parts of a form begin and end, before it is parsed. Parsers differ in what they take for the beginning
//! of a part. A form is refused if some of them could find other parts in it.

use super::ambiguous;
use crate::body::BodyFault;
use memchr::memmem;

/// The longest head of a part.
const MAX_HEAD_BYTES: usize = 16 * 1024;
/// The most parts of a form.
const MAX_PARTS: usize = 10_000;
/// Headers of which parsers use the first or the last one if a part has two.
const HEADERS: [&[u8]; 3] = [b"content-disposition", b"content-type", b"content-transfer-encoding"];

/// Refuses a form whose parts are not certain. It takes linear time.
pub(super) fn check(body: &[u8], boundary: &str) -> Result<(), BodyFault> {
    let delimiter = format!("--{boundary}");
    let finder = memmem::Finder::new(&delimiter);
    let (mut from, mut parts) = (0, 0);
    // The data of a part ends with a line end in front of a delimiter. The one at the end of a head is another one.
    let mut data = 0;
    while let Some(at) = finder.find(&body[from..]).map(|found| from + found) {
        let rest = &body[at + delimiter.len()..];
        if rest.starts_with(b"--") {
            // Some parsers end here, wherever it is, and others read on.
            return match finder.find(rest) {
                Some(_) => Err(ambiguous("has parts after the end of the form")),
                None => Ok(()),
            };
        }
        from = at + delimiter.len();
        let begins_line = match body[..at] {
            [] | [.., b'\r', b'\n'] => true,
            [.., b'\r' | b'\n'] => return Err(ambiguous("has a delimiter with an unusual line end")),
            _ => false,
        };
        if !begins_line && parts > 0 {
            continue;
        }
        // Some parsers take the first delimiter wherever it is, and white space behind a delimiter.
        if !begins_line || !rest.starts_with(b"\r\n") {
            return Err(ambiguous("has a delimiter that is not a line of its own"));
        }
        if parts > 0 && at < data + 2 {
            return Err(ambiguous("has a part without a line end behind its head"));
        }
        parts += 1;
        if parts > MAX_PARTS {
            return Err(ambiguous("has too many parts"));
        }
        let head = &rest[2..];
        let window = &head[..head.len().min(MAX_HEAD_BYTES)];
        let length =
            memmem::find(window, b"\r\n\r\n").ok_or_else(|| ambiguous("has a part without a head"))?;
        check_head(&head[..length], delimiter.as_bytes())?;
        data = from + 2 + length + 4;
        from = data;
    }
    Ok(())
}

/// Refuses a head that parsers read differently.
fn check_head(head: &[u8], delimiter: &[u8]) -> Result<(), BodyFault> {
    let mut seen = [false; HEADERS.len()];
    for line in head.split(|&b| b == b'\n') {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        let name = line[..memchr::memchr(b':', line).unwrap_or(0)].trim_ascii();
        let header = HEADERS.iter().position(|header| name.eq_ignore_ascii_case(header));
        if header.is_some_and(|header| std::mem::replace(&mut seen[header], true)) {
            return Err(ambiguous("has a part with a header twice"));
        }
        if line.starts_with(delimiter) {
            return Err(ambiguous("has a part without an end of its head"));
        }
    }
    // The last line of the head ends with the empty line.
    let line_ends = memchr::memchr_iter(b'\n', head).count();
    if memchr::memchr_iter(b'\r', head).count() != line_ends
        || memmem::find_iter(head, b"\r\n").count() != line_ends
    {
        return Err(ambiguous("has a line end in a head that is not CR and LF"));
    }
    Ok(())
}
